"""What a preparation is asked for, and whether a folder holds, or was begun with, just that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunaris.atomic_files import sync_folder, write_durably
from lunaris.data import manifest as manifests
from lunaris.data.prepare.chunks import Source
from lunaris.errors import UserError

# Raised when the same input and keys give other bytes.
_VERSION = 3


@dataclass(frozen=True)
class Recipe:
    """What to make of the sources: the keys of the `data` group that decide the bytes, and others.

    weights: one a source. processes and on_error do not change what is written of sound documents.
    """

    folder: Path
    tokenizer: str | None
    eot: str | None
    vocab_size: int
    sample_mb: int
    shard_tokens: int
    val_fraction: float
    seed: int
    on_exhausted: str
    processes: int
    on_error: str


def settings_of(recipe: Recipe, sources: Sequence[Source], weights: list[float]) -> dict[str, Any]:
    """Return what the shards' bytes depend on, for JSON."""
    return {
        "version": _VERSION,
        "tokenizer": recipe.tokenizer,
        "tokenizer_sha256": _sha256_of(recipe.tokenizer),
        "eot": recipe.eot,
        "vocab_size": recipe.vocab_size,
        "sample_mb": recipe.sample_mb,
        "shard_tokens": recipe.shard_tokens,
        "val_fraction": recipe.val_fraction,
        "seed": recipe.seed,
        "on_exhausted": recipe.on_exhausted,
        "sources": [
            {
                "name": source.name,
                "weight": weight,
                "input": hashlib.sha256(json.dumps(source.fingerprint()).encode()).hexdigest(),
            }
            for source, weight in zip(sources, weights, strict=True)
        ],
    }


def _sha256_of(tokenizer: str | None) -> str | None:
    """Return the sha256 of a tokenizer that is a file here; one of the Hub has its name only."""
    if tokenizer is None:
        return None
    path = Path(tokenizer).expanduser()
    path = path / manifests.TOKENIZER if path.is_dir() else path
    return manifests.sha256(path) if path.is_file() else None


def require_same(folder: Path, made: dict[str, Any], asked: dict[str, Any]) -> None:
    if made == asked:
        return
    rows = [
        f"data.{key}: {made.get(key)} → {asked.get(key)}"
        for key in sorted(made.keys() | asked.keys())
        if made.get(key) != asked.get(key) and key != "sources"
    ]
    if made.get("sources") != asked["sources"]:
        rows.append(
            "the input: other files, files that changed, another data.format or data.text_key, "
            "or other weights"
        )
    raise UserError(
        f"data.dir={folder}: holds shards of another preparation; choose another folder or "
        "remove it. Differing:\n  " + "\n  ".join(rows)
    )


def read_note(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the last note of an unfinished preparation, or {} at its beginning."""
    work = folder / manifests.UNFINISHED
    path = work / "note.json"
    if path.is_file():
        note: dict[str, Any] = json.loads(path.read_bytes())
        if "writers" in note or note["settings"] == asked:
            require_same(folder, note["settings"], asked)
            return note
        # Nothing is written yet that a change of mind would spoil.
        (folder / manifests.TOKENIZER).unlink(missing_ok=True)
    elif not work.is_dir():
        foreign = [path for path in folder.iterdir() if path.name != ".lock"]
        if foreign:
            raise UserError(
                f"data.dir={folder}: holds {foreign[0].name} and no manifest.json; "
                "give an empty folder or a new one"
            )
        work.mkdir()
        sync_folder(folder)
    write_durably(path, json.dumps({"settings": asked}).encode())
    return {}
