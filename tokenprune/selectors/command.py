"""`tokenprune methods`: the table of methods, what each looks at, its paper and its options."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "list the methods: what each looks at, its paper, its options and their defaults"
EXTRA = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments; the table is always whole."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from tokenprune.registry import NO_SELECTORS

    described = describe_methods()
    if arguments.json:
        import json

        print(json.dumps({"methods": described, "no_selectors": NO_SELECTORS}, indent=2))
        return 0
    width = max(len(name) for name in described)
    for name, about in described.items():
        print(f"{name:<{width}}  {about['summary']}")
        lines = [
            ("paper", about["paper"] or "none: a baseline"),
            ("needs", ", ".join(about["needs"]) or "nothing but the number of tokens"),
            *(("option", f"{option}={value!r}") for option, value in about["options"].items()),
        ]
        for label, text in lines:
            print(f"{'':<{width}}  {label + ':':<7} {text}")
    for name, text in NO_SELECTORS.items():
        print(f"\n{name} {text}")
    return 0


def describe_methods() -> dict[str, dict[str, Any]]:
    """Return name -> ``{"summary", "paper", "needs", "options"}``, options with their defaults."""
    import dataclasses

    from tokenprune.registry import methods

    return {
        name: {
            "summary": selector.summary,
            "paper": selector.paper,
            "needs": list(selector.needs),
            "options": {field.name: field.default for field in dataclasses.fields(selector)},
        }
        for name, selector in methods().items()
    }
