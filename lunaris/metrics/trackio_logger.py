"""Trackio: a local database of runs, which `trackio show` displays."""

from __future__ import annotations

import contextlib
import io
import sqlite3
import uuid
from pathlib import Path
from typing import Any

from lunaris.config.schema.root import Config
from lunaris.config.typed import to_plain
from lunaris.console import say
from lunaris.errors import need
from lunaris.metrics.loggers import Logger
from lunaris.metrics.records import Row, expert_shares, kept_rows, scalars
from lunaris.runs.run_dir import RunDir


class TrackioLogger(Logger):
    """Logs scalars, and with each validation loss one histogram of expert use a layer.

    The run's name in the project is a file of the run's folder (`trackio_name`), so that every
    attempt continues the same run, and runs of one name in different folders stay apart. Raises
    UserError when the extra `trackio` is not installed.
    """

    def __init__(self, *, project: str, group: str | None) -> None:
        """project, group: where it shows the run. The variable TRACKIO_DIR names its folder."""
        self._trackio: Any = need("trackio", "logger=trackio", extra="trackio")
        self._project, self._group = project, group

    def start(self, run_dir: RunDir, cfg: Config, step: int) -> None:
        """Open the run, without the rows that it writes again and with any that are missing."""
        name = self._name(run_dir.path / "trackio_name", str(cfg.name))
        known = self._cut(name, step)
        config = to_plain(cfg) | {"provenance": run_dir.read_provenance()}
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = self._trackio.init(
                project=self._project,
                name=name,
                group=self._group,
                config=config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        say(f"Trackio: trackio show --project {self._project}")
        # A killed process may not have written its last rows.
        for row in kept_rows(run_dir.metrics_path, step):
            if row["step"] not in known:
                self.log(row)

    def log(self, row: Row) -> None:
        """Log the row under its names; lists but the experts' shares are left out."""
        histogram = self._trackio.Histogram
        charts = {
            name: histogram(np_histogram=(share, list(range(len(share) + 1))))
            for name, share in expert_shares(row).items()
        }
        self._run.log(scalars(row) | charts, step=row["step"])

    def finish(self) -> None:
        """Write what is left and end the run."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()

    def _name(self, path: Path, name: str) -> str:
        """Return the run's name in the project: `name`, or with a suffix where that is taken."""
        if not path.is_file():
            rows = self._query("SELECT 1 FROM configs WHERE run_name = ? LIMIT 1", name)
            path.write_text(f"{name}-{uuid.uuid4().hex[:6]}" if rows else name)
        return path.read_text().strip()

    def _cut(self, name: str, step: int) -> set[int]:
        """Delete a run's rows after `step`, all of them for 0; return the steps that remain."""
        self._query("DELETE FROM metrics WHERE run_name = ? AND step > ?", name, step or -1)
        return {row[0] for row in self._query("SELECT step FROM metrics WHERE run_name = ?", name)}

    def _query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        storage = need("trackio.sqlite_storage", "logger=trackio", extra="trackio").SQLiteStorage
        path = storage.get_project_db_path(self._project)
        if not path.is_file():
            return []
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as database, database:
            return database.execute(sql, values).fetchall()
