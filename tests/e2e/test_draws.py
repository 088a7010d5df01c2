"""Initial weights are drawn where nothing else gives a run its weights, and counted here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lunaris.inference import load_trained
from lunaris.metrics.records import read_rows
from lunaris.model import init
from lunaris.runs.run_dir import RunDir

Tiny = Callable[..., Any]
RunHere = Callable[[Any], RunDir]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of what is drawn, in order; memory that is not filled holds NaN."""
    names: list[str] = []
    draw, allocate = init.seeded_normal, torch.nn.Module.to_empty

    def count(shape: tuple[int, ...], std: float, seed: int, name: str) -> torch.Tensor:
        names.append(name)
        return draw(shape, std, seed, name)

    def to_empty(self: torch.nn.Module, **keys: Any) -> torch.nn.Module:
        made = allocate(self, **keys)
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_floating_point():
                tensor.data.fill_(torch.nan)
        return made

    monkeypatch.setattr(init, "seeded_normal", count)
    monkeypatch.setattr(torch.nn.Module, "to_empty", to_empty)
    return names


@pytest.mark.parametrize(
    "overrides",
    [["moe=switch"], ["moe=fine_grained", "moe.n_experts_per_token=2", "optimizer=muon"]],
    ids=["adamw", "muon"],
)
def test_a_resumed_run_draws_nothing(
    tiny: Tiny, run_here: RunHere, drawn: list[str], overrides: list[str]
) -> None:
    run = run_here(tiny(*overrides, "trainer.stop_at=4"))
    assert "embedding.weight" in drawn and len(set(drawn)) == len(drawn)
    drawn.clear()
    run_here(tiny(*overrides))
    assert drawn == []
    rows = read_rows(run.metrics_path)
    straight = read_rows(run_here(tiny(*overrides, name="straight")).metrics_path)
    assert [row["train/loss"] for row in rows[1:]] == [row["train/loss"] for row in straight[1:]]
    drawn.clear()
    load_trained(run.read_config(), run, None)
    assert drawn == []


def test_a_start_from_other_weights_draws_what_they_lack(
    tiny: Tiny, run_here: RunHere, drawn: list[str]
) -> None:
    dense = run_here(tiny("moe=none", "trainer.max_steps=1", name="dense"))
    start = ["trainer.max_steps=1", f"init_from={dense.path}"]

    def draws(name: str, *overrides: str) -> set[str]:
        drawn.clear()
        run_here(tiny(*start, *overrides, name=name))
        return set(drawn)

    assert draws("same", "moe=none") == set()
    wide = ["moe=none", "data.vocab_size=70", "init_from_resize=true"]
    assert draws("wide", *wide) == {"embedding.weight"}
    routers = {f"blocks.{layer}.feed_forward.router.weight" for layer in range(2)}
    assert draws("experts", "moe=switch") == routers
