"""Planned activations against what autograd saves, to the byte; the peak against live tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from lunaris.config.compose import compose
from lunaris.config.instantiate import instantiate_component
from lunaris.config.schema.root import Config
from lunaris.model import recompute
from lunaris.moe import experts
from lunaris.moe.experts import Product
from lunaris.planning.activations import saved_activations
from lunaris.planning.memory import memory_of
from lunaris.planning.parameters import model_parameters
from lunaris.planning.sharding import layout_of

VOCAB = 96
SMALL = [
    "data=synthetic",
    f"data.vocab_size={VOCAB}",
    "model.d_model=24",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.max_seq_len=32",
    "model.n_layers=1",
    "model.multiple_of=4",
    "model.ffn_hidden_multiplier=2",
    "trainer.batch_size=2",
]
CASES = [
    "moe=none",
    "moe=none model.norm=pre",
    "moe=none model.n_heads=2",
    "moe=none model.n_heads=2 model.norm=pre model.n_layers=3",
    "moe=none model.activation=geglu",
    "moe=none model.activation=relu2",
    "moe=switch moe.n_experts=4",
    "moe=switch moe.n_experts=4 moe.balance_scope=sequence model.n_layers=3",
    "moe=top2 moe.n_experts=4 moe.n_shared_experts=1",
    "moe=top2 moe.n_experts=4 moe.router_z_loss_weight=0 model.activation=relu2",
    "moe=top2 moe.n_experts=4 moe.balancing=bias moe.normalize_gates=false",
    "moe=none attention.output_gate=true",
    "moe=none attention.sinks=true",
    "moe=none attention.sinks=true attention.output_gate=true model.n_heads=2",
    "moe=none attention=mla model.norm=pre model.n_kv_heads=4",
    "moe=none attention=mla model.norm=pre model.n_kv_heads=4 attention.q_lora_rank=10",
    "moe=none attention=mla model.norm=pre model.n_kv_heads=4 attention.v_head_dim=12",
    "moe=none model.tie_embeddings=false",
    "moe=none objective=multi_token",
    "moe=switch objective=multi_token objective.depth=2",
    "moe=none trainer.activation_checkpointing=full model.n_layers=3",
    "moe=none objective.logit_soft_cap=5 objective.z_loss_weight=0.1",
    "moe=none data.document_masking=true",
    "moe=none data.document_masking=true attention.ranges=masked",
    "moe=none objective=multi_token objective.depth=3 trainer.activation_checkpointing=full",
    "moe=fine_grained moe.n_experts=8",
    "moe=none attention=sliding_window attention.window=8 attention.full_every=2 model.n_layers=3",
    "moe=none attention=sliding_window attention.window=8 "
    "attention.full_every=null attention.sinks=true model.n_layers=2",
    "moe=none attention=mla model.norm=pre "
    "model.n_kv_heads=4 attention.q_lora_rank=10 attention.sinks=true attention.output_gate=true",
    "moe=none objective=multi_token "
    "attention=sliding_window attention.window=31 attention.full_every=null",
    "moe=top2 moe.n_experts=4 model.norm=pre attention.output_gate=true "
    "model.n_heads=2 model.tie_embeddings=false moe.first_dense_layers=1 model.n_layers=2",
    "moe=switch trainer.activation_checkpointing=full model.n_layers=3 "
    "objective=multi_token attention=sliding_window attention.window=8",
    "moe=fine_grained moe.n_experts=8 moe.router.sequence_loss_weight=0 moe.normalize_gates=false",
    "moe=fine_grained moe.n_experts=8 moe.router.n_groups=4 "
    "moe.router.topk_groups=2 moe.balancing=aux_loss moe.balance_scope=sequence "
    "moe.aux_loss_weight=0.01",
]


def batch_of(cfg: Config) -> dict[str, Tensor]:
    """Return a batch of random tokens."""
    shape = (cfg.trainer.batch_size, cfg.model.max_seq_len)
    vocab_size = cfg.model.vocab_size or cfg.data.vocab_size  # type: ignore[attr-defined]
    batch = {name: torch.randint(0, vocab_size, shape) for name in ("tokens", "targets")}
    if cfg.data.document_masking:
        batch["documents"] = torch.zeros(shape, dtype=torch.int64)
    return batch


def forward(cfg: Config, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of a batch, as a micro-step computes it."""
    objective: Any = instantiate_component("objective", cfg.objective)
    half = cfg.trainer.half()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        return objective(model, batch).total


def built(cfg: Config) -> torch.nn.Module:
    from lunaris.run import bare_model

    model = bare_model(cfg, cfg.data.vocab_size)  # type: ignore[attr-defined]
    model.to_empty(device="cpu")
    model.init_weights(1)
    return model.train()


def saved_bytes(cfg: Config) -> int:
    """Return the bytes of unique storages that a forward saves, parameters and batch left out."""
    torch.manual_seed(0)
    contexts: list[Any] = []

    def contexts_of(policy: Any) -> Any:
        contexts.append(create_selective_checkpoint_contexts(policy))
        return contexts[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recompute, "create_selective_checkpoint_contexts", contexts_of)
        model, batch = built(cfg), batch_of(cfg)
    given = [*model.parameters(), *model.buffers(), *batch.values()]
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(cfg, model, batch)
    assert loss.isfinite()
    for forward_context, _ in contexts:
        for entry in tree_leaves(forward_context.storage):
            if hasattr(entry, "val"):
                pack(entry.val)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_saved_activations_are_counted_to_the_byte(case: str, precision: str) -> None:
    cfg = compose([*SMALL, f"trainer.precision={precision}", *case.split()])
    planned = saved_activations(cfg, model_parameters(cfg, VOCAB))
    assert planned.total == saved_bytes(cfg)


SELECTIVE = "trainer.activation_checkpointing=selective"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [case for case in CASES if "checkpointing" not in case])
def test_what_selective_checkpointing_keeps_is_counted_to_the_byte(
    case: str, precision: str
) -> None:
    cfg = compose([*SMALL, f"trainer.precision={precision}", *case.split(), SELECTIVE])
    planned = saved_activations(cfg, model_parameters(cfg, VOCAB))
    assert planned.total == saved_bytes(cfg)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        "moe=switch moe.n_experts=4",
        "moe=switch moe.n_experts=4 moe.capacity_factor=1.25",
        "moe=top2 moe.n_experts=8 moe.n_shared_experts=1 model.n_layers=3",
        "moe=top2 moe.n_experts=4 model.activation=relu2 objective=multi_token objective.depth=2",
        "moe=fine_grained moe.n_experts=8",
    ],
)
def test_saved_padded_blocks_are_counted_to_the_byte(
    monkeypatch: pytest.MonkeyPatch, case: str, precision: str
) -> None:
    monkeypatch.setattr(experts, "product_for", lambda *_: Product.PADDED)
    cfg = compose([*SMALL, f"trainer.precision={precision}", *case.split()])
    planned = saved_activations(cfg, model_parameters(cfg, VOCAB), padded=True)
    assert planned.total == saved_bytes(cfg)
    assert planned.total > saved_activations(cfg, model_parameters(cfg, VOCAB)).total


@pytest.mark.parametrize("product", [Product.LOOP, Product.PADDED], ids=lambda p: p.name)
@pytest.mark.parametrize(
    "case",
    [
        "moe=none",
        "moe=switch",
        "moe=top2 trainer.activation_checkpointing=full",
        f"moe=none {SELECTIVE}",
        f"moe=top2 {SELECTIVE}",
        "moe=top2 optimizer=muon trainer.batch_size=1",
    ],
)
def test_the_peak_is_that_of_the_live_tensors(
    monkeypatch: pytest.MonkeyPatch, case: str, product: Product
) -> None:
    """Within 10 %, for two steps; torch's MemTracker counts every tensor."""
    from torch.distributed._tools.mem_tracker import MemTracker

    monkeypatch.setattr(experts, "product_for", lambda *_: product)
    keys = ["data=synthetic", "data.vocab_size=4096", "trainer.batch_size=8", "optimizer=adamw"]
    cfg = compose([*keys, *case.split()])
    model = built(cfg)
    optimizer: Any = instantiate_component(
        "optimizer", cfg.optimizer, model=model, router_lr_scale=1.0
    )
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()
            forward(cfg, model, batch_of(cfg)).backward()
            optimizer.step()
            optimizer.zero_grad()
    live = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    padded = product is Product.PADDED
    parameters = model_parameters(cfg, 4096)
    planned = memory_of(cfg, parameters, layout_of(cfg), gpu=False, padded=padded)
    assert planned.peak == pytest.approx(live, rel=0.1)


# Bytes a token and layer in bf16 on a CPU, copies of weights included: none, selective, full.
BUDGET = {
    "moe=none": (3692, 1264, 256),
    "moe=switch moe.n_experts=4": (5724.625, 1280, 256),
    "moe=none attention=mla model.norm=pre model.n_kv_heads=4": (4428, 1600, 256),
}


@pytest.mark.parametrize("case", BUDGET)
def test_a_layer_stays_within_its_budget(case: str) -> None:
    found = []
    for kind in ("none", "selective", "full"):
        keys = [f"trainer.activation_checkpointing={kind}", "trainer.precision=bf16"]
        one, two = (
            saved_bytes(compose([*SMALL, "model.d_model=64", *case.split(), *keys, layers]))
            for layers in ("model.n_layers=1", "model.n_layers=2")
        )
        found.append((two - one) / 64)  # Tokens.
    assert found == list(BUDGET[case])
