"""Models and trained selectors that packages bring are found by their name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenprune import entries
from tokenprune.errors import MissingPackageError, RegistryError
from tokenprune.providers import BUNDLED_MODELS, model_path, selector_path

CODE = """
from pathlib import Path

def folder():
    return Path(__file__).with_name("weights")

def number():
    return 3
"""


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, models: str = "", selectors: str = ""
) -> None:
    """Lay out what installing a package with these entry points would."""
    (folder / "provider_of_a_test.py").write_text(CODE)
    (folder / "broken_provider_of_a_test.py").write_text("import a_package_that_is_not_there\n")
    info = folder / "provider_of_a_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: provider-of-a-test\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        f"[tokenprune.models]\n{models}\n[tokenprune.trained_selectors]\n{selectors}\n"
    )
    monkeypatch.syspath_prepend(str(folder))


def test_a_package_brings_a_model_and_a_selector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(
        tmp_path,
        monkeypatch,
        models="my-vlm = provider_of_a_test:folder",
        selectors="mine = provider_of_a_test:folder",
    )
    assert model_path("my-vlm") == str(tmp_path / "weights")
    assert selector_path("mine") == tmp_path / "weights"
    # The groups are apart, and what nobody brings stays what it is.
    assert model_path("mine") == "mine"
    assert model_path("someone/my-vlm") == "someone/my-vlm"
    assert model_path(Path("bundled") / "x") == "bundled/x"
    assert model_path("./my-vlm") == "./my-vlm"
    assert selector_path("a/folder") == Path("a/folder")


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_bundled_models_are_checkpoints(name: str) -> None:
    folder = Path(model_path(name))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in folder.iterdir()
    }


def test_the_bundled_model_has_a_selector() -> None:
    assert {"config.json", "model.safetensors"} <= {
        file.name for file in selector_path("bundled").iterdir()
    }


def test_without_what_brings_it_bundled_is_no_name_for_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entries, "_read", lambda *_: {})
    for find, name in (
        *((model_path, name) for name in BUNDLED_MODELS),
        (selector_path, "bundled"),
    ):
        with pytest.raises(MissingPackageError, match=r"pip install 'tokenprune-vlm\[demo\]'"):
            find(name)


@pytest.mark.parametrize(
    ("target", "kind", "said"),
    [
        (
            "broken_provider_of_a_test:folder",
            MissingPackageError,
            "needs the package 'a_package_that_is_not_there', which is not installed",
        ),
        ("provider_of_a_test:gone", RegistryError, "cannot be loaded from provider_of_a_test:gone"),
        ("provider_of_a_test:number", RegistryError, "must return the path of a folder"),
    ],
)
def test_a_provider_that_does_not_work(
    target: str,
    kind: type[Exception],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(tmp_path, monkeypatch, models=f"my-vlm = {target}")
    with pytest.raises(kind, match=said):
        model_path("my-vlm")


def test_two_packages_with_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, models="bundled = provider_of_a_test:folder")
    with pytest.raises(RegistryError, match="two models are called 'bundled'"):
        model_path("bundled")
