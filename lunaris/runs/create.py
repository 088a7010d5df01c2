"""Creates the folder of a run, or opens it again for the same run. No torch."""

from __future__ import annotations

import os
import shlex

from lunaris.atomic_files import replace_file, write_json
from lunaris.config.frozen import to_tree, to_yaml
from lunaris.config.identity import (
    GLOBAL_BATCH,
    differing,
    every_key,
    fixed_keys,
    identity,
    keep_choices,
    left_open,
)
from lunaris.config.schema.launch import LocalLaunchConfig
from lunaris.config.schema.root import Config
from lunaris.config.trust import allow_tree
from lunaris.errors import UserError
from lunaris.runs import provenance
from lunaris.runs.changes import changed_keys
from lunaris.runs.facts import checkpoint_folders
from lunaris.runs.run_dir import RunDir

# The keys whose product is the global batch.
_BATCH = (
    "trainer.batch_size", "trainer.gradient_accumulation_steps", "launch.processes",
    "launch.nodes", "launch.gpus_per_node", "launch.tasks_per_node",
)  # fmt: skip


def create(cfg: Config, command: str, overrides: list[str]) -> RunDir:
    """Create the folder `cfg.out_dir` for a composed config, or open it again.

    A folder that already holds a run of the same identity (`lunaris.config.identity.identity`) is
    reused, with the new values of the keys that may change. Raises UserError, having written
    nothing, when its config differs or another job is writing it.
    """
    run_dir = RunDir(cfg.out_dir)
    take_world_size(cfg)
    allow_tree(to_tree(cfg))
    before = refuse_other_config(run_dir, cfg, overrides)
    if before is not None:
        keep_choices(cfg, before)
    try:
        run_dir.logs.mkdir(parents=True, exist_ok=True)
        with run_dir.lock():
            run_dir.set_aside_damaged()
            replace_file(run_dir.config_path, to_yaml(cfg))
            old, new = run_dir.read_provenance(), provenance.collect(command, overrides)
            write_json(run_dir.provenance_path, provenance.update(old, new))
            if not run_dir.read_status():
                run_dir.write_status(
                    state="queued", step=0, attempts=0, max_steps=cfg.trainer.max_steps
                )
    except OSError as error:
        raise UserError(f"out_dir={cfg.out_dir}: cannot be written: {error.strerror}") from error
    return run_dir


def take_world_size(cfg: Config) -> None:
    """Set `launch.processes` to the world size of the launcher that started this process."""
    if "RANK" in os.environ and isinstance(cfg.launch, LocalLaunchConfig):
        cfg.launch.processes = int(os.environ["WORLD_SIZE"])


def refuse_other_config(
    run_dir: RunDir, cfg: Config, overrides: list[str] | None = None
) -> Config | None:
    """Return the config of the run in a folder, or None without one.

    The copy of the config in the newest checkpoint, or in a change recorded since, is taken, and
    config.yaml where there is none. overrides: of the command, for the message. Raises UserError
    when the run has another identity than `cfg`.
    """
    run_dir.check_kinds()
    saved = run_dir.saved_config()
    if saved is None and not run_dir.config_path.is_file():
        if checkpoint_folders(run_dir.checkpoints):
            raise UserError(
                f"{run_dir.config_path}: missing, and no checkpoint has a copy of it; put it back, "
                "or choose another `name=`"
            )
        return None
    before = saved or run_dir.read_config()
    rows = differing(identity(before), identity(cfg))
    if rows:
        raise UserError(
            f"{run_dir.path}: holds a run of another config; choose another `name=`, or "
            f"remove the folder{_how_to_change(run_dir, before, cfg, overrides or [])}. Differing "
            "keys:\n  " + "\n  ".join(rows)
        )
    return before


def _how_to_change(run_dir: RunDir, before: Config, cfg: Config, overrides: list[str]) -> str:
    """Return the command that changes the run to `cfg`, where that is possible, or ""."""
    old, new = every_key(before), every_key(cfg)
    free = every_key(before).keys() - identity(before).keys()
    keys = [key for key in changed_keys(old, new) if key != GLOBAL_BATCH]
    keys = [key for key in keys if key not in free or key in _BATCH]
    keys = [key for key in keys if not left_open(key, new.get(key))]
    if set(keys) & (fixed_keys(before) | fixed_keys(cfg)):
        return ""
    words: dict[str, None] = {}
    for key in keys:
        given = [o for o in overrides if f"{key}.".startswith(f"{o.partition('=')[0]}.")]
        if given:
            words |= dict.fromkeys(given)
        elif key in new:
            words[f"{key}={'null' if new[key] is None else new[key]}"] = None
    return f", or change this run: `{shlex.join(['lunaris', 'resume', str(run_dir.path), *words])}`"
