"""The whole model: what each position sees, caching, recomputation, accumulation, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lunaris.model.transformer import Transformer
from lunaris.moe.router.sigmoid import SigmoidRouterFactory
from lunaris.objective.base import ObjectiveOutput
from lunaris.objective.next_token import NextToken

Make = Callable[..., Transformer]
MOES: list[dict[str, Any] | None] = [
    None,
    {},
    {"capacity_factor": 0.75, "n_shared_experts": 1},
    {"balancing": "bias", "n_experts_per_token": 1, "first_dense_layers": 1},
    {
        "router": SigmoidRouterFactory(n_groups=2, topk_groups=1, route_scale=1.5),
        "balancing": "bias",
        "normalize_gates": True,
        "capacity_factor": 0.75,
    },
]
moes = pytest.mark.parametrize("moe", MOES, ids=["dense", "top2", "capacity", "bias", "sigmoid"])
norms = pytest.mark.parametrize("norm", ["qk_reorder", "pre"])


def batch(b: int = 3, length: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(0, 40, (b, length + 1))
    return tokens[:, :-1], tokens[:, 1:].clone()


def losses(
    model: Transformer, tokens: Tensor, targets: Tensor, rows: slice = slice(None)
) -> ObjectiveOutput:
    return NextToken()(model, {"tokens": tokens[rows], "targets": targets[rows]})


def grads(model: Transformer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    model.zero_grad()
    return found


@norms
@moes
def test_the_last_token_changes_no_earlier_logit(
    make_model: Make, moe: dict[str, Any] | None, norm: str
) -> None:
    model = make_model(moe, norm=norm).train()
    tokens, _ = batch()
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % 40
    a, b = model.logits(tokens), model.logits(other)
    torch.testing.assert_close(a[:, :-1], b[:, :-1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(a[:, -1], b[:, -1])


@moes
def test_a_sequence_does_not_see_another(make_model: Make, moe: dict[str, Any] | None) -> None:
    model = make_model(moe).train()
    tokens, _ = batch()
    other = tokens.clone()
    other[1] = (tokens[1] + 7) % 40
    a, b = model.logits(tokens), model.logits(other)
    torch.testing.assert_close(a[[0, 2]], b[[0, 2]], rtol=1e-5, atol=1e-5)


@norms
@moes
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 4, 2], [12]], ids=str)
def test_decoding_with_a_cache_equals_the_full_forward(
    make_model: Make, moe: dict[str, Any] | None, norm: str, chunks: list[int]
) -> None:
    model = make_model(moe, norm=norm).eval()
    tokens, _ = batch()
    cache = model.new_cache(len(tokens))
    with torch.no_grad():
        parts = [model.logits(part, cache=cache) for part in tokens.split(chunks, dim=1)]
        full = model.logits(tokens)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-5, atol=1e-5)
    assert cache.length == 12


@moes
def test_packed_documents_equal_separate_ones(make_model: Make, moe: dict[str, Any] | None) -> None:
    model = make_model(moe).eval()
    tokens, _ = batch(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [3] * 12])
    packed = model.logits(tokens, documents=documents)
    torch.testing.assert_close(packed[:1, :5], model.logits(tokens[:1, :5]), rtol=1e-5, atol=1e-5)
    # Rotary positions count on through a pack; attention knows their differences alone.
    torch.testing.assert_close(packed[:1, 5:], model.logits(tokens[:1, 5:]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[1:], model.logits(tokens[1:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [3, 6, 9])
def test_packed_documents_do_not_share_capacity(make_model: Make, first: int) -> None:
    model = make_model({"capacity_factor": 0.75}).train()
    tokens, _ = batch(1, 12)
    documents = torch.tensor([[0] * first + [1] * (12 - first)])
    packed = model.logits(tokens, documents=documents)
    dropped = 0
    for part in (slice(0, first), slice(first, 12)):
        alone = model(tokens[:, part])
        dropped += alone.dropped.sum()
        torch.testing.assert_close(packed[:, part], alone.outputs["logits"], rtol=1e-4, atol=1e-4)
    assert dropped > 0
    other = tokens.clone()
    other[:, :first] = (tokens[:, :first] + 7) % 40
    again = model.logits(other, documents=documents)
    torch.testing.assert_close(again[:, first:], packed[:, first:], rtol=1e-5, atol=1e-5)
    shared = make_model({"capacity_factor": 0.75, "capacity_scope": "sequence"}).train()
    a, b = (shared.logits(t, documents=documents)[:, first:] for t in (tokens, other))
    assert not torch.allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tie", [True, False])
@moes
def test_losses_equal_cross_entropy_of_the_logits(
    make_model: Make, moe: dict[str, Any] | None, tie: bool
) -> None:
    model = make_model(moe, tie_embeddings=tie).train()
    tokens, targets = batch()
    targets[0, :4] = -100
    out = losses(model, tokens, targets)
    main = out.losses["main"].value
    main.backward()
    got = grads(model)
    plain = F.cross_entropy(
        model.logits(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100
    )
    plain.backward()
    torch.testing.assert_close(main, plain)
    torch.testing.assert_close(got, grads(model), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.total, main + out.losses["aux"].value)
    layers = 0 if moe is None else 2 - moe.get("first_dense_layers", 0)
    assert out.load.shape == ((layers, 4) if layers else (0, 0))
    k = 0 if moe is None else moe.get("n_experts_per_token", 2)
    assert (out.load.sum(1) == 36 * k).all()
    assert out.dropped.shape == (layers,)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@moes
def test_activation_checkpointing_changes_nothing(
    make_model: Make, moe: dict[str, Any] | None, dropout: float
) -> None:
    tokens, targets = batch()
    results = []
    for kind in ("none", "selective", "full"):
        model = make_model(moe, activation_checkpointing=kind, dropout=dropout).train()
        torch.manual_seed(5)
        out = losses(model, tokens, targets)
        out.total.backward()
        results.append((out, grads(model)))
    (plain, g), *others = results
    for again, h in others:
        assert torch.equal(again.total, plain.total)
        # Counts are returned by the first forward alone; a recomputed one adds nothing.
        assert torch.equal(again.load, plain.load) and torch.equal(again.dropped, plain.dropped)
        assert all(torch.equal(h[name], g[name]) for name in g)


@moes
def test_accumulation_over_sequences_changes_nothing(
    make_model: Make, moe: dict[str, Any] | None
) -> None:
    model = make_model(moe).train()
    tokens, targets = batch(4)
    whole = losses(model, tokens, targets)
    whole.total.backward()
    want = grads(model)
    parts = []
    for rows in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)):
        parts.append(losses(model, tokens, targets, rows))
        (parts[-1].total / 4).backward()
    torch.testing.assert_close(grads(model), want, rtol=1e-4, atol=1e-5)
    aux = [p.losses["aux"].value for p in (whole, *parts)]
    torch.testing.assert_close(sum(aux[1:]) / 4, aux[0])
    torch.testing.assert_close(sum(p.load for p in parts), whole.load)
    torch.testing.assert_close(sum(p.dropped for p in parts), whole.dropped)


def test_balance_moves_once_a_call_and_only_there(make_model: Make) -> None:
    model = make_model({"balancing": "bias", "bias_update_rate": 0.25}).train()
    tokens, targets = batch()
    out = losses(model, tokens, targets)
    out.total.backward()
    biases = [block.feed_forward.router.balance_bias for block in model.blocks]
    assert not any(bias.any() for bias in biases)
    model.update_balance(out.load)
    for bias, load in zip(biases, out.load, strict=True):
        assert torch.equal(bias, 0.25 * torch.sign(load.mean() - load))


def test_the_language_model_loss_trains_every_router(make_model: Make) -> None:
    model = make_model({"n_experts_per_token": 1}).train()
    losses(model, *batch()).losses["main"].value.backward()
    for block in model.blocks:
        assert block.feed_forward.router.weight.grad.abs().max() > 1e-6


def test_bf16_autocast_trains_with_float32_weights(make_model: Make) -> None:
    model = make_model({"capacity_factor": 1.0}).train()
    exact = losses(model, *batch()).total.item()
    with torch.autocast("cpu", torch.bfloat16):
        out = losses(model, *batch())
        assert model.logits(batch()[0]).dtype == torch.float32
    out.total.backward()
    assert out.total.dtype == torch.float32
    assert abs(out.total.item() - exact) < 0.1 * exact
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads(model).values())


def test_a_cache_takes_autocast_dtype(make_model: Make) -> None:
    model = make_model({}).eval()
    tokens, _ = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full = model.logits(tokens)
        cache = model.new_cache(len(tokens))
        parts = [model.logits(part, cache=cache) for part in tokens.split([5, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0.1, atol=0.3)


def test_parameters_and_flops_are_counted(make_model: Make) -> None:
    model = make_model({"n_experts": 4, "n_experts_per_token": 1}, n_layers=1, n_heads=2)
    hidden = 24  # 2/3 · 2 · 16, up to a multiple of 8
    expert = 3 * 16 * hidden
    rest = 40 * 16 + 16 * (16 + 2 * 16) + 16 * 16 + 4 * 16 + 4 * 16  # …, router, four norms
    assert model.count_parameters() == (rest + 4 * expert, rest + expert)
    assert model.flops_per_token(24) == 6 * (rest + expert) + 12 * 16 * 24


def test_too_long_a_sequence_is_refused(make_model: Make) -> None:
    with pytest.raises(AssertionError, match="25 positions, made for 24"):
        make_model()(torch.zeros(1, 25, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # the compiler's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_give_the_same(make_model: Make, backend: str) -> None:
    torch.compiler.reset()
    tokens, targets = batch()
    results = []
    for compiled in (False, True):
        moe = {"capacity_factor": 1.0, "first_dense_layers": 1}
        kind = "selective" if backend == "inductor" else "full"
        model = make_model(moe, activation_checkpointing=kind).train()
        if compiled:
            for block in model.blocks:
                block.forward = torch.compile(block.forward, backend=backend)
        out = losses(model, tokens, targets)
        out.total.backward()
        results.append((out.total.detach(), grads(model)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
