"""Folders of shards: reading across files, the held-out part, and refusing what is unsound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lunaris.data import manifest as manifests
from lunaris.data.manifest import Manifest, ShardEntry
from lunaris.data.shard_folder import inspect, verify
from lunaris.data.shards import ShardsData
from lunaris.data.token_stream import TokenStream
from lunaris.errors import UserError


def write_shards(folder: Path, sizes: list[int], dtype: str = "uint16", first: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        tokens = np.arange(first, first + size, dtype=dtype)
        np.save(folder / f"part_{i:03d}.npy", tokens)
        first += size


def write_manifest(
    folder: Path, vocab_size: int = 1000, val: tuple[str, ...] = (), tokenizer: str = "{}"
) -> Manifest:
    (folder / "tokenizer.json").write_text(tokenizer)
    parts: dict[str, list[ShardEntry]] = {"train": [], "val": []}
    for file in sorted(folder.glob("*.npy")):
        entry = ShardEntry(file.name, len(np.load(file)), manifests.sha256(file))
        parts["val" if file.name in val else "train"].append(entry)
    manifest = Manifest(
        tokenizer_hash=manifests.sha256(folder / "tokenizer.json"),
        vocab_size=vocab_size,
        eot_id=0,
        dtype="uint16",
        shards=parts,
    )
    manifest.write(folder)
    return manifest


def test_sequences_cross_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [5, 1, 7, 12])
    data = ShardsData(dir=str(tmp_path / "s"), val_fraction=0)
    data.ensure_ready()
    part = data.train(seq_len=4, seed=0)
    assert len(part) == (25 - 1) // 4
    rows = np.empty((len(part), 5), dtype=np.int64)
    part.gather(np.arange(len(part)), rows)
    rows = rows[np.argsort(rows[:, 0])]
    assert np.array_equal(rows, np.arange(6)[:, None] * 4 + np.arange(5))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_integer_types_read_the_same(tmp_path: Path, dtype: str) -> None:
    write_shards(tmp_path / "s", [60, 50], dtype)
    info = inspect(tmp_path / "s")
    assert (info.n_tokens, info.vocab_size, info.exact) == (110, 110, True)
    out = np.empty(110, dtype=np.int64)
    TokenStream(info.train).read(0, out)
    assert np.array_equal(out, np.arange(110))


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lunaris.data.token_stream._MOST_OPEN", 2)
    write_shards(tmp_path / "s", [10] * 6)
    stream = TokenStream(inspect(tmp_path / "s").train)
    out = np.empty(35, dtype=np.int64)
    for start in (20, 0, 25, 3):
        stream.read(start, out)
        assert np.array_equal(out, np.arange(start, start + 35))
        assert len(stream._open) <= 2


def test_epochs_go_on_and_each_holds_all(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [401])
    data = ShardsData(dir=str(tmp_path / "s"), val_fraction=0)
    data.ensure_ready()
    part = data.train(seq_len=4, seed=9)
    rows = np.empty((300, 5), dtype=np.int64)
    part.gather(np.arange(300), rows)
    epochs = rows[:, 0].reshape(3, 100)
    assert all(np.array_equal(np.sort(e), np.arange(100) * 4) for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_held_out_tail_is_never_trained_on(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [500, 500])
    data = ShardsData(dir=str(tmp_path / "s"), val_fraction=0.1)
    data.ensure_ready()
    train, val = data.train(8, 0), data.val(8)["s"]
    rows = np.empty((len(train), 9), dtype=np.int64)
    train.gather(np.arange(len(train)), rows)
    assert rows.max() < 900
    rows = np.empty((len(val), 9), dtype=np.int64)
    val.gather(np.arange(len(val)), rows)
    assert np.array_equal(rows[:, 0], 900 + 8 * np.arange(len(val)))


def test_val_part_by_manifest_by_name_and_by_folder(tmp_path: Path) -> None:
    write_shards(tmp_path / "m", [100, 50])
    write_manifest(tmp_path / "m", val=("part_001.npy",))
    write_shards(tmp_path / "n", [100, 50])
    (tmp_path / "n" / "part_001.npy").rename(tmp_path / "n" / "val_0.npy")
    write_shards(tmp_path / "alone", [100])
    write_shards(tmp_path / "other", [50], first=100)
    for folder, val_dir in (("m", None), ("n", None), ("alone", str(tmp_path / "other"))):
        data = ShardsData(dir=str(tmp_path / folder), val_dir=val_dir)
        data.ensure_ready()
        assert len(data.train(10, 0)) == 9
        ((_, val),) = data.val(10).items()
        rows = np.empty((len(val), 11), dtype=np.int64)
        val.gather(np.arange(len(val)), rows)
        assert rows[:, 0].tolist() == [100, 110, 120, 130]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("empty file", lambda p: p.write_bytes(b""), "empty file"),
    ("no tokens", lambda p: np.save(p, np.empty(0, np.uint16)), "no tokens"),
    ("float", lambda p: np.save(p, np.ones(9, np.float32)), "holds float32"),
    ("bool", lambda p: np.save(p, np.ones(9, bool)), "holds bool"),
    ("negative", lambda p: np.save(p, np.array([4, -1], np.int32)), "negative id -1"),
    ("2-D", lambda p: np.save(p, np.ones((3, 3), np.uint16)), "2 dimensions"),
    ("truncated", _truncate, "truncated"),
    ("text", lambda p: p.write_bytes(b"some text, no array"), "not a .npy file"),
    ("objects", lambda p: np.save(p, np.array([None], object)), "holds object"),
]


@pytest.mark.parametrize(("what", "spoil", "message"), BAD, ids=[row[0] for row in BAD])
def test_bad_shard_is_named(
    tmp_path: Path, what: str, spoil: Callable[[Path], object], message: str
) -> None:
    write_shards(tmp_path / "s", [10, 10])
    bad = tmp_path / "s" / "part_001.npy"
    spoil(bad)
    with pytest.raises(UserError, match=message) as error:
        inspect(tmp_path / "s")
    assert str(bad) in str(error.value)


def test_absent_or_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no \.npy files"):
        inspect(tmp_path)


def test_too_few_tokens_for_a_sequence(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [10])
    data = ShardsData(dir=str(tmp_path / "s"), val_fraction=0)
    data.ensure_ready()
    assert len(data.train(9, 0)) == 1
    with pytest.raises(UserError, match=r"10 training tokens.*model\.max_seq_len=10"):
        data.train(10, 0)


def test_given_vocabulary_must_hold_the_ids(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [10])
    data = ShardsData(dir=str(tmp_path / "s"), vocab_size=9)
    with pytest.raises(UserError, match=r"data\.vocab_size=9: must be at least 10, .* up to 9"):
        data.ensure_ready()


def test_masking_needs_an_end_of_text(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [10])
    data = ShardsData(dir=str(tmp_path / "s"), document_masking=True)
    with pytest.raises(UserError, match=r"data\.eot_id"):
        data.ensure_ready()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dir": "a", "eot_id": 10}, r"data\.eot_id=10: a holds token ids up to 9"),
        ({"dir": "known", "eot_id": 3}, r"data\.eot_id=3: the manifest of known says 0"),
        ({"dir": "a", "val_dir": "gone"}, r"data\.val_dir=gone: no such folder of shards"),
        ({"dir": "a", "val_dir": []}, r"data\.val_dir=\[\]: at least one folder"),
        ({"dir": {"a": "b"}}, r"data\.dir=.*: must be a folder, or a list of folders"),
        ({"dir": "known", "val_dir": "foreign"}, "another tokenizer than known"),
    ],
)
def test_folders_that_cannot_go_together(keys: dict[str, Any], message: str) -> None:
    for name in ("a", "known", "foreign"):
        write_shards(Path(name), [10])
    write_manifest(Path("known"))
    write_manifest(Path("foreign"), tokenizer="another")
    with pytest.raises(UserError, match=message):
        ShardsData(**keys).ensure_ready()


def test_keys_of_another_kind_of_data_are_refused() -> None:
    with pytest.raises(UserError, match="its keys do not fit ShardsDataConfig: .*'files'"):
        ShardsData(dir="a", files="b")


def test_the_vocabulary_holds_the_validation_folders_ids_too() -> None:
    write_shards(Path("2024"), [10])
    write_shards(Path("b"), [10], first=50)
    data = ShardsData(dir=2024, val_dir="b")
    data.ensure_ready()
    assert data.vocab_size == 60


SPOILT: list[tuple[str, Callable[[Path], object], str]] = [
    ("part_001.npy", lambda p: p.unlink(), "absent"),
    ("part_001.npy", _truncate, "truncated"),
    ("part_001.npy", lambda p: np.save(p, np.ones(9, np.uint16)), "9 tokens of uint16, .* 10 tok"),
    ("part_001.npy", lambda p: np.save(p, np.ones(10, np.uint32)), "of uint32"),
    ("tokenizer.json", lambda p: p.write_text("{ }"), "not the tokenizer that"),
    ("tokenizer.json", lambda p: p.unlink(), "absent"),
    ("manifest.json", lambda p: p.write_text("{"), "cannot be read as JSON"),
    ("manifest.json", lambda p: p.write_text("[]"), "not a manifest"),
]


@pytest.mark.parametrize(("file", "spoil", "message"), SPOILT)
def test_manifest_is_held_against_the_files(
    tmp_path: Path, file: str, spoil: Callable[[Path], object], message: str
) -> None:
    write_shards(tmp_path / "s", [10, 10])
    write_manifest(tmp_path / "s")
    inspect(tmp_path / "s")
    spoil(tmp_path / "s" / file)
    with pytest.raises(UserError, match=message) as error:
        inspect(tmp_path / "s")
    assert str(tmp_path / "s" / file) in str(error.value)


def test_verify_finds_a_changed_token(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [10, 10])
    write_manifest(tmp_path / "s")
    assert verify(tmp_path / "s") == 2
    file = tmp_path / "s" / "part_001.npy"
    tokens = np.load(file)
    tokens[4] += 1
    np.save(file, tokens)
    inspect(tmp_path / "s")
    data = ShardsData(dir=str(tmp_path / "s"), verify=True)
    for check in (lambda: verify(tmp_path / "s"), data.ensure_ready):
        with pytest.raises(UserError, match="part_001.npy: its contents changed"):
            check()


def test_mixed_folders_must_share_a_tokenizer(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, [100])
        write_manifest(tmp_path / name)
    dirs = [str(tmp_path / "a"), str(tmp_path / "b")]
    ShardsData(dir=dirs).ensure_ready()
    (tmp_path / "b" / "tokenizer.json").write_text("{ }")
    raw = json.loads((tmp_path / "b" / "manifest.json").read_text())
    raw["tokenizer_hash"] = manifests.sha256(tmp_path / "b" / "tokenizer.json")
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"b was made with another tokenizer than .*a"):
        ShardsData(dir=dirs).ensure_ready()
