"""`lunaris runs`: the table, from files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.atomic_files import write_json
from lunaris.runs.run_dir import RunDir


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def make_run(path: Path, overrides: list[str] | None = None, **status: object) -> None:
    (path / "logs").mkdir(parents=True)
    (path / "config.yaml").write_text("name: x\n")
    write_json(path / "provenance.json", {"overrides": overrides or []})
    RunDir(path).write_status(**status)


def make_sweep(path: Path, *seeds: int) -> None:
    rows = [
        {"name": f"seed={s}", "overrides": ["moe=top2", f"seed={s}"], "dir": f"seed={s}"}
        for s in seeds
    ]
    path.mkdir(parents=True)
    write_json(path / "manifest.json", {"points": rows})


def test_runs_and_sweeps_below_a_folder_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(
        Path("runs/one"), ["moe=top2"], state="done", step=8, max_steps=8, best_val_loss=1.5,
        job_id="3",
    )  # fmt: skip
    make_sweep(Path("sweeps/first"), 1, 2)
    make_run(Path("sweeps/first/seed=1"), state="failed", step=2, max_steps=8, last_error="Boom: x")
    Path("sweeps/first/seed=1/logs/rank_0.log").write_text("trace\n")
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "val", "loss", "job", "overrides"]
    assert lines[1].split() == ["one", "done", "8/8", "1.5000", "3", "moe=top2"]
    assert lines[3] == "sweep sweeps/first: 1 failed, 1 missing"
    assert lines[5].split() == ["seed=1", "failed", "2/8", "-", "-", "seed=1"]
    assert lines[6].split()[:3] == ["seed=2", "missing", "0/?"]
    assert "  seed=1: failed: Boom: x" in lines
    assert "    log: sweeps/first/seed=1/logs/rank_0.log" in lines


def test_what_cannot_be_read_hides_no_other_run(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs/good"), state="done", step=8, max_steps=8, best_val_loss=1.5)
    make_run(Path("runs/odd"), state="done", best_val_loss="y")
    write_json(Path("runs/odd/provenance.json"), {"overrides": 5})
    for name, points in (("a", None), ("b", [{"name": "x"}, 3]), ("c", [])):
        make_sweep(Path("sweeps", name))
        write_json(Path("sweeps", name, "manifest.json"), {"points": points})
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    assert "1.5000" in out and "odd" in out
    assert main(["runs", "--json"]) == 0


def test_a_failure_without_an_error_shows_the_log_s_last_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run(Path("run"), state="failed", step=0)
    Path("run/logs/rank_1.log").write_text("Traceback\nOSError: disk full\n\n")
    assert main(["runs", "run"]) == 0
    assert "run: failed: OSError: disk full" in capsys.readouterr().out


def test_json_holds_a_row_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("run"), ["seed=1"], state="done", step=3, max_steps=3)
    assert main(["runs", "run", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["state"], row["step"]) == ("run", "done", 3)
    assert row["overrides"] == ["seed=1"]


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_runs_is_a_user_error(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", folder]) == 2
    assert folder in capsys.readouterr().err


def test_no_torch_and_no_hydra_are_imported() -> None:
    make_run(Path("run"), state="done", step=3)
    code = "import sys; from lunaris.__main__ import main; assert main(['runs']) == 0; \
sys.exit(bool({'torch', 'hydra', 'omegaconf', 'submitit', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
