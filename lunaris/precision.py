"""Mixed precision: which dtype the matrix products run in, and the gradient scaler of fp16.

Weights and optimizer state stay float32: bf16 weights under AdamW stop moving once an update is
smaller than half a unit in the last place (2^-9 of the weight).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from lunaris.torch_internals import AgreedGradScaler, cpu_multiplies

_FIRST_SCALE = 2.0**15
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Precision:
    """The compute dtype of a run, with its autocast context and gradient scaler.

    `scaler` changes nothing unless the dtype is float16.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.dtype = _DTYPES[name]
        self.device = device
        self.scaler = AgreedGradScaler(device.type, enabled=name == "fp16", init_scale=_FIRST_SCALE)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for forward passes; it does nothing in fp32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    @property
    def emulated(self) -> bool:
        """Whether the device is a CPU without fast products in the dtype; fp32 is far faster."""
        slow_on_cpu = self.dtype != torch.float32 and self.device.type == "cpu"
        return slow_on_cpu and not cpu_multiplies(self.dtype)
