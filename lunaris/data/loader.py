"""The batches of each optimizer step, which a thread gathers ahead of time.

Shapes: A micro-steps, B sequences per process and micro-step, L tokens.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lunaris.data.base import Sequences, is_masked
from lunaris.data.order import SequenceOrder
from lunaris.errors import UserError

IGNORED = -100
# How many steps are gathered ahead; each takes one buffer of A · B · (L + 1) int64.
_AHEAD = 2


def split_documents(rows: Tensor, eot_id: int | None) -> dict[str, Tensor]:
    """Split rows ([..., L + 1] int64) into `tokens` and `targets`, and `documents` with an eot_id.

    All are [..., L] int64; targets are â100 where there is none, and documents are numbered within
    their sequence. An end-of-text token belongs to the document that it ends, and is predicted.
    What follows it is another document, whose first token is not a target.
    """
    tokens, targets = rows[..., :-1].clone(), rows[..., 1:].clone()
    if eot_id is None:
        return {"tokens": tokens, "targets": targets}
    ends = tokens == eot_id
    documents = ends.cumsum(-1) - ends.long()
    targets.masked_fill_(ends, IGNORED)
    return {"tokens": tokens, "targets": targets, "documents": documents}


def to_batch(rows: Tensor, eot_id: int | None, masked: bool) -> dict[str, Tensor]:
    """Return the batch of rows ([..., L + 1] int64) as `Sequences.gather` writes them.

    masked: a negative number is a token that carries no loss: it is not a target, and the batch
    also has `loss_mask` ([..., L] bool), which is false there.
    """
    if not masked:
        return split_documents(rows, eot_id)
    keeps = rows[..., 1:] >= 0
    batch = split_documents(rows ^ (rows >> 63), eot_id)
    batch["targets"].masked_fill_(~keeps, IGNORED)
    return batch | {"loss_mask": keeps}


def check_ids(
    rows: np.ndarray, n: np.ndarray, sequences: Sequences, vocab_size: int | None
) -> None:
    """Raise UserError for an id outside the vocabulary, before a device looks it up.

    rows: [R, L + 1] int64; n: [R], which sequence each row is.
    """
    if is_masked(sequences):
        rows = rows ^ (rows >> 63)
    # As an unsigned number, a negative id is larger than any vocabulary.
    ids, limit = rows.view(np.uint64), np.uint64(2**63 if vocab_size is None else vocab_size)
    if ids.max() < limit:
        return
    row, column = np.argwhere(ids >= limit)[0]
    raise UserError(
        f"{sequences.describe(int(n[row]))}: holds the id {rows[row, column]}, outside "
        f"the vocabulary of {vocab_size}; set model.vocab_size to more than the largest id"
    )


class Loader:
    """An endless iterator over the batches of one process.

    Step s of a run that began at `start` takes the global sequences start + [s·G, (s+1)·G), but for
    those that `order` leaves out, with G = B · A · world_size; micro-step m of rank r takes B of
    them from (m · world_size + r) · B on.
    So a step's set of sequences is the same for every way to divide G.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        device: torch.device | str = "cpu",
        vocab_size: int | None = None,
        eot_id: int | None = None,
        order: SequenceOrder | None = None,
    ) -> None:
        """start: the position in `order`, by default all sequences. eot_id: with document masking.

        Every id is checked against vocab_size; a UserError names the file of the first id that is
        not below it. The iterator raises the errors of the thread.
        """
        self.wait_s = 0.0
        self._sequences = sequences
        self._masked = is_masked(sequences)
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._eot_id = eot_id
        self._start = start
        self._order = order or SequenceOrder()
        self._global_batch = batch_size * accumulation * world_size
        self._offsets = (
            (np.arange(accumulation)[:, None] * world_size + rank) * batch_size
            + np.arange(batch_size)[None, :]
        ).reshape(-1)
        self._shape = (accumulation, batch_size, sequences.seq_len + 1)
        self._pinned = self._device.type == "cuda"
        self._free: queue.Queue[_Buffer] = queue.Queue()
        self._filled: queue.Queue[_Buffer | BaseException] = queue.Queue()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield each step's batch on the device: [A, B, L] tensors, see `to_batch`."""
        if self._thread is None:
            for _ in range(_AHEAD + 1):
                self._free.put(_Buffer(self._shape, self._pinned))
            self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
            self._thread.start()
        while not self._closed.is_set():
            yield self._next()

    def close(self) -> None:
        """Stop the thread and wait for it; the iterator ends."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _next(self) -> dict[str, Tensor]:
        began = time.perf_counter()
        filled = self._filled.get()
        self.wait_s = time.perf_counter() - began
        if isinstance(filled, BaseException):
            # Kept for the next call, because the thread has ended.
            self._filled.put(filled)
            raise filled
        batch = filled.batch
        if batch is None:
            rows = filled.rows.to(self._device, non_blocking=True)
            batch = to_batch(rows, self._eot_id, self._masked)
            filled.sent()
        self._free.put(filled)
        return batch

    def _fill(self) -> None:
        step = 0
        try:
            while not self._closed.is_set():
                try:
                    buffer = self._free.get(timeout=0.1)
                except queue.Empty:
                    continue
                buffer.wait()
                n = self._order.take(self._start, step * self._global_batch + self._offsets)
                rows = buffer.rows.view(len(n), -1).numpy()
                self._sequences.gather(n, rows)
                check_ids(rows, n, self._sequences, self._vocab_size)
                if not self._pinned:
                    # Nothing is copied; the rows of a GPU are split on the GPU.
                    buffer.batch = to_batch(buffer.rows, self._eot_id, self._masked)
                self._filled.put(buffer)
                step += 1
        except BaseException as error:  # raised in the thread that trains
            self._filled.put(error)


class _Buffer:
    """Rows of one step in host memory ([A, B, L + 1] int64), pinned for a GPU."""

    def __init__(self, shape: tuple[int, ...], pinned: bool) -> None:
        self.rows = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
        self.batch: dict[str, Tensor] | None = None
        self._copied = torch.cuda.Event() if pinned else None

    def sent(self) -> None:
        """Mark that copies to the device are queued on the current stream."""
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Wait until the last copy to the device is done, before the rows are overwritten."""
        if self._copied is not None:
            self._copied.synchronize()
