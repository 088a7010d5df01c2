"""What is sent to SLURM, tested without one: the script, the environment, the requeue."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.atomic_files import read_json, write_json
from lunaris.distributed.signals import StopSignal
from lunaris.errors import UserError
from lunaris.launch import free_port, requeue, slurm, slurm_task
from lunaris.launch.job_environment import setup_lines
from lunaris.launch.slurm import Slurm
from lunaris.launch.slurm_task import Task
from lunaris.launch.submitit_internals import HELD, HOLD_SIGNALS
from lunaris.runs.create import create
from lunaris.runs.first_cause import recorded_errors
from lunaris.runs.run_dir import RunDir

SCRIPTS = Path(__file__).parent / "scripts"
# name of the recorded script -> overrides
RECORDED = {
    "fsdp_4x8": [
        "model=large", "parallelism=fsdp",
        "launch.nodes=4", "launch.gpus_per_node=8", "launch.cpus_per_task=12",
        "launch.mem_gb=900", "launch.timeout_min=1440", "launch.partition=gpu",
        "launch.account=lab", "launch.qos=high", "launch.constraint=h100",
        "launch.setup=[module load cuda]", "launch.additional_parameters.exclude=node13",
    ],
    "container": [
        "launch.container=/images/lunaris.sif", "launch.container_args=[--nv]",
        'launch.container_binds=[/data,"/scratch/me:/tmp"]', "launch.exclusive=true",
        'launch.srun_args=["--cpu-bind=cores"]',
    ],
    "pyxis": [
        'launch.container="nvcr.io#nvidia/pytorch:26.01-py3"', "launch.container_runtime=pyxis",
        "launch.container_binds=[/data]", "launch.python=/opt/venv/bin/python",
    ],
    "chain": [
        "launch.chain=3", "launch.max_failures=2", "launch.timeout_min=240",
        "launch.container=/images/lunaris.sif",
    ],
    "preflight": ["launch.nodes=2", "launch.preflight=true", "launch.venv=/envs/moe",
                  "parallelism=ddp"],
    "environment": [
        "launch.modules=[cuda/12.8,gcc]", "launch.conda=moe", 'launch.dependency="afterok:17:18"',
        "launch.mail=me@example.org", "launch.mail_type=FAIL",
    ],
}  # fmt: skip
FAKE_CLIENT = """\
#!/bin/sh
echo "$0 $@" >> {calls}
case "$2" in
    job) echo "JobId=7 JobState={state} Restarts={restarts} RunTime={run} TimeLimit=01:00:00" ;;
esac
exit {code}
"""


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that puts a `scontrol` in place and returns the calls made to it."""
    calls = tmp_path / "calls"
    calls.touch()

    def put(state: str = "RUNNING", restarts: int = 0, run: str = "00:30:00", code: int = 0) -> Any:
        client = tmp_path / "bin" / "scontrol"
        client.parent.mkdir(exist_ok=True)
        client.write_text(
            FAKE_CLIENT.format(calls=calls, state=state, restarts=restarts, run=run, code=code)
        )
        client.chmod(0o755)
        monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        return lambda: [line.partition("scontrol ")[2] for line in calls.read_text().splitlines()]

    return put


def after_stop(tiny: Callable[..., Any], *overrides: str) -> tuple[int, dict[str, Any]]:
    run_dir = create(tiny("launch=slurm", *overrides), "test", [])
    run_dir.write_status(state="stopped", step=5)
    code = Task(run_dir.path)._after_stop(run_dir, seconds=1.0)
    return code, run_dir.read_status()


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_the_script_of_a_job_is_the_recorded_one(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data=synthetic", "launch=slurm", "launch.dry_run=true", f"name={name}"]
    assert main(["train", *overrides, *RECORDED[name]]) == 0
    script = capsys.readouterr().out
    for text, word in ((sys.executable, "PYTHON"), (os.getcwd(), "HERE")):
        script = script.replace(text, word)
    assert script == (SCRIPTS / f"{name}.sbatch").read_text()
    assert not os.listdir()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("launch.container_args=[--nv]", "launch.container_args=[--nv]: needs launch.container"),
        ("launch.container_runtime=dockr", "launch.container_runtime=dockr: allowed are"),
        ("launch.dependency=afterokay:7", "did you mean afterok?"),
        ("launch.dependency=afterok", "launch.dependency=afterok: afterok needs job ids"),
        ('launch.dependency="afterok:7,after:x"', "after needs job ids: after:17"),
        ("launch.conda=a launch.venv=b", "launch.conda=a: only one of"),
        ("launch.cluster=local launch.container=i.sif", "launch.container=i.sif: needs SLURM"),
        ("launch.cluster=local launch.exclusive=true", "launch.exclusive=True: needs SLURM"),
    ],
)
def test_what_a_job_cannot_have_is_refused(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "data=synthetic", "launch=slurm", *override.split()]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not os.listdir()


def test_a_script_loads_modules_also_where_only_login_shells_have_them(tmp_path: Path) -> None:
    """And a module that cannot be loaded ends the job."""
    keys = Slurm(modules=["cuda", "gcc/12"], setup=["echo after"]).keys
    script = "\n".join(setup_lines(keys, Path("/logs"), Path("/code"))[:-3])
    for status in (0, 1):
        have = f'module() {{ echo "module $*"; return {status}; }}; {script}'
        done = subprocess.run(["bash", "-c", have], capture_output=True, text=True, check=False)
        expected = "module load cuda gcc/12\n" + "after\n" * (status == 0)
        assert (done.stdout, done.returncode) == (expected, status), done.stderr


def test_an_array_s_script_names_its_points_and_limit(tiny: Callable[..., Any]) -> None:
    launcher = Slurm.of(tiny("launch=slurm", "launch.array_parallelism=4"))
    script = launcher.script("sweep", Path("/logs"), Path("/code"), points=100)
    assert "#SBATCH --array=0-99%4\n" in script
    assert "#SBATCH --output=/logs/%A_%a_0_log.out\n" in script


def test_requeueing_can_be_turned_off(tiny: Callable[..., Any]) -> None:
    cfg = tiny("launch=slurm", "launch.additional_parameters.requeue=false")
    script = Slurm.of(cfg).script("run", Path("/logs"), Path("/code"))
    assert "#SBATCH --no-requeue\n" in script and "--requeue" not in script


def test_without_slurm_the_message_says_what_else_there_is(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    cfg = tiny("launch=slurm")
    with pytest.raises(UserError, match="launch.cluster=local to rehearse"):
        Slurm.of(cfg).submit(cfg, "test", [])
    assert not Path(cfg.out_dir).exists()


def test_of_a_refused_run_nothing_is_written(
    tiny: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("sbatch", "srun"):
        client = tmp_path / "bin" / name
        client.parent.mkdir(exist_ok=True)
        client.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition nope' >&2\nexit 1\n")
        client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    cfg = tiny("launch=slurm", "launch.partition=nope")
    with pytest.raises(UserError, match="refuses the job, and nothing was sent: invalid part"):
        Slurm.of(cfg).submit(cfg, "test", [])
    assert not Path(cfg.out_dir).exists()
    # The command prints the error, once.
    assert "nope" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "tasks", "shown"), [(1, 1, "(1 node × 1 task)"), (2, 3, "(2 nodes × 3 tasks)")]
)
def test_one_node_is_one_node(nodes: int, tasks: int, shown: str) -> None:
    launcher = Slurm(nodes=nodes, tasks_per_node=tasks)
    assert shown in slurm._sent(["7"], launcher.keys, "runs/x")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, []),
        ({"gpus_per_node": 8}, ["launch.cpus_per_task=8", "launch.mem_gb"]),
        ({"gpus_per_node": 8, "cpus_per_task": 12}, ["launch.mem_gb"]),
        ({"gpus_per_node": 8, "mem_gb": 900}, ["launch.cpus_per_task=8"]),
        ({"gpus_per_node": 8, "exclusive": True}, ["launch.cpus_per_task=8", "launch.mem_gb"]),
        (
            {
                "gpus_per_node": 2,
                "cpus_per_task": 8,
                "additional_parameters": {"mem-per-gpu": "64G"},
            },
            [],
        ),
    ],
    ids=str,
)
def test_a_job_with_gpus_says_what_it_did_not_ask_for(
    keys: dict[str, Any], named: list[str]
) -> None:
    said = slurm._sent(["7"], Slurm(**keys).keys, "runs/x")
    notes = [line for line in said.splitlines() if line.startswith("note")]
    assert len(notes) == len(named)
    assert all(name in note for name, note in zip(named, notes, strict=True))


def test_the_local_cluster_has_one_node(tiny: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="launch.nodes=2: must be 1"):
        Slurm.of(tiny("launch=slurm", "launch.cluster=local", "launch.nodes=2", "parallelism=ddp"))


def test_a_stopped_run_is_requeued_once(tiny: Any, scontrol: Any) -> None:
    calls = scontrol()
    code, status = after_stop(tiny)
    assert (code, status["state"], status["timeouts"]) == (0, "queued", 0)
    assert calls() == ["show job -o 7", "requeue 7"]


def test_a_task_of_an_array_requeues_itself_alone(
    tiny: Any, scontrol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM gives the last task of an array the number of the array as the number of its job."""
    calls = scontrol()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert after_stop(tiny)[0] == 0
    assert calls() == ["show job -o 7_2", "requeue 7_2"]


def test_a_requeue_whose_answer_was_lost_is_not_refused(
    tiny: Any, scontrol: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol()
    (tmp_path / "bin" / "scontrol").write_text(
        f"#!/bin/sh\ncd {tmp_path}\n"
        "if [ $1 = show ]; then [ -e done ] && echo JobState=PENDING || echo JobState=RUNNING\n"
        "elif [ -e done ]; then echo 'Job is pending execution' >&2; exit 1\n"
        "else touch done; echo 'Socket timed out on send/recv operation' >&2; exit 1; fi\n"
    )
    monkeypatch.setattr(requeue, "_WAITS_S", (0.0,))
    code, status = after_stop(tiny)
    assert (code, status["state"], status.get("last_error")) == (0, "queued", None)


def test_near_its_limit_a_stop_counts_as_a_timeout_up_to_the_limit_of_those(
    tiny: Any, scontrol: Any
) -> None:
    calls = scontrol(run="00:58:30")
    code, status = after_stop(tiny, "launch.max_num_timeout=1")
    assert (code, status["state"], status["timeouts"]) == (0, "queued", 1)
    run_dir = RunDir(tiny("launch=slurm").out_dir)
    run_dir.write_status(state="stopped")
    assert Task(run_dir.path)._after_stop(run_dir, seconds=1.0) == 3
    status = run_dir.read_status()
    assert (status["state"], status["stop_cause"], status["timeouts"]) == ("stopped", "timeout", 2)
    assert "launch.max_num_timeout" in status["last_error"]
    assert calls().count("requeue 7") == 1


@pytest.mark.parametrize(("restarts", "cause"), [(1, "preempted"), (0, None)])
def test_what_slurm_requeued_or_someone_cancelled_is_left_alone(
    tiny: Any, scontrol: Any, restarts: int, cause: str | None
) -> None:
    calls = scontrol(state="COMPLETING", restarts=restarts)
    code, status = after_stop(tiny)
    assert (code, status["state"]) == (3, "stopped")
    assert (status["stop_cause"] or None) == cause
    assert "requeue 7" not in calls()


def test_a_refused_requeue_is_reported(tiny: Any, scontrol: Any) -> None:
    scontrol(code=1)
    code, status = after_stop(tiny)
    assert (code, status["state"]) == (3, "stopped")
    assert status["last_error"] == "scontrol requeue failed"


@pytest.mark.parametrize("answers_after", [2, 99])
def test_a_controller_that_does_not_answer_at_once_costs_no_run(
    tiny: Any, scontrol: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers_after: int
) -> None:
    calls = scontrol()
    client = tmp_path / "bin" / "scontrol"
    answering = tmp_path / "answering" / "scontrol"
    answering.parent.mkdir()
    client.rename(answering)
    client.write_text(
        f"#!/bin/sh\necho >> {tmp_path}/tries\n"
        f"[ $1 = show ] && [ $(wc -l < {tmp_path}/tries) -le {answers_after} ] && {{\n"
        "  echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }\n"
        f'exec {answering} "$@"\n'
    )
    client.chmod(0o755)
    monkeypatch.setattr(requeue, "_WAITS_S", (0.0, 0.0, 0.0))
    code, status = after_stop(tiny)
    assert (code, status["state"]) == (0, "queued")
    assert calls()[-1] == "requeue 7"


def test_a_requeue_that_kills_its_own_command_is_not_refused(tiny: Any, scontrol: Any) -> None:
    calls = scontrol(code="$(kill -TERM $$)")
    code, status = after_stop(tiny)
    assert calls() == ["show job -o 7", "requeue 7"]
    assert (code, status["state"], status.get("last_error")) == (0, "queued", None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:01:05", 65), ("1-02:00:00", 93600), ("05:00", 300), ("UNLIMITED", None), (None, None)],
)
def test_slurm_s_times_are_read(text: str | None, seconds: int | None) -> None:
    assert requeue._seconds(text) == seconds


def test_the_error_of_the_rank_that_failed_first_is_kept(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = create(tiny("launch=slurm"), "test", [])
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, at in ((0, 20.0), (2, 10.0)):
        text = f'{{"message": {{"message": "fault {rank}", "extraInfo": {{"time": {at}}}}}}}'
        (run_dir.logs / f".error_{rank}.json").write_text(text)
    slurm_task._record_failure(run_dir, 0)
    assert run_dir.read_status()["last_error"] == "rank 2: fault 2"


def test_a_signal_before_training_reaches_it() -> None:
    with StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
        with StopSignal() as inner:
            assert inner.received is signal.SIGTERM


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2"])
def test_a_signal_while_python_starts_waits_for_its_handler(tmp_path: Path, name: str) -> None:
    """The script starts python as a task does; python hears of the signal from StopSignal."""
    code = (
        "import os, sys, pathlib, time; pathlib.Path('up').touch()\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
        "from lunaris.distributed.signals import StopSignal\n"
        "with StopSignal() as stop: print(stop.name)"
    )
    script = tmp_path / "job.sh"
    script.write_text(f'{HOLD_SIGNALS}\nexec {HELD} {sys.executable} -c "$1"\n')
    job = subprocess.Popen(["bash", str(script), code], cwd=tmp_path, stdout=subprocess.PIPE)
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    job.send_signal(getattr(signal, f"SIG{name}"))
    (tmp_path / "go").touch()
    assert job.communicate(timeout=60)[0].decode().strip() == f"SIG{name}"
    assert job.returncode == 0


@pytest.mark.slow
def test_a_submission_is_rehearsed_on_this_machine(tiny: Callable[..., Any]) -> None:
    cfg = tiny(
        "launch=slurm", "launch.cluster=local", "launch.tasks_per_node=2", "parallelism=ddp",
        "launch.wait=true",
    )  # fmt: skip
    # In a separate process: the job is a child process, about which Python would warn here.
    code = f"import sys; from lunaris.launch.slurm import Slurm; from lunaris.config.compose \
import compose; cfg = compose({_overrides(cfg)!r}); sys.exit(Slurm.of(cfg).submit(cfg, 'x', []))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = RunDir(cfg.out_dir)
    assert run_dir.read_status()["state"] == "done"
    assert run_dir.read_status()["job_id"].startswith("local-")
    assert read_json(run_dir.path / "provenance.json")["attempts"][0]["world_size"] == 2
    assert len(list(run_dir.logs.glob("rank_*.log"))) == 2


def _overrides(cfg: Any) -> list[str]:
    return [
        "data=synthetic", "data.n_tokens=20000", "data.vocab_size=64", "model.d_model=16",
        "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.max_seq_len=16",
        "model.multiple_of=8", "moe.n_experts=4", "trainer.max_steps=4", "trainer.batch_size=4",
        "trainer.device=cpu", "launch=slurm", "launch.cluster=local", "launch.tasks_per_node=2",
        "launch.wait=true", "parallelism=ddp", f"out_dir={cfg.out_dir}", "name=run",
    ]  # fmt: skip


def test_a_sweep_takes_further_sbatch_options(capsys: pytest.CaptureFixture[str]) -> None:
    further = "launch.additional_parameters.exclude=node13"
    overrides = ["data=synthetic", "launch=slurm", "launch.dry_run=true", further, "seed=1,2"]
    assert main(["train", "-m", *overrides]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --exclude=node13\n" in script and "#SBATCH --array=0-1%2\n" in script
    assert not os.listdir()


def test_a_run_that_is_a_job_already_is_not_sent_again(tiny: Callable[..., Any]) -> None:
    cfg = tiny("launch=slurm")
    run_dir = create(cfg, "test", [])
    # The process of init, which lives as long as the machine runs.
    run_dir.write_status(state="running", job_id="local-1")
    with pytest.raises(UserError, match="is already running, as job local-1; `lunaris cancel"):
        Slurm.of(cfg).submit(cfg, "test", [])


def test_a_requeued_job_gets_another_port(monkeypatch: pytest.MonkeyPatch) -> None:
    class Environment:
        def export(self, **keys: object) -> None: ...

    monkeypatch.setattr(slurm_task, "TorchDistributedEnvironment", Environment)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("MASTER_PORT", "0")
    ports = []
    for restarts in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        slurm_task.export_ranks()
        ports.append(int(os.environ["MASTER_PORT"]))
    assert ports[0] != ports[1] and all(24_500 <= port < 32_500 for port in ports)


def test_a_taken_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Environment:
        def export(self, **keys: object) -> None: ...

    # As the job's script runs it.
    command = [sys.executable, "-I", "-S", free_port.__file__, "7"]
    first = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) != first and 24_500 <= int(done.stdout) < 32_500
    monkeypatch.setattr(slurm_task, "TorchDistributedEnvironment", Environment)
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("LUNARIS_MASTER_PORT", done.stdout.strip())
    slurm_task.export_ranks()
    assert os.environ["MASTER_PORT"] == done.stdout.strip()


@pytest.mark.parametrize(
    ("rank", "code", "ends", "requeued"),
    [("0", 0, 0, False), ("0", 3, 7, True), ("1", 3, 0, False), ("1", 1, 1, False)],
)
def test_rank_0_alone_requeues_and_only_failures_end_a_task(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, rank: str, code: int, ends: int, requeued: bool
) -> None:
    run_dir = create(tiny("launch=slurm"), "test", [])
    stops: list[float] = []

    def after_stop(self: Task, run_dir: RunDir, seconds: float) -> int:
        stops.append(seconds)
        return 7

    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_ERROR_FILE", "RANK"):
        monkeypatch.setenv(name, rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Errors of an earlier attempt, which had four ranks.
    for i in range(4):
        write_json(
            run_dir.logs / f".error_{i}.json",
            {"message": {"message": "old", "extraInfo": {"time": 1}}},
        )
    monkeypatch.setattr(slurm_task, "export_ranks", lambda: None)
    monkeypatch.setattr(slurm_task, "main", lambda argv: code)
    monkeypatch.setattr(Task, "_after_stop", after_stop)
    if ends:
        with pytest.raises(SystemExit) as ended:
            Task(run_dir.path)()
        assert ended.value.code == ends
    else:
        Task(run_dir.path)()
    assert bool(stops) == requeued
    left = {1} if rank == "0" else {0, 2, 3}
    assert recorded_errors(run_dir.logs).keys() - {int(rank)} == left
