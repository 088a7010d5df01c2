from __future__ import annotations

import pytest

from lunaris.optim.schedule import WSD, Constant, Cosine


def test_warm_up_rises_linearly_to_the_peak() -> None:
    schedule = Cosine(max_steps=100, warmup_steps=4)
    assert [schedule(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant_stays_at_the_peak() -> None:
    assert {Constant(max_steps=10)(s) for s in range(10)} == {1.0}


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_floor() -> None:
    schedule = Cosine(max_steps=110, warmup_steps=10, min_lr_ratio=0.2)
    assert schedule(60) == pytest.approx(0.6)
    assert schedule(110) == pytest.approx(0.2)


def test_wsd_is_flat_until_its_last_fraction_then_linear() -> None:
    schedule = WSD(max_steps=100, warmup_steps=10, min_lr_ratio=0.0, decay_fraction=0.2)
    assert {schedule(s) for s in range(10, 81)} == {1.0}
    assert schedule(90) == pytest.approx(0.5)
    assert schedule(99) == pytest.approx(0.05)
