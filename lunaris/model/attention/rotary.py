"""Rotary positions (arXiv 2104.09864).

Shapes: B sequences, L positions, H heads, K head width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def rope_tables(
    length: int, head_dim: int, theta: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ([length, K/2] float32) of rotary positions.

    Computed on the CPU in float64 and kept per device, so that all layers read the same memory.
    """
    index = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    frequencies = theta ** (-index / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x ([B, L, H, K]) by its positions (cos, sin: [L, K/2]), in float32.

    The pair (i, i + K/2) is one plane, as in Hugging Face's models.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.type_as(x)
