"""A heartbeat between the processes of a run: a process that hangs is named, and the run ends.

A thread of each process writes to the group's key-value store that the process is alive, and reads
what others wrote. A process that is stopped (SIGSTOP, a frozen node) writes nothing. One whose main
thread hangs still writes, with its current phase and the number of phases that it has begun; a
collective's timeout compares those numbers.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from lunaris.errors import EXPECTED

# A process watches only the next ones (cyclically), so that the store's load is linear in them.
_WATCHED = 8
_LONGEST_INTERVAL_S = 5.0


def end_process(message: str) -> None:
    """Print `message` and end this process at once: its main thread is stuck in a collective."""
    record_failure(message)
    print(f"lunaris: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def record_failure(cause: BaseException | str) -> None:
    """Write why this process ends to the file that torch's elastic agent reads; the first wins."""
    expected = isinstance(cause, (*EXPECTED, str))
    message = str(cause) if expected else f"{type(cause).__name__}: {cause}"
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        extra = {"py_callstack": "", "timestamp": str(int(time.time())), "time": time.time(),
                 "exit_code": getattr(cause, "exit_code", 1)}  # fmt: skip
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


class Heartbeat:
    """The heartbeat of this process, and its watch over those of others."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_s: float,
        on_hang: Callable[[str], None] = end_process,
    ) -> None:
        """timeout_s: a process without a heartbeat for three quarters of it counts as hung.

        on_hang: called once, in the heartbeat's thread, with a sentence that names the processes.
        """
        self._rank = rank
        self._world = world_size
        self._silence_s = 0.75 * timeout_s
        self._interval_s = min(_LONGEST_INTERVAL_S, timeout_s / 20)
        self._on_hang = on_hang
        self._phases_begun = 0
        self._phase = "starting"
        self._excused = False
        self._beating = threading.Lock()
        self._store = _connect(self._silence_s)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the first heartbeat and start the thread."""
        self._beat(0)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and tell the others that this process ends on purpose."""
        self._stopped.set()
        self._thread.join(timeout=self._silence_s)
        try:
            self._store.set(str(self._rank), "done")
        except RuntimeError:
            pass  # The process that serves the store has ended already.

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Let the others expect no heartbeat: code of torch keeps Python from running for long."""
        self._excused = True
        self._beat(0)
        try:
            yield
        finally:
            self._excused = False
            self._beat(0)

    def set_phase(self, phase: str) -> None:
        """Record what the main thread begins to do."""
        self._phases_begun += 1
        self._phase = phase

    def slowest_ranks(self) -> str:
        """Return a sentence that names the processes that have begun the fewest phases."""
        try:
            beats = self._read(range(self._world))
        except RuntimeError:
            return f"{_store_address()} does not answer"
        fields = {r: beat.split(" ", 2) for r, beat in beats.items() if beat != "done"}
        fewest = min(int(begun) for _, begun, _ in fields.values())
        slow = [f"rank {r} ({f[2]})" for r, f in fields.items() if int(f[1]) == fewest]
        if len(slow) == len(fields) > 1:
            return "every rank waits at the same place"
        return f"the furthest behind: {', '.join(slow)}"

    def _run(self) -> None:
        watched = {(self._rank + i) % self._world for i in range(1, _WATCHED + 1)} - {self._rank}
        last = dict.fromkeys(watched, "")
        seen = dict.fromkeys(watched, time.monotonic())
        answered = time.monotonic()
        count = 0
        while not self._stopped.wait(self._interval_s):
            count += 1
            now = time.monotonic()
            try:
                self._beat(count)
                beats = self._read(watched)
            except RuntimeError:
                if now - answered > self._silence_s and not self._stopped.is_set():
                    self._on_hang(f"{_store_address()} has not answered for {now - answered:.0f} s")
                    return
                continue
            # After a pause of this process the others' times are reset: it could not read them.
            paused = now - answered > 2 * self._interval_s + 1
            answered = time.monotonic()
            for r, beat in beats.items():
                if beat != last[r] or beat == "done" or paused:
                    last[r], seen[r] = beat, answered
            hung = [r for r in watched if answered - seen[r] > self._silence_s]
            if hung:
                self._on_hang(
                    "; ".join(
                        f"rank {r} has sent no heartbeat for {answered - seen[r]:.0f} s "
                        f"(last: {last[r].split(' ', 2)[-1] or 'none'})"
                        for r in hung
                    )
                )
                return

    def _beat(self, count: int) -> None:
        with self._beating:
            beat = "done" if self._excused else f"{count} {self._phases_begun} {self._phase}"
            self._store.set(str(self._rank), beat)

    def _read(self, ranks: Iterable[int]) -> dict[int, str]:
        ranks = [r for r in ranks if self._store.check([str(r)])]
        if not ranks:
            return {}
        values = self._store.multi_get([str(r) for r in ranks])
        return {r: value.decode() for r, value in zip(ranks, values, strict=True)}


def _connect(timeout_s: float) -> dist.Store:
    """Return a client of the group's store with a separate connection.

    The connection of the default store is busy for as long as the main thread waits on it.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=max(timeout_s, 30)),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"lunaris/heartbeat/{attempt}", store)


def _store_address() -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return f"the group's store at {address} (rank 0's machine)"
