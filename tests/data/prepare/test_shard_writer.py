"""Writers are all closed, also where the first of them finds the disk full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lunaris.data.prepare.shard_writer import ShardWriter, close_all


def test_every_writer_is_closed_on_a_full_disk(tmp_path: Path) -> None:
    # Whatever is written to it, /dev/full has no space left.
    (tmp_path / "train_00000.npy.part").symlink_to("/dev/full")
    writers = [ShardWriter(tmp_path, part, np.dtype(np.uint16), 100) for part in ("a", "val")]
    writers[0]._file = (tmp_path / "train_00000.npy.part").open("r+b")
    writers[0].append(np.zeros(3, np.uint16))
    writers[1].append(np.zeros(3, np.uint16))
    files = [writer._file for writer in writers]
    with pytest.raises(OSError, match="No space left"):
        close_all(writers)
    assert [file.closed for file in files if file is not None] == [True, True]
