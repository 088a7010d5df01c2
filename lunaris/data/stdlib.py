"""The source text of the running Python's standard library: a corpus that every machine has."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lunaris.data import manifest as manifests
from lunaris.data.manifest import Manifest, ShardEntry, SourceEntry
from lunaris.data.prepared import PreparedFolder, cache_folder, folder_lock
from lunaris.data.tokenizer import TextTokenizer, train_bpe
from lunaris.errors import UserError

# Not the library's own text: installed packages; and its tests, which are as long again.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
# Raised when the same files and keys give other tokens.
_VERSION = 1
_SAMPLE_BYTES = 8 * 2**20
_BATCH = 16


class StdlibData(PreparedFolder):
    """Byte-level BPE trained on the library's `.py` files, and shards of them, made on first use.

    Files are split into a training and a validation part by the hash of their names.
    """

    def __init__(
        self,
        *,
        dir: str | None = None,
        vocab_size: int = 2048,
        val_fraction: float = 0.05,
        document_masking: bool = False,
    ) -> None:
        """dir: where to keep the shards; None: a folder of the cache."""
        self._settings = settings(vocab_size, val_fraction)
        super().__init__(
            Path(dir) if dir else default_folder(vocab_size, val_fraction),
            verify=False,
            document_masking=document_masking,
        )

    def prepare(self) -> None:
        made = manifests.read(self.folder)
        if made is None:
            lock = self.folder.with_name(f".{self.folder.name}.lock")
            with folder_lock(lock, wait=True):
                made = manifests.read(self.folder)
                if made is None:
                    self._make()
        self._require_own(manifests.read(self.folder))
        super().prepare()

    def _require_own(self, made: Manifest | None) -> None:
        """Raise UserError when a given folder holds something else, or what other keys made."""
        found = {} if made is None else made.settings
        # Shards of another Python's library are as good: they are kept as they are.
        rows = [
            f"{key}: {found.get(key)} → {value}"
            for key, value in self._settings.items()
            if found.get(key) != value and (key != "python" or key not in found)
        ]
        if rows:
            raise UserError(
                f"data.dir={self.folder}: holds shards of another preparation; choose another "
                "folder or remove it. Differing:\n  " + "\n  ".join(rows)
            )

    def _make(self) -> None:
        """Build the folder beside and rename it, so that it is whole or absent."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                raise UserError(
                    f"data.dir={self.folder}: holds {path.name} and no manifest.json; give an "
                    "empty folder or a new one"
                )
        beside = self.folder.with_name(f".{self.folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        build(beside, self._settings)
        if self.folder.is_dir():
            # Only an empty folder can be taken over; rename fails on any other.
            self.folder.rmdir()
        beside.rename(self.folder)


def library_files() -> list[Path]:
    """Return the library's `.py` files in the order of their names relative to its root."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _LEFT_OUT]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def settings(vocab_size: int, val_fraction: float) -> dict[str, object]:
    """Return what the shards depend on, files apart."""
    return {
        "version": _VERSION,
        "python": platform.python_version(),
        "vocab_size": vocab_size,
        "val_fraction": val_fraction,
    }


def default_folder(vocab_size: int, val_fraction: float) -> Path:
    """Return the cache's folder for these keys and the library's files (their names and sizes)."""
    files = [(str(path), path.stat().st_size) for path in library_files()]
    key = json.dumps([settings(vocab_size, val_fraction), files])
    return cache_folder() / f"stdlib-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def is_held_out(name: str, fraction: float) -> bool:
    """Return whether a document of this name belongs to the validation part."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def build(folder: Path, asked: dict[str, object]) -> None:
    """Train the tokenizer and write shards and manifest into an empty folder, with progress."""
    from tqdm import tqdm

    root = Path(sysconfig.get_path("stdlib"))
    files = library_files()
    fraction = float(str(asked["val_fraction"]))
    path = folder / manifests.TOKENIZER
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, desc="standard library: tokenizer", unit="B", unit_scale=True) as bar:
        train_bpe(_sample(files), int(str(asked["vocab_size"])), path)
        tokenizer = TextTokenizer(path)
        end = np.array([tokenizer.eot_id], dtype=tokenizer.dtype)
        bar.set_description("standard library: tokens")
        for first in range(0, len(files), _BATCH):
            batch = files[first : first + _BATCH]
            documents = [file.read_bytes() for file in batch]
            for file, ids in zip(batch, tokenizer.encode(documents), strict=True):
                held_out = is_held_out(file.relative_to(root).as_posix(), fraction)
                parts["val" if held_out else "train"] += [ids, end]
            bar.update(sum(map(len, documents)))
    shards = {
        part: [_write(folder / f"{part}_00000.npy", np.concatenate(ids))]
        for part, ids in parts.items()
        if ids
    }
    tokens = sum(entry.tokens for entries in shards.values() for entry in entries)
    Manifest(
        tokenizer_hash=manifests.sha256(path),
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        dtype=str(tokenizer.dtype),
        shards=shards,
        sources=[SourceEntry("stdlib", 1.0, len(files), tokens, size)],
        settings=asked,
    ).write(folder)


def _write(path: Path, tokens: np.ndarray) -> ShardEntry:
    np.save(path, tokens)
    return ShardEntry(path.name, len(tokens), manifests.sha256(path))


def _sample(files: list[Path]) -> Iterator[str]:
    """Yield files' texts, evenly over all of them, up to the size that training needs."""
    size = sum(file.stat().st_size for file in files)
    step = max(1, -(-size // _SAMPLE_BYTES))
    for file in files[::step]:
        yield file.read_bytes().decode("utf-8", "replace")
