"""README.md of a submission folder, from the runs and the submission.json made of them."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from records import REPOSITORY, ToolError
from records.reading.runs import RunLog, read_text
from records.reading.script import as_variable, differences, resolve, unpacked
from records.reading.statistics import compare, summarize
from records.writing.pack import without_docstrings
from records.writing.submission import Submission


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; empty cells for None."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def claim(submission: Submission, data: dict[str, Any]) -> str:
    """The line that readers and tools look for first."""
    seeds = len(submission.runs)
    spread = f", std {data['val_bpb_std']:.4f}" if "val_bpb_std" in data else ""
    return (f"**val_bpb: {data['val_bpb']:.4f} ({seeds}-seed mean{spread})** | ~{data['bytes_total'] / 1e6:.2f} MB | "
            f"{data['hardware']}")


def stage_scores(run: RunLog) -> dict[str, float]:
    """Score name -> bits per byte, in the order logged."""
    return {score.name: score.val_bpb for score in run.scores}


def results(submission: Submission, data: dict[str, Any]) -> str:
    """The table of seeds with mean and standard deviation below; the submitted score's column is in bold."""
    runs = submission.runs
    stages = list(stage_scores(runs[0]))
    header = ["seed", "steps", "ms/step", *stages, "val_loss", "artifact bytes", "total bytes", "train s", "eval s"]
    rows = []
    for run in runs:
        row = data["seed_results"][str(run.seed)]
        scores = [f"{stage_scores(run).get(name, math.nan):.6f}" for name in stages]
        rows.append([run.seed, row["steps"], f"{row['step_avg_ms']:.2f}", *scores, f"{row['val_loss']:.6f}",
                     row["artifact_bytes"], row["bytes_total"], row["train_time_s"], row["eval_time_s"]])
    columns = [summarize([stage_scores(run).get(name, math.nan) for run in runs]) for name in stages]
    means = [f"{column.mean:.6f}" for column in columns]
    rows.append(["**mean**", data["train_steps_mean"], data["step_avg_ms_mean"], *means[:-1], f"**{means[-1]}**",
                 f"{data['val_loss']:.6f}", data["artifact_bytes_mean"], f"{data['bytes_total']} (max)",
                 data["train_time_s_mean"], data["eval_time_s_mean"]])
    if len(runs) > 1:
        spread = [f"{column.sd:.6f}" for column in columns]
        rows.append(["sd", None, None, *spread, f"{data['val_loss_std']:.6f}", *[None] * 4])
    return table(header, rows)


def compliance(submission: Submission, data: dict[str, Any]) -> str:
    """Every rule with the number that the worst seed reached."""
    runs, told = submission.runs, data["compliance"]
    lines = [
        f"training with calibration and GPTQ: {max(run.train_seconds for run in runs):.1f} s of 600 s",
        f"evaluation, from opening the artifact to the score: {max(run.eval_seconds for run in runs):.1f} s of 600 s",
        f"artifact and code: {data['bytes_total']:,} of 16,000,000 bytes, from disk",
        "test-time training: score-first, on tokens that have been scored" if told.get("score_first_ttt") else
        "no test-time training",
        "no n-gram mixing" if told["no_ngram_cache"] else "n-grams: counts of scored tokens, mixed into one normalised "
        "distribution",
        "causal, normalised, scored before any update, each target once: `python -m records check` tests this script",
    ]
    return "\n".join(f"- {line}" for line in lines)


def comparison(submission: Submission) -> Iterator[str]:
    """The tests against the parent record."""
    if submission.baseline is None:
        yield "No parent record was named, so nothing is claimed against one."
        return
    runs = submission.runs
    yield f"Against {submission.baseline.name}:\n"
    for test in compare([r.score.val_loss for r in runs], [r.score.val_bpb for r in runs], submission.baseline):
        yield f"- {test.line()}"


def parent_values(parent: Path | None) -> tuple[dict[str, Any] | None, str]:
    """(hyperparameters, what they are called) to compare with: the parent's log or script, else this repository's."""
    if parent is None:
        return resolve(REPOSITORY / "train_gpt.py", {}).values, "the defaults of this repository's train_gpt.py"
    for log in sorted(parent.glob("train*.log")):
        if values := read_text(log).values:
            return values, parent.name
    try:
        return resolve(parent / "train_gpt.py", {}).values, parent.name
    except ToolError:
        return None, parent.name


def changes(submission: Submission) -> str:
    """What is not the parent's: values of the configuration, and definitions of the script."""
    parent = submission.args.parent
    values, name = parent_values(parent)
    code = [] if parent is None else [code_changes(parent / "train_gpt.py", submission.first.script)]
    if values is None:
        return "\n\n".join([f"{name} logs no hyperparameters, so its configuration cannot be compared.", *code])
    ours = submission.first.run.values
    changed = differences({key: ours[key] for key in ours if key in values},
                          {key: values[key] for key in values if key in ours})
    odd = {"only here": sorted(set(ours) - set(values)), "only there": sorted(set(values) - set(ours))}
    notes = [f"Variables {where}: {shortened(map(str.upper, names))}." for where, names in odd.items() if names] + code
    if not changed:
        return "\n\n".join([f"The configuration equals {name}.", *notes])
    rows = [[f"`{key}`", *(f"`{as_variable(value)}`" for value in (theirs, ours))]
            for key, (ours, theirs) in changed.items()]
    return "\n\n".join([f"Configuration, against {name}:", table(["variable", "there", "here"], rows), *notes])


def definitions(script: Path) -> dict[str, str]:
    """Name -> code of every function and method of a script, packed or not, without comments and docstrings."""
    text = script.read_text(encoding="utf-8")
    tree, found = without_docstrings(unpacked(text) or text), {}
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + part.name: ast.unparse(part) for part in inside if isinstance(part, ast.FunctionDef)}
    return found


def code_changes(parent: Path, ours: Path) -> str:
    """The functions that were added, removed and changed since the parent's script."""
    try:
        theirs, mine = definitions(parent), definitions(ours)
    except (OSError, ToolError):
        return f"{parent.name} of the parent cannot be read, so the code is not compared."
    groups = {"added": sorted(set(mine) - set(theirs)), "removed": sorted(set(theirs) - set(mine)),
              "changed": sorted(name for name in set(mine) & set(theirs) if mine[name] != theirs[name])}  # fmt: skip
    said = [f"{kind} {shortened(names)}" for kind, names in groups.items() if names]
    return f"Functions of the script: {'; '.join(said)}." if said else "The script's functions are the parent's."


def shortened(names: Iterable[str]) -> str:
    """Names, a dozen at most."""
    listed = [f"`{name}`" for name in names]
    return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")


def environment(submission: Submission, data: dict[str, Any]) -> list[list[Any]]:
    """What the runs ran on, from their logs."""
    text = submission.first.text
    return [
        ["hardware", data["hardware"]], ["Python, torch", f"{text.facts.get('python')}, {data['pytorch_version']}"],
        ["attention", data.get("attention_backend")], ["parameters", data.get("model_params")],
        ["dataset", f"{text.facts.get('dataset')}, {data.get('train_shards')} train shards, "
                    f"{data.get('val_tokens')} validation tokens in {text.counts.get('val_documents')} documents"],
        ["train_gpt.py", f"sha256 `{data['script_sha256']}`, {data['bytes_code']} bytes"],
        ["configuration", f"sha256 `{data['config_sha256']}`"],
    ]  # fmt: skip


def files(submission: Submission) -> list[str]:
    """One line per file of the folder."""
    known = {
        "train_gpt.py": "the exact file that ran", "train_gpt_human.py": "the same before packing",
        "submission.json": "results for tools", "requirements.txt": "packages", "curves.png": "loss and bits per byte",
        "README.md": "this page",
    }  # fmt: skip
    names = sorted({"README.md", *(path.name for path in submission.folder.iterdir())})
    described = {name: known.get(name, "log of one seed" if name.endswith(".log") else "tokenizer") for name in names}
    return [f"- `{name}`: {text}" for name, text in described.items()]


def render(submission: Submission, data: dict[str, Any], picture: str) -> str:
    """The whole page."""
    parts = [
        f"# {submission.args.name}", claim(submission, data), submission.args.blurb,
        "## Results", results(submission, data), f"Score: the last scored line of each log, `{data['score']}`.",
        f"![training curves]({picture})" if picture else "",
        "## Significance", "\n".join(comparison(submission)),
        "## What changed", changes(submission),
        "## Compliance", compliance(submission, data),
        "## Reproduce", f"```bash\npip install -r requirements.txt\n{submission.command()}\n```",
        "Every hyperparameter is a default of this folder's `train_gpt.py`; the command sets only paths and the seed."
        if not submission.changed else "The command sets what the defaults of `train_gpt.py` do not hold.",
        "## Environment", table(["", ""], environment(submission, data)),
        "## Files", "\n".join(files(submission)),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"
