"""Names the parts of a model in what torch's profiler records.

A region's name is `lunaris/GROUP/LAYER`, or `lunaris/step/NUMBER` for a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

from lunaris.model.feed_forward import RoutedFeedForward
from lunaris.model.transformer import Transformer

_PREFIX = "lunaris/"
STEP = "step"


def region_name(group: str, number: int) -> str:
    """Return the name of a region."""
    return f"{_PREFIX}{group}/{number}"


def group_of_region(name: str) -> str | None:
    """Return the group of a region's name, or None for a name of another kind."""
    return name.split("/")[1] if name.startswith(_PREFIX) else None


@contextmanager
def regions_of(model: Transformer, *, compiled: bool) -> Iterator[None]:
    """Open a region around each forward of the model's parts, in this context.

    compiled: the blocks are compiled, so that each of them is one region: a hook within one would
    compile it again.
    """
    hooks = [
        hook
        for group, layer, module in _parts(model, compiled)
        for hook in _watch(module, region_name(group, layer))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts(model: Transformer, compiled: bool) -> Iterator[tuple[str, int, nn.Module]]:
    yield "embedding", 0, model.embedding
    if compiled:
        yield from (("compiled blocks", i, unit) for i, unit in enumerate(model.units()))
        return
    blocks: list[Any] = [*model.blocks, *(predictor.block for predictor in model.predictors)]
    for layer, block in enumerate(blocks):
        yield "attention", layer, block.attention
        routed = isinstance(block.feed_forward, RoutedFeedForward)
        yield "experts" if routed else "feed-forward", layer, block.feed_forward
        router = getattr(block.feed_forward, "router", None)
        if isinstance(router, nn.Module):
            yield "router", layer, router


def _watch(module: nn.Module, name: str) -> list[Any]:
    """Register the hooks that open and close a region; return their handles."""
    opened: list[record_function] = []

    def begin(*_: object) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def end(*_: object) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)

    # Recomputation under activation checkpointing leaves a forward early, by an exception.
    return [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end, always_call=True),
    ]
