"""`lunaris evaluate`: loss and perplexity of a run's checkpoint, on its data or on any shards."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from lunaris.config.overrides import parse
from lunaris.config.schema.data import ShardsDataConfig
from lunaris.config.schema.root import Config
from lunaris.config.trust import add_flag, allow
from lunaris.errors import UserError, did_you_mean
from lunaris.runs.run_dir import RunDir

_KEYS = ("data.dir", "trainer.batch_size", "trainer.precision", "trainer.device")


def main(argv: list[str]) -> int:
    """Print validation loss (nats a token) and perplexity, per source; return the exit code."""
    args = _parser().parse_args(argv)
    allow(args.trust)
    if args.max_sequences is not None and args.max_sequences < 1:
        raise UserError(f"--max-sequences {args.max_sequences}: must be at least 1")
    cfg: Config = RunDir(args.dir).read_config()
    for override in args.overrides:
        _apply(cfg, override)

    # Imports torch, which `--help` and a wrong key do not need.
    from lunaris.inference import evaluate_checkpoint

    result = evaluate_checkpoint(cfg, RunDir(args.dir), step=args.step, most=args.max_sequences)
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{args.dir}, step {result.pop('step')}")
    for name, value in result.items():
        print(f"{name:<28} {value:.4f}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris evaluate",
        description="Loss (nats a token) and perplexity of a run's checkpoint, per source.",
        epilog="example: lunaris evaluate runs/default 'data.dir=[shards/wiki,shards/code]' --json",
    )
    parser.add_argument("dir", help="the run's folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help=f"keys to override: {', '.join(_KEYS)}"
    )
    parser.add_argument(
        "--at",
        "--step",
        dest="step",
        type=int,
        metavar="STEP",
        help="the checkpoint (default: the newest)",
    )
    parser.add_argument(
        "--max-sequences", type=int, help="at most so many of each source (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_flag(parser)
    return parser


def _apply(cfg: Config, override: str) -> None:
    key, equals, value = override.partition("=")
    if key not in _KEYS or not equals:
        raise UserError(
            f"{override}: evaluate cannot override this; "
            f"allowed are {', '.join(_KEYS)}{did_you_mean(key, _KEYS)}"
        )
    if key == "data.dir":
        folders = _folders(override)
        cfg.data = ShardsDataConfig(
            dir=folders,
            val_dir=folders,
            eot_id=getattr(cfg.data, "eot_id", None),
            document_masking=cfg.data.document_masking,
        )
        return
    name = key.removeprefix("trainer.")
    typed: Any = value
    if name == "batch_size":
        if not value.removeprefix("-").isdecimal():
            raise UserError(f"{key}={value}: must be an integer")
        typed = int(value)
    cfg.trainer = replace(cfg.trainer, **{name: typed})


def _folders(override: str) -> str | list[str]:
    """Return the folder, or the list of folders, that `data.dir=…` gives."""
    value = override.partition("=")[2]
    if "${" in value or value == "???":
        raise UserError(f"{override}: must be a folder, or a list of folders")
    if not value.startswith("["):
        return value
    folders = parse([override])[0].value()
    if not isinstance(folders, list):
        raise UserError(f"{override}: must be a folder, or a list of folders")
    return [str(folder) for folder in folders]
