"""The folder of a run: its config, provenance, status and lock. No torch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.atomic_files import FileInUse, file_lock, read_json, replace_file, write_json
from lunaris.config.identity import differing, identity
from lunaris.errors import UserError
from lunaris.runs import provenance

if TYPE_CHECKING:
    from lunaris.config.schema.root import Config

# Groups that every config has. `launch` is one of the last, so that a cut file lacks it.
_GROUPS = ("model", "data", "trainer", "launch")


class RunDir:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer_path(self) -> Path:
        """Return the path of the copy of the tokenizer that the run was trained with."""
        return self.path / "tokenizer.json"

    @property
    def provenance_path(self) -> Path:
        return self.path / "provenance.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def read_config(self) -> Any:
        """Return the frozen config as a DictConfig. Raises UserError unless it is there, whole."""
        from omegaconf import OmegaConf
        from yaml import YAMLError

        if not self.config_path.is_file():
            raise UserError(f"{self.path}: not a run's folder (it holds no config.yaml)")
        try:
            cfg = OmegaConf.load(self.config_path)
        except (OSError, ValueError, YAMLError) as error:
            raise UserError(f"{self.config_path}: cannot be read: {error}") from error
        absent = [key for key in _GROUPS if not OmegaConf.is_dict(cfg) or key not in cfg]
        if absent:
            raise UserError(f"{self.config_path}: is not whole: it lacks {', '.join(absent)}")
        return cfg

    def write_config(self, cfg: Any) -> None:
        """Write the composed config, resolved."""
        from omegaconf import OmegaConf

        replace_file(self.config_path, OmegaConf.to_yaml(cfg, resolve=True).encode())

    def read_status(self) -> dict[str, Any]:
        """Return status.json, or {} before the first write."""
        return read_json(self.path / "status.json")

    def write_status(self, **changes: Any) -> None:
        """Merge `changes` into status.json and stamp the time (seconds since the epoch)."""
        # The process that submits a job writes its id while the job may already write its step.
        with file_lock(self.path / ".status.lock"):
            status = self.read_status() | changes | {"time": time.time()}
            write_json(self.path / "status.json", status)

    def read_provenance(self) -> dict[str, Any]:
        """Return provenance.json, or {} before the first write."""
        return read_json(self.provenance_path)

    def note(self, **facts: Any) -> None:
        """Write facts into provenance.json under their names."""
        write_json(self.provenance_path, self.read_provenance() | facts)

    def noted(self, name: str) -> Any:
        """Return the fact that `note` wrote under a name, or None."""
        return self.read_provenance().get(name)

    def record_attempt(self, world_size: int) -> int:
        """Append this start of the run to provenance.json; return how many there are now."""
        attempt = {"time": time.time(), "world_size": world_size, **provenance.machine()}
        attempts = [*self.read_provenance().get("attempts", []), attempt]
        self.note(attempts=attempts)
        return len(attempts)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for this job. Raises UserError while another job has the lock.

        The kernel releases the lock when the process ends, however it ends.
        """
        with ExitStack() as stack:
            try:
                file = stack.enter_context(file_lock(self.path / ".lock", wait=False))
            except FileInUse as error:
                raise UserError(
                    f"{self.path}: in use by {error or 'another process'}; only one job at a "
                    "time can write a folder"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield


def create(cfg: Config, command: str, overrides: list[str]) -> RunDir:
    """Create the folder `cfg.out_dir` for a composed config, or open it again.

    A folder that already holds a run of the same identity (`lunaris.config.identity.identity`) is
    reused, with the new values of the keys that may change. Raises UserError, having written
    nothing, when its config differs or another job is writing it.
    """
    run_dir = RunDir(cfg.out_dir)
    take_world_size(cfg)
    refuse_other_config(run_dir, cfg)
    try:
        run_dir.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir={cfg.out_dir}: cannot be created: {error.strerror}") from error
    try:
        _write(run_dir, cfg, command, overrides)
    except OSError as error:
        raise UserError(f"out_dir={cfg.out_dir}: cannot be written: {error.strerror}") from error
    return run_dir


def take_world_size(cfg: Config) -> None:
    """Set `launch.processes` to the world size of the launcher that started this process."""
    if "RANK" in os.environ and hasattr(cfg.launch, "processes"):
        cfg.launch.processes = int(os.environ["WORLD_SIZE"])


def refuse_other_config(run_dir: RunDir, cfg: Config) -> None:
    """Raise UserError when a folder holds a run of another identity than `cfg`."""
    if not run_dir.config_path.is_file():
        return
    rows = differing(identity(run_dir.read_config()), identity(cfg))
    if rows:
        raise UserError(
            f"{run_dir.path}: holds a run of another config; choose another `name=`, or "
            "remove the folder. Differing keys:\n  " + "\n  ".join(rows)
        )


def _write(run_dir: RunDir, cfg: Config, command: str, overrides: list[str]) -> None:
    with run_dir.lock():
        run_dir.write_config(cfg)
        old, new = run_dir.read_provenance(), provenance.collect(command, overrides)
        write_json(run_dir.provenance_path, provenance.update(old, new))
        if not run_dir.read_status():
            run_dir.write_status(
                state="queued", step=0, attempts=0, max_steps=cfg.trainer.max_steps
            )
