"""Command-line arguments that several subcommands share, and how their text is read.

All subcommands write the same argument in the same way: ``--method`` or ``--methods``, MODEL as the
first word or ``--model MODEL``, ``--option NAME=VALUE`` or ``--option METHOD.NAME=VALUE``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from tokenprune.errors import BudgetError, ConfigError, OptionError, did_you_mean

if TYPE_CHECKING:
    pass

Container = argparse.ArgumentParser | argparse._ArgumentGroup
"""What arguments are added to: `argparse` has no public name for a group."""

_IN_PLACE = "_model_in_place"
"""Notes while parsing whether the model came in its place."""

_NEAR = 0.6
"""Similarity of a mistyped word and its correction, as `difflib` counts it."""


class Parser(argparse.ArgumentParser):
    """A parser that names an unknown option, and the known one that is nearest to it.

    `argparse` would report a missing or misplaced argument first, which is only a consequence of
    the mistyped option.

    Attributes
    ----------
    takes_more
        Whether arguments that it does not know are for somebody else.
    model_is_required
        Whether MODEL is the first positional argument, see `add_model`.
    """

    takes_more = False
    model_is_required = False

    def __init__(self, *args: Any, **more: Any) -> None:
        more.setdefault("allow_abbrev", False)
        super().__init__(*args, **more)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; see `argparse.ArgumentParser.parse_known_args`."""
        given = list(args or ())
        if not self.takes_more:
            self._check_options(given)
        if self.model_is_required:
            given = self._with_model_in_its_place(given)
        arguments, more = super().parse_known_args(given, namespace)
        vars(arguments).pop(_IN_PLACE, None)
        return arguments, more

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End with an error for words that no argument takes."""
        self.error(f"there is no place for {' '.join(unknown)}; see {self.prog} --help")

    def _check_options(self, given: Sequence[str]) -> None:
        """End with an error for an option that is not there."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for word in given:
            if word == "--":
                return
            name = word.partition("=")[0]
            if word.startswith("--") and name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
                hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
                self.error(f"there is no option {name}; {hint}")

    def _with_model_in_its_place(self, given: list[str]) -> list[str]:
        """Return arguments with what the last ``--model`` says in front, where MODEL is."""
        model: str | None = None
        rest: list[str] = []
        words = iter(given)
        for word in words:
            name, equals, value = word.partition("=")
            if word == "--":
                rest += [word, *words]
            elif name == "--model":
                model = value if equals else next(words, None)
                if model is None:
                    self.error("argument --model: expected one argument")
            else:
                rest.append(word)
        return rest if model is None else self._one_model([model, *rest])

    def _one_model(self, given: list[str]) -> list[str]:
        """End with an error if there are now more positional arguments than places in front."""
        positional = sum(not action.option_strings for action in self._actions)
        leading = next((n for n, word in enumerate(given) if word.startswith("-")), len(given))
        if leading > positional:
            self.error(f"the model is named twice: {given[1]} and --model {given[0]}")
        return given


class _Model(argparse.Action):
    """Store the model, given in its place or as ``--model``, but not both; of several the last."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        known = vars(namespace).get(self.dest)
        in_place = option_string is None
        if known is not None and vars(namespace)[_IN_PLACE] != in_place:
            parser.error(f"the model is named twice: {known} and {values}")
        setattr(namespace, self.dest, values)
        setattr(namespace, _IN_PLACE, in_place)


def add_model(parser: Parser, what: str, *, required: bool = True) -> None:
    """Add MODEL and, for the same, ``--model MODEL``; it goes to ``arguments.model``.

    Parameters
    ----------
    parser
        A subcommand's.
    what
        For ``--help``: what it may be, and what is taken without one.
    required
        Whether there must be one. It is then the first positional argument. Where there need be
        none, it is the last one, and `parser` takes what was added before for the first.
    """
    if required:
        parser.model_is_required = True
        parser.add_argument("model", metavar="MODEL", help=what)
        # Never met while parsing: `Parser` puts its value where MODEL is.
        parser.add_argument(
            "--model", dest="model_", metavar="MODEL", help="the same", default=argparse.SUPPRESS
        )
        return
    parser.add_argument(
        "model",
        nargs="?",
        action=_Model,
        metavar="MODEL",
        help=what,
        # argparse would otherwise write the default over what --model gave.
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--model", action=_Model, metavar="MODEL", help="the same")


def add_method(container: Container, what: str, *, required: bool = False) -> None:
    """Add ``--method METHOD``, also called ``--methods``: one; it goes to ``arguments.method``."""
    container.add_argument(
        "--method", "--methods", dest="method", metavar="METHOD", help=what, required=required
    )


def add_methods(container: Container, what: str, *, required: bool = False) -> None:
    """Add ``--method METHOD [METHOD ...]``, also called ``--methods``: a list in `method`."""
    container.add_argument(
        "--method",
        "--methods",
        dest="method",
        nargs="+",
        action="extend",
        metavar="METHOD",
        help=what,
        required=required,
    )


def add_keep(parser: Container, default: str | None = None) -> None:
    """Add ``--keep KEEP``; read it with `parse_keep`."""
    ending = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--keep",
        default=default,
        metavar="KEEP",
        help=f"a number of tokens such as 16, or a fraction such as 0.25 or 25%%{ending}",
    )


def add_positions(parser: Container) -> None:
    """Add ``--positions``."""
    parser.add_argument(
        "--positions",
        default="original",
        choices=("original", "compact"),
        help="positions of the kept tokens: as in the full image (default), or renumbered",
    )


def add_scope(parser: Container) -> None:
    """Add ``--scope``."""
    parser.add_argument(
        "--scope",
        default="item",
        choices=("item", "image"),
        help="what has a set of kept tokens of its own: each item, such as a crop of an image "
        "(default), or all crops of an image together",
    )


def add_options(parser: Container) -> None:
    """Add ``--option``; read the list with `options_by_method`."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="[METHOD.]NAME=VALUE",
        help="an option of a method, for example flexselect.layer=3; without METHOD of every "
        "method that has it; may be repeated",
    )


def parse_keep(text: str, name: str = "--keep ") -> int | float:
    """Return a budget written as text: with a decimal point or ``%`` a fraction, else a count.

    The name of a published budget becomes its number.

    Parameters
    ----------
    text
        What was given.
    name
        Put in front of it in the message.

    Raises
    ------
    BudgetError
        If it is no budget.
    """
    from tokenprune.budget import PUBLISHED, check_keep

    if text in PUBLISHED:
        return check_keep(text)
    value = _number(text)
    if value is None:
        raise BudgetError(
            f"{name}{text} is no number. Give a number of tokens (64) or a fraction (0.1 or 10%)."
        )
    return check_keep(value)


def check_at_least(arguments: argparse.Namespace, **least: int) -> None:
    """Raise if a number on the command line is below the least that makes sense.

    Parameters
    ----------
    arguments
        What was given; None for a number is left alone.
    **least
        The least value of each, by the name of its argument.

    Raises
    ------
    ConfigError
        For the first one that is.
    """
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} {value} is too small. Give at least {smallest}.")


def parse_share(name: str, text: str) -> float:
    """Return ``"1%"`` or ``"0.01"`` as 0.01.

    Parameters
    ----------
    name
        The argument, for the message.
    text
        What was given.

    Raises
    ------
    ConfigError
        If it is no share above 0 and below 1.
    """
    share = _number(text)
    if share is None or math.isnan(share):
        raise ConfigError(f"{name} {text} is no share. Write 1% or 0.01.")
    if not 0 < share < 1:
        hint = "" if "%" in text or share < 1 else f" For {text} percent write {text}%."
        raise ConfigError(f"{name} {text} must lie above 0 and below 1, which is 100%.{hint}")
    return share


def _number(text: str) -> int | float | None:
    """Return a number as it is written, ``25%`` as 0.25; None where it is none."""
    number, percent, rest = text.strip().partition("%")
    try:
        if not percent:
            return int(number)
    except ValueError:
        pass
    try:
        value = float(number)
    except ValueError:
        return None
    if rest:
        return None
    return value / 100 if percent else value


def parse_options(given: Iterable[str], argument: str = "--option") -> dict[str, Any]:
    """Return ``NAME=VALUE`` arguments as a dict; values are read as JSON, or stay text.

    Parameters
    ----------
    given
        The arguments.
    argument
        What to call it in an error.

    Raises
    ------
    OptionError
        If there is no ``=``.
    """
    values: dict[str, Any] = {}
    for assignment in given:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise OptionError(f"{argument} {assignment} is not NAME=VALUE, for example seed=1.")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return {name.replace("-", "_"): value for name, value in values.items()}


def options_by_method(given: Iterable[str], methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what ``--option`` says, by method.

    Parameters
    ----------
    given
        ``METHOD.NAME=VALUE``, for one method, or ``NAME=VALUE``, for every method that has it.
    methods
        Those that are in use.

    Returns
    -------
    dict
        Method -> name -> value, for those of `methods` that were given an option. What names its
        method wins over what does not.

    Raises
    ------
    OptionError
        If an option names a method that is not in use, or no method in use has it.
    UnknownMethodError
        If there is no such method.
    """
    named: dict[str, dict[str, Any]] = {}
    plain: dict[str, dict[str, Any]] = {}
    methods = list(dict.fromkeys(methods))
    for assignment in given:
        name, equals, text = assignment.partition("=")
        # A method's name may have a dot in it, an option's cannot.
        method, dot, option = name.rpartition(".")
        ((option, value),) = parse_options([f"{option}{equals}{text}"]).items()
        if dot:
            if method not in methods:
                raise OptionError(
                    f"--option {assignment} is for {method!r}, which is not among the methods. "
                    f"{did_you_mean(method, methods)}"
                )
            _check_option(option, [method])
            named.setdefault(method, {})[option] = value
            continue
        for method in _check_option(option, methods):
            plain.setdefault(method, {})[option] = value
    return {
        method: {**plain.get(method, {}), **named.get(method, {})}
        for method in methods
        if method in plain or method in named
    }


def _check_option(option: str, methods: Sequence[str]) -> list[str]:
    """Return those methods that have an option; raise where none has."""
    from tokenprune.registry import find_any

    fields = {
        method: {field.name for field in dataclasses.fields(find_any(method))} for method in methods
    }
    having = [method for method in methods if option in fields[method]]
    if having:
        return having
    match methods:
        case []:
            lacking = "there is no method in use that has an option"
        case [method]:
            lacking = f"method {method!r} has no option"
        case _:
            lacking = f"none of the methods {', '.join(methods)} has an option"
    raise OptionError(
        f"{lacking} {option!r}. {did_you_mean(option, set().union(*fields.values()))}"
    )
