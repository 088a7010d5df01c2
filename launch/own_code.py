"""The code of custom classes, for the copy that a job runs."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

# Folders of installed packages, in any environment on the path.
_INSTALLED = {"site-packages", "dist-packages"}


def own_files(targets: Iterable[str], suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the files of the modules that dotted paths name, by their paths in the copy.

    With each module or package come those that it imports from the same folder. What is installed
    is left out, and so is what cannot be found. Of a package, the files with these suffixes.
    """
    files: dict[str, Path] = {}
    for name in sorted({target.partition(".")[0] for target in targets}):
        root = _root(name)
        if root is not None:
            files |= _with_imports(root, name, suffixes)
    return files


def _root(name: str) -> Path | None:
    """Return the folder of a top-level module or package that is not installed."""
    try:
        spec: ModuleSpec | None = find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or [])
    if not places and not spec.has_location:  # built into python
        return None
    root = Path(places[0] if places else str(spec.origin)).resolve().parent
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    installed = root == standard or not _INSTALLED.isdisjoint(root.parts)
    return None if installed else root


def _with_imports(root: Path, name: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    waiting, seen = [name], {name}
    while waiting:
        for path in _files_of(root, waiting.pop(), suffixes):
            files[str(path.relative_to(root))] = path
            for other in _imported(path) if path.suffix == ".py" else ():
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
    return files


def _files_of(root: Path, name: str, suffixes: tuple[str, ...]) -> Iterator[Path]:
    module = root / f"{name}.py"
    if module.is_file():
        yield module
    package = root / name
    if package.is_dir() and any(package.glob("*.py")):
        for path in sorted(package.rglob("*")):
            if path.suffix in suffixes and path.is_file():
                yield path


def _imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports; none where it cannot be read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found
