"""A group of real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest


@pytest.fixture
def run_two() -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """Return a function that runs a body in a session of processes, and how they ended."""

    def run(body: str, processes: int = 2) -> list[subprocess.CompletedProcess[str]]:
        code = f"""
import time, torch
from lunaris.distributed import collectives, session
from lunaris.errors import UserError
with session.join("cpu", 4.0):
{textwrap.indent(textwrap.dedent(body), "    ")}
"""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        shared["WORLD_SIZE"] = str(processes)
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=os.environ | shared | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        ended = []
        for worker in workers:
            out, err = worker.communicate(timeout=120)
            ended.append(subprocess.CompletedProcess([], worker.returncode, out, err))
        return ended

    return run
