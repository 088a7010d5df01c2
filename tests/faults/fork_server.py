"""Starts commands as forks of one process that has imported torch: a start takes milliseconds.

Reads one JSON object a line: {"module": ..., "args": [...], "env": {...}, "cwd": ..., "log": ...}
and answers with the process id, then, for {"wait": PID}, with the exit code (negative: a signal).
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

import matplotlib.backends.backend_agg  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401

import lunaris.checkpoint
import lunaris.moe.factory
import lunaris.run  # noqa: F401


def command(order: dict[str, Any]) -> None:
    """Run a module as `python -m` does, as this process, and end the process."""
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.argv = [order["module"], *order["args"]]
    code: Any = 0
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Answer the orders of standard input until it ends."""
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                command(order)
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
