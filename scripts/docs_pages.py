"""Pages of the documentation's site that are no file in docs/; a hook of mkdocs, see mkdocs.yml.

README, CONTRIBUTING, CHANGELOG and the examples' README become pages as they are, and their links
are turned: to a page where one was made of the file, and else into plain text, since a site has no
source files. The API's pages list the public names of each package: those that its ``__init__``
imports as themselves (``from x import y as y``), and the public modules that the documents tell
users to import. Nothing is imported; griffe reads the files.
"""

from __future__ import annotations

import ast
import posixpath
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
"""File outside docs/ -> its page."""

API: dict[str, tuple[str, ...]] = {
    "tokenprune": (
        "tokenprune.errors",
        "tokenprune.inside.base",
        "tokenprune.inside.fastv",
        "tokenprune.inside.pyramid_drop",
        "tokenprune.inside.sparsevlm",
        "tokenprune.question.attention",
        "tokenprune.launches",
        "tokenprune.numerics",
        "tokenprune.testing",
    ),
    "tokenprune.selectors": (),
    "tokenprune.masks": (),
    "tokenprune_hf": (),
    "tokenprune_vllm": ("tokenprune_vllm.export",),
    "tokenprune_lmms_eval": (),
    "tokenprune_eval": ("tokenprune_eval.bundled.scenes:load_scenes",),
}
"""Package with a page of its own -> what is shown on it, too: modules, or one name of a module."""

_LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<to>[^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", flags=re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API's pages into the navigation."""
    pages = [{package: f"api/{package}.md"} for package in API]
    config.nav = [
        {"API": pages} if isinstance(entry, dict) and "API" in entry else entry
        for entry in config.nav or []
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the script and style sheet that they load."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
    for package in API:
        text = "\n".join(_api_page(package))
        files.append(File.generated(config, f"api/{package}.md", content=text))
    mermaid = ROOT / ".venv-docs" / "mermaid.min.js"
    files.append(File.generated(config, "assets/mermaid.min.js", abs_src_path=str(mermaid)))
    files.append(File.generated(config, "assets/site.css", content=_STYLE))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page, which are those of its file in the repository."""
    source = next((name for name, made in PAGES.items() if made == page.file.src_uri), None)
    source = source or f"docs/{page.file.src_uri}"
    known = {file.src_uri for file in files}

    def turned(link: re.Match[str]) -> str:
        to, _, anchor = link["to"].partition("#")
        if not to or re.match(r"[a-z]+:", to):
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), to))
        if target == "examples":
            target = "examples/README.md"
        made = PAGES.get(target, target.removeprefix("docs/"))
        if made not in known:
            return link["text"]
        relative = posixpath.relpath(made, posixpath.dirname(page.file.src_uri) or ".")
        # A reader of the site knows pages by their titles, and no files.
        text = _title(target) if link["text"].endswith(".md") else link["text"]
        return f"{link['mark']}[{text}]({relative}{'#' + anchor if anchor else ''})"

    # Code stays as it is.
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(turned, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(turned, markdown[end:])])


def _title(name: str) -> str:
    """Return the first heading of a Markdown file."""
    text = (ROOT / name).read_text("utf-8")
    return text.partition("# ")[2].partition("\n")[0].strip()


def _api_page(package: str) -> Iterator[str]:
    """Yield the lines of a package's page."""
    loader = griffe.GriffeLoader(search_paths=[ROOT, ROOT / "integrations", ROOT / "eval"])
    top = loader.load(package.partition(".")[0])
    shown: Any = top if "." not in package else top[package.partition(".")[2]]
    yield f"# {package}"
    yield ""
    yield _summary(shown)
    if package == "tokenprune.selectors":
        for name, place in sorted(_methods(shown).items()):
            yield f"## {name}"
            yield from _sections([place], level=3)
    else:
        yield from _sections(_names(shown))
    for place in API[package]:
        module, _, name = place.partition(":")
        if name:
            yield from _sections([f"{module}.{name}"])
            continue
        held = top[module.partition(".")[2]]
        yield f"## {module}"
        yield ""
        yield _summary(held)
        yield from _sections(_names(held), level=3)


def _summary(module: Any) -> str:
    return module.docstring.value if module.docstring else ""


def _sections(names: list[str], level: int = 2) -> Iterator[str]:
    for name in names:
        yield ""
        yield f"::: {name}"
        yield "    options:"
        yield f"      heading_level: {level}"
    yield ""


def _names(module: Any) -> list[str]:
    """Return the public names of a module: what it imports as itself, or else what it defines."""
    handed_on, own = [], []
    for name, member in module.members.items():
        if name.startswith("_"):
            continue
        if member.is_alias and _is_handed_on(module, member):
            handed_on.append(f"{module.path}.{name}")
        elif not member.is_alias and not member.is_module and member.docstring is not None:
            own.append(f"{module.path}.{name}")
    return sorted(handed_on or own, key=str.lower)


def _is_handed_on(module: Any, member: Any) -> bool:
    """Say whether an import is written ``from x import y as y``."""
    text = Path(module.filepath).read_text("utf-8")
    return re.search(rf"\bimport {member.name} as {member.name}$", text, flags=re.M) is not None


def _methods(package: Any) -> dict[str, str]:
    """Return name -> class, for every selector that is registered."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = {
        name: place.replace(":", ".")
        for name, place in project["entry-points"]["tokenprune.selectors"].items()
    }
    for module in package.modules.values():
        for kind in module.classes.values():
            # Only a class that can be registered has a name of its own.
            if not kind.is_alias and "name" in kind.members and kind.members["name"].value:
                found[ast.literal_eval(str(kind.members["name"].value))] = kind.path
    return found


_STYLE = """\
/* Wide tables and long signatures scroll by themselves, and not the page. */
.md-typeset table:not([class]) { display: block; overflow-x: auto; }
.md-typeset table:not([class]) code { white-space: nowrap; }
.md-typeset h2.doc-heading, .md-typeset h3.doc-heading { overflow-wrap: anywhere; }
.doc-contents { padding-left: 1rem; border-left: .1rem solid var(--md-default-fg-color--lightest); }
"""
