"""Make sure that the package `tokenprune` which Python finds is the one of this distribution.

Another project is called ``tokenprune`` on PyPI and installs a top-level package of the same name.
Where that one lies earlier on the path, or was installed over ours, every import would end in an
error that explains nothing. So the command starts here, and the packages beside `tokenprune` import
`tokenprune_vlm.checked` first. Nothing of `tokenprune` is imported here but the package itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

DISTRIBUTION = "tokenprune-vlm"
"""The name under which pip knows these packages; ``tokenprune.DISTRIBUTION`` says the same."""


class ForeignPackageError(ImportError):
    """Python finds another project's package `tokenprune` in the place of ours."""


def check() -> None:
    """Raise unless `tokenprune` is this distribution's.

    Raises
    ------
    ForeignPackageError
        Saying what was found, and how to put it right.
    """
    import tokenprune

    if getattr(tokenprune, "DISTRIBUTION", None) == DISTRIBUTION:
        return
    # Without an __init__.py, as an uninstallation of the other one leaves it, there is no file.
    found = getattr(tokenprune, "__file__", None) or ", ".join(getattr(tokenprune, "__path__", []))
    raise ForeignPackageError(
        f"the package `tokenprune` in {found} is not the one of {DISTRIBUTION}: another project "
        "has that name on PyPI. Remove it with: pip uninstall tokenprune. Then put ours back, from "
        "the checkout or the wheel that you installed: "
        "pip install --force-reinstall --no-deps CHECKOUT_OR_WHEEL",
        name="tokenprune",
        path=getattr(tokenprune, "__file__", None),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `tokenprune` and return its exit status."""
    try:
        check()
    except ForeignPackageError as error:
        print(f"tokenprune: {error}", file=sys.stderr)
        return 2
    from tokenprune.cli import main as command

    return command(argv)
