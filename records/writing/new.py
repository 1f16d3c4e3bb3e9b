"""`python -m records new NAME --runs logs/A_seed42 ...`: the submission folder of finished runs.

Everything in it is read from the runs: the script is the file that ran (its sha256 is in every log), the numbers of
submission.json and README.md come from the logs, and the command is the one that repeats a seed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from records import RECORDS, REPOSITORY, ToolError
from records.reading.rules import TRACKS, promises
from records.reading.runs import RunLog
from records.reading.script import differences, named, resolve, unpacked
from records.reading.statistics import compare, read_baseline, summarize
from records.writing import pack, plot, readme
from records.writing.seeds import seed_row
from records.writing.submission import Source, Submission, read_sources, tokenizer_to_ship


def requirements(source: Source) -> str:
    """The repository's requirements, with torch pinned to the version of the log."""
    version = source.run.facts["torch"].split("+")[0]
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [f"torch=={version}" if re.match(r"torch\b", line) else line for line in lines if not line.startswith("#")]
    header = f"# the runs used Python {source.text.facts.get('python', '3')}, torch {source.run.facts['torch']}"
    return "\n".join([header, *wanted]) + "\n"


def mean_of(rows: Sequence[dict[str, Any]], key: str, digits: int = 2) -> float | None:
    """Mean of one column over the seeds that have it."""
    values = [row[key] for row in rows if key in row]
    mean = round(statistics.fmean(values), digits) if values else None
    return int(mean) if mean is not None and mean.is_integer() and key == "steps" else mean


def describe(submission: Submission) -> dict[str, Any]:
    """submission.json: the newest published form and the keys that older validators ask for."""
    args, runs, first = submission.args, submission.runs, submission.first
    rows = {str(run.seed): seed_row(run) for run in runs}
    loss, bpb = summarize([run.score.val_loss for run in runs]), summarize([run.score.val_bpb for run in runs])
    rounded = {"val_loss": loss.mean, "val_bpb": bpb.mean, "val_loss_std": loss.sd, "val_bpb_std": bpb.sd}
    artifacts, every = [run.artifact_bytes for run in runs], list(rows.values())
    torch = first.run.facts["torch"]
    data = {
        "author": args.author, "github_id": args.github_id, "name": args.name, "blurb": args.blurb, "date": args.date,
        "track": args.track, **{key: None if value is None else round(value, 8) for key, value in rounded.items()},
        "score": first.run.score.name, "seeds": [run.seed for run in runs], "seed_results": rows,
        **against(submission),
        "artifact_bytes_mean": round(statistics.fmean(artifacts)), "artifact_bytes_max": max(artifacts),
        "bytes_total": max(run.total_bytes for run in runs), "bytes_code": first.run.code_bytes,
        "train_steps_mean": mean_of(every, "steps"), "step_avg_ms_mean": mean_of(every, "step_avg_ms"),
        "train_time_s_mean": mean_of(every, "train_time_s"), "eval_time_s_mean": mean_of(every, "eval_time_s"),
        "hardware": hardware(first.run), "pytorch_version": torch,
        "cuda_version": cuda_version(torch), "attention_backend": first.text.facts.get("attention"),
        "train_shards": first.text.counts.get("train_shards"), "val_tokens": first.text.counts.get("val_tokens"),
        "model_params": first.text.counts.get("model_params"), "script_sha256": first.run.facts["sha256"],
        "config_sha256": first.run.config_hash, "compliance": compliance(submission),
    }  # fmt: skip
    return {key: value for key, value in data.items() if value is not None and value != ""}


def hardware(run: RunLog) -> str:
    """1x NVIDIA H100 80GB HBM3, or the CPU with its threads."""
    device, world = run.facts["device"], run.counts["world_size"]
    return f"{world}x CPU ({device})" if device.endswith("threads") else f"{world}x {device}"


def cuda_version(torch: str) -> str | None:
    """12.8 of 2.11.0+cu128; None for other builds."""
    found = re.search(r"\+cu(\d+)(\d)$", torch)
    return f"{found[1]}.{found[2]}" if found else None


def against(submission: Submission) -> dict[str, Any]:
    """What is claimed against the parent record, with the tests behind it."""
    baseline, runs = submission.baseline, submission.runs
    if baseline is None:
        return {}
    losses, bpbs = [run.score.val_loss for run in runs], [run.score.val_bpb for run in runs]
    tests = compare(losses, bpbs, baseline)
    theirs = statistics.fmean(baseline.val_bpb)
    nats = [test.difference for test in tests if test.unit == "token"]
    return {
        "based_on": baseline.name, "comparison_baseline_bpb": round(theirs, 8),
        "delta_vs_leaderboard_bpb": round(statistics.fmean(bpbs) - theirs, 8),
        "delta_vs_leaderboard_nats": round(nats[0], 8) if nats else None,
        "tests": [{**test._asdict(), "passes": test.passes} for test in tests],
    }


def compliance(submission: Submission) -> dict[str, bool]:
    """What the logs prove of the rules."""
    runs = submission.runs
    return {
        "train_under_600s": all(run.train_seconds <= 600 for run in runs),
        "eval_under_600s": all(run.eval_seconds <= 600 for run in runs),
        "artifact_under_16mb": all(run.total_bytes <= 16_000_000 for run in runs),
        "three_seeds": len(runs) >= 3, "one_configuration": True, "every_default_baked_in": not submission.changed,
        **promises(submission.first.run.values),
    }


def prepare(args: argparse.Namespace) -> Submission:
    """Read and check everything before a file is written."""
    sources = read_sources(args.runs)
    resolved = resolve(sources[0].script, {})
    changed = differences(resolved.values, sources[0].run.values)
    if changed and not args.with_variables:
        raise ToolError(f"the script's defaults are not the run's configuration: {named(changed)}. Run the seeds "
                        "through `python -m records seeds`, which bakes them in, or pass --with-variables to set them "
                        "in the command")
    shipped = args.tokenizer or tokenizer_to_ship(sources[0])
    if shipped and not shipped.is_file():
        raise ToolError(f"{shipped}: no such tokenizer here (the path is from where the run was started); name "
                        "it by --tokenizer: one that is not official belongs into the folder")
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "", args.name)
    if not name:
        raise ToolError(f"NAME {args.name!r}: nothing of it can stand in a folder's name; use letters, digits and _")
    folder = args.root / f"track_{args.track}" / f"{args.date}_{name}"
    if folder.exists():
        raise ToolError(f"{folder}: exists already; a landed record is not edited. Choose another NAME or remove it")
    baseline = read_baseline(args.parent) if args.parent else None
    return Submission(folder, args, sources, resolved, changed, baseline)


def write(submission: Submission) -> None:
    """Fill the folder."""
    folder, first = submission.folder, submission.first
    folder.mkdir(parents=True)
    shutil.copyfile(first.script, folder / "train_gpt.py")
    if (human := readable(first)) is not None:
        (folder / "train_gpt_human.py").write_text(human, encoding="utf-8")
    for source in submission.sources:
        shutil.copyfile(source.text.path, folder / f"train_seed{source.seed}.log")
    (folder / "requirements.txt").write_text(requirements(first), encoding="utf-8")
    if shipped := submission.tokenizer:
        shutil.copyfile(shipped, folder / shipped.name)
    data = describe(submission)
    (folder / "submission.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    picture = draw(submission)
    page = readme.render(submission, data, picture)
    (folder / "README.md").write_text(page, encoding="utf-8")


def readable(source: Source) -> str | None:
    """The program in a packed script: the commented file it was made of if that is still there, else what it holds."""
    ran = source.script.read_text(encoding="utf-8")
    if (inner := unpacked(ran)) is None:
        return None
    original = source.run.path.with_name(source.run.path.stem.rsplit("_seed", 1)[0]) / "train_gpt_human.py"
    if original.is_file() and pack.pack(text := original.read_text(encoding="utf-8")) == ran:
        return text
    return inner


def draw(submission: Submission) -> str:
    """The seeds' curves as curves.png; empty where matplotlib is missing."""
    try:
        figure = plot.draw(plot.read_curves([run.path for run in submission.runs]), None)
    except ModuleNotFoundError:
        print("no curves.png: python -m pip install -r requirements-dev.txt")
        return ""
    figure.savefig(submission.folder / "curves.png", dpi=110)
    return "curves.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `new` takes."""
    parser.add_argument("name", metavar="NAME", help="name of the submission, as XSA_Gated")
    parser.add_argument("--runs", nargs="+", type=Path, required=True,
                        help="finished runs, as logs/<RUN_ID>, or the folder of a series, as logs/<name>")
    parser.add_argument("--track", choices=TRACKS, default="10min_16mb")
    parser.add_argument("--author", default="unknown")
    parser.add_argument("--github-id", default="unknown")
    parser.add_argument("--blurb", default="", help="what it is, in a sentence or two")
    parser.add_argument("--parent", type=Path, help="record folder that this one changes and wants to beat")
    parser.add_argument("--root", type=Path, default=RECORDS, help="folder of the tracks (default: records/)")
    parser.add_argument("--date", default=datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    parser.add_argument("--tokenizer", type=Path, help="tokenizer to ship (default: the run's, unless official)")
    parser.add_argument("--with-variables", action="store_true",
                        help="accept a script whose defaults are not the run's; the command then sets variables")


def run(args: argparse.Namespace) -> int:
    """Write the folder, say where it is and what is left to do."""
    submission = prepare(args)
    with contextlib.ExitStack() as undo:  # half a folder would stop the next attempt and look like a submission
        undo.callback(shutil.rmtree, submission.folder, ignore_errors=True)
        write(submission)
        undo.pop_all()
    missing = {"--author": args.author == "unknown", "--github-id": args.github_id == "unknown",
               "--blurb": not args.blurb, "--parent": args.parent is None}  # fmt: skip
    open_points = [flag for flag, is_missing in missing.items() if is_missing]
    print(f"{submission.folder}: {len(submission.sources)} seed(s)")
    if open_points:
        print(f"left open: {', '.join(open_points)}; reviewers ask for them (remove the folder and run this again)")
    print(f"next: python -m records check {submission.folder}")
    return 0
