"""Draw the scores of the track and print them as a table, both from benchmarks/track.csv.

    python -m benchmarks.track [-o benchmarks/track.png]

A row is one run of 600 s, made as benchmarks/RESULTS.md says; an empty cell was not measured.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import markdown, shown

DATA = Path(__file__).with_suffix(".csv")
COLOURS = {"ours": "#0072B2", "others": "#D55E00"}
HEAD = ["system", "parameters", "steps", "ms a step", "after averaging", "round trip", "sliding, stride 64",
        "artifact + code, bytes"]  # fmt: skip
FORMS = {"parameters": ",.0f", "steps": ",.0f", "step_ms": ".1f", "after_average": ".5f", "round_trip": ".5f",
         "sliding": ".5f", "total_bytes": ",.0f"}  # fmt: skip


class Score(NamedTuple):
    """A row of the table: who made the system, and its numbers by column (None: not measured)."""

    system: str
    by: str
    numbers: dict[str, float | None]

    def cells(self) -> list[str]:
        return [self.system, *(shown(self.numbers[name], form) for name, form in FORMS.items())]


def read_scores(path: Path = DATA) -> list[Score]:
    """All rows of the file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Score(row.pop("system"), row.pop("by"), {k: float(v) if v else None for k, v in row.items()})
                for row in csv.DictReader(file)]  # fmt: skip


def draw(scores: Sequence[Score], out: Path) -> None:
    """A line a system: bits per byte of its weights (ring) and of its artifact (dot), with what a step takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9.5, 0.8 + 0.36 * len(scores)), layout="constrained")
    for line, score in enumerate(scores):
        weights, artifact = score.numbers["after_average"], score.numbers["round_trip"]
        axes.plot([weights, artifact], [line, line], "-", color=COLOURS[score.by])
        axes.plot(weights, line, "o", color=COLOURS[score.by], markerfacecolor="white", markersize=7)
        axes.plot(artifact, line, "o", color=COLOURS[score.by], markersize=8)
        text = f"{artifact:.4f}, {score.numbers['step_ms']:.0f} ms a step"
        axes.annotate(text, (max(weights, artifact), line), (9, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(scores)), [score.system for score in scores], fontsize=8)
    axes.invert_yaxis()
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.35 * (right - left))  # room for the texts
    axes.set_xlabel("bits per byte after 600 s of one H200: averaged weights (ring), artifact (dot)", fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.track", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=DATA.with_suffix(".png"), help="picture (track.png)")
    scores = read_scores()
    draw(scores, parser.parse_args(arguments).out)
    print(markdown(HEAD, [score.cells() for score in scores]))


if __name__ == "__main__":
    main()
