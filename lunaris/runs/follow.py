"""The log of a run, as far as it is written, and its further lines until the run ends. No torch."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from lunaris.errors import UserError
from lunaris.runs.run_dir import FINISHED, RunDir
from lunaris.runs.slurm_client import LOCAL
from lunaris.runs.status import RunState, logs_of, resolve_states

# Seconds between two looks at a log, at a run's state, and at the state of a job, which asks SLURM.
_LOOK_S, _STATE_S, _JOB_S = 0.3, 1.0, 10.0
# What SLURM itself writes into the log of a job.
_OF_SLURM = re.compile(rb"^(slurmstepd|srun|slurmd)\b.*$", re.MULTILINE)


class RunLog:
    """The log of one process of a run: of all its attempts, which append to one file.

    Before the process has written anything, the log of its job or its console stands for it: what
    went wrong is there then.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        """Raises UserError where the run has other ranks, and this one is none of them."""
        self._path = path
        self._rank = rank
        self._file = RunDir(path).logs / f"rank_{rank}.log"
        known = sorted(int(log.stem[5:]) for log in (path / "logs").glob("rank_*.log"))
        if known and rank not in known:
            raise UserError(
                f"--rank {rank}: {path} has no log of this process; there are those of "
                f"{', '.join(map(str, known))}"
            )

    def read(self) -> Iterator[bytes]:
        """Yield everything that is written. Raises UserError where there is nothing."""
        state = self.state()
        if self._file.is_file():
            yield self._file.read_bytes()
            if state.ended and state.state not in FINISHED:
                yield from self._words_of_slurm(state)
            return
        logs = self._others(state)
        if not logs:
            raise UserError(
                f"{self._path}: has no log yet; the run is {state.state}"
                + (f" ({state.remark})" if state.remark else "")
            )
        for log in logs:
            yield log.read_bytes()

    def follow(self) -> Iterator[bytes]:
        """Yield what is written and what follows, until no attempt is queued or running."""
        at, state, asked = 0, self.state(), time.monotonic()
        while True:
            new = self._from(at)
            at += len(new)
            if new:
                yield new
            elif state.ended:
                break
            wait = _JOB_S if _is_slurm(state) else _STATE_S
            if time.monotonic() - asked >= wait:
                state, asked = self.state(), time.monotonic()
                if state.ended:
                    continue  # What was written before it ended comes first.
            time.sleep(_LOOK_S)
        if at == 0:
            yield from self.read()
        elif state.state not in FINISHED:
            yield from self._words_of_slurm(state)

    def state(self) -> RunState:
        """Return the state of the run now."""
        (state,) = resolve_states([self._path])
        return state

    def _from(self, at: int) -> bytes:
        try:
            with self._file.open("rb") as file:
                file.seek(at)
                return file.read()
        except OSError:
            return b""

    def _others(self, state: RunState) -> list[Path]:
        console = self._path / "logs" / "console.log"
        own = [log for log in (self._path / "logs" / "slurm").glob("*_0_log.out")]
        logs = [log for log in logs_of(self._path, state.status) if not log.name.startswith("rank")]
        named = {log.resolve(): log for log in [*own, *logs, console] if log.is_file()}
        found = [log for log in named.values() if log.stat().st_size]
        return sorted(found, key=lambda log: log.stat().st_mtime)

    def _words_of_slurm(self, state: RunState) -> Iterator[bytes]:
        """Yield why SLURM ended the job, which the processes themselves could not write."""
        for log in self._others(state)[-1:]:
            lines = [match[0] for match in _OF_SLURM.finditer(log.read_bytes())]
            if lines:
                yield b"\n".join(lines) + b"\n"


def _is_slurm(state: RunState) -> bool:
    job_id = state.job_id or ""
    return bool(job_id) and not job_id.startswith(LOCAL)
