"""Mean, spread and the competition's test over the seeds of one configuration.

A record must beat the one before by 0.005 nats at p < 0.01. Nobody pinned down whether that is per token or per byte,
so both are tested: one-sided Welch on val_loss (nats per token) and on val_bpb times ln 2 (nats per byte).
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from records import ToolError

MARGIN_NATS = 0.005
ALPHA = 0.01


class Summary(NamedTuple):
    """A sample in three numbers; sd and se are None for a single seed."""

    n: int
    mean: float
    sd: float | None
    se: float | None


class Baseline(NamedTuple):
    """What is to be beaten: scores per seed where they are known, else one mean."""

    name: str
    val_bpb: list[float]
    val_loss: list[float]


class Comparison(NamedTuple):
    """One test: is our mean lower than the baseline's by more than `margin` nats per `unit`?"""

    unit: str
    margin: float
    difference: float  # ours - baseline, nats per unit
    t: float | None
    p: float | None
    method: str

    @property
    def passes(self) -> bool:
        return self.p is not None and self.p < ALPHA

    def line(self) -> str:
        """The test as one line of text."""
        claim = f"lower than the baseline by more than {self.margin:g} nats per {self.unit}"
        if self.p is None:
            return f"{claim}: difference {self.difference:+.5f}, not testable ({self.method})"
        verdict = "yes" if self.passes else "no"
        return f"{claim}: {verdict}, difference {self.difference:+.5f}, t {self.t:.3f}, p {self.p:.3g} ({self.method})"


def summarize(values: Sequence[float]) -> Summary:
    """Mean, standard deviation (n - 1) and standard error."""
    if len(values) < 2:
        return Summary(len(values), float(values[0]), None, None)
    sd = statistics.stdev(values)
    return Summary(len(values), statistics.fmean(values), sd, sd / math.sqrt(len(values)))


def one_sided(
    ours: Sequence[float], baseline: Sequence[float], margin: float
) -> tuple[float | None, float | None, str]:
    """(t, p, method) of the hypothesis that mean(ours) < mean(baseline) - margin."""
    from scipy import stats

    if len(ours) < 2:
        return None, None, "needs two seeds or more"
    shifted = [value - margin for value in baseline]
    if len(set(ours)) == 1 and len(set(baseline)) == 1:
        return None, None, "no spread between seeds: are they different runs?"
    if len(shifted) == 1:
        result = stats.ttest_1samp(ours, shifted[0], alternative="less")
        return float(result.statistic), float(result.pvalue), "one-sample t: the baseline is one value"
    result = stats.ttest_ind(ours, shifted, equal_var=False, alternative="less")
    return float(result.statistic), float(result.pvalue), "one-sided Welch t"


def compare(val_loss: Sequence[float], val_bpb: Sequence[float], baseline: Baseline) -> list[Comparison]:
    """Both units, at a margin of 0 and of 0.005 nats."""
    pairs = {"byte": ([v * math.log(2) for v in val_bpb], [v * math.log(2) for v in baseline.val_bpb])}
    if baseline.val_loss:
        pairs = {"token": (list(val_loss), baseline.val_loss), **pairs}
    rows = []
    for unit, (ours, theirs) in pairs.items():
        if not theirs:
            continue
        difference = statistics.fmean(ours) - statistics.fmean(theirs)
        for margin in (0.0, MARGIN_NATS):
            rows.append(Comparison(unit, margin, difference, *one_sided(ours, theirs, margin)))
    return rows


def numbers(value: Any) -> list[float]:
    """A number or a list of numbers as a list."""
    values = value if isinstance(value, list) else [value]
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


def read_baseline(path: Path) -> Baseline:
    """Scores from a submission.json (or its folder), from what `seeds` wrote, or from {"val_bpb": [...]}."""
    if importlib.util.find_spec("scipy") is None:  # said before hours of runs, not after
        raise ToolError("the tests against a baseline need scipy: python -m pip install -r requirements-dev.txt")
    path = path / "submission.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(data, dict):
        raise ToolError(f"{path}: a list where an object is expected; a baseline is a submission.json or "
                        '{"val_bpb": [one number per seed], "val_loss": [...]}')
    results = data.get("seed_results", {})
    results = [row for row in (results.values() if isinstance(results, dict) else results) if isinstance(row, dict)]
    samples = {}
    for key in ("val_bpb", "val_loss"):
        listed = [float(row[key]) for row in results if key in row]
        samples[key] = listed if listed else numbers(data.get(key, data.get(f"mean_{key}")))
    if not samples["val_bpb"]:
        raise ToolError(f"{path}: no val_bpb and no seed_results in it; a baseline is a submission.json or "
                        '{"val_bpb": [one number per seed], "val_loss": [...]}')
    return Baseline(str(data.get("name", path.stem)), samples["val_bpb"], samples["val_loss"])


def described(summary: Summary, digits: int = 6) -> str:
    """A summary as text."""
    if summary.sd is None:
        return f"{summary.mean:.{digits}f} (1 seed: no spread)"
    return f"{summary.mean:.{digits}f} (n {summary.n}, sd {summary.sd:.{digits}f}, se {summary.se:.{digits}f})"
