"""Every product compiles to one graph, once: whatever is routed, balanced or activated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lunaris.moe.router.sigmoid import SigmoidRouterFactory

CASES: dict[str, dict[str, Any]] = {
    "softmax-global": {"n_experts_per_token": 2, "normalize_gates": True},
    "softmax-sequence": {"balance_scope": "sequence", "capacity_factor": 1.0},
    "sigmoid-groups-bias-geglu": {
        "router": SigmoidRouterFactory(n_groups=2, topk_groups=1),
        "n_experts_per_token": 2,
        "balancing": "bias",
        "activation": "geglu",
    },
    "sigmoid-global-shared-relu2": {
        "router": SigmoidRouterFactory(),
        "n_shared_experts": 1,
        "activation": "relu2",
    },
    "documents": {"capacity_factor": 0.75, "capacity_scope": "document"},
}


@pytest.mark.filterwarnings("ignore::Warning")  # the compiler's own
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("capability", [(9, 0), (8, 0), None], ids=["grouped", "padded", "loop"])
def test_one_graph_serves_every_step(
    make_layer: Callable[..., nn.Module],
    take_gpu: Callable[[tuple[int, int]], None],
    capability: tuple[int, int] | None,
    name: str,
) -> None:
    if capability is not None:
        take_gpu(capability)
    torch.compiler.reset()
    layer = make_layer(expert_hidden_multiplier=3.0, **CASES[name]).train()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    frames = torch._dynamo.utils.counters["stats"]
    frames.clear()
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(2, 8, 8)
        documents = (torch.arange(8) > step).long().expand(2, 8) if name == "documents" else None
        found = []
        with torch.autocast("cpu", torch.bfloat16):
            for module in (layer, compiled):
                y, stats = module(x, documents)
                (y.square().sum() + stats.loss).backward()
                grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
                found.append([y, stats.loss, stats.load, stats.dropped, *grads])
                layer.zero_grad()
        assert len(found[0]) == len(found[1]) == 4 + len(list(layer.parameters()))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(other, mine, rtol=0.02, atol=0.02)
        layer.update_balance(stats.load)
    assert frames["unique_graphs"] == 1
