"""The command `tokenprune`: a shell whose subcommands live beside their code.

A subcommand is a module registered in the entry point group ``tokenprune.commands``. It has

    HELP       one line for ``tokenprune --help``
    EXTRA      the extra of this distribution that it needs, or ""
    configure  (parser) -> None, adds its arguments
    run        (arguments) -> int, the exit status
    needs      optional: (arguments) -> the packages it will import, up to its last stage; they are
               looked for before `run`
    TAKES_MORE optional: True where arguments it does not know go to `run` as `arguments.more`

and imports torch and the engines inside `run` only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Protocol, cast

from tokenprune.errors import TokenPruneError
from tokenprune.packages import Package, check_packages, missing_packages

GROUP = "tokenprune.commands"


class Command(Protocol):
    """What a subcommand's module has."""

    HELP: str
    EXTRA: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the subcommand's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work and return the exit status."""


def _load(entry: EntryPoint) -> Command | None:
    """Return the subcommand's module, or None after saying why it cannot be loaded."""
    try:
        return cast(Command, entry.load())
    except ImportError as error:
        print(f"tokenprune: the subcommand {entry.name} is left out: {error}", file=sys.stderr)
        return None


def _parser(commands: dict[str, Command]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenprune",
        description="Keep the visual tokens that matter, before the language model reads them.",
    )
    parser.add_argument("--version", action="version", version=version("tokenprune-vlm"))
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in sorted(commands.items()):
        command.configure(
            subparsers.add_parser(
                name, help=command.HELP, description=command.HELP, allow_abbrev=False
            )
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 done, 2 wrong input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    # Load just the subcommand that is asked for; --help and a mistyped name need them all.
    wanted = [argv[0]] if argv and argv[0] in entries else sorted(entries)
    commands = {name: command for name in wanted if (command := _load(entries[name])) is not None}
    parser = _parser(commands)
    arguments, more = parser.parse_known_args(argv)
    arguments.more = more
    command = commands[arguments.command]
    if more and not getattr(command, "TAKES_MORE", False):
        parser.error(f"{arguments.command} has no arguments {' '.join(more)}")
    try:
        if hasattr(command, "needs"):
            check_packages(command.needs(arguments), command.EXTRA, "this subcommand")
        return command.run(arguments)
    except TokenPruneError as error:
        print(f"tokenprune {arguments.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not command.EXTRA or (error.name or "").startswith("tokenprune"):
            raise
        # What `needs` left out: a package that one of those it names needs in its turn.
        missing = missing_packages([Package(error.name or "?")], command.EXTRA, "this subcommand")
        print(f"tokenprune {arguments.command}: {missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ntokenprune {arguments.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
