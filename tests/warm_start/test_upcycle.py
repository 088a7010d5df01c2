"""Experts from a dense feed-forward (arXiv 2212.05055): the first forward is the dense model's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.__main__ import main
from lunaris.errors import RunFailed
from lunaris.inference import load_trained
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir
from lunaris.warm_start import upcycle

Tiny = Callable[..., Any]
# The hidden width of the dense run is 48, of experts with these multipliers 48 and 24.
WHOLE, HALF = "moe.expert_hidden_multiplier=4", "moe.expert_hidden_multiplier=2"


def difference(text: str) -> float:
    """Return the largest difference of a logit that a run printed."""
    found = re.search(r"largest difference of a logit is (\S+); loss (\S+) .* (\S+) now", text)
    assert found is not None, text
    return float(found[1])


def first_val(run_dir: RunDir) -> float:
    return float(read_rows(run_dir.metrics_path)[0]["val/loss"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dense") / "run"


@pytest.fixture
def dense(trained: Path, tiny: Tiny, run_here: Callable[[Any], RunDir]) -> RunDir:
    """Return a finished dense run, trained once."""
    if not trained.exists():
        run_here(tiny("moe=none", "optimizer.learning_rate=0.02", f"out_dir={trained}"))
    return RunDir(trained)


EQUAL = {
    "top-2": ["moe=top2", WHOLE],
    "top-2 of equal active size": ["moe=top2"],
    "balanced by bias": ["moe=top2", "moe.balancing=bias"],
    "sigmoid": ["moe=top2", "moe/router=sigmoid", "moe.router.route_scale=2.5"],
    "a shared expert": ["moe=top2", "moe.n_shared_experts=1", WHOLE],
    "first layer dense": ["moe=top2", "moe.first_dense_layers=1"],
    "virtual groups": ["moe=top2", "moe.n_experts=8", "moe.n_experts_per_token=4", HALF],
    "virtual groups, sigmoid, bias, shared": [
        "moe=fine_grained", "moe.n_experts=8", "moe.n_experts_per_token=4", HALF
    ],
}  # fmt: skip
OTHER = {
    "raw gates": (["moe=switch"], "the gates of moe.normalize_gates=false do not sum"),
    "raw sigmoid": (["moe=switch", "moe/router=sigmoid"], "only to about 0.5, for which"),
    "perturbed": (["moe=top2", "init_from_noise=0.5"], "init_from_noise=0.5 changes the experts"),
    "drop": (["moe=top2", "init_from_drop=0.5"], "init_from_drop=0.5 draws a part"),
    "another activation": (
        ["moe=top2", "model.activation=geglu"],
        "model.activation=swiglu there, geglu here",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("words", EQUAL.values(), ids=EQUAL)
def test_the_first_forward_is_that_of_the_dense_model(
    dense: RunDir,
    words: list[str],
    tiny: Tiny,
    run_here: Callable[[Any], RunDir],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_here(tiny(*words, "trainer.max_steps=1", f"init_from={dense.path}"))
    assert difference(capsys.readouterr().out) < 1e-5
    ended = [row["val/loss"] for row in read_rows(dense.metrics_path) if "val/loss" in row][-1]
    assert first_val(run) == pytest.approx(ended, rel=1e-6)
    (parent,) = run.parents()
    assert parent["kind"] == "upcycled from" and parent["step"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(("words", "reason"), OTHER.values(), ids=OTHER)
def test_what_differs_is_said_with_its_size_and_its_reason(
    dense: RunDir,
    words: list[str],
    reason: str,
    tiny: Tiny,
    run_here: Callable[[Any], RunDir],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_here(tiny(*words, "trainer.max_steps=1", f"init_from={dense.path}"))
    said = capsys.readouterr().out
    assert difference(said) > 1e-4 and reason in said


@pytest.mark.slow
def test_a_wrong_factor_is_noticed_before_the_first_step(
    dense: RunDir, tiny: Tiny, run_here: Callable[[Any], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcycle, "_factor", lambda moe, parts: (1.01, ""))
    cfg = tiny("moe=top2", f"init_from={dense.path}")
    with pytest.raises(RunFailed, match="the upcycled model is not the dense one"):
        run_here(cfg)
    assert not RunDir(cfg.out_dir).checkpoints.exists()


@pytest.mark.slow
def test_sharded_experts_are_those_of_one_process(
    dense: RunDir,
    tiny: Tiny,
    run_here: Callable[[Any], RunDir],
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [*EQUAL["virtual groups"], "init_from_noise=0.1", f"init_from={dense.path}"]
    one = run_here(tiny(*words, "trainer.max_steps=1", name="one"))
    layout = ["parallelism=fsdp", "launch.processes=2", "parallelism.expert_parallel=2"]
    assert main(["fork", str(one.path), *layout, "trainer.batch_size=2", "trainer.eval_steps=2",
                 "out_dir=two", "name=two"]) == 0  # fmt: skip
    assert first_val(RunDir("two")) == pytest.approx(first_val(one), rel=1e-6)
    assert "upcycled   the feed-forward of 2 layers, cut into 2 parts" in capfd.readouterr().out


@pytest.mark.slow
def test_experts_are_copies_of_parts_and_dropped_units_are_drawn_again(
    dense: RunDir, tiny: Tiny, run_here: Callable[[Any], RunDir]
) -> None:
    still = ["trainer.max_steps=1", "optimizer.learning_rate=1e-12", "optimizer.weight_decay=0"]
    words = [*EQUAL["virtual groups"], *still, f"init_from={dense.path}"]
    run = run_here(tiny(*words))
    old, _ = load_trained(dense.read_config(), dense, None)
    new, _ = load_trained(run.read_config(), run, None)
    ffn, moe = old.blocks[1].feed_forward.swiglu, new.blocks[1].feed_forward
    gate, up = ffn.gate_up.weight.chunk(2)
    for expert in range(8):
        part = slice(24 * (expert % 2), 24 * (expert % 2) + 24)
        expected = torch.cat([gate[part], up[part]]).mT
        torch.testing.assert_close(moe.experts.gate_up[expert], expected)
        torch.testing.assert_close(moe.experts.down[expert], 2 * ffn.down.weight[:, part].mT)
    # A group is chosen as one, and groups differ.
    rows = moe.router.weight.unflatten(0, (-1, 2))
    torch.testing.assert_close(rows[:, 0], rows[:, 1])
    assert not torch.allclose(rows[0], rows[1])
    dropped = run_here(tiny(*words, "init_from_drop=0.5", name="drop"))
    half, _ = load_trained(dropped.read_config(), dropped, None)
    changed = (half.blocks[1].feed_forward.experts.down - moe.experts.down).abs().amax(-1) > 1e-6
    assert changed.sum(-1).tolist() == [12] * 8 and not (changed[0] == changed[2]).all()
    mup = ["model.parametrization=mup", "model.mup_base_width=4"]
    wide, _ = load_trained(tiny(*words, *mup), run_here(tiny(*words, *mup, name="mup")), None)
    router = wide.blocks[1].feed_forward.router.weight
    torch.testing.assert_close(router, moe.router.weight / 4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["moe.expert_hidden_multiplier=3"],
            "a hidden width of 48, which experts of 32 do not cut",
        ),
        ([HALF, "moe.n_experts_per_token=3"], "moe.n_experts_per_token=3 and the experts of a"),
        ([HALF, "moe.n_experts=5"], "moe.n_experts=5, moe.n_experts_per_token=2 and"),
    ],
)
def test_experts_that_do_not_fit_are_refused_before_anything_is_written(
    dense: RunDir, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["fork", str(dense.path), "moe=top2", "moe.n_experts=4", "name=new", "out_dir=new"]
    assert main([*base, f"init_from={dense.path}", *words]) == 2
    assert expected in capsys.readouterr().err and not Path("new").exists()
