"""`lunaris check`: is this machine ready for a run, and how fast is it; under five minutes."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lunaris.errors import UserError

if TYPE_CHECKING:
    from lunaris.check.item import Item
    from lunaris.config.cli import Flags
    from lunaris.config.schema.root import Config

_WHAT = """\
Checks whether this machine is ready for a run, and measures how fast it is, in under five minutes:
software, cores, memory, open files and disk; the device and its arithmetic; what the processes
exchange and their meshes; the kernels of experts and attention; then short runs of the config, on
drawn tokens, compiled and not, stopped and resumed; and a drill in which one process hangs. Each
line says ok, fail, or why it was skipped. The last lines are what to change. Its files lie in a
temporary folder (TMPDIR), of which the logs stay where something failed.

Exit code 0, or 1 where anything failed.

flags of its own:
  --json         print one JSON object
  --seconds N    end after so long; what is left is skipped (default: 300)"""

_EXAMPLES = [
    ("lunaris check", "the default config: a process on each GPU, or one"),
    ("lunaris check parallelism=fsdp launch.processes=8 model=base", "eight GPUs of this machine"),
]

_SECONDS = 300.0
# Looking at device, kernels and network, or at steps, may take the longer of these; a hang takes
# all of it. The share is of `--seconds`.
_LOOKING_S, _LOOKING_SHARE = 100.0, 1 / 3


def main(argv: list[str]) -> int:
    """Look, print and return the exit code."""
    from lunaris.config.cli import help_text, parse_flags
    from lunaris.config.compose import config_dirs
    from lunaris.config.trust import allow, allow_named

    own, rest = _parser().parse_known_args(argv)
    flags = parse_flags(rest, "lunaris check")
    if flags.help:
        print(help_text("lunaris check", _WHAT, _EXAMPLES, config_dirs(flags.source)))
        return 0
    for flag in ("multirun", "cfg", "info", "hydra_help", "shell_completion", "dry_run"):
        if getattr(flags, flag):
            raise UserError(f"--{flag.replace('_', '-')}: goes with lunaris train, not with check")
    if not (math.isfinite(own.seconds) and own.seconds > 0):
        raise UserError(f"--seconds {own.seconds:g}: must be above 0")
    if "RANK" in os.environ:
        raise UserError("lunaris check: not under torchrun; give launch.processes=N instead")
    allow(flags.trust)
    allow_named(flags.overrides)
    cfg, short = _configs(flags)
    from lunaris.check.item import FAIL

    found: list[Item] = []
    folder = Path(tempfile.mkdtemp(prefix="lunaris-check-"))
    until = time.monotonic() + own.seconds
    try:
        with _ending_at_signals():
            for item in _look(cfg, short, folder, until):
                found.append(item)
                if not own.json:
                    print(item.line(), flush=True)
    finally:
        failed = [item.name for item in found if item.state == FAIL]
        logs = _clean(folder, keep_logs=bool(failed))
    if own.json:
        items = [item.as_dict() for item in found]
        print(json.dumps({"ok": not failed, "logs": logs, "items": items}, indent=2))
    else:
        print("\n".join(_conclusion(found, failed, logs)))
    return int(bool(failed))


@contextmanager
def _ending_at_signals() -> Iterator[None]:
    """End as at Ctrl-C where the terminal or the job goes away, with all that was started."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, end) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clean(folder: Path, *, keep_logs: bool) -> str | None:
    """Remove what a check has written, but for the logs where they are wanted; return where."""
    if not keep_logs:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    for part in folder.iterdir():
        for inner in part.iterdir() if part.is_dir() else ():
            if inner.name != "logs":
                shutil.rmtree(inner, ignore_errors=True)
    return str(folder)


def _parser() -> argparse.ArgumentParser:
    from lunaris.config.cli import bare_parser

    parser = bare_parser("lunaris check")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=_SECONDS)
    return parser


def _configs(flags: Flags) -> tuple[Config, Config]:
    """Return the config, and that of short runs of it on drawn tokens."""
    from lunaris.check.machine import usable_gpus
    from lunaris.check.runs import STEPS
    from lunaris.config.compose import Composer
    from lunaris.config.schema.data import SyntheticDataConfig
    from lunaris.config.schema.launch import LocalLaunchConfig
    from lunaris.planning.plan import corpus

    composer = Composer(flags.source)
    cfg = composer.compose(flags.overrides, check_data=False)
    for line in composer.defaults_lines([flags.overrides]):
        print(line, file=sys.stderr)
    if not isinstance(cfg.launch, LocalLaunchConfig):
        # As one node of the job.
        cfg.launch = LocalLaunchConfig(processes=cfg.launch.processes_per_node())
    processes, gpus = cfg.launch.processes, usable_gpus(cfg)
    if 0 < gpus < processes:
        raise UserError(
            f"launch: {processes} processes, but this machine has {gpus} GPU{'s' * (gpus > 1)}; "
            "each process takes one"
        )
    vocab_size, _ = corpus(cfg)
    # It pauses, so that the schedule is that of the whole run.
    trainer = replace(
        cfg.trainer,
        max_steps=max(cfg.trainer.max_steps, STEPS + 1),
        stop_at=STEPS,
        log_interval=1,
        compile_model=False,
        eval_interval=None,
        eval_steps=1,
        profile_steps=[],
    )
    tokens = max(20 * cfg.model.max_seq_len, 1 << 16)
    short = replace(
        cfg,
        trainer=trainer,
        data=SyntheticDataConfig(
            vocab_size=vocab_size,
            n_tokens=tokens,
            document_masking=cfg.data.document_masking,
        ),
        checkpoint=replace(cfg.checkpoint, save_interval=10**6, consolidated=False),
        logger={name: each for name, each in cfg.logger.items() if name == "local"},
        launch=replace(cfg.launch, max_restarts=0),
        init_from=None,
    )
    return cfg, short


def _look(cfg: Config, short: Config, folder: Path, until: float) -> Iterator[Item]:
    """Yield each item when it is known."""
    from lunaris.check.drill import hang_drill
    from lunaris.check.item import skipped
    from lunaris.check.machine import machine_items
    from lunaris.check.runs import ShortRuns
    from lunaris.console import phase

    def left_s() -> float:
        return max(until - time.monotonic(), 0.0)

    most = max(_LOOKING_S, _LOOKING_SHARE * left_s())

    def at_steps() -> Item | list[Item]:
        if not runs.trained:
            return skipped("waits", "needs the training above")
        return _items_of("steps", short, folder, min(left_s(), most))

    yield from machine_items(cfg)
    runs = ShortRuns(short, folder, left_s, compiles=cfg.trainer.compile_model)
    steps: list[tuple[str, str, Callable[[], Item | list[Item]]]] = [
        (
            "device",
            "looking at devices, kernels and network",
            # The first of all: with its full time it has no excuse.
            lambda: _items_of("probe", short, folder, min(left_s(), most), left_s() >= most),
        ),
        ("training", "training some steps", runs.train),
        ("waits", "looking at single steps", at_steps),
        ("resume", "stopping and resuming", runs.resumed),
        ("hang drill", "letting a process hang", lambda: hang_drill(short, folder, left_s())),
        ("compilation", "compiling", runs.compiled),
    ]
    for name, doing, step in steps:
        if left_s() == 0:
            yield skipped(name, "no time is left; give --seconds")
            continue
        with phase(doing, log=False):
            found = step()
        yield from found if isinstance(found, list) else [found]


def _items_of(
    name: str, cfg: Config, folder: Path, timeout_s: float, hangs: bool = False
) -> list[Item]:
    """Return what processes of the run's number find that run `lunaris.check.NAME`.

    The last item is what they looked at when they crashed (failed) or time ran out (skipped, or
    failed if processes that take so long hang).
    """
    from lunaris.atomic_files import read_json
    from lunaris.check.group import ITEMS
    from lunaris.check.item import FAIL, Item
    from lunaris.check.runs import not_ended
    from lunaris.check.stage import run_module
    from lunaris.runs.create import create

    path = folder / name
    create(replace(cfg, name=name, out_dir=str(path)), "lunaris check", [])
    ended = run_module(f"lunaris.check.{name}", path, timeout_s)
    written = read_json(path / ITEMS)
    found = [Item.from_dict(each) for each in written.get("items", [])]
    if ended.code != 0:
        # Nothing else is known of it.
        doing = written.get("doing") or "processes"
        hung = hangs and ended.code is None
        found.append(Item(doing, FAIL, ended.reason()) if hung else not_ended(doing, ended))
    return found


def _conclusion(found: list[Item], failed: list[str], logs: str | None) -> list[str]:
    from lunaris.check.item import SKIP
    from lunaris.console import fitted

    skipped = sum(item.state == SKIP for item in found)
    said = f"{len(failed)} failed: {', '.join(failed)}" if failed else "nothing failed"
    lines = ["", said + (f", {skipped} skipped" if skipped else "")]
    if logs is not None:
        lines.append(f"logs    {logs}")
    advice = [text for item in found for text in item.advice]
    return lines + [fitted(f"change  {text}") for text in advice]
