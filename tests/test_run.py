from __future__ import annotations

import pytest
import torch

from lunaris.errors import UserError
from lunaris.lifecycle import explain_out_of_memory


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"out of memory here \(MemoryError\)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nat c10"), "9 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "Tried 2 GiB"),
    ],
)
def test_too_little_memory_is_explained(error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message), explain_out_of_memory("here"):
        raise error
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory("here"):
        raise RuntimeError("another")
