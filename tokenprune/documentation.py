"""`tokenprune docs`: the pages of documentation that come with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenprune.errors import InputFileError, did_you_mean

HELP = "print a page of the documentation, or list the pages"
EXTRA = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "topic", nargs="?", metavar="TOPIC", help="what to print (default: the list of pages)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the page or the list."""
    pages = find_pages()
    if arguments.topic is None:
        width = max(map(len, pages))
        for topic, file in pages.items():
            print(f"{topic:<{width}}  {_title(file)}")
        return 0
    topic = arguments.topic.removesuffix(".md")
    if topic not in pages:
        raise InputFileError(f"there is no page {topic!r}. {did_you_mean(topic, pages)}")
    print(pages[topic].read_text("utf-8"), end="")
    return 0


def find_pages() -> dict[str, Path]:
    """Return topic -> its Markdown file.

    Raises
    ------
    InputFileError
        If the package was installed without them.
    """
    package = Path(__file__).parent
    # A wheel has them inside the package, a checkout beside it.
    for folder in (package / "docs", package.parent / "docs"):
        if files := sorted(folder.glob("*.md")):
            return {file.stem: file for file in files}
    raise InputFileError(
        f"there is no documentation in {package / 'docs'}. Install tokenprune-vlm anew."
    )


def _title(file: Path) -> str:
    """Return the first heading of a page."""
    for line in file.read_text("utf-8").splitlines():
        if line.startswith("# "):
            return line.removeprefix("# ")
    return file.stem
