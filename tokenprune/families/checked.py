"""How well each model is supported in each engine: what tests found, as checked.json has it.

The file is written by `scripts/update_models.py`; docs/models.md and ``tokenprune models`` say what
is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from tokenprune.families.registry import FAMILIES

FILE = "checked.json"
"""Beside this module."""

ENGINES = ("transformers", "vllm")
"""Of transformers, types are listed; of vLLM, architectures."""

OWN_FUNCTION = {
    "mllama": "pruned by its own function, [trimmed-attention.md](trimmed-attention.md)"
}
"""Types that `prune` does not take."""

Entry = Mapping[str, Any]
"""What is known of one model: the releases under which tests ``checked`` it, and under which it is
``refused`` or the engine itself has a ``fault``, with the reason; its ``positions``, what is
particular to its ``attention``, rows that ``stay``; and why it is ``untested``."""


def read_checked() -> dict[str, Any]:
    """Return the file: a table for each of `ENGINES`, of when and of which release."""
    text = files("tokenprune.families").joinpath(FILE).read_text("utf-8")
    checked: dict[str, Any] = json.loads(text)
    return checked


def first_class(engine: str, name: str, entry: Entry) -> bool:
    """Say whether a model is of a family."""
    if engine == "vllm":
        return bool(entry.get("family"))
    return name in FAMILIES and FAMILIES[name].in_transformers


def level(engine: str, name: str, entry: Entry) -> str:
    """Return how well a model is supported in an engine.

    Parameters
    ----------
    engine
        One of `ENGINES`.
    name
        A type of transformers, or an architecture of vLLM.
    entry
        What is known of it.

    Returns
    -------
    str
        ``"first class"``, ``"checked"``, ``"generic, not tested"``, or ``"refused: "`` and why.
    """
    if engine == "transformers" and name in OWN_FUNCTION:
        return OWN_FUNCTION[name]
    if first_class(engine, name, entry):
        return "first class"
    if "checked" in entry:
        return "checked"
    if "refused" in entry:
        return f"refused: {entry['refused'][max(entry['refused'], key=version_of)]}"
    return "generic, not tested"


def notes(entry: Entry) -> str:
    """Return what is particular to a model."""
    fault = entry.get("fault", {})
    parts = [
        entry.get("attention", ""),
        entry.get("stays", ""),
        "" if "checked" in entry else entry.get("untested", ""),
        *(f"{release} fails itself: {why}" for release, why in sorted(fault.items())),
    ]
    return "; ".join(part for part in parts if part)


def in_vllm(entry: Entry, vllm: Mapping[str, Entry]) -> str:
    """Return the level of a type's class in vLLM; nothing where that has none of the same name."""
    name = entry.get("class", "")
    return level("vllm", name, vllm[name]) if name in vllm else ""


def version_of(release: str) -> list[int]:
    """Return a release as numbers, to be compared."""
    return [int(part) for part in release.split(".")]
