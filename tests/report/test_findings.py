"""Which experts are dead."""

from __future__ import annotations

from lunaris.report.findings import dead_experts


def test_an_expert_is_dead_after_three_rows_without_its_share() -> None:
    rows = [{0: [2.0, 0.0, 1.0], 3: [0.0, 0.0, 3.0]}] * 2 + [
        {0: [2.0, 0.009, 1.0], 3: [1.0, 0.0, 2.0]}
    ]
    assert dead_experts(rows) == [(0, 1), (3, 1)]
    assert dead_experts(rows[:2]) == []
    assert dead_experts([*rows, {0: [1.0, 0.01, 1.0]}]) == []
