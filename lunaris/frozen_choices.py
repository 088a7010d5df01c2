"""What a run leaves to its device: decided where it first trains, and frozen in its folder."""

from __future__ import annotations

from dataclasses import replace

import torch

from lunaris.atomic_files import replace_file
from lunaris.config.frozen import to_yaml
from lunaris.config.schema.root import Config
from lunaris.config.schema.trainer import AUTO
from lunaris.distributed import collectives, session
from lunaris.precision import chosen_precision
from lunaris.runs.run_dir import RunDir


def with_precision(cfg: Config, run_dir: RunDir, device: torch.device) -> Config:
    """Return `cfg` with `trainer.precision=auto` decided, and freeze it; every process calls this.

    A run that has trained keeps its precision. Else all devices of the run must compute bf16.
    """
    # Under torchrun each process has composed the config, and only rank 0 knows the folder.
    chosen = collectives.from_rank_0(_known(cfg, run_dir) if session.rank() == 0 else AUTO)
    if chosen == AUTO:
        found = set(collectives.gather_objects(chosen_precision(AUTO, device)))
        chosen = "bf16" if found == {"bf16"} else "fp32"
    settled = replace(cfg, trainer=replace(cfg.trainer, precision=chosen))
    if session.rank() == 0 and cfg.trainer.precision == AUTO:
        replace_file(run_dir.config_path, to_yaml(settled))
    return settled


def _known(cfg: Config, run_dir: RunDir) -> str:
    """Return the precision that the config or the run's history names, or `auto`."""
    if cfg.trainer.precision != AUTO:
        return cfg.trainer.precision
    saved = run_dir.saved_config()
    return AUTO if saved is None else saved.trainer.precision
