"""The places of a sweep on this machine: which points run at once, on which GPUs and cores."""

from __future__ import annotations

import os
from collections import Counter

from lunaris.config.schema.root import Config
from lunaris.devices import visible_gpus
from lunaris.launch.local import threads_each


class Places:
    """The GPUs of this machine, and which of them each running point has.

    `launch.points_at_once` bounds how many points run. Without it, as many run as have GPUs of
    their own, and one at a time where there is no GPU.
    """

    def __init__(self) -> None:
        self._gpus = visible_gpus(apart=True)
        # The GPUs of the running points, by their names.
        self._taken: dict[str, list[str]] = {}

    def at_once(self, cfg: Config) -> int:
        """Return how many points of this kind run at a time."""
        return _asked(cfg) or max(1, len(self._gpus_for(cfg)) // _processes(cfg))

    def take(self, name: str, cfg: Config) -> dict[str, str] | None:
        """Give a point its place; return the variables of its process, or None without room.

        The variables are CUDA_VISIBLE_DEVICES where there are GPUs, and, where several points run
        at a time and it is not set, OMP_NUM_THREADS. Points that outnumber the GPUs share them
        evenly.
        """
        gpus, wanted, asked = self._gpus_for(cfg), _processes(cfg), _asked(cfg)
        points_on = Counter(gpu for each in self._taken.values() for gpu in each)
        unused = sum(points_on[gpu] == 0 for gpu in gpus)
        room = 0 < wanted <= unused if asked is None else len(self._taken) < asked
        if self._taken and not room:
            return None
        chosen = sorted(gpus, key=points_on.__getitem__)[:wanted]
        self._taken[name] = chosen
        variables = {"CUDA_VISIBLE_DEVICES": ",".join(chosen)} if gpus else {}
        at_once = self.at_once(cfg)
        if at_once > 1 and "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(threads_each(at_once * wanted))
        return variables

    def free(self, name: str) -> None:
        """Take the place of a point that has ended back."""
        del self._taken[name]

    def _gpus_for(self, cfg: Config) -> list[str]:
        return [] if cfg.trainer.device == "cpu" else self._gpus


def _asked(cfg: Config) -> int | None:
    # A custom launcher need not have the key.
    asked: int | None = getattr(cfg.launch, "points_at_once", None)
    return asked


def _processes(cfg: Config) -> int:
    return int(getattr(cfg.launch, "processes", 1))
