"""`lunaris resume`: what is not done is continued, as it was launched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lunaris.__main__ import main
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir

SMALL = [
    "data=synthetic", "data.n_tokens=20000", "data.vocab_size=64", "model.d_model=16",
    "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.max_seq_len=16",
    "model.multiple_of=8", "moe.n_experts=4", "trainer.max_steps=2", "trainer.batch_size=2",
    "trainer.log_interval=1", "trainer.eval_steps=1", "trainer.device=cpu",
]  # fmt: skip


def shards(folder: str, seed: int) -> None:
    Path(folder).mkdir()
    tokens = np.random.default_rng(seed).integers(0, 64, 20_000, dtype=np.uint16)
    np.save(f"{folder}/0.npy", tokens)


def steps(path: Path) -> list[int]:
    lines = RunDir(path).metrics_path.read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_run_continues_from_its_checkpoint(tiny: Callable[..., Any]) -> None:
    cfg = tiny("trainer.max_steps=4", "checkpoint.save_interval=1")
    run_dir = create(cfg, "lunaris train", ["seed=1"])
    assert main(["resume", str(run_dir.path)]) == 0
    shutil.rmtree(run_dir.checkpoints / "step_00000004")
    run_dir.write_status(state="failed", last_error="power cut")
    assert main(["resume", str(run_dir.path)]) == 0
    assert run_dir.read_status()["state"] == "done"
    assert steps(run_dir.path) == list(range(5))
    provenance = json.loads((run_dir.path / "provenance.json").read_text())
    assert provenance["overrides"] == ["seed=1"] and len(provenance["attempts"]) == 2


@pytest.mark.slow
def test_of_a_moved_sweep_only_what_is_asked_for_runs_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "-m", *SMALL, "seed=1,2,3", "name=s"]) == 0
    Path("sweeps/s").rename("moved")
    shutil.rmtree("moved/seed=2")
    RunDir(Path("moved/seed=3")).write_status(state="failed", last_error="x")
    capsys.readouterr()
    assert main(["resume", "moved", "--only", "missing"]) == 0
    assert "[1/1] seed=2: done" in capsys.readouterr().out
    assert RunDir(Path("moved/seed=3")).read_status()["state"] == "failed"
    assert main(["resume", "moved"]) == 0
    attempts = {s: RunDir(Path(f"moved/seed={s}")).read_status()["attempts"] for s in (1, 2, 3)}
    assert attempts == {1: 1, 2: 1, 3: 2}
    assert main(["resume", "moved"]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_of_a_sweep_only_the_launch_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-m", *SMALL, "seed=1,2", "name=s"]) == 0
    points = [RunDir(Path(f"sweeps/s/seed={seed}")) for seed in (1, 2)]
    points[0].write_status(state="failed")
    before = [point.config_path.read_text() for point in points]
    capsys.readouterr()
    for given in ("seed=3", "trainer.max_steps=4", "launches.processes=2"):
        assert main(["resume", "sweeps/s", given]) == 2
        assert f"{given}: goes with the folder of a run" in capsys.readouterr().err
    assert main(["resume", "sweeps/s", "launch.max_restart=2"]) == 2
    assert "did you mean launch.max_restarts?" in capsys.readouterr().err
    assert [point.config_path.read_text() for point in points] == before
    shutil.rmtree(points[0].checkpoints / "step_00000002")
    assert main(["resume", "sweeps/s", "launch.max_restarts=2"]) == 0
    out = capsys.readouterr().out
    assert "seed=1: changed    from step 0: launch.max_restarts: 0 → 2" in out
    assert points[0].read_status()["state"] == "done"
    assert [point.read_config().launch.max_restarts for point in points] == [2, 0]
    assert main(["resume", "sweeps/s"]) == 0


@pytest.mark.slow
def test_a_point_with_another_config_than_the_manifest_s_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "-m", *SMALL, "seed=1,2", "name=s"]) == 0
    point = RunDir(Path("sweeps/s/seed=2"))
    text = point.config_path.read_text()
    point.config_path.write_text(text.replace("seed: 2", "seed: 5"))
    point.write_status(state="failed")
    assert main(["resume", "sweeps/s"]) == 2
    assert "seed: 2 → 5" in capsys.readouterr().err


@pytest.mark.slow
def test_a_point_whose_data_is_gone_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards("k1", 1)
    shards("k2", 2)
    data = ["data=shards", "data.dir=k1,k2", "checkpoint.save_interval=1"]
    own = [key for key in SMALL if not key.startswith("data")]
    assert main(["train", "-m", *data, *own, "name=s"]) == 0
    points = [RunDir(path) for path in sorted(Path("sweeps/s").glob("data.dir=*"))]
    for point in points:
        shutil.rmtree(point.checkpoints / "step_00000002")
        point.write_status(state="failed")
    Path("k1").rename("elsewhere")
    capsys.readouterr()
    assert main(["resume", "sweeps/s"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and "data.dir=k1: no such folder" in captured.err
    assert [point.read_status()["state"] for point in points] == ["failed", "done"]


def test_a_class_within_a_class_is_found_again(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_data.py").write_text(
        "from lunaris.data.shards import ShardsData\n\n\nclass Outer:\n    Data = ShardsData\n"
    )
    monkeypatch.syspath_prepend(os.getcwd())
    shards("k1", 1)
    Path("conf/data").mkdir(parents=True)
    Path("conf/data/nested.yaml").write_text(
        "_target_: own_data.Outer.Data\ndir: k1\ndocument_masking: false\n"
    )
    own = [key for key in SMALL if not key.startswith("data")]
    argv = ["--config-dir", "conf", "data=nested", "checkpoint.save_interval=1", *own, "name=n"]
    assert main(["train", *argv]) == 0
    run_dir = RunDir("runs/n")
    shutil.rmtree(run_dir.checkpoints / "step_00000002")
    run_dir.write_status(state="failed")
    assert main(["resume", "runs/n", "--trust", "own_data"]) == 0
    assert run_dir.read_status()["state"] == "done"


def test_a_done_run_has_nothing_to_do(
    tiny: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = create(tiny(), "lunaris train", [])
    run_dir.write_status(state="done")
    assert main(["resume", str(run_dir.path)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_an_unknown_state_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", ".", "--only", "fail"]) == 2
    assert "did you mean failed" in capsys.readouterr().err
