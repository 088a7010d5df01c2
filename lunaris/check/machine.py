"""What a machine offers a run: cores, memory, files, disk. No torch."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from importlib import metadata
from pathlib import Path

from lunaris.check.item import FAIL, OK, Item
from lunaris.check.temporary import temporary_item
from lunaris.config.schema.root import Config
from lunaris.devices import this_machine, visible_gpus
from lunaris.errors import UserError
from lunaris.planning.plan import make_plan
from lunaris.planning.report import memory_warning

# Open files that a process needs: shards, checkpoint files, connections to the other processes.
_FILES = 4096
_GB = 1e9


def machine_items(cfg: Config) -> list[Item]:
    """Return what can be seen before any process starts."""
    return [
        _software(), _cores(cfg), _memory(cfg), _files(), _disk(cfg), temporary_item(cfg)
    ]  # fmt: skip


def _software() -> Item:
    versions = {"python": platform.python_version()}
    for name in ("lunaris-codex", "torch", "hydra-core"):
        versions[name] = metadata.version(name)
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Item("software", OK, f"{text}, {platform.system()} {platform.release()}", versions)


def _cores(cfg: Config) -> Item:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus, processes = usable_gpus(cfg), cfg.launch.world_size()
    figures = {"usable": usable, "of": os.cpu_count(), "processes": processes, "gpus": gpus}
    text = f"{usable} of {os.cpu_count()} usable, {processes} process{'es' * (processes > 1)}"
    if not gpus:
        return Item("cores", OK, text, figures)
    text += f", {gpus} GPU{'s' * (gpus > 1)}"
    if gpus <= processes:
        return Item("cores", OK, text, figures)
    several = "parallelism=ddp " if processes == 1 else ""
    advice = (
        f"{several}launch.processes={gpus}: the run uses {processes} of {gpus} GPUs; each process "
        "adds trainer.batch_size sequences to a step",
    )
    return Item("cores", OK, text, figures, advice)


def usable_gpus(cfg: Config) -> int:
    """Return how many GPUs the processes of a run can use here, 0 where it trains on the CPU."""
    return 0 if cfg.trainer.device == "cpu" else len(visible_gpus())


def _memory(cfg: Config) -> Item:
    machine, warning = this_machine(), memory_warning(cfg)
    figures = {"available_gb": machine.available / _GB, "total_gb": machine.memory / _GB}
    text = f"{figures['available_gb']:.1f} of {figures['total_gb']:.1f} GB available"
    if warning is not None:
        return Item("memory", FAIL, f"{text}; {warning}", figures)
    return Item("memory", OK, text, figures)


def _files() -> Item:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["no limit" if n == resource.RLIM_INFINITY else str(n) for n in (soft, hard)]
    text = f"{shown[0]} can be open at once, at most {shown[1]}"
    figures = {"soft": soft, "hard": hard}
    # A process that trains raises its limit to the hard one.
    if hard != resource.RLIM_INFINITY and hard < _FILES:
        advice = f"ulimit -Hn {1 << 16}: as root, or limits.conf"
        return Item("open files", OK, text, figures, (f"{advice}; many processes need more files",))
    return Item("open files", OK, text, figures)


def _disk(cfg: Config) -> Item:
    folder = Path(cfg.out_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    figures: dict[str, float] = {"free_gb": free / _GB}
    text = f"{free / _GB:.1f} GB free at {folder}"
    if not os.access(folder, os.W_OK):
        return Item("disk", FAIL, f"{folder} cannot be written", figures)
    try:
        each = make_plan(cfg, gpu=False).checkpoint
    except UserError:  # What a custom class takes is not known.
        return Item("disk", OK, text, figures)
    kept = cfg.checkpoint.keep_last
    written = -(-cfg.trainer.max_steps // cfg.checkpoint.save_interval)
    # One more is written before the oldest is removed.
    needed = each * (written if kept is None else min(kept + 1, written))
    figures["checkpoint_gb"] = each / _GB
    text += f"; a checkpoint takes {each / _GB:.2g} GB, {kept or 'all'} are kept"
    return Item("disk", FAIL if free < needed else OK, text, figures)
