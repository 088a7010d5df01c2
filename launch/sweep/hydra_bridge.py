"""The bridge to Hydra: its flags, and sweepers and launchers that are not ours.

`hydra.main` serves `hydra/sweeper=optuna`, `hydra/launcher=submitit_slurm` and the like. Our
sweeper and launchers are plugins here, so that each can be combined with one of Hydra's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import isfinite
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lunaris.config.cli import Flags
from lunaris.config.compose import Composer, places, schema_nodes
from lunaris.config.hydra_internals import (
    PLUGIN_PACKAGE,
    instantiate_launcher,
    register_plugin,
    register_schemas,
    run_hydra_main,
)
from lunaris.config.keys import CONFIG_MODULE
from lunaris.config.messages import explain
from lunaris.config.overrides import open_maps, parse, quoted
from lunaris.errors import UserError
from lunaris.launch.sweep.expand import PRODUCT, SweepRequest, expand
from lunaris.launch.sweep.optuna_study import OPTUNA
from lunaris.launch.sweep.points import Outcome, PointLauncher, Sweep, outcome_of, submit_points
from lunaris.launch.sweep.progress import Silent
from lunaris.launch.sweep.run_points import point_launcher, run_points
from lunaris.runs.run_dir import RunDir


class PointFailed(RuntimeError):
    """Tells a sweeper that a point failed; the message is the point's last error."""


def run_by_hydra(
    request: SweepRequest, sweep: Sweep, targets: list[str], extra: Sequence[str] = ()
) -> list[Outcome]:
    """Let Hydra's sweeper or launcher run the sweep; return how its points ended.

    targets: the `_target_`s of the sweeper and the launcher. extra: further overrides of Hydra's
    part, which win. Raises UserError.
    """
    further = [f"hydra.sweep.dir={quoted(str(sweep.dir))}", *extra]
    with suppress(PointFailed):
        # A sweeper that ends at a failed point raises it; the summary shows it.
        # Without the keys of a defaults.yaml, which need not fit every point: our own composition
        # of a point takes them.
        option = sweep.composer.defaults.option()
        call_hydra(request.flags, request.parsed, _SweepTask(sweep), further, targets, option)
    if sweep.outcomes and targets[0] != OPTUNA:
        return sweep.outcomes
    # Processes of another launcher leave nothing but the folders of the points.
    points = sweep.frozen_points()
    if PRODUCT not in targets:
        # The manifest then holds the points in the order in which their processes started.
        points.sort(key=lambda point: point.name)
    # A study goes on: the points of earlier commands are its own.
    return [*map(outcome_of, points), *sweep.outcomes]


def call_hydra(
    flags: Flags,
    parsed: list[Override],
    task: Callable[[Any], Any],
    extra: Sequence[str] = (),
    targets: Sequence[str] = (),
    defaults: dict[str, Any] | None = None,
) -> None:
    """Let `hydra.main` do what the flags ask, and report its errors as ours.

    parsed: the overrides of the flags. extra: further ones, which win. targets: the
    plugins that the config will ask for, of which ours are registered. defaults: the option
    `user/defaults`, if any. Raises UserError.
    """
    register_schemas(schema_nodes())
    for plugin in (Product, LocalSweep, SlurmArray):
        if f"{PLUGIN_PACKAGE}.{plugin.__name__}" in targets:
            register_plugin(plugin)
    try:
        argv = _argv(flags, [*open_maps(parsed), *extra])
        run_hydra_main(f"pkg://{CONFIG_MODULE}", task, argv, places(flags.source), defaults)
    except SystemExit as ended:
        # `--hydra-help` ends with one.
        if ended.code:
            raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if flags.shell_completion:
            raise UserError(explain(error)) from error
        # Our own composition has the better message, where it finds the fault too.
        swept = {o.input_line for o in parsed if o.is_sweep_override()}
        Composer(flags.source).compose_raw([o for o in flags.overrides if o not in swept])
        raise UserError(explain(error)) from error


def _argv(flags: Flags, overrides: list[str]) -> list[str]:
    argv = ["lunaris"]
    if flags.config_path is not None:
        flags = replace(flags, config_path=os.path.abspath(flags.config_path))
    # Its folder is one of the places that Hydra searches anyway.
    for name, value in vars(replace(flags, config_dir=None)).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, str):
            argv += [flag, value]
        elif value is True:
            argv.append(flag)
    return [*argv, *overrides]


class _SweepTask:
    """The function that one of Hydra's launchers calls for a point; it also carries the sweep."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def __call__(self, cfg: Any) -> float | None:
        overrides = list(HydraConfig.get().overrides.task)
        if "SUBMITIT_EXECUTOR" in os.environ:
            return _train_in_job(self.sweep, overrides)
        points = self.sweep.plan([overrides])
        self.sweep.freeze(points)
        (outcome,) = run_points(points, Silent())
        return _returned(outcome).return_value


class Product(Sweeper):
    """Our sweeper as a plugin, for Hydra's launchers: every combination of the swept values.

    It writes nothing before all points have been checked, unlike Hydra's basic sweeper. params:
    further overrides, by key.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self._params = params or {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: Any
    ) -> None:
        assert isinstance(task_function, _SweepTask)
        self._sweep = task_function.sweep
        self._config_loader = hydra_context.config_loader
        self._launcher = instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Check and launch the points; return how each ended."""
        given = [f"{key}={value}" for key, value in self._params.items()]
        points = expand(parse([*given, *arguments], self._config_loader), self._sweep.zipped)
        if not isinstance(self._launcher, _PointLauncher):
            # Hydra's launchers would find a wrong point only at its turn. The manifest fixes the
            # order of the points before their processes add to it in any order.
            self._sweep.record(self._sweep.plan(points))
        return self._launcher.launch(points, initial_job_idx=0)


class _PointLauncher(Launcher):
    """One of our launchers as a plugin, for Hydra's sweepers."""

    def setup(self, *, task_function: TaskFunction, config: Any, **_: Any) -> None:
        assert isinstance(task_function, _SweepTask)
        self._sweep = task_function.sweep
        launcher = point_launcher(config.hydra.launcher._target_)
        assert launcher is not None
        self._launcher: PointLauncher = launcher

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Check all points, then run or send them; return how each ended."""
        outcomes = submit_points(self._sweep, job_overrides, self._launcher)
        return [_returned(outcomes[self._sweep.name_of(texts)]) for texts in job_overrides]


class LocalSweep(_PointLauncher):
    """`hydra/launcher=local`: runs points on this machine."""


class SlurmArray(_PointLauncher):
    """`hydra/launcher=slurm`: sends points as a job array."""


class _PointReturn(JobReturn):
    """What a sweeper gets of a point; Hydra's own prints all overrides when it has failed."""

    @property
    def return_value(self) -> Any:
        if self.status is JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def _returned(outcome: Outcome) -> JobReturn:
    """Return an outcome as Hydra's sweepers take it: the best validation loss, or the error."""
    failed = outcome.state == "failed"
    result = _PointReturn(
        overrides=outcome.point.overrides,
        cfg=outcome.point.cfg,
        working_dir=str(outcome.point.dir),
        task_name="train",
        status=JobStatus.FAILED if failed else JobStatus.COMPLETED,
    )
    result.return_value = PointFailed(outcome.error) if failed else outcome.val_loss
    if not failed and outcome.val_loss is not None and not isfinite(outcome.val_loss):
        # Sweepers refuse it as a value, Optuna's with an error that ends the sweep.
        result.status = JobStatus.FAILED
        result.return_value = PointFailed(f"its validation loss is {outcome.val_loss}")
    return result


def _train_in_job(sweep: Sweep, overrides: list[str]) -> float | None:
    """Train one point as a task of a job of hydra-submitit-launcher; return the objective.

    The launcher calls this in every task. Only rank 0 writes the folder.
    """
    from lunaris.launch.local import train_here
    from lunaris.launch.process import set_up_process
    from lunaris.launch.slurm_task import export_ranks

    export_ranks()
    (point,) = sweep.plan([overrides])
    if os.environ["RANK"] == "0":
        sweep.freeze([point])
    set_up_process(point.cfg.trainer.device, RunDir(point.dir).logs)
    # The other ranks wait for rank 0 when the process group is created.
    try:
        return train_here(point.cfg, point.dir).best_val_loss
    except UserError as error:
        # No other process waits for this one and could record the error.
        RunDir(point.dir).write_status(state="failed", last_error=str(error))
        raise
