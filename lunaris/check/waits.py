"""Where the host waits for a GPU within a step, which leaves the GPU idle after it."""

from __future__ import annotations

import inspect
import os
import sysconfig
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

import lunaris
from lunaris.check.item import OK, Item, skipped
from lunaris.config.schema.root import Config
from lunaris.distributed import session

_SAID = "called a synchronizing CUDA operation"
_PACKAGE = Path(lunaris.__file__).parent
_TORCH = Path(inspect.getfile(torch)).parent
_STDLIB = Path(sysconfig.get_path("stdlib"))
_SHOWN = 5


def host_waits(cfg: Config, step: Callable[[], None]) -> Item:
    """Take a step, and return how often and where the host waits for the GPU in it.

    torch reports most of such calls, not all (`torch.cuda.set_sync_debug_mode`).
    """
    if session.device().type != "cuda":
        return skipped("waits", "needs a GPU: where the host waits for it in a step")
    found = _waits_of(step)
    figures = {"waits": found.total(), "places": dict(found)}
    if not found:
        return Item("waits", OK, "the host does not wait for the GPU in a step", figures)
    shown = [f"{place} ({n})" if n > 1 else place for place, n in found.most_common(_SHOWN)]
    if len(found) > _SHOWN:
        shown.append(f"{len(found) - _SHOWN} more places")
    times = "once" if found.total() == 1 else f"{found.total()} times"
    text = f"the host waits for the GPU {times} in a step: {', '.join(shown)}"
    return Item("waits", OK, text, figures, _advice(cfg, list(found)))


def _waits_of(step: Callable[[], None]) -> Counter[str]:
    """Return how often the host waited, by file and line of who called."""
    found: Counter[str] = Counter()

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _SAID in str(message):
            found[_caller() or f"{filename}:{lineno}"] += 1

    with warnings.catch_warnings():
        # Once for each line would hide the others of it.
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def _caller() -> str | None:
    """Return the innermost line of the run's own code, the package's or a custom class's."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith("<") or _passes_on(frame.filename):
            continue
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            path = path.relative_to(_PACKAGE.parent)
        return f"{path}:{frame.lineno}"
    return None


def _passes_on(filename: str) -> bool:
    """Return whether a file's frames only pass a call on: the check's, torch's and Python's."""
    if _within(_PACKAGE, filename):
        return _within(_PACKAGE / "check", filename)
    if _within(_TORCH, filename):
        return True
    # Of a Python without a virtual environment, the folder for packages is below the library's.
    packages = (_STDLIB / name for name in ("site-packages", "dist-packages"))
    return _within(_STDLIB, filename) and not any(_within(each, filename) for each in packages)


def _within(folder: Path, filename: str) -> bool:
    return filename.startswith(f"{folder}{os.sep}")


def _advice(cfg: Config, places: list[str]) -> tuple[str, ...]:
    """Return what in a config makes the host wait."""
    advice = []
    if getattr(cfg.parallelism, "expert_parallel", 1) > 1 and any(
        place.startswith(("lunaris/moe/", "lunaris/parallelism/")) for place in places
    ):
        advice.append(
            "parallelism.expert_parallel=1, where the experts fit: the host reads the numbers of "
            "rows of each exchange"
        )
    own = [place for place in places if not place.startswith("lunaris/")]
    if own:
        advice.append(f"{own[0]}: code that is not of this package reads values of the GPU")
    return tuple(advice)
