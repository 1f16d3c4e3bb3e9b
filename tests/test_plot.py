"""`python -m records plot`: a real picture comes out, and every error says what to do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="plots need requirements-dev.txt")

from matplotlib.image import imread

from records.__main__ import main
from records.plot import Mark, XAxis, cluster, read_run, smooth

STEPS = 200
pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns where a layout collapses, and draws on


def events(offset: float = 0.0) -> list[dict[str, object]]:
    """The events of a small run, in the order in which a run logs them."""
    rows: list[dict[str, object]] = [{"event": "config", "seed": 1}]
    for step in range(1, STEPS + 1, 5):
        loss, at = 2 + offset + 4 * math.exp(-step / 20), {"step": step, "train_time_ms": 50.0 * step}
        rows.append({"event": "train", "train_loss": loss, "step_avg_ms": 50.0, "lr_scale": 1.0, **at})
        if step % 50 == 1:
            rows.append({"event": "val", "val_loss": loss, "val_bpb": loss / 2, **at})
        if step == 151:
            rows.append({"event": "phase", "name": "late_qat:enabled", **at})
    score = {"event": "score", "name": "final_int6_sliding_window", "val_loss": 2.0, "val_bpb": 1.0, "eval_time_ms": 9}
    return [*rows, {"event": "size", "total": 1}, {"event": "ledger"}, {"event": "not yet invented"}, score]


def write_log(path: Path, rows: list[dict[str, object]]) -> Path:
    """A run log of these events."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("flags, panels", [((), 2), (("--x", "step"), 1), (("--x", "time"), 1)])
def test_picture(tmp_path: Path, flags: tuple[str, ...], panels: int) -> None:
    """Two runs give a PNG whose columns differ and which is neither blank nor of one colour."""
    logs = [str(write_log(tmp_path / f"{name}.jsonl", events(offset))) for name, offset in (("a", 0.0), ("b", 0.3))]
    out = tmp_path / "new folder" / "curves.png"
    assert main(["plot", *logs, "-o", str(out), *flags]) == 0
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = (imread(out)[..., :3] * 255).astype("uint8")
    assert pixels.shape[1] > 900 * panels
    colours = {tuple(row) for row in pixels.reshape(-1, 3)[::7].tolist()}
    assert len(colours) > 50 and {(0, 114, 178), (213, 94, 0)} <= colours, "both runs' colours are in the picture"


@pytest.mark.parametrize("keep", [{"train"}, {"train", "val"}, {"train", "score"}, {"train", "phase"}])
def test_sparse_logs(tmp_path: Path, keep: set[str]) -> None:
    """Training events alone are enough; whatever else is there is drawn."""
    log = write_log(tmp_path / "run.jsonl", [row for row in events() if row["event"] in keep])
    assert main(["plot", str(log), "-o", str(tmp_path / "out.png")]) == 0


def test_one_point_and_diverged(tmp_path: Path) -> None:
    """A single step and a loss that became NaN are drawn, not an error."""
    rows = [row for row in events() if row["event"] == "train"]
    for name, some in (("one", rows[:1]), ("nan", [*rows[:-1], {**rows[-1], "train_loss": math.nan}])):
        assert main(["plot", str(write_log(tmp_path / name, some)), "-o", str(tmp_path / f"{name}.png")]) == 0


def test_last_run_of_an_appended_log(tmp_path: Path) -> None:
    """A log that was appended to shows its last run; a last line cut off by a kill is dropped."""
    log = write_log(tmp_path / "run.jsonl", events() + events(1.0))
    log.write_text(log.read_text() + '{"event": "tra', encoding="utf-8")
    run = read_run(log, "run", "black")
    assert len(run.train) == STEPS // 5 and len(run.scores) == 1 and run.train[0].loss > 6


GOOD = json.dumps(events()[1]) + "\n"
ERRORS = {
    "missing file": (None, "no such file"),
    "empty": ("", "TRAIN_LOG_EVERY"),
    "no train events": ('{"event": "config"}\n', "TRAIN_LOG_EVERY"),
    "text log": ("step:1/20 train_loss:6.9\nstep:2/20 train_loss:6.8\n", ":1: not a JSON object"),
    "damaged line": (GOOD + "{]\n" + GOOD, ":2: not a JSON object"),
    "missing field": (GOOD + '{"event": "train", "step": 2}\n', ":2: the 'train' event"),
    "no number": (GOOD + '{"event": "score", "name": "x", "val_bpb": null}\n', ":2: the 'score' event"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
}


@pytest.mark.parametrize("content, message", ERRORS.values(), ids=ERRORS)
def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes | None, message: str) -> None:
    """Status 1 and one message that names the file; no picture."""
    log, out = tmp_path / "run.jsonl", tmp_path / "out.png"
    if content is not None:
        log.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["plot", str(log), "-o", str(out)]) == 1
    said = capsys.readouterr().err
    assert message in said and str(log) in said and not out.exists()


def test_picture_format_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A suffix that no picture format has is the user's to mend."""
    log = write_log(tmp_path / "run.jsonl", events())
    assert main(["plot", str(log), "-o", str(tmp_path / "out.xyz")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_smooth() -> None:
    """A line stays itself (no lag), the ends are kept, noise shrinks; a handful of points is not smeared."""
    assert smooth([6.9, 5.0, 4.8, 3.0, 2.7]) == [6.9, 5.0, 4.8, 3.0, 2.7]
    line = [0.5 * i for i in range(200)]
    assert smooth(line) == pytest.approx(line)
    noise = [(-1.0) ** i for i in range(200)]
    assert smooth(noise)[0] == 1 and smooth(noise)[-1] == -1 and max(map(abs, smooth(noise)[5:-5])) < 0.2


def test_cluster() -> None:
    """Neighbours share a label, in the order of the axis."""
    marks = [Mark(50, 1.0, "c"), Mark(10, 3.0, "a"), Mark(11, 2.0, "b")]
    assert [[mark.name for mark in group] for group in cluster(marks, XAxis("step", ""), 2)] == [["a", "b"], ["c"]]
