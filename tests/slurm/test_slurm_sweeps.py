"""Sweeps on a real cluster: one array, watched, mended and gone on with; with accounting, too."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SIX = "data.seed=1,2,3,4,5,13"


def sweep(site: Any, name: str, *overrides: str, code: int = 0) -> str:
    return site.train(name, "-m", *overrides, code=code)


def states(site: Any, folder: str) -> dict[str, str]:
    return {row["name"]: row["state"] for row in site.rows(folder)}


def hide(site: Any, folder: Path, *clients: str) -> str:
    """Return a PATH on which `clients` of SLURM know no job any more."""
    folder.mkdir()
    for client in clients:
        (folder / client).write_text("#!/bin/sh\necho Invalid job id specified >&2\nexit 1\n")
        (folder / client).chmod(0o755)
    return f"{folder}:{site.env['PATH']}"


def test_six_points_are_one_array_watched_to_its_end_and_mended(site: Any) -> None:
    started = time.monotonic()
    text = sweep(site, "six", SIX, "launch.array_parallelism=2")
    seconds = time.monotonic() - started
    first = states(site, "sweeps/six")
    assert set(first.values()) <= {"queued", "running"} and "queued" in first.values(), text
    queue = site.cluster.client("squeue", "-h", "-r", "-n", "six", "-o", "%F %T").splitlines()
    assert len({line.split()[0] for line in queue}) == 1 and len(queue) == 6
    assert sum(line.endswith("RUNNING") for line in queue) <= 2
    assert seconds < 60  # It ends long after.
    manifest = json.loads((site.dir / "sweeps/six/manifest.json").read_text())
    assert [p["job_id"].partition("_")[2] for p in manifest["points"]] == list("012345")

    seen = set(first.values())

    def over() -> bool:
        now = states(site, "sweeps/six")
        seen.update(now.values())
        return not {"queued", "running"} & set(now.values())

    site.wait_for(over, 200)
    assert {"queued", "running", "done", "failed"} <= seen
    assert Counter(states(site, "sweeps/six").values()) == {"done": 5, "failed": 1}
    table = site.lunaris("runs", "sweeps/six")
    assert "data.seed=13: failed: ValueError: failed by design" in table
    assert "log: sweeps/six/data.seed=13/logs/rank_0.log" in table

    (site.dir / "mended").touch()
    before = {row["name"]: row["attempts"] for row in site.rows("sweeps/six")}
    assert "(1 points)" in site.lunaris(
        "resume", "sweeps/six", "--trust", "paced", "--only", "failed"
    )
    site.wait_for_state("sweeps/six/data.seed=13", "done")
    after = {row["name"]: row["attempts"] for row in site.rows("sweeps/six")}
    (site.dir / "mended").unlink()
    assert {name for name in after if after[name] != before[name]} == {"data.seed=13"}
    assert "nothing to do" in site.lunaris("resume", "sweeps/six", "--trust", "paced")


def test_the_last_point_of_an_array_is_requeued_alone(site: Any) -> None:
    """SLURM gives it the number of the array as the number of its job."""
    pace = site.dir / "pace-pair"
    pace.write_text("0.5")
    site.train("pair", "-m", "data.seed=1,2", "trainer.max_steps=30", PACE=str(pace))
    first, last = (f"sweeps/pair/data.seed={seed}" for seed in (1, 2))
    for run in (first, last):
        site.wait_for(lambda run=run: site.status(run).get("step", 0) >= 2)
    site.cluster.client("scancel", "--signal=USR2", site.status(last)["job_id"])
    site.wait_for(lambda: site.status(last).get("attempts") == 2)
    pace.write_text("0")
    for run in (first, last):
        site.wait_for_state(run, "done", "failed")
    assert [site.status(run)["attempts"] for run in (first, last)] == [1, 2]
    assert states(site, "sweeps/pair") == {"data.seed=1": "done", "data.seed=2": "done"}


def test_an_invalid_point_sends_nothing_and_is_named(site: Any) -> None:
    text = sweep(site, "invalid", "moe.n_experts_per_token=2,3,9", code=2)
    assert "moe.n_experts_per_token=9" in text and "Traceback" not in text
    assert not (site.dir / "sweeps/invalid").exists()
    assert site.cluster.client("squeue", "-h", "-t", "all", "-n", "invalid") == ""


def test_a_sweep_above_the_largest_array_is_several_with_one_limit(site: Any) -> None:
    """The cluster takes six jobs in an array."""
    seeds = ",".join(map(str, range(14)))
    hold = "launch.additional_parameters.hold=true"
    text = sweep(site, "large", f"seed={seeds}", "launch.array_parallelism=2", hold)
    assert text.count("sent    job array") == 3 and "(2 points)" in text, text
    manifest = json.loads((site.dir / "sweeps/large/manifest.json").read_text())
    ids = [p["job_id"].split("_") for p in manifest["points"]]
    arrays = list(dict.fromkeys(job for job, _ in ids))
    assert [int(i) for _, i in ids] == [*range(6), *range(6), 0, 1]
    for array in arrays:
        shown = site.cluster.client("scontrol", "show", "job", array)
        assert "ArrayTaskThrottle=1" in shown
        assert (f"Dependency=afterany:{arrays[0]}_" in shown) == (array == arrays[2])
    assert set(states(site, "sweeps/large").values()) == {"queued"}
    assert site.lunaris("cancel", "sweeps/large").count("cancelled job") == 14


def test_a_point_that_slurm_refuses_keeps_the_others_from_being_sent(site: Any) -> None:
    text = sweep(site, "half", "launch.partition=low,nosuch", code=2)
    assert text.count("nosuch") == 2 and text.count("error:") == 1, text
    assert not (site.dir / "sweeps/half").exists()
    assert site.cluster.client("squeue", "-h", "-t", "all", "-n", "half") == ""


def test_points_are_resumed_with_other_resources(site: Any) -> None:
    sweep(site, "grown", "seed=1,2", "launch.additional_parameters.hold=true")
    site.lunaris("cancel", "sweeps/grown")
    free = "launch.additional_parameters.hold=false"
    command = ["resume", "sweeps/grown", "--trust", "paced", "--only", "cancelled"]
    command += ["launch.timeout_min=7", free]
    text = site.lunaris(*command, "launch.partition=nosuch", code=2)
    assert "nosuch" in text and set(states(site, "sweeps/grown").values()) == {"cancelled"}
    assert not list(site.dir.glob("sweeps/grown/*/changes.jsonl"))
    text = site.lunaris(*command)
    assert "seed=1: changed    from step 0: launch.timeout_min: 60 → 7" in text, text
    job_id = site.status("sweeps/grown/seed=1")["job_id"].partition("_")[0]
    assert "TimeLimit=00:07:00" in site.cluster.client("scontrol", "show", "job", job_id)
    for point in ("sweeps/grown/seed=1", "sweeps/grown/seed=2"):
        assert site.wait_for_state(point, "done", "failed")["state"] == "done"


def test_the_points_of_a_sweep_are_continued_by_the_next_array(site: Any, tmp_path: Path) -> None:
    pace = tmp_path / "pace"
    pace.write_text("0.5")
    text = site.train("links", "-m", "seed=1,2", "launch.chain=2", PACE=str(pace))
    assert "(2 points, followed by 1 that continue it)" in text
    points = [f"sweeps/links/seed={seed}" for seed in (1, 2)]
    for point in points:
        site.wait_for(lambda point=point: site.status(point).get("step", 0) >= 1)
    first, second = site.status(points[0])["chain"]
    site.cluster.client("scancel", "--signal=USR2", first)
    pace.write_text("0")
    for point in points:
        assert site.wait_for_state(point, "done", "failed")["state"] == "done"
    assert [site.status(point)["attempts"] for point in points] == [2, 1]
    assert site.status(points[0])["job_id"] == second


def test_waiting_for_a_sweep_returns_each_point_s_loss(site: Any) -> None:
    text = sweep(site, "awaited", "seed=1,2", "launch.wait=true")
    assert "2 done" in text and "best: seed=" in text


def test_the_best_of_three_points_trains_on_in_a_second_array(site: Any) -> None:
    keys = ("trainer.eval_interval=1", "hydra.sweeper.first_step=2", "launch.wait=true")
    text = sweep(site, "halved", "hydra/sweeper=halving", "seed=1,2,3", *keys)
    assert "rung    2 of 2: 1 point to step" in text and "1 done, 2 paused" in text
    found = {row["name"]: (row["state"], row["step"]) for row in site.rows("sweeps/halved")}
    assert sorted(state for state, _ in found.values()) == ["done", "paused", "paused"]
    assert {step for state, step in found.values() if state == "paused"} == {2}
    attempts = {site.status(f"sweeps/halved/{name}")["attempts"] for name in found}
    assert attempts == {1, 2}
    # SLURM knows the jobs as completed; what paused is not sent again.
    assert "no point to send" in sweep(site, "halved", "hydra/sweeper=halving", "seed=1,2,3", *keys)


def test_the_stock_launcher_runs_every_task_as_a_rank(site: Any) -> None:
    text = site.train(
        "stock", "-m", "launch=local", "hydra/launcher=submitit_slurm", "parallelism=ddp",
        "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=5", "seed=1,2",
    )  # fmt: skip
    assert "Traceback" not in text
    rows = site.rows("sweeps/stock")
    assert [row["state"] for row in rows] == ["done", "done"]
    for row in rows:
        logs = [Path(log).name for log in row["logs"]]
        assert logs == ["rank_0.log", "rank_1.log"] and row["attempts"] == 1
        steps = [r["step"] for r in site.metrics(row["dir"])]
        assert steps == sorted(set(steps))


@pytest.mark.parametrize("accounting", [False, True], ids=["no-accounting", "accounting"])
def test_states_are_right_once_the_queue_has_forgotten_the_jobs(
    request: pytest.FixtureRequest, tmp_path: Path, accounting: bool
) -> None:
    site = request.getfixturevalue("site_with_accounting" if accounting else "site")
    slow = tmp_path / "pace"
    slow.write_text("0.5")
    env = {"PACE": str(slow)}
    site.train("ok")
    site.train("error", "data.seed=13")
    site.train("held", "launch.additional_parameters.hold=true")
    long = "trainer.max_steps=1000"
    site.train("killed", long, **env)
    site.train("limited", long, "launch.additional_parameters.signal=USR1@1", **env)
    site.wait_for(lambda: site.status("runs/killed").get("step", 0) >= 1)
    site.wait_for(lambda: site.status("runs/limited").get("step", 0) >= 1)
    site.cluster.client("scancel", site.status("runs/held")["job_id"])
    # As the kernel ends a process that takes too much memory.
    pid = (site.dir / "runs/killed/.lock").read_text().split()[1]
    os.kill(int(pid), 9)
    site.cluster.client("scancel", site.status("runs/limited")["job_id"])
    for run in ("ok", "error", "held", "killed", "limited"):
        site.wait_for_state(f"runs/{run}", "done", "failed", "cancelled")
    expected = {"ok": "done", "error": "failed", "killed": "failed", "limited": "cancelled"}

    with_squeue = {run: site.rows(f"runs/{run}")[0]["state"] for run in (*expected, "held")}
    assert with_squeue == expected | {"held": "cancelled"}
    # SLURM's own clients, and the files alone.
    path = hide(site, tmp_path / "bin", "squeue")
    found = {run: site.rows(f"runs/{run}", PATH=path)[0]["state"] for run in (*expected, "held")}
    assert found == expected | {"held": "cancelled" if accounting else "missing"}
    error = site.rows("runs/error", PATH=path)[0]
    assert "failed by design" in error["remark"] and error["logs"]
