"""Finished runs on their way to a submission folder: their files, which must fit each other, and what is made of it."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import ToolError
from records.reading.rules import known_data
from records.reading.runs import RunLog, read_jsonl, read_text, run_files, run_stem
from records.reading.script import PATHS, Resolved, as_variable
from records.reading.statistics import Baseline
from records.writing.seeds import refuse_unlike


@dataclass(frozen=True)
class Source:
    """The files of one finished run and what they say."""

    run: RunLog
    text: RunLog
    script: Path

    @property
    def seed(self) -> int:
        return int(self.run.values["seed"])


def read_source(path: Path) -> Source:
    """A finished run with the exact script that ran; ToolError says what is missing."""
    stream, text, script = run_files(run_stem(path))
    run = read_jsonl(stream)
    if not (run.finished and run.score and run.artifact_bytes):
        raise ToolError(f"{stream}: the run did not come to its end (no score, size or ledger); run the seed again: "
                        "`python -m records seeds` continues a series")
    sha256 = hashlib.sha256(script.read_bytes()).hexdigest()
    if sha256 != run.facts["sha256"]:
        raise ToolError(f"{script}: sha256 {sha256[:12]} is not the {run.facts['sha256'][:12]} of its log: the copy "
                        "was changed after the run. Restore the file that ran, or run it again")
    return Source(run, read_text(text), script)


def run_stems(paths: Sequence[Path]) -> list[Path]:
    """The runs that --runs names, each once: by any of their files (logs/mine_seed*), or by the folder of a series."""
    stems = []
    for path in paths:
        statistics_file = path / "statistics.json"
        if statistics_file.is_file():
            seeds = json.loads(statistics_file.read_text(encoding="utf-8"))["seeds"]
            stems += [path.with_name(f"{path.name}_seed{seed}") for seed in seeds]
        elif path.is_dir():
            raise ToolError(f"{path}: no statistics.json in it, so no series that `python -m records seeds` finished; "
                            f"name its runs, as {path}_seed42")
        else:
            stems.append(run_stem(path))
    return list(dict.fromkeys(stems))


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """All runs, which must be different seeds of one script and one configuration."""
    sources = [read_source(path) for path in run_stems(paths)]
    refuse_unlike([source.run for source in sources])
    seeds = [source.seed for source in sources]
    if len(set(seeds)) < len(seeds):
        raise ToolError(f"--runs hold the seeds {seeds}: one seed twice is one seed")
    return sources


@dataclass(frozen=True)
class Submission:
    """What is written: where, from which runs, and what is claimed."""

    folder: Path
    args: argparse.Namespace
    sources: list[Source]
    resolved: Resolved  # the script's own defaults
    changed: dict[str, tuple[Any, Any]]  # hyperparameters that the defaults do not hold
    baseline: Baseline | None

    @property
    def runs(self) -> list[RunLog]:
        return [source.run for source in self.sources]

    @property
    def first(self) -> Source:
        return self.sources[0]

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that goes into the folder."""
        return self.args.tokenizer or tokenizer_to_ship(self.first)

    def command(self) -> str:
        """The command that repeats a seed: paths, SEED, and what the script's defaults do not hold (else nothing)."""
        values, world = self.first.run.values, self.first.run.counts["world_size"]
        places = {"DATA_PATH": "path/to/shards", "TOKENIZER_PATH": "path/to/tokenizer.model"}
        if shipped := self.tokenizer:
            places["TOKENIZER_PATH"] = shipped.name
        if not any(self.first.run.sources.get(name) != "default" for name in PATHS) and not shipped:
            places = {}
        settings = {name: as_variable(ours) for name, (_, ours) in self.changed.items()}
        words = [f"{name}={value}" for name, value in {**places, **settings, "SEED": values["seed"]}.items()]
        start = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
        return " ".join([*words, start, "train_gpt.py"])


def tokenizer_path(source: Source) -> Path:
    """The tokenizer that a run read."""
    values = source.run.values
    default = Path(values["data_dir"], "tokenizers", f"fineweb_{values['vocab_size']}_bpe.model")
    return Path(values["tokenizer_path"]) if values["tokenizer_path"] else default


def tokenizer_to_ship(source: Source) -> Path | None:
    """The run's tokenizer unless it is an official one, by its name and the official validation tokens."""
    path, tokens = tokenizer_path(source), source.text.counts.get("val_tokens", 0)
    official = re.fullmatch(r"fineweb_(\d+)_bpe\.model", path.name)
    label = known_data(tokens) or ""
    return None if official and label.startswith(f"sp{official[1]}") else path
