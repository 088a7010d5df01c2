"""A copy of the code for a job, so that later edits do not change a queued job."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import lunaris
import lunaris.conf
import lunaris.launch
from lunaris.launch.own_code import own_files

# Folders of the repository, and where each is in an installed package.
_INSTALLED = {"lunaris": "lunaris", "conf": "lunaris/conf", "launch": "lunaris/launch"}
_CODE = (".py", ".yaml", ".yml", ".json", ".toml")
_LARGEST = 4 << 20
_LONGEST_DIFF = 1 << 20
_LONGEST_NEW_FILE = 1 << 16
_GIT_S = 60


@dataclass(frozen=True)
class Snapshot:
    """A copy of the code, importable with `path` first on PYTHONPATH, and where it came from."""

    path: Path
    commit: str | None = None
    # The difference to the commit, with the new files that the copy has; cut after 2**20
    # characters. New files of more than 2**16 bytes are only named.
    diff: str = ""

    def provenance(self) -> dict[str, Any]:
        """Return the facts that provenance.json holds about the code."""
        return {"snapshot": str(self.path), "commit": self.commit, "diff": self.diff}


def take(folder: Path, targets: Iterable[str] = ()) -> Snapshot:
    """Copy the code that this process runs into `folder` and return the copy.

    targets: dotted paths of custom classes, whose modules are copied wherever they are, unless
    they are installed.

    Of a git checkout, all files of this package and every other Python file are copied, tracked or
    untracked, but not ignored; of an installed package, the package. The copy is named by a hash
    of its content, so that the same code is copied once.
    """
    root = _checkout()
    files = _checkout_files(root) if root is not None else _package_files()
    own = own_files((t for t in targets if not t.startswith("lunaris.")), _CODE)
    files = own | files
    digest = hashlib.sha256()
    for target in sorted(files):
        digest.update(f"{target}\0".encode())
        digest.update(files[target].read_bytes())
    path = folder.absolute() / digest.hexdigest()[:12]
    if not path.is_dir():
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        for target, source in files.items():
            copy = unfinished / target
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        try:
            unfinished.rename(path)
        except OSError:  # Another command has made the same copy.
            shutil.rmtree(unfinished)
    if root is None:
        return Snapshot(path)
    return Snapshot(path, _git(root, "rev-parse", "HEAD").strip() or None, _diff(root, files))


def _checkout() -> Path | None:
    """Return the root of the git checkout that this package is imported from, or None."""
    package = Path(lunaris.__file__).resolve().parent
    root = package.parent
    # An installed package may be inside an unrelated repository, in its virtual environment.
    if not all((root / name).is_dir() for name in _INSTALLED):
        return None
    return root if _git(root, "ls-files", "lunaris/__init__.py").strip() else None


def _checkout_files(root: Path) -> dict[str, Path]:
    """Return the files to copy, by their paths in the copy."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    files = {}
    for name in sorted(filter(None, listed.split("\0"))):
        top, _, rest = name.partition("/")
        source = root / name
        # A listed file may be deleted. A link may point outside the checkout.
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
        for source in package.rglob("*"):
            if source.suffix in _CODE and source.is_file():
                target = Path(*module.__name__.split("."), source.relative_to(package))
                files[str(target)] = source
    return files


def _diff(root: Path, files: dict[str, Path]) -> str:
    """Return the difference of the checkout to its commit, with those of `files` that are new.

    Other new files, like those of a corpus in the checkout, are no part of the code.
    """
    text = _git(root, "diff", "HEAD", most=_LONGEST_DIFF + 1)
    copied = {
        str(source.relative_to(root)) for source in files.values() if source.is_relative_to(root)
    }
    for name in _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0"):
        if len(text) > _LONGEST_DIFF:
            break
        if name in copied and name.endswith(_CODE):
            text += _new_file(root / name, name)
    cut = "\n(cut: it is longer)\n" if len(text) > _LONGEST_DIFF else ""
    return text[:_LONGEST_DIFF] + cut


def _new_file(path: Path, name: str) -> str:
    """Return a new file as `git diff` shows it; of a large one only its size."""
    size = path.stat().st_size
    head = f"diff --git a/{name} b/{name}\nnew file mode 100644\n"
    if size > _LONGEST_NEW_FILE:
        return f"{head}({size:,} bytes, not shown)\n"
    lines = path.read_text(errors="replace").splitlines()
    shown = "".join(f"+{line}\n" for line in lines)
    return f"{head}--- {os.devnull}\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@\n{shown}"


def _git(root: Path, *args: str, most: int = -1) -> str:
    """Return what git prints, of at most `most` bytes where that is given; "" without git."""
    try:
        with subprocess.Popen(
            ["git", "-C", str(root), *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            limit = Timer(_GIT_S, process.kill)
            limit.start()
            text = process.stdout.read(most)
            # Where more was to come.
            process.stdout.close()
            limit.cancel()
    except OSError:
        return ""
    return text.decode(errors="replace")
