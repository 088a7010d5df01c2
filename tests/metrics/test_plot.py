"""The plot shows the series that its labels name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lunaris.metrics.plot import plot_loss

DENSE = [
    {"step": 0, "val/loss": 6.0},
    {"step": 1, "train/loss": 9.1, "train/main_loss": 5.0, "train/aux_loss": 4.1},
    {"step": 2, "train/loss": 8.1, "train/main_loss": 4.0, "val/loss": 4.5, "train/grad_norm": 1.0},
    {"step": 3, "train/main_loss": None},
]
LOADS = [
    {},
    {"moe/max_load": 1.5, "moe/min_load": 0.5},
    {"moe/max_load": 1.25, "moe/min_load": 0.75},
    {},
]
TRAINING = {
    "training": [(1, 5.0), (2, 4.0)],
    "validation": [(0, 6.0), (2, 4.5)],
}
EXPERTS = {
    "busiest expert": [(1, 1.5), (2, 1.25)],
    "idlest expert": [(1, 0.5), (2, 0.75)],
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    figures: list[Figure] = []
    real = Figure.savefig

    def savefig(figure: Figure, *args: object, **keys: object) -> None:
        figures.append(figure)
        real(figure, *args, **keys)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_every_label_names_its_series(tmp_path: Path, drawn: list[Figure], experts: bool) -> None:
    rows = [a | b for a, b in zip(DENSE, LOADS, strict=True)] if experts else DENSE
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_loss(metrics, png)
    found = [
        {
            str(line.get_label()): [(int(x), float(y)) for x, y in line.get_xydata()]
            for line in axes.get_lines()
        }
        for axes in drawn[0].axes
    ]
    assert found == ([TRAINING, EXPERTS] if experts else [TRAINING])
    assert drawn[0].axes[-1].get_xlabel() == "step"
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_change_of_the_config_is_a_vertical_line(tmp_path: Path, drawn: list[Figure]) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in DENSE))
    plot_loss(metrics, tmp_path / "loss.png", {1: "optimizer.learning_rate: 0.003 → 0.001"})
    (axes,) = drawn[0].axes
    marks = {str(line.get_label()): line.get_xdata() for line in axes.get_lines()[2:]}
    assert marks == {"step 1: optimizer.learning_rate: 0.003 → 0.001": [1, 1]}
