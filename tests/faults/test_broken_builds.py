"""The fault tests can fail: each class of them catches a build that was broken on purpose.

`test_poison.py` and `test_run_folder.py` hold the broken builds of their own classes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.timeout(0)

_ROOT = Path(__file__).parents[2]


class Broken(NamedTuple):
    """A fault of a build: `file` with `old` replaced by `new`, and the tests that must fail."""

    file: str
    old: str
    new: str
    tests: str


BUILDS = {
    "a checkpoint is never checked": Broken(
        "lunaris/runs/checkpoint_files.py",
        "        if found != sums[name]:\n",
        "        if False:\n",
        "tests/faults/test_checkpoints.py::test_a_flipped_bit_is_damage",
    ),
    "an error of reading is taken for damage": Broken(
        "lunaris/runs/checkpoint_files.py",
        "_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)\n",
        "_GONE = (OSError,)\n",
        "tests/faults/test_checkpoints.py::test_a_read_error_is_no_damage",
    ),
    "a manifest's vocabulary is not checked": Broken(
        "lunaris/data/manifest.py",
        "    if type(size) is not int or not 1 <= size <= 2**32:\n",
        "    if False:\n",
        "tests/faults/test_shards.py::test_a_malformed_manifest_is_refused",
    ),
    "a folder's config may name any class": Broken(
        "lunaris/config/trust.py",
        "    if _trusted is None:\n",
        "    if True:\n",
        "tests/faults/test_untrusted.py::test_a_config_names_only_trusted_classes",
    ),
    "a signal in an evaluation is not seen": Broken(
        "lunaris/evaluate.py",
        "                raise EvaluationStopped\n",
        "                pass\n",
        "tests/faults/test_signals.py::test_an_evaluation_is_left_before_its_next_batch",
    ),
    "a run's folder is not locked": Broken(
        "lunaris/lifecycle.py",
        "        collectives.on_rank_0(lambda: stack.enter_context(run_dir.lock()))\n",
        "",
        "tests/faults/test_starters.py",
    ),
    "every step keeps a tensor": Broken(
        "lunaris/train.py",
        "        run.logger.tick(state.step)\n",
        "        run.logger.tick(state.step)\n"
        "        run.__dict__.setdefault('kept', []).append(torch.ones(32000))\n",
        "tests/faults/test_endurance.py",
    ),
    "every save keeps a file open": Broken(
        "lunaris/train.py",
        "        run.logger.tick(state.step)\n",
        "        run.logger.tick(state.step)\n"
        "        run.__dict__.setdefault('kept', []).append(open('/dev/null'))\n",
        "tests/faults/test_endurance.py",
    ),
    "a wrong value is answered by OmegaConf": Broken(
        "lunaris/config/overrides.py",
        "            raise UserError(wrong_value(schema, name, part)) from error\n",
        "            raise\n",
        "tests/faults/test_command_lines.py",
    ),
    "a stopped run waits for W&B": Broken(
        "lunaris/metrics/wandb_logger.py",
        "_STOPPED_S = 5.0\n",
        "_STOPPED_S = 40.0\n",
        "tests/metrics/test_wandb.py::test_a_stopped_run_does_not_wait",
    ),
    "W&B gets only the rows since its start": Broken(
        "lunaris/metrics/wandb_feed.py",
        "        self._offset = 0\n",
        "        self._offset = run_dir.metrics_path.stat().st_size\n",
        "tests/metrics/test_wandb.py::test_offline_each_attempt_holds_all_rows",
    ),
}
# What takes seconds belongs to the short form.
_SHORT = ("a checkpoint is never checked", "a folder's config may name any class")


@pytest.mark.parametrize("name", BUILDS)
def test_a_broken_build_is_caught(
    name: str, long: bool, counted: Callable[[str, int], None], tmp_path: Path
) -> None:
    if not long and name not in _SHORT:
        pytest.skip("belongs to the long form, `make faults`")
    broken, build = BUILDS[name], tmp_path / "build"
    for folder in ("lunaris", "launch", "conf", "tests"):
        shutil.copytree(
            _ROOT / folder, build / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(_ROOT / "pyproject.toml", build)
    for folder in ("launch", "conf"):
        (build / "lunaris" / folder).symlink_to(build / folder)
    text = (build / broken.file).read_text()
    assert text.count(broken.old) == 1, "the code has changed: break it where it is now"
    (build / broken.file).write_text(text.replace(broken.old, broken.new))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", broken.tests],
        cwd=build,
        env={**os.environ, "PYTHONPATH": str(build), "LUNARIS_FAULTS": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout + done.stderr
    assert str(build) in done.stdout or "AssertionError" in done.stdout
    counted("broken builds caught", 1)
