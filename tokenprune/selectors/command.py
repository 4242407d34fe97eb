"""`tokenprune methods`: the table of methods, what each looks at, its paper and its options."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.registry import Method

HELP = "list the methods: what each looks at, its paper, its options and their defaults"
EXTRA = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments; the table is always whole."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from tokenprune.registry import GROUPS, KINDS, listed

    every = listed()
    if arguments.json:
        print(json.dumps(as_json(every), indent=2))
        return 0
    width = max(map(len, every))
    print(f"{_sentence(KINDS['before'])}\n")
    for group, meaning in GROUPS.items():
        of_group = [method for method in every.values() if method.group == group]
        if of_group:
            print(f"{_sentence(meaning)}\n")
        for method in of_group:
            print(f"{method.name:<{width}}  {method.summary}")
            for label, text in _lines(method):
                print(f"{'':<{width}}  {label + ':':<7} {text}")
        if of_group:
            print()
    return 0


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _lines(method: Method) -> Iterator[tuple[str, str]]:
    """Yield what is printed below a method: a label, and what it labels."""
    yield "paper", method.paper or "none: a baseline"
    if method.kind == "before":
        yield "needs", ", ".join(method.needs) or "nothing but the number of tokens"
    if method.kind != "before" or method.call.startswith("tokenprune.select("):
        yield "call", method.call
    for option, default in method.options.items():
        yield "option", f"{option}={default!r}"


def as_json(every: dict[str, Method]) -> dict[str, Any]:
    """Return what ``tokenprune methods --json`` prints.

    Parameters
    ----------
    every
        What `tokenprune.registry.listed` returned.

    Returns
    -------
    dict
        ``"methods"`` are the selectors, which every command and function takes by name;
        ``"other_methods"`` those with a function of their own. Each is name -> fields of
        `tokenprune.registry.Method`. ``"no_selectors"``: name -> a sentence about each of the
        latter, for readers of what earlier releases printed.
    """
    selectors: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, method in every.items():
        fields = dataclasses.asdict(method)
        del fields["name"]
        (selectors if method.kind == "before" else others)[name] = fields
    sentences = {name: f"{every[name].summary}: call {every[name].call}" for name in others}
    return {"methods": selectors, "other_methods": others, "no_selectors": sentences}
