"""Command lines at random: each is refused by one message, or trains; nothing else happens."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lunaris.__main__ import main
from lunaris.config.compose import compose
from lunaris.config.identity import every_key
from lunaris.config.schema.root import Config
from lunaris.errors import UserError
from lunaris.planning.plan import make_plan

# Two steps of a second; what a command line changes of it comes after.
_BASE = [
    "data=synthetic", "model.d_model=16", "model.n_layers=2", "model.n_heads=2",
    "model.n_kv_heads=1", "model.max_seq_len=16", "trainer.batch_size=2", "trainer.max_steps=2",
    "trainer.log_interval=1", "trainer.eval_interval=2", "trainer.eval_steps=1",
    "trainer.device=cpu", "name=fuzz",
]  # fmt: skip
_OPTIONS = {
    "attention": ["gqa", "sliding_window", "mla", "gqqa"],
    "moe": ["none", "switch", "top2", "fine_grained", "swich"],
    "objective": ["next_token", "multi_token"],
    "optimizer": ["adamw", "muon", "sgd"],
    "schedule": ["cosine", "wsd", "constant", "linear"],
    "parallelism": ["single", "ddp", "fsdp", "hsdp", "none"],
    "logger": ["local", "[local,tensorboard]", "[]", "nothing"],
    "model": ["tiny", "base", "small"],
}
_WILD = [
    *("0", "-1", "1", "2", "3", "0.5", "1e-9", "1e3", "1e30", "1e308", "-1e308", "nan", "inf"),
    *("-inf", str(2**31), str(2**63), str(2**70), "true", "False", "null", "none", "''", "abc"),
    *("a,b", "[]", "[1,2]", "[0.5,0.9]", "[a]", "{}", "{a:1}", "{_target_:os.system}"),
    *("os.system", "torch.optim.SGD", "${seed}", "${nope}", "${oc.env:HOME}", "${", "'${seed}'"),
    *("range(3)", "choice(1,2)", "\u00e9", "\U0001f40d", "\\", "'", '"', "(", "a b", " 5", "5 "),
    *("0x10", "1_000", "a" * 3000, "../../x", "/dev/null", "@", "?"),
]
# What the bounded size allows.
_MOST_BYTES, _MOST_STEPS, _MOST_TOKENS = 300 * 2**20, 4, 4096


def command_line(draw: random.Random, known: dict[str, Any]) -> list[str]:
    """Return one to four overrides: of options, of keys with near or wild values, or misspelt."""
    found = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.random()
        if kind < 0.25:
            group = draw.choice(list(_OPTIONS))
            found.append(f"{group}={draw.choice(_OPTIONS[group])}")
            continue
        key = draw.choice(list(known))
        value = near(draw, known[key]) if kind < 0.7 else draw.choice(_WILD)
        if kind > 0.95:
            at = draw.randrange(len(key))
            key = key[:at] + draw.choice(["", "x", ".", "_"]) + key[at + 1 :]
        sign = draw.choice([""] * 30 + ["+", "++", "~"])
        found.append(f"~{key}" if sign == "~" else f"{sign}{key}={value}")
    return found


def near(draw: random.Random, value: Any) -> str:
    """Return a value that a person might try in the place of this one."""
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int):
        return str(draw.choice([value + 1, value * 2, value // 2, 1, 4]))
    if isinstance(value, float):
        return str(draw.choice([value * 2, value / 2, value / 10, 1 - value]))
    return draw.choice(["1", "4", "0.25", "null"]) if value is None else str(value)


def composed(overrides: list[str]) -> Config | None:
    """Return the config of a command line, or None where it is refused by one line."""
    try:
        return compose([*_BASE, *overrides])
    except UserError as error:
        assert str(error).strip() and "Traceback" not in str(error)
        return None


def fits(cfg: Config) -> bool:
    """Return whether a config may train here: small, short, in this process."""
    trainer = cfg.trainer
    steps = max(trainer.max_steps, trainer.eval_steps or 99, trainer.gradient_accumulation_steps)
    tokens = trainer.batch_size * cfg.model.max_seq_len
    alone = getattr(cfg.launch, "processes", 1) == 1
    if not alone or steps > _MOST_STEPS or tokens > _MOST_TOKENS or trainer.compile_model:
        return False
    if cfg.model.n_layers > 16 or getattr(cfg.moe, "n_experts", 1) > 64:
        return False
    try:
        return make_plan(cfg, gpu=False).memory.peak < _MOST_BYTES
    except UserError:
        return True  # A custom class, which the plan does not know.


def test_each_command_line_is_refused_or_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    long: bool, counted: Callable[[str, int], None],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    # No key of where the run goes: it would leave this folder.
    left_out = ("name", "out_dir", "global_batch")
    keys = every_key(compose(_BASE))
    known = {key: keys[key] for key in sorted(keys) if key not in left_out}
    assert len(known) > 60
    draw = random.Random(0)
    tries = {"refused": 0, "trained": 0, "accepted, but too large to train here": 0}
    others: list[str] = []
    for _ in range(2000 if long else 60):
        line = command_line(draw, known)
        try:
            outcome = _outcome(line, capfd)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:300]}"
        if outcome in tries:
            tries[outcome] += 1
        else:
            others.append(f"{line}: {outcome}")
        for left in tmp_path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    for kind, number in tries.items():
        counted(f"command lines {kind}", number)
    assert not others, "\n".join(others)
    assert min(tries["refused"], tries["trained"]) > 5


def _outcome(line: list[str], capfd: Any) -> str:
    cfg = composed(line)
    if cfg is not None and not fits(cfg):
        return "accepted, but too large to train here"
    code = main(["train", *_BASE, *line])
    out, err = capfd.readouterr()
    said = [text for text in err.splitlines() if text.startswith("error: ")]
    if "Traceback" in out + err:
        return f"a traceback: {err[-300:]}"
    if code == 2 and len(said) == 1:
        if cfg is None and list(Path.cwd().iterdir()):
            return f"refused, but left {list(Path.cwd().iterdir())}"
        return "refused"
    # What diverges trains too: it ends by the message that says so.
    diverged = code == 1 and len(said) == 1 and ("nan" in said[0] or "not finite" in said[0])
    if cfg is not None and (code == 0 or diverged):
        return "trained"
    return f"exit code {code}: {err[-300:]}"
