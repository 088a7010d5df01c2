"""Approximate orthogonalization of matrices by odd polynomials, for Muon."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

# Coefficients (a, b, c) of p(x) = a·x + b·x³ + c·x⁵, one row an iteration, the last one repeated.
# The quintic of Muon's post moves all singular values in (0, 1] towards 1.
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),)
# Polar Express (arXiv 2505.16932, algorithm 1): each row is the minimax approximation of 1 on what
# the rows before it leave of [0.005, 1], computed by linear programs in float64.
_POLAR_EXPRESS = (
    (8.2987047, -24.4305011, 18.0903059),
    (3.9152212, -2.9211307, 0.5592234),
    (3.1746036, -2.3804329, 0.4978264),
    (2.1894629, -1.5672207, 0.4078872),
    (1.8822792, -1.2580645, 0.3758074),
    (1.875, -1.25, 0.375),
)
METHODS = {"newton_schulz": _NEWTON_SCHULZ, "polar_express": _POLAR_EXPRESS}
# Rounding must not leave a singular value above the range of a polynomial, which is steep there: in
# bfloat16 (relative error 2^-9) the next ones would carry it off. Of the first range, in any dtype.
_MARGIN = 1.01
# Keeps zeros zero; its root is still a normal number.
_TINY = 1e-30


def orthogonalize(matrices: Tensor, steps: int, method: str = "polar_express") -> Tensor:
    """Return the nearest semi-orthogonal matrices, approximately, by `steps` iterations.

    matrices: [..., rows, columns], any float dtype; computed in bfloat16 where a GPU multiplies it
    and in float32 elsewhere; returned in float32. The leading dimensions are a batch (stacked
    experts). A matrix of zeros stays one.

    method: a key of METHODS. `newton_schulz` divides by the Frobenius norm first, as Muon does;
    `polar_express` by the smaller bound ‖XXᵀ‖^½ of the largest singular value, which costs nothing,
    since the first iteration needs XXᵀ anyhow.
    """
    x = matrices.to(_dtype(matrices.device))
    shape = x.shape
    x = x.reshape(prod(shape[:-2]), *shape[-2:])
    tall = x.size(-2) > x.size(-1)
    rows = METHODS[method]
    for step in range(steps):
        a, b, c = rows[min(step, len(rows) - 1)]
        if x.dtype == torch.bfloat16 and step < len(rows) - 1:
            a, b, c = a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        if step == 0:
            bound = _bound(gram, method)
            gram = gram / bound
            x = x / bound.sqrt()
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (x, polynomial) if tall else (polynomial, x)
        x = torch.baddbmm(x, left, right, beta=a)
    return x.float().reshape(shape)


def _dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the products: bfloat16 only where it is not emulated."""
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.bfloat16


def _bound(gram: Tensor, method: str) -> Tensor:
    """Return [N, 1, 1], no less than the largest eigenvalue of each of `gram` [N, M, M]."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if method == "newton_schulz":
        # As Muon's post divides, which also lets an expert without tokens fade out.
        bound = (diagonal.sum(-1)[:, None, None].sqrt() + 1e-7).square()
    else:
        # Divided first, since the squares of very small numbers would be zero.
        largest = diagonal.amax(-1)[:, None, None].clamp_min(_TINY)
        bound = (gram / largest).norm(dim=(-2, -1), keepdim=True) * largest * _MARGIN**2
    return bound.clamp_min(_TINY)
