"""A run continues only on the tokens that it was started with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lunaris.__main__ import main
from lunaris.data.prepare.build import build_shards
from lunaris.data.shards import ShardsData
from lunaris.data.text import TextData
from lunaris.errors import UserError
from lunaris.runs.run_dir import RunDir

RunHere = Callable[[Any], RunDir]


def save(path: str, seed: int, tokens: int = 20_000) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    np.save(path, np.random.default_rng(seed).integers(0, 64, tokens, dtype=np.uint16))


def keys(folder: str) -> list[str]:
    return [
        "data=shards",
        f"data.dir={folder}",
        "trainer.max_steps=2",
        "checkpoint.save_interval=1",
    ]


def stopped_after_one_step(run_dir: RunDir) -> None:
    last = run_dir.checkpoints / "step_00000002"
    last.rename(run_dir.path / "aside")


def test_other_shards_are_refused_and_the_old_ones_taken(
    tiny: Callable[..., Any], run_here: RunHere
) -> None:
    save("a/0.npy", 1)
    save("b/0.npy", 2)
    cfg = tiny(*keys("[a,b]"))
    run_dir = run_here(cfg)
    stopped_after_one_step(run_dir)
    old = Path("b/0.npy").read_bytes()
    changed = np.load("b/0.npy")
    changed[-1] += 1
    np.save("b/0.npy", changed)
    with pytest.raises(UserError, match=r"trained on other tokens than .* in b;"):
        run_here(cfg)
    assert (run_dir.checkpoints / "step_00000001").is_dir()
    Path("b/0.npy").write_bytes(old)
    run_here(cfg)
    assert run_dir.read_status()["state"] == "done"


def test_prepared_shards_are_known_by_their_checksums(
    tiny: Callable[..., Any], run_here: RunHere
) -> None:
    def prepare(words: str) -> None:
        Path("text.txt").write_text(words * 300)
        keys: dict[str, Any] = {"vocab_size": 280, "processes": 1, "val_fraction": 0.0}
        build_shards(TextData(dir="made", files="text.txt", **keys))

    prepare("one two three ")
    cfg = tiny(*keys("made"))
    run_dir = run_here(cfg)
    stopped_after_one_step(run_dir)
    manifest = json.loads(Path("made/manifest.json").read_text())
    manifest["shards"]["train"][0]["sha256"] = "0" * 64
    Path("made/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"in made;"):
        run_here(cfg)


def test_before_the_first_checkpoint_any_data_is_taken(
    tiny: Callable[..., Any], run_here: RunHere
) -> None:
    save("a/0.npy", 1)
    cfg = tiny(*keys("a"))
    run_dir = run_here(cfg)
    for path in run_dir.checkpoints.iterdir():
        path.rename(run_dir.path / path.name)
    save("a/0.npy", 2)
    run_here(cfg)
    assert run_dir.noted("data") == {"a": digest_of("a")}


def test_a_run_without_a_fingerprint_gets_one_when_it_continues(
    tiny: Callable[..., Any], run_here: RunHere
) -> None:
    save("a/0.npy", 1)
    cfg = tiny(*keys("a"))
    run_dir = run_here(cfg)
    stopped_after_one_step(run_dir)
    run_dir.note(data=None)
    run_here(cfg)
    assert run_dir.noted("data") == {"a": digest_of("a")}


def digest_of(folder: str) -> str:
    data = ShardsData(dir=folder)
    data.ensure_ready()
    return data.digests()[folder]


def test_a_digest_is_of_types_sizes_and_ends() -> None:
    found = set()
    for tokens in (np.arange(9), np.arange(10), np.arange(9)[::-1], np.arange(10_000)):
        for dtype in (np.uint16, np.uint32):
            Path("d").mkdir(exist_ok=True)
            np.save("d/0.npy", tokens.astype(dtype))
            found.add(digest_of("d"))
    assert len(found) == 8
    # Named otherwise, it is the same.
    before = digest_of("d")
    Path("d/0.npy").rename("d/1.npy")
    assert digest_of("d") == before


def test_a_run_that_is_done_stays_done(tiny: Callable[..., Any], run_here: RunHere) -> None:
    save("a/0.npy", 1)
    cfg = tiny(*keys("a"))
    run_dir = run_here(cfg)
    save("a/0.npy", 2)
    with pytest.raises(UserError, match="other tokens"):
        run_here(cfg)
    status = run_dir.read_status()
    assert status["state"] == "done" and "other tokens" in status["last_error"]


def test_a_digest_is_of_what_is_trained_on(tiny: Callable[..., Any], run_here: RunHere) -> None:
    save("a/0.npy", 1)
    cfg = tiny(*keys("a"))
    stopped_after_one_step(run_here(cfg))
    # With a separate validation shard, no part of the training shards is set aside.
    save("a/val.npy", 2, 500)
    with pytest.raises(UserError, match="other tokens"):
        run_here(cfg)


def test_resume_looks_at_the_data_before_it_writes(
    tiny: Callable[..., Any], run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    save("a/0.npy", 1)
    run_dir = run_here(tiny(*keys("a")))
    stopped_after_one_step(run_dir)
    run_dir.write_status(state="stopped")
    files = {p: p.read_bytes() for p in run_dir.path.rglob("*") if p.is_file()}
    Path("a").rename("moved")
    assert main(["resume", str(run_dir.path)]) == 2
    assert "data.dir=a: no such folder" in capsys.readouterr().err
    Path("moved").rename("a")
    content = Path("a/0.npy").read_bytes()
    save("a/0.npy", 2)
    assert main(["resume", str(run_dir.path)]) == 2
    assert "trained on other tokens" in capsys.readouterr().err
    assert files == {p: p.read_bytes() for p in run_dir.path.rglob("*") if p.is_file()}
    Path("a/0.npy").write_bytes(content)
    assert main(["resume", str(run_dir.path)]) == 0
    assert run_dir.read_status()["state"] == "done"
