"""Prepare, killed: SIGKILL at random moments changes no final byte."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Small chunks and a note after every one, so that a small corpus has many moments to be killed at.
_PREPARE = """
import sys
from lunaris.data.prepare import chunks, pipeline
from lunaris.data.prepare.build import build_shards
from lunaris.data.text import TextData
pipeline.NOTE_S = 0.0
chunks.CHUNK_BYTES = 20_000
if __name__ == "__main__":
    build_shards(TextData(
        dir=sys.argv[1],
        files={"a": "a.jsonl", "b": "b.txt"},
        vocab_size=400,
        sample_mb=1,
        shard_tokens=20_000,
        val_fraction=0.1,
        processes=2,
    ))
"""
_WORDS = "the naïve cat sat on a mat of 漢字 and 😀 in for while return x = f(1)".split()


def write_corpus() -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(_WORDS, k=draw.randint(0, 400))) for _ in range(1500)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    Path("b.txt").write_text("\n".join(texts[:700]))
    Path("prepare_it.py").write_text(_PREPARE)


def start(folder: str) -> subprocess.Popen[bytes]:
    with Path("log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "prepare_it.py", folder], stdout=log, stderr=subprocess.STDOUT
        )


def merged(folder: str) -> int:
    """Return the tokens that the last note of an unfinished preparation counts."""
    note = Path(folder, ".prepare", "note.json")
    if not note.is_file():
        return 0
    return sum(source["taken"] for source in json.loads(note.read_text()).get("sources", []))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_change_no_byte() -> None:
    write_corpus()
    began = time.monotonic()
    whole = start("whole")
    assert whole.wait(timeout=300) == 0, Path("log").read_text()
    whole_s = time.monotonic() - began

    draw = random.Random(1)
    kills, seen = 0, set()
    while kills < 20:
        before = merged("killed")
        process = start("killed")
        time.sleep(draw.uniform(0.1, 0.9) * whole_s)
        # On a busy machine it may not have come to the merging: every second kill waits for that.
        while kills % 2 and merged("killed") <= before and process.poll() is None:
            time.sleep(0.01)
        finished = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        seen.add(merged("killed"))
        if finished:
            # It finished before it was killed: start again.
            assert process.returncode == 0, Path("log").read_text()
            require_same()
            shutil.rmtree("killed")
            continue
        kills += 1
    last = start("killed")
    assert last.wait(timeout=300) == 0, Path("log").read_text()
    require_same()
    # Some kills came in the middle of the merging.
    assert len(seen) > 3, seen


def contents(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def require_same() -> None:
    killed, whole = contents("killed"), contents("whole")
    # The names first: a difference of the bytes is too long to be read.
    assert sorted(killed) == sorted(whole)
    assert [name for name in whole if killed[name] != whole[name]] == []


def test_workers_end_with_a_killed_parent() -> None:
    psutil = pytest.importorskip("psutil")
    write_corpus()
    process = start("out")
    children: list[object] = []
    deadline = time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < deadline and process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.01)
    process.kill()
    process.wait(timeout=60)
    assert children
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
