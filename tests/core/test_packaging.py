"""The built wheel holds everything and imports on its own, as the checkout does."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

_IMPORT_ALL = """
import importlib, json, pkgutil, sys
sys.path.insert(0, sys.argv[1])
found = {}
for name in ("tokenprune", "tokenprune_vlm", "tokenprune_hf", "tokenprune_eval"):
    package = importlib.import_module(name)
    found[name] = package.__file__
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
from tokenprune.documentation import find_pages
found["docs"] = str(find_pages()["serving"])
print(json.dumps(found))
"""


def test_wheel_imports_without_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run([*build, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("tokenprune_vlm-*.whl"))
    unpacked = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(unpacked)
    for package in ("tokenprune", "tokenprune_vlm", "tokenprune_hf", "tokenprune_eval"):
        assert f"{package}/py.typed" in names
    pages = {f"tokenprune/docs/{file.name}" for file in (ROOT / "docs").glob("*.md")}
    assert pages == {name for name in names if name.startswith("tokenprune/docs/")}
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    # Isolated mode leaves out the current folder; the wheel comes before the editable checkout.
    output = subprocess.run(
        [sys.executable, "-I", "-c", _IMPORT_ALL, str(unpacked)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    for name, file in json.loads(output).items():
        assert Path(file).is_relative_to(unpacked), name
