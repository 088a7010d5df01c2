"""One process of a run: `python -m lunaris.launch.worker RUN_DIR`.

The local launcher, SLURM tasks, sweep points and resumed runs start this module. It reads the
frozen config in the folder and composes nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lunaris.config.schema.root import Config
from lunaris.distributed.signals import StopSignal
from lunaris.errors import EXPECTED, Stopped, UserError, ending
from lunaris.launch.local import Local, exit_code_here
from lunaris.runs.run_dir import RunDir


def main(argv: list[str] | None = None) -> int:
    """Train the run in a folder and return the exit code, as `lunaris train` does."""
    args = sys.argv[1:] if argv is None else argv
    if len(args) != 1:
        print("usage: python -m lunaris.launch.worker RUN_DIR", file=sys.stderr)
        return UserError.exit_code
    path = Path(args[0])
    try:
        # From the start, because a signal during the import of torch must not kill the process.
        with StopSignal():
            cfg: Config = RunDir(path).read_config()
            if "RANK" not in os.environ and getattr(cfg.launch, "processes", 1) > 1:
                return Local.of(cfg).start(path)
            return exit_code_here(cfg, path)
    except EXPECTED as error:
        # Under torch's elastic agent the launcher prints it, once for all processes.
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            kind = "stopped" if isinstance(error, Stopped) else "error"
            print(ending(kind, str(error)), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
