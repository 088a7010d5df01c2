"""Reads a checkpoint tensor by tensor, whatever number of processes wrote it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lunaris.checkpoint_reader import load_tensors, read_metadata

_MODEL = "model."


class CheckpointSource:
    """The weights of one checkpoint; it holds the last tensor that was read, and no more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        found = read_metadata(path).state_dict_metadata
        self._saved = {
            name.removeprefix(_MODEL): entry
            for name, entry in found.items()
            if name.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
        }
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> set[str]:
        """Return the names of all weights and buffers."""
        return set(self._saved)

    def empty(self, name: str) -> Tensor:
        """Return a tensor on the meta device with the shape and dtype of a saved one."""
        entry = self._saved[name]
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """Return a saved tensor, on the CPU."""
        if self._last is None or self._last[0] != name:
            self._last = None  # Freed before the next is read.
            tensor = torch.empty_like(self.empty(name), device="cpu")
            load_tensors(self._path, {name: tensor}, alone=True)
            self._last = (name, tensor)
        return self._last[1]
