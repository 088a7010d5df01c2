"""What a run leaves to its device: decided where it first trains, and frozen in its folder."""

from __future__ import annotations

from dataclasses import replace

import torch

from lunaris.atomic_files import replace_file
from lunaris.config.frozen import to_yaml
from lunaris.config.schema.root import Config
from lunaris.config.schema.trainer import AUTO
from lunaris.distributed import collectives
from lunaris.precision import chosen_precision
from lunaris.runs.run_dir import RunDir


def with_precision(cfg: Config, run_dir: RunDir, device: torch.device) -> Config:
    """Return `cfg` with `trainer.precision=auto` decided, and freeze it; every process calls this.

    A run that has trained keeps its precision. Else all devices of the run must compute bf16.
    """
    if cfg.trainer.precision != AUTO:
        return cfg
    saved = run_dir.saved_config()
    chosen = collectives.from_rank_0(saved.trainer.precision if saved is not None else AUTO)
    if chosen == AUTO:
        found = set(collectives.gather_objects(chosen_precision(AUTO, device)))
        chosen = "bf16" if found == {"bf16"} else "fp32"
    cfg = replace(cfg, trainer=replace(cfg.trainer, precision=chosen))
    collectives.on_rank_0(lambda: replace_file(run_dir.config_path, to_yaml(cfg)))
    return cfg
