"""The study of `hydra/sweeper=optuna`, kept in the sweep's folder and continued there.

The plugin would begin a new study in memory with every command. Overrides of its keys give it a
storage, the number of trials that are left, and those to try again.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, ValueType

from lunaris.config.identity import differing, identity
from lunaris.config.overrides import parse, quoted
from lunaris.errors import UserError, need
from lunaris.launch.sweep.places import Places
from lunaris.launch.sweep.points import Point, Sweep
from lunaris.runs.run_dir import RunDir
from lunaris.runs.sweep_manifest import read_points

if TYPE_CHECKING:
    from optuna.study import Study

    from lunaris.launch.sweep.expand import SweepRequest

# The plugin, as `hydra.sweeper._target_` names it.
OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
CHOICE = "hydra/sweeper=optuna"
_EXTRA = "optuna"
_FILE = "study.db"
# The name of the study in our file, which stays when the folder is moved.
_NAME = "sweep"


def require_plugin() -> None:
    """Raise UserError where the plugin is not installed."""
    need("hydra_plugins.hydra_optuna_sweeper", CHOICE, extra=_EXTRA)


def study_overrides(request: SweepRequest, sweep: Sweep, sweeper: Any) -> list[str]:
    """Check what Optuna may choose; return the overrides that make the plugin continue its study.

    sweeper: `hydra.sweeper` of the composed config. `n_trials` counts the points with a loss of all
    commands together. A point that was stopped or failed is tried again first, in its folder.
    Raises UserError, having written nothing, when a point cannot work.
    """
    _check_counts(sweeper)
    given = {override.key_or_group for override in request.parsed}
    swept = [o for o in _params(sweeper) + request.overrides if o.is_sweep_override()]
    if not swept and not sweeper.search_space and not sweeper.custom_search_space:
        raise UserError(
            f"{CHOICE}: no key is swept; give ranges or lists, like "
            "'optimizer.learning_rate=interval(1e-4,1e-2)' moe.n_experts=4,8"
        )
    first = _check_corners(request, sweep, sweeper, swept)
    found = {"n_trials": sweeper.n_trials}
    if "hydra.sweeper.max_failure_rate" not in given and not sweeper.max_failure_rate:
        # As in every sweep, a point that fails does not stop the others.
        found["max_failure_rate"] = 1.0
    if "hydra.sweeper.n_jobs" not in given and not hasattr(first.cfg.launch, "dry_run"):
        # No more than run at a time, so that each can be chosen by as many as possible before it.
        found["n_jobs"] = Places().at_once(first.cfg)
    storage, name = sweeper.storage, sweeper.study_name
    if storage is None or isinstance(storage, str):
        _check_storage()
    if storage is None:
        # As a URI, a path may hold any character.
        path = quote(str((sweep.dir / _FILE).absolute()))
        storage, name = f"sqlite:///file:{path}?uri=true", name or _NAME
        sweep.dir.mkdir(parents=True, exist_ok=True)
    name = name or sweep.name
    _quiet()
    if isinstance(storage, str):
        found |= {"storage": quoted(storage), "study_name": quoted(name)}
        found |= _remaining(storage, name, sweep, sweeper)
    return [f"hydra.sweeper.{key}={value}" for key, value in found.items()]


def _check_counts(sweeper: Any) -> None:
    for key in ("n_trials", "n_jobs"):
        if sweeper[key] < 1:
            raise UserError(f"hydra.sweeper.{key}={sweeper[key]}: must be at least 1")
    rate = sweeper.max_failure_rate
    if not 0 <= rate <= 1:
        raise UserError(f"hydra.sweeper.max_failure_rate={rate}: must be between 0 and 1")


def _params(sweeper: Any) -> list[Override]:
    return parse([f"{key}={value}" for key, value in (sweeper.params or {}).items()])


def _check_corners(
    request: SweepRequest, sweep: Sweep, sweeper: Any, swept: list[Override]
) -> Point:
    """Check the first value of all keys, each other value of a list, and the end of each range.

    Optuna would find a wrong one only when it chooses it, after hours of training. Returns the
    first point.
    """
    fixed = [o for o in request.overrides if not (o.is_sweep_override() or o.is_hydra_override())]
    texts = [o.input_line or "" for o in fixed]
    values = {o.get_key_element(): _corners(o) for o in swept}
    start = {key: found[0] for key, found in values.items()}
    points = [start, *({**start, key: v} for key, found in values.items() for v in found[1:])]
    if sweeper.search_space or sweeper.custom_search_space:
        # Its keys are known to the plugin alone.
        points = points[:1]
    lines = [[*(f"{key}={v}" for key, v in point.items()), *texts] for point in points]
    # One by one, because a value at both ends would be two equal points.
    first, *_ = [sweep.plan([line])[0] for line in lines]
    first.check_waits(f"{CHOICE} chooses each point by the losses of earlier ones")
    _check_same(sweep, texts, list(values))
    return first


def _corners(override: Override) -> list[str]:
    """Return the values of a list, or the ends of a range or an interval, as texts."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    if isinstance(value, RangeSweep) and not value.shuffle:
        # The end is Optuna's, which includes it.
        return [str(value.start), str(value.stop)]
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        raise UserError(
            f"{override.input_line}: {CHOICE} takes a list (A,B), a range or an interval"
        )
    return list(override.sweep_string_iterator())


def _check_same(sweep: Sweep, fixed: list[str], swept: list[str]) -> None:
    """Raise UserError where the folder's points were trained with other values that are not swept.

    Their losses would mislead the sampler.
    """
    for row in reversed(read_points(sweep.dir) or []):
        chosen = [text for text in row.overrides if text.partition("=")[0] in swept]
        if len(chosen) == len(swept) and row.identity:
            cfg = sweep.composer.compose([*chosen, *fixed])
            differ = differing(row.identity, identity(cfg))
            if differ:
                raise UserError(
                    f"{sweep.dir}: its study is of points with other values; choose another "
                    "`name=`. Differing keys:\n  " + "\n  ".join(differ)
                )
            return


def _check_storage() -> None:
    """Raise UserError where the installed Optuna cannot use the installed SQLAlchemy."""
    with _unwarned():
        import optuna
        import sqlalchemy
    try:
        with _unwarned():
            optuna.storages.RDBStorage("sqlite:///:memory:")
    except (AssertionError, ImportError, AttributeError) as error:
        raise UserError(
            f"{CHOICE}: Optuna {optuna.__version__} cannot write its study with SQLAlchemy "
            f"{sqlalchemy.__version__}: pip install 'lunaris-codex[{_EXTRA}]'"
        ) from error


def _remaining(storage: str, name: str, sweep: Sweep, sweeper: Any) -> dict[str, Any]:
    """Enqueue the unfinished points of a study again; return the keys by which it is continued.

    A new study needs none.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    if sweeper.storage is None and not (sweep.dir / _FILE).exists():
        return {}
    shown = sweeper.storage or sweep.dir / _FILE
    with _unwarned():
        try:
            study = optuna.load_study(study_name=name, storage=storage)
        except KeyError:
            return {}
        except (SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError) as error:
            place = "hydra.sweeper.storage=" if sweeper.storage else ""
            cause = str(error).splitlines()[0]
            raise UserError(f"{place}{shown}: cannot be opened as a study: {cause}") from error
        ended, again = _sorted(study, sweep)
        left = max(0, sweeper.n_trials - ended)
        for params in again[:left]:
            study.enqueue_trial(params)
        waiting = sum(t.state is optuna.trial.TrialState.WAITING for t in study.trials)
    retried = f", {min(waiting, left)} to be tried again" if min(waiting, left) else ""
    print(f"study   {shown}: {ended} of {sweeper.n_trials} trials are done{retried}", flush=True)
    found: dict[str, Any] = {"n_trials": left}
    seed = sweeper.sampler.get("seed")
    if seed is not None:
        # The same seed would draw the points of the first command again.
        found["sampler.seed"] = seed + len(study.trials)
    return found


def _sorted(study: Study, sweep: Sweep) -> tuple[int, list[dict[str, Any]]]:
    """Return how many points of a study have ended, and the parameters of those to try again.

    A trial that the plugin could not report, because its command was killed, has failed.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=True)
    ended = [t.params for t in trials if t.state is TrialState.COMPLETE]
    seen = [t.system_attrs.get("fixed_params") for t in trials if t.state is TrialState.WAITING]
    seen += ended
    again = []
    for trial in trials:
        if trial.state is TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state is not TrialState.FAIL:
            continue
        if trial.params and trial.params not in seen:
            seen.append(trial.params)
            name = sweep.name_of([f"{key}={value}" for key, value in trial.params.items()])
            status = RunDir(sweep.dir / name).read_status()
            loss = status.get("best_val_loss")
            if status.get("state") == "done" and not (loss is not None and isfinite(loss)):
                ended.append(trial.params)  # It will never have a loss.
            else:
                again.append(trial.params)
    return len(ended), again


@contextmanager
def _unwarned() -> Iterator[None]:
    # Optuna 2 warns of its own experimental functions and of SQLAlchemy's old ones.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _quiet() -> None:
    """Keep the plugin and Optuna from logging what the progress lines and the summary say."""
    import optuna

    optuna.logging.disable_default_handler()
    for name in ("hydra_plugins.hydra_optuna_sweeper", "optuna"):
        logging.getLogger(name).addHandler(logging.NullHandler())
