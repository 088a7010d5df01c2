"""Preparations by several tasks: the same bytes as by one process, whatever the tasks did."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.data.prepare import chunks, file_source, share
from lunaris.data.prepare import pipeline as preparation
from lunaris.data.prepare.build import build_shards, spec_of
from lunaris.data.prepare.bundles import bundles_folder
from lunaris.data.prepare.encode import encode_chunk
from lunaris.data.prepare.folder_tokenizer import train_bpe
from lunaris.data.prepare.share import Share, encode_share, most_tasks
from lunaris.data.prepare.spec import read_note
from lunaris.data.text import TextData
from lunaris.errors import Stopped, UserError
from lunaris.runs.preparation import progress

WORDS = "der Fuß of naïve 漢字 and 😀 the cat\tsat on\r a mat — x = f(1, 2)".split(" ")


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


@pytest.fixture
def data(tokenizer: Path) -> Callable[..., TextData]:
    """Return a function from a folder and further keys to data of files of every kind."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts(150, 1)]
    Path("a.jsonl").write_text("".join(lines) + "\n" * 5000)  # And chunks without a document.
    Path("b.txt").write_text("\n".join(texts(200, 2)))
    # Too large for one task: it hardly compresses.
    rows = [json.dumps({"text": random.Random(i).randbytes(500).hex()}) for i in range(60)]
    Path("big.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    for i in range(20):
        Path(f"c{i:02}.txt").write_text(texts(20, i)[i])
    files: dict[str, Any] = {"a": ["a.jsonl", "big.jsonl.gz"], "b": ["b.txt", "c*.txt"]}
    for i in range(12):  # Between plain files, and each too small to be shared.
        Path(f"e{i:02}.txt").write_text(" ".join(texts(4, 50 + i)))
        if i % 4:
            Path(f"e{i:02}.txt.gz").write_bytes(gzip.compress("\n".join(texts(20, i)).encode()))
    files["e"] = "e*"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        pass
    else:
        table = pyarrow.table({"text": texts(300, 3)})
        parquet.write_table(table, "d.parquet", row_group_size=40)
        files["d"] = "d.parquet"

    def make(folder: str, **keys: Any) -> TextData:
        defaults = {"tokenizer": str(tokenizer), "processes": 1, "val_fraction": 0.2}
        return TextData(**({"dir": folder, "files": files, "shard_tokens": 3000} | defaults | keys))

    return make


def begin(made: TextData) -> None:
    Path(made.keys.dir).mkdir(exist_ok=True)
    read_note(spec_of(made))


def encode(made: TextData, task: int, tasks: int) -> None:
    encode_share(spec_of(made), Share(task, tasks), lambda: False)


def contents(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of what is encoded from now on: each chunk by its path and its beginning."""
    done: list[str] = []

    def counted(chunk: Any) -> Any:
        done.append(f"{chunk.path}:{chunk.start}")
        return encode_chunk(chunk)

    monkeypatch.setattr(share, "encode_chunk", counted)
    monkeypatch.setattr(preparation, "encode_chunk", counted)
    return done


@pytest.mark.parametrize(
    ("tasks", "keys"),
    [(1, {}), (3, {}), (4, {}), (3, {"format": "chat"}), (4, {"on_exhausted": "stop"})],
    ids=str,
)
def test_tasks_make_the_same_bytes_as_one_process(
    data: Callable[..., TextData], encoded: list[str], tasks: int, keys: dict[str, Any]
) -> None:
    if keys.get("format") == "chat":
        rows = [{"prompt": "two?", "completion": text} for text in texts(200, 4)]
        Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = keys | {"files": {"chat": "chat.jsonl"}}
    build_shards(data("one", **keys))
    everything = sorted(encoded)
    encoded.clear()
    begin(data("several", **keys))
    for task in range(tasks):
        encode(data("several", **keys), task, tasks)
    if keys.get("on_exhausted") != "stop":
        assert sorted(encoded) == everything and len(everything) > 10
        total = sum(source.size for source in spec_of(data("one", **keys)).sources)
        # Of a compressed file, the sizes depend on the blocks that are read.
        assert total / 2 < progress(Path("several"), {}).encoded < total * 2
    encoded.clear()
    build_shards(data("several", **keys))
    assert encoded == []
    assert contents("one") == contents("several")


def test_a_task_of_several_processes_writes_the_same_bundles(
    data: Callable[..., TextData],
) -> None:
    found = []
    for folder, processes in (("one", 1), ("two", 2)):
        made = data(folder, processes=processes)
        begin(made)
        encode(made, 1, 2)
        found.append(contents(str(bundles_folder(Path(folder)))))
    # Not by CHUNK_BYTES, which other processes have from the module.
    assert found[0] == found[1] and len(found[0]) > 3


def test_a_stopped_and_a_killed_task_continue(
    data: Callable[..., TextData], encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_shards(data("one"))
    everything = sorted(encoded)
    encoded.clear()
    begin(data("several"))
    asked = iter([False] * 40 + [True] * 1000)
    with pytest.raises(Stopped, match="several; run the same command"):
        encode_share(spec_of(data("several")), Share(0, 2), lambda: next(asked))
    before = len(encoded)
    assert before > 5

    class Killed(BaseException):
        """Nothing is done on its way, as at a SIGKILL."""

    with monkeypatch.context() as patch:
        finish = share.BundleWriter.finish
        left = 4

        def killed(self: Any) -> None:
            nonlocal left
            left -= self._file is not None
            if left <= 0:
                self._file.close()
                raise Killed
            finish(self)

        patch.setattr(share.BundleWriter, "finish", killed)
        with pytest.raises(Killed):
            encode(data("several"), 1, 2)
    assert len(encoded) > before + 3
    for task in range(2):
        encode(data("several"), task, 2)
    # What a killed task had in its last bundle is encoded twice, and nothing else.
    twice = [chunk for chunk in set(encoded) if encoded.count(chunk) > 1]
    assert sorted(set(encoded)) == everything and 0 < len(twice) <= 16
    encoded.clear()
    build_shards(data("several"))
    assert encoded == []
    assert contents("one") == contents("several")


def test_what_is_missing_is_sent_again_to_another_number_of_tasks(
    data: Callable[..., TextData], encoded: list[str]
) -> None:
    build_shards(data("one"))
    everything = sorted(encoded)
    encoded.clear()
    begin(data("several"))
    for task in (0, 2):
        encode(data("several"), task, 3)
    for task in range(5):
        encode(data("several"), task, 5)
    assert sorted(encoded) == everything
    encoded.clear()
    build_shards(data("several"))
    assert encoded == [] and contents("one") == contents("several")


KINDS = ["a bit", "the index", "cut", "empty", "gone"]


def damage(path: Path, kind: str) -> None:
    raw = bytearray(path.read_bytes())
    if kind == "a bit":
        raw[len(raw) // 3] ^= 1
    elif kind == "the index":
        raw[-40] ^= 1
    elif kind == "cut":
        del raw[len(raw) // 2 :]
    elif kind == "empty":
        raw.clear()
    path.write_bytes(raw)
    if kind == "gone":
        path.unlink()


def test_the_merging_encodes_what_is_missing_or_damaged(
    data: Callable[..., TextData], encoded: list[str]
) -> None:
    build_shards(data("one"))
    count = len(encoded)
    begin(data("several"))
    for task in range(3):
        encode(data("several"), task, 3)
    found = sorted(bundles_folder(Path("several")).iterdir())
    for i, path in enumerate(found[:: len(found) // 10]):
        damage(path, KINDS[i % len(KINDS)])
    encoded.clear()
    build_shards(data("several"))
    assert 9 < len(encoded) < count / 2
    assert contents("one") == contents("several")


def test_bundles_of_other_settings_are_not_taken(
    data: Callable[..., TextData], encoded: list[str]
) -> None:
    for seed in (0, 1):
        begin(data("several", seed=seed))
        if not seed:
            for task in range(2):
                encode(data("several"), task, 2)
            assert list(bundles_folder(Path("several")).iterdir())
            kept = contents(str(bundles_folder(Path("several"))))
    assert not bundles_folder(Path("several")).exists()
    # Nor where they are put back.
    bundles_folder(Path("several")).mkdir()
    for name, content in kept.items():
        bundles_folder(Path("several")).joinpath(name).write_bytes(content)
    encoded.clear()
    build_shards(data("several", seed=1))
    build_shards(data("one", seed=1))
    assert contents("one") == contents("several")
    assert len(encoded) == 2 * len(set(encoded))


def test_an_interrupted_merging_takes_the_rest_of_the_bundles(
    data: Callable[..., TextData], encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_shards(data("one"))
    begin(data("several"))
    for task in range(2):
        encode(data("several"), task, 2)
    encoded.clear()
    monkeypatch.setattr(preparation, "NOTE_S", 0.0)
    before = len(list(bundles_folder(Path("several")).iterdir()))
    asked = iter([False] * 30 + [True] * 3)
    with pytest.raises(Stopped):
        preparation.write_shards(spec_of(data("several")), stopped=lambda: next(asked))
    left = len(list(bundles_folder(Path("several")).iterdir()))
    assert 0 < left < before
    done = progress(Path("several"), {"bytes": 10**9})
    assert 0 < done.merged < done.encoded < 10**9
    # Tasks that are sent again find nothing to do.
    for task in range(3):
        encode(data("several"), task, 3)
    build_shards(data("several"))
    assert encoded == []
    assert contents("one") == contents("several")


def test_a_document_that_cannot_be_read_ends_the_task_that_meets_it(
    data: Callable[..., TextData],
) -> None:
    good = [json.dumps({"text": text}) + "\n" for text in texts(300, 13)]
    Path("bad.jsonl").write_text("".join(good) + "not JSON\n")
    keys = {"files": ["bad.jsonl"]}
    begin(data("several", **keys))
    with pytest.raises(
        UserError, match=r"bad\.jsonl: line \d+ of the part from byte \d+ on: not JSON.*on_error="
    ):
        for task in range(4):
            encode(data("several", **keys), task, 4)
    for task in range(4):
        encode(data("several", on_error="skip", **keys), task, 4)
    made = build_shards(data("several", on_error="skip", **keys))
    assert (made.sources[0].documents, made.sources[0].skipped) == (300, 1)


def test_an_input_that_changed_since_is_refused(data: Callable[..., TextData]) -> None:
    begin(data("several"))
    with Path("a.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="the input: other files, files that changed"):
        encode(data("several"), 0, 2)


def test_there_are_no_more_tasks_than_chunks(data: Callable[..., TextData]) -> None:
    Path("small.txt").write_text("one text")
    Path("larger.txt").write_bytes(b"a text " * 1000)
    assert most_tasks(spec_of(data("one", files="small.txt"))) == 1
    assert most_tasks(spec_of(data("one", files=["small.txt", "larger.txt"]))) == 4
    spec = spec_of(data("one", files="larger.txt"))
    spec.sources[0].size = 0  # As of a stream.
    assert most_tasks(spec) == 1


def test_one_task_trains_the_tokenizer(data: Callable[..., TextData]) -> None:
    keys: dict[str, Any] = {"tokenizer": None, "vocab_size": 300, "sample_mb": 1}
    build_shards(data("one", **keys))
    begin(data("several", **keys))
    encode(data("several", **keys), 1, 2)
    trained = Path("several/tokenizer.json").stat().st_mtime_ns
    encode(data("several", **keys), 0, 2)
    build_shards(data("several", **keys))
    assert Path("several/tokenizer.json").stat().st_mtime_ns == trained
    assert contents("one") == contents("several")


def test_a_small_compressed_file_is_read_by_one_task(
    data: Callable[..., TextData], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[int, str]] = []
    task = 0
    stream_chunks = file_source.stream_chunks

    def counted(i: int, path: Path, *place: Any) -> Any:
        opened.append((task, path.name))
        return stream_chunks(i, path, *place)

    monkeypatch.setattr(file_source, "stream_chunks", counted)
    begin(data("several"))
    for task in range(3):
        encode(data("several"), task, 3)
    small = [name for _, name in opened if name.startswith("e")]
    assert sorted(small) == sorted(path.name for path in Path().glob("e*.gz"))
    assert len({task for task, name in opened if name in small}) == 3
    assert [name for _, name in opened if name == "big.jsonl.gz"] == ["big.jsonl.gz"] * 3
