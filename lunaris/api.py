"""The package from Python: compose a config, train it, load what was trained, read what was logged.

`lunaris.compose`, `lunaris.train` and so on are these functions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lunaris.config.compose import Source, checked
from lunaris.config.compose import compose as _compose
from lunaris.config.schema.root import Config
from lunaris.config.trust import restricted
from lunaris.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lunaris.data.tokenizer import TextTokenizer
    from lunaris.model.transformer import Transformer
    from lunaris.run import RunResult


class Loaded(NamedTuple):
    """A trained model. tokenizer: None for a run on data without one. step: of its checkpoint."""

    model: Transformer
    tokenizer: TextTokenizer | None
    config: Config
    step: int


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> Config:
    """Return the checked config of a command line: `lunaris.compose(["moe=top2", "seed=3"])`.

    config_dir: a folder with more options. Raises UserError, which names the key, the value and
    what is allowed. Imports no torch.
    """
    source = Source(dir=None if config_dir is None else str(config_dir))
    return _compose(list(overrides), source=source)


def train(cfg: Config | DictConfig | Sequence[str]) -> RunResult:
    """Train a run in its folder (`out_dir`), from its newest checkpoint if it has one.

    cfg: of `compose`, what Hydra's own `compose` returns for `lunaris.conf`, or overrides. With one
    process the run trains in this one, else the launcher of the config starts it and this waits for
    it; one that only sends the run (SLURM) returns when it is sent. Raises UserError for what the
    person can mend, Stopped after a signal with a checkpoint saved, and RuntimeError where a
    process of the run failed.
    """
    from lunaris.config.instantiate import instantiate_component
    from lunaris.config.schema.launch import LocalLaunchConfig
    from lunaris.continuation.checks import check_start
    from lunaris.launch.local import train_here
    from lunaris.run import RunResult
    from lunaris.runs.create import create
    from lunaris.runs.run_dir import RunDir

    overrides = [str(text) for text in cfg] if isinstance(cfg, list | tuple) else []
    composed = _as_config(cfg)
    check_start(composed)
    if isinstance(composed.launch, LocalLaunchConfig) and composed.launch.world_size() == 1:
        run_dir = create(composed, "lunaris.train(…)", overrides)
        return train_here(run_dir.read_config(), run_dir.path)
    launcher = instantiate_component("launch", composed.launch)
    code = int(launcher.submit(composed, "lunaris.train(…)", overrides))
    status = RunDir(composed.out_dir).read_status()
    if code:
        raise RuntimeError(f"{composed.out_dir}: {status.get('last_error') or 'it failed'}")
    return RunResult(int(status.get("step", 0)), status.get("best_val_loss"))


def load(
    folder: str | Path,
    *,
    step: int | None = None,
    device: str | None = None,
    trust: Sequence[str] = (),
) -> Loaded:
    """Return the model of a run in eval mode, with its tokenizer and config.

    step: of the checkpoint; None: the newest. device: "cpu" or "cuda"; None: cuda where there is
    one. trust: packages, modules or classes, besides those of this package, that the folder's
    config may name. Raises UserError where the folder is no run, has no such checkpoint, or names
    another class.
    """
    from lunaris.data.tokenizer import TextTokenizer
    from lunaris.distributed import session
    from lunaris.inference import load_trained
    from lunaris.runs.run_dir import RunDir

    run_dir = RunDir(folder)
    with restricted(trust):
        cfg = run_dir.read_config()
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"device={device}: must be cpu, cuda or None")
    with session.join(device, cfg.launch.collective_timeout_s):
        model, at = load_trained(cfg, run_dir, step)
    path = run_dir.tokenizer_path
    tokenizer = TextTokenizer(path, run_dir.noted("eot_id")) if path.is_file() else None
    return Loaded(model, tokenizer, cfg, at)


def metrics(folder: str | Path) -> Any:
    """Return the rows of a run's metrics: a pandas DataFrame if pandas is there, else dicts.

    A row has a `step` and the metrics that were logged at it. Raises UserError for a folder that is
    no run.
    """
    from lunaris.metrics.records import read_rows
    from lunaris.runs.discovery import is_run
    from lunaris.runs.run_dir import RunDir, not_a_run

    if not is_run(Path(folder)):
        raise UserError(not_a_run(Path(folder)))
    return _table(read_rows(RunDir(folder).metrics_path))


def runs(folder: str | Path = ".") -> Any:
    """Return all runs below a folder with their state, step and best validation loss.

    A pandas DataFrame if pandas is there, else dicts; what `lunaris runs --json` prints. Raises
    UserError where the folder does not exist.
    """
    from lunaris.runs.rows import run_rows

    return _table(run_rows(Path(folder)))


def _as_config(cfg: Any) -> Config:
    from omegaconf import DictConfig

    if isinstance(cfg, Config):
        return cfg
    if isinstance(cfg, DictConfig):
        return checked(cfg)
    if isinstance(cfg, list | tuple):
        return compose(cfg)
    raise UserError(
        f"train takes a config of lunaris.compose, or a list of overrides, not {type(cfg).__name__}"
    )


def _table(rows: list[dict[str, Any]]) -> Any:
    if importlib.util.find_spec("pandas") is None:
        return rows
    pandas = importlib.import_module("pandas")
    return pandas.DataFrame(rows)
