"""Packages beside torch and numpy that a part of tokenprune imports, and what installs them.

A subcommand says in its ``needs`` all that it will import, up to its last stage, and
`check_packages` looks for them before the first: a package that only the report needs must not be
missed when the answers are there. What depends on settings or on the data is checked by the same
function as soon as these are known.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from tokenprune import DISTRIBUTION as DISTRIBUTION
from tokenprune.errors import MissingPackageError


@dataclass(frozen=True)
class Package:
    """A package that is looked for.

    Attributes
    ----------
    module
        What is imported.
    install
        What ``pip install`` is told where the subcommand's own extra does not bring it.
    hint
        A sentence to put behind the advice.
    """

    module: str
    install: str = ""
    hint: str = ""

    def is_there(self) -> bool:
        """Say whether it can be found; it is not imported."""
        try:
            spec = importlib.util.find_spec(self.module)
        except ImportError:
            return False
        except ValueError:  # imported already, from something that is no file
            return True
        # A folder of that name without code, found in the working directory, has no origin.
        return spec is not None and spec.origin is not None


def check_packages(packages: Iterable[Package], extra: str, who: str) -> None:
    """Make sure that all packages are there.

    Parameters
    ----------
    packages
        What will be imported.
    extra
        Of this distribution; brings them.
    who
        What needs them, as the beginning of a sentence.

    Raises
    ------
    MissingPackageError
        Naming all that are missing and the command that installs them.
    """
    missing = [one for one in dict.fromkeys(packages) if not one.is_there()]
    if missing:
        raise missing_packages(missing, extra, who)


def missing_packages(missing: Iterable[Package], extra: str, who: str) -> MissingPackageError:
    """Return the error for packages that are known to be missing; see `check_packages`."""
    missing = list(missing)
    names = ", ".join(one.module for one in missing)
    noun = "package" if len(missing) == 1 else "packages"
    verb = "is" if len(missing) == 1 else "are"
    hints = "".join(f" {one.hint}" for one in missing if one.hint)
    return MissingPackageError(
        f"{who} needs the {noun} {names}, which {verb} not installed. Install what is missing "
        f"with: {install_command(missing, extra)}{hints}"
    )


def install_command(packages: Iterable[Package], extra: str) -> str:
    """Return the line for a shell that installs packages."""
    packages = list(packages)
    own = f"'{DISTRIBUTION}[{extra}]'"
    told = sorted({one.install or own for one in packages}, key=lambda text: text != own)
    # One after the other: an option such as --no-deps holds for the whole of a command.
    return " && ".join(f"pip install {text}" for text in told)
