"""The share of routing choices that change between evaluations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import torch

from lunaris.metrics.churn import RoutingChurn
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir


def choices(*tokens: list[int]) -> torch.Tensor:
    """Return the choices of one sequence, [1, L, k]."""
    return torch.tensor([tokens])


def test_a_choice_counts_where_it_is_new_whatever_its_order() -> None:
    churn = RoutingChurn()
    churn.watch([choices([0, 1], [2, 3])])
    assert churn.row([4]) == {}
    churn.watch([choices([1, 0], [2, 5])])
    assert churn.row([4]) == {"moe/layer_04/churn": 0.25}
    churn.watch([choices([6, 7], [0, 1])])
    assert churn.row([4]) == {"moe/layer_04/churn": 1.0}


def test_a_layer_without_choices_or_of_another_shape_has_no_number() -> None:
    churn = RoutingChurn()
    churn.watch([None, choices([1], [2]), choices([0], [0])])
    churn.row([0, 1, 2])
    churn.watch([None, choices([1]), choices([0], [1])])
    assert churn.row([0, 1, 2]) == {"moe/layer_02/churn": 0.5}


def test_a_saved_state_continues() -> None:
    churn = RoutingChurn()
    churn.watch([None, choices([0, 300], [2, 3])])
    churn.row([0, 1])
    again = RoutingChurn(json.loads(json.dumps(churn.state_dict())))
    again.watch([None, choices([0, 300], [2, 4])])
    assert again.row([0, 1]) == {"moe/layer_01/churn": 0.25}
    assert RoutingChurn({}).state_dict() == {}


def test_a_checkpoint_holds_a_bounded_number_of_choices() -> None:
    churn = RoutingChurn()
    churn.watch([torch.zeros(8, 1024, 8, dtype=torch.int64)] * 61)
    churn.row(range(61))
    assert len(json.dumps(churn.state_dict())) < 4 * 2**17 * 2 / 3 + 61 * 100


def test_a_run_that_starts_again_logs_what_an_undisturbed_one_logs(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    """It starts again from step 4, between the evaluations of steps 3 and 6."""
    keys = ["trainer.eval_interval=3", "optimizer.learning_rate=0.1"]
    whole = churns(run_here(tiny(*keys, name="whole")))
    assert sorted(whole) == [3, 6, 8]
    values = [value for row in whole.values() for value in row.values()]
    assert all(0 <= value <= 1 for value in values) and len(set(values)) > 2
    again = run_here(tiny(*keys, name="again"))
    shutil.rmtree(again.checkpoints / "step_00000008")
    assert churns(run_here(tiny(*keys, name="again"))) == whole


def churns(run_dir: RunDir) -> dict[int, dict[str, float]]:
    """Return the churn of each layer in the rows that have it, by step."""
    rows = read_rows(run_dir.metrics_path)
    found = {r["step"]: {k: v for k, v in r.items() if k.endswith("/churn")} for r in rows}
    return {step: row for step, row in found.items() if row}
