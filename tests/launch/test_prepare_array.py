"""`lunaris prepare launch=slurm`, rehearsed on this machine: what is sent, and what comes of it."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.data.prepare import chunks
from lunaris.data.prepare.share import Share
from lunaris.errors import Stopped
from lunaris.launch import prepare_task
from lunaris.launch.prepare_task import PrepareTask
from lunaris.launch.requeue import Job
from lunaris.runs.run_dir import RunDir

COMMAND = [
    "prepare", "data=text", "data.dir=out", "data.files=[corpus.jsonl]", "data.vocab_size=300",
    "data.sample_mb=1", "launch=slurm",
]  # fmt: skip
_CHUNK = 50_000
_WORDS = ["the", "cat", "sat", "on", "a", "mat", "naïve", "漢字"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Here and in all processes, so that a small corpus has several."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", _CHUNK)
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(
        f"from lunaris.data.prepare import chunks\nchunks.CHUNK_BYTES = {_CHUNK}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def write_corpus(count: int, *, broken: bool = False) -> None:
    """Write a corpus of so many chunks; broken: with a line that is no JSON near its end."""
    draw = random.Random(0)
    lines: list[str] = []
    while sum(map(len, lines)) < (count - 0.5) * _CHUNK:
        lines.append(json.dumps({"text": " ".join(draw.choices(_WORDS, k=400))}))
    if broken:
        lines.insert(-3, "not JSON")
    Path("corpus.jsonl").write_text("\n".join(lines) + "\n")


def lunaris(*args: str, code: int = 0) -> str:
    """Run a command in a process of its own, whose jobs outlive it; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "lunaris", *args], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def shards(folder: str) -> dict[str, bytes]:
    """Return what a preparation is made for, without what the jobs leave."""
    kept = [p for p in Path(folder).iterdir() if p.suffix == ".npy" or p.name == "manifest.json"]
    return {p.name: p.read_bytes() for p in [*kept, Path(folder, "tokenizer.json")]}


def test_a_dry_run_prints_the_scripts_and_writes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_corpus(3)
    before = sorted(os.listdir())
    keys = ["launch.array_tasks=5", "launch.cpus_per_task=4", "launch.partition=cpu"]
    assert main([*COMMAND, "launch.dry_run=true", "launch.dependency='afterok:3'", *keys]) == 0
    array, merging = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert "#SBATCH --array=0-2%3\n" in array and "#SBATCH --dependency=afterok:3\n" in array
    assert "#SBATCH --dependency=afterok:ARRAY\n" in merging
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in merging and "--array" not in merging
    for script in (array, merging):
        assert "#SBATCH --job-name=prepare-out\n" in script
        assert "#SBATCH --cpus-per-task=4\n" in script and "#SBATCH --partition=cpu\n" in script
    # One chunk is no work for several tasks.
    write_corpus(1)
    assert main([*COMMAND, "launch.dry_run=true", *keys]) == 0
    (alone,) = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert "--array" not in alone and "--dependency" not in alone
    assert sorted(os.listdir()) == before


def test_defaults_of_a_site_for_runs_are_not_those_of_a_preparation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setenv("LUNARIS_CONFIG_DIR", str(site))
    (site / "defaults.yaml").write_text(
        "launch: {partition: gpu, nodes: 4, gpus_per_node: 8, preflight: true, max_failures: 2}\n"
    )
    write_corpus(1)
    assert main([*COMMAND, "launch.dry_run=true"]) == 0
    shown = capsys.readouterr()
    assert "launch.partition=gpu" in shown.err and "gpus_per_node" not in shown.err
    assert "--partition=gpu" in shown.out and "gpus" not in shown.out
    # What the command itself says is refused as before, and runs keep their defaults.
    for text in ("launch.nodes=4", "++launch.nodes=4"):
        assert main([*COMMAND, "launch.dry_run=true", text]) == 2
        assert "launch.nodes=4: must be 1 for" in capsys.readouterr().err
    assert main(["train", "launch=slurm", "launch.dry_run=true", "parallelism=fsdp"]) == 0
    assert "--gpus-per-node=8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.nodes=2"], "launch.nodes=2: must be 1 for `lunaris prepare`"),
        (["launch.chain=2"], "launch.chain=2: goes with `lunaris train`, not with"),
        (["launch.after=runs/a"], "launch.after=runs/a: goes with `lunaris train`, not with"),
        (["launch.tasks_per_node=2"], "launch.tasks_per_node=2: must be 1 for"),
        (["launch.gpus_per_node=1"], "launch.gpus_per_node=1: must be 0 for"),
        (["launch.array_tasks=0"], "launch.array_tasks=0: must be at least 1"),
        (["data.files=[gone.jsonl]"], "no file matches gone.jsonl"),
        (["data.dir=a%b"], "data.dir="),
        (["data=stdlib"], "launch=slurm prepares data=text and data=hf"),
        (["launch.container=x.sif"], "launch.container=x.sif: needs SLURM"),
        (["data.tokenizer=gone.json"], "data.tokenizer=gone.json: no such file"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    Path("corpus.jsonl").write_text('{"text": "one"}\n')
    given = [o for o in COMMAND if overrides != ["data=stdlib"] or not o.startswith("data")]
    assert main([*given, "launch.cluster=local", *overrides]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert os.listdir() == ["corpus.jsonl"]


@pytest.mark.parametrize("launch", ["slurm", "local"])
def test_what_is_queued_or_runs_is_not_prepared_twice(
    capsys: pytest.CaptureFixture[str], launch: str
) -> None:
    Path("corpus.jsonl").write_text('{"text": "one"}\n')
    Path("out").mkdir()
    Path("out/prepare.yaml").touch()
    # The process of init, which lives as long as the machine runs.
    RunDir("out").write_status(state="running", job_id="local-1", task_ids=[])
    assert main([*COMMAND[:-1], f"launch={launch}"]) == 2
    assert "is already running, as job local-1; `lunaris cancel" in capsys.readouterr().err
    assert not Path("out/.prepare").exists()


@pytest.mark.slow
def test_a_failed_task_is_told_and_what_is_missing_is_sent_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first time, a document cannot be read; the merging does not run."""
    write_corpus(3, broken=True)
    jobs = ["launch.cluster=local", "launch.array_tasks=2", "launch.wait=true"]
    said = lunaris(*COMMAND, *jobs, code=1)
    assert "sent    job array local-" in said and "(2 tasks × 1 process), and job local-" in said
    assert "failed: out: task 0: corpus.jsonl: line " in said and "data.on_error=skip" in said
    status = RunDir("out").read_status()
    assert status["state"] == "failed" and len(status["task_ids"]) == 2
    assert not list(Path("out").glob("train*"))
    bundles = {p: p.stat().st_mtime_ns for p in Path("out/.prepare/encoded").iterdir()}
    assert len(bundles) == 2
    assert main(["runs", "out"]) == main(["logs", "out"]) == 0
    shown = capsys.readouterr().out
    assert "out: failed: task 0: corpus.jsonl: line " in shown
    assert f"log: {status['job_log']}" in shown and "error: corpus.jsonl: line " in shown

    said = lunaris(*COMMAND, *jobs, "data.on_error=skip")
    assert "done: out" in said
    status = RunDir("out").read_status()
    assert (status["state"], status["last_error"]) == ("done", None)
    assert not Path("out/.prepare").exists()
    here = [*COMMAND[:-1], "data.dir=here", "data.on_error=skip", "data.processes=1"]
    assert main(here) == main([*COMMAND, *jobs, "data.on_error=skip"]) == 0
    assert shards("out") == shards("here")
    assert "already prepared; nothing was sent" in capsys.readouterr().out
    assert main(["logs", "out"]) == main(["runs", "out"]) == 0
    shown = capsys.readouterr().out
    assert "1 skipped" in shown and re.search(r"^out +done +100 % +100 %", shown, re.MULTILINE)


class Requeued:
    """A job of SLURM as it reports itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **job: Any) -> None:
        self.asked = 0
        known = Job(**({"local": False, "timed_out": False, "ours_to_requeue": True} | job))
        monkeypatch.setattr(Job, "now", classmethod(lambda cls, *_: known))
        monkeypatch.setattr(Job, "requeue", lambda _: self._requeue())

    def _requeue(self) -> None:
        self.asked += 1


def run_stopped(monkeypatch: pytest.MonkeyPatch, share: Share | None) -> int:
    """Run a task whose work a signal stops; return its exit code."""

    def stopped(*_: object) -> None:
        raise Stopped("at out")

    monkeypatch.setattr(PrepareTask, "_work", stopped)

    class Environment:
        class paths:
            stdout = Path("log")

    monkeypatch.setattr(prepare_task.submitit, "JobEnvironment", Environment)
    try:
        PrepareTask(Path("out").absolute(), share)()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> RunDir:
    from lunaris.config.compose import compose
    from lunaris.config.frozen import to_yaml

    Path("corpus.jsonl").write_text('{"text": "one"}\n')
    Path("out").mkdir()
    cfg = compose([*COMMAND[1:], "launch.max_num_timeout=2"], check_data=False)
    Path("out/prepare.yaml").write_bytes(to_yaml(cfg))
    RunDir("out").write_status(state="running")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    return RunDir("out")


@pytest.mark.parametrize("share", [Share(1, 4), None])
def test_a_stopped_task_requeues_its_job(
    monkeypatch: pytest.MonkeyPatch, frozen: RunDir, share: Share | None
) -> None:
    job = Requeued(monkeypatch)
    assert run_stopped(monkeypatch, share) == 0
    assert job.asked == 1 and frozen.read_status()["state"] == "running"


def test_a_task_that_slurm_requeues_or_someone_cancelled_does_not(
    monkeypatch: pytest.MonkeyPatch, frozen: RunDir
) -> None:
    job = Requeued(monkeypatch, ours_to_requeue=False)
    assert run_stopped(monkeypatch, Share(1, 4)) == 3
    assert job.asked == 0 and frozen.read_status()["state"] == "running"


def test_a_task_reaches_its_time_limit_only_so_often(
    monkeypatch: pytest.MonkeyPatch, frozen: RunDir
) -> None:
    job = Requeued(monkeypatch, timed_out=True)
    assert run_stopped(monkeypatch, Share(1, 4)) == 3
    status = frozen.read_status()
    assert job.asked == 0 and status["state"] == "failed"
    assert status["last_error"].startswith("task 1: reached its time limit after 2 restarts")
