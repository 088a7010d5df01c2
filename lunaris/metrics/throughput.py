"""Tokens per second, model FLOPs utilisation, waiting for data, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lunaris.devices import find_device


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak bf16 FLOP/s, or None where it is not known (every CPU)."""
    return named_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak_flops(name: str) -> float | None:
    """Return the peak bf16 FLOP/s of the GPU that CUDA calls `name`, or None for an unknown one."""
    device = find_device(name)
    return device.flops if device else None


def peak_memory_gb(device: torch.device) -> float:
    """Return this process's peak memory in GiB: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Meter:
    """Measures the time between log rows without the time spent evaluating and saving."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float | None) -> None:
        """tokens_per_step: of all processes; peak: FLOP/s of all processes, or None."""
        self._tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self._peak = peak
        self._restart()

    def step(self, waited: float) -> None:
        """Count a step that waited `waited` seconds for its data."""
        self._steps += 1
        self._waited += waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not measure what happens in this context."""
        began = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - began

    def row(self) -> dict[str, float | None]:
        """Return the `perf/` metrics since the last call, and start to measure the next ones.

        On a GPU, call it after something that waited for the device (reading a loss).
        """
        seconds = max(time.perf_counter() - self._since - self._excluded, 1e-9)
        tokens_per_s = self._steps * self._tokens_per_step / seconds
        mfu = tokens_per_s * self.flops_per_token / self._peak if self._peak else None
        row = {
            "perf/tokens_per_s": tokens_per_s,
            "perf/mfu": mfu,
            "perf/data_wait": self._waited / seconds,
        }
        self._restart()
        return row

    def _restart(self) -> None:
        self._steps, self._waited, self._excluded = 0, 0.0, 0.0
        self._since = time.perf_counter()
