"""`lunaris plan`: what a run would cost, before any is spent: parameters, memory, time, traffic."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from typing import TYPE_CHECKING

from lunaris.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from lunaris.config.cli import Flags
    from lunaris.devices import Device
    from lunaris.planning.plan import Plan

_WHAT = """\
Prints what a run would cost, from the config alone: parameters by part, FLOPs, tokens and epochs,
the memory of a process, the size of checkpoints, what is sent over the network in a step, and on a
known GPU the time, GPU-hours and energy. Nothing is allocated or written. With -m, a table over the
points of a sweep.

flags of its own:
  --device NAME  the GPU: H100, A100, "H100 PCIe", …; without it, the GPUs of this machine if any
  --mfu SHARE    the share of the GPU's peak that training reaches (default: 0.35, an assumption)
  --json         print one JSON object, or with -m a list"""

_EXAMPLES = [
    ("lunaris plan model=small moe=top2", "on this machine"),
    ("lunaris plan experiment=moe_1b launch.nodes=4 --device H100", "on 32 GPUs"),
    ("lunaris plan -m moe.n_experts=8,16,32 --device A100", "a table over a sweep"),
]


def main(argv: list[str]) -> int:
    """Compose, count and print; return the exit code."""
    from lunaris.config.cli import help_text, parse_flags
    from lunaris.config.compose import Composer, config_dirs
    from lunaris.config.overruled import overruled
    from lunaris.planning.plan import make_plan
    from lunaris.planning.report import as_dict, as_text

    own, rest = _parser().parse_known_args(argv)
    flags = parse_flags(rest, "lunaris plan")
    if flags.help:
        print(help_text("lunaris plan", _WHAT, _EXAMPLES, config_dirs(flags.source)))
        return 0
    if not (math.isfinite(own.mfu) and 0 < own.mfu <= 1):
        raise UserError(f"--mfu {own.mfu}: must be above 0 and at most 1")
    device = _device(own.device)
    if flags.multirun:
        return _sweep(flags, device, own.mfu, as_json=own.json)
    # Data that is not prepared yet can be planned with all the same.
    composer = Composer(flags.source)
    cfg = composer.compose(flags.overrides, check_data=False)
    for line in composer.defaults_lines([flags.overrides]):
        print(line, file=sys.stderr)
    for text in overruled(composer, [flags.overrides]):
        print(f"warning: {text}", file=sys.stderr)
    plan = make_plan(cfg, gpu=device is not None, device=device)
    if own.json:
        print(json.dumps(as_dict(plan, device, own.mfu), indent=2))
    else:
        print(as_text(plan, device, own.mfu))
    return 0


def _parser() -> argparse.ArgumentParser:
    from lunaris.config.cli import bare_parser

    parser = bare_parser("lunaris plan")
    parser.add_argument("--device")
    parser.add_argument("--mfu", type=float, default=0.35)
    parser.add_argument("--json", action="store_true")
    return parser


def _device(name: str | None) -> Device | None:
    """Return the device of that name, or this machine's GPU; None for a machine without one."""
    from lunaris.devices import DEVICES, find_device, this_machine

    if name is None:
        gpus = this_machine().gpus
        return find_device(gpus[0]) if gpus else None
    known = {device.name.lower(): device for device in DEVICES}
    if name.lower() not in known:
        names = [device.name for device in DEVICES]
        raise UserError(
            f"--device {name}: not a known GPU; allowed are {', '.join(names)}"
            f"{did_you_mean(name, names)}"
        )
    return known[name.lower()]


def _sweep(flags: Flags, device: Device | None, mfu: float, *, as_json: bool) -> int:
    from lunaris.launch.sweep.expand import read_request
    from lunaris.planning.plan import make_plan
    from lunaris.planning.report import as_dict, as_table

    request = read_request(flags, shlex.join(["lunaris", "plan", *flags.overrides]))
    sweep = request.sweep()
    hydra = request.hydra_config(sweep.composer)
    rows: list[tuple[str, Plan]] = []
    points = request.expand(hydra.sweeper.params or {})
    for line in sweep.composer.defaults_lines(points):
        print(line, file=sys.stderr)
    for overrides in points:
        cfg = sweep.composer.compose(overrides, check_data=False)
        rows.append(
            (sweep.name_of(overrides), make_plan(cfg, gpu=device is not None, device=device))
        )
    if as_json:
        print(json.dumps([{**as_dict(p, device, mfu), "name": name} for name, p in rows], indent=2))
    else:
        print(as_table(rows, device, mfu))
    return 0
