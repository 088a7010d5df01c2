"""`lunaris train`: compose a run from the options and overrides, and run or send it."""

from __future__ import annotations

import importlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = "train a model here (launch=local) or send it to SLURM (launch=slurm); -m sweeps"


def main(argv: list[str]) -> int:
    """Compose, check and launch; return the exit code."""
    from lunaris.config.compose import compose

    cfg = compose(argv)
    return submit(cfg, shlex.join(["lunaris", "train", *argv]), argv)


def submit(cfg: DictConfig, command: str, overrides: list[str]) -> int:
    """Give a composed config to its launcher, or run it here when torchrun started us."""
    if "RANK" in os.environ:
        return _run_as_rank(cfg, command, overrides)
    from omegaconf import OmegaConf

    keys: Any = OmegaConf.to_container(cfg.launch, resolve=True)
    launcher = locate("launch._target_", keys.pop("_target_"))(**keys)
    return int(launcher.submit(cfg, command, overrides))


def _run_as_rank(cfg: DictConfig, command: str, overrides: list[str]) -> int:
    from lunaris import rundir
    from lunaris.launch.worker import work

    if os.environ["RANK"] == "0":
        rundir.create(cfg, command, overrides)
    # The other ranks meet rank 0 in `work`, when the process group is made.
    work(cfg, Path(cfg.out_dir))
    return 0


def locate(key: str, dotted: str) -> Any:
    """Return the class at a dotted path. Raises UserError under `key` where there is none."""
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}={dotted}: cannot be imported: {error}") from error
