"""Whether the kernels that a model uses are right on this device, and which ones it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lunaris.check.item import FAIL, OK, Item
from lunaris.config.schema.root import Config
from lunaris.distributed import session
from lunaris.model.activation import ACTIVATIONS
from lunaris.moe import experts
from lunaris.moe.experts import Product
from lunaris.precision import Precision

# Tokens of an expert: as many for each, an expert without any, one with all, and none at all.
_COUNTS = ([24, 24, 24, 24], [40, 0, 7, 49], [0, 96, 0, 0], [0, 0, 0, 0])
_WIDTH, _HIDDEN = 64, 32
# Backward passes, because memory that a kernel does not write holds another value each time.
_REPEATS = 10
# Of bfloat16 products, relative to the largest value.
_TOLERANCE = 2e-2
_LONGEST = 2048
_HEADS = 4
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def kernel_looks(cfg: Config) -> dict[str, Callable[[], Item]]:
    """Return, by the name of its item, what every process calls to look at the kernels."""
    return {"experts": partial(_experts, cfg), "attention": partial(_attention, cfg)}


def _experts(cfg: Config) -> Item:
    """Compare a GPU's two products of experts with one an expert, in bfloat16, both directions."""
    device = session.device()
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    rows = sum(_COUNTS[0])
    x, gradient = drawn(rows, _WIDTH), drawn(rows, _WIDTH)
    weights = drawn(4, _WIDTH, 2 * _HIDDEN), drawn(4, _HIDDEN, _WIDTH)
    dtype = Precision(cfg.trainer.precision, device).dtype
    taken = experts.product_for(device, dtype, *weights) if hasattr(cfg.moe, "n_experts") else None
    found: dict[str, float] = {}
    said, wrong = [], False
    for kind, product in (
        (Product.GROUPED, experts.grouped_product),
        (Product.PADDED, experts.padded_product),
    ):
        mark = " (taken by this run)" if kind is taken else ""
        try:
            worst = _worst_of(product, x, weights, gradient)
        except RuntimeError as error:
            # Where it is not taken nothing rests on it.
            wrong |= kind is taken
            said.append(f"{kind.value}{mark} fails: {str(error).splitlines()[0]}")
            continue
        wrong |= kind is taken and worst > _TOLERANCE
        found[f"{kind.name.lower()}_difference"] = worst
        said.append(f"{kind.value}{mark} {worst:.1e}")
    text = f"difference from {Product.LOOP.value}: {', '.join(said)}"
    if taken is not None:
        text += f"; takes {experts.describe_product(device, dtype, *weights)}"
    figures = {**found, "product": taken.name.lower() if taken else None}
    return Item("experts", FAIL if wrong else OK, text, figures)


def _worst_of(
    product: Callable[..., Tensor], x: Tensor, weights: tuple[Tensor, Tensor], gradient: Tensor
) -> float:
    """Return the largest difference from one product an expert, over all loads and repeats."""
    worst = 0.0
    for counts in _COUNTS:
        sizes = torch.tensor(counts, device=x.device)
        right = _both_ways(experts.one_product_each, x, sizes, weights, gradient)
        for _ in range(_REPEATS):
            found = _both_ways(product, x, sizes, weights, gradient)
            worst = max(worst, *map(_difference, found, right))
    return worst


def _both_ways(
    product: Callable[..., Tensor],
    x: Tensor,
    counts: Tensor,
    weights: tuple[Tensor, Tensor],
    gradient: Tensor,
) -> list[Tensor]:
    """Return the outputs and the gradients of the rows and the weights."""
    inputs = [each.clone().requires_grad_() for each in (x, *weights)]
    rows, *stacked = inputs
    out = product(rows, counts, *stacked, ACTIVATIONS["swiglu"].function)
    out.backward(gradient)
    return [out.detach(), *(each.grad for each in inputs if each.grad is not None)]


def _difference(found: Tensor, right: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite if not finite."""
    if not found.isfinite().all():
        return float("inf")
    scale = right.float().abs().max().clamp_min(1e-6)
    return float((found.float() - right.float()).abs().max() / scale)


def _attention(cfg: Config) -> Item:
    """Try every kernel of scaled dot-product attention on heads as wide as the config's."""
    device = session.device()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.trainer.precision)
    width = cfg.model.d_model // cfg.model.n_heads
    length = min(cfg.model.max_seq_len, _LONGEST)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, _HEADS, length, width, generator=generator).to(device, dtype)
        for _ in range(3)
    )
    found: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for name, backend in _BACKENDS.items():
        try:
            with sdpa_kernel([backend]):
                outputs[name] = _attended(q, k, v)
                found[name] = min(_seconds(q, k, v) for _ in range(3))
        except RuntimeError:
            continue  # It does not take such heads, or is not for this device.
    shape = f"{_HEADS} heads of {width}, {length} positions, causal, {cfg.trainer.precision}"
    if "math" not in outputs:
        return Item("attention", FAIL, f"no kernel takes {shape}")
    tolerance = 1e-4 if dtype is None else _TOLERANCE
    wrong = [n for n, out in outputs.items() if _difference(out, outputs["math"]) > tolerance]
    times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in found.items())
    figures = {f"{name}_s": seconds for name, seconds in found.items()}
    if wrong:
        return Item("attention", FAIL, f"{', '.join(wrong)} differs from math: {shape}", figures)
    return Item("attention", OK, f"{times}; {shape}", figures)


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _seconds(q: Tensor, k: Tensor, v: Tensor) -> float:
    began = time.perf_counter()
    _attended(q, k, v)
    if q.is_cuda:
        torch.cuda.synchronize(q.device)
    return time.perf_counter() - began
