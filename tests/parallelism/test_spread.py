"""A run's numbers depend neither on the parallelism nor on a stop in between.

Real runs, each in the real loop. One group of processes of each size trains all runs of that size,
and all groups are forks of one process (`matrix.py`), since starting takes longer than training.

The tolerance: a distributed run adds the same float32 numbers in another order, so a loss or a
norm differs by a few units in the last place (1.2e-7), which the next steps add to. Ten steps stay
within 2e-7; a real error (a gradient counted twice, a dropped token) is 1e-3 and more. 1e-6 lies
between.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
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

# Stands for the folder of prepared conversations.
CHAT = "CHAT"
MODELS = {
    "dense": ["moe=none", "model.activation=geglu"],
    # 32 tokens a step for 16 experts: some have none, on one process or on all; some too many.
    # Balanced over the global batch, by the shares of the step before.
    "switch": [
        "moe=switch",
        "moe.n_experts=16",
        "moe.capacity_factor=1.0",
        "model.max_seq_len=4",
    ],
    # Prompts without loss, so that micro-steps differ in their targets; a z-loss, a soft cap.
    "masked": [
        "moe=none",
        "objective.z_loss_weight=1e-2",
        "objective.logit_soft_cap=5",
        "data=shards",
        f"data.dir={CHAT}",
    ],
    # Two further depths, whose blocks route as well.
    "multi_token": [
        "objective=multi_token",
        "objective.depth=2",
        "moe=top2",
        "moe.n_experts=4",
    ],
    # A sigmoid router with groups, a sequence loss and a bias; mup at twice its base width.
    "shared_bias": [
        "moe=fine_grained",
        "moe.n_experts=8",
        "moe.n_experts_per_token=2",
        "moe.router.n_groups=4",
        "moe.router.topk_groups=2",
        "moe.router.route_scale=1.5",
        "moe.router.sequence_loss_weight=0.01",
        "model.activation=relu2",
        "model.parametrization=mup",
        "model.mup_base_width=8",
    ],
    # Balanced within each sequence.
    "window": [
        "moe=switch",
        "moe.n_experts=4",
        "moe.balance_scope=sequence",
        "attention=sliding_window",
        "attention.window=5",
        "attention.full_every=2",
        "attention.sinks=true",
        "attention.output_gate=true",
    ],
    "mla": [
        "moe=switch",
        "moe.n_experts=4",
        "model.norm=pre",
        "model.n_kv_heads=2",
        "model.activation=geglu",
        "attention=mla",
        "attention.q_lora_rank=6",
        "attention.sinks=true",
        "attention.output_gate=true",
    ],
    # Matrices and experts, whole and sharded, that one process of a group orthogonalizes.
    "muon": ["moe=switch", "moe.n_experts=4", "optimizer=muon"],
}
# The first polynomial of Muon magnifies small singular values, and so roundings, eightfold.
TOLERANCES = {"muon": 1e-5}


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


# Where the models in FEW are trained: each way to shard their parameters, once a size.
FEW = ("window", "mla", "masked", "multi_token", "muon")
FEW_SETUPS = [
    Setup(1, "fsdp"),
    Setup(2, "ddp", 2),
    Setup(2, "fsdp"),
    Setup(4, "ddp"),
    Setup(4, "hsdp"),
    Setup(4, "fsdp", 2),
]

# What is saved and resumed under each other with the model shared_bias, and bit for bit under
# itself with both that have routing state. The models in FEW resume under three of them.
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
EXACT = [(model, setup) for model in ("shared_bias", "switch") for setup in RESUMED]
EXACT += [
    (model, setup)
    for model in FEW
    for setup in (Setup(2, "ddp", 2), Setup(2, "fsdp"), Setup(4, "hsdp"))
    if setup.experts == 1 or model != "masked"
]
PAIRS = [("shared_bias", saved, under) for saved in RESUMED for under in RESUMED]
PAIRS += [(model, setup, setup) for model, setup in EXACT if model != "shared_bias"]
PAIRS += [("switch", Setup(2, "ddp", 2), Setup(4, "fsdp", 4))]
CASES = [
    pytest.param(model, setup, id=f"{model}-{setup}")
    for setup in SETUPS
    for model in MODELS
    if setup in FEW_SETUPS or model not in FEW
    if setup.experts == 1 or model not in ("dense", "masked")
]
# One process of pytest-xdist runs all of this file, so that each group is started once.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_SYNTHETIC = ["data=synthetic", "data.n_tokens=20000", "data.vocab_size=64"]
_SMALL = [
    "optimizer=adamw",
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

    data = [] if "data=shards" in overrides else _SYNTHETIC
    return compose([*data, *_SMALL, *overrides])


def prepare_chat(folder: Path) -> None:
    """Prepare prompts and completions of random words, with their loss masks."""
    from lunaris.data.prepare.build import build_shards
    from lunaris.data.text import TextData

    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdefgh", k=draw.randint(1, 60))) for _ in range(400)]
    rows = [{"prompt": a, "completion": b} for a, b in zip(texts, texts[1:], strict=False)]
    corpus = folder.with_suffix(".jsonl")
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"vocab_size": 270, "val_fraction": 0.1, "processes": 1}
    build_shards(TextData(dir=str(folder), files=str(corpus), format="chat", **keys))


def write_run(folder: Path, model: str, setup: Setup, chat: Path) -> Path:
    """Freeze the config of a small run in `folder`; `chat` holds the model masked's data."""
    from lunaris.config.frozen import to_yaml
    from lunaris.runs.run_dir import RunDir

    # Composed once a model and once a setup: what a setup says is in these groups alone.
    spread = _composed("moe.n_experts=4", *setup.overrides())
    groups = {group: getattr(spread, group) for group in ("parallelism", "launch", "trainer")}
    overrides = [text.replace(CHAT, str(chat)) for text in MODELS[model]]
    cfg = replace(_composed(*overrides), **groups, name=folder.name, out_dir=str(folder))
    folder.mkdir(parents=True)
    RunDir(folder).config_path.write_bytes(to_yaml(cfg))
    return folder


def rows(folder: Path) -> list[dict]:
    """Return a run's metrics, one dict a step from the first on."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["step"] > 0]


def train_groups(groups: dict[int, list[Path]], log: Path) -> None:
    """Train the runs in folders, by their number of processes, in one group of each number."""
    plan = []
    for processes, folders in groups.items():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        plan.append({"processes": processes, "port": port, "folders": [*map(str, folders)]})
    at = log.with_suffix(".json")
    at.write_text(json.dumps(plan))
    with log.open("w") as out:
        started = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("matrix.py")), str(at)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            code = started.wait(timeout=1500)
        finally:
            with suppress(ProcessLookupError):  # It has ended, and its forks with it.
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    assert code == 0, log.read_text()[-6000:]


def by_size(setups: list[Setup]) -> dict[int, list[Setup]]:
    """Return setups by their number of processes."""
    return {n: [s for s in setups if s.processes == n] for n in (1, 2, 4)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Setup], Path]:
    """Train every model under every setup; return a function to a run's folder."""
    root = tmp_path_factory.mktemp("trained")
    prepare_chat(root / "chat")

    def folder(model: str, setup: Setup) -> Path:
        return root / f"{model}-{setup}"

    wanted = {case.values for case in CASES} | {(model, SINGLE) for model in MODELS}
    groups = {
        processes: [
            write_run(folder(model, setup), model, setup, root / "chat")
            for setup in setups
            for model in MODELS
            if (model, setup) in wanted
        ]
        for processes, setups in by_size([SINGLE, *SETUPS]).items()
    }
    train_groups(groups, root / "groups.log")
    return folder


@pytest.fixture(scope="module")
def resumed(
    trained: Callable[[str, Setup], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Setup, Setup], Path]:
    """Resume each setup's checkpoint under each other; return a function to a run's folder."""
    root = tmp_path_factory.mktemp("resumed")
    chat = trained("masked", SINGLE).parent / "chat"

    def folder(model: str, saved: Setup, under: Setup) -> Path:
        return root / f"{model}-{saved}-{under}"

    name = f"checkpoints/step_{SAVED_AT:08d}"
    groups: dict[int, list[Path]] = {}
    for processes, setups in by_size(RESUMED).items():
        groups[processes] = []
        for model, saved, under in [pair for pair in PAIRS if pair[2] in setups]:
            written = write_run(folder(model, saved, under), model, under, chat)
            shutil.copytree(trained(model, saved) / name, written / name)
            groups[processes].append(written)
    train_groups(groups, root / "groups.log")
    return folder


def assert_same_curve(
    model: str, expected: list[dict[str, Any]], found: list[dict[str, Any]]
) -> None:
    """Assert that two runs' steps, losses, gradient norms and expert loads agree."""
    tolerance = TOLERANCES.get(model, TOLERANCE)
    assert [row["step"] for row in expected] == [row["step"] for row in found]
    for a, b in zip(expected, found, strict=True):
        for key in a:
            if key.endswith("_loss") or key in ("train/grad_norm", "val/loss"):
                assert b[key] == pytest.approx(a[key], rel=tolerance), (key, a["step"])
        for key in [key for key in a if key.startswith("moe/")]:
            # A mean over tokens in float32; all else counts tokens.
            rel = tolerance if key.endswith("/confidence") else 0
            assert b[key] == pytest.approx(a[key], rel=rel, abs=0), (key, a["step"])


@pytest.mark.parametrize(("model", "setup"), CASES)
def test_numbers_do_not_depend_on_the_parallelism(
    trained: Callable[[str, Setup], Path], model: str, setup: Setup
) -> None:
    expected, found = rows(trained(model, SINGLE)), rows(trained(model, setup))
    assert len(expected) == STEPS
    assert_same_curve(model, expected, found)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_global_batches_are_the_same(trained: Callable[[str, Setup], Path], setup: Setup) -> None:
    """4 × 1, 2 × 2 and 1 × 2 (processes × micro-steps) read the same sequences in one order."""
    single = json.loads((trained("switch", SINGLE) / "hashes.json").read_text())
    found = json.loads((trained("switch", setup) / "hashes.json").read_text())
    assert len(set(single)) == STEPS
    assert found == single


def test_models_are_hard_cases(trained: Callable[[str, Setup], Path]) -> None:
    """Every step has idle experts and nearly all drop tokens: else the rest would prove little."""
    found = rows(trained("switch", SINGLE))
    assert all(0.0 in row["moe/layer_00/load"] for row in found)
    assert sum(row["moe/layer_00/drop_rate"] > 0 for row in found) >= STEPS - 2


@pytest.mark.parametrize(("model", "saved", "under"), PAIRS, ids=str)
def test_resumes_under_any_other(
    trained: Callable[[str, Setup], Path],
    resumed: Callable[[str, Setup, Setup], Path],
    model: str,
    saved: Setup,
    under: Setup,
) -> None:
    expected, found = rows(trained(model, SINGLE)), rows(resumed(model, saved, under))
    assert_same_curve(model, expected[SAVED_AT:], found)
    hashes = json.loads((trained(model, SINGLE) / "hashes.json").read_text())
    at = resumed(model, saved, under) / "hashes.json"
    assert json.loads(at.read_text()) == hashes[SAVED_AT:]


@pytest.mark.parametrize(("model", "setup"), EXACT, ids=str)
def test_resumes_bit_for_bit_under_the_same(
    trained: Callable[[str, Setup], Path],
    resumed: Callable[[str, Setup, Setup], Path],
    model: str,
    setup: Setup,
) -> None:
    whole, parted = trained(model, setup), resumed(model, setup, setup)
    for a, b in zip(rows(whole)[SAVED_AT:], rows(parted), strict=True):
        exact = [key for key in a if not key.startswith("perf/")]
        assert {key: a[key] for key in exact} == {key: b[key] for key in exact}
    assert (parted / "weights.json").read_text() == (whole / "weights.json").read_text()
