"""Hooks of mkdocs.yml: pages of the site that are files of the repository outside of docs/.

README.md is the site's first page and CHANGELOG.md its last. Any other file that a page links to becomes a page under
files/ that shows its text, so a link works in the repository and on the site.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that are pages as they are, and their names on the site."""
_LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#:]+)(?P<after>(#[^)\s]*)?\))")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".sbatch": "bash", ".json": "json"}


def source_of(page: str) -> str:
    """The file of the repository that a page of the site is made from."""
    return next((source for source, name in PAGES.items() if name == page), f"docs/{page}")


def page_of(file: str) -> str:
    """The page or file of the site for a file of the repository."""
    if file in PAGES:
        return PAGES[file]
    return file.removeprefix("docs/") if file.startswith("docs/") else f"files/{file}.md"


def linked(markdown: str, source: str) -> set[str]:
    """Files of the repository that a page links to. Links in code are text."""
    text, folder = _FENCE.sub("", markdown), posixpath.dirname(source)
    return {posixpath.normpath(posixpath.join(folder, link["target"])) for link in _LINK.finditer(text)}


def with_links_of_the_site(markdown: str, page: str) -> str:
    """The text of a page whose links to files of the repository are links to pages of the site."""
    folder = posixpath.dirname(source_of(page))

    def replace(link: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(folder, link["target"]))
        if not (ROOT / file).is_file():
            return link[0]  # mkdocs reports it
        target = posixpath.relpath(page_of(file), posixpath.dirname(page) or ".")
        return f"{link['before']}{target}{link['after']}"

    code, position, parts = list(_FENCE.finditer(markdown)), 0, []
    for block in code:
        parts += [_LINK.sub(replace, markdown[position : block.start()]), block[0]]
        position = block.end()
    return "".join([*parts, _LINK.sub(replace, markdown[position:])])


def file_as_page(file: str) -> str:
    """A page that shows a text file of the repository."""
    text, language = (ROOT / file).read_text(encoding="utf-8"), _LANGUAGES.get(os.path.splitext(file)[1], "text")
    return f"# {posixpath.basename(file)}\n\n`{file}`\n\n````{language}\n{text}\n````\n"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages made from files outside of docs/."""
    from mkdocs.structure.files import File

    texts = {source_of(file.src_uri): file.content_string for file in files.documentation_pages()}
    for source, page in PAGES.items():
        texts[source] = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=texts[source]))
    outside = {file for source, text in texts.items() for file in linked(text, source)}
    for file in sorted(outside - PAGES.keys()):
        if not file.startswith("docs/") and (ROOT / file).is_file():
            files.append(File.generated(config, page_of(file), content=file_as_page(file)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site. The first page needs no list of pages beside it."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    if page.file.src_uri.startswith("files/"):
        return markdown
    return with_links_of_the_site(markdown, page.file.src_uri)
