"""Writing shards of a fixed number of tokens, so that a killed writer can be continued."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lunaris.atomic_files import sync_folder
from lunaris.data.manifest import MASK, ShardEntry, sha256

_HEADER_BYTES = 128


class ShardWriter:
    """Appends tokens to `PART_00000.npy`, `PART_00001.npy`, …, all but the last of one size.

    The shard being written is `PART_NNNNN.npy.part`. `state()` makes what was appended durable and
    returns what a later writer needs to continue exactly there.
    """

    def __init__(
        self,
        folder: Path,
        part: str,
        dtype: np.dtype,
        shard_tokens: int,
        state: dict[str, Any] | None = None,
        *,
        keep_open: bool = True,
    ) -> None:
        """state: of an earlier writer; whatever it appended after that state is dropped.

        shard_tokens: tokens a shard. keep_open: keep the file open between appends; with false,
        there can be more writers than the process may open files.
        """
        self._folder, self._part = folder, part
        self.dtype, self._shard_tokens = dtype, shard_tokens
        state = state or {"entries": [], "tokens": 0}
        self.entries = [ShardEntry(**entry) for entry in state["entries"]]
        self._tokens: int = state["tokens"]
        self._file: io.BufferedRandom | None = None
        self._keep_open = keep_open
        self._durable = True
        self._reopen()

    def append(self, tokens: np.ndarray) -> None:
        """Append tokens ([n] of `dtype`)."""
        done = 0
        while done < len(tokens):
            taken = tokens[done : done + self._shard_tokens - self._tokens]
            self._open().write(taken.data)
            self._durable = False
            self._tokens += len(taken)
            done += len(taken)
            if self._tokens == self._shard_tokens:
                self._finish_shard()
        if not self._keep_open:
            self.close()

    def state(self) -> dict[str, Any]:
        """Make what was appended durable; return the shards and tokens so far, for JSON."""
        if not self._durable:
            file = self._open()
            file.flush()
            os.fsync(file.fileno())
            self._durable = True
            if not self._keep_open:
                self.close()
        return {"entries": [asdict(entry) for entry in self.entries], "tokens": self._tokens}

    def finish(self) -> list[ShardEntry]:
        """Finish the last shard, which may be shorter, and return all of them."""
        if self._tokens:
            self._finish_shard()
        return self.entries

    def close(self) -> None:
        """Close the open file without finishing the shard."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _open(self) -> io.BufferedRandom:
        """Return the file of the shard being written, at its end."""
        if self._file is None and self._tokens:
            self._file = self._unfinished().open("r+b")
            self._file.seek(0, os.SEEK_END)
        elif self._file is None:
            self._file = self._unfinished().open("w+b")
            self._file.write(bytes(_HEADER_BYTES))
        return self._file

    def _path(self, index: int) -> Path:
        return self._folder / f"{self._part}_{index:05d}.npy"

    def _unfinished(self) -> Path:
        path = self._path(len(self.entries))
        return path.with_name(f"{path.name}.part")

    def _reopen(self) -> None:
        """Put the files back into the condition that the state describes."""
        current = self._path(len(self.entries))
        # The shard may have been finished after the state was taken.
        if current.is_file():
            current.replace(self._unfinished())
        for path in sorted(self._folder.glob(f"{self._part}_*.npy*")):
            index = int(path.name.removeprefix(f"{self._part}_").partition(".")[0])
            if index > len(self.entries) or (index == len(self.entries) and not self._tokens):
                path.unlink()
        if self._tokens:
            with self._unfinished().open("r+b") as file:
                file.truncate(_HEADER_BYTES + self._tokens * self.dtype.itemsize)

    def _finish_shard(self) -> None:
        file = self._open()
        file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self._tokens,)}
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == _HEADER_BYTES
        file.flush()
        os.fsync(file.fileno())
        self.close()
        self._durable = True
        path = self._path(len(self.entries))
        self._unfinished().replace(path)
        sync_folder(self._folder)
        self.entries.append(ShardEntry(path.name, self._tokens, sha256(path)))
        self._tokens = 0


def masked_dtype(dtype: np.dtype) -> np.dtype:
    """Return the type of a token with its loss mask: `token` of `dtype`, `loss` uint8."""
    return np.dtype([("token", dtype), ("loss", np.uint8)])


class MaskedShardWriter:
    """Writes shards of tokens, and next to each a shard of their loss mask: `mask_PART_NNNNN.npy`.

    A `ShardWriter` of records of `masked_dtype`.
    """

    def __init__(
        self,
        folder: Path,
        part: str,
        dtype: np.dtype,
        shard_tokens: int,
        state: dict[str, Any] | None = None,
        *,
        keep_open: bool = True,
    ) -> None:
        """dtype: of the tokens; the other arguments as of `ShardWriter`."""
        state = state or {}
        self.dtype = masked_dtype(dtype)
        self._fields = {
            "token": ShardWriter(
                folder, part, dtype, shard_tokens, state.get("token"), keep_open=keep_open
            ),
            "loss": ShardWriter(
                folder,
                f"{MASK}{part}",
                np.dtype(np.uint8),
                shard_tokens,
                state.get("loss"),
                keep_open=keep_open,
            ),
        }

    def append(self, tokens: np.ndarray) -> None:
        """Append records ([n] of `dtype`)."""
        for name, writer in self._fields.items():
            writer.append(np.ascontiguousarray(tokens[name]))

    def state(self) -> dict[str, Any]:
        """Make what was appended durable; return what a later writer continues from, for JSON."""
        return {name: writer.state() for name, writer in self._fields.items()}

    def finish(self) -> list[ShardEntry]:
        """Finish the last shards and return the entries of all, with their masks."""
        entries, masks = (writer.finish() for writer in self._fields.values())
        return [
            replace(entry, mask=mask.file, mask_sha256=mask.sha256)
            for entry, mask in zip(entries, masks, strict=True)
        ]

    def close(self) -> None:
        """Close the open files without finishing the shards."""
        close_all(self._fields.values())


def close_all(writers: Iterable[ShardWriter | MaskedShardWriter]) -> None:
    """Close every writer, also where one cannot write what it holds, then raise its OSError."""
    with ExitStack() as closing:
        for writer in writers:
            closing.callback(writer.close)
