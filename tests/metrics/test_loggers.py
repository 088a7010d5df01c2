from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lunaris.config.compose import compose
from lunaris.metrics.loggers import LocalLogger, Logger, Loggers
from lunaris.metrics.records import Row, read_rows
from lunaris.runs.run_dir import RunDir

CFG = compose(["name=x", "trainer.max_steps=4"])
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ROW = {"step": 2, "train/loss": 5.0, "perf/tokens_per_s": 1234.5, "moe/layer_00/load": [0.25, 0.75]}


def test_local_logger_writes_the_row_and_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = LocalLogger()
    logger.start(RunDir(tmp_path), CFG, step=0)
    logger.tick(2)
    logger.log(ROW)
    logger.finish()
    assert read_rows(tmp_path / "metrics.jsonl") == [ROW]
    out = capsys.readouterr().out
    assert out == "step 2/4  loss 5.0000  1,234 tokens/s\n"


def test_on_a_terminal_rows_with_a_validation_loss_stay_above_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_terminal: Callable[[int], io.StringIO]
) -> None:
    screen = on_terminal(60)
    monkeypatch.setattr("lunaris.metrics.loggers._DRAW_S", 0.0)
    logger = LocalLogger()
    logger.start(RunDir(tmp_path), CFG, step=0)
    for step in (1, 2, 3):
        logger.tick(step)
        logger.log(ROW | {"step": step, "perf/tokens_per_s": 1234567890123.0})
    logger.log(ROW | {"step": 3, "val/loss": 4.25, "perf/tokens_per_s": 1234567890123.0})
    logger.message("a message")
    print("from elsewhere")
    logger.finish()
    lines = [line for line in re.split(r"[\r\n]+", _ESCAPES.sub("", screen.getvalue())) if line]
    assert max(len(line) for line in lines) <= 60
    printed = [line for line in lines if "━" not in line]
    assert "step 3/4  loss 5.0000  val 4.2500" in printed
    assert "a message" in printed and "from elsewhere" in printed
    shown = [line for line in lines if "━" in line]
    assert any(line.startswith("step 3/4") and "loss 5.0000" in line for line in shown)
    assert sys.stdout is screen


class Calls(Logger):
    """Notes every call; fails in the one that it is given."""

    def __init__(self, failing: str = "") -> None:
        self.seen: list[str] = []
        self._failing = failing

    def _note(self, call: str) -> None:
        self.seen.append(call)
        if call == self._failing:
            raise ValueError(f"no {call}")

    def start(self, run_dir: RunDir, cfg: object, step: int) -> None:
        self._note("start")

    def tick(self, step: int) -> None:
        self._note(f"tick {step}")

    def log(self, row: Row) -> None:
        self._note(f"log {row['step']}")

    def message(self, text: str) -> None:
        self._note(f"message {text}")

    def flush(self) -> None:
        self._note("flush")

    def finish(self) -> None:
        self._note("finish")


EVERY_CALL = ["start", "tick 2", "log 2", "message hello", "flush", "finish"]


def call_all(logger: Logger, run_dir: RunDir) -> None:
    logger.start(run_dir, CFG, 0)
    logger.tick(2)
    logger.log(ROW)
    logger.message("hello")
    logger.flush()
    logger.finish()


@pytest.mark.parametrize("failing", ["", *EVERY_CALL])
def test_every_logger_gets_every_call_until_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    first, last = Calls(failing), Calls()
    call_all(Loggers({"a": first, "local": LocalLogger(), "b": last}), RunDir(tmp_path))
    assert last.seen == EVERY_CALL
    assert first.seen == EVERY_CALL[: EVERY_CALL.index(failing) + 1] if failing else EVERY_CALL
    assert read_rows(tmp_path / "metrics.jsonl") == [ROW]
    told = f"logger.a failed and is dropped (ValueError: no {failing})"
    assert (told in capsys.readouterr().out) is bool(failing)


def test_a_failing_local_logger_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        call_all(Loggers({"local": LocalLogger()}), RunDir(tmp_path / "absent"))


def test_no_logger_at_all_drops_everything(tmp_path: Path) -> None:
    call_all(Loggers({}), RunDir(tmp_path / "absent"))
    call_all(type("Silent", (Logger,), {})(), RunDir(tmp_path / "absent"))
