"""Sampling with drafts gives the text that sampling without them gives, in fewer forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lunaris.model.attention.gqa import GQAFactory
from lunaris.model.attention.mla import MLAFactory
from lunaris.model.attention.sliding_window import SlidingWindowFactory
from lunaris.model.block import Block
from lunaris.model.cache import WindowCache
from lunaris.model.generate import stream
from lunaris.model.lookahead import Predictor
from lunaris.model.speculative import stream_ahead
from lunaris.model.transformer import Transformer
from lunaris.moe.factory import DenseFactory

Make = Callable[..., Transformer]
WIDTHS = {"q_lora_rank": 6, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gqa": (GQAFactory(), {}),
    "window": (SlidingWindowFactory(window=3, full_every=None), {}),
    "window-of-one": (SlidingWindowFactory(window=1, full_every=2), {}),
    "window-gate-sinks": (
        SlidingWindowFactory(window=5, full_every=2, output_gate=True, sinks=True),
        {},
    ),
    "mla": (MLAFactory(**WIDTHS, v_head_dim=5), {"norm": "pre", "n_kv_heads": 4}),
}


@pytest.fixture
def make(make_model: Make) -> Make:
    """Return a function to a float64 model with drafts; of three tokens, a draft is often right."""

    def build(kind: str = "gqa", depth: int = 2, vocab_size: int = 3, **more: Any) -> Transformer:
        attention, keys = KINDS[kind]
        plain = make_model(None, attention=attention, **keys)
        blocks = [
            Block(attention(2 + i, plain.shape), DenseFactory()(2 + i, plain.shape), plain.shape)
            for i in range(depth)
        ]
        predictors = [Predictor(block, plain.shape) for block in blocks]
        made = {"attention": attention, "predictors": predictors, "vocab_size": vocab_size}
        return make_model(**{"moe": None} | made | keys | more).double().eval()

    return build


def counted(model: Transformer) -> list[int]:
    """Return a list that takes the length of each forward of the model."""
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].size(1)))
    return lengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("length", [1, 9, 30])
def test_the_text_is_the_same_in_fewer_forwards(
    make: Make, kind: str, depth: int, length: int
) -> None:
    """30 tokens are longer than the 24 positions of the model, and 60 more make it read again."""
    model = make(kind, depth)
    prompt = torch.randint(3, (1, length), generator=torch.Generator().manual_seed(length))
    for sampling in ({"temperature": 0.0}, {"temperature": 3.0, "seed": 4, "top_p": 0.95}):
        want = torch.cat(list(stream(model, prompt, 60, **sampling))).tolist()
        lengths = counted(model)
        found = torch.cat(list(stream_ahead(model, prompt, 60, **sampling))).tolist()
        assert found == want
    assert len(lengths) < 55 and max(lengths[1:]) >= 1 + depth


@pytest.mark.parametrize("kind", ["gqa", "window"])
def test_a_mixture_of_experts_with_capacity_drafts_alike(make: Make, kind: str) -> None:
    model = make(kind, 2, moe={"capacity_factor": 0.5})
    prompt = torch.tensor([[1, 2, 0]])
    want = list(stream(model, prompt, 30, seed=2))
    assert list(stream_ahead(model, prompt, 30, seed=2)) == want


def test_it_ends_at_end_of_text(make: Make) -> None:
    model = make(vocab_size=6)
    prompt = torch.tensor([[1, 2, 3]])
    for eot in range(6):
        want = [int(token) for token in stream(model, prompt, 20, seed=3, eot_id=eot)]
        found = [int(token) for token in stream_ahead(model, prompt, 20, seed=3, eot_id=eot)]
        assert found == want and eot not in found


@pytest.mark.parametrize("length", [1, 5])
def test_perfect_drafts_are_all_taken(make: Make, length: int) -> None:
    """With depths and blocks that add nothing, a constant text is drafted without a mistake."""
    model = make(depth=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embedding" not in name:
                parameter.zero_()
        for predictor in model.predictors:
            predictor.project.weight[:, :16] = torch.eye(16)
        model.embedding.weight.zero_()
        model.embedding.weight[:, 0] = torch.tensor([1.0, 1.0, 3.0])
    lengths = counted(model)
    prompt = torch.full((1, length), 2)
    found = list(stream_ahead(model, prompt, 13, temperature=0.0))
    assert [int(token) for token in found] == [2] * 13
    # The prompt gives one token, three forwards of four positions give four each.
    assert lengths == [length, 4, 4, 4]


@pytest.mark.parametrize("chunk", [2, 3, 7])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_a_window_cache_forgets_what_a_chunk_brought(window: int, chunk: int) -> None:
    """Truncated, it continues like a cache that never saw the positions taken back."""

    def numbers(begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, dtype=torch.float32)[None, None, :, None]

    def empty() -> WindowCache:
        return WindowCache(torch.zeros(1, 1, window, 1), torch.zeros(1, 1, window, 1))

    for before in (0, 1, 4):
        for kept in range(chunk + 1):
            revised, straight = empty(), empty()
            for cache in (revised, straight):
                for at in range(before):
                    cache.extend(numbers(at, at + 1), -numbers(at, at + 1))
            revised.extend(100 + numbers(before, before + chunk), numbers(0, chunk))
            if kept:
                straight.extend(100 + numbers(before, before + kept), numbers(0, kept))
            if kept or not before:
                revised.truncate(before + kept)
                for _ in range(2):
                    more = numbers(50, 50 + 2)
                    for a, b in zip(
                        revised.extend(more, more), straight.extend(more, more), strict=True
                    ):
                        assert torch.equal(a, b)
