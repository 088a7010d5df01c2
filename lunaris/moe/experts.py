"""The experts' weights, stacked, and their product over tokens sorted by expert.

Shapes: T assignments, D model width, H hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lunaris.model.activation import ACTIVATIONS, Activation
from lunaris.model.layers import compute_dtype, local_part
from lunaris.model.roles import Role
from lunaris.moe.padded import padded_product

Activate = Callable[[Tensor], Tensor]


class Product(Enum):
    """How the experts' products are computed; the values are what a run prints."""

    GROUPED = "one grouped product"
    PADDED = "padded batched products"
    LOOP = "one product an expert"


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

    def forward(self, x: Tensor, counts: Tensor, most: int | None = None) -> Tensor:
        """Return each row's expert's output ([T, D], in the dtype of the products).

        x: [T, D], sorted by expert; counts: [E] int64 rows of each, T or fewer in all; rows past
        their sum give zeros. most: rows that no expert exceeds, where the host knows it.
        """
        dtype = compute_dtype(x)
        weights = (local_part(self.gate_up).to(dtype), local_part(self.down).to(dtype))
        product = product_for(x.device, dtype, *weights)
        with torch.autocast(x.device.type, enabled=False):
            if product is Product.GROUPED:
                return grouped_product(x.to(dtype), counts, *weights, self.activate)
            if product is Product.PADDED:
                return padded_product(x.to(dtype), counts, *weights, self.activate, most)
            return one_product_each(x.to(dtype), counts, *weights, self.activate)

    def parameter_roles(self) -> dict[str, Role]:
        return {"gate_up": Role.EXPERT, "down": Role.EXPERT | Role.RESIDUAL_OUTPUT}


def choose_product(
    device_type: str, dtype: torch.dtype, capability: tuple[int, int] | None, *, aligned: bool
) -> Product:
    """Return the fastest product that does not wait for the device.

    capability: the compute capability of an NVIDIA GPU, None for anything else. aligned: whether
    rows of the weights are a multiple of 16 bytes.

    torch 2.11 to 2.13 have the kernel of `grouped_mm` for bf16 and capabilities 9.x and 10.x.
    Elsewhere on a GPU the call copies the offsets to the host, waits, and computes one product an
    expert (pytorch/pytorch issue 186620). On a CPU nothing waits, and one product an expert is
    faster than both others (tests/benchmarks/LOG.md).
    """
    if device_type != "cuda":
        return Product.LOOP
    has_kernel = capability is not None and capability[0] in (9, 10)
    if has_kernel and dtype == torch.bfloat16 and aligned:
        return Product.GROUPED
    return Product.PADDED


def product_for(device: torch.device, dtype: torch.dtype, *weights: Tensor) -> Product:
    """Return the product of stacked weights in `dtype` on `device`."""
    aligned = all(size % 8 == 0 for w in weights for size in w.shape[1:])
    return choose_product(device.type, dtype, _capability(device), aligned=aligned)


def describe_product(device: torch.device, dtype: torch.dtype, *weights: Tensor) -> str:
    """Return in a few words which product is taken, and what decided it."""
    product, capability = product_for(device, dtype, *weights), _capability(device)
    name = str(dtype).removeprefix("torch.")
    if capability is None:
        return f"{product.value} ({name} on {device.type})"
    why = f"{name}, compute capability {capability[0]}.{capability[1]}"
    if product is Product.PADDED and dtype == torch.bfloat16 and capability[0] in (9, 10):
        why += ", widths that 8 does not divide"
    return f"{product.value} ({why})"


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int] | None:
    # ROCm's devices are called cuda too, and their capabilities number something else.
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def grouped_product(
    x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, activate: Activate
) -> Tensor:
    """Compute all experts by one call of torch's `grouped_mm`; arguments as in `padded_product`."""
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


def one_product_each(
    x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, activate: Activate
) -> Tensor:
    """Compute one product per expert; on a GPU this waits for the counts."""
    hidden = activate(_ProductEach.apply(x, gate_up, counts))
    out: Tensor = _ProductEach.apply(hidden, down, counts)
    return out


class _ProductEach(torch.autograd.Function):
    """`product_each` and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        return product_each(x, weight, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = product_each(grad, weight.mT, counts) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient_each(x, grad, counts) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


# Operators of this package, so that a block compiles to one graph although the counts are read
# here, and so that selective checkpointing can keep the product (`lunaris.model.recompute`). Each
# writes its results into one tensor: the backward of `unbind` would copy every expert's gradient.
@torch.library.custom_op("lunaris::product_each", mutates_args=())
def product_each(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply each expert's rows of x ([T, D]) by its matrix of the weight ([E, D, H]).

    counts: [E] int64, the rows of each expert, T or fewer in all; rows past their sum give zeros.
    """
    out = x.new_empty(len(x), weight.size(2))
    end = 0
    for i, rows in _rows_of_each(counts):
        torch.mm(x[rows], weight[i], out=out[rows])
        end = rows.stop
    out[end:].zero_()
    return out


@product_each.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.size(2))


@torch.library.custom_op("lunaris::weight_gradient_each", mutates_args=())
def _weight_gradient_each(x: Tensor, grad: Tensor, counts: Tensor) -> Tensor:
    """Return the gradient [E, D, H] of `product_each`'s weight; x: [T, D], grad: [T, H]."""
    out = x.new_empty(len(counts), x.size(1), grad.size(1))
    for i, rows in _rows_of_each(counts):
        # An expert without rows has a product over no row: zero.
        torch.mm(x[rows].mT, grad[rows], out=out[i])
    return out


@_weight_gradient_each.register_fake
def _(x: Tensor, grad: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(len(counts), x.size(1), grad.size(1))


def _rows_of_each(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert and its rows."""
    end = 0
    for i, size in enumerate(counts.tolist()):
        begin, end = end, end + size
        yield i, slice(begin, end)
