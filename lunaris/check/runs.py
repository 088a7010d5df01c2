"""Short runs of a config: their speed, compiled and not, and whether they continue exactly."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lunaris.check.item import FAIL, OK, Item, skipped
from lunaris.check.stage import Ended, run_module
from lunaris.config.schema.root import Config
from lunaris.metrics.records import read_rows
from lunaris.runs.create import create

STEPS, HALF = 6, 3
# The first steps allocate and compile.
_WARM = 2
_WORKER = "lunaris.launch.worker"
# Of losses, relative: what another order of additions may change in so few steps.
_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 3e-2}
# Of the tokens per second, above which it is worth to change a key.
_WORTHWHILE = 1.05
_EXACT = ("train/", "val/", "moe/")

Rows = list[dict[str, Any]]


class ShortRuns:
    """Runs of a few steps in folders below `folder`; left_s: the seconds that are left for all."""

    def __init__(self, cfg: Config, folder: Path, left_s: Callable[[], float]) -> None:
        self._cfg, self._folder, self._left_s = cfg, folder, left_s
        self._rows: Rows = []

    def train(self) -> Item:
        """Train a few steps, and say how fast."""
        rows, ended = self._run("whole")
        if ended.code != 0:
            return Item("training", FAIL, ended.reason())
        self._rows = rows
        speed, row = _speed(rows), rows[-1]
        tokens = row["train/tokens"] / row["step"]
        figures = {
            "tokens_per_s": speed, "mfu": row.get("perf/mfu"), "loss": row["train/loss"],
            "peak_memory_gb": max(row["perf/peak_memory_gb"]), "seconds": ended.seconds,
        }  # fmt: skip
        text = f"{speed:,.0f} tokens/s, {tokens / speed:.3g} s a step of {tokens:,.0f} tokens"
        if figures["mfu"]:
            text += f", MFU {figures['mfu']:.1%}"
        text += f", peak {figures['peak_memory_gb']:.2f} GiB a process"
        state = OK if math.isfinite(row["train/loss"]) else FAIL
        return Item("training", state, f"{text}; loss {row['train/loss']:.4f}", figures)

    def compiled(self) -> Item:
        """Train the same steps compiled, and compare losses and speed."""
        if not self._rows:
            return skipped("compilation", "needs the training above")
        if self._cfg.trainer.compile_model:
            return skipped("compilation", "the config compiles already")
        if self._device() == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return skipped("compilation", "on a CPU needs a C++ compiler")
        rows, ended = self._run("compiled", compile_model=True)
        if ended.code is None:
            return skipped("compilation", f"{ended.reason()}; give --seconds")
        if ended.code != 0:
            return Item("compilation", FAIL, ended.reason())
        gain = _speed(rows) / _speed(self._rows)
        worst = max(
            abs(a["train/loss"] - b["train/loss"]) / abs(b["train/loss"])
            for a, b in zip(rows, self._rows, strict=True)
            if "train/loss" in b
        )
        figures = {"speed": gain, "difference": worst, "seconds": ended.seconds}
        text = (
            f"{gain:.2f} times as fast, losses differ by {worst:.1e}; it takes "
            f"{ended.seconds:.0f} s to begin and train"
        )
        close = worst <= _TOLERANCE[self._cfg.trainer.precision]
        advice = (
            (f"trainer.compile_model=true: {gain:.2f} times as fast here",)
            if close and gain > _WORTHWHILE
            else ()
        )
        return Item("compilation", OK if close else FAIL, text, figures, advice)

    def resumed(self) -> Item:
        """Train half of the steps, save, continue in new processes, and compare with the whole."""
        if not self._rows:
            return skipped("resume", "needs the training above")
        _, ended = self._run("parts", stop_at=HALF)
        if ended.code == 0:
            rows, ended = self._run("parts")
        if ended.code != 0:
            return Item("resume", FAIL, ended.reason())
        one, other = _exact(self._rows), _exact(rows)
        if one == other:
            return Item(
                "resume", OK, f"after a save at step {HALF}, {STEPS} steps equal bit for bit"
            )
        wrong = [
            f"step {a['step']}: {key}"
            for a, b in zip(one, other, strict=False)
            for key in a
            if a[key] != b.get(key)
        ]
        where = wrong[0] if wrong else f"{len(other)} rows instead of {len(one)}"
        same = self._device() != "cuda"
        text = f"a resumed run differs from one that was not stopped, first in {where}"
        # Some kernels of GPUs add in another order each time.
        return Item("resume", FAIL if same else OK, text, {"differing": len(wrong)})

    def _device(self) -> str:
        """Return the device of the runs, as the one that has trained printed it."""
        text = (self._folder / "whole" / "logs" / "rank_0.log").read_text(errors="replace")
        return "cuda" if f"{self._cfg.trainer.precision} on cuda" in text else "cpu"

    def _run(self, name: str, **trainer: Any) -> tuple[Rows, Ended]:
        """Train in folder `name`, with other keys of the trainer; return its rows."""
        path = self._folder / name
        keys = replace(self._cfg.trainer, **trainer)
        cfg = replace(self._cfg, name=name, out_dir=str(path), trainer=keys)
        create(cfg, "lunaris check", [])
        ended = run_module(_WORKER, path, self._left_s())
        return read_rows(path / "metrics.jsonl"), ended


def _speed(rows: Rows) -> float:
    """Return the median tokens per second of the steps after the first ones."""
    return statistics.median(
        row["perf/tokens_per_s"] for row in rows if row["step"] > _WARM and row["step"] <= STEPS
    )


def _exact(rows: Rows) -> Rows:
    """Return what does not depend on the clock."""
    return [
        {key: value for key, value in row.items() if key == "step" or key.startswith(_EXACT)}
        for row in rows
    ]
