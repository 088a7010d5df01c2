"""A run of 1,024 processes: what one of them builds does not grow with the number of the others."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.testing._internal.distributed.fake_pg import FakeStore

from lunaris.checkpoint_plan import Planner
from lunaris.checkpoint_reader import OPTIONS
from lunaris.config.compose import compose
from lunaris.config.instantiate import instantiate_component
from lunaris.data.order import SequenceOrder
from lunaris.model.layers import local_part
from lunaris.optim.build import build_optimizer
from lunaris.parallelism.base import Parallelism
from lunaris.planning.parameters import model_parameters
from lunaris.planning.sharding import layout_of
from lunaris.precision import Precision
from lunaris.run import bare_model, loader_of

WORLD, RANK, LOCAL = 1024, 1021, 8
VOCAB = 1024
RUN = [
    # Two moments a parameter; the fake group can not exchange Muon's matrices.
    "optimizer=adamw",
    *("data=synthetic", f"data.vocab_size={VOCAB}", "data.n_tokens=100000", "moe.n_experts=8"),
    *("model.d_model=1024", "model.n_heads=16", "model.n_kv_heads=16", "model.n_layers=1"),
    *("model.max_seq_len=16", "model.ffn_hidden_multiplier=1", "trainer.batch_size=2"),
    *("launch=slurm", f"launch.nodes={WORLD // LOCAL}", f"launch.gpus_per_node={LOCAL}"),
    *("trainer.precision=fp32", "trainer.device=cpu"),
]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def one_of_many(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be one of 1,024 processes whose others do not exist."""
    for name, value in (("RANK", RANK), ("WORLD_SIZE", WORLD), ("LOCAL_RANK", RANK % LOCAL),
                        ("LOCAL_WORLD_SIZE", LOCAL)):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("option", "expert_parallel", "mesh", "groups"),
    [
        ("ddp", 1, (1024, 1, 1), 1),
        ("ddp", 8, (128, 1, 8), 3),
        ("fsdp", 1, (1, 1024, 1), 1),
        ("fsdp", 8, (1, 128, 8), 3),
        ("hsdp", 1, (128, 8, 1), 3),
        ("hsdp", 8, (128, 1, 8), 5),
    ],
)
def test_one_of_a_thousand_processes_is_built(
    option: str, expert_parallel: int, mesh: tuple[int, int, int], groups: int
) -> None:
    keys = [f"parallelism={option}", f"parallelism.expert_parallel={expert_parallel}"]
    cfg = compose([*RUN, *keys])
    tracemalloc.start()
    parallelism: Parallelism = instantiate_component("parallelism", cfg.parallelism)
    found = parallelism.mesh
    assert (found.replicate, found.shard, found.expert) == mesh
    assert (parallelism.data_rank, parallelism.data_world_size) == (RANK, WORLD)
    model = parallelism.wrap(
        bare_model(cfg, VOCAB),
        precision=Precision("fp32", parallelism.device),
        seed=None,
        compile=False,
    )
    layout = layout_of(cfg)
    planned = {p.name: layout.local(p) for p in model_parameters(cfg, VOCAB)}
    assert {n: local_part(p).numel() for n, p in model.named_parameters()} == planned
    optimizer = build_optimizer(cfg.optimizer, model, router_lr_scale=1.0)
    for parameter in model.parameters():
        local_part(parameter.data).zero_()
    plan = _plan(model, optimizer)
    assert len(dist.distributed_c10d._world.pg_map) == groups
    # What Python holds besides tensors: objects of torch and of the plan, not one a process.
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 8 * MIB
    _check_plan(plan, planned)


def test_a_process_of_a_thousand_reads_its_part_of_every_batch() -> None:
    cfg = compose([*RUN, "parallelism=fsdp", "trainer.gradient_accumulation_steps=2"])
    parallelism: Parallelism = instantiate_component("parallelism", cfg.parallelism)
    data = instantiate_component("data", cfg.data)
    data.ensure_ready()
    loader = loader_of(cfg, data, parallelism, start=0, order=SequenceOrder())
    try:
        batch = next(iter(loader))
    finally:
        loader.close()
    sequences = data.train(16, cfg.seed)
    places = np.array([(micro * WORLD + RANK) * 2 + i for micro in (0, 1) for i in (0, 1)])
    rows = np.empty((4, 17), dtype=np.int64)
    sequences.gather(places, rows)
    assert batch["tokens"].flatten(0, 1).tolist() == rows[:, :-1].tolist()


def _plan(model: Any, optimizer: Any) -> SavePlan:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    planner = Planner()
    planner.set_up_planner({"model": model_state, "optimizer": optimizer_state}, None, False)
    return planner.create_local_plan()


def _check_plan(plan: SavePlan, planned: dict[str, int]) -> None:
    """Check that a process plans to write its parts alone: of weights and both moments."""
    written: dict[str, int] = {}
    for item in plan.items:
        name = item.index.fqn.removeprefix("model.")
        if name in planned and item.tensor_data is not None:
            written[name] = item.tensor_data.chunk.sizes.numel()
            moments = [i for i in plan.items if i.index.fqn.startswith(f"optimizer.state.{name}.")]
            assert len(moments) == 3
    assert written == planned
