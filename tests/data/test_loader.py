"""The loader: the same global batches for every split, ahead of the step, with its errors."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lunaris.data.loader import Loader, split_documents
from lunaris.data.shards import ShardsData
from lunaris.data.synthetic import ArrayStream
from lunaris.data.token_stream import StreamSequences
from lunaris.errors import UserError


def numbered(count: int = 200, seq_len: int = 4) -> StreamSequences:
    """Return sequences whose first token says which one it is."""
    tokens = np.arange(count * seq_len + 1, dtype=np.uint32)
    return StreamSequences(ArrayStream(tokens, "numbers"), seq_len, 7, "numbers")


def first_tokens(steps: int, **keys: int) -> list[list[int]]:
    loader = Loader(numbered(), **keys)
    batches = iter(loader)
    try:
        return [next(batches)["tokens"][..., 0].reshape(-1).tolist() for _ in range(steps)]
    finally:
        loader.close()


def test_every_split_of_the_global_batch_is_the_same_set() -> None:
    whole = first_tokens(40, batch_size=12)
    for batch_size, accumulation, world_size in ((3, 4, 1), (2, 3, 2), (1, 1, 12), (4, 1, 3)):
        parts = [
            first_tokens(
                40,
                batch_size=batch_size,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        for step in range(40):
            assert sorted(sum((part[step] for part in parts), [])) == sorted(whole[step])


def test_started_later_goes_on_where_it_was() -> None:
    assert first_tokens(10, batch_size=6, start=5 * 6) == first_tokens(15, batch_size=6)[5:]


def test_rows_are_inputs_and_their_next_tokens() -> None:
    loader = Loader(numbered(), batch_size=3, accumulation=2)
    batch = next(iter(loader))
    loader.close()
    assert {(name, part.shape) for name, part in batch.items()} == {
        ("tokens", (2, 3, 4)),
        ("targets", (2, 3, 4)),
    }
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert torch.equal(batch["targets"], batch["tokens"] + 1)


def test_batches_are_not_overwritten_by_later_ones() -> None:
    loader = Loader(numbered(), batch_size=4)
    batches = iter(loader)
    kept = [next(batches) for _ in range(12)]
    copies = first_tokens(12, batch_size=4)
    loader.close()
    assert [batch["tokens"][..., 0].reshape(-1).tolist() for batch in kept] == copies


def test_documents_split_after_their_end() -> None:
    rows = torch.tensor([[5, 6, 0, 7, 0, 0, 8, 9, 3], [0, 1, 2, 3, 4, 5, 6, 7, 0]])
    tokens, targets, documents = split_documents(rows, eot_id=0).values()
    assert tokens.tolist() == rows[:, :-1].tolist()
    assert targets.tolist() == [
        [6, 0, -100, 0, -100, -100, 9, 3],
        [-100, 2, 3, 4, 5, 6, 7, 0],
    ]
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1]]


def test_split_never_shares_memory_with_rows() -> None:
    rows = torch.arange(5).reshape(1, 5)
    tokens, targets = split_documents(rows, eot_id=None).values()
    targets[:] = -100
    assert rows.tolist() == [[0, 1, 2, 3, 4]]
    assert tokens.tolist() == [[0, 1, 2, 3]]


def test_masked_batches_bring_their_documents() -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 801).astype(np.uint16)
    part = StreamSequences(ArrayStream(tokens, "x"), 8, 1, "x")
    loader = Loader(part, batch_size=5, accumulation=3, eot_id=0)
    batches = iter(loader)
    for _ in range(5):
        batch = next(batches)
        assert batch["documents"].shape == (3, 5, 8)
        assert torch.equal(batch["targets"] < 0, batch["tokens"] == 0)
        assert (batch["targets"] < 0).any()
    loader.close()


def test_an_id_outside_the_vocabulary_names_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full(50, 3, np.uint16))
    np.save(tmp_path / "b.npy", np.full(50, 11, np.uint16))
    data = ShardsData(dir=str(tmp_path), val_fraction=0)
    data.ensure_ready()
    loader = Loader(data.train(4, 0), batch_size=24, vocab_size=11)
    with pytest.raises(UserError, match=r"b\.npy: holds the id 11, .*vocabulary of 11"):
        next(iter(loader))
    loader.close()


class Broken(StreamSequences):
    """Sequences that fail at the third step."""

    def gather(self, n: np.ndarray, out: np.ndarray) -> None:
        if n[0] >= 8:
            raise OSError("the disk is gone")
        super().gather(n, out)


def test_errors_of_the_thread_reach_the_loop() -> None:
    part = Broken(ArrayStream(np.arange(101), "x"), 4, None, "x")
    loader = Loader(part, batch_size=4)
    batches = iter(loader)
    next(batches)
    next(batches)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(iter(loader))
    loader.close()


def test_close_ends_the_thread_and_the_iterator() -> None:
    before = threading.active_count()
    loader = Loader(numbered(), batch_size=2)
    batches = iter(loader)
    next(batches)
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before
    assert list(batches) == []
    loader.close()


class Slow(StreamSequences):
    """Sequences that take their time."""

    def gather(self, n: np.ndarray, out: np.ndarray) -> None:
        time.sleep(0.3)
        super().gather(n, out)


def test_wait_is_what_the_step_waited() -> None:
    loader = Loader(Slow(ArrayStream(np.arange(101), "x"), 4, None, "x"), batch_size=2)
    batches = iter(loader)
    next(batches)
    assert loader.wait_s > 0.2
    # The thread works while the loop does.
    while loader._filled.qsize() < 2:
        time.sleep(0.05)
    next(batches)
    assert loader.wait_s < 0.2
    loader.close()
