"""Whether attention is right on this device, by which kernel it runs, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from lunaris.check.item import FAIL, OK, Item, skipped
from lunaris.check.numbers import TOLERANCE, difference, least_seconds
from lunaris.config.schema.root import Config
from lunaris.distributed import session
from lunaris.model.attention.base import Positions
from lunaris.model.attention.gqa import GroupedQueryAttention
from lunaris.model.attention.heads import attend
from lunaris.model.attention.mla import MultiHeadLatentAttention
from lunaris.model.attention.ranges import first_attended, has_kernel, ranges_mask
from lunaris.precision import Precision

# Positions at most: the plain kernel holds all their pairs.
_LONGEST = {"cuda": 2048, "cpu": 1024}
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_FP32_TOLERANCE = 1e-4
# Times as fast, from which on it is worth to change a key.
_WORTHWHILE = 1.05
_SEQUENCES = 2


@dataclass(frozen=True)
class Heads:
    """The heads of a layer. window: positions that each attends to, None: all up to itself."""

    queries: int
    groups: int
    width: int
    window: int | None = None
    sinks: bool = False

    @classmethod
    def of(cls, model: nn.Module, cfg: Config) -> list[Heads]:
        """Return the different heads of a model's layers; of a custom class, as `model` says."""
        found: dict[Heads, None] = {}
        for layer in model.modules():
            if isinstance(layer, GroupedQueryAttention):
                queries, groups, width = layer.shape.n_heads, layer.n_kv_heads, layer.head_dim
                sinks = layer.sinks is not None
                found[cls(queries, groups, width, layer.window, sinks)] = None
            if isinstance(layer, MultiHeadLatentAttention):
                width = max(layer.nope + layer.rope, layer.value)
                sinks = layer.sinks is not None
                found[cls(layer.n_heads, layer.n_heads, width, None, sinks)] = None
        shape = cfg.model
        default = cls(shape.n_heads, shape.n_kv_heads, shape.d_model // shape.n_heads)
        return list(found) or [default]

    def drawn(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of two sequences, [B, n, L, K], that take gradients."""
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(_SEQUENCES, n, length, self.width, generator=generator)
            .to(session.device(), dtype)
            .requires_grad_()
            for n in (self.queries, self.groups, self.groups)
        )
        return q, k, v

    def logits(self) -> Tensor | None:
        """Return the logits of sinks ([H]), None for heads without."""
        return torch.zeros(self.queries, device=session.device()) if self.sinks else None

    def __str__(self) -> str:
        return f"{self.queries} heads of {self.width} in {self.groups} groups"


def attention_looks(cfg: Config, model: nn.Module) -> dict[str, Callable[[], Item]]:
    """Return, by the name of its item, what every process calls to look at attention."""
    heads = Heads.of(model, cfg)
    return {"attention": partial(_causal, cfg, heads[0]), "ranges": partial(_ranges, cfg, heads)}


def _causal(cfg: Config, heads: Heads) -> Item:
    """Try every kernel of scaled dot-product attention on the run's heads, causal."""
    device, precision = session.device(), Precision(cfg.trainer.precision, session.device())
    length = min(cfg.model.max_seq_len, _LONGEST[device.type])
    q, k, v = heads.drawn(length, precision.dtype)
    sinks = heads.logits()

    def attended() -> Tensor:
        return _attended(q, k, v, sinks)

    found: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    for name, backend in _BACKENDS.items():
        try:
            with sdpa_kernel([backend]):
                outputs[name] = attended().detach()
                found[name] = least_seconds(attended, device)
        except RuntimeError:
            continue  # It does not take such heads, or is not for this device.
    shape = f"{heads}, {length} positions, causal, {precision.name}"
    if "math" not in outputs:
        return Item("attention", FAIL, f"no kernel takes {shape}")
    tolerance = _FP32_TOLERANCE if precision.name == "fp32" else TOLERANCE
    wrong = [n for n, out in outputs.items() if difference(out, outputs["math"]) > tolerance]
    times = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in found.items())
    taken = _kernel_of(attended)
    figures = {f"{name}_s": seconds for name, seconds in found.items()} | {"kernel": taken}
    if wrong:
        return Item("attention", FAIL, f"{', '.join(wrong)} differs from math: {shape}", figures)
    advice: tuple[str, ...] = ()
    if taken == "math" and device.type == "cuda":
        advice = (
            "model.n_heads=N, so that model.d_model / N is 64 or 128: no fast kernel of attention "
            f"takes heads of {heads.width} here",
        )
    return Item("attention", OK, f"takes {taken}: {times}; {shape}", figures, advice)


def _attended(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    return attend(q, k, v, None, sinks=sinks)


def _kernel_of(call: Callable[[], Tensor]) -> str:
    """Return which kernel torch takes for a call, by the operators that a profile of it names."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    ran = {event.key for event in profiled.key_averages()}
    for name in ("flash", "cudnn", "efficient"):
        if any(key.startswith(f"aten::_scaled_dot_product_{name}_attention") for key in ran):
            return name
    return "math"


def _ranges(cfg: Config, heads: list[Heads]) -> Item:
    """Compare documents and windows by the kernel of ranges with those by a mask, both ways."""
    device, precision = session.device(), Precision(cfg.trainer.precision, session.device())
    # The heads of a layer with a window, where there are such.
    own = next((each for each in heads if each.window is not None), heads[0])
    if not has_kernel(device, own.width):
        why = f"no Triton with a C compiler takes heads of {own.width} on this GPU"
        return skipped("ranges", f"{why}; documents and windows are computed by a mask")
    length = min(cfg.model.max_seq_len, _LONGEST[device.type])
    worst, speeds = 0.0, {}
    for name, first in _first_of_each(length, own.window or max(1, length // 4)):
        both_ways = _BothWays(own, precision.dtype, first)
        worst = max(worst, both_ways.worst())
        speeds[name] = both_ways.gain()
    kernel = "FlexAttention" if device.type == "cuda" else "blocks of queries"
    fast = ", ".join(f"{name} {gain:.2f}" for name, gain in speeds.items())
    text = (
        f"{kernel} differ from a mask by {worst:.1e} in outputs and gradients; times as fast: "
        f"{fast}; {own}, {length} positions, {precision.name}"
    )
    figures: dict[str, object] = {"difference": worst, "speed": speeds, "kernel": kernel}
    tolerance = _FP32_TOLERANCE if precision.name == "fp32" else TOLERANCE
    masked = "attention.ranges=masked"
    if worst > tolerance:
        advice = (f"{masked}: the kernel of documents and windows is wrong here",)
        return Item("ranges", FAIL, text, figures, advice)
    used = "documents" if cfg.data.document_masking else "window"
    needs = cfg.data.document_masking or own.window is not None
    auto = getattr(cfg.attention, "ranges", None) == "auto"
    if needs and auto and speeds[used] < 1 / _WORTHWHILE:
        gain = 1 / speeds[used]
        return Item("ranges", OK, text, figures, (f"{masked}: {gain:.2f} times as fast here",))
    return Item("ranges", OK, text, figures)


def _first_of_each(length: int, window: int) -> Iterator[tuple[str, Tensor]]:
    """Yield, by name, where the ranges of documents, of a window and of both begin ([B, L])."""
    at = torch.arange(length, device=session.device())
    # Documents of different lengths, which end elsewhere in each sequence.
    documents = torch.stack([at // max(2, length // n) for n in (3, 5)])
    for name, documents_of, within in (
        ("documents", documents, None), ("window", None, window), ("both", documents, window),
    ):  # fmt: skip
        first = first_attended(Positions(0, length, at.device, documents_of), within)
        if first is not None:  # A window as long as the sequence leaves all positions.
            yield name, first


class _BothWays:
    """Attention to given ranges, forward and backward."""

    def __init__(self, heads: Heads, dtype: torch.dtype, first: Tensor) -> None:
        self._inputs, self._first = heads.drawn(first.size(1), dtype), first
        self._sinks = heads.logits()
        generator = torch.Generator().manual_seed(1)
        queries = self._inputs[0]
        self._gradient = torch.randn(queries.shape, generator=generator).to(queries)

    def __call__(self, *, by_mask: bool) -> list[Tensor]:
        """Return the outputs and the gradients of queries, keys and values."""
        for each in self._inputs:
            each.grad = None
        out = _attended_ranges(*self._inputs, self._first, self._sinks, by_mask=by_mask)
        out.backward(self._gradient)
        return [out.detach(), *(each.grad for each in self._inputs if each.grad is not None)]

    def worst(self) -> float:
        """Return the largest difference of what ranges give from what a mask gives."""
        pairs = zip(self(by_mask=False), self(by_mask=True), strict=True)
        return max(difference(found, right) for found, right in pairs)

    def gain(self) -> float:
        """Return how many times as fast ranges are as a mask."""
        device = self._first.device
        masked, ranges = (
            least_seconds(partial(self, by_mask=by_mask), device) for by_mask in (True, False)
        )
        return masked / ranges


def _attended_ranges(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, sinks: Tensor | None, *, by_mask: bool
) -> Tensor:
    if by_mask:
        return attend(q, k, v, ranges_mask(first), sinks=sinks)
    return attend(q, k, v, None, first=first, sinks=sinks)
