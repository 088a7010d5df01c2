"""A run's folder: its config, provenance, status and lock. No torch."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from lunaris.atomic_files import FileInUse, file_lock, read_json, replace_file, write_json
from lunaris.config.identity import differing, identity
from lunaris.errors import UserError

# Of what every run's config holds; `launch` is near its end.
_GROUPS = ("model", "data", "trainer", "launch")
_PACKAGES = ("lunaris-codex", "torch", "numpy", "hydra-core", "omegaconf", "submitit", "tokenizers")


class RunDir:
    """The files of one run (see the design's section on a run's folder)."""

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
        return self.path / "tokenizer.json"

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
        # Who sends a job notes its id while the job, maybe, already writes how far it is.
        with file_lock(self.path / ".status.lock"):
            status = self.read_status() | changes | {"time": time.time()}
            write_json(self.path / "status.json", status)

    def note(self, **facts: Any) -> None:
        """Keep facts in provenance.json, under their names."""
        path = self.path / "provenance.json"
        write_json(path, read_json(path) | facts)

    def noted(self, name: str) -> Any:
        """Return what `note` kept under a name, or None."""
        return read_json(self.path / "provenance.json").get(name)

    def record_attempt(self, world_size: int) -> int:
        """Count a start of the run and append where it runs to provenance.json."""
        path = self.path / "provenance.json"
        provenance = read_json(path)
        attempts = provenance.setdefault("attempts", [])
        attempts.append({"time": time.time(), "world_size": world_size, **_where()})
        write_json(path, provenance)
        return len(attempts)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one job. Raises UserError while another job holds it.

        The kernel releases the lock when the process ends, however it ends.
        """
        with ExitStack() as stack:
            try:
                file = stack.enter_context(file_lock(self.path / ".lock", wait=False))
            except FileInUse as error:
                raise UserError(
                    f"{self.path}: in use by {error or 'another process'}; two jobs never write "
                    "one folder"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield


def create(cfg: Any, command: str, overrides: list[str]) -> RunDir:
    """Make or reopen the folder `cfg.out_dir` for a composed config.

    A folder that already holds a run of the same identity (`lunaris.config.identity.identity`) is
    taken on, with the new values of the keys that may change. Raises UserError, having written
    nothing, when its config differs or another job is writing it.
    """
    run_dir = RunDir(cfg.out_dir)
    if "RANK" in os.environ and "processes" in cfg.launch:
        cfg.launch.processes = int(os.environ["WORLD_SIZE"])
    if run_dir.config_path.is_file():
        rows = differing(identity(run_dir.read_config()), identity(cfg))
        if rows:
            raise UserError(
                f"{run_dir.path}: holds a run of another config; choose another `name=`, or "
                "remove the folder. Differing keys:\n  " + "\n  ".join(rows)
            )
    try:
        run_dir.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir={cfg.out_dir}: cannot be made: {error.strerror}") from error
    try:
        _write(run_dir, cfg, command, overrides)
    except OSError as error:
        raise UserError(f"out_dir={cfg.out_dir}: cannot be written: {error.strerror}") from error
    return run_dir


def _write(run_dir: RunDir, cfg: Any, command: str, overrides: list[str]) -> None:
    with run_dir.lock():
        run_dir.write_config(cfg)
        path = run_dir.path / "provenance.json"
        write_json(path, _after(read_json(path), _provenance(command, overrides)))
        if not run_dir.read_status():
            run_dir.write_status(
                state="queued", step=0, attempts=0, max_steps=cfg.trainer.max_steps
            )


def _after(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance of a run that is launched again: what changed is kept in `earlier`."""
    changed = {key: old[key] for key in new if key in old and old[key] != new[key]}
    merged = old | new
    if changed.keys() - {"created"}:
        merged["earlier"] = [*old.get("earlier", []), changed]
    return merged


def _provenance(command: str, overrides: list[str]) -> dict[str, Any]:
    return {
        "command": command,
        "overrides": list(overrides),
        "created": time.time(),
        "cwd": os.getcwd(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in _PACKAGES},
        "git": _git(Path(__file__).resolve().parent),
        **_where(),
    }


def _where() -> dict[str, Any]:
    slurm = {k: v for k, v in os.environ.items() if k.startswith("SLURM_JOB") or "ARRAY" in k}
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "slurm": {k: v for k, v in sorted(slurm.items()) if k.startswith("SLURM_")},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache  # The same for every point of a sweep.
def _git(folder: Path) -> dict[str, Any]:
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(git("status", "--porcelain")) if commit else None}
