"""The folder of a run: its config, provenance, status and lock. No torch."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lunaris.atomic_files import FileInUse, file_lock, read_json, write_json
from lunaris.errors import UserError, did_you_mean
from lunaris.runs import changes, provenance
from lunaris.runs.facts import checkpoint_folders, newest_facts

if TYPE_CHECKING:
    from lunaris.config.schema.root import Config

_log = logging.getLogger(__name__)
_FILES = ("config.yaml", "provenance.json", "status.json", "metrics.jsonl", "tokenizer.json",
          "changes.jsonl", "loss.png", "report.html", "model.pt", "wandb.json", ".lock",
          ".status.lock", ".submission.lock")  # fmt: skip
_FOLDERS = ("checkpoints", "logs", "set_aside")


def _is_map(value: object) -> bool:
    return isinstance(value, dict)


def _are(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number_or_null(value: object) -> bool:
    return value is None or type(value) in (int, float)


# What the entries of the files must be; others, which a custom part may have written, pass.
_STATUS: dict[str, Callable[[object], bool]] = {
    "state": _is_text, "step": _is_count, "attempts": _is_count, "max_steps": _is_count,
    "timeouts": _is_count, "tokens": _is_count, "parameters": _is_count,
    "active_parameters": _is_count, "job_id": _is_text_or_null,
    "job_log": _is_text_or_null, "last_error": _is_text_or_null, "time": _is_number_or_null,
    "best_val_loss": _is_number_or_null, "after": _are(str), "chain": _are(str),
    "bad_nodes": _is_map, "excluded": _is_map,
    "failures": _is_count, "preflights": _is_count, "last_failure": _is_text_or_null,
}  # fmt: skip
_PROVENANCE: dict[str, Callable[[object], bool]] = {
    "command": _is_text, "overrides": _are(str), "attempts": _are(dict), "earlier": _are(dict),
    "parents": _are(dict),
    "data": lambda value: value is None or _is_map(value), "versions": _is_map, "slurm": _is_map,
    "eot_id": lambda value: value is None or _is_count(value), "git": _is_map,
}  # fmt: skip
_RULES = {"status.json": _STATUS, "provenance.json": _PROVENANCE}
# The states of a run that has trained as far as its config says.
FINISHED = ("done", "paused")


def not_a_run(folder: Path, further: str = "") -> str:
    """Return the message that a folder is no run's, with what it is not either (`further`).

    Of a folder that does not exist, it names the nearest one beside it.
    """
    text = f"{folder}: not a run's folder{further}"
    if folder.exists():
        return text
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return f"{text}: it does not exist{did_you_mean(str(folder), map(str, beside))}"


class RunDir:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        # A copy of the tokenizer that the run was trained with.
        self.tokenizer_path = self.path / "tokenizer.json"
        self.provenance_path = self.path / "provenance.json"
        self.logs = self.path / "logs"

    def read_config(self) -> Config:
        """Return the frozen config, brought to today's version.

        Where config.yaml is missing or damaged, the copy in the newest checkpoint, or in a change
        recorded since, is taken. Raises UserError when there is no config, when the schemas do not
        allow it, or when config.yaml has other values than this copy.
        """
        # Imported here: the table of runs answers without OmegaConf.
        from lunaris.config.frozen import read_config

        self.check_kinds()
        saved = self.saved_config()
        if not self.config_path.is_file():
            if saved is not None:
                _log.warning("%s: missing; its copy in a checkpoint is taken", self.config_path)
                return saved
            if checkpoint_folders(self.checkpoints):
                raise UserError(f"{self.config_path}: missing, and no checkpoint has a copy of it")
            raise UserError(not_a_run(self.path))
        try:
            cfg = read_config(self.config_path)
        except UserError as error:
            if saved is None:
                raise
            _log.warning("%s; its copy in a checkpoint is taken", error)
            return saved
        return cfg if saved is None else self._refuse_edited(cfg, saved)

    def saved_config(self) -> Config | None:
        """Return the config with which this run continues, as its history holds it.

        It is that of the last change recorded since the newest checkpoint, else the copy in this
        checkpoint; None without such a copy.
        """
        from lunaris.config.frozen import from_tree

        facts = newest_facts(self.checkpoints)
        rows = self.changes_since_checkpoint()
        if rows:
            return from_tree(rows[-1].config, self.path / changes.NAME)
        return None if facts is None else from_tree(facts.config, facts.path)

    def changes_since_checkpoint(self) -> list[changes.Change]:
        """Return the changes that no checkpoint with a copy of the config knows yet."""
        facts = newest_facts(self.checkpoints)
        return changes.since(changes.read_changes(self.path), facts.step if facts else 0)

    def _refuse_edited(self, cfg: Config, saved: Config) -> Config:
        """Return `cfg`, or `saved` where the last recorded change did not reach config.yaml.

        Raises UserError when `cfg` would give the run other numbers than `saved` for any other
        reason.
        """
        from lunaris.config.identity import differing, every_key, identity, keep_choices

        if not differing(identity(saved), identity(cfg)):
            keep_choices(cfg, saved)
            return cfg
        # A change may have been written since `saved` was read; it is recorded before config.yaml.
        saved = self.saved_config() or saved
        rows = differing(identity(saved), identity(cfg))
        if not rows:
            keep_choices(cfg, saved)
            return cfg
        last = self.changes_since_checkpoint()[-1:]
        found = every_key(cfg)
        if last and all(found.get(key) == row.get("old") for key, row in last[0].keys.items()):
            _log.warning("%s: without the change recorded last, which is taken", self.config_path)
            return saved
        raise UserError(
            f"{self.config_path}: was edited: the checkpoints were trained with another config; "
            "put the old values back, change the run by `lunaris resume DIR KEY=VALUE`, or start "
            "one with another `name=`. Differing keys:\n  " + "\n  ".join(rows)
        )

    def check_kinds(self) -> None:
        """Raise UserError for a folder where a file must be, and for a file in place of one."""
        logs = [f"logs/{log.name}" for log in self.logs.glob("rank_*.log")]
        for name in (*_FILES, *logs, *_FOLDERS):
            path = self.path / name
            if path.exists() and path.is_dir() != (name in _FOLDERS):
                kinds = ("file", "folder") if name in _FOLDERS else ("folder", "file")
                raise UserError(f"{path}: is a {kinds[0]}, must be a {kinds[1]}; move it away")

    def set_aside_damaged(self) -> None:
        """Rename what cannot be read of status.json and provenance.json, to be written again.

        Only the holder of the lock may call this.
        """
        for name in _RULES:
            path = self.path / name
            fault = self.fault_of(name)
            if fault is not None:
                path.replace(path.with_name(f"{name}.damaged"))
                _log.warning("%s: %s; kept as %s.damaged and written again", path, fault, name)

    def fault_of(self, name: str) -> str | None:
        """Return what is wrong with status.json or provenance.json, or None; absent is not."""
        path = self.path / name
        if not path.exists():
            return None
        content = read_json(path)
        if not content:
            return "cannot be read"
        wrong = [key for key in content if not _fits(name, key, content[key])]
        return f"holds a {wrong[0]} of a wrong type" if wrong else None

    def read_status(self) -> dict[str, Any]:
        """Return status.json without entries of a wrong type, or {} before the first write."""
        return self._read("status.json")

    def write_status(self, **changes: Any) -> None:
        """Merge `changes` into status.json and stamp the time (seconds since the epoch)."""
        # The process that submits a job writes its id while the job may already write its step.
        with file_lock(self.path / ".status.lock"):
            status = self.read_status() | changes | {"time": time.time()}
            write_json(self.path / "status.json", status)

    def read_provenance(self) -> dict[str, Any]:
        """Return provenance.json without entries of a wrong type, or {} before the first write."""
        return self._read("provenance.json")

    def note(self, **facts: Any) -> None:
        """Write facts into provenance.json under their names."""
        write_json(self.provenance_path, self.read_provenance() | facts)

    def noted(self, name: str) -> Any:
        """Return the fact that `note` wrote under a name, or None."""
        return self.read_provenance().get(name)

    def parents(self) -> list[dict[str, Any]]:
        """Return the runs that this one comes from: each a `kind`, `dir` and `step` (or None).

        kind is in words, like "forked from".
        """
        found: list[dict[str, Any]] = self.noted("parents") or []
        return found

    def add_parent(self, parent: dict[str, Any]) -> None:
        """Keep a run or a file that this run comes from, once of each kind."""
        others = [row for row in self.parents() if row.get("kind") != parent["kind"]]
        self.note(parents=[*others, parent])

    def left_out(self) -> list[tuple[int, int]]:
        """Return the ranges of sequences, first and last, that `lunaris resume` left out."""
        return [(row["first"], row["last"]) for row in self.noted("skip_sequences") or []]

    def leave_out(self, first: int, last: int) -> None:
        """Record that the run does not train on the sequences `first` to `last` from now on."""
        row = {"first": first, "last": last, "time": time.time()}
        self.note(skip_sequences=[*(self.noted("skip_sequences") or []), row])

    def record_attempt(self, world_size: int) -> int:
        """Append this start of the run to provenance.json; return how many there are now."""
        attempt = {"time": time.time(), "world_size": world_size, **provenance.machine()}
        attempts = self.read_provenance().get("attempts", [])
        if attempts and "ended" not in attempts[-1]:
            # It was killed. Its last row of metrics is the last that is known of it.
            attempts[-1]["ended"] = self._last_row_at(attempts[-1].get("time"))
        attempts = [*attempts, attempt]
        self.note(attempts=attempts)
        return len(attempts)

    def end_attempt(self) -> None:
        """Note in provenance.json when the last attempt ends: now."""
        *others, last = self.read_provenance()["attempts"]
        self.note(attempts=[*others, last | {"ended": time.time()}])

    def trained_s(self, *, active: bool) -> float | None:
        """Return the seconds for which the run's processes existed, over all attempts.

        active: whether the last attempt goes on. None before the first one, and where an older
        version recorded more than one.
        """
        attempts = self.read_provenance().get("attempts", [])
        began = [attempt.get("time") for attempt in attempts]
        ended = [attempt.get("ended") for attempt in attempts]
        if attempts and ended[-1] is None:
            ended[-1] = time.time() if active else self._last_row_at(began[-1])
        known = all(type(at) in (int, float) for at in (*began, *ended))
        return float(sum(ended) - sum(began)) if attempts and known else None

    def _last_row_at(self, began: object) -> float | None:
        """Return when the last row of metrics was written, and `began` if that is later."""
        if not isinstance(began, int | float):
            return None
        try:
            return max(began, self.metrics_path.stat().st_mtime)
        except OSError:
            return began

    def begin_at(self, step: int) -> None:
        """Record that this start of the run continues after `step`; changes begin there too."""
        changes.begin_changes_at(self.path, step)
        attempts = self.read_provenance().get("attempts", [])
        if attempts:
            self.note(attempts=[*attempts[:-1], attempts[-1] | {"step": step}])

    def _read(self, name: str) -> dict[str, Any]:
        content = read_json(self.path / name)
        return {key: value for key, value in content.items() if _fits(name, key, value)}

    def submission_lock(self) -> TextIO:
        """Wait until no other command submits this run; closing the returned file lets others."""
        return file_lock(self.path / ".submission.lock")

    def lock(self) -> TextIO:
        """Lock the folder for this job, until the returned file is closed or the process ends.

        Raises UserError while another job has the lock.
        """
        try:
            file = file_lock(self.path / ".lock", wait=False)
        except FileInUse as error:
            raise UserError(
                f"{self.path}: in use by {error or 'another process'}; only one job at a "
                "time can write a folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        return file


def _fits(file: str, key: str, value: object) -> bool:
    rule = _RULES[file].get(key)
    return rule is None or rule(value)
