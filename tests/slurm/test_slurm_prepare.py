"""A corpus prepared by a job array and merged by the job after it, on a real cluster."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

_WORDS = ["the", "cat", "sat", "on", "a", "mat", "naïve", "漢字"]
COMMAND = ["prepare", "data=text", "data.vocab_size=300", "data.sample_mb=1"]
# Small chunks, so that a small corpus has many. Task 1 waits once it has written a bundle, until a
# file is there.
_CHUNKS = "from lunaris.data.prepare import chunks\nchunks.CHUNK_BYTES = 100_000\n"
_HELD = """\
import os, pathlib, time
if os.environ.get("SLURM_ARRAY_TASK_ID") == "1" and not os.path.exists("{folder}/go"):
    real = pathlib.Path.replace
    def replace(path, target):
        real(path, target)
        if str(target).endswith(".bundle"):
            pathlib.Path("{folder}/up").touch()
            while not os.path.exists("{folder}/go"):
                time.sleep(0.05)
    pathlib.Path.replace = replace
"""


def write_corpus(path: Path, size: int, last: str = "") -> None:
    draw = random.Random(0)
    text = ""
    while len(text) < size:
        text += json.dumps({"text": " ".join(draw.choices(_WORDS, k=400))}) + "\n"
    path.write_text(text + last)


def small_chunks(site: Any, folder: Path, more: str = "") -> dict[str, str]:
    """Return the environment in which commands and their jobs have small chunks."""
    (folder / "sitecustomize.py").write_text(_CHUNKS + more)
    return {"PYTHONPATH": f"{folder}:{site.env['PYTHONPATH']}"}


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".npy", ".json")}


def of_data(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the shards, manifest and tokenizer, without what the jobs leave."""
    return {k: v for k, v in files.items() if k not in ("status.json", "provenance.json")}


def test_four_tasks_one_of_them_preempted_make_the_bytes_of_one_process(
    site: Any, tmp_path: Path
) -> None:
    write_corpus(site.dir / "corpus.jsonl", 2_000_000)
    env = small_chunks(site, tmp_path, _HELD.format(folder=tmp_path))
    data = [*COMMAND, "data.files=[corpus.jsonl]"]
    command = [*data, "data.dir=shards/four", "launch=slurm", "launch.array_tasks=4"]
    said = site.lunaris(*command, **env)
    assert "(4 tasks × 1 process), and job " in said
    site.wait_for((tmp_path / "up").exists)
    status = site.status("shards/four")
    (row,) = site.rows("shards/four")
    assert row["state"] == "running" and 0 < row["prepared"]["encoded"] < row["prepared"]["total"]
    assert "is already running, as job" in site.lunaris(*command, code=2, **env)
    assert "is already running, as job" in site.lunaris(
        *data, "data.dir=shards/four", code=2, **env
    )
    node = site.cluster.client("squeue", "-h", "-j", status["task_ids"][1], "-o", "%N")
    site.cluster.client(
        "sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "-w", node, "--wrap", "sleep 1"
    )
    time.sleep(1)
    (tmp_path / "go").touch()
    site.wait_for_state("shards/four", "done", "failed")
    assert site.status("shards/four")["state"] == "done", site.lunaris("logs", "shards/four")
    log = site.lunaris("logs", "shards/four")
    assert "stopped: at " in log and "tokens for training" in log
    site.lunaris(*data, "data.dir=shards/one", **env)
    assert of_data(shards(site.dir / "shards/four")) == shards(site.dir / "shards/one")
    assert "already prepared; nothing was sent" in site.lunaris(*command, **env)


def test_a_failed_task_ends_the_job_that_merges_and_a_cancelled_array_continues(
    site: Any, tmp_path: Path
) -> None:
    write_corpus(site.dir / "bad.jsonl", 170_000, "not JSON\n")
    env = small_chunks(site, tmp_path)
    command = [
        *COMMAND, "data.files=[bad.jsonl]", "data.dir=shards/bad", "launch=slurm",
        "launch.array_tasks=2",
    ]  # fmt: skip
    site.lunaris(*command, **env)
    row = site.wait_for_state("shards/bad", "failed", "done")
    assert row["state"] == "failed"
    assert row["remark"].startswith("task 1: bad.jsonl: line ") and "not JSON" in row["remark"]
    merging = site.status("shards/bad")["job_id"]

    def ended() -> bool:
        return not site.cluster.client("squeue", "-h", "-t", "PD,R", "-j", merging, check=False)

    site.wait_for(ended)
    assert not list((site.dir / "shards/bad").glob("train*"))
    # The next command is cancelled before it starts, and the one after it ends well.
    held = "launch.additional_parameters.hold=true"
    site.lunaris(*command, "data.on_error=skip", held, **env)
    assert "cancelled jobs " in site.lunaris("cancel", "shards/bad")
    site.wait_for_state("shards/bad", "cancelled")
    text = site.lunaris(*command, "data.on_error=skip", "launch.wait=true", **env)
    assert "done: shards/bad" in text
