"""The widths that follow from a config's keys, for the model and for the plan. No torch.

Shapes: D model width, H hidden width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# By the values of `model.activation`: whether the first product computes a gate and a value (fused,
# the gate first).
GATED = {"swiglu": True, "geglu": True, "relu2": False}


class WidthFactors(NamedTuple):
    """What a parametrization makes of a model's width.

    width: the model's over that of its base model. logits: the factor of the logits. scores: that
    of attention's scores. All are 1 in the standard parametrization, and at the base width.
    """

    width: float = 1.0
    logits: float = 1.0
    scores: float = 1.0


def width_factors(
    parametrization: str, d_model: int, n_heads: int, base_width: int, base_head_width: int | None
) -> WidthFactors:
    """Return the factors of a parametrization: `standard` or `mup` (arXiv 2203.03466, table 8).

    base_head_width: the width of a head of the base model; None: it has as many heads. Scores fall
    by 1/d of the head width d instead of 1/√d, relative to the base model.
    """
    if parametrization == "standard":
        return WidthFactors()
    width = d_model / base_width
    heads = width if base_head_width is None else d_model / n_heads / base_head_width
    return WidthFactors(width, 1 / width, 1 / math.sqrt(heads))


def first_columns(gated: bool, hidden: int) -> int:
    """Return how many columns a feed-forward's first matrix has: 2H with a gate, else H."""
    return 2 * hidden if gated else hidden


def hidden_width(gated: bool, d_model: int, multiplier: float, multiple_of: int) -> int:
    """Return the hidden width H of a feed-forward.

    With a gate: 2/3 · multiplier · D, rounded up to `multiple_of`; the 2/3 keeps the parameters of
    a two-matrix feed-forward of that multiplier (arXiv 2002.05202). Without one there are two
    matrices instead of three, so it is 3/2 of that width: the same number of parameters, exactly
    where the gated width is even.
    """
    width = multiple_of * math.ceil(2 * multiplier * d_model / 3 / multiple_of)
    return width if gated else math.ceil(3 * width / 2)


def expert_width(
    gated: bool,
    d_model: int,
    multiplier: float | None,
    multiple_of: int,
    *,
    dense_multiplier: float,
    active: int,
) -> int:
    """Return the hidden width H of one expert.

    active: experts that a token passes through, shared ones among them. Without a multiplier they
    are together as wide as the dense feed-forward of `dense_multiplier`, each rounded up to a
    multiple of 8, the 16 bytes in bf16 that grouped products ask for (or of `multiple_of`, where
    that is less).
    """
    if multiplier is not None:
        return hidden_width(gated, d_model, multiplier, multiple_of)
    dense = hidden_width(gated, d_model, dense_multiplier, multiple_of)
    step = min(8, multiple_of)
    return dense if active == 1 else step * math.ceil(dense / active / step)


class LatentWidths(NamedTuple):
    """The widths of multi-head latent attention: its latent, and the parts of each head."""

    latent: int
    nope: int
    rope: int
    value: int


def latent_widths(
    head: int, *, latent: int | None, nope: int | None, rope: int | None, value: int | None
) -> LatentWidths:
    """Return the widths of latent attention, None replaced.

    With the head width d = D / heads, None is 2d for the latent, d for the part without positions
    and the value, and d/2, rounded up to an even number, for the rotary part.
    """
    return LatentWidths(
        latent or 2 * head, nope or head, rope or 2 * ((head + 3) // 4), value or head
    )
