"""The tensors of a safetensors file, mapped where they are read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lunaris.errors import UserError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file; begin, end: bytes of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> Tensor:
        """Return the tensor, mapped from the file: what is not read takes no memory."""
        raw = np.memmap(self.path, mode="c", offset=self.begin, shape=(self.end - self.begin,))
        return torch.from_numpy(raw).view(self.dtype).view(self.shape)


def read_header(path: Path, said: str) -> dict[str, StoredTensor]:
    """Return what a safetensors file says of its tensors. Raises UserError for a damaged file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError("its header has an impossible length")
            header = json.loads(file.read(length))
        size = path.stat().st_size
        header.pop("__metadata__", None)
        found = {}
        for name, row in header.items():
            begin, end = (8 + length + offset for offset in row["data_offsets"])
            dtype, shape = _DTYPES.get(row["dtype"]), tuple(row["shape"])
            if dtype is None:
                raise UserError(f"{said}: {path.name}: {name} has the dtype {row['dtype']}")
            if not 8 + length <= begin <= end <= size:
                raise ValueError(f"{name} lies outside of the file")
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has another size than its shape")
            found[name] = StoredTensor(path, dtype, shape, begin, end)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{said}: {path.name} is damaged: {reason}") from error
    return found
