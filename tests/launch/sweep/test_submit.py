"""What is submitted of a sweep: to SLURM, to a worker here, to Hydra."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.launch.slurm import Slurm
from lunaris.launch.sweep import run_points, slurm_array
from lunaris.runs.run_dir import RunDir
from lunaris.runs.slurm_client import refusal_of
from lunaris.runs.sweep_manifest import read_manifest

ARGV = ["train", "-m", "data=synthetic", "launch=slurm", "name=s"]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the sending of jobs; return the names of the points of each job array."""
    arrays: list[list[str]] = []

    def send(
        self: Slurm, paths: list[Path], *, folder: Path, name: str, targets: set[str]
    ) -> list[str]:
        # The classes that the configs name, whose code the copy holds.
        assert "lunaris.moe.factory.MoEFactory" in targets
        arrays.append([path.name for path in paths])
        for i, path in enumerate(paths):
            RunDir(path).write_status(state="queued", job_id=f"local-{2**22 + i}")
        return [f"{len(arrays)}_{i}" for i in range(len(paths))]

    monkeypatch.setattr(Slurm, "send", send)
    monkeypatch.setattr(Slurm, "check", lambda self, name, folder: None)
    return arrays


def test_only_points_that_are_neither_done_nor_active_are_sent(
    sent: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGV, "seed=1,2,3"]) == 0
    assert sent == [["seed=1", "seed=2", "seed=3"]]
    assert "sent    job array 1 (3 points)" in capsys.readouterr().out
    assert [p.job_id for p in read_manifest(Path("sweeps/s")).points] == ["1_0", "1_1", "1_2"]
    RunDir("sweeps/s/seed=1").write_status(state="done")
    RunDir("sweeps/s/seed=2").write_status(state="failed", job_id=None, last_error="Boom")
    # The process of init, which lives as long as the machine runs.
    RunDir("sweeps/s/seed=3").write_status(state="running", job_id="local-1")
    capsys.readouterr()
    assert main([*ARGV, "seed=1,2,3"]) == 0
    assert sent[1:] == [["seed=2"]]
    shown = capsys.readouterr().out
    assert "sent    job 2_0 (1 points)" in shown and "1 queued, 1 running, 1 done" in shown
    assert [p.job_id for p in read_manifest(Path("sweeps/s")).points] == ["1_0", "2_0", "1_2"]


def test_points_that_a_command_does_not_have_any_more_are_named_and_left_alone(
    sent: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGV, "seed=1,2,3"]) == 0
    assert "removed" not in capsys.readouterr().out
    # The process of init, which lives as long as the machine runs.
    RunDir("sweeps/s/seed=1").write_status(state="running", job_id="local-1")
    RunDir("sweeps/s/seed=3").write_status(state="done")
    assert main([*ARGV, "seed=2,4"]) == 0
    said = capsys.readouterr().out
    assert "removed 2 points of sweeps/s that this command does not have\n" in said
    assert "seed=1: running, job local-1\n" in said and "seed=3: done\n" in said
    assert "`lunaris cancel sweeps/s --removed` cancels their jobs" in said
    assert sent[1:] == [["seed=2", "seed=4"]]
    # Neither a rehearsal nor a resume of the others changes that.
    assert main([*ARGV, "seed=4", "launch.dry_run=true"]) == 0
    assert read_manifest(Path("sweeps/s")).removed == ["seed=1", "seed=3"]
    capsys.readouterr()
    RunDir("sweeps/s/seed=1").write_status(state="failed", job_id=None)
    assert main(["resume", "sweeps/s"]) == 0
    assert "does not have them: seed=1, seed=3\n" in capsys.readouterr().out
    assert sent[2:] == [["seed=2", "seed=4"]]
    assert main([*ARGV, "seed=1,2,3,4"]) == 0
    assert sent[3][0] == "seed=1" and not read_manifest(Path("sweeps/s")).removed


def test_a_dry_run_says_of_how_many_arrays_its_script_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_array, "max_array_size", lambda: 2)
    argv = [*ARGV, "launch.dry_run=true"]
    assert main([*argv, "seed=1,2,3,4,5"]) == 0
    said = capsys.readouterr()
    assert "# sent as 3 arrays, of 2, 2, 1 points: MaxArraySize is 2\n" in said.out
    assert "launch.dry_run: nothing was written to sweeps/s or sent\n" in said.err
    assert main([*argv, "seed=1,2"]) == 0
    assert "arrays" not in capsys.readouterr().out and not Path("sweeps").exists()


def test_points_with_other_resources_are_another_array(sent: list[list[str]]) -> None:
    assert main([*ARGV, "launch.mem_gb=1,2", "seed=1,2"]) == 0
    assert [len(array) for array in sent] == [2, 2]


def test_a_sweep_that_waits_reports_the_error_of_a_point(
    sent: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(paths: list[Path]) -> Any:
        from lunaris.runs.status import RunState

        RunDir(paths[0]).write_status(state="done", best_val_loss=0.5)
        return [RunState("done", {}), RunState("node_fail", {}, "n1"), RunState("timeout", {})]

    monkeypatch.setattr("lunaris.launch.sweep.slurm_array.wait_until_ended", ended)
    assert main([*ARGV, "launch.wait=true", "seed=1,2,3"]) == 1
    shown = capsys.readouterr().out
    assert "1 done, 2 failed" in shown and "best: seed=1, val loss 0.5000" in shown
    assert "failed: seed=2: n1" in shown and "failed: seed=3: timeout" in shown


@pytest.mark.parametrize(
    ("code", "before", "error"),
    [
        (-9, {"state": "running"}, "killed by SIGKILL"),
        (1, {"state": "running"}, "exit code 1"),
        (1, {"state": "queued", "last_error": "Boom"}, "Boom"),
        (2, {"state": "queued"}, None),
    ],
)
def test_how_a_worker_ended_is_recorded_where_it_could_not(
    tmp_path: Path, code: int, before: dict[str, str], error: str | None
) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.write_status(**before)
    run_points._record_exit(run_dir, code)
    status = run_dir.read_status()
    assert (status["state"], status.get("last_error")) == ("failed", error)
    run_dir.write_status(state="stopped")
    run_points._record_exit(run_dir, code)
    assert run_dir.read_status()["state"] == "stopped"


def test_a_callback_of_hydra_s_is_called(
    sent: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("seen.py").write_text(
        "from pathlib import Path\nfrom hydra.experimental.callback import Callback\n\n\n"
        "class Seen(Callback):\n"
        "    def on_multirun_end(self, config, **keys):\n        Path('called').touch()\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    assert main([*ARGV, "+hydra.callbacks.seen._target_=seen.Seen", "seed=1,2"]) == 0
    assert Path("called").exists() and sent == [["seed=1", "seed=2"]]


def test_our_slurm_launcher_refuses_points_of_another_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", "hydra/launcher=slurm", "launch=local", "seed=1,2"]) == 2
    assert "hydra/launcher=slurm needs launch=slurm" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


SBATCH = """\
#!/bin/sh
echo "$@" >> {calls}
grep -q partition=nope || exit 0
echo 'sbatch: error: invalid partition specified: nope' >&2
echo 'allocation failure: {said}' >&2
exit 1
"""


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts an `sbatch` in place, which refuses the partition `nope`."""
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def put(said: str) -> None:
        (tmp_path / "bin").mkdir()
        for name in ("sbatch", "srun"):
            client = tmp_path / "bin" / name
            client.write_text(SBATCH.format(calls=calls, said=said))
            client.chmod(0o755)

    return put


def test_a_point_that_slurm_refuses_keeps_the_sweep_from_being_sent(
    sbatch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch("Invalid partition name specified")
    assert main([*ARGV, "launch.partition=main,nope", "seed=1,2,3"]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and said.count("invalid partition specified: nope") == 1
    assert "launch.partition=nope: SLURM refuses" in said and not Path("sweeps").exists()
    # Once for each set of resources; nothing else was asked.
    assert (tmp_path / "calls").read_text() == "--test-only\n" * 2


def test_a_job_that_would_wait_is_not_refused(sbatch: Any) -> None:
    sbatch("Requested nodes are busy")
    assert refusal_of("#SBATCH --partition=nope\n") is None


@pytest.mark.parametrize("folder", ["a%j", "a\\\\b"])
def test_a_folder_with_a_pattern_of_slurm_s_is_refused(
    sent: list[list[str]], folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, seeds in (["-m"], "seed=1,2"), ([], "seed=1"):
        argv = ["train", *flags, "data=synthetic", "launch=slurm", seeds, f"out_dir='{folder}'"]
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: out_dir=") and "must not contain" in said
    assert not os.listdir() and not sent
