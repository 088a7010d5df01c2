"""`lunaris report`: an HTML page of a run, a sweep or several runs, which needs no network."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lunaris.config.trust import add_flag, allow
from lunaris.errors import UserError
from lunaris.runs.discovery import FoundRun, find_runs, is_run, is_sweep
from lunaris.runs.run_dir import RunDir
from lunaris.runs.sweep_manifest import read_manifest

if TYPE_CHECKING:
    from lunaris.report.run_page import Sample

# Of each sample: its length, and how freely its tokens are drawn.
_SAMPLE_TOKENS = 100
_TEMPERATURE = 0.8


def main(argv: list[str]) -> int:
    """Write the page, and pictures with --png; print where they are."""
    args = _parser().parse_args(argv)
    allow(args.trust)
    folders = [Path(text) for text in args.dir]
    folder = folders[0]
    several = len(folders) > 1
    found = _find_several(folders) if several else find_runs(folder)
    sweep = not several and is_sweep(folder)
    if len(found) != 1 and not sweep and not several:
        raise UserError(f"{folder}: holds {len(found)} runs; give the folder of one, or a sweep's")
    if args.prompt and len(found) + sweep + several != 1:
        raise UserError("--prompt: is continued by the checkpoints of one run; give its folder")
    if args.png is not None and Path(args.png).exists() and not Path(args.png).is_dir():
        raise UserError(f"--png {args.png}: is a file; give a folder")
    # Imported here: `--help` and a wrong folder need no numpy and no Hydra.
    from lunaris.report.page import NAME, write
    from lunaris.report.record import read_records
    from lunaris.report.run_page import run_page
    from lunaris.report.runs_page import runs_page
    from lunaris.report.sweep_page import sweep_page

    to = Path(args.to) if args.to else Path(NAME) if several else folder / NAME
    records = read_records(found)
    if sweep:
        page = sweep_page(folder, read_manifest(folder), records)
    elif several:
        page = runs_page(records)
    else:
        page = run_page(records[0], _defaults(), _samples(folder, args.prompt))
    write(page, to)
    print(f"report     {to}")
    if args.png is not None:
        from lunaris.report.pictures import write_pictures

        record = None if sweep or several else records[0]
        pictures = write_pictures(page.charts(), Path(args.png), record)
        print(f"pictures   {len(pictures)} in {args.png}")
    if args.open:
        webbrowser.open(to.resolve().as_uri())
    return 0


def _samples(folder: Path, prompts: Sequence[str]) -> list[Sample]:
    """Return each prompt's continuations by the checkpoints of a run, the oldest first.

    Raises UserError where the run has no checkpoint, or a prompt cannot be encoded.
    """
    if not prompts:
        return []
    # Only samples need torch.
    from tqdm import tqdm

    from lunaris.report.run_page import Sample
    from lunaris.runs.checkpoint_files import complete
    from lunaris.runs.facts import step_of
    from lunaris.sampling import Request, Settings, sample_texts

    run_dir = RunDir(folder)
    steps = sorted(step_of(path) for path in complete(run_dir.checkpoints))
    if not steps:
        raise UserError(f"{folder}: --prompt: the run has no checkpoint")
    cfg = run_dir.read_config()
    settings = Settings(max_new_tokens=_SAMPLE_TOKENS, temperature=_TEMPERATURE)
    requests = [Request(prompt, seed=0) for prompt in prompts]
    texts = {(number, step): "" for number in range(len(prompts)) for step in steps}
    for step in tqdm(steps, desc="samples", unit="checkpoint", leave=False):
        for piece in sample_texts(cfg, run_dir, requests, settings, step=step):
            texts[piece.index, step] += piece.text
    return [Sample(step, prompts[number], text) for (number, step), text in texts.items()]


def _find_several(folders: Sequence[Path]) -> list[FoundRun]:
    """Return the run of each folder. Raises UserError for any other folder, and one given twice."""
    found: dict[Path, FoundRun] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        if is_sweep(folder):
            raise UserError(f"{folder}: is a sweep; give it alone, or some of its points' folders")
        if not is_run(folder):
            raise UserError(f"{folder}: not a run's folder; several folders are those of runs")
        if folder.resolve() in found:
            raise UserError(f"{folder}: is given twice; give each run once")
        (found[folder.resolve()],) = find_runs(folder)
    return list(found.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lunaris report",
        description="Write one HTML file that shows a run (losses, learning rate, speed, memory, "
        "the load of its experts, its config and where it comes from) or a sweep (its points in a "
        "table, their curves, what each key did). Of two or more runs, it shows them side by side: "
        "their numbers, the keys that differ, their curves over each other. The file holds "
        "everything and opens from disk without a network.",
        epilog="examples: lunaris report runs/first; lunaris report sweeps/lr --png pictures; "
        "lunaris report runs/first runs/second --to both.html",
    )
    parser.add_argument("dir", nargs="+", help="the folder of a run or of a sweep, or of each run")
    parser.add_argument(
        "--to",
        metavar="FILE",
        help="the file (default: DIR/report.html; report.html here for several runs)",
    )
    parser.add_argument("--png", metavar="DIR", help="write the charts as pictures too")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="continue this text with each checkpoint of the run, to see it learn; may be repeated",
    )
    add_flag(parser)
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    return parser


def _defaults() -> dict[str, object]:
    """Return the config of a command without overrides, flat and dotted."""
    from lunaris.config.compose import Composer
    from lunaris.config.frozen import to_tree
    from lunaris.config.keys import flat

    return flat(to_tree(Composer(with_defaults=False).compose([], check_data=False)))
