"""Checkpoints: complete or absent, in one format for every parallelism.

torch.distributed.checkpoint writes a checkpoint as `.tmp-step_…` (each process its own shards);
then it is made durable, and rank 0 renames it. `files.json`, written last, has the size and CRC-32
of every other file, so that a corrupt checkpoint is recognised and skipped.
"""

from __future__ import annotations

import re
import shutil
import warnings
import zlib
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from lunaris.atomic_files import read_json, sync_folder, write_json
from lunaris.distributed import collectives, session
from lunaris.errors import RunFailed, UserError
from lunaris.model.layers import local_part
from lunaris.runs.facts import NAME as FACTS

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_CHUNK = 1 << 22
_NAME = re.compile(r"step_\d+")
_WRITTEN_BY_RANK_0 = (".metadata", "train_state.json", FACTS)


@dataclass
class TrainState:
    """The progress of a run: what a checkpoint has besides weights and optimizer state.

    `sequences` is the position in the data: the number of the next sequence of the global order.
    left_out: the ranges of sequences that the run does not train on. guard: the state of
    `lunaris.optim.guard.StepGuard`. unfinished: the metrics of the last step where a signal stopped
    its evaluation, so that its row is not logged yet; otherwise None.
    """

    step: int = 0
    sequences: int = 0
    best_val_loss: float | None = None
    scaler: dict[str, float] = field(default_factory=dict)
    left_out: list[list[int]] = field(default_factory=list)
    guard: dict[str, Any] = field(default_factory=dict)
    unfinished: dict[str, Any] | None = None


class Checkpoints:
    """The `checkpoints` folder of a run; every process has one."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int | None,
        async_save: bool,
        facts: dict[str, Any] | None = None,
        save_interval: int | None = None,
        keep_step: int | None = None,
    ) -> None:
        """facts: the content of every checkpoint's `run.json` (`lunaris.runs.facts`).

        save_interval: None: only what is asked for. keep_step: a step whose checkpoint is due, and
        kept besides the newest `keep_last`.
        """
        self._folder = folder
        self._save_interval = save_interval
        self._keep_step = keep_step
        self._facts = facts or {}
        self._keep_last = keep_last
        self._async = async_save
        self._pending: tuple[Path, Future[object]] | None = None
        self._corrupt: list[Path] = []

    def is_due(self, step: int) -> bool:
        """Return whether a run saves its step `step`, wherever it ends."""
        interval = self._save_interval
        return step == self._keep_step or (interval is not None and step % interval == 0)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Write the checkpoint of `state.step`; every process calls this.

        With `async_save`, this returns once the state is copied; `wait_pending` completes it.
        Raises RunFailed, having written nothing, when a weight or the optimizer's state has a value
        that is not finite.
        """
        self.wait_pending()
        _require_finite(model, optimizer, state.step)
        target = self._folder / f"step_{state.step:08d}"
        temporary = self._folder / f".tmp-{target.name}"
        if session.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_json(temporary / "train_state.json", asdict(state))
            write_json(temporary / FACTS, self._facts)
        collectives.barrier()
        model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
        tree = {"model": model_state, "optimizer": optimizer_state}
        if self._async:
            # The thread that saves runs collectives, in a group that the main thread never uses.
            group = session.background_group()
            future = dcp.async_save(tree, checkpoint_id=temporary, **_processes(group))
            assert isinstance(future, Future)
            self._pending = (temporary, future)
            return
        dcp.save(tree, checkpoint_id=temporary, **_processes(session.cpu_group()))
        self._commit(temporary)

    def wait_pending(self) -> None:
        """Wait for an asynchronous save and complete it; every process calls this."""
        if self._pending is not None:
            temporary, future = self._pending
            self._pending = None
            future.result()
            self._commit(temporary)

    def try_finalize(self) -> None:
        """Complete an asynchronous save if every process has written its part; all call this."""
        if self._pending is not None and not collectives.any_rank(not self._pending[1].done()):
            self.wait_pending()

    def load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState | None:
        """Restore the newest complete checkpoint and return its state; None when there is none.

        A corrupt one is skipped with a warning and the one before it is taken. Raises UserError
        when all are corrupt, since a new start would overwrite them.
        """
        found = collectives.from_rank_0([str(path) for path in complete(self._folder)])
        for path in map(Path, found):
            fault = find_corruption(path, session.rank(), session.world_size())
            if collectives.any_rank(fault is not None):
                self._corrupt.append(path)
                if fault is not None:
                    warnings.warn(f"checkpoint {path} is damaged, skipped: {fault}", stacklevel=2)
                continue
            _load(path, model, optimizer)
            return TrainState(**read_json(path / "train_state.json"))
        if found:
            raise UserError(
                f"{self._folder}: every checkpoint is damaged; remove the folder to start again"
            )
        return None

    def consolidate(self, step: int) -> Path:
        """Write the weights of `step` as one `model.pt`, which torch.load reads; rank 0 only."""
        path = self._folder / f"step_{step:08d}"
        full = path.with_name(f".tmp-{path.name}.pt")
        dcp_to_torch_save(path, full)
        weights = torch.load(full, map_location="cpu", weights_only=True)["model"]
        torch.save(weights, full)
        target = self._folder.parent / "model.pt"
        full.replace(target)
        return target

    def _commit(self, temporary: Path) -> None:
        # Each process sums its own files, so that the time does not grow with the world size.
        rank = session.rank()
        mine = {p.name: _sums(p) for p in temporary.glob(f"__{rank}_*")}
        if rank == 0:
            mine |= {name: _sums(temporary / name) for name in _WRITTEN_BY_RANK_0}
        sums: dict[str, list[int]] = {}
        for part in collectives.gather_objects(mine):
            sums |= part
        if rank == 0:
            write_json(temporary / "files.json", sums)
            sync_folder(temporary)
            target = self._folder / temporary.name.removeprefix(".tmp-")
            # A step that is saved again was corrupt, or the run would have resumed from it.
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            self._corrupt = [path for path in self._corrupt if path != target]
            sync_folder(self._folder)
            self._prune()
        collectives.barrier()

    def _prune(self) -> None:
        # Corrupt checkpoints have later steps than the one that the run resumed from: counted by
        # `keep_last`, they would be kept in place of the one just written.
        while self._corrupt:
            shutil.rmtree(self._corrupt.pop(), ignore_errors=True)
        if self._keep_last is not None:
            for old in complete(self._folder)[self._keep_last :]:
                if old.name != f"step_{self._keep_step or 0:08d}":
                    shutil.rmtree(old)


@torch.no_grad()
def _require_finite(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    named = [*model.named_parameters(), *model.named_buffers()]
    named += [
        (f"the optimizer's {key}", value)
        for state in optimizer.state.values()
        for key, value in state.items()
    ]
    local = [
        (name, local_part(x.detach()))
        for name, x in named
        if isinstance(x, Tensor) and x.is_floating_point()
    ]
    local = [(name, x) for name, x in local if x.numel()]
    # The largest absolute value of each; it is NaN where any of them is.
    largest = [x.item() for x in torch._foreach_norm([x for _, x in local], torch.inf)]
    bad = [name for (name, _), value in zip(local, largest, strict=True) if not isfinite(value)]
    everywhere = [name for found in collectives.gather_objects(bad) for name in found]
    if everywhere:
        raise RunFailed(
            f"step {step}: {everywhere[0]} has a value that is not finite; no checkpoint is "
            "written and the last one is kept. Lower optimizer.learning_rate or set "
            "trainer.grad_clip, by `lunaris resume DIR KEY=VALUE`"
        )


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, newest first."""
    found = (p for p in folder.glob("step_*") if _NAME.fullmatch(p.name))
    return sorted((p for p in found if (p / "files.json").is_file()), reverse=True)


def find_corruption(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return how a checkpoint's files differ from their recorded sizes and checksums, or None.

    Checks every `parts`-th file, starting at `part`, so that processes share the reading.
    """
    sums = read_json(path / "files.json")
    if not sums:
        return "files.json cannot be read"
    for name in sorted(sums)[part::parts]:
        try:
            found = _sums(path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != sums[name]:
            return f"{name}: size and checksum {found}, expected {sums[name]}"
    return None


def newest(folder: Path, step: int | None = None) -> Path:
    """Return the newest intact checkpoint in `folder`, or that of `step`.

    Raises UserError when there is none.
    """
    for path in complete(folder):
        if step is None or path.name == f"step_{step:08d}":
            fault = find_corruption(path)
            if fault is None:
                return path
            warnings.warn(f"checkpoint {path} is damaged, skipped: {fault}", stacklevel=2)
    steps = ", ".join(str(int(path.name.removeprefix("step_"))) for path in complete(folder))
    wanted = "no complete checkpoint" if step is None else f"no checkpoint of step {step}"
    raise UserError(f"{folder}: {wanted}" + (f"; there are {steps}" if steps else ""))


def saved_vocab_size(path: Path) -> int:
    """Return the vocabulary size of a checkpoint's model, from its metadata."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return int(metadata["model.embedding.weight"].size[0])  # type: ignore[union-attr]


def saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a checkpoint's model by its name, from its metadata."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        name.removeprefix("model."): tuple(value.size)  # type: ignore[union-attr]
        for name, value in metadata.items()
        if name.startswith("model.")
    }


def load_tensors(path: Path, targets: dict[str, Tensor], *, alone: bool = False) -> None:
    """Load some tensors of a checkpoint's model into `targets`, in place, in any sharding.

    Every process calls this, unless `alone`: then each reads complete tensors by itself.
    """
    processes: dict[str, Any] = {"no_dist": True} if alone else _processes(session.cpu_group())
    if targets or not alone:
        dcp.load({"model": targets}, checkpoint_id=path, **processes)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the weights of one checkpoint into `model`, in any parallelism."""
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=path, **_processes(session.cpu_group()))
    set_model_state_dict(model, state["model"])


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    tree: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(tree, checkpoint_id=path, **_processes(session.cpu_group()))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tree["model"],
        optim_state_dict=tree["optimizer"],
        options=_OPTIONS,
    )


def _processes(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Return the arguments of DCP that say which processes take part."""
    if dist.is_initialized():
        return {"process_group": group}
    # Without a group DCP warns, also from its own thread, that it assumes a single process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return {"no_dist": True}


def _sums(path: Path) -> list[int]:
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
    return [size, crc]
