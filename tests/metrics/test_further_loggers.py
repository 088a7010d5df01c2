"""TensorBoard and Trackio: what they write, read back offline, also after a resume."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.config.compose import compose
from lunaris.errors import UserError
from lunaris.metrics.loggers import LocalLogger, Logger, Loggers
from lunaris.metrics.records import read_rows, scalars
from lunaris.metrics.tensorboard_logger import TensorBoardLogger
from lunaris.metrics.trackio_logger import TrackioLogger
from lunaris.runs.run_dir import RunDir

CFG = compose(["name=x", "trainer.max_steps=4"])
Series = dict[str, list[tuple[int, float]]]


def row(step: int, loss: float) -> dict[str, Any]:
    further = {"perf/mfu": None, "perf/peak_memory_gb": [1.0, 2.0], "val/loss": loss + 1}
    return {"step": step, "train/loss": loss, "moe/layer_00/load": [0.25, 0.75], **further}


def from_tensorboard(run_dir: RunDir) -> tuple[Series, Series]:
    """Return the scalars, and the histograms' counts, by tag as (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir.path / "tensorboard"), {"scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    values = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]}
    charts = {
        tag: [
            (event.step, count)
            for event in events.Histograms(tag)
            for count in event.histogram_value.bucket
        ]
        for tag in tags["histograms"]
    }
    assert tags["tensors"] == ["config/text_summary"]
    return values, charts


def from_trackio(run_dir: RunDir) -> tuple[Series, Series]:
    from trackio.sqlite_storage import SQLiteStorage

    name = (run_dir.path / "trackio_name").read_text()
    values: Series = {}
    charts: Series = {}
    with sqlite3.connect(SQLiteStorage.get_project_db_path("lunaris")) as database:
        found = database.execute(
            "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,)
        ).fetchall()
    database.close()
    for step, text in found:
        for key, value in json.loads(text).items():
            if isinstance(value, dict):
                assert value["bins"] == list(range(len(value["values"]) + 1))
                charts.setdefault(key, []).extend((step, count) for count in value["values"])
            else:
                values.setdefault(key, []).append((step, value))
    return values, charts


KINDS: dict[str, tuple[Callable[[], Logger], Callable[[RunDir], tuple[Series, Series]]]] = {
    "tensorboard": (TensorBoardLogger, from_tensorboard),
    "trackio": (lambda: TrackioLogger(project="lunaris", group=None), from_trackio),
}


def attempt(run_dir: RunDir, kind: str, step: int, rows: list[dict[str, Any]]) -> None:
    logger = Loggers({"local": LocalLogger(), kind: KINDS[kind][0]()})
    logger.start(run_dir, CFG, step)
    for each in rows:
        logger.log(each)
    logger.flush()
    logger.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_the_same_series_and_a_resumed_run_no_row_twice(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = RunDir(tmp_path)
    # Killed before the first checkpoint, then after that of step 2, then done.
    attempt(run_dir, kind, 0, [row(0, 9.5), row(1, 9.25)])
    attempt(run_dir, kind, 0, [row(0, 8.0), row(1, 7.0), row(2, 6.0), row(3, 5.5)])
    attempt(run_dir, kind, 2, [row(3, 5.0), row(4, 4.0)])
    values, charts = KINDS[kind][1](run_dir)
    steps = [(0, 8.0), (1, 7.0), (2, 6.0), (3, 5.0), (4, 4.0)]
    assert values == {
        "train/loss": steps,
        "val/loss": [(step, loss + 1) for step, loss in steps],
    }
    shares = [(step, share) for step, _ in steps for share in (0.25, 0.75)]
    assert charts == {"moe/layer_00/load_chart": shares}
    # Those of metrics.jsonl, number by number.
    local = [
        (r["step"], name, v)
        for r in read_rows(run_dir.metrics_path)
        for name, v in scalars(r).items()
    ]
    assert sorted(local) == sorted((s, name, v) for name, rows in values.items() for s, v in rows)
    assert "failed" not in capsys.readouterr().out


def test_trackio_keeps_runs_of_one_name_apart_and_fills_gaps(tmp_path: Path) -> None:
    folders = [RunDir(tmp_path / name) for name in ("a", "b")]
    for run_dir in folders:
        run_dir.path.mkdir()
        attempt(run_dir, "trackio", 0, [row(1, 3.0), row(2, 2.0)])
    names = [(run_dir.path / "trackio_name").read_text() for run_dir in folders]
    assert names[0] != names[1] and names[1].startswith("x")
    from trackio.sqlite_storage import SQLiteStorage

    with sqlite3.connect(SQLiteStorage.get_project_db_path("lunaris")) as database:
        database.execute("DELETE FROM metrics WHERE run_name = ? AND step = 1", (names[0],))
    database.close()
    attempt(folders[0], "trackio", 2, [row(3, 1.0)])
    for run_dir, losses in zip(folders, ([3.0, 2.0, 1.0], [3.0, 2.0]), strict=True):
        found = sorted(from_trackio(run_dir)[0]["train/loss"])
        assert found == [(i + 1, loss) for i, loss in enumerate(losses)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_run_logs_and_goes_on_when_the_logger_fails(
    kind: str,
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = run_here(tiny(f"logger=[local,{kind}]", name=f"good-{kind}"))
    values, _ = KINDS[kind][1](run_dir)
    for r in read_rows(run_dir.metrics_path):
        for name, value in scalars(r).items():
            assert dict(values[name])[r["step"]] == pytest.approx(value, rel=1e-6)

    target = {"tensorboard": TensorBoardLogger, "trackio": TrackioLogger}[kind]

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(target, "log", full_disk)
    failed = run_here(tiny(f"logger=[local,{kind}]", name=f"bad-{kind}"))
    assert failed.read_status()["state"] == "done"
    assert len(read_rows(failed.metrics_path)) == 9
    assert capsys.readouterr().out.count(f"logger.{kind} failed and is dropped (OSError: no s") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_that_is_not_installed_is_one_message_with_the_extra(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == kind else real(name, *rest)
    )
    text = (
        f"logger={kind} needs {kind}, which is not installed: pip install 'lunaris-codex[{kind}]'"
    )
    with pytest.raises(UserError) as caught:
        compose([f"logger=[local,{kind}]"])
    assert str(caught.value) == text
    # A run that is resumed elsewhere says the same.
    monkeypatch.setitem(__import__("sys").modules, kind, None)
    with pytest.raises(UserError) as caught:
        KINDS[kind][0]()
    assert str(caught.value) == text
