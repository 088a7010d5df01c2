"""Writes safetensors files tensor by tensor, so that memory does not grow with the model.

The library's own `save_file` needs all tensors of a file at once. The format: the header's length
(8 bytes, little-endian), the header (JSON: dtype, shape and offsets of each tensor), the tensors'
bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lunaris.atomic_files import write_json
from lunaris.export.source import CheckpointSource
from lunaris.export.weights import Weight

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: its shape and dtype on disk are known before it is read."""

    weight: Weight
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


def write_weights(
    folder: Path,
    source: CheckpointSource,
    weights: Sequence[Weight],
    *,
    dtype: torch.dtype,
    shard_bytes: int,
) -> int:
    """Write `model.safetensors`, or shards of it with an index; return the bytes of the tensors.

    dtype: of all weights but those marked float32. shard_bytes: the most that a file holds, unless
    one tensor is larger. Reads one tensor of the checkpoint at a time.
    """
    shards = _shards([_entry(source, weight, dtype) for weight in weights], shard_bytes)
    total = sum(entry.bytes for shard in shards for entry in shard)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", source, shards[0])
        return total
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, source, shard)
        index |= {entry.weight.name: name for entry in shard}
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
    )
    return total


def _entry(source: CheckpointSource, weight: Weight, dtype: torch.dtype) -> _Entry:
    shape = weight.make(source.empty(weight.source)).shape
    kept = torch.float32 if weight.float32 else dtype
    return _Entry(weight, tuple(shape), kept, shape.numel() * kept.itemsize)


def _shards(entries: Sequence[_Entry], shard_bytes: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def _write_file(path: Path, source: CheckpointSource, entries: Sequence[_Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.weight.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.weight.make(source.read(entry.weight.source))
            file.write(_bytes_of(tensor.to(entry.dtype)))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
