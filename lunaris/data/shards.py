"""`data=shards`: training on one folder of `.npy` token shards, or on a mixture of several."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, TypeVar

from lunaris.config.schema.data import DataConfig, ShardsDataConfig
from lunaris.data.base import Sequences
from lunaris.data.folders import ShardFolders, inspect_folders, short_names
from lunaris.data.mixture import MixedSequences
from lunaris.data.shard_folder import ShardsInfo, require_size, verify
from lunaris.data.token_stream import StreamSequences, TokenStream
from lunaris.errors import UserError

_log = logging.getLogger(__name__)
Schema = TypeVar("Schema", bound=DataConfig)


def checked_keys(schema: type[Schema], keys: dict[str, Any]) -> Schema:
    """Return keys as the schema's dataclass, which checks them. Raises UserError for other keys."""
    try:
        return schema(**keys)
    except TypeError as error:
        raise UserError(f"data: its keys do not fit {schema.__name__}: {error}") from error


class ShardsData:
    """One folder of shards, or several that are mixed by weight."""

    def __init__(self, **keys: Any) -> None:
        """keys: of `ShardsDataConfig`. Nothing is read before `ensure_ready`."""
        self._shard_keys = checked_keys(ShardsDataConfig, keys)
        self._opened: ShardFolders | None = None

    def ensure_ready(self) -> None:
        """Inspect the folders, once. Raises UserError when they cannot be trained on."""
        if self._opened is not None:
            return
        found = inspect_folders(self._shard_keys)
        for info in [*found.train, *found.val] if self._shard_keys.verify else []:
            verify(info.path)
        self._opened = found

    @property
    def inspected(self) -> ShardFolders | None:
        """What `ensure_ready` found, or None before it."""
        return self._opened

    def take(self, found: ShardFolders) -> None:
        """Take what another process found in the same folders, instead of inspecting them.

        Raises UserError for a file that is not here, or has another size than there.
        """
        for info in [*found.train, *found.val]:
            for shard in [*info.train, *info.val]:
                for part in [shard] if shard.mask is None else [shard, shard.mask]:
                    require_size(part)
        self._opened = found

    @property
    def vocab_size(self) -> int:
        """`data.vocab_size`, else the manifest's, else the largest id + 1."""
        folders = self._folders
        found = max(info.vocab_size for info in [*folders.train, *folders.val])
        return found if self._shard_keys.vocab_size is None else self._shard_keys.vocab_size

    @property
    def eot_id(self) -> int | None:
        """`data.eot_id`, else the id that the manifest names."""
        given = self._shard_keys.eot_id
        return self._folders.train[0].eot_id if given is None else given

    @property
    def tokenizer_path(self) -> Path | None:
        """The first folder's `tokenizer.json`, if it has one."""
        return self._folders.train[0].tokenizer_path

    def digests(self) -> dict[str, str]:
        """Return the number of tokens trained on and a digest of them for each folder's name."""
        infos = self._folders.train
        found = [f"{info.n_tokens - self._tail(info)} {info.digest()}" for info in infos]
        return dict(zip(short_names(infos), found, strict=True))

    def train(self, seq_len: int, seed: int) -> Sequences:
        """Return the training part, shuffled by `seed`. Raises UserError when it is too short."""
        infos = self._folders.train
        parts = []
        for i, (name, info) in enumerate(zip(short_names(infos), infos, strict=True)):
            stream = TokenStream(info.train, 0, info.n_tokens - self._tail(info))
            # Each source has its own seed; that of a single folder is the run's seed itself.
            part = StreamSequences(stream, seq_len, seed + i, name)
            require_sequences(part, stream, seq_len, str(info.path))
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return MixedSequences(parts, self._folders.weights or [len(part) for part in parts], seed)

    def val(self, seq_len: int) -> dict[str, Sequences]:
        """Return each source's validation part in file order; {} when there is none."""
        separate = bool(self._folders.val)
        if not separate and self._shard_keys.val_fraction == 0:
            return {}
        infos = self._folders.val or self._folders.train
        streams: dict[str, TokenStream] = {}
        for name, info in zip(short_names(infos), infos, strict=True):
            for source, shards in info.val_sources(seq_len + 1).items():
                parts = [part for part in (name, source) if part is not None]
                streams["/".join(parts if len(infos) > 1 else parts[-1:])] = TokenStream(shards)
            if not info.val and separate:
                streams[name] = TokenStream(info.train)
            elif not info.val and (tail := self._tail(info)):
                streams[name] = TokenStream(info.train, info.n_tokens - tail)
        return val_sequences(streams, seq_len)

    @property
    def _folders(self) -> ShardFolders:
        assert self._opened is not None, "ensure_ready() comes first"
        return self._opened

    def _tail(self, info: ShardsInfo) -> int:
        """Return how many tokens at the end of the training shards are held out."""
        if info.val or info.manifest or self._folders.val:
            return 0
        return round(info.n_tokens * self._shard_keys.val_fraction)


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
    """Return the parts that hold a sequence, in file order; warn about the others."""
    parts: dict[str, Sequences] = {}
    for name, stream in streams.items():
        part = StreamSequences(stream, seq_len, None, name)
        if len(part):
            parts[name] = part
        elif len(stream):
            _log.warning("no validation on %s: its %d tokens make no sequence", name, len(stream))
    return parts
