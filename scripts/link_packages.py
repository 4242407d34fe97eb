"""Link packages of this environment into another one: ``link_packages.py REPORT ENVIRONMENT``.

REPORT is what ``pip install --dry-run --report`` wrote. Of the packages it lists, those that are
here in the same release are linked, file by file, into the folder ENVIRONMENT; all others, but for
this project, are printed as requirements for pip.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path


def link(package: Distribution, site: Path) -> None:
    """Give `site` the files of a package that lie beside each other, scripts left out."""
    for file in package.files or []:
        if ".." in file.parts:
            continue  # commands, man pages
        target = site / file
        if target.exists():
            continue  # a file of several packages; to write over it would reach through the link
        target.parent.mkdir(parents=True, exist_ok=True)
        source = package.locate_file(file)
        try:
            os.link(source, target)
        except FileNotFoundError:
            continue  # listed, and removed since: compiled files of an older interpreter
        except OSError:  # another file system
            shutil.copyfile(source, target)


def main() -> None:
    """Read the report, link what is here and print what is not."""
    report, environment = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    for entry in report["install"]:
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        if name == "tokenprune-vlm":
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            package = None
        if package is not None and package.version == version:
            link(package, site)
        else:
            print(f"{name}=={version}")


if __name__ == "__main__":
    main()
