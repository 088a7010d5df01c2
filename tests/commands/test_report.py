"""`lunaris report`: what it refuses, and that it writes nothing then."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.data.prepare.build import build_shards
from lunaris.data.text import TextData
from lunaris.runs.run_dir import RunDir
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
        (["runs/x", "runs/y", "--prompt", "a"], "--prompt: is continued by the checkpoints of one"),
        (["sweep", "--prompt", "a"], "--prompt: is continued by the checkpoints of one run"),
        (["runs/x", "--prompt", "a"], "runs/x: --prompt: the run has no checkpoint"),
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


@pytest.mark.slow
def test_prompts_are_continued_by_each_checkpoint(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_text("the cat sat on the mat. " * 400)
    keys: dict[str, Any] = {"dir": "shards", "vocab_size": 270, "val_fraction": 0.0}
    build_shards(TextData(files=["a.txt"], processes=1, **keys))
    text = ["data=text", "data.files=[a.txt]", *(f"data.{k}={v}" for k, v in keys.items())]
    run_dir = run_here(tiny(*text, "trainer.eval_interval=null"))
    capsys.readouterr()
    prompts = ["--prompt", "the <cat>", "--prompt", "mat"]
    assert main(["report", str(run_dir.path), *prompts]) == 0
    page = (run_dir.path / "report.html").read_text()
    labels = re.findall(r"<h3>step ([\d,]+)</h3>\n<div class=\"code\"><pre>(.*?)</pre>", page, re.S)
    assert [step for step, _ in labels] == ["4", "8", "4", "8"]
    args = ["--prompt", "mat", "--max-new-tokens", "100", "--json", "--step"]
    for (_, shown), step in zip(labels[2:], ("4", "8"), strict=True):
        capsys.readouterr()
        assert main(["generate", str(run_dir.path), *args, step]) == 0
        assert html.unescape(shown) == "mat" + json.loads(capsys.readouterr().out)["text"]
    assert all(text.startswith("the &lt;cat&gt;") for _, text in labels[:2])
    assert labels[0] != labels[1]
