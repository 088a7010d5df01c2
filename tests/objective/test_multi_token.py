"""Multi-token prediction against its definition in float64, and what it must not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lunaris.metrics.records import read_rows
from lunaris.model.transformer import Transformer
from lunaris.moe import experts
from lunaris.moe.experts import Product
from lunaris.objective.multi_token import MultiToken, later_targets
from lunaris.objective.next_token import NextToken
from lunaris.run import bare_model
from lunaris.runs.run_dir import RunDir

SPLIT = ["trainer.batch_size=2", "trainer.gradient_accumulation_steps=2"]


@pytest.fixture
def make(tiny: Callable[..., Any]) -> Callable[..., Transformer]:
    """Return a function from overrides to a model with weights and its predictors."""

    def build(*overrides: str) -> Transformer:
        cfg = tiny("objective=multi_token", *overrides)
        model = bare_model(cfg, 64).to_empty(device="cpu")
        model.init_weights(3)
        for parameter in model.parameters():  # far from zero, so that differences show
            parameter.data.mul_(8.0 if parameter.ndim > 1 else 1.0)
        return model

    return build


def a_batch(documents: bool = False) -> dict[str, Tensor]:
    rows = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:].clone()}
    if documents:
        numbers = torch.tensor([5, 1, 10]).repeat_interleave(1)
        ids = torch.arange(3).repeat_interleave(numbers)
        batch["documents"] = ids.expand(3, -1)
        batch["targets"][:, [4, 5]] = -100  # the last token of a document predicts nothing
        batch["targets"][1, 8:12] = -100  # a prompt
    return batch


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Return rotary embeddings by complex numbers; x: [L, heads, K], half-split pairs."""
    half = x.size(-1) // 2
    angles = torch.arange(len(x), dtype=x.dtype)[:, None] * theta ** (
        -torch.arange(half, dtype=x.dtype) / half
    )
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.cat((turned.real, turned.imag), dim=-1)


def block(p: dict[str, Tensor], at: str, x: Tensor, ids: Tensor) -> Tensor:
    """Return a dense QK-reorder block's output for one sequence x [L, D], position by position."""
    length, width = x.shape
    n_heads, n_kv, k_width = 2, 1, width // 2
    q, k, v = (x @ p[f"{at}.attention.qkv.weight"].T).split(
        [width, n_kv * k_width, n_kv * k_width], dim=-1
    )
    q, k = (norm(t, p[f"{at}.attention.{n}_norm.weight"]) for t, n in ((q, "q"), (k, "k")))
    q, k = (rotated(t.view(length, -1, k_width)) for t in (q, k))
    rows = []
    for i in range(length):
        seen = [j for j in range(i + 1) if ids[j] == ids[i]]
        heads = []
        for head in range(n_heads):
            scores = k[seen, 0] @ q[i, head] / k_width**0.5
            heads.append(scores.softmax(-1) @ v[seen])
        rows.append(torch.cat(heads) @ p[f"{at}.attention.out.weight"].T)
    h = x + torch.stack(rows)
    gate, up = (
        norm(h, p[f"{at}.feed_forward_norm.weight"])
        @ p[f"{at}.feed_forward.swiglu.gate_up.weight"].T
    ).chunk(2, dim=-1)
    return h + (F.silu(gate) * up) @ p[f"{at}.feed_forward.swiglu.down.weight"].T


def defined(p: dict[str, Tensor], batch: dict[str, Tensor], depth: int) -> list[Tensor]:
    """Return the main loss and that of each depth, equations 21 to 24 one position at a time."""
    emb = p["embedding.weight"]
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(depth + 1)]
    tokens, targets = batch["tokens"], batch["targets"]
    documents = batch.get("documents", torch.zeros_like(tokens))
    length = tokens.size(1)
    for row, wanted, ids in zip(tokens, targets, documents, strict=True):
        x = emb[row]
        for layer in range(2):
            x = block(p, f"blocks.{layer}", x, ids)
        h = norm(x, p["norm.weight"])
        for k in range(depth + 1):
            if k:
                at = f"predictors.{k - 1}"
                joined = [
                    torch.cat(
                        (
                            norm(h[i], p[f"{at}.hidden_norm.weight"]),
                            norm(emb[row[i + k]], p[f"{at}.embedding_norm.weight"]),
                        )
                    )
                    for i in range(length - k)
                ]
                x = torch.stack(joined) @ p[f"{at}.project.weight"].T
                h = norm(block(p, f"{at}.block", x, ids[: length - k]), p[f"{at}.norm.weight"])
            for i in range(length - k):
                if wanted[i + k] >= 0 and ids[i] == ids[i + k]:
                    log_probs = (h[i] @ emb.T).log_softmax(-1)
                    sums[k] = sums[k] - log_probs[wanted[i + k]]
    return [each / (targets >= 0).sum() for each in sums]


@pytest.mark.parametrize("documents", [False, True])
def test_losses_and_every_gradient_equal_the_definition(
    make: Callable[..., Transformer], documents: bool
) -> None:
    model = make("moe=none", "objective.depth=2").train()
    batch = a_batch(documents)
    out = MultiToken(depth=2, loss_weight=0.6)(model, batch)
    assert list(out.losses) == ["main", "mtp_1", "mtp_2", "aux"]
    assert [out.losses[f"mtp_{k}"].weight for k in (1, 2)] == [0.3, 0.3]
    p = {n: q.detach().double().requires_grad_() for n, q in model.named_parameters()}
    main, *later = defined(p, batch, 2)
    for name, want in zip(("main", "mtp_1", "mtp_2"), (main, *later), strict=True):
        torch.testing.assert_close(out.losses[name].value, want, check_dtype=False)
    out.total.backward()
    (main + 0.6 * sum(later) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, p[name].grad, check_dtype=False, rtol=1e-3, atol=1e-5, msg=name
        )


def test_later_targets_stay_within_their_document() -> None:
    targets = torch.tensor([[1, 2, -100, 4, 5]])
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    assert later_targets(targets, None, 2).tolist() == [[-100, 4, 5]]
    assert later_targets(targets, documents, 1).tolist() == [[2, -100, -100, 5]]
    assert later_targets(targets, documents, 2).tolist() == [[-100, -100, -100]]


@pytest.mark.parametrize(
    "moe",
    ["moe=none", "moe=top2", "moe=top2 moe.capacity_factor=0.6"],
    ids=["none", "top2", "drops"],
)
def test_no_depth_sees_its_targets_nor_another_row(
    make: Callable[..., Transformer], moe: str
) -> None:
    model = make(*moe.split(), "objective.depth=2").train()  # Only training drops tokens.
    tokens = a_batch()["tokens"]

    def states(tokens: Tensor) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def ahead(depth: int, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            found[depth] = hidden.detach()
            return {}

        dropped = model(tokens, ahead=ahead).dropped
        assert (dropped > 0).all() or "capacity" not in moe
        return found

    before = states(tokens)
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 64
    after = states(changed)
    for depth, hidden in before.items():
        assert hidden.shape == (3, 16 - depth, 16)
        # Position i reads tokens up to i + depth: the first that may differ is 9 − depth.
        assert torch.equal(hidden[0, : 9 - depth], after[depth][0, : 9 - depth])
        assert not torch.equal(hidden[0, 9 - depth], after[depth][0, 9 - depth])
        torch.testing.assert_close(hidden[1:], after[depth][1:], rtol=0, atol=1e-6)


def test_evaluation_computes_the_main_loss_alone(make: Callable[..., Transformer]) -> None:
    model, batch = make("moe=switch", "objective.depth=2").eval(), a_batch()
    out = MultiToken(depth=2, loss_weight=0.3, logit_soft_cap=4.0)(model, batch)
    plain = NextToken(logit_soft_cap=4.0)(model, batch)
    assert list(out.losses) == ["main", "aux"]
    assert out.losses["main"].value == plain.losses["main"].value


def test_predictors_are_counted_and_route(make: Callable[..., Transformer]) -> None:
    model = make("moe=top2", "objective.depth=2")
    assert model.moe_layers() == [0, 1, 2, 3]
    own = sum(p.numel() for p in model.predictors.parameters())
    one = make("moe=top2", "objective.depth=1")
    assert model.count_parameters().total - one.count_parameters().total == own // 2
    unused = sum(b.feed_forward.idle_parameters() for b in model._all_blocks())
    assert model.count_parameters().active == model.count_parameters().total - unused
    extra = model.flops_per_token(16) - one.flops_per_token(16)
    active = own // 2 - one._all_blocks()[-1].feed_forward.idle_parameters()
    assert extra == 6 * (active + 64 * 16) + one._all_blocks()[-1].attention.flops_per_token(16)
    out = MultiToken(depth=2, loss_weight=0.3)(model.train(), a_batch())
    assert out.load.shape == (4, 4)
    # Each depth routes one position less.
    assert out.load.sum(1).tolist() == [3 * n * 2 for n in (16, 16, 15, 14)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # the compiler's own
@pytest.mark.parametrize("product", [Product.GROUPED, Product.PADDED], ids=lambda p: p.name)
@pytest.mark.parametrize("dynamic", [False, None])  # None: what trainer.compile_model takes.
def test_each_unit_is_one_graph_of_a_gpus_path_that_is_never_compiled_again(
    make: Callable[..., Transformer],
    monkeypatch: pytest.MonkeyPatch,
    dynamic: bool | None,
    product: Product,
) -> None:
    monkeypatch.setattr(experts, "product_for", lambda *_: product)
    torch.compiler.reset()
    model = make("moe=top2", "model.d_model=32", "objective.depth=3").train()
    for unit in model.units():
        unit.forward = torch.compile(
            unit.forward, backend="aot_eager", fullgraph=True, dynamic=dynamic
        )
    objective = MultiToken(depth=3, loss_weight=0.3)
    for step in range(3):
        # The depths have different lengths, each of which the first step compiles.
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            with torch.autocast("cpu", torch.bfloat16):
                out = objective(model, a_batch())
            out.total.backward()
    torch.compiler.reset()


@pytest.mark.slow
def test_every_depth_trains_is_logged_and_does_not_depend_on_the_accumulation(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    keys = ["objective=multi_token", "objective.depth=2", "data.document_masking=true"]
    longer = ["trainer.max_steps=30", "optimizer.learning_rate=1e-2"]
    whole = run_here(tiny(*keys, *longer, name="whole"))
    split = run_here(
        tiny(*keys, *longer, *SPLIT, "trainer.activation_checkpointing=selective", name="split")
    )
    names = ["main", "mtp_1", "mtp_2", "aux"]
    rows, others = (read_rows(r.metrics_path)[1:] for r in (whole, split))
    for a, b in zip(rows, others, strict=True):
        weights = [1, 0.15, 0.15, 1]
        total = sum(w * a[f"train/{n}_loss"] for n, w in zip(names, weights, strict=True))
        assert a["train/loss"] == pytest.approx(total, rel=1e-9)
        for name in names[:3]:
            other = b[f"train/{name}_loss"]
            assert a[f"train/{name}_loss"] == pytest.approx(other, rel=1e-4)
    for name in names[:3]:
        assert rows[-1][f"train/{name}_loss"] < rows[0][f"train/{name}_loss"]
    assert "moe/layer_03/load" in rows[-1]
    assert "val/loss" in rows[-1] and not any(k.startswith("val/mtp") for k in rows[-1])
