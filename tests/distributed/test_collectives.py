"""What processes exchange besides tensors, with one process and with two."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from lunaris.distributed import collectives, session


def test_a_process_alone_gets_its_own_value() -> None:
    with session.join("cpu", 10.0):
        assert collectives.gather_objects("a") == ["a"]
        assert collectives.from_rank_0("a") == "a"
        assert collectives.on_rank_0(lambda: 3) == 3
        assert collectives.any_rank(True) and not collectives.any_rank(False)
        collectives.barrier()


@pytest.mark.slow
def test_two_processes_agree(
    run_two: Callable[[str], list[subprocess.CompletedProcess[str]]],
) -> None:
    ended = run_two(
        """
        rank = session.rank()
        assert collectives.gather_objects(rank) == [0, 1]
        assert collectives.from_rank_0(rank) == 0
        assert collectives.any_rank(rank == 1) and not collectives.any_rank(False)
        assert collectives.on_rank_0(lambda: 5) == (5 if rank == 0 else None)

        def refuse():
            raise UserError("data.dir=x: absent")

        try:
            collectives.on_rank_0(refuse)
        except UserError as error:
            print(error)
        """
    )
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert [done.stdout for done in ended] == ["data.dir=x: absent\n"] * 2
