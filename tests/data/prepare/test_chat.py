"""Conversations and prompts: their template, their loss masks, and the shards that hold both."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lunaris.data.loader import IGNORED, Loader, to_batch
from lunaris.data.manifest import Manifest, read
from lunaris.data.prepare import chunks
from lunaris.data.prepare import pipeline as preparation
from lunaris.data.prepare.build import build_shards
from lunaris.data.prepare.chat import pieces_of
from lunaris.data.prepare.folder_tokenizer import train_bpe
from lunaris.data.shard_folder import inspect, verify
from lunaris.data.shards import ShardsData
from lunaris.data.text import TextData
from lunaris.data.tokenizer import TextTokenizer
from lunaris.errors import UserError

WORDS = "der Fuß of naïve 漢字 and 😀 the cat\tsat on\r a mat — x = f(1, 2)".split(" ")


def say(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


RENDERED: list[tuple[dict[str, object], list[tuple[str, bool]]]] = [
    (
        {"messages": [say("system", "S"), say("user", "Q"), say("assistant", "A")]},
        [("<|system|>\nS\n<|user|>\nQ\n<|assistant|>\n", False), ("A\n", True)],
    ),
    (
        {"messages": [say("assistant", "A"), say("tool", ""), say("assistant", "B\n")]},
        [
            ("<|assistant|>\n", False),
            ("A\n", True),
            ("<|tool|>\n\n<|assistant|>\n", False),
            ("B\n\n", True),
        ],
    ),
    (
        {"messages": [say("assistant", ""), say("user", "Q")], "id": 3},
        [("<|assistant|>\n", False), ("\n", True), ("<|user|>\nQ\n", False)],
    ),
    ({"prompt": "P ", "completion": "C"}, [("P ", False), ("C", True)]),
    ({"prompt": "", "completion": "C"}, [("", False), ("C", True)]),
]
WRONG = {
    "{}": "no key messages, and no keys prompt and completion, in []",
    '{"prompt": "P"}': "completion is null, not text",
    '{"prompt": 3, "completion": "C"}': "prompt is a int, not text",
    '{"messages": []}': "messages is not a list of at least one message",
    '{"messages": ["hi"]}': "messages[0] is a str, not an object with role and content",
    '{"messages": [{"role": "assitant", "content": "A"}]}': "did you mean assistant?",
    '{"messages": [{"role": "assistant", "content": [1]}]}': "content is a list, not text",
    '{"messages": [{"role": "user", "content": "Q"}]}': "no message of the assistant",
}


@pytest.mark.parametrize(("record", "pieces"), RENDERED)
def test_the_template(record: dict[str, object], pieces: list[tuple[str, bool]]) -> None:
    assert pieces_of(record) == pieces


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe([" ".join(WORDS), "<|user|>\n"] * 50, 320, path)
    return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)


def make(tokenizer: Path, folder: str = "out", /, **keys: Any) -> Manifest:
    defaults: dict[str, Any] = {"processes": 1, "val_fraction": 0.0, "tokenizer": str(tokenizer)}
    return build_shards(TextData(**({"dir": folder, "format": "chat"} | defaults | keys)))


def records(count: int, seed: int) -> list[dict[str, object]]:
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(0, 30)))

    found: list[dict[str, object]] = []
    for i in range(count):
        turns = [say("user", text()), say("assistant", text())] * draw.randint(1, 3)
        chat = {"messages": [*turns, say("user", text())] if i % 7 == 0 else turns}
        found.append({"prompt": text(), "completion": text()} if i % 3 == 0 else chat)
    return found


def write(path: str, rows: list[dict[str, object]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def stored(folder: str, part: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and the loss mask of a part."""
    manifest = read(Path(folder))
    assert manifest is not None
    entries = manifest.shards[part]
    tokens = [np.load(Path(folder, entry.file)) for entry in entries]
    masks = [np.load(Path(folder, str(entry.mask))) for entry in entries]
    assert all(mask.dtype == np.uint8 for mask in masks)
    return np.concatenate(tokens), np.concatenate(masks)


def expected(tokenizer: Path, rows: list[dict[str, object]]) -> tuple[list[int], list[int]]:
    """Return the tokens and masks that the definition gives, one record after the other."""
    kind = TextTokenizer(tokenizer)
    tokens, masks = [], []
    for row in rows:
        pieces = pieces_of(row)
        assert isinstance(pieces, list)
        for text, loss in pieces:
            ids = kind.encode([text.encode()])[0].tolist()
            tokens += ids
            masks += [int(loss)] * len(ids)
        tokens.append(kind.eot_id)
        masks.append(int(pieces[-1][1]))
    return tokens, masks


def contents(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_shards_hold_the_tokens_and_which_of_them_carry_loss(tokenizer: Path) -> None:
    rows = records(120, 0)
    write("a.jsonl", rows)
    manifest = make(tokenizer, files="a.jsonl", shard_tokens=1500)
    tokens, masks = stored("out")
    assert (tokens.tolist(), masks.tolist()) == expected(tokenizer, rows)
    assert 0 < masks.mean() < 1 and set(masks.tolist()) == {0, 1}
    names = [entry.mask for entry in manifest.shards["train"]]
    assert len(names) > 3 and names[1] == "mask_train_00001.npy"
    assert verify("out") == len(names)
    # The prompt is encoded as `lunaris generate` encodes it: in one piece.
    kind = TextTokenizer(tokenizer)
    prompt = kind.encode([b"<|user|>\nwhy the cat\n<|assistant|>\n"])[0].tolist()
    write("b.jsonl", [{"messages": [say("user", "why the cat"), say("assistant", "so")]}])
    make(tokenizer, "one", files="b.jsonl")
    assert stored("one")[0].tolist()[: len(prompt)] == prompt


def test_the_same_bytes_for_every_number_of_processes_and_after_kills(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a.jsonl", 1), ("b.jsonl", 2)):
        write(name, records(60, seed))
    keys: dict[str, Any] = {
        "files": {"a": "a.jsonl", "b": "b.jsonl"}, "val_fraction": 0.2, "shard_tokens": 700,
    }  # fmt: skip
    whole = make(tokenizer, "whole", **keys)
    assert all(entry.mask for part in whole.shards.values() for entry in part)
    make(tokenizer, "two", processes=2, **keys)
    assert contents("two") == contents("whole")
    monkeypatch.setattr(preparation, "NOTE_S", 0.0)
    tries = 0
    for _ in interruptions(monkeypatch):
        try:
            make(tokenizer, "killed", **keys)
        except InterruptedError:
            tries += 1
    assert tries >= 4 and contents("killed") == contents("whole")


def interruptions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the k-th write fail, of tokens or of masks; yield before each try."""
    append, left = preparation.ShardWriter.append, 0

    def failing(self: Any, tokens: np.ndarray) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InterruptedError
        append(self, tokens)

    monkeypatch.setattr(preparation.ShardWriter, "append", failing)
    for allowed in (1, 2, 5, 8, 13, 10**9):
        left = allowed
        yield


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_record_is_named_or_skipped(
    tokenizer: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps({"prompt": "P", "completion": "C"})
    Path("a.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError) as caught:
        make(tokenizer, files="a.jsonl")
    assert "a.jsonl:2: " in str(caught.value) and WRONG[line] in str(caught.value)
    manifest = make(tokenizer, "skipped", files="a.jsonl", on_error="skip")
    assert (manifest.sources[0].documents, manifest.sources[0].skipped) == (2, 1)


def test_damaged_masks_are_named(tokenizer: Path) -> None:
    write("a.jsonl", records(20, 3))
    make(tokenizer, files="a.jsonl")
    mask, manifest = Path("out/mask_train_00000.npy"), Path("out/manifest.json")
    data = mask.read_bytes()
    before = inspect("out").digest()
    mask.write_bytes(data[:-1] + b"\x07")
    with pytest.raises(UserError, match=r"mask_train_00000.npy: its contents changed"):
        verify("out")
    mask.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"mask_train_00000.npy: truncated"):
        inspect("out")
    mask.unlink()
    with pytest.raises(UserError, match=r"mask_train_00000.npy: absent"):
        inspect("out")
    mask.write_bytes(data)
    tree = json.loads(manifest.read_text())
    entry = tree["shards"]["train"][0]
    # A run is not continued on other masks.
    manifest.write_text(manifest.read_text().replace(entry["mask_sha256"], "0" * 64))
    assert inspect("out").digest() != before
    del entry["mask_sha256"]
    manifest.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="a mask without its sha256"):
        inspect("out")
    manifest.unlink()
    with pytest.raises(UserError, match=r"mask_train_00000.npy: a loss mask, but manifest.json is"):
        inspect("out")


def test_a_folder_without_masks_is_written_as_before(tokenizer: Path) -> None:
    Path("a.txt").write_text("one two three")
    make(tokenizer, files="a.txt", format="auto")
    tree = json.loads(Path("out/manifest.json").read_text())
    assert tree["shards"]["train"][0].keys() == {"file", "tokens", "sha256", "source"}
    assert "format" not in tree["settings"] and not list(Path("out").glob("mask*"))
    with pytest.raises(UserError, match=r"data\.format: None → chat, template 1"):
        make(tokenizer, files="a.txt")


def test_masked_tokens_are_no_targets() -> None:
    rows = torch.tensor([[4, ~5, 6, ~0, 7, ~8, 9]])
    batch = to_batch(rows, eot_id=None, masked=True)
    assert batch["tokens"].tolist() == [[4, 5, 6, 0, 7, 8]]
    assert batch["targets"].tolist() == [[-100, 6, -100, 7, -100, 9]]
    assert batch["loss_mask"].tolist() == [[False, True, False, True, False, True]]
    # The first token of a document is no target, whether it carries loss or not.
    batch = to_batch(rows, eot_id=0, masked=True)
    assert batch["targets"].tolist() == [[-100, 6, -100, -100, -100, 9]]
    assert batch["documents"].tolist() == [[0, 0, 0, 0, 1, 1]]


def test_what_training_reads_is_what_was_written(tokenizer: Path) -> None:
    write("a.jsonl", records(150, 4))
    write("b.jsonl", [{"text": " ".join(WORDS)}] * 200)
    make(tokenizer, "chat", files="a.jsonl", shard_tokens=500, val_fraction=0.1)
    make(tokenizer, "plain", files="b.jsonl", format="auto", shard_tokens=500)
    tokens, masks = stored("chat")

    def batches(folders: Any, world: int) -> dict[str, torch.Tensor]:
        """Return 12 steps of 8 sequences ([12, 8, L] each), in the global order."""
        data = ShardsData(dir=folders)
        data.ensure_ready()
        sequences = data.train(16, seed=5)
        found = []
        for rank in range(world):
            loader = Loader(sequences, batch_size=8 // world, rank=rank, world_size=world)
            steps = [batch for batch, _ in zip(loader, range(12), strict=False)]
            loader.close()
            found.append({k: torch.cat([step[k] for step in steps]) for k in steps[0]})
        return {key: torch.cat([part[key] for part in found], dim=1) for key in found[0]}

    whole = batches("chat", 1)
    for row, targets in zip(
        whole["tokens"].view(-1, 16).tolist(), whole["targets"].view(-1, 16).tolist(), strict=True
    ):
        starts = [
            at for at in range(0, len(tokens) - 16, 16) if tokens[at : at + 16].tolist() == row
        ]
        wanted = [
            np.where(masks[at + 1 : at + 17], tokens[at + 1 : at + 17].astype(int), IGNORED)
            for at in starts
        ]
        assert targets in [part.tolist() for part in wanted]
    for world in (2, 4):
        found = batches("chat", world)
        assert all(torch.equal(found[key], whole[key]) for key in whole)
    mixed = batches(["chat", "plain"], 1)
    full = (mixed["targets"] >= 0).all(-1)
    assert full.any() and not full.all() and (mixed["tokens"] >= 0).all()
    assert "loss_mask" not in batches("plain", 1)


def test_a_negative_id_of_a_folder_without_masks_is_still_refused(tokenizer: Path) -> None:
    write("a.jsonl", records(60, 6))
    make(tokenizer, "chat", files="a.jsonl")
    Path("plain").mkdir()
    ids = np.arange(200, dtype=np.int32) % 50
    np.save("plain/a.npy", ids)
    data = ShardsData(dir=["chat", "plain"], vocab_size=320)
    data.ensure_ready()
    ids[:] = -3
    np.save("plain/a.npy", ids)
    loader = Loader(data.train(16, seed=0), batch_size=64, vocab_size=320)
    with pytest.raises(UserError, match=r"plain.*outside the vocabulary of 320"):
        next(iter(loader))
    loader.close()
