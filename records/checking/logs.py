"""Checks of what the logs prove: scores, sizes, times, data, seeds, and that they are the shipped script's."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from records.checking.result import CheckResult
from records.reading.folder import Folder, claimed_bpb, is_number, means, near, tolerance
from records.reading.rules import (
    DATA_SETS,
    FORBIDDEN,
    LIMIT_BYTES,
    LIMIT_SECONDS,
    OFFICIAL_DOCUMENTS,
    SAME_RATIO,
    bytes_per_token,
    data_set,
    is_leaky,
    known_data,
    promises,
    uses,
)
from records.reading.runs import SAME_COUNTS, SAME_FACTS, RunLog, unlike
from records.reading.script import named
from records.reading.statistics import compare, described, read_baseline, summarize

SEEDS_FOR_A_RECORD = 3
UNTRAINED = 0.1  # nats below ln(vocabulary) in which no first loss lies
BEST_EVALUATION = 0.92  # of the loss of the last validation
LONGEST_STEP = 2.0  # a last step over the mean of the run: published logs reach 1.6


def scores(folder: Folder) -> Iterator[CheckResult]:
    """The scores of the logs are those of submission.json, per seed and in the mean."""
    scored = [run for run in folder.claimed if run.score]
    claimed = claimed_bpb(folder.data) if folder.data else None
    rows = [row for row in folder.seed_results.values() if is_number(row.get("val_bpb"))]
    if not scored or claimed is None and not rows:
        yield CheckResult("score", "skip", "no val_bpb claimed or no score logged")
        return
    for run in scored:
        row = folder.seed_results.get(str(run.seed), {})
        for key in ("val_bpb", "val_loss"):
            value, logged = row.get(key), getattr(run.score, key)
            if is_number(value) and not near(value, logged):
                yield CheckResult(f"score of seed {run.seed}", "fail", f"submission.json says {key} {value}, "
                                  f"{run.path.name} ends with {run.score.name} {logged:.8f}: copy the log's number")
    for key, value in (("val_bpb", claimed), ("val_loss", (folder.data or {}).get("val_loss"))):
        if is_number(value):
            yield headline(key, value, scored, [row[key] for row in rows if is_number(row.get(key))])


def headline(key: str, value: float, scored: list[RunLog], rows: list[float]) -> CheckResult:
    """The submission's own number: the mean of the logs, of what it says per seed, or (older forms) one log's."""
    logged = [getattr(run.score, key) for run in scored]
    name, text = f"score {key}", f"{key} {value} and the mean of {len(logged)} log(s), {statistics.fmean(logged):.8f}"
    if any(near(value, mean) for mean in means(logged)) or (
            len(rows) == len(scored) and near(value, statistics.fmean(rows))):
        return CheckResult(name, "pass", f"{text} ({scored[-1].score.name})")
    single = [run for run, score in zip(scored, logged, strict=True) if near(value, score)]
    if single and not rows:
        return CheckResult(name, "pass", f"{value} is the {key} of {single[0].path.name} alone; the mean of "
                           f"{len(logged)} logs is {statistics.fmean(logged):.8f}, which is what compares")
    return CheckResult(name, "fail", f"{text} ({scored[-1].score.name}): they differ; write the mean of the last "
                       "scored lines")


def stated_pairs(folder: Folder) -> Iterator[tuple[str, float, float]]:
    """(where it stands, val_loss, val_bpb) of every place that has both: submission.json, scores and curves."""
    rows = {"submission.json": folder.data or {}}
    rows |= {f"submission.json, seed {seed}": row for seed, row in folder.seed_results.items()}
    for where, row in rows.items():
        yield where, row.get("val_loss"), row.get("val_bpb")
    for run in folder.logs:
        yield from ((f"{run.path.name}, {score.name}", score.val_loss, score.val_bpb) for score in run.scores)
        yield from ((f"{run.path.name}, step {point.step}", point.loss, point.bpb) for point in run.val)


def score_ratio(folder: Folder) -> CheckResult:
    """val_loss / (ln 2 x val_bpb) is the bytes per token of the validation text: one constant of the data set.

    It shows a score that was not computed from its loss, or with the bytes of another text.
    """
    name, expected, found = "bytes per token", {}, {}
    for run in folder.logs:
        tokens = run.counts.get("val_tokens", 0)
        if known := data_set(tokens):
            expected[known.name] = known.bytes_per_token
        elif "val_bytes" in run.counts:
            expected["the log's val_bytes"] = run.counts["val_bytes"] / max(tokens - 1, 1)
    for where, loss, bpb in stated_pairs(folder):
        if all(isinstance(value, int | float) and 0 < value < math.inf for value in (loss, bpb)):
            found[where] = bytes_per_token(loss, bpb)
    if not found:
        return CheckResult(name, "skip", "no score with both val_loss and val_bpb")
    wanted = expected or {f"{known.name}, {known.tokens} tokens": known.bytes_per_token for known in DATA_SETS}
    odds = ({where: ratio for where, (ratio, inexact) in found.items() if abs(ratio / right - 1) > SAME_RATIO + inexact}
            for right in wanted.values())
    odd = min(odds, key=len)  # one set for all scores of a folder
    right = ", ".join(f"{value:.4f} ({what})" for what, value in wanted.items())
    if odd and (expected or folder.is_record_track):
        where, ratio = next(iter(odd.items()))
        return CheckResult(name, "fail", f"{len(odd)} of {len(found)} scores do not belong to their loss, first "
                           f"{where}: val_loss / (ln 2 x val_bpb) is {ratio:.4f}, the data has {right}; score the "
                           "artifact again with the right tokenizer, bytes and text")
    if odd:
        return CheckResult(name, "skip", f"{min(odd.values()):.4f} to {max(odd.values()):.4f}, of no data known here")
    return CheckResult(name, "pass", f"{len(found)} scores agree with {right if expected else 'an official set'}")


def untouched(folder: Folder, run: RunLog) -> CheckResult:
    """A log agrees with itself and with what losses can be: digits that were edited in one place show in another.

    An untrained model's loss is ln(vocabulary): published logs begin within 0.03 of it. A submitted score is at best 3%
    below the last validation of training, by sliding windows or test-time training.
    """
    name, found = f"log agrees with itself {run.path.name}", list(run.contradictions)
    known = data_set(run.counts.get("val_tokens", 0))
    for point in [point for point in (*run.val[:1], *run.train[:1]) if point.step <= 1 and known and not run.resumes]:
        if point.loss < math.log(known.vocabulary) - UNTRAINED:
            found.append(f"a loss of {point.loss} at step {point.step}, where an untrained model of {known.vocabulary} "
                         f"tokens has ln {known.vocabulary} = {math.log(known.vocabulary):.3f}")
    last = [point for point in run.val[-1:] if point.step and run.score]
    for point in last if folder.is_record_track else ():
        if run.score.val_loss < BEST_EVALUATION * point.loss:
            found.append(f"{run.score.name} has {run.score.val_loss:.4f} nats, "
                         f"{run.score.val_loss / point.loss - 1:.0%} against the {point.loss:.4f} of the last "
                         "validation; evaluation has never gained 3%")
    if found:
        return CheckResult(name, "fail", f"{'; '.join(found[:3])}: ship the log as the run wrote it")
    if not (run.train or run.val):
        return CheckResult(name, "skip", "no step lines to compare with")
    return CheckResult(name, "pass", "its times, its rounded and exact scores, its first and last loss")


def code_size(folder: Folder, run: RunLog) -> CheckResult:
    """The code bytes that a log counts are those of the shipped script."""
    name, counted = f"code bytes {run.path.name}", run.code_bytes
    if counted is None or folder.script is None:
        return CheckResult(name, "skip", "the log has no `Code size` line, or there is no script")
    shipped = folder.script.stat().st_size
    if counted == shipped:
        return CheckResult(name, "pass", f"{counted}, the size of {folder.script.name}")
    if abs(counted - shipped) == 1 and provenance(folder, run).status == "pass":
        return CheckResult(name, "pass", f"{counted}, the size of {folder.script.name} but for its last line's end")
    raw = run.counts.get("code_bytes_raw")
    wrapper = " (the log counts a compressed form that is not the shipped file)" if raw == shipped else ""
    return CheckResult(name, "fail", f"the log counts {counted} bytes, the shipped {folder.script.name} has "
                       f"{shipped}{wrapper}: ship the file that ran; if it is to be packed, run the packed one")


def size(folder: Folder, run: RunLog) -> Iterator[CheckResult]:
    """Artifact and code are within 16,000,000 bytes, by the log and by the shipped script."""
    name, total, artifact = f"size {run.path.name}", run.total_bytes, run.artifact_bytes
    if total is None:
        yield CheckResult(name, "skip", "the log has no `Total submission size` or `Serialized model` and `Code size` "
                          "lines")
        return
    parts = None if artifact is None or run.code_bytes is None else artifact + run.code_bytes
    if parts not in (None, total):
        yield CheckResult(f"sum {run.path.name}", "fail", f"model {artifact} + code {run.code_bytes} is {parts}, but "
                          f"the log's total is {total}: one of the lines is of another file")
    worst, what = total, "as logged"
    if artifact is not None and folder.script is not None and artifact + folder.script.stat().st_size > worst:
        worst, what = artifact + folder.script.stat().st_size, "with the shipped script"
    if worst <= LIMIT_BYTES:
        yield CheckResult(name, "pass", f"{worst} bytes {what}, {LIMIT_BYTES - worst} below the limit")
        return
    mebi = "; it would fit 16 MiB, but MB is decimal here" if worst <= 16 * 2**20 else ""
    yield CheckResult(name, "fail", f"{worst} bytes {what}, {worst - LIMIT_BYTES} over {LIMIT_BYTES}{mebi}: pack the "
                      "script, lower MATRIX_BITS, or let the run fit the clip (MATRIX_CLIP_SIGMAS=0)")


def claimed_sizes(folder: Folder) -> Iterator[CheckResult]:
    """bytes_total and bytes_code of submission.json against the logs and the file."""
    data, totals = folder.data or {}, [run.total_bytes for run in folder.logs if run.total_bytes]
    claimed, code = data.get("bytes_total"), data.get("bytes_code")
    if isinstance(claimed, int) and totals:
        shipped = folder.script.stat().st_size if folder.script else 0
        as_shipped = [run.artifact_bytes + shipped for run in folder.logs if run.artifact_bytes]
        fine = claimed in [*totals, *as_shipped, round(statistics.fmean(totals))]
        remedy = "" if fine else ": write the largest total of the logs"
        yield CheckResult("bytes_total", "pass" if fine else "fail", f"claimed {claimed}, logged {max(totals)} at most"
                          f"{remedy}")
    if isinstance(claimed, int) and claimed > LIMIT_BYTES:
        yield CheckResult("bytes_total limit", "fail", f"{claimed} claimed: over {LIMIT_BYTES} decimal bytes")
    if isinstance(code, int) and folder.script:
        shipped = folder.script.stat().st_size
        remedy = "" if code == shipped else f": {folder.script.name} on disk has {shipped}; count the file that ships"
        yield CheckResult("bytes_code", "pass" if not remedy else "fail", f"claimed {code}{remedy}")


def claims(folder: Folder) -> CheckResult:
    """What submission.json says of script, data, sizes and steps against the file and the logs."""
    given, logs, wrong = folder.data or {}, folder.logs, []
    largest = [max(filter(None, column), default=None) for column in (
        [run.artifact_bytes for run in logs], [run.total_bytes for run in logs])]  # fmt: skip
    known = {name: [run.counts.get(name) for run in logs] for name in ("val_tokens", "train_shards", "model_params")}
    known |= {"config_sha256": [run.config_hash for run in logs], "artifact_bytes_max": largest}
    if folder.script:
        known["script_sha256"] = [hashlib.sha256(folder.script.read_bytes()).hexdigest()]
    pairs = [(name, given.get(name), right) for name, right in known.items()]
    for run in logs:
        row, sizes = folder.seed_results.get(str(run.seed), {}), [run.artifact_bytes, run.total_bytes]
        rows = {"artifact_bytes": sizes, "bytes_total": sizes[1:], "steps": [run.steps]}  # the first is used for both
        pairs += [(f"{name} of seed {run.seed}", row.get(name), right) for name, right in rows.items()]
    pairs = [pair for pair in pairs if pair[1] is not None and pair[2] and None not in pair[2]]
    for name, claimed, right in pairs:
        if claimed not in right:
            wrong.append(f"{name} {claimed}, not {', '.join(map(str, dict.fromkeys(right)))}")
    if wrong:
        return CheckResult("claims", "fail", f"submission.json has {'; '.join(wrong)}: copy the numbers of the logs, "
                           "or let `python -m records new` write it")
    if not pairs:
        return CheckResult("claims", "skip", "submission.json names no size, step count or digest that a log has")
    return CheckResult("claims", "pass", f"{', '.join(name for name, *_ in pairs)[:200]}: those of the logs")


def has_code(run: RunLog, feature: str) -> bool:
    """Whether the source in a log does anything with the hyperparameters of a feature; true where it has no source."""
    names = [name for name in run.values if feature and re.search(feature, name)]
    return not run.source_text or not names or any(re.search(rf"\.{name}\b", run.source_text) for name in names)


def compliance(folder: Folder) -> Iterator[CheckResult]:
    """Promises of submission.json against the logs; nothing is trained on validation before it is scored."""
    given, logs = (folder.data or {}).get("compliance"), folder.logs
    early = sorted(run.path.name for run in logs if run.facts.get("pre_quant_ttt")
                   or uses(run.values, FORBIDDEN["no_pre_quant_ttt"]))
    if early:
        yield CheckResult("pre-quantization TTT", "fail", f"{', '.join(early)}: the model is trained on validation "
                          "text before it is scored, which breaks C3 (score first); switch it off, or adapt only on "
                          "tokens that have been scored")
    if not isinstance(given, dict):
        return
    proven = {"train_under_600s": [run.train_seconds <= LIMIT_SECONDS for run in logs if run.train_seconds],
              "eval_under_600s": [run.eval_seconds <= LIMIT_SECONDS for run in logs if run.eval_seconds],
              "artifact_under_16mb": [run.total_bytes <= LIMIT_BYTES for run in logs if run.total_bytes],
              "three_seeds": [len({run.seed for run in logs}) >= SEEDS_FOR_A_RECORD] if logs else []}
    for run in logs:
        for key, holds in promises(run.values).items() if run.values else ():
            proven.setdefault(key, []).append(holds or not has_code(run, FORBIDDEN.get(key, "")))
    broken = sorted(key for key, holds in proven.items() if given.get(key) is True and not all(holds))
    known = sum(bool(holds) and key in given for key, holds in proven.items())
    if not known:
        yield CheckResult("compliance", "skip", f"none of {len(given)} promises can be read off the logs")
        return
    yield CheckResult("compliance", "fail" if broken else "pass", f"submission.json promises {', '.join(broken)}, the "
                      "logs say otherwise: correct it" if broken else f"{known} of {len(given)} promises are those of "
                      "the logs; the others are for a reviewer")


def provenance(folder: Folder, run: RunLog) -> CheckResult:
    """The log was written by the shipped script: by sha256, by the source in the log, or by its length."""
    name = f"provenance {run.path.name}"
    if folder.script is None:
        return CheckResult(name, "skip", "no script to compare with")
    raw = folder.script.read_bytes()
    if logged := run.facts.get("sha256"):
        shipped = hashlib.sha256(raw).hexdigest()
        if logged == shipped:
            return CheckResult(name, "pass", f"sha256 {logged[:16]} is the shipped script's")
        return CheckResult(name, "fail", f"the log is of sha256 {logged[:16]}, the shipped {folder.script.name} is "
                           f"{shipped[:16]}: ship logs/<RUN_ID>.py of the run, or run this file again")
    if run.source_text:
        same = run.source_text.rstrip().endswith((folder.source or "no script").strip())
        return CheckResult(name, "pass" if same else "fail", "the source at the log's head is the shipped "
                           "script" if same else
                           "the source at the log's head is not the shipped script: ship the file that ran")
    return CheckResult(name, "skip", "the log has neither a sha256 nor the source; only sizes can be compared")


def resumed(run: RunLog) -> Iterator[CheckResult]:
    """A run that was killed and went on says so, and all that was spent before counts, lost steps included."""
    if not (run.resumes or run.values.get("resume")):
        return
    name, lost = f"resumed {run.path.name}", sum(resume.lost for resume in run.resumes)
    most = max((resume.seconds for resume in run.resumes), default=0.0)
    places = ", ".join(str(resume.step) for resume in run.resumes) or "the end of training"
    text = f"the run was interrupted and went on at step {places}; {lost:.1f} s were lost and count as training"
    if run.train_seconds is not None and run.train_seconds < most:
        yield CheckResult(name, "fail", f"{text}, but the log ends with {run.train_seconds:.1f} s where {most:.1f} s "
                          "were spent at the last resumption: run the seed again")
    else:
        yield CheckResult(name, "pass", text)


def times(folder: Folder, run: RunLog) -> Iterator[CheckResult]:
    """Training with calibration within 600 s, evaluation within another 600 s; no limits off the record track."""
    trained, evaluated = run.train_seconds, run.eval_seconds
    if not folder.is_record_track:
        yield CheckResult(f"time {run.path.name}", "skip", "no limit on this track; trained "
                          f"{trained or float('nan'):.1f} s, evaluated {evaluated or float('nan'):.1f} s")
        return
    name = f"train time {run.path.name}"
    if trained is None:
        yield CheckResult(name, "skip", "the log has no time of training")
    else:
        # scripts that stop at the first step after the limit run over by less than that step
        step = 0.0 if "budget_train" in run.times else LONGEST_STEP * (run.step_avg or 0.0)
        allowed = LIMIT_SECONDS + step
        hessians = run.times.get("hessians", 0.0)
        parts = f" ({hessians:.1f} s of them calibration, which reads training data)" if hessians else ""
        one = f", {trained - LIMIT_SECONDS:.3f} s over, less than a step" if LIMIT_SECONDS < trained <= allowed else ""
        advice = ": stop earlier, reserve time for calibration (GPTQ_RESERVE_SECONDS)"
        remedy = "" if trained <= allowed else f", {trained - LIMIT_SECONDS:.3f} s over{advice}"
        yield CheckResult(name, "fail" if remedy else "pass", f"{trained:.1f} s of {LIMIT_SECONDS:.0f} "
                          f"s{parts}{one}{remedy}")
    name = f"eval time {run.path.name}"
    if evaluated is None:
        yield CheckResult(name, "skip", "the log has no time of evaluation")
        return
    off, whole = run.off_the_clock, evaluated + run.off_the_clock
    parts = f" with {off:.0f} s of loading and compiling that the log's timer leaves out" if off else ""
    over = whole > LIMIT_SECONDS
    remedy = ": raise EVAL_STRIDE, adapt on fewer tokens, or compile less" if over else ""
    yield CheckResult(name, "fail" if over else "pass", f"{whole:.1f} s of {LIMIT_SECONDS:.0f} s{parts}{remedy}")


def data(folder: Folder, run: RunLog) -> Iterator[CheckResult]:
    """Fingerprints of the data: validation tokens and documents, train shards."""
    name, counts, dataset = f"data {run.path.name}", run.counts, run.facts.get("dataset", "")
    shards, tokens = counts.get("train_shards"), counts.get("val_tokens")
    if shards is not None:
        if is_leaky(shards, counts.get("train_tokens", 0), dataset):
            yield CheckResult(f"train shards {run.path.name}", "fail", f"train_shards {shards}: shards of 10M tokens "
                              "come from a preparation script that left most of validation in train; fetch the "
                              "official shards and run again")
        else:
            yield CheckResult(f"train shards {run.path.name}", "pass", f"{shards}")
    if tokens is None:
        yield CheckResult(name, "skip", "the log does not say how many validation tokens there were")
        return
    official = known_data(tokens)
    if official is None and re.search(r"fineweb10B|sp8192", dataset):
        yield CheckResult(name, "fail", f"{tokens} validation tokens are those of no official set, but the data is "
                          f"called {dataset}: fetch fineweb_val_* again; the whole split must be scored")
        return
    if official is None:
        yield CheckResult(name, "skip", f"{tokens} validation tokens of {dataset or 'a corpus without name'}, not the "
                          "official FineWeb split: not comparable with the leaderboard")
        return
    documents = counts.get("val_documents")
    if documents not in (None, OFFICIAL_DOCUMENTS):
        yield CheckResult(name, "fail", f"{documents} validation documents, the official split has "
                          f"{OFFICIAL_DOCUMENTS}")
    else:
        counted = f", {documents} documents" if documents else ""
        yield CheckResult(name, "pass", f"{tokens} validation tokens: {official}{counted}")


def tokenizer(folder: Folder) -> Iterator[CheckResult]:
    """Data other than the official sets needs its tokenizer in the folder."""
    counts = [run.counts["val_tokens"] for run in folder.logs if "val_tokens" in run.counts]
    if not counts:
        return
    files = [path for pattern in ("*.model", "tokenizers/*.model") for path in folder.path.glob(pattern)]
    shipped, logged = ", ".join(path.name for path in files), {run.facts.get("tokenizer_sha256") for run in folder.logs}
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if files and logged != {None} and not logged <= digests:
        yield CheckResult("tokenizer", "fail", f"{shipped} is not the tokenizer of the logs (sha256 "
                          f"{min(digests)[:12]}, there {', '.join(str(value)[:12] for value in logged)}): ship the one "
                          "that the runs read")
    elif known_data(counts[0]) or shipped:
        yield CheckResult("tokenizer", "pass", shipped or f"the official one of {known_data(counts[0])}")
    else:
        yield CheckResult("tokenizer", "fail", "the data is not official and no *.model is in the folder: put the "
                          "tokenizer there, and say in README how the shards are made")


def true_names(folder: Folder, run: RunLog) -> Iterator[CheckResult]:
    """Score lines are called what they are, and no name stands for two numbers."""
    name, kinds = f"log keys {run.path.name}", {kind for kind, _ in run.sizes}
    bits = run.values.get("matrix_bits")
    int6 = any(re.match(r"int[4-7]\b|int[4-7]\+", kind) for kind in kinds) or (isinstance(bits, int) and bits < 8)
    lies = sorted({score.name for score in run.scores if "int8" in score.name and int6
                   and not any("int8" in kind for kind in kinds)})
    doubles = sorted({score.name for score in run.scores for other in run.scores
                      if score.name == other.name and abs(score.val_bpb - other.val_bpb) > 5.1e-5})
    if lies:
        yield CheckResult(name, "fail", f"{', '.join(lies)} for a model of "
                          f"{', '.join(sorted(kinds)) or f'{bits} bits'}: the key names another format; print it under "
                          "its own")
    if doubles:
        yield CheckResult(name, "fail", f"{', '.join(doubles)} stands for two different scores: one key, one meaning")
    inactive = run.facts.get("inactive", "none")
    if inactive != "none":
        yield CheckResult(f"features {run.path.name}", "fail", f"configured but never active: {inactive}; switch it "
                          "off or change its schedule, so that the record says what it is")
    if not lies and not doubles:
        yield CheckResult(name, "pass", ", ".join(dict.fromkeys(score.name for score in run.scores)) or "no scores")


def seeds(folder: Folder) -> Iterator[CheckResult]:
    """Distinct seeds of one configuration and one script; every claimed seed has its log."""
    found = [run.seed for run in folder.claimed]
    known = [seed for seed in found if seed is not None]
    scored = {str(seed): folder.seed_results.get(str(seed), {}).get("val_bpb") for seed in folder.claimed_seeds}
    unnamed = [run.score.val_bpb for run in folder.claimed if run.score and str(run.seed) not in scored]
    proven = {int(seed) for seed, bpb in scored.items()  # the log of its score may name another seed
              if any(near(bpb, logged) for logged in unnamed)}
    missing = sorted(set(folder.claimed_seeds) - set(known) - proven) if known else []
    double = sorted({seed for seed in known if known.count(seed) > 1})
    wrong = [f"seed(s) {double} logged twice: every log must be of another seed"] if double else []
    if missing and (len(found) < len(folder.claimed_seeds) or any(scored[str(seed)] for seed in missing)):
        wrong.append(f"submission.json names seed(s) {missing} without a log: add train_seed<SEED>.log")
    if wrong:
        yield CheckResult("seeds", "fail", "; ".join(wrong))
    elif len(found) < SEEDS_FOR_A_RECORD and folder.is_record_track:
        yield CheckResult("seeds", "skip", f"{len(found)} seed(s) {known}: a claim of significance needs "
                          f"{SEEDS_FOR_A_RECORD} (python -m records seeds)")
    elif found:
        yield CheckResult("seeds", "pass", f"{len(found)}: {known}")
    for group in (folder.claimed, [run for run in folder.logs if run not in folder.claimed]):
        if len(group) > 1:
            yield one_configuration(group)


def one_configuration(logs: list[RunLog]) -> CheckResult:
    """All logs have the same hyperparameters (or the same visible sizes where none are logged) and the same script."""
    name, first = "one configuration", logs[0]
    for first, other in itertools.combinations(logs, 2):
        if changed := unlike(first, other):
            return CheckResult(name, "fail", f"{first.path.name} and {other.path.name} differ in {named(changed)}: a "
                               "mean needs seeds of one configuration, script and data; run the odd one again")
    shown = [bool(run.values or run.counts.keys() & {*SAME_COUNTS} or run.facts.keys() & {*SAME_FACTS}) for run in logs]
    if not all(shown):
        return CheckResult(name, "skip", f"{shown.count(False)} of {len(logs)} logs say nothing of their configuration")
    basis = "hyperparameters" if first.values else "the settings they show (the logs have no full list)"
    return CheckResult(name, "pass", f"{len(logs)} logs agree in {basis}")


def significance(folder: Folder, baseline: Path | None) -> Iterator[CheckResult]:
    """Spread over seeds, and the test against a baseline where one is given."""
    scored = [run.score for run in folder.claimed if run.score]
    if not scored:
        return
    bpbs, losses = [score.val_bpb for score in scored], [score.val_loss for score in scored]
    summary = summarize(bpbs)
    claimed = (folder.data or {}).get("val_bpb_std")
    if isinstance(claimed, int | float) and summary.sd is not None:
        population = statistics.pstdev(bpbs)
        fine = min(abs(claimed - summary.sd), abs(claimed - population)) <= max(tolerance(claimed), 6e-5)
        yield CheckResult("val_bpb_std", "pass" if fine else "fail", f"claimed {claimed}, from the logs "
                          f"{summary.sd:.8f}"
                          + ("" if fine else ": write the standard deviation of the logs' scores"))
    if baseline is None:
        yield CheckResult("significance", "skip", f"val_bpb {described(summary)}; no --baseline to test against")
        return
    tests = [test for test in compare(losses, bpbs, read_baseline(baseline)) if test.margin]
    passes = any(test.passes for test in tests)
    remedy = "" if passes else "; more seeds narrow the error, a smaller gain is no record"
    yield CheckResult("significance", "pass" if passes else "fail", "; ".join(test.line() for test in tests) + remedy)


def other_logs(folder: Folder) -> Iterator[CheckResult]:
    """Logs that nothing in submission.json claims are named, so that none passes for evidence."""
    if folder.others:
        names = ", ".join(dict.fromkeys(str(run.path.relative_to(folder.path)) for run in folder.others))
        yield CheckResult("other logs", "skip", f"{len(folder.others)} run(s) that submission.json does not claim, not "
                          f"checked: {names[:300]}")


def check_logs(folder: Folder, baseline: Path | None) -> Iterator[CheckResult]:
    """All checks of this module."""
    yield from scores(folder)
    yield score_ratio(folder)
    for run in folder.logs:
        yield provenance(folder, run)
        yield code_size(folder, run)
        yield untouched(folder, run)
        yield from resumed(run)
        for part in (size, times, data, true_names):
            yield from part(folder, run)
    yield from tokenizer(folder)
    yield from claimed_sizes(folder)
    yield claims(folder)
    yield from compliance(folder)
    yield from seeds(folder)
    yield from significance(folder, baseline)
    yield from other_logs(folder)
