"""What the processes of a check look at: `python -m lunaris.check.probe DIR`.

DIR is a folder with the frozen config. Rank 0 writes what was found to `items.json` in it.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from lunaris.atomic_files import write_json
from lunaris.check.communication import communication_items
from lunaris.check.item import FAIL, OK, Item
from lunaris.check.kernels import kernel_items
from lunaris.config.schema.root import Config
from lunaris.distributed import collectives, preflight, session
from lunaris.errors import EXPECTED
from lunaris.launch.local import threads_each
from lunaris.precision import Precision
from lunaris.runs.run_dir import RunDir

ITEMS = "items.json"
MODULE = "lunaris.check.probe"


def main(path: Path) -> int:
    """Look, as one of the processes, or start them; return the exit code."""
    cfg: Config = RunDir(path).read_config()
    processes = cfg.launch.world_size()
    if "RANK" not in os.environ and processes > 1:
        from lunaris.launch.elastic import run_group

        os.environ.setdefault("OMP_NUM_THREADS", str(threads_each(processes)))
        return run_group(path, processes, 0, cfg.launch.collective_timeout_s, module=MODULE)
    try:
        with session.join(cfg.trainer.device, cfg.launch.collective_timeout_s):
            items = look(cfg)
            if session.rank() == 0:
                write_json(path / ITEMS, {"items": [item.as_dict() for item in items]})
            collectives.barrier()
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def look(cfg: Config) -> list[Item]:
    """Return what the processes found; every one of an open session calls this."""
    return [_device(cfg), _product(), *communication_items(), *kernel_items(cfg)]


def _device(cfg: Config) -> Item:
    device = session.device()
    if device.type == "cpu":
        level = torch.backends.cpu.get_cpu_capability()
        text = f"CPU {_processor()}, {level}, {torch.get_num_threads()} threads a process"
        advice: tuple[str, ...] = ()
        if Precision(cfg.trainer.precision, device).emulated:
            advice = ("trainer.precision=fp32: this processor only emulates the chosen one",)
        return Item("device", OK, text, {"capability": level}, advice)
    made = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    capability = f"{made.major}.{made.minor}"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    text = (
        f"{made.name}, compute capability {capability}, {free / 1e9:.1f} of {total / 1e9:.1f} GB "
        f"free, CUDA {torch.version.cuda}, NCCL {nccl}"
    )
    figures = {"name": made.name, "capability": capability, "free_gb": free / 1e9}
    better: tuple[str, ...] = ()
    if cfg.trainer.precision == "fp32" and torch.cuda.is_bf16_supported(including_emulation=False):
        better = ("trainer.precision=bf16: this GPU computes it several times as fast as fp32",)
    return Item("device", OK, text, figures, better)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _product() -> Item:
    error, tflops = preflight.check_product(session.device())
    found = collectives.gather_objects((error, tflops))
    wrong = [f"rank {rank}: {said}" for rank, (said, _) in enumerate(found) if said]
    speeds = [speed for _, speed in found]
    figures = {"tflops": speeds}
    if wrong:
        return Item("product", FAIL, "; ".join(wrong), figures)
    low, high = min(speeds), max(speeds)
    shown = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    kind = "bf16" if session.device().type == "cuda" else "fp32"
    return Item("product", OK, f"exact, {shown} TFLOP/s in {kind}", figures)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
