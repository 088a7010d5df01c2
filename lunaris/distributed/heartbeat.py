"""Signs of life between the processes of a run, so that a hung one is named and ends the job.

A thread of each process writes its process's beat to the group's key-value store and reads the
others'. A process that is stopped (SIGSTOP, a frozen node) writes none; one whose main thread
hangs still beats, but says what it is doing and for how many such steps, which is compared when a
collective times out.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

# A process watches its next ones (cyclically), so that the store's load grows with the world only.
_WATCHED = 8
_LONGEST_INTERVAL_S = 5.0


def end_process(message: str) -> None:
    """Say why and end this process at once; its main thread is stuck in a collective."""
    record_failure(message)
    print(f"lunaris: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def record_failure(message: str) -> None:
    """Leave the reason of this process's end where torch's elastic agent looks for it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        extra = {"py_callstack": "", "timestamp": str(int(time.time())), "time": time.time()}
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


class Heartbeat:
    """This process's beat and its watch over the others'."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_s: float,
        on_hang: Callable[[str], None] = end_process,
    ) -> None:
        """timeout_s: a process silent for three quarters of it is taken to hang."""
        self._rank = rank
        self._world = world_size
        self._silence_s = 0.75 * timeout_s
        self._interval_s = min(_LONGEST_INTERVAL_S, timeout_s / 20)
        self._on_hang = on_hang
        self._marks = 0
        self._doing = "starting"
        self._store = _own_connection(self._silence_s)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat and to watch."""
        self._beat(0)
        self._thread.start()

    def stop(self) -> None:
        """Say good-bye, so that the others miss nobody."""
        self._stopped.set()
        self._thread.join(timeout=self._silence_s)
        try:
            self._store.set(str(self._rank), "done")
        except RuntimeError:
            pass  # The store is gone with the process that held it.

    def mark(self, doing: str) -> None:
        """Note what the main thread begins to do."""
        self._marks += 1
        self._doing = doing

    def laggards(self) -> str:
        """Return a sentence that names the processes whose main threads are furthest behind."""
        try:
            beats = self._read(range(self._world))
        except RuntimeError:
            return f"{_where()} does not answer"
        fields = {r: beat.split(" ", 2) for r, beat in beats.items() if beat != "done"}
        behind = min(int(marks) for _, marks, _ in fields.values())
        slow = [f"rank {r} ({f[2]})" for r, f in fields.items() if int(f[1]) == behind]
        if len(slow) == len(fields) > 1:
            return "every rank waits at the same place"
        return f"the furthest behind: {', '.join(slow)}"

    def _run(self) -> None:
        watched = [(self._rank + i) % self._world for i in range(1, _WATCHED + 1)]
        watched = [r for r in dict.fromkeys(watched) if r != self._rank]
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
                    self._on_hang(f"{_where()} has not answered for {now - answered:.0f} s")
                    return
                continue
            # A pause of this very process is no fault of the others.
            paused = now - answered > 2 * self._interval_s + 1
            answered = time.monotonic()
            for r, beat in beats.items():
                if beat != last[r] or beat == "done" or paused:
                    last[r], seen[r] = beat, answered
            silent = [r for r in watched if answered - seen[r] > self._silence_s]
            if silent:
                self._on_hang(
                    "; ".join(
                        f"rank {r} gave no sign of life for {answered - seen[r]:.0f} s "
                        f"(last: {last[r].split(' ', 2)[-1] or 'none'})"
                        for r in silent
                    )
                )
                return

    def _beat(self, count: int) -> None:
        self._store.set(str(self._rank), f"{count} {self._marks} {self._doing}")

    def _read(self, ranks: range | list[int]) -> dict[int, str]:
        ranks = [r for r in ranks if self._store.check([str(r)])]
        if not ranks:
            return {}
        values = self._store.multi_get([str(r) for r in ranks])
        return {r: value.decode() for r, value in zip(ranks, values, strict=True)}


def _own_connection(timeout_s: float) -> dist.Store:
    """Return a client of the group's store with a connection of its own.

    The default store's connection is taken for as long as the main thread waits on it.
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


def _where() -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return f"the group's store at {address} (rank 0's machine)"
