"""`lunaris new`: the skeleton of a custom part in a folder of the user's."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
from pathlib import Path
from shlex import quote

from lunaris.errors import UserError, did_you_mean
from lunaris.scaffold.skeleton import kinds, skeleton


def main(argv: list[str]) -> int:
    """Write the files, none of which may exist, and print how to train with them."""
    args = _parser().parse_args(argv)
    if args.kind not in kinds():
        raise UserError(
            f"{args.kind}: no such kind of part; allowed are {', '.join(kinds())}"
            f"{did_you_mean(args.kind, kinds())}"
        )
    folder = Path(args.to)
    _check_name(args.name)
    made = skeleton(args.kind, args.name)
    paths = {folder / name: text for name, text in made.files.items()}
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists; choose another name, or another folder with --to")
    _check_free(args.name)
    try:
        for path, text in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error
    for path in paths:
        print(path)
    at, conf = quote(str(folder)), quote(str(folder / "conf"))
    test = quote(str(folder / f"test_{args.name}.py"))
    print(f"test it:    PYTHONPATH={at} python -m pytest {test}")
    if importlib.util.find_spec("pytest") is None:
        print("            after `pip install pytest`")
    print(f"train with: PYTHONPATH={at} lunaris train --config-dir {conf} {made.choose}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris new",
        description="Write the skeleton of a custom part: its class, schema, option file and test. "
        "It works as it is; change it from there. No file is overwritten.",
        epilog="example: lunaris new attention my_attention",
    )
    parser.add_argument("kind", metavar="KIND", help=f"one of {', '.join(kinds())}")
    parser.add_argument("name", metavar="NAME", help="lower-case words joined by underscores")
    parser.add_argument("--to", default=".", metavar="DIR", help="the folder (default: this one)")
    return parser


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise UserError(
            f"{name}: must be lower-case words joined by underscores, such as my_attention, and "
            "no word of Python's own"
        )


def _check_free(name: str) -> None:
    """Raise UserError for a name that another module has, which the part's would hide."""
    for module in (name, f"{name}_schema"):
        if importlib.util.find_spec(module) is not None:
            raise UserError(f"{name}: there is a module {module} already; choose another name")
