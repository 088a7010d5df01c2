"""Opens what `init_from` names: a run, one of its checkpoints, or a consolidated file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lunaris.checkpoint import find_corruption, load_tensors, newest, saved_shapes
from lunaris.config.schema.root import Config
from lunaris.errors import UserError
from lunaris.model.init import copy_to_shard
from lunaris.runs.discovery import is_run
from lunaris.runs.facts import step_of
from lunaris.runs.run_dir import RunDir

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Where weights lie: the folder of a checkpoint, or a file; run: the folder of its run."""

    path: Path
    run: Path | None

    @property
    def step(self) -> int | None:
        return step_of(self.path) if self.path.is_dir() else None

    def config(self) -> Config | None:
        """Return the config of the run that the weights come from, if it is known."""
        return None if self.run is None else RunDir(self.run).read_config()

    def tokenizer(self) -> Path | None:
        """Return the tokenizer of that run, if it has one."""
        path = None if self.run is None else RunDir(self.run).tokenizer_path
        return path if path is not None and path.is_file() else None


def find(given: str) -> Place:
    """Return the place of the weights that `init_from` names, checked for damage.

    Raises UserError for what holds no weights, and for a damaged checkpoint.
    """
    path = Path(given)
    if path.is_file():
        run = path.parent if is_run(path.parent) else None
        return Place(path, run)
    if (path / "files.json").is_file() and path.name.startswith("step_"):
        fault = find_corruption(path)
        if fault is not None:
            raise UserError(f"init_from={given}: is damaged: {fault}")
        run = path.absolute().parent.parent
        return Place(path, run if is_run(run) else None)
    if not path.is_dir():
        raise UserError(f"init_from={given}: no such file or folder")
    if is_run(path):
        try:
            return Place(newest(RunDir(path).checkpoints), path)
        except UserError as error:
            raise UserError(f"init_from={given}: {error}") from error
    if (path / "config.json").is_file():
        raise UserError(
            f"init_from={given}: is a Hugging Face folder, which cannot be read yet; give a run, a "
            "checkpoint or a model.pt"
        )
    raise UserError(
        f"init_from={given}: not a run's folder, a checkpoint (step_…) or a file of weights"
    )


class Source:
    """The tensors at a place, by the names that they have in the model; read as they are needed."""

    def __init__(self, place: Place) -> None:
        """Raises UserError for a file that is not one of weights."""
        self.place = place
        self._file: dict[str, Tensor] | None = None
        if place.path.is_dir():
            self.shapes: Shapes = saved_shapes(place.path)
            return
        self._file = _open_file(place.path)
        self.shapes = {name: tuple(value.shape) for name, value in self._file.items()}

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Read tensors of the same shapes into `targets`, in place; every process calls this.

        Each process reads what its shards need.
        """
        if self._file is None:
            load_tensors(self.place.path, targets)
            return
        for name, target in targets.items():
            copy_to_shard(target, self._file[name])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return complete tensors on the CPU, float32; each process reads them by itself."""
        if self._file is not None:
            return {name: self._file[name].float() for name in names}
        empty = {name: torch.empty(self.shapes[name]) for name in names}
        load_tensors(self.place.path, empty, alone=True)
        return empty


def _open_file(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a `model.pt` into memory, where only what is read takes any."""
    said = f"init_from={path}"
    try:
        content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # noqa: BLE001 - the library raises many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{said}: not a file of weights that torch.load reads: {reason}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{said}: holds no named tensors")
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{said}: holds more than named tensors; is it a model.pt of a run?")
    return content
