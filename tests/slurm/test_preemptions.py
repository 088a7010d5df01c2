"""A run that SLURM preempts again and again, at random moments, watched each second."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.atomic_files import read_json
from lunaris.runs.status import resolve_states

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(7200)]

LONG = os.environ.get("LUNARIS_FAULTS") == "long"
PREEMPTIONS = 50 if LONG else 2
# More than it trains until the last of them, at the pace that it keeps so long.
STEPS = 12 * PREEMPTIONS if LONG else 60
# Of a run of four processes on two nodes, with a save every fourth step.
FSDP = [
    "parallelism=fsdp", "launch.nodes=2", "launch.tasks_per_node=2", "launch.partition=grace",
    "checkpoint.save_interval=4", "logger=[local,wandb]", f"trainer.max_steps={STEPS}",
]  # fmt: skip
# Every third preemption comes within so many seconds of the job's start, most of them in Python's;
# the others come at a step or in a save.
START_S = 12.0


class Watch:
    """Resolves the state of a run each second, as `lunaris runs` does."""

    def __init__(self, site: Any, run: Path) -> None:
        self.seen: list[tuple[float, str, str]] = []
        self._run, self._conf = run, str(site.cluster.conf)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._patch = pytest.MonkeyPatch()
        self._patch.setenv("SLURM_CONF", self._conf)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._patch.undo()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(1.0)
            # Also at the end, which would be missed by up to a second.
            (state,) = resolve_states([self._run])
            self.seen.append((time.monotonic(), state.state, state.remark))


def test_preempted_at_random_moments_a_run_repeats_and_its_state_is_never_wrong(
    site: Any, offline_steps: Callable[[Path], list[int]]
) -> None:
    drawn = random.Random(7)
    pace = site.dir / "pace-often"
    pace.write_text("0.3")
    chosen, others = site.cluster.nodes[:2], site.cluster.nodes[2:4]
    pinned = "launch.additional_parameters.nodelist"
    site.train("often", *FSDP, f'{pinned}="{",".join(chosen)}"', PACE=str(pace))
    site.train("calm", *FSDP, f'{pinned}="{",".join(others)}"')
    run = site.dir / "runs/often"
    job_id = site.status("runs/often")["job_id"]

    def restarts() -> int:
        shown = site.cluster.client("scontrol", "show", "job", job_id)
        return int(shown.partition("Restarts=")[2].split()[0])

    def at_work() -> bool:
        return site.cluster.client("squeue", "-h", "-j", job_id, "-o", "%T") == "RUNNING"

    def step() -> int:
        return int(site.status("runs/often").get("step", 0))

    steps = []
    with Watch(site, run) as watch:
        for attempt in range(PREEMPTIONS):
            site.wait_for(at_work)
            if attempt % 3 == 1:
                time.sleep(drawn.uniform(0, START_S))
            else:
                least = step() + drawn.randint(1, 8)
                site.wait_for(lambda least=least: step() >= least)
                time.sleep(drawn.uniform(0, 0.5))
            steps.append(step())
            site.cluster.client(
                "sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null",
                "-w", ",".join(chosen), "--wrap", "true",
            )  # fmt: skip
            site.wait_for(lambda attempt=attempt: restarts() == attempt + 1)
        pace.write_text("0")
        site.wait_for_state("runs/often", "done", "failed", seconds=900)
    site.wait_for_state("runs/calm", "done", "failed", seconds=900)

    assert site.metrics("runs/often") == site.metrics("runs/calm")
    wrong = [entry for entry in watch.seen if entry[1] not in ("queued", "running", "done")]
    assert not wrong, wrong
    states = [state for _, state, _ in watch.seen]
    assert set(states[states.index("done") :]) == {"done"}
    rows = [row["step"] for row in site.metrics("runs/often")]
    assert offline_steps(run) == rows
    sent = read_json(run / "wandb.json")
    assert (sent["finished"], sent["rows"]) == (True, len(rows))
    counts = {state: states.count(state) for state in set(states)}
    print(f"{PREEMPTIONS} preemptions, at steps {steps}; {len(states)} states: {counts}")
