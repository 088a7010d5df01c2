"""From a unit of work to its documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from lunaris.data.extras import need
from lunaris.data.prepare.chunks import HEAD_BYTES, Unit
from lunaris.errors import did_you_mean

_SURROGATES = re.compile("([\ud800-\udc7f\udd00-\udfff]+)")
_BLOCK = 2**20


@dataclass(frozen=True)
class Document:
    """One document, or a piece of one: `head` are the document's first bytes, for its hash."""

    text: bytes
    head: bytes
    last: bool = True


@dataclass(frozen=True)
class Problem:
    """A document that cannot be read: its line (or row) within its unit, from 1, and why."""

    line: int
    message: str


@dataclass
class Reader:
    """Reads the documents of one unit; `lines` counts the lines or rows it went through."""

    unit: Unit
    text_key: str
    lines: int = 0

    def __iter__(self) -> Iterator[Document | Problem]:
        unit = self.unit
        try:
            yield from self._documents()
        except (OSError, ValueError) as error:  # pyarrow's are ValueErrors
            yield Problem(self.lines + 1, f"cannot be read on: {error}")
            if unit.kind == "text" and unit.start and unit.last:
                yield Document(b"", unit.head)
        if unit.problem:
            yield Problem(self.lines + 1, unit.problem)

    def _documents(self) -> Iterator[Document | Problem]:
        unit = self.unit
        if unit.kind == "documents":
            assert isinstance(unit.payload, list)
            for text in unit.payload:
                self.lines += 1
                yield Problem(self.lines, text) if isinstance(text, str) else whole(text)
        elif unit.kind == "parquet":
            yield from self._rows()
        elif unit.kind == "text":
            yield self._piece()
        else:
            parse = self._line if unit.kind == "lines" else self._json
            for line in _lines(unit):
                self.lines += 1
                document = parse(line)
                if document is not None:
                    yield document

    def _piece(self) -> Document:
        unit = self.unit
        if unit.payload is not None:
            assert isinstance(unit.payload, bytes)
            return Document(unit.payload, unit.head, unit.last)
        with open(unit.path, "rb") as file:
            head = unit.head or file.read(HEAD_BYTES)
            file.seek(unit.start)
            return Document(file.read(unit.stop - unit.start), head, unit.last)

    def _line(self, line: bytes) -> Document:
        return whole(line.removesuffix(b"\n"))

    def _json(self, line: bytes) -> Document | Problem | None:
        if self.lines == 1 and self.unit.start == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            return None
        try:
            # What is not UTF-8 stays what it is, as lone surrogates, and comes back as bytes.
            record = json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            return Problem(self.lines, f"not JSON: {error}")
        if not isinstance(record, dict):
            return Problem(self.lines, f"a JSON {type(record).__name__}, not an object")
        return to_document(record, self.text_key, self.lines)

    def _rows(self) -> Iterator[Document | Problem]:
        pyarrow = need("pyarrow", "Parquet")
        parquet = need("pyarrow.parquet", "Parquet")
        groups = list(range(self.unit.start, self.unit.stop))
        with parquet.ParquetFile(self.unit.path) as file:
            for batch in file.iter_batches(256, groups, [self.text_key]):
                column = batch.column(0)
                kind = column.type
                if pyarrow.types.is_string(kind):
                    column = column.cast(pyarrow.binary())
                elif pyarrow.types.is_large_string(kind):
                    column = column.cast(pyarrow.large_binary())
                for value in column.to_pylist():
                    self.lines += 1
                    yield whole_or_problem(value, self.text_key, self.lines)


def whole(text: bytes) -> Document:
    return Document(text, text[:HEAD_BYTES])


def to_document(record: dict[str, Any], key: str, line: int) -> Document | Problem:
    """Return the document that a record has under `key`, or why it has none."""
    if key not in record:
        hint = did_you_mean(key, record)
        return Problem(line, f"no key {key} (data.text_key) in {list(record)[:8]}{hint}")
    return whole_or_problem(record[key], key, line)


def whole_or_problem(value: object, key: str, line: int) -> Document | Problem:
    """Return the document that a record's value is, or why it is none."""
    if isinstance(value, str):
        return whole(to_bytes(value))
    if isinstance(value, bytes):
        return whole(value)
    return Problem(line, f"{key} is {'null' if value is None else type(value).__name__}, not text")


def to_bytes(text: str) -> bytes:
    """Return a text as UTF-8; lone surrogates as the bytes that they escape, or as they are."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return b"".join(
            part.encode("utf-8", "surrogatepass" if i % 2 else "surrogateescape")
            for i, part in enumerate(_SURROGATES.split(text))
        )


def _lines(unit: Unit) -> Iterator[bytes]:
    """Yield the lines that begin in a unit, with their line ends."""
    if unit.payload is not None:
        assert isinstance(unit.payload, bytes)
        yield from _split(unit.payload)
        return
    with open(unit.path, "rb") as file:
        at = unit.start
        if at:
            # Skip the line that began before, without holding it: it may be of any length.
            file.seek(at - 1)
            at += _skip_line(file, unit.stop - at + 1) - 1
        while at < unit.stop:
            line = file.readline()
            if not line:
                return
            at += len(line)
            yield line


def _split(payload: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(payload):
        end = payload.find(b"\n", at) + 1 or len(payload)
        yield payload[at:end]
        at = end


def _skip_line(file: IO[bytes], most: int) -> int:
    """Read to the end of a line or at least `most` bytes; return how many were read."""
    done = 0
    while done < most:
        block = file.readline(_BLOCK)
        done += len(block)
        if not block or block.endswith(b"\n"):
            break
    return done
