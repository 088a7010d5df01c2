"""Folders of `.npy` token shards: what they hold, whether they are sound, and training on them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lunaris.data import manifest as manifests
from lunaris.data.base import Sequences
from lunaris.data.folders import check_eot, check_together, check_weights, folder_list, names
from lunaris.data.manifest import Manifest
from lunaris.data.mixture import MixedSequences
from lunaris.data.token_stream import Shard, StreamSequences, TokenStream
from lunaris.errors import UserError

_ALLOWED = "one-dimensional .npy files of uint16 or uint32 token ids"
# Bytes of a folder without a manifest that are read to find its largest id.
_SCAN_BYTES = 256 * 2**20
# Bytes at either end of such a folder's shards that its digest is made of.
_ENDS = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardsInfo:
    """What a folder of shards holds. `vocab_size` is the manifest's, else the largest id + 1.

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
        return sum(shard.tokens for shard in self.train)

    @property
    def n_val_tokens(self) -> int:
        return sum(shard.tokens for shard in self.val)

    def val_sources(self, least: int) -> dict[str | None, list[Shard]]:
        """Return the validation shards of each source; under None where they are not told apart.

        Sources of fewer than `least` tokens are taken together, as `rest`.
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
        return self.manifest.eot_id if self.manifest else None

    @property
    def tokenizer_path(self) -> Path | None:
        path = self.path / manifests.TOKENIZER
        return path if path.is_file() else None

    def digest(self) -> str:
        """Return a digest (hex) of the training tokens in order, without reading them all.

        With a manifest, of its checksums; without one, of every shard's type, size and both ends.
        """
        found = hashlib.sha256()
        if self.manifest is not None:
            for entry in self.manifest.shards["train"]:
                found.update(f"{entry.tokens} {entry.sha256}\n".encode())
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
    """Look at a folder of shards, given as `key`, without reading it through.

    With a manifest, files are compared with it (type, tokens, size; the tokenizer's hash). Without
    one, every `.npy` file is a training shard, but those called `val*` are the validation part.
    Raises UserError naming the file, what was found and what is allowed.
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
    for entry in entries:
        found = manifests.sha256(info.path / entry.file)
        if found != entry.sha256:
            raise UserError(
                f"{info.path / entry.file}: its contents changed: sha256 {found[:16]}…, "
                f"the manifest says {entry.sha256[:16]}…"
            )
    return len(entries)


def read_header(path: Path) -> Shard:
    """Return where a shard's tokens lie. Raises UserError unless it is whole and of integers."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size == 0:
                raise UserError(f"{path}: empty file; allowed are {_ALLOWED}")
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
            offset = file.tell()
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not a .npy file ({error}); allowed are {_ALLOWED}") from error
    if len(shape) != 1:
        raise UserError(f"{path}: has {len(shape)} dimensions {shape}; allowed are {_ALLOWED}")
    if dtype.kind not in "ui":
        raise UserError(f"{path}: holds {dtype}; allowed are {_ALLOWED}")
    (tokens,) = shape
    if tokens == 0:
        raise UserError(f"{path}: holds no tokens")
    if size < offset + tokens * dtype.itemsize:
        raise UserError(
            f"{path}: truncated: its header says {tokens} tokens of {dtype}, "
            f"{offset + tokens * dtype.itemsize} bytes, and it has {size}"
        )
    return Shard(path, offset, tokens, dtype)


def _inspect_manifest(path: Path, manifest: Manifest) -> ShardsInfo:
    tokenizer = path / manifests.TOKENIZER
    if manifest.tokenizer_hash is not None:
        if not tokenizer.is_file():
            raise UserError(f"{tokenizer}: absent, but the manifest names it")
        found = manifests.sha256(tokenizer)
        if found != manifest.tokenizer_hash:
            raise UserError(
                f"{tokenizer}: another tokenizer than the shards were made with: sha256 "
                f"{found[:16]}…, the manifest says {manifest.tokenizer_hash[:16]}…"
            )
    parts: dict[str, list[Shard]] = {"train": [], "val": []}
    for part, entries in manifest.shards.items():
        for entry in entries:
            file = path / entry.file
            if not file.is_file():
                raise UserError(f"{file}: absent, but the manifest names it")
            shard = read_header(file)
            has = f"{shard.tokens} tokens of {shard.dtype}"
            said = f"{entry.tokens} tokens of {manifest.dtype}"
            if has != said:
                raise UserError(f"{file}: holds {has}, the manifest says {said}")
            parts.setdefault(part, []).append(shard)
    if not parts["train"]:
        raise UserError(f"{path / manifests.NAME}: names no training shards")
    return ShardsInfo(path, parts["train"], parts["val"], manifest.vocab_size, True, manifest)


def _largest_id(shards: list[Shard]) -> tuple[int, bool]:
    """Return the largest id of the shards' beginnings, and whether that was all of them."""
    share = max(1, _SCAN_BYTES // len(shards))
    largest, exact = 0, True
    for shard in shards:
        count = min(shard.tokens, max(1, share // shard.dtype.itemsize))
        exact &= count == shard.tokens
        tokens = np.memmap(shard.path, shard.dtype, "r", shard.offset, (shard.tokens,))[:count]
        if shard.dtype.kind == "i" and (least := int(tokens.min())) < 0:
            raise UserError(f"{shard.path}: holds the negative id {least}; allowed are {_ALLOWED}")
        largest = max(largest, int(tokens.max()))
    return largest, exact


class ShardsData:
    """One folder of shards, or several that are mixed by weight."""

    def __init__(
        self,
        *,
        dir: str | Sequence[str],
        val_dir: str | Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        val_fraction: float = 0.01,
        vocab_size: int | None = None,
        eot_id: int | None = None,
        verify: bool = False,
        document_masking: bool = False,
    ) -> None:
        """Keys of the `data` group; nothing is read before `prepare`."""
        self._dirs = folder_list(dir, "data.dir")
        self._val_dirs = None if val_dir is None else folder_list(val_dir, "data.val_dir")
        self._weights = None if weights is None else check_weights(weights, self._dirs)
        self._val_fraction = val_fraction
        self._given_vocab_size = vocab_size
        self._given_eot_id = eot_id
        self._verify = verify
        self._document_masking = document_masking
        self._infos: list[ShardsInfo] = []
        self._val_infos: list[ShardsInfo] = []

    def prepare(self) -> None:
        if self._infos:
            return
        if self._verify:
            for folder in [*self._dirs, *(self._val_dirs or [])]:
                verify(folder)
        self._val_infos = [inspect(folder, "data.val_dir") for folder in self._val_dirs or []]
        self._infos = [inspect(folder) for folder in self._dirs]
        check_together([*self._infos, *self._val_infos])
        check_eot(self._given_eot_id, self._infos[0])
        if self._document_masking and self.eot_id is None:
            raise UserError(
                "data.document_masking=true: needs data.eot_id, for "
                f"{self._dirs[0]} has no manifest that names the end-of-text id"
            )

    @property
    def vocab_size(self) -> int:
        found = max(info.vocab_size for info in [*self._infos, *self._val_infos])
        given = self._given_vocab_size
        if given is not None and given < found:
            raise UserError(f"data.vocab_size={given}: the shards hold ids up to {found - 1}")
        return found if given is None else given

    @property
    def eot_id(self) -> int | None:
        found = self._infos[0].eot_id
        return found if self._given_eot_id is None else self._given_eot_id

    @property
    def tokenizer_path(self) -> Path | None:
        return self._infos[0].tokenizer_path

    def digests(self) -> dict[str, str]:
        found = [f"{info.n_tokens - self._tail(info)} {info.digest()}" for info in self._infos]
        return dict(zip(names(self._dirs), found, strict=True))

    def train(self, seq_len: int, seed: int) -> Sequences:
        parts = []
        for i, (name, info) in enumerate(zip(names(self._dirs), self._infos, strict=True)):
            stream = TokenStream(info.train, 0, info.n_tokens - self._tail(info))
            # Each source has its own order; one folder alone is seeded by the run's seed itself.
            part = StreamSequences(stream, seq_len, seed + i, name)
            require_sequences(part, stream, seq_len, str(info.path))
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return MixedSequences(parts, self._weights or [len(part) for part in parts], seed)

    def val(self, seq_len: int) -> dict[str, Sequences]:
        dirs, infos = self._dirs, self._infos
        apart = self._val_dirs is not None
        if self._val_dirs is not None:
            dirs, infos = self._val_dirs, self._val_infos
        elif self._val_fraction == 0:
            return {}
        streams: dict[str, TokenStream] = {}
        for name, info in zip(names(dirs), infos, strict=True):
            for source, shards in info.val_sources(seq_len + 1).items():
                parts = [part for part in (name, source) if part is not None]
                streams["/".join(parts if len(dirs) > 1 else parts[-1:])] = TokenStream(shards)
            if not info.val and apart:
                streams[name] = TokenStream(info.train)
            elif not info.val and (tail := self._tail(info)):
                streams[name] = TokenStream(info.train, info.n_tokens - tail)
        return val_sequences(streams, seq_len)

    def _tail(self, info: ShardsInfo) -> int:
        """Return how many tokens at the end of the training shards are held out."""
        own = info.val or info.manifest or self._val_dirs is not None
        return 0 if own else round(info.n_tokens * self._val_fraction)


def require_sequences(
    part: StreamSequences, stream: TokenStream, seq_len: int, folder: str
) -> None:
    """Raise UserError unless a training part holds at least one sequence."""
    if len(part) == 0:
        raise UserError(
            f"data.dir={folder}: {len(stream)} training tokens, fewer than one sequence of "
            f"model.max_seq_len={seq_len} and its last target"
        )


def val_sequences(streams: dict[str, TokenStream], seq_len: int) -> dict[str, Sequences]:
    """Return the parts that hold a sequence, in file order; say which one is too short."""
    parts: dict[str, Sequences] = {}
    for name, stream in streams.items():
        part = StreamSequences(stream, seq_len, None, name)
        if len(part):
            parts[name] = part
        elif len(stream):
            _log.warning("no validation on %s: its %d tokens make no sequence", name, len(stream))
    return parts
