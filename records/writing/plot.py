"""`python -m records plot RUN... -o curves.png`: loss curves of one or more runs.

Reads the JSON lines that train_gpt.py writes, and text logs of either published dialect, so that a run can be drawn
beside somebody's record. One column of panels per x axis (steps, training time), one row for the loss and one for bits
per byte.
"""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from records import ToolError
from records.reading.runs import LOG_SUFFIXES, Mark, Point, RunLog, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY, PALE = "#666666", "#c8c8c8"
MINUTES_FROM_SECONDS = 180.0  # a time axis longer than this is in minutes
CHARACTERS_PER_INCH = 12.0  # of the legends' font
WIDEST = 60  # characters of a line of the legend; longer names are broken


@dataclass(frozen=True)
class Curve:
    """A run in the picture."""

    name: str
    colour: str
    log: RunLog

    @property
    def val(self) -> list[Point]:
        """Validation of a model that was trained: a line from step 0 would cross the picture."""
        return [point for point in self.log.val if point.step] or ([] if self.log.train else self.log.val)

    def legend(self) -> str:
        """The run's name and its scores, one to a line."""
        lines = [self.name, *(f"  {score.name}  {score.val_bpb:.4f} bpb" for score in self.log.scores)]
        wrap = textwrap.TextWrapper(WIDEST, subsequent_indent="    ", drop_whitespace=False)
        wrap.wordsep_re = re.compile(r"(?<=[/_ -])")  # where names may be broken
        return "\n".join(part for line in lines for part in wrap.wrap(line))


class XAxis(NamedTuple):
    """An x axis: the attribute of Point and Mark it shows, divided by `unit`."""

    attribute: str
    label: str
    unit: float = 1.0

    def of(self, points: Sequence[Point | Mark]) -> list[float]:
        """The x values of some points."""
        return [getattr(point, self.attribute) / self.unit for point in points]


# ---------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------

def read_curves(paths: Sequence[Path]) -> list[Curve]:
    """All runs, named by file, or by folder and file where files are called the same.

    A path may be a log of any kind or the stem logs/<RUN_ID>. Of several runs those without anything to draw are left
    out and named; ToolError where there is no other.
    """
    known = [path.is_file() or path.suffix in LOG_SUFFIXES for path in paths]
    files = [path if ok else path.with_name(f"{path.name}.jsonl") for path, ok in zip(paths, known, strict=True)]
    runs = {path: read_run(path) for path in files}
    drawn = [path for path, run in runs.items() if run.train or run.val]
    for path in [path for path in runs if path not in drawn]:
        problem = (f"{path}: no train events. Either the run ended before its first logged step (read the end of its "
                   ".txt log) or it logged none: set TRAIN_LOG_EVERY=10 and run it again")
        if not drawn:
            raise ToolError(problem)
        print(f"left out: {problem}")
    stems = [path.stem for path in drawn]
    names = [path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}" for path in drawn]
    return coloured([Curve(name, PALE, runs[path]) for name, path in zip(names, drawn, strict=True)])


def coloured(curves: Sequence[Curve]) -> list[Curve]:
    """Every run in a colour; of more runs than there are colours the best, and the rest in grey after them."""
    def score(curve: Curve) -> float:
        return curve.log.score.val_bpb if curve.log.score else math.inf

    ranked = sorted(curves, key=score) if len(curves) > len(COLOURS) else curves
    best = [replace(curve, colour=colour) for curve, colour in zip(ranked, COLOURS, strict=False)]
    return [*best, *ranked[len(COLOURS) :]]


# ---------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------

def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean over about a twentieth of the points.

    The window is symmetric and shrinks towards both ends, so that the curve does not miss the last value; it reaches
    half way to the start at most, where many logs have each of the steps 1-10. Fewer than 40 points stay as they are:
    steps 1-10 and three later ones have no neighbours to average with.
    """
    count = len(values)
    widest = count // 40
    result = []
    for i in range(count):
        half = min(i // 2, count - 1 - i, widest)
        window = values[i - half : i + half + 1]
        result.append(sum(window) / len(window))
    return result


def top_of(lines: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Upper y limit for lines of (x, y): what lies in the first 4% of the x axis may run out of the picture.

    A loss starts at ln(vocabulary) and falls within a few steps; showing all of that would flatten everything after it.
    A line that ends there, of a run much shorter than the others, is measured by its own length.
    """
    start = 0.04 * max(x for line in lines for x, _ in line)
    own = [0.04 * max(x for x, _ in line) for line in lines]
    starts = [start if start <= 25 * first else first for first in own]
    return max(y for line, first in zip(lines, starts, strict=True) for x, y in line if x >= first)


def draw_loss(axes: Axes, runs: Sequence[Curve], x: XAxis) -> None:
    """Training loss as points under their moving mean, validation loss as ringed dots; the first runs on top."""
    for run in reversed(runs):
        train_x, losses = x.of(run.log.train), [point.loss for point in run.log.train]
        if run.colour != PALE:
            axes.plot(train_x, losses, ".-", color=run.colour, alpha=0.25, linewidth=0.5, markersize=2.5)
        axes.plot(train_x, smooth(losses), color=run.colour, linewidth=0.8 if run.colour == PALE else 1.5)
        axes.plot(x.of(run.val), [point.loss for point in run.val], **val_style(run.colour))
    axes.set_ylabel("loss (nats per token)")


def draw_bpb(axes: Axes, runs: Sequence[Curve], x: XAxis) -> None:
    """Validation bits per byte over training; the last score, which is the submitted one, as a star at its end."""
    for run in reversed(runs):
        line = {**val_style(run.colour), "linestyle": "-", "linewidth": 0.8 if run.colour == PALE else 1}
        axes.plot(x.of(run.val), [point.bpb for point in run.val], **line)
        if run.log.score and run.colour != PALE:
            end = max(x.of(run.log.train + run.log.val))
            axes.plot([end], [run.log.score.val_bpb], "*", color=run.colour, markeredgecolor="white",
                      markeredgewidth=0.5, markersize=12, zorder=5)
    axes.set_ylabel("validation (bits per byte)")


def val_style(colour: str) -> dict[str, Any]:
    """How a validation point looks in every panel."""
    if colour == PALE:
        return {"linestyle": "none", "marker": ".", "markersize": 3, "color": colour, "zorder": 2}
    style = {"linestyle": "none", "marker": "o", "markersize": 5, "markerfacecolor": "white", "markeredgewidth": 1.3}
    return {**style, "color": colour, "zorder": 4}


def limit(axes: Axes) -> None:
    """Fit the y axis to the drawn values, less what top_of lets go; a diverged run's NaN are left out.

    The x axis begins at 0 unless most of it would be empty for a run that went on from elsewhere; a few points at the
    end alone do not make it that.
    """
    pairs = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.get_lines()]
    lines = [line for every in pairs if (line := [(x, y) for x, y in every if math.isfinite(x + y)])]
    if not lines:
        return
    low, high = min(y for line in lines for _, y in line), top_of(lines)
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    first, last = (end(x for line in lines for x, _ in line) for end in (min, max))
    if first > 0.6 * last:
        axes.set_xlim(-0.05 * last, 1.05 * last)


def cluster(marks: Sequence[Mark], x: XAxis, width: float) -> list[list[Mark]]:
    """Marks in groups of neighbours less than `width` from the group's first, so that labels do not collide."""
    groups: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda mark: x.of([mark])[0]):
        if groups and x.of([mark])[0] - x.of(groups[-1])[0] < width:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    return groups


def draw_phases(axes: Axes, runs: Sequence[Curve], x: XAxis, labelled: bool) -> None:
    """A dotted line at every change of phase; its name along it where `labelled`."""
    marks = [(mark, run.colour) for run in runs for mark in run.log.phases
             if run.colour != PALE and math.isfinite(x.of([mark])[0])]
    for mark, colour in marks:
        axes.axvline(x.of([mark])[0], color=colour, linestyle=":", linewidth=1, alpha=0.8, zorder=1)
    if not labelled:
        return
    left, right = axes.get_xlim()
    for group in cluster([mark for mark, _ in marks], x, 0.025 * (right - left)):
        axes.annotate(
            ", ".join(dict.fromkeys(mark.name for mark in group)), (x.of(group)[0], 0.97),
            xycoords=axes.get_xaxis_transform(), xytext=(-2, 0), textcoords="offset points", rotation=90, ha="right",
            va="top", fontsize=7, color=GREY, bbox={"color": "white", "alpha": 0.7, "pad": 0.3})


def x_axes(runs: Sequence[Curve], chosen: str | None) -> list[XAxis]:
    """The x axes to draw: the chosen one, or both where the logs have times."""
    every = [point.seconds for run in runs for point in run.log.train + run.log.val if math.isfinite(point.seconds)]
    minutes = max(every, default=0) > MINUTES_FROM_SECONDS
    axes = {"step": XAxis("step", "step"),
            "time": XAxis("seconds", f"training time ({'minutes' if minutes else 'seconds'})", 60 if minutes else 1)}
    return [axes[chosen or "step"]] if chosen or not every else list(axes.values())


def style(axes: Axes) -> None:
    """A quiet frame: light grid, no box."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def add_legends(figure: Figure, runs: Sequence[Curve]) -> None:
    """The kinds of line above the panels, the runs with their scores below."""
    from matplotlib.lines import Line2D

    kinds = {}
    if any(run.log.train for run in runs):
        kinds = {"training, logged": {"linestyle": "-", "marker": ".", "linewidth": 0.5, "alpha": 0.5},
                 "training, moving mean": {"linewidth": 1.5}}
    if any(run.log.val for run in runs):
        kinds["validation"] = val_style(GREY)
    if any(run.log.score for run in runs):
        kinds["last score"] = {"linestyle": "none", "marker": "*", "markersize": 9}
    if any(run.log.phases for run in runs):
        kinds["change of phase"] = {"linestyle": ":", "linewidth": 1}
    handles = [Line2D([], [], **{"color": GREY, **kind}) for kind in kinds.values()]
    figure.legend(handles, list(kinds), loc="outside upper center", ncols=len(kinds), fontsize=8, frameon=False)
    named = [run for run in runs if run.colour != PALE]
    lines, texts = [Line2D([], [], color=run.colour, linewidth=3) for run in named], [run.legend() for run in named]
    if len(named) < len(runs):
        lines.append(Line2D([], [], color=PALE, linewidth=3))
        texts.append(f"{len(runs) - len(named)} other runs")
    longest = max(len(line) for text in texts for line in text.splitlines())
    columns = int(CHARACTERS_PER_INCH * figure.get_figwidth() / (longest + 6))
    figure.legend(lines, texts, loc="outside lower center", ncols=max(1, min(3, columns, len(texts))), fontsize=8,
                  frameon=False)


def draw(runs: Sequence[Curve], chosen: str | None) -> Figure:
    """The whole figure: a column per x axis, the loss above, bits per byte below if any run has them."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state; savefig then draws with Agg

    columns = x_axes(runs, chosen)
    rows = [draw_loss, draw_bpb] if any(run.log.val or run.log.score for run in runs) else [draw_loss]
    below = 0.14 * sum(len(run.legend().splitlines()) for run in runs if run.colour != PALE)  # at most, in one column
    figure = Figure(figsize=(2.0 + 5.2 * len(columns), 1.1 + 3.0 * len(rows) + below), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), sharex="col", sharey="row", squeeze=False)
    for i, draw_row in enumerate(rows):
        for axes, x in zip(grid[i], columns):
            draw_row(axes, runs, x)
            style(axes)
            axes.set_xlabel(x.label if i == len(rows) - 1 else "")
            axes.label_outer()
        for axes in grid[i]:
            limit(axes)
    for axes, x in ((axes, x) for row in grid for axes, x in zip(row, columns)):
        draw_phases(axes, runs, x, labelled=axes in grid[0])
    figure.align_ylabels(grid[:, 0])
    add_legends(figure, runs)
    return figure


# ---------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `plot` takes."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="log of a run, as "
                        "logs/<RUN_ID>.jsonl or a published train_seed42.log")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture to write, as logs/curves.png")
    parser.add_argument("--x", choices=("step", "time"), help="draw only against this (default: both, side by side)")


def run(args: argparse.Namespace) -> int:
    """Read the logs, write the picture, say where it is."""
    runs = read_curves(args.runs)
    try:
        figure = draw(runs, args.x)
    except ModuleNotFoundError as error:
        raise ToolError(f"{error}: python -m pip install -r requirements-dev.txt") from None
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture format
        raise ToolError(f"{args.out}: cannot be written ({error})") from None
    points = sum(len(run.log.train) for run in runs)
    rest = f"; the {len(COLOURS)} best are named" if len(runs) > len(COLOURS) else ""
    print(f"{args.out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {points} training points{rest}")
    return 0
