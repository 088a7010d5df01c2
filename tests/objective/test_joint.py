"""An objective from outside the package, with two losses: it trains, is logged and evaluated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir

TOY = '''
import torch

from lunaris.model.loss import linear_cross_entropy
from lunaris.objective.base import Loss, Objective, ObjectiveOutput


class OneAndTwoAhead(Objective):
    """Also predict the token after the next, and take a target only at every other position."""

    def __init__(self, *, ahead_weight: float, **of_the_option: object) -> None:
        self.ahead_weight = ahead_weight

    def __call__(self, model, batch):
        targets = self._targets(batch)
        ahead = targets.roll(-1, dims=1)  # as many targets, so both are means over the same count

        def head(hidden, weight):
            return {
                "main": linear_cross_entropy(hidden, weight, targets),
                "ahead": linear_cross_entropy(hidden, weight, ahead),
            }

        out = model(batch["tokens"], head=head)
        losses = {
            "main": Loss(out.outputs["main"]),
            "ahead": Loss(out.outputs["ahead"], self.ahead_weight),
        }
        return ObjectiveOutput.of(losses, out)

    def count_targets(self, batch):
        return (self._targets(batch) >= 0).sum(dim=(-2, -1))

    def _targets(self, batch):
        return batch["targets"].masked_fill(batch["tokens"] % 2 == 0, -100)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the overrides that choose the objective, by its dotted path."""
    (tmp_path / "toy_objective.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    yield ["objective._target_=toy_objective.OneAndTwoAhead", "+objective.ahead_weight=0.25"]
    sys.modules.pop("toy_objective")


def test_every_loss_trains_and_is_logged(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    toy: list[str],
) -> None:
    whole = run_here(tiny("moe=switch", *toy, name="whole"))
    halves = ["trainer.batch_size=2", "trainer.gradient_accumulation_steps=2"]
    parts = run_here(tiny("moe=switch", *toy, *halves, name="parts"))
    rows = [row for row in read_rows(whole.metrics_path) if "train/loss" in row]
    for row in rows:
        main, ahead, aux = (row[f"train/{name}_loss"] for name in ("main", "ahead", "aux"))
        assert row["train/loss"] == main + 0.25 * ahead + aux
    for name in ("main", "ahead"):
        assert rows[-1][f"train/{name}_loss"] < rows[0][f"train/{name}_loss"]
    # Micro-steps have different numbers of targets, and weigh by them.
    other = [row for row in read_rows(parts.metrics_path) if "train/loss" in row]
    for a, b in zip(rows, other, strict=True):
        assert b["train/main_loss"] == pytest.approx(a["train/main_loss"], rel=1e-5)
    assert read_rows(whole.metrics_path)[-1]["val/loss"] > 0
