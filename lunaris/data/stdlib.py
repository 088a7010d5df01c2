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
from lunaris.data.prepared import PreparedFolder
from lunaris.data.shards import checked_keys

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
        """Inspect the folder, once. Raises UserError when it is not built, or from other keys.

        Shards of another Python's library are accepted as they are.
        """
        made, asked = manifests.read(self.folder), settings(self.keys)
        if made is not None:
            python = {"python": asked["python"]}
            manifests.require_same(self.folder, made.settings | python, asked)
        super().ensure_ready()


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
    """Return the folder for these keys and the library's files (their names and sizes).

    It is in $LUNARIS_CACHE, else in lunaris/ in the user's cache.
    """
    files = [(str(path), path.stat().st_size) for path in library_files()]
    key = json.dumps([settings(keys), files])
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("LUNARIS_CACHE") or user / "lunaris")
    return cache / f"stdlib-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
