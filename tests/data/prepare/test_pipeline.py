"""Prepare: round trips, the same bytes for every number of processes, and resuming after a kill."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import random
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lunaris.data.manifest import Manifest, read
from lunaris.data.prepare import chunks
from lunaris.data.prepare import pipeline as preparation
from lunaris.data.prepare.build import build_shards
from lunaris.data.prepare.encode import is_held_out
from lunaris.data.prepare.folder_tokenizer import train_bpe
from lunaris.data.prepare.interleave import SourceInterleaver
from lunaris.data.prepare.pipeline import folder_lock
from lunaris.data.shard_folder import inspect, verify
from lunaris.data.shards import ShardsData
from lunaris.data.text import TextData
from lunaris.data.tokenizer import TextTokenizer
from lunaris.errors import UserError

WORDS = "der Fuß of naïve 漢字 and 😀 the cat\tsat on\r a mat — x = f(1, 2)".split(" ")

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


def texts(count: int, seed: int, longest: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(texts(200, 0), 320, path)
    return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)


def make(tokenizer: Path, folder: str = "out", /, **keys: Any) -> Manifest:
    defaults = {"processes": 1, "val_fraction": 0.0, "tokenizer": str(tokenizer)}
    return build_shards(TextData(**({"dir": folder} | defaults | keys)))


def part(folder: str, name: str = "train") -> list[bytes]:
    """Return the documents that a part's shards hold."""
    manifest = read(Path(folder))
    assert manifest is not None
    tokenizer = TextTokenizer(Path(folder) / "tokenizer.json")
    shards = [np.load(Path(folder) / entry.file) for entry in manifest.shards[name]]
    tokens = np.concatenate(shards) if shards else np.empty(0, np.uint16)
    ends = np.flatnonzero(tokens == tokenizer.eot_id)
    assert len(tokens) == 0 or ends[-1] == len(tokens) - 1
    return [tokenizer.decode_bytes(ids[:-1]) for ids in np.split(tokens, ends + 1)[:-1]]


def contents(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_bytes(b"".join(json.dumps({"text": d}).encode() + b"\n" for d in documents))


STRANGE = ["", " ", "<|endoftext|>", "a\nb\r\n\n", "\x00", "é e\u0301", "x" * 9000, "漢" * 4000]


def test_jsonl_round_trip(tokenizer: Path) -> None:
    documents = texts(300, 1) + STRANGE + texts(50, 2)
    write_jsonl(Path("a.jsonl"), documents)
    manifest = make(tokenizer, files=["a.jsonl"], shard_tokens=1500)
    assert part("out") == [d.encode() for d in documents]
    entries = manifest.shards["train"]
    assert len(entries) > 5
    assert {entry.tokens for entry in entries[:-1]} == {1500}
    assert manifest.sources[0].documents == len(documents)
    assert manifest.sources[0].bytes == sum(len(d.encode()) for d in documents)
    assert manifest.sources[0].tokens == sum(entry.tokens for entry in entries)
    assert verify("out") == len(entries)
    assert not (Path("out") / ".prepare").exists()


def test_jsonl_of_broken_bytes_blank_lines_and_no_last_newline(tokenizer: Path) -> None:
    Path("a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "first"}\n\n  \r\n{"text": "br\xff\xc3oken"}\r\n'
        b'{"text": "lone \\ud83d surrogate"}\n{"id": 1, "text": "last"}'
    )
    make(tokenizer, files="a.jsonl")
    assert part("out") == [b"first", b"br\xff\xc3oken", b"lone \xed\xa0\xbd surrogate", b"last"]


def test_plain_files_are_documents(tokenizer: Path) -> None:
    documents = {
        "a.txt": b"",
        "b.txt": "naïve 漢字\n".encode() * 700,
        "c.txt": random.Random(3).randbytes(9000),
        "d.txt": b"w" * 7001,
        "e.txt": "漢".encode() * 2000,
        "f.md": b"no newline at the end",
    }
    for name, content in documents.items():
        Path(name).write_bytes(content)
    manifest = make(tokenizer, files=["*.txt", "f.md"])
    assert part("out") == list(documents.values())
    assert manifest.sources[0].documents == 6


def test_lines_are_documents(tokenizer: Path) -> None:
    content = b"one\n\ntwo \xff\r\n" + b"long " * 2000 + b"\n" + b"x\n" * 3000 + b"end"
    Path("a.txt").write_bytes(content)
    make(tokenizer, files="a.txt", format="lines")
    assert part("out") == content.split(b"\n")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_compressed_as_plain(tokenizer: Path, suffix: str, kind: str) -> None:
    zstd = pytest.importorskip(ZSTD)
    documents = [*texts(60, 4), "y" * 9000, *texts(10, 5)]
    plain = Path(f"plain.{kind}")
    if kind == "jsonl":
        write_jsonl(plain, documents)
    else:
        plain.write_text("\n".join(documents))
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(
        suffix, zstd.compress
    )
    # Two members or frames one after the other, as parallel compressors write them.
    content = plain.read_bytes()
    half = len(content) // 2
    Path(f"packed.{kind}{suffix}").write_bytes(pack(content[:half]) + pack(content[half:]))
    make(tokenizer, "one", files=[str(plain)])
    make(tokenizer, "two", files=[f"packed.{kind}{suffix}"])
    expected = [d.encode() for d in documents] if kind == "jsonl" else [content]
    assert part("one") == part("two") == expected


def test_parquet(tokenizer: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = [d.encode() for d in texts(500, 6)] + [b"", b"br\xffoken"]
    table = pyarrow.table({"id": list(range(502)), "body": pyarrow.array(documents)})
    parquet.write_table(table, "a.parquet", row_group_size=40)
    strings = pyarrow.table({"body": texts(20, 7)})
    parquet.write_table(strings, "b.parquet")
    make(tokenizer, files="*.parquet", text_key="body")
    assert part("out") == documents + [d.encode() for d in texts(20, 7)]
    with pytest.raises(UserError, match=r"data\.text_key=boddy: a\.parquet .*did you mean body\?"):
        make(tokenizer, "other", files="a.parquet", text_key="boddy")


def test_number_of_processes_changes_no_byte(tokenizer: Path) -> None:
    write_jsonl(Path("a.jsonl"), texts(400, 8))
    write_jsonl(Path("b.jsonl"), texts(100, 9, longest=300))
    Path("c.txt.gz").write_bytes(gzip.compress("\n".join(texts(300, 10)).encode()))
    keys: dict[str, Any] = {
        "files": {"a": "a.jsonl", "b": "b.jsonl", "c": "c.txt.gz"},
        "weights": {"a": 2, "b": 1, "c": 3},
        "val_fraction": 0.1,
        "shard_tokens": 2000,
    }
    make(tokenizer, "one", processes=1, **keys)
    make(tokenizer, "three", processes=3, **keys)
    assert contents("one") == contents("three")
    assert len(part("one", "val")) > 10


def test_validation_part_is_by_document(tokenizer: Path) -> None:
    documents = [f"document {i} {text}" for i, text in enumerate(texts(600, 11))]
    write_jsonl(Path("a.jsonl"), documents + documents)
    make(tokenizer, files="a.jsonl", val_fraction=0.2)
    train, val = part("out"), part("out", "val")
    assert sorted(train + val) == sorted(d.encode() for d in documents + documents)
    # Copies are on the same side.
    assert not set(train) & set(val)
    assert 0.14 < len(val) / 1200 < 0.26
    make(tokenizer, "other", files="a.jsonl", val_fraction=0.2, seed=1)
    assert set(part("other", "val")) != set(val)


def test_each_source_has_a_separate_validation_part(tokenizer: Path) -> None:
    documents = {name: [f"{name} {text}" for text in texts(200, i)] for i, name in enumerate("abc")}
    documents["c"] = documents["c"][:1]  # held out or not, one document
    for name, mine in documents.items():
        write_jsonl(Path(f"{name}.jsonl"), mine)
    files = {name: f"{name}.jsonl" for name in documents}
    made = make(tokenizer, files=files, val_fraction=0.2, shard_tokens=300)
    both = [
        name.encode() for name in "ab" for document in documents[name]
        if is_held_out(document.encode(), 0.2, 0)
    ]  # fmt: skip
    found = [document[:1] for document in part("out", "val")]
    assert [name for name in found if name != b"c"] == both
    shards = {entry.source for entry in made.shards["val"]}
    assert {"a", "b"} <= shards <= {"a", "b", "c"} and len(made.shards["val"]) > 3
    assert {entry.source for entry in made.shards["train"]} == {None}
    data = ShardsData(dir="out")
    data.ensure_ready()
    for name, sequences in data.val(8).items():
        rows = np.empty((len(sequences), 9), np.int64)
        sequences.gather(np.arange(len(sequences)), rows)
        mine = [np.load(f"out/{e.file}") for e in made.shards["val"] if e.source == name]
        tokens = rows[:, :8].reshape(-1)
        assert len(tokens) and (tokens == np.concatenate(mine)[: len(tokens)]).all()
    # Those that are too small for a sequence of their own share one.
    tokens = {name: sum(e.tokens for e in made.shards["val"] if e.source == name) for name in "abc"}
    length = max(tokens.values())
    assert list(data.val(length)) == ["rest"] and len(data.val(length)["rest"]) == 1
    # Of a folder among several, by the folder's name too.
    make(tokenizer, "one", files="a.jsonl", val_fraction=0.2)
    both_folders = ShardsData(dir=["out", "one"])
    both_folders.ensure_ready()
    assert list(both_folders.val(8))[:2] == ["out/a", "out/b"]
    assert list(both_folders.val(8))[-1] == "one"


def test_a_tokenizer_that_loses_text_is_reported(
    tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").write_text("Some words")
    make(tokenizer, files="a.txt")
    assert "note: " not in capsys.readouterr().err
    lossy = json.loads(tokenizer.read_text()) | {"normalizer": {"type": "Lowercase"}}
    Path("lossy.json").write_text(json.dumps(lossy))
    make(Path("lossy.json"), "lossy", files="a.txt")
    said = capsys.readouterr().err
    assert "data.tokenizer=lossy.json does not preserve every text: 'A  b" in said
    with pytest.raises(UserError, match=r"^data\.tokenizer=lossy\.json: has no token nosuch"):
        make(Path("lossy.json"), "other", files="a.txt", eot="nosuch")
    assert not Path("other").exists()


def test_more_sources_than_files_may_be_open(tokenizer: Path) -> None:
    count = 60
    for i in range(count):
        Path(f"{i}").mkdir()
        for k in range(5):
            Path(f"{i}/{k}.txt").write_text(f"source {i} document {k} " * 20)
    files = {f"s{i}": f"{i}/*.txt" for i in range(count)}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, limits[1]))
    try:
        made = make(tokenizer, files=files, val_fraction=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(made.shards["val"]) > 50
    assert verify("out") == len(made.shards["val"]) + 1


def test_sources_are_interleaved_by_weight(tokenizer: Path) -> None:
    for name in "abc":
        write_jsonl(Path(f"{name}.jsonl"), [f"{name} {text}" for text in texts(400, 12)])
    keys: dict[str, Any] = {"files": {name: f"{name}.jsonl" for name in "abc"}}
    weights = {"a": 6, "b": 3, "c": 1}
    manifest = make(tokenizer, weights=weights, on_exhausted="stop", **keys)
    taken = {source.name: source.tokens for source in manifest.sources}
    total = sum(taken.values())
    for name, weight in weights.items():
        assert taken[name] / total == pytest.approx(weight / 10, abs=0.02)
    documents = part("out")
    assert sum(d.startswith(b"a ") for d in documents) == 400
    # Any stretch of the output is mixed, from its beginning.
    sizes = {name: 0 for name in "abc"}
    for document in documents[200:400]:
        sizes[chr(document[0])] += len(document)
    assert sizes["a"] / sum(sizes.values()) == pytest.approx(0.6, abs=0.1)

    make(tokenizer, "all", weights=weights, **keys)
    assert len(part("all")) == 1200
    make(tokenizer, "seeded", weights=weights, seed=5, **keys)
    assert part("seeded") != part("all")
    assert sorted(part("seeded")) == sorted(part("all"))


BAD_LINES = [
    (b"{not json", "not JSON"),
    (b"[1, 2]", "a JSON list, not an object"),
    (b'{"txt": "a"}', r"no key text \(data.text_key\).*did you mean txt\?"),
    (b'{"text": null}', "text is null, not text"),
    (b'{"text": 5}', "text is int, not text"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_document_is_named_or_skipped(
    tokenizer: Path, capfd: pytest.CaptureFixture[str], line: bytes, message: str
) -> None:
    lines = [json.dumps({"text": text}).encode() for text in texts(300, 13)]
    Path("a.jsonl").write_bytes(b"\n".join([*lines[:250], line, *lines[250:]]))
    with pytest.raises(UserError, match=rf"a\.jsonl:251: {message}"):
        make(tokenizer, files="a.jsonl")
    # The choice may change; what is done is kept.
    manifest = make(tokenizer, files="a.jsonl", on_error="skip")
    assert "skipped a.jsonl:251: " in capfd.readouterr().err
    assert (manifest.sources[0].documents, manifest.sources[0].skipped) == (300, 1)
    assert part("out") == [text.encode() for text in texts(300, 13)]


def test_corrupt_archive_gives_what_it_holds(
    tokenizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    documents = [random.Random(i).randbytes(40).hex() for i in range(400)]
    write_jsonl(Path("plain.jsonl"), documents)
    Path("a.jsonl.gz").write_bytes(gzip.compress(Path("plain.jsonl").read_bytes())[:-4000])
    write_jsonl(Path("b.jsonl"), ["after"])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d+: cannot be read further"):
        make(tokenizer, files=["a.jsonl.gz", "b.jsonl"])
    make(tokenizer, files=["a.jsonl.gz", "b.jsonl"], on_error="skip")
    found = part("out")
    assert "skipped a.jsonl.gz:" in capfd.readouterr().err
    assert found[-1] == b"after"
    assert 100 < len(found) - 1 < 400
    assert found[:-1] == [d.encode() for d in documents[: len(found) - 1]]


def test_corrupt_archive_of_one_text(tokenizer: Path) -> None:
    content = random.Random(0).randbytes(30_000).hex().encode()
    Path("a.txt.gz").write_bytes(gzip.compress(content)[:-6000])
    Path("b.txt").write_text("after")
    Path("c.txt.xz").write_bytes(b"this is no archive")
    manifest = make(tokenizer, files=["*.gz", "*.txt", "*.xz"], on_error="skip")
    start, after = part("out")
    assert content.startswith(start) and 20_000 < len(start) < 60_000
    assert after == b"after"
    assert (manifest.sources[0].documents, manifest.sources[0].skipped) == (2, 2)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("cut", ["half", "all", "none"])
def test_a_cut_zstd_file_is_reported(tokenizer: Path, kind: str, cut: str) -> None:
    zstd = pytest.importorskip(ZSTD)
    documents = [random.Random(i).randbytes(40).hex() for i in range(400)]
    write_jsonl(Path("plain.jsonl"), documents)
    raw = Path("plain.jsonl").read_bytes()
    # Two frames, as of files that were joined.
    frames = [zstd.compress(raw[:9000]), zstd.compress(raw[9000:])]
    whole = b"".join(frames)
    keep = {"half": len(frames[0]) + len(frames[1]) // 2, "all": 0, "none": len(whole)}[cut]
    Path(f"a.{kind}.zst").write_bytes(whole[:keep])
    Path("b.jsonl").write_text('{"text": "after"}\n')
    files = [f"a.{kind}.zst", "b.jsonl"]
    if cut == "none":
        make(tokenizer, files=files)
        expected = [d.encode() for d in documents] if kind == "jsonl" else [raw]
        assert part("out") == [*expected, b"after"]
        return
    with pytest.raises(
        UserError, match=rf"a\.{kind}\.zst:\d+: cannot be read further: .* ended before"
    ):
        make(tokenizer, files=files)
    make(tokenizer, files=files, on_error="skip")
    assert part("out")[-1] == b"after"


def test_a_text_that_goes_away_while_it_is_cut_ends_there(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(0).randbytes(10_000).hex()
    Path("a.txt").write_text(content)
    after = [text.encode() for text in texts(20, 23)]
    for i, text in enumerate(after):
        Path(f"b{i}.txt").write_bytes(text)
    cuts = 0
    cut_before = chunks.cut_before

    def failing(path: Path, *place: int) -> int:
        nonlocal cuts
        cuts += path.name == "a.txt"
        if cuts > 5 and path.name == "a.txt":
            raise OSError("Stale file handle")
        return cut_before(path, *place)

    monkeypatch.setattr(chunks, "cut_before", failing)
    # It ends in the part that it began in.
    held_out = [is_held_out(content.encode(), 0.5, seed) for seed in range(20)]
    for name in ("train", "val"):
        cuts = 0
        seed = held_out.index(name == "val")
        keys: dict[str, Any] = {"files": ["a.txt", "b*.txt"], "on_error": "skip"}
        manifest = make(tokenizer, name, val_fraction=0.5, seed=seed, **keys)
        begun = next(text for text in part(name, name) if len(text) > 100)
        assert content.encode().startswith(begun) and len(begun) < len(content)
        assert (manifest.sources[0].documents, manifest.sources[0].skipped) == (21, 1)
        assert sorted(part(name) + part(name, "val")) == sorted([begun, *after])


def test_chunks_of_a_source_that_waits_for_its_turn_are_bounded(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(Path("a.jsonl"), texts(2000, 21))
    Path("a.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    write_jsonl(Path("b.jsonl"), texts(2000, 22))
    most = 0
    add = SourceInterleaver.add

    def watched(self: SourceInterleaver, chunk: Any, encoded: Any) -> None:
        nonlocal most
        add(self, chunk, encoded)
        most = max(most, *(self.waiting(i) for i in range(2)))

    monkeypatch.setattr(SourceInterleaver, "add", watched)
    keys: dict[str, Any] = {"files": {"a": "a.jsonl.gz", "b": "b.jsonl"}}
    make(tokenizer, weights={"a": 1, "b": 9}, **keys)
    assert 1 <= most <= 3  # one process, and two more


def test_another_reading_of_the_same_files_is_refused(tokenizer: Path) -> None:
    records = [{"text": f"text {i}", "title": f"title {i}"} for i in range(20)]
    Path("a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    make(tokenizer, files="a.jsonl")
    for other in ({"text_key": "title"}, {"format": "lines"}):
        with pytest.raises(UserError, match=r"data\.format or data\.text_key"):
            make(tokenizer, files="a.jsonl", **other)
    copy = Path("copy.json")
    copy.write_bytes(tokenizer.read_bytes())
    make(copy, "of_copy", files="a.jsonl")
    train_bpe(texts(200, 1), 300, copy)
    with pytest.raises(UserError, match=r"data\.tokenizer_sha256"):
        make(copy, "of_copy", files="a.jsonl")


def test_a_fault_before_the_first_token_may_be_corrected(tokenizer: Path) -> None:
    Path("a.jsonl").write_text('{"text": "one"}\nnot JSON\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        make(tokenizer, files="a.jsonl")
    write_jsonl(Path("a.jsonl"), ["one", "two"])
    make(tokenizer, files="a.jsonl")
    assert part("out") == [b"one", b"two"]


def test_a_full_disk_is_reported_and_the_work_continued(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(Path("a.jsonl"), texts(300, 24))
    append, left = preparation.ShardWriter.append, 3

    def full(self: Any, tokens: np.ndarray) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, tokens)

    monkeypatch.setattr(preparation.ShardWriter, "append", full)
    with pytest.raises(UserError, match=r"data\.dir=out: cannot be written: No space left"):
        make(tokenizer, files="a.jsonl")
    make(tokenizer, files="a.jsonl")
    assert part("out") == [text.encode() for text in texts(300, 24)]


def test_corrupt_parquet(tokenizer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = [random.Random(i).randbytes(40).hex() for i in range(400)]
    parquet.write_table(pyarrow.table({"text": documents}), "a.parquet", row_group_size=100)
    raw = bytearray(Path("a.parquet").read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 2000] = bytes(2000)
    Path("a.parquet").write_bytes(raw)
    Path("b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet:\d+: cannot be read"):
        make(tokenizer, files="*.parquet")
    manifest = make(tokenizer, files="*.parquet", on_error="skip")
    assert "skipped b.parquet:1: cannot be read" in capfd.readouterr().err
    assert manifest.sources[0].skipped >= 2
    assert {d.encode() for d in documents[:100]} <= set(part("out"))


class Interrupted(Exception):
    """Stands for a kill at a chosen moment."""


def interruptions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the k-th write of tokens fail, for k = 1, 2, …; yield before each try."""
    writer = preparation.ShardWriter
    append = writer.append
    left = 0

    def failing(self: Any, tokens: np.ndarray) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted
        append(self, tokens)

    monkeypatch.setattr(writer, "append", failing)
    for allowed in (1, 2, 3, 5, 8, 13):
        left = allowed
        yield
    left = 10**9
    yield


@pytest.mark.parametrize("note_s", [0.0, 1e9])
def test_interrupted_and_continued_gives_the_same_bytes(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch, note_s: float
) -> None:
    """With a note after every unit, and with none at all."""
    monkeypatch.setattr(preparation, "NOTE_S", note_s)
    write_jsonl(Path("a.jsonl"), texts(150, 14))
    Path("b.txt").write_text("\n".join(texts(200, 15)))
    Path("c.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    keys: dict[str, Any] = {
        "files": {"a": ["a.jsonl"], "b": ["b.txt", "c.jsonl.gz"]},
        "val_fraction": 0.2,
        "shard_tokens": 1200,
    }
    make(tokenizer, "whole", **keys)
    interrupted = 0
    for _ in interruptions(monkeypatch):
        try:
            make(tokenizer, "killed", **keys)
        except Interrupted:
            interrupted += 1
            with pytest.raises(UserError, match="half prepared"):
                inspect("killed")
    assert interrupted >= 4
    assert contents("killed") == contents("whole")


def test_a_file_cut_off_by_a_kill_is_removed(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new content of a file, written beside it, when the process ends before the rename."""
    write_jsonl(Path("a.jsonl"), texts(20, 16))
    make(tokenizer, "whole", files="a.jsonl")
    for name in ("tokenizer.json", "manifest.json"):
        with monkeypatch.context() as patch:
            replace = Path.replace

            def cut(path: Path, target: Path, last: str = name, real: Any = replace) -> Path:
                if Path(target).name == last:
                    raise Interrupted
                return real(path, target)

            patch.setattr(Path, "replace", cut)
            with pytest.raises(Interrupted):
                make(tokenizer, "killed", files="a.jsonl")
        # Another process has another number, so that it does not replace this file.
        left = next(path for path in Path("killed").iterdir() if path.name.endswith(".tmp"))
        left.rename(left.with_name(f".{name}.0.tmp"))
    make(tokenizer, "killed", files="a.jsonl")
    assert contents("killed") == contents("whole")


def test_done_is_done(tokenizer: Path) -> None:
    write_jsonl(Path("a.jsonl"), texts(20, 16))
    make(tokenizer, files="a.jsonl")
    before = {p: p.stat().st_mtime_ns for p in Path("out").iterdir() if p.name != ".lock"}
    make(tokenizer, files="a.jsonl", processes=2)
    assert before == {p: p.stat().st_mtime_ns for p in Path("out").iterdir() if p.name != ".lock"}
    with pytest.raises(UserError, match=r"data\.shard_tokens: 100000000 → 7"):
        make(tokenizer, files="a.jsonl", shard_tokens=7)
    write_jsonl(Path("a.jsonl"), texts(21, 16))
    with pytest.raises(UserError, match="the input: other files"):
        make(tokenizer, files="a.jsonl")


def test_a_folder_of_other_things_is_left_alone(tokenizer: Path) -> None:
    write_jsonl(Path("a.jsonl"), texts(20, 16))
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"data\.dir=out: holds thesis\.tex"):
        make(tokenizer, files="a.jsonl")
    assert Path("out/thesis.tex").read_text() == "mine"


def test_two_at_once_are_refused(tokenizer: Path) -> None:
    write_jsonl(Path("a.jsonl"), texts(20, 16))
    with folder_lock(Path("out"), wait=False):
        with pytest.raises(UserError, match="another `lunaris prepare` is writing this folder"):
            make(tokenizer, files="a.jsonl")


def test_trains_a_tokenizer_on_a_sample() -> None:
    write_jsonl(Path("a.jsonl"), texts(300, 17))
    Path("b.txt").write_text("\n".join(texts(300, 18)))
    keys: dict[str, Any] = {"files": {"a": "a.jsonl", "b": "b.txt"}, "val_fraction": 0.1}
    for folder in ("one", "two"):
        build_shards(TextData(dir=folder, vocab_size=300, processes=1, **keys))
    assert contents("one") == contents("two")
    manifest = read(Path("one"))
    assert manifest is not None
    assert (manifest.vocab_size, manifest.dtype) == (300, "uint16")
    data = TextData(dir="one", vocab_size=300, **keys)
    data.ensure_ready()
    assert len(data.train(16, 0)) > 0
    assert data.eot_id == 0


def test_wide_vocabulary_is_uint32(tokenizer: Path) -> None:
    raw = json.loads(tokenizer.read_text())
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 70_000, "content": "<far>"})
    raw["model"]["vocab"]["<far>"] = 70_000
    Path("wide.json").write_text(json.dumps(raw))
    write_jsonl(Path("a.jsonl"), texts(20, 16))
    manifest = make(Path("wide.json"), files="a.jsonl")
    assert (manifest.vocab_size, manifest.dtype) == (70_001, "uint32")
    assert part("out") == [text.encode() for text in texts(20, 16)]


BAD_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"files": []}, r"data\.files=\[\]"),
    ({"files": {}}, r"data\.files=\{\}"),
    ({"files": ["nowhere/*.txt"]}, r"no file matches nowhere/\*\.txt"),
    ({"files": "a.jsonl", "tokenizer": "gone.json"}, r"data\.tokenizer=gone\.json: no such file"),
    ({"files": "a.jsonl", "tokenizer": "a.jsonl"}, r"not a tokenizer\.json"),
    ({"files": "a.jsonl", "eot": "<end>"}, "has no token <end>"),
    ({"files": {"a": "a.jsonl"}, "weights": {"b": 1}}, r"data\.weights\.b: no such source"),
    ({"files": {"a": "a.jsonl"}, "weights": {"a": 0}}, r"data\.weights\.a=0"),
    ({"files": {"a": "a.jsonl"}, "weights": {}}, "source a has no weight"),
    ({"files": {"a": "a.jsonl"}, "weights": [1.0]}, "must map names"),
    ({"files": "empty.jsonl"}, "no training document"),
]


@pytest.mark.parametrize(("keys", "message"), BAD_KEYS)
def test_what_cannot_be_prepared(tokenizer: Path, keys: dict[str, Any], message: str) -> None:
    write_jsonl(Path("a.jsonl"), ["text"])
    Path("empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=message):
        make(tokenizer, **keys)
    assert not Path("out").exists() or Path("out/tokenizer.json").is_file()
    # A corrected command is not refused for what the mistaken one left.
    make(tokenizer, files=["a.jsonl"])


def test_training_says_what_to_run_first() -> None:
    with pytest.raises(
        UserError, match=r"data\.dir=out: holds no prepared shards yet; run `lunaris prep"
    ):
        TextData(dir="out", files="a.jsonl").ensure_ready()
