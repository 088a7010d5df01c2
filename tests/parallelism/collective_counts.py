"""Count the collectives of one optimizer step at four processes, where torch issues them.

`python tests/parallelism/collective_counts.py` replaces `tests/golden/collectives.json` and prints
the table for docs/parallelism.md. With `worker FOLDER` it is one of the four processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lunaris.data.loader import Loader
from lunaris.distributed import collectives, session
from lunaris.distributed.signals import StopSignal
from lunaris.objective.base import Batch
from lunaris.run import build
from lunaris.runs.run_dir import RunDir
from lunaris.train import train

GOLDEN = Path(__file__).parent.parent / "golden" / "collectives.json"
PROCESSES = 4
SETUPS = {
    "ddp": ["parallelism=ddp"],
    "fsdp": ["parallelism=fsdp"],
    "hsdp": ["parallelism=hsdp", "parallelism.shard_size=2"],
    "fsdp, experts": ["parallelism=fsdp", "parallelism.expert_parallel=2"],
    "ddp, experts": ["parallelism=ddp", "parallelism.expert_parallel=2"],
    "fsdp, Muon": ["parallelism=fsdp", "optimizer=muon"],
}
# Three routed layers; two processes of an expert group have four experts each.
MODEL = [
    "data=synthetic", "data.n_tokens=20000", "data.vocab_size=64", "moe=switch", "moe.n_experts=8",
    "model.d_model=32", "model.n_layers=3", "model.n_heads=4", "model.n_kv_heads=2",
    "model.max_seq_len=16", "model.multiple_of=8", "trainer.max_steps=3", "trainer.log_interval=9",
    "trainer.batch_size=2", "trainer.eval_interval=null", "trainer.eval_steps=1",
    "trainer.device=cpu", "optimizer=adamw", "trainer.precision=fp32", "checkpoint.save_interval=9",
    f"launch.processes={PROCESSES}",
]  # fmt: skip
COUNTED = 2  # The first step sets up, the last one saves.

# What an operator of torch's process groups does, and which of its arguments is larger.
KINDS = {
    "allreduce_": ("all_reduce", 0),
    "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", None),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "alltoall_base_": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 0),
    "broadcast_": ("broadcast", 0),
    "barrier": ("barrier", None),
}
NO_COLLECTIVE = ("wait_tensor", "_wrap_tensor_autograd")


class Counted(TorchDispatchMode):
    """Counts collectives by when they are issued, what they do, and their dtype.

    when: `forward`, `backward` or `after` the backward; `host` for those of the session's CPU
    groups, in which the host itself waits for the other processes, whatever the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.when = "forward"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # It comes back as what it is made of.
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name not in NO_COLLECTIVE:
                self._add(*KINDS[name], func, args, result)
        return result

    def _add(
        self, kind: str, place: int | None, func: Any, args: tuple[Any, ...], result: Any
    ) -> None:
        moved = result if place is None else args[place]
        tensors = [x for x in _flat(moved) if isinstance(x, torch.Tensor)]
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "-"
        key = f"{'host' if _on_host(args) else self.when} {kind} {dtype}"
        self.counts[key] += 1
        self.bytes[key] += sum(x.numel() * x.element_size() for x in tensors)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _on_host(args: tuple[Any, ...]) -> bool:
    """Return whether a collective's group is one of the session's CPU groups."""
    current = session.current()
    assert current is not None
    host = {g.group_name for g in (current.cpu_group, current.background_group) if g is not None}
    for arg in args:
        if isinstance(arg, str):
            return arg in host
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).group_name in host
    raise AssertionError("a collective without a group")


class Watched:
    """A loader that counts the collectives between two of its batches."""

    def __init__(self, loader: Loader, counted: Counted) -> None:
        self._loader, self._counted = loader, counted

    @property
    def wait_s(self) -> float:
        return self._loader.wait_s

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(self._loader, 1):
            if step == COUNTED:
                self._counted.when = "forward"
                self._counted.__enter__()
            yield batch
            if step == COUNTED:
                self._counted.__exit__(None, None, None)


def count_one(folder: Path) -> None:
    """Train the run in a folder; rank 0 writes its mean counts over the processes."""
    run_dir, counted = RunDir(folder), Counted()
    backward = torch.Tensor.backward

    def marked(*args: Any, **keys: Any) -> None:
        counted.when = "backward"
        backward(*args, **keys)
        counted.when = "after"

    with StopSignal() as stop:
        run = build(run_dir.read_config(), run_dir, stop)
        loader, run.loader = run.loader, Watched(run.loader, counted)  # type: ignore[assignment]
        torch.Tensor.backward = marked  # type: ignore[method-assign]
        try:
            train(run)
        finally:
            torch.Tensor.backward = backward  # type: ignore[method-assign]
            loader.close()
            run.logger.finish()
    every = collectives.gather_objects((counted.counts, counted.bytes))
    assert all(counts == counted.counts for counts, _ in every), "ranks issue different collectives"
    # Tokens are sent where their experts are, so only the sum over the processes is certain.
    size = {key: sum(sizes[key] for _, sizes in every) // PROCESSES for key in counted.counts}
    if session.rank() == 0:
        rows = {key: [counted.counts[key], size[key]] for key in sorted(counted.counts)}
        (folder / "counts.json").write_text(json.dumps(rows))


def count(root: Path) -> dict[str, dict[str, list[int]]]:
    """Return each setup's collectives: "when kind dtype" to [number, bytes of a process]."""
    from lunaris.config.compose import compose
    from lunaris.runs.create import create

    for name, overrides in SETUPS.items():
        create(compose([*MODEL, *overrides, f"out_dir={root / name.replace(', ', '-')}"]), "", [])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={PROCESSES}", __file__, "worker", str(root)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return {
        name: json.loads((root / name.replace(", ", "-") / "counts.json").read_text())
        for name in SETUPS
    }


def table(found: dict[str, dict[str, list[int]]]) -> str:
    """Return the counts as a table in Markdown, one row a setup."""
    columns = ("forward", "backward", "after", "host")
    lines = [
        "| | all | in the forward | in the backward | after it | on the host's group |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        cells = []
        for column in columns:
            parts: dict[str, list[int]] = {}
            for key, (number, size) in rows.items():
                when, kind, _ = key.split()
                if when == column:
                    total = parts.setdefault(kind, [0, 0])
                    total[0] += number
                    total[1] += size
            cells.append(
                "<br>".join(f"{n} `{kind}`, {_size(b)}" for kind, (n, b) in parts.items()) or "none"
            )
        everything = sum(number for number, _ in rows.values())
        lines.append(f"| {name} | {everything} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count} B" if count < 1000 else f"{count / 1000:.0f} kB"


def main() -> None:
    """Count, or be one of the processes that are counted."""
    if sys.argv[1:2] == ["worker"]:
        with session.join("cpu", 120.0):
            for name in SETUPS:
                count_one(Path(sys.argv[2]) / name.replace(", ", "-"))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = count(Path(folder))
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
