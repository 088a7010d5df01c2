"""Makes data ready in all processes of a run: one reads it, the others get what it found."""

from __future__ import annotations

from lunaris.data.base import Data
from lunaris.data.prepare.build import make_ready
from lunaris.data.shards import ShardsData
from lunaris.distributed import collectives, session


def make_ready_everywhere(data: Data) -> None:
    """Make `data` ready in every process; every process calls this.

    Rank 0 builds and inspects it, and verifies checksums where the keys ask for that. Of shards the
    others only look whether the files are there: a thousand processes that each read the headers
    and the ids would read the corpus a thousand times. Data of another class is inspected in each.
    Raises UserError.
    """
    collectives.on_rank_0(lambda: make_ready(data))
    if isinstance(data, ShardsData):
        found = collectives.from_rank_0(data.inspected)
        if session.rank() != 0 and found is not None:
            data.take(found)
    data.ensure_ready()
