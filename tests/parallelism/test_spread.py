"""A run's numbers depend neither on the parallelism nor on a stop in between.

Real runs, each in the real loop. One group of processes of each size trains all runs of that size
(`matrix.py`), since starting a group takes longer than training.

The tolerance: a distributed run adds the same float32 numbers in another order, so a loss or a
norm differs by a few units in the last place (1.2e-7), which the next steps add to. Ten steps stay
within 2e-7; a real error (a gradient counted twice, a dropped token) is 1e-3 and more. 1e-6 lies
between.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from lunaris.config.schema.root import Config

# Sequences of every run's global batch, whatever the parallelism.
GLOBAL_BATCH = 8
STEPS, SAVED_AT = 10, 8
TOLERANCE = 1e-6

MODELS = {
    "dense": ["moe=none"],
    # 32 tokens a step for 16 experts: some have none, on one process or on all; some too many.
    "switch": [
        "moe=switch",
        "moe.n_experts=16",
        "moe.capacity_factor=1.0",
        "model.max_seq_len=4",
    ],
    "shared_bias": [
        "moe=top2",
        "moe.n_experts=4",
        "moe.n_shared_experts=1",
        "moe.balancing=bias",
        "moe.capacity_factor=null",
    ],
}


@dataclass(frozen=True)
class Setup:
    """A way to distribute a run: how many processes, and the overrides that define it."""

    processes: int
    parallelism: str
    experts: int = 1

    def __str__(self) -> str:
        experts = f"+ep{self.experts}" if self.experts > 1 else ""
        return f"{self.parallelism}{experts}@{self.processes}"

    def overrides(self) -> list[str]:
        rows = [f"parallelism={self.parallelism}", f"launch.processes={self.processes}"]
        micro_steps = 1 if self.parallelism == "single" else 2
        rows.append(f"trainer.gradient_accumulation_steps={micro_steps}")
        rows.append(f"trainer.batch_size={GLOBAL_BATCH // micro_steps // self.processes}")
        if self.parallelism == "hsdp":
            rows.append("parallelism.shard_size=2")
        if self.experts > 1:
            rows.append(f"parallelism.expert_parallel={self.experts}")
        return rows


SINGLE = Setup(1, "single")
SETUPS = [
    Setup(1, "ddp"),
    Setup(1, "fsdp"),
    Setup(2, "ddp"),
    Setup(2, "fsdp"),
    Setup(2, "ddp", 2),
    Setup(2, "fsdp", 2),
    Setup(4, "ddp"),
    Setup(4, "fsdp"),
    Setup(4, "hsdp"),
    Setup(4, "ddp", 2),
    Setup(4, "ddp", 4),
    Setup(4, "fsdp", 2),
    Setup(4, "fsdp", 4),
    Setup(4, "hsdp", 2),
]


# What is saved and resumed under each other, with the model that has the most state.
RESUMED = [
    SINGLE,
    Setup(2, "fsdp"),
    Setup(2, "ddp", 2),
    Setup(2, "fsdp", 2),
    Setup(4, "ddp"),
    Setup(4, "hsdp"),
    Setup(4, "ddp", 4),
    Setup(4, "fsdp", 4),
]
CASES = [
    pytest.param(model, setup, id=f"{model}-{setup}")
    for setup in SETUPS
    for model in MODELS
    if setup.experts == 1 or model != "dense"
]
# One process of pytest-xdist runs all of this file, so that each group is started once.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_SMALL = [
    "data=synthetic",
    "data.n_tokens=20000",
    "data.vocab_size=64",
    "model.d_model=16",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.max_seq_len=16",
    "model.multiple_of=8",
    f"trainer.max_steps={STEPS}",
    "trainer.log_interval=1",
    "trainer.eval_interval=null",
    "trainer.eval_steps=1",
    "trainer.device=cpu",
    f"checkpoint.save_interval={SAVED_AT}",
    "checkpoint.keep_last=null",
]


@lru_cache
def _composed(*overrides: str) -> Config:
    from lunaris.config.compose import compose

    return compose([*_SMALL, *overrides])


def write_run(folder: Path, model: str, setup: Setup) -> Path:
    """Freeze the config of a small run in `folder`."""
    from lunaris.config.frozen import to_yaml
    from lunaris.runs.run_dir import RunDir

    # Composed once a model and once a setup: what a setup says is in these groups alone.
    spread = _composed("moe.n_experts=4", *setup.overrides())
    groups = {group: getattr(spread, group) for group in ("parallelism", "launch", "trainer")}
    cfg = replace(_composed(*MODELS[model]), **groups, name=folder.name, out_dir=str(folder))
    folder.mkdir(parents=True)
    RunDir(folder).config_path.write_bytes(to_yaml(cfg))
    return folder


def rows(folder: Path) -> list[dict]:
    """Return a run's metrics, one dict a step from the first on."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["step"] > 0]


def train_group(folders: list[Path], processes: int, log: Path) -> None:
    """Train the runs in `folders` one after the other in one group of processes."""
    plan = log.with_suffix(".json")
    plan.write_text(json.dumps([str(folder) for folder in folders]))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "error",
    }
    command = [sys.executable, str(Path(__file__).with_name("matrix.py")), str(plan)]
    with log.open("w") as out:
        workers = [
            subprocess.Popen(
                command,
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=out,
                stderr=out,
            )
            for rank in range(processes)
        ]
        try:
            codes = [worker.wait(timeout=800) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    assert codes == [0] * processes, log.read_text()[-6000:]


def by_size(setups: list[Setup]) -> dict[int, list[Setup]]:
    """Return setups by their number of processes."""
    return {n: [s for s in setups if s.processes == n] for n in (1, 2, 4)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Setup], Path]:
    """Train every model under every setup; return a function to a run's folder."""
    root = tmp_path_factory.mktemp("trained")

    def folder(model: str, setup: Setup) -> Path:
        return root / f"{model}-{setup}"

    for processes, setups in by_size([SINGLE, *SETUPS]).items():
        wanted = {case.values for case in CASES} | {(model, SINGLE) for model in MODELS}
        folders = [
            write_run(folder(model, setup), model, setup)
            for setup in setups
            for model in MODELS
            if (model, setup) in wanted
        ]
        train_group(folders, processes, root / f"group{processes}.log")
    return folder


@pytest.fixture(scope="module")
def resumed(
    trained: Callable[[str, Setup], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Setup, Setup], Path]:
    """Resume each setup's checkpoint under each other; return a function to a run's folder."""
    root = tmp_path_factory.mktemp("resumed")

    def folder(saved: Setup, under: Setup) -> Path:
        return root / f"{saved}-{under}"

    name = f"checkpoints/step_{SAVED_AT:08d}"
    for processes, setups in by_size(RESUMED).items():
        folders = []
        for saved, under in [(saved, under) for saved in RESUMED for under in setups]:
            folders.append(write_run(folder(saved, under), "shared_bias", under))
            shutil.copytree(trained("shared_bias", saved) / name, folders[-1] / name)
        train_group(folders, processes, root / f"group{processes}.log")
    return folder


def assert_same_curve(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Assert that two runs' steps, losses, gradient norms and expert loads agree."""
    assert [row["step"] for row in expected] == [row["step"] for row in found]
    for a, b in zip(expected, found, strict=True):
        for key in ("train/main_loss", "train/aux_loss", "train/grad_norm", "val/loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=TOLERANCE), (key, a["step"])
        for key in [key for key in a if key.startswith("moe/")]:
            assert b[key] == a[key], (key, a["step"])


@pytest.mark.parametrize(("model", "setup"), CASES)
def test_numbers_do_not_depend_on_the_parallelism(
    trained: Callable[[str, Setup], Path], model: str, setup: Setup
) -> None:
    expected, found = rows(trained(model, SINGLE)), rows(trained(model, setup))
    assert len(expected) == STEPS
    assert_same_curve(expected, found)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_global_batches_are_the_same(trained: Callable[[str, Setup], Path], setup: Setup) -> None:
    """4 × 1, 2 × 2 and 1 × 2 (processes × micro-steps) read the same sequences in one order."""
    single = json.loads((trained("switch", SINGLE) / "hashes.json").read_text())
    found = json.loads((trained("switch", setup) / "hashes.json").read_text())
    assert len(set(single)) == STEPS
    assert found == single


def test_models_are_hard_cases(trained: Callable[[str, Setup], Path]) -> None:
    """Experts are idle, tokens are dropped: else the rest would prove little."""
    for row in rows(trained("switch", SINGLE)):
        assert 0.0 in row["moe/layer_00/load"]
        assert row["moe/layer_00/drop_rate"] > 0


@pytest.mark.parametrize("under", RESUMED, ids=str)
@pytest.mark.parametrize("saved", RESUMED, ids=str)
def test_resumes_under_any_other(
    trained: Callable[[str, Setup], Path],
    resumed: Callable[[Setup, Setup], Path],
    saved: Setup,
    under: Setup,
) -> None:
    expected, found = rows(trained("shared_bias", SINGLE)), rows(resumed(saved, under))
    assert_same_curve(expected[SAVED_AT:], found)
    hashes = json.loads((trained("shared_bias", SINGLE) / "hashes.json").read_text())
    assert json.loads((resumed(saved, under) / "hashes.json").read_text()) == hashes[SAVED_AT:]


@pytest.mark.parametrize("setup", RESUMED, ids=str)
def test_resumes_bit_for_bit_under_the_same(
    trained: Callable[[str, Setup], Path],
    resumed: Callable[[Setup, Setup], Path],
    setup: Setup,
) -> None:
    whole, parted = trained("shared_bias", setup), resumed(setup, setup)
    for a, b in zip(rows(whole)[SAVED_AT:], rows(parted), strict=True):
        exact = [key for key in a if not key.startswith("perf/")]
        assert {key: a[key] for key in exact} == {key: b[key] for key in exact}
    assert (parted / "weights.json").read_text() == (whole / "weights.json").read_text()
