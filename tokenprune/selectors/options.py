"""A method's options: its fields, of the types that they are annotated with, given by name."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tokenprune.errors import OptionError, did_you_mean

_Method = TypeVar("_Method")


@dataclass(frozen=True)
class _Type:
    """A type of options: how an error calls it, and which values are of it."""

    wanted: str
    has: Callable[[Any], bool]


def _is_number(value: Any, kinds: type | types.UnionType) -> bool:
    # Python counts True and False among the ints; an option that was given one is mistaken.
    return isinstance(value, kinds) and not isinstance(value, bool)


_TYPES: dict[Any, _Type] = {
    bool: _Type("True or False", lambda value: isinstance(value, bool)),
    int: _Type("a whole number", lambda value: _is_number(value, int)),
    # JSON writes 1.0 as 1, so an int is a float too.
    float: _Type(
        "a finite number", lambda value: _is_number(value, int | float) and math.isfinite(value)
    ),
    types.NoneType: _Type("None", lambda value: value is None),
    Any: _Type("anything", lambda value: True),
}
"""Annotations whose values `isinstance` alone does not tell."""


def with_options(method: type[_Method], options: dict[str, Any]) -> _Method:
    """Return a method with options, given by their names.

    Parameters
    ----------
    method
        A dataclass with a `name`.
    options
        Option -> its value; what is left out takes the field's default.

    Raises
    ------
    OptionError
        For a name that the method does not have (with the nearest one) or a value it cannot take.
    """
    kind: Any = method
    known = {field.name for field in dataclasses.fields(kind)}
    for name in options:
        if name not in known:
            raise OptionError(
                f"method {kind.name!r} has no option {name!r}. {did_you_mean(name, known)}"
            )
    return method(**options)


def check_options(method: Any) -> None:
    """Raise OptionError unless every option of a method, a dataclass, is of its annotation."""
    hints = typing.get_type_hints(type(method))
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        check_option(method.name, field.name, value, hints[field.name])


def check_option(method: str, option: str, value: Any, annotation: Any) -> None:
    """Raise unless an option's value is of its annotation.

    Parameters
    ----------
    method, option
        Their names, for the message.
    value
        What was given.
    annotation
        A class, a `Literal`, or a union of them. Anything else (`Any`, ``list[int]``) is not
        checked.

    Raises
    ------
    OptionError
        Naming the value and what is allowed.
    """
    if typing.get_origin(annotation) is Literal:
        check_choice(method, option, value, typing.get_args(annotation))
    elif not _fits(value, annotation):
        raise OptionError(
            f"option {option}={value!r} of method {method!r} must be {_wanted(value, annotation)}."
        )


def check_choice(method: str, option: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise OptionError, with the nearest value, unless an option has one of its few values."""
    if value not in allowed:
        raise OptionError(
            f"option {option}={value!r} of method {method!r} is not one of its values. "
            f"{did_you_mean(str(value), [str(choice) for choice in allowed])}"
        )


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _fits(value: Any, annotation: Any) -> bool:
    """Say whether a value is of an annotation."""
    if _is_union(annotation):
        return any(_fits(value, member) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return value in typing.get_args(annotation)
    if annotation in _TYPES:
        return _TYPES[annotation].has(value)
    return not isinstance(annotation, type) or isinstance(value, annotation)


def _wanted(value: Any, annotation: Any) -> str:
    """Return what an annotation allows and, where that helps, what was given in its place."""
    if _is_union(annotation):
        return f"a {annotation}"
    known = _TYPES.get(annotation)
    wanted: str = annotation.__name__ if known is None else known.wanted
    if annotation is type(value) is float:
        return wanted  # a float that does not fit is nan or infinite, as the message shows
    return f"{wanted}, not {type(value).__name__}"
