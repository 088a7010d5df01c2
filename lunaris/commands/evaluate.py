"""`lunaris evaluate`: loss of runs' checkpoints on validation shards, texts or questions."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lunaris.config.overrides import parse
from lunaris.config.schema.data import ShardsDataConfig
from lunaris.config.schema.root import Config
from lunaris.config.trust import add_flag, allow
from lunaris.errors import UserError, did_you_mean
from lunaris.runs.run_dir import RunDir, not_a_run

_KEYS = ("data.dir", "trainer.batch_size", "trainer.precision", "trainer.device")


def main(argv: list[str]) -> int:
    """Print the losses of runs on validation shards or on texts; return the exit code."""
    args = _parser().parse_args(argv)
    allow(args.trust)
    given = _sort_arguments(args.arguments)
    _check(args, given)
    runs = []
    for folder in given.runs:
        cfg: Config = RunDir(folder).read_config()
        for override in given.overrides:
            _apply(cfg, override)
        runs.append((folder, cfg))
    if given.texts or args.choices:
        rows = _score(runs, given.texts, args)
    else:
        rows = _validate(runs, args)
    if args.json:
        one = len(runs) == 1 and not given.texts and not args.choices
        # JSON has no NaN.
        plain = [{k: v if _finite(v) else None for k, v in row.items()} for row in rows]
        print(json.dumps({k: v for k, v in plain[0].items() if k != "run"} if one else plain))
    elif len(rows) == 1:
        print(f"{rows[0].pop('run')}, step {rows[0].pop('step')}")
        for name, value in rows[0].items():
            print(f"{name:<28} {_shown(value)}")
        steps = runs[0][1].trainer.eval_steps
        if "val/loss" in rows[0] and args.max_sequences is None and steps is not None:
            print(
                "of all validation sequences; training evaluates at most "
                f"trainer.eval_steps={steps} batches of each source"
            )
    else:
        print(_table(rows))
    return 0


class _Given(NamedTuple):
    runs: list[str]
    texts: list[Path]
    overrides: list[str]


def _sort_arguments(arguments: list[str]) -> _Given:
    """Tell runs (folders), texts (files) and overrides (KEY=VALUE) apart."""
    given = _Given([], [], [])
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            given.runs.append(argument)
        elif path.is_file():
            given.texts.append(path)
        elif "=" in argument and "/" not in argument.partition("=")[0]:
            given.overrides.append(argument)
        else:
            raise UserError(not_a_run(path, " and no text file"))
    if not given.runs:
        raise UserError("evaluate: needs a run's folder")
    return given


def _check(args: argparse.Namespace, given: _Given) -> None:
    for name, value in (("--max-sequences", args.max_sequences), ("--stride", args.stride)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    texts = bool(given.texts or args.choices)
    if args.stride is not None and not given.texts:
        raise UserError(f"--stride {args.stride}: is for text files, and none is given")
    if args.max_sequences is not None and texts:
        raise UserError(f"--max-sequences {args.max_sequences}: is for validation shards")
    folders = [override for override in given.overrides if override.startswith("data.dir=")]
    if folders and texts:
        raise UserError(f"{folders[0]}: is for validation shards; texts are given by their files")


def _validate(runs: list[tuple[str, Config]], args: argparse.Namespace) -> list[dict[str, Any]]:
    # Imports torch, which `--help` and a wrong key do not need.
    from lunaris.inference import evaluate_checkpoint

    return [
        {"run": folder}
        | evaluate_checkpoint(cfg, RunDir(folder), step=args.step, most=args.max_sequences)
        for folder, cfg in runs
    ]


def _score(
    runs: list[tuple[str, Config]], texts: list[Path], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each run and text, and for each run and file of questions."""
    from lunaris.distributed import session
    from lunaris.scoring import Scorer, accuracies, read_questions, read_text

    contents = [(path, read_text(path)) for path in texts]
    questions = [(Path(name), read_questions(Path(name))) for name in args.choices]
    rows: list[dict[str, Any]] = []
    for folder, cfg in runs:
        with session.join(cfg.trainer.device, cfg.launch.collective_timeout_s):
            scorer = Scorer(cfg, RunDir(folder), args.step)
            about = {"run": folder, "step": scorer.step}
            scores = [scorer.text(content, args.stride) for _, content in contents]
            rows += [
                about | {"text": str(path)} | score.row()
                for (path, _), score in zip(contents, scores, strict=True)
            ]
            if len(scores) > 1:
                rows.append(about | {"text": "(all)"} | sum(scores[1:], scores[0]).row())
            rows += [
                about | {"choices": str(path)} | accuracies(asked, scorer.choices(asked))
                for path, asked in questions
            ]
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    """Return rows as text in columns; rows with other columns begin another table."""
    tables = []
    kinds = dict.fromkeys(tuple(row) for row in rows)
    for names in kinds:
        lines = [names, *(tuple(map(_shown, row.values())) for row in rows if tuple(row) == names)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
        numbers = [isinstance(value, int | float) for value in _first(rows, names).values()]
        tables.append("\n".join(
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for cell, width, number in zip(line, widths, numbers, strict=True)
            ).rstrip()
            for line in lines
        ))  # fmt: skip
    return "\n\n".join(tables)


def _first(rows: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    return next(row for row in rows if tuple(row) == names)


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris evaluate",
        description="Losses of runs' checkpoints, on validation shards or on text files. A loss is "
        "in nats a token; bits_per_byte does not depend on the tokenizer.",
        epilog="examples: lunaris evaluate runs/default 'data.dir=[shards/wiki,shards/code]' "
        "--json; lunaris evaluate runs/a runs/b book.txt notes.txt",
    )
    parser.add_argument(
        "arguments", nargs="+", metavar="RUN | TEXT_FILE | KEY=VALUE",
        help="the folders of runs, the texts (UTF-8; default: the run's validation shards), and "
        f"keys to override: {', '.join(_KEYS)}",
    )  # fmt: skip
    parser.add_argument(
        "--choices", action="append", default=[], metavar="FILE",
        help='questions, {"context": TEXT, "choices": [TEXT, …], "answer": INDEX} a line; prints '
        "how often the right choice is the likeliest; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--at", "--step", dest="step", type=int, metavar="STEP",
        help="the checkpoint (default: the newest)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=int, metavar="TOKENS",
        help="by how much the windows of a text advance: less than the model's length gives "
        "each token more context and takes longer (default: the model's length)",
    )  # fmt: skip
    parser.add_argument(
        "--max-sequences", type=int, help="at most so many of each source (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: of one run an object, "
                        "else a list with an object a row")  # fmt: skip
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
