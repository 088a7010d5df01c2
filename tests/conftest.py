"""What every test shares: one torch thread, a private cache, no environment of a launcher."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["WANDB_SILENT"] = "true"
# No options and no defaults of the person who runs the tests.
os.environ["LUNARIS_CONFIG_DIR"] = ""

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in an empty folder, outside any job."""
    monkeypatch.chdir(tmp_path)
    for name in _LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def own_devices() -> None:
    """Let each test ask its own nvidia-smi, which a process asks once."""
    from lunaris import devices

    devices._asked.cache_clear()
    devices._warn.cache_clear()


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Undo what a test changes of Python's root logger.

    Hydra's flags set it up for the whole process, with a handler that writes into pytest's capture
    of that test, which is closed when the next one logs.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what tests write out of the user's caches; `data=stdlib` once for all xdist workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    os.environ["LUNARIS_CACHE"] = str(root / "lunaris-cache")
    # Trackio reads it once, when it is imported.
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.getbasetemp() / "trackio")


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Any]:
    """Return a function from overrides to the composed config of a run that takes a second."""

    def make(*overrides: str, name: str = "run") -> Any:
        from lunaris.config.compose import compose

        groups = {text.partition("=")[0]: text.partition("=")[2] for text in overrides}
        own_keys = []
        if groups.get("data", "synthetic") == "synthetic":
            own_keys += ["data=synthetic", "data.n_tokens=20000", "data.vocab_size=64"]
        if "moe" not in groups:
            own_keys += ["moe=switch"]
        if "optimizer" not in groups:
            own_keys += ["optimizer=adamw"]
        if groups.get("moe") != "none":
            own_keys += ["moe.n_experts=4"]
        return compose(
            [
                *own_keys,
                "model.d_model=16",
                "model.n_layers=2",
                "model.n_heads=2",
                "model.n_kv_heads=1",
                "model.max_seq_len=16",
                "model.multiple_of=8",
                "trainer.max_steps=8",
                "trainer.batch_size=4",
                "trainer.log_interval=1",
                "trainer.eval_interval=4",
                "trainer.eval_steps=2",
                "trainer.device=cpu",
                "checkpoint.save_interval=4",
                f"name={name}",
                f"out_dir={tmp_path}/runs/{name}",
                *overrides,
            ]
        )

    return make


class _Screen(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], io.StringIO]:
    """Return a function that makes standard output and error a terminal of so many columns."""

    def begin(columns: int) -> io.StringIO:
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        screen = _Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return begin


@pytest.fixture
def run_here() -> Callable[[Any], Any]:
    """Return a function that makes a composed config's folder and trains it in this process."""

    def run(cfg: Any) -> Any:
        from lunaris.run import execute
        from lunaris.runs.create import create

        run_dir = create(cfg, "test", [])
        execute(run_dir.read_config(), run_dir.path)
        return run_dir

    return run


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def finished(_trained: Path, tiny: Callable[..., Any], run_here: Callable[[Any], Any]) -> Any:
    """Return the `RunDir` of a finished `tiny` run, trained once and copied for each test."""
    from lunaris.config.frozen import to_yaml
    from lunaris.runs.run_dir import RunDir

    cfg = tiny()
    if not _trained.exists():
        shutil.copytree(run_here(cfg).path, _trained)
    run_dir = RunDir(cfg.out_dir)
    shutil.copytree(_trained, run_dir.path, dirs_exist_ok=True)
    run_dir.config_path.write_bytes(to_yaml(cfg))
    return run_dir


@pytest.fixture
def canary_of() -> Callable[..., AbstractContextManager[None]]:
    """Return a context (package, what, place=…) that fails when a package changed what we use.

    The message names the package, its version, what it changed, and the place to adapt.
    """

    @contextmanager
    def canary(package: str, what: str, *, place: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            version = metadata.version(package)
            pytest.fail(
                f"{package} {version} changed {what}: adapt {place}, or limit {package} in "
                f"pyproject.toml ({type(error).__name__}: {error})",
                pytrace=False,
            )

    return canary


def _offline_steps(path: Path) -> list[int]:
    """Return the steps in the newest offline file of W&B, a log in LevelDB's format."""
    from wandb.proto import wandb_internal_pb2

    content = max(path.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime).read_bytes()
    steps, position, record = [], 7, b""
    while position + 7 <= len(content):
        block = 32768 - position % 32768
        if block < 7:
            position += block
            continue
        size, kind = (
            int.from_bytes(content[position + 4 : position + 6], "little"),
            content[position + 6],
        )
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # A whole record, or the last part of one.
            found = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if found.WhichOneof("record_type") == "history":
                steps.append(found.history.step.num)
    return steps


@pytest.fixture
def offline_steps() -> Callable[[Path], list[int]]:
    """Return a function from a run's folder to the steps in its newest offline file of W&B."""
    return _offline_steps
