"""Opens what `init_from` names: a run, a checkpoint, a consolidated file, a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lunaris.checkpoint_reader import load_tensors, saved_shapes
from lunaris.config.identity import every_key
from lunaris.config.schema.root import Config
from lunaris.errors import UserError
from lunaris.model.init import copy_to_shard
from lunaris.runs.checkpoint_files import complete, find_corruption
from lunaris.runs.discovery import is_run
from lunaris.runs.facts import step_of
from lunaris.runs.run_dir import RunDir
from lunaris.warm_start.fit import Shapes
from lunaris.warm_start.hugging_face import HuggingFaceFolder

# Keys that change what the same weights compute; of these, those that do not, or by their shapes.
_MEANING = ("model.", "attention.", "objective.logit_soft_cap")
_NO_MEANING = (
    *("model.vocab_size", "model.max_seq_len", "model.dropout", "model.n_layers"),
    *("model.ffn_hidden_multiplier", "model.multiple_of", "model.tie_embeddings"),
)


@dataclass(frozen=True)
class Place:
    """Where weights lie: the folder of a checkpoint, a file, or a Hugging Face folder.

    run: the folder of the run that they come from, if it is known; step: of the checkpoint.
    """

    path: Path
    run: Path | None = None
    step: int | None = None

    def config(self) -> Config | None:
        """Return the config of the run that the weights come from, if it is known."""
        return None if self.run is None else RunDir(self.run).read_config()

    def tokenizer(self) -> Path | None:
        """Return the tokenizer of that run, or of the folder, if it has one."""
        path = (self.path if self.run is None else self.run) / "tokenizer.json"
        return path if path.is_file() else None


def find(given: str) -> Place:
    """Return the place of the weights that `init_from` names, checked for damage.

    Raises UserError for what holds no weights, and for a damaged checkpoint.
    """
    path = Path(given)
    if path.is_file():
        run = path.parent if is_run(path.parent) else None
        return Place(path, run)
    if (path / "files.json").is_file() and path.name.startswith("step_"):
        run = path.absolute().parent.parent
        return _checkpoint(path, run if is_run(run) else None, given)
    if not path.is_dir():
        raise UserError(f"init_from={given}: no such file or folder")
    if is_run(path):
        saved = complete(RunDir(path).checkpoints)
        if not saved:
            raise UserError(f"init_from={given}: the run has no complete checkpoint")
        return _checkpoint(saved[0], path, given)
    if (path / "config.json").is_file():
        return Place(path)
    raise UserError(
        f"init_from={given}: not a run's folder, a checkpoint (step_…), a file of weights or a "
        "Hugging Face folder"
    )


def _checkpoint(path: Path, run: Path | None, given: str) -> Place:
    """Return a checkpoint as a place. Raises UserError for a damaged one."""
    fault = _corruption(path, (path / "files.json").stat().st_mtime_ns)
    if fault is not None:
        raise UserError(f"init_from={given}: {path} is damaged: {fault}")
    return Place(path, run, step_of(path))


@cache
def _corruption(path: Path, changed: int) -> str | None:
    # Read once for all points of a sweep. changed: when the checkpoint was written.
    return find_corruption(path)


class Source(Protocol):
    """The tensors at a place, by the names that they have in the model; read as they are needed."""

    shapes: Shapes

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Read tensors of the same shapes into `targets`, in place; every process calls this.

        Each process reads what its shards need.
        """

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return complete tensors on the CPU, float32; each process reads them by itself."""

    def other_keys(self, cfg: Config) -> list[str]:
        """Return a line for each key with which a config computes something else with them."""


def open_source(place: Place) -> Source:
    """Open what lies at a place. Raises UserError for a file or a folder that cannot be read."""
    if place.path.is_file():
        return FileWeights(place)
    return CheckpointWeights(place) if place.step is not None else HuggingFaceFolder(place.path)


class CheckpointWeights:
    """The weights in a checkpoint."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.shapes: Shapes = saved_shapes(place.path)

    def fill(self, targets: dict[str, Tensor]) -> None:
        load_tensors(self._place.path, targets)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        empty = {name: torch.empty(self.shapes[name]) for name in names}
        load_tensors(self._place.path, empty, alone=True)
        return empty

    def other_keys(self, cfg: Config) -> list[str]:
        return other_keys(self._place.config(), cfg)


class FileWeights:
    """The weights in a `model.pt`."""

    def __init__(self, place: Place) -> None:
        """Raises UserError for a file that is not one of weights."""
        self._place = place
        self._file = _open_file(place.path)
        self.shapes: Shapes = {name: tuple(value.shape) for name, value in self._file.items()}

    def fill(self, targets: dict[str, Tensor]) -> None:
        for name, target in targets.items():
            copy_to_shard(target, self._file[name])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._file[name].float() for name in names}

    def other_keys(self, cfg: Config) -> list[str]:
        return other_keys(self._place.config(), cfg)


def other_keys(before: Config | None, cfg: Config) -> list[str]:
    """Return a line for each key that changes what the same weights compute."""
    if before is None:
        return []
    old, new = every_key(before), every_key(cfg)
    keys = [
        key
        for key in new
        if key.startswith(_MEANING) and key not in _NO_MEANING and old.get(key) != new[key]
    ]
    return [f"{key}={old.get(key)} there, {new[key]} here" for key in keys]


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
