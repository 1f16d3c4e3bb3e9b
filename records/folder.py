"""A submission folder as published: whatever of script, logs, submission.json and README is there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from records import ToolError
from records.runs import RunLog, read_text
from records.script import unpacked


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
        """train_gpt.py, else the only other train_*.py."""
        exact = self.path / "train_gpt.py"
        others = sorted(path for path in self.path.glob("train_*.py") if not path.stem.endswith("_human"))
        return exact if exact.is_file() else others[0] if others else None

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
    def logs(self) -> list[RunLog]:
        """Run logs, by seed: train_seed*.log, else train.log, else any log with a score."""
        seeded = sorted(self.path.glob("train_seed*.log")) or sorted(self.path.glob("train_s[0-9]*.log"))
        chosen = seeded or [path for path in [self.path / "train.log"] if path.is_file()]
        runs = []
        for path in chosen or sorted([*self.path.glob("*.log"), *self.path.glob("train*.txt")]):
            try:
                runs.append(read_text(path))
            except ToolError as error:
                self.unreadable.append(str(error).removeprefix(f"{path.parent}/"))
        return [run for run in runs if chosen or run.score or run.train]

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


def claimed_bpb(data: dict[str, Any]) -> float | None:
    """The mean score that a submission.json claims."""
    value = data.get("val_bpb", data.get("mean_val_bpb"))
    return float(value) if isinstance(value, int | float) else None


def open_folder(path: Path) -> Folder:
    """The folder; ToolError if it is none."""
    if not path.is_dir():
        raise ToolError(f"{path}: no such folder; give one like records/track_10min_16mb/2026-03-17_NaiveBaseline")
    return Folder(path)
