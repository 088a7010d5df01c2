"""`manifest.json`, the description of a folder of shards that was prepared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lunaris.atomic_files import write_durably
from lunaris.errors import UserError
from lunaris.runs.preparation import WORK

NAME = "manifest.json"
TOKENIZER = "tokenizer.json"
# The subfolder of an unfinished preparation.
UNFINISHED = WORK
# What the names of the shards of loss masks begin with.
MASK = "mask_"
_FORMAT = 1
# The types of tokens that `lunaris prepare` writes.
_TYPES = ("uint16", "uint32")


@dataclass
class ShardEntry:
    """One shard: its file name in the folder, how many tokens it holds, the sha256 of the file.

    source: the source of its validation documents, when each of several has separate shards. mask:
    the shard of its loss mask ([tokens] uint8, 0 where a token as a target carries no loss) and
    mask_sha256 the sha256 of that file; both absent in a folder without masks.
    """

    file: str
    tokens: int
    sha256: str
    source: str | None = None
    mask: str | None = None
    mask_sha256: str | None = None

    def as_json(self) -> dict[str, object]:
        """Return the entry for the manifest; one without a mask as before masks existed."""
        found = asdict(self)
        return found if self.mask is not None else _without(found, "mask", "mask_sha256")


@dataclass
class SourceEntry:
    """One source of documents: its share in the interleaving and what was taken of it."""

    name: str
    weight: float
    documents: int
    tokens: int
    bytes: int
    skipped: int = 0


@dataclass
class Manifest:
    """How shards were made. `shards` maps train and val to entries in order."""

    tokenizer_hash: str | None
    vocab_size: int
    eot_id: int | None
    dtype: str
    shards: dict[str, list[ShardEntry]]
    sources: list[SourceEntry] = field(default_factory=list)
    # What the shards' bytes depend on; preparing the folder with other settings is refused.
    settings: dict[str, object] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest; the last step of a preparation."""
        shards = {part: [e.as_json() for e in entries] for part, entries in self.shards.items()}
        text = json.dumps({"format": _FORMAT, **asdict(self), "shards": shards}, indent=2) + "\n"
        write_durably(folder / NAME, text.encode())


def _without(found: dict[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in found.items() if key not in keys}


def read(folder: Path) -> Manifest | None:
    """Return the folder's manifest, or None if it has none. Raises UserError for a corrupt one."""
    path = folder / NAME
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    try:
        if raw.pop("format") != _FORMAT:
            raise UserError(f"{path}: written by another version of lunaris; prepare it again")
        raw["shards"] = {k: [ShardEntry(**e) for e in v] for k, v in raw["shards"].items()}
        if not all(isinstance(e.source, str | None) for e in raw["shards"].get("val", ())):
            raise TypeError("a shard's source is not a name")
        if any(
            (e.mask is None) != (e.mask_sha256 is None) for v in raw["shards"].values() for e in v
        ):
            raise TypeError("a shard has a mask without its sha256, or the other way round")
        raw["sources"] = [SourceEntry(**e) for e in raw.get("sources", [])]
        found = Manifest(**raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest of shards ({error!r})") from error
    fault = _fault(found)
    if fault is not None:
        raise UserError(f"{path}: {fault}")
    return found


def _fault(found: Manifest) -> str | None:
    """Return which field of a manifest has a value that no preparation writes, or None."""
    size, eot, tokenizer = found.vocab_size, found.eot_id, found.tokenizer_hash
    if type(size) is not int or not 1 <= size <= 2**32:
        return f"vocab_size={size!r}: must be a whole number, 1 to {2**32}"
    if eot is not None and (type(eot) is not int or not 0 <= eot < size):
        return f"eot_id={eot!r}: must be an id of the vocabulary, 0 to {size - 1}, or null"
    if not isinstance(tokenizer, str | None):
        return f"tokenizer_hash={tokenizer!r}: must be a sha256 in hex, or null"
    if found.dtype not in _TYPES:
        return f"dtype={found.dtype!r}: allowed are {', '.join(_TYPES)}"
    if unknown := found.shards.keys() - {"train", "val"}:
        return f"shards.{min(unknown)}: no such part; allowed are train, val"
    if not isinstance(found.settings, dict):
        return f"settings={found.settings!r}: must be keys with values"
    seen: set[str] = set()
    for part, entries in found.shards.items():
        for i, entry in enumerate(entries):
            fault = _entry_fault(entry, seen)
            if fault is not None:
                return f"shards.{part}[{i}].{fault}"
    return None


def _entry_fault(entry: ShardEntry, seen: set[str]) -> str | None:
    """Return the fault of one shard's entry, or None; seen: the files so far, which it joins."""
    if type(entry.tokens) is not int or entry.tokens < 1:
        return f"tokens={entry.tokens!r}: must be a whole number, at least 1"
    files = {"file": entry.file} | ({} if entry.mask is None else {"mask": entry.mask})
    for key, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".npy"):
            return f"{key}={file!r}: must be the name of a .npy file in the folder"
        if file in seen:
            return f"{key}={file}: is listed twice"
        seen.add(file)
    for key, value in (("sha256", entry.sha256), ("mask_sha256", entry.mask_sha256)):
        if not isinstance(value, str) and (key == "sha256" or value is not None):
            return f"{key}={value!r}: must be a sha256 in hex"
    return None


def require_same(folder: Path, made: dict[str, object], asked: dict[str, object]) -> None:
    """Raise UserError with the differences unless a folder was made with the settings asked for."""
    rows = [
        f"data.{key}: {made.get(key)} → {asked.get(key)}"
        for key in sorted(made.keys() | asked.keys())
        if made.get(key) != asked.get(key) and key != "sources"
    ]
    if made.get("sources") != asked.get("sources"):
        rows.append(
            "the input: other files, files that changed, another data.format or data.text_key, "
            "or other weights"
        )
    if rows:
        raise UserError(
            f"data.dir={folder}: holds shards that other settings made; choose another folder or "
            "remove it. Differing:\n  " + "\n  ".join(rows)
        )


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
