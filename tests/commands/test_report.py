"""`lunaris report`: what it refuses, and that it writes nothing then."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.runs.sweep_manifest import ManifestPoint, write_points


@pytest.fixture
def run() -> Path:
    folder = Path("runs/x")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\n")
    shutil.copytree(folder, "runs/y")
    write_points(Path("sweep"), "lunaris train -m seed=1", [ManifestPoint("a", ["seed=1"], "a")])
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: holds no runs and no sweeps"),
        (["runs/x", "--to", "notes.txt"], "notes.txt: exists and is no report; choose another"),
        (["runs/x", "--to", "empty"], "empty: is a folder; give the report a file"),
        (["runs/x", "--to", "notes.txt/report.html"], "notes.txt/report.html: cannot be written"),
        (["runs/x", "--png", "notes.txt"], "--png notes.txt: is a file; give a folder"),
        (["runs/x", "nowhere"], "nowhere: no such folder"),
        (["runs/x", "empty"], "empty: not a run's folder; several folders are those of runs"),
        (["runs", "runs/x"], "runs: not a run's folder; several folders are those of runs"),
        (["runs/x", "./runs/../runs/x/"], "runs/../runs/x: is given twice; give each run once"),
        (["runs/x", "sweep"], "sweep: is a sweep; give it alone, or some of its points' folders"),
        (["sweep", "sweep"], "sweep: is a sweep; give it alone, or some of its points' folders"),
        (["runs/x", "runs/y", "--to", "notes.txt"], "notes.txt: exists and is no report"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_and_nothing_is_written(
    run: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    Path("empty").mkdir()
    Path("notes.txt").write_text("mine")
    before = sorted(Path().rglob("*"))
    assert main(["report", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and len(err.splitlines()) == 1
    assert sorted(Path().rglob("*")) == before and Path("notes.txt").read_text() == "mine"


def test_a_report_is_written_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "report     runs/x/report.html"
    assert main(["report", str(run), "--to", "pages/one.html"]) == 0
    assert Path("pages/one.html").is_file()


def test_no_torch_is_imported(run: Path) -> None:
    code = (
        "import sys; from lunaris.__main__ import main; assert main(['report', 'runs/x', '--png', "
        "'p']) == 0; "
        "sys.exit(bool({'torch', 'tokenizers', 'wandb', 'submitit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
