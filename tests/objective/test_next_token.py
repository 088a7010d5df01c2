"""The losses of a batch, and their part of a step."""

from __future__ import annotations

import pytest
import torch

from lunaris.model.transformer import ModelOutput
from lunaris.objective.base import Loss, ObjectiveOutput
from lunaris.objective.next_token import NextToken

STATS = {"load": torch.zeros(1, 2), "dropped": torch.zeros(1)}


def test_targets_are_counted_for_a_batch_and_for_each_micro_step() -> None:
    targets = torch.tensor([[[1, 2], [-100, 3]], [[-100, -100], [-100, 0]]])
    batch = {"tokens": targets, "targets": targets}
    assert NextToken().count_targets(batch).tolist() == [3, 1]
    assert NextToken().count_targets({"targets": targets[0]}).tolist() == 3


def test_only_document_masking_makes_targets_vary() -> None:
    batch = {"tokens": torch.zeros(1, 2), "targets": torch.zeros(1, 2)}
    assert not NextToken().targets_vary(batch)
    assert NextToken().targets_vary(batch | {"documents": torch.zeros(1, 2)})


def test_the_routing_losses_come_as_aux() -> None:
    routed = ModelOutput({}, torch.tensor(0.5), **STATS)
    out = ObjectiveOutput.of({"main": Loss(torch.tensor(2.0))}, routed)
    assert list(out.losses) == ["main", "aux"]
    assert out.total == 2.5 and out.load is STATS["load"]


def test_a_step_weighs_by_targets_or_by_micro_steps_and_the_total_by_weights() -> None:
    losses = {
        "main": Loss(torch.tensor(2.0)),
        "later": Loss(torch.tensor(3.0), weight=0.25),
        "aux": Loss(torch.tensor(8.0), per_target=False),
    }
    part = ObjectiveOutput(losses, **STATS).scaled(0.5, micro_steps=4)
    assert {name: loss.value.item() for name, loss in part.losses.items()} == {
        "main": 1.0,
        "later": 1.5,
        "aux": 2.0,
    }
    assert part.total.item() == pytest.approx(1.0 + 0.25 * 1.5 + 2.0)
