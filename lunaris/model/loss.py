"""The cross-entropy of a vocabulary projection, computed in chunks of positions.

Shapes: T positions, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lunaris.model.layers import compute_dtype

# The number of logits in memory at once. A CPU is fastest while they stay near its cache (16 MiB of
# float32); a GPU needs chunks (256 MiB) in which the products outweigh the weight's gradient sum.
_LOGITS = {"cpu": 1 << 22}
_LOGITS_GPU = 1 << 26


class VocabularyLoss(NamedTuple):
    """The losses of a vocabulary projection, [] float32 each, means over the targets.

    cross_entropy: in nats. z: log² Z, the squared logarithm of the softmax's normaliser (PaLM,
    arXiv 2204.02311, section 5), without a gradient of its own: the gradient of `z_weight` · z is
    part of cross_entropy's, so that one pass over the logits computes both. 0 where z_weight is 0.
    """

    cross_entropy: Tensor
    z: Tensor


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap · tanh(logits / cap), or the logits for None (Gemma 2, arXiv 2408.00118)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None
) -> Tensor:
    """Return the mean cross-entropy [] (float32, nats) of softmax(x Wᵀ) against the targets.

    The arguments are those of `vocabulary_loss`.
    """
    return vocabulary_loss(x, weight, targets, chunk=chunk).cross_entropy


def vocabulary_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    soft_cap: float | None = None,
    z_weight: float = 0.0,
    chunk: int | None = None,
) -> VocabularyLoss:
    """Return the losses of the logits x Wᵀ, capped by `soft_capped`, against the targets.

    x: [..., D]; weight: [V, D]; targets: [...] int64, negative where there is none (0 for a batch
    without any). chunk: positions whose logits are in memory at once; None: a size that suits the
    device. The products run in autocast's dtype, the softmax and all sums in float32.
    """
    if chunk is None:
        chunk = max(64, _LOGITS.get(x.device.type, _LOGITS_GPU) // weight.size(0))
    with_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    options = (chunk, compute_dtype(x), with_grad, soft_cap, z_weight)
    rows = x.reshape(-1, x.size(-1))
    return VocabularyLoss(*_VocabularyLoss.apply(rows, weight, targets.reshape(-1), *options))


class _VocabularyLoss(torch.autograd.Function):
    """Computes both gradients together with the loss, chunk by chunk, and keeps no logits.

    The stored gradients lack the factor 1 / targets, so that float16 can represent them; backward
    multiplies them by it and by the incoming gradient. Per position, with p the softmax of the
    logits l and t the uncapped logits over the cap: d/dl = p (1 + 2 z_weight log Z) − onehot, and
    by the cap dl = 1 − tanh² t.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        dtype: torch.dtype,
        with_grad: bool,
        soft_cap: float | None,
        z_weight: float,
    ) -> tuple[Tensor, Tensor]:
        # Under no_grad, too, needs_input_grad is true for a tensor that requires a gradient.
        need_x, need_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if need_weight
            else None
        )
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        total_z = torch.zeros_like(total)
        wanted = targets >= 0
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            for begin in range(0, x.size(0), chunk):
                rows = slice(begin, begin + chunk)
                x_c, want_c = x[rows].to(dtype), wanted[rows]
                target_c = targets[rows].clamp_min(0)[:, None]
                logits = (x_c @ w.mT).float()
                tanh = None if soft_cap is None else torch.tanh(logits / soft_cap)
                if soft_cap is not None and tanh is not None:
                    logits = tanh * soft_cap
                log_probs = logits.log_softmax(dim=-1)
                loss = log_probs.gather(1, target_c).neg_()
                total += (loss.squeeze(1) * want_c).sum()
                if z_weight:
                    log_z = logits.gather(1, target_c) + loss
                    total_z += (log_z.square().squeeze(1) * want_c).sum()
                if not (need_x or need_weight):
                    continue
                # softmax − onehot, in the same memory
                grad = log_probs.exp_()
                if z_weight:
                    grad.mul_(1 + 2 * z_weight * log_z)
                grad.scatter_add_(1, target_c, torch.full_like(loss, -1.0))
                if tanh is not None:
                    grad.mul_(1 - tanh.square_())
                grad = grad.mul_(want_c[:, None]).to(dtype)
                if grad_x is not None:
                    grad_x[rows] = (grad @ w).to(grad_x.dtype)
                if grad_weight is not None and dtype == torch.float32:
                    grad_weight.addmm_(grad.mT, x_c)
                elif grad_weight is not None:
                    grad_weight += grad.mT @ x_c
        scale = 1.0 / wanted.sum().clamp_min(1)
        ctx.save_for_backward(grad_x, grad_weight, scale)
        ctx.weight_dtype = weight.dtype
        total, total_z = total * scale, total_z * scale
        ctx.mark_non_differentiable(total_z)
        return total, total_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> Any:
        grad_x, grad_weight, scale = ctx.saved_tensors
        factor = grad_output * scale
        if grad_x is not None:
            grad_x = (grad_x * factor).to(grad_x.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * factor).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None, None, None, None
