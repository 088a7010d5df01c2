"""Weights & Biases: metrics, and one bar chart of expert use per layer."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, Literal, cast

import wandb

from lunaris.config.schema.root import Config
from lunaris.config.typed import to_plain
from lunaris.metrics.loggers import Logger, say
from lunaris.metrics.records import Row, expert_shares
from lunaris.runs.run_dir import RunDir

_Mode = Literal["online", "offline", "disabled"]


class WandbLogger(Logger):
    """Logs to W&B; writes to an offline folder when the service cannot be reached.

    The W&B run's id is a file of the run's folder (`wandb_id`), so that every attempt of a run
    continues the same W&B run.
    """

    def __init__(self, *, tags: list[str], mode: str, **keys: Any) -> None:
        """keys: `project`, `entity` and `group`, as `wandb.init` takes them."""
        self._keys = keys | {"tags": list(tags)}
        self._mode = cast(_Mode, mode)

    def start(self, run_dir: RunDir, cfg: Config, step: int) -> None:
        """Start or resume the W&B run. Raises wandb.Error or OSError when offline fails too."""
        try:
            self._init(run_dir, cfg, self._mode)
        except (wandb.Error, OSError) as error:
            if self._mode == "offline":
                raise
            say(f"W&B ({self._mode}) did not start: {error}; it is written offline")
            self._init(run_dir, cfg, "offline")

    def log(self, row: Row) -> None:
        """Log the row; with a validation loss, also one bar chart of expert use a layer."""
        scalars = {k: v for k, v in row.items() if not isinstance(v, list)}
        charts = {key: _expert_chart(key, share) for key, share in expert_shares(row).items()}
        self._run.log(scalars | charts)

    def finish(self) -> None:
        self._run.finish()

    def _init(self, run_dir: RunDir, cfg: Config, mode: _Mode) -> None:
        config = to_plain(cfg) | {"provenance": run_dir.read_provenance()}
        self._run = wandb.init(
            id=_run_id(run_dir.path / "wandb_id"),
            resume="allow",
            name=cfg.name,
            dir=str(run_dir.path),
            config=config,
            mode=mode,
            **self._keys,
            settings=wandb.Settings(init_timeout=60, silent=True),
        )
        # A separate axis: W&B's counter of calls refuses the steps of a resumed run.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")


def _run_id(path: Path) -> str:
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _expert_chart(key: str, load: list[float]) -> object:
    columns: list[str | int] = ["expert", "share of tokens"]
    table = wandb.Table(data=[[f"{i:03d}", share] for i, share in enumerate(load)], columns=columns)
    layer = key.split("/")[1].replace("_", " ")
    return wandb.plot.bar(table, "expert", "share of tokens", title=f"Expert use, {layer}")
