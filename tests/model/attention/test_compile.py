"""Blocks of every attention over the grouped experts' product: one graph each, compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import lookup_backend

from lunaris.model.attention.gqa import GQAFactory
from lunaris.model.attention.mla import MLAFactory
from lunaris.model.attention.sliding_window import SlidingWindowFactory
from lunaris.model.transformer import Transformer
from lunaris.moe import experts
from lunaris.moe.experts import Product
from lunaris.objective.next_token import NextToken

BOTH = {"output_gate": True, "sinks": True}
WIDTHS = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
MHA = {"norm": "pre", "n_kv_heads": 4}
# The factory, the keys of `model`, and how many kinds of layers there are.
KINDS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "gqa": (GQAFactory(), {}, 1),
    "gqa-gate-sinks": (GQAFactory(**BOTH), {}, 1),
    "window": (SlidingWindowFactory(window=5, full_every=2), {}, 2),
    "window-gate-sinks": (SlidingWindowFactory(window=5, full_every=None, **BOTH), {}, 1),
    "mla": (MLAFactory(q_lora_rank=None, **WIDTHS), MHA, 1),
    "mla-gate-sinks": (MLAFactory(q_lora_rank=8, **WIDTHS, **BOTH), MHA, 1),
}


@pytest.fixture(autouse=True)
def grouped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the grouped product, which only a GPU takes by itself, and forget what was compiled."""
    monkeypatch.setattr(experts, "product_for", lambda *_: Product.GROUPED)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch(seed: int, packed: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randint(0, 40, (2, 16), generator=generator) for name in ("tokens", "targets")
    }
    if packed:
        cut = 3 + seed
        made["documents"] = torch.tensor([[0] * cut + [1] * (16 - cut)] * 2)
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # the compiler's own
@pytest.mark.parametrize(
    ("kind", "packed"),
    [*((kind, False) for kind in KINDS), ("window", True), ("mla-gate-sinks", True)],
)
def test_each_kind_of_block_is_one_graph_compiled_once(
    make_model: Callable[..., Transformer], kind: str, packed: bool
) -> None:
    factory, keys, kinds_of_layers = KINDS[kind]
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    results = []
    for compiled in (False, True):
        model = make_model(
            {"n_experts_per_token": 2}, attention=factory, d_model=32, n_layers=4, **keys
        ).train()
        if compiled:
            for block in model.blocks:
                block.forward = torch.compile(
                    block.forward, backend=backend, fullgraph=True, dynamic=False
                )
        losses = []
        for step in range(3):
            # After the first step nothing may be compiled again.
            no_more = torch._dynamo.config.patch(error_on_recompile=True)
            with no_more if compiled and step else nullcontext():
                with torch.autocast("cpu", torch.bfloat16):
                    out = NextToken()(model, batch(step, packed))
                out.total.backward()
            losses.append(out.total.item())
        results.append(losses)
    assert len(graphs) == (1 if packed else kinds_of_layers)
    assert results[1] == pytest.approx(results[0], rel=1e-2)
