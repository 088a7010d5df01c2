"""Preparations sent to SLURM: a job array encodes the corpus, and a job after it merges."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError

from lunaris.atomic_files import replace_file, write_json
from lunaris.config.frozen import to_tree, to_yaml
from lunaris.config.schema.base import component_keys
from lunaris.config.schema.data import PreparedDataConfig
from lunaris.config.schema.root import Config
from lunaris.config.trust import targets_of
from lunaris.data import manifest as manifests
from lunaris.data.prepare.folder_tokenizer import folder_tokenizer
from lunaris.data.prepare.pipeline import cleaned_up, folder_lock
from lunaris.data.prepare.share import Share, most_tasks
from lunaris.data.prepare.spec import PrepareSpec, read_note
from lunaris.errors import UserError
from lunaris.launch import snapshot
from lunaris.launch.arrays import split
from lunaris.launch.job_environment import python_command
from lunaris.launch.prepare_task import PrepareTask, spec_for_jobs
from lunaris.launch.sending import array_of, end_of, refusal
from lunaris.launch.slurm import Slurm, check_folder, say_dry, wait_until_ended
from lunaris.launch.submitit_internals import sbatch_script
from lunaris.runs import provenance
from lunaris.runs.preparation import CONFIG
from lunaris.runs.run_dir import RunDir
from lunaris.runs.slurm_client import LOCAL, cancel_jobs, max_array_size
from lunaris.runs.status import refuse_active


class PrepareArray(Slurm):
    """Sends the preparation of one folder; takes the keys of `launch=slurm`."""

    @classmethod
    def of(cls, cfg: Config) -> PrepareArray:
        return cls(**component_keys(cfg.launch))

    def prepare(self, cfg: Config, command: str, overrides: list[str]) -> int:
        """Freeze the preparation that a config describes, send its jobs and return.

        Returns the exit code: 0 when the jobs were sent or there is nothing to do, and with `wait`
        1 if the preparation failed. Raises UserError when it is queued or running already, the
        folder holds something else, or SLURM refuses a job; nothing is sent then.
        """
        assert isinstance(cfg.data, PreparedDataConfig)
        given, frozen = cfg.data.dir, to_yaml(cfg)
        path = Path(given).absolute()
        check_folder(path, "data.dir")
        spec = spec_for_jobs(cfg, path)
        made = manifests.read(path)
        if made is not None:
            manifests.require_same(path, made.settings, spec.settings)
            print(f"{given}: already prepared; nothing was sent")
            return 0
        name, tasks = f"prepare-{path.name}", min(self.keys.array_tasks, most_tasks(spec))
        if self.keys.dry_run:
            print("\n".join(self.scripts(name, path, tasks)))
            say_dry(given)
            return 0
        refuse_active(path)
        self.check(name, path)
        # The jobs wait for the lock, and a second command is refused.
        with cleaned_up(path), folder_lock(path, wait=False):
            refuse_active(path)
            read_note(spec)
            if spec.keys.tokenizer is not None:
                # Here, where there may be a network. To train one takes a while: the first task.
                folder_tokenizer(spec)
            replace_file(path / CONFIG, frozen)
            ids = self._send_all(spec, name, tasks, targets_of(to_tree(cfg)), command, overrides)
        print(self._sent(ids, tasks, given), flush=True)
        if not self.keys.wait:
            return 0
        state = wait_until_ended([path])[0]
        print(f"{state.state}: {given}" + (f": {state.remark}" if state.remark else ""))
        return int(state.state != "done")

    def scripts(self, name: str, folder: Path, tasks: int) -> list[str]:
        """Return the scripts of the array, if there are several tasks, and of the merging."""
        logs, code = folder / "logs" / "slurm", folder / "code" / "SNAPSHOT"
        python = python_command(self.keys, folder)
        if tasks == 1:
            return [self.script(name, logs, code)]
        merging = self._merging(name, logs, code, ["ARRAY"])
        return [self.script(name, logs, code, tasks), sbatch_script(logs, merging, python)]

    def _send_all(
        self, spec: PrepareSpec, name: str, tasks: int, targets: set[str], command: str,
        overrides: list[str],
    ) -> list[str]:  # fmt: skip
        """Send the jobs and write their ids into the folder; return them, the merging last."""
        folder, run_dir = spec.folder, RunDir(spec.folder)
        code = snapshot.take(folder / "code", targets)
        new = provenance.collect(command, overrides) | {"code": code.provenance()}
        run_dir.logs.joinpath("slurm").mkdir(parents=True, exist_ok=True)
        write_json(run_dir.provenance_path, provenance.update(run_dir.read_provenance(), new))
        sizes = [source.size for source in spec.sources]
        run_dir.write_status(
            state="queued", job_id=None, task_ids=[], job_log=None, last_error=None,
            stop_cause=None, cancelled=None, bytes=sum(sizes) if all(sizes) else 0,
        )  # fmt: skip
        sent: list[str] = []
        try:
            merging = self._send_jobs(folder, name, tasks, code.path, sent)
        except (FailedJobError, FailedSubmissionError) as error:
            refused = refusal(error)
            with suppress(RuntimeError):
                cancel_jobs(sent)
            run_dir.write_status(state="failed", last_error=refused)
            raise UserError(f"launch=slurm: {refused}") from error
        run_dir.write_status(job_id=sent[-1], task_ids=sent[:-1])
        if run_dir.read_status().get("job_log") is None:  # A task that failed has written its own.
            run_dir.write_status(job_log=str(merging.paths.stdout))
        return sent

    def _send_jobs(self, folder: Path, name: str, tasks: int, code: Path, sent: list[str]) -> Any:
        """Send the array and the job that merges; append their ids, and return the latter."""
        logs = folder / "logs" / "slurm"
        shares = [PrepareTask(folder, Share(k, tasks)) for k in range(tasks)] if tasks > 1 else []
        if self.keys.cluster == "local":
            if shares:
                sent += [LOCAL + job.job_id for job in self._start_here(shares, logs, code)]
            merge = PrepareTask(folder, None, waits_for=tuple(sent))
            (job,) = self._start_here([merge], logs, code, in_turn=False)
            sent.append(LOCAL + job.job_id)
            return job
        parts = split(tasks, max_array_size(), self.keys.array_parallelism) if shares else []
        for part in parts:
            before = [] if part.after is None else [end_of(sent[parts[part.after].first])]
            parameters = self.parameters(name, logs, code, before)
            parameters["array_parallelism"] = part.parallelism
            chosen = shares[part.first : part.first + part.size]
            sent += [job.job_id for job in self._submit(chosen, logs, parameters)]
            # At once, so that a command that is interrupted here leaves no unknown job.
            RunDir(folder).write_status(job_id=sent[-1], task_ids=sent[:-1])
        parameters = self.parameters(name, logs, code)
        if shares:
            arrays = list(dict.fromkeys(map(array_of, sent)))
            parameters = self._merging(name, logs, code, arrays)
        (job,) = self._submit([PrepareTask(folder, None)], logs, parameters)
        sent.append(job.job_id)
        return job

    def _merging(self, name: str, logs: Path, code: Path, arrays: Sequence[str]) -> dict[str, Any]:
        """Return the options of the job that merges once all tasks of the arrays have succeeded."""
        parameters = self.parameters(name, logs, code)
        parameters["additional_parameters"] |= {
            "dependency": f"afterok:{':'.join(arrays)}",
            # Otherwise it would wait for ever after a task has failed.
            "kill-on-invalid-dep": "yes",
        }
        return parameters

    def _sent(self, ids: list[str], tasks: int, given: str) -> str:
        where = f", partition {self.keys.partition}" if self.keys.partition else ""
        cores = self.keys.cpus_per_task
        shape = f"{cores} process{'es' * (cores != 1)}{where}"
        jobs = f"job {ids[-1]} ({shape})"
        if tasks > 1:
            arrays = list(dict.fromkeys(map(array_of, ids[:-1])))
            one = len(arrays) == 1 or self.keys.cluster == "local"
            named = f"job array {arrays[0]}" if one else f"job arrays {', '.join(arrays)}"
            jobs = f"{named} ({tasks} tasks × {shape}), and job {ids[-1]}, which merges after it"
        folder = shlex.quote(given)
        return "\n".join(
            [
                f"sent    {jobs}",
                f"shards  {given}",
                f"logs    {given}/logs/slurm",
                f"follow  lunaris runs {folder} --watch",
                f"cancel  lunaris cancel {folder}",
            ]
        )
