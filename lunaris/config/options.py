"""The groups of the config tree and the options each has, read from the folders. No Hydra."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from lunaris.config.schema.root import SCHEMAS

CONFIG_MODULE = "lunaris.conf"
# Picked from the folder `experiment`; it has no keys of its own.
EXPERIMENT = "experiment"
GROUPS = (*SCHEMAS, EXPERIMENT)


class Option(NamedTuple):
    """One file of a group: its name and the comment it opens with."""

    name: str
    summary: str


def folders() -> list[Path]:
    """Return the folder that our own options come from, as a list to put others behind."""
    return [Path(str(resources.files(CONFIG_MODULE)))]


def options(group: str, config_dirs: list[Path] | None = None) -> list[Option]:
    """Return the options of `group`, sorted by name."""
    files = {
        file.stem: file
        for folder in reversed(config_dirs or folders())
        for file in sorted((folder / group).glob("*.y*ml"))
    }
    return [Option(name, _summary(files[name])) for name in sorted(files)]


def _summary(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ")
        # An experiment opens with the command that runs it.
        if not text.startswith(("@", "lunaris ")):
            return text
    return ""
