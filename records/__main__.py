"""`python -m records COMMAND ...`: one row of COMMANDS per command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from records import ToolError
from records.checking import check, doctor
from records.writing import leaderboard, new, pack, plot, seeds


class Command(NamedTuple):
    """A subcommand: `add_arguments` declares what it takes, `run` does it and returns the exit status."""

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


# The modules import their heavy libraries when they run, so a row costs nothing to the other commands.
COMMANDS = (
    Command("doctor", "look over machine, data and configuration before a paid run", doctor.add_arguments, doctor.run),
    Command("seeds", "run one configuration with several seeds, and their statistics", seeds.add_arguments, seeds.run),
    Command("new", "make the submission folder of finished runs", new.add_arguments, new.run),
    Command("check", "check a submission folder; exit status 1 if a check fails", check.add_arguments, check.run),
    Command("table", "the leaderboard over all submission folders", leaderboard.add_arguments, leaderboard.run),
    Command("pack", "make the self-extracting form of a script", pack.add_arguments, pack.run),
    Command("plot", "draw the loss curves of one or more run logs", plot.add_arguments, plot.run),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser for all rows of COMMANDS; the chosen row is left in `command`."""
    parser = argparse.ArgumentParser(prog="python -m records", description="Tools around runs and submissions.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a ToolError becomes a message on stderr and status 1."""
    args = build_parser().parse_args(argv)
    try:
        return args.command.run(args)
    except ToolError as error:
        print(f"records {args.command.name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
