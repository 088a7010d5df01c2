from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lunaris.metrics.loggers import LocalLogger
from lunaris.metrics.plot import plot_loss
from lunaris.metrics.records import read_rows
from lunaris.metrics.wandb_logger import WandbLogger
from lunaris.runs.run_dir import RunDir

CFG = OmegaConf.create({"name": "x", "trainer": {"max_steps": 4}})
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_keeps_its_run_id_and_draws_every_layer(tmp_path: Path) -> None:
    for step in (0, 2):
        logger = wandb_logger("offline")
        logger.start(RunDir(tmp_path), CFG, step=step)
        assert logger._run is not None
        charts: dict[str, object] = {}
        real_log = logger._run.log
        logger._run.log = lambda row, into=charts, log=real_log: (into.update(row), log(row))
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

    def unreachable(**settings: object) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", unreachable)
    logger = wandb_logger("online")
    logger.start(RunDir(tmp_path), CFG, step=0)
    logger.log(ROW)

    class Broken:
        def log(self, row: object) -> None:
            raise wandb.errors.CommError("connection reset")

    logger._run = Broken()
    logger.log(ROW | {"step": 4})
    logger.finish()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2, 4]
    assert "no route to host" in (out := capsys.readouterr().out) and "connection reset" in out


def test_plot_is_a_png(tmp_path: Path) -> None:
    logger = LocalLogger()
    logger.start(RunDir(tmp_path), CFG, step=0)
    for step in (1, 2):
        logger.log(
            {
                "step": step,
                "train/main_loss": 5.0 / step,
                "val/loss": 5.5 / step,
                "moe/max_load": 1.5,
                "moe/min_load": 0.5,
            }
        )
    logger.finish()
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
