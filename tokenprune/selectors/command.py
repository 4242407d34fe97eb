"""`tokenprune methods`: the table of methods, what each looks at, its paper and its options."""

from __future__ import annotations

import argparse

HELP = "list the methods: what each looks at, its paper, its options and their defaults"
EXTRA = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: the table is always whole."""


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    import dataclasses

    from tokenprune.registry import NO_SELECTORS, methods

    classes = methods()
    width = max(len(name) for name in classes)
    for name, selector in classes.items():
        print(f"{name:<{width}}  {selector.summary}")
        lines = [
            ("paper", selector.paper or "none: a baseline"),
            ("needs", ", ".join(selector.needs) or "nothing but the number of tokens"),
            *(
                ("option", f"{field.name}={field.default!r}")
                for field in dataclasses.fields(selector)
            ),
        ]
        for label, text in lines:
            print(f"{'':<{width}}  {label + ':':<7} {text}")
    for name, text in NO_SELECTORS.items():
        print(f"\n{name} {text}")
    return 0
