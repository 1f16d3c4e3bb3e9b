"""Seconds from starting train_gpt.py to its first timed step: with empty caches, then with those of the first start.

    python -m benchmarks.start_time [KEY=value ...]

Each start is a process of its own with a new folder for inductor's, Triton's and the driver's caches, which the second
one finds filled. It makes two steps and leaves out the sliding window. The first column ends when step 1 is in
logs/<RUN_ID>.jsonl: imports, data, model, warm-up of all phases with compilation, measuring the reserve, one step. What
of it was warm-up comes from the run's ledger. About 4 minutes on an H100.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import train_gpt as t
from benchmarks.common import (
    Finished,
    UsageError,
    events,
    finish,
    markdown,
    plain_environment,
    settings_of,
    shown,
    start,
    verdict,
)

BASE = {"TRAIN_BATCH_TOKENS": "98304", "ITERATIONS": "2", "EVAL_STRIDE": "0", "VAL_LOSS_EVERY": "0"}
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
TARGETS = {"cold": 150.0, "warm": 60.0}  # seconds to the first timed step
POLL_SECONDS = 0.1


class Start(NamedTuple):
    """One start: seconds to the first step and in warm-up (None: it did not get there), and how the run ended."""

    name: str
    first_step: float | None
    warmup: float | None
    finished: Finished

    def cells(self) -> list[str]:
        """The row of the table."""
        limit = TARGETS[self.name]
        judged = verdict(self.first_step, limit) if self.first_step is not None else self.finished.error
        before = None if None in (self.first_step, self.warmup) else self.first_step - self.warmup
        numbers = [shown(value, ".1f") for value in (before, self.warmup, self.finished.seconds)]
        return [self.name, shown(self.first_step, ".1f"), f"{limit:g}", judged, *numbers]


def has_stepped(run_id: str) -> bool:
    return any(event["event"] == "train" for event in events(run_id))


def timed_start(name: str, env: Mapping[str, str]) -> Start:
    """Run train_gpt.py and look at its log until the first step is there."""
    begin, first = time.perf_counter(), None
    process = start(env, ranks=1)
    while first is None and process.poll() is None:
        time.sleep(POLL_SECONDS)
        first = time.perf_counter() - begin if has_stepped(env["RUN_ID"]) else None
    finished = finish(process, env["RUN_ID"], begin)
    ledgers = [event for event in events(env["RUN_ID"]) if event["event"] == "ledger" and event["budget"] == "untimed"]
    return Start(name, first, ledgers[-1]["phases"].get("warmup") if ledgers else None, finished)


def both_starts(settings: Mapping[str, str]) -> list[Start]:
    """A cold start and a warm one."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {variable: str(Path(folder, name)) for variable, name in CACHES.items()}
        env = {**BASE, **plain_environment(), **settings, **caches}
        t.Config.from_env(env)
        return [timed_start(name, {**env, "RUN_ID": f"start_{name}"}) for name in TARGETS]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if both runs came to their end."""
    parser = argparse.ArgumentParser(prog="benchmarks.start_time", description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=value", help="variables of train_gpt.py")
    try:
        starts = both_starts(settings_of(parser.parse_args(arguments).settings))
    except (UsageError, t.UserError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    head = ["caches", "seconds to the first timed step", "target", "verdict", "imports, data, model, first step",
            "warm-up with compilation", "whole run"]  # fmt: skip
    device = next((e["device"] for e in events("start_warm") if e["event"] == "config"), "the run has no log")
    print(f"{device}; {starts[-1].finished.error or 'both runs ended well'}")
    print(markdown(head, [start.cells() for start in starts]))
    return int(any(start.finished.status for start in starts))


if __name__ == "__main__":
    sys.exit(main())
