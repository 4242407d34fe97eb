"""CONTRIBUTING's pictures and words: what they name is there, and the arrows are the imports."""

from __future__ import annotations

import ast
import itertools
import re

import pytest

from tests.docs.blocks import BLOCKS, ROOT
from tests.house.test_imports import ALLOWED, IMPORTS, MODULES

PICTURES = [block for block in BLOCKS if block.language == "mermaid"]
GUARD = "tokenprune_vlm"
_NAME = re.compile(r"\btokenprune(?:_\w+)?(?:\.\w+)*")
_ROW = re.compile(r"^\| (?P<word>[^|]+) \| (?P<meaning>[^|]+) \| `(?P<place>[\w.]+)` \|$", re.M)


def is_there(name: str) -> bool:
    """Say whether a dotted name is a module, or defined at the top of one."""
    if name in MODULES:
        return True
    module, _, own = name.rpartition(".")
    if module not in MODULES:
        return False
    defined = set()
    for node in ast.parse(MODULES[module].read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    return own in defined


def reachable(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return all pairs of which the second is reached from the first."""
    found = set(edges)
    while more := {(a, d) for a, b in found for c, d in found if b == c} - found:
        found |= more
    return found


def words() -> list[re.Match[str]]:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    return list(_ROW.finditer(text.partition("## Words\n")[2].partition("\n## ")[0]))


def test_what_the_pictures_name_is_there() -> None:
    assert len(PICTURES) == 2
    for block in PICTURES:
        names = _NAME.findall(block.code)
        assert len(set(names)) >= 5, block.place
        missing = sorted({name for name in names if not is_there(name)})
        assert not missing, f"{block.place}: {missing}"


def test_the_arrows_between_packages_are_the_imports() -> None:
    edges = set(re.findall(r"^ +(tokenprune\w*) --> (tokenprune\w*)$", PICTURES[0].code, re.M))
    imported = {
        one.packages
        for one in IMPORTS
        if set(one.packages) <= ALLOWED.keys() - {GUARD} and len(set(one.packages)) == 2
    }
    assert reachable(edges) == imported


def test_every_way_in_the_second_picture_goes_through_the_library() -> None:
    arrows = set()
    for line in PICTURES[1].code.splitlines():
        nodes = [re.sub(r"\[.*", "", node).strip() for node in line.split("-->")]
        arrows |= set(itertools.pairwise(nodes))
    ways = reachable(arrows)
    for start in ("tokenprune_hf.pruning", "tokenprune_vllm.processor"):
        for step in ("tokenprune.tokens", "tokenprune.selectors", "tokenprune.selection", "model"):
            assert (start, step) in ways, (start, step)


def test_each_word_is_defined_once_and_is_in_the_code() -> None:
    rows = words()
    assert len(rows) > 25
    names = [row["word"] for row in rows]
    assert len(set(names)) == len(names)
    missing = [row["place"] for row in rows if not is_there(row["place"])]
    assert not missing


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("tokenprune.tokens", True),
        ("tokenprune.tokens.VisualTokens", True),
        ("tokenprune.config.Positions", True),
        ("tokenprune.tokens.Away", False),
        ("tokenprune.away", False),
        ("tokenprune.away.VisualTokens", False),
    ],
)
def test_a_name_that_is_not_there_is_found(name: str, there: bool) -> None:
    assert is_there(name) == there
