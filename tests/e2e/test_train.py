"""A run that is interrupted, accumulates or recomputes has the numbers of one that does not."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lunaris.__main__ import main
from lunaris.data.prepare.build import build_shards
from lunaris.data.shards import ShardsData
from lunaris.data.text import TextData
from lunaris.errors import RunFailed, Stopped
from lunaris.metrics.records import read_rows
from lunaris.run import bare_model
from lunaris.runs.checkpoint_files import newest, sums_of
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir
from lunaris.train import Run

EXACT = ("train/", "val/", "moe/")


def exact_rows(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return what must not depend on the machine or on how often the run was interrupted."""
    return [
        {k: v for k, v in row.items() if k == "step" or k.startswith(EXACT)}
        for row in read_rows(run_dir.metrics_path)
    ]


def tensors(run_dir: RunDir, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the newest checkpoint: weights, buffers and optimizer state."""
    file = tmp_path / f"{run_dir.path.name}.pt"
    dcp_to_torch_save(newest(run_dir.checkpoints), file)
    tree = torch.load(file, weights_only=False)
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}/{key}", value)
        else:
            flat[prefix] = torch.as_tensor(node) if isinstance(node, (int, float)) else node

    walk("", tree)
    return {k: v for k, v in flat.items() if isinstance(v, torch.Tensor)}


def assert_same_run(a: RunDir, b: RunDir, tmp_path: Path) -> None:
    assert exact_rows(a) == exact_rows(b)
    left, right = tensors(a, tmp_path), tensors(b, tmp_path)
    assert left.keys() == right.keys() and len(left) > 20
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture
def chat() -> list[str]:
    """Prepare prompts with completions; return the overrides that train on them."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdefgh", k=draw.randint(1, 40))) for _ in range(300)]
    rows = [{"prompt": a, "completion": b} for a, b in zip(texts, texts[1:], strict=False)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"vocab_size": 270, "val_fraction": 0.1, "processes": 1}
    build_shards(TextData(dir="chat", files="chat.jsonl", format="chat", **keys))
    return ["data=shards", "data.dir=chat"]


@pytest.mark.usefixtures("chat")
@pytest.mark.parametrize(
    "overrides",
    [
        ["moe=switch", "data=shards", "data.dir=chat"],
        ["moe=switch"],
        [
            "moe=fine_grained",
            "moe.n_experts_per_token=2",
            "moe.router.n_groups=2",
            "model.activation=relu2",
            "optimizer=muon",
            "model.dropout=0.2",
        ],
        [
            "moe=none",
            "model.activation=geglu",
            "trainer.precision=fp16",
            "checkpoint.async_save=true",
        ],
        [
            "attention=sliding_window",
            "attention.window=5",
            "attention.full_every=2",
            "attention.sinks=true",
            "attention.output_gate=true",
        ],
        [
            "attention=mla",
            "model.norm=pre",
            "model.n_kv_heads=2",
            "attention.q_lora_rank=6",
            "attention.sinks=true",
            "attention.output_gate=true",
            "optimizer=muon",
            "trainer.precision=bf16",
        ],
        ["moe=none", "objective.z_loss_weight=1e-2", "objective.logit_soft_cap=2"],
        ["moe=top2", "moe.balancing=bias", "objective=multi_token", "objective.depth=2"],
    ],
    ids=[
        "loss-mask",
        "switch",
        "sigmoid-bias-muon-dropout",
        "dense-fp16-async",
        "window",
        "mla-muon-bf16",
        "z-and-cap",
        "multi-token",
    ],
)
def test_a_run_stopped_by_a_signal_and_started_again_equals_an_undisturbed_one(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    overrides: list[str],
) -> None:
    whole = run_here(tiny(*overrides, name="whole"))

    import lunaris.train

    real_step = lunaris.train.train_step

    def interrupted(run: Run, batch: Any) -> Any:
        if run.state.step == 4:  # in the middle of step 5, between two saves
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(lunaris.train, "train_step", interrupted)
        with pytest.raises(Stopped, match="SIGTERM at step 5"):
            run_here(tiny(*overrides, name="parts"))
    assert RunDir(tmp_path / "runs/parts").read_status()["state"] == "stopped"
    parts = run_here(tiny(*overrides, name="parts"))

    assert parts.read_status() | {"time": 0} == whole.read_status() | {"time": 0, "attempts": 2}
    assert_same_run(whole, parts, tmp_path)


def test_a_run_that_paused_and_went_on_equals_one_that_did_not(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run_here(tiny(name="whole"))
    parts = run_here(tiny("trainer.stop_at=3", name="parts"))
    status = parts.read_status()
    assert (status["state"], status["step"], status["max_steps"]) == ("paused", 3, 8)
    assert [row["step"] for row in read_rows(parts.metrics_path)] == [0, 1, 2, 3]
    printed = capsys.readouterr().out
    folder = tmp_path / "runs/parts"
    assert "pauses     after step 3 (trainer.stop_at)" in printed
    assert "paused     after step 3 of 8 (trainer.stop_at)" in printed
    assert f"lunaris resume {folder} trainer.stop_at=null" in printed
    # Once more there is nothing to do, and it is no fault.
    assert main(["resume", str(folder)]) == 0
    assert "trainer.stop_at=null` continues to the last step" in capsys.readouterr().out
    assert run_here(tiny("trainer.stop_at=3", name="parts")).read_status()["state"] == "paused"
    for step in (2, 3):
        assert main(["resume", str(folder), f"trainer.stop_at={step}"]) == 2
        assert f"trainer.stop_at={step}: the run is at step 3; give" in capsys.readouterr().err
    assert main(["resume", str(folder), "trainer.stop_at=6"]) == 0
    assert parts.read_status()["state"] == "paused" and parts.read_status()["step"] == 6
    assert main(["resume", str(folder), "--only", "paused"]) == 0
    assert parts.read_status()["state"] == "done"
    assert_same_run(whole, parts, tmp_path)
    # A run that is done stays so.
    assert run_here(tiny("trainer.stop_at=3", name="parts")).read_status()["state"] == "done"


@pytest.mark.slow
def test_a_run_killed_outright_and_started_again_equals_an_undisturbed_one(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], tmp_path: Path
) -> None:
    longer = ["trainer.max_steps=60", "checkpoint.save_interval=7", "trainer.eval_interval=20"]
    whole = run_here(tiny(*longer, name="whole"))
    run_dir = create(tiny(*longer, name="parts"), "test", [])
    command = [sys.executable, "-m", "lunaris.launch.worker", str(run_dir.path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        while not any(row["step"] > 16 for row in read_rows(run_dir.metrics_path)):
            assert worker.poll() is None
            time.sleep(0.005)
        worker.send_signal(signal.SIGKILL)
    assert read_rows(run_dir.metrics_path)[-1]["step"] < 60
    parts = run_here(tiny(*longer, name="parts"))
    assert parts.read_status()["attempts"] == 2
    assert_same_run(whole, parts, tmp_path)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_accumulation_and_activation_checkpointing_change_only_float_noise(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], checkpointing: str
) -> None:
    moe = ["moe=top2", "moe.capacity_factor=1.0", "moe.balancing=bias"]
    whole = run_here(tiny(*moe, name="whole"))
    split = run_here(
        tiny(
            *moe,
            "trainer.batch_size=1",
            "trainer.gradient_accumulation_steps=4",
            f"trainer.activation_checkpointing={checkpointing}",
            name="split",
        )
    )
    for a, b in zip(exact_rows(whole)[1:], exact_rows(split)[1:], strict=True):
        assert a["train/main_loss"] == pytest.approx(b["train/main_loss"], rel=1e-5)
        assert a["train/aux_loss"] == pytest.approx(b["train/aux_loss"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)
        assert a["moe/layer_00/load"] == b["moe/layer_00/load"]


def test_document_masking_weighs_every_target_alike_whatever_the_accumulation(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    masked = ["data.document_masking=true"]
    whole = run_here(tiny(*masked, name="whole"))
    split = run_here(
        tiny(
            *masked,
            "trainer.batch_size=2",
            "trainer.gradient_accumulation_steps=2",
            name="split",
        )
    )
    for a, b in zip(exact_rows(whole)[1:], exact_rows(split)[1:], strict=True):
        assert a["train/main_loss"] == pytest.approx(b["train/main_loss"], rel=1e-5)


def test_only_unmasked_targets_count_alike_whatever_the_accumulation(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], chat: list[str]
) -> None:
    """The losses are those of the float64 mean over the kept targets of the global batch."""
    whole = run_here(tiny(*chat, "moe=none", name="whole"))
    halves = ["trainer.batch_size=2", "trainer.gradient_accumulation_steps=2"]
    split = run_here(tiny(*chat, "moe=none", *halves, name="split"))
    for a, b in zip(exact_rows(whole)[1:], exact_rows(split)[1:], strict=True):
        assert a["train/main_loss"] == pytest.approx(b["train/main_loss"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)
    cfg = whole.read_config()
    data = ShardsData(dir="chat")
    data.ensure_ready()
    model = bare_model(cfg, data.vocab_size).to_empty(device="cpu")
    model.init_weights(cfg.seed)
    rows = np.empty((4, 17), dtype=np.int64)
    data.train(16, cfg.seed).gather(np.arange(4), rows)
    targets = torch.from_numpy(rows[:, 1:])
    with torch.no_grad():
        tokens = torch.from_numpy(np.where(rows < 0, ~rows, rows)[:, :-1])
        logits = model.double().logits(tokens).double()
    kept = targets >= 0
    assert 0 < kept.float().mean() < 0.9
    want = torch.nn.functional.cross_entropy(logits[kept], targets[kept])
    first = exact_rows(whole)[1]["train/main_loss"]
    assert first == pytest.approx(want.item(), rel=1e-6)
    assert exact_rows(whole)[-1]["train/main_loss"] < first


def test_a_row_holds_what_the_design_names_and_the_loss_falls(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    run_dir = run_here(tiny("trainer.max_steps=60", "optimizer.learning_rate=1e-2"))
    rows = read_rows(run_dir.metrics_path)
    assert [row["step"] for row in rows] == list(range(61))
    first, last = rows[1], rows[-1]
    assert rows[0]["val/loss"] == pytest.approx(math.log(64), rel=0.05)
    for key in ("loss", "main_loss", "aux_loss", "perplexity", "lr", "grad_norm"):
        assert isinstance(last[f"train/{key}"], float)
    for key in ("perf/tokens_per_s", "perf/mfu", "perf/data_wait", "moe/layer_00/load"):
        assert key in last
    assert last["train/loss"] == last["train/main_loss"] + last["train/aux_loss"]
    assert sum(last["moe/layer_01/load"]) == pytest.approx(1)
    assert first["train/main_loss"] == pytest.approx(math.log(64), rel=0.05)
    assert last["val/loss"] < first["train/main_loss"] - 0.1
    assert (run_dir.path / "loss.png").is_file()
    status = run_dir.read_status()
    assert status["state"] == "done" and status["step"] == 60
    assert status["best_val_loss"] == min(r["val/loss"] for r in rows if "val/loss" in r)


@pytest.mark.parametrize("moe", ["moe=none", "moe=switch"])
def test_a_row_holds_the_mean_losses_of_its_interval_wherever_the_run_stopped(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    moe: str,
) -> None:
    """Rows stand at steps 3, 6 and 8; the run stops within an interval, and is extended at 8."""
    keys = [moe, "trainer.log_interval=3", "schedule=constant"]
    single = exact_rows(run_here(tiny(*keys[::2], "trainer.max_steps=12", name="single")))
    every = {row["step"]: row for row in single}
    import lunaris.train

    real_step = lunaris.train.train_step

    def interrupted(run: Run, batch: Any) -> Any:
        if run.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(lunaris.train, "train_step", interrupted)
        with pytest.raises(Stopped, match="SIGTERM at step 5"):
            run_here(tiny(*keys, name="parts"))
    parts = run_here(tiny(*keys, name="parts"))
    assert_same_run(run_here(tiny(*keys, name="whole")), parts, tmp_path)

    assert main(["resume", str(parts.path), "trainer.max_steps=12"]) == 0
    rows = {row["step"]: row for row in exact_rows(parts) if "train/loss" in row}
    straight = exact_rows(run_here(tiny(*keys, "trainer.max_steps=12", name="straight")))
    assert list(rows) == [3, 6, 8, 9, 12]
    for step, first in ((3, 1), (6, 4), (8, 7), (9, 7), (12, 10)):
        for key in ("train/loss", "train/main_loss"):
            mean = sum(every[n][key] for n in range(first, step + 1)) / (step + 1 - first)
            assert rows[step][key] == pytest.approx(mean, rel=1e-12)
        if step != 8:
            assert rows[step] == next(row for row in straight if row["step"] == step)


def test_a_checkpoint_without_loss_sums_resumes(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    keys = ["trainer.log_interval=3", "trainer.eval_interval=null"]
    single = exact_rows(run_here(tiny(*keys[1:], name="single")))
    run_dir = run_here(tiny(*keys))
    shutil.rmtree(run_dir.checkpoints / "step_00000008")
    folder = run_dir.checkpoints / "step_00000004"
    path = folder / "train_state.json"
    state = json.loads(path.read_text())
    assert state.pop("losses")["steps"] == 1
    path.write_text(json.dumps(state))
    sums = json.loads((folder / "files.json").read_text())
    (folder / "files.json").write_text(json.dumps(sums | {path.name: sums_of(path)}))
    rows = {row["step"]: row for row in exact_rows(run_here(tiny(*keys)))}
    losses = [row["train/loss"] for row in single if row["step"] in (5, 6)]
    assert rows[6]["train/loss"] == pytest.approx(sum(losses) / 2, rel=1e-12)


def test_a_last_step_that_diverges_is_not_done(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    """The last step's own loss is that of the weights before it."""
    cfg = tiny("optimizer.learning_rate=1e30", "trainer.max_steps=1", "trainer.eval_interval=null")
    with pytest.raises(RunFailed, match=r"val/loss is (nan|inf) at step 1"):
        run_here(cfg)
    run_dir = RunDir(cfg.out_dir)
    assert run_dir.read_status()["state"] == "failed"
    assert not list(run_dir.path.glob("checkpoints/step_*"))


def test_a_loss_that_is_not_finite_fails_the_run_and_saves_nothing(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    cfg = tiny(
        "optimizer.learning_rate=1e30", "trainer.grad_clip=null", "moe.n_experts=2",
        "trainer.eval_interval=null", "trainer.max_skipped_steps=3",
    )  # fmt: skip
    with pytest.raises(RunFailed, match=r"max_skipped_steps=3: .* step 4, .* not finite"):
        run_here(cfg)
    run_dir = RunDir(cfg.out_dir)
    assert run_dir.read_status()["state"] == "failed"
    assert "not finite" in run_dir.read_status()["last_error"]
    assert not list(run_dir.path.glob("checkpoints/step_*"))
