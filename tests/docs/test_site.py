"""The site that `scripts/docs` builds: every link and picture is there, and every public name."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.blocks import DOCUMENTS, ROOT
from tests.eval.browser import browse
from tokenprune.registry import methods

PYTHON = ROOT / ".venv-docs" / "bin" / "python"

_LOADED = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}
"""Tag -> the attribute with what a browser loads by itself."""
_NOT_LOADED = {"next", "prev", "canonical"}
"""What a ``link`` may say of a page that is not loaded."""


@dataclass
class Page(HTMLParser):
    """What a page has: names that can be linked to, links, and what it loads."""

    text: str
    names: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.names |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in _LOADED and _LOADED[tag] in given:
            target = self.links if given.get("rel") in _NOT_LOADED else self.loaded
            target.append(given[_LOADED[tag]])


def pages_of(folder: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf-8")) for path in sorted(folder.rglob("*.html"))}


def dead_links(folder: Path) -> list[str]:
    """Return the links and loaded files that lead nowhere inside a site, and what leads outside."""
    pages = pages_of(folder)
    dead = []
    for path, page in pages.items():
        where = path.relative_to(folder)
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme == "data" or (parts.scheme and link in page.links):
                continue  # a picture inside the page; a link that a reader may follow
            if parts.scheme or parts.netloc:
                dead.append(f"{where} loads {link}")
                continue
            # Only the page for what is not found is served under any address.
            base = folder if parts.path.startswith("/") else path.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file() or not target.is_relative_to(folder.resolve()):
                dead.append(f"{where}: {link}")
            elif parts.fragment and unquote(parts.fragment) not in pages[target].names:
                dead.append(f"{where}: {link} has no such name")
    return dead


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing. Run scripts/setup-docs first.")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [ROOT / "scripts" / "docs", "--site-dir", folder],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_NO_INDEX": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert dead_links(site) == []
    assert sum(len(page.links) for page in pages_of(site).values()) > 500


def test_every_document_is_a_page_and_the_readme_the_first(site: Path) -> None:
    names = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    made = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog"}
    for document in DOCUMENTS:
        page = "examples" if document.parent.name == "examples" else document.stem
        assert f"{made.get(page, page)}.html" in names, document
    readme = (ROOT / "README.md").read_text("utf-8")
    sentence = next(line for line in readme.splitlines() if line.startswith("A vision-language"))
    assert sentence in (site / "index.html").read_text("utf-8")


def test_every_public_name_is_in_the_api(site: Path) -> None:
    names = set().union(
        *(page.names for path, page in pages_of(site).items() if "api" in str(path))
    )
    for package in ("tokenprune", "tokenprune_hf", "tokenprune_vllm", "tokenprune_lmms_eval"):
        public = importlib.import_module(package).__all__
        missing = [name for name in public if f"{package}.{name}" not in names]
        assert public
        assert not missing, missing
    classes = {f"{kind.__module__}.{kind.__qualname__}" for kind in methods().values()}
    assert classes <= names
    assert set(methods()) <= names


def test_docstrings_have_no_marks_that_are_not_rendered(site: Path) -> None:
    for path in (site / "api").rglob("*.html"):
        text = path.read_text("utf-8")
        assert not re.search(r":(func|class|data|meth|mod|attr):", text), path
        assert "::: " not in text, path


def test_diagrams_are_drawn(site: Path) -> None:
    page = site / "contributing.html"
    assert page.read_text("utf-8").count('<pre class="mermaid">') >= 1
    drawn = browse(page, "--virtual-time-budget=20000", "--dump-dom").stdout
    # The theme puts a drawn diagram in the place of its text.
    assert '<pre class="mermaid">' not in drawn
    assert '<div class="mermaid">' in drawn


# The check itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<a href="b.html#there">', None),
        ('<a href="sub/">', None),
        ('<a href="https://example.org/x">', None),
        ('<img src="data:image/png;base64,AA">', None),
        ('<a href="c.html">', "a.html: c.html"),
        ('<a href="b.html#away">', "a.html: b.html#away has no such name"),
        ('<a href="#away">', "a.html: #away has no such name"),
        ('<a href="../outside.html">', "a.html: ../outside.html"),
        ('<img src="c.png">', "a.html: c.png"),
        ('<script src="https://example.org/x.js">', "a.html loads https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x">', "a.html loads //example.org/x"),
    ],
)
def test_a_dead_link_is_found(text: str, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "outside.html").touch()
    folder = tmp_path / "site"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.html").write_text(text)
    (folder / "b.html").write_text('<h1 id="there">')
    (folder / "sub" / "index.html").touch()
    assert dead_links(folder) == ([found] if found else [])
