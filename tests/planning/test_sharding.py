"""What a process holds of each parameter, against the parallelisms themselves; and the traffic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lunaris.config.compose import compose
from lunaris.planning.costs import traffic
from lunaris.planning.parameters import model_parameters
from lunaris.planning.sharding import layout_of

BASE = [
    "data=synthetic",
    "data.vocab_size=97",
    "model.d_model=24",
    "model.n_heads=4",
    "model.n_layers=2",
    "launch.processes=4",
]
CASES = [
    ["parallelism=fsdp"],
    ["parallelism=fsdp", "trainer.precision=bf16", "moe=none"],
    ["parallelism=fsdp", "parallelism.expert_parallel=2", "moe.n_experts=4"],
    ["parallelism=hsdp", "parallelism.shard_size=2"],
    ["parallelism=ddp", "parallelism.expert_parallel=4"],
    [
        "parallelism=hsdp",
        "parallelism.shard_size=2",
        "parallelism.expert_parallel=2",
        "trainer.precision=bf16",
        "model.d_model=20",
        "model.n_heads=5",
        "model.n_kv_heads=1",
    ],
]


@pytest.mark.slow
def test_a_process_holds_what_the_parallelism_gives_it() -> None:
    """An odd vocabulary is padded; norms and routers are not sharded in half precision."""
    configs = [[*BASE, *case] for case in CASES]
    script = Path(__file__).with_name("fake_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(configs)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for overrides, held in zip(configs, json.loads(done.stdout), strict=True):
        cfg = compose(overrides)
        layout = layout_of(cfg)
        planned = {p.name: layout.local(p) for p in model_parameters(cfg, 97)}
        assert planned == held, overrides


def sent(*overrides: str) -> tuple[int, int, int]:
    cfg = compose([*BASE, "data.vocab_size=96", "moe.n_experts=4", *overrides])
    found = traffic(cfg, model_parameters(cfg, 96), layout_of(cfg))
    return found.gradients, found.parameters, found.tokens


def test_traffic_is_that_of_rings() -> None:
    """By hand: 4 bytes a gradient, 3/4 of it for a scatter over 4, twice that for an all-reduce."""
    cfg = compose([*BASE, "data.vocab_size=96", "moe.n_experts=4", "parallelism=ddp"])
    found = model_parameters(cfg, 96)
    total = sum(p.numel for p in found)
    blocks = sum(p.numel for p in found if p.unit)
    assert sent("parallelism=ddp") == (pytest.approx(2 * 4 * total * 3 / 4, abs=1), 0, 0)
    # Gradients once; blocks gathered for the forward and again for the backward, the root once.
    gathered = 4 * (2 * blocks + total - blocks) * 3 / 4
    wanted = (pytest.approx(4 * total * 3 / 4, abs=1), pytest.approx(gathered, abs=1), 0)
    assert sent("parallelism=fsdp") == wanted
    kept = 4 * total * 3 / 4
    once = sent("parallelism=fsdp", "parallelism.reshard_after_forward=false")
    assert once[1] == pytest.approx(kept, abs=1)
    # Two micro-steps do both twice, but DDP exchanges at the last one only.
    assert sent("parallelism=fsdp", "trainer.gradient_accumulation_steps=2")[1] == pytest.approx(
        2 * gathered, abs=2
    )
    assert sent("parallelism=ddp", "trainer.gradient_accumulation_steps=2") == sent(
        "parallelism=ddp"
    )


def test_expert_parallelism_sends_tokens_and_fewer_gradients() -> None:
    """Half of 4096 tokens × 24 floats leave the process, 4 times in each of 2 layers."""
    gradients, _, tokens = sent("parallelism=ddp", "parallelism.expert_parallel=2")
    assert tokens == 4 * 2 * (16 * 256) * 24 * 4 // 2
    cfg = compose([*BASE, "data.vocab_size=96", "moe.n_experts=4", "parallelism=ddp"])
    found = model_parameters(cfg, 96)
    experts = sum(p.numel for p in found if p.kind == "expert")
    others = sum(p.numel for p in found) - experts
    # Two processes hold the same half of the experts, four the rest.
    assert gradients == pytest.approx(2 * 4 * (others * 3 / 4 + experts / 2 / 2), abs=1)
