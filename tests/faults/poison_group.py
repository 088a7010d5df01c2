"""One process of a group that trains runs of which one step is poisoned: `poison_group.py PLAN`.

PLAN is a JSON list of cases: the folder of a frozen run, the rank and the step that are poisoned,
and how. Each process checks that the step changes no bit of its weights, optimizer state and
buffers, that the others do, and that the report names the step's sequences. Rank 0 prints each
fault that it finds as a line `FAULT …`. With `--mutant NAME` the code is broken on purpose.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lunaris.train
from lunaris.distributed import collectives, session
from lunaris.distributed.signals import StopSignal
from lunaris.metrics.records import read_rows
from lunaris.objective.base import Batch, Loss, ObjectiveOutput
from lunaris.run import build
from lunaris.runs.run_dir import RunDir
from lunaris.train import Run, train


class _Poison(torch.autograd.Function):
    """Passes a loss on and spoils it and its gradient, or only one of them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, how: str) -> Tensor:
        ctx.how = how
        return loss.clone() if how == "gradient" else loss * float(how.removeprefix("loss "))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        how = {"gradient": "nan", "loss nan": "1"}.get(ctx.how, ctx.how)
        return grad * float(how), None


class Poisoned:
    """An objective whose main loss is spoiled in one forward of training."""

    def __init__(self, inner: Any, how: str, at: int) -> None:
        self._inner, self._how, self._left = inner, how, at

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        out = self._inner(model, batch)
        if model.training:
            self._left -= 1
            if self._left == 0:
                loss = out.losses["main"]
                spoiled = _Poison.apply(loss.value, self._how)
                return replace(out, losses=out.losses | {"main": Loss(spoiled, loss.weight)})
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def bits(run: Run) -> str:
    """Return a hash of this process's weights, buffers and optimizer state, bit for bit."""
    found = hashlib.sha256()
    # The optimizer's parameters: under FSDP those of the model may be gathered ones.
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    state = [
        value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter in parameters
        for value in run.optimizer.state.get(parameter, {}).values()
    ]
    for value in [*parameters, *run.model.buffers(), *state]:
        local: Any = value.to_local() if isinstance(value, DTensor) else value
        found.update(local.detach().clone().contiguous().numpy().tobytes())
    return found.hexdigest()


def faults_of(case: dict[str, Any]) -> list[str]:
    """Train the run of a case; return what was wrong, as one line each."""
    run_dir = RunDir(case["folder"])
    hashes: list[str] = []
    with StopSignal() as stop:
        run = build(run_dir.read_config(), run_dir, stop)
        messages: list[str] = []
        run.logger.message = messages.append  # type: ignore[method-assign]
        if session.rank() == case["rank"]:
            forwards = run.cfg.trainer.gradient_accumulation_steps
            at = (case["step"] - 1) * forwards + 1
            run.objective = Poisoned(run.objective, case["how"], at)  # type: ignore[assignment]
        real = lunaris.train.train_step

        def recorded(run: Run, batch: Batch) -> Any:
            if not hashes:
                hashes.append(bits(run))
            stats = real(run, batch)
            hashes.append(bits(run))
            return stats

        lunaris.train.train_step = recorded
        try:
            train(run)
        finally:
            lunaris.train.train_step = real
            run.loader.close()
            run.logger.finish()
    found = []
    for step in range(1, len(hashes)):
        same = hashes[step] == hashes[step - 1]
        if same != (step == case["step"]) and not (step == 1 and case["step"] == 1):
            found.append(f"step {step} {'changes nothing' if same else 'changes bits'}")
    size = run.global_batch
    first = (case["step"] - 1) * size
    expected = f"step {case['step']} is skipped: its loss or gradient norm is not finite; "
    expected += f"sequences {first} to {first + size - 1}"
    if messages != [expected]:
        found.append(f"messages are {messages}")
    last = read_rows(run_dir.metrics_path)[-1]
    if last.get("train/skipped_steps") != 1 or last.get("train/main_loss") is None:
        found.append(f"the last row is {last}")
    return found


def break_on_purpose(mutant: str) -> None:
    """Replace a part of the code by one that is wrong."""
    if mutant == "not agreed":
        lunaris.train.sum_named = lambda parallelism, totals: totals  # type: ignore[attr-defined]
    elif mutant == "balance moves":
        lunaris.train.restore_where = lambda skip, values, saved: None  # type: ignore[attr-defined]
    elif mutant == "step is taken":
        lunaris.train.take_step = lambda optimizer, skip: optimizer.step()  # type: ignore[attr-defined]
    else:
        raise ValueError(mutant)


def main() -> None:
    """Train every run of the plan in one process group."""
    if "--mutant" in sys.argv:
        break_on_purpose(sys.argv[sys.argv.index("--mutant") + 1])
    with session.join("cpu", 120.0):
        for case in json.loads(Path(sys.argv[1]).read_text()):
            for rank, faults in enumerate(collectives.gather_objects(faults_of(case))):
                for fault in faults if session.rank() == 0 else ():
                    print(f"FAULT {case}: rank {rank}: {fault}", flush=True)


if __name__ == "__main__":
    main()
