"""The page of a run: its numbers are those of the files, and nothing in them is taken for HTML."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir

ROWS = [
    {"step": 0, "val/loss": 6.0, "val/wiki/loss": 5.5, "val/code/loss": 6.5},
    {"step": 2, "train/loss": 5.125, "train/main_loss": 5.0, "train/aux_loss": 0.125,
     "train/lr": 1e-3, "train/grad_norm": 0.9, "train/skipped_steps": 0, "train/sequences": 8,
     "perf/tokens_per_s": 100.0, "perf/mfu": None, "perf/data_wait": 0.5,
     "perf/peak_memory_gb": [0.25, 0.5]},
    {"step": 4, "train/loss": None, "train/main_loss": None, "train/lr": 1e-3,
     "train/grad_norm": None, "train/skipped_steps": 2, "train/sequences": 16,
     "perf/tokens_per_s": 300.0, "perf/data_wait": 0.25, "val/loss": 4.5,
     "val/wiki/loss": 4.0, "val/code/loss": 5.0, "perf/peak_memory_gb": [0.25, 0.75]},
    {"step": 8, "train/loss": 4.0, "train/main_loss": 3.9, "train/lr": 1e-4,
     "train/skipped_steps": 2, "train/sequences": 32, "perf/tokens_per_s": 200.0,
     "perf/data_wait": 0.3, "val/loss": 5.25, "val/wiki/loss": 5.0, "val/code/loss": 5.5,
     "perf/peak_memory_gb": [0.25, 0.75], "mine/score": 7.0},
]  # fmt: skip
HOSTILE = '</script><img src=x onerror="alert(1)"><b>&amp;'


def test_the_curves_are_the_numbers_of_the_metrics(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    page = report_of(str(make_run("runs/x", ROWS)))
    assert page.points("loss", "training") == [(2, 5.0), (4, None), (8, 3.9)]
    assert page.points("loss", "validation") == [(0, 6.0), (4, 4.5), (8, 5.25)]
    assert page.points("loss", "validation: code") == [(0, 6.5), (4, 5.0), (8, 5.5)]
    assert page.points("parts", "aux_loss") == [(2, 0.125)]
    assert page.points("metric-train-lr") == [(2, 1e-3), (4, 1e-3), (8, 1e-4)]
    assert page.points("memory", "largest") == [(2, 0.5), (4, 0.75), (8, 0.75)]
    assert page.points("memory", "smallest") == [(2, 0.25), (4, 0.25), (8, 0.25)]
    assert page.points("skips", "skipped") == [(2, 0), (4, 2), (8, 2)]
    assert page.points("metric-mine-score") == [(8, 7.0)]
    assert "metric-perf-mfu" not in page.figures
    text = " ".join(page.text.split())
    assert "best validation loss 4.5000 at step 4" in text.replace("loss4", "loss 4")
    assert "512" in text  # tokens: 32 sequences of 16


def test_the_warnings_say_what_is_wrong(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    folder = make_run(
        "runs/x", ROWS, extra='{"step": 1\n[]\n', state="failed", last_error="Boom: x"
    )
    text = " ".join(report_of(str(folder)).text.split())
    for words in (
        "The run is failed at step 8 of 8: Boom: x",
        "metrics.jsonl: line 5, 6 cannot be read",
        "The validation loss rose from 4.5000 at step 4 to 5.2500",
        "2 steps were skipped",
        "1 of 3 rows have a training loss that is not finite",
        "Training waits for its data in 28% of the time",
    ):
        assert words in text


def test_a_run_that_paused_is_no_fault(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    folder = make_run("runs/x", ROWS, state="paused", max_steps=20)
    text = " ".join(report_of(str(folder)).text.split())
    assert "The run is paused at step 8 of 20 (trainer.stop_at)." in text
    assert "lunaris resume runs/x trainer.stop_at=null" in text


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    page = report_of(str(make_run("runs/x", ROWS)))
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster", "background")
    ]
    assert addresses and all((value or "").startswith("#") for value in addresses)
    (policy,) = [
        attributes["content"]
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    nonces = {a["nonce"] for a in scripts if a.get("type") != "application/json"}
    assert len(nonces) == 1 and f"script-src 'nonce-{nonces.pop()}'" in str(policy)
    assert str(policy).startswith("default-src 'none';")
    html = Path("runs/x/report.html").read_text()
    assert "@import" not in html.partition("</style>")[0]


def test_what_comes_from_a_run_is_text(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    config = f"name: x\nodd: '{HOSTILE}'\n"
    rows = [{"step": 1, f"val/{HOSTILE}/loss": 1.0, "val/loss": 1.0, HOSTILE: 2.0}]
    folder = make_run("runs/x", rows, config=config, state="failed", last_error=HOSTILE)
    RunDir(folder).note(command=HOSTILE, host=HOSTILE, parents=[{"kind": HOSTILE, "dir": "y"}])
    plain = report_of(str(make_run("runs/plain", rows[:0])))
    page = report_of(str(folder))
    assert page.text.count(HOSTILE) >= 5
    assert "img" not in {tag for tag, _ in page.elements}
    assert sum(tag == "script" for tag, _ in page.elements) == sum(
        tag == "script" for tag, _ in plain.elements
    )
    assert page.points("loss", f"validation: {HOSTILE}") == [(1, 1.0)]


def test_changes_and_restarts_are_lines_and_rows(
    make_run: Callable[..., Path], report_of: Callable[..., Any]
) -> None:
    folder = make_run("runs/x", ROWS)
    change = {
        "step": 4, "keys": {"optimizer.learning_rate": {"old": 0.001, "new": 0.002}}, "config": {},
        "command": "lunaris resume runs/x optimizer.learning_rate=2e-3", "data": None, "time": 1.0,
    }  # fmt: skip
    (folder / "changes.jsonl").write_text(json.dumps(change) + "\n")
    attempts = [{"time": 1.0, "world_size": 1, "step": 0}, {"time": 2.0, "world_size": 2},
                {"time": 3.0, "world_size": 4, "step": 4}]  # fmt: skip
    RunDir(folder).note(attempts=attempts)
    page = report_of(str(folder))
    (shape,) = page.figures["metric-train-lr"]["layout"]["shapes"]
    assert (shape["x0"], shape["label"]["text"]) == (4, "c1 r2")
    assert "optimizer.learning_rate: 0.001 → 0.002" in page.text
    starts = next(table for table in page.tables if table[0][0] == "start")
    assert [row[:2] for row in starts[1:]] == [["start", "0"], ["r1", "–"], ["r2", "4"]]


def test_a_real_run_shows_its_experts_and_what_differs(
    finished: RunDir, report_of: Callable[..., Any]
) -> None:
    page = report_of(str(finished.path))
    rows = read_rows(finished.metrics_path)
    last = rows[-1]
    z = page.trace("experts-layers")["z"]
    for layer, shares in enumerate(z):
        expected = [share * 4 for share in last[f"moe/layer_{layer:02d}/load"]]
        assert shares == pytest.approx(expected, abs=5e-4)
    loads = [row for row in rows if "moe/layer_01/load" in row]
    over_time = page.trace("experts-time", view=1)
    assert over_time["x"] == [row["step"] for row in loads]
    assert over_time["z"][2] == pytest.approx(
        [row["moe/layer_01/load"][2] * 4 for row in loads], abs=5e-4
    )
    differing = next(table for table in page.tables if table[0] == ["key", "this run", "default"])
    assert ["moe.n_experts", "4", "8"] in differing
    assert not [row for row in differing if row[0] in ("seed", "model.norm")]
    # The run is resumed as before, and another report replaces the first one.
    finished.check_kinds()
    assert finished.read_config().moe.n_experts == 4
    report_of(str(finished.path))


@pytest.mark.parametrize(
    "rows", [[], [{"step": 0, "val/loss": 2.0}], [{"step": 1, "train/loss": 2.0}]]
)
def test_little_is_enough(
    make_run: Callable[..., Path], report_of: Callable[..., Any], rows: list[dict[str, Any]]
) -> None:
    folder = make_run("runs/x", rows, state="running")
    for name in ("provenance.json", "status.json"):
        (folder / name).unlink()
    page = report_of(str(folder))
    assert bool(page.figures) == bool(rows)


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "\0", None])
def test_a_config_that_cannot_be_read_is_said(
    make_run: Callable[..., Path], report_of: Callable[..., Any], text: str | None
) -> None:
    folder = make_run("runs/x", ROWS, config=text or "")
    if text is None:
        (folder / "config.yaml").unlink()
        (folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert "config.yaml" in report_of(str(folder)).text
