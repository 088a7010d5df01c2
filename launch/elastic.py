"""Several workers of one run under torch's elastic agent."""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from lunaris.console import say
from lunaris.distributed.signals import saving
from lunaris.errors import Stopped, UserError, ending
from lunaris.torch_internals import ElasticAgent

_WRONG_INPUT, _STOPPED = UserError.exit_code, Stopped.exit_code
# Workers that survive a failed one get SIGTERM, and SIGKILL after this time (at most an eighth of
# the timeout of collectives). Workers that end together, after wrong input or a signal, get longer,
# because they may still upload a log.
_GRACE_S, _FINISH_S = 5, 60


# What a worker runs, with the folder of the run.
_WORKER = "lunaris.launch.worker"


def run_group(
    path: Path, processes: int, max_restarts: int, timeout_s: float, *, module: str = _WORKER
) -> int:
    """Train the run in folder `path` with several workers; return the exit code.

    When a worker dies, the group starts again from the newest checkpoint, up to `max_restarts`
    times, but not after wrong input or a signal. SIGTERM and SIGINT are forwarded to the workers,
    which save and stop; a second SIGINT kills them. timeout_s: `launch.collective_timeout_s`, the
    seconds within which a group with a hung worker ends. module: what each worker runs.
    """
    # The agent's report of a failure is a page long and names no file of the run.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    before = {number: signal.getsignal(number) for number in _Agent.PASSED_ON}
    with tempfile.TemporaryDirectory(prefix="lunaris-") as errors:
        agent = _Agent(path, processes, max_restarts, timeout_s, errors, module)
        try:
            result = agent.run()
        finally:
            # Its thread, within C++ code when the interpreter ends, would abort the process.
            agent.rendezvous.shutdown()
            for number, handler in before.items():
                signal.signal(number, handler)
    if not result.is_failed():
        return 0
    failures = list(result.failures.values())
    print(describe(failures, path), file=sys.stderr, flush=True)
    return exit_code(failure.exitcode for failure in failures)


def exit_code(codes: Iterable[int]) -> int:
    """Return a group's exit code from those of its failed workers."""
    codes = set(codes)
    if _WRONG_INPUT in codes:
        return _WRONG_INPUT
    return _STOPPED if codes == {_STOPPED} else 1


def describe(failures: list[ProcessFailure], path: Path) -> str:
    """Return one message for the failure of a group: the error of the worker that failed first."""
    expected = [f for f in failures if f.exitcode in (_WRONG_INPUT, _STOPPED)]
    first = min(expected or failures, key=_time)
    if first.exitcode in (_WRONG_INPUT, _STOPPED):
        kind = "error" if first.exitcode == _WRONG_INPUT else "stopped"
        return ending(kind, _reason(first))
    # All workers are on this machine, so that the local rank is the rank.
    rank = first.local_rank
    return f"rank {rank} failed: {_reason(first)}; see {path / 'logs' / f'rank_{rank}.log'}"


def _reason(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"killed by {signal.Signals(-failure.exitcode).name}"
    return str(_recorded(failure).get("message", f"exit code {failure.exitcode}"))


def _time(failure: ProcessFailure) -> float:
    return float(_recorded(failure).get("extraInfo", {}).get("time", failure.timestamp))


def _recorded(failure: ProcessFailure) -> dict[str, Any]:
    data = (failure.error_file_data or {}).get("message")
    return data if isinstance(data, dict) else {}


class _Agent(ElasticAgent):
    """torch's agent, which also passes signals on and knows which failures are final."""

    def __init__(
        self,
        path: Path,
        processes: int,
        max_restarts: int,
        timeout_s: float,
        errors: str,
        module: str,
    ) -> None:
        self.rendezvous = get_rendezvous_handler(
            RendezvousParameters(
                backend="c10d",
                endpoint="localhost:0",
                run_id=uuid.uuid4().hex,
                min_nodes=1,
                max_nodes=1,
                local_addr="localhost",
            )
        )
        spec = WorkerSpec(
            role="lunaris",
            local_world_size=processes,
            entrypoint=sys.executable,
            args=("-u", "-m", module, str(path)),
            rdzv_handler=self.rendezvous,
            max_restarts=max_restarts,
            monitor_interval=0.1,
            local_addr="localhost",
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=errors), exit_barrier_timeout=10)
        self._path, self._processes = path, processes
        self._signals = 0
        self._grace_s = min(_GRACE_S, timeout_s / 8)

    def ending(self, exit_codes: set[int | None]) -> tuple[signal.Signals, float]:
        """Let workers that end together finish; end the survivors of a failure soon."""
        if exit_codes & {_WRONG_INPUT, _STOPPED}:
            return signal.SIGCONT, _FINISH_S
        return signal.SIGTERM, self._grace_s

    def may_restart(self, failed: RunResult, restarts_left: int) -> bool:
        """Restart after a failure that is neither wrong input nor a signal, and print it."""
        failures = list(failed.failures.values())
        if self._signals or exit_code(f.exitcode for f in failures) != 1:
            return False
        if restarts_left > 0:
            print(
                f"{describe(failures, self._path)}\nthe group starts again from the newest "
                f"checkpoint ({restarts_left} restarts left)",
                file=sys.stderr,
                flush=True,
            )
        return True

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass the signal on, so that the workers save and stop; a second SIGINT kills them."""
        self._signals += 1
        again = number == signal.SIGINT and self._signals > 1
        if number == signal.SIGINT and not again:
            Thread(target=say, args=(saving(signal.SIGINT, self._processes),), daemon=True).start()
        self.send(signal.SIGKILL if again else signal.SIGTERM)
