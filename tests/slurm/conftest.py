"""Fixtures of the cluster tests: a cluster of each kind, and a folder whose jobs run on it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lunaris.runs.status import resolve_states

_HERE = Path(__file__).parent
_REST_S = 3

TINY = [
    "data=synthetic", "data._target_=paced.PacedData", "data.n_tokens=20000", "data.vocab_size=64",
    "model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1",
    "model.max_seq_len=16", "model.multiple_of=8", "moe.n_experts=4", "trainer.max_steps=6",
    "trainer.batch_size=4", "trainer.log_interval=1", "trainer.eval_interval=3",
    "trainer.eval_steps=2", "trainer.device=cpu", "checkpoint.save_interval=1000",
]  # fmt: skip


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"slurm_{name}", _HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Site:
    """A cluster and a folder from which a person uses it."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self.cluster = cluster
        self.dir = folder
        self.pace = folder / "pace"
        self._waiting: dict[str, float] = {}
        self.env = cluster.env | {
            "PACE": str(self.pace),
            "PYTHONPATH": str(_HERE),
            "OMP_NUM_THREADS": "1",
            "LUNARIS_CONFIG_DIR": "",
            "PATH": cluster.env["PATH"],
        }

    def lunaris(self, *args: str, code: int = 0, **env: str) -> str:
        """Run a command in the site's folder and return what it prints; check its exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "lunaris", *args],
            cwd=self.dir, env=self.env | env, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def train(self, name: str, *overrides: str, code: int = 0, **env: str) -> str:
        """Send a tiny run (with `launch=local`, train it here) and return what is printed."""
        return self.lunaris(*self.train_args(name), *overrides, code=code, **env)

    def train_args(self, name: str) -> list[str]:
        """Return the arguments of the command that sends a tiny run."""
        return ["train", *TINY, "launch=slurm", f"name={name}"]

    def rows(self, folder: str, **env: str) -> list[dict[str, Any]]:
        """Return what `lunaris runs` shows of a folder."""
        return json.loads(self.lunaris("runs", folder, "--json", **env))

    def status(self, run: str) -> dict[str, Any]:
        try:
            return json.loads((self.dir / run / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl without what depends on the clock."""
        lines = (self.dir / run / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]

    def wait_for(self, what: Callable[[], Any], seconds: float = 120) -> Any:
        """Wait until `what` is true, letting requeued jobs start at once; return what it gave."""
        deadline = time.monotonic() + seconds
        while not (result := what()):
            assert time.monotonic() < deadline, self.cluster.client("squeue", "-t", "all")
            self.hasten()
            time.sleep(0.5)
        return result

    def wait_for_state(self, run: str, *states: str, seconds: float = 120) -> dict[str, Any]:
        """Wait until `lunaris runs` shows one of `states`; return the run's row."""

        def reached() -> bool:
            # As `lunaris runs` sees it, but without a process for every look.
            with pytest.MonkeyPatch.context() as patch:
                for name in ("SLURM_CONF", "PATH"):
                    patch.setenv(name, self.env[name])
                return resolve_states([self.dir / run])[0].state in states

        self.wait_for(reached, seconds)
        return self.rows(run)[0]

    def hasten(self) -> None:
        """Start requeued jobs soon: SLURM lets them wait two minutes."""
        shown = self.cluster.client("squeue", "-h", "-t", "PD", "-o", "%A %r", check=False)
        waiting = {line.split()[0] for line in shown.splitlines() if line.endswith("BeginTime")}
        now = time.monotonic()
        self._waiting = {job: self._waiting.get(job, now) for job in waiting}
        for job, since in self._waiting.items():
            # Not at once: a node refuses a job that it ended in the same second.
            if now - since > _REST_S:
                self.cluster.client(
                    "scontrol", "update", f"jobid={job}", "StartTime=now", check=False
                )


def _site(
    tmp_path_factory: pytest.TempPathFactory, accounting: bool = False, slurm: Path | None = None
) -> Iterator[Site]:
    module = _module("cluster")
    reason = module.missing_packages(accounting)
    if reason:
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("accounting" if accounting else "slurm")
    cluster = module.Cluster(root / "cluster", nodes=6, accounting=accounting, slurm=slurm)
    cluster.start()
    try:
        (root / "work").mkdir()
        yield Site(cluster, root / "work")
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A cluster without accounting."""
    yield from _site(tmp_path_factory)


@pytest.fixture(scope="session")
def site_with_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A cluster with accounting."""
    yield from _site(tmp_path_factory, accounting=True)


@pytest.fixture(scope="session")
def newer_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A cluster whose SLURM is of a later Debian than this machine's."""
    folder = _module("newer").default_folder()
    if not (folder / "complete").exists():
        pytest.skip(f"no newer SLURM in {folder}; run `make cluster`")
    yield from _site(tmp_path_factory, slurm=folder)
