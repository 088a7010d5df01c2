"""How far the numbers of a kernel are from the right ones, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

# Of bfloat16 products, relative to the largest value.
TOLERANCE = 2e-2


def difference(found: Tensor, right: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite if not finite."""
    if not found.isfinite().all():
        return float("inf")
    scale = right.float().abs().max().clamp_min(1e-6)
    return float((found.float() - right.float()).abs().max() / scale)


def least_seconds(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Return the shortest time of a call, in seconds, with what it leaves to a GPU."""
    return min(_seconds(call, device) for _ in range(repeats))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
