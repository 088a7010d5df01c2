"""`lunaris runs`: the table, from files alone."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.atomic_files import write_json
from lunaris.runs.rows import last_values
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
    heads = ["run", "state", "step", "loss", "val", "loss", "time", "job"]
    assert lines[0].split() == [*heads, "overrides"]
    assert lines[1].split() == ["one", "done", "8/8", "-", "1.5000", "-", "3", "moe=top2"]
    assert lines[3] == "sweep sweeps/first: 1 failed, 1 missing"
    assert lines[4].split() == [*heads, "seed"]
    assert lines[5].split() == ["seed=1", "failed", "2/8", "-", "-", "-", "-", "1"]
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


@pytest.fixture
def sweep() -> None:
    """Make a sweep of two keys, and a run between sweeps whose name holds some overrides."""
    losses = {("4", "1e-3"): 2.5, ("16", "1e-3"): 2.25, ("4", "3e-3"): None}
    rows = []
    for (experts, rate), loss in losses.items():
        texts = [f"moe.n_experts={experts}", f"optimizer.learning_rate={rate}"]
        name = ",".join(texts)
        rows.append({"name": name, "overrides": ["seed=1", *texts], "dir": name})
        folder = Path("sweeps/two", name)
        state = "done" if loss else "stopped"
        make_run(folder, state=state, step=8, max_steps=8, best_val_loss=loss, tokens=512)
        lines = [{"step": 8, "train/loss": 3.0}, {"step": 8, "val/loss": loss}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        attempts = [{"time": 100.0, "ended": 130.0}, {"time": 500.0, "ended": 535.5}]
        write_json(folder / "provenance.json", {"attempts": attempts})
    write_json(Path("sweeps/two/manifest.json"), {"points": rows})
    make_run(
        Path("runs/moe=top2,seed=3"), ["moe=top2", "seed=3", "name=x", "logger=wandb"],
        state="done", step=8, max_steps=8, best_val_loss=1.5,
    )  # fmt: skip


@pytest.mark.usefixtures("sweep")
def test_swept_keys_are_columns_and_overrides_do_not_repeat_the_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "moe=top2,seed=3" and lines[1].split()[-1] == "logger=wandb"
    assert lines[4].split()[-2:] == ["n_experts", "learning_rate"]
    assert lines[5].split()[1:] == [
        "done", "8/8", "3.0000", "2.5000", "0:01:06", "-", "4", "1e-3",
    ]  # fmt: skip


@pytest.mark.usefixtures("sweep")
@pytest.mark.parametrize(
    ("flags", "experts"),
    [
        ([], ["4", "16", "4"]),
        (["--sort", "val_loss"], ["16", "4", "4"]),
        (["--sort", "moe.n_experts"], ["4", "4", "16"]),
        (["--sort", "moe.n_experts", "--reverse"], ["16", "4", "4"]),
        (["--best"], ["16"]),
    ],
)
def test_rows_are_sorted_and_chosen(
    flags: list[str], experts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "sweeps/two", "--json", *flags]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["values"]["moe.n_experts"] for row in rows] == experts
    assert main(["runs", "sweeps/two", "--csv", *flags]) == 0
    cells = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["moe.n_experts"] for row in cells] == experts
    assert cells[0]["final_train_loss"] == "3.0" and cells[0]["tokens"] == "512"
    assert cells[0]["duration_s"] == "65.5"


@pytest.mark.usefixtures("sweep")
def test_an_unknown_column_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--sort", "lerning_rate"]) == 2
    err = capsys.readouterr().err
    assert "--sort lerning_rate: no such column" in err
    assert "did you mean optimizer.learning_rate?" in err


@pytest.mark.usefixtures("sweep")
@pytest.mark.parametrize("columns", [60, 100, 200])
def test_a_terminal_s_table_fits_and_cuts_no_loss(
    on_terminal: Callable[[int], io.StringIO], columns: int
) -> None:
    screen = on_terminal(columns)
    assert main(["runs"]) == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert plain != screen.getvalue()  # It has colours.
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= columns
    for text in ("2.5000", "2.2500", "1.5000", "3.0000", "val loss", "8/8", "1e-3"):
        assert text in plain
    assert ("moe.n_experts=16" in plain) is (columns == 200)


@pytest.mark.usefixtures("sweep")
def test_a_table_without_color(
    on_terminal: Callable[[int], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = on_terminal(60)
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["runs"]) == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", screen.getvalue())


def test_watching_ends_with_the_last_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("run"), state="queued", step=1, max_steps=3, job_id="local-" + str(os.getpid()))

    def end(seconds: float) -> None:
        assert seconds == 0.5
        RunDir(Path("run")).write_status(state="done", step=3)

    monkeypatch.setattr("lunaris.commands.runs.time.sleep", end)
    assert main(["runs", "run", "--watch", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "1/3" in out and "3/3" in out and out.index("1/3") < out.index("3/3")


def test_the_last_losses_are_found_behind_long_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    loads = {"moe/layer_00/load": [0.123456789] * 20_000}
    rows = [{"step": 1, "val/loss": 7.0}, {"step": 2, "val/loss": None, "train/loss": 5.0} | loads]
    rows += [{"step": s, "train/loss": 4.0 - s / 100} | loads for s in (3, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "train')
    assert last_values(path, ["train/loss", "val/loss"]) == {"train/loss": 3.96, "val/loss": 7.0}
    assert last_values(path, ["none"]) == {}
    assert last_values(tmp_path / "absent", ["train/loss"]) == {}


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
