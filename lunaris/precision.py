"""Mixed precision: which dtype the matrix products run in, and the gradient scaler of fp16.

Weights and optimizer state stay float32: bf16 weights under AdamW stop moving once an update is
smaller than half a unit in the last place (2^-9 of the weight).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Precision:
    """The compute dtype of a run, with its autocast context and gradient scaler.

    `scaler` is always there and passes everything through unless the dtype is float16.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.dtype = _DTYPES[name]
        self.device = device
        self.scaler = _Scaler(device.type, enabled=name == "fp16", init_scale=2.0**15)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for forward passes; a null context in fp32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def emulated(self) -> bool:
        """Whether this is a processor without fast products in the dtype: fp32 is faster by far."""
        if self.device.type != "cpu" or self.dtype == torch.float32:
            return False
        if not torch.backends.mkldnn.is_available():
            return True
        if self.dtype == torch.bfloat16:
            return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()


class _Scaler(torch.amp.GradScaler):
    """torch's gradient scaler for gradients of any layout, with one verdict for all processes.

    A process that holds other shards, or other experts, than the one that overflowed must skip
    the step too, or the weights drift apart.
    """

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        grads = [
            p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
        if dist.is_initialized():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}
