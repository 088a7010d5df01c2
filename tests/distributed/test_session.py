"""What the processes of a run tell each other; most of it with one process, the rest with two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

from lunaris.distributed import session as distributed
from lunaris.errors import UserError


def test_alone_every_answer_is_ones_own() -> None:
    with distributed.session("cpu", 10.0) as device:
        assert device == torch.device("cpu") == distributed.device()
        assert distributed.gather_objects("a") == ["a"]
        assert distributed.from_rank_0("a") == "a"
        assert distributed.on_rank_0(lambda: 3) == 3
        assert distributed.any_rank(True) and not distributed.any_rank(False)
        distributed.barrier()
        distributed.ensure_group()
        distributed.end_first_step()
    assert not torch.distributed.is_initialized()


def test_absent_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="trainer.device=cuda"):
        distributed.choose_device("cuda")


def test_each_process_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.choose_device(None) == torch.device("cuda", 1)
    assert distributed.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="at most one process a device"):
        distributed.choose_device(None)
    # SLURM may show a task its own device alone.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert distributed.choose_device(None) == torch.device("cuda", 0)


def run_two(body: str) -> list[subprocess.CompletedProcess[str]]:
    """Run `body` in a session of two processes and return how they ended."""
    code = f"""
import time, torch
from lunaris.distributed import session as d
from lunaris.errors import UserError
with d.session("cpu", 4.0):
{textwrap.indent(textwrap.dedent(body), "    ")}
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = []
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        ended.append(subprocess.CompletedProcess([], worker.returncode, out, err))
    return ended


@pytest.mark.slow
def test_two_processes_agree() -> None:
    ended = run_two(
        """
        assert d.gather_objects(d.rank()) == [0, 1]
        assert d.from_rank_0(d.rank()) == 0
        assert d.any_rank(d.rank() == 1) and not d.any_rank(False)
        assert d.on_rank_0(lambda: 5) == (5 if d.rank() == 0 else None)

        def refuse():
            raise UserError("data.dir=x: absent")

        try:
            d.on_rank_0(refuse)
        except UserError as error:
            print(error)
        """
    )
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert [done.stdout for done in ended] == ["data.dir=x: absent\n"] * 2


@pytest.mark.slow
def test_stuck_process_is_named_when_a_collective_times_out() -> None:
    """Its heartbeat goes on, so that only the collective tells."""
    waits, stuck = run_two(
        """
        d.end_first_step()
        for _ in range(3):
            d.mark("a micro-step")
            torch.distributed.all_reduce(torch.ones(1))
        d.mark("a micro-step" if d.rank() == 0 else "reading a file")
        if d.rank() == 1:
            time.sleep(12)
        d.mark("the end of a step")
        torch.distributed.all_reduce(torch.ones(1))
        """
    )
    assert waits.returncode == 1 and stuck.returncode == 1
    assert "a collective timed out; the furthest behind: rank 1 (reading a file)" in waits.stderr
