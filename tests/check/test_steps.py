"""The largest micro-batch and the exposed communication that `lunaris check` finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from lunaris.check import exposed, micro_batch, steps
from lunaris.check.exposed import exposed_communication
from lunaris.check.item import OK, SKIP
from lunaris.check.micro_batch import largest_micro_batch, search
from lunaris.check.steps import Steps
from lunaris.distributed import collectives, session
from lunaris.runs.create import create


@pytest.mark.parametrize("limit", [8, 9, 15, 16, 17, 100, 1000])
def test_the_search_ends_within_an_eighth_below_the_limit(limit: int) -> None:
    tried: list[int] = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= limit

    found, ended = search(fits, 8, 1 << 20, math.inf)
    assert ended and found <= limit < found + max(2, found // 8 + 1)
    assert len(tried) < 20 and len(set(tried)) == len(tried)


def test_the_search_says_where_memory_did_not_end_it() -> None:
    assert search(lambda n: True, 8, 40, math.inf) == (32, False)
    assert search(lambda n: True, 8, 1 << 20, 0.0) == (8, False)


def test_larger_micro_steps_are_advised_where_the_global_batch_has_several(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny("trainer.batch_size=4", "trainer.gradient_accumulation_steps=6")
    assert largest_micro_batch(cfg, lambda n: True).state == SKIP
    monkeypatch.setattr(session, "device", lambda: torch.device("cuda", 0))
    item = largest_micro_batch(cfg, lambda n: n <= 13)
    assert item.figures == {"sequences": 13, "ended": True}
    assert item.text.startswith("13 sequences of ") and item.text.endswith("the config has 4")
    # 12 would be above nine tenths of what fits.
    (text,) = item.advice
    assert text.startswith("trainer.batch_size=8 trainer.gradient_accumulation_steps=3: ")
    assert not largest_micro_batch(tiny(), lambda n: n <= 13).advice
    monkeypatch.setattr(micro_batch, "_MOST", 2)
    assert "at least 8 sequences" in largest_micro_batch(cfg, lambda n: True).text
    monkeypatch.setattr(session, "world_size", lambda: 2)
    assert "launch.processes=1" in largest_micro_batch(cfg, lambda n: True).text


@pytest.fixture
def built(
    request: pytest.FixtureRequest, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The steps of a run in this process, after the first ones. Its parameter: overrides."""
    cfg, made = tiny(*getattr(request, "param", ())), []
    create(cfg, "lunaris check", [])

    class Kept(Steps):
        def __init__(self, run: Any) -> None:
            super().__init__(run)
            made.append(self)

    monkeypatch.setattr(steps, "Steps", Kept)
    with session.join("cpu", 10.0), ExitStack() as stack:
        steps.looks(cfg, Path(cfg.out_dir), stack)
        yield made[0]


def test_a_step_that_needs_too_much_memory_does_not_fit(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, ...]] = []
    kind = type(built.run.objective)
    real = kind.__call__

    def objective(self: Any, model: Any, batch: Any) -> Any:
        sizes.append(tuple(batch["tokens"].shape))
        if len(batch["tokens"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, model, batch)

    monkeypatch.setattr(kind, "__call__", objective)
    length = built.run.cfg.model.max_seq_len
    assert built.fits(6) and not built.fits(9) and built.fits(8)
    assert sizes == [(6, length), (9, length), (8, length)]
    assert all(p.grad is None for p in built.run.model.parameters())


def test_what_the_exchange_of_gradients_adds_is_exposed(
    built: Any, monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Any]
) -> None:
    assert exposed_communication(built.run, built.next_batch).state == SKIP
    monkeypatch.setattr(session, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "gather_objects", lambda value: [value, value / 2])
    taken: list[bool] = []

    def seconds(run: Any, batch: Any, *, exchange: bool) -> float:
        taken.append(exchange)
        return 4.0 if exchange else 3.0

    real = exposed._micro_step_s
    monkeypatch.setattr(exposed, "_micro_step_s", seconds)
    item = exposed_communication(built.run, built.next_batch)
    assert item.state == OK and item.figures["share"] == 0.25
    assert taken == [False, True] * 6
    for parallelism, said in (
        ("ddp", "trainer.gradient_accumulation_steps=2, "), ("fsdp", "parallelism=ddp where"),
    ):  # fmt: skip
        built.run.cfg = tiny(f"parallelism={parallelism}", "launch.processes=2")
        (text,) = exposed_communication(built.run, built.next_batch).advice
        assert text.startswith(said) and "25% of forward and backward" in text
    # The last micro-step of a step is the one that exchanges.
    asked: list[bool] = []
    micro_step = built.run.parallelism.micro_step
    monkeypatch.setattr(
        built.run.parallelism, "micro_step",
        lambda model, last: asked.append(last) or micro_step(model, last),
    )  # fmt: skip
    batch = {name: part[0] for name, part in built.next_batch().items()}
    assert real(built.run, batch, exchange=True) > 0 and real(built.run, batch, exchange=False) > 0
    assert asked == [True, False]


FSDP = ["parallelism=fsdp", "trainer.precision=bf16"]


@pytest.mark.parametrize("built", [FSDP], indirect=True)
def test_complete_gradients_of_a_sharded_model_are_freed(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "world_size", lambda: 2)
    monkeypatch.setattr(exposed, "_PAIRS", 1)
    params = [
        param
        for module in built.run.model.modules() if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
        for param in group.fsdp_params
    ]  # fmt: skip

    def complete() -> list[Any]:
        each = [(p.unsharded_accumulated_grad, p.unsharded_param.grad) for p in params]
        return [grad for pair in each for grad in pair if grad is not None]

    kept: list[int] = []
    real = exposed._micro_step_s

    def seconds(run: Any, batch: Any, *, exchange: bool) -> float:
        found = real(run, batch, exchange=exchange)
        kept.append(len(complete()))
        return found

    monkeypatch.setattr(exposed, "_micro_step_s", seconds)
    assert exposed_communication(built.run, built.next_batch).state == OK
    assert kept == [len(params), 0] * 2
    assert all(p.grad is None for p in built.run.model.parameters())


@pytest.mark.parametrize("built", [FSDP], indirect=True)
def test_complete_gradients_that_do_not_fit_are_not_made(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * sum(p.numel() for p in built.run.model.parameters())
    total = 2 * needed
    for name, value in (
        ("mem_get_info", (needed // 2, total)), ("memory_reserved", total),
        ("max_memory_allocated", total - needed),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(exposed, "_micro_step_s", lambda *args, exchange: 1.0)
    monkeypatch.setattr(session, "world_size", lambda: 2)
    monkeypatch.setattr(session, "device", lambda: torch.device("cuda", 0))
    # 1.5 times what is needed, less the margin of 0.1.
    assert exposed_communication(built.run, built.next_batch).state == OK
    # Another process has too little.
    monkeypatch.setattr(collectives, "gather_objects", lambda value: [value, value / 2])
    item = exposed_communication(built.run, built.next_batch)
    assert item.state == SKIP and item.text.startswith("needs ")
    monkeypatch.setattr(built.run, "model", torch.nn.Linear(1, 1))
    assert exposed_communication(built.run, built.next_batch).state == OK
