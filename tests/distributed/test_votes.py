"""Several processes stop at the same step, though none of them asks the others in a step."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from lunaris.runs.checkpoint_files import complete
from lunaris.runs.create import create

pytestmark = pytest.mark.slow


def test_a_flag_of_one_process_is_read_after_the_next_step(
    run_two: Callable[[str], list[subprocess.CompletedProcess[str]]],
) -> None:
    ended = run_two(
        """
        from lunaris.parallelism.ddp import DDP

        parallelism = DDP()
        for step in range(1, 6):
            told = session.rank() == 1 and step == 3
            votes = parallelism.sum(torch.tensor(float(told)))
            print(int(parallelism.agree(told, votes)), session.current().first_step_done)
        """
    )
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    expected = ["0 True", "0 True", "0 True", "1 True", "0 True"]
    assert [done.stdout.splitlines() for done in ended] == [expected] * 2


@pytest.mark.parametrize(
    ("met", "stops_at"),
    # Before and after the sums of the third step.
    [("clip_grad_norm", 4), ("take_step", 5)],
)
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    tiny: Callable[..., Any],
    run_two: Callable[[str], list[subprocess.CompletedProcess[str]]],
    met: str,
    stops_at: int,
) -> None:
    keys = ("launch.processes=2", "trainer.batch_size=2", "parallelism=ddp")
    run = create(tiny(*keys, "trainer.eval_interval=null"), "test", [])
    ended = run_two(
        f"""
        import os, signal
        import lunaris.train
        from lunaris.distributed.signals import StopSignal
        from lunaris.errors import Stopped
        from lunaris.run import build
        from lunaris.runs.run_dir import RunDir

        real = lunaris.train.{met}

        def hit(*args, **keys):
            if session.rank() == 1 and run.state.step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return real(*args, **keys)

        lunaris.train.{met} = hit
        run_dir = RunDir({str(run.path)!r})
        with StopSignal() as stop:
            run = build(run_dir.read_config(), run_dir, stop)
            try:
                lunaris.train.train(run)
            except Stopped as error:
                print(error)
            run.loader.close()
            run.logger.finish()
        """
    )
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    words = f"at step {stops_at}; a checkpoint is saved\n"
    assert ended[0].stdout.endswith(f"stopped by a signal to another process {words}")
    assert ended[1].stdout.endswith(f"stopped by SIGUSR1 {words}")
    assert stops_at in [int(path.name[5:]) for path in complete(run.checkpoints)]
