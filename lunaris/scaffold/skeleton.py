"""The skeletons of custom parts, from which `lunaris new` writes files. No torch.

A skeleton is a text file: lines `choose:` (the override that takes the part), `key:` and `bad:` (a
good and a bad value of its key), then the files, each below a line `--- PATH`. The name stands as
`my_part` and `MyPart`.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import NamedTuple

_MODULE = "lunaris.scaffold"


class Skeleton(NamedTuple):
    """A part's files by their paths, and the override that chooses it."""

    files: dict[str, str]
    choose: str


def kinds() -> list[str]:
    """Return the kinds of parts that have a skeleton, sorted."""
    folder = resources.files(_MODULE) / "skeletons"
    return sorted(file.name.removesuffix(".txt") for file in folder.iterdir())


def skeleton(kind: str, name: str) -> Skeleton:
    """Return the files of a part of a known kind; name: lower-case words joined by underscores."""
    text = _named((resources.files(_MODULE) / "skeletons" / f"{kind}.txt").read_text(), name)
    head, *parts = re.split(r"^--- (\S+)\n", text, flags=re.MULTILINE)
    files = dict(zip(parts[::2], parts[1::2], strict=True))
    lines = dict(line.split(": ", 1) for line in head.splitlines())
    files[f"test_{name}.py"] = _test(kind, name, lines)
    return Skeleton(files, lines["choose"])


def _test(kind: str, name: str, lines: dict[str, str]) -> str:
    further = [] if kind == "feed_forward" else ["moe.n_experts=4"]
    if kind != "data":
        further += ["data=synthetic", "data.n_tokens=20000", "data.vocab_size=64"]
    values = lines | {
        "bad_key": lines["bad"].partition("=")[0],
        "further": " ".join(f'"{override}",' for override in further),
    }
    text = _named((resources.files(_MODULE) / "test.txt").read_text(), name)
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def _named(text: str, name: str) -> str:
    camel = "".join(word.capitalize() for word in name.split("_"))
    return text.replace("my_part", name).replace("MyPart", camel)
