"""One thing is written one way in every subcommand: the model, the methods, their options."""

from __future__ import annotations

import argparse
import shlex
from importlib.metadata import entry_points
from typing import Any

import pytest

from tokenprune.arguments import Parser, add_model, options_by_method, parse_options
from tokenprune.cli import GROUP, main
from tokenprune.errors import OptionError, UnknownMethodError


def parsed(monkeypatch: pytest.MonkeyPatch, line: str) -> dict[str, Any]:
    """Return what a subcommand is given for a command line; it is not run."""
    words = shlex.split(line)
    (entry,) = entry_points(group=GROUP, name=words[0])
    seen: list[argparse.Namespace] = []

    def run(arguments: argparse.Namespace) -> int:
        seen.append(arguments)
        return 0

    command = entry.load()
    monkeypatch.setattr(command, "run", run)
    # Nothing is done here, so that the packages for it (vLLM for one) may be missing.
    monkeypatch.setattr(command, "needs", lambda arguments: (), raising=False)
    assert main(words) == 0
    (arguments,) = seen
    return vars(arguments)


COMMANDS = {
    "advise": "--keep 0.5",
    "calibrate": "--data d --method random --max-drop 1%",
    "calibrate-heads": "--data d --out o",
    "eval": "--data d",
    "eval validate": "--data d",
    "find-layer": "--video v",
    "serve": "--method random --keep 3",
    "train-selector": "--data d --out o",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_model_in_its_place_or_as_an_option(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = COMMANDS[command]
    expected = parsed(monkeypatch, f"{command} some-model {more}")
    assert expected["model"] == "some-model"
    for line in (
        f"--model some-model {more}",
        f"{more} --model some-model",
        f"{more} --model=some-model",
        f"--model another {more} --model some-model",
    ):
        assert parsed(monkeypatch, f"{command} {line}") == expected


def test_the_model_beside_other_words_without_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = parsed(monkeypatch, "export some-model out --method random --keep 3")
    assert (expected["model"], str(expected["out"])) == ("some-model", "out")
    for line in (
        "export out --model some-model --method random --keep 3",
        "export --model some-model --method random --keep 3 out",
        "export --method random --keep 3 some-model out",
    ):
        assert parsed(monkeypatch, line) == expected
    shown = parsed(monkeypatch, "show photo.jpg some-model --keep 3")
    assert (shown["model"], str(shown["image"])) == ("some-model", "photo.jpg")
    assert parsed(monkeypatch, "show --model some-model photo.jpg --keep 3") == shown
    assert parsed(monkeypatch, "show photo.jpg --keep 3 --model some-model") == shown
    assert parsed(monkeypatch, "show photo.jpg")["model"] is None
    assert parsed(monkeypatch, "eval --config run.yaml")["model"] is None


@pytest.mark.parametrize(
    "line",
    [
        "serve a --model b --method random --keep 3",
        "export a out --model b --method random --keep 3",
        "eval a --model b --data d",
        "show photo.jpg a --model b",
        "find-layer a --model b --video v",
        "advise a --model b",
    ],
)
def test_two_models_are_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    assert stop.value.code == 2
    assert "the model is named twice" in capsys.readouterr().err


def test_what_vllm_takes_stays_behind_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = parsed(monkeypatch, "serve --port 80 --model m --method random --keep 3 --x-y z")
    assert seen["model"] == "m"
    assert seen["more"] == ["--port", "80", "--x-y", "z"]


@pytest.mark.parametrize(
    ("command", "several"),
    [
        ("calibrate m --data d --max-drop 1%", True),
        ("demo", True),
        ("eval m --data d", True),
        ("show photo.jpg", True),
        ("serve m --keep 3", False),
        ("export m out --keep 3", False),
    ],
)
def test_method_and_methods_are_one(
    command: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = parsed(monkeypatch, f"{command} --method random")
    assert one["method"] == (["random"] if several else "random")
    assert parsed(monkeypatch, f"{command} --methods random") == one
    if several:
        two = parsed(monkeypatch, f"{command} --methods random uniform")
        assert two["method"] == ["random", "uniform"]
        assert parsed(monkeypatch, f"{command} --method random --method uniform") == two


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("eval --modle bundled", "no option --modle; did you mean --model?"),
        ("calibrate --modle bundled", "no option --modle; did you mean --model?"),
        ("eval m --data d --kepe=4", "no option --kepe; did you mean --keep?"),
        ("methods --jsn", "no option --jsn; did you mean --json?"),
        ("methods --frobnicate", "no option --frobnicate; see tokenprune methods --help"),
        ("eval ls --jsn", "no option --jsn; did you mean --json?"),
        ("eval vaildate --data d", "no action vaildate; did you mean validate?"),
        ("evla --data d", "no subcommand evla. Did you mean eval?"),
        ("--verson", "no option --verson; did you mean --version?"),
        ("methods now", "there is no place for now"),
        ("methods -x", "there is no place for -x"),
        ("serve --keep 3", "required: MODEL"),
        ("export m out --model", "--model: expected one argument"),
    ],
)
def test_what_is_mistyped_is_named(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_model_may_be_called_like_an_action(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch, "eval someone/validate --data d")["model"] == "someone/validate"
    assert parsed(monkeypatch, "eval --model validat --data d")["model"] == "validat"


def test_a_parser_without_a_model_is_as_argparse_has_it() -> None:
    parser = Parser(prog="x")
    add_model(parser, "a model", required=False)
    assert parser.parse_args([]).model is None
    assert parser.parse_args(["a"]).model == "a"


OPTIONS = [
    # What both methods have goes to both, what one has to that one.
    (["seed=3"], {"random": {"seed": 3}}),
    (["layer=3"], {"flexselect": {"layer": 3}, "relevant-information": {"layer": 3}}),
    (["flexselect.layer=3"], {"flexselect": {"layer": 3}}),
    # What names its method wins, in either order.
    (
        ["flexselect.layer=1", "layer=3"],
        {"flexselect": {"layer": 1}, "relevant-information": {"layer": 3}},
    ),
    (
        ["layer=3", "flexselect.layer=1"],
        {"flexselect": {"layer": 1}, "relevant-information": {"layer": 3}},
    ),
    # JSON, or text; dashes as in options of the command line; a dot in the value names no method.
    (["flexselect.reduction=mean"], {"flexselect": {"reduction": "mean"}}),
    (["flexselect.frames-per-set=8"], {"flexselect": {"frames_per_set": 8}}),
    (["candidates=0.25"], {"relevant-information": {"candidates": 0.25}}),
    (["flexselect.layer=null"], {"flexselect": {"layer": None}}),
    ([], {}),
]


@pytest.mark.parametrize(("given", "expected"), OPTIONS)
def test_options_by_method(given: list[str], expected: dict[str, Any]) -> None:
    methods = ["flexselect", "random", "relevant-information"]
    found = options_by_method(given, methods)
    assert found == expected


@pytest.mark.parametrize(
    ("given", "methods", "said"),
    [
        ("layre=3", ["flexselect"], "method 'flexselect' has no option 'layre'. Did you mean 'lay"),
        ("layre=3", ["flexselect", "random"], "none of the methods flexselect, random has an opt"),
        ("flexselect.layre=3", ["flexselect", "random"], "method 'flexselect' has no option 'lay"),
        ("flexselct.layer=3", ["flexselect"], "not among the methods. Did you mean 'flexselect'"),
        ("flexselect.layer=3", ["random"], "is for 'flexselect', which is not among the methods"),
        ("layer=3", [], "no method in use that has an option 'layer'"),
        ("layer", ["flexselect"], "--option layer is not NAME=VALUE"),
        ("flexselect.layer", ["flexselect"], "is not NAME=VALUE"),
        ("=3", ["flexselect"], "is not NAME=VALUE"),
    ],
)
def test_options_that_are_nobodys(given: str, methods: list[str], said: str) -> None:
    with pytest.raises(OptionError) as error:
        options_by_method([given], methods)
    assert said in str(error.value)


def test_options_of_a_method_that_is_not_there() -> None:
    with pytest.raises(UnknownMethodError, match="no method 'nix'"):
        options_by_method(["seed=1"], ["random", "nix"])


def test_an_argument_that_is_no_assignment_is_called_by_its_name() -> None:
    with pytest.raises(OptionError, match="--engine-arg dtype is not NAME=VALUE"):
        parse_options(["dtype"], "--engine-arg")
