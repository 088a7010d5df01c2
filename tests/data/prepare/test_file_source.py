"""Which files globs name, and the weights of named sources."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lunaris.data.prepare.build import source_weights
from lunaris.data.prepare.file_source import FileSource, expand
from lunaris.errors import UserError


def named(globs: Any, without: str = "out") -> list[str]:
    return [str(path) for path in expand(globs, Path(without))]


@pytest.fixture(autouse=True)
def corpus() -> None:
    for name in ("corpus/b.txt", "corpus/a.txt", "corpus/in/c.txt", "corpus/out/train_00000.npy"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")


def test_a_file_that_several_names_lead_to_is_taken_once() -> None:
    os.symlink(".", "corpus/again")
    os.symlink("a.txt", "corpus/z.txt")
    files = ["corpus/a.txt", "corpus/b.txt", "corpus/in/c.txt"]
    assert named("corpus", "corpus/out") == files
    assert named(["corpus/*.txt", str(Path("corpus/b.txt").absolute())])[-1] == "corpus/b.txt"
    assert len(named(["corpus/*.txt", str(Path("corpus/b.txt").absolute())])) == 2


def test_the_shards_own_folder_is_no_input() -> None:
    assert "corpus/out/train_00000.npy" in named("corpus")
    assert "corpus/out/train_00000.npy" not in named("corpus", "corpus/out")


@pytest.mark.parametrize("globs", [5, [["corpus/a.txt"]], [""], ""])
def test_what_is_no_glob_is_refused(globs: Any) -> None:
    with pytest.raises(UserError, match=r"data\.files="):
        expand(globs if isinstance(globs, str) else [globs], Path("out"))


def test_weights_are_finite_and_go_by_the_names_as_written() -> None:
    sources: list[Any] = [FileSource(name, [Path("corpus/a.txt")]) for name in ("1", "2")]
    assert source_weights({1: 1, 2: 3}, sources) == [1.0, 3.0]
    with pytest.raises(UserError, match=r"data\.weights\.2=inf: must be a finite number above 0"):
        source_weights({1: 1, 2: float("inf")}, sources)
