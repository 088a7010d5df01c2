"""`lunaris prepare` as a person calls it, up to the sequences that training takes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lunaris.__main__ import main
from lunaris.data.manifest import read
from lunaris.data.shards import ShardsData
from lunaris.data.tokenizer import TextTokenizer


def write_corpus(name: str = "a.jsonl") -> list[str]:
    draw = random.Random(0)
    documents = [f"{i} " + "word " * draw.randint(1, 80) for i in range(200)]
    Path(name).write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return documents


COMMAND = ["prepare", "data=text", "data.dir=out", "data.vocab_size=300", "data.processes=1"]


def test_from_files_to_sequences(capfd: pytest.CaptureFixture[str]) -> None:
    documents = write_corpus()
    assert main([*COMMAND, "data.files=[a.jsonl]", "data.val_fraction=0.1"]) == 0
    out = capfd.readouterr().out
    assert "text: 200 documents, " in out
    assert "next: lunaris train data=shards data.dir=out" in out
    assert main(["prepare", "--verify", "data=shards", "data.dir=out"]) == 0
    assert "out: 2 shards are as they were written" in capfd.readouterr().out

    data = ShardsData(dir="out")
    data.ensure_ready()
    assert data.vocab_size == 300 and data.tokenizer_path is not None
    val = data.val(seq_len=32)["out"]
    row = np.empty((1, 33), dtype=np.int64)
    val.gather(np.array([0]), row)
    start = TextTokenizer(data.tokenizer_path).decode_bytes(row[0])
    assert any(d.encode().startswith(start[:20]) for d in documents)


def test_named_sources_with_weights(capfd: pytest.CaptureFixture[str]) -> None:
    write_corpus()
    write_corpus("b.jsonl")
    keys = ["data.files={one: a.jsonl, two: [b.jsonl]}", "data.weights={one: 1, two: 3}"]
    assert main([*COMMAND, *keys]) == 0
    manifest = read(Path("out"))
    assert manifest is not None
    assert [(s.name, s.weight) for s in manifest.sources] == [("one", 0.25), ("two", 0.75)]


def test_text_without_a_validation_part_says_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    Path("book.txt").write_text("".join(f"Line {i} of a book.\n" for i in range(500)))
    assert main([*COMMAND, "data.files=book.txt"]) == 0
    out = capfd.readouterr().out
    assert "no val/loss; a text file is one document: cut it into files" in out
    assert (
        main(
            [
                *COMMAND[:2],
                "data.dir=cut",
                *COMMAND[3:],
                "data.files=book.txt",
                "data.format=lines",
                "data.val_fraction=0.1",
            ]
        )
        == 0
    )
    assert "note:" not in capfd.readouterr().out
    write_corpus()
    assert (
        main(
            [
                *COMMAND[:2],
                "data.dir=many",
                *COMMAND[3:],
                "data.files=a.jsonl",
                "data.val_fraction=0.0001",
            ]
        )
        == 0
    )
    assert "no val/loss; raise data.val_fraction or give more" in capfd.readouterr().out


BAD = [
    (["data.files=[b.jsonl]"], "no file matches b.jsonl"),
    ([], "data.files"),
    (["data.files=[a.jsonl]", "data.val_fraction=2"], "data.val_fraction=2"),
    (["data.files=[a.jsonl]", "data.format=json"], "did you mean jsonl?"),
    (["data.files=[a.jsonl]", "data.on_exhausted=go"], "data.on_exhausted=go"),
    (["data.files=[a.jsonl]", "--verfy"], "--verfy: no such option"),
    (["data.files=[a.jsonl]", "data.text_kye=x"], "did you mean data.text_key?"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_mistakes(capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    write_corpus()
    assert main([*COMMAND, *arguments]) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not Path("out/manifest.json").exists()


def test_what_needs_no_preparation(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "data=synthetic"]) == 2
    assert "there is nothing to prepare" in capfd.readouterr().err
    assert main(["prepare", "--verify", "data=synthetic"]) == 2
    assert "needs data.dir" in capfd.readouterr().err


_CUSTOM = """
from pathlib import Path
from lunaris.config.schema.data import TextDataConfig
from lunaris.data.prepare.file_source import FileSource
from lunaris.data.prepare.pipeline import write_shards
from lunaris.data.prepare.spec import PrepareSpec, settings_of
from lunaris.data.prepared import PreparedData


class CustomData(PreparedData):
    schema = TextDataConfig

    def build_shards(self):
        sources = [FileSource("custom", [Path("a.jsonl")])]
        settings = settings_of(self.keys, sources, [1.0])
        return write_shards(PrepareSpec(self.keys, sources, [1.0], settings))
"""


def test_a_custom_class_builds_its_shards(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus()
    Path("custom.py").write_text(_CUSTOM)
    monkeypatch.syspath_prepend(".")
    assert main([*COMMAND, "data._target_=custom.CustomData", "data.files=[]"]) == 0
    assert "custom: 200 documents, " in capfd.readouterr().out


def test_a_corrupt_shard_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    write_corpus()
    assert main([*COMMAND, "data.files=[a.jsonl]"]) == 0
    shard = Path("out/train_00000.npy")
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert main(["prepare", "--verify", "data=shards", "data.dir=out"]) == 2
    assert f"{shard}: its contents changed" in capfd.readouterr().err


def test_no_torch() -> None:
    write_corpus()
    code = (
        "import sys; from lunaris.__main__ import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    arguments = [*COMMAND, "data.files=[a.jsonl]"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_names_every_key(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--help"]) == 0
    out = capfd.readouterr().out
    for key in ("data.files", "data.tokenizer", "data.on_error", "--verify"):
        assert key in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_of_a_hundred_megabytes(name: str) -> None:
    words = ["internationalisation", "extraordinarily", "naïveté-漢字漢字漢字", "🙂🙂🙂🙂🙂"]
    block = " ".join(random.Random(0).choices(words, k=20_000)).encode()
    count = 100_000_000 // len(block) + 1
    text = (block + b" \xff ") * count
    Path(name).write_bytes(text)
    if name == "a.jsonl":
        # Broken UTF-8 within JSON, and an escape that is no character.
        Path(name).write_bytes(b'{"text": "%s"}\n' % ((block + b" \xff\\ud83d ") * count))
        text = (block + b" \xff\xed\xa0\xbd ") * count
    assert main([*COMMAND[:-1], "data.sample_mb=1", f"data.files=[{name}]"]) == 0
    tokens = np.concatenate([np.load(path) for path in sorted(Path("out").glob("*.npy"))])
    decoded = TextTokenizer(Path("out/tokenizer.json")).decode_bytes(tokens)
    assert decoded == text
    assert np.count_nonzero(tokens == 0) == 1


def test_a_missing_validation_part_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    write_corpus()
    assert main([*COMMAND, "data.files=[a.jsonl]", "data.val_fraction=0"]) == 0
    out = capfd.readouterr().out
    assert "0 for validation" in out and "training will have no val/loss" in out
