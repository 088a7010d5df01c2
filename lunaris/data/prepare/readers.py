"""Reading the documents of a chunk."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lunaris.data.prepare.chat import pieces_of
from lunaris.data.prepare.chunks import HEAD_BYTES, Chunk
from lunaris.errors import did_you_mean, need

_SURROGATES = re.compile("([\ud800-\udc7f\udd00-\udfff]+)")
_BLOCK = 2**20


@dataclass(frozen=True)
class Document:
    """One document, or a piece of one. head: the document's first bytes, which are hashed.

    last: whether the document ends here. pieces: the text in parts, each with whether it carries
    loss; empty where all of it does.
    """

    text: bytes
    head: bytes
    last: bool = True
    pieces: tuple[tuple[bytes, bool], ...] = ()


@dataclass(frozen=True)
class Problem:
    """A document that cannot be read: its line (or row) within its chunk, from 1, and why."""

    line: int
    message: str


@dataclass
class Reader:
    """Reads the documents of one chunk; `lines` counts the lines or rows read so far."""

    chunk: Chunk
    text_key: str
    lines: int = 0

    def __iter__(self) -> Iterator[Document | Problem]:
        chunk = self.chunk
        try:
            yield from self._documents()
        except (OSError, ValueError) as error:  # pyarrow's are ValueErrors
            yield Problem(self.lines + 1, f"cannot be read further: {error}")
            if chunk.kind == "text" and chunk.start and chunk.last:
                yield Document(b"", chunk.head)
        if chunk.problem:
            yield Problem(self.lines + 1, chunk.problem)

    def _documents(self) -> Iterator[Document | Problem]:
        chunk = self.chunk
        if chunk.kind == "documents":
            assert isinstance(chunk.payload, list)
            for text in chunk.payload:
                self.lines += 1
                yield Problem(self.lines, text) if isinstance(text, str) else complete(text)
        elif chunk.kind == "parquet":
            yield from self._rows()
        elif chunk.kind == "text":
            yield self._piece()
        else:
            for line in _lines(chunk):
                self.lines += 1
                if chunk.kind == "lines":
                    yield complete(line.removesuffix(b"\n"))
                elif document := self._json(line):
                    yield document

    def _piece(self) -> Document:
        chunk = self.chunk
        if chunk.payload is not None:
            assert isinstance(chunk.payload, bytes)
            return Document(chunk.payload, chunk.head, chunk.last)
        with open(chunk.path, "rb") as file:
            head = chunk.head or file.read(HEAD_BYTES)
            file.seek(chunk.start)
            return Document(file.read(chunk.stop - chunk.start), head, chunk.last)

    def _json(self, line: bytes) -> Document | Problem | None:
        if self.lines == 1 and self.chunk.start == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            return None
        try:
            # Bytes that are not UTF-8 become lone surrogates here and the same bytes later.
            record = json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            return Problem(self.lines, f"not JSON: {error}")
        if not isinstance(record, dict):
            return Problem(self.lines, f"a JSON {type(record).__name__}, not an object")
        if self.chunk.kind == "chat":
            return _to_chat(record, self.lines)
        return to_document(record, self.text_key, self.lines)

    def _rows(self) -> Iterator[Document | Problem]:
        pyarrow = need("pyarrow", "Parquet")
        parquet = need("pyarrow.parquet", "Parquet")
        groups = list(range(self.chunk.start, self.chunk.stop))
        with parquet.ParquetFile(self.chunk.path) as file:
            for batch in file.iter_batches(256, groups, [self.text_key]):
                column = batch.column(0)
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(
                    column.type
                ):
                    column = column.cast(pyarrow.large_binary())
                for value in column.to_pylist():
                    self.lines += 1
                    yield value_to_document(value, self.text_key, self.lines)


def complete(text: bytes) -> Document:
    """Return a text as one document."""
    return Document(text, text[:HEAD_BYTES])


def to_document(record: dict[str, object], key: str, line: int) -> Document | Problem:
    """Return the document under `key` of a record, or why there is none."""
    if key not in record:
        hint = did_you_mean(key, record)
        return Problem(line, f"no key {key} (data.text_key) in {list(record)[:8]}{hint}")
    return value_to_document(record[key], key, line)


def _to_chat(record: dict[str, object], line: int) -> Document | Problem:
    """Return the document of a conversation or a prompt, or why there is none."""
    found = pieces_of(record)
    if isinstance(found, str):
        return Problem(line, found)
    pieces = tuple((to_bytes(text), loss) for text, loss in found)
    return replace(complete(b"".join(text for text, _ in pieces)), pieces=pieces)


def value_to_document(value: object, key: str, line: int) -> Document | Problem:
    """Return a record's value as a document, or why it is not a text."""
    if isinstance(value, str):
        return complete(to_bytes(value))
    if isinstance(value, bytes):
        return complete(value)
    return Problem(line, f"{key} is {'null' if value is None else type(value).__name__}, not text")


def to_bytes(text: str) -> bytes:
    """Return a text as UTF-8; lone surrogates as the bytes they escape, or as surrogates."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return b"".join(
            part.encode("utf-8", "surrogatepass" if i % 2 else "surrogateescape")
            for i, part in enumerate(_SURROGATES.split(text))
        )


def _lines(chunk: Chunk) -> Iterator[bytes]:
    """Yield the lines that begin in a chunk, with their line ends."""
    if chunk.payload is not None:
        assert isinstance(chunk.payload, bytes)
        yield from io.BytesIO(chunk.payload)
        return
    with open(chunk.path, "rb") as file:
        if chunk.start:
            # Skip the line that began earlier without loading it, because it may be of any length.
            file.seek(chunk.start - 1)
            while (block := file.readline(_BLOCK)) and file.tell() < chunk.stop:
                if block.endswith(b"\n"):
                    break
        at = file.tell()
        while at < chunk.stop and (line := file.readline()):
            at += len(line)
            yield line
