"""An attention from outside the package: named by its dotted path, different in each layer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.config.instantiate import locate
from lunaris.model.attention.base import Positions
from lunaris.model.attention.gqa import GroupedQueryAttention
from lunaris.model.attention.ranges import first_attended
from lunaris.model.transformer import Transformer
from lunaris.objective.next_token import NextToken

Make = Callable[..., Transformer]
TOY = '''
import torch
from torch import nn

from lunaris.model.attention.base import Attention
from lunaris.model.attention.gqa import GQAFactory
from lunaris.model.roles import Role


class Factory:
    """The mean of the last `window` positions in even layers, grouped queries in odd ones."""

    def __init__(self, *, window: int) -> None:
        self.window = window

    def __call__(self, layer, shape):
        return GQAFactory()(layer, shape) if layer % 2 else WindowMean(shape.d_model, self.window)


class WindowMean(Attention):
    prepared = 0

    def __init__(self, d_model, window):
        super().__init__()
        self.window = window
        self.mix = nn.Linear(d_model, d_model, bias=False)

    def prepare(self, positions):
        def make():
            WindowMean.prepared += 1
            at = torch.arange(positions.end, device=positions.device)
            back = at[positions.start :, None] - at
            seen = ((back >= 0) & (back < self.window)).float()
            if positions.documents is not None:
                seen = seen * (positions.documents[:, :, None] == positions.documents[:, None])
            return seen / seen.sum(-1, keepdim=True)

        return positions.shared((WindowMean, self.window), make)

    def forward(self, x, prepared, cache=None):
        if cache is not None:
            cache.append(x)
            x = torch.cat(cache, dim=1)
        return self.mix(prepared @ x)

    def new_cache(self, batch, max_len, *, device, dtype):
        return []

    def flops_per_token(self, seq_len):
        return 7.0 * seq_len

    def parameter_roles(self):
        return {"mix.weight": Role.MATRIX | Role.RESIDUAL_OUTPUT}
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield the factory, built from its dotted path and its key as a config would."""
    (tmp_path / "toy_attention.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    yield locate("attention._target_", "toy_attention.Factory")(window=3)
    sys.modules.pop("toy_attention")


def tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(0, 40, (2, length), generator=torch.Generator().manual_seed(1))


def test_layers_differ_and_each_brings_its_cache(make_model: Make, toy: Any) -> None:
    model = make_model(None, attention=toy, n_layers=3).eval()
    kinds = [type(block.attention).__name__ for block in model.blocks]
    assert kinds == ["WindowMean", "GroupedQueryAttention", "WindowMean"]
    cache = model.new_cache(2)
    with torch.no_grad():
        parts = [model.logits(part, cache=cache) for part in tokens().split([5, 1, 6], dim=1)]
        torch.testing.assert_close(
            torch.cat(parts, dim=1), model.logits(tokens()), rtol=1e-5, atol=1e-5
        )


def test_a_token_reaches_only_as_far_as_the_windows(make_model: Make, toy: Any) -> None:
    model = make_model(None, attention=toy, n_layers=1).eval()
    other = tokens().clone()
    other[:, 4] = (other[:, 4] + 1) % 40
    changed = (model.logits(tokens()) != model.logits(other)).any(-1).any(0)
    assert changed.tolist() == [position in (4, 5, 6) for position in range(12)]


def test_it_trains_recomputed_and_stays_within_documents(make_model: Make, toy: Any) -> None:
    documents = torch.tensor([[0] * 5 + [1] * 7] * 2)
    found = []
    for kind in ("none", "selective", "full"):
        model = make_model({}, attention=toy, activation_checkpointing=kind).train()
        batch = {"tokens": tokens(), "targets": tokens(), "documents": documents}
        NextToken()(model, batch).total.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        found.append(model.blocks[0].attention.mix.weight.grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    model.eval()
    packed = model.logits(tokens(), documents=documents)[:, :5]
    torch.testing.assert_close(packed, model.logits(tokens()[:, :5]), rtol=1e-5, atol=1e-5)


def test_its_roles_and_flops_count(make_model: Make, toy: Any) -> None:
    model = make_model(None, attention=toy, n_layers=2, seed=None, d_model=64)
    model.init_weights(0)
    mix = model.blocks[0].attention.mix.weight
    assert mix.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    products = 6 * sum(p.numel() for p in model.parameters())
    assert model.flops_per_token(24) == products + 7 * 24 + 12 * 64 * 24


def test_positions_are_prepared_once_a_forward_and_not_once_a_layer(
    make_model: Make, toy: Any
) -> None:
    model = make_model(None, attention=toy, n_layers=6)
    kind = type(model.blocks[0].attention)
    for forwards in (1, 2):
        model.logits(tokens())
        assert kind.prepared == forwards
    shared = Positions(0, 6, torch.device("cpu"), torch.zeros(1, 6, dtype=torch.int64))
    a, b = (model.blocks[layer].attention.prepare(shared) for layer in (1, 3))
    assert isinstance(model.blocks[1].attention, GroupedQueryAttention)
    assert a.cos is b.cos and a.first is b.first is first_attended(shared)
