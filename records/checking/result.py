"""What every check says, and how it is printed."""

from __future__ import annotations

from typing import NamedTuple, TextIO

COLOURS = {"pass": "green", "fail": "bold red", "skip": "yellow"}


class CheckResult(NamedTuple):
    """The outcome of one check: status is "pass", "fail" (message holds the remedy) or "skip" (message says why)."""

    name: str
    status: str
    message: str


def report(result: CheckResult, out: TextIO) -> None:
    """One line, in colour where the terminal has it."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError:
        print(f"{result.status} {result.name}: {result.message}", file=out, flush=True)
        return
    console = Console(file=out, soft_wrap=True, highlight=False)
    status = Text(result.status, COLOURS[result.status])
    console.print(status, f" {result.name}: {result.message}", sep="", markup=False)
    out.flush()
