"""A disk that is really full while shards are prepared: one message, and the next try continues."""

from __future__ import annotations

import filecmp
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lunaris.__main__ import main


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a file system of a size in KiB, or changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def sized(kib: int) -> Path:
        nonlocal mounted
        options = ["-o", ("remount," if mounted else "") + f"size={kib}k"]
        command = ["mount", "-t", "tmpfs", *options, "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a file system of a fixed size needs root: {done.stderr.strip()}")
        mounted = True
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.timeout(0)
def test_prepare_continues_after_a_full_disk(
    small_disk: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], long: bool, counted: Callable[[str, int], None],
) -> None:  # fmt: skip
    """Full at random sizes: while the tokenizer is written, or the chunks, or the shards."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{i} quick brown foxes jump over {i * i % 97} lazy dogs\n" for i in range(20_000)]
    Path("text.txt").write_text("".join(lines))
    keys = ["data=text", "data.files=text.txt", "data.format=lines", "data.vocab_size=270"]
    keys += ["data.val_fraction=0.1", "data.shard_tokens=100000", "data.processes=1"]
    assert main(["prepare", *keys, "data.dir=roomy"]) == 0
    names = sorted(os.listdir("roomy"))
    assert len(names) > 5
    draw, tries, refused = random.Random(0), 40 if long else 3, 0
    for i in range(tries):
        size = 0
        small_disk(4)
        folder = tmp_path / f"disk/shards{i}"
        while True:
            size += draw.randint(40, 1200)
            small_disk(size)
            code = main(["prepare", *keys, f"data.dir={folder}"])
            error = capsys.readouterr().err
            if code == 0:
                break
            refused += 1
            message = [line for line in error.splitlines() if line.startswith("error: ")]
            assert code == 2 and len(message) == 1 and "Traceback" not in error, error
            assert "cannot be written: No space left on device" in message[0]
            assert not (folder / "manifest.json").exists()
        assert sorted(os.listdir(folder)) == names
        assert filecmp.cmpfiles("roomy", folder, names, shallow=False) == (names, [], [])
        for name in names:
            (folder / name).unlink()
        folder.rmdir()
    counted("disks filled while shards were prepared", refused)
    assert refused >= tries
