"""Settings of the C library's allocator for training on a CPU. No torch."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

# The parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MOST = 2**31 - 1
_TOP_PAD = 256 * 2**20


def keep_freed_memory(device: str | None) -> None:
    """Let glibc keep the memory that a step frees for the next one, where `device` is the CPU.

    By default glibc gives large blocks back to the system, which then clears their pages for every
    step again. Call it before torch allocates. A C library without `mallopt` keeps its defaults.

    device: `trainer.device`; None counts as the CPU where no NVIDIA driver is loaded.
    """
    if sys.platform != "linux" or not trains_on_cpu(device):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST)
        mallopt(_M_TOP_PAD, _TOP_PAD)


def trains_on_cpu(device: str | None) -> bool:
    """Return whether a run with this `trainer.device` trains on the CPU of this machine."""
    return device == "cpu" or (device is None and not Path("/dev/nvidiactl").exists())
