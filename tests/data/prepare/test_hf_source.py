"""Hub datasets, streamed: here from folders, with no network."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lunaris.data.hf import HFData
from lunaris.data.manifest import Manifest
from lunaris.data.prepare import chunks, pipeline
from lunaris.data.prepare.build import build_shards
from lunaris.data.prepare.folder_tokenizer import train_bpe
from lunaris.data.prepare.hf_source import HFSource
from lunaris.data.text import TextData
from lunaris.errors import UserError

DOCUMENTS = {name: [f"{name} {i} " + "word " * (i % 40) for i in range(300)] for name in "ab"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Datasets in folders a (Parquet) and b (JSON lines), a tokenizer, and no Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pytest.importorskip("datasets")  # now: it reads the environment when it is imported
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    table = pyarrow.table({"id": list(range(300)), "text": DOCUMENTS["a"]})
    Path("a").mkdir()
    parquet.write_table(table, "a/train.parquet", row_group_size=50)
    Path("b").mkdir()
    lines = [json.dumps({"body": text}) for text in DOCUMENTS["b"]]
    Path("b/data.jsonl").write_text("\n".join(lines))
    train_bpe(DOCUMENTS["a"], 280, Path("tokenizer.json"))


def make(folder: str, datasets: Any, /, **keys: Any) -> Manifest:
    defaults = {"tokenizer": "tokenizer.json", "processes": 1, "val_fraction": 0.1}
    return build_shards(HFData(**({"dir": folder, "datasets": datasets} | defaults | keys)))


def shards(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).glob("*.npy")}


BOTH = {"a": "a", "b": {"path": "b", "text_key": "body"}}


def test_a_dataset_as_the_same_files(tmp_path: Path) -> None:
    make("out", "a")
    keys: dict[str, Any] = {"tokenizer": "tokenizer.json", "processes": 1, "val_fraction": 0.1}
    build_shards(TextData(dir="files", files="a/*.parquet", **keys))
    assert shards("out") == shards("files") != {}


def test_several_are_interleaved_and_processes_change_nothing() -> None:
    manifest = make("one", BOTH, weights={"a": 1, "b": 2})
    assert [(s.name, s.documents) for s in manifest.sources] == [("a", 300), ("b", 300)]
    make("two", BOTH, weights={"a": 1, "b": 2}, processes=2)
    assert shards("one") == shards("two")


def test_interrupted_and_continued_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    make("whole", BOTH, shard_tokens=700)
    for after in (3, 20, 40):
        interrupted(monkeypatch, "killed", BOTH, after, shard_tokens=700)
    make("killed", BOTH, shard_tokens=700)
    assert shards("killed") == shards("whole")


def interrupted(
    monkeypatch: pytest.MonkeyPatch, folder: str, datasets: Any, after: int, **keys: Any
) -> None:
    """Begin a preparation and break it off after so many appends to the shards."""
    append, left = pipeline.ShardWriter.append, [after]

    def failing(self: Any, tokens: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.ShardWriter, "append", failing)
        patch.setattr(pipeline, "NOTE_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            make(folder, datasets, **keys)


@pytest.mark.parametrize("found", [True, False])
def test_what_is_done_is_not_read_again_where_the_library_finds_the_place(
    monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    Path("c").mkdir()
    for i in range(4):
        table = pyarrow.table({"text": [f"{i} {text}" for text in DOCUMENTS["a"]]})
        parquet.write_table(table, f"c/{i}.parquet", row_group_size=50)
    make("whole", "c")
    interrupted(monkeypatch, "killed", "c", 100)
    note = Path("killed/.prepare/note.json")
    content = json.loads(note.read_bytes())
    (progress,) = content["sources"]
    assert progress["start"] > 400
    if found:
        # The rows of the first file are gone, its schema is there: to read it again would fail.
        first = Path("c/0.parquet")
        before = first.stat()
        with first.open("r+b") as file:
            file.seek(4)
            file.write(b"#" * 1000)
        os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        progress["place"]["last"] = "text 0"
        note.write_text(json.dumps(content))
    make("killed", "c")
    assert shards("killed") == shards("whole")


BAD: list[tuple[Any, str]] = [
    ([], "at least one dataset"),
    ({"a": {"name": "x"}}, r"data\.datasets\.a: needs a path"),
    ({"a": {"path": "a", "splitt": "x"}}, r"data\.datasets\.a\.splitt: .*did you mean split\?"),
    ({"a": {"path": "a", "text_key": "txt"}}, r"data\.text_key=txt: .*did you mean text\?"),
    # The library asks the network several times.
    pytest.param("nowhere", "nowhere cannot be loaded", marks=pytest.mark.slow),
    (5, r"data\.datasets=5: must be a path"),
    ({"a": 5}, r"data\.datasets\.a=5: must be a path"),
    ({"a": {"path": "a", "split": "test"}}, "a cannot be loaded"),
]


@pytest.mark.parametrize(("datasets", "message"), BAD)
def test_what_cannot_be_loaded(datasets: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make("out", datasets, tokenizer=None, vocab_size=280, on_error="skip")
    assert str(error.value).startswith("data.")
    assert not Path("out").exists()
    make("out", "a")


def test_a_corrupt_file_is_reported_or_skipped(capfd: pytest.CaptureFixture[str]) -> None:
    Path("c").mkdir()
    Path("c/0.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in DOCUMENTS["a"]))
    Path("c/1.jsonl").write_text('{"text": "one"}\n{broken\n')
    with pytest.raises(UserError, match=r"c\[train\]:\d+: cannot be read further: \w+: JSON"):
        make("out", "c")
    manifest = make("out", "c", on_error="skip")
    assert "skipped c[train]:" in capfd.readouterr().err
    assert manifest.sources[0].documents >= 300 and manifest.sources[0].skipped == 1


def test_a_network_fault_is_reported_and_the_work_continued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = HFSource._rows

    def failing(self: HFSource, cursor: Any) -> Any:
        for i, row in enumerate(rows(self, cursor)):
            if i == 200:
                raise ConnectionError("reset by peer")
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(HFSource, "_rows", failing)
        with pytest.raises(
            UserError, match="a cannot be read further after 200 documents: Connection"
        ):
            make("out", "a", on_error="skip")
    make("out", "a", on_error="skip")
    make("whole", "a", on_error="skip")
    assert shards("out") == shards("whole")


@pytest.mark.parametrize("where", ["load", "place"])
def test_an_outage_while_continuing_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    import datasets

    make("whole", BOTH)
    interrupted(monkeypatch, "killed", BOTH, 40)

    def down(*args: Any, **keys: Any) -> Any:
        raise ConnectionError("network down")

    with monkeypatch.context() as patch:
        if where == "load":
            patch.setattr(datasets, "load_dataset", down)
        else:
            patch.setattr(datasets.IterableDataset, "__iter__", down)
        with pytest.raises(UserError, match="ConnectionError: network down"):
            make("killed", BOTH, on_error="skip")
    make("killed", BOTH)
    assert shards("killed") == shards("whole")


def test_a_stream_without_a_state_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def none(self: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(datasets.IterableDataset, "state_dict", none)
    make("whole", BOTH)
    interrupted(monkeypatch, "killed", BOTH, 40)
    make("killed", BOTH)
    assert shards("killed") == shards("whole")


def test_files_of_a_folder_that_changed_are_another_input() -> None:
    make("out", "b", text_key="body")
    Path("b/more.jsonl").write_text('{"body": "more"}\n')
    with pytest.raises(UserError, match="files that changed"):
        make("out", "b", text_key="body")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'lunaris-codex\[hf\]'"):
        make("out", "a")
