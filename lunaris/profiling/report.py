"""The account of recorded steps as text and as JSON, with the slowest process named."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from lunaris.profiling.account import Account, Operator

# The rows of the table; the JSON file has more.
_ROWS, _MOST = 30, 200
_OPERATORS = "operator, without what it calls"


def slowest_rank(accounts: list[Account]) -> int:
    """Return the rank whose steps take longest without the waiting for other processes."""
    return max(range(len(accounts)), key=lambda rank: accounts[rank].own_s())


def slowest_text(accounts: list[Account]) -> str:
    """Return which rank is the slowest and by how much, in words."""
    rank = slowest_rank(accounts)
    own = accounts[rank].own_s()
    others = [account.own_s() for other, account in enumerate(accounts) if other != rank]
    if not others:
        return f"rank 0 alone: {own:.4g} s a step"
    usual = median(others)
    more = f"{100 * (own / usual - 1):.0f} %" if usual > 0 else "all"
    return (
        f"the slowest is rank {rank}: {own:.4g} s a step without waiting for the others, {more} "
        f"more than their median of {usual:.4g} s"
    )


def as_json(accounts: list[Account], steps: list[int], device: str) -> dict[str, Any]:
    """Return everything that is known of the steps, in seconds a step."""
    ranks = []
    for rank, account in enumerate(accounts):
        row = asdict(account)
        row["operators"] = row["operators"][:_MOST]
        ranks.append({"rank": rank, "mean_s": account.mean_s(), "own_s": account.own_s()} | row)
    return {
        "steps": steps, "device": device, "slowest_rank": slowest_rank(accounts), "ranks": ranks,
    }  # fmt: skip


def as_text(accounts: list[Account], steps: list[int], device: str) -> str:
    """Return the times of all ranks, and where a step of the slowest one went."""
    rank = slowest_rank(accounts)
    account = accounts[rank]
    total = account.mean_s()
    what = "of the GPU" if account.on_device else "of the thread that trains"
    rows, rest = account.operators[:_ROWS], account.operators[_ROWS:]
    width = max(map(len, [_OPERATORS, *account.groups, *(row.name for row in rows)]))
    lines = [
        f"{span(steps)}, {len(accounts)} process{'es' * (len(accounts) > 1)}, {device}.",
        "Times are seconds. The profiler makes steps longer, those of many small operators most.",
        f"By rank, {slowest_text(accounts)}.",
        "",
        *_rank_rows(accounts, steps),
        "",
        f"Where a step of rank {rank} went: time {what}, {total:.4g} s a step.",
        "",
        f"{'group':<{width}} {'seconds':>10} {'share':>7}",
        *(f"{name:<{width}} {s:>10.4g} {_share(s, total)}" for name, s in account.groups.items()),
        "",
        f"{_OPERATORS:<{width}} {'seconds':>10} {'share':>7} {'calls':>7}",
    ]
    if rest:
        s, calls = sum(row.self_s for row in rest), sum(row.calls for row in rest)
        rows.append(Operator(f"{len(rest)} others", s, calls))
    lines += [
        f"{row.name:<{width}} {row.self_s:>10.4g} {_share(row.self_s, total)} {row.calls:>7.1f}"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def span(steps: list[int]) -> str:
    """Return "Step 10" or "Steps 10 to 13"."""
    return f"Step {steps[0]}" if len(steps) == 1 else f"Steps {steps[0]} to {steps[-1]}"


def _rank_rows(accounts: list[Account], steps: list[int]) -> list[str]:
    names = [f"step {step}" for step in steps]
    heads = ["mean", "own", "waiting", "data", *names]
    rows = [f"{'rank':<6}" + "".join(f" {head:>10}" for head in heads)]
    for rank, account in enumerate(accounts):
        n = len(account.step_s)
        waiting, data = sum(account.waiting_s) / n, sum(account.data_s) / n
        numbers = [account.mean_s(), account.own_s(), waiting, data, *account.step_s]
        rows.append(f"{rank:<6}" + "".join(f" {number:>10.4g}" for number in numbers))
    return rows


def _share(seconds: float, total: float) -> str:
    return f"{100 * seconds / total:>6.1f}%"
