"""What the fault tests share: the long form, counts, groups of processes, an interrupted run.

`make faults` runs the long form (LUNARIS_FAULTS=long); the short form belongs to the test suite.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.runs.run_dir import RunDir

# A run of a second on shards with a tokenizer; it saves at steps 2, 4, 6 and 8.
KEYS = [
    "data=shards", "model.d_model=16", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1",
    "model.max_seq_len=16", "model.multiple_of=8", "moe.n_experts=4", "trainer.max_steps=8",
    "trainer.batch_size=4", "trainer.log_interval=1", "trainer.eval_interval=4",
    "trainer.eval_steps=2", "trainer.device=cpu", "checkpoint.save_interval=2",
    "checkpoint.keep_last=null", "data.dir=shards", "name=run",
]  # fmt: skip


@pytest.fixture(scope="session")
def long() -> bool:
    """Return whether the long form was asked for."""
    return os.environ.get("LUNARIS_FAULTS") == "long"


@pytest.fixture
def keys() -> list[str]:
    """Return the overrides of the stopped run."""
    return list(KEYS)


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Return a function that adds a number of tries of a kind to the summary."""
    return lambda kind, tries: record_property("faults", (kind, tries))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder as slow: each of them trains."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many tries of each kind the tests made, those of xdist's workers too."""
    totals: dict[str, int] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in getattr(report, "user_properties", []):
            if name == "faults" and report.when == "call":
                totals[value[0]] = totals.get(value[0], 0) + value[1]
    for kind, tries in totals.items():
        terminalreporter.write_line(f"faults: {tries:,} {kind}")


@pytest.fixture
def group() -> Callable[..., tuple[list[int], str]]:
    """Return a function that runs a script of this folder as a group of processes, one a rank.

    It takes the script's name, its arguments and `processes`; it returns the exit codes and the
    output of all.
    """

    def run(script: str, *args: str, processes: int = 2) -> tuple[list[int], str]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = os.environ | {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(Path(__file__).with_name(script)), *args]
        with Path(f"{script}.log").open("w+") as log:
            workers = [
                subprocess.Popen(
                    command,
                    env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
                for rank in range(processes)
            ]
            try:
                codes = [worker.wait(timeout=1500) for worker in workers]
            finally:
                for worker in workers:
                    worker.kill()
                    worker.wait()
            log.seek(0)
            return codes, log.read()

    return run


class Fork:
    """A process that the fork server started."""

    def __init__(self, server: subprocess.Popen[str], pid: int) -> None:
        self._server, self.pid = server, pid

    def running(self) -> bool:
        """Return whether the process has not ended."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def wait(self, timeout_s: float = 250) -> int:
        """Return the exit code; kill the process after `timeout_s` seconds and raise."""
        end = time.monotonic() + timeout_s
        while self.running():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} still ran after {timeout_s} s")
            time.sleep(0.005)
        return ask(self._server, {"wait": self.pid})


def ask(server: subprocess.Popen[str], order: dict[str, Any]) -> int:
    """Send an order to the fork server and return its answer."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@pytest.fixture(scope="session")
def _fork_server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield server


@pytest.fixture
def fork(_fork_server: subprocess.Popen[str]) -> Callable[..., Fork]:
    """Return a function that starts `python -m MODULE ARGS` in this folder, with torch imported.

    Its output goes to `forks.log`. Keyword arguments are environment variables.
    """

    def start(module: str, *args: str, **env: str) -> Fork:
        order = {"module": module, "args": args, "env": env, "cwd": str(Path.cwd())}
        log = str(Path("forks.log").absolute())
        return Fork(_fork_server, ask(_fork_server, order | {"log": log}))

    return start


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory, shared_cache: None) -> Path:
    """Return a folder with shards and two runs: `whole`, finished, and `run`, stopped at 4."""
    folder = tmp_path_factory.mktemp("faults")
    before = Path.cwd()
    os.chdir(folder)
    try:
        lines = [f"{i} quick brown foxes jump over {i * i % 97} lazy dogs\n" for i in range(400)]
        Path("text.txt").write_text("".join(lines))
        shape = ["data.vocab_size=280", "data.val_fraction=0.2", "data.format=lines"]
        assert main(["prepare", "data=text", "data.dir=shards", "data.files=text.txt", *shape]) == 0
        assert main(["train", *KEYS]) == 0
        shutil.copytree("runs/run", "whole")
        for step in (6, 8):
            shutil.rmtree(f"runs/run/checkpoints/step_{step:08d}")
        RunDir("runs/run").write_status(state="stopped", step=4)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def stopped(_trained: Path, tmp_path: Path) -> Callable[[], RunDir]:
    """Return a function that puts a stopped run and its shards into the current folder."""

    def fresh() -> RunDir:
        for name in ("runs", "whole", "shards"):
            shutil.rmtree(name, ignore_errors=True)
            shutil.copytree(_trained / name, name)
        return RunDir("runs/run")

    return fresh
