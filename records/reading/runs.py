"""Read what a run logged: our JSON lines, or a text log in any of the dialects of published records.

Family A has `step:1/20000 train_loss:..` lines, family B `1/20000 train_loss: ..`; both may begin with a dump of the
source, so every pattern is anchored to a line's start and wants digits where the source has expressions.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from records import ToolError
from records.reading.script import differences, hyperparameters

NUMBER = r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|nan|inf)"
SCORE = re.compile(rf"^[\d:. -]*([A-Za-z][\w ().+-]*?)(?: stride:\d+)?[ :]+val_loss[:=] ?{NUMBER} "
                   rf"val_bpb[:=] ?{NUMBER}(.*)$")
DIAGNOSTIC = re.compile(r"diagnostic|pre.?quant|post_ema|before|^swa|^ema", re.IGNORECASE)
SOURCE_END = re.compile(r"^={100}$", re.MULTILINE)
RUN_START = re.compile(r"^(?:source: sha256:[0-9a-f]{64} .*\n)?Running Python \d", re.MULTILINE)
STEP_LINE = r"^(?:step:)?\d+/\d+ (?:train|val)_loss"
# What a console that was captured puts before every line.
STAMP = re.compile(r"^\[?(?:\d{10}\.\d+|\d{4}-\d\d-\d\d[T ][\d:.,]+Z?)\]? ", re.MULTILINE)
RESUMED = r"^resumed: step:(\d+) train_time:(\d+)ms of which lost:(\d+)ms$"

# name of the quantity -> pattern with one group; of several matches the last counts
COUNTS = {
    "seed": r"^(?:.* )?seed: ?(\d+)\b",
    "world_size": r"^(?:.* )?world_size: ?(\d+)\b",
    "model_params": r"^model_params: ?(\d+)",
    "train_shards": r"^(?:.* )?train_shards: ?(\d+)",
    "train_tokens": r"^train_loader:.* tokens:(\d+)",
    "val_tokens": r"^(?:val_loader:.* tokens:|val_tokens: ?)(\d+)",
    "val_bytes": r"^val_tokens:.* val_bytes: ?(\d+)",
    "val_documents": r"^(?:val_tokens:.* val_documents: ?|ttt_phased: total_docs:)(\d+)",
    "code_bytes": r"^Code size(?! \((?:un)?compressed\))[^:]*: ?(\d+) bytes",
    "code_bytes_raw": r"^Code size \(uncompressed\): ?(\d+) bytes",
    "code_bytes_packed": r"^Code size \(compressed\): ?(\d+) bytes",
    "source_bytes": r"^source: .*\bbytes:(\d+)",
}
SECONDS = {  # seconds per unit of the group, pattern
    "stopped_at": (1e-3, r"^stopping_early: .*train_time: ?(\d+)ms"),
    "step_time": (1e-3, r"^step:\d+/\d+ .*train_time:(\d+)ms"),
    "step_minutes": (60.0, r"^\d+/\d+ train_loss: .*train_time: ([\d.]+)m\b"),
    "hessians": (1.0, r"^GPTQ:collected .* in ([\d.]+)s"),
    "total_eval": (1.0, r"^total_eval_time: ?([\d.]+)s"),
    "step_avg": (1e-3, r"^step:\d+/\d+ .*step_avg:([\d.]+)ms"),
    "budget_train": (1.0, r"^budget train: ([\d.]+)s"),
    "budget_eval": (1.0, r"^budget eval: ([\d.]+)s"),
}
# Training on validation text before the artifact is made, in the words that logs have for it.
LEARNS = r"(?:ttt|test.?time.?(?:train|adapt)\w*|adapt\w*|fine.?tun\w*|slot)"
MADE = r"(?:quant(?:iz\w*)?|gptq|export|serializ\w*|compress\w*)"
BETWEEN = r"[\W_]*(?:[a-z]+[\W_]+){0,3}?"  # words between
PRE_QUANT_TTT = (rf"(?i)^(?! )(.*(?:\bpre[\W_]?{MADE}[\W_]*{LEARNS}|\b{LEARNS}{BETWEEN}(?:before|pre|prior.to)[\W_]*"
                 rf"(?:the\W+)?{MADE}|\b{LEARNS}{BETWEEN}(?:val|validation){BETWEEN}before)"
                 r"(?!.*\b(?:\w*enabled|epochs)?[:=] ?(?:0|false|none|off)\b).*)$")
# Loading, compiling and counting for the evaluation, after the artifact's size; what is timed with a score is not it.
OFF_THE_CLOCK = (r"(?im)^(?!.*(?:eval_time|val_bpb|\.py\b))(?:.*[^a-z])?(?:deserializ|decompress|dequantiz|load|compil|"
                 r"warm.?up|precomput|prefill|pre-?build)\w*\b.*?\b(?:done|took|finished|in|elapsed|after)\W+"
                 r"([\d.]+) ?(ms|s)\b")
ARTIFACT_LINE = r"^(?:Serialized model|Total submission size) ?\S.*\d+ bytes"
EVALUATED = re.compile(r"^(.*?)\b(?:eval|ttt|adapt|scor)\w*time[:=] ?([\d.]+) ?(ms|s)\b", re.IGNORECASE)
PART = re.compile(r"\b(?:part|phase|half|pass|chunk|block|group|round)[ _:-]?\d", re.IGNORECASE)
CLOCK = r"^step:(\d+)/\d+ .*train_time:(\d+)ms step_avg:([\d.]+)ms"
SECONDS_IN = {"ms": 1e-3, "s": 1.0}


# What logs name differently in every run of one configuration, beside script.IDENTITY.
FOREIGN_IDENTITY = ("logfile", "rank", "local_rank", "is_main_process", "model_path", "quantized_model_path",
                    "artifact_dir", "datasets_dir", "train_files", "val_files", "train_log_every")  # fmt: skip
SAME_COUNTS = ("world_size", "model_params", "train_shards", "train_tokens", "val_tokens")
SAME_DATA = {"tokenizer_sha256": "tokenizer", "val_sha256": "validation set"}  # fact -> what it is the SHA-256 of
SAME_FACTS = ("sha256", "device", "torch", "settings", *SAME_DATA)


class Point(NamedTuple):
    """A logged loss and where it stands: steps done, seconds of training."""

    step: int
    seconds: float
    loss: float
    bpb: float = math.nan


class Mark(NamedTuple):
    """A change of phase: where it happened and its name."""

    step: int
    seconds: float
    name: str


class Resume(NamedTuple):
    """Where a run that was killed went on: the step, seconds counted there, and those of them that were lost."""

    step: int
    seconds: float
    lost: float


class Score(NamedTuple):
    """One named score of a log; `exact` if the line has all digits."""

    name: str
    val_loss: float
    val_bpb: float
    eval_seconds: float | None = None


@dataclass
class RunLog:
    """What one log says. None or empty where it says nothing; durations are seconds, sizes bytes."""

    path: Path
    dialect: str
    counts: dict[str, int] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    sizes: list[tuple[str, int]] = field(default_factory=list)  # (kind, artifact bytes)
    totals: list[tuple[str, int]] = field(default_factory=list)  # (kind, artifact + code bytes)
    scores: list[Score] = field(default_factory=list)
    train: list[Point] = field(default_factory=list)
    val: list[Point] = field(default_factory=list)
    phases: list[Mark] = field(default_factory=list)
    resumes: list[Resume] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)  # hyperparameters with the identity
    sources: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)  # words: sha256, torch, device, dataset, attention ...
    steps: int | None = None
    source_text: str = ""  # what stands before the run in some logs, its source last
    off_the_clock: float = 0.0  # seconds of loading and compiling that the evaluation timer left out
    parts: float = 0.0  # seconds of evaluation on lines of their own, without a score or with that of a part
    contradictions: list[str] = field(default_factory=list)  # where the log disagrees with itself
    finished: bool = False

    @property
    def seed(self) -> int | None:
        """The seed, from the log or else from the file's name."""
        named = re.search(r"(?:seed[_-]?|_s)(\d+)|_(\d+)$", self.path.stem)
        return self.counts.get("seed", int(named[1] or named[2]) if named else None)

    @property
    def score(self) -> Score | None:
        """The submitted score: the last one that is no diagnostic, with its exact digits. None if that is no number."""
        final = [score for score in self.scores if not DIAGNOSTIC.search(score.name)]
        return final[-1] if final and math.isfinite(final[-1].val_loss + final[-1].val_bpb) else None

    @property
    def artifact_bytes(self) -> int | None:
        return self.sizes[-1][1] if self.sizes else None

    @property
    def code_bytes(self) -> int | None:
        """The code bytes that the log's total counts."""
        packed = self.counts.get("code_bytes_packed")
        return self.counts.get("code_bytes", packed if packed is not None else self.counts.get("code_bytes_raw"))

    @property
    def total_bytes(self) -> int | None:
        """Artifact and code: as logged, else their sum."""
        if self.totals:
            return self.totals[-1][1]
        parts = self.artifact_bytes, self.code_bytes
        return None if None in parts else sum(parts)

    @property
    def train_seconds(self) -> float | None:
        """Training with calibration and GPTQ where the log has them on the clock."""
        if "budget_train" in self.times:
            return self.times["budget_train"]
        exact = [self.times[name] for name in ("stopped_at", "step_time") if name in self.times]
        end = max(exact, default=self.times.get("step_minutes"))
        return end if end is None else end + self.times.get("hessians", 0.0)

    @property
    def eval_seconds(self) -> float | None:
        """From opening the artifact to the score, or what the log has nearest to it; with its parts, if it has some."""
        same = {score.eval_seconds for score in self.scores if self.score and score.eval_seconds is not None
                and abs(score.val_bpb - self.score.val_bpb) < 5.1e-5}  # the last line may be another name of one before
        found = [sum(same) + self.parts] if same or self.parts else []
        return max([*found, *(self.times[name] for name in ("budget_eval", "total_eval") if name in self.times)],
                   default=None)

    @property
    def step_avg(self) -> float | None:
        """Seconds per step over the whole run."""
        if "step_avg" in self.times:
            return self.times["step_avg"]
        stopped = self.times.get("stopped_at", self.times.get("step_minutes"))
        return stopped / self.steps if stopped and self.steps else None

    @property
    def config_hash(self) -> str | None:
        return config_hash(self.values) if self.values else None


def config_hash(values: dict[str, Any]) -> str:
    """sha256 of the hyperparameters without the run's identity."""
    return hashlib.sha256(json.dumps(hyperparameters(values), sort_keys=True).encode()).hexdigest()


def unlike(a: RunLog, b: RunLog) -> dict[str, tuple[Any, Any]]:
    """Where two runs are not of one configuration: NAME -> (a's, b's), of what both logs say.

    Hyperparameters, the script, ranks, GPU, torch, and the size of model and data, which even terse logs show.
    """
    ours, theirs = ({key: value for key, value in run.values.items() if key not in FOREIGN_IDENTITY
                     and not key.endswith(("_files", "_path", "_dir"))} for run in (a, b))
    found = differences(ours, theirs) if ours and theirs else {}
    for names, kind in ((SAME_COUNTS, "counts"), (SAME_FACTS, "facts")):
        pairs = {name: (getattr(a, kind).get(name), getattr(b, kind).get(name)) for name in names}
        found |= {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}
    return found


# ---------------------------------------------------------------------------------------
# Our JSON lines
# ---------------------------------------------------------------------------------------

def read_events(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, event) for every line. A last line that a running or killed run left unfinished is dropped."""
    lines = text_of(path).split("\n")
    unfinished = len(lines) if lines[-1] else 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = {} if number == unfinished and number > 1 else None
        if not isinstance(event, dict):
            raise ToolError(f"{path}:{number}: not a JSON object, so this is no run log in JSON lines; text logs end "
                            "in .txt or .log")
        yield number, event


def text_of(path: Path) -> str:
    """A log's text; ToolError says why there is none."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ToolError(f"{path}: no such file. A run writes logs/<RUN_ID>.jsonl and .txt in the folder it is started "
                        "in; see what is there with `ls logs/`") from None
    except OSError as error:
        raise ToolError(f"{path}: cannot be read ({error})") from None
    codec = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    if codec == "utf-8-sig" and b"\0" in raw:
        raise ToolError(f"{path}: cannot be read as a text file (it holds NUL bytes); save it as UTF-8")
    return raw.decode(codec, "replace").replace("\r\n", "\n")


def read_jsonl(path: Path) -> RunLog:
    """The last run in a JSON-lines log."""
    run = RunLog(path, "jsonl")
    for number, event in read_events(path):
        before = run
        if event.get("event") == "config":
            run = RunLog(path, "jsonl")
        try:
            take_event(run, event)
            if run.values.get("resume") and run is not before:
                go_on(run, before)
        except (KeyError, TypeError, ValueError) as error:
            raise ToolError(f"{path}:{number}: the {event.get('event')!r} event is not what train_gpt.py writes "
                            f"({error!r})") from None
    return run


def go_on(run: RunLog, before: RunLog) -> None:
    """Put what a run logged before it was resumed in front, less what it did again from its checkpoint on."""
    first = run.resumes[0].step if run.resumes else math.inf
    for name in ("train", "val", "phases"):
        getattr(run, name)[:0] = [point for point in getattr(before, name) if point.step <= first]
    run.resumes[:0] = before.resumes
    run.steps, run.times = run.steps or before.steps, {**before.times, **run.times}


def take_event(run: RunLog, event: dict[str, Any]) -> None:
    """Add one event to the run; KeyError, TypeError or ValueError if a field is missing or no number."""
    kind = event.get("event")
    if kind == "config":
        run.values, run.sources = event["values"], event["sources"]
        run.facts.update({name: str(event[name]) for name in ("sha256", "torch", "device")})
        run.counts.update(seed=event["values"]["seed"], world_size=event["world_size"])
    elif kind == "data":
        known = {"tokens": f"{event['split']}_tokens", "shards": f"{event['split']}_shards",
                 "documents": f"{event['split']}_documents", "bytes": f"{event['split']}_bytes"}  # fmt: skip
        run.counts.update({name: event[key] for key, name in known.items() if key in event})
        run.facts.update({name: str(event[name]) for name in SAME_DATA if name in event})
    elif kind == "model":
        run.counts["model_params"] = event["parameters"]
    elif kind in ("train", "val", "phase"):
        take_step(run, event, int(event["step"]), float(event["train_time_ms"]) / 1000)
    elif kind == "resume":
        run.resumes.append(Resume(int(event["step"]), event["train_time_ms"] / 1000, event["lost_ms"] / 1000))
        for name in ("train", "val", "phases"):
            setattr(run, name, [point for point in getattr(run, name) if point.step <= event["step"]])
    elif kind == "score":
        run.scores.append(Score(str(event["name"]), float(event["val_loss"]), float(event["val_bpb"]),
                                event["eval_time_ms"] / 1000))
    elif kind == "size":
        run.sizes.append((event["kind"], event["artifact_bytes"]))
        run.totals.append((event["kind"], event["artifact_bytes"] + event["code_bytes"]))
        run.counts["code_bytes"] = event["code_bytes"]
    elif kind == "ledger":
        run.times[f"budget_{event['budget']}"] = event["seconds"]
        run.finished = run.finished or event["budget"] == "eval"


def take_step(run: RunLog, event: dict[str, Any], step: int, seconds: float) -> None:
    """An event on the curves: a loss of training, one of validation, or a change of phase."""
    if event["event"] == "phase":
        run.phases.append(Mark(step, seconds, str(event["name"])))
    elif event["event"] == "train":
        run.train.append(Point(step, seconds, float(event["train_loss"])))
        run.times["step_avg"] = event["step_avg_ms"] / 1000
    else:
        run.val.append(Point(step, seconds, float(event["val_loss"]), float(event["val_bpb"])))
        run.steps, run.times["step_time"] = step, seconds
        run.times["step_avg"] = seconds / max(step, 1)


# ---------------------------------------------------------------------------------------
# Text logs
# ---------------------------------------------------------------------------------------

def last_match(pattern: str, text: str) -> str | None:
    """The group of the last match, or None."""
    found = re.findall(pattern, text, re.MULTILINE)
    return found[-1] if found else None


def read_text(path: Path) -> RunLog:
    """The last run in a text log of ours or of either published family."""
    return text_runs(path)[-1]


def text_runs(path: Path) -> list[RunLog]:
    """All runs that a text log holds: scripts that open it to append leave several, and one that was resumed is one."""
    raw, runs = STAMP.sub("", text_of(path)), []
    rules = [rule.end() for rule in SOURCE_END.finditer(raw)]
    starts = [found.start() for found in RUN_START.finditer(raw)] or rules[:1] or [0]
    dump = raw[: starts[0]]
    is_dump = "import " in dump and bool(re.search(STEP_LINE, raw[starts[0] :], re.MULTILINE))
    starts[0] = starts[0] if is_dump else 0
    for start, end in zip(starts, [*starts[1:], len(raw)], strict=True):
        text = raw[start:end]
        if is_dump and dump[:400] in text:  # the next run's source stands before its start
            text = text[: text.index(dump[:400])]
        if is_dump and not runs:  # settings may stand before the source
            text = "".join(part for part in SOURCE_END.split(dump) if "import " not in part) + text
        run = read_run_text(path, text)
        run.source_text = raw[:start].rstrip().removesuffix("=" * 100) if is_dump else ""
        if run.values.get("resume") and runs:
            go_on(run, runs.pop())
        runs.append(run)
    return runs


def read_run_text(path: Path, text: str) -> RunLog:
    """One run of a text log."""
    run = RunLog(path, dialect_of(text))
    for name, pattern in COUNTS.items():
        if (found := last_match(pattern, text)) is not None:
            run.counts[name] = int(found)
    for name, (unit, pattern) in SECONDS.items():
        if (found := last_match(pattern, text)) is not None:
            run.times[name] = float(found) * unit
    if re.search(r"self.?gen|generat\w+ .*calibration", text, re.IGNORECASE):
        run.times.pop("hessians", None)  # calibration on the model's own text uses no data: it may follow the clock
    sizes = [found.end() for found in re.finditer(ARTIFACT_LINE, text, re.MULTILINE)]
    after = text[sizes[-1] :] if sizes else text
    run.off_the_clock = sum(float(time) * SECONDS_IN[unit.lower()] for time, unit in re.findall(OFF_THE_CLOCK, after))
    read_facts(run, text)
    read_curves(run, text)
    read_scores(run, text)
    read_parts(run, after)
    check_clock(run, text)
    run.resumes = [Resume(int(step), int(spent) / 1000, int(lost) / 1000)
                   for step, spent, lost in re.findall(RESUMED, text, re.MULTILINE)]
    run.finished = run.score is not None
    return run


def dialect_of(text: str) -> str:
    """ "ours", "A" or "B", by the form of the step lines; "none" if there are no such lines."""
    if re.search(r"^source: sha256:[0-9a-f]{64} ", text, re.MULTILINE):
        return "ours"
    if re.search(r"^step:\d+/\d+ ", text, re.MULTILINE):
        return "A"
    return "B" if re.search(r"^\d+/\d+ (?:train|val)_loss: ", text, re.MULTILINE) else "none"


def read_facts(run: RunLog, text: str) -> None:
    """Words and sizes of a text log."""
    patterns = {
        "sha256": r"^source: sha256:([0-9a-f]{64})", "torch": r"^Running (?:Python .* )?PyTorch (\S+)",
        "python": r"^Running Python (\S+)", "device": r"^device:\w+ \((.*?)\) ",
        "dataset": r"^train_loader:dataset: ?(\S+)", "attention": r"^attn_backend: ?(\S+)",
        "inactive": r"^never activated: (.*)$", "driver": r"Driver Version: *([\d.]+)",
        **{name: rf"^(?:.* )?{name}:([0-9a-f]{{64}})" for name in SAME_DATA},
        "pre_quant_ttt": PRE_QUANT_TTT,
    }  # fmt: skip
    for name, pattern in patterns.items():
        if (found := last_match(pattern, text)) is not None:
            run.facts[name] = found
    sized = re.findall(r"^Serialized model ?([^:\n]*): ?(\d+) bytes", text, re.MULTILINE)
    run.sizes = [(kind.strip(), int(size)) for kind, size in sized if kind.strip()]
    totals = re.findall(r"^Total submission size ?([^:\n]*): ?(\d+) bytes", text, re.MULTILINE)
    run.totals = [(kind.strip(), int(size)) for kind, size in totals if kind.strip() or not sized[1:]]
    shown = re.findall(r"^(?:train_batch_tokens|attention_mode|tie_embeddings):.*$", text, re.MULTILINE)
    if shown:  # all that family A says of its configuration
        run.facts["settings"] = "; ".join(shown)
    for name, value in hyperparameter_lines(text):
        run.values[name], run.sources[name] = parse_setting(value)
    if isinstance(run.values.get("seed"), int):
        run.counts["seed"] = run.values["seed"]
    if folder := run.values.get("datasets_dir", run.values.get("data_path")):
        run.facts.setdefault("dataset", Path(str(folder)).name)


def hyperparameter_lines(text: str) -> Iterator[tuple[str, str]]:
    """The indented `name: value` lines under `Hyperparameters:`."""
    block = re.search(r"^Hyperparameters:\n((?:  \w+: ?.*\n)+)", text, re.MULTILINE)
    for line in block[1].splitlines() if block else ():
        name, _, value = line.strip().partition(":")
        yield name, value.strip()


def parse_setting(text: str) -> tuple[Any, str]:
    """(value, source) of a hyperparameter's line; the source is empty where the log has none."""
    value, source = text, ""
    if found := re.fullmatch(r"(.*?) ?\(((?:default|recipe|environment)(?: as \w+)?)\)", text):
        value, source = found[1].strip(), found[2]
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        parsed = value
    return list(parsed) if isinstance(parsed, tuple) else parsed, source


def read_curves(run: RunLog, text: str) -> None:
    """Losses by step, changes of phase and the number of steps. Lines without a time take it from their neighbours."""
    lines = re.findall(rf"^(?:step:)?(\d+)/\d+ (train|val)_loss: ?{NUMBER}(?: val_bpb: ?{NUMBER})?(.*)$", text,
                       re.MULTILINE)
    clock = {int(step): seconds for step, *_, rest in lines if (seconds := train_time(rest)) is not None}
    if stopped := re.search(r"^stopping_early: (.*)step: ?(\d+)/\d+", text, re.MULTILINE):
        clock[int(stopped[2])] = train_time(stopped[1]) or math.nan
    for step, kind, loss, bpb, _ in lines:
        point = Point(int(step), seconds_at(clock, int(step)), float(loss), float(bpb or "nan"))
        (run.train if kind == "train" else run.val).append(point)
    for name, step in re.findall(r"^(\w+:(?:enabled|start))\b.* step: ?(\d+)", text, re.MULTILINE):
        run.phases.append(Mark(int(step), seconds_at(clock, int(step)), name))
    ends = [point.step for point in run.train[-1:] + run.val[-1:]]
    run.steps = int(stopped[2]) if stopped else max(ends, default=None)


def train_time(text: str) -> float | None:
    """Seconds of `train_time:24ms` or `train_time: 3.2m`."""
    found = re.search(r"train_time: ?([\d.]+)(ms|m)\b", text)
    return None if found is None else float(found[1]) * {"ms": 1e-3, "m": 60.0}[found[2]]


def seconds_at(clock: Mapping[int, float], step: int) -> float:
    """Seconds of training at a step, on the line between the nearest steps whose time was logged."""
    before, after = ([known for known in clock if known <= step], [known for known in clock if known >= step])
    if not before or not after:
        return clock[max(before)] if before else clock[min(after)] if after else math.nan
    low, high = max(before), min(after)
    share = (step - low) / (high - low) if high > low else 0.0
    return clock[low] + share * (clock[high] - clock[low])


def read_scores(run: RunLog, text: str) -> None:
    """Named scores in the order logged; an exact line takes the place of the rounded one before it."""
    shown: list[str] = []
    for line in text.splitlines():
        found = SCORE.match(line)
        if not found:
            continue
        name, timing = found[1].strip(), re.search(r"eval_time: ?(\d+)ms", found[4])
        score = Score(name.removesuffix("_exact"), float(found[2]), float(found[3]),
                      int(timing[1]) / 1000 if timing else None)  # fmt: skip
        before = run.scores[-1] if run.scores else None
        if before and name.endswith("_exact") and before.name == score.name:
            run.scores[-1] = score._replace(eval_seconds=before.eval_seconds)
            if any(abs(float(rounded) - exact) > 0.51 * 10.0 ** -len(rounded.partition(".")[2])
                   for rounded, exact in zip(shown, score[1:3], strict=True)):
                run.contradictions.append(f"{name} is {found[3]}, its rounded line {shown[1]}")
        else:
            run.scores.append(score)
        shown = [found[2], found[3]]


def read_parts(run: RunLog, text: str) -> None:
    """Seconds of evaluation that stand apart from the submitted score: lines without one, and scores of a part."""
    for line in text.splitlines():
        timed, scored = EVALUATED.match(line), SCORE.match(line)
        if scored:
            is_part = bool(PART.search(scored[1])) and not (run.score and scored[1].startswith(run.score.name))
        else:
            is_part = not re.match(r"step:|\d+/\d+ |total", line)
        if timed and is_part and not DIAGNOSTIC.search(timed[1]):
            run.parts += float(timed[2]) * SECONDS_IN[timed[3].lower()]


def check_clock(run: RunLog, text: str) -> None:
    """The clock of the step lines runs forward, is their number times their mean, and ends where training ends."""
    last = 0
    for step, spent, mean in re.findall(CLOCK, text, re.MULTILINE):
        step, spent, mean = int(step), int(spent), float(mean)
        if step and abs(spent - step * mean) > 2 + 0.006 * step:
            run.contradictions.append(f"{spent} ms at step {step} are not {step} steps of {mean} ms")
        if spent < last:
            run.contradictions.append(f"the clock runs from {last} ms back to {spent} ms at step {step}")
        last = spent
    ends = [1000 * run.times[name] for name in ("stopped_at", "budget_train") if name in run.times and last]
    run.contradictions += [f"training ends at {end:.0f} ms, the last step's line says {last} ms" for end in ends
                           if end < last - 100]


# ---------------------------------------------------------------------------------------
# Either
# ---------------------------------------------------------------------------------------

LOG_SUFFIXES = (".jsonl", ".txt", ".log")


def read_run(path: Path) -> RunLog:
    """A log of any kind, by its suffix."""
    return read_jsonl(path) if path.suffix == ".jsonl" else read_text(path)


def run_stem(path: Path) -> Path:
    """logs/<RUN_ID> of any file that a run writes."""
    return path.with_name(re.sub(r"\.(jsonl|txt|py|pgolf|weights\.pt)$", "", path.name))


def run_files(stem: Path) -> tuple[Path, Path, Path]:
    """The three files of one of our runs: .jsonl, .txt, .py."""
    files = tuple(stem.with_name(stem.name + suffix) for suffix in (".jsonl", ".txt", ".py"))
    for file in files:
        if not file.is_file():
            raise ToolError(f"{file}: no such file; --runs takes logs/<RUN_ID>, whose .jsonl, .txt and .py a run "
                            "writes")
    return files
