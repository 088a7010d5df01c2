"""What a kind of data has in common whose shards we make ourselves: training reads its folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lunaris.atomic_files import FileInUse, file_lock
from lunaris.data.base import Sequences
from lunaris.data.shards import ShardsData
from lunaris.errors import UserError


class PreparedFolder:
    """A `Data` over one folder with a manifest; subclasses make the folder in `prepare`."""

    def __init__(self, folder: Path, *, verify: bool, document_masking: bool) -> None:
        self.folder = folder
        self._shards = ShardsData(dir=str(folder), verify=verify, document_masking=document_masking)

    def prepare(self) -> None:
        self._shards.prepare()

    @property
    def vocab_size(self) -> int:
        return self._shards.vocab_size

    @property
    def eot_id(self) -> int | None:
        return self._shards.eot_id

    @property
    def tokenizer_path(self) -> Path | None:
        return self._shards.tokenizer_path

    def digests(self) -> dict[str, str]:
        return self._shards.digests()

    def train(self, seq_len: int, seed: int) -> Sequences:
        return self._shards.train(seq_len, seed)

    def val(self, seq_len: int) -> dict[str, Sequences]:
        return self._shards.val(seq_len)


def cache_folder() -> Path:
    """Return where prepared data is kept: $LUNARIS_CACHE, or lunaris/ in the user's cache."""
    given = os.environ.get("LUNARIS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lunaris"


@contextmanager
def folder_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock file until the block or the process ends.

    wait: until another process releases it; else raise UserError that it is in use.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(path, wait=wait))
        except FileInUse as error:
            raise UserError(
                f"{path.parent}: another `lunaris prepare` is writing this folder"
            ) from error
        except OSError as error:
            raise UserError(
                f"data.dir={path.parent}: cannot be written: {error.strerror}"
            ) from error
        yield
