"""What rows say of the use of experts, and which alarms they raise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lunaris.metrics.expert_health import (
    AlarmBell,
    LayerRouting,
    entropy,
    expert_alarms,
    expert_row,
)
from lunaris.metrics.records import Row, read_rows
from lunaris.moe.router.top_k import TopKRouter
from lunaris.runs.run_dir import RunDir


def routed(layer: int, *load: float, dropped: float = 0.0) -> LayerRouting:
    return LayerRouting(layer, list(load), dropped, 0.5, {"bias_range": 0.25})


def row(step: int, *layers: LayerRouting) -> Row:
    return {"step": step} | expert_row(layers)


def test_a_row_holds_each_layers_numbers_and_the_extremes() -> None:
    found = expert_row([routed(1, 6.0, 2.0, 0.0, 0.0, dropped=2.0), routed(12, 1.0, 1.0, 1.0, 1.0)])
    assert found["moe/layer_01/load"] == [0.75, 0.25, 0.0, 0.0]
    assert found["moe/layer_01/max_over_mean"] == 3.0
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert found["moe/layer_01/entropy"] == pytest.approx(expected)
    assert found["moe/layer_01/drop_rate"] == 0.25
    assert found["moe/layer_01/confidence"] == 0.5
    assert found["moe/layer_01/bias_range"] == 0.25
    assert found["moe/layer_12/entropy"] == 1.0
    assert (found["moe/max_load"], found["moe/min_load"]) == (3.0, 0.0)


def test_what_was_not_measured_is_left_out() -> None:
    assert expert_row([]) == {}
    assert expert_row([routed(0, 0.0, 0.0)]) == {}
    own = LayerRouting(0, [1.0, 1.0], 0.0, math.nan, {})
    assert "moe/layer_00/confidence" not in expert_row([own])


def test_entropy_is_relative_to_equal_shares() -> None:
    assert entropy([0.5, 0.5]) == 1.0
    assert entropy([1.0, 0.0, 0.0]) == 0.0
    assert entropy([1.0]) == 1.0


def kinds(rows: list[Row]) -> list[tuple[str, tuple[int, ...]]]:
    return [(alarm.kind, alarm.layers) for alarm in expert_alarms(rows, "aux_loss")]


def test_an_expert_is_dead_after_three_rows_without_its_share() -> None:
    rows = [row(i, routed(0, 200, 0, 100), routed(3, 0, 0, 300)) for i in (1, 2)]
    rows.append(row(3, routed(0, 200, 0.9, 100), routed(3, 100, 0, 200)))
    assert kinds(rows) == [("dead", (0, 3))]
    text = expert_alarms(rows, "aux_loss")[0].text
    assert "2 experts got under 1 % of the fair share" in text
    assert "(layer 0: 1; layer 3: 1)" in text
    # Fewer rows say nothing, and an expert with 1 % of the fair share is alive.
    assert kinds(rows[:2]) == []
    assert kinds([*rows, row(4, routed(0, 100, 1.01, 198.99))]) == []


def test_an_expert_is_overloaded_where_it_is_so_in_each_row() -> None:
    heavy, even = routed(2, 85, 3, 3, 3, 3, 3), routed(2, 20, 20, 15, 15, 15, 15)
    assert kinds([row(i, heavy) for i in range(3)]) == [("overloaded", (2,))]
    assert kinds([row(0, heavy), row(1, even), row(2, heavy)]) == []


def test_drops_name_the_worst_layer_and_the_key() -> None:
    rows = [row(1, routed(0, 50, 50, dropped=11), routed(1, 50, 50, dropped=30))]
    (alarm,) = expert_alarms(rows, None)
    assert (alarm.kind, alarm.layers) == ("dropped", (0, 1))
    assert "30%" in alarm.text and "layer 1" in alarm.text
    assert "moe.capacity_factor" in alarm.remedy


@pytest.mark.parametrize(
    ("balancing", "key"),
    [("aux_loss", "moe.aux_loss_weight"), ("bias", "moe.bias_update_rate"), (None, "moe.balanc")],
)
def test_the_remedy_is_the_key_of_the_balancing_that_is_used(
    balancing: str | None, key: str
) -> None:
    rows = [row(i, routed(0, 100, 0)) for i in range(3)]
    assert key in expert_alarms(rows, balancing)[0].remedy


def test_the_bell_rings_once_for_a_layer() -> None:
    bell = AlarmBell("bias")
    told = [bell.take(row(step, routed(0, 100, 0))) for step in range(5)]
    assert [len(lines) for lines in told] == [0, 0, 1, 0, 0]
    assert told[2][0].startswith("step 2: 1 expert got under 1 %")
    both = [bell.take(row(step, routed(0, 100, 0), routed(1, 0, 100))) for step in range(5, 9)]
    assert [len(lines) for lines in both] == [0, 0, 1, 0]
    assert bell.take({"step": 9, "val/loss": 1.0}) == []


def test_a_run_says_that_its_experts_are_dead(
    tiny: Callable[..., Any],
    run_here: Callable[[Any], RunDir],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its router sends every token to the first expert, with a gate of almost 1."""

    def first(router: TopKRouter, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*x.shape[:-1], router.spec.n_experts)
        logits[..., 0] = 9.0
        return logits + 0 * router.weight.sum()

    monkeypatch.setattr(TopKRouter, "logits", first)
    last = read_rows(run_here(tiny()).metrics_path)[-1]
    assert last["moe/layer_00/max_over_mean"] == 4.0
    assert last["moe/layer_00/entropy"] == 0.0
    assert last["moe/layer_00/confidence"] == pytest.approx(1.0, abs=1e-3)
    assert last["moe/layer_00/churn"] == 0.0
    said = capfd.readouterr().out
    assert said.count("experts got under 1 % of the fair share") == 1
    assert "step 3: 6 experts got" in said
    assert "Raise moe.aux_loss_weight" in said


def test_a_router_with_a_bias_logs_its_range(
    tiny: Callable[..., Any], run_here: Callable[[Any], RunDir]
) -> None:
    run_dir = run_here(tiny("moe.balancing=bias", "moe.bias_update_rate=0.5"))
    rows = [row for row in read_rows(run_dir.metrics_path) if "moe/layer_01/load" in row]
    # After one step the experts above the mean are at -0.5, those below at 0.5.
    assert rows[0]["moe/layer_01/bias_range"] == 1.0
    assert all(row["moe/layer_01/bias_range"] % 0.5 == 0 for row in rows)
