"""`python guard.py COMMAND ...` runs a command that ends with the process that started it, whose pipe is stdin here.

The system closes that pipe when the process ends, however it ends. The command's process group is then asked to end by
SIGTERM, on which the trainer saves its weights, and killed if it is still there after PATIENCE seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

PATIENCE = 60.0  # torchrun gives its workers 30


def end_with_pipe(child: subprocess.Popen[bytes]) -> None:
    """Wait for the end of stdin, then end the child's group."""
    os.read(0, 1)  # nothing is ever written: it returns at the end
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)


def main() -> int:
    """The command's exit status, as a shell has it: 128 and the number of a signal that ended it."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=end_with_pipe, args=[child], daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
