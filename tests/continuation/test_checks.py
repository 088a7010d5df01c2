"""A custom class that lacks a method is refused by the method's name, and nothing is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.config.validate import METHODS
from lunaris.data.base import Data
from lunaris.launch.local import Local
from lunaris.metrics.loggers import Logger
from lunaris.model.attention.base import AttentionFactory
from lunaris.model.feed_forward import FeedForwardFactory
from lunaris.moe.router.base import RouterFactory
from lunaris.objective.base import Objective
from lunaris.optim.schedule import Schedule
from lunaris.parallelism.base import Parallelism

_MINE = """
import torch
from lunaris.moe.router.base import Router
from lunaris.objective.base import Objective

class Schedule:
    def __init__(self, max_steps): pass

class Data:
    def ensure_ready(self): pass
    def train(self, seq_len, seed): pass

class Logger:
    def start(self, run_dir, cfg, step): pass

class Launcher:
    def __init__(self): pass

class Mixing(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Linear(width, width)
    def forward(self, x, prepared, cache=None):
        return self.weight(x)

class Attention:
    def __call__(self, layer, shape): return Mixing(shape.d_model)

class NoModule:
    def __call__(self, layer, shape): return 3

class RouterFactory:
    def __call__(self, layer, shape, spec): return Router()

class Half(Objective):
    def __call__(self, model, batch): pass

class Uncallable:
    def __init__(self, n): pass

class Messages:
    def __init__(self, room): pass
    def start(self, run_dir, cfg, step): pass
    def tick(self, step): pass
    def log(self, row): pass
    def message(self, text): pass
    def flush(self): pass
    def finish(self, state): pass
"""
BAD = [
    ("schedule", "Schedule", "has no method __call__; lunaris.optim.schedule.Schedule says"),
    ("data", "Data", "has no method val; lunaris.data.base.Data says"),
    ("+logger.mine", "Logger", "has no method tick; lunaris.metrics.loggers.Logger says"),
    ("launch", "Launcher", "has no method submit; lunaris.launch.local.Local says"),
    ("attention", "Attention", "Mixing has no method new_cache; lunaris.model.attention.base.Atte"),
    ("attention", "NoModule", "int is not a torch.nn.Module"),
    ("moe.router", "RouterFactory", "Router has no method forward; lunaris.moe.router.base.Router"),
    ("attention", "Uncallable", "has no method __call__; lunaris.model.attention.base.Attention"),
    ("+logger.mine", "Messages", "its keys do not fit: missing a required argument: 'room'"),
    ("objective", "Half", "Half has no method count_targets; lunaris.objective.base.Objective say"),
]


@pytest.mark.parametrize(("group", "name", "message"), BAD)
def test_a_missing_method_is_named(
    group: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Path("mine_parts.py").write_text(_MINE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "mine_parts", raising=False)
    moe = ["moe=switch"] if group.startswith("moe") else ["moe=none"]
    command = ["train", "data=synthetic", *moe, f"{group}._target_=mine_parts.{name}", "name=x"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{group.lstrip('+')}._target_=mine_parts.{name}: {message}" in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.optim.SparseAdam", "cannot make a step: RuntimeError: SparseAdam does not support"),
        ("torch.optim.LBFGS", "LBFGS doesn't support per-parameter options"),
    ],
)
def test_an_optimizer_that_cannot_step_here_is_refused(
    target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "data=synthetic", "moe=none", f"optimizer._target_={target}", "name=x"]
    assert main(command) == 2
    assert f"error: optimizer._target_={target}: {message}" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_methods_are_those_of_the_interfaces() -> None:
    """`data` may lack `digests`."""
    bases = {
        "data": Data, "objective": Objective, "schedule": Schedule, "parallelism": Parallelism,
        "logger": Logger, "launch": Local, "attention": AttentionFactory,
        "moe": FeedForwardFactory, "moe.router": RouterFactory,
    }  # fmt: skip
    assert METHODS.keys() == bases.keys()
    for group, (names, where) in METHODS.items():
        base = bases[group]
        assert where == f"{base.__module__}.{base.__qualname__}"
        own = {
            name for name, value in vars(base).items()
            if callable(value) and (not name.startswith("_") or name == "__call__")
        }  # fmt: skip
        allowed_more = {"data": {"digests"}, "launch": {"start"}}.get(group, set())
        assert own == {*names} | allowed_more


def test_the_current_folder_is_importable() -> None:
    """Also for the installed command, whose path does not begin with it."""
    Path("own_schedule.py").write_text(
        "class Falling:\n"
        "    def __init__(self, max_steps): self.n = max_steps\n"
        "    def __call__(self, step): return 1 - step / self.n\n"
    )
    script = (
        "import sys; from lunaris.__main__ import main; sys.path[:] = sys.path[1:]; "
        "sys.exit(main(sys.argv[1:]))"
    )
    keys = [
        "data=synthetic", "model.d_model=16", "model.n_layers=1", "model.n_heads=2",
        "model.n_kv_heads=1", "model.max_seq_len=16", "trainer.max_steps=2", "moe=none",
        "trainer.eval_steps=1", "schedule._target_=own_schedule.Falling", "name=x",
    ]  # fmt: skip
    command = [sys.executable, "-c", script]
    assert subprocess.run([*command, "train", *keys]).returncode == 0
    # Nothing else of the folder is imported: what is not installed may not be taken from there.
    Path("trackio.py").write_text("raise SystemExit('code of the folder ran')\n")
    quiet = (
        "import sys; sys.modules.pop('trackio', None); sys.path[:] = sys.path[1:]; "
        "from lunaris.config.instantiate import locate; locate('x', 'torch.optim.SGD'); "
        "assert not {'', __import__('os').getcwd()} & set(sys.path)"
    )
    assert subprocess.run([sys.executable, "-c", quiet]).returncode == 0
    Path("trackio.py").unlink()
    more = ["resume", "runs/x", "trainer.max_steps=3", "--trust", "own_schedule"]
    assert subprocess.run([*command, *more]).returncode == 0
    moved = ["resume", "../x", "trainer.max_steps=4", "--trust", "own_schedule"]
    lost = subprocess.run([*command, *moved], cwd=_elsewhere(), capture_output=True, text=True)
    assert lost.returncode == 2 and "no such module on the Python path" in lost.stderr


def _elsewhere() -> Path:
    """Return another folder, next to a copy of the run."""
    Path("y").mkdir()
    Path("runs/x").rename("x")
    return Path("y")
