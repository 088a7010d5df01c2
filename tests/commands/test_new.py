"""`lunaris new`: every skeleton passes its own test, trains, and overwrites nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from lunaris.__main__ import main
from lunaris.config.compose import Source, compose
from lunaris.config.keys import groups
from lunaris.optim.build import build_optimizer
from lunaris.run import bare_model
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


def test_skeletons_follow_the_width_by_their_roles_and_an_optimizer_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("attention", "router", "objective", "optimizer")
    for kind in kinds:
        assert main(["new", kind, f"mup_{kind}", "--to", "parts"]) == 0
    monkeypatch.syspath_prepend(str(Path("parts").absolute()))
    keys = [
        "attention=mup_attention", "moe=top2", "moe/router=mup_router", "objective=mup_objective",
        "optimizer=adamw", "model.d_model=64", "model.parametrization=mup",
        "model.mup_base_width=16",
    ]  # fmt: skip
    cfg = compose(keys, source=Source(dir="parts/conf"))
    model = bare_model(cfg, 500).to_empty(device="cpu")
    model.init_weights(0)
    block = model.blocks[0]
    assert abs(block.attention.mix.weight.std().item() / (0.02 / 2 / 8**0.5) - 1) < 0.05
    assert abs(block.feed_forward.router.gate.weight.std().item() / (0.02 / 4) - 1) < 0.1
    optimizer = build_optimizer(cfg.optimizer, model, router_lr_scale=1.0, width_multiplier=4.0)
    rates = {id(p): g["peak_lr"] for g in optimizer.param_groups for p in g["params"]}
    learned = [block.attention.mix.weight, block.feed_forward.router.gate.weight]
    assert [rates[id(p)] for p in learned] == [cfg.optimizer.learning_rate / 4] * 2
    # The objective's head gets the states with the factor of the logits.
    found = {}
    model(torch.arange(8)[None], head=lambda hidden, weight: found.setdefault("of", {"x": hidden}))
    assert abs(found["of"]["x"].square().mean().sqrt().item() - 1 / 4) < 0.01
    capsys.readouterr()
    command = ["train", "--config-dir", "parts/conf", "optimizer=mup_optimizer", "data=synthetic"]
    assert main([*command, "name=x", *keys[-3:]]) == 2
    said = capsys.readouterr().err
    assert "needs width_multiplier=4" in said and "build_mup_optimizer does not take it" in said
    assert not Path("runs").exists()


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
