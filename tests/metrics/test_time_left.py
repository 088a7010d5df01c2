"""The estimate of a run's end."""

from __future__ import annotations

import pytest

from lunaris.metrics.time_left import TimeLeft, in_words


def test_nothing_is_known_before_three_steps_without_the_first() -> None:
    left = TimeLeft(300, None, None)
    assert left.seconds(0) is None
    # The first step compiles for 100 s. Each other one takes 0.5 s.
    for step, now in enumerate((100.0, 100.5, 101.0), 1):
        left.step(now, set())
        assert left.seconds(step) is None
    left.step(101.5, set())
    assert left.seconds(4) == pytest.approx(296 * 0.5)


def test_evaluations_and_checkpoints_to_come_are_counted() -> None:
    """Steps take 1 s, an evaluation every 10 steps 5 s, a checkpoint every 20 steps 2 s."""
    left = TimeLeft(45, 10, 20)
    left.evaluated(5.0)
    now, pending = 60.0, set[str]()
    for step in range(1, 46):
        now += 1 + 5 * ("evaluation" in pending) + 2 * ("checkpoint" in pending)
        left.step(now, pending)
        pending = set()
        if step % 10 == 0:
            pending.add("evaluation")
        if step % 20 == 0:
            pending.add("checkpoint")
        found = left.seconds(step)
        if step == 5:
            # Steps 10, 20, 30, 40 and 45 evaluate; no checkpoint has been measured yet.
            assert found == pytest.approx(40 + 5 * 5)
        if step == 25:
            # Steps 30, 40 and 45 evaluate, steps 40 and 45 save.
            assert found == pytest.approx(20 + 3 * 5 + 2 * 2)
    assert left.seconds(45) == 0


def test_the_evaluation_before_the_first_step_counts_and_later_ones_replace_it() -> None:
    left = TimeLeft(20, 10, None)
    left.evaluated(30.0)
    for now in (1.0, 2.0, 3.0, 4.0):
        left.step(now, set())
    left.evaluated(1000.0)
    assert left.seconds(4) == pytest.approx(16 + 2 * 30)
    left.step(9.0, {"evaluation"})
    assert left.seconds(11) == pytest.approx(9 + 4)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0:00"), (41, "0:41"), (3599.6, "1:00:00"), (3850, "1:04:10"),
        (86400 * 2 + 3600 * 3, "2 d 3 h"),
    ],
)  # fmt: skip
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
