"""Weights & Biases beside the console and `metrics.jsonl`."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import wandb
from omegaconf import OmegaConf

from lunaris.atomic_files import read_json
from lunaris.metrics.loggers import LocalLogger
from lunaris.runs.run_dir import RunDir


class WandbLogger(LocalLogger):
    """Logs to W&B as well. A service that cannot be reached is said once and never stops the run.

    The W&B run's id is kept in the run's folder (`wandb_id`), so that every attempt of a run goes
    on in the same W&B run.
    """

    def __init__(
        self, *, project: str, entity: str | None, group: str | None, tags: list[str], mode: str
    ) -> None:
        self._settings: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "tags": list(tags),
        }
        self._mode = mode
        self._run: Any = None

    def start(self, run_dir: RunDir, cfg: Any, step: int) -> None:
        """Start or resume the W&B run; fall back to offline, then to local logging alone."""
        super().start(run_dir, cfg, step)
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        config["provenance"] = read_json(run_dir.path / "provenance.json")
        modes: list[Any] = list(dict.fromkeys((self._mode, "offline")))
        for mode in modes:
            try:
                self._run = wandb.init(
                    id=_run_id(run_dir.path / "wandb_id"),
                    resume="allow",
                    name=cfg.name,
                    dir=str(run_dir.path),
                    config=config,
                    mode=mode,
                    settings=wandb.Settings(init_timeout=60, silent=True),
                    **self._settings,
                )
                # Its own axis: W&B's counter of calls refuses the steps of a resumed run.
                self._run.define_metric("step")
                self._run.define_metric("*", step_metric="step")
                return
            except (wandb.Error, OSError) as error:
                self._run = None
                self.message(f"W&B ({mode}) did not start: {error}")

    def log(self, row: dict[str, Any]) -> None:
        """Log the row; with a validation loss, also one bar chart of expert use a layer."""
        super().log(row)
        scalars = {k: v for k, v in row.items() if not isinstance(v, list)}
        charts = {}
        if "val/loss" in row:
            charts = {
                f"{key}_chart": _expert_chart(key, value)
                for key, value in row.items()
                if key.startswith("moe/") and key.endswith("/load")
            }
        self._safely("log", scalars | charts)

    def finish(self) -> None:
        """End the W&B run and close the local files."""
        self._safely("finish")
        super().finish()

    def _safely(self, verb: str, *args: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, verb)(*args)
        except (wandb.Error, OSError) as error:
            self.message(f"W&B stopped answering ({error}); metrics.jsonl goes on")
            self._run = None


def _run_id(path: Path) -> str:
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _expert_chart(key: str, load: list[float]) -> Any:
    columns: list[str | int] = ["expert", "share of tokens"]
    table = wandb.Table(data=[[f"{i:03d}", share] for i, share in enumerate(load)], columns=columns)
    layer = key.split("/")[1].replace("_", " ")
    return wandb.plot.bar(table, "expert", "share of tokens", title=f"Expert use, {layer}")
