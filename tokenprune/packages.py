"""Packages beside torch and numpy that a part of tokenprune imports, and what installs them.

A subcommand lists in its ``needs`` all packages that it will import, up to its last stage.
`check_packages` looks for them before the first stage, so that a run does not fail at its report
for a missing package. What depends on settings or on the data is checked by the same function as
soon as these are known.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from tokenprune.errors import MissingPackageError

DISTRIBUTION = "tokenprune-vlm"
"""The name under which pip knows this package."""


@dataclass(frozen=True)
class Package:
    """A package that is looked for.

    Attributes
    ----------
    module
        What is imported.
    install
        The argument of ``pip install``, if the subcommand's own extra does not install it.
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


TRANSFORMERS = (Package("transformers"), Package("torchvision"), Package("PIL"))
"""What a model of transformers and its processor need; vLLM reads configurations with them."""


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
    missing = [package for package in dict.fromkeys(packages) if not package.is_there()]
    if missing:
        raise missing_packages(missing, extra, who)


def missing_packages(missing: Iterable[Package], extra: str, who: str) -> MissingPackageError:
    """Return the error for packages that are known to be missing; see `check_packages`."""
    missing = list(missing)
    names = ", ".join(package.module for package in missing)
    noun = "package" if len(missing) == 1 else "packages"
    verb = "is" if len(missing) == 1 else "are"
    hints = "".join(f" {package.hint}" for package in missing if package.hint)
    return MissingPackageError(
        f"{who} needs the {noun} {names}, which {verb} not installed. Install what is missing "
        f"with: {install_command(missing, extra)}{hints}"
    )


def install_command(packages: Iterable[Package], extra: str) -> str:
    """Return the shell command that installs packages."""
    packages = list(packages)
    of_extra = f"'{DISTRIBUTION}[{extra}]'"
    arguments = sorted(
        {package.install or of_extra for package in packages}, key=lambda text: text != of_extra
    )
    # A command each: an option such as --no-deps applies to all packages of its command.
    return " && ".join(f"pip install {text}" for text in arguments)
