"""Feeds the rows of a run's `metrics.jsonl` to Weights & Biases, in a separate process. No torch.

`python -m lunaris.metrics.wandb_feed RUN_DIR KEYS`, with KEYS as JSON, sends the rows of the file
and those that follow, until its standard input is closed or a byte arrives there. Training never
waits for W&B. Each start sends all rows: W&B drops the steps that it has, so that what a signal, a
crash or a broken connection cost is sent when the run continues, or by `lunaris wandb-sync`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lunaris.atomic_files import read_json, write_json
from lunaris.metrics.records import Row, expert_shares, rows_from, scalars
from lunaris.runs.run_dir import RunDir

_POLL_S = 0.5
# Where whoever started this process is gone, it outlives `finish_timeout_s` by this at most.
_SPARE_S = 60
# W&B draws no histogram of more bins.
_MOST_BINS = 512
STATE = "wandb.json"
# What the log of W&B's service says where it stops sending rows.
_GAVE_UP = "filestream: fatal error"


@dataclass
class FeedState:
    """What `wandb.json` in a run's folder says.

    mode: online or offline, once W&B has started. url: of the run, once W&B has taken it.
    rows: rows of `metrics.jsonl` given to W&B; finished: whether W&B has confirmed them all.
    error: why it did not, or why it is offline.
    """

    id: str
    project: str
    entity: str | None
    mode: str | None = None
    url: str | None = None
    rows: int = 0
    finished: bool = False
    error: str | None = None


def read_state(run_dir: RunDir) -> FeedState | None:
    """Return the state of a run's feed, or None where there is none that can be read."""
    try:
        state = FeedState(**read_json(run_dir.path / STATE))
    except (OSError, ValueError, TypeError):
        return None
    texts = (state.id, state.project)
    optional = (state.entity, state.mode, state.url, state.error)
    whole = all(isinstance(text, str) and text for text in texts) and isinstance(state.rows, int)
    return state if whole and all(isinstance(text, str | None) for text in optional) else None


def start_state(run_dir: RunDir, keys: dict[str, Any]) -> FeedState:
    """Write and return the state of a feed that starts.

    The id stays as it was, so that every attempt of a run continues the same W&B run. So do the
    project and the entity once W&B has taken the run; until then `keys` may correct them, and the
    environment counts where nothing did before.
    """
    before = read_state(run_dir)
    project, entity = keys.get("project"), keys.get("entity")
    if before is None:
        project = project or os.environ.get("WANDB_PROJECT") or "lunaris"
        state = FeedState(uuid.uuid4().hex[:12], project, entity)
    elif before.url:
        state = FeedState(before.id, before.project, before.entity, url=before.url)
    else:
        state = FeedState(before.id, project or before.project, entity or before.entity)
    write_json(run_dir.path / STATE, asdict(state))
    return state


def main(argv: list[str] | None = None) -> int:
    """Feed a run's rows; return 0 once W&B has them all, else 1, with the reason in wandb.json."""
    args = sys.argv[1:] if argv is None else argv
    run_dir, keys = RunDir(args[0]), json.loads(args[1])
    # What ends a job goes to all its processes. The end of this one is its standard input.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ended = threading.Event()
    most_s = int(keys["finish_timeout_s"]) + _SPARE_S
    threading.Thread(target=_wait_for_the_end, args=(ended, most_s), daemon=True).start()
    state = read_state(run_dir) or start_state(run_dir, keys)
    modes = [keys["mode"], *(["offline"] if keys["fallback"] else [])]
    for mode in modes:
        state.mode, state.rows = None, 0
        try:
            _Feed(run_dir, keys, state).follow(mode, ended)
            return 0
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            state.error = state.error or f"{type(error).__name__}: {reason}"
            with suppress(OSError):
                write_json(run_dir.path / STATE, asdict(state))
            _tear_down()
    return 1


def _wait_for_the_end(ended: threading.Event, most_s: int) -> None:
    os.read(0, 1)
    signal.alarm(most_s)
    ended.set()


def _tear_down() -> None:
    """End W&B's service, which may be dead: the next try starts a fresh one."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _refusal(log: Path) -> str | None:
    """Return why W&B's service gave up on the rows, from its own log; None where it did not.

    `finish` returns as if all were well then.
    """
    with suppress(OSError, ValueError):
        for line in log.read_text().splitlines():
            message = str(json.loads(line).get("msg"))
            if message.startswith(_GAVE_UP):
                return message.removeprefix(_GAVE_UP).strip(": ")
    return None


class _Feed:
    """One W&B run in this process."""

    def __init__(self, run_dir: RunDir, keys: dict[str, Any], state: FeedState) -> None:
        self._dir, self._keys, self._state = run_dir, keys, state
        self._offset = 0

    def follow(self, mode: str, ended: threading.Event) -> None:
        """Start W&B in `mode`, send rows until the end and finish. Raises what W&B raises."""
        import wandb

        self._start(wandb, mode)
        last = False
        while not last:
            last = ended.wait(_POLL_S)
            self._send(wandb)
        self._run.finish(exit_code=0)
        if (refusal := _refusal(Path(self._run.settings.log_internal))) is not None:
            raise ConnectionError(f"W&B refused the rows: {refusal}")
        self._state.finished = True
        self._save()

    def _start(self, wandb: Any, mode: str) -> None:
        keys, state = self._keys, self._state
        self._run = wandb.init(
            id=state.id,
            resume="allow",
            project=state.project,
            entity=state.entity,
            group=keys.get("group"),
            job_type=keys.get("job_type"),
            tags=keys.get("tags") or None,
            name=os.environ.get("WANDB_NAME") or keys["name"],
            dir=os.environ.get("WANDB_DIR") or str(self._dir.path),
            config=_config(self._dir),
            mode=mode,
            settings=wandb.Settings(init_timeout=keys["init_timeout_s"], silent=True),
        )
        for name, summary in (("*", None), ("train/loss", "min"), ("val/loss", "min")):
            self._run.define_metric(name, step_metric="step", summary=summary)
        state.mode = mode
        if mode != "offline":
            state.url = self._run.url
        self._save()

    def _send(self, wandb: Any) -> None:
        rows, self._offset = rows_from(self._dir.metrics_path, self._offset)
        for row in rows:
            self._run.log(_entries(wandb, row), step=row["step"])
        if rows:
            self._state.rows += len(rows)
            self._save()

    def _save(self) -> None:
        write_json(self._dir.path / STATE, asdict(self._state))


def _entries(wandb: Any, row: Row) -> dict[str, Any]:
    """Return what W&B logs of a row: its numbers, and expert use as a heat map over time.

    A histogram whose bins are the experts is one small entry a layer, and W&B draws those of all
    steps as a heat map.
    """
    entries: dict[str, Any] = {"step": row["step"], **scalars(row)}
    for name, shares in expert_shares(row).items():
        if len(shares) <= _MOST_BINS:
            edges = list(range(len(shares) + 1))
            entries[name] = wandb.Histogram(np_histogram=(shares, edges))
    return entries


def _config(run_dir: RunDir) -> dict[str, Any]:
    """Return the run's config as plain dicts, with its provenance."""
    from omegaconf import OmegaConf

    if not run_dir.config_path.is_file():
        return {}
    config = OmegaConf.to_container(OmegaConf.load(run_dir.config_path))
    found = config if isinstance(config, dict) else {}
    return {str(k): v for k, v in found.items()} | {"provenance": run_dir.read_provenance()}


if __name__ == "__main__":
    sys.exit(main())
