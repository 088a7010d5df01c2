"""Links lead to files, every training command composes, and the examples of extending.md run."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from lunaris.__main__ import commands, main
from lunaris.config.cli import parse_flags
from lunaris.config.compose import compose
from lunaris.config.overrides import parse
from lunaris.metrics.records import read_rows
from lunaris.runs.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines(page: Path) -> list[str]:
    """Return the lines of a page's code blocks that call lunaris, continuations joined."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("lunaris ")
    ]


TRAIN = [
    pytest.param(line, id=line[:60])
    for page in PAGES
    if page.name != "extending.md"  # Its commands need the files of their examples.
    for line in shell_lines(page)
    if line.startswith("lunaris train") and "…" not in line and "--help" not in line
]
EXTENDING = ROOT / "docs" / "extending.md"
# The sections of extending.md whose examples are run: title -> text.
EXAMPLES = {
    section.splitlines()[0]: section
    for section in EXTENDING.read_text().split("\n## ")[1:]
    if "lunaris train" in section
}
SMALL = {
    "model.d_model": "16", "model.n_layers": "1", "model.n_heads": "2", "model.n_kv_heads": "1",
    "model.max_seq_len": "16", "model.multiple_of": "8", "moe.n_experts": "4",
    "trainer.max_steps": "4", "trainer.batch_size": "4", "trainer.log_interval": "1",
    "trainer.device": "cpu", "data": "synthetic", "data.vocab_size": "64",
}  # fmt: skip


TYPED = {
    "Attention": {
        "attention.window=wide": "attention.window=wide: must be a whole number",
        "attention.window=0": "attention.window=0: must be at least 1",
        "attention.windw=3": "did you mean attention.window?",
    },
    "Router": {
        "moe.router.temperature=hot": "moe.router.temperature=hot: must be a number",
        "moe.router.temperature=0": "moe.router.temperature=0.0: must be greater than 0",
        "moe.router.temprature=3": "did you mean moe.router.temperature?",
    },
    "Logger": {
        "logger.csv.delimiter=x": "logger.csv.delimiter=x: allowed are ,, ;",
        "logger.csv.delimitr=x": "did you mean logger.csv.delimiter?",
    },
    "Objective": {
        "objective.ahead_weight=2": "objective.ahead_weight=2.0: must be between 0.0 and 1.0",
        "objective.ahead_weigth=1": "did you mean objective.ahead_weight?",
    },
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def first_value(text: str) -> str:
    (override,) = parse([text])
    if not override.is_sweep_override() or override.is_hydra_override():
        return text
    key, value = override.get_key_element(), override.value()
    found = value.start if hasattr(value, "start") else next(override.sweep_string_iterator())
    return f"{key}={found}"


@pytest.mark.parametrize("line", TRAIN)
def test_training_commands_compose(line: str) -> None:
    flags = parse_flags(shlex.split(line, comments=True)[2:])
    if flags.multirun:
        # The first value of each swept key; tests/launch holds that all of them are expanded.
        flags.overrides = [first_value(text) for text in flags.overrides]
    if find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        optuna = ("hydra/sweeper=optuna", "hydra.sweeper.")
        flags.overrides = [text for text in flags.overrides if not text.startswith(optuna)]
    compose(flags.overrides, source=flags.source, check_data=False)


def test_extras_are_installed_from_the_distribution_of_this_project() -> None:
    """The public index has another project called `lunaris`; export.md installs `lm-eval` too."""
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    files = [*PAGES, *sorted((ROOT / "lunaris").rglob("*.py"))]
    shown = [m for f in files for m in re.findall(r"pip install '([^'\[]*)\[", f.read_text())]
    assert name in shown and set(shown) <= {name, "lm-eval"}


def test_every_file_named_exists() -> None:
    named = re.compile(r"`((?:lunaris|launch|tests|conf|docs)/[\w./]+\.(?:py|md|yaml))`")
    found = {path for page in PAGES for path in named.findall(page.read_text())}
    missing = {path for path in found if "GROUP" not in path and not (ROOT / path).is_file()}
    assert found and not missing


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    config = (ROOT / "docs" / "site" / "mkdocs.yml").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert not pages - set(re.findall(r"- (?:\w+: )?(\w+\.md)$", config, re.MULTILINE))


def test_every_command_shown_exists() -> None:
    shown = {line.split()[1] for page in PAGES for line in shell_lines(page)}
    assert shown - {"--help", "COMMAND"} <= set(commands())
    assert len(TRAIN) > 3


def test_the_files_for_newcomers_stay_short() -> None:
    section = (ROOT / "README.md").read_text().partition("## Where to start reading")[2]
    first = section.partition("More:")[0]
    files = re.findall(r"\]\((\S+\.md)\)|`(\S+\.(?:py|yaml))`", first)
    lines = [len((ROOT / (a or b)).read_text().splitlines()) for a, b in files]
    assert len(lines) == 5 and sum(lines) < 800, dict(zip(files, lines, strict=True))


@pytest.fixture
def path_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the test's folder on the Python path, and forget the modules that come from it."""
    monkeypatch.syspath_prepend(tmp_path)
    # Also before: another test may have left a module of this name.
    forget_mine()
    yield
    forget_mine()


def forget_mine() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.mark.usefixtures("path_kept")
@pytest.mark.parametrize("title", EXAMPLES)
def test_the_examples_of_extending_run(
    title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = EXAMPLES[title]
    for path, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", section, re.DOTALL):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    *others, line = [line for line in shell_lines(EXTENDING) if line in section]
    given = shlex.split(line)[1:]
    # What the example itself chooses is left to it.
    chosen = re.sub(r"```python.*?```", "", section, flags=re.DOTALL)
    small = [
        f"{key}={value}"
        for key, value in SMALL.items()
        if not re.search(rf"\b{key.rpartition('.')[2]}[:=]", chosen)
    ]
    for i, other in enumerate(others):
        assert main([*shlex.split(other)[1:], *small, f"name=other{i}"]) == 0
    assert main([*given, *small, "name=x"]) == 0
    run_dir = RunDir("runs/x")
    assert run_dir.read_status()["state"] == "done"
    shows = {
        "Preset": lambda: run_dir.read_config().model.d_model == 64,
        "Schedule": lambda: "schedule.Linear" in run_dir.config_path.read_text(),
        "Logger": lambda: (
            [row["step"] for row in read_rows(run_dir.metrics_path)] == [0, 1, 2, 3, 4]
            and len((run_dir.path / "loss.csv").read_text().splitlines()) == 4
        ),
        "Parallelism": lambda: "micro-step 4" in capsys.readouterr().out,
        "Attention": lambda: "window: 8" in run_dir.config_path.read_text(),
        "Router": lambda: "temperature: 4.0" in run_dir.config_path.read_text(),
        "Objective": lambda: "train/ahead_loss" in run_dir.metrics_path.read_text(),
    }
    assert shows.get(title, lambda: True)()
    if "_schema_" in section:
        # Its keys are typed and checked like ours, and the folder is read by its schema again.
        for bad, message in TYPED[title].items():
            assert main([*given, *small, "name=y", bad]) == 2
            assert message in capsys.readouterr().err
        assert not Path("runs/y").exists()
        assert main(["evaluate", "runs/x", "--trust", "mine"]) == 0


def test_every_joint_has_its_example() -> None:
    joints = {
        "Attention", "Router", "Objective", "Preset", "Schedule", "Optimizer", "Data", "Logger",
        "Parallelism", "Launcher",
    }  # fmt: skip
    assert joints <= EXAMPLES.keys()
