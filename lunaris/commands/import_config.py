"""`lunaris import-config`: print the command that a YAML file of the earlier Lunaris amounts to."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

_EPILOG = """\
example:
  lunaris import-config old/config.yaml

The command is printed on one line, and before it, as comments, what will be different. It is
composed and checked first, but data that is not there yet is not looked for."""


def main(argv: list[str]) -> int:
    """Print the command; return 0. Raises UserError where the file, or what it asks, is bad."""
    from lunaris.config.compose import compose
    from lunaris.config.earlier import import_config

    parser = argparse.ArgumentParser(
        "lunaris import-config",
        description="Print the command that a YAML file of the earlier Lunaris Codex amounts to.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="OLD.yaml", help="what train_moe.py took")
    path = Path(parser.parse_args(argv).file)
    imported = import_config(path)
    compose(imported.overrides, check_data=False)
    for note in imported.notes:
        print(f"# {note}")
    print(shlex.join(["lunaris", "train", *imported.overrides]))
    return 0
