"""The points of a sweep sent to SLURM as job arrays."""

from __future__ import annotations

import shlex
from collections import Counter

from lunaris.config.frozen import to_tree, to_yaml
from lunaris.config.schema.base import component_keys
from lunaris.config.trust import targets_of
from lunaris.errors import UserError
from lunaris.launch.arrays import split
from lunaris.launch.sending import array_of
from lunaris.launch.slurm import Slurm, check_folder, say_dry, wait_until_ended
from lunaris.launch.sweep.points import Outcome, Point, Sweep, outcome_of
from lunaris.runs.run_dir import FINISHED, RunDir
from lunaris.runs.slurm_client import max_array_size
from lunaris.runs.status import ACTIVE, refuse_unknown, resolve_states


class SlurmPoints:
    """Sends points to SLURM and returns while they wait there.

    With `launch.wait=true` it returns when all have ended, with their best validation losses, so
    that sweepers which choose the next points by the losses work.
    """

    def submit(self, sweep: Sweep, points: list[Point]) -> list[Outcome]:
        """Freeze the points and send those that are neither done nor active.

        Raises UserError, having written nothing, for a point that is not launched by SLURM.
        """
        for point in points:
            if not hasattr(point.cfg.launch, "dry_run"):
                raise UserError(
                    f"point {point.name}: launch._target_={point.cfg.launch._target_}: "
                    "hydra/launcher=slurm needs launch=slurm"
                )
        launch = points[0].cfg.launch
        check_folder(sweep.dir.absolute())
        if launch.dry_run:
            return _print_scripts(sweep, points)
        paths = [point.dir for point in points]
        known = resolve_states(paths)
        refuse_unknown(paths, known)
        states = list(zip(points, known, strict=True))
        active = [p for p, s in states if s.active and s.job_id]
        unsent = [p for p in points if not p.done and p not in active]
        check_points(sweep, unsent)
        sweep.freeze(points, active)
        for point in active:
            if not point.done and RunDir(point.dir).config_path.read_bytes() != to_yaml(point.cfg):
                print(f"keeps   {point.name}: its job trains by the config that it was sent with")
        send_points(sweep, unsent)
        if not launch.wait:
            # From the files: SLURM does not report a job that it has only just taken.
            written = [str(RunDir(path).read_status().get("state", "missing")) for path in paths]
            return [_outcome(p, state) for p, state in zip(points, written, strict=True)]
        ended = wait_until_ended(paths)
        return [_outcome(p, s.state, s.remark) for p, s in zip(points, ended, strict=True)]


def check_points(sweep: Sweep, points: list[Point]) -> None:
    """Raise UserError where SLURM would refuse one of the jobs; write and send nothing.

    SLURM is asked once for each set of resources.
    """
    for launcher, _ in _by_launch(points):
        launcher.check(sweep.name, sweep.dir)


def send_points(sweep: Sweep, points: list[Point]) -> None:
    """Send points whose folders are frozen, and write their job ids into the manifest.

    Those that ask for the same resources are one array, or several where SLURM's largest one is
    smaller.
    """
    if not points:
        print(f"sweep   {sweep.dir}: no point to send")
        return
    for launcher, group in _by_launch(points):
        folder = sweep.dir.absolute()
        targets = {target for p in group for target in targets_of(to_tree(p.cfg))}
        paths = [p.dir.absolute() for p in group]
        ids = launcher.send(paths, folder=folder, name=sweep.name, targets=targets)
        sweep.record(group, dict(zip((p.name for p in group), ids, strict=True)))
        one_job = len(ids) == 1 or launcher.keys.cluster == "local"
        arrays = Counter(map(array_of, ids))
        links = launcher.keys.chain
        further = f", followed by {links - 1} that continue it" if links > 1 else ""
        for array, n in [(ids[0], len(ids))] if one_job else arrays.items():
            print(f"sent    {'job' if one_job else 'job array'} {array} ({n} points{further})")
    print(f"sweep   {sweep.dir}\nstate   lunaris runs {shlex.quote(str(sweep.dir))}", flush=True)


def _print_scripts(sweep: Sweep, points: list[Point]) -> list[Outcome]:
    folder = sweep.dir.absolute()
    for launcher, group in _by_launch(points):
        print(launcher.script(
            sweep.name, folder / "logs" / "slurm", folder / "code" / "SNAPSHOT",
            points=len(group) if len(group) > 1 else None,
        ))  # fmt: skip
        largest = max_array_size() if len(group) > 1 else None
        parts = split(len(group), largest, launcher.keys.array_parallelism)
        if len(parts) > 1:
            sizes = ", ".join(str(part.size) for part in parts)
            print(f"# sent as {len(parts)} arrays, of {sizes} points: MaxArraySize is {largest}")
    say_dry(sweep.dir)
    return [Outcome(point, "checked") for point in points]


def _by_launch(points: list[Point]) -> list[tuple[Slurm, list[Point]]]:
    """Return the points in groups that ask for the same resources, and each group's launcher."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(repr(component_keys(point.cfg.launch)), []).append(point)
    return [(Slurm.of(group[0].cfg), group) for group in groups.values()]


def _outcome(point: Point, state: str, error: str = "") -> Outcome:
    read = outcome_of(point)
    if point.done:
        return read
    if state in (*FINISHED, *ACTIVE):
        return Outcome(point, state, read.val_loss)
    return Outcome(point, "failed", None, read.error or error or state, read.log)
