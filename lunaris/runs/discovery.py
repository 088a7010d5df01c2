"""The runs and sweeps below a folder, recognised by their files. No torch, no Hydra."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lunaris.errors import UserError
from lunaris.runs.facts import checkpoint_folders
from lunaris.runs.preparation import is_preparation
from lunaris.runs.run_dir import RunDir
from lunaris.runs.sweep_manifest import are_texts, read_manifest, read_points


@dataclass(frozen=True)
class FoundRun:
    """A run, or a point of a sweep. The folder of a point may be absent.

    overrides: as given on the command line; of a point, those that not all points of its sweep
    share. sweep: the folder of the point's sweep. prepares: whether it is no run, but a folder of
    shards that jobs prepare.
    """

    path: Path
    name: str
    overrides: list[str]
    sweep: Path | None = None
    prepares: bool = False


def is_run(folder: Path) -> bool:
    """Return whether `folder` holds a run, whose config.yaml may be missing."""
    run_dir = RunDir(folder)
    return run_dir.config_path.exists() or bool(checkpoint_folders(run_dir.checkpoints))


def is_sweep(folder: Path) -> bool:
    """Return whether `folder` holds a sweep."""
    return read_points(folder) is not None


def find_runs(folder: Path, *, preparations: bool = False) -> list[FoundRun]:
    """Return the run in `folder`, the points of the sweep in it, or all below it, sorted by path.

    preparations: the folders of shards, too, that jobs prepare. Raises UserError when there are
    none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = list(_in(folder, preparations))
    if not found:
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                found += _in(child, preparations)
                if child.name in ("runs", "sweeps", "shards"):
                    for grandchild in sorted(child.iterdir()):
                        found += _in(grandchild, preparations)
    if not found:
        raise UserError(f"{folder}: holds no runs and no sweeps")
    return found


def expected_runs(folder: Path, *, preparations: bool = False) -> list[FoundRun]:
    """Return what `find_runs` does, without the points that a sweep's command does not have."""
    removed = read_manifest(folder).removed if is_sweep(folder) else []
    return [run for run in find_runs(folder, preparations=preparations) if run.name not in removed]


def completions(begun: str) -> list[str]:
    """Return the folders that a shell may complete a begun path to; a run or sweep ends there.

    Where nothing is begun, those are the runs in `runs` and the sweeps in `sweeps`.
    """
    head, slash, start = begun.rpartition("/")
    folders = [Path(head + slash)] if begun else [Path("runs"), Path("sweeps")]
    found = []
    for folder in folders:
        for child in sorted(folder.iterdir()) if folder.is_dir() else []:
            if child.name.startswith(start) and child.is_dir():
                ends = is_run(child) or is_sweep(child)
                # With the begun part as it is: `./runs/` would not match `runs/NAME`.
                path = f"{head}{slash}{child.name}" if begun else str(child)
                found.append(path if ends else f"{path}/")
    return found


def _in(folder: Path, preparations: bool) -> Iterator[FoundRun]:
    if preparations and is_preparation(folder):
        yield FoundRun(folder, folder.name, [], prepares=True)
    elif is_run(folder):
        overrides = RunDir(folder).noted("overrides")
        yield FoundRun(folder, folder.name, overrides if are_texts(overrides) else [])
    elif folder.is_dir() and (points := read_points(folder)) is not None:
        shared = set.intersection(*(set(p.overrides) for p in points)) if points else set()
        for point in points:
            given = [text for text in point.overrides if len(points) == 1 or text not in shared]
            yield FoundRun(folder / point.dir, point.name, given, folder)
