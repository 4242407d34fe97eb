"""Old names lead to what has moved, and warn whoever uses them."""

from __future__ import annotations

import importlib
import tomllib
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tokenprune import moved as module
from tokenprune.errors import RegistryError
from tokenprune.moved import GROUP, moved, moved_names

ROOT = Path(__file__).parents[2]
ENTRIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]


@pytest.mark.parametrize("old", ENTRIES)
def test_every_old_name_is_the_new_one(old: str) -> None:
    """Also by the old name's own import, whatever stands in its place."""
    new = EntryPoint(old, ENTRIES[old], GROUP)
    pytest.importorskip(new.module.partition(".")[0])
    with pytest.warns(DeprecationWarning, match=f"^{old} is {ENTRIES[old].replace(':', '.')} now"):
        assert moved(old) is new.load()
    package, _, name = old.rpartition(".")
    if new.attr:
        with pytest.warns(DeprecationWarning, match=f"^{old} is"):
            assert getattr(importlib.import_module(package), name) is new.load()
        return
    place = importlib.import_module(old)
    public = next(name for name in dir(new.load()) if name[0].isalpha() and name != "annotations")
    with pytest.warns(DeprecationWarning, match=f"^{old} is"):
        assert getattr(place, public) is getattr(new.load(), public)


def test_who_uses_an_old_name_is_told_and_not_who_looks_for_other_names() -> None:
    with pytest.warns(DeprecationWarning, match="video.Video|video is") as caught:
        from tokenprune_hf.video import Video  # noqa: F401
    assert {one.filename for one in caught} == {__file__}
    place = importlib.import_module("tokenprune_hf.video")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("__path__", "__wrapped__", "__all__"):
            assert not hasattr(place, name)


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    with (
        pytest.warns(DeprecationWarning, match="video is"),
        pytest.raises(AttributeError, match="never"),
    ):
        moved_names("tokenprune_hf.video")("never")


def test_entry_points_of_another_version_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "unique_entries", lambda *_: {})
    with pytest.raises(RegistryError, match=r"tokenprune_hf\.video has moved.*pip install"):
        moved("tokenprune_hf.video")
