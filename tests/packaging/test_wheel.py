"""The wheel, installed where nothing of this checkout is, does the work from an empty folder."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import lunaris

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
NAME = "lunaris-codex"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of commands of a new environment with the wheel.

    The packages that it needs are those of this one, put after its own on the path; a file of
    paths within them, as an editable install has, is not read.
    """
    env = tmp_path_factory.mktemp("env") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    python = env / "bin/python"
    command = [str(python), "-m", "pip", "install", "--no-deps", "-q", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    here = [path for path in sys.path if path.endswith("site-packages")]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    paths = "; ".join(f"sys.path.append({path!r})" for path in here)
    (env / "lib" / version / "site-packages/needed.pth").write_text(f"import sys; {paths}\n")
    return env / "bin"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a command of the environment in an empty folder."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"PATH": f"{installed}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def command(*args: str) -> str:
        done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{args}\n{done.stdout}{done.stderr}"
        return done.stdout

    return command


def test_the_wheel_holds_one_package_and_its_options(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"lunaris", f"lunaris_codex-{lunaris.__version__}.dist-info"}
    for folder, inside, pattern in (
        ("lunaris", "lunaris", "*.py"), ("launch", "lunaris/launch", "*.py"),
        ("conf", "lunaris/conf", "*.yaml"), ("lunaris/scaffold", "lunaris/scaffold", "*.txt"),
    ):  # fmt: skip
        files = {f"{inside}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob(pattern)}
        assert files and files <= set(names), sorted(files - set(names))


def test_a_wheel_trains_sweeps_prepares_resumes_and_exports(
    run: Callable[..., str], installed: Path, tmp_path: Path
) -> None:
    where = run("python", "-c", "import lunaris; print(lunaris.__file__)").strip()
    assert Path(where).is_relative_to(installed.parent)
    assert run("lunaris", "--version").strip() == f"lunaris {lunaris.__version__}"
    tiny = [
        "model.d_model=16", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1",
        "model.max_seq_len=16", "model.norm=pre", "trainer.max_steps=2", "trainer.batch_size=2",
        "trainer.eval_steps=1", "trainer.device=cpu",
    ]  # fmt: skip
    text = "".join(f"{i} quick brown foxes jump over lazy dogs\n" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    prepare = ["data=text", "data.files=text.txt", "data.format=lines", "data.vocab_size=270"]
    run("lunaris", "prepare", *prepare, "data.dir=shards", "data.val_fraction=0.2")
    shards = ["data=shards", "data.dir=shards", "moe=top2", "moe.n_experts=4", *tiny]
    run("lunaris", "train", *shards, "name=one")
    run("lunaris", "train", "-m", *shards, "name=two", "seed=1,2")
    run("lunaris", "resume", "runs/one", "trainer.max_steps=3")
    assert "done" in run("lunaris", "runs") and "seed=2" in run("lunaris", "runs", "sweeps/two")
    run("lunaris", "evaluate", "runs/one", "text.txt")
    run("lunaris", "generate", "runs/one", "--prompt", "1 quick", "--max-new-tokens", "3")
    run("lunaris", "export", "runs/one", "--to", "exported")
    load = (
        "from transformers import AutoModelForCausalLM as M; "
        "print(sum(p.numel() for p in M.from_pretrained('exported').parameters()))"
    )
    assert int(run("python", "-c", load)) > 1000
    run("lunaris", "new", "schedule", "falling")


def test_what_the_wheel_asks_for_is_what_these_tests_ran_with(wheel: Path) -> None:
    """Every bound of a requirement, of its extras too, allows the version that is installed."""
    metadata = zipfile.ZipFile(wheel).read(
        f"lunaris_codex-{lunaris.__version__}.dist-info/METADATA"
    )
    asked = re.findall(r"^Requires-Dist: (.*)$", metadata.decode(), re.MULTILINE)
    assert len(asked) > 15
    for text in asked:
        requirement = Requirement(text)
        extra = re.search(r"extra == ['\"](\w+)['\"]", text)
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra[1] if extra else ""}):
            continue
        if requirement.name == NAME:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            # An environment may lack an extra whose tests are skipped then.
            assert extra, text
            continue
        assert requirement.specifier.contains(version, prereleases=True), text
    assert sysconfig.get_python_version() >= "3.11"


def test_the_version_is_that_of_the_change_log() -> None:
    """The newest heading with a version; before the first release, 0.1.0 is being prepared."""
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    released = [Version(text) for text in headings[1:]]
    assert released == sorted(released, reverse=True)
    newest = released[0] if released else Version("0.0.0")
    current = Version(lunaris.__version__)
    assert current >= newest
    assert importlib.metadata.version(NAME) == lunaris.__version__
