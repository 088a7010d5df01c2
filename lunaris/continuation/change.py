"""Change the config of a run, or go back in it: first the checks, then what is written. No torch.

Nothing is written before all checks have passed. Then the checkpoints that the run leaves are set
aside, the change is recorded (`lunaris.runs.changes`), and config.yaml is replaced; interrupted
between any two of them, the run can still be resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from lunaris.atomic_files import read_json, replace_file
from lunaris.config.change import changed
from lunaris.config.compose import Source
from lunaris.config.frozen import to_tree, to_yaml
from lunaris.config.identity import every_key, fixed_keys
from lunaris.config.schema.root import Config
from lunaris.console import labelled
from lunaris.continuation.horizon import horizon
from lunaris.continuation.set_aside import set_aside
from lunaris.errors import UserError
from lunaris.runs.changes import Change, begin_changes_at, changed_keys, record_change
from lunaris.runs.facts import checkpoint_folders, is_complete, step_of
from lunaris.runs.run_dir import RunDir

# Keys of a run's folder, which another run has.
_OF_THE_FOLDER = ("name", "out_dir", "experiment")
_VOCABULARY = "model.vocab_size"


@dataclass(frozen=True)
class Continuation:
    """A checked change of a run: its config from then on, and the step at which that begins.

    eot_id: of the data, where `change.data` says that it is another. notes: for the person.
    """

    run_dir: RunDir
    cfg: Config
    step: int
    change: Change | None
    eot_id: int | None = None
    notes: tuple[str, ...] = ()

    def write(self) -> list[str]:
        """Write the change into the run's folder; return lines that say what was done.

        Raises UserError while a job writes the folder.
        """
        run_dir, lines = self.run_dir, list(self.notes)
        with run_dir.lock():
            left = set_aside(run_dir, self.step)
            if left is not None:
                lines.append(f"set aside  what came after step {self.step}: {left}")
            begin_changes_at(run_dir.path, self.step)
            if self.change is not None:
                record_change(run_dir.path, self.change)
                lines.append(f"changed    from step {self.step}: {self.change}")
                if self.change.data is not None:
                    run_dir.note(data=self.change.data, eot_id=self.eot_id)
            replace_file(run_dir.config_path, to_yaml(self.cfg))
            saved = read_json(_checkpoint(run_dir, self.step) / "train_state.json")
            run_dir.write_status(
                state="queued", step=self.step, max_steps=self.cfg.trainer.max_steps,
                best_val_loss=saved.get("best_val_loss"), last_error=None,
            )  # fmt: skip
        return lines


def plan_change(
    run_dir: RunDir,
    cfg: Config,
    overrides: list[str],
    *,
    at: int | None = None,
    source: Source | None = None,
    command: str = "",
) -> Continuation:
    """Return the checked continuation of the run with the frozen config `cfg`; write nothing.

    at: the step of the checkpoint to go back to; None: the newest, or where a longer run extends
    the stable part of its schedule, the newest before the decay. Raises UserError for a key that
    may not change, for a step without an intact checkpoint, and where nothing is left to train.
    """
    new = changed(cfg, overrides, source, check_data=False)
    keys = changed_keys(every_key(cfg), every_key(new))
    _refuse_fixed(run_dir, cfg, new, Change(0, keys, {}, ""))
    steps = [step_of(p) for p in checkpoint_folders(run_dir.checkpoints) if is_complete(p)]
    step, notes = _start(run_dir, cfg, new, steps, at)
    if new.trainer.max_steps <= step:
        if not keys and at is None:
            raise UserError(f"{run_dir.path}: has trained all of its {step} steps")
        earlier = sorted(s for s in steps if s < new.trainer.max_steps)
        back = f"go back by --at STEP to one of {', '.join(map(str, earlier))}"
        raise UserError(
            f"trainer.max_steps={new.trainer.max_steps}: the run is at step {step}; give more "
            f"steps, or {back if earlier else 'start another run by `lunaris fork`'}"
        )
    stop_at = new.trainer.stop_at
    # A run that was stopped while it evaluated at that step has still to pause there.
    reached = "trainer.stop_at" in keys or run_dir.read_status().get("state") == "paused"
    if stop_at is not None and (stop_at < step or (stop_at == step and reached)):
        raise UserError(
            f"trainer.stop_at={stop_at}: the run is at step {step}; give a later step, or null"
        )
    data, eot_id = None, None
    if any(key.startswith("data.") and key != "data.verify" for key in keys) or _VOCABULARY in keys:
        data, eot_id = _other_data(run_dir, new, step)
    change = Change(step, keys, to_tree(new), command, data) if keys else None
    return Continuation(run_dir, new, step, change, eot_id, tuple(notes))


def _checkpoint(run_dir: RunDir, step: int) -> Path:
    return run_dir.checkpoints / f"step_{step:08d}"


def _refuse_fixed(run_dir: RunDir, cfg: Config, new: Config, change: Change) -> None:
    """Raise UserError for the keys that a run keeps."""
    for key in _OF_THE_FOLDER:
        if key in change.keys:
            raise UserError(
                f"{key}={change.keys[key].get('new')}: a run keeps its {key}; `lunaris fork` "
                "starts another run from its config"
            )
    # The vocabulary is checked by what it is with the data, which null takes.
    fixed = (fixed_keys(cfg) | fixed_keys(new)) - {_VOCABULARY}
    rows = [key for key, _ in change.rows() if key in fixed]
    if rows:
        shown = str(Change(0, {key: change.keys[key] for key in rows}, {}, ""))
        raise UserError(
            f"{shown}: changes what the weights of the run in {run_dir.path} are, or the order of "
            "its data; `lunaris fork` starts another run from its config"
        )


def _start(
    run_dir: RunDir, cfg: Config, new: Config, steps: list[int], at: int | None
) -> tuple[int, list[str]]:
    """Return the step from which the run continues, and what its schedule makes of that."""
    if at is not None and at not in steps:
        listed = (
            f"its checkpoint steps: {', '.join(map(str, sorted(steps)))}"
            if steps
            else "it has none"
        )
        raise UserError(f"--at {at}: {run_dir.path} has no checkpoint of this step; {listed}")
    step = max(steps, default=0) if at is None else at
    found = horizon(cfg, new, step)
    if found is not None and found.decay_start is not None and at is None:
        stable = [s for s in steps if s <= found.same_until]
        if not stable:
            raise UserError(
                f"trainer.max_steps={new.trainer.max_steps}: would extend the stable part of the "
                f"schedule, which ended at step {found.decay_start}, but no checkpoint up to it is "
                f"kept; `lunaris resume {quote(str(run_dir.path))} --at {step} …` continues from "
                "the decayed weights"
            )
        step = max(stable)
    if step:
        _refuse_damaged(run_dir, step)
    return step, [] if found is None else [labelled("schedule", found.text)]


def _refuse_damaged(run_dir: RunDir, step: int) -> None:
    from lunaris.runs.checkpoint_files import find_corruption

    path = _checkpoint(run_dir, step)
    fault = find_corruption(path)
    if fault is not None:
        raise UserError(f"{path}: is damaged: {fault}; go back by --at STEP to an older one")


def _other_data(run_dir: RunDir, cfg: Config, step: int) -> tuple[dict[str, str], int | None]:
    """Return the digests and the end-of-text id of data that a run continues on.

    Raises UserError for another tokenizer or another vocabulary than the run's.
    """
    from lunaris.config.instantiate import instantiate_component
    from lunaris.data.prepare.build import make_ready
    from lunaris.runs.data_fingerprint import check_tokenizer, digests_of

    data = instantiate_component("data", cfg.data)
    make_ready(data)
    data.ensure_ready()
    check_tokenizer(data.tokenizer_path, run_dir)
    if step:
        from lunaris.checkpoint_reader import saved_vocab_size

        size, found = saved_vocab_size(_checkpoint(run_dir, step)), data.vocab_size
        if (cfg.model.vocab_size or found) != size or found > size:
            raise UserError(
                f"{_VOCABULARY}={cfg.model.vocab_size or found}: the model of this run has a "
                f"vocabulary of {size}, the data one of {found}"
                + (f"; write {_VOCABULARY}={size}" if found < size else "")
            )
    return digests_of(data), data.eot_id
