"""The largest micro-batch of a config that fits into the memory of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

from lunaris.check.item import OK, Item, skipped
from lunaris.config.schema.root import Config
from lunaris.distributed import session

_SECONDS = 40.0
# Times the config's own micro-batch, at most.
_MOST = 256
# Of what fits, what a longer run should use: loads of experts vary, and memory is fragmented.
_SAFE = 0.9


def largest_micro_batch(cfg: Config, fits: Callable[[int], bool]) -> Item:
    """Return how many sequences a micro-step of one process can have.

    fits: takes a step with so many sequences, and returns whether memory was enough.
    """
    if session.device().type != "cuda":
        return skipped("micro-batch", "needs a GPU: the largest micro-batch that fits it")
    if session.world_size() > 1:
        why = "needs launch.processes=1: where one process has too little memory, the others wait"
        return skipped("micro-batch", why)
    own = cfg.trainer.batch_size
    found, ended = search(fits, own, own * _MOST, time.monotonic() + _SECONDS)
    least = "" if ended else "at least "
    text = f"{least}{found} sequences of {cfg.model.max_seq_len} fit; the config has {own}"
    return Item("micro-batch", OK, text, {"sequences": found, "ended": ended}, _advice(cfg, found))


def search(fits: Callable[[int], bool], own: int, most: int, until: float) -> tuple[int, bool]:
    """Return the largest number from `own`, which fits, that fits, within an eighth of it.

    Numbers are doubled, then halved into. The second value is False where `most` or the time
    (`until`, of the monotonic clock) ended the search first.
    """
    low, high = own, 0
    while not high and 2 * low <= most and time.monotonic() < until:
        if fits(2 * low):
            low *= 2
        else:
            high = 2 * low
    if not high:
        return low, False
    while high - low > max(1, low // 8):
        if time.monotonic() >= until:
            return low, False
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, True


def _advice(cfg: Config, found: int) -> tuple[str, ...]:
    """Return larger micro-steps of the same global batch, where it has several."""
    own, steps = cfg.trainer.batch_size, cfg.trainer.gradient_accumulation_steps
    factors = [n for n in range(2, steps + 1) if steps % n == 0 and own * n <= _SAFE * found]
    if not factors:
        return ()
    n = factors[-1]
    return (
        f"trainer.batch_size={own * n} trainer.gradient_accumulation_steps={steps // n}: the same "
        "global batch in fewer, larger micro-steps fits",
    )
