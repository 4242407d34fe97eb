"""docs/models.md: written from checked.json alone, which is made of the tests' results."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.blocks import ROOT

JUNIT = """<testsuites><testsuite>
<testcase name="a"><properties>
  <property name="transformers" value="aria"/><property name="release" value="5.24.0"/>
  <property name="positions" value="3 axes"/>
</properties></testcase>
<testcase name="b"><properties>
  <property name="transformers" value="git"/><property name="release" value="5.24.0"/>
  <property name="refused" value="it is old"/>
</properties></testcase>
<testcase name="c"><properties>
  <property name="transformers" value="fuyu"/><property name="release" value="5.24.0"/>
</properties><failure message="no"/></testcase>
<testcase name="d"><properties>
  <property name="vllm" value="AriaForConditionalGeneration"/>
  <property name="release" value="0.32.0"/>
</properties></testcase>
<testcase name="e"/>
</testsuite></testsuites>"""


def script() -> ModuleType:
    """Return scripts/update_models.py as a module."""
    spec = importlib.util.spec_from_file_location("models", ROOT / "scripts" / "update_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT: Any = script()


def checked() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(SCRIPT.CHECKED.read_text("utf-8"))
    return content


def test_the_page_is_what_the_script_writes() -> None:
    assert SCRIPT.PAGE.read_text("utf-8") == SCRIPT.page(checked()), "scripts/update_models.py"


def test_the_readme_counts_what_is_tested() -> None:
    found = re.search(
        r"(\d+) types of transformers and (\d+)\s+architectures of vLLM are tested",
        (ROOT / "README.md").read_text("utf-8"),
    )
    assert found is not None
    of_vllm = checked()["vllm"].values()
    assert [int(number) for number in found.groups()] == [
        sum("checked" in entry for entry in checked()["transformers"].values()),
        sum("checked" in entry or bool(entry.get("family")) for entry in of_vllm),
    ]


def test_most_types_are_checked() -> None:
    of_newest = [
        kind
        for kind, entry in checked()["transformers"].items()
        if "5.24.0" in entry.get("checked", [])
    ]
    assert len(of_newest) >= 60


def test_results_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "models.xml"
    file.write_text(JUNIT)
    known: dict[str, Any] = {
        "date": "2026-01-01",
        "listed": "5.24.0",
        "listed_vllm": "0.32.0",
        "transformers": {
            "aria": {"checked": ["5.19.0"], "class": "AriaForConditionalGeneration"},
            "fuyu": {"checked": ["5.19.0", "5.24.0"]},
            "git": {"checked": ["5.24.0"]},
            "llava": {"checked": ["5.19.0"]},
        },
        "vllm": {},
    }
    SCRIPT.merge(known, list(SCRIPT.results(file)))
    types = known["transformers"]
    assert types["aria"]["checked"] == ["5.19.0", "5.24.0"]
    assert types["aria"]["positions"] == "3 axes"
    assert types["fuyu"] == {"checked": ["5.19.0"]}  # it failed
    assert types["git"] == {"refused": {"5.24.0": "it is old"}}
    assert types["llava"] == {"checked": ["5.19.0"]}
    again = copy.deepcopy(known)
    SCRIPT.merge(again, list(SCRIPT.results(file)))
    assert again == known
    page = SCRIPT.page(known)
    assert "| `aria` | checked | 5.19.0, 5.24.0 |  | 3 axes |  | checked |" in page
    assert "| `git` | refused: it is old |" in page
    assert "| `llava` | first class |" in page
    assert "| `AriaForConditionalGeneration` | checked | 0.32.0 |" in page


def test_why_nothing_was_tested_is_said_until_it_is() -> None:
    known: dict[str, Any] = {
        "date": "2026-01-01",
        "listed": "5.24.0",
        "listed_vllm": "0.32.0",
        "transformers": {},
        "vllm": {"Phi3VForCausalLM": {"untested": "it has newlines"}},
    }
    assert "| generic, not tested |  | it has newlines |" in SCRIPT.page(known)
    known["vllm"]["Phi3VForCausalLM"]["checked"] = ["0.32.0"]
    assert "it has newlines" not in SCRIPT.page(known)


def test_the_script_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "models.xml"
    file.write_text(JUNIT)
    start = {"date": "", "listed": "0.0.0", "listed_vllm": "", "transformers": {}, "vllm": {}}
    monkeypatch.setattr(SCRIPT, "CHECKED", tmp_path / "checked.json")
    monkeypatch.setattr(SCRIPT, "PAGE", tmp_path / "models.md")
    SCRIPT.CHECKED.write_text(json.dumps(start))
    monkeypatch.setattr(sys, "argv", ["update_models.py", str(file)])
    SCRIPT.main()
    written = checked()
    assert written["transformers"]["aria"]["checked"] == ["5.24.0"]
    assert written["transformers"]["llava"]["class"] == "LlavaForConditionalGeneration"
    assert SCRIPT.PAGE.read_text() == SCRIPT.page(written)


def test_every_type_of_this_release_is_listed() -> None:
    known: dict[str, Any] = {"listed": "0.0.0", "transformers": {}, "vllm": {}}
    SCRIPT.list_types(known)
    here = {kind for kind in known["transformers"]}
    assert here - checked()["transformers"].keys() == set()
