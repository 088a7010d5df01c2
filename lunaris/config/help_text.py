"""The help of commands that take the whole config: examples, flags, groups and their options."""

from __future__ import annotations

from pathlib import Path

from lunaris.config.cli import parser
from lunaris.config.options import GROUPS, options

_WIDTH = 22


def manual(prog: str, what: str, examples: list[tuple[str, str]], config_dirs: list[Path]) -> str:
    """Return the help of a command; examples: pairs of a command line and what it does."""
    longest = max(len(line) for line, _ in examples)
    shown = [f"  {line:<{longest}}  {does}" for line, does in examples]
    flags = parser(prog).format_help().strip()
    return "\n".join(
        [
            f"usage: {prog} [FLAGS] [GROUP=OPTION …] [KEY=VALUE …]",
            "",
            what,
            "",
            "examples:",
            *shown,
            "",
            flags,
            "",
            "groups and their options (GROUP=OPTION):",
            *_groups(config_dirs),
            "",
            f"`{prog} --cfg job` shows every key with its value, `-p moe` those of one group;",
            "add overrides to see what they do. An override never needs a plus.",
        ]
    )


def _groups(config_dirs: list[Path]) -> list[str]:
    lines = []
    for group in GROUPS:
        lines.append(f"  {group}")
        for option in options(group, config_dirs):
            lines.append(f"    {option.name:<{_WIDTH}} {option.summary}".rstrip())
    return lines
