"""`python -m records plot`: a real picture comes out, and every error says what to do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="plots need requirements-dev.txt")

from matplotlib.image import imread

from records.__main__ import main
from records.reading.runs import Mark, read_run
from records.writing.plot import PALE, XAxis, cluster, draw, read_curves, smooth

STEPS = 200
CONFIG = {"event": "config", "sha256": "0", "torch": "2", "device": "cpu", "world_size": 1, "values": {"seed": 1},
          "sources": {}}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns where a layout collapses, and draws on


def events(offset: float = 0.0) -> list[dict[str, object]]:
    """The events of a small run, in the order in which a run logs them."""
    rows: list[dict[str, object]] = [dict(CONFIG)]
    for step in range(1, STEPS + 1, 5):
        loss, at = 2 + offset + 4 * math.exp(-step / 20), {"step": step, "train_time_ms": 50.0 * step}
        rows.append({"event": "train", "train_loss": loss, "step_avg_ms": 50.0, "lr_scale": 1.0, **at})
        if step % 50 == 1:
            rows.append({"event": "val", "val_loss": loss, "val_bpb": loss / 2, **at})
        if step == 151:
            rows.append({"event": "phase", "name": "late_qat:enabled", **at})
    score = {"event": "score", "name": "final_int6_sliding_window", "val_loss": 2.0, "val_bpb": 1.0, "eval_time_ms": 9}
    size = {"event": "size", "kind": "int6", "artifact_bytes": 1, "code_bytes": 1, "limit": 2}
    ledger = {"event": "ledger", "budget": "train", "seconds": 9.0, "limit": 10.0}
    return [*rows, size, ledger, {"event": "not yet invented"}, score]


FAMILY_A = """\
step:0/20000 val_loss:6.9370 val_bpb:4.0978 train_time:0ms step_avg:0.01ms
step:1/20000 train_loss:6.9408 train_time:24ms step_avg:23.99ms
swa:start step:12000
step:13750/20000 train_loss:1.9910 train_time:598726ms step_avg:43.54ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
FAMILY_B = """\
1/20000 train_loss: 9.0087 train_time: 0.0m tok/s: 17921784
2000/20000 train_loss: 2.6506 train_time: 3.2m tok/s: 8167705
layer_loop:enabled step:2178 frac:0.350 encoder:[0, 1] decoder:[2]
4945/20000 val_loss: 2.3539 val_bpb: 1.0756
stopping_early: wallclock_cap train_time: 599592ms step: 4945/20000
diagnostic quantized val_loss:2.34727563 val_bpb:1.07254371 eval_time:49995ms
quantized_ttt_phased val_loss:2.31944212 val_bpb:1.05989454 eval_time:508785ms
"""


def test_published_logs(tmp_path: Path) -> None:
    """Text logs of both dialects are drawn beside our own; a line without a time has its neighbours'."""
    paths = [tmp_path / "a.log", tmp_path / "b.log", tmp_path / "ours.jsonl"]
    paths[0].write_text(FAMILY_A)
    paths[1].write_text(FAMILY_B)
    write_log(paths[2], events())
    a, b, ours = (curve.log for curve in read_curves([*paths[:2], tmp_path / "ours"]))
    assert a.train == [(1, 0.024, 6.9408, pytest.approx(math.nan, nan_ok=True)), (13750, 598.726, 1.991,
                                                                                  pytest.approx(math.nan, nan_ok=True))]
    assert a.val[-1] == (13780, 600.038, 2.0606, 1.2172) and b.val == [(4945, 599.592, 2.3539, 1.0756)]
    assert [mark[::2] for mark in (*a.phases, *b.phases)] == [(12000, "swa:start"), (2178, "layer_loop:enabled")]
    assert 192 < b.phases[0].seconds < 220 and 500 < a.phases[0].seconds < 540
    assert ours.phases == [(151, 7.55, "late_qat:enabled")] and b.score.name == "quantized_ttt_phased"
    assert main(["plot", *map(str, paths), "-o", str(tmp_path / "out.png")]) == 0


def test_log_without_times(tmp_path: Path) -> None:
    """Only the panel over steps."""
    (tmp_path / "a.log").write_text("step:1/9 train_loss:6.9\nstep:9/9 train_loss:5.9\n")
    assert main(["plot", str(tmp_path / "a.log"), "-o", str(tmp_path / "out.png")]) == 0
    assert imread(tmp_path / "out.png").shape[1] < 1200


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


def test_validation_alone(tmp_path: Path) -> None:
    """A log without training lines is drawn by its validation points."""
    log = write_log(tmp_path / "run.jsonl", [row for row in events() if row["event"] in {"val", "score"}])
    assert main(["plot", str(log), "-o", str(tmp_path / "out.png")]) == 0


def test_long_names_and_many_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every legend lies within the picture; of many runs the best have colours and names, over the grey rest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for count, name in ((3, "a_very_long_name_of_a_run_" * 6 + "seed"), (20, "seed")):
        logs = [write_log(tmp_path / f"{name}{i}.jsonl", events(0.01 * i)) for i in range(count)]
        curves = read_curves(logs)
        figure = draw(curves, None)
        FigureCanvasAgg(figure).draw()
        frame = figure.bbox
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        named = {curve.colour for curve in curves} - {PALE}
        assert len(named) == min(count, 7) and sum(curve.colour == PALE for curve in curves) == max(count - 7, 0)
        texts = [text.get_text() for text in figure.legends[1].get_texts()]
        assert all(line.strip().endswith(("_", "seed0", "seed1", "seed2", "bpb")) or "a_very" not in texts[0]
                   for text in texts for line in text.splitlines()), "names are broken where a word ends"
        assert ("13 other runs" in texts) == (count == 20)
    assert main(["plot", *map(str, logs), "-o", str(tmp_path / "out.png")]) == 0
    assert "the 7 best are named" in capsys.readouterr().out


def test_what_a_picture_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without curves, by name; validation before the first step; a run a hundred times shorter stays in sight."""
    logs = [write_log(tmp_path / f"{name}.jsonl", rows) for name, rows in (
        ("long", events()), ("empty", events()[:1]),
        ("short", [{**row, "step": row["step"] // 100} for row in events(3.0) if row["event"] == "val"]),
        ("start", [row for row in events() if row["event"] == "train"] + [
            {"event": "val", "step": 0, "train_time_ms": 0, "val_loss": 99.0, "val_bpb": 99.0}]))]
    curves = read_curves(logs)
    assert "left out: " in (said := capsys.readouterr().out) and "empty.jsonl" in said
    assert [curve.name for curve in curves] == ["long", "short", "start"] and not curves[2].val
    upper, lower = draw(curves, "step").axes
    assert upper.get_ylim()[1] < 10 and lower.get_ylim()[1] < 10
    assert lower.get_ylim()[1] > max(point.bpb for point in curves[1].val if point.step)


def test_one_point_and_diverged(tmp_path: Path) -> None:
    """A single step and a loss that became NaN are drawn, not an error."""
    rows = [row for row in events() if row["event"] == "train"]
    for name, some in (("one", rows[:1]), ("nan", [*rows[:-1], {**rows[-1], "train_loss": math.nan}])):
        log = write_log(tmp_path / f"{name}.jsonl", some)
        assert main(["plot", str(log), "-o", str(tmp_path / f"{name}.png")]) == 0


def test_last_run_of_an_appended_log(tmp_path: Path) -> None:
    """A log that was appended to shows its last run; a last line cut off by a kill is dropped."""
    log = write_log(tmp_path / "run.jsonl", events() + events(1.0))
    log.write_text(log.read_text() + '{"event": "tra', encoding="utf-8")
    run = read_run(log)
    assert len(run.train) == STEPS // 5 and len(run.scores) == 1 and run.train[0].loss > 6


GOOD = json.dumps(events()[1]) + "\n"
ERRORS = {
    "missing file": (None, "no such file"),
    "empty": ("", "TRAIN_LOG_EVERY"),
    "no train events": (json.dumps(CONFIG) + "\n", "TRAIN_LOG_EVERY"),
    "text log": ("step:1/20 train_loss:6.9\nstep:2/20 train_loss:6.8\n", ":1: not a JSON object"),
    "damaged line": (GOOD + "{]\n" + GOOD, ":2: not a JSON object"),
    "missing field": (GOOD + '{"event": "train", "step": 2}\n', ":2: the 'train' event"),
    "no number": (GOOD + '{"event": "score", "name": "x", "val_bpb": null}\n', ":2: the 'score' event"),
    "not text": (b"\x7fELF\x00", "cannot be read"),
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
    assert smooth(noise)[0] == 1 and smooth(noise)[-1] == -1 and max(map(abs, smooth(noise)[10:-5])) < 0.2


def test_cluster() -> None:
    """Neighbours share a label, in the order of the axis."""
    marks = [Mark(50, 1.0, "c"), Mark(10, 3.0, "a"), Mark(11, 2.0, "b")]
    assert [[mark.name for mark in group] for group in cluster(marks, XAxis("step", ""), 2)] == [["a", "b"], ["c"]]
