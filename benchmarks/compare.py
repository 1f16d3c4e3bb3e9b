"""Train several configurations one after the other, each in its own process, and tabulate what they reached.

    python -m benchmarks.compare [options] NAME [KEY=value ...] [-- NAME [KEY=value ...]] ...   # named variants
    python -m benchmarks.compare [options] --recipes [NAME ...]                                 # recipes (none: all)
    python -m benchmarks.compare [options] --remove KEY=value [...] [--remove ...] NAME [...]   # ablations of NAME,
                                                             # one run for each --remove (--without is the same word)

    --seconds S         MAX_WALLCLOCK_SECONDS of every run (60)
    --seeds N ...       every variant with each seed (1337); with --remove only the full configuration, for the noise
    --shared KEY=value ...   settings of all variants; a variant's own settings win
    --ranks N           GPUs of a run, through torchrun (1); a rank takes 98,304 tokens of a step
    --written-for S     clock that recipes are written for (600): their lengths in steps shrink by seconds / S
    --limit-s S         start no run that would not end within S seconds of the beginning (0: no limit)
    --out FILE          rows as JSON lines; runs that are finished there are not repeated
    --dry-run           show what would run

Data are those of DATA_PATH and TOKENIZER_PATH (VOCAB_SIZE follows the tokenizer). A setting comes from, the later
winning: the recipe, BASE below, the environment, --seconds and --shared, the variant. What a recipe says in steps
(warmdown, momentum warm-up, snapshots) or as seconds of post-training QAT is for 8 GPUs and 600 s; a GPU that takes the
same tokens makes steps at the same rate, so a run of 60 s gets a tenth of each, unless it is set by name. Variants
after `--recipes` that bear a recipe's name add settings to it. MAX_WALLCLOCK_SECONDS=0 in a variant (a matched pair at
equal ITERATIONS) takes the lengths as they are. The whole table is printed after every run; numbers come from
logs/<RUN_ID>.jsonl, and what a run printed lies in logs/<RUN_ID>.console.txt.

For example, on one GPU (--ranks N: on N of them, by torchrun):

    python -m benchmarks.compare --recipes -- xsa_gptq GPTQ_RESERVE_SECONDS=7 -- default
    python -m benchmarks.compare --shared MAX_WALLCLOCK_SECONDS=0 EVAL_STRIDE=64 \\
        -- control RECIPE=records/recipes/mar22_control.env -- asqu RECIPE=records/recipes/mar22_asqu.env
    python -m benchmarks.compare --seconds 600 --seeds 1337 42 0 --remove XSA_LAST_N=0 --remove VE_ENABLED=0 \\
        --remove BIGRAM_VOCAB_SIZE=0 --remove SMEAR_GATE_ENABLED=0 --remove MLP_ACTIVATION=relu2 \\
        --remove KEY_OFFSET=0 --remove EMA_ENABLED=0 --remove LATE_QAT_THRESHOLD=0 --remove GPTQ_ENABLED=0 default
"""

import argparse
import hashlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

import train_gpt as t
from benchmarks.common import (
    ROOT,
    Finished,
    UsageError,
    events,
    finish,
    groups_of,
    markdown,
    plain_environment,
    settings_of,
    shown,
    start,
)
from records.reading.runs import config_hash

RECIPES = ROOT / "records" / "recipes"
BASE = {"MAX_WALLCLOCK_SECONDS": "60", "WARMUP_STEPS": "5", "VAL_LOSS_EVERY": "0", "TRAIN_LOG_EVERY": "50",
        "EVAL_STRIDE": "256"}  # fmt: skip
LENGTHS = "warmdown_iters muon_momentum_warmup_steps swa_every lawa_freq post_qat_seconds".split()  # shrink with a run
SCORES = {  # part of a score's name -> column, the first that fits
    "ttt_lora": "document TTT", "ngram": "n-gram", "ttt": "TTT", "sliding_window": "sliding",
    "document_windows": "by documents", "roundtrip": "round trip",
}  # fmt: skip

Row = dict[str, Any]  # what is known of one run; the keys are those of `row_of` and FACTS


class Variant(NamedTuple):
    """A configuration by name; `removed`: an ablation of the one before it."""

    name: str
    settings: dict[str, str]
    removed: bool = False


@dataclass(frozen=True)
class Job:
    """One run: its variant and seed, its environment, what identifies it, and why it cannot run (empty: it can)."""

    variant: Variant
    seed: int
    env: dict[str, str]
    key: str
    problem: str = ""


# ---------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------

LISTS: dict[str, Callable[[str], Any]] = {  # option that takes several words -> whether a word still belongs to it
    "--seeds": str.isdigit,
    "--shared": lambda word: "=" in word,
    "--remove": lambda word: "=" in word,
    "--without": lambda word: "=" in word,
    "--recipes": lambda word: (RECIPES / f"{word}.env").is_file(),
}


def joined_lists(words: Sequence[str]) -> list[str]:
    """The words with each option of LISTS and its values as one, so that a variant's name may follow."""
    result, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word in LISTS:
            values = []
            while rest and not rest[0].startswith("--") and LISTS[word](rest[0]):
                values.append(rest.pop(0))
            word = f"{word}={chr(10).join(values)}"
        result.append(word)
    return result


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options and, in `variants`, the named groups of settings; UsageError where they mean nothing."""
    parser = argparse.ArgumentParser(prog="benchmarks.compare", usage="see --help", add_help=False)
    parser.add_argument("--seconds")
    parser.add_argument("--seeds", type=str.split, default=["1337"])
    parser.add_argument("--shared", type=str.splitlines, default=[])
    parser.add_argument("--remove", "--without", type=str.splitlines, action="append", default=[])
    parser.add_argument("--recipes", type=str.split)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--written-for", type=float, default=600.0)
    parser.add_argument("--limit-s", type=float, default=0.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("words", nargs="*")
    first, *others = groups_of(arguments)
    given = parser.parse_intermixed_args(joined_lists(first))
    groups = [group for group in (given.words, *others) if group]
    given.variants = variants_of(given, groups)
    given.shared = ({"MAX_WALLCLOCK_SECONDS": given.seconds} if given.seconds else {}) | settings_of(given.shared)
    given.seeds = [int(seed) for seed in given.seeds]
    if len(set(given.seeds)) < len(given.seeds) or not given.seeds:
        raise UsageError(f"--seeds {' '.join(map(str, given.seeds))}: one seed or more, each once")
    return given


def variants_of(given: argparse.Namespace, groups: Sequence[Sequence[str]]) -> list[Variant]:
    """Recipes, then the named groups, then (with --remove) the ablations of the only group."""
    chosen: dict[str, dict[str, str]] = {}
    if given.recipes is not None:
        names = given.recipes or sorted(path.stem for path in RECIPES.glob("*.env") if path.stem != "demo")
        chosen = {name: {"RECIPE": str(RECIPES / f"{name}.env")} for name in names}
    recipes = set(chosen)
    for name, *words in groups:
        if "=" in name or name.startswith("-"):
            raise UsageError(f"{name}: expected the name of a variant (options come before the first variant)")
        if name in chosen and name not in recipes:
            raise UsageError(f"{name}: two variants of this name")
        chosen[name] = chosen.get(name, {}) | settings_of(words)
    if not chosen:
        raise UsageError("no variant: give NAME [KEY=value ...] or --recipes")
    variants = [Variant(name, settings) for name, settings in chosen.items()]
    if given.remove and len(variants) > 1:
        raise UsageError(f"--remove takes one full configuration, not {len(variants)}: {' '.join(chosen)}")
    full = variants[0].settings
    return variants + [Variant(f"{' '.join(words)}", full | settings_of(words), True) for words in given.remove]


# ---------------------------------------------------------------------------------------
# What is to run
# ---------------------------------------------------------------------------------------


def vocabulary(env: Mapping[str, str]) -> dict[str, str]:
    """VOCAB_SIZE of the tokenizer at TOKENIZER_PATH; nothing where there is none."""
    path = env.get("TOKENIZER_PATH", "")
    if not Path(path).is_file():
        return {}
    return {"VOCAB_SIZE": str(sentencepiece.SentencePieceProcessor(model_file=path).vocab_size())}


def shortened(cfg: t.Config, written_for: float) -> dict[str, str]:
    """Those of LENGTHS that nobody set by name, in proportion to the clock."""
    ratio = cfg.max_wallclock_seconds / written_for if 0 < cfg.max_wallclock_seconds < written_for else 1.0
    idle = {"swa_every": not cfg.swa_enabled, "lawa_freq": not cfg.lawa_enabled}
    named = {name for name in LENGTHS if cfg.sources[name].startswith("environment")}
    values = {name: vars(cfg)[name] for name in LENGTHS if name not in named and not idle.get(name)}
    scaled = {n: max(1, round(v * ratio)) if isinstance(v, int) else v * ratio for n, v in values.items() if v}
    return {name.upper(): f"{value:g}" for name, value in scaled.items() if value != values[name]}


def job_of(given: argparse.Namespace, base: Mapping[str, str], variant: Variant, seed: int) -> Job:
    """The run of a variant with a seed; a configuration that train_gpt.py refuses becomes its `problem`."""
    env = {**base, **given.shared, **variant.settings, "SEED": str(seed)}
    try:
        env |= shortened(t.Config.from_env(env), given.written_for)
        values = vars(t.Config.from_env(env)) | {"sources": None}
    except t.UserError as problem:
        return Job(variant, seed, env, "", f"error: {problem}")
    script = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    identity = f"{variant.name} {seed} {given.ranks} {script} {config_hash(values)}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    env["RUN_ID"] = f"compare_{re.sub(r'[^A-Za-z0-9.]+', '_', variant.name)[:60]}_{key[:8]}_seed{seed}"
    return Job(variant, seed, env, key)


def jobs_of(given: argparse.Namespace) -> list[Job]:
    """All runs: seed by seed, so that an early end leaves every variant a row; of ablations the full runs first."""
    surroundings = plain_environment()
    base = {**BASE, "TRAIN_BATCH_TOKENS": str(98_304 * given.ranks), **vocabulary(surroundings), **surroundings}
    pairs = [(v, seed) for seed in given.seeds for v in given.variants if not v.removed]
    pairs += [(v, given.seeds[0]) for v in given.variants if v.removed]
    return [job_of(given, base, variant, seed) for variant, seed in pairs]


def described(jobs: Iterable[Job]) -> str:
    """The variants with what they set and what was shortened for them, one a line."""
    lines = {}
    for job in jobs:
        lengths = {name.upper(): job.env[name.upper()] for name in LENGTHS if name.upper() in job.env}
        words = " ".join(f"{key}={value}" for key, value in {**lengths, **job.variant.settings}.items())
        lines.setdefault(job.variant.name, f"  {job.variant.name}: {words} {job.problem}".rstrip())
    return "\n".join(lines.values())


# ---------------------------------------------------------------------------------------
# What a run reached
# ---------------------------------------------------------------------------------------

FACTS: dict[str, Callable[[dict[str, Any]], Row]] = {  # event -> what it says; of several the last counts
    "config": lambda e: {"device": e["device"], "torch": e["torch"]},
    "model": lambda e: {"parameters": e["parameters"]},
    "val": lambda e: {"steps": e["step"], "step_ms": e["train_time_ms"] / max(e["step"], 1)},
    "degradation": lambda e: {"degradation": e["bpb"]},
    "size": lambda e: {"total_bytes": e["artifact_bytes"] + e["code_bytes"], "limit_bytes": e["limit"]},
    "inactive": lambda e: {"inactive": [feature.split(" (")[0] for feature in e["features"]]},
    "ledger": lambda e: {f"{e['budget']}_s": e["seconds"], f"{e['budget']}_limit_s": e["limit"]},
}


def row_of(job: Job, finished: Finished) -> Row:
    """Everything that the table shows of a run, from its event stream."""
    row = {"name": job.variant.name, "seed": job.seed, "key": job.key, "settings": job.variant.settings, "scores": {},
           "status": finished.status, "error": finished.error, "wall_s": finished.seconds}  # fmt: skip
    for event in events(job.env["RUN_ID"]) if job.key else ():
        kind = event["event"]
        if kind == "score" and event["name"].startswith("DIAGNOSTIC "):
            is_rounded = event["name"].endswith(" rounded")  # the same weights on the grid of QAT
            row |= {} if is_rounded else {"before": event["val_bpb"]}
        elif kind == "score":
            label = next((label for part, label in SCORES.items() if part in event["name"]), event["name"])
            row["scores"][label] = event["val_bpb"]
        elif kind in FACTS:
            row |= FACTS[kind](event)
    return row


def final(row: Row) -> float | None:
    """The submitted score: the last one."""
    return next(reversed(row["scores"].values()), None)


def read_done(path: Path | None) -> dict[str, Row]:
    """Finished rows of an earlier call by key; a line that a killed call left unfinished does not count."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["status"] == 0:
            rows[row["key"]] = row
    return rows


# ---------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of numbers: title, value in a row (or None), format."""

    title: str
    value: Callable[[Row], float | None]
    form: str


def field(title: str, key: str, form: str) -> Column:
    return Column(title, lambda row: row.get(key), form)


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns that have a value in any row; scores in the order in which a run logs them."""
    labels = [label for label in reversed(SCORES.values())]
    labels += sorted({label for row in rows for label in row["scores"]} - set(labels))
    scores = [Column(label, lambda row, label=label: row["scores"].get(label), ".5f") for label in labels]
    columns = [
        field("parameters", "parameters", ",.0f"), field("steps", "steps", ",.0f"), field("ms/step", "step_ms", ".2f"),
        field("before quantization", "before", ".5f"), *scores, field("degradation", "degradation", "+.5f"),
        field("artifact + code", "total_bytes", ",.0f"), field("eval s", "eval_s", ".1f"),
        field("train s", "train_s", ".1f"), field("of s", "train_limit_s", ".0f"), field("wall s", "wall_s", ".0f"),
    ]  # fmt: skip
    return [column for column in columns if any(column.value(row) is not None for row in rows)]


def outcome(row: Row) -> str:
    """How a run ended, in a cell."""
    if row["status"]:
        return f"**exit {row['status']}**: {row['error'][:200]}".replace("|", "/")
    over = [name for name, spent, limit in (("train", "train_s", "train_limit_s"), ("eval", "eval_s", "eval_limit_s"),
                                            ("bytes", "total_bytes", "limit_bytes"))
            if 0 < row.get(limit, 0) < row.get(spent, 0)]  # fmt: skip
    return f"over budget: {' '.join(over)}" if over else "ok"


def spread_rows(columns: Sequence[Column], rows: Sequence[Row]) -> list[list[str]]:
    """The mean and the sample standard deviation of a variant's finished runs."""
    samples = [[v for row in rows if (v := column.value(row)) is not None] for column in columns]
    means = [shown(statistics.fmean(s) if s else None, c.form) for c, s in zip(columns, samples, strict=True)]
    sds = [shown(statistics.stdev(s) if len(s) > 1 else None, c.form.lstrip("+"))
           for c, s in zip(columns, samples, strict=True)]  # fmt: skip
    return [[rows[0]["name"], label, *cells, "", ""] for label, cells in ((f"mean of {len(rows)}", means), ("sd", sds))]


def differences(given: argparse.Namespace, rows: Sequence[Row]) -> list[Column]:
    """For ablations: the last score less the full configuration's mean, and that over the noise of a difference."""
    full = given.variants[0].name
    scores = [final(row) for row in rows if row["name"] == full and not row["status"] and row["scores"]]
    if not given.remove or not scores:
        return []
    mean = statistics.fmean(scores)
    noise = statistics.stdev(scores) * math.sqrt(1 + 1 / len(scores)) if len(scores) > 1 else 0.0

    def difference(row: Row) -> float | None:
        return None if row["name"] == full or row["status"] or not row["scores"] else final(row) - mean

    def over_noise(row: Row) -> float | None:
        return None if difference(row) is None or not noise else difference(row) / noise

    columns = [Column(f"minus {full}", difference, "+.5f"), Column("over noise", over_noise, "+.1f")]
    return [column for column in columns if any(column.value(row) is not None for row in rows)]


def table(given: argparse.Namespace, rows: Sequence[Row]) -> str:
    """All rows, variant by variant, with the spread of those that ran with several seeds."""
    columns = columns_of(rows) + differences(given, rows)
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        for row in own:
            numbers = [shown(column.value(row), column.form) for column in columns]
            lines.append([name, str(row["seed"]), *numbers, ", ".join(row.get("inactive", [])), outcome(row)])
        finished = [row for row in own if not row["status"]]
        lines += spread_rows(columns, finished) if len(finished) > 1 else []
    devices = dict.fromkeys(f"{row['device']}, torch {row['torch']}" for row in rows if "device" in row)
    warning = " (timings of different machines do not compare)" if len(devices) > 1 else ""
    note = "\nover noise: the difference over sd x sqrt(1 + 1/n) of the n full runs" if given.remove else ""
    head = ["variant", "seed", *(column.title for column in columns), "never activated", "status"]
    return f"{'; '.join(devices)}{warning}; scores in bits per byte\n{markdown(head, lines)}{note}"


# ---------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------


def run_job(given: argparse.Namespace, job: Job) -> Row:
    """Run a job to its end; its row is in --out before anything else can happen."""
    print(f"running {job.variant.name}, seed {job.seed}", flush=True)
    begin = time.perf_counter()
    if job.problem:
        finished = Finished(1, 0.0, job.problem)
    else:
        finished = finish(start(job.env, given.ranks), job.env["RUN_ID"], begin)
    row = row_of(job, finished)
    if given.out:
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return row


def run_all(given: argparse.Namespace, jobs: Sequence[Job]) -> list[Row]:
    """Run what is not done yet while the time allows, with a table after every run; returns the rows."""
    done = read_done(given.out)
    rows = [done[job.key] for job in jobs if job.key in done]
    waiting = [job for job in jobs if job.key not in done]
    print(f"{len(rows)} runs finished before, {len(waiting)} to do", flush=True)
    begin = time.perf_counter()
    while waiting:
        longest = max((row["wall_s"] for row in rows), default=0.0)
        if given.limit_s and time.perf_counter() - begin + longest > given.limit_s:
            break
        rows.append(run_job(given, waiting.pop(0)))
        if len(rows) < len(jobs):
            print(table(given, rows), flush=True)
    print(f"\nvariants:\n{described(jobs)}")
    print(table(given, rows))
    for job in waiting:
        print(f"not run, the time is up: {job.variant.name}, seed {job.seed}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every run that was started came to its end."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        given = parse(arguments)
        jobs = jobs_of(given)
    except (UsageError, t.UserError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if given.dry_run:
        print(f"{len(jobs)} runs\n{described(jobs)}")
        return int(any(job.problem for job in jobs))
    return int(any(row["status"] for row in run_all(given, jobs)))


if __name__ == "__main__":
    sys.exit(main())
