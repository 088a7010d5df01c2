"""The site of the documentation builds without a warning, and its links lead to its own files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("material", reason="needs the extra `docs`")

ROOT = Path(__file__).resolve().parents[1]


def build(checkout: Path, to: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["-f", str(checkout / "docs/site/mkdocs.yml"), "-d", str(to)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("site")
    done = build(ROOT, to)
    assert done.returncode == 0, done.stderr
    return to


def article(page: Path) -> str:
    return page.read_text().partition("<article")[2].partition("</article>")[0]


def test_every_page_is_there_and_the_first_one_is_the_readme(site: Path) -> None:
    names = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert names | {"index", "contributing", "changelog", "measurements"} <= {
        path.stem for path in site.glob("*.html")
    }
    shown = article(site / "index.html")
    for heading in re.findall(r"^## (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert heading in shown


def test_links_of_the_site_lead_to_its_files(site: Path) -> None:
    found = 0
    for page in site.glob("*.html"):
        if page.name == "404.html":
            continue
        for target in re.findall(r'(?:href|src|srcset)="([^"]+)"', page.read_text()):
            path, _, anchor = target.partition("#")
            if re.match(r"https?:|data:|mailto:", target):
                continue
            file = site / unquote(path) if path else page
            assert file.is_file(), f"{page.name}: {target}"
            if anchor and file.suffix == ".html" and anchor != "__skip":
                assert f'id="{unquote(anchor)}"' in file.read_text(), f"{page.name}: {target}"
            found += 1
    assert found > 100


def test_text_that_python_markdown_reads_unlike_github_is_not_there(site: Path) -> None:
    """It takes a list or a table only after an empty line, and no link is left as text."""
    for page in site.glob("*.html"):
        text = re.sub(r"<(code|pre).*?</\1>", "", article(page), flags=re.DOTALL)
        for paragraph in re.findall(r"<p>(.*?)</p>", text, re.DOTALL):
            assert not re.search(r"\n(?:[-*] |\d+\. |\|)|^\|", paragraph), (page.name, paragraph)
        assert not re.search(r"\]\([^)\s]+\)", text), page.name


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]* (?:src|href)="(https?:[^"]+)', page.read_text()
        )
        assert not loaded, (page.name, loaded)


def test_links_that_lead_nowhere_fail_the_build(tmp_path: Path) -> None:
    text = "[page](no_page.md) [part](runs.md#no-part) [file](../tests/no_file.py)"
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / name).write_text("# Title\n")
    (tmp_path / "tests/benchmarks").mkdir(parents=True)
    (tmp_path / "tests/benchmarks/LOG.md").write_text("# Title\n")
    for path in (ROOT / "docs").rglob("*"):
        if path.suffix in (".md", ".yml", ".py", ".css", ".ipynb"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    with (tmp_path / "docs/plan.md").open("a") as page:
        page.write(f"\n{text}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    for what in ("no_page.md", "#no-part", "no_file.py"):
        assert what in done.stderr
