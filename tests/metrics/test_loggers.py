from __future__ import annotations

from pathlib import Path

import pytest

from lunaris.config.compose import compose
from lunaris.metrics.loggers import LocalLogger, Logger, Loggers
from lunaris.metrics.records import Row, read_rows
from lunaris.metrics.wandb_logger import WandbLogger
from lunaris.runs.run_dir import RunDir

CFG = compose(["name=x", "trainer.max_steps=4"])
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
    assert "step 2/4" in out and "loss 5.0000" in out and "tokens/s 1,234" in out and "ETA" in out


def wandb_logger(mode: str) -> WandbLogger:
    return WandbLogger(project="p", entity=None, group=None, tags=[], mode=mode)


def with_local(logger: Logger) -> Loggers:
    return Loggers({"local": LocalLogger(), "other": logger})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_keeps_its_run_id_and_draws_every_layer(tmp_path: Path) -> None:
    for step in (0, 2):
        wandb = wandb_logger("offline")
        logger = with_local(wandb)
        logger.start(RunDir(tmp_path), CFG, step=step)
        assert wandb._run.config["trainer"]["max_steps"] == 4
        charts: dict[str, object] = {}
        real_log = wandb._run.log
        wandb._run.log = lambda row, into=charts, log=real_log: (into.update(row), log(row))
        logger.log(ROW | {"step": step + 1, "val/loss": 4.0})
        logger.finish()
        assert "moe/layer_00/load_chart" in charts
    run_id = (tmp_path / "wandb_id").read_text()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(run_id in folder.name for folder in folders)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 3]


def test_wandb_failing_at_start_or_later_leaves_local_logging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    class Broken:
        def define_metric(self, *names: str, **keys: str) -> None:
            pass

        def log(self, row: object) -> None:
            raise wandb.errors.CommError("connection reset")

    modes: list[str] = []

    def init(*, mode: str, **settings: object) -> Broken:
        modes.append(mode)
        if mode in unreachable:
            raise wandb.errors.CommError(f"no route to host ({mode})")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    for i, unreachable in enumerate((("online", "offline"), ("online",), ())):
        run_dir = RunDir(tmp_path / str(i))
        run_dir.path.mkdir()
        logger = with_local(wandb_logger("online"))
        logger.start(run_dir, CFG, step=0)
        logger.log(ROW)
        logger.log(ROW | {"step": 4})
        logger.finish()
        assert [row["step"] for row in read_rows(run_dir.metrics_path)] == [2, 4]
        out = capsys.readouterr().out
        assert ("W&B (online) did not start: no route to host" in out) is bool(unreachable)
        assert ("no route to host (offline)" in out) is (len(unreachable) == 2)
        assert ("connection reset" in out) is (len(unreachable) < 2)
        assert out.count("logger.other failed and is dropped") == 1
    assert modes == ["online", "offline"] * 2 + ["online"]


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
