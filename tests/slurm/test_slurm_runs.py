"""Single runs on a real cluster: sent, interrupted in every way, and gone on with."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.launch import snapshot

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

DDP = "parallelism=ddp"
STEPS = 30


def on(site: Any, *numbers: int) -> str:
    """Return the override that pins a job to nodes of the cluster."""
    names = ",".join(site.cluster.nodes[i] for i in numbers)
    return f'launch.additional_parameters.nodelist="{names}"'


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["train/loss"] for row in rows if "train/loss" in row]


def stops_and_resumes(site: Any, run: str) -> list[tuple[int, int]]:
    """Return, for each interruption, the step it came at and the step the run went on from."""
    log = (site.dir / run / "logs" / "rank_0.log").read_text()
    stops = [int(step) for step in re.findall(r"Stopped: stopped by .* at step (\d+)", log)]
    resumes = [int(step) for step in re.findall(r"resumed +after step (\d+)", log)]
    return list(zip(stops, resumes, strict=True))


@pytest.fixture(scope="module")
def timed(site: Any) -> Callable[[], None]:
    """A run with a time limit of a minute, sent early; gives what checks it, late."""
    pace = site.dir / "pace-timed"
    pace.write_text("1.0")
    site.train(
        "timed", "launch.timeout_min=1", "launch.signal_delay_s=5",
        f"trainer.max_steps={STEPS * 4}", on(site, 0), PACE=str(pace),
    )  # fmt: skip

    def check() -> None:
        site.wait_for(lambda: site.status("runs/timed").get("timeouts", 0) >= 2, 150)
        pace.write_text("0")
        site.wait_for_state("runs/timed", "done")

    return check


@pytest.fixture(scope="module")
def lost_node(site: Any) -> str:
    """A node that dies early under two runs on two nodes each, `requeued` and `resumed`."""
    pace = site.dir / "pace-node"
    pace.write_text("0.5")
    lost = site.cluster.nodes[5]
    both = [DDP, "launch.nodes=2", "checkpoint.save_interval=2", f"trainer.max_steps={STEPS}"]
    site.train("requeued", *both, on(site, 4, 5), PACE=str(pace))
    once = "launch.additional_parameters.requeue=false"
    site.train("resumed", *both, once, on(site, 4, 5), PACE=str(pace))
    for run in ("runs/requeued", "runs/resumed"):
        site.wait_for(lambda run=run: site.status(run).get("step", 0) >= 3)
    site.cluster.kill_node(lost)
    pace.write_text("0")
    return str(lost)


@pytest.fixture(scope="module")
def states_without_node(site: Any, lost_node: str) -> dict[str, dict[str, Any]]:
    """What `lunaris runs` says of the two while the node is away; brings the node back, after."""
    states = {"requeued": "queued", "resumed": "node_fail"}
    rows = {run: site.wait_for_state(f"runs/{run}", state) for run, state in states.items()}
    site.cluster.client("scontrol", "hold", site.status("runs/requeued")["job_id"])
    site.cluster.start_node(lost_node)
    return rows


@pytest.fixture(scope="module")
def undisturbed(site: Any) -> str:
    """What the run with a time limit is compared with: the same without an interruption."""
    site.train("calm-timed", f"trainer.max_steps={STEPS * 4}", on(site, 1))
    return "runs/calm-timed"


@pytest.mark.usefixtures("timed", "undisturbed", "lost_node")
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_nodes_by_two_tasks_train_as_one_process_here(site: Any, parallelism: str) -> None:
    name = f"four-{parallelism}"
    site.train(name, f"parallelism={parallelism}", "launch.nodes=2", "launch.tasks_per_node=2")
    if not (site.dir / "runs/one").exists():
        site.train("one", "trainer.batch_size=16", "launch=local")
    site.wait_for_state(f"runs/{name}", "done", "failed")
    assert losses(site.metrics(f"runs/{name}")) == pytest.approx(
        losses(site.metrics("runs/one")), rel=1e-5
    )
    logs = sorted(path.name for path in (site.dir / f"runs/{name}/logs").glob("rank_*.log"))
    assert logs == [f"rank_{rank}.log" for rank in range(4)]


def test_preempted_while_python_starts_a_run_is_requeued(site: Any, tmp_path: Path) -> None:
    """In a partition with GraceTime, SLURM requeues only what still runs at its end."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "if 'SLURM_PROCID' in os.environ and not (folder / 'go').exists():\n"
        "    (folder / 'up').touch()\n"
        "    while not (folder / 'go').exists():\n"
        "        time.sleep(0.05)\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}:{site.env['PYTHONPATH']}"}
    site.train("early", "launch.partition=grace", on(site, 3), **env)
    site.wait_for((tmp_path / "up").exists)
    preemptor = site.cluster.client(
        "sbatch", "--parsable", "-p", "high", "--exclusive", "-o", "/dev/null",
        "-w", site.cluster.nodes[3], "--wrap", "true",
    )  # fmt: skip
    time.sleep(5)  # By then SLURM has signalled the job.
    assert site.cluster.client("squeue", "-h", "-j", preemptor, "-o", "%T") == "PENDING"
    (tmp_path / "go").touch()
    site.wait_for_state("runs/early", "done", "failed")
    assert site.status("runs/early")["state"] == "done"
    assert site.status("runs/early")["attempts"] == 2


def test_signalled_in_the_lines_before_its_tasks_a_run_is_requeued(
    site: Any, tmp_path: Path
) -> None:
    """As in `launch.setup`, which may load modules or copy data for minutes."""
    wait = f"touch {tmp_path}/up; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done"
    site.train("setup", on(site, 3), f"launch.setup=['{wait}']")
    site.wait_for((tmp_path / "up").exists)
    job_id = site.status("runs/setup")["job_id"]
    # SLURM itself signals the tasks alone; sites and persons signal the script as well.
    site.cluster.client("scancel", "--full", "--signal=TERM", job_id)
    time.sleep(1)
    (tmp_path / "go").touch()
    site.wait_for_state("runs/setup", "done", "failed", "stopped")
    assert site.status("runs/setup")["state"] == "done"
    # The first time, no rank has begun to train.
    assert site.status("runs/setup")["attempts"] == 1
    assert "Restarts=1 " in site.cluster.client("scontrol", "show", "job", job_id)


def test_signalled_by_hand_a_run_is_requeued_once(site: Any) -> None:
    pace = site.dir / "pace-signalled"
    pace.write_text("0.5")
    site.train("signalled", on(site, 2), PACE=str(pace))
    job_id = site.status("runs/signalled")["job_id"]
    site.wait_for(lambda: site.status("runs/signalled").get("step", 0) >= 2)
    site.cluster.client("scancel", "--signal=USR2", job_id)
    site.wait_for(lambda: site.status("runs/signalled").get("attempts") == 2)
    pace.write_text("0")
    site.wait_for_state("runs/signalled", "done", "failed")
    shown = site.cluster.client("scontrol", "show", "job", job_id)
    assert "Restarts=1 " in shown
    assert site.status("runs/signalled").get("timeouts", 0) == 0
    assert [row["step"] for row in site.metrics("runs/signalled")] == list(range(7))


def test_a_lost_node_is_told(states_without_node: dict[str, dict[str, Any]]) -> None:
    assert [row["state"] for row in states_without_node.values()] == ["queued", "node_fail"]
    assert all(row["step"] >= 3 for row in states_without_node.values())


def test_code_edited_after_sending_does_not_change_the_job(site: Any, tmp_path: Path) -> None:
    checkout = snapshot.take(tmp_path / "code").path
    # A custom class outside of it, which imports a module beside it.
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(Path(__file__).parent / "paced.py", own / "slowly.py")
    (own / "paced.py").write_text("from slowly import *\n")
    env = {"PYTHONPATH": f"{checkout}:{own}", "PYTHONSAFEPATH": "1"}
    site.train("frozen", "launch.additional_parameters.hold=true", **env)
    job_id = site.status("runs/frozen")["job_id"]
    (checkout / "lunaris" / "train.py").write_text("raise SystemExit('the edited code ran')\n")
    shutil.rmtree(checkout / "lunaris" / "conf")
    for module in ("paced", "slowly"):
        (own / f"{module}.py").write_text("raise SystemExit('the edited class ran')\n")
    site.cluster.client("scontrol", "release", job_id)
    assert site.wait_for_state("runs/frozen", "done", "failed")["state"] == "done"


def test_a_job_runs_in_its_container_after_another_with_its_modules(
    site: Any, tmp_path: Path
) -> None:
    """Stand-ins take the place of `apptainer` and `module`, and write down how they are called."""
    runtime = tmp_path / "bin" / "apptainer"
    runtime.parent.mkdir()
    runtime.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n'
        'while [ "$1" != image.sif ]; do shift; done; shift; exec "$@"\n'
    )
    runtime.chmod(0o755)
    env = {
        "PATH": f"{runtime.parent}:{os.environ['PATH']}",
        "BASH_FUNC_module%%": f'() {{ echo "module $*" >> {tmp_path}/called; }}',
    }
    held = site.cluster.client(
        "sbatch", "--parsable", "--hold", "-o", "/dev/null", "--wrap", "true"
    )
    site.train(
        "inside", "launch.container=image.sif", "launch.container_binds=[/mnt]",
        "launch.modules=[cuda]", f"launch.python={sys.executable}", "launch.exclusive=true",
        f"launch.dependency='afterany:{held}'", "launch.srun_args=['--cpu-bind=none']",
        "launch.mail=nobody@localhost", **env,
    )  # fmt: skip
    job_id = site.status("runs/inside")["job_id"]
    shown = site.cluster.client("scontrol", "show", "job", job_id)
    assert f"Dependency=afterany:{held}" in shown and "MailUser=nobody@localhost" in shown
    assert "OverSubscribe=NO" in shown
    site.cluster.client("scontrol", "release", held)
    assert site.wait_for_state("runs/inside", "done", "failed")["state"] == "done"
    loaded, called = (tmp_path / "called").read_text().splitlines()
    run = site.dir / "runs" / "inside"
    assert loaded == "module load cuda"
    assert called.startswith(f"exec --bind {run} --bind {site.dir} --bind /mnt image.sif ")


def test_a_python_error_of_any_rank_is_shown_with_its_log(site: Any) -> None:
    site.train("broken", DDP, "launch.tasks_per_node=2", "data.seed=13")
    row = site.wait_for_state("runs/broken", "failed", "done")
    assert row["state"] == "failed"
    assert "failed by design" in row["remark"]
    table = site.lunaris("runs", "runs/broken")
    rank = re.search(r"rank (\d): ValueError: failed by design", table)
    assert rank is not None and f"runs/broken/logs/rank_{rank[1]}.log" in table


def test_a_killed_and_a_hung_rank_are_named_with_their_logs(site: Any) -> None:
    pace = site.dir / "pace-ranks"
    pace.write_text("0.3")
    for run, number in (("gone", signal.SIGKILL), ("hung", signal.SIGSTOP)):
        site.train(
            run, DDP, "launch.tasks_per_node=2", "trainer.max_steps=1000",
            "launch.collective_timeout_s=8", PACE=str(pace),
        )  # fmt: skip
        site.wait_for(lambda run=run: site.status(f"runs/{run}").get("step", 0) >= 1)
        os.kill(rank_process(site.status(f"runs/{run}")["job_id"], 1), number)
    for run, said in (("gone", "rank 1: killed by SIGKILL"), ("hung", "rank 1 has sent no heart")):
        row = site.wait_for_state(f"runs/{run}", "failed")
        assert row["remark"].startswith(said)
        assert Path(row["logs"][0]).name == "rank_1.log"


def test_a_failed_job_is_requeued_up_to_its_limit_but_not_for_a_wrong_input(site: Any) -> None:
    pace = site.dir / "pace-failures"
    pace.write_text("0.3")
    site.train(
        "retried", DDP, "launch.tasks_per_node=2", "trainer.max_steps=1000",
        "launch.max_failures=1", "checkpoint.save_interval=2", PACE=str(pace),
    )  # fmt: skip
    # Its weights do not fit, which its job finds out.
    site.train("narrow", "launch.additional_parameters.hold=true")
    site.train(
        "wide", "init_from=runs/narrow", "launch.after=runs/narrow", "model.d_model=32",
        "launch.max_failures=3",
    )  # fmt: skip
    site.cluster.client("scontrol", "release", site.status("runs/narrow")["job_id"])
    job_id = site.status("runs/retried")["job_id"]
    for attempt in (1, 2):

        def under_way(attempt: int = attempt) -> bool:
            status = site.status("runs/retried")
            return status.get("attempts") == attempt and status["step"] > 4 * attempt

        site.wait_for(under_way)
        os.kill(rank_process(job_id, 1), signal.SIGKILL)
    row = site.wait_for_state("runs/retried", "failed")
    assert (row["attempts"], row["failures"], row["job_id"]) == (2, 2, job_id)
    said = "rank 1: killed by SIGKILL"
    assert f"retried: failed 2 times; the last: {said}" in site.lunaris("runs", "runs/retried")
    assert "resumed" in (site.dir / "runs/retried/logs/rank_0.log").read_text()
    row = site.wait_for_state("runs/wide", "failed", "done")
    assert (row["state"], row["attempts"], row["failures"]) == ("failed", 1, 0)
    assert "init_from=runs/narrow" in row["remark"]


def test_a_chain_of_jobs_ends_a_run_without_a_requeue(site: Any) -> None:
    pace = site.dir / "pace-chain"
    pace.write_text("0.5")
    site.train("chained", "launch.chain=3", PACE=str(pace))
    chain = site.status("runs/chained")["chain"]
    assert len(chain) == 3
    site.train("last", "launch.after=runs/chained")
    for job_id in chain:
        assert "Requeue=0" in site.cluster.client("scontrol", "show", "job", job_id)
    site.wait_for(lambda: site.status("runs/chained").get("step", 0) >= 2)
    site.cluster.client("scancel", "--signal=USR2", chain[0])
    site.wait_for(lambda: site.status("runs/chained").get("attempts") == 2)
    assert site.rows("runs/chained")[0]["job_id"] == chain[1]
    assert f"is already running, as job {chain[1]}" in site.train("chained", code=2)
    pace.write_text("0")
    assert site.wait_for_state("runs/last", "done", "cancelled")["state"] == "done"
    assert [row["step"] for row in site.metrics("runs/chained")] == list(range(7))
    # The third job has found the run done.
    assert site.status("runs/chained")["attempts"] == 2
    shown = site.cluster.client("scontrol", "show", "job", chain[2])
    assert "JobState=COMPLETED" in shown and "ExitCode=0:0" in shown


def test_a_chain_is_given_up_after_a_failure_and_cancelled_as_one(site: Any) -> None:
    site.train("unmended", "data.seed=13", "launch.chain=3", "launch.max_failures=1")
    site.train("held", "launch.chain=2", "launch.additional_parameters.hold=true")
    chain = site.status("runs/held")["chain"]
    assert f"cancelled jobs {', '.join(chain)}: " in site.lunaris("cancel", "runs/held")
    site.wait_for_state("runs/held", "cancelled")
    assert not site.cluster.client("squeue", "-h", "-t", "PD,R", "-n", "held")
    row = site.wait_for_state("runs/unmended", "failed")
    assert (row["attempts"], row["failures"]) == (2, 2) and "failed by design" in row["remark"]
    third = site.status("runs/unmended")["chain"][2]
    assert "JobState=CANCELLED" in site.cluster.client("scontrol", "show", "job", third)


# Python runs it at its start: the node that has rank 1 of the first attempt is slow from then on.
SLOW_NODE = """\
import os, pathlib
if os.environ.get("SLURM_PROCID") == "1":
    from lunaris.distributed import preflight
    file, name = pathlib.Path({file!r}), preflight.node_name()
    if not file.exists():
        file.write_text(name)
    if file.read_text() == name:
        measured = preflight.check_product
        preflight.check_product = lambda device: (
            measured(device)[0], measured(device)[1] / 1000
        )
"""


def test_a_run_goes_on_without_the_node_that_the_preflight_finds_slow(
    site: Any, tmp_path: Path
) -> None:
    file = tmp_path / "slow"
    (tmp_path / "sitecustomize.py").write_text(SLOW_NODE.format(file=str(file)))
    site.train(
        "looked", DDP, "launch.nodes=2", "launch.preflight=true", "launch.preflight_share=0.05",
        PYTHONPATH=f"{tmp_path}:{site.env['PYTHONPATH']}",
    )  # fmt: skip
    row = site.wait_for_state("runs/looked", "done", "failed")
    slow = file.read_text()
    assert (row["state"], row["attempts"], row["failures"]) == ("done", 2, 0)
    assert list(row["excluded"]) == [slow]
    shown = site.lunaris("runs", "runs/looked")
    assert f"looked: without node {slow}: a matrix product at" in shown
    shown = site.cluster.client("scontrol", "show", "job", row["job_id"])
    assert f"ExcNodeList={slow}" in shown
    log = (site.dir / "runs/looked/logs/rank_0.log").read_text()
    assert f"preflight: {slow} (rank 1): a matrix product at" in log
    assert log.count("preflight  2 nodes, ") == 2


SCRIPTS = Path(__file__).parents[1] / "launch" / "scripts"


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.stem)
def test_sbatch_takes_every_recorded_script(site: Any, script: Path) -> None:
    """As far as a cluster without accounts and qualities of service can tell."""
    done = subprocess.run(
        ["sbatch", "--test-only", str(script)], env=site.env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


def rank_process(job_id: str, rank: int) -> int:
    """Return the process of a rank of a job on this machine."""
    wanted = {f"SLURM_JOB_ID={job_id}", f"SLURM_PROCID={rank}"}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            entries = set(path.read_text(errors="replace").split("\0"))
            command = (path.parent / "cmdline").read_text()
        except OSError:
            continue
        if wanted <= entries and "submitit" in command:
            return int(path.parent.name)
    raise AssertionError(f"job {job_id} has no rank {rank}")


def test_a_run_waits_for_the_last_attempt_of_another_and_starts_from_its_weights(
    site: Any,
) -> None:
    pace = site.dir / "pace-after"
    pace.write_text("0.5")
    site.train("before", on(site, 2), PACE=str(pace))
    site.train("after", "init_from=runs/before", "launch.after=runs/before")
    site.wait_for(lambda: site.status("runs/before").get("step", 0) >= 2)
    site.cluster.client("scancel", "--signal=USR2", site.status("runs/before")["job_id"])
    site.wait_for(lambda: site.status("runs/before").get("attempts") == 2)
    assert site.rows("runs/after")[0]["remark"] == "Dependency"
    pace.write_text("0")
    row = site.wait_for_state("runs/after", "done", "failed", "cancelled")
    assert row["state"] == "done" and site.status("runs/before")["state"] == "done"
    assert row["parents"] == [{"kind": "continued from", "dir": "runs/before", "step": 6}]
    assert "step 6: " in (site.dir / "runs/after/logs/rank_0.log").read_text()


def test_a_run_whose_awaited_run_fails_is_cancelled_and_says_why(site: Any) -> None:
    site.train("faulty", "data.seed=13", "launch.additional_parameters.hold=true")
    site.train("vain", "launch.after=runs/faulty")
    site.cluster.client("scontrol", "release", site.status("runs/faulty")["job_id"])
    row = site.wait_for_state("runs/vain", "cancelled", "done")
    assert row["remark"] == "runs/faulty, for which it waited, failed"
    assert "runs/faulty is failed" in site.train("later", "launch.after=runs/faulty", code=2)
    assert not (site.dir / "runs/later").exists()


def test_cancel_ends_a_waiting_and_a_running_job(site: Any) -> None:
    pace = site.dir / "pace-cancelled"
    pace.write_text("0.5")
    site.train("waiting", "launch.additional_parameters.hold=true")
    site.train("running", "trainer.max_steps=1000", on(site, 3), PACE=str(pace))
    assert site.rows("runs/waiting")[0]["state"] == "queued"
    refused = site.lunaris("resume", "runs/waiting", "--trust", "paced", code=2)
    assert "is already queued" in refused
    site.wait_for(lambda: site.status("runs/running").get("step", 0) >= 1)
    for run in ("runs/waiting", "runs/running"):
        assert "cancelled job" in site.lunaris("cancel", run)
        site.wait_for_state(run, "cancelled")
    site.wait_for(lambda: site.status("runs/running")["state"] == "stopped")
    assert list((site.dir / "runs/running/checkpoints").glob("step_*"))


def test_two_that_send_one_run_at_once_send_one_job(site: Any) -> None:
    """Each pair is a new run; the second command begins 0 to 0.6 s after the first."""
    for i in range(3):
        run, started = f"runs/pair{i}", []
        command = [sys.executable, "-m", "lunaris", *site.train_args(f"pair{i}")]
        for wait_s in (0.0, 0.3 * i):
            time.sleep(wait_s)
            started.append(
                subprocess.Popen(
                    command, cwd=site.dir, env=site.env, text=True, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        said = [process.communicate(timeout=120)[0] for process in started]
        assert sorted(process.returncode for process in started) == [0, 2], said
        refused = next(text for text, p in zip(said, started, strict=True) if p.returncode)
        assert "is already" in refused or "in use by process" in refused
        jobs = site.cluster.client("squeue", "-h", "-t", "all", "-n", f"pair{i}", "-o", "%A")
        assert len(set(jobs.split())) == 1
        site.wait_for_state(run, "done", "failed")
        assert site.status(run)["state"] == "done" and not site.status(run).get("last_error")
        assert [row["step"] for row in site.metrics(run)] == list(range(7))


def test_a_run_that_is_queued_does_not_train_here(site: Any) -> None:
    site.train("elsewhere", "launch.additional_parameters.hold=true")
    job_id = site.status("runs/elsewhere")["job_id"]
    text = site.train("elsewhere", "launch=local", code=2)
    assert f"is already queued, as job {job_id}" in text
    assert site.status("runs/elsewhere")["job_id"] == job_id
    site.cluster.client("scontrol", "release", job_id)
    site.wait_for_state("runs/elsewhere", "done", "failed")
    assert site.status("runs/elsewhere")["state"] == "done"
    assert not site.status("runs/elsewhere").get("last_error")


def test_what_slurm_refuses_is_said_and_nothing_is_queued(site: Any) -> None:
    before = site.cluster.client("squeue", "-h", "-t", "PD,R")
    text = site.train("refused", "launch.partition=nosuch", code=2)
    assert "nosuch" not in before and "invalid partition" in text
    assert not (site.dir / "runs/refused").exists()


def test_waiting_for_the_end_returns_the_run_s_exit_code(site: Any) -> None:
    started = time.monotonic()
    text = site.train("awaited", "launch.wait=true")
    assert "done: runs/awaited" in text and time.monotonic() - started > 1
    assert site.status("runs/awaited")["state"] == "done"
    assert "nothing was sent" in site.train("awaited")


def test_run_into_its_time_limit_twice_a_run_repeats_and_loses_nothing(
    site: Any, timed: Callable[[], None], undisturbed: str
) -> None:
    timed()
    site.wait_for_state(undisturbed, "done", "failed")
    assert site.metrics("runs/timed") == site.metrics(undisturbed)
    pairs = stops_and_resumes(site, "runs/timed")
    assert len(pairs) >= 2 and all(stop == resume for stop, resume in pairs)
    status = site.status("runs/timed")
    # A signal that meets an attempt before it trains, on a slow machine, leaves no pair.
    assert status["attempts"] >= len(pairs) + 1 and status["timeouts"] >= len(pairs)


@pytest.mark.usefixtures("states_without_node")
def test_after_a_lost_node_the_requeued_job_and_the_resumed_run_go_on(site: Any) -> None:
    site.lunaris("resume", "runs/resumed", "--trust", "paced")
    # SLURM 22.05 goes on sending a dead node the signals that ended the first attempt's step, once
    # a minute, and they end the second's, which has the same number.
    site.wait_for(lambda: re.search(r"Agent queue size: +0\b", site.cluster.client("sdiag")))
    site.cluster.client("scontrol", "release", site.status("runs/requeued")["job_id"])
    for run in ("runs/requeued", "runs/resumed"):
        assert site.wait_for_state(run, "done", "failed")["state"] == "done"
        assert site.status(run)["attempts"] == 2
        assert [row["step"] for row in site.metrics(run)] == list(range(STEPS + 1))
