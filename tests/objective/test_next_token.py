"""The losses of a batch, and their part of a step."""

from __future__ import annotations

import pytest
import torch

from lunaris.model.transformer import Head, ModelOutput
from lunaris.objective.base import Loss, ObjectiveOutput
from lunaris.objective.next_token import NextToken

STATS = {"load": torch.zeros(1, 2), "dropped": torch.zeros(1), "confidence": torch.zeros(1)}


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


class Fixed(torch.nn.Module):
    """A model whose last hidden states are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = torch.nn.Parameter(3 * torch.randn(2, 5, 8))
        self.weight = torch.nn.Parameter(torch.randn(11, 8))

    def forward(self, tokens: torch.Tensor, *, head: Head, documents: None) -> ModelOutput:
        return ModelOutput(head(self.hidden, self.weight), torch.tensor(0.0), **STATS)


def test_options_change_the_losses_and_the_logits_alike() -> None:
    model, tokens = Fixed(), torch.randint(11, (2, 5))
    batch = {"tokens": tokens, "targets": tokens}
    plain = NextToken()(model, batch)
    assert list(plain.losses) == ["main", "aux"]
    objective = NextToken(z_loss_weight=1e-2, logit_soft_cap=2.0)
    out = objective(model, batch)
    assert list(out.losses) == ["main", "z", "aux"] and out.losses["z"].weight == 1e-2
    logits = objective.logits(model.hidden, model.weight)["logits"]
    assert logits.abs().max() <= 2.0
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(out.losses["main"].value, want)
    z = logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(out.losses["z"].value, z)
    torch.testing.assert_close(out.total, want + 1e-2 * z)
    # The sum's gradient is that of both terms, and halves of a step add up to it.
    want_grads = torch.autograd.grad(want + 1e-2 * z, list(model.parameters()))
    torch.testing.assert_close(torch.autograd.grad(out.total, list(model.parameters())), want_grads)
    assert not torch.allclose(plain.losses["main"].value, out.losses["main"].value)
