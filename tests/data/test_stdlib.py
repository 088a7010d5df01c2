"""The standard library as a corpus: built once, and the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lunaris.data import stdlib
from lunaris.data.prepare import pipeline
from lunaris.data.prepare.build import make_ready
from lunaris.data.shard_folder import verify
from lunaris.data.stdlib import StdlibData
from lunaris.data.tokenizer import TextTokenizer
from lunaris.errors import UserError

FEW = stdlib.library_files()[:40]


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stdlib, "library_files", lambda: FEW)
    monkeypatch.setenv("LUNARIS_CACHE", str(tmp_path / "cache"))


def test_files_are_the_librarys_own_in_order() -> None:
    files = [str(path) for path in stdlib.library_files()]
    assert any(name.endswith("/argparse.py") for name in files)
    assert not any(part in name for name in files for part in ("site-packages", "/test/"))
    assert len(files) > 300


@pytest.mark.usefixtures("few_files")
def test_shards_decode_to_the_files(tmp_path: Path) -> None:
    data = StdlibData(vocab_size=400, val_fraction=0.2)
    make_ready(data)
    assert data.folder.parent == tmp_path / "cache"
    assert data.tokenizer_path is not None and data.eot_id is not None
    assert verify(data.folder) == 2
    assert data.vocab_size == 400
    tokenizer = TextTokenizer(data.tokenizer_path)
    found = []
    for part in ("train", "val"):
        tokens = np.load(data.folder / f"{part}_00000.npy")
        assert tokens.dtype == np.uint16
        ends = np.flatnonzero(tokens == data.eot_id)
        assert ends[-1] == len(tokens) - 1
        found += [tokenizer.decode_bytes(ids) for ids in np.split(tokens, ends + 1)[:-1]]
    assert sorted(found) == sorted(path.read_bytes() for path in FEW)
    assert len(data.train(64, 0)) > 0
    assert list(data.val(64)) == [data.folder.name]


@pytest.mark.usefixtures("few_files")
def test_made_once_and_the_same_again(tmp_path: Path) -> None:
    first = StdlibData(vocab_size=300)
    make_ready(first)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in first.folder.iterdir()}
    make_ready(StdlibData(vocab_size=300))
    assert before == {
        p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in first.folder.iterdir()
    }
    elsewhere = StdlibData(dir=str(tmp_path / "mine"), vocab_size=300)
    make_ready(elsewhere)
    for name, (_, content) in before.items():
        assert (tmp_path / "mine" / name).read_bytes() == content


@pytest.mark.usefixtures("few_files")
def test_an_interrupted_build_is_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    complete = StdlibData(dir=str(tmp_path / "complete"), vocab_size=300, val_fraction=0.3)
    make_ready(complete)
    data = StdlibData(vocab_size=300, val_fraction=0.3)
    append, left = pipeline.ShardWriter.append, 20

    def failing(self: pipeline.ShardWriter, tokens: np.ndarray) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        append(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.ShardWriter, "append", failing)
        patch.setattr(pipeline, "NOTE_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            make_ready(data)
    with pytest.raises(UserError, match="holds no prepared shards yet"):
        data.ensure_ready()
    make_ready(data)
    names = [path.name for path in complete.folder.iterdir()]
    assert sorted(names) == sorted(path.name for path in data.folder.iterdir())
    for name in names:
        assert (data.folder / name).read_bytes() == (complete.folder / name).read_bytes()


@pytest.mark.usefixtures("few_files")
def test_tokens_are_those_of_the_first_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old runs hold a digest of them: files in order, split by the unkeyed hash of their names."""
    monkeypatch.setattr(pipeline, "NOTE_S", 0.0)
    data = StdlibData(vocab_size=300, val_fraction=0.3)
    make_ready(data)
    assert data.tokenizer_path is not None and data.eot_id is not None
    tokenizer = TextTokenizer(data.tokenizer_path)
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for path in FEW:
        name = path.relative_to(stdlib.library_root()).as_posix()
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        part = "val" if int.from_bytes(digest, "little") < 0.3 * 2**64 else "train"
        parts[part] += [*tokenizer.encode([path.read_bytes()]), np.array([data.eot_id])]
    for part, ids in parts.items():
        expected = np.concatenate(ids).astype(np.uint16)
        np.save("expected.npy", expected)
        shard = data.folder / f"{part}_00000.npy"
        assert shard.read_bytes() == Path("expected.npy").read_bytes()


@pytest.mark.usefixtures("few_files")
def test_a_folder_of_anything_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    make_ready(StdlibData(dir=str(folder), vocab_size=300))
    with pytest.raises(UserError, match="vocab_size: 300 → 310"):
        make_ready(StdlibData(dir=str(folder), vocab_size=310))
    # The shards of another Python are accepted.
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(platform.python_version(), "3.99.0"))
    make_ready(StdlibData(dir=str(folder), vocab_size=300))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("text")
    with pytest.raises(UserError, match=r"holds letter\.txt and no manifest\.json"):
        make_ready(StdlibData(dir=str(tmp_path / "full"), vocab_size=300))


_RACE = """
from lunaris.data import stdlib
from lunaris.data.prepare.build import make_ready
few = stdlib.library_files()[:40]
stdlib.library_files = lambda: few
data = stdlib.StdlibData(vocab_size=300)
make_ready(data)
print(data.folder, len(data.train(64, 0)))
"""


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    env = os.environ | {"LUNARIS_CACHE": str(tmp_path / "cache")}
    both = [
        subprocess.Popen([sys.executable, "-c", _RACE], env=env, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] != ""
    assert sum("prepare: " in err for _, err in said) == 1


@pytest.mark.slow
def test_default_is_ready_for_training() -> None:
    """The whole library, as `lunaris train` uses it."""
    data = StdlibData()
    make_ready(data)
    assert (data.vocab_size, data.eot_id) == (2048, 0)
    manifest = json.loads((data.folder / "manifest.json").read_text())
    assert manifest["sources"][0]["documents"] == len(stdlib.library_files())
    train = manifest["shards"]["train"][0]["tokens"]
    val = manifest["shards"]["val"][0]["tokens"]
    assert train > 2_000_000
    assert 0.01 < val / train < 0.15
