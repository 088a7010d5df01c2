"""`lunaris new`: every skeleton passes its own test, trains, and overwrites nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.config.keys import groups
from lunaris.scaffold.skeleton import kinds, skeleton

ROOT = Path(__file__).resolve().parents[2]
# Groups that hold values only.
VALUES = {"model", "trainer", "checkpoint"}


def test_every_joint_has_a_skeleton() -> None:
    chosen = {skeleton(kind, "x_y").choose.partition("=")[0] for kind in kinds()}
    assert chosen == set(groups()) - VALUES


@pytest.mark.slow
def test_the_skeleton_of_each_kind_passes_its_own_test_in_which_it_trains(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind in kinds():
        assert main(["new", kind, f"own_{kind}", "--to", "parts"]) == 0
        out = capsys.readouterr().out
        assert f"parts/test_own_{kind}.py" in out
        assert "train with: PYTHONPATH=parts lunaris train --config-dir parts/conf " in out
    tests = sorted(str(path) for path in Path("parts").glob("test_*.py"))
    assert len(tests) == len(kinds()) == 10
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"PYTHONPATH": "parts"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{2 * len(tests)} passed" in done.stdout
    # The printed command, with two steps.
    line = out.splitlines()[-1].partition("train with: PYTHONPATH=parts lunaris ")[2]
    small = ["data=synthetic", "trainer.max_steps=2", "trainer.eval_steps=1", "model.d_model=16"]
    done = subprocess.run(
        [sys.executable, "-m", "lunaris", *line.split(), *small, "trainer.device=cpu", "name=two"],
        env=os.environ | {"PYTHONPATH": "parts"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path("runs/two/metrics.jsonl").is_file()


def test_a_skeleton_is_clean_code(tmp_path: Path) -> None:
    for kind in kinds():
        for path, text in skeleton(kind, f"my_{kind}").files.items():
            if path.endswith(".py"):
                compile(text, path, "exec")
                assert max(map(len, text.splitlines())) <= 100, path
            assert "my_part" not in text and "MyPart" not in text and text.endswith("\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["atention", "x"], "atention: no such kind of part; allowed are attention, data,"),
        (["router", "My-Router"], "My-Router: must be lower-case words joined by underscores"),
        (["router", "class"], "class: must be lower-case words"),
        (["router", "json"], "json: there is a module json already; choose another name"),
        (["router", "taken"], "conf/moe/router/taken.yaml: exists; choose another name"),
        (["router", "free", "--to", "file"], "file: cannot be written"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = Path("conf/moe/router/taken.yaml")
    taken.parent.mkdir(parents=True)
    taken.write_text("mine")
    Path("file").write_text("")
    before = sorted(Path(".").rglob("*"))
    assert main(["new", *args]) == 2
    assert message in capsys.readouterr().err
    assert sorted(Path(".").rglob("*")) == before and taken.read_text() == "mine"


def test_the_skeletons_are_installed() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert data["package-data"]["lunaris.scaffold"] == ["*.txt", "**/*.txt"]
