"""What a command leaves to the machine: the number of processes and their parallelism. No torch."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from lunaris.config.frozen import read_config
from lunaris.config.identity import world_size
from lunaris.config.schema.launch import LocalLaunchConfig
from lunaris.config.schema.parallelism import (
    AutoConfig,
    DDPConfig,
    FSDPConfig,
    HSDPConfig,
    ParallelismConfig,
    SingleConfig,
)
from lunaris.config.schema.root import Config
from lunaris.config.schema.trainer import AUTO
from lunaris.devices import visible_gpus
from lunaris.errors import UserError

# A custom parallelism may know nothing of other processes.
_OF_SEVERAL = {s._target_ for s in (AutoConfig, DDPConfig, FSDPConfig, HSDPConfig)}


def decide_processes(cfg: Config, *, of_sweep: bool = False) -> str | None:
    """Decide `launch.processes=auto` and `parallelism=auto` in place, for this machine.

    A run that has a folder keeps what it was started with. Otherwise there is one process for each
    GPU that CUDA_VISIBLE_DEVICES leaves, or one without GPUs, with `trainer.device=cpu`, with a
    parallelism of one process or a custom one, and in a point of a sweep, which has a GPU of its
    own (of_sweep). Several are joined by `ddp`. Returns a line that says so where several processes
    were chosen, else None.
    """
    counted = getattr(cfg.launch, "processes", None) == AUTO
    joined = isinstance(cfg.parallelism, AutoConfig) and cfg.parallelism.left_open()
    if not (counted or joined):
        return None
    # A point's folder is not known yet: `out_dir` is that of a run with the sweep's name.
    before = None if of_sweep else _before(cfg)
    kept = None
    if counted:
        joins = cfg.parallelism._target_ in _OF_SEVERAL
        if joins and before is not None and isinstance(before.launch, LocalLaunchConfig):
            kept = None if "RANK" in os.environ else before.launch.processes
        found = kept or _processes(cfg, alone=of_sweep or not joins)
        cfg.launch.processes = found  # type: ignore[attr-defined]
    world = world_size(cfg)
    if joined:
        cfg.parallelism = _parallelism(before, world)
    if not counted or world == 1 or "RANK" in os.environ:
        return None
    name = cfg.parallelism._target_.rpartition(".")[2].lower()
    why = "as before" if kept is not None else "one on each GPU of this machine"
    return f"launch.processes=auto: {world} processes, {why}; parallelism={name}"


def _before(cfg: Config) -> Config | None:
    """Return the config of the run that `out_dir` holds, None without one that can be read."""
    path = Path(cfg.out_dir) / "config.yaml"
    with suppress(UserError, OSError, ValueError):
        if path.is_file():
            return read_config(path)
    return None


def _processes(cfg: Config, *, alone: bool) -> int:
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    # A torch for CPUs trains on none of the GPUs.
    if alone or cfg.trainer.device == "cpu" or metadata.version("torch").endswith("+cpu"):
        return 1
    return max(1, len(visible_gpus()))


def _parallelism(before: Config | None, world: int) -> ParallelismConfig:
    if before is not None and (world == 1 or not isinstance(before.parallelism, SingleConfig)):
        return before.parallelism
    return SingleConfig() if world == 1 else DDPConfig()
