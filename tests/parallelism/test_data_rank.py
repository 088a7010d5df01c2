"""The data rank decides what a process reads and draws; the process rank decides who writes.

One process plays a data rank of two, so that the two kinds of rank differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lunaris.distributed.signals import StopSignal
from lunaris.objective.base import Batch
from lunaris.parallelism.single import Single
from lunaris.run import build, execute
from lunaris.run_summary import describe
from lunaris.runs.create import create
from lunaris.runs.run_dir import RunDir
from lunaris.train import Run, micro_step_weights, train_step

HALF = ["trainer.batch_size=2"]  # of the four sequences of `tiny`


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes this process play a data rank of two."""
    real = Single.__init__

    def set_ranks(data_rank: int, *, is_writer: bool = True) -> None:
        def init(self: Single) -> None:
            real(self)
            self.data_rank, self.data_world_size, self.is_writer = data_rank, 2, is_writer

        monkeypatch.setattr(Single, "__init__", init)
        monkeypatch.setattr(Single, "sum", lambda self, values: values)

    return set_ranks


@pytest.fixture
def build_run(tiny: Callable[..., Any]) -> Iterator[Callable[..., Run]]:
    """Return a function from overrides to a run that is built and has not begun."""
    built: list[Run] = []

    def make(*overrides: str) -> Run:
        cfg = tiny(*overrides, name=f"run{len(built)}")
        run_dir = create(cfg, "test", [])
        built.append(build(run_dir.read_config(), run_dir, StopSignal()))
        return built[-1]

    yield make
    for run in built:
        run.loader.close()
        run.logger.finish()


def first_batch(run: Run) -> Batch:
    return next(iter(run.loader))


def test_data_ranks_share_the_global_batch(
    play: Callable[..., None], build_run: Callable[..., Run]
) -> None:
    complete = build_run()
    parts = []
    for rank in (0, 1):
        play(rank)
        run = build_run(*HALF)
        assert run.global_batch == complete.global_batch == 4
        assert "2 a process × 1 micro-steps × 2 processes" in describe(run)
        assert "experts    one product an expert (float32 on cpu)" in describe(run)
        parts.append(first_batch(run)["tokens"])
    assert torch.equal(torch.cat(parts, dim=1), first_batch(complete)["tokens"])


def test_data_ranks_share_the_validation(
    play: Callable[..., None], build_run: Callable[..., Run]
) -> None:
    complete = build_run()
    expected = complete.evaluator(complete.model)["val/loss"]
    losses = []
    for rank in (0, 1):
        play(rank)
        run = build_run(*HALF)
        losses.append(run.evaluator(run.model)["val/loss"])
    assert losses[0] != losses[1]
    assert sum(losses) / 2 == pytest.approx(expected, rel=1e-6)


def test_targets_are_weighed_over_the_data_ranks(
    play: Callable[..., None], build_run: Callable[..., Run]
) -> None:
    play(1)
    run = build_run(*HALF, "data.document_masking=true")
    # The fake does not sum over ranks: what it has counts as the only targets of both.
    assert sum(micro_step_weights(run, first_batch(run))) == pytest.approx(2)


def test_data_ranks_drop_different_activations(
    play: Callable[..., None], build_run: Callable[..., Run]
) -> None:
    def loss(data_rank: int, batch: Batch) -> float:
        play(data_rank)
        stats = train_step(build_run(*HALF, "model.dropout=0.5"), batch)
        return stats.losses["main"].item()

    batch = first_batch(build_run(*HALF))
    assert loss(0, batch) == loss(0, batch)
    assert loss(0, batch) != loss(1, batch)


@pytest.mark.parametrize(("data_rank", "is_writer"), [(1, True), (0, False)])
def test_the_process_that_writes_need_not_be_data_rank_0(
    play: Callable[..., None], tiny: Callable[..., Any], data_rank: int, is_writer: bool
) -> None:
    play(data_rank, is_writer=is_writer)
    run_dir: RunDir = create(tiny(*HALF, "trainer.max_steps=2"), "test", [])
    execute(run_dir.read_config(), run_dir.path)
    written = [path.is_file() for path in (run_dir.metrics_path, run_dir.path / "loss.png")]
    assert written == [is_writer] * 2
    assert (run_dir.read_status().get("step") == 2) is is_writer
