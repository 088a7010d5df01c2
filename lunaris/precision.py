"""Mixed precision: which dtype the matrix products run in, and the gradient scaler of fp16.

Weights and optimizer state stay float32: bf16 weights under AdamW stop moving once an update is
smaller than half a unit in the last place (2^-9 of the weight).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from lunaris.config.schema.trainer import AUTO
from lunaris.torch_internals import AgreedGradScaler, cpu_multiplies

_FIRST_SCALE = 2.0**15
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def chosen_precision(name: str, device: torch.device) -> str:
    """Return `name`, or for `auto` bf16 on a GPU that computes it and fp32 on any other device.

    GPUs of a compute capability below 8.0 only emulate bf16. A CPU takes fp32, also where it has
    products in bf16.
    """
    if name != AUTO:
        return name
    computes = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if computes else "fp32"


class Precision:
    """The compute dtype of a run, with its autocast context and gradient scaler.

    `scaler` changes nothing unless the dtype is float16.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        """name: of `trainer.precision`; `auto` is decided by `chosen_precision`."""
        self.name = chosen_precision(name, device)
        self.dtype = _DTYPES[self.name]
        self.device = device
        scales = self.name == "fp16"
        self.scaler = AgreedGradScaler(device.type, enabled=scales, init_scale=_FIRST_SCALE)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for forward passes; it does nothing in fp32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    @property
    def emulated(self) -> bool:
        """Whether the device is a CPU without fast products in the dtype; fp32 is far faster."""
        slow_on_cpu = self.dtype != torch.float32 and self.device.type == "cpu"
        return slow_on_cpu and not cpu_multiplies(self.dtype)
