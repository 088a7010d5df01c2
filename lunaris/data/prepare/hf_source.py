"""Datasets of the Hugging Face Hub as sources of documents, streamed; needs the extra `hf`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lunaris.data.prepare import chunks as sizes
from lunaris.data.prepare.chunks import Chunk, Cursor
from lunaris.data.prepare.readers import Problem, to_document
from lunaris.errors import UserError, did_you_mean, need

# Bytes that a document takes in memory besides its own.
_OBJECT_BYTES = 64
# What the library raises for a state of another dataset, or of another version of the library.
_UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StopIteration,
          TypeError, ValueError)  # fmt: skip
_KEYS = ("path", "name", "split", "text_key", "data_files", "revision")
_log = logging.getLogger(__name__)
Row = dict[str, object]


def hf_sources(datasets: object, *, split: str, text_key: str) -> list[HFSource]:
    """Return the sources of `data.datasets`: a path, a list, or source name -> path or `_KEYS`.

    split, text_key: of a dataset that names none. Raises UserError when there is no dataset, for a
    map of other keys, and without the extra `hf`.
    """
    need("datasets", "data=hf")
    if isinstance(datasets, str):
        datasets = [datasets]
    if not isinstance(datasets, list | dict | None):
        raise UserError(
            f"data.datasets={datasets}: must be a path, a list of paths, or a map of source name "
            "to path"
        )
    if not isinstance(datasets, dict):
        datasets = {path: path for path in datasets or []}
    elif "path" in datasets:  # a single dataset may be given by its keys alone
        datasets = {"hf": datasets}
    if not datasets:
        raise UserError("data.datasets: at least one dataset is needed")
    return [_source(str(name), what, split, text_key) for name, what in datasets.items()]


def _source(name: str, what: object, split: str, text_key: str) -> HFSource:
    if not isinstance(what, str | dict):
        raise UserError(
            f"data.datasets.{name}={what}: must be a path, like owner/name, or a map of "
            f"{', '.join(_KEYS)}"
        )
    keys = {"path": what} if isinstance(what, str) else dict(what)
    for key in keys:
        if key not in _KEYS:
            raise UserError(
                f"data.datasets.{name}.{key}: no such key; allowed are {', '.join(_KEYS)}"
                f"{did_you_mean(str(key), _KEYS)}"
            )
    if not isinstance(keys.get("path"), str):
        raise UserError(f"data.datasets.{name}: needs a path, like owner/name")
    text_key = keys.pop("text_key", text_key)
    return HFSource(name, {"split": split} | keys, text_key)


@dataclass
class HFSource:
    """One streamed dataset. keys: arguments of `datasets.load_dataset`."""

    name: str
    keys: dict[str, Any]
    text_key: str
    size: int = 0  # unknown before it is read
    _dataset: Any = field(default=None, repr=False)

    def chunks(self, cursor: Cursor) -> Iterator[Chunk]:
        """Yield the chunks from `cursor` on, which carry their documents."""
        payload: list[bytes | str] = []
        at, held = cursor.start, 0
        place, full = None, False
        if self._dataset is None:
            self._dataset = self._load()
        rows = self._rows(cursor)
        while True:
            row, problem = self._next_row(rows, at + len(payload))
            if row is None:
                break
            payload.append(_content(row, self.text_key))
            held += len(payload[-1]) if isinstance(payload[-1], bytes) else 0
            if full:
                after = {"state": place, "last": _digest(payload[-1])} if place else None
                yield replace(self._chunk(at, payload, held), after=after)
                at, payload, held, full = at + len(payload), [], 0, False
            elif held + len(payload) * _OBJECT_BYTES >= sizes.CHUNK_BYTES:
                # One document before the chunk ends; a later start recognises the place by it.
                place, full = self._place(), True
        if payload or problem:
            yield replace(self._chunk(at, payload, held), problem=problem)

    def sample(self, budget: int) -> Iterator[Chunk]:
        """Return the dataset's first chunks, about `budget` bytes."""
        return sizes.up_to(budget, self.chunks(Cursor()))

    def fingerprint(self) -> list[object]:
        """Return the keys; for a dataset in a local folder, each file's path, size and time too."""
        path = Path(self.keys["path"])
        files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
        stats = [(file, file.stat()) for file in files if file.is_file()]
        return [self.keys, self.text_key, [[str(f), s.st_size, s.st_mtime_ns] for f, s in stats]]

    def _chunk(self, at: int, payload: list[bytes | str], held: int) -> Chunk:
        path, stop = f"{self.keys['path']}[{self.keys['split']}]", at + len(payload)
        return Chunk(Cursor(0, at), path, "documents", stop, held, payload, last=False)

    def _next_row(self, rows: Iterator[Row], done: int) -> tuple[Row | None, str]:
        """Return the next row, None at the end, and why the rest cannot be read.

        done: how many documents were read. Raises UserError when the network fails.
        """
        try:
            return next(rows, None), ""
        except UserError:
            raise
        except ValueError as error:  # pyarrow raises it for broken JSON or Parquet
            return None, f"cannot be read further: {type(error).__name__}: {error}"
        except Exception as error:  # the network raises many kinds
            raise UserError(
                f"data.datasets.{self.name}: {self.keys['path']} cannot be read further after "
                f"{done} documents: {type(error).__name__}: {error}; run the same command to "
                "continue"
            ) from error

    def _rows(self, cursor: Cursor) -> Iterator[Row]:
        """Yield the rows from a cursor on; the dataset is loaded."""
        rows = None if cursor.place is None else self._rows_at(cursor.place)
        if rows is None:
            if cursor.place is not None:
                _log.warning("%s: is read again from its beginning, to find its place", self.name)
                self._dataset = self._load()
            rows = islice(self._dataset, cursor.start, None)
        yield from rows

    def _rows_at(self, place: dict[str, object]) -> Iterator[Row] | None:
        """Return the rows after a noted place, or None when the library does not find it.

        Raises what the network raises, which is no reason to read all rows again.
        """
        try:
            self._dataset.load_state_dict(place["state"])
            rows: Iterator[Row] = iter(self._dataset)
            found = _digest(_content(next(rows), self.text_key))
        except _UNFIT as error:
            _log.debug("%s: %r", self.name, error)
            return None
        return rows if found == place["last"] else None

    def _place(self) -> object:
        """Return the stream's state, which JSON can hold, or None if it has none."""
        try:
            return json.loads(json.dumps(self._dataset.state_dict()))
        except _UNFIT:
            return None

    def _load(self) -> Any:
        datasets = need("datasets", "data=hf")
        keys = {key: value for key, value in self.keys.items() if value is not None}
        try:
            dataset = datasets.load_dataset(**keys, streaming=True)
        except Exception as error:  # the library raises many kinds
            raise UserError(
                f"data.datasets.{self.name}: {self.keys['path']} cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        columns = dataset.column_names
        if columns is not None:
            sizes.require_column(self.text_key, columns, self.keys["path"])
            dataset = dataset.select_columns([self.text_key])
        return dataset


def _content(row: Row, text_key: str) -> bytes | str:
    """Return a row's document, or why it has none, as a str."""
    document = to_document(row, text_key, 1)
    return document.message if isinstance(document, Problem) else document.text


def _digest(content: bytes | str) -> str:
    kind, data = ("problem", content.encode()) if isinstance(content, str) else ("text", content)
    return f"{kind} {hashlib.blake2b(data, digest_size=16).hexdigest()}"
