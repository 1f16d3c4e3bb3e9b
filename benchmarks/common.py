"""What the benchmarks share: their command lines, Markdown tables, verdicts, and runs of train_gpt.py in a process."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train_gpt as t
from records.reading.runs import read_events

ROOT = Path(t.__file__).resolve().parent


class UsageError(Exception):
    """A command line that means nothing; the text says what was expected."""


def settings_of(words: Iterable[str]) -> dict[str, str]:
    """KEY=value words as variables."""
    pairs = [word.partition("=") for word in words]
    if wrong := ["".join(pair) for pair in pairs if not pair[1] or not pair[0]]:
        raise UsageError(f"{' '.join(wrong)}: expected KEY=value")
    return {key: value for key, _, value in pairs}


def groups_of(arguments: Sequence[str]) -> list[list[str]]:
    """The words between `--`."""
    groups: list[list[str]] = [[]]
    for word in arguments:
        if word == "--":
            groups.append([])
        else:
            groups[-1].append(word)
    return groups


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" if i != 1 else "|---" * len(head) + "|"
                     for i, cells in enumerate(lines))  # fmt: skip


def shown(value: float | None, form: str) -> str:
    """A number in a table; nothing where there is none."""
    return "" if value is None else format(value, form)


def verdict(value: float, limit: float) -> str:
    """Whether a target was met, for a table."""
    return "met" if value <= limit else "**missed**"


def device_name(device: torch.device) -> str:
    """The hardware and the torch version, which every table stands under."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device.type} ({name}), torch {torch.__version__}"


class Finished(NamedTuple):
    """How a run of train_gpt.py in its own process ended: exit status, seconds of wall time, its last error line."""

    status: int
    seconds: float
    error: str


def command(ranks: int) -> list[str]:
    """The launch command of train_gpt.py, torchrun where there are several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / "train_gpt.py")]


def logged(run_id: str, suffix: str) -> Path:
    """A file of a run, in the working directory as train_gpt.py writes it."""
    return Path("logs", run_id + suffix)


def start(env: Mapping[str, str], ranks: int) -> subprocess.Popen:
    """Start train_gpt.py with exactly this environment; what it prints goes to logs/<RUN_ID>.console.txt."""
    Path("logs").mkdir(exist_ok=True)
    for suffix in (".jsonl", ".txt"):  # what an older run left must not be read as this one's
        logged(env["RUN_ID"], suffix).unlink(missing_ok=True)
    with logged(env["RUN_ID"], ".console.txt").open("wb") as console:
        env = {**env, "OVERWRITE": "1"}
        return subprocess.Popen(command(ranks), env=env, stdout=console, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, run_id: str, begin: float) -> Finished:
    """Wait for a run that was started at `begin` (time.perf_counter)."""
    status = process.wait()
    return Finished(status, time.perf_counter() - begin, last_error(run_id) if status else "")


def last_error(run_id: str) -> str:
    """The error that the run's log names, else the last that it printed, else its last line."""
    texts = [path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
             for path in (logged(run_id, ".txt"), logged(run_id, ".console.txt"))]  # fmt: skip
    log, console = ([line.strip() for line in text.splitlines() if line.strip()] for text in texts)
    named = [line for line in log or console if line.startswith("error: ")]
    raised = [line for line in console if "Error: " in line]
    return (named or raised or console or ["it printed nothing"])[-1]


def events(run_id: str) -> Iterator[dict[str, Any]]:
    """The JSON events that a run has logged so far; none before it has a log."""
    path = logged(run_id, ".jsonl")
    if path.is_file() and path.stat().st_size:
        yield from (event for _, event in read_events(path) if event)


def plain_environment() -> dict[str, str]:
    """This process's environment for a run of its own: alone in its world, unbuffered."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RUN_ID")
    return {k: v for k, v in os.environ.items() if k not in own} | {"PYTHONUNBUFFERED": "1"}
