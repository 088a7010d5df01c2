"""Every command that the docs show is composed or run by a test, or its block says why not.

A fenced block without a language, or with `bash`, holds commands; with lines that begin with `$ `,
these alone are commands and the others output. `lunaris train` is composed in tests/test_docs.py.
What CHEAP names is run here, page by page, where the runs, sweeps, shards and texts that the docs
name are tiny ones. Any other command needs `<!-- not run: REASON -->` in the line before its block.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.commands import check
from lunaris.config.compose import compose
from lunaris.runs.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CHEAP = {
    "cancel", "evaluate", "export", "fork", "generate", "import-config", "keys", "logs", "new",
    "plan", "prepare", "report", "resume", "runs",
}  # fmt: skip
# Programs of the machine; a line of theirs is given to the shell.
SHELL = {"mkdir", "python3"}
TINY = [
    "data=shards", "data.dir=shards/tiny", "model.d_model=16", "model.n_layers=2",
    "model.n_heads=2", "model.n_kv_heads=1", "model.max_seq_len=16", "model.multiple_of=8",
    "model.norm=pre", "moe=top2", "moe.n_experts=4", "objective=multi_token", "schedule=wsd",
    "trainer.max_steps=8", "trainer.batch_size=4", "trainer.eval_interval=4",
    "trainer.eval_steps=2", "trainer.log_interval=1", "trainer.device=cpu",
    "checkpoint.save_interval=2", "checkpoint.keep_last=null",
]  # fmt: skip


@dataclass
class Block:
    """A fenced block: where it begins, its commands, and why some of them are not run."""

    page: Path
    line: int
    commands: list[str]
    reason: str | None


def command_blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that hold commands; continued lines are joined."""
    text = page.read_text()
    found = []
    pattern = r"(?:<!-- not run: ([^\n]+?) -->\n)?^```([^\n]*)\n(.*?)^```$"
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        reason, language, body = match.groups()
        if language not in ("", "bash"):
            continue
        lines = body.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        found.append(Block(page, text[: match.start()].count("\n") + 1, lines, reason))
    return found


def words(command: str) -> list[str]:
    """Return the words of a command, as bash makes them."""
    plain = re.sub(r"\$'(.*?)'", lambda match: "'" + match[1].replace("\\n", "\n") + "'", command)
    return shlex.split(plain, comments=True)


def is_composed(command: str) -> bool:
    match words(command):
        case ["lunaris", "train", *rest]:
            return "--dry-run" not in rest
        case ["lunaris", "prepare" | "check", *_]:
            return True
    return False


def is_run(command: str) -> bool:
    match words(command):
        case ["lunaris", "train", *rest]:
            return "--dry-run" in rest
        case ["lunaris", "prepare", *rest]:
            sends = "launch=slurm" in rest and "launch.dry_run=true" not in rest
            return "data=hf" not in rest and not sends  # It needs the network, or sends jobs.
        case ["lunaris", "resume", *rest]:
            return not any(word.startswith("launch.") for word in rest)  # It sends a job.
        case ["lunaris", name, *_]:
            return name in CHEAP
        case [program, *_]:
            return program in SHELL
    return False


BLOCKS = [block for page in PAGES for block in command_blocks(page)]
RUN = {
    page.name: [c for b in BLOCKS if b.page == page for c in b.commands if is_run(c)]
    for page in PAGES
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_every_block_of_commands_is_checked_or_says_why_not(block: Block) -> None:
    unchecked = [c for c in block.commands if not is_composed(c) and not is_run(c)]
    if unchecked:
        assert block.reason, f"add <!-- not run: REASON --> before the block of {unchecked}"
    else:
        assert not block.reason, f"is checked, so it needs no reason: {block.reason}"


PREPARE = {c: words(c)[2:] for b in BLOCKS for c in b.commands if c.startswith("lunaris prepare")}


@pytest.mark.parametrize("command", PREPARE)
def test_commands_that_prepare_compose(command: str) -> None:
    cfg = compose(PREPARE[command], check_data=False)
    assert cfg.data.dir


CHECK = [words(c)[2:] for b in BLOCKS for c in b.commands if c.startswith("lunaris check")]


@pytest.mark.parametrize("argv", CHECK, ids=" ".join)
def test_commands_that_check_a_machine_compose(argv: list[str]) -> None:
    _, overrides = check._parser().parse_known_args(argv)
    assert compose(overrides, check_data=False).launch.world_size() >= 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the docs name, tiny ones."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        texts = [f"def main({i}): the quick brown fox {i * i} jumps\n" * 3 for i in range(60)]
        rows = [json.dumps({"text": text}) for text in texts]
        question = {"context": "the quick", "choices": [" brown", " fox"], "answer": 0}
        chat = [{"prompt": "2 + 2 =", "completion": " 4"}] * 40
        for name, text in {
            "corpus/a.jsonl": "\n".join(rows),
            "chat/a.jsonl": "\n".join(map(json.dumps, chat)),
            "src/a/b.py": texts[0] * 40,
            "book.txt": texts[1],
            "notes.txt": texts[2],
            "prompts.txt": "def main(\nthe quick\n",
            "questions.jsonl": json.dumps(question),
            "old/config.yaml": "model:\n  d_model: 96\n",
        }.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text)
        Path("books").mkdir()
        Path("books/a.txt.gz").write_bytes(gzip.compress(("".join(texts)).encode()))
        tiny = ["data=text", "data.files=corpus", "data.vocab_size=300", "data.val_fraction=0.3"]
        assert main(["prepare", *tiny, "data.dir=shards/tiny"]) == 0
        named = set(re.findall(r"\b(runs|shards)/(\w+)", "\n".join(sum(RUN.values(), []))))
        assert main(["train", *TINY, "name=first"]) == 0
        Path("runs/first/logs/rank_3.log").write_text("step 1\n")
        for kind, name in named - {("runs", "first")}:
            if kind == "shards":
                shutil.copytree("shards/tiny", f"shards/{name}")
                prepared_by_jobs(Path("shards", name))
                continue
            shutil.copytree("runs/first", f"runs/{name}")
            config = Path(f"runs/{name}/config.yaml")
            text = config.read_text()
            for key, value in (("name: first", f"name: {name}"), ("runs/first", f"runs/{name}")):
                assert key in text
                text = text.replace(key, value)
            config.write_text(text)
        assert main(["train", "-m", *TINY, "name=lr", "optimizer.learning_rate=1e-3,3e-3"]) == 0
    return folder


def prepared_by_jobs(folder: Path) -> None:
    """Add what the jobs of `lunaris prepare launch=slurm` leave in a folder of shards."""
    (folder / "prepare.yaml").touch()
    RunDir(folder).write_status(state="done", job_id="8", task_ids=["7_0", "7_1"])
    (folder / "logs/slurm").mkdir(parents=True)
    (folder / "logs/slurm/8_0_log.out").write_text("merged\n")


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, commands in RUN.items() if commands])
def test_the_commands_of_a_page_run(
    page: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world")
    for command in RUN[page]:
        program, *args = words(small(command))
        if program in SHELL:
            subprocess.run(command, shell=True, check=True)
            continue
        for word in args:
            key, _, value = word.partition("=")
            new = {("prepare", "data.dir"): value, ("fork", "name"): f"runs/{value}"}
            if (args[0], key) in new:
                shutil.rmtree(new[args[0], key], ignore_errors=True)
        code = main(args)
        assert code == 0, f"{command}\n{capsys.readouterr().err}"


def small(command: str) -> str:
    """Return the command with the steps and the sweep of the tiny runs."""
    command = re.sub(r"sweeps/\w+", "sweeps/lr", command)
    if "--dry-run" in command:
        command = re.sub(r"name=\w+", "name=listed", command)
    command = re.sub(r"--at \d+", "--at 4", command)
    return re.sub(r"(trainer\.max_steps)=\d+", r"\1=12", command)
