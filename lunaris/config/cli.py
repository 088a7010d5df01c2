"""The flags that `lunaris train` shares with every Hydra program, and its help text."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from lunaris.config.compose import Source
from lunaris.config.keys import group_names, options
from lunaris.config.trust import add_flag
from lunaris.errors import UserError, did_you_mean

# Width of an option's name in the help.
_WIDTH = 22
# What a flag means whose value is left out.
_BEFORE_OVERRIDE = {
    "-c": "--cfg=job", "--cfg": "--cfg=job", "-i": "--info=all", "--info": "--info=all",
    "--zip": "--zip=",
}  # fmt: skip


@dataclass
class Flags:
    """The flags of a command line; `overrides` are its other words.

    zipped: what each `--zip` names, "" where it names no key.
    """

    overrides: list[str] = field(default_factory=list)
    help: bool = False
    hydra_help: bool = False
    cfg: str | None = None
    resolve: bool = False
    package: str | None = None
    multirun: bool = False
    info: str | None = None
    shell_completion: bool = False
    config_name: str = "train"
    config_path: str | None = None
    config_dir: str | None = None
    trust: list[str] = field(default_factory=list)
    dry_run: bool = False
    zipped: list[str] = field(default_factory=list)

    @property
    def source(self) -> Source:
        """Where the config is read from; its main file may lie in the folder of options."""
        path = self.config_path
        if path is None and self.config_dir is not None and self.config_name != "train":
            main = Path(self.config_dir, f"{self.config_name.removesuffix('.yaml')}.yaml")
            path = self.config_dir if main.is_file() else None
        return Source(self.config_name, path, self.config_dir)


class _Bare(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def bare_parser(prog: str) -> argparse.ArgumentParser:
    """Return a parser for flags of a command's own beside those of `parser`, without a help."""
    return _Bare(prog=prog, add_help=False, allow_abbrev=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flag = unknown.split()[0]
            known = [name for action in self._actions for name in action.option_strings]
            raise UserError(f"{flag}: no such flag{did_you_mean(flag, known)}")
        raise UserError(message)


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the flags, which also prints them in the help."""
    made = _Parser(prog=prog, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    made.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    flags = made.add_argument_group("flags")
    add, add_one = flags.add_argument, flags.add_mutually_exclusive_group().add_argument
    add("-h", "--help", action="store_true", help="this text")
    add_one("-m", "--multirun", action="store_true", help="a sweep over every KEY=A,B,C")
    add_one(
        "-c", "--cfg", nargs="?", const="job", choices=("job", "hydra", "all"),
        help="show the config and do nothing",
    )  # fmt: skip
    add("-p", "--package", help="with --cfg: the part to show, like model or moe")
    add("--resolve", action="store_true", help="with --cfg: fill in the interpolations")
    add("-cd", "--config-dir", metavar="DIR", help="a folder with more options")
    add("-cn", "--config-name", metavar="NAME", default="train", help="instead of train")
    add("-cp", "--config-path", metavar="DIR", help="a folder that is read before ours")
    add_one(
        "-i", "--info", nargs="?", const="all",
        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        help="how Hydra composes the config",
    )  # fmt: skip
    add_flag(flags)
    add("--dry-run", action="store_true", help="with -m: list the points, write and send nothing")
    add(
        "--zip", nargs="?", const="", action="append", default=[], dest="zipped",
        metavar="KEY,KEY",
        help="with -m: pair the i-th values of the named keys, or of all swept keys; the others "
        "are multiplied; may be given several times",
    )  # fmt: skip
    add("--hydra-help", action="store_true", help="Hydra's own help")
    add_one("-sc", "--shell-completion", action="store_true", help="with install=SHELL: completion")
    return made


def parse_flags(argv: list[str], prog: str = "lunaris train") -> Flags:
    """Return the flags and overrides of a command line. Raises UserError for an unknown flag.

    `--cfg`, `--info` and `--zip` may stand without a value before an override.
    """
    spread: list[str] = []
    for text in argv:
        # argparse would take the override for the flag's value.
        if spread and spread[-1] in _BEFORE_OVERRIDE and "=" in text:
            spread[-1] = _BEFORE_OVERRIDE[spread[-1]]
        spread.append(text)
    flags = Flags(**vars(parser(prog).parse_intermixed_args(spread)))
    for name, value in (("--resolve", flags.resolve), ("--package", flags.package)):
        if value and not flags.cfg:
            raise UserError(f"{name}: goes with --cfg")
    if flags.zipped and not flags.multirun:
        raise UserError("--zip: goes with -m, a sweep: lunaris train -m --zip KEY=A,B KEY=C,D")
    if flags.dry_run and not flags.multirun:
        raise UserError(
            "--dry-run: goes with -m; of one run, `lunaris plan` shows the cost and --cfg job the "
            "config"
        )
    return flags


def help_text(
    prog: str, what: str, examples: list[tuple[str, str]], config_dirs: list[Path]
) -> str:
    """Return the help of a command; examples: pairs of a command line and what it does."""
    longest = max(len(line) for line, _ in examples)
    return "\n".join(
        [
            f"usage: {prog} [FLAGS] [GROUP=OPTION …] [KEY=VALUE …]",
            "",
            what,
            "",
            "examples:",
            *(f"  {line:<{longest}}  {does}" for line, does in examples),
            "",
            parser(prog).format_help().strip(),
            "",
            "groups and their options (GROUP=OPTION):",
            *_groups(config_dirs),
            "",
            f"`{prog} --cfg job` shows every key with its value, `-p moe` those of one group;",
            "add overrides to see what they do. An override never needs a plus.",
        ]
    )


def _groups(config_dirs: list[Path]) -> list[str]:
    lines = []
    for group in group_names():
        lines.append(f"  {group}")
        for option in options(group, config_dirs):
            lines.append(f"    {option.name:<{_WIDTH}} {option.summary}".rstrip())
    return lines
