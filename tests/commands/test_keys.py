"""`lunaris keys`: every key is there with its meaning, and the page is what the command prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lunaris.__main__ import main
from lunaris.config.keys import all_keys, groups
from lunaris.config.reference import sections

_PAGE = Path(__file__).parents[2] / "docs/keys.md"


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "--markdown"]) == 0
    assert _PAGE.read_text(encoding="utf-8") == capsys.readouterr().out


def test_every_key_is_explained() -> None:
    keys = [key for section in sections() for key in section.keys]
    assert [key.name for key in keys if not re.match(r"\S.*\.$", key.about)] == []
    inner = {group.replace("/", ".") for group in groups()}
    plain = {name for name in all_keys() if not name.endswith("_target_")} - inner
    assert {key.name for key in keys} == plain


def test_a_key_shows_its_default_limits_and_when_it_may_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["keys", "--json", "n_experts_per_token", "trainer.precision", "launch.nodes"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    taken = rows["moe.n_experts_per_token"]
    assert taken["default"] == "1 (fine_grained: 4, top2: 2)"
    assert taken["takes"] == "a whole number, at least 1"
    assert taken["options"] == ["fine_grained", "switch", "top2"]
    assert taken["when"] == "new run"
    assert rows["trainer.precision"]["takes"] == "auto, bf16, fp16, fp32"
    assert rows["trainer.precision"]["when"] == "by resume"
    # Of a group that is free as a whole.
    assert rows["launch.nodes"]["when"] == "any time"


@pytest.mark.parametrize(
    ("names", "shown", "hidden"),
    [
        (["moe"], "moe.n_experts = 8", "optimizer."),
        (["moe/router"], "moe.router.n_groups", "moe.n_experts ="),
        (["moe.router"], "moe.router.n_groups", "moe.n_experts ="),
        (["wsd"], "schedule.warmup_steps", "optimizer."),
        (["muon", "learning_rate"], "optimizer.ns_steps", "schedule."),
    ],
)
def test_names_choose_groups_options_and_keys(
    names: list[str], shown: str, hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", *names]) == 0
    printed = capsys.readouterr().out
    assert shown in printed and f"  {hidden}" not in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "near"),
    [("n_expert", None), ("sigmid", "sigmoid"), ("learning_rat3", "learning_rate")],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    name: str, near: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", name]) == (2 if near else 0)
    said = capsys.readouterr()
    assert near is None or said.err == (
        f"error: {name}: no such group or key; did you mean {near}?\n"
    )
