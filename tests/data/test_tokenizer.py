"""Byte-level BPE: any bytes come back as they were."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lunaris.data.prepare.folder_tokenizer import train_bpe
from lunaris.data.text_split import split_bytes
from lunaris.data.tokenizer import TextTokenizer, byte_alphabet
from lunaris.errors import UserError

TEXT = "The cat sat on the mat. Der Fuß, naïve — 漢字とかな 😀 x = f(1, 2)\n" * 40
DOCUMENTS = {
    "empty": b"",
    "space": b" \n\t  \r\n ",
    "plain": b"hello world",
    "unicode": "naïve 漢字 😀👩‍👩‍👧 \u200b ﷽ é vs e\u0301 \ufeff".encode(),
    "zero": b"a\x00b\x00",
    "special": b"a<|endoftext|>b <|endoftext|>",
    "broken": b"\xff\xfe ok \xc3 \xe6\xbc text \xed\xa0\x80 \x80\x80\x80",
    "cut character": "漢".encode()[:2],
    "random": random.Random(0).randbytes(5000),
    "long word": b"a" * 200_001,
    "long characters": "漢".encode() * 60_000,
    "long text": TEXT.encode() * 60,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe([TEXT], 300, path)
    return path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_round_trip(trained: Path, name: str) -> None:
    tokenizer = TextTokenizer(trained)
    document = DOCUMENTS[name]
    (ids,) = tokenizer.encode([document])
    assert tokenizer.decode_bytes(ids) == document
    assert tokenizer.eot_id not in ids


def test_batch_equals_one_at_a_time(trained: Path) -> None:
    tokenizer = TextTokenizer(trained)
    documents = list(DOCUMENTS.values())
    for document, ids in zip(documents, tokenizer.encode(documents), strict=True):
        assert np.array_equal(tokenizer.encode([document])[0], ids)


def test_encodes_as_the_library_does(trained: Path) -> None:
    whole = Tokenizer.from_file(str(trained)).encode(TEXT * 60, add_special_tokens=False).ids
    assert TextTokenizer(trained).encode([(TEXT * 60).encode()])[0].tolist() == whole


def test_same_text_same_tokenizer(trained: Path, tmp_path: Path) -> None:
    train_bpe([TEXT], 300, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == trained.read_bytes()


def test_alphabet_is_the_librarys() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte_alphabet()[ord(" ")] == "Ġ"
    assert byte_alphabet()[ord("\n")] == "Ċ"


@pytest.mark.parametrize("document", [b"ab cd  ef " * 50, "漢字".encode() * 99, b"\xbf" * 501])
def test_pieces_make_the_whole(document: bytes) -> None:
    pieces = list(split_bytes(document, most=64))
    assert b"".join(pieces) == document
    assert max(map(len, pieces)) <= 64
    if b" " in document:
        assert all(piece.startswith(b" ") for piece in pieces[1:])


def test_vocabulary_decides_the_type_of_shards(trained: Path) -> None:
    tokenizer = TextTokenizer(trained)
    assert tokenizer.vocab_size == 300
    for size, dtype in ((65_536, np.uint16), (65_537, np.uint32)):
        tokenizer.vocab_size = size
        assert tokenizer.dtype == dtype


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UserError, match=r"t\.json: not a tokenizer\.json"):
        TextTokenizer(tmp_path / "t.json")


def test_end_of_text_must_be_known(trained: Path, tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "t"))
    with pytest.raises(UserError, match=r"data\.eot"):
        TextTokenizer(tmp_path / "t")
    assert TextTokenizer(tmp_path / "t", eot="a").eot_id == 0
    assert TextTokenizer(trained, eot="x").eot_id != 0
