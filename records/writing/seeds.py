"""`python -m records seeds --seeds 42 0 1234 -- torchrun ... train_gpt.py`: one configuration, several seeds.

The configuration is resolved once and baked into a copy of the script; that copy is what runs, so the seeds cannot
differ in anything else. A series that broke off is continued: finished seeds of the same script and configuration are
kept, and one of another, or of other data, stops the command before anything is paid for. Statistics over all seeds
come last. A series belongs to one process at a time, and its runs end with that process.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from records import ToolError
from records.reading.runs import SAME_DATA, RunLog, config_hash, read_jsonl, unlike
from records.reading.script import IDENTITY, Resolved, as_variable, data_identity, differences, named, resolve
from records.reading.statistics import Baseline, Summary, compare, described, read_baseline, summarize
from records.writing.freeze import bake, prove
from records.writing.pack import pack

LOGS = Path("logs")
GUARD = Path(__file__).with_name("guard.py")


class Series(NamedTuple):
    """What is to run: the frozen script, its configuration, the launch command and the environment of a run."""

    name: str
    script: Path
    launch: list[str]
    env: dict[str, str]
    finished: dict[int, RunLog]  # seeds that need not run again
    lock: int  # file that is locked while any process of the series lives

    def log(self, seed: int) -> Path:
        return LOGS / f"{self.name}_seed{seed}.jsonl"


def script_index(launch: Sequence[str]) -> int:
    """Where the training script stands in a launch command."""
    found = [i for i, word in enumerate(launch) if word.endswith(".py") and Path(word).is_file()]
    if not found:
        raise ToolError("the command after -- names no training script that exists, such as "
                        "`-- torchrun --standalone --nproc_per_node=8 train_gpt.py`")
    return found[0]


def refuse_single(values: Mapping[str, object]) -> None:
    """ToolError for variables that make no sense for several seeds."""
    for name, what in (("eval_only", "trains nothing"), ("export_only", "trains nothing"),
                       ("resume", "goes on with one run")):
        if values.get(name):
            raise ToolError(f"{name.upper()}=1 {what}; unset it to run seeds")
    for name in ("artifact_path", "weights_path"):
        if values.get(name):
            raise ToolError(f"{name.upper()}={values[name]}: every seed would write the same file; unset it")


def series_name(given: str | None, source: Path, values: Mapping[str, object]) -> str:
    """The name of a series: what --name says, else made of the script's name and the configuration's hash.

    ToolError for a name that cannot begin the names of files: a run would be paid for and its log not found.
    """
    name = given if given is not None else f"{source.stem}_{config_hash(values)[:8]}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,150}", name):
        raise ToolError(f"--name {name!r}: files are named after it; use letters, digits and _ . + - (150 at most)")
    return name


@contextlib.contextmanager
def owned(name: str) -> Iterator[int]:
    """Lock a series for this process and its children; the open lock file. ToolError names the process that has it."""
    folder = LOGS / name
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())
        yield lock
    except BlockingIOError:
        owner = os.read(lock, 200).decode(errors="replace") or "another process"
        raise ToolError(f"--name {name}: {owner} runs this series now; wait for its end (its last run saves its "
                        "weights), or choose another --name") from None
    finally:
        os.close(lock)


def prepare(args: argparse.Namespace, resolved: Resolved, name: str, lock: int) -> Series:
    """Freeze; the frozen copy lies in logs/<name>/train_gpt.py, written once nothing speaks against it."""
    index, values, env = script_index(args.launch), resolved.values, os.environ
    script = LOGS / name / "train_gpt.py"
    human = bake(Path(args.launch[index]).read_text(encoding="utf-8"), values)
    files = {script: pack(human), script.with_name("train_gpt_human.py"): human} if args.pack else {script: human}
    finished = finished_runs(name, args.seeds)
    refuse_mixed(finished, resolved, hashlib.sha256(files[script].encode()).hexdigest())
    kept = {key: text for key, text in env.items() if key not in resolved.variables}
    own = ("recipe", "run_id", "seed", "resume", "overwrite")  # set for every run, or meant for one
    places = {key.upper(): as_variable(values[key]) for key in IDENTITY if key not in own}
    ours = kept | {key: text for key, text in places.items() if text}
    if finished:
        refuse_other_data(finished, data_identity(Path(args.launch[index]), {**env, "RUN_ID": name}))
    for path, text in files.items():
        path.write_text(text, encoding="utf-8", newline="")
    prove(script, resolved)
    launch = [*args.launch[:index], str(script), *args.launch[index + 1 :]]
    return Series(name, script, launch, ours, finished, lock)


def finished_run(path: Path) -> RunLog | None:
    """The run in a log if it came to its end."""
    if not path.is_file() or not path.stat().st_size:
        return None
    run = read_jsonl(path)
    return run if run.finished and run.score else None


def finished_runs(name: str, seeds: Sequence[int]) -> dict[int, RunLog]:
    """The seeds of a series that came to their end."""
    runs = {seed: finished_run(LOGS / f"{name}_seed{seed}.jsonl") for seed in seeds}
    return {seed: run for seed, run in runs.items() if run}


def refuse_mixed(finished: Mapping[int, RunLog], resolved: Resolved, sha256: str) -> None:
    """ToolError if a finished seed has another configuration or script than the series, or they differ in between."""
    for run in finished.values():
        if changed := differences(resolved.values, run.values):
            raise ToolError(f"mixed configurations: {run.path} was run with other values: {named(changed)}; "
                            f"choose another --name, or set them as they were, or delete the log")
        if run.facts["sha256"] != sha256:
            raise ToolError(f"mixed scripts: {run.path} was run by sha256 {run.facts['sha256'][:12]}, this series is "
                            f"{sha256[:12]}: the script was changed since. Choose another --name, or delete the log")
    refuse_unlike(list(finished.values()))


def refuse_other_data(finished: Mapping[int, RunLog], identity: Mapping[str, str]) -> None:
    """ToolError if a finished seed was run with another tokenizer or validation set than the next one would be."""
    for run in finished.values():
        for key, what in SAME_DATA.items():
            if run.facts.get(key, identity[key]) != identity[key]:
                raise ToolError(f"mixed data: {run.path} was run with another {what} ({key} {run.facts[key][:12]}, "
                                f"now {identity[key][:12]}); set its DATA_PATH and TOKENIZER_PATH, or choose another "
                                "--name")


def refuse_unlike(runs: Sequence[RunLog]) -> None:
    """ToolError if runs were made on other GPUs, ranks or data than the first."""
    for other in runs[1:]:
        if changed := unlike(runs[0], other):
            raise ToolError(f"mixed configurations: {runs[0].path} and {other.path} differ in {named(changed)}; a mean "
                            "needs seeds of one configuration, machine and data: run the odd one again")


def run_to_end(launch: Sequence[str], env: Mapping[str, str], lock: int) -> int:
    """Exit status of a command that ends with this process, as guard.py sees to it; it holds the series' lock."""
    with subprocess.Popen([sys.executable, str(GUARD), *launch], env=env, stdin=subprocess.PIPE, pass_fds=[lock],
                          start_new_session=True) as guard:  # no Ctrl-C of the terminal's: the pipe's end is the sign
        try:
            return guard.wait()
        finally:
            guard.stdin.close()


def run_seed(series: Series, seed: int) -> RunLog:
    """Run one seed, or take its finished run; what is left of a run without an end is replaced."""
    path = series.log(seed)
    if seed in series.finished:
        print(f"seed {seed}: finished before, kept ({path})", flush=True)
        return series.finished[seed]
    print(f"seed {seed}: {' '.join(series.launch)}", flush=True)
    env = {**series.env, "SEED": str(seed), "RUN_ID": path.stem, "OVERWRITE": "1"}
    status = run_to_end(series.launch, env, series.lock)
    run = finished_run(path)
    if status or run is None:
        raise ToolError(f"seed {seed} ended with status {status} and {'a' if run else 'no'} score; read the end of "
                        f"{path.with_suffix('.txt')}. The same command continues the series")
    return run


class Statistics(NamedTuple):
    """All that is said about a series, as text and as JSON."""

    text: str
    data: dict[str, object]


def seed_row(run: RunLog) -> dict[str, object]:
    """One seed's results under the names that submission.json uses."""
    row = {"val_loss": run.score.val_loss, "val_bpb": run.score.val_bpb, "artifact_bytes": run.artifact_bytes,
           "bytes_total": run.total_bytes, "steps": run.steps, "step_avg_ms": run.step_avg and 1000 * run.step_avg,
           "train_time_s": run.train_seconds, "eval_time_s": run.eval_seconds}
    rounding = {"val_loss": 8, "val_bpb": 8, "step_avg_ms": 2, "train_time_s": 2, "eval_time_s": 2}
    return {key: round(value, rounding[key]) if key in rounding else value
            for key, value in row.items() if value is not None}


def spread(summary: Summary) -> dict[str, float | int | None]:
    """A summary as JSON."""
    return {key: round(value, 8) if isinstance(value, float) else value for key, value in summary._asdict().items()}


def statistics_of(name: str, runs: Sequence[RunLog], baseline: Baseline | None) -> Statistics:
    """Table of seeds, mean and spread, and the tests against a baseline."""
    losses, bpbs = [run.score.val_loss for run in runs], [run.score.val_bpb for run in runs]
    tests = compare(losses, bpbs, baseline) if baseline else []
    lines = [f"{name}: {runs[0].score.name}, {len(runs)} seeds, config {runs[0].config_hash[:12]}, "
             f"script sha256 {runs[0].facts.get('sha256', 'unknown')[:12]}",
             f"{'seed':>8} {'steps':>7} {'ms/step':>9} {'val_loss':>11} {'val_bpb':>11} {'artifact':>11} {'total':>11}"]
    for run in runs:
        row = seed_row(run)
        lines.append(f"{run.seed:>8} {row.get('steps', ''):>7} {row.get('step_avg_ms', 0):>9.2f} "
                     f"{row['val_loss']:>11.6f} {row['val_bpb']:>11.6f} {row.get('artifact_bytes', ''):>11} "
                     f"{row.get('bytes_total', ''):>11}")
    lines += [f"val_loss {described(summarize(losses))}", f"val_bpb  {described(summarize(bpbs))}"]
    lines += [f"against {baseline.name}, {len(baseline.val_bpb)} value(s):"] if baseline else []
    lines += [f"  {test.line()}" for test in tests]
    data = {
        "name": name, "score": runs[0].score.name, "config_sha256": runs[0].config_hash,
        "script_sha256": runs[0].facts.get("sha256"), "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): seed_row(run) for run in runs},
        "val_loss": spread(summarize(losses)), "val_bpb": spread(summarize(bpbs)),
        "baseline": baseline._asdict() if baseline else None,
        "tests": [{**test._asdict(), "passes": test.passes} for test in tests],
    }  # fmt: skip
    return Statistics("\n".join(lines), data)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `seeds` takes."""
    parser.add_argument("--seeds", nargs="+", type=int, required=True, help="seeds to run, as 42 0 1234")
    parser.add_argument("--name", help="name of the series (default: the script's and the configuration's hash)")
    parser.add_argument("--baseline", type=Path, help="submission.json, its folder, or statistics to test against")
    parser.add_argument("--pack", action="store_true", help="run the packed (self-extracting) form of the frozen "
                        "script")
    parser.add_argument("launch", nargs="+", metavar="-- COMMAND", help="how one seed is run, ending in train_gpt.py")


def run(args: argparse.Namespace) -> int:
    """Run or continue the series, then print and write its statistics."""
    if len(set(args.seeds)) < len(args.seeds):
        raise ToolError(f"--seeds {' '.join(map(str, args.seeds))}: a seed twice is one seed")
    baseline = read_baseline(args.baseline) if args.baseline else None
    source = Path(args.launch[script_index(args.launch)])
    resolved = resolve(source, os.environ)
    refuse_single(resolved.values)
    name, runs = series_name(args.name, source, resolved.values), []
    with owned(name) as lock:
        series = prepare(args, resolved, name, lock)
        for seed in args.seeds:
            runs.append(run_seed(series, seed))
            refuse_unlike(runs)  # after every seed: the next one costs money
    result = statistics_of(name, runs, baseline)
    for suffix, text in ((".txt", result.text), (".json", json.dumps(result.data, indent=2))):
        (LOGS / name / f"statistics{suffix}").write_text(text + "\n", encoding="utf-8")
    print(f"{result.text}\nwritten: {LOGS / name}/statistics.txt and .json")
    return 0
