"""`data=stdlib`: the source text of the running Python's standard library, on every machine.

`lunaris.data.prepare.build` builds the shards on first use.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

from lunaris.config.schema.data import StdlibDataConfig
from lunaris.data import manifest as manifests
from lunaris.data.prepared import PreparedFolder, cache_folder
from lunaris.data.shards import checked_keys
from lunaris.errors import UserError

# Installed packages, and the library's tests, which are as long as the library itself.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
# Raised when the same files and keys give other tokens.
_VERSION = 1


class StdlibData(PreparedFolder):
    """Byte-level BPE trained on the library's `.py` files, and shards of them."""

    def __init__(self, **keys: Any) -> None:
        """keys: of `StdlibDataConfig`."""
        self.keys = checked_keys(StdlibDataConfig, keys)
        super().__init__(
            Path(self.keys.dir) if self.keys.dir else default_folder(self.keys),
            document_masking=self.keys.document_masking,
        )

    def ensure_ready(self) -> None:
        """Inspect the folder, once. Raises UserError when it is not built, or from other keys."""
        made = manifests.read(self.folder)
        if made is not None:
            self._check_settings(made.settings)
        super().ensure_ready()

    def _check_settings(self, found: dict[str, object]) -> None:
        """Raise UserError when a folder holds something else, or what other keys made.

        Shards of another Python's library are accepted as they are.
        """
        rows = [
            f"{key}: {found.get(key)} → {value}"
            for key, value in settings(self.keys).items()
            if found.get(key) != value and (key != "python" or key not in found)
        ]
        if rows:
            raise UserError(
                f"data.dir={self.folder}: holds shards that other settings made; choose another "
                "folder or remove it. Differing:\n  " + "\n  ".join(rows)
            )


def library_root() -> Path:
    """Return the folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def library_files() -> list[Path]:
    """Return the library's `.py` files in the order of their names relative to its root."""
    root = library_root()
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _LEFT_OUT]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def settings(keys: StdlibDataConfig) -> dict[str, object]:
    """Return what the shards depend on besides the library's files, for the manifest."""
    return {
        "version": _VERSION,
        "python": platform.python_version(),
        "vocab_size": keys.vocab_size,
        "val_fraction": keys.val_fraction,
    }


def default_folder(keys: StdlibDataConfig) -> Path:
    """Return the cache's folder for these keys and the library's files (their names and sizes)."""
    files = [(str(path), path.stat().st_size) for path in library_files()]
    key = json.dumps([settings(keys), files])
    return cache_folder() / f"stdlib-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
