"""train_gpt.py as one of several runs on a GPU that compile beside each other and train one at a time.

    MINITRACK_TURN=/tmp/gpu0.turn python benchmarks/in_turn.py      # other variables as for train_gpt.py

The run waits for the lock MINITRACK_TURN when its warm-up has ended (with EXPORT_ONLY, before it loads the weights) and
holds it until its artifact is made; where a sliding window is to be scored, until it ends; where no clock runs
(MAX_WALLCLOCK_SECONDS=0), until training ends. So the 40 to 120 s until a run's clock starts cost the GPU nothing, and
the clock runs on a GPU that only another run's compilation disturbs. `warmup` in the ledger includes the wait.
EVAL_ONLY takes no turn.
"""

import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t


def trains_in_turn(lock: TextIO) -> None:
    """Let train_gpt.py take `lock` after warm-up and give it back after the export, or before it if no clock runs."""
    measure, read, export = t.measure_reserve, t.read_weights, t.export_model

    def take(run: t.Runtime) -> None:
        t.synchronize(run.ranks.device)
        torch.cuda.empty_cache()  # warm-up's memory, which steps that replay a graph do not use; without CUDA nothing
        if run.ranks.is_main:
            fcntl.flock(lock, fcntl.LOCK_EX)
        run.ranks.agree(0.0)  # the other ranks wait for the first

    def measure_in_turn(run: t.Runtime, trainer: t.Trainer) -> float:
        take(run)
        return measure(run, trainer)

    def read_in_turn(run: t.Runtime, *arguments: Any) -> dict[str, Any]:
        take(run)
        return read(run, *arguments)

    def export_in_turn(run: t.Runtime, *arguments: Any) -> Any:
        if not run.cfg.max_wallclock_seconds:
            fcntl.flock(lock, fcntl.LOCK_UN)
        exported = export(run, *arguments)
        if not run.cfg.eval_stride:
            fcntl.flock(lock, fcntl.LOCK_UN)
        return exported

    t.measure_reserve, t.read_weights, t.export_model = measure_in_turn, read_in_turn, export_in_turn


def main(run: Callable[[], None] = t.main) -> None:
    """The main program of train_gpt.py, in turn."""
    with Path(os.environ["MINITRACK_TURN"]).open("w") as lock:
        trains_in_turn(lock)
        try:
            run()
        except t.UserError as problem:
            sys.exit(f"error: {problem}" if t.is_first_to_fail(os.environ) else 1)


if __name__ == "__main__":
    main()
