"""What is known of jobs, and what is printed and kept of them, where SLURM or a name is odd."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lunaris.launch.free_port import first_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

# How a controller under load answers: not at all in time, or with an error.
SILENT = {
    "hangs": "sleep 60",
    "refuses": "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1",
}


def path_with(site: Any, folder: Path, script: str, *clients: str) -> str:
    """Return a PATH on which each of `clients` is a shell script."""
    folder.mkdir()
    for client in clients:
        (folder / client).write_text(f"#!/bin/sh\n{script}\n")
        (folder / client).chmod(0o755)
    return f"{folder}:{site.env['PATH']}"


def jobs_named(site: Any, name: str) -> list[str]:
    return site.cluster.client("squeue", "-h", "-t", "PD,R", "-n", name, "-o", "%A").split()


@pytest.mark.parametrize("how", SILENT)
def test_while_slurm_does_not_answer_a_run_is_unknown_and_nothing_is_sent(
    site: Any, tmp_path: Path, how: str
) -> None:
    name, run = f"silent-{how}", f"runs/silent-{how}"
    site.train(name, "launch.additional_parameters.hold=true")
    (job,) = jobs_named(site, name)
    env = {"PATH": path_with(site, tmp_path / "bin", SILENT[how], "squeue", "sacct")}
    # The clients are waited for 30 s.
    (tmp_path / "sitecustomize.py").write_text(
        "from lunaris.runs import slurm_client\nslurm_client._TIMEOUT_S = 1\n"
    )
    env["PYTHONPATH"] = f"{site.env['PYTHONPATH']}:{tmp_path}"
    assert site.rows(run, **env)[0]["state"] == "unknown"
    for args in (["resume", run, "--trust", "paced"], site.train_args(name), ["cancel", run]):
        text = site.lunaris(*args, code=2, **env)
        assert f"whether job {job} still waits or runs is unknown" in text
    assert jobs_named(site, name) == [job] and site.status(run)["job_id"] == job
    assert site.rows(run)[0]["state"] == "queued"
    assert "cancelled job" in site.lunaris("cancel", run)


def test_without_slurm_s_clients_a_running_job_is_unknown(site: Any, tmp_path: Path) -> None:
    pace = tmp_path / "pace"
    pace.write_text("0.5")
    site.train("clientless", PACE=str(pace))
    site.wait_for(lambda: site.status("runs/clientless").get("step", 0) >= 1)
    (tmp_path / "empty").mkdir()
    bare = f"{Path(sys.executable).parent}:{tmp_path / 'empty'}"
    assert site.rows("runs/clientless", PATH=bare)[0]["state"] == "unknown"
    text = site.lunaris("resume", "runs/clientless", "--trust", "paced", code=2, PATH=bare)
    assert "still waits or runs is unknown" in text
    pace.write_text("0")
    assert site.wait_for_state("runs/clientless", "done", "failed")["state"] == "done"


def test_points_are_sent_with_few_lines_whatever_lies_in_the_checkout(
    site: Any, tmp_path: Path
) -> None:
    """A person's checkout, with a corpus beside the code that git does not track."""
    root = Path(__file__).parents[2]
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", str(root), str(checkout)], check=True)
    corpus = checkout / "corpus"
    corpus.mkdir()
    for i in range(300):
        (corpus / f"{i}.json").write_text('{"text": "word"}\n' * 10)
    (corpus / "large.json").write_text('{"text": "word"}\n' * 500_000)
    # Counts the processes of git, each of which then does what it is asked.
    count = tmp_path / "count"
    script = f'echo x >> {shlex.quote(str(count))}\nexec {shlex.quote(_which("git"))} "$@"'
    env = {"PATH": path_with(site, tmp_path / "bin", script, "git")}
    env["PYTHONPATH"] = f"{site.env['PYTHONPATH']}:{_installed(checkout, tmp_path)}"
    text = site.train(
        "several", "-m", "seed=1,2,3,4,5", "launch.additional_parameters.hold=true", **env
    )
    assert len(text.splitlines()) < 9 and "seed=" not in text, text
    assert len(count.read_text().splitlines()) < 50
    provenance = site.dir / "sweeps/several/seed=1/provenance.json"
    assert provenance.stat().st_size < 100_000
    code = site.dir / "sweeps/several/code"
    assert not list(code.rglob("large.json")) and list(code.rglob("train.py"))
    assert {row["state"] for row in site.rows("sweeps/several")} == {"queued"}
    assert "cancelled job" in site.lunaris("cancel", "sweeps/several")


def _which(name: str) -> str:
    return subprocess.run(
        ["which", name], capture_output=True, text=True, check=True
    ).stdout.strip()


def _installed(checkout: Path, folder: Path) -> Path:
    """Return a folder of sitecustomize.py that makes Python import the package of a checkout."""
    made = folder / "site"
    made.mkdir()
    mapping = {
        "lunaris": checkout / "lunaris",
        "lunaris.conf": checkout / "conf",
        "lunaris.launch": checkout / "launch",
    }
    (made / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder, ModuleSpec\n"
        "from importlib.util import spec_from_file_location\n"
        f"MAPPING = { {name: str(path) for name, path in mapping.items()}!r}\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name in MAPPING:\n"
        "            folder = MAPPING[name]\n"
        "            return spec_from_file_location(name, folder + '/__init__.py',\n"
        "                submodule_search_locations=[folder])\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    return made


def test_the_commands_that_are_printed_are_for_a_shell(site: Any) -> None:
    run = "runs/it's an odd name"
    text = site.train("odd", f'out_dir="{run}"')
    assert "(1 node × 1 task" in text
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert shlex.split(lines["state"]) == ["lunaris", "runs", run]
    assert shlex.split(lines["follow"]) == ["tail", "-F", f"{run}/logs/rank_0.log"]
    assert site.wait_for_state(run, "done", "failed")["state"] == "done"
    assert (site.dir / lines["log"]).stat().st_size


@pytest.mark.parametrize("folder", ["odd-%j", "odd-\\x"])
def test_a_folder_that_slurm_would_rename_is_refused(site: Any, folder: str) -> None:
    before = {str(path) for path in site.dir.rglob("*")}
    text = site.train("renamed", f"out_dir='runs/{folder}'", code=2)
    assert "must not contain" in text and folder in text
    assert {str(path) for path in site.dir.rglob("*")} == before
    assert not jobs_named(site, "renamed")


def test_a_requeue_that_ends_its_own_scontrol_is_carried_out(site: Any, tmp_path: Path) -> None:
    """SLURM ends the processes of a job that it requeues, and so the one that asked for it."""
    real = _which("scontrol")
    script = f'{shlex.quote(real)} "$@" >&2\n[ "$1" = requeue ] && kill -KILL $$\ntrue'
    pace = tmp_path / "pace"
    pace.write_text("0.5")
    env = {"PATH": path_with(site, tmp_path / "bin", script, "scontrol"), "PACE": str(pace)}
    site.train("ended", **env)
    site.wait_for(lambda: site.status("runs/ended").get("step", 0) >= 2)
    site.cluster.client("scancel", "--signal=USR2", site.status("runs/ended")["job_id"])
    site.wait_for(lambda: site.status("runs/ended").get("attempts") == 2)
    assert not site.status("runs/ended").get("last_error")
    pace.write_text("0")
    assert site.wait_for_state("runs/ended", "done", "failed")["state"] == "done"
    job = site.status("runs/ended")["job_id"]
    assert "Restarts=1 " in site.cluster.client("scontrol", "show", "job", job)


@contextmanager
def taken(ports: list[int]) -> Iterator[None]:
    """Listen on ports of this machine."""
    with ExitStack() as stack:
        for port in ports:
            listening = stack.enter_context(socket.socket())
            try:
                listening.bind(("", port))
            except OSError:
                continue  # Another process has it.
            listening.listen()
        yield


def test_where_the_port_of_a_job_is_taken_it_takes_another(site: Any) -> None:
    site.train(
        "port", "parallelism=ddp", "launch.nodes=2", "launch.additional_parameters.hold=true"
    )
    job = site.status("runs/port")["job_id"]
    # That of the script, and that of the scripts of other launchers.
    begun = [first_port(job), first_port(f"{job}:0")]
    with taken([port + i for port in begun for i in range(3)]):
        site.cluster.client("scontrol", "release", job)
        assert site.wait_for_state("runs/port", "done", "failed")["state"] == "done"
