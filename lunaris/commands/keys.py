"""`lunaris keys`: every key of the config, what it takes, its default and what it means."""

from __future__ import annotations

import argparse
import json

_EXAMPLES = """\
examples:
  lunaris keys                  every key by group
  lunaris keys moe wsd          those of a group and of an option
  lunaris keys learning_rate    those whose name contains this

A key may have another value at `any time`; `by resume`: in the middle of a run, which records the
change; or only in a `new run`."""


def main(argv: list[str]) -> int:
    """Print the keys; return 0. Raises UserError for a name that is in no key."""
    from lunaris.config.reference import find, sections

    parser = argparse.ArgumentParser(
        "lunaris keys",
        description="Every key of the config, what it takes, its default and what it means.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a group, an option, or a part of a key"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a page of documentation")
    args = parser.parse_args(argv)
    chosen = find(args.names) if args.names else sections()
    if args.json:
        rows = [{"group": s.group, **key._asdict()} for s in chosen for key in s.keys]
        print(json.dumps(rows, indent=2))
    elif args.markdown:
        from lunaris.config.reference import as_markdown

        print(as_markdown(chosen))
    else:
        from lunaris.config.reference import as_text

        print(as_text(chosen))
    return 0
