"""benchmarks/compare.py and start_time.py: rows say what the event stream says, and no run is lost or made twice."""

import json
import math
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_env

import train_gpt as t
from benchmarks import common, compare, start_time, step_time

NEVER_SET = ("RUN_ID", "MAX_WALLCLOCK_SECONDS")


@pytest.fixture
def toy(in_tmp: Path, corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, the tiny configuration and its data in the environment."""
    for name, value in tiny_env(**corpus, OMP_NUM_THREADS=1).items():
        if name not in NEVER_SET:
            monkeypatch.setenv(name, value)
    return in_tmp


def cells(output: str) -> list[list[str]]:
    """Rows of the last table, its head first."""
    lines = output.splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("| variant |"))
    table = [line for line in lines[last:] if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in re.split(r"(?<=[| ])\|(?= |$)", line.strip("|") + " |")[:-1]] for line in table]


def column(output: str, title: str) -> list[str]:
    head, *rows = cells(output)
    return [row[head.index(title)] for row in rows]


# ---------------------------------------------------------------------------------------
# Command line and plan
# ---------------------------------------------------------------------------------------


def planned(*words: str) -> dict[tuple[str, int], compare.Job]:
    return {(job.variant.name, job.seed): job for job in compare.jobs_of(compare.parse(words))}


def test_options_with_lists_end_where_a_variant_begins(toy: Path) -> None:
    """Names follow a list without a separator; variants win over --shared, that over the environment."""
    jobs = planned("--seconds", "9", "--seeds", "1", "2", "--shared", "EVAL_STRIDE=8", "SEED=7", "a", "--", "b",
                   "EVAL_STRIDE=4", "MAX_WALLCLOCK_SECONDS=0")  # fmt: skip
    assert list(jobs) == [("a", 1), ("b", 1), ("a", 2), ("b", 2)], "every variant comes before the second seed"
    assert [job.env["EVAL_STRIDE"] for job in jobs.values()] == ["8", "4", "8", "4"]
    assert [job.env["MAX_WALLCLOCK_SECONDS"] for job in jobs.values()] == ["9", "0", "9", "0"]
    assert jobs["a", 2].env["SEED"] == "2" and jobs["a", 1].env["MODEL_DIM"] == "32"
    assert len({job.env["RUN_ID"] for job in jobs.values()}) == 4 and len({job.key for job in jobs.values()}) == 4


def test_vocabulary_follows_the_tokenizer(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is set."""
    monkeypatch.delenv("VOCAB_SIZE")
    assert planned("a")["a", 1337].env["VOCAB_SIZE"] == "512"
    assert planned("a", "VOCAB_SIZE=600")["a", 1337].env["VOCAB_SIZE"] == "600"


def test_recipes_are_variants_and_take_more_settings() -> None:
    """All but the demo, or those named; a group with a recipe's name adds to it, another one is a variant."""
    every = {path.stem for path in compare.RECIPES.glob("*.env")} - {"demo"}
    jobs = planned("--recipes", "--", "xsa_gptq", "GPTQ_RESERVE_SECONDS=7", "--", "default")
    assert {name for name, _ in jobs} == every | {"default"} and not any(job.problem for job in jobs.values())
    assert jobs["xsa_gptq", 1337].env["GPTQ_RESERVE_SECONDS"] == "7"
    assert jobs["xsa_gptq", 1337].env["RECIPE"].endswith("xsa_gptq.env") and "RECIPE" not in jobs["default", 1337].env
    named = ["mar22_asqu", "naive_baseline"]
    assert [name for name, _ in planned("--recipes", *named)] == named


def test_lengths_of_recipes_shrink_with_the_clock() -> None:
    """A tenth of 600 s gets a tenth of the steps; what is set by name, and a run without a clock, stay as they are."""
    short = planned("--recipes", "int6_mlp1488", "naive_baseline", "depth_recurrent", "mar22_asqu")
    got = {name: compare.shortened(t.Config.from_env({**job.env, "RECIPE": job.env["RECIPE"]}), 600.0)
           for (name, _), job in short.items()}  # fmt: skip
    assert not any(got.values()), "they are in the environment by now"
    values = {name: t.Config.from_env(job.env) for (name, _), job in short.items()}
    assert (values["int6_mlp1488"].warmdown_iters, values["int6_mlp1488"].post_qat_seconds) == (300, 3.0)
    assert (values["naive_baseline"].warmdown_iters, values["naive_baseline"].muon_momentum_warmup_steps) == (120, 50)
    assert (values["depth_recurrent"].lawa_freq, values["mar22_asqu"].swa_every) == (4, 5)
    job = planned("--recipes", "mar22_asqu", "--", "mar22_asqu", "MAX_WALLCLOCK_SECONDS=0")["mar22_asqu", 1337]
    assert (t.Config.from_env(job.env).warmdown_iters, t.Config.from_env(job.env).iterations) == (3500, 2000)
    job = planned("--recipes", "mar22_asqu", "--", "mar22_asqu", "WARMDOWN_ITERS=77")["mar22_asqu", 1337]
    assert t.Config.from_env(job.env).warmdown_iters == 77


def test_ablations_take_the_full_configuration_and_its_seeds() -> None:
    """Each removal alone, with the first seed; the full one with all, first."""
    jobs = planned("--seeds", "5", "6", "--remove", "XSA_LAST_N=0", "--without", "VE_ENABLED=0", "EMA_ENABLED=0",
                   "full", "MIN_LR=0.1")  # fmt: skip
    assert list(jobs) == [("full", 5), ("full", 6), ("XSA_LAST_N=0", 5), ("VE_ENABLED=0 EMA_ENABLED=0", 5)]
    cfg = t.Config.from_env(jobs["VE_ENABLED=0 EMA_ENABLED=0", 5].env)
    assert (cfg.ve_enabled, cfg.ema_enabled, cfg.min_lr, cfg.xsa_last_n) == (False, False, 0.1, 11)


@pytest.mark.parametrize(("words", "message"), [
    ([], "no variant"), (["A=1"], "expected the name"), (["a", "B"], "expected KEY=value"),
    (["a", "--", "a"], "two variants"),
    (["a", "--", "b", "--seeds", "3"], "expected KEY=value"), (["--seeds", "1", "1", "a"], "each once"),
    (["--remove", "A=1", "a", "--", "b"], "one full configuration"),
])  # fmt: skip
def test_command_lines_that_mean_nothing(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(words) == 2
    assert message in capsys.readouterr().err


def test_identity_is_configuration_seed_and_script() -> None:
    """Another setting, seed or number of ranks is another run; another spelling of a default is the same one."""
    keys = [planned(*words)["a", seed].key for words, seed in (
        (["a"], 1337), (["--seeds", "1", "a"], 1), (["--ranks", "2", "a"], 1337), (["a", "MIN_LR=0.2"], 1337),
        (["a", "MIN_LR=0.10"], 1337))]  # fmt: skip
    assert len(set(keys)) == 4 and keys[0] == keys[4]


def documented(name: str) -> list[list[str]]:
    """The arguments of every documented `python -m benchmarks.NAME ...`, but for the outlines with [brackets]."""
    folder = Path(compare.__file__).parent
    texts = [compare.__doc__, step_time.__doc__, *(path.read_text() for path in folder.glob("*.md"))]
    lines = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
    commands = [line.split("  #")[0] for line in lines if line.startswith(f"python -m benchmarks.{name} ")]
    return [shlex.split(command)[3:] for command in commands if "[" not in command]


def test_documented_command_lines_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    """Every line asks for runs that train_gpt.py accepts."""
    lines = documented("compare")
    assert len(lines) >= 3 and len(documented("step_time")) >= 3
    for words in lines:
        assert compare.main(["--dry-run", *words]) == 0, words
    assert re.search(r"^  asqu: RECIPE=\S+mar22_asqu.env$", capsys.readouterr().out, re.MULTILINE), "nothing shortened"
    for words in documented("step_time"):
        assert all(t.Config.from_env(variant.settings) for variant in step_time.parse(words).variants)


# ---------------------------------------------------------------------------------------
# Rows and tables
# ---------------------------------------------------------------------------------------

EVENTS = [
    {"event": "config", "device": "H100", "torch": "2", "values": {}, "sources": {}},
    {"event": "model", "parameters": 1234567, "mlp_hidden": 9},
    {"event": "train", "step": 1, "train_loss": 6.0, "train_time_ms": 90, "step_avg_ms": 90.0, "lr_scale": 1.0},
    {"event": "val", "step": 600, "val_loss": 2.0, "val_bpb": 1.5, "train_time_ms": 48000},
    {"event": "score", "name": "DIAGNOSTIC before_post_qat rounded", "val_loss": 9, "val_bpb": 9, "eval_time_ms": 1},
    {"event": "train", "step": 650, "train_loss": 2.0, "train_time_ms": 3000, "step_avg_ms": 4.6, "lr_scale": 0.1},
    {"event": "score", "name": "DIAGNOSTIC after_post_qat rounded", "val_loss": 8.0, "val_bpb": 8.0, "eval_time_ms": 1},
    {"event": "size", "artifact_bytes": 15000000, "code_bytes": 160000, "limit": 16000000, "kind": "int6+ans"},
    {"event": "score", "name": "DIAGNOSTIC post_qat", "val_loss": 1.0, "val_bpb": 1.4, "eval_time_ms": 1},
    {"event": "score", "name": "final_int8_zlib_roundtrip", "val_loss": 1.0, "val_bpb": 1.41, "eval_time_ms": 1},
    {"event": "degradation", "bpb": 0.01},
    {"event": "score", "name": "final_int6_sliding_window", "val_loss": 1.0, "val_bpb": 1.39, "eval_time_ms": 1},
    {"event": "score", "name": "legal_ttt", "val_loss": 1.0, "val_bpb": 1.38, "eval_time_ms": 1},
    {"event": "score", "name": "legal_ttt_ngram", "val_loss": 1.0, "val_bpb": 1.2, "eval_time_ms": 1},
    {"event": "inactive", "features": ["swa (SWA_EVERY=50)", "late_qat (LATE_QAT_THRESHOLD=0.1)"]},
    {"event": "ledger", "budget": "train", "limit": 60.0, "seconds": 61.25, "phases": {}, "over": True},
    {"event": "ledger", "budget": "eval", "limit": 600.0, "seconds": 19.5, "phases": {}, "over": False},
]


def job(name: str = "a", seed: int = 1) -> compare.Job:
    return compare.Job(compare.Variant(name, {}), seed, {"RUN_ID": name}, f"{name}{seed}")


def test_row_says_what_the_events_say(in_tmp: Path) -> None:
    """Every quantity from its event; scores of rounded weights during QAT are not the score before quantization."""
    Path("logs").mkdir()
    Path("logs/a.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS) + '{"event": "led')
    row = compare.row_of(job(), common.Finished(0, 100.0, ""))
    assert row["scores"] == {"round trip": 1.41, "sliding": 1.39, "TTT": 1.38, "n-gram": 1.2}
    assert (row["before"], row["steps"], row["step_ms"], row["parameters"]) == (1.4, 600, 80.0, 1234567)
    assert compare.final(row) == 1.2
    text = compare.table(compare.parse(["a"]), [row])
    assert cells(text)[1] == ["a", "1", "1,234,567", "600", "80.00", "1.40000", "1.41000", "1.39000", "1.38000",
                              "1.20000", "+0.01000", "15,160,000", "19.5", "61.2", "60", "100", "swa, late_qat",
                              "over budget: train"]  # fmt: skip
    assert text.startswith("H100, torch 2; ")


def row_at(name: str, seed: int, score: float, **changes: Any) -> compare.Row:
    """A finished row with one score."""
    return {"name": name, "seed": seed, "status": 0, "error": "", "scores": {"sliding": score}, "wall_s": 10.0,
            "device": "H100", "torch": "2", **changes}  # fmt: skip


def test_spread_and_ablations() -> None:
    """Mean and sample sd of the finished seeds; a removal's difference over the noise of a difference to that mean."""
    full = [1.40, 1.41, 1.45]
    rows = [row_at("full", seed, score) for seed, score in enumerate(full)]
    failed = row_at("full", 9, 0.0, status=1, error="killed", scores={})
    rows += [failed, row_at("A=0", 0, 1.5), row_at("B=0", 0, 1.4)]
    text = compare.table(compare.parse(["--remove", "A=0", "--remove", "B=0", "full"]), rows)
    mean, sd = statistics.fmean(full), statistics.stdev(full)
    expected = [*full, None, mean, sd, 1.5, 1.4]
    assert column(text, "sliding") == [common.shown(value, ".5f") for value in expected]
    assert column(text, "seed")[4:6] == ["mean of 3", "sd"]
    assert column(text, "minus full")[-2:] == [f"{1.5 - mean:+.5f}", f"{1.4 - mean:+.5f}"]
    noise = sd * math.sqrt(1 + 1 / 3)
    assert column(text, "over noise")[-2:] == [f"{(1.5 - mean) / noise:+.1f}", f"{(1.4 - mean) / noise:+.1f}"]
    assert column(text, "status")[3] == "**exit 1**: killed" and set(column(text, "minus full")[:6]) == {""}


def test_other_machines_are_named() -> None:
    """Timings of different machines in one table carry a warning."""
    text = compare.table(compare.parse(["a"]), [row_at("a", 1, 1.0), row_at("b", 1, 1.0, device="H200")])
    assert text.startswith("H100, torch 2; H200, torch 2 (timings of different machines do not compare)")


# ---------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------


def test_runs_end_to_end_and_are_not_repeated(
    toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real runs: a good one, one that training stops, one that is refused; the table after each; the second call takes
    the finished row from the file and tries the failed ones again."""
    words = ["--out", "rows.jsonl", "good", "LAWA_ENABLED=1", "LAWA_FREQ=99", "--", "diverges", "MATRIX_LR=1e30",
             "--", "refused", "VE_LAYERS=77"]  # fmt: skip
    assert compare.main(words) == 1
    output = capsys.readouterr().out
    assert output.count("| variant | seed |") == 3, "a table after every run"
    assert column(output, "variant") == ["good", "diverges", "refused"]
    status = column(output, "status")
    assert status[0] == "ok" and re.match(r"\*\*exit 1\*\*: error: .*the training loss is nan", status[1])
    assert "VE_LAYERS=77" in status[2] and column(output, "never activated") == ["lawa", "", ""]
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    log = [json.loads(line) for line in next(Path("logs").glob("compare_good_*.jsonl")).read_text().splitlines()]
    scores = [event["val_bpb"] for event in log if event["event"] == "score" and not event["name"].endswith(" rounded")]
    assert [rows[0]["before"], *rows[0]["scores"].values()] == scores
    assert list(rows[0]["scores"]) == ["round trip", "by documents", "sliding"]
    assert rows[0]["train_limit_s"] == 60 and rows[0]["steps"] == 12 and rows[0]["wall_s"] > rows[0]["train_s"]

    tried: list[str] = []
    fake_runs(monkeypatch, tried, common.Finished(3, 1.0, "x"))
    assert compare.main(words) == 1
    again = capsys.readouterr().out
    assert [run_id.split("_")[1] for run_id in tried] == ["diverges"] and "1 runs finished before, 2 to do" in again
    assert cells(again)[1] == cells(output)[1] and column(again, "status")[:2] == ["ok", "**exit 3**: x"]


def fake_runs(monkeypatch: pytest.MonkeyPatch, started: list[str], ended: common.Finished) -> None:
    """In place of processes: they leave the events of a good run and have ended."""

    def start(env: dict[str, str], ranks: int) -> None:
        Path("logs").mkdir(exist_ok=True)
        lines = [json.dumps(event) + "\n" for event in EVENTS if not ended.status]
        common.logged(env["RUN_ID"], ".jsonl").write_text("".join(lines))
        started.append(env["RUN_ID"])

    monkeypatch.setattr(compare, "start", start)
    monkeypatch.setattr(compare, "finish", lambda process, run_id, begin: ended)


@pytest.mark.parametrize(("limit", "made"), [("0", 3), ("1000", 3), ("399", 1)])
def test_no_run_begins_that_would_end_too_late(
    limit: str, made: int, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Judged by the longest run so far; what was not run is said, and the next call makes it."""
    calls: list[str] = []
    fake_runs(monkeypatch, calls, common.Finished(0, 400.0, ""))
    words = ["--out", "rows.jsonl", "--limit-s", limit, "a", "--", "b", "--", "c"]
    assert compare.main(words) == 0
    output = capsys.readouterr().out
    assert len(calls) == made
    left = re.findall(r"not run, the time is up: (\w), seed 1337", output)
    assert left == ["a", "b", "c"][made:]
    assert compare.main([*words[:2], *words[4:]]) == 0
    assert [call.split("_")[1] for call in calls] == ["a", "b", "c"]


def test_a_broken_line_in_the_rows_is_passed_over(tmp_path: Path) -> None:
    """A killed call leaves half a line; failed rows are not done; of two rows of one run the later counts."""
    path = tmp_path / "rows.jsonl"
    rows = [{"key": "a", "status": 0, "n": 1}, {"key": "a", "status": 0, "n": 2}, {"key": "b", "status": 1}]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"key": "c", "sta')
    assert compare.read_done(path) == {"a": rows[1]}
    assert compare.read_done(tmp_path / "none") == compare.read_done(None) == {}


def test_launch_is_torchrun_for_several_ranks() -> None:
    assert common.command(1)[1:] == [t.__file__]
    assert common.command(3)[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", t.__file__]


@pytest.mark.parametrize(("log", "console", "error"), [
    ("error: UserError: no", "error: other\n", "error: UserError: no"),
    ("", "warning\nerror: bad value\n", "error: bad value"),
    ("step:1", "Traceback\n  x\ntorch.OutOfMemoryError: CUDA out\n=====\n", "torch.OutOfMemoryError: CUDA out"),
    ("", "Killed\n", "Killed"), ("", "", "it printed nothing"),
])  # fmt: skip
def test_last_error(log: str, console: str, error: str, in_tmp: Path) -> None:
    """The log's own error, else what the console says."""
    Path("logs").mkdir()
    Path("logs/r.txt").write_text(log)
    Path("logs/r.console.txt").write_text(console)
    assert common.last_error("r") == error


def test_start_is_timed_to_its_first_step(toy: Path) -> None:
    """A real start: its first step lies between the warm-up that the ledger has and the end of the run."""
    env = {**common.plain_environment(), "RUN_ID": "start_cold", "ITERATIONS": "1", "EVAL_STRIDE": "0"}
    cold = start_time.timed_start("cold", env)
    assert 0 < cold.warmup < cold.first_step < cold.finished.seconds and cold.finished.status == 0
    ledgers = [event for event in common.events("start_cold") if event["event"] == "ledger"]
    assert cold.warmup == ledgers[-1]["phases"]["warmup"]


def test_starts_share_caches_that_begin_empty(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cold and a warm start, judged by their own targets."""
    seen = []

    def timed(name: str, env: dict[str, str]) -> start_time.Start:
        folder = Path(env["TORCHINDUCTOR_CACHE_DIR"]).parent
        seen.append((name, folder, sorted(path.name for path in folder.iterdir()), env["TRAIN_BATCH_TOKENS"]))
        (folder / name).touch()
        return start_time.Start(name, 100.0, 70.0, common.Finished(0, 130.0, ""))

    monkeypatch.setattr(start_time, "timed_start", timed)
    assert start_time.main(["EVAL_STRIDE=0"]) == 0
    assert [row[0] for row in seen] == ["cold", "warm"] and [row[2] for row in seen] == [[], ["cold"]]
    assert seen[0][1] == seen[1][1] and not seen[0][1].exists() and seen[0][3] == "256"
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert rows == [["cold", "100.0", "150", "met", "30.0", "70.0", "130.0"],
                    ["warm", "100.0", "60", "**missed**", "30.0", "70.0", "130.0"]]  # fmt: skip


def test_a_start_that_fails_says_why(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused settings are known before anything starts; the verdict of a run that dies is its error."""
    assert start_time.main(["NUM_HEADS=3"]) == 2 and "MODEL_DIM=32" in capsys.readouterr().err
    died = start_time.Start("cold", None, None, common.Finished(1, 3.0, "error: no"))
    assert died.cells() == ["cold", "", "150", "error: no", "", "", "3.0"]
