"""The folders of shards that a key names, and what must hold between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.errors import UserError

if TYPE_CHECKING:
    from lunaris.data.shards import ShardsInfo


def check_together(infos: list[ShardsInfo]) -> None:
    """Raise UserError unless all folders that name a tokenizer name the same one."""
    known = [i for i in infos if i.manifest and i.manifest.tokenizer_hash]
    for info in known[1:]:
        first, other = known[0].manifest, info.manifest
        assert first is not None and other is not None
        if first.tokenizer_hash != other.tokenizer_hash:
            raise UserError(
                f"data.dir: {info.path} was made with another tokenizer than {known[0].path}; "
                "folders that are mixed must share one"
            )


def check_eot(eot_id: int | None, info: ShardsInfo) -> None:
    """Raise UserError unless a given end-of-text id can be that of a folder's documents."""
    if eot_id is None:
        return
    if info.eot_id is not None and eot_id != info.eot_id:
        raise UserError(f"data.eot_id={eot_id}: the manifest of {info.path} says {info.eot_id}")
    if info.exact and eot_id >= info.vocab_size:
        raise UserError(
            f"data.eot_id={eot_id}: {info.path} holds token ids up to {info.vocab_size - 1}"
        )


def names(folders: list[str]) -> list[str]:
    """Return a short unlike name for each folder: its last part, or as much as tells it apart."""
    for depth in range(1, 20):
        short = ["/".join(Path(folder).resolve().parts[-depth:]) for folder in folders]
        if len(set(short)) == len(short):
            return short
    return [f"{name}#{i}" for i, name in enumerate(short)]


def check_weights(weights: Sequence[float], folders: Sequence[str]) -> list[float]:
    """Return the weights of several folders. Raises UserError unless each has one above 0."""
    if len(weights) != len(folders):
        raise UserError(
            f"data.weights={list(weights)}: {len(weights)} for {len(folders)} folders of data.dir"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"data.weights={list(weights)}: each must be a number above 0")
    return [float(weight) for weight in weights]


def folder_list(value: Any, key: str) -> list[str]:
    """Return the folders that a key gives, one or a list. Raises UserError for what is neither."""
    folders = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not folders:
        raise UserError(f"{key}=[]: at least one folder is needed")
    for folder in folders:
        # A folder called 2024 is read as a number.
        if isinstance(folder, bool) or not isinstance(folder, str | Path | int):
            raise UserError(f"{key}={value}: must be a folder, or a list of folders")
    return [str(folder) for folder in folders]
