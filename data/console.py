"""Printing, signals and exit of the data tools.

A build of hours must not end because nobody can read its progress. A line that cannot be printed (a reader that went
away, a closed terminal, a full disk) is given up, and so are all later ones, with one warning on standard error where
that works. A character that the terminal's encoding lacks is printed as an escape.

Usage:
    console.say("progress")                 # from any thread
    console.warn("error: ...")              # to standard error
    sys.exit(console.run_tool(main))        # main() -> exit status
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

PRINT_ERRORS = (OSError, ValueError)  # ValueError: the stream is closed
_print_lock = threading.Lock()


def printable(text: str, stream: TextIO) -> str:
    """Text with escapes for what the stream cannot encode: an ASCII terminal, or file names that are not utf-8."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def warn(text: str) -> None:
    """Print a line to standard error if that is possible."""
    if sys.stderr is not None:
        with contextlib.suppress(*PRINT_ERRORS):
            print(printable(text, sys.stderr), file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a line at once, lines of several threads one after the other; never an error."""
    with _print_lock:
        if sys.stdout is None:  # closed from the start, or given up
            return
        try:
            print(printable(text, sys.stdout), flush=True)
        except PRINT_ERRORS as error:
            give_up_output()
            warn(f"warning: standard output is lost ({error}); going on without it")


def give_up_output() -> None:
    """Print nothing from now on; what is still in the stream's buffer must not fail again when Python ends."""
    with contextlib.suppress(*PRINT_ERRORS):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
    sys.stdout = None


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGINT, so that what is half done is tidied up on the way out."""


def interrupt(number: int, _: Any) -> None:
    """Signal handler. A second signal must not interrupt the tidying up."""
    for later in (signal.SIGTERM, signal.SIGINT):
        signal.signal(later, signal.SIG_IGN)
    raise Interrupted(number)


def exit_status(stop: KeyboardInterrupt) -> int:
    """What a shell expects of a program that a signal ended."""
    return 128 + (stop.args[0] if isinstance(stop, Interrupted) else signal.SIGINT)


def follow_parent() -> None:
    """Initializer of a worker process: Ctrl-C is the parent's to handle, and nothing outlives it, even if killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def end_after(parent: multiprocessing.process.BaseProcess) -> None:
    """Wait for a process to end, then end this one."""
    parent.join()
    os._exit(1)


def run_tool(main: Callable[[], int]) -> int:
    """Exit status of main(), which a closing terminal (SIGHUP) does not end, and SIGTERM ends as Ctrl-C does."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed stdout would give its number to the next file
        pass
    os.close(spare)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # a shell's background jobs begin with SIGINT ignored
            signal.signal(number, interrupt)
    return main()
