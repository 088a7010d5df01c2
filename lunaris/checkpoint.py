"""Checkpoints: complete or absent, in one format for every parallelism.

torch.distributed.checkpoint writes a checkpoint as `.tmp-step_…` (each process its own shards);
then it is made durable, and rank 0 renames it. `files.json`, written last, has the size and CRC-32
of every other file, so that a corrupt checkpoint is recognised and skipped.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
)

from lunaris.atomic_files import read_json, sync_folder, write_json
from lunaris.checkpoint_plan import Planner
from lunaris.checkpoint_reader import OPTIONS, CannotLoad, processes_of, restore
from lunaris.distributed import collectives, session
from lunaris.errors import RunFailed, UserError
from lunaris.model.layers import local_part
from lunaris.runs.checkpoint_files import (
    complete,
    find_corruption,
    remove,
    remove_leftovers,
    require_room,
    save_failed,
    set_damaged_aside,
    sums_of,
)
from lunaris.runs.facts import NAME as FACTS
from lunaris.runs.facts import checkpoint_folders

_WRITTEN_BY_RANK_0 = (".metadata", "train_state.json", FACTS)


@dataclass
class TrainState:
    """The progress of a run: what a checkpoint has besides weights and optimizer state.

    `sequences` is the position in the data: the number of the next sequence of the global order.
    left_out: the ranges of sequences that the run does not train on. guard: the state of
    `lunaris.optim.guard.StepGuard`. losses: that of `lunaris.metrics.loss_means.LossMeans`, empty
    in older checkpoints. churn: that of `lunaris.metrics.churn.RoutingChurn`. unfinished: the
    metrics of the last step where a signal stopped its evaluation, so that its row is not logged
    yet; otherwise None.
    """

    step: int = 0
    sequences: int = 0
    best_val_loss: float | None = None
    scaler: dict[str, float] = field(default_factory=dict)
    left_out: list[list[int]] = field(default_factory=list)
    guard: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    churn: dict[str, Any] = field(default_factory=dict)
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
        on_error: str = "stop",
    ) -> None:
        """facts: the content of every checkpoint's `run.json` (`lunaris.runs.facts`).

        save_interval: None: only what is asked for. keep_step: a step whose checkpoint is due, and
        kept besides the newest `keep_last`. on_error: stop, or continue without a checkpoint that
        cannot be written.
        """
        self._folder = folder
        self._save_interval = save_interval
        self._keep_step = keep_step
        self._facts = facts or {}
        self._keep_last = keep_last
        self._async = async_save
        self._pending: tuple[Path, Future[object], bool] | None = None
        self._continue = on_error == "continue"

    def is_due(self, step: int) -> bool:
        """Return whether a run saves its step `step`, wherever it ends."""
        interval = self._save_interval
        return step == self._keep_step or (interval is not None and step % interval == 0)

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        *,
        last: bool = False,
    ) -> None:
        """Write the checkpoint of `state.step`; every process calls this.

        With `async_save`, this returns once the state is copied; `wait_pending` completes it.
        Raises RunFailed, having written nothing, when a weight or the optimizer's state has a value
        that is not finite, and when the checkpoint cannot be written. With `on_error=continue` the
        latter is a warning, unless it is the last checkpoint of this process.
        """
        self.wait_pending()
        _require_finite(model, optimizer, state.step)
        temporary = self._folder / f".tmp-step_{state.step:08d}"
        must = last or not self._continue
        try:
            model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
            tree = {"model": model_state, "optimizer": optimizer_state}
            size = sum(collectives.gather_objects(_local_bytes(tree)))
            collectives.on_rank_0(lambda: self._begin(temporary, state, size))
            if self._async:
                # The thread that saves runs collectives, in a group that the main thread never
                # uses.
                group = session.background_group()
                future = dcp.async_save(
                    tree, checkpoint_id=temporary, planner=Planner(), **processes_of(group)
                )
                assert isinstance(future, Future)
                self._pending = (temporary, future, must)
                return
            group = session.cpu_group()
            dcp.save(tree, checkpoint_id=temporary, planner=Planner(), **processes_of(group))
            self._commit(temporary)
        except (OSError, RuntimeError, CheckpointException) as error:
            self._give_up(temporary, error, must)

    def wait_pending(self) -> None:
        """Wait for an asynchronous save and complete it; every process calls this.

        Raises RunFailed as `save` does.
        """
        if self._pending is not None:
            temporary, future, must = self._pending
            self._pending = None
            try:
                future.result()
                self._commit(temporary)
            except (OSError, RuntimeError, CheckpointException) as error:
                self._give_up(temporary, error, must)

    def try_finalize(self) -> None:
        """Complete an asynchronous save if every process has written its part; all call this."""
        if self._pending is not None and not collectives.any_rank(not self._pending[1].done()):
            self.wait_pending()

    def listed(self) -> list[Path]:
        """Remove leftovers; return all checkpoints, incomplete ones too, newest first.

        Every process calls this; rank 0 looks. The caller holds the run's lock.
        """

        def look() -> list[Path]:
            remove_leftovers(self._folder)
            return checkpoint_folders(self._folder)

        return collectives.from_rank_0(collectives.on_rank_0(look) or [])

    def load_newest(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        listed: list[Path] | None = None,
    ) -> TrainState | None:
        """Restore the newest complete checkpoint and return its state; None when there is none.

        listed: what `listed` returned before, of which one must be loaded where weights were not
        drawn because of them; None: look now.
        One that is damaged or cannot be loaded is skipped with a warning, the one before it is
        taken, and what was skipped is renamed to `damaged-…`. Raises UserError when none can be
        taken, since a new start would overwrite them, and when the disk gives no answer. The caller
        holds the run's lock.
        """
        skipped: list[Path] = []
        reason = ""
        for path in self.listed() if listed is None else listed:
            parts = session.rank(), session.world_size()
            fault = _agreed(partial(find_corruption, path, *parts))
            fault = fault or _agreed(partial(_restored, path, model, optimizer))
            if fault is None:
                collectives.on_rank_0(lambda: set_damaged_aside(skipped))
                return TrainState(**read_json(path / "train_state.json"))
            skipped.append(path)
            reason = f"{path}: {fault}"
            if session.rank() == 0:
                warnings.warn(f"checkpoint {path} is damaged, skipped: {fault}", stacklevel=2)
        if skipped:
            raise UserError(
                f"{self._folder}: every checkpoint is damaged; remove the folder to start again. "
                f"The oldest is {reason}"
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

    def _begin(self, temporary: Path, state: TrainState, size: int) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        require_room(temporary, size)
        write_json(temporary / "train_state.json", asdict(state))
        write_json(temporary / FACTS, self._facts)

    def _commit(self, temporary: Path) -> None:
        # Each process sums its own files, so that the time does not grow with the world size.
        rank = session.rank()
        names = [p.name for p in temporary.glob(f"__{rank}_*")]
        names += _WRITTEN_BY_RANK_0 if rank == 0 else ()
        mine: dict[str, list[int]] | str
        try:
            mine = {name: sums_of(temporary / name) for name in names}
        except (OSError, UserError) as error:
            mine = str(error)
        sums: dict[str, list[int]] = {}
        for part in collectives.gather_objects(mine):
            if isinstance(part, str):
                raise OSError(part)
            sums |= part
        collectives.on_rank_0(lambda: self._finish(temporary, sums))

    def _finish(self, temporary: Path, sums: dict[str, list[int]]) -> None:
        write_json(temporary / "files.json", sums)
        sync_folder(temporary)
        target = self._folder / temporary.name.removeprefix(".tmp-")
        if target.exists():
            # A step that is saved again was damaged, or the run would have resumed from it.
            remove(target)
        temporary.rename(target)
        sync_folder(self._folder)
        if self._keep_last is not None:
            for old in complete(self._folder)[self._keep_last :]:
                if old.name != f"step_{self._keep_step or 0:08d}":
                    remove(old)

    def _give_up(self, temporary: Path, error: BaseException, must: bool) -> None:
        """Remove what was written, and raise RunFailed or warn. Every process comes here."""
        if session.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        failed = save_failed(self._folder / temporary.name.removeprefix(".tmp-"), error)
        if must:
            raise failed from error
        if session.rank() == 0:
            warnings.warn(f"{failed}", stacklevel=2)


def _agreed(look: Callable[[], str | None]) -> str | None:
    """Return the fault that `look` finds in any process; an error is raised in every one."""
    try:
        found: str | UserError | None = look()
    except UserError as error:
        found = error
    for each in collectives.gather_objects(found):
        if isinstance(each, UserError):
            raise each
        if each is not None:
            return each
    return None


def _restored(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Restore a checkpoint; return why that is not possible, or None."""
    try:
        restore(path, model, optimizer)
        TrainState(**read_json(path / "train_state.json"))
    except (CannotLoad, TypeError) as error:
        return str(error)
    return None


def _local_bytes(tree: dict[str, Any]) -> int:
    """Return the bytes of this process's part of all tensors of a state."""
    return sum(
        local_part(value).nbytes
        for part in tree.values()
        for value in part.values()
        if isinstance(value, Tensor)
    )


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
