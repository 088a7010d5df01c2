"""What to build in a folder, and whether the folder holds, or was begun with, exactly that."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunaris.atomic_files import sync_folder, write_durably
from lunaris.config.schema.data import PreparedDataConfig
from lunaris.data import manifest as manifests
from lunaris.data.prepare.chat import TEMPLATE
from lunaris.data.prepare.chunks import Source
from lunaris.errors import UserError
from lunaris.runs.preparation import BUNDLES, NOTE

# Raised when the same input and keys give other bytes.
_VERSION = 3


@dataclass(frozen=True)
class PrepareSpec:
    """What to build: the keys, the sources of documents, and a weight above 0 for each source.

    settings: everything that the shards' bytes depend on, as the manifest will hold it.
    """

    keys: PreparedDataConfig
    sources: Sequence[Source]
    weights: list[float]
    settings: dict[str, object]

    @property
    def folder(self) -> Path:
        """The folder to build."""
        return Path(self.keys.dir)

    @property
    def masked(self) -> bool:
        """Whether the shards get loss masks."""
        return "format" in self.settings


def settings_of(
    keys: PreparedDataConfig, sources: Sequence[Source], weights: list[float]
) -> dict[str, object]:
    """Return what the shards' bytes depend on: not `processes`, and not `on_error`."""
    tokenizer = tokenizer_file(keys.tokenizer) if keys.tokenizer else None
    settings: dict[str, object] = {
        "version": _VERSION,
        "tokenizer": keys.tokenizer,
        "tokenizer_sha256": manifests.sha256(tokenizer) if tokenizer else None,
        "eot": keys.eot,
        "vocab_size": keys.vocab_size,
        "sample_mb": keys.sample_mb,
        "shard_tokens": keys.shard_tokens,
        "val_fraction": keys.val_fraction,
        "seed": keys.seed,
        "on_exhausted": keys.on_exhausted,
        "sources": [
            {
                "name": source.name,
                "weight": weight,
                "input": hashlib.sha256(json.dumps(source.fingerprint()).encode()).hexdigest(),
            }
            for source, weight in zip(sources, weights, strict=True)
        ],
    }
    # Only here, so that folders without loss masks stay what they were.
    if getattr(keys, "format", "") == "chat":
        settings["format"] = f"chat, template {TEMPLATE}"
    return settings


def tokenizer_file(name: str) -> Path | None:
    """Return the file that `data.tokenizer` names, itself or by its folder; None if there is none.

    A tokenizer of the Hub has none.
    """
    path = Path(name).expanduser()
    path = path / manifests.TOKENIZER if path.is_dir() else path
    return path if path.is_file() else None


def read_note(spec: PrepareSpec) -> dict[str, Any]:
    """Return the last note of an unfinished preparation, or {} at its beginning.

    Raises UserError when the folder was begun with other settings, or holds something else.
    """
    folder = spec.folder
    work = folder / manifests.UNFINISHED
    path = work / NOTE
    if path.is_file():
        note: dict[str, Any] = json.loads(path.read_bytes())
        if "writers" in note or note["settings"] == spec.settings:
            manifests.require_same(folder, note["settings"], spec.settings)
            return note
        # No token is in a shard yet, so that other settings may start from the beginning.
        (folder / manifests.TOKENIZER).unlink(missing_ok=True)
        shutil.rmtree(work / BUNDLES, ignore_errors=True)
    elif not work.is_dir():
        foreign = [path for path in folder.iterdir() if path.name != ".lock"]
        if foreign:
            raise UserError(
                f"data.dir={folder}: holds {foreign[0].name} and no manifest.json; "
                "give an empty folder or a new one"
            )
        work.mkdir()
        sync_folder(folder)
    write_durably(path, json.dumps({"settings": spec.settings}).encode())
    return {}


def require_begun(spec: PrepareSpec) -> dict[str, Any]:
    """Return the last note of a preparation that another process began with the same settings.

    Raises UserError where it began with others, as when the input has changed since.
    """
    note: dict[str, Any] = json.loads((spec.folder / manifests.UNFINISHED / NOTE).read_bytes())
    manifests.require_same(spec.folder, note["settings"], spec.settings)
    return note
