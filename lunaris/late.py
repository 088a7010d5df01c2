"""Numbers on the device that the host reads later, without waiting for what follows them."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """A whole number that the device computes and the host reads a step later.

    The copy to the host is queued behind the computation, so that `read` waits for that alone.
    """

    def __init__(self, value: Tensor) -> None:
        """value: [] of any dtype; it must not be changed in place until it is read."""
        self._value = value.to("cpu", non_blocking=True)  # into pinned memory
        self._copied = torch.cuda.Event() if value.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> int:
        """Return the number; waits for the device where it has not computed it yet."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._value)
