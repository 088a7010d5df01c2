"""What SLURM says of jobs, and what it takes, in a version later than this machine's.

The names of its states, the options of its scripts and the words of its refusals are read alike.
"""

from __future__ import annotations

from typing import Any

import pytest

from lunaris.runs.slurm_client import max_array_size, refusal_of

STEPS = "trainer.max_steps=20"
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture
def asked(newer_site: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The newer cluster, which this process asks too."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, newer_site.env[name])
    return newer_site


def on(site: Any, *numbers: int) -> str:
    names = ",".join(site.cluster.nodes[i] for i in numbers)
    return f'launch.additional_parameters.nodelist="{names}"'


def test_it_is_newer(asked: Any) -> None:
    version = asked.cluster.client("sinfo", "--version").split()[-1]
    assert tuple(map(int, version.split(".")[:2])) >= (23, 11)
    assert max_array_size() == 6


def test_a_preempted_run_an_array_and_cancelled_jobs(asked: Any) -> None:
    """All at once, because most of the time is the start of processes."""
    site = asked
    pace = site.dir / "pace"
    pace.write_text("0.5")
    both = ["parallelism=fsdp", "launch.nodes=2", "launch.partition=grace"]
    site.train("preempted", *both, STEPS, on(site, 0, 1), PACE=str(pace))
    site.train("calm", *both, STEPS, on(site, 2, 3))
    site.train("long", STEPS, on(site, 4), PACE=str(pace))
    site.train("waits", "launch.additional_parameters.begin=now+1hour")
    site.train("two", "-m", on(site, 5), "data.seed=1,13")
    assert [row["state"] for row in site.rows("runs/waits")] == ["queued"]
    site.lunaris("cancel", "runs/waits")

    site.wait_for(lambda: site.status("runs/preempted").get("step", 0) > 2)
    site.cluster.client(
        "sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null",
        "-w", ",".join(site.cluster.nodes[:2]), "--wrap", "sleep 1",
    )  # fmt: skip
    site.wait_for(lambda: site.status("runs/long").get("state") == "running")
    assert [row["state"] for row in site.rows("runs/long")] == ["running"]
    site.cluster.client("scancel", site.status("runs/long")["job_id"])
    row = site.wait_for_state("runs/preempted", "queued")
    assert row["attempts"] == 1
    pace.write_text("0")
    for run in ("runs/waits", "runs/long"):
        site.wait_for_state(run, "cancelled")
    ended = {"data.seed=1": "done", "data.seed=13": "failed"}
    site.wait_for(lambda: {r["name"]: r["state"] for r in site.rows("sweeps/two")} == ended)
    for run in ("runs/preempted", "runs/calm"):
        site.wait_for_state(run, "done", "failed")
    assert site.status("runs/preempted")["attempts"] == 2
    assert site.metrics("runs/preempted") == site.metrics("runs/calm")


def test_what_it_refuses_and_takes(asked: Any) -> None:
    site = asked
    assert "partition" in (refusal_of("#!/bin/sh\n#SBATCH --partition=nope\n") or "")
    text = site.train("refused", "launch.partition=nope", code=2)
    assert "SLURM refuses the job" in text and "partition" in text
    two = ["launch.dry_run=true", "launch.nodes=2", "launch.gpus_per_node=4", "parallelism=fsdp"]
    shown = site.train("dry", *two, "launch.exclusive=true", "launch.mail=me@example.org")
    assert refusal_of(shown[shown.index("#!") :]) is None
