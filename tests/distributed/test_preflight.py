"""The look at the nodes: what is judged, and measurements of two real processes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lunaris.distributed.preflight import Measurement, judge, summary
from lunaris.distributed.preflight import _rounds as rounds


def nodes(n: int, per_node: int = 2, **of_last: Any) -> list[Measurement]:
    """Return alike measurements, but for those of the last process."""
    found = [
        Measurement(rank, f"n{rank // per_node}", "", 100.0, 80.0, 500.0, 0.0, 20.0, 10.0)
        for rank in range(n * per_node)
    ]
    return [*found[:-1], replace(found[-1], **of_last)]


@pytest.mark.parametrize(
    ("of_last", "said"),
    [
        (
            {"tflops": 60.0},
            "a matrix product at 60 TFLOP/s, the median of the nodes is 100 TFLOP/s",
        ),
        (
            {"link_gb_s": 2.0},
            "its links to other nodes carry 2 GB/s, the median of the nodes is 10",
        ),
        ({"device_gb": 30.0}, "free memory of the device: 30 GB, the median of the nodes is 80 GB"),
        ({"host_gb": 9.0}, "free memory of the host: 9 GB, the median of the nodes is 500 GB"),
        ({"error": "2 of 512 rows of a matrix product are wrong", "tflops": 0.0}, "2 of 512 rows"),
    ],
)
def test_a_bad_node_is_named_with_its_figure_and_that_of_the_others(
    of_last: dict[str, Any], said: str
) -> None:
    (fault,) = judge(nodes(4, **of_last), 0.7)
    assert (fault.node, fault.rank) == ("n3", 7)
    assert str(fault).startswith(f"n3 (rank 7): {said}")


def test_nodes_that_differ_a_little_are_well() -> None:
    assert judge(nodes(4, tflops=75.0, link_gb_s=8.0, clock_s=0.5, host_gb=300.0), 0.7) == []
    assert judge(nodes(1, tflops=1.0), 0.7) == []
    assert [fault.rank for fault in judge(nodes(4, tflops=75.0), 0.8)] == [7]


def test_a_clock_is_compared_with_those_of_the_others_also_where_rank_0_s_is_wrong() -> None:
    found = [replace(m, clock_s=0.0 if m.node == "n0" else -7.0) for m in nodes(4)]
    (fault,) = judge(found, 0.7)
    assert str(fault) == "n0 (rank 0): its clock is 7.0 s ahead of those of the others"
    (fault,) = judge(found[:4], 0.7)
    assert fault.node == "n1"


@pytest.mark.parametrize("n", range(10))
def test_on_the_ring_each_link_is_measured_once_and_each_node_is_in_one_pair_at_a_time(
    n: int,
) -> None:
    made = rounds(list(range(n)))
    pairs = [pair for pairs in made for pair in pairs]
    assert len(pairs) == len(set(pairs)) == (n if n > 2 else n // 2)
    for each in made:
        ranks = [rank for pair in each for rank in pair]
        assert len(ranks) == len(set(ranks))
    assert len(made) <= 3
    if n > 2:
        assert all(sum(rank in pair for pair in pairs) == 2 for rank in range(n))


def test_the_summary_gives_ranges() -> None:
    assert summary(nodes(2, tflops=50.0)) == (
        "preflight  2 nodes, 50 to 100 TFLOP/s, all-reduce of 64 MB 20 GB/s, links 10 GB/s, "
        "free on devices 80 GB, free on hosts 500 GB"
    )


BODY = """
import os
from lunaris.distributed import preflight
os.environ["SLURMD_NODENAME"] = f"n{{session.rank()}}"
if session.rank() == 1:
    {patch}
found = preflight.measure()
for fault in preflight.judge(found, 0.05):
    print(fault)
assert all(m.tflops > 0 and m.host_gb > 0 for m in found)
assert all(m.link_gb_s > 0 and m.allreduce_gb_s > 0 for m in found) or found[1].error
print(*(m.node for m in found))
"""
SLOW = (
    "make = time.time; time.time = lambda: make() + 60; made = torch.Tensor.__matmul__; "
    "torch.Tensor.__matmul__ = lambda a, b: (time.sleep(0.5), made(a, b))[1]"
)
WRONG = (
    "made = torch.Tensor.__matmul__; torch.Tensor.__matmul__ = lambda a, b: "
    "made(a, b).index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(9.0)) "
    "if a.dtype == torch.float32 else made(a, b)"
)


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ("pass", []),
        (SLOW, ["n1 (rank 1): a matrix product at", "n1 (rank 1): its clock is 60"]),
        (WRONG, ["n1 (rank 1): 1 of 512 rows of a matrix product are wrong"]),
    ],
    ids=["well", "slow", "wrong"],
)
def test_two_processes_agree_on_the_node_that_is_bad(
    run_two: Callable[[str], list[subprocess.CompletedProcess[str]]], patch: str, said: list[str]
) -> None:
    """The share is small, because both processes share the cores of this machine."""
    ended = run_two(BODY.format(patch=patch))
    for process in ended:
        assert process.returncode == 0, process.stderr
        *faults, names = process.stdout.splitlines()
        assert names == "n0 n1"
        assert len(faults) == len(said), faults
        assert all(fault.startswith(text) for fault, text in zip(faults, said, strict=True))
