"""The command line, `lunaris COMMAND …`. Imports nothing heavy before a command runs."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from lunaris import __version__
from lunaris.errors import RunFailed, Stopped, UserError, did_you_mean, ending

_FOLDER = Path(__file__).parent / "commands"
_ORDER = (
    *("train", "prepare", "plan", "check", "keys", "runs", "logs", "resume", "fork"),
    *("cancel", "report", "evaluate", "generate", "export", "new", "import-config"),
)
# Commands that take folders of runs, and those that take a config's keys.
_OF_FOLDERS = (
    *("runs", "logs", "resume", "fork", "cancel", "report", "evaluate", "generate", "export"),
    "wandb-sync",
)
_OF_KEYS = ("train", "prepare", "plan", "check")
_EPILOG = """\
`lunaris COMMAND --help` explains a command and gives an example.

lunaris train                                     a small model, here, in about two minutes
lunaris train moe=top2 trainer.max_steps=1000     another option, another value
lunaris train -m moe.n_experts=4,8,16             a sweep"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 2: the input was wrong. 3: stopped by a signal, with a checkpoint saved. 1: any other
    failure; an unexpected exception is raised with its traceback.
    """
    args = sys.argv[1:] if argv is None else argv
    try:
        # Imported here: the help needs nothing of it.
        from lunaris.config.trust import restricted

        with restricted():
            return _run(args)
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        said = ending("stopped", str(stopped))
        hint = "" if "same command" in said else "; run the same command to continue"
        print(f"{said}{hint}", file=sys.stderr)
        return Stopped.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of the output has left, as `head` does. Nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def commands() -> list[str]:
    """Return the names of all commands, in the order in which a run needs them."""
    files = (path.stem for path in _FOLDER.glob("*.py") if not path.stem.startswith("_"))
    names = {stem.replace("_", "-") for stem in files}
    return [name for name in _ORDER if name in names] + sorted(names - set(_ORDER))


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if args[0] == "--version":
        print(f"lunaris {__version__}")
        return 0
    if args[0] in ("-sc", "--shell-completion"):
        return _complete(args)
    names = commands()
    if args[0] not in names:
        raise UserError(
            f"{args[0]}: no such command; allowed are {', '.join(names)}"
            f"{did_you_mean(args[0], names)}"
        )
    module = f"lunaris.commands.{args[0].replace('-', '_')}"
    return int(importlib.import_module(module).main(args[1:]) or 0)


def _complete(args: list[str]) -> int:
    """Complete a line for a shell: commands and folders of runs here, the rest through `train`.

    The shell calls `lunaris -sc query=bash` with the line in COMP_LINE. Hydra completes options and
    keys, but does not know the command, which is removed from the line.
    """
    line = os.environ.get("COMP_LINE", "lunaris train ")
    words = line.split()[1:]
    if not words or (len(words) == 1 and not line.endswith(" ")):
        print(" ".join(name for name in commands() if name.startswith("".join(words))))
        return 0
    if words[0] in _OF_FOLDERS:
        from lunaris.runs.discovery import completions

        print("\n".join(completions("" if line.endswith(" ") else words[-1])))
        return 0
    if words[0] not in _OF_KEYS:
        return 0
    os.environ["COMP_LINE"] = " ".join(["lunaris", *words[1:]]) + " " * line.endswith(" ")
    return int(importlib.import_module("lunaris.commands.train").main(args))


def _overview() -> str:
    lines = [f"  {name:<10} {_help_line(name)}" for name in commands()]
    return "\n".join(["usage: lunaris COMMAND [ARGUMENTS]", "", *lines, "", _EPILOG])


def _help_line(name: str) -> str:
    # Read, not imported: a command may import torch, the list of commands must not.
    file = _FOLDER / f"{name.replace('-', '_')}.py"
    _, text, _ = file.read_text(encoding="utf-8").split('"""', 2)
    what = text.partition("\n\n")[0].removeprefix(f"`lunaris {name}`: ").removesuffix(".")
    return " ".join(what.split())


if __name__ == "__main__":
    sys.exit(main())
