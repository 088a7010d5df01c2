"""The code of a job, as it is when the job is sent: editing it later changes no queued job."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lunaris
import lunaris.conf
import lunaris.launch

# Where a folder of the repository is found once installed.
_INSTALLED = {"lunaris": "lunaris", "conf": "lunaris/conf", "launch": "lunaris/launch"}
_CODE = (".py", ".yaml", ".yml", ".json", ".toml")
_LARGEST = 4 << 20
_LONGEST_DIFF = 1 << 20


@dataclass(frozen=True)
class Snapshot:
    """A copy of the code, importable with `path` first on PYTHONPATH, and where it came from."""

    path: Path
    commit: str | None = None
    # Against the commit, with new files; cut where it is longer than a million characters.
    diff: str = ""

    def provenance(self) -> dict[str, Any]:
        """Return what provenance.json says of it."""
        return {"snapshot": str(self.path), "commit": self.commit, "diff": self.diff}


def take(folder: Path) -> Snapshot:
    """Copy the code that this process runs into `folder` and return the copy.

    From a git checkout: all files of ours and every other Python file, tracked or untracked, but
    not ignored. From an installed package: the package. The copy is named by its content, so
    that the same code is copied once.
    """
    root = _checkout()
    files = _checkout_files(root) if root is not None else _package_files()
    digest = hashlib.sha256()
    for target in sorted(files):
        digest.update(f"{target}\0".encode())
        digest.update(files[target].read_bytes())
    path = folder.absolute() / digest.hexdigest()[:12]
    if not path.is_dir():
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        for target, source in files.items():
            copy = beside / target
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        try:
            beside.rename(path)
        except OSError:  # Another command made the same copy meanwhile.
            shutil.rmtree(beside)
    if root is None:
        return Snapshot(path)
    return Snapshot(path, _git(root, "rev-parse", "HEAD").strip() or None, _diff(root))


def _checkout() -> Path | None:
    """Return the root of the git checkout that our package is run from, or None."""
    package = Path(lunaris.__file__).resolve().parent
    root = package.parent
    # An installed package may lie below some unrelated repository: a virtual environment in it.
    if not all((root / name).is_dir() for name in _INSTALLED):
        return None
    return root if _git(root, "ls-files", "lunaris/__init__.py").strip() else None


def _checkout_files(root: Path) -> dict[str, Path]:
    """Return the files to copy: where each goes -> where it is."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    files = {}
    for name in sorted(filter(None, listed.split("\0"))):
        top, _, rest = name.partition("/")
        source = root / name
        # A file may be listed and deleted; what a link points to may be anywhere.
        if not source.is_file() or source.is_symlink() or source.stat().st_size > _LARGEST:
            continue
        if top in _INSTALLED and rest:
            files[f"{_INSTALLED[top]}/{rest}"] = source
        elif name.endswith(".py") and top not in ("tests", "docs"):
            files[name] = source
    return files


def _package_files() -> dict[str, Path]:
    files = {}
    for module in (lunaris, lunaris.conf, lunaris.launch):
        assert module.__file__ is not None
        package = Path(module.__file__).resolve().parent
        for folder, _, names in os.walk(package):
            for name in names:
                source = Path(folder) / name
                if source.suffix in _CODE:
                    target = Path(*module.__name__.split("."), source.relative_to(package))
                    files[str(target)] = source
    return files


def _diff(root: Path) -> str:
    text = _git(root, "diff", "HEAD")
    for name in _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0"):
        if name.endswith(_CODE):
            # Exit code 1 says that the files differ, as they must.
            text += _git(root, "diff", "--no-index", "--", os.devnull, name)
    cut = f"\n(cut: {len(text):,} characters)\n" if len(text) > _LONGEST_DIFF else ""
    return text[:_LONGEST_DIFF] + cut


def _git(root: Path, *args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")
