"""Malformed shards and manifests: each is refused with one line that names the file."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lunaris.__main__ import main
from lunaris.runs.run_dir import RunDir

Manifest = dict[str, Any]
TRAIN = "train_00000.npy"


def npy(shape: str, dtype: str, content: bytes = b"\0" * 64) -> bytes:
    """Return a .npy file with a header of these texts."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def saved(values: list[int], dtype: str) -> bytes:
    """Return a .npy file of these ids."""
    file = io.BytesIO()
    np.save(file, np.array(values, dtype=dtype))
    return file.getvalue()


# Files in a folder that has no manifest, and a part of the message.
FILES: dict[str, tuple[bytes, str]] = {
    "negative shape": (npy("(-5,)", "'<u2'"), "header says -5 tokens"),
    "bool shape": (npy("(True,)", "'<u2'", b"\0\0"), "header says True tokens"),
    "no shape": (npy("()", "'<u2'"), "has 0 dimensions"),
    "two dimensions": (npy("(4, 8)", "'<u2'"), "has 2 dimensions"),
    "text shape": (npy("('a',)", "'<u2'"), "not a .npy file"),
    "float shape": (npy("(3.5,)", "'<u2'"), "not a .npy file"),
    "list shape": (npy("[32]", "'<u2'"), "not a .npy file"),
    "huge shape": (npy(f"({2**70},)", "'<u2'"), "truncated"),
    "no tokens": (npy("(0,)", "'<u2'", b""), "holds no tokens"),
    "truncated": (npy("(33,)", "'<u2'"), "truncated"),
    "trailing bytes": (npy("(31,)", "'<u2'"), "has more than its tokens"),
    "floats": (npy("(16,)", "'<f4'"), "holds float32"),
    "objects": (npy("(8,)", "'|O'"), "holds object"),
    "text": (npy("(16,)", "'<U1'"), "holds <U1"),
    "records": (npy("(16,)", "[('a', '<u4')]"), "holds [('a', '<u4')]"),
    "no such type": (npy("(16,)", "'<q9'"), "not a .npy file"),
    "code for a type": (npy("(16,)", "__import__('os')"), "not a .npy file"),
    "empty": (b"", "empty file"),
    "no magic": (b"PK\x03\x04" + b"\0" * 100, "not a .npy file"),
    "magic alone": (b"\x93NUMPY\x01\x00", "not a .npy file"),
    "header cut off": (npy("(32,)", "'<u2'")[:60], "not a .npy file"),
    "version 9": (b"\x93NUMPY\x09\x00" + b"\0" * 100, "not a .npy file"),
    "negative ids": (saved([1, -7, 3] * 20, "int32"), "holds the negative id -7"),
    "one id of 4e9": (saved([1] * 60 + [4 * 10**9], "uint32"), "the id 4000000000 at position 60"),
    "beyond int64": (saved([1] * 60 + [2**63 + 5], "uint64"), "the id 9223372036854775813"),
}  # fmt: skip


def entry(found: Manifest) -> Any:
    return found["shards"]["train"][0]


# Changes of a manifest, and a part of the message.
MANIFESTS: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "vocab_size text": (lambda m: m.update(vocab_size="280"), "vocab_size='280'"),
    "vocab_size null": (lambda m: m.update(vocab_size=None), "vocab_size=None"),
    "vocab_size negative": (lambda m: m.update(vocab_size=-1), "vocab_size=-1"),
    "vocab_size zero": (lambda m: m.update(vocab_size=0), "vocab_size=0"),
    "vocab_size bool": (lambda m: m.update(vocab_size=True), "vocab_size=True"),
    "vocab_size float": (lambda m: m.update(vocab_size=280.5), "vocab_size=280.5"),
    "vocab_size huge": (lambda m: m.update(vocab_size=2**63), "vocab_size="),
    "eot_id text": (lambda m: m.update(eot_id="1"), "eot_id='1'"),
    "eot_id list": (lambda m: m.update(eot_id=[1]), "eot_id=[1]"),
    "eot_id negative": (lambda m: m.update(eot_id=-1), "eot_id=-1"),
    "eot_id out of range": (lambda m: m.update(eot_id=280), "eot_id=280"),
    "eot_id bool": (lambda m: m.update(eot_id=True), "eot_id=True"),
    "dtype number": (lambda m: m.update(dtype=16), "dtype=16"),
    "dtype other": (lambda m: m.update(dtype="float32"), "dtype='float32'"),
    "tokenizer_hash number": (lambda m: m.update(tokenizer_hash=5), "tokenizer_hash=5"),
    "file number": (lambda m: entry(m).update(file=7), "shards.train[0].file=7"),
    "file outside": (lambda m: entry(m).update(file="../other.npy"), "file='../other.npy'"),
    "file absolute": (lambda m: entry(m).update(file="/etc/hosts.npy"), "/etc/hosts.npy"),
    "file absent": (lambda m: entry(m).update(file="none.npy"), "absent"),
    "file of another kind": (lambda m: entry(m).update(file="tokenizer.json"), "tokenizer.json"),
    "file twice": (lambda m: m["shards"]["train"].append(dict(entry(m))), "is listed twice"),
    "file in both parts": (lambda m: m["shards"]["val"].append(dict(entry(m))), "is listed twice"),
    "tokens text": (lambda m: entry(m).update(tokens="9"), "tokens='9'"),
    "tokens wrong": (lambda m: entry(m).update(tokens=9), "the manifest says 9 tokens"),
    "tokens zero": (lambda m: entry(m).update(tokens=0), "tokens=0"),
    "tokens bool": (lambda m: entry(m).update(tokens=True), "tokens=True"),
    "sha256 number": (lambda m: entry(m).update(sha256=3), "sha256=3"),
    "mask without sum": (lambda m: entry(m).update(mask="mask.npy"), "mask without its sha256"),
    "source number": (lambda m: m["shards"]["val"][0].update(source=3), "source is not a name"),
    "unknown part": (lambda m: m["shards"].update(test=[]), "shards.test: no such part"),
    "no shards": (lambda m: m.update(shards={}), "names no training shards"),
    "shards a list": (lambda m: m.update(shards=[]), "not a manifest"),
    "shards a number": (lambda m: m["shards"].update(train=3), "not a manifest"),
    "entry a text": (lambda m: m["shards"].update(train=["a"]), "not a manifest"),
    "unknown key": (lambda m: m.update(extra=1), "not a manifest"),
    "settings text": (lambda m: m.update(settings="x"), "settings='x'"),
    "sources number": (lambda m: m.update(sources=3), "not a manifest"),
    "format": (lambda m: m.update(format=99), "another version"),
    "no format": (lambda m: m.pop("format"), "not a manifest"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_shard_is_refused(
    name: str,
    keys: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    counted: Callable[[str, int], None],
) -> None:
    content, message = FILES[name]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/a.npy").write_bytes(content)
    assert main(["train", *keys]) == 2
    error = capsys.readouterr().err
    assert message in error and "shards/a.npy" in error
    assert "Traceback" not in error and error.count("\n") == 1
    assert not Path("runs").exists()
    counted("malformed shards and manifests", 1)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_malformed_manifest_is_refused(
    name: str,
    keys: list[str],
    stopped: Callable[[], RunDir],
    capsys: pytest.CaptureFixture[str],
    counted: Callable[[str, int], None],
) -> None:
    stopped()
    shutil.rmtree("runs")
    change, message = MANIFESTS[name]
    path = Path("shards/manifest.json")
    found = json.loads(path.read_text())
    assert entry(found)["file"] == TRAIN and found["vocab_size"] == 280
    change(found)
    path.write_text(json.dumps(found))
    assert main(["train", *keys]) == 2
    error = capsys.readouterr().err
    assert message in error and "shards" in error
    assert "Traceback" not in error and error.count("\n") == 1
    assert not Path("runs").exists()
    counted("malformed shards and manifests", 1)


@pytest.mark.parametrize("length", [0, 100, -2])
def test_a_shard_that_is_cut_while_it_is_read_is_named(
    stopped: Callable[[], RunDir],
    keys: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    length: int,
) -> None:
    """Reading a memory map past the new end would kill the process (SIGBUS)."""
    run_dir = stopped()
    import lunaris.train

    real = lunaris.train.train_step

    def cutting(*args: Any) -> Any:
        path = Path("shards", TRAIN)
        if path.stat().st_size > 1000:
            os.truncate(path, length if length >= 0 else path.stat().st_size + length)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lunaris.train, "train_step", cutting)
        assert main(["train", *keys, "trainer.max_steps=2000", "name=long"]) == 2
    error = capsys.readouterr().err
    assert f"shards/{TRAIN}: was cut to" in error and "Traceback" not in error
    assert RunDir("runs/long").read_status()["state"] == "failed"
    assert run_dir.path.is_dir()


def test_data_without_a_validation_part_is_pointed_out(
    keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shards").mkdir()
    np.save(tmp_path / "shards/a.npy", np.arange(2000, dtype=np.uint16) % 50)
    assert main(["train", *keys, "data.val_fraction=0"]) == 0
    assert "no validation part" in capsys.readouterr().out
