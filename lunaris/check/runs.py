"""Short runs of a config: their speed, compiled and not, and whether they continue exactly."""

from __future__ import annotations

import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lunaris.check.item import FAIL, OK, Item, skipped
from lunaris.check.stage import Ended, run_module
from lunaris.config.schema.root import Config
from lunaris.config.schema.trainer import AUTO
from lunaris.metrics.records import read_rows
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir

STEPS, HALF = 6, 3
# The first steps allocate and compile.
_WARM = 2
_WORKER = "lunaris.launch.worker"
# Of losses, relative: what another order of additions may change in so few steps.
_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 3e-2}
# Times as fast, from which on it is worth to change a key.
_WORTHWHILE = 1.05
_EXACT = ("train/", "val/", "moe/")
_RESUMED = re.compile(rf"^resumed +after step {HALF}$", re.MULTILINE)
_NO_TIME = "give --seconds"

Rows = list[dict[str, Any]]


class ShortRuns:
    """Runs of a few steps in folders below `folder`; left_s: the seconds that are left for all.

    compiles: whether the config that is checked compiles its model; these runs do not, but for one.
    """

    def __init__(
        self, cfg: Config, folder: Path, left_s: Callable[[], float], *, compiles: bool = False
    ) -> None:
        self._cfg, self._folder, self._left_s, self._compiles = cfg, folder, left_s, compiles
        self._rows: Rows = []

    def train(self) -> Item:
        """Train a few steps, and say how fast."""
        rows, ended = self._run("whole")
        if ended.code != 0:
            return not_ended("training", ended)
        row = rows[-1]
        if row["train/loss"] is None:  # As metrics.jsonl has a number that is not finite.
            return Item("training", FAIL, f"the loss is not finite at step {row['step']}")
        self._rows = rows
        speed, tokens = _median(rows, "perf/tokens_per_s"), row["train/tokens"] / row["step"]
        figures = {
            "tokens_per_s": speed, "mfu": _median(rows, "perf/mfu"), "loss": row["train/loss"],
            "peak_memory_gb": max(row["perf/peak_memory_gb"]), "seconds": ended.seconds,
        }  # fmt: skip
        text = f"{speed:,.0f} tokens/s, {tokens / speed:.3g} s a step of {tokens:,.0f} tokens"
        if figures["mfu"]:
            text += f", MFU {figures['mfu']:.1%}"
        text += f", peak {figures['peak_memory_gb']:.2f} GiB a process"
        if self._compiles:
            text += ", not compiled"
        return Item("training", OK, f"{text}; loss {row['train/loss']:.4f}", figures)

    @property
    def trained(self) -> bool:
        """Whether the run of `train` ended, with a finite loss."""
        return bool(self._rows)

    def compiled(self) -> Item:
        """Train the same steps compiled, and compare losses and speed."""
        if not self.trained:
            return skipped("compilation", "needs the training above")
        rows, ended = self._run("compiled", compile_model=True)
        if ended.code != 0:
            if ended.code is not None and self._compiles:
                return Item("compilation", FAIL, ended.reason())
            return skipped("compilation", ended.reason())
        gain = _median(rows, "perf/tokens_per_s") / _median(self._rows, "perf/tokens_per_s")
        worst = _difference(rows, self._rows)
        figures = {"speed": gain, "difference": worst, "seconds": ended.seconds}
        text = (
            f"{gain:.2f} times as fast, losses differ by {worst:.1e}; it takes "
            f"{ended.seconds:.0f} s to begin and train"
        )
        if self._cfg.model.dropout:
            text += " (compiled, dropout draws other numbers)"
        elif worst > self._tolerance:
            return Item("compilation", FAIL, text, figures)
        advice: tuple[str, ...] = ()
        if gain > _WORTHWHILE and not self._compiles:
            advice = (f"trainer.compile_model=true: {gain:.2f} times as fast here",)
        if gain < 1 / _WORTHWHILE and self._compiles:
            advice = (f"trainer.compile_model=false: {1 / gain:.2f} times as fast here",)
        return Item("compilation", OK, text, figures, advice)

    def resumed(self) -> Item:
        """Train half of the steps, save, continue in new processes, and compare with the whole."""
        if not self.trained:
            return skipped("resume", "needs the training above")
        _, ended = self._run("parts", keep=True, stop_at=HALF)
        if ended.code == 0:
            rows, ended = self._run("parts")
        if ended.code != 0:
            return not_ended("resume", ended)
        if not _RESUMED.search(self._log("parts")):
            return Item("resume", FAIL, f"the run did not continue after step {HALF}")
        one, other = _exact(self._rows), _exact(rows)
        if one == other:
            text = f"after a save at step {HALF}, all {STEPS} steps are equal bit for bit"
            return Item("resume", OK, text)
        if len(one) != len(other):
            text = f"the resumed run has {len(other)} rows, one that was not stopped {len(one)}"
            return Item("resume", FAIL, text)
        worst = _difference(rows, self._rows)
        text = f"losses differ by {worst:.1e} from those of a run that was not stopped"
        if self._on_gpu() and worst <= self._tolerance:
            text += ", as kernels that add in another order make them"
            return Item("resume", OK, text, {"difference": worst})
        return Item("resume", FAIL, text, {"difference": worst})

    @property
    def _tolerance(self) -> float:
        return _TOLERANCE[self._precision]

    @property
    def _precision(self) -> str:
        """The precision that the first run has, decided by its devices where the config says so."""
        given = self._cfg.trainer.precision
        if given != AUTO:
            return given
        chosen: str = RunDir(self._folder / "whole").read_config().trainer.precision
        return chosen

    def _on_gpu(self) -> bool:
        # The line may be broken between any two words.
        return f"{self._precision} on cuda" in " ".join(self._log("whole").split())

    def _log(self, name: str) -> str:
        log = self._folder / name / "logs" / "rank_0.log"
        return log.read_text(errors="replace") if log.is_file() else ""

    def _run(self, name: str, keep: bool = False, **trainer: Any) -> tuple[Rows, Ended]:
        """Train in folder `name`, with other keys of the trainer; return its rows.

        keep: the checkpoints, which may be as large as the disk.
        """
        path = self._folder / name
        keys = replace(self._cfg.trainer, **trainer)
        cfg = replace(self._cfg, name=name, out_dir=str(path), trainer=keys)
        create(cfg, "lunaris check", [])
        ended = run_module(_WORKER, path, self._left_s())
        if not keep:
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
        return read_rows(path / "metrics.jsonl"), ended


def not_ended(name: str, ended: Ended) -> Item:
    """Return the item of processes that time ran out for (skipped) or that failed."""
    if ended.code is None:
        return skipped(name, f"{ended.reason()}; {_NO_TIME}")
    return Item(name, FAIL, ended.reason())


def _median(rows: Rows, name: str) -> float:
    """Return the median of a metric over the steps after the first ones; 0 where it is not known.

    The last row of a longer run is left out.
    """
    values = [row.get(name) for row in rows if _WARM < row["step"] <= STEPS]
    return statistics.median([value for value in values if value is not None] or [0.0])


def _difference(rows: Rows, others: Rows) -> float:
    """Return the largest relative difference of the training losses of the same steps."""
    right = {row["step"]: row["train/loss"] for row in others if row.get("train/loss")}
    pairs = [(row.get("train/loss"), right.get(row["step"])) for row in rows if row["step"]]
    if any(a is None or b is None for a, b in pairs):
        return float("inf")
    return max((abs(a - b) / abs(b) for a, b in pairs if a and b), default=float("inf"))


def _exact(rows: Rows) -> Rows:
    """Return what does not depend on the clock."""
    return [
        {key: value for key, value in row.items() if key == "step" or key.startswith(_EXACT)}
        for row in rows
    ]
