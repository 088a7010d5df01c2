"""The folders of shards that a config names, and what must hold between them. No torch.

Training and the check of a config on the login node both call `inspect_folders`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lunaris.config.messages import shown
from lunaris.config.schema.data import ShardsDataConfig
from lunaris.data import manifest as manifests
from lunaris.data.shard_folder import ShardsInfo, inspect
from lunaris.errors import UserError


@dataclass(frozen=True)
class ShardFolders:
    """Inspected folders that fit together: those of `data.dir` and those of `data.val_dir`."""

    train: list[ShardsInfo]
    val: list[ShardsInfo]
    weights: list[float] | None

    def check_vocab_size(self, key: str, size: int | None) -> None:
        """Raise UserError unless every id in the folders is below `size`, which `key` gives."""
        named = [("data.dir", i) for i in self.train] + [("data.val_dir", i) for i in self.val]
        for dir_key, info in named:
            if size is not None and size < info.vocab_size:
                raise UserError(
                    f"{key}={size}: must be at least {info.vocab_size}, for "
                    f"{dir_key}={info.path} holds token ids up to {info.vocab_size - 1}"
                )


def inspect_folders(keys: ShardsDataConfig) -> ShardFolders:
    """Inspect the folders that the keys of `data=shards` name.

    Raises UserError for a folder that cannot be read, for folders that do not fit together, and for
    keys that do not fit the folders. It reads no checksums (`data.verify`).
    """
    dirs = folder_list(keys.dir, "data.dir")
    val_dirs = [] if keys.val_dir is None else folder_list(keys.val_dir, "data.val_dir")
    weights = None if keys.weights is None else check_weights(keys.weights, dirs)
    val = [inspect(folder, "data.val_dir") for folder in val_dirs]
    found = ShardFolders([inspect(folder) for folder in dirs], val, weights)
    _check_tokenizers([*found.train, *found.val])
    found.check_vocab_size("data.vocab_size", keys.vocab_size)
    first = found.train[0]
    _check_eot(keys.eot_id, first)
    if keys.document_masking and keys.eot_id is None and first.eot_id is None:
        raise UserError(
            f"data.document_masking=true: needs data.eot_id, for data.dir={first.path} has no "
            "manifest that names the end-of-text id"
        )
    return found


def inspect_prepared(folder: str, *, document_masking: bool) -> ShardFolders:
    """Inspect a folder that `lunaris prepare` builds. Raises UserError when it is not finished."""
    require_prepared(Path(folder))
    return inspect_folders(ShardsDataConfig(dir=folder, document_masking=document_masking))


def require_prepared(folder: Path) -> None:
    """Raise UserError unless a folder has a manifest, which is the last file to be written."""
    if not (folder / manifests.NAME).is_file():
        raise UserError(
            f"data.dir={folder}: holds no prepared shards yet; run `lunaris prepare` with the "
            "same data overrides first"
        )


def short_names(infos: Sequence[ShardsInfo]) -> list[str]:
    """Return a short unique name for each folder: as many last parts of its path as it takes."""
    for depth in range(1, 20):
        short = ["/".join(info.path.resolve().parts[-depth:]) for info in infos]
        if len(set(short)) == len(short):
            return short
    return [f"{name}#{i}" for i, name in enumerate(short)]


def check_weights(weights: Sequence[float], folders: Sequence[str]) -> list[float]:
    """Return the weights of several folders. Raises UserError unless each has one above 0."""
    given = f"data.weights={shown(list(weights))}"
    if len(weights) != len(folders):
        raise UserError(
            f"{given}: must be one weight for each folder of data.dir={shown(list(folders))}"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"{given}: each must be a finite number above 0")
    return [float(weight) for weight in weights]


def folder_list(value: object, key: str) -> list[str]:
    """Return the folder or folders that a key gives, as a list. Raises UserError for other types.

    A folder called 2024 arrives as a number.
    """
    folders = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not folders:
        raise UserError(f"{key}=[]: at least one folder is needed")
    for folder in folders:
        if isinstance(folder, bool) or not isinstance(folder, str | Path | int):
            raise UserError(f"{key}={value}: must be a folder, or a list of folders")
    return [str(folder) for folder in folders]


def _check_tokenizers(infos: list[ShardsInfo]) -> None:
    """Raise UserError unless all folders that name a tokenizer name the same one."""
    hashes = [(i, i.manifest.tokenizer_hash) for i in infos if i.manifest]
    known = [(info, found) for info, found in hashes if found]
    for info, found in known[1:]:
        if found != known[0][1]:
            raise UserError(
                f"data.dir: {info.path} was made with another tokenizer than {known[0][0].path}; "
                "folders that are mixed must share one"
            )


def _check_eot(eot_id: int | None, info: ShardsInfo) -> None:
    """Raise UserError unless a given end-of-text id can be the one of a folder's documents."""
    if eot_id is None:
        return
    if info.eot_id is not None and eot_id != info.eot_id:
        raise UserError(f"data.eot_id={eot_id}: the manifest of {info.path} says {info.eot_id}")
    if info.exact and eot_id >= info.vocab_size:
        raise UserError(
            f"data.eot_id={eot_id}: {info.path} holds token ids up to {info.vocab_size - 1}"
        )
