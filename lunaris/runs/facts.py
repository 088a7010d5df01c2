"""What every checkpoint repeats of its run, so that a damaged folder cannot mislead a resume.

`run.json` within a checkpoint holds the frozen config, the fingerprint of the data and the hash of
the tokenizer. Its size and CRC-32 are in the checkpoint's `files.json`. Checkpoints of older
versions have none. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.atomic_files import read_json

if TYPE_CHECKING:
    from lunaris.config.schema.root import Config
    from lunaris.runs.run_dir import RunDir

NAME = "run.json"
_STEP = re.compile(r"step_\d+")


@dataclass(frozen=True)
class Facts:
    """The content of a `run.json`.

    path: of the file. config: the content of config.yaml. data: each source's digest by its name.
    eot_id: the end-of-text id. tokenizer: the sha256 (hex) of the run's tokenizer.json, or None.
    """

    path: Path
    config: dict[str, Any]
    data: dict[str, str]
    eot_id: int | None
    tokenizer: str | None

    @property
    def step(self) -> int:
        return step_of(self.path.parent)


def facts_of(cfg: Config, run_dir: RunDir) -> dict[str, Any]:
    """Return the content of the `run.json` of this run's next checkpoints.

    The fingerprint of the data has to be in the run's folder already.
    """
    from lunaris.config.frozen import to_tree

    return {
        "config": to_tree(cfg),
        "data": run_dir.noted("data") or {},
        "eot_id": run_dir.noted("eot_id"),
        "tokenizer": sha256_of(run_dir.tokenizer_path),
    }


def newest_facts(checkpoints: Path) -> Facts | None:
    """Return the facts in the newest checkpoint that has them undamaged, or None."""
    for folder in checkpoint_folders(checkpoints):
        found = _read(folder)
        if found is not None:
            return found
    return None


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, complete or not, newest first."""
    found = [p for p in checkpoints.glob("step_*") if _STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end, as `lunaris.checkpoint` sees it."""
    return (checkpoint / "files.json").is_file()


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint by the name of its folder."""
    return int(checkpoint.name.removeprefix("step_"))


def sha256_of(path: Path) -> str | None:
    """Return the sha256 of a file in hex, or None where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _read(folder: Path) -> Facts | None:
    path = folder / NAME
    try:
        content = path.read_bytes()
        if read_json(folder / "files.json").get(NAME) != [len(content), zlib.crc32(content)]:
            return None
        raw = json.loads(content)
        return Facts(path, raw["config"], raw["data"], raw["eot_id"], raw["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
