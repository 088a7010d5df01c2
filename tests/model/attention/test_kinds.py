"""Every attention in a whole model: what each position sees, caching, packing, recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lunaris.model.attention.gqa import GQAFactory
from lunaris.model.attention.mla import MLAFactory
from lunaris.model.attention.sliding_window import SlidingWindowFactory
from lunaris.model.cache import KVCache
from lunaris.model.generate import generate
from lunaris.model.transformer import Transformer
from lunaris.objective.next_token import NextToken

Make = Callable[..., Transformer]
BOTH = {"output_gate": True, "sinks": True}
DERIVED = dict.fromkeys(
    ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
)
MHA = {"norm": "pre", "n_kv_heads": 4}
# The factory and the keys of `model`; in a window model the second of two layers is full.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gqa-gate-sinks": (GQAFactory(**BOTH), {}),
    "window": (SlidingWindowFactory(window=4, full_every=None), {}),
    "window-of-one": (SlidingWindowFactory(window=1, full_every=2), {"norm": "pre"}),
    "window-gate-sinks": (SlidingWindowFactory(window=5, full_every=2, **BOTH), {}),
    "window-over-all": (SlidingWindowFactory(window=99, full_every=None), {}),
    "mla": (MLAFactory(**DERIVED), MHA),
    "mla-gate-sinks": (
        MLAFactory(**DERIVED | {"q_lora_rank": 6, "v_head_dim": 3, "kv_lora_rank": 5}, **BOTH),
        MHA,
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)
moes = pytest.mark.parametrize("moe", [None, {"capacity_factor": 0.75}], ids=["dense", "capacity"])


def build(make_model: Make, kind: str, moe: dict[str, Any] | None = None, **more: Any) -> Any:
    factory, keys = KINDS[kind]
    model = make_model(moe, attention=factory, **keys | more)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.copy_(torch.linspace(-1, 2, len(parameter)))
    return model


def tokens(length: int = 12) -> Tensor:
    return torch.randint(0, 40, (3, length), generator=torch.Generator().manual_seed(1))


@kinds
@moes
def test_the_last_token_changes_no_earlier_logit(
    make_model: Make, kind: str, moe: dict[str, Any] | None
) -> None:
    model = build(make_model, kind, moe).train()
    other = tokens().clone()
    other[:, -1] = (other[:, -1] + 1) % 40
    a, b = model.logits(tokens()), model.logits(other)
    torch.testing.assert_close(a[:, :-1], b[:, :-1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(a[:, -1], b[:, -1])


@kinds
@moes
def test_a_sequence_does_not_see_another(
    make_model: Make, kind: str, moe: dict[str, Any] | None
) -> None:
    model = build(make_model, kind, moe).train()
    other = tokens().clone()
    other[1] = (other[1] + 7) % 40
    a, b = model.logits(tokens()), model.logits(other)
    torch.testing.assert_close(a[[0, 2]], b[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a[1], b[1])


@kinds
@moes
@pytest.mark.parametrize("chunks", [[1] * 12, [3, 1, 1, 6, 1], [1, 7, 4], [12]], ids=str)
def test_decoding_with_a_cache_equals_the_full_forward(
    make_model: Make, kind: str, moe: dict[str, Any] | None, chunks: list[int]
) -> None:
    model = build(make_model, kind, moe).eval()
    cache = model.new_cache(3)
    with torch.no_grad():
        parts = [model.logits(part, cache=cache) for part in tokens().split(chunks, dim=1)]
        full = model.logits(tokens())
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=3e-5)
    assert cache.length == 12


@kinds
def test_a_cache_takes_autocast_dtype(make_model: Make, kind: str) -> None:
    model = build(make_model, kind).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full = model.logits(tokens())
        cache = model.new_cache(3)
        assert {t.dtype for t in held(cache)} == {torch.bfloat16}
        parts = [model.logits(part, cache=cache) for part in tokens().split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0.1, atol=0.3)


@kinds
def test_packed_documents_equal_separate_ones(make_model: Make, kind: str) -> None:
    model = build(make_model, kind).eval()
    documents = torch.tensor([[0] * 5 + [1] * 7, [3] * 12, [0] * 11 + [7]])
    packed = model.logits(tokens(), documents=documents)
    for row, begin, end in ((0, 0, 5), (0, 5, 12), (1, 0, 12), (2, 0, 11), (2, 11, 12)):
        alone = model.logits(tokens()[row : row + 1, begin:end])
        torch.testing.assert_close(packed[row, begin:end], alone[0], rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(
    make_model: Make, kind: str, dropout: float
) -> None:
    found = []
    for checkpointing in ("none", "selective", "full"):
        keys = {"activation_checkpointing": checkpointing, "dropout": dropout}
        model = build(make_model, kind, {}, **keys)
        model.train()
        torch.manual_seed(5)
        out = NextToken()(model, {"tokens": tokens(), "targets": tokens().roll(-1, dims=1)})
        out.total.backward()
        found.append([out.total.detach(), *(p.grad for p in model.parameters())])
    for mine in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], mine, strict=True))
    if kind != "window-of-one":  # Alone, a position has a weight of 1, whatever its query.
        assert all(g.any() for g in found[0])


@kinds
def test_bf16_autocast_is_near_float32(make_model: Make, kind: str) -> None:
    model = build(make_model, kind, {}).train()
    batch = {"tokens": tokens(), "targets": tokens()}
    exact = NextToken()(model, batch).total.item()
    with torch.autocast("cpu", torch.bfloat16):
        out = NextToken()(model, batch)
    out.total.backward()
    assert abs(out.total.item() - exact) < 0.1 * exact
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@kinds
def test_greedy_text_is_that_of_the_full_forward(make_model: Make, kind: str) -> None:
    model = build(make_model, kind).eval()
    prompt = tokens(3)
    out = generate(model, prompt, 14, temperature=0)
    for at in range(3, 17):
        likeliest = model.logits(out[:, :at])[:, -1].topk(2)
        clear = likeliest.values[:, 0] - likeliest.values[:, 1] > 1e-3
        assert torch.equal(out[clear, at], likeliest.indices[clear, 0])
        assert clear.any()


def held(cache: KVCache) -> list[Tensor]:
    """Return the tensors of a cache."""
    found = [value for layer in cache.layers for value in vars(layer).values()]
    return [value for value in found if isinstance(value, Tensor)]


def test_a_token_reaches_as_far_as_its_window(make_model: Make) -> None:
    for window in (1, 3, 12):
        factory = SlidingWindowFactory(window=window, full_every=None)
        model = make_model(None, attention=factory, n_layers=1).eval()
        other = tokens().clone()
        other[:, 4] = (other[:, 4] + 1) % 40
        changed = (model.logits(tokens()) != model.logits(other)).any(-1).any(0)
        assert changed.tolist() == [4 <= at < 4 + window for at in range(12)]


def test_every_nth_layer_is_full(make_model: Make) -> None:
    for every, full in ((2, [1, 3, 5]), (3, [2, 5]), (None, []), (7, [])):
        factory = SlidingWindowFactory(window=4, full_every=every)
        model = make_model(None, attention=factory, n_layers=6)
        windows = [block.attention.window for block in model.blocks]
        assert windows == [None if layer in full else 4 for layer in range(6)]


def test_the_caches_hold_what_the_formulas_say(make_model: Make) -> None:
    """Two layers, width 16, four heads of 4, two key-value heads, 24 positions, float32."""
    length, numbers = 24, {}
    for kind, (factory, keys) in KINDS.items():
        cache = make_model(None, attention=factory, **keys).new_cache(1)
        numbers[kind] = sum(tensor.numel() for tensor in held(cache))
    of_a_position = 2 * 2 * 4  # keys and values of two heads
    assert numbers["gqa-gate-sinks"] == 2 * length * of_a_position
    assert numbers["window"] == 2 * 4 * of_a_position
    assert numbers["window-of-one"] == (1 + length) * of_a_position
    assert numbers["window-gate-sinks"] == (5 + length) * of_a_position
    assert numbers["window-over-all"] == 2 * length * of_a_position
    assert numbers["mla"] == 2 * length * (2 * 4 + 2)
    assert numbers["mla-gate-sinks"] == 2 * length * (5 + 2)


def test_a_window_cache_of_a_long_text_is_that_of_its_end(make_model: Make) -> None:
    """What fell out of every window changes nothing: the ring forgets it."""
    factory = SlidingWindowFactory(window=4, full_every=None)
    model = make_model(None, attention=factory, n_layers=1).eval()
    other = tokens(20).clone()
    other[:, :10] = (other[:, :10] + 3) % 40
    with torch.no_grad():
        for chunks in ([1] * 20, [13, 1, 6]):
            ends = []
            for text in (tokens(20), other):
                cache = model.new_cache(3)
                parts = [model.logits(part, cache=cache) for part in text.split(chunks, dim=1)]
                ends.append(torch.cat(parts, dim=1)[:, 13:])
            torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_flops_count_what_is_attended(make_model: Make) -> None:
    def attention(kind: Any, **keys: Any) -> float:
        model = make_model(None, attention=kind, n_layers=4, **keys)
        products = 6 * model.count_parameters().active
        return model.flops_per_token(24) - products

    full = 12 * 16 * 24
    assert attention(GQAFactory(**BOTH)) == 4 * full
    window = SlidingWindowFactory(window=6, full_every=4)
    assert attention(window) == 3 * full / 4 + full
    assert attention(SlidingWindowFactory(window=99, full_every=None)) == 4 * full
    # Heads of 4: 4 numbers without positions, 2 rotary ones, values of 4; 2 · 3 a product.
    assert attention(MLAFactory(**DERIVED), **MHA) == 4 * 6 * 4 * (4 + 2 + 4) * 24


def test_sinks_start_at_zero_and_gates_half_open(make_model: Make) -> None:
    model = make_model(None, attention=GQAFactory(**BOTH), seed=None, d_model=64)
    model.init_weights(3)
    attention = model.blocks[1].attention
    assert attention.sinks.shape == (4,) and not attention.sinks.any()
    assert attention.gate.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_options_that_are_off_add_nothing(make_model: Make) -> None:
    plain, off = GQAFactory(), GQAFactory(output_gate=False, sinks=False)
    names = [[n for n, _ in make_model(None, attention=f).named_parameters()] for f in (plain, off)]
    assert names[0] == names[1]
    assert not [name for name in names[0] if "gate.weight" in name or "sinks" in name]
