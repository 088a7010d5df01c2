"""One folder of `.npy` token shards: what it holds, and whether its files are intact. No torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from platform import node

import numpy as np

from lunaris.data import manifest as manifests
from lunaris.data.manifest import MASK, Manifest
from lunaris.data.token_stream import Shard
from lunaris.errors import UserError

_ALLOWED = "one-dimensional .npy files of uint16 or uint32 token ids"
# How many bytes of a folder without a manifest are read to find its largest id.
_SCAN_BYTES = 256 * 2**20
# Of a folder without a manifest: a vocabulary of more has too many weights for any model here.
_LARGEST_ID = 2**24 - 1
# How many bytes at either end of each shard enter the digest of a folder without a manifest.
_ENDS = 4096


@dataclass(frozen=True)
class ShardsInfo:
    """The contents of a folder of shards. `vocab_size` is the manifest's, else the largest id + 1.

    `exact` is false when the folder was too large to look at every id.
    """

    path: Path
    train: list[Shard]
    val: list[Shard]
    vocab_size: int
    exact: bool
    manifest: Manifest | None

    @property
    def n_tokens(self) -> int:
        """The number of tokens in the training shards."""
        return sum(shard.tokens for shard in self.train)

    def val_sources(self, least: int) -> dict[str | None, list[Shard]]:
        """Return the validation shards by source, or under None if the sources are not separate.

        Sources of fewer than `least` tokens are pooled under the name `rest`.
        """
        if self.manifest is None:
            return {None: self.val} if self.val else {}
        found: dict[str | None, list[Shard]] = {}
        for entry, shard in zip(self.manifest.shards.get("val", ()), self.val, strict=True):
            found.setdefault(entry.source, []).append(shard)
        small = [name for name, part in found.items() if sum(s.tokens for s in part) < least]
        if len(small) > 1:
            pooled = [shard for name in small for shard in found.pop(name)]
            found["rest" if "rest" not in found else "(rest)"] = pooled
        return found

    @property
    def eot_id(self) -> int | None:
        """The manifest's end-of-text id."""
        return self.manifest.eot_id if self.manifest else None

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder's `tokenizer.json`, if it has one."""
        path = self.path / manifests.TOKENIZER
        return path if path.is_file() else None

    def digest(self) -> str:
        """Return a digest (hex) of the training tokens in order without reading them all.

        It covers the checksums in the manifest; without a manifest, the type, the size and both
        ends of every shard.
        """
        found = hashlib.sha256()
        if self.manifest is not None:
            for entry in self.manifest.shards["train"]:
                found.update(f"{entry.tokens} {entry.sha256}\n".encode())
                if entry.mask_sha256 is not None:
                    found.update(f"mask {entry.mask_sha256}\n".encode())
            return found.hexdigest()
        for shard in self.train:
            size = shard.tokens * shard.dtype.itemsize
            found.update(f"{shard.tokens} {shard.dtype.str}\n".encode())
            with shard.path.open("rb") as file:
                for at in (0, max(0, size - _ENDS)):
                    file.seek(shard.offset + at)
                    found.update(file.read(min(_ENDS, size)))
        return found.hexdigest()


def inspect(folder: str | Path, key: str = "data.dir") -> ShardsInfo:
    """Return what the folder of shards given by the key `key` holds, from its files' headers.

    With a manifest, the files are compared with it (type, tokens, size, the tokenizer's hash).
    Without one, every `.npy` file is a training shard, except that files called `val*` are the
    validation part. Raises UserError naming the file, what was found and what is allowed.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{key}={folder}: no such folder of shards")
    manifest = manifests.read(path)
    if manifest is not None:
        return _inspect_manifest(path, manifest)
    if (path / manifests.UNFINISHED).is_dir():
        raise UserError(f"{key}={folder}: half prepared; run the same `lunaris prepare` again")
    files = sorted(path.glob("*.npy"))
    if not files:
        raise UserError(f"{key}={folder}: holds no .npy files; allowed are {_ALLOWED}")
    for file in files:
        if file.name.startswith(MASK) and file.with_name(file.name.removeprefix(MASK)) in files:
            raise UserError(f"{file}: a loss mask, but {manifests.NAME} is absent")
    shards = [read_header(file) for file in files]
    val = [s for s in shards if s.path.name.startswith("val")]
    train = [s for s in shards if not s.path.name.startswith("val")] or val
    largest, exact = _largest_id(shards)
    return ShardsInfo(path, train, val if train is not val else [], largest + 1, exact, None)


def verify(folder: str | Path) -> int:
    """Recompute the checksum of every shard in a folder's manifest; return how many there are.

    Raises UserError naming the first file that differs, or when there is no manifest.
    """
    info = inspect(folder)
    if info.manifest is None:
        raise UserError(f"data.dir={folder}: has no manifest.json to verify against")
    entries = [e for part in info.manifest.shards.values() for e in part]
    files = {entry.file: entry.sha256 for entry in entries}
    files |= {e.mask: e.mask_sha256 for e in entries if e.mask and e.mask_sha256}
    for file, expected in files.items():
        found = manifests.sha256(info.path / file)
        if found != expected:
            raise UserError(
                f"{info.path / file}: its contents changed: sha256 {found[:16]}…, "
                f"the manifest says {expected[:16]}…"
            )
    return len(entries)


def read_header(path: Path) -> Shard:
    """Return where a shard's tokens lie. Raises UserError unless it is complete and of integers."""
    npy = np.lib.format
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = npy.read_magic(file) == (1, 0)
            read = npy.read_array_header_1_0 if first else npy.read_array_header_2_0
            shape, _, dtype = read(file)
            offset = file.tell()
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        what = f"not a .npy file ({error})" if size else "empty file"
        raise UserError(f"{path}: {what}; allowed are {_ALLOWED}") from error
    if len(shape) != 1:
        raise UserError(f"{path}: has {len(shape)} dimensions {shape}; allowed are {_ALLOWED}")
    if dtype.kind not in "ui":
        raise UserError(f"{path}: holds {dtype}; allowed are {_ALLOWED}")
    (tokens,) = shape
    if isinstance(tokens, bool) or tokens < 0:
        raise UserError(f"{path}: its header says {tokens} tokens; allowed are {_ALLOWED}")
    if tokens == 0:
        raise UserError(f"{path}: holds no tokens")
    expected = offset + tokens * dtype.itemsize
    if size != expected:
        fault = "truncated" if size < expected else "has more than its tokens"
        raise UserError(
            f"{path}: {fault}: its header says {tokens} tokens of {dtype}, {expected} bytes, and "
            f"it has {size}"
        )
    return Shard(path, offset, tokens, dtype)


def require_size(shard: Shard) -> None:
    """Raise UserError unless a shard that another process has inspected is here as it was there."""
    expected = shard.offset + shard.tokens * shard.dtype.itemsize
    try:
        size = shard.path.stat().st_size
    except OSError as error:
        raise UserError(f"{shard.path}: cannot be read on {node()}: {error.strerror}") from error
    if size != expected:
        raise UserError(
            f"{shard.path}: has {size} bytes on {node()}, and {expected} where rank 0 runs; all "
            "processes must see the same shards"
        )


def _inspect_manifest(path: Path, manifest: Manifest) -> ShardsInfo:
    tokenizer = path / manifests.TOKENIZER
    if manifest.tokenizer_hash is not None:
        if not tokenizer.is_file():
            raise UserError(f"{tokenizer}: absent, but the manifest names it")
        found = manifests.sha256(tokenizer)
        if found != manifest.tokenizer_hash:
            raise UserError(
                f"{tokenizer}: not the tokenizer that the shards were made with: sha256 "
                f"{found[:16]}…, the manifest says {manifest.tokenizer_hash[:16]}…"
            )
    parts: dict[str, list[Shard]] = {"train": [], "val": []}
    for part, entries in manifest.shards.items():
        for entry in entries:
            shard = _named_shard(path / entry.file, entry.tokens, manifest.dtype)
            if entry.mask is not None:
                mask = _named_shard(path / entry.mask, entry.tokens, "uint8")
                shard = replace(shard, mask=mask)
            parts.setdefault(part, []).append(shard)
    if not parts["train"]:
        raise UserError(f"{path / manifests.NAME}: names no training shards")
    masks = [shard.mask is not None for shards in parts.values() for shard in shards]
    if any(masks) and not all(masks):
        raise UserError(
            f"{path / manifests.NAME}: some of its shards have a loss mask, others none"
        )
    return ShardsInfo(path, parts["train"], parts["val"], manifest.vocab_size, True, manifest)


def _named_shard(file: Path, tokens: int, dtype: str) -> Shard:
    """Return a shard that a manifest names. Raises UserError unless it is as the manifest says."""
    if not file.is_file():
        raise UserError(f"{file}: absent, but the manifest names it")
    shard = read_header(file)
    has, expected = f"{shard.tokens} tokens of {shard.dtype}", f"{tokens} tokens of {dtype}"
    if has != expected:
        raise UserError(f"{file}: holds {has}, the manifest says {expected}")
    return shard


def _largest_id(shards: list[Shard]) -> tuple[int, bool]:
    """Return the largest id in the first bytes of each shard, and whether those were all bytes."""
    share = max(1, _SCAN_BYTES // len(shards))
    largest, exact = 0, True
    for shard in shards:
        count = min(shard.tokens, max(1, share // shard.dtype.itemsize))
        exact &= count == shard.tokens
        tokens = np.fromfile(shard.path, shard.dtype, count, offset=shard.offset)
        if shard.dtype.kind == "i" and (least := int(tokens.min())) < 0:
            raise UserError(f"{shard.path}: holds the negative id {least}; allowed are {_ALLOWED}")
        found = int(tokens.max())
        if found > _LARGEST_ID:
            raise UserError(
                f"{shard.path}: holds the id {found} at position {int(tokens.argmax())}; without a "
                f"{manifests.NAME} the largest id is that of the vocabulary, at most {_LARGEST_ID}"
            )
        largest = max(largest, found)
    return largest, exact
