"""The training losses of a row are means over the steps since the row before it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lunaris.metrics.loss_means import LossMeans

CPU = torch.device("cpu")
TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def step(means: LossMeans, main: float, skip: torch.Tensor = TAKEN) -> None:
    main_loss = torch.tensor(main, dtype=torch.float64)
    means.add({"loss": main_loss + 1, "main_loss": main_loss}, skip)


def test_a_row_holds_the_means_and_the_next_one_begins_again() -> None:
    means = LossMeans(CPU)
    for main in (2.0, 4.0):
        step(means, main)
    row = means.row(begin_again=True)
    assert row == {
        "train/loss": 4.0,
        "train/main_loss": 3.0,
        "train/perplexity": math.exp(3.0),
    }
    step(means, 5.0)
    assert means.row(begin_again=True)["train/main_loss"] == 5.0


def test_a_row_that_is_written_early_takes_nothing_from_the_next_one() -> None:
    means = LossMeans(CPU)
    step(means, 2.0)
    assert means.row(begin_again=False)["train/main_loss"] == 2.0
    step(means, 4.0)
    assert means.row(begin_again=True)["train/main_loss"] == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300])
def test_skipped_steps_do_not_count(bad: float) -> None:
    means = LossMeans(CPU)
    step(means, 2.0)
    step(means, bad, SKIPPED)
    step(means, 4.0)
    assert means.row(begin_again=True)["train/main_loss"] == 3.0
    step(means, bad, SKIPPED)
    row = means.row(begin_again=True)
    assert all(math.isnan(row[f"train/{name}"]) for name in ("loss", "main_loss", "perplexity"))
    step(means, 7.0)
    assert means.row(begin_again=True)["train/main_loss"] == 7.0


def test_sums_survive_a_checkpoint_bit_for_bit() -> None:
    losses = [math.pi * n for n in (1.0, 1e-9, 3e7, 0.1)]
    whole, first = LossMeans(CPU), LossMeans(CPU)
    for loss in losses:
        step(whole, loss)
    for loss in losses[:2]:
        step(first, loss)
    second = LossMeans(CPU, json.loads(json.dumps(first.state_dict())))
    for loss in losses[2:]:
        step(second, loss)
    assert second.row(begin_again=True) == whole.row(begin_again=True)
    assert LossMeans(CPU, whole.state_dict()).state_dict() == whole.state_dict()


def test_sums_of_other_losses_are_dropped() -> None:
    means = LossMeans(CPU, {"steps": 3, "sums": {"loss": 9.0, "main_loss": 9.0, "ahead": 9.0}})
    step(means, 2.0)
    assert means.row(begin_again=True)["train/main_loss"] == 2.0


@pytest.mark.parametrize("saved", [None, {}])
def test_a_checkpoint_of_an_older_version_has_no_sums(saved: dict[str, float] | None) -> None:
    means = LossMeans(CPU, saved)
    step(means, 2.0)
    assert means.row(begin_again=True)["train/main_loss"] == 2.0
