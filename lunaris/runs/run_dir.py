"""The folder of a run: its config, provenance, status and lock. No torch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunaris.atomic_files import FileInUse, file_lock, read_json, write_json
from lunaris.errors import UserError
from lunaris.runs import provenance

if TYPE_CHECKING:
    from lunaris.config.schema.root import Config


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

    def read_config(self) -> Config:
        """Return the frozen config, brought to today's version.

        Raises UserError unless the file is there, complete and allowed by the schemas.
        """
        # Imported here: the table of runs answers without OmegaConf.
        from lunaris.config.frozen import read_config

        if not self.config_path.is_file():
            raise UserError(f"{self.path}: not a run's folder (it holds no config.yaml)")
        return read_config(self.config_path)

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
