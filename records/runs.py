"""Read what a run logged: our JSON lines, or a text log in any of the dialects of published records.

Family A has `step:1/20000 train_loss:..` lines, family B `1/20000 train_loss: ..`; both may begin with a dump of the
source, so every pattern is anchored to a line's start and wants digits where the source has expressions.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from records import ToolError
from records.plot import read_events
from records.script import hyperparameters

NUMBER = r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|nan|inf)"
SCORE = re.compile(rf"^[\d:. -]*([A-Za-z][\w ().+-]*?)(?: stride:\d+)?[ :]+val_loss[:=] ?{NUMBER} "
                   rf"val_bpb[:=] ?{NUMBER}(.*)$")
DIAGNOSTIC = re.compile(r"diagnostic|pre.?quant|post_ema|before|^swa|^ema", re.IGNORECASE)
SOURCE_END = re.compile(r"^={100}$", re.MULTILINE)

# name of the quantity -> pattern with one group; of several matches the last counts
COUNTS = {
    "seed": r"^(?:.* )?seed: ?(\d+)\b",
    "world_size": r"^(?:.* )?world_size: ?(\d+)\b",
    "model_params": r"^model_params: ?(\d+)",
    "train_shards": r"^(?:.* )?train_shards: ?(\d+)",
    "train_tokens": r"^train_loader:.* tokens:(\d+)",
    "val_tokens": r"^(?:val_loader:.* tokens:|val_tokens: ?)(\d+)",
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
OFF_THE_CLOCK = r"^(?:Deserialize: .*? done in |ttt_lora:compile warmup done \()([\d.]+)s"


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
    train: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    val: list[tuple[int, float, float]] = field(default_factory=list)  # (step, loss, bpb)
    values: dict[str, Any] = field(default_factory=dict)  # hyperparameters with the identity
    sources: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)  # words: sha256, torch, device, dataset, attention ...
    steps: int | None = None
    source_text: str = ""  # the dump at the head of some logs
    off_the_clock: float = 0.0  # seconds of loading and compiling that the evaluation timer left out
    finished: bool = False

    @property
    def seed(self) -> int | None:
        """The seed, from the log or else from the file's name."""
        named = re.search(r"(?:seed|_s)_?(\d+)", self.path.stem)
        return self.counts.get("seed", int(named[1]) if named else None)

    @property
    def score(self) -> Score | None:
        """The submitted score: the last one that is no diagnostic, with its exact digits."""
        final = [score for score in self.scores if not DIAGNOSTIC.search(score.name)]
        return final[-1] if final else None

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
        ends = [self.times[name] for name in ("stopped_at", "step_time", "step_minutes") if name in self.times]
        return ends[0] + self.times.get("hessians", 0.0) if ends else None

    @property
    def eval_seconds(self) -> float | None:
        """From opening the artifact to the score, or what the log has nearest to it."""
        score = self.score.eval_seconds if self.score else None
        return self.times.get("budget_eval", self.times.get("total_eval", score))

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


# ---------------------------------------------------------------------------------------
# Our JSON lines
# ---------------------------------------------------------------------------------------

def read_jsonl(path: Path) -> RunLog:
    """The last run in a JSON-lines log."""
    run = RunLog(path, "jsonl")
    for number, event in read_events(path):
        if event.get("event") == "config":
            run = RunLog(path, "jsonl")
        try:
            take_event(run, event)
        except (KeyError, TypeError, ValueError) as error:
            raise ToolError(f"{path}:{number}: the {event.get('event')!r} event is not what train_gpt.py writes "
                            f"({error!r})") from None
    return run


def take_event(run: RunLog, event: dict[str, Any]) -> None:
    """Add one event to the run."""
    kind = event.get("event")
    if kind == "config":
        run.values, run.sources = event["values"], event["sources"]
        run.facts.update({name: str(event[name]) for name in ("sha256", "torch", "device")})
        run.counts.update(seed=event["values"]["seed"], world_size=event["world_size"])
    elif kind == "train":
        run.train.append((event["step"], event["train_loss"]))
        run.times["step_avg"] = event["step_avg_ms"] / 1000
    elif kind == "val":
        run.val.append((event["step"], event["val_loss"], event["val_bpb"]))
        run.steps = event["step"]
        run.times["step_time"] = event["train_time_ms"] / 1000
        run.times["step_avg"] = run.times["step_time"] / max(run.steps, 1)
    elif kind == "score":
        run.scores.append(Score(event["name"], event["val_loss"], event["val_bpb"], event["eval_time_ms"] / 1000))
    elif kind == "size":
        run.sizes.append((event["kind"], event["artifact_bytes"]))
        run.totals.append((event["kind"], event["artifact_bytes"] + event["code_bytes"]))
        run.counts["code_bytes"] = event["code_bytes"]
    elif kind == "ledger":
        run.times[f"budget_{event['budget']}"] = event["seconds"]
        run.finished = run.finished or event["budget"] == "eval"


# ---------------------------------------------------------------------------------------
# Text logs
# ---------------------------------------------------------------------------------------

def last_match(pattern: str, text: str) -> str | None:
    """The group of the last match, or None."""
    found = re.findall(pattern, text, re.MULTILINE)
    return found[-1] if found else None


def read_text(path: Path) -> RunLog:
    """A text log of ours or of either published family."""
    try:
        raw = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError as error:
        raise ToolError(f"{path}: cannot be read ({error})") from None
    head = SOURCE_END.search(raw)
    is_dump = bool(head) and "import " in raw[: head.start()]
    text = raw[head.end() :] if is_dump else raw
    if is_dump and not re.search(r"^(?:step:)?\d+/\d+ (?:train|val)_loss", text, re.MULTILINE):
        text = raw  # a line of = somewhere else
    run = RunLog(path, dialect_of(text), source_text=raw[: head.start()] if is_dump else "")
    for name, pattern in COUNTS.items():
        if (found := last_match(pattern, text)) is not None:
            run.counts[name] = int(found)
    for name, (unit, pattern) in SECONDS.items():
        if (found := last_match(pattern, text)) is not None:
            run.times[name] = float(found) * unit
    if re.search(r"self.?gen|generat\w+ .*calibration", text, re.IGNORECASE):
        run.times.pop("hessians", None)  # calibration on the model's own text uses no data: it may follow the clock
    run.off_the_clock = sum(map(float, re.findall(OFF_THE_CLOCK, text, re.MULTILINE)))
    read_facts(run, text)
    read_curves(run, text)
    read_scores(run, text)
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
    }  # fmt: skip
    for name, pattern in patterns.items():
        if (found := last_match(pattern, text)) is not None:
            run.facts[name] = found
    sized = re.findall(r"^Serialized model ?([^:\n]*): ?(\d+) bytes", text, re.MULTILINE)
    run.sizes = [(kind.strip(), int(size)) for kind, size in sized if kind.strip()]
    totals = re.findall(r"^Total submission size ?([^:\n]*): ?(\d+) bytes", text, re.MULTILINE)
    run.totals = [(kind.strip(), int(size)) for kind, size in totals if kind.strip() or not sized[1:]]
    for name, value in hyperparameter_lines(text):
        run.values[name], run.sources[name] = parse_setting(value)
    if "seed" in run.values:
        run.counts["seed"] = int(run.values["seed"])


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
    """Training and validation losses by step, and the number of steps."""
    train = re.findall(rf"^(?:step:)?(\d+)/\d+ train_loss: ?{NUMBER}", text, re.MULTILINE)
    val = re.findall(rf"^(?:step:)?(\d+)/\d+ val_loss: ?{NUMBER} val_bpb: ?{NUMBER}", text, re.MULTILINE)
    run.train = [(int(step), float(loss)) for step, loss in train]
    run.val = [(int(step), float(loss), float(bpb)) for step, loss, bpb in val]
    stopped = last_match(r"^stopping_early: .*step: ?(\d+)/\d+", text)
    ends = [step for step, *_ in run.train[-1:] + run.val[-1:]]
    run.steps = int(stopped) if stopped else max(ends, default=None)


def read_scores(run: RunLog, text: str) -> None:
    """Named scores in the order logged; an exact line takes the place of the rounded one before it."""
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
        else:
            run.scores.append(score)


# ---------------------------------------------------------------------------------------
# Either
# ---------------------------------------------------------------------------------------

def read_run(path: Path) -> RunLog:
    """A log of any kind, by its suffix."""
    if not path.is_file():
        raise ToolError(f"{path}: no such file. A run writes logs/<RUN_ID>.jsonl and .txt in the folder it is started "
                        "in")
    return read_jsonl(path) if path.suffix == ".jsonl" else read_text(path)


def run_files(path: Path) -> tuple[Path, Path, Path]:
    """The three files of one of our runs (.jsonl, .txt, .py), from any one of them or their common stem."""
    stem = path.with_suffix("") if path.suffix in (".jsonl", ".txt", ".py", ".pgolf") else path
    files = tuple(stem.with_name(stem.name + suffix) for suffix in (".jsonl", ".txt", ".py"))
    for file in files:
        if not file.is_file():
            raise ToolError(f"{file}: no such file; --runs takes logs/<RUN_ID>, whose .jsonl, .txt and .py a run "
                            "writes")
    return files
