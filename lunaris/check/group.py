"""Lets the processes of a run look at one thing after another, and keeps what they found."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from lunaris.atomic_files import write_json
from lunaris.check.item import FAIL, Item
from lunaris.config.schema.root import Config
from lunaris.distributed import collectives, session
from lunaris.distributed.heartbeat import record_failure
from lunaris.errors import EXPECTED
from lunaris.launch.local import threads_each
from lunaris.runs.run_dir import RunDir

ITEMS = "items.json"
# By the name of its item, what every process calls to look at something.
Looks = dict[str, Callable[[], Item]]


def look_in_processes(
    path: Path, module: str, looks: Callable[[Config, Path, ExitStack], Looks]
) -> int:
    """Look, as one of the processes, or start them as `python -m module path`.

    Returns the exit code. path: a folder with the frozen config. looks: from it, the folder, and a
    stack for what has to be closed at the end. Rank 0 writes what was found to `items.json` in the
    folder.
    """
    cfg: Config = RunDir(path).read_config()
    processes = cfg.launch.world_size()
    if "RANK" not in os.environ and processes > 1:
        from lunaris.launch.elastic import run_group

        os.environ.setdefault("OMP_NUM_THREADS", str(threads_each(processes)))
        return run_group(path, processes, 0, cfg.launch.collective_timeout_s, module=module)
    try:
        with session.join(cfg.trainer.device, cfg.launch.collective_timeout_s):
            with ExitStack() as stack:
                look(looks(cfg, path, stack), path / ITEMS)
            collectives.barrier()
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        record_failure(error)
        return error.exit_code
    return 0


def look(looks: Looks, file: Path) -> None:
    """Look at one thing after another; every process of an open session calls this.

    Rank 0 writes what was found after each, and before it what it looks at, so that a crash or a
    hang loses nothing else.
    """
    found: list[dict[str, Any]] = []
    for name, at in looks.items():
        if session.rank() == 0:
            write_json(file, {"items": found, "doing": name})
        try:
            item = at()
        except RuntimeError as error:  # That of a broken device.
            item = Item(name, FAIL, str(error).splitlines()[0])
        found.append(_of_all(item).as_dict())
    if session.rank() == 0:
        write_json(file, {"items": found, "doing": None})


def _of_all(item: Item) -> Item:
    """Return the item of the first rank where it failed, with its number, or that of rank 0."""
    items = collectives.gather_objects(item)
    failed = [(rank, each) for rank, each in enumerate(items) if each.state == FAIL]
    if not failed:
        return items[0]
    rank, first = failed[0]
    return replace(first, text=f"rank {rank}: {first.text}") if len(items) > 1 else first
