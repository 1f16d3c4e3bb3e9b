"""`python -m records table`: the leaderboard over all submission folders, for the terminal or as Markdown."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from records import RECORDS
from records.reading.folder import Folder, claimed_bpb
from records.reading.rules import TRACKS

WIDTH_OF_A_PIPE = 250  # columns: more than any name takes
NARROW = 110  # a terminal of fewer columns has authors behind the names


class Entry(NamedTuple):
    """One submission as the board shows it."""

    track: str
    bpb: float
    sd: float | None
    seeds: int
    size: int | None
    author: str
    date: str
    name: str
    folder: str

    def cells(self, place: int) -> list[str]:
        """The row's texts."""
        spread = "" if self.sd is None else f"{self.sd:.4f}"
        size = "" if self.size is None else f"{self.size:,}"
        return [str(place), f"{self.bpb:.4f}", spread, str(self.seeds), size, self.author, self.date, self.name]


HEADER = ["#", "val_bpb", "sd", "seeds", "bytes", "author", "date", "name"]


def entry(path: Path) -> Entry | None:
    """A folder's entry, from its claims and, where they say nothing, its logs; None without a score in either."""
    folder = Folder(path)
    data: dict[str, Any] = folder.data or {}
    logged = [run.score.val_bpb for run in folder.claimed if run.score]
    bpb = claimed_bpb(data) or (statistics.fmean(logged) if logged else None)
    if bpb is None:
        return None
    sd, size = data.get("val_bpb_std"), data.get("bytes_total", data.get("artifact_bytes_max"))
    sizes = [run.total_bytes for run in folder.logs if run.total_bytes]
    dated = re.match(r"\d{4}-\d{2}-\d{2}", path.name)
    return Entry(path.parent.name.removeprefix("track_"), bpb, sd if isinstance(sd, float) else spread_of(logged),
                 max(len(folder.claimed_seeds), len(logged), 1),
                 size if isinstance(size, int) else max(sizes, default=None),
                 str(data.get("author", "")), str(data.get("date", dated[0] if dated else ""))[:10],
                 str(data.get("name", data.get("run_name", path.name))), path.name)


def spread_of(scores: Sequence[float]) -> float | None:
    """Standard deviation over seeds, where there are some."""
    return statistics.stdev(scores) if len(scores) > 1 else None


def why_without(path: Path) -> str:
    """Why a folder has no place on the board."""
    folder = Folder(path)
    if folder.data is None:
        return "; ".join(folder.problems) or "no submission.json, and no log with a score"
    return "submission.json claims no val_bpb, and no log has a score"


def entries(root: Path, track: str | None) -> tuple[list[Entry], list[str]]:
    """(entries, best first; folders without a score), of one track or of all."""
    folders = sorted(path for path in root.glob(f"track_{track or '*'}/*") if path.is_dir())
    found = [(path, entry(path)) for path in folders]
    board = sorted((item for _, item in found if item), key=lambda item: (item.track, item.bpb))
    return board, [f"{path.relative_to(root)}: {why_without(path)}" for path, item in found if item is None]


def markdown(rows: Sequence[Entry]) -> str:
    """The board as a Markdown table whose names link to the folders."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    for place, row in enumerate(rows, 1):
        cells = row.cells(place)
        cells[-1] = f"[{row.name}](track_{row.track}/{row.folder}/README.md)"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def show(title: str, rows: Sequence[Entry]) -> None:
    """The board in the terminal; plain columns where rich is missing."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        lines = [HEADER, *(row.cells(place) for place, row in enumerate(rows, 1))]
        print(title, *("\t".join(cells) for cells in lines), sep="\n")
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE)  # nothing is folded in a pipe
    board = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    lines = [HEADER, *(row.cells(place) for place, row in enumerate(rows, 1))]
    if console.width < NARROW:  # one column of words, which leaves them room
        lines = [[*cells[:5], cells[6], ", ".join(filter(None, (cells[7], cells[5])))] for cells in lines]
    for column in lines[0]:
        board.add_column(column, justify="right" if column in HEADER[:5] else "left", overflow="fold",
                         no_wrap=column != lines[0][-1])
    for cells in lines[1:]:
        board.add_row(*map(Text, cells))
    console.print(board)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `table` takes."""
    parser.add_argument("--track", choices=TRACKS, help="only this one (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--root", type=Path, default=RECORDS, help="folder of the tracks (default: records/)")


def run(args: argparse.Namespace) -> int:
    """Print a board per track, and name the folders that have no score."""
    board, without = entries(args.root, args.track)
    for track in sorted({row.track for row in board}):
        rows = [row for row in board if row.track == track]
        if args.markdown:
            print(f"### {track}\n\n{markdown(rows)}\n")
        else:
            show(track, rows)
    if not board:
        print(f"no submission with a score below {args.root}; `python -m records new` makes one")
    for name in without:
        print(f"not on the board: {name}")
    return 0
