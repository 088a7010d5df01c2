"""Which classes the config in a folder may name: a folder may come from somebody else. No torch.

A config names its components by `_target_`, and naming one runs it. Within `restricted` a config
that is read from a folder may name the classes of this package and of `torch.optim`, and what the
person named: by `--trust`, or on the command line of this process. A process that such a command
starts reads the same folder without restrictions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.errors import UserError

if TYPE_CHECKING:
    from argparse import ArgumentParser, _ArgumentGroup

_NAMES = ("_target_", "_schema_")
_ALWAYS = ("lunaris", "torch.optim")
# None: everything is trusted.
_trusted: set[str] | None = None


@contextmanager
def restricted(names: Iterable[str] = ()) -> Iterator[None]:
    """Restrict what folders may name to `names`, dotted paths of packages, modules or classes."""
    global _trusted
    before, _trusted = _trusted, {*_ALWAYS, *names}
    try:
        yield
    finally:
        _trusted = before


def allow(names: Iterable[str]) -> None:
    """Trust more names until the innermost `restricted` ends."""
    if _trusted is not None:
        _trusted.update(names)


def allow_named(overrides: Iterable[str]) -> None:
    """Trust the classes that overrides of a command line name."""
    allow(target for _, target in _of_overrides(overrides))


def allow_tree(tree: Any) -> None:
    """Trust the classes that a config names, as plain dicts, which the person composed."""
    allow(target for _, target in _of_tree(tree, ""))


def targets_of(tree: Any) -> set[str]:
    """Return the dotted paths of the classes that a config names, as plain dicts."""
    return {target for _, target in _of_tree(tree, "")}


def flags_for(tree: Any) -> list[str]:
    """Return the words by which a person trusts the custom classes that a config names."""
    others = [t for t in targets_of(tree) if not any(f"{t}.".startswith(f"{a}.") for a in _ALWAYS)]
    return [word for name in _packages(sorted(others)) for word in ("--trust", name)]


def check_tree(tree: Any, path: Path) -> None:
    """Raise UserError where the content of a config file names a class that is not trusted."""
    _check(_of_tree(tree, ""), path)


def check_overrides(overrides: Iterable[str], path: Path) -> None:
    """Raise UserError where overrides from a file name a class that is not trusted."""
    _check(_of_overrides(overrides), path)


def add_flag(parser: ArgumentParser | _ArgumentGroup) -> None:
    """Add `--trust NAME` to the flags of a command that reads a folder."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="NAME",
        help="a package, module or class that the folder's config may name and so run; may be "
        "given several times",
    )


def _check(found: Iterable[tuple[str, str]], path: Path) -> None:
    if _trusted is None:
        return
    others = {
        key: target
        for key, target in found
        if not any(f"{target}.".startswith(f"{name}.") for name in _trusted)
    }
    if others:
        modules = _packages(others.values())
        named = ", ".join(f"{key}={target}" for key, target in others.items())
        raise UserError(
            f"{path}: {named}: {'is' if len(others) == 1 else 'are'} no part of this package, and "
            "what a folder names is run; where "
            f"you trust the folder, add {' '.join(f'--trust {module}' for module in modules)}"
        )


def _packages(targets: Iterable[str]) -> list[str]:
    """Return a name to trust for each package: the module of its targets, or what holds them all.

    A class and its schema are often in two modules of one package.
    """
    found: dict[str, list[str]] = {}
    for target in targets:
        module = (target.rpartition(".")[0] or target).split(".")
        known = found.setdefault(module[0], module)
        found[module[0]] = list(os.path.commonprefix([known, module]))
    return [".".join(names) for names in found.values()]


def _of_tree(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    items = enumerate(tree) if isinstance(tree, list) else ()
    for name, value in tree.items() if isinstance(tree, dict) else items:
        inner = f"{key}.{name}" if key else str(name)
        if name in _NAMES:
            yield inner, str(value)
        else:
            yield from _of_tree(value, inner)


def _of_overrides(overrides: Iterable[str]) -> Iterator[tuple[str, str]]:
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key.rpartition(".")[2] in _NAMES:
            yield key, value.strip("'\"")
        elif any(name in value for name in _NAMES):
            # A dict on the command line, `moe={_target_: …}`: named as a whole.
            yield key, value
