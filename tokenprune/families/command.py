"""`tokenprune models`: every model type and architecture, and how well each engine prunes it."""

from __future__ import annotations

import argparse
import json
from typing import Any

HELP = "list the models: how well each is supported in transformers and in vLLM"
EXTRA = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="types or architectures, or parts of their names (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables."""
    from tokenprune.families.checked import ENGINES, level, notes, read_checked

    checked = read_checked()
    found = {
        engine: {
            name: {"level": level(engine, name, entry), **entry}
            for name, entry in sorted(checked[engine].items())
            if _asked(name, entry, arguments.names)
        }
        for engine in ENGINES
    }
    if arguments.json:
        about = {name: value for name, value in checked.items() if name not in ENGINES}
        print(json.dumps({**about, **found}, indent=2))
        return 0
    titles = {
        "transformers": f"Types of transformers {checked['listed']}, tested {checked['date']}.",
        "vllm": f"Architectures of vLLM {checked['listed_vllm']}.",
    }
    for engine, models in found.items():
        print(f"{titles[engine]}\n")
        width = max(map(len, models), default=0)
        for name, entry in models.items():
            more = notes(entry)
            print(f"{name:<{width}}  {entry['level']}{f' ({more})' if more else ''}")
        if not models:
            print(f"none whose name has {' or '.join(arguments.names)} in it")
        print()
    print(
        "Any other model is pruned likewise if transformers hands it rows (mm_encoder_outputs), or "
        "vLLM\nruns it with images. See `tokenprune docs models`."
    )
    return 0


def _asked(name: str, entry: dict[str, Any], names: list[str]) -> bool:
    """Say whether one of the names is in a model's own, or in that of its class."""
    own = f"{name} {entry.get('class', '')}".lower()
    return not names or any(asked.lower() in own for asked in names)
