"""Datasets of the Hugging Face Hub, streamed; needs the extra `hf`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lunaris.data.extras import need
from lunaris.data.prepare import chunks as units
from lunaris.data.prepare.chunks import Cursor, Source, Unit
from lunaris.data.prepare.readers import Problem, to_document
from lunaris.data.text import Preparable
from lunaris.errors import UserError, did_you_mean

# Bytes that a document takes in memory besides its own.
_OBJECT_BYTES = 64
# What a state raises that is not of this dataset, or of another version of the library.
_UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StopIteration,
          TypeError, ValueError)  # fmt: skip
_log = logging.getLogger(__name__)
_KEYS = ("path", "name", "split", "text_key", "data_files", "revision")


class HFData(Preparable):
    """Documents of datasets that `datasets.load_dataset` streams, from the Hub or a folder."""

    option = "hf"

    def __init__(
        self, *, datasets: Any, split: str = "train", text_key: str = "text", **keys: Any
    ) -> None:
        """datasets: a dataset's path, a list of them, or source name -> path or map of `_KEYS`."""
        super().__init__(**keys)
        self._datasets, self._split, self._text_key = datasets, split, text_key

    def sources(self) -> list[Source]:
        need("datasets", "data=hf")
        return [self._source(name, what) for name, what in named(self._datasets).items()]

    def _source(self, name: str, what: Any) -> Source:
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
        text_key = keys.pop("text_key", self._text_key)
        return HFSource(name, {"split": self._split} | keys, text_key)


def named(datasets: Any) -> dict[str, Any]:
    """Return source name -> what it is. Raises UserError when there is none."""
    if isinstance(datasets, str):
        datasets = [datasets]
    if not isinstance(datasets, list | dict | None):
        raise UserError(
            f"data.datasets={datasets}: must be a path, a list of paths, or a map of source name "
            "to path"
        )
    if isinstance(datasets, dict):
        # One dataset may be given by its keys alone.
        found = {"hf": datasets} if "path" in datasets else datasets
    else:
        found = {str(path): path for path in datasets or []}
    if not found:
        raise UserError("data.datasets: at least one dataset is needed")
    return {str(name): what for name, what in found.items()}


@dataclass
class HFSource:
    """One streamed dataset. keys: of `datasets.load_dataset`."""

    name: str
    keys: dict[str, Any]
    text_key: str
    size: int = 0  # not known before it is read
    _dataset: Any = field(default=None, repr=False)

    def units(self, index: int, cursor: Cursor) -> Iterator[Unit]:
        payload: list[bytes | str] = []
        at, held = cursor.start, 0
        place, full, problem = None, False, ""
        if self._dataset is None:
            self._dataset = self._load()
        rows = self._rows(cursor)
        while True:
            try:
                row = next(rows, None)
            except UserError:
                raise
            except ValueError as error:  # pyarrow's are, for what is no JSON or no Parquet
                row, problem = None, f"cannot be read on: {type(error).__name__}: {error}"
            except Exception as error:  # the network's, of many kinds
                raise UserError(
                    f"data.datasets.{self.name}: {self.keys['path']} cannot be read on after "
                    f"{at + len(payload)} documents: {type(error).__name__}: {error}; the same "
                    "command goes on"
                ) from error
            if row is None:
                break
            payload.append(_content(row, self.text_key))
            held += len(payload[-1]) if isinstance(payload[-1], bytes) else 0
            if full:
                after = place and {"state": place, "last": _digest(payload[-1])}
                yield replace(self._unit(index, at, payload, held), after=after)
                at, payload, held, full = at + len(payload), [], 0, False
            elif held + len(payload) * _OBJECT_BYTES >= units.UNIT_BYTES:
                # Of one document before the unit ends: by that one a later start knows it again.
                place, full = self._place(), True
        if payload or problem:
            yield replace(self._unit(index, at, payload, held), problem=problem)

    def sample(self, budget: int) -> Iterator[Unit]:
        for unit in self.units(0, Cursor()):
            yield unit
            budget -= unit.size
            if budget <= 0:
                return

    def fingerprint(self) -> list[Any]:
        path = Path(self.keys["path"])
        # Of a dataset in a folder here, what would be read; one of the Hub is known by its name.
        files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
        stats = [(file, file.stat()) for file in files if file.is_file()]
        return [self.keys, self.text_key, [[str(f), s.st_size, s.st_mtime_ns] for f, s in stats]]

    def _unit(self, index: int, at: int, payload: list[bytes | str], held: int) -> Unit:
        path, stop = f"{self.keys['path']}[{self.keys['split']}]", at + len(payload)
        return Unit(index, Cursor(0, at), path, "documents", stop, held, payload, last=False)

    def _rows(self, cursor: Cursor) -> Iterator[Any]:
        """Yield the rows from a cursor on; the dataset is loaded."""
        rows = None if cursor.place is None else self._rows_at(cursor.place)
        if rows is None:
            if cursor.place is not None:
                _log.warning("%s: is read from its beginning again, to find its place", self.name)
                self._dataset = self._load()
            rows = islice(self._dataset, cursor.start, None)
        yield from rows

    def _rows_at(self, place: Any) -> Iterator[Any] | None:
        """Return the rows after a noted place, or None where the library does not find it.

        Raises what the network does: it is no reason to read all again.
        """
        try:
            self._dataset.load_state_dict(place["state"])
            rows: Iterator[Any] = iter(self._dataset)
            found = _digest(_content(next(rows), self.text_key))
        except _UNFIT as error:
            _log.debug("%s: %r", self.name, error)
            return None
        return rows if found == place["last"] else None

    def _place(self) -> Any:
        """Return the stream's own state, for JSON, or None where it keeps none."""
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
        if columns is not None and self.text_key not in columns:
            raise UserError(
                f"data.text_key={self.text_key}: {self.keys['path']} has no such column; it has "
                f"{', '.join(columns)}{did_you_mean(self.text_key, columns)}"
            )
        if columns is not None:
            dataset = dataset.select_columns([self.text_key])
        return dataset


def _content(row: Any, text_key: str) -> bytes | str:
    """Return a row's document, or why it has none."""
    document = to_document(row, text_key, 1)
    return document.message if isinstance(document, Problem) else document.text


def _digest(content: bytes | str) -> str:
    kind, data = ("problem", content.encode()) if isinstance(content, str) else ("text", content)
    return f"{kind} {hashlib.blake2b(data, digest_size=16).hexdigest()}"
