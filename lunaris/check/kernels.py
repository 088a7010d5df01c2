"""Whether the kernels that a model uses are right on this device, and which ones it takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lunaris.check.attention import attention_looks
from lunaris.check.item import FAIL, OK, Item
from lunaris.check.numbers import TOLERANCE, difference
from lunaris.config.schema.root import Config
from lunaris.distributed import session
from lunaris.moe import experts
from lunaris.moe.experts import Experts, Product
from lunaris.planning.plan import corpus
from lunaris.precision import Precision
from lunaris.run import bare_model

# Tokens of an expert: as many for each, an expert without any, one with all, and none at all.
_COUNTS = ([24, 24, 24, 24], [40, 0, 7, 49], [0, 96, 0, 0], [0, 0, 0, 0])
# Widths of a model without experts, and on a CPU of experts that would take too long.
_WIDTH, _HIDDEN = 64, 32
_MOST_ON_CPU = 1 << 18
# Backward passes, because memory that a kernel does not write holds another value each time.
_REPEATS = 10


def kernel_looks(cfg: Config) -> dict[str, Callable[[], Item]]:
    """Return, by the name of its item, what every process calls to look at the kernels."""
    model = bare_model(cfg, corpus(cfg)[0])
    return {"experts": partial(_experts, cfg, model), **attention_looks(cfg, model)}


def _experts(cfg: Config, model: nn.Module) -> Item:
    """Compare a GPU's two products of experts with one an expert, in bfloat16, both directions.

    Their widths are those of the model's first experts, of which there are four here.
    """
    device = session.device()
    dtype = Precision(cfg.trainer.precision, device).dtype
    own = next((m for m in model.modules() if isinstance(m, Experts)), None)
    taken, takes = None, ""
    if own is not None:
        taken = experts.product_for(device, dtype, own.gate_up, own.down)
        takes = f"; takes {experts.describe_product(device, dtype, own.gate_up, own.down)}"
    small = own is None or (device.type == "cpu" and own.down[0].numel() > _MOST_ON_CPU)
    tried = Experts(4, _WIDTH, _HIDDEN) if own is None or small else own
    hidden, width = tried.down.shape[1:]
    found: dict[str, float] = {}
    said, wrong = [], False
    for kind, product in (
        (Product.GROUPED, experts.grouped_product),
        (Product.PADDED, experts.padded_product),
    ):
        mark = " (taken by this run)" if kind is taken else ""
        try:
            worst = _worst_of(product, tried, device)
        except RuntimeError as error:
            # Where it is not taken nothing rests on it.
            wrong |= kind is taken
            said.append(f"{kind.value}{mark} fails: {str(error).splitlines()[0]}")
            continue
        wrong |= kind is taken and worst > TOLERANCE
        found[f"{kind.name.lower()}_difference"] = worst
        said.append(f"{kind.value}{mark} {worst:.1e}")
    text = f"difference from {Product.LOOP.value}: {', '.join(said)}; {width} wide, {hidden} hidden"
    figures = {
        **found, "width": width, "hidden": hidden, "product": taken.name.lower() if taken else None
    }  # fmt: skip
    advice: tuple[str, ...] = ()
    if taken is Product.PADDED and own is not None and _unaligned(device, dtype, own):
        advice = (
            "model.multiple_of=64, and model.d_model a multiple of 8: the grouped product of this "
            "GPU needs such widths",
        )
    return Item("experts", FAIL if wrong else OK, text + takes, figures, advice)


def _unaligned(device: torch.device, dtype: torch.dtype, own: Experts) -> bool:
    """Return whether only the widths keep a run from the grouped product."""
    aligned = [weight.new_empty(1, 8, 8) for weight in (own.gate_up, own.down)]
    return experts.product_for(device, dtype, *aligned) is Product.GROUPED


def _worst_of(product: Callable[..., Tensor], tried: Experts, device: torch.device) -> float:
    """Return the largest difference from one product an expert, over all loads and repeats.

    tried: whose widths and activation are taken.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values.to(device, torch.bfloat16)

    rows, width = sum(_COUNTS[0]), tried.down.size(2)
    x, gradient = drawn(rows, width), drawn(rows, width)
    # Outputs as large as their inputs, at any width.
    shapes = [(4, *weight.shape[1:]) for weight in (tried.gate_up, tried.down)]
    weights = [drawn(*shape, scale=shape[1] ** -0.5) for shape in shapes]
    worst = 0.0
    for counts in _COUNTS:
        sizes = torch.tensor(counts, device=device)
        given = (x, sizes, weights, tried.activate, gradient)
        right = _both_ways(experts.one_product_each, *given)
        for _ in range(_REPEATS):
            worst = max(worst, *map(difference, _both_ways(product, *given), right))
    return worst


def _both_ways(
    product: Callable[..., Tensor],
    x: Tensor,
    counts: Tensor,
    weights: list[Tensor],
    activate: experts.Activate,
    gradient: Tensor,
) -> list[Tensor]:
    """Return the outputs and the gradients of the rows and the weights."""
    inputs = [each.clone().requires_grad_() for each in (x, *weights)]
    rows, *stacked = inputs
    out = product(rows, counts, *stacked, activate)
    out.backward(gradient)
    return [out.detach(), *(each.grad for each in inputs if each.grad is not None)]
