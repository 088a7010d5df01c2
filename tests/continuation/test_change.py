"""`lunaris resume DIR KEY=VALUE`: a run continues with a recorded change, or from further back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.__main__ import main
from lunaris.metrics.records import read_rows
from lunaris.runs.changes import NAME, read_changes
from lunaris.runs.checkpoint_files import complete
from lunaris.runs.run_dir import RunDir

WSD = ("schedule=wsd", "schedule.decay_fraction=0.25", "schedule.warmup_steps=2")
# What differs between two runs of the same numbers.
OF_THE_MACHINE = ("perf/",)


def numbers(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the rows of a run without what depends on the machine."""
    return [
        {key: value for key, value in row.items() if not key.startswith(OF_THE_MACHINE)}
        for row in read_rows(run_dir.metrics_path)
    ]


def weights(run_dir: RunDir, step: int, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, the optimizer's too, by their names."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = tmp_path / "full.pt"
    dcp_to_torch_save(run_dir.checkpoints / f"step_{step:08d}", file)
    tree = torch.load(file, weights_only=True)
    return {
        f"{part}.{name}": value
        for part in ("model", "optimizer")
        for name, value in tree[part].items()
        if isinstance(value, torch.Tensor)
    }


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the content of every file of a folder, to see that nothing was written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def resume(run_dir: RunDir, *words: str) -> int:
    return main(["resume", str(run_dir.path), *words])


def steps_of(run_dir: RunDir) -> list[int]:
    return sorted(int(path.name[5:]) for path in complete(run_dir.checkpoints))


@pytest.mark.slow
def test_a_run_extended_under_wsd_equals_a_run_of_that_length(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = run_here(tiny(*WSD, name="short"))
    # The decay begins at step 6, whose checkpoint is kept; the last one is of step 8.
    assert steps_of(short) == [4, 6, 8]
    assert resume(short, "trainer.max_steps=16") == 0
    said = capsys.readouterr().out
    assert "extend the stable part, which ended at step 6; its decay now begins at step 12" in (
        " ".join(said.split())
    )
    assert "changed    from step 6: trainer.max_steps: 8 → 16" in said
    long = run_here(tiny(*WSD, "trainer.max_steps=16", name="long"))
    assert numbers(short) == numbers(long) and numbers(long)[-1]["step"] == 16
    for step in (12, 16):
        found, expected = weights(short, step, tmp_path), weights(long, step, tmp_path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The decay that was left is kept, rows and checkpoint.
    (aside,) = (short.path / "set_aside").iterdir()
    assert aside.name == "001_after_step_6" and (aside / "step_00000008").is_dir()
    assert [row["step"] for row in read_rows(aside / "metrics.jsonl")] == [7, 8]
    assert short.read_status()["state"] == "done"


@pytest.mark.slow
def test_a_changed_rate_and_batch_begin_at_the_checkpoint(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_here(tiny("schedule=constant"))
    before = numbers(run)
    words = ["optimizer.learning_rate=1e-3", "optimizer.weight_decay=0", "trainer.batch_size=2"]
    assert resume(run, "trainer.max_steps=12", *words) == 0
    rows = numbers(run)
    assert rows[: len(before)] == before
    rates = {row["step"]: row["train/lr"] for row in rows if row["step"]}
    assert rates[8] == 3e-3 and rates[9] == 1e-3
    # 8 steps of 4 sequences, then 2 a step: none is read twice, none is left out.
    read = {row["step"]: row["train/sequences"] for row in rows if row["step"]}
    assert [read[step] for step in (8, 9, 12)] == [32, 34, 40]
    (change,) = read_changes(run.path)
    assert change.step == 8 and change.keys["trainer.batch_size"] == {"old": 4, "new": 2}
    assert change.keys["global_batch"] == {"old": 4, "new": 2}
    assert "lunaris resume" in change.command
    capsys.readouterr()
    assert main(["runs", str(run.path)]) == 0
    assert "changed at step 8: optimizer.learning_rate: 0.003 → 0.001" in capsys.readouterr().out
    assert main(["runs", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["changes"][0]["step"] == 8


def test_a_cosine_of_another_length_is_said_to_be_another_curve(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished
    assert resume(run, "trainer.max_steps=12") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "cosine: a run of 12 steps has another curve from step 1 on; at step 8" in said
    assert "from 0.1 to 0.325 of the peak" in said


@pytest.mark.slow
def test_going_back_sets_aside_what_came_later(finished: RunDir) -> None:
    run = finished
    before = numbers(run)
    assert resume(run, "--at", "4") == 0
    assert numbers(run) == before
    (aside,) = (run.path / "set_aside").iterdir()
    assert [row["step"] for row in read_rows(aside / "metrics.jsonl")] == [5, 6, 7, 8]
    assert resume(run, "--at", "4", "optimizer.learning_rate=1e-3") == 0
    assert numbers(run)[:5] == before[:5] and numbers(run)[5:] != before[5:]
    assert sorted(p.name for p in (run.path / "set_aside").iterdir()) == [
        "001_after_step_4", "002_after_step_4"
    ]  # fmt: skip
    assert [change.step for change in read_changes(run.path)] == [4]


@pytest.mark.slow
def test_a_change_taken_back_is_no_change(finished: RunDir) -> None:
    run = finished
    assert resume(run, "trainer.max_steps=9", "trainer.grad_clip=2") == 0
    assert resume(run, "--at", "8", "trainer.grad_clip=1", "trainer.max_steps=10") == 0
    (change,) = read_changes(run.path)
    assert list(change.keys) == ["trainer.max_steps"] and change.keys["trainer.max_steps"] == {
        "old": 8, "new": 10
    }  # fmt: skip


@pytest.mark.slow
def test_the_old_command_offers_the_change_and_cannot_undo_it(
    tiny: Callable[..., Any], finished: RunDir
) -> None:
    from lunaris.errors import UserError
    from lunaris.runs.create import create

    run = finished
    with pytest.raises(UserError, match=r"lunaris resume .*/run trainer.max_steps=12`"):
        create(tiny("trainer.max_steps=12"), "", ["trainer.max_steps=12"])
    with pytest.raises(UserError) as refused:
        create(tiny("moe.n_experts=8"), "", [])
    assert "resume" not in str(refused.value)
    shutil.rmtree(run.checkpoints / "step_00000008")
    assert resume(run, "optimizer.learning_rate=1e-3", "trainer.max_steps=5") == 0
    with pytest.raises(UserError, match=r"learning_rate: 0.001 → 0.003"):
        create(tiny(), "", [])


@pytest.mark.slow
def test_an_edited_config_is_still_refused_after_a_change(
    finished: RunDir,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = finished
    assert resume(run, "trainer.max_steps=10") == 0
    text = run.config_path.read_text()
    run.config_path.write_text(text.replace("weight_decay: 0.1", "weight_decay: 0.2"))
    assert resume(run, "trainer.max_steps=12") == 2
    assert "was edited" in capsys.readouterr().err
    run.config_path.write_text(text)
    assert resume(run, "trainer.max_steps=11") == 0


@pytest.mark.slow
def test_a_change_that_did_not_reach_the_config_is_completed(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lunaris.continuation import change

    run = finished

    def power_cut(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(change, "replace_file", power_cut)
        assert resume(run, "trainer.max_steps=10") == 1
    assert "max_steps: 8" in run.config_path.read_text()
    assert run.read_config().trainer.max_steps == 10
    run.write_status(state="failed")
    assert resume(run) == 0
    assert run.read_status()["step"] == 10


@pytest.mark.slow
def test_other_data_is_taken_where_the_vocabulary_is_that_of_the_model(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished
    before = files(run.path)
    assert resume(run, "trainer.max_steps=10", "data.vocab_size=32") == 2
    assert "model.vocab_size=32: the model of this run has a vocabulary of 64" in (
        capsys.readouterr().err
    )
    assert files(run.path) == before
    assert resume(run, "trainer.max_steps=9", "data.seed=1") == 0
    assert resume(run, "trainer.max_steps=10") == 0


BAD = [
    (["moe.n_experts=8"], "moe.n_experts: 4 → 8: changes what the weights of the run in"),
    (["model.d_model=32", "moe.n_experts=8"], "model.d_model: 16 → 32, moe.n_experts: 4 → 8"),
    (["seed=3"], "seed: 1337 → 3"),
    (["optimizer=muon"], "optimizer._target_: lunaris.optim.adamw.build_adamw →"),
    (["attention=sliding_window"], "attention._target_"),
    (["name=other"], "name=other: a run keeps its name"),
    (["out_dir=other"], "out_dir=other: a run keeps its out_dir"),
    (["experiment=smoke"], "experiment=smoke: goes with `lunaris train`"),
    (["hydra.sweep.dir=x"], "hydra.sweep.dir=x: goes with `lunaris train`"),
    (["trainer.max_step=9"], "no such key; did you mean trainer.max_steps?"),
    (["trainer.max_steps=many"], "trainer.max_steps=many: must be a whole number"),
    (["trainer.max_steps=6"], "trainer.max_steps=6: the run is at step 8; give more steps, or go"),
    (["optimizer.learning_rate=1e-3"], "trainer.max_steps=8: the run is at step 8; give more"),
    (["--at", "5"], "--at 5: runs/run has no checkpoint of this step; its checkpoint steps: 4, 8"),
    (["schedule.warmup_steps=99"], "schedule.warmup_steps=99: must be at most trainer.max_steps=8"),
    (["parallelism=ddp", "parallelism.expert_parallel=3"], "must divide the world"),
    (["schedule=wds"], "schedule=wds: no such option; allowed are constant, cosine, wsd"),
]  # fmt: skip


def test_bad_changes_write_nothing(
    finished: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = files(finished.path)
    for words, expected in BAD:
        assert main(["resume", "runs/run", *words]) == 2, words
        assert expected in capsys.readouterr().err
        assert files(finished.path) == before and not (finished.path / NAME).exists()
    assert main(["resume", "nowhere", "trainer.max_steps=9"]) == 2
    assert "nowhere: not a run's folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stable_part_without_a_checkpoint_is_not_extended(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_here(tiny(*WSD))
    for step in (4, 6):
        shutil.rmtree(run.checkpoints / f"step_{step:08d}")
    assert resume(run, "trainer.max_steps=16") == 2
    assert "which ended at step 6, but no checkpoint up to it is kept" in capsys.readouterr().err
    assert resume(run, "trainer.max_steps=16", "--at", "8") == 0


def test_a_damaged_checkpoint_to_go_back_to_is_refused(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    (shard,) = (finished.checkpoints / "step_00000004").glob("__0_*")
    shard.write_bytes(b"x")
    assert main(["resume", str(finished.path), "--at", "4"]) == 2
    assert "step_00000004: is damaged" in capsys.readouterr().err
    assert steps_of(finished) == [4, 8]


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_with_the_change(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished.checkpoints)
    finished.write_status(state="failed")
    assert resume(finished, "--at", "4") == 2
    assert "no checkpoint of this step; it has none" in capsys.readouterr().err
    assert resume(finished, "trainer.max_steps=4", "optimizer.learning_rate=1e-3") == 0
    assert [row["step"] for row in numbers(finished)] == [0, 1, 2, 3, 4]
    assert [change.step for change in read_changes(finished.path)] == [0]


@pytest.mark.slow
def test_a_run_changes_its_parallelism_with_its_rate(finished: RunDir) -> None:
    layout = ["parallelism=fsdp", "launch.processes=2", "trainer.batch_size=2"]
    assert resume(finished, "trainer.max_steps=10", "optimizer.learning_rate=1e-3", *layout) == 0
    rates = {row["step"]: row["train/lr"] for row in numbers(finished) if row["step"]}
    assert len(rates) == 10 and rates[9] < rates[1] / 2
    (change,) = read_changes(finished.path)
    assert "global_batch" not in change.keys and "launch.processes" in change.keys
