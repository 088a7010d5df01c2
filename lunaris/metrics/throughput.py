"""Tokens a second, model FLOPs utilisation, waiting for data, memory."""

from __future__ import annotations

import resource
import time

import torch

# Peak dense bf16 FLOP/s of a device by a part of its name, from the vendors' data sheets.
_PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak bf16 FLOP/s, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16.items() if part in name), None)


def peak_memory_gb(device: torch.device) -> float:
    """Return this process's peak memory in GiB: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Meter:
    """Measures the time between log rows, less what was spent evaluating and saving."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float | None) -> None:
        """tokens_per_step: of all processes; peak: FLOP/s of all processes, or None."""
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._steps = 0
        self._seconds = 0.0
        self._waited = 0.0
        self._since: float | None = None

    def start_step(self) -> None:
        """Begin timing a step, its wait for data included."""
        self._since = time.perf_counter()

    def end_step(self, waited: float) -> None:
        """End timing a step that waited `waited` seconds for its data."""
        assert self._since is not None
        self._seconds += time.perf_counter() - self._since
        self._waited += waited
        self._steps += 1

    def row(self) -> dict[str, float | None]:
        """Return the `perf/` metrics since the last call, and begin anew."""
        tokens_per_s = self._steps * self._tokens_per_step / max(self._seconds, 1e-9)
        row = {
            "perf/tokens_per_s": tokens_per_s,
            "perf/mfu": tokens_per_s * self._flops_per_token / self._peak if self._peak else None,
            "perf/data_wait": self._waited / max(self._seconds, 1e-9),
        }
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return row
