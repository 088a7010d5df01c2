"""The work of one process: a chunk's documents become tokens in two files."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import IO, Any

import numpy as np

from lunaris.data import manifest as manifests
from lunaris.data.prepare.chunks import Chunk
from lunaris.data.prepare.readers import Document, Problem, Reader
from lunaris.data.prepare.shard_writer import masked_dtype
from lunaris.data.prepare.spec import PrepareSpec
from lunaris.data.text_split import PIECE_BYTES
from lunaris.data.tokenizer import TextTokenizer

# What is said where the pool of an `executor` breaks.
LOST_WORKER = (
    "a prepare worker was killed (out of memory?); run the same command to continue, or lower "
    "data.processes"
)
_PARALLELISM = "TOKENIZERS_PARALLELISM"
PARTS = ("train", "val")
# Bytes of text encoded at once: enough to be fast, little enough to take little memory.
_BATCH_BYTES = 16 * PIECE_BYTES


@dataclass(frozen=True)
class Job:
    """What a worker process needs for every chunk."""

    tokenizer: Path
    eot: str | None
    text_keys: tuple[str, ...]  # one a source
    val_fraction: float
    seed: int
    folder: Path  # of the chunks' token files
    masked: bool = False  # whether the files hold a loss mask too, as records of `masked_dtype`

    @classmethod
    def of(cls, spec: PrepareSpec, folder: Path) -> Job:
        """Return the job of a preparation whose tokenizer is there; folder: as above."""
        return cls(
            spec.folder / manifests.TOKENIZER,
            spec.keys.eot,
            tuple(source.text_key for source in spec.sources),
            spec.keys.val_fraction,
            spec.keys.seed,
            folder,
            masked=spec.masked,
        )


@dataclass(frozen=True)
class Span:
    """A range of a file's bytes."""

    path: Path
    offset: int
    size: int


@dataclass
class Encoded:
    """The result for one chunk. Its tokens are in `KEY.train` and `KEY.val`, in document order.

    lengths: [D] int64, tokens of each document with its end of text. held_out: [D] bool. open:
    whether the last document continues in the next chunk. text_bytes: of all documents. lines: how
    many lines or rows were read. spans: where the tokens of each part are, if in no files of their
    own.
    """

    lengths: np.ndarray
    held_out: np.ndarray
    open: bool
    text_bytes: int
    lines: int
    problems: list[Problem] = field(default_factory=list)
    spans: dict[str, Span] | None = None


def chunk_path(folder: Path, chunk: Chunk, part: str) -> Path:
    """Return the file of a chunk's tokens of one part, which exists until they are in a shard."""
    key = f"{chunk.source}-{chunk.cursor.file}-{chunk.cursor.start}"
    return folder / f"{key}.{part}"


def read_tokens(
    folder: Path, chunk: Chunk, encoded: Encoded, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Return the tokens of an encoded chunk by part, each [n] of `dtype`; folder: of its files."""
    if encoded.spans is None:
        return {part: np.fromfile(chunk_path(folder, chunk, part), dtype) for part in PARTS}
    return {
        part: np.fromfile(span.path, dtype, span.size // dtype.itemsize, offset=span.offset)
        for part, span in encoded.spans.items()
    }


def is_held_out(head: bytes, fraction: float, seed: int | None = None) -> bool:
    """Return whether the document that begins with `head` belongs to the validation part.

    The hash of the content decides, so that duplicates land in the same part. seed: its key.
    """
    key = b"" if seed is None else seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(head, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


class Encoder:
    """Encodes chunks with one tokenizer."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer = TextTokenizer(job.tokenizer, job.eot)
        self._end = np.array([self._tokenizer.eot_id], dtype=self._tokenizer.dtype)
        self._dtype = masked_dtype(self._end.dtype)

    def __call__(self, chunk: Chunk) -> Encoded:
        """Write a chunk's tokens, atomically, and return what they are."""
        job = self._job
        reader = Reader(chunk, job.text_keys[chunk.source])
        out = Encoded(np.empty(0, np.int64), np.empty(0, bool), False, 0, 0)
        lengths: list[int] = []
        held_out: list[bool] = []
        paths = [chunk_path(job.folder, chunk, part) for part in PARTS]
        temporary = [path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in paths]
        with temporary[0].open("wb") as train, temporary[1].open("wb") as val:
            for batch in _batches(reader, out.problems):
                for document, ids in zip(batch, self._encode(batch), strict=True):
                    held = chunk.held_out
                    if held is None:
                        held = is_held_out(document.head, job.val_fraction, job.seed)
                    lengths.append(self._write(val if held else train, ids, document.last))
                    held_out.append(held)
                    out.text_bytes += len(document.text)
                    out.open = not document.last
        for source, target in zip(temporary, paths, strict=True):
            source.replace(target)
        out.lengths, out.held_out = np.array(lengths, np.int64), np.array(held_out, bool)
        out.lines = reader.lines
        return out

    def _encode(self, batch: list[Document]) -> list[np.ndarray]:
        """Return the tokens of each document; with a loss mask, [tokens + 1] of `masked_dtype`."""
        if not self._job.masked:
            return self._tokenizer.encode([document.text for document in batch])
        pieces = [document.pieces or ((document.text, True),) for document in batch]
        encoded = iter(self._tokenizer.encode([text for part in pieces for text, _ in part]))
        return [self._records([(next(encoded), loss) for _, loss in part]) for part in pieces]

    def _records(self, parts: list[tuple[np.ndarray, bool]]) -> np.ndarray:
        """Return the parts' tokens and an end of text, which carries loss if the last part does."""
        parts.append((self._end, parts[-1][1]))
        records = np.empty(sum(len(ids) for ids, _ in parts), dtype=self._dtype)
        records["token"] = np.concatenate([ids for ids, _ in parts])
        records["loss"] = np.repeat([loss for _, loss in parts], [len(ids) for ids, _ in parts])
        return records

    def _write(self, file: IO[bytes], ids: np.ndarray, last: bool) -> int:
        file.write(ids.tobytes())
        if not last or self._job.masked:  # Records end with their end of text.
            return len(ids)
        file.write(self._end.tobytes())
        return len(ids) + 1


def _batches(
    documents: Iterable[Document | Problem], problems: list[Problem]
) -> Iterator[list[Document]]:
    """Yield documents in groups of about `_BATCH_BYTES`; append the problems to `problems`."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if isinstance(document, Problem):
            problems.append(document)
            continue
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def executor(processes: int, job: Job) -> Executor:
    """Return an executor that runs `encode_chunk` in so many processes; 1 means this process."""
    if processes == 1:
        return _Inline(job)
    return ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_process,
        initargs=(job,),
    )


def encode_chunk(chunk: Chunk) -> Encoded:
    """Encode a chunk in a process of an `executor`."""
    assert _encoder is not None
    return _encoder(chunk)


_encoder: Encoder | None = None


def _start_process(job: Job) -> None:
    """Set up a worker process: one thread, no interrupts, and an exit when its parent ends."""
    global _encoder
    os.environ[_PARALLELISM] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = Encoder(job)


def _exit_with_parent() -> None:
    # A killed parent cannot stop its workers, which would wait for work for ever.
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class _Inline(Executor):
    """Runs a submitted call immediately in this process, with a single-threaded tokenizer."""

    def __init__(self, job: Job) -> None:
        global _encoder
        self._parallelism = os.environ.get(_PARALLELISM)
        os.environ[_PARALLELISM] = "false"
        _encoder = Encoder(job)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._parallelism is None:
            os.environ.pop(_PARALLELISM, None)
        else:
            os.environ[_PARALLELISM] = self._parallelism
