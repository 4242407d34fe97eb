"""Imports point one way, between the packages and inside each; see `tests/house/imports.py`."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from tests.house.imports import (
    Import,
    circles,
    file_circles,
    imports_of,
    modules_of,
    room_circles,
    wrong_ways,
)

ROOT = Path(__file__).parents[2]

ALLOWED: dict[str, set[str]] = {
    "tokenprune": set(),
    # The guard looks at the package that Python finds, and starts the command.
    "tokenprune_vlm": {"tokenprune"},
    "tokenprune_hf": {"tokenprune", "tokenprune_vlm"},
    "tokenprune_vllm": {"tokenprune", "tokenprune_vlm"},
    "tokenprune_lmms_eval": {"tokenprune", "tokenprune_vlm", "tokenprune_hf"},
    "tokenprune_eval": {"tokenprune", "tokenprune_vlm", "tokenprune_hf", "tokenprune_vllm"},
}
"""Package -> those that it may import, at any time and in any way."""

ENGINES = {
    "tokenprune": {"transformers", "vllm", "lmms_eval"},
    "tokenprune_vlm": {"transformers", "vllm", "lmms_eval"},
    "tokenprune_hf": {"vllm", "lmms_eval"},
    "tokenprune_vllm": {"lmms_eval"},
    "tokenprune_lmms_eval": {"vllm"},
}
"""Package -> engines that it must not import."""

STARTS_WITH = {"torch", "numpy"}
"""What the library imports at its start, beside Python's own; all else inside functions."""

WITH_AN_EXTRA = {
    "tokenprune.media": {"PIL"},
    "tokenprune.greedy.fused": {"triton"},
    "tokenprune.masks.paged_kernels": {"triton"},
}
"""Rooms of the library that need more; only one that needs the same imports them at its start."""

MOST_ROOM_CIRCLES = 3
"""Circles of rooms, each a package and its own subpackages; lower it when one goes."""

FOLDERS = {
    "tokenprune": ROOT / "tokenprune",
    "tokenprune_vlm": ROOT / "tokenprune_vlm",
    "tokenprune_hf": ROOT / "integrations" / "tokenprune_hf",
    "tokenprune_vllm": ROOT / "integrations" / "tokenprune_vllm",
    "tokenprune_lmms_eval": ROOT / "integrations" / "tokenprune_lmms_eval",
    "tokenprune_eval": ROOT / "eval" / "tokenprune_eval",
}
MODULES = modules_of(FOLDERS)
IMPORTS = imports_of(MODULES)


def shown(imports: list[Import]) -> str:
    return "\n".join(f"{one.source}:{one.line} imports {one.target}" for one in imports)


def is_in(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


# This repository --------------------------------------------------------------------------------


def test_every_package_is_read() -> None:
    there = {
        path.parent.name
        for folder in (ROOT, ROOT / "integrations", ROOT / "eval")
        for path in folder.glob("tokenprune*/__init__.py")
    }
    assert there == FOLDERS.keys() == ALLOWED.keys()
    assert len(MODULES) > 150
    assert {one.when for one in IMPORTS} == {"start", "later", "typing", "string"}


def test_packages_import_one_way() -> None:
    wrong = wrong_ways(IMPORTS, ALLOWED)
    assert not wrong, shown(wrong)


def test_no_package_imports_an_engine_that_is_not_its_own() -> None:
    wrong = [
        one
        for one in IMPORTS
        if one.when != "typing" and one.packages[1] in ENGINES.get(one.packages[0], ())
    ]
    assert not wrong, shown(wrong)


def test_the_library_starts_with_torch_and_numpy_alone() -> None:
    ours = STARTS_WITH | sys.stdlib_module_names | FOLDERS.keys()
    wrong = []
    for one in IMPORTS:
        if one.packages[0] != "tokenprune" or one.when != "start":
            continue
        extra = {room: more for room, more in WITH_AN_EXTRA.items() if is_in(one.source, room)}
        known = ours.union(*extra.values())
        into = [
            room
            for room, more in WITH_AN_EXTRA.items()
            if is_in(one.target, room) and not more <= known
        ]
        if one.packages[1] not in known or into:
            wrong.append(one)
    assert not wrong, shown(wrong)


def test_no_circle_of_files() -> None:
    assert file_circles(IMPORTS) == []


def test_imports_inside_functions_make_no_circle_either() -> None:
    edges = [(one.source, one.target) for one in IMPORTS if one.when in ("start", "later")]
    assert circles(edges) == []


def test_rooms_are_in_circles_with_their_own_subrooms_alone() -> None:
    found = room_circles(IMPORTS, MODULES)
    assert len(found) <= MOST_ROOM_CIRCLES, found
    assert all(len({room.partition(".")[0] for room in circle}) == 1 for circle in found), found


def test_entry_points_lead_to_modules() -> None:
    """They are the one way up: a package below may name a module above there, and nowhere else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = {"scripts": project["scripts"], **project["entry-points"]}
    for group, entries in groups.items():
        for name, value in entries.items():
            assert value.partition(":")[0] in MODULES, f"{group}: {name}"


# The reader itself ------------------------------------------------------------------------------


def written(folder: Path, files: dict[str, str]) -> dict[str, Path]:
    """Write packages `low` and `high` and return their modules."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for package in path.relative_to(folder).parents:
            if package.name:
                (folder / package / "__init__.py").touch()
    return modules_of({name: folder / name for name in ("low", "high")})


UPWARDS = {
    "import": "import high.tool",
    "with another name": "import os, high.tool as own",
    "from": "from high.tool import use",
    "of a module": "from high import tool",
    "in a function": "def run():\n    from high import tool",
    "in a method": "class A:\n    async def run(self):\n        import high.tool",
    "in a condition": "try:\n    import high.tool\nexcept ImportError:\n    pass",
    "for type checkers": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from high.tool import use"
    ),
    "import_module": "import importlib\nimportlib.import_module('high.tool')",
    "import_module, bare": "from importlib import import_module\nimport_module('high')",
    "__import__": "__import__('high.tool')",
    "find_spec": "from importlib.util import find_spec\nfind_spec('high.tool')",
    "an f-string": "def load(name):\n    return __import__(f'high.{name}')",
    "a table of strings": "HOMES = {'tool': 'high.tool:use'}",
    "a default": "def load(name='high.tool.use'):\n    return __import__(name)",
    "lazy names": "__all__, __getattr__, __dir__ = lazy_names('low', {'use': 'high.tool'})",
}


@pytest.mark.parametrize("text", UPWARDS.values(), ids=UPWARDS.keys())
def test_every_way_up_is_seen(text: str, tmp_path: Path) -> None:
    modules = written(tmp_path, {"low/a/b.py": text, "high/tool.py": "import low.a.b\nuse = 1"})
    (wrong,) = wrong_ways(imports_of(modules), {"low": set(), "high": {"low"}})
    assert wrong.source == "low.a.b"
    assert wrong.target in ("high", "high.tool")
    assert text.splitlines()[wrong.line - 1].count("high")


@pytest.mark.parametrize(
    "text",
    [
        '"""Is used by `high.tool`."""',
        "def run():\n    '''high.tool'''",
        "message = 'see high.tool for more'",
        "def call(name):\n    return f'high.tool.use({name})'",
        "import highest",
    ],
)
def test_what_is_no_import_is_not_taken_for_one(text: str, tmp_path: Path) -> None:
    modules = written(tmp_path, {"low/a.py": text, "high/tool.py": ""})
    assert wrong_ways(imports_of(modules), {"low": set(), "high": {"low"}}) == []


def test_relative_imports_are_resolved(tmp_path: Path) -> None:
    modules = written(
        tmp_path,
        {
            "low/a/b.py": "from . import c\nfrom .c import x\nfrom ..d import y\nfrom .. import d",
            "low/a/c.py": "x = 1",
            "low/d.py": "y = 1",
        },
    )
    (tmp_path / "low/a/__init__.py").write_text("from .c import x\nfrom .. import d")
    found = [(one.source, one.target, one.line) for one in imports_of(modules)]
    assert sorted(found) == [
        ("low.a", "low.a.c", 1),
        ("low.a", "low.d", 2),
        ("low.a.b", "low.a.c", 1),
        ("low.a.b", "low.a.c", 2),
        ("low.a.b", "low.d", 3),
        ("low.a.b", "low.d", 4),
    ]


def test_circles_of_files_are_found(tmp_path: Path) -> None:
    files = {
        "low/a.py": "from low import b",
        "low/b.py": "from .c import x",
        "low/c.py": "import low.a\nx = 1",
        "low/d.py": "import low.a",
    }
    modules = written(tmp_path, files)
    assert file_circles(imports_of(modules)) == [{"low.a", "low.b", "low.c"}]
    later = written(tmp_path, {**files, "low/c.py": "def run():\n    import low.a\nx = 1"})
    assert file_circles(imports_of(later)) == []
    edges = [(one.source, one.target) for one in imports_of(later)]
    assert circles(edges) == [{"low.a", "low.b", "low.c"}]


def test_circles_of_rooms_are_found(tmp_path: Path) -> None:
    files = {
        "low/one/a.py": "from low.two.b import x",
        "low/two/b.py": "x = 1",
        "low/two/c.py": "def run():\n    import low.one.d",
        "low/one/d.py": "",
    }
    modules = written(tmp_path, files)
    assert file_circles(imports_of(modules)) == []
    assert room_circles(imports_of(modules), modules) == [{"low.one", "low.two"}]
    modules = written(tmp_path, {**files, "low/two/c.py": ""})
    assert room_circles(imports_of(modules), modules) == []
