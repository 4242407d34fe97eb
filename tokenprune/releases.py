"""The releases of the engines that were tested, and one warning where another one is found.

The bounds in pyproject.toml are the same numbers. Another release (installed with ``--no-deps`` or
from source) may work: engines rename things, and the names that are known to have changed are
looked up.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass

from tokenprune.errors import UntestedReleaseWarning


@dataclass(frozen=True)
class Releases:
    """What was tested of an engine, from `oldest` to `newest`, both as (major, minor).

    A bugfix release counts as its minor release.
    """

    oldest: tuple[int, int]
    newest: tuple[int, int]

    @property
    def requirement(self) -> str:
        """The range as pyproject.toml says it: ``">=5.19,<5.25"``."""
        major, minor = self.newest
        return f">={_said(self.oldest)},<{major}.{minor + 1}"

    def covers(self, version: str) -> bool:
        """Say whether a version's (major, minor) was tested; one that cannot be read was not."""
        numbers = re.match(r"(\d+)\.(\d+)", version)
        return numbers is not None and (
            self.oldest <= (int(numbers.group(1)), int(numbers.group(2))) <= self.newest
        )


TESTED = {
    "transformers": Releases((5, 19), (5, 24)),
    "vllm": Releases((0, 32), (0, 33)),
}
"""Engine -> what was tested, by `scripts/test` and by hand."""

_WARNED = "TOKENPRUNE_WARNED_OF"
"""The environment variable with the engines that were warned of.

vLLM starts several processes, and each loads the plugin: what one has said, those that it starts
inherit and do not say again.
"""


def warn_untested(engine: str, version: str) -> None:
    """Warn, once for each engine in a process and those that it starts, of an untested release.

    Parameters
    ----------
    engine
        A key of `TESTED`.
    version
        What is running.
    """
    tested = TESTED[engine]
    warned = os.environ.get(_WARNED, "").split()
    if engine in warned or tested.covers(version):
        return
    os.environ[_WARNED] = " ".join([*warned, engine])
    warnings.warn(
        f"{engine} {version} was not tested with this tokenprune; {_said(tested.oldest)} to "
        f"{_said(tested.newest)} were. If it fails or answers oddly, install "
        f"'{engine}{tested.requirement}', or a newer tokenprune.",
        UntestedReleaseWarning,
        stacklevel=2,
    )


def _said(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
