"""Chunks of work: bounded parts of the input, cut at the same places whoever works on them.

A plain file is cut by bytes without reading it, Parquet by row groups. What must be read from its
beginning (a compressed file, a stream of documents) is cut as it is read, and its chunks carry
their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lunaris.data.prepare.decompress import CompressedFile, is_compressed
from lunaris.data.text_split import cut
from lunaris.errors import UserError, did_you_mean, need

# The size that chunks aim at, in bytes of input.
CHUNK_BYTES = 4 * 2**20
# How many of a document's first bytes are hashed to decide whether it is held out for validation.
HEAD_BYTES = 2**16
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Cursor:
    """Where a chunk begins: the file of the source, and bytes, row groups or documents within it.

    place: the source's own note of that point (`Chunk.after`), which JSON can hold, or None.
    """

    file: int = 0
    start: int = 0
    place: dict[str, object] | None = None


@dataclass(frozen=True)
class Chunk:
    """A part of one file of a source, which one worker turns into tokens.

    kind: text (a piece of one document), lines, jsonl, chat, parquet or documents. stop: where it
    ends, in bytes (decompressed), row groups or documents. size: how many bytes of the source's
    `size` it accounts for. payload: its bytes, or its documents (bytes, or a str that says why one
    is missing); None when the worker reads the file itself.
    """

    cursor: Cursor
    path: str
    kind: str
    stop: int
    size: int
    payload: bytes | list[bytes | str] | None = None
    # The first bytes of a text's only document, when several chunks or a payload hold it.
    head: bytes = b""
    # Whether the file ends here, and with it a text's only document.
    last: bool = True
    # Why what follows these documents cannot be read.
    problem: str = ""
    # The note by which a source that is read from its beginning finds `stop` again sooner.
    after: dict[str, object] | None = None
    # Whether its documents are held out for validation; None: the hash of each one's head decides.
    held_out: bool | None = None
    # The place of its source among the sources.
    source: int = 0

    @property
    def start(self) -> int:
        """Where it begins, in the same chunk as `stop`."""
        return self.cursor.start


class Source(Protocol):
    """A named series of documents that can be cut into chunks from the beginning of any chunk."""

    name: str
    size: int  # the bytes of all its input, or 0 when that is unknown
    text_key: str  # the key of the text in the records that its chunks' readers parse

    def chunks(self, cursor: Cursor) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on."""

    def sample(self, budget: int) -> Iterator[Chunk]:
        """Yield chunks of about `budget` bytes together, from all over the source."""

    def fingerprint(self) -> list[object]:
        """Return what distinguishes this input from another; JSON can hold it."""


def kind_of(path: Path, format: str) -> str:
    """Return what a file holds, by `format` or, for auto, by its name."""
    if format != "auto":
        return format
    plain = path.with_suffix("") if is_compressed(path) else path
    return _KINDS.get(plain.suffix.lower(), "text")


def range_chunks(i: int, path: Path, kind: str, at: int, size: int) -> Iterator[Chunk]:
    """Yield byte ranges of a plain file, the i-th of its source; a text is cut where words begin.

    A line belongs to the range that it begins in, so that ranges of lines are made without reading
    the file.
    """
    head = b""
    if kind == "text" and size > CHUNK_BYTES:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    last = False
    while not last:
        # A text is cut a little before a multiple of CHUNK_BYTES.
        stop = min((-(-at // CHUNK_BYTES) + 1) * CHUNK_BYTES, size)
        if kind == "text":
            stop = cut_before(path, stop, size, CHUNK_BYTES)
        last = stop >= size
        yield Chunk(Cursor(i, at), str(path), kind, stop, stop - at, head=head, last=last)
        at = stop


def cut_before(path: Path, at: int, size: int, chunk_bytes: int) -> int:
    """Return where to cut a text: at white space or a character at `at` or a little before it."""
    if at <= 0 or at >= size:
        return min(max(at, 0), size)
    reach = min(HEAD_BYTES, chunk_bytes // 2)
    with path.open("rb") as file:
        file.seek(max(0, at - reach))
        window = file.read(min(at, reach) + 1)
    return at - (len(window) - 1) + cut(window)


def stream_chunks(i: int, path: Path, kind: str, at: int) -> Iterator[Chunk]:
    """Yield chunks that carry their bytes, from a compressed file read from its beginning.

    A corrupt file is read as far as possible, and its last chunk says what is wrong.
    """
    with CompressedFile(path) as stream:
        head = stream.skip(at, HEAD_BYTES)
        counted = stream.raw.tell() if at else 0
        last = False
        while not last:
            stream.fill(CHUNK_BYTES)
            pending = stream.pending
            head = head or bytes(pending[:HEAD_BYTES])
            if stream.ended and len(pending) <= CHUNK_BYTES:
                end = len(pending)
            elif kind == "text":
                begin = CHUNK_BYTES - min(HEAD_BYTES, CHUNK_BYTES // 2)
                end = begin + cut(bytes(pending[begin : CHUNK_BYTES + 1]))
            else:
                end = stream.line_end(CHUNK_BYTES)
            last = stream.ended and end == len(pending)
            part = bytes(pending[:end])
            del pending[:end]
            now = stream.raw.tell()
            # A file that gave nothing has no document at all, not an empty one.
            corrupt = last and stream.problem
            if corrupt and kind != "text":
                part = part[: part.rfind(b"\n") + 1]
            yield Chunk(
                Cursor(i, at),
                str(path),
                "lines" if corrupt and not head else kind,
                at + end,
                now - counted,
                payload=part,
                head=head if kind == "text" else b"",
                last=last,
                problem=stream.problem if last else "",
            )
            at, counted = at + end, now


def parquet_chunks(i: int, path: Path, first: int, text_key: str, size: int) -> Iterator[Chunk]:
    """Yield runs of row groups, from `first` on, that hold about a chunk of text.

    Raises UserError when the file has no column `text_key`.
    """
    parquet = need("pyarrow.parquet", f"{path}: Parquet")
    with parquet.ParquetFile(path) as file:
        metadata = file.metadata
        columns = file.schema_arrow.names
    require_column(text_key, columns, path)
    groups = metadata.num_row_groups
    paths = [metadata.schema.column(k).path for k in range(metadata.num_columns)]
    column = paths.index(text_key)
    held = 0
    for group in range(first, groups):
        held += metadata.row_group(group).column(column).total_uncompressed_size
        if held >= CHUNK_BYTES or group == groups - 1:
            stop, last = group + 1, group == groups - 1
            share = size * stop // groups - size * first // groups
            yield Chunk(Cursor(i, first), str(path), "parquet", stop, share, last=last)
            first, held = stop, 0


def require_column(text_key: str, columns: list[str], where: object) -> None:
    """Raise UserError unless the columns of the file or dataset `where` include `text_key`."""
    if text_key not in columns:
        raise UserError(
            f"data.text_key={text_key}: {where} has no such column; it has "
            f"{', '.join(columns)}{did_you_mean(text_key, columns)}"
        )


def up_to(budget: int, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yield chunks until they account for `budget` bytes."""
    for chunk in chunks:
        yield chunk
        budget -= chunk.size
        if budget <= 0:
            return
