"""The documents, and the fenced blocks in them with what their comments say about testing.

A comment before a block says how a test runs it, and no reader of the page sees it::

    <!-- test: setup=talk -->        run it with what `setups.SETUPS["talk"]` prepares
    <!-- test: continues -->         run it behind the block of Python before it
    <!-- test: skip: the reason -->  do not run it

A block of Python without a comment runs on its own, in an empty folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = tuple(
    sorted(
        [
            *ROOT.glob("*.md"),
            *ROOT.glob("docs/*.md"),
            *ROOT.glob("examples/*.md"),
        ]
    )
)

_FENCE = re.compile(
    r"(?:^<!-- test: (?P<how>.+?) -->\n+)?"
    r"^```(?P<language>\S*)\n(?P<code>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
_HOW = re.compile(r"setup=(?P<setup>[\w-]+)|(?P<continues>continues)|skip: (?P<skip>\S.+)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes
    ----------
    document, line
        Where its fence is; lines count from 1.
    language
        Behind the fence.
    code
        What is in it.
    how
        What the comment before it says, or "".
    """

    document: Path
    line: int
    language: str
    code: str
    how: str

    @property
    def place(self) -> str:
        """The document and the line, as an editor takes them."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    def said(self, what: str) -> str:
        """Return what the comment says of ``"setup"``, ``"continues"`` or ``"skip"``, or ""."""
        match = _HOW.fullmatch(self.how)
        return (match[what] or "") if match else ""

    def is_understood(self) -> bool:
        """Say whether the comment, if there is one, says something."""
        return not self.how or _HOW.fullmatch(self.how) is not None


def blocks_of(document: Path) -> list[Block]:
    """Return the fenced blocks of a document."""
    text = document.read_text("utf-8")
    return [
        Block(
            document,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            match["code"],
            match["how"] or "",
        )
        for match in _FENCE.finditer(text)
    ]


BLOCKS = tuple(block for document in DOCUMENTS for block in blocks_of(document))
