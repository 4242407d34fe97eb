"""Print what an extra of this project asks for, without upper bounds: one requirement a line.

For trying out releases that are newer than any that was tested. Needs no package.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PROJECT: dict[str, Any] = tomllib.loads(
    (Path(__file__).parents[1] / "pyproject.toml").read_text()
)["project"]


def requirements(extra: str) -> Iterator[str]:
    """Yield the requirements of an extra, those of the extras that it contains in their place."""
    for requirement in _PROJECT["optional-dependencies"][extra]:
        inside = re.fullmatch(rf"{_PROJECT['name']}\[(.+)\]", requirement)
        if inside:
            for name in inside.group(1).split(","):
                yield from requirements(name)
        else:
            yield requirement


if __name__ == "__main__":
    asked = [*_PROJECT["dependencies"], *requirements(sys.argv[1])]
    for one in dict.fromkeys(asked):
        print(re.sub(r",\s*<=?[^,;]+", "", one))
