"""The pages say what is true: links lead somewhere, and every training command composes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lunaris.__main__ import commands
from lunaris.config.cli import parse_flags
from lunaris.config.compose import compose

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines(page: Path) -> list[str]:
    """Return the lines of a page's code blocks that call lunaris, continuations joined."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("lunaris ")
    ]


TRAIN = [
    pytest.param(line, id=line[:60])
    for page in PAGES
    for line in shell_lines(page)
    if line.startswith("lunaris train") and "…" not in line and "--help" not in line
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("line", TRAIN)
def test_training_commands_compose(line: str) -> None:
    flags = parse_flags(shlex.split(line, comments=True)[2:])
    if flags.multirun:
        # The first value of each swept key; tests/launch holds that all of them are expanded.
        flags.overrides = [re.sub(r"=([^\[,]+),.*", r"=\1", text) for text in flags.overrides]
    compose(flags.overrides, source=flags.source, check_data=False)


def test_every_command_shown_exists() -> None:
    shown = {line.split()[1] for page in PAGES for line in shell_lines(page)}
    assert shown - {"--help", "COMMAND"} <= commands().keys()
    assert len(TRAIN) > 3
