"""Which activations of a block are kept for the backward pass, and which it computes again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lunaris.torch_internals import ATTENTION_KERNELS, GROUPED_PRODUCT

T = TypeVar("T")

_ATEN = torch.ops.aten
# What costs most to compute again. Operators of this package are such products, too.
_PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    GROUPED_PRODUCT,
}


class Run(Protocol):
    """Calls the computation of a block, and decides what is kept of it for the backward."""

    def __call__(self, compute: Callable[..., T], *args: Any) -> T:
        """Return compute(*args)."""


def keep_all(compute: Callable[..., T], *args: Any) -> T:
    """Return compute(*args); autograd keeps what it needs."""
    return compute(*args)


def run_of(kind: str, *, draws: bool) -> Run:
    """Return how blocks run under a value of `trainer.activation_checkpointing`.

    draws: whether a block draws random numbers, which must be the same ones again.
    """
    if kind == "none":
        return keep_all
    keys: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
    if kind == "selective":
        # A kernel that drops weights itself is run again: it moves the generator's state on, which
        # what is drawn after it depends on.
        kept = _PRODUCTS if draws else _PRODUCTS | ATTENTION_KERNELS
        policy = partial(_policy, kept)
        keys["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    else:
        assert kind == "full", kind
    return partial(_recompute, keys)


def _recompute(keys: dict[str, Any], compute: Callable[..., T], *args: Any) -> T:
    if not torch.is_grad_enabled():
        return compute(*args)
    result: T = checkpoint(compute, *args, **keys)
    return result


def _policy(kept: set[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in kept or op.namespace == "lunaris":
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
