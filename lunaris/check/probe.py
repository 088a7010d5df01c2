"""What the processes of a check look at: `python -m lunaris.check.probe DIR`.

DIR is a folder with the frozen config, into which the items are written.
"""

from __future__ import annotations

import platform
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from lunaris.check.communication import communication_looks
from lunaris.check.group import Looks, look_in_processes
from lunaris.check.item import FAIL, OK, Item
from lunaris.check.kernels import kernel_looks
from lunaris.check.machine import usable_gpus
from lunaris.config.schema.root import Config
from lunaris.distributed import collectives, preflight, session
from lunaris.precision import Precision

MODULE = "lunaris.check.probe"
# Of a GPU's memory, below which something else holds some; this process's own context is small.
_FREE_SHARE = 0.9


def looks(cfg: Config, path: Path, stack: ExitStack) -> Looks:
    """Return what every process looks at, by the name of its item."""
    return {
        "device": partial(_device, cfg),
        "product": _product,
        **kernel_looks(cfg),
        **communication_looks(),
    }


def _device(cfg: Config) -> Item:
    device = session.device()
    if device.type == "cpu":
        gpus = usable_gpus(cfg)
        if gpus:
            text = (
                f"torch {torch.__version__} sees no CUDA device, but this machine has {gpus}; "
                "install a torch for CUDA, or a driver that is new enough for it"
            )
            return Item("device", FAIL, text)
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
    figures = {
        "name": made.name, "capability": capability, "free_gb": free / 1e9, "total_gb": total / 1e9
    }  # fmt: skip
    better: tuple[str, ...] = ()
    if free < _FREE_SHARE * total:
        better = (
            f"nvidia-smi: it names what holds {(total - free) / 1e9:.1f} GB of this GPU; end that, "
            "or choose others by CUDA_VISIBLE_DEVICES",
        )
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if cfg.trainer.precision == "fp32" and bf16:
        better += ("trainer.precision=bf16: this GPU computes it several times as fast as fp32",)
    if cfg.trainer.precision == "bf16" and not bf16:
        better += ("trainer.precision=fp16: this GPU only emulates bf16",)
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
    sys.exit(look_in_processes(Path(sys.argv[1]), MODULE, looks))
