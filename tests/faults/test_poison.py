"""A loss or gradient that is not finite, on one rank of two: the step changes nothing anywhere."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.errors import RunFailed
from lunaris.metrics.records import read_rows
from lunaris.runs.checkpoint_files import complete
from lunaris.runs.run_dir import RunDir

HOW = ("nan", "inf", "-inf", "gradient", "loss nan")
TWO = ["launch.processes=2", "trainer.batch_size=2"]
SETUPS = {
    "ddp": [*TWO, "parallelism=ddp"],
    "fsdp": [*TWO, "parallelism=fsdp", "optimizer=muon"],
    "experts": [*TWO, "parallelism=ddp", "parallelism.expert_parallel=2"],
    "fsdp-adamw": [*TWO, "parallelism=fsdp", "trainer.gradient_accumulation_steps=2"],
    "muon": [*TWO, "parallelism=ddp", "optimizer=muon"],
    "custom": [*TWO, "parallelism=ddp", "optimizer._target_=torch_sgd.build"],
}
STEPS = 5
SGD = """\
import torch
def build(model, *, learning_rate, weight_decay, betas, eps, router_lr_scale):
    groups = [{"params": list(model.parameters()), "lr": 0.1, "peak_lr": 0.1}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
"""


@pytest.fixture
def plan(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that freezes cases and writes their plan: its path."""
    from lunaris.runs.create import create

    (tmp_path / "torch_sgd.py").write_text(SGD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(cases: list[tuple[str, int, int, str]]) -> str:
        rows = []
        for i, (setup, rank, step, how) in enumerate(cases):
            cfg = tiny(
                "moe=top2", "moe.balancing=bias", f"trainer.max_steps={STEPS}",
                "trainer.eval_interval=null", "checkpoint.save_interval=100",
                *SETUPS[setup], name=f"case{i}",
            )  # fmt: skip
            folder = create(cfg, "test", []).path
            rows.append({"folder": str(folder), "rank": rank, "step": step, "how": how})
        Path("plan.json").write_text(json.dumps(rows))
        return "plan.json"

    return write


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_step_that_is_poisoned_on_one_rank_changes_no_bit_on_any(
    plan: Any, group: Any, long: bool, counted: Callable[[str, int], None]
) -> None:
    chance = random.Random(13)
    times = 16 if long else 1
    cases = [
        (setup, chance.randrange(2), chance.randint(1, STEPS - 1), how)
        for _ in range(times)
        for setup, how in itertools.product(SETUPS, HOW)
    ]
    codes, output = group("poison_group.py", plan(cases))
    assert codes == [0, 0], output[-6000:]
    assert "FAULT" not in output, output[-6000:]
    counted("steps poisoned on one rank of two, each without a changed bit", len(cases))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["not agreed", "balance moves", "step is taken"])
def test_a_build_that_takes_poisoned_steps_is_caught(plan: Any, group: Any, mutant: str) -> None:
    codes, output = group("poison_group.py", plan([("ddp", 1, 3, "loss nan")]), "--mutant", mutant)
    assert "FAULT" in output or codes != [0, 0], output[-3000:]


def poisoned(monkeypatch: pytest.MonkeyPatch, bad: set[int], value: float = torch.nan) -> None:
    """Spoil the gradient norm of the steps in `bad`, and so the gradients."""
    import lunaris.train

    real, steps = lunaris.train.clip_grad_norm, iter(range(1, 10_000))

    def clip(*args: Any) -> Any:
        norm = real(*args)
        return norm * value if next(steps) in bad else norm

    monkeypatch.setattr(lunaris.train, "clip_grad_norm", clip)


def test_a_run_goes_on_after_a_bad_step_and_resumes_bit_for_bit(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poisoned(monkeypatch, {3})
    run_dir = run_here(tiny("trainer.log_interval=8"))
    (row,) = [r for r in read_rows(run_dir.metrics_path) if "train/loss" in r]
    assert row["train/skipped_steps"] == 1 and row["train/spikes"] == 0
    log = (run_dir.path / "metrics.jsonl").read_text()
    assert "NaN" not in log
    state = json.loads((run_dir.checkpoints / "step_00000008/train_state.json").read_text())
    assert state["guard"]["skipped"] == 1 and state["sequences"] == 32


def test_too_many_bad_steps_in_a_row_stop_the_run_and_it_trains_on_without_their_data(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lunaris.__main__ import main
    from lunaris.launch.local import Local

    cfg = tiny("trainer.max_skipped_steps=2", "trainer.max_steps=10")
    with monkeypatch.context() as patch:
        poisoned(patch, {6, 7, 8, 9})
        with pytest.raises(RunFailed) as failed:
            Local.of(cfg).submit(cfg, "lunaris train", [])
    assert "sequences are 20 to 27;" in str(failed.value)
    assert "--skip-sequences 20-27" in str(failed.value)
    run_dir = RunDir(cfg.out_dir)
    status = run_dir.read_status()
    assert status["state"] == "failed" and "20 to 27" in status["last_error"]
    assert "Traceback" not in (run_dir.logs / "rank_0.log").read_text()
    assert [p.name for p in complete(run_dir.checkpoints)] == ["step_00000004"]
    seen = watched(monkeypatch)
    assert main(["resume", cfg.out_dir, "--skip-sequences", "20-27"]) == 0
    wanted = [*range(16, 20), *range(28, 48)]
    assert seen == wanted, seen
    (noted,) = run_dir.noted("skip_sequences")
    assert (noted["first"], noted["last"]) == (20, 27)
    state = json.loads((run_dir.checkpoints / "step_00000010/train_state.json").read_text())
    assert state["sequences"] == 48 and state["left_out"] == [[20, 27]]
    # Once more from the middle, with the list of the checkpoint alone.
    rows = read_rows(run_dir.metrics_path)
    shutil.rmtree(run_dir.checkpoints / "step_00000010")
    provenance = run_dir.read_provenance()
    del provenance["skip_sequences"]
    run_dir.provenance_path.write_text(json.dumps(provenance))
    run_dir.write_status(state="stopped")
    seen.clear()
    assert main(["resume", cfg.out_dir]) == 0
    assert seen == list(range(40, 48))
    again = read_rows(run_dir.metrics_path)
    exact = ("train/", "val/", "moe/")
    for row, other in zip(rows, again, strict=True):
        for key in (key for key in row if key.startswith(exact)):
            assert row[key] == other[key], key


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list that the sequences of every training step are appended to."""
    import lunaris.train

    seen: list[int] = []
    real = lunaris.train.train_step

    def step(run: Any, batch: Any) -> Any:
        first, last = lunaris.train.sequences_of_step(run)
        rows = torch.cat([batch["tokens"][0], batch["targets"][0][:, -1:]], dim=1)
        for n in range(first, last + 1):
            out = torch.empty(1, rows.size(1), dtype=torch.int64).numpy()
            run.loader._sequences.gather(torch.tensor([n]).numpy(), out)
            if any((row.numpy() == out[0]).all() for row in rows):
                seen.append(n)
        return real(run, batch)

    monkeypatch.setattr(lunaris.train, "train_step", step)
    return seen


@pytest.mark.parametrize("skip", [False, True])
def test_a_spike_is_counted_and_skipped_by_choice(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    skip: bool,
) -> None:
    poisoned(monkeypatch, {12}, value=1e4)
    cfg = tiny(
        "trainer.spike_window=8", f"trainer.skip_spikes={str(skip).lower()}",
        "trainer.max_steps=14", "trainer.log_interval=14",
    )  # fmt: skip
    run_dir = run_here(cfg)
    (row,) = [r for r in read_rows(run_dir.metrics_path) if "train/loss" in r]
    assert row["train/spikes"] == 1
    assert row["train/skipped_steps"] == int(skip)


def test_overflow_under_fp16_is_counted(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    from lunaris.precision import Precision

    assert Precision("fp16", torch.device("cpu")).scaler.is_enabled()
    cfg = tiny("trainer.precision=fp16", "moe=none", "trainer.grad_clip=null")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lunaris.precision._FIRST_SCALE", 2.0**40)
        run_dir = run_here(cfg)
    row = read_rows(run_dir.metrics_path)[-1]
    assert row["train/skipped_steps"] >= 1
    assert row["train/loss_scale"] == 2.0 ** (40 - row["train/skipped_steps"])


def test_no_checkpoint_with_a_weight_that_is_not_finite_is_written(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lunaris.train

    real = lunaris.train.take_step

    def diverge(optimizer: Any, skip: Any) -> None:
        real(optimizer, skip)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][-1].view(-1)[-1] = torch.inf

    monkeypatch.setattr(lunaris.train, "take_step", diverge)
    with pytest.raises(RunFailed, match="has a value that is not finite; no checkpoint is written"):
        run_here(tiny("checkpoint.save_interval=1", "trainer.grad_clip=null"))
    assert not list(RunDir("runs/run").path.glob("checkpoints/*"))


@pytest.mark.parametrize("text", ["5", "7-3", "-3", "a-b", "3-", "1-99999999999999999999"])
def test_a_wrong_range_is_refused(
    finished: RunDir, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    from lunaris.__main__ import main

    assert main(["resume", str(finished.path), f"--skip-sequences={text}"]) == 2
    assert f"--skip-sequences {text}: must be A-B" in capsys.readouterr().err
    assert finished.noted("skip_sequences") is None
