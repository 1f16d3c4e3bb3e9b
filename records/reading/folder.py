"""A submission folder as published: whatever of script, logs, submission.json and README is there."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from records import ToolError
from records.reading.runs import RunLog, text_runs
from records.reading.script import unpacked


@dataclass
class Folder:
    """The files of a submission and what was read from them."""

    path: Path
    problems: list[str] = field(default_factory=list)  # submission*.json that cannot be read
    unreadable: list[str] = field(default_factory=list)  # logs that cannot be read

    @cached_property
    def json_files(self) -> list[Path]:
        """submission.json, or its variants submission_*.json."""
        exact = self.path / "submission.json"
        return [exact] if exact.is_file() else sorted(self.path.glob("submission_*.json"))

    @cached_property
    def data(self) -> dict[str, Any] | None:
        """The submission's claims; of variants the one with the lowest val_bpb. None if there is none to read."""
        found = []
        for path in self.json_files:
            try:
                loaded = json.loads(path.read_text(encoding="utf-8-sig"))
            except (ValueError, OSError) as error:
                self.problems.append(f"{path.name}: not JSON ({error})")
                continue
            if isinstance(loaded, dict):
                found.append(loaded)
            else:
                self.problems.append(f"{path.name}: a JSON object is expected, it holds {type(loaded).__name__}")
        return min(found, key=lambda data: claimed_bpb(data) or 1e9, default=None)

    @cached_property
    def script(self) -> Path | None:
        """The script of the logs: of several train_*.py the one whose bytes they count, else train_gpt.py, else any."""
        found = [path for path in sorted(self.path.glob("train_*.py")) if not path.stem.endswith(("_human", "_decode"))]
        counted = {run.counts.get("code_bytes", run.counts.get("code_bytes_raw")) for run in self.logs}
        counted |= {(self.data or {}).get("bytes_code")}
        exact = self.path / "train_gpt.py"
        likely = sorted(found, key=lambda path: (path.stat().st_size not in counted, path != exact))
        return exact if exact.is_file() and exact.stat().st_size in counted else likely[0] if likely else None

    @cached_property
    def source(self) -> str | None:
        """The text of the script; None if there is none or it is no text."""
        if self.script is None:
            return None
        try:
            return self.script.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            return None

    @cached_property
    def inner_source(self) -> str | None:
        """The program itself: what a packed script holds, else the script."""
        if self.source is None:
            return None
        return unpacked(self.source) or self.source

    @cached_property
    def pool(self) -> list[RunLog]:
        """Every run that any log in the folder or below holds."""
        found = []
        for path in sorted(path for suffix in ("log", "txt") for path in self.path.rglob(f"*.{suffix}")):
            if path.name.startswith("requirements"):
                continue
            try:
                runs = text_runs(path)
            except ToolError as error:
                self.unreadable.append(str(error).removeprefix(f"{path.parent}/"))
                continue
            telling = [run for run in runs if run.score or run.train or run.val]
            found += telling or (runs[:1] if self.is_own(path) else [])
        return found

    @cached_property
    def claimed(self) -> list[RunLog]:
        """The runs whose scores submission.json claims: by seed where it has rows, else those of its val_bpb."""
        rows = {seed: row["val_bpb"] for seed, row in self.seed_results.items() if is_number(row.get("val_bpb"))}
        named = list({id(run): run for seed in rows if (run := self.run_of(seed, rows))}.values())
        if named:
            standard = next((runs for runs in self.series() if is_standard(runs[0].path)), [])
            return named + [run for run in standard if run not in named and not is_rerun(run, named)
                            and not any(is_copy(run, other) for other in named)]
        bpb, series = claimed_bpb(self.data or {}), self.series()
        fitting = [runs for runs in series if fits(bpb, [run.score.val_bpb for run in runs if run.score])]
        single = [run for run in self.pool if run.score and near(bpb, run.score.val_bpb)]
        return next(iter(fitting), []) or single[:1] or next(iter(series), [])

    @property
    def logs(self) -> list[RunLog]:
        """The claimed runs, and for those that only score an artifact the runs that trained it."""
        trained = [run for run in self.pool if run.train and run.artifact_bytes]
        made = [next((run for run in trained if run.seed == scorer.seed), None) for scorer in self.claimed
                if not scorer.train and not scorer.artifact_bytes]
        return [*self.claimed, *(run for run in made if run and run not in self.claimed)]

    @property
    def others(self) -> list[RunLog]:
        """Runs in the folder that nothing claims."""
        return [run for run in self.pool if run not in self.logs and not any(is_copy(run, log) for log in self.logs)]

    def run_of(self, seed: str, rows: Mapping[str, float]) -> RunLog | None:
        """The run behind a claimed row: of its score and seed, else of its seed, else of its score alone."""
        same = [run for run in self.pool if str(run.seed) == seed]
        right = [run for run in self.pool if run.score and near(rows[seed], run.score.val_bpb)]
        ordered = [*(run for run in right if run in same), *(run for run in same if is_standard(run.path)),
                   *(run for run in right if str(run.seed) not in rows), *same]
        return ordered[0] if ordered else None

    def series(self) -> list[list[RunLog]]:
        """Runs whose files are called alike, of different seeds: first train_seed*.log with train.log, then by size."""
        alike: dict[str, list[RunLog]] = {}
        for run in self.pool:
            name = re.sub(r"[0-9]+", "", run.path.name)
            group = alike.setdefault("" if self.is_own(run.path) else f"{run.path.parent}/{name}", [])
            twin = next((other for other in group if other.path == run.path or is_copy(run, other)), None)
            if twin is None:
                group.append(run)
            elif self.better(run, twin):
                group[group.index(twin)] = run
        kept = [runs for key, runs in alike.items() if not key or len({run.seed for run in runs}) == len(runs)]
        kept += [[run] for runs in alike.values() if runs not in kept for run in runs]
        return sorted(kept, key=lambda runs: (runs is not alike.get(""), runs[0].path.parent != self.path, -len(runs)))

    def is_own(self, path: Path) -> bool:
        """Whether a log has the name and place that submissions give to the logs of their runs."""
        return path.parent == self.path and is_standard(path)

    def better(self, run: RunLog, other: RunLog) -> bool:
        """Whether of two runs in one file this one counts: the claimed score, else a score, else the later one."""
        bpb = claimed_bpb(self.data or {})
        return not (other.score and (near(bpb, other.score.val_bpb) or not run.score))

    @cached_property
    def readme(self) -> str:
        path = self.path / "README.md"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @cached_property
    def artifacts(self) -> list[Path]:
        """Compressed models that are shipped along."""
        patterns = "*.pgolf", "final_model*.ptz", "*.int*.ptz"
        return sorted({path for pattern in patterns for path in self.path.glob(pattern)})

    @property
    def is_record_track(self) -> bool:
        """Whether the 600 second limits apply: by the track's folder, else by the claimed track."""
        parent = self.path.resolve().parent.name
        if parent.startswith("track_"):
            return "non" not in parent and "10min" in parent
        track = str((self.data or {}).get("track", "10min"))
        return "10min" in track and "non" not in track

    @cached_property
    def seed_results(self) -> dict[str, dict[str, Any]]:
        """Claimed results by seed, from any of the published forms."""
        results = (self.data or {}).get("seed_results", {})
        if isinstance(results, list):
            results = {str(row.get("seed", i)): row for i, row in enumerate(results) if isinstance(row, dict)}
        seeds = (self.data or {}).get("seeds")
        if not results or not isinstance(results, dict):
            results = seeds if isinstance(seeds, dict) else {}
        rows = {str(key): row if isinstance(row, dict) else {} for key, row in results.items()}
        return {key.removeprefix("seed").lstrip("_ "): row for key, row in rows.items()}

    @property
    def claimed_seeds(self) -> list[int]:
        """Seeds that the submission names."""
        seeds = (self.data or {}).get("seeds")
        listed = seeds if isinstance(seeds, list) else list(self.seed_results)
        return [int(seed) for seed in listed if str(seed).lstrip("-").isdigit()]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def tolerance(claimed: float) -> float:
    """Half of the last digit that a claimed number shows, between four and seven decimals."""
    digits = len(repr(float(claimed)).partition(".")[2]) if "e" not in repr(float(claimed)) else 7
    return 0.51 * 10.0 ** -min(max(digits, 4), 7)


def near(claimed: Any, logged: float) -> bool:
    """Whether a claimed number is a logged one, as far as its digits go."""
    return is_number(claimed) and abs(claimed - logged) <= tolerance(claimed)


def means(values: Sequence[float]) -> list[float]:
    """The mean of some scores, also as it is where each was rounded first."""
    return [statistics.fmean(round(value, digits) for value in values) for digits in (8, 6, 5, 4)] if values else []


def fits(claimed: Any, values: Sequence[float]) -> bool:
    """Whether a claimed number is the mean of scores or one of them."""
    return any(near(claimed, value) for value in [*means(values), *values])


def is_standard(path: Path) -> bool:
    """Whether a log is called as submissions call them."""
    return bool(re.fullmatch(r"train\.log|train_s(eed)?\d.*\.log", path.name))


def is_copy(run: RunLog, other: RunLog) -> bool:
    """Whether one of two logs is train.log and the other the same run under its seed's name."""
    is_twice = "train.log" in (run.path.name, other.path.name)
    return is_twice and bool(run.score) and run.score == other.score and run.seed == other.seed


def is_rerun(run: RunLog, named: Sequence[RunLog]) -> bool:
    """Whether a log is of a seed that another one stands for, with another score."""
    return any(run.seed == other.seed and run.score != other.score for other in named)


def claimed_bpb(data: dict[str, Any]) -> float | None:
    """The mean score that a submission.json claims."""
    value = data.get("val_bpb", data.get("mean_val_bpb"))
    return float(value) if isinstance(value, int | float) else None


def open_folder(path: Path) -> Folder:
    """The folder; ToolError if it is none."""
    if not path.is_dir():
        raise ToolError(f"{path}: no such folder; give one like records/track_10min_16mb/2026-03-17_NaiveBaseline")
    return Folder(path)
