"""The command `tokenprune`: a shell whose subcommands live beside their code.

A subcommand is a module registered in the entry point group ``tokenprune.commands``. It has

    HELP       one line for ``tokenprune --help``
    EXTRA      the extra of this distribution that it needs, or ""
    configure  (parser) -> None, adds its arguments
    run        (arguments) -> int, the exit status
    needs      optional: (arguments) -> the packages it will import, up to its last stage; they are
               looked for before `run`
    TAKES_MORE optional: True where arguments it does not know go to `run` as `arguments.more`
    ACTIONS    optional: name -> `Action`, where the first word may be one; `arguments.action` is
               its name, or None

and imports torch and the engines inside `run` only.
"""

from __future__ import annotations

import argparse
import difflib
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from typing import NoReturn, Protocol, cast

from tokenprune.arguments import Parser
from tokenprune.errors import TokenPruneError
from tokenprune.packages import Package, check_packages, missing_packages

GROUP = "tokenprune.commands"

_CLOSED_PIPE = 128 + 13
"""What shells give to a program that SIGPIPE, signal 13, ended."""

_NEAR = 0.6
"""Similarity of a mistyped word and its correction, as `difflib` counts it."""

_NEARER = 0.75
"""The same where the word could also be right, as the name of a model."""


class Command(Protocol):
    """What a subcommand's module has."""

    HELP: str
    EXTRA: str

    def configure(self, parser: Parser) -> None:
        """Add the subcommand's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work and return the exit status."""


@dataclass(frozen=True)
class Action:
    """One of several things that a subcommand does.

    Attributes
    ----------
    help
        One line.
    configure
        Adds its arguments.
    """

    help: str
    configure: Callable[[Parser], None]


def _name(entry: EntryPoint) -> str:
    return entry.name


def _load(entry: EntryPoint) -> Command | None:
    """Return the subcommand's module, or None after saying why it cannot be loaded."""
    try:
        return cast(Command, entry.load())
    except ImportError as error:
        print(f"tokenprune: the subcommand {entry.name} is left out: {error}", file=sys.stderr)
        return None


def _overview(entries: Mapping[str, EntryPoint]) -> Parser:
    """Return the parser of the command itself, which lists the subcommands."""
    parser = Parser(
        prog="tokenprune",
        description="Keep the visual tokens that matter, before the language model reads them.",
    )
    parser.add_argument("--version", action="version", version=version("tokenprune-vlm"))
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, entry in sorted(entries.items()):
        if (command := _load(entry)) is not None:
            subparsers.add_parser(name, help=command.HELP)
    return parser


def _no_subcommand(entries: Mapping[str, EntryPoint], argv: Sequence[str]) -> NoReturn:
    """Print the overview, the version, or what is wrong with the first word; and end."""
    parser = _overview(entries)
    if argv and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], entries, n=1, cutoff=_NEAR)
        hint = f"Did you mean {near[0]}? " if near else ""
        parser.error(f"there is no subcommand {argv[0]}. {hint}Allowed: {', '.join(entries)}.")
    parser.parse_args(argv)
    raise SystemExit(2)  # every such line ends in argparse


def parse(name: str, command: Command, words: Sequence[str]) -> argparse.Namespace:
    """Return what a subcommand is given for the words behind its name; ends for wrong ones.

    Returns
    -------
    argparse.Namespace
        Its own arguments, and `command`, `action` and `more` (see the top of this file).
    """
    actions: Mapping[str, Action] = getattr(command, "ACTIONS", {})
    action = words[0] if words and words[0] in actions else None
    prog = f"tokenprune {name}" if action is None else f"tokenprune {name} {action}"
    described = command.HELP if action is None else actions[action].help
    parser = Parser(prog=prog, description=described)
    parser.takes_more = getattr(command, "TAKES_MORE", False)
    if action is None:
        command.configure(parser)
        _check_action(parser, actions, words)
    else:
        actions[action].configure(parser)
        words = words[1:]
    arguments, more = parser.parse_known_args(words)
    if more and not parser.takes_more:
        parser.refuse(more)
    arguments.command, arguments.action, arguments.more = name, action, more
    return arguments


def _check_action(parser: Parser, actions: Mapping[str, Action], words: Sequence[str]) -> None:
    """End with an error if the first word is a mistyped action, and not a model or a file."""
    # `--model` takes whatever looks like an action.
    if words and not words[0].startswith("-") and "/" not in words[0]:
        near = difflib.get_close_matches(words[0], actions, n=1, cutoff=_NEARER)
        if near and not os.path.exists(words[0]):
            parser.error(f"there is no action {words[0]}; did you mean {near[0]}?")


def _run(argv: Sequence[str]) -> int:
    entries = {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=_name)}
    if not argv or argv[0] not in entries:
        _no_subcommand(entries, argv)
    # Only this subcommand is loaded: importing all of them would slow down each.
    name = argv[0]
    command = _load(entries[name])
    if command is None:
        return 2
    arguments = parse(name, command, argv[1:])
    try:
        if hasattr(command, "needs"):
            check_packages(command.needs(arguments), command.EXTRA, "this subcommand")
        return command.run(arguments)
    except TokenPruneError as error:
        print(f"tokenprune {name}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not command.EXTRA or (error.name or "").startswith("tokenprune"):
            raise
        # A package that `needs` does not list: a dependency of one that it lists.
        missing = missing_packages([Package(error.name or "?")], command.EXTRA, "this subcommand")
        print(f"tokenprune {name}: {missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ntokenprune {name}: interrupted", file=sys.stderr)
        return 130


def _is_closed_pipe(file: int) -> bool:
    """Return whether a file descriptor is a pipe whose reader has gone."""
    try:
        poll = select.poll()
    except AttributeError:  # not on every system
        return True
    poll.register(file, 0)  # errors are reported without being asked for
    return bool(poll.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Returns
    -------
    int
        0 done, 2 wrong input, 130 interrupted, 141 if the reader of a pipe went away (``| head``);
        a subcommand may have others.
    """
    try:
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            # A closed pipe raises here, where it can be handled, and not when Python ends.
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_closed_pipe(sys.stdout.fileno()):
            raise  # another pipe broke, such as one to a worker
        # What is left in the buffer must not be written again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE


if __name__ == "__main__":
    sys.exit(main())
