"""Hooks of MkDocs: pages made of files outside docs/, and links that lead outside the site."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# The page of the site -> the file that it shows.
OUTSIDE = {
    "index.md": ROOT / "README.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "measurements.md": ROOT / "tests/benchmarks/LOG.md",
}
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_ATTRIBUTE = re.compile(r'\b(src|srcset|href)="([^"]+)"')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of OUTSIDE; each is its file, so that no copy of it can go stale."""
    for name, path in OUTSIDE.items():
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the text with links to pages of the site; a link to another file becomes its path."""
    name = page.file.src_uri
    folder = OUTSIDE.get(name, DOCS / name).parent

    def link(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        uri = _uri(target, folder, files)
        if uri is None:
            # Its path within the repository, next to the words that led to it.
            path = (folder / target.partition("#")[0]).resolve().relative_to(ROOT)
            return f"{text} (`{path}`)"
        return f"{image}[{text}]({uri})"

    def attribute(found: re.Match[str]) -> str:
        return f'{found[1]}="{_uri(found[2], folder, files) or found[2]}"'

    # Code stays as it is.
    parts = _FENCE.split(markdown)
    parts[::2] = [_ATTRIBUTE.sub(attribute, _LINK.sub(link, part)) for part in parts[::2]]
    return "".join(parts)


def _uri(target: str, folder: Path, files: Files) -> str | None:
    """Return what leads to `target`, a link of a file in `folder`, on the site; None: nothing."""
    path_text, mark, anchor = target.partition("#")
    if "://" in target or not path_text:
        return target
    path = Path(os.path.normpath(folder / path_text))
    if not path.exists():
        return target  # MkDocs reports it.
    names = {file: name for name, file in OUTSIDE.items()}
    uri = names.get(path)
    if uri is None and path.is_relative_to(DOCS):
        uri = path.relative_to(DOCS).as_posix()
    # Every page that has links stands at the top of the site.
    return None if uri is None or files.get_file_from_path(uri) is None else uri + mark + anchor
