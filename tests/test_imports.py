"""Imports point down only, and what has to answer at once imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

import lunaris

PACKAGE = Path(lunaris.__file__).parent
ROOT = PACKAGE.parent
# From the top down; a module imports its own layer's only within its own folder.
LAYERS: list[tuple[str, ...]] = [
    ("__main__",),
    ("commands",),
    ("api", "check"),
    ("launch",),
    ("planning", "continuation", "report"),
    ("export",),
    ("sampling", "scoring"),
    ("inference",),
    ("run",),
    ("run_summary", "lifecycle", "frozen_choices"),
    ("train",),
    ("evaluate", "profiling"),
    ("warm_start",),
    ("moe", "objective", "data", "optim", "parallelism", "metrics", "checkpoint"),
    ("model",),
    ("precision", "checkpoint_plan", "checkpoint_reader"),
    ("runs", "scaffold"),
    ("distributed",),
    ("config",),
    ("errors", "console", "atomic_files", "late", "torch_internals", "conf", "devices"),
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The folders of shards are inspected when a config is checked, without torch.
ALLOWED = {("config/validate.py", "lunaris.data.folders")}


def modules() -> Iterator[tuple[str, Path]]:
    for folder, prefix in ((PACKAGE, ""), (ROOT / "launch", "launch/")):
        for path in sorted(folder.rglob("*.py")):
            yield prefix + path.relative_to(folder).as_posix(), path


def imported(path: Path, *, deep: bool) -> set[str]:
    """Return the modules that a file imports; deep: within functions too, but not for types."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    if not deep:
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        skipped |= {id(inner) for function in functions for inner in ast.walk(function)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "lunaris":
                found |= {f"lunaris.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_point_down(name: str, path: Path) -> None:
    own = name.split("/")[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in RANK, f"{own} stands in no layer: add it to LAYERS"
    for module in imported(path, deep=True):
        if not module.startswith("lunaris."):
            continue
        other = module.split(".")[1]
        if other == "__version__" or other == own or (name, module) in ALLOWED:
            continue
        assert RANK[own] < RANK[other], f"{name} imports {module}, which is not below it"


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {PurePosixPath("lunaris", name).parent for name, _ in modules()}
    assert {str(folder).replace("/", ".") for folder in folders} <= set(listed)


def module_name(name: str) -> str:
    """Return the dotted name of a file: "launch/sweep/start.py" -> "lunaris.launch.sweep.start"."""
    return f"lunaris.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")


def module_graph() -> dict[str, set[str]]:
    """Return for every module of ours the modules of ours that it imports, at any depth."""
    files = {module_name(name): path for name, path in modules()}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names = imported(path, deep=True) | imported_names(path)
        graph[module] = {name for name in names if name in files and name != module}
    return graph


def imported_names(path: Path) -> set[str]:
    """Return `a.b` for every `from a import b` of a file, since b may be a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports, the first of them again at the end, or []."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def test_no_imports_go_in_a_circle_within_a_room_either() -> None:
    graph = module_graph()
    assert len(graph) > 80 and graph["lunaris.launch.worker"] >= {"lunaris.launch.local"}
    found = circle(graph)
    assert not found, f"a circle of imports: {' -> '.join(found)}"


def test_a_circle_of_imports_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"a"}}) == ["a", "b", "d", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# What libraries do not promise to keep, and the one file that may use it.
INTERNALS = {
    "hydra._internal": "config/hydra_internals.py",
    "hydra.core.config_store": "config/hydra_internals.py",
    "hydra.core.global_hydra": "config/hydra_internals.py",
    "hydra.core.override_parser.overrides_parser": "config/hydra_internals.py",
    "hydra.core.plugins": "config/hydra_internals.py",
    "submitit.core._submit": "launch/submitit_internals.py",
    "submitit.local.local": "launch/submitit_internals.py",
    "submitit.slurm.slurm": "launch/submitit_internals.py",
}


@pytest.mark.parametrize(("module", "allowed"), INTERNALS.items())
def test_internals_of_a_library_are_used_in_one_file(module: str, allowed: str) -> None:
    users = [
        name
        for name, path in modules()
        if any(f"{used}.".startswith(f"{module}.") for used in imported(path, deep=True))
    ]
    assert set(users) <= {allowed}


def test_no_module_but_one_instantiates() -> None:
    callers = [name for name, path in modules() if "hydra.utils" in imported(path, deep=True)]
    assert callers == ["config/instantiate.py"]


def test_what_training_reads_imports_nothing_of_the_preparation() -> None:
    importers = {
        name
        for name, path in modules()
        if not name.startswith("data/prepare/")
        and any(f"{m}.".startswith("lunaris.data.prepare.") for m in imported(path, deep=True))
    }
    # The commands, and the composition root, where data is built on first use.
    assert importers == {
        "commands/prepare.py", "commands/resume.py", "continuation/change.py", "inference.py",
        "continuation/checks.py", "run.py", "launch/prepare_array.py", "launch/prepare_task.py",
    }  # fmt: skip


TORCH_FREE = (
    *("config/", "commands/", "runs/", "planning/", "report/", "continuation/", "launch/sweep/"),
    *("errors.py", "__main__.py", "api.py", "devices.py"),
)


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name, path in modules() if name.startswith(TORCH_FREE)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_light_modules_import_no_torch(name: str, path: Path) -> None:
    assert not [m for m in imported(path, deep=False) if m.split(".")[0] == "torch"]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["train", "--cfg", "job"], 0),
        (["train", "moe.n_expert=16"], 2),
        (["train", "moe=swich"], 2),
        (["train", "moe.n_experts_per_token=9"], 2),
        (["train", "data=shards", "data.dir=nowhere"], 2),
        (["train", "-m", "moe.n_experts=4,x"], 2),
        (["plan"], 0),
        (["plan", "-m", "moe.n_experts=4,8", "--device", "H100"], 0),
        (["nothing"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_answers_at_once_imports_no_torch(argv: list[str], code: int) -> None:
    script = (
        "import sys\n"
        "from lunaris.__main__ import main\n"
        f"code = main({argv!r})\n"
        "heavy = {'torch', 'tokenizers', 'matplotlib', 'wandb', 'submitit', 'datasets'}\n"
        "print(code, sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{code} []", done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert (code == 2) == done.stderr.startswith("error: ")


def test_help_of_the_program_needs_no_hydra() -> None:
    script = (
        "import sys\nfrom lunaris.__main__ import main\nmain(['--help'])\n"
        "print([m for m in ('hydra', 'omegaconf', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
