"""The parametrization mup: what training changes does not depend on the width (coordinate check).

Of tiny models the mean absolute change of activations in a few steps is fitted by a power of the
width (arXiv 2203.03466, appendix D.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lunaris.model.attention.mla import MLAFactory
from lunaris.model.generate import generate
from lunaris.model.transformer import Transformer
from lunaris.moe.router.sigmoid import SigmoidRouterFactory
from lunaris.objective.multi_token import MultiToken
from lunaris.objective.next_token import NextToken
from lunaris.optim.adamw import build_adamw
from lunaris.optim.muon import build_muon

Make = Callable[..., Transformer]

WIDTHS = (32, 64, 128, 256)
STEPS, SEEDS = 4, (0, 1)
# Of the fitted exponent in mup: narrow models differ from wide ones, by less than 1.7 in all.
FLAT = 0.25
# In the standard parametrization all changes grow by more.
GROWS = 0.4
ADAM = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8}
MUON = {"momentum": 0.9, "orthogonalization": "newton_schulz", "ns_steps": 5}
SOFTMAX = {"normalize_gates": True}
SIGMOID = {
    "router": SigmoidRouterFactory(), "n_shared_experts": 1, "normalize_gates": True,
    "balancing": "bias",
}  # fmt: skip
MLA = {
    "norm": "pre",
    "n_kv_heads": 4,
    "attention": MLAFactory(
        q_lora_rank=None,
        kv_lora_rank=None,
        qk_nope_head_dim=None,
        qk_rope_head_dim=None,
        v_head_dim=None,
    ),
}
# Keys of `moe`, further keys, and whether heads grow in number instead of width.
KINDS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], bool]] = {
    "dense": (None, {}, False),
    "dense, pre": (None, {"norm": "pre"}, False),
    "dense, more heads": (None, {}, True),
    "untied": (None, {"tie_embeddings": False}, False),
    "latent attention": (None, MLA, False),
    "softmax router": (SOFTMAX, {}, False),
    "sigmoid router": (SIGMOID, {"norm": "pre"}, True),
}


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(32, (8, 25), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def train(model: Transformer, optimizer: torch.optim.Optimizer, objective: Any = None) -> None:
    objective = NextToken() if objective is None else objective
    for _ in range(STEPS):
        objective(model, batch()).total.backward()
        optimizer.step()
        optimizer.zero_grad()


def changes(
    make: Make, width: int, parametrization: str, kind: str, seed: int, muon: bool
) -> dict[str, float]:
    """Return how much a few steps change each activation: its mean absolute difference."""
    moe, keys, more_heads = KINDS[kind]
    if more_heads:
        keys = keys | {"n_heads": width // 8, "n_kv_heads": width // 16, "mup_base_head_width": 8}
    model = make(
        moe, seed=None, d_model=width, vocab_size=32, parametrization=parametrization,
        mup_base_width=WIDTHS[0], **keys,
    )  # fmt: skip
    model.init_weights(seed)
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(record(f"block {i}"))
        block.attention.register_forward_hook(record(f"attention {i}"))
        block.feed_forward.register_forward_hook(record(f"feed-forward {i}"))
        if moe is not None:
            block.feed_forward_norm.register_forward_hook(record(f"input of router {i}"))

    def measured() -> dict[str, Tensor]:
        with torch.no_grad():
            seen["logits"] = model.logits(batch()["tokens"])
            if moe is not None:
                for i, block in enumerate(model.blocks):
                    inner = block.feed_forward.router
                    seen[f"router {i}"] = inner.logits(seen.pop(f"input of router {i}"))
        return dict(seen)

    before = measured()
    keys = ADAM | {"width_multiplier": model.shape.factors.width}
    optimizer = build_muon(model, **MUON, **keys) if muon else None
    train(model, optimizer or build_adamw(model, **keys))
    after = measured()
    return {name: (after[name] - before[name]).abs().mean().item() for name in before}


def exponents(make: Make, parametrization: str, kind: str, muon: bool = False) -> dict[str, float]:
    """Return the exponent of the width in the change of each activation, by least squares."""
    sizes: dict[str, list[float]] = {}
    for width in WIDTHS:
        found = [changes(make, width, parametrization, kind, seed, muon) for seed in SEEDS]
        for name in found[0]:
            sizes.setdefault(name, []).append(sum(each[name] for each in found) / len(found))
    x = torch.tensor(WIDTHS).log()
    x = x - x.mean()
    return {
        name: float((x * torch.tensor(values).log()).sum() / x.square().sum())
        for name, values in sizes.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_changes_do_not_depend_on_the_width_in_mup_and_grow_in_standard(
    kind: str, make_model: Make
) -> None:
    flat = exponents(make_model, "mup", kind)
    assert max(map(abs, flat.values())) < FLAT, flat
    grows = exponents(make_model, "standard", kind)
    assert min(grows.values()) > GROWS, grows
    assert len(flat) == len(grows) == 7 + 2 * (KINDS[kind][0] is not None)


def test_muons_changes_do_not_depend_on_the_width_in_mup(make_model: Make) -> None:
    flat = exponents(make_model, "mup", "dense", muon=True)
    assert max(map(abs, flat.values())) < FLAT, flat
    grows = exponents(make_model, "standard", "dense", muon=True)
    # The change of a block is that of the embedding for the most part.
    assert min(v for name, v in grows.items() if not name.startswith("block")) > GROWS, grows


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_base_width_nothing_differs_in_a_bit(kind: str, make_model: Make) -> None:
    moe, keys, _ = KINDS[kind]
    found = []
    for parametrization in ("standard", "mup"):
        keys = keys | {"parametrization": parametrization, "mup_base_width": 16}
        model = make_model(moe, seed=None, **keys)
        model.init_weights(3)
        assert model.shape.factors.width == 1
        train(model, build_adamw(model, **ADAM, width_multiplier=model.shape.factors.width))
        found.append([*model.parameters(), model.logits(batch()["tokens"])])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_initial_weights_follow_the_width(make_model: Make) -> None:
    keys = {"parametrization": "mup", "mup_base_width": 16, "d_model": 64, "vocab_size": 500}
    model = make_model({"n_experts": 64}, seed=None, n_layers=2, **keys)
    model.init_weights(0)
    block, residual = model.blocks[1], math.sqrt(4)
    for weight, std in (
        (model.embedding.weight, 0.02),
        (block.attention.qkv.weight, 0.02 / 2),
        (block.attention.out.weight, 0.02 / 2 / residual),
        (block.feed_forward.experts.gate_up, 0.02 / 2),
        (block.feed_forward.experts.down, 0.02 / 2 / residual),
        (block.feed_forward.router.weight, 0.02 / 4),
    ):
        assert abs(weight.std().item() / std - 1) < 0.1
    assert (block.feed_forward_norm.weight == 1).all()


def test_logits_and_scores_have_their_factors(make_model: Make) -> None:
    wide = {"d_model": 64, "mup_base_width": 16}
    standard, mup = (
        make_model(seed=None, parametrization=name, **wide) for name in ("standard", "mup")
    )
    standard.init_weights(0)
    mup.load_state_dict(standard.state_dict())
    tokens = batch()["tokens"]
    for block in mup.blocks:
        assert block.attention.q_norm.factor == 0.5  # Heads of 16 instead of 4: √(4/16).
        block.attention.q_norm.factor = 1.0
    assert torch.equal(4 * mup.logits(tokens), standard.logits(tokens))  # A power of two is exact.
    more = make_model(d_model=64, n_heads=16, parametrization="mup", mup_base_width=16,
                      mup_base_head_width=4)  # fmt: skip
    assert more.blocks[0].attention.q_norm.factor == 1
    latent = make_model(parametrization="mup", **wide, **MLA)  # Heads of 16 and 8 columns.
    assert latent.blocks[0].attention.scale == pytest.approx(0.5 / math.sqrt(24))


@pytest.mark.parametrize("kind", ["dense", "latent attention", "softmax router"])
def test_text_from_a_cache_is_that_of_complete_forwards(kind: str, make_model: Make) -> None:
    moe, keys, _ = KINDS[kind]
    model = make_model(moe, d_model=32, parametrization="mup", mup_base_width=16, **keys).eval()
    tokens = prompt = batch()["tokens"][:2, :5]
    for _ in range(8):
        with torch.no_grad():
            new = model.logits(tokens)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, new), dim=1)
    assert torch.equal(generate(model, prompt, 8, temperature=0), tokens)


def test_depths_of_multi_token_prediction_have_the_logits_factor(make_model: Make) -> None:
    keys = {"d_model": 64, "parametrization": "mup", "mup_base_width": 16, "seed": None}
    bare = make_model(**keys)
    objective = MultiToken(depth=2, loss_weight=0.3)
    layers = [block.attention for block in bare.blocks], [b.feed_forward for b in bare.blocks]
    parts = (lambda i, shape: layers[0][i - 2], lambda i, shape: layers[1][i - 2])
    predictors = objective.predictors(bare.shape, *parts)
    model = make_model(predictors=predictors, **keys)
    model.init_weights(0)
    assert [predictor.norm.factor for predictor in predictors] == [0.25, 0.25]
    before = objective(model, batch()).losses
    # All logits are near 0, so that each loss is that of equal probabilities.
    assert all(abs(before[f"mtp_{k}"].value / before["main"].value - 1) < 0.15 for k in (1, 2))
    train(model, build_adamw(model, **ADAM, width_multiplier=4.0), objective)
    after = objective(model, batch()).losses
    assert all(after[name].value < before[name].value for name in ("main", "mtp_1", "mtp_2"))
