"""Optimizers from elsewhere: classes of torch.optim and factories, by their plain signatures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunaris.__main__ import main
from lunaris.config.compose import Source, compose
from lunaris.errors import UserError
from lunaris.metrics.records import read_rows
from lunaris.optim.build import build_optimizer
from lunaris.run import bare_model
from lunaris.runs.run_dir import RunDir

_MINE = """
import torch

def plain(model, lr):
    return torch.optim.Adagrad(model.parameters(), lr=lr)

def of_groups(params, learning_rate, momentum=0.5):
    return torch.optim.SGD(params, lr=learning_rate, momentum=momentum)

def peaks(model):
    return torch.optim.SGD([{"params": model.parameters(), "lr": 0.1, "peak_lr": 0.2}])

def number(model):
    return 3

def other(weights):
    return 3
"""


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module `mine_optim` into the current folder."""
    Path("mine_optim.py").write_text(_MINE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "mine_optim", raising=False)


def built(cfg: Any) -> torch.optim.Optimizer:
    target = cfg.optimizer._target_
    scale = 1.0 if target in ("mine_optim.plain", "mine_optim.peaks") else 0.5
    return build_optimizer(cfg.optimizer, bare_model(cfg, 64), router_lr_scale=scale)


def test_a_class_of_torch_gets_our_groups_and_its_own_names(tiny: Callable[..., Any]) -> None:
    keys = ["optimizer.learning_rate=0.02", "optimizer.weight_decay=0.3", "+optimizer.momentum=0.9"]
    optimizer = built(tiny("optimizer._target_=torch.optim.SGD", *keys))
    assert type(optimizer) is torch.optim.SGD
    found = [(g["lr"], g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(0.02, 0.02, 0.3)] * 2 + [(0.02, 0.02, 0.0), (0.01, 0.01, 0.3)]
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta"])
def test_what_a_class_has_of_our_keys_it_gets(tiny: Callable[..., Any], name: str) -> None:
    optimizer = built(tiny(f"optimizer._target_=torch.optim.{name}", "optimizer.eps=1e-5"))
    assert {g["eps"] for g in optimizer.param_groups} == {1e-5}
    assert {g.get("betas", (0.9, 0.95)) for g in optimizer.param_groups} == {(0.9, 0.95)}
    assert {g["lr"] for g in optimizer.param_groups} >= {3e-3}


def test_a_key_of_another_type_stays_the_class_s_own(tiny: Callable[..., Any]) -> None:
    optimizer = built(tiny("optimizer._target_=torch.optim.Adafactor"))
    assert optimizer.param_groups[0]["eps"] == (None, 1e-3)


@pytest.mark.usefixtures("mine")
def test_a_factory_needs_to_know_no_peak(tiny: Callable[..., Any]) -> None:
    (group,) = built(tiny("optimizer._target_=mine_optim.plain")).param_groups
    assert group["lr"] == group["peak_lr"] == 3e-3
    (group,) = built(tiny("optimizer._target_=mine_optim.peaks")).param_groups
    assert (group["lr"], group["peak_lr"]) == (0.1, 0.2)
    groups = built(tiny("optimizer._target_=mine_optim.of_groups")).param_groups
    assert {g["momentum"] for g in groups} == {0.5} and len(groups) == 4


def test_a_class_keeps_its_own_rate_where_no_key_gives_one(tiny: Callable[..., Any]) -> None:
    Path("conf/optimizer").mkdir(parents=True)
    Path("conf/optimizer/bare.yaml").write_text("_target_: torch.optim.SGD\nmomentum: 0.9\n")
    cfg = compose(["data=synthetic", "optimizer=bare"], source=Source(dir="conf"))
    groups = build_optimizer(cfg.optimizer, bare_model(cfg, 64), router_lr_scale=1.0).param_groups
    assert {(g["lr"], g["peak_lr"], g["weight_decay"], g["momentum"]) for g in groups} == {
        (1e-3, 1e-3, 0, 0.9)
    }


@pytest.mark.usefixtures("mine")
def test_a_router_rate_that_a_factory_does_not_take_is_refused(tiny: Callable[..., Any]) -> None:
    cfg = tiny("optimizer._target_=mine_optim.plain")
    with pytest.raises(UserError, match="moe.router_lr_scale=0.5: .*does not take"):
        build_optimizer(cfg.optimizer, bare_model(cfg, 64), router_lr_scale=0.5)


WIDE = ["model.parametrization=mup", "model.mup_base_width=4"]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("mine_optim.plain", "mine_optim.plain does not take it"),
        ("torch.optim.SGD", "mup has no rule for torch.optim.SGD, only for Adam, AdamW, "),
    ],
)
def test_an_optimizer_that_cannot_follow_the_width_is_refused(
    target: str, reason: str, tiny: Callable[..., Any]
) -> None:
    cfg = tiny(f"optimizer._target_={target}", *WIDE)
    width = cfg.model.width_factors().width
    with pytest.raises(UserError, match="model.parametrization=mup: .*width_multiplier=4 ") as e:
        build_optimizer(
            cfg.optimizer, bare_model(cfg, 64), router_lr_scale=1.0, width_multiplier=width
        )
    assert reason in str(e.value)
    build_optimizer(cfg.optimizer, bare_model(cfg, 64), router_lr_scale=1.0)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("target", ["torch.optim.NAdam", "mine_optim.of_groups"])
def test_a_class_that_takes_groups_gets_the_rates_of_the_width(
    target: str, tiny: Callable[..., Any]
) -> None:
    cfg = tiny(f"optimizer._target_={target}", *WIDE)
    groups = build_optimizer(
        cfg.optimizer, bare_model(cfg, 64), router_lr_scale=1.0, width_multiplier=4.0
    ).param_groups
    assert [g["peak_lr"] for g in groups] == [3e-3 / 4, 3e-3, 3e-3, 3e-3 / 4]


@pytest.mark.slow
def test_sgd_resumes_bit_for_bit(tiny: Callable[..., Any], run_here: Callable[..., Any]) -> None:
    keys = ["optimizer._target_=torch.optim.SGD", "+optimizer.momentum=0.9", "schedule=cosine"]
    whole = run_here(tiny(*keys, "optimizer.learning_rate=0.5", name="whole"))
    half = run_here(tiny(*keys, "optimizer.learning_rate=0.5", name="half"))
    for path in half.checkpoints.glob("step_00000008/*"):
        path.unlink()
    (half.checkpoints / "step_00000008").rmdir()
    half.write_status(state="stopped", step=4)
    run_here(tiny(*keys, "optimizer.learning_rate=0.5", name="half"))
    rows = [
        [(r["step"], r.get("train/loss"), r.get("val/loss")) for r in read_rows(d.metrics_path)]
        for d in (whole, half)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 9
    assert rows[0][-1][1] < rows[0][1][1]


BAD = [
    ("mine_optim.number", [], "made a int, not a torch.optim.Optimizer"),
    ("mine_optim.other", [], "takes neither `model` nor `params`; it takes weights"),
    ("mine_optim.plain", ["optimizer.weight_decay=0.3"], "unexpected keyword argument 'weight_"),
    ("torch.optim.SGD", ["+optimizer.momentun=0.9"], "unexpected keyword argument 'momentun'"),
    ("torch.optim.SGD", ["+optimizer.momentum=-1"], "Invalid momentum value: -1"),
    ("torch.optim.SGD", WIDE, "choose optimizer=adamw or muon"),
    ("torch.optim.LBFGS", [], "LBFGS doesn't support per-parameter options"),
]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(("target", "keys", "message"), BAD)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    target: str, keys: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["optimizer=adamw", f"optimizer._target_={target}"]
    command = ["train", "data=synthetic", *chosen, *keys, "name=x"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert target in error and message in error
    assert not RunDir("runs/x").path.exists()
