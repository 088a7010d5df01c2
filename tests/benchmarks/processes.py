"""Groups of worker processes for the benchmarks that need several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from typing import Any

# Freed memory goes back at once, so that the resident set shows what is used, not glibc's caches.
SMALL_CACHES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run_group(command: list[str], processes: int, extra: dict[str, str] | None = None) -> Any:
    """Run `command` once per rank, one thread each; return the JSON that rank 0 prints.

    extra: more environment variables.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = (
        os.environ
        | (extra or {})
        | {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
    )
    workers = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "a worker failed"
    return json.loads(outputs[0])
