"""The experts' weights, stacked, and their product over tokens sorted by expert.

Shapes: T assignments, D model width, H hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lunaris.model.activation import ACTIVATIONS, Activation
from lunaris.model.layers import compute_dtype, local_part
from lunaris.model.roles import Role

Activate = Callable[[Tensor], Tensor]


class Experts(nn.Module):
    """E feed-forwards with stacked weights.

    gate_up: [E, D, 2H], or [E, D, H] for an activation without a gate; down: [E, H, D].
    """

    def __init__(
        self,
        n_experts: int,
        d_model: int,
        hidden: int,
        activation: Activation = ACTIVATIONS["swiglu"],
    ) -> None:
        super().__init__()
        self.activate = activation.function
        self.gate_up = nn.Parameter(torch.empty(n_experts, d_model, activation.columns(hidden)))
        self.down = nn.Parameter(torch.empty(n_experts, hidden, d_model))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Return each row's expert's output ([T, D], in the dtype of the products).

        x: [T, D], sorted by expert; counts: [E] int64 rows of each, T or fewer in all; rows past
        their sum give zeros.
        """
        dtype = compute_dtype(x)
        weights = (local_part(self.gate_up).to(dtype), local_part(self.down).to(dtype))
        with torch.autocast(x.device.type, enabled=False):
            if grouped_mm_fits(x, dtype, *weights):
                return grouped_product(x.to(dtype), counts, *weights, self.activate)
            return one_product_each(x.to(dtype), counts, *weights, self.activate)

    def parameter_roles(self) -> dict[str, Role]:
        return {"gate_up": Role.EXPERT, "down": Role.EXPERT | Role.RESIDUAL_OUTPUT}


def grouped_mm_fits(x: Tensor, dtype: torch.dtype, *weights: Tensor) -> bool:
    """Return whether `grouped_mm` is correct and fast here: bf16 on a GPU, rows of 16 bytes.

    On a CPU it is slower than one product an expert (tests/benchmarks/LOG.md).
    """
    aligned = all(size % 8 == 0 for w in weights for size in w.shape[1:])
    return x.is_cuda and dtype == torch.bfloat16 and aligned


def grouped_product(
    x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, activate: Activate
) -> Tensor:
    ends = counts.cumsum(0)
    # Rows past the last expert's are not computed: their memory must reach neither direction.
    inside = (torch.arange(len(x), device=x.device) < ends[-1])[:, None]
    x = torch.where(inside, x, 0)
    offsets = ends.to(torch.int32)
    hidden = activate(F.grouped_mm(x, _ZeroWhereIdle.apply(gate_up, counts), offs=offsets))
    hidden = torch.where(inside, hidden, 0)
    out = F.grouped_mm(hidden, _ZeroWhereIdle.apply(down, counts), offs=offsets)
    return torch.where(inside, out, 0)


class _ZeroWhereIdle(torch.autograd.Function):
    """Returns the weights unchanged; their gradient is zero where an expert has no row.

    Some GPUs leave uninitialised memory there (pytorch/pytorch issue 172439).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (counts,) = ctx.saved_tensors
        return grad.masked_fill((counts == 0)[:, None, None], 0), None


@torch.compiler.disable
def one_product_each(
    x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, activate: Activate
) -> Tensor:
    """Compute one product per expert, for fp32 and fp16; on a GPU this waits for the counts."""
    sizes = counts.tolist()
    rest = len(x) - sum(sizes)
    *parts, past = x.split([*sizes, rest])
    # The backward of unbind stacks once; that of an index allocates full-size zeros each time.
    outputs = [
        activate(part @ up) @ out
        for part, up, out in zip(parts, gate_up.unbind(), down.unbind(), strict=True)
    ]
    return torch.cat([*outputs, torch.zeros_like(past)])
