"""`python -m records plot RUN.jsonl... -o curves.png`: loss curves of one or more runs.

Reads the JSON-lines log that train_gpt.py writes beside its text log. One column of
panels per x axis (steps, training time), one row for the loss and one for bits per
byte. Events this module does not know are passed over, so logs may grow new ones.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from records import ToolError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"
MINUTES_FROM_SECONDS = 180.0  # a time axis longer than this is in minutes


class Point(NamedTuple):
    """One logged value and where it stands on both x axes."""

    step: int
    seconds: float
    loss: float
    bpb: float = math.nan


class Mark(NamedTuple):
    """A change of phase: where it happened, its name and the run's colour."""

    step: int
    seconds: float
    name: str
    colour: str = GREY


@dataclass
class Run:
    """What one log says, in the order logged; `scores` are (name, bits per byte)."""

    name: str
    colour: str
    train: list[Point] = field(default_factory=list)
    val: list[Point] = field(default_factory=list)
    phases: list[Mark] = field(default_factory=list)
    scores: list[tuple[str, float]] = field(default_factory=list)

    def add(self, event: dict[str, Any]) -> None:
        """Take in one event; KeyError, TypeError or ValueError if a field is missing or no number."""
        kind = event.get("event")
        if kind == "config":  # the file was appended to: only its last run counts
            self.train, self.val, self.phases, self.scores = [], [], [], []
        elif kind == "score":
            self.scores.append((str(event["name"]), float(event["val_bpb"])))
        elif kind in ("train", "val", "phase"):
            at = int(event["step"]), float(event["train_time_ms"]) / 1000
            if kind == "phase":
                self.phases.append(Mark(*at, str(event["name"]), self.colour))
            elif kind == "train":
                self.train.append(Point(*at, float(event["train_loss"])))
            else:
                self.val.append(Point(*at, float(event["val_loss"]), float(event["val_bpb"])))

    def legend(self) -> str:
        """The run's name and its scores, one to a line."""
        return "\n".join([self.name, *(f"  {name}  {bpb:.4f} bpb" for name, bpb in self.scores)])


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

def read_events(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, event) for every line. A last line that a running or killed run left unfinished is dropped."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ToolError(f"{path}: no such file. A run writes logs/<RUN_ID>.jsonl in the folder it is started in; "
                        "see what is there with `ls logs/*.jsonl`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"{path}: cannot be read as a text file ({error})") from None
    lines = text.split("\n")
    unfinished = len(lines) if lines[-1] else 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = {} if number == unfinished and number > 1 else None
        if not isinstance(event, dict):
            hint = f"; did you mean {path.with_suffix('.jsonl')}?" if path.suffix != ".jsonl" else ""
            raise ToolError(f"{path}:{number}: not a JSON object, so this is no run log in JSON lines{hint}")
        yield number, event


def read_run(path: Path, name: str, colour: str) -> Run:
    """The run that a log describes; ToolError if it holds nothing to draw."""
    run = Run(name, colour)
    for number, event in read_events(path):
        try:
            run.add(event)
        except (KeyError, TypeError, ValueError) as error:
            raise ToolError(f"{path}:{number}: the {event['event']!r} event is missing a field or holds no number "
                            f"there ({error!r})") from None
    if not run.train:
        raise ToolError(f"{path}: no train events. Either the run ended before its first logged step (read the end "
                        "of its .txt log) or it logged none: set TRAIN_LOG_EVERY=10 and run it again")
    return run


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs, named by file, or by folder and file where files are called the same."""
    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}" for path in paths]
    return [read_run(path, name, COLOURS[i % len(COLOURS)]) for i, (path, name) in enumerate(zip(paths, names))]


# ---------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------

def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean over about a twentieth of the points.

    The window is symmetric and shrinks towards both ends, so the curve neither lags
    behind a steep start nor misses the last value. Fewer than 40 points stay as they are:
    steps 1-10 and three later ones have no neighbours to average with.
    """
    count = len(values)
    widest = count // 40
    result = []
    for i in range(count):
        half = min(i, count - 1 - i, widest)
        window = values[i - half : i + half + 1]
        result.append(sum(window) / len(window))
    return result


def top_of(values: Sequence[tuple[float, float]]) -> float:
    """Upper y limit for (x, y) values: what lies in the first 4% of the x axis may run out of the picture.

    A loss starts at ln(vocabulary) and falls within a few steps; showing all of that
    would flatten everything after it.
    """
    start = 0.04 * max(x for x, _ in values)
    return max(y for x, y in values if x >= start)


def draw_loss(axes: Axes, runs: Sequence[Run], x: XAxis) -> None:
    """Training loss as points under their moving mean, validation loss as ringed dots."""
    for run in runs:
        train_x, losses = x.of(run.train), [point.loss for point in run.train]
        axes.plot(train_x, losses, ".-", color=run.colour, alpha=0.25, linewidth=0.5, markersize=2.5)
        axes.plot(train_x, smooth(losses), color=run.colour, linewidth=1.5)
        axes.plot(x.of(run.val), [point.loss for point in run.val], **val_style(run))
    axes.set_ylabel("loss (nats per token)")


def draw_bpb(axes: Axes, runs: Sequence[Run], x: XAxis) -> None:
    """Validation bits per byte over training; the last score, which is the submitted one, as a star at its end."""
    for run in runs:
        line = {**val_style(run), "linestyle": "-", "linewidth": 1}
        axes.plot(x.of(run.val), [point.bpb for point in run.val], **line)
        end = max(x.of(run.train + run.val))
        axes.plot([end for _ in run.scores[-1:]], [bpb for _, bpb in run.scores[-1:]], "*", color=run.colour,
                  markeredgecolor="white", markeredgewidth=0.5, markersize=12, zorder=5)
    axes.set_ylabel("validation (bits per byte)")


def val_style(run: Run) -> dict[str, Any]:
    """How a validation point looks in every panel."""
    style = {"linestyle": "none", "marker": "o", "markersize": 5, "markerfacecolor": "white", "markeredgewidth": 1.3}
    return {**style, "color": run.colour, "zorder": 4}


def limit_y(axes: Axes) -> None:
    """Fit the y axis to the drawn values, less what top_of lets go; a diverged run's NaN are left out."""
    pairs = [pair for line in axes.get_lines() for pair in zip(line.get_xdata(), line.get_ydata())]
    finite = [(x, y) for x, y in pairs if math.isfinite(y)]
    if not finite:
        return
    low, high = min(y for _, y in finite), top_of(finite)
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)


def cluster(marks: Sequence[Mark], x: XAxis, width: float) -> list[list[Mark]]:
    """Marks in groups of neighbours less than `width` from the group's first, so that labels do not collide."""
    groups: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda mark: x.of([mark])[0]):
        if groups and x.of([mark])[0] - x.of(groups[-1])[0] < width:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    return groups


def draw_phases(axes: Axes, runs: Sequence[Run], x: XAxis, labelled: bool) -> None:
    """A dotted line at every change of phase; its name along it where `labelled`."""
    marks = [mark for run in runs for mark in run.phases]
    for mark in marks:
        axes.axvline(x.of([mark])[0], color=mark.colour, linestyle=":", linewidth=1, alpha=0.8, zorder=1)
    if not labelled:
        return
    left, right = axes.get_xlim()
    for group in cluster(marks, x, 0.025 * (right - left)):
        colours = {mark.colour for mark in group}
        axes.annotate(
            ", ".join(dict.fromkeys(mark.name for mark in group)), (x.of(group)[0], 0.97),
            xycoords=axes.get_xaxis_transform(), xytext=(-2, 0), textcoords="offset points", rotation=90, ha="right",
            va="top", fontsize=7, color=colours.pop() if len(colours) == 1 else GREY)


def x_axes(runs: Sequence[Run], chosen: str | None) -> list[XAxis]:
    """The x axes to draw: the chosen one, or both."""
    seconds = max(point.seconds for run in runs for point in run.train + run.val)
    minutes = seconds > MINUTES_FROM_SECONDS
    axes = {"step": XAxis("step", "step"),
            "time": XAxis("seconds", f"training time ({'minutes' if minutes else 'seconds'})", 60 if minutes else 1)}
    return [axes[chosen]] if chosen else list(axes.values())


def style(axes: Axes) -> None:
    """A quiet frame: light grid, no box."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def add_legends(figure: Figure, runs: Sequence[Run]) -> None:
    """The kinds of line above the panels, the runs with their scores below."""
    from matplotlib.lines import Line2D

    kinds = {"training, logged": {"linestyle": "-", "marker": ".", "linewidth": 0.5, "alpha": 0.5},
             "training, moving mean": {"linewidth": 1.5}}
    if any(run.val for run in runs):
        kinds["validation"] = val_style(Run("", GREY))
    if any(run.scores for run in runs):
        kinds["last score"] = {"linestyle": "none", "marker": "*", "markersize": 9}
    if any(run.phases for run in runs):
        kinds["change of phase"] = {"linestyle": ":", "linewidth": 1}
    handles = [Line2D([], [], **{"color": GREY, **kind}) for kind in kinds.values()]
    figure.legend(handles, list(kinds), loc="outside upper center", ncols=len(kinds), fontsize=8, frameon=False)
    figure.legend([Line2D([], [], color=run.colour, linewidth=3) for run in runs], [run.legend() for run in runs],
                  loc="outside lower center", ncols=min(3, len(runs)), fontsize=8, frameon=False)


def draw(runs: Sequence[Run], chosen: str | None) -> Figure:
    """The whole figure: a column per x axis, the loss above, bits per byte below if any run has them."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state; savefig then draws with Agg

    columns = x_axes(runs, chosen)
    rows = [draw_loss, draw_bpb] if any(run.val or run.scores for run in runs) else [draw_loss]
    figure = Figure(figsize=(2.0 + 5.2 * len(columns), 1.1 + 3.0 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), sharex="col", sharey="row", squeeze=False)
    for i, draw_row in enumerate(rows):
        for axes, x in zip(grid[i], columns):
            draw_row(axes, runs, x)
            style(axes)
            axes.set_xlabel(x.label if i == len(rows) - 1 else "")
            axes.label_outer()
        limit_y(grid[i][0])
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
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run log, as logs/<RUN_ID>.jsonl")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture to write, as logs/curves.png")
    parser.add_argument("--x", choices=("step", "time"), help="draw only against this (default: both, side by side)")


def run(args: argparse.Namespace) -> int:
    """Read the logs, write the picture, say where it is."""
    runs = read_runs(args.runs)
    try:
        figure = draw(runs, args.x)
    except ModuleNotFoundError as error:
        raise ToolError(f"{error}: python -m pip install -r requirements-dev.txt") from None
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture format
        raise ToolError(f"{args.out}: cannot be written ({error})") from None
    points = sum(len(run.train) for run in runs)
    print(f"{args.out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {points} training points")
    return 0
