"""`tokenprune models`: what it says of each model, and of those that nobody knows."""

from __future__ import annotations

import json

import pytest

from tokenprune.cli import main
from tokenprune.families.checked import level
from tokenprune.families.registry import FAMILIES


def lines(capsys: pytest.CaptureFixture[str], *names: str) -> list[str]:
    assert main(["models", *names]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_models_are_listed_with_their_levels(capsys: pytest.CaptureFixture[str]) -> None:
    printed = lines(capsys)
    for line in (
        "qwen3_vl first class",
        "Qwen3VLForConditionalGeneration first class",
        "deepseek_ocr2 checked (newlines or separators stay)",
        "florence2 refused: it has an encoder for its text, where visual tokens cannot be dropped",
    ):
        assert line in printed


def test_some_are_asked_for_by_a_part_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    printed = lines(capsys, "Qwen2VL", "nobody")
    assert "qwen2_vl first class" in printed  # by the name of its class
    assert "Qwen2VLForConditionalGeneration first class" in printed
    assert not [line for line in printed if "qwen3" in line.lower()]
    assert lines(capsys, "nobody").count("none whose name has nobody in it") == 2


def test_json_has_what_is_known_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json", "aria"]) == 0
    found = json.loads(capsys.readouterr().out)
    aria = found["transformers"]["aria"]
    assert aria["level"] == "checked"
    assert "5.24.0" in aria["checked"]
    assert {"date", "listed", "listed_vllm", "vllm"} <= found.keys()


def test_levels() -> None:
    assert level("transformers", next(iter(FAMILIES)), {}) == "first class"
    assert level("transformers", "x", {}) == "generic, not tested"
    assert level("vllm", "x", {"family": True, "checked": ["0.32.0"]}) == "first class"
    assert level("vllm", "x", {"checked": ["0.32.0"]}) == "checked"
    refused = {"refused": {"5.9.0": "it was old", "5.24.0": "it is old"}}
    assert level("transformers", "x", refused) == "refused: it is old"
