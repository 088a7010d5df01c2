"""One process of a run reads its data; the others get what it found."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lunaris.data.shard_folder import inspect, require_size
from lunaris.errors import UserError

SHARDS, TOKENS = 4, 2**20

BODY = """
from pathlib import Path
from lunaris.data.prepare.everywhere import make_ready_everywhere
from lunaris.data.shards import ShardsData

def read_bytes():
    # Of files: what comes through sockets is received, not read.
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])

data = ShardsData(dir={folder!r}, verify={verify})
collectives.from_rank_0([Path("x")])
before = read_bytes()
make_ready_everywhere(data)
print(read_bytes() - before)
print(data.vocab_size, len(data.train(64, 1)), data.train(64, 1).describe(7), data.digests())
"""


def write_shards(folder: Path) -> int:
    """Write shards without a manifest, so that their ids are read; return their bytes."""
    ids = np.random.default_rng(0).integers(0, 500, (SHARDS, TOKENS)).astype(np.uint16)
    for i, tokens in enumerate(ids):
        np.save(folder / f"train_{i}.npy", tokens)
    return ids.nbytes


@pytest.mark.slow
def test_of_four_processes_one_reads_the_data(
    run_two: Callable[..., list[subprocess.CompletedProcess[str]]], tmp_path: Path
) -> None:
    size = write_shards(tmp_path)
    ended = run_two(BODY.format(folder=str(tmp_path), verify=False), processes=4)
    assert [done.returncode for done in ended] == [0] * 4, ended[0].stderr + ended[1].stderr
    (first, found), *others = (done.stdout.splitlines() for done in ended)
    assert int(first) >= size
    for read, same in others:
        assert same == found
        assert int(read) < size / 50


def test_a_shard_that_differs_here_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (shard, *_) = inspect(tmp_path).train
    require_size(shard)
    shard.path.write_bytes(shard.path.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"train_0.npy: has {2 * TOKENS + 126} bytes on .*, and"):
        require_size(shard)
    shard.path.unlink()
    with pytest.raises(UserError, match=r"train_0.npy: cannot be read on .*: No such file"):
        require_size(shard)
