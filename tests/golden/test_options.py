"""Every option of every group trains, to the losses that it had when it was added."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

GOLDEN = json.loads((Path(__file__).parent / "options.json").read_text())
TOLERANCE = 1e-4  # Relative, as for the golden curves.


def test_every_option_is_here_or_trained_elsewhere(script: Callable[[str], ModuleType]) -> None:
    """For a new option, run `python tests/golden/options.py GROUP=OPTION`."""
    options = script("options")
    assert set(options.options()) == GOLDEN.keys() | options.ELSEWHERE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*wandb.*", "ignore::DeprecationWarning:wandb")
@pytest.mark.parametrize("option", GOLDEN)
def test_every_option_trains(script: Callable[[str], ModuleType], option: str) -> None:
    assert script("options").losses(option) == pytest.approx(GOLDEN[option], rel=TOLERANCE)


def test_options_that_change_the_numbers_differ() -> None:
    for group in ("attention", "moe", "optimizer", "schedule"):
        curves = [losses for option, losses in GOLDEN.items() if option.startswith(f"{group}=")]
        for i, a in enumerate(curves):
            for b in curves[:i]:
                assert a != pytest.approx(b, rel=10 * TOLERANCE)
