"""The documentation site builds without warnings, shows every page, and fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("mkdocs")


class Page(HTMLParser):
    """The resources that a page loads, the first words of its paragraphs, and its headings' anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.resources: list[str] = []
        self.paragraphs: list[str] = []
        self.anchors: set[str] = set()
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors.add(values.get("id") or "")
        if tag in ("script", "img", "iframe", "source"):
            self.resources.append(values.get("src") or "")
        if tag == "link" and values.get("rel") != "canonical":
            self.resources.append(values.get("href") or "")
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open == "p":
            self.paragraphs.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as the command builds it, with every warning as an error."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {
        file.parent.relative_to(site).as_posix(): Page(file.read_text(encoding="utf-8"))
        for file in site.rglob("index.html")
    }


def test_nothing_is_fetched_from_the_network(site: Path, pages: dict[str, Page]) -> None:
    outside = {link for page in pages.values() for link in page.resources if re.match(r"(https?:)?//", link)}
    for sheet in site.rglob("*.css"):
        outside |= set(re.findall(r"url\([\"']?((?:https?:)?//[^)]*)\)", sheet.read_text(encoding="utf-8")))
    assert not outside


def test_readme_changelog_and_linked_files_are_pages(pages: dict[str, Page]) -> None:
    files = {"LICENSE", "benchmarks/scaling/node.yaml"}
    assert pages.keys() >= {".", "changelog", *(f"files/{name}" for name in files)}
    assert "install-into-your-own-environment" in pages["."].anchors


def test_lists_and_tables_are_rendered(pages: dict[str, Page]) -> None:
    # GitHub starts a list or a table below a line of text; Markdown in Python wants an empty line before it.
    broken = [
        f"{name}: {line}"
        for name, page in pages.items()
        if not name.startswith("files/")
        for text in page.paragraphs
        for line in text.splitlines()
        if re.match(r"\s*([-*] |\d+\. |\| )", line)
    ]
    assert not broken


def test_reference_describes_what_plug_ins_and_scripts_use(pages: dict[str, Page]) -> None:
    wanted = {
        "api/plans": ("cllm.plan.plan.KVPlan", "cllm.plan.registry.register_read", "cllm.plan.presets.sharing.CLA"),
        "api/config": ("cllm.config.training.OptimConfig.lr", "cllm.config.load.load_settings"),
        "api/model": ("cllm.cache.cache.KVCache", "cllm.posthoc.cache.CompressedKVCache"),
        "api/training": ("cllm.train.run.train", "cllm.train.optim.Optimizer"),
        "api/posthoc": ("cllm.posthoc.method.Compressor.encode", "cllm.posthoc.registry.register"),
        "api/evaluation": ("cllm.evaluate.suites.suite.Suite",),
    }
    missing = {anchor for page, anchors in wanted.items() for anchor in anchors if anchor not in pages[page].anchors}
    assert not missing
