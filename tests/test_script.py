"""End to end in subprocesses: what a run writes, repeats, survives and refuses."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_env, tiny_model

import train_gpt as t

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
RECIPES = sorted((ROOT / "records" / "recipes").glob("*.env"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
FINAL = r"^final_int6_sliding_window_exact .*$"


def start(folder: Path, env: dict[str, str], *launcher: str) -> subprocess.CompletedProcess[str]:
    """Run the script in `folder` with `env` and nothing else from this process but the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    outside = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
    env = {**outside, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, *launcher, str(SCRIPT)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=110, check=False)


def one_line(pattern: str, text: str) -> str:
    """The only line that matches."""
    lines = re.findall(f"(?m){pattern}", text)
    assert len(lines) == 1, f"{pattern}: {lines}"
    return lines[0]


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def bpb(line: str) -> float:
    return float(re.search(r"val_bpb:(\S+)", line)[1])


# One complete run, shared


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]) -> Path:
    """Folder of a finished run, RUN_ID=full, whose SWA could never start; stdout and stderr beside the logs."""
    folder = tmp_path_factory.mktemp("full")
    result = start(folder, tiny_env(**corpus, RUN_ID="full", SWA_ENABLED=1, SWA_EVERY=1000, VAL_LOSS_EVERY=5))
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    return folder


def test_a_run_writes_its_files(full: Path) -> None:
    """Text, source, JSON lines, weights and artifact under logs/, the seed logs beside; and nothing else."""
    names = {str(path.relative_to(full)) for path in full.rglob("*") if path.is_file()}
    logs = {f"logs/full.{kind}" for kind in ("txt", "jsonl", "py", "pgolf", "weights.pt")}
    assert names == logs | {"train_seed1337.log", "train.log", "stdout"}
    text = (full / "logs/full.txt").read_text()
    assert (full / "train_seed1337.log").read_text() == (full / "train.log").read_text() == text
    assert set((full / "stdout").read_text().splitlines()) <= set(text.splitlines())


CANONICAL = [
    r"^source: sha256:\w+", r"^Hyperparameters:", r"^  max_wallclock_seconds: 0\.0 \(environment\)",
    r"^  matrix_lr: 0\.025 \(default\)", r"^val_bpb:enabled", r"^val_loader:shards", r"^val_tokens: \d+",
    r"^attn_backend:\w+", r"^model_params:\d+", r"^train_loader:", r"^world_size:1 grad_accum_steps:1",
    r"^warmup:train", r"^warmup:late_qat", r"^step:1/12 train_loss:[\d.]+ train_time:\d+ms step_avg:[\d.]+ms",
    r"^step:5/12 val_loss:[\d.]+ val_bpb:[\d.]+", r"^late_qat:enabled step:\d+ scale:0\.\d+", r"^weights: .*\(raw, average\)",
    r"^step:12/12 val_loss:[\d.]+ val_bpb:[\d.]+", r"^ema:applying EMA weights", r"^GPTQ:collected 19 Hessians",
    r"^Serialized model int6\S*: \d+ bytes", r"^Code size: \d+ bytes", r"^Total submission size int6\S*: \d+ bytes",
    r"^DIAGNOSTIC post_ema val_loss:\S+ val_bpb:\S+", r"^DIAGNOSTIC post_ema rounded val_loss:\S+ val_bpb:\S+",
    r"^final_int6_roundtrip val_loss:\S+ val_bpb:\S+ eval_time:\d+ms",
    r"^final_int6_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
    r"^quantization_degradation bpb:[+-]\d\.\d{8}$",
    r"^final_int6_document_windows val_loss:\S+ val_bpb:\S+ stride:16 eval_time:\d+ms",
    r"^final_int6_document_windows_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} stride:16$",
    r"^final_int6_sliding_window val_loss:\S+ val_bpb:\S+ stride:16 eval_time:\d+ms",
    r"^final_int6_sliding_window_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}", r"^never activated: ",
    r"^budget train: ", r"^budget eval: ", r"^budget untimed: ",
]  # fmt: skip


def test_canonical_lines_come_once_and_in_order(full: Path) -> None:
    """Every line that tools grep for stands exactly once in the log, after the one before it."""
    text = (full / "logs/full.txt").read_text()
    places = [text.index(one_line(pattern + ".*$", text)) for pattern in CANONICAL]
    assert places == sorted(places)


@pytest.mark.parametrize(("lost", "warns"), [(0.0123456789, True), (0.002, False), (-0.001, False)])
def test_degradation_is_exact_and_warns_above_a_hundredth(run: t.Runtime, lost: float, warns: bool) -> None:
    """Eight decimals with a sign."""
    nats = math.log(2) * 1000
    t.log_degradation(run, t.Score(nats, 10, 1000), t.Score(nats * (1 + lost), 10, 1000))
    line = one_line(r"^quantization_degradation .*$", Path(f"logs/{run.cfg.run_id}.txt").read_text())
    assert f"bpb:{lost:+.8f}" in line and ("WARNING" in line) == warns


def test_the_last_score_is_the_sliding_window(full: Path) -> None:
    """A reader that takes the last line with val_bpb gets the score; the JSON stream holds the same one."""
    text = (full / "logs/full.txt").read_text()
    last = re.findall(r"(?m)^.*val_bpb:\d.*$", text)[-1]
    assert last.startswith("final_int6_sliding_window")
    scores = [e for e in events(full / "logs/full.jsonl") if e["event"] == "score"]
    assert scores[-1]["name"] == "final_int6_sliding_window"
    assert scores[-1]["val_bpb"] == pytest.approx(bpb(one_line(FINAL, text)), abs=1e-8)
    assert bpb(one_line(FINAL, text)) < bpb(one_line(r"^final_int6_roundtrip_exact .*$", text)) < 4.5


def test_logged_sizes_and_digests_are_those_of_the_files(full: Path) -> None:
    text, artifact, source = (full / "logs/full.txt").read_text(), full / "logs/full.pgolf", full / "logs/full.py"
    size, code = artifact.stat().st_size, SCRIPT.stat().st_size
    assert f": {size} bytes" in one_line(r"^Serialized model.*$", text)
    assert f": {code} bytes" in one_line(r"^Code size.*$", text)
    assert f": {size + code} bytes" in one_line(r"^Total submission size.*$", text)
    assert source.read_bytes() == SCRIPT.read_bytes()
    assert hashlib.sha256(source.read_bytes()).hexdigest() in one_line(r"^source: .*$", text)


def test_the_ledger_books_every_phase_once(full: Path) -> None:
    """Training holds steps, Hessians and GPTQ; evaluation holds reading the artifact and both scores."""
    ledger = {e["budget"]: e for e in events(full / "logs/full.jsonl") if e["event"] == "ledger"}
    assert {"steps", "hessians", "gptq"} <= set(ledger["train"]["phases"])
    assert {"read artifact", "roundtrip", "document windows", "sliding window"} == set(ledger["eval"]["phases"])
    assert {"warmup", "validation@5", "validation@12"} <= set(ledger["untimed"]["phases"])
    assert not any(e["over"] for e in ledger.values())
    assert sum(ledger["eval"]["phases"].values()) == pytest.approx(ledger["eval"]["seconds"])


def test_repeated_phases_add_up_in_the_ledger(run: t.Runtime) -> None:
    """Fitting the size quantizes up to three times: the seconds of all passes are in the JSON line and in the sum."""
    for phase, seconds in [("steps", 5.0), ("gptq", 2.0), ("gptq", 3.0)]:
        run.ledger.append(("train", phase, seconds))
    t.log_ledger(run)
    (ledger,) = [e for e in events(Path(f"logs/{run.cfg.run_id}.jsonl")) if e["event"] == "ledger"]
    assert ledger["seconds"] == 10.0
    assert sum(ledger["phases"].values()) == 10.0


def test_the_last_step_is_validated_once(run: t.Runtime) -> None:
    """Also where VAL_LOSS_EVERY divides the number of steps, as the default 4,000 does 20,000."""
    run = replace(run, cfg=replace(run.cfg, iterations=2, val_loss_every=2, warmup_steps=0))
    validation = t.load_validation(run)
    t.train(run, t.Trainer(run, t.build_model(run, run.cfg, 1)), validation)
    one_line(r"^step:2/2 val_loss:.*$", Path(f"logs/{run.cfg.run_id}.txt").read_text())


@pytest.mark.parametrize("late", [0, 2])
def test_compilation_inside_the_clock_is_reported(run: t.Runtime, monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    """A graph that is first made in step `late` + 1 of the run is named with its step; without one the count is 0."""
    run = replace(run, cfg=replace(run.cfg, iterations=4, warmup_steps=0))
    trainer, validation = t.Trainer(run, t.build_model(run, run.cfg, 1)), t.load_validation(run)
    double, step = torch.compile(lambda x: x * 2, backend="eager"), trainer.step

    def compiling_step(number: int, *plan: Any) -> torch.Tensor:
        if late and number == late:
            double(torch.ones(()))
        return step(number, *plan)

    monkeypatch.setattr(trainer, "step", compiling_step)
    t.train(run, trainer, validation)
    log = Path(f"logs/{run.cfg.run_id}.txt").read_text()
    assert (f"WARNING: step {late + 1} compiled 1 graphs inside the clock" in log) == bool(late)
    one_line(rf"^graphs compiled inside the clock: {int(bool(late))}$", log)


def test_a_feature_that_never_acted_is_named(full: Path) -> None:
    """SWA was configured and never took a snapshot; what did act is not accused."""
    line = one_line(r"^never activated: .*$", (full / "logs/full.txt").read_text())
    assert "swa" in line and "SWA_EVERY=1000" in line
    assert not re.search(r"\b(ema|late_qat|warmdown|lawa)\b", line)


def test_the_weights_file_loads_without_code(full: Path) -> None:
    """fp32, raw and averaged, every parameter of the model."""
    saved = torch.load(full / "logs/full.weights.pt", weights_only=True)
    names = {name.split(".", 1)[1] for name in saved["raw"]}
    assert names >= {"qkv", "up", "tok_emb", "attn_scale"} and saved["steps"] == 12
    assert saved["raw"].keys() == saved["average"].keys()
    assert all(tensor.dtype == torch.float32 for tensor in saved["average"].values())
    assert not torch.equal(saved["raw"]["banks.up"], saved["average"]["banks.up"])


# Running again from what is on disk


def evaluation_variables(corpus: dict[str, str], artifact: Path) -> dict[str, str]:
    """What an evaluator sets: nothing about the model."""
    return {"EVAL_ONLY": "1", "ARTIFACT_PATH": str(artifact), "EVAL_STRIDE": "16", "DEVICE": "cpu", "COMPILE": "0",
            "RUN_ID": "again", "VAL_BATCH_SIZE": "512", **corpus}  # fmt: skip


def test_eval_only_reproduces_the_score_to_the_last_digit(full: Path, tmp_path: Path, corpus: dict[str, str]) -> None:
    """In a fresh process and folder that holds the artifact, the tokenizer and the validation shard alone."""
    for name in ("fineweb_val_000000.bin", "tokenizer.model"):
        shutil.copy(Path(corpus["DATA_PATH"], name), tmp_path / name)
    shutil.copy(full / "logs/full.pgolf", tmp_path / "model.pgolf")
    paths = {"DATA_PATH": str(tmp_path), "TOKENIZER_PATH": str(tmp_path / "tokenizer.model")}
    result = start(tmp_path / "work", evaluation_variables(paths, tmp_path / "model.pgolf"))
    assert result.returncode == 0, result.stderr
    text = (full / "logs/full.txt").read_text()
    for pattern in (FINAL, r"^final_int6_roundtrip_exact .*$"):
        assert one_line(pattern, result.stdout) == one_line(pattern, text)
    assert not list((tmp_path / "work").glob("train*.log"))  # an evaluation replaces no training log


@pytest.mark.parametrize("variable", ["NUM_LAYERS=3", "MLP_ACTIVATION=relu2", "VALUE_RESIDUAL=1"])
def test_eval_only_refuses_another_architecture(
    full: Path, corpus: dict[str, str], variable: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that was set and contradicts the artifact is an error that names it; one that agrees is fine."""
    name, value = variable.split("=")
    env = evaluation_variables(corpus, full / "logs/full.pgolf") | {"VE_LAYERS": "2", "XSA_LAST_N": "3", "NUM_LOOPS": "0"}
    cfg = t.Config.from_env({**env, "VE_LAYERS": "2,3", "XSA_LAST_N": "4", "NUM_LAYERS": "4"})
    assert t.load_architecture(cfg).model_dim == 32
    if name != "NUM_LAYERS":
        env |= {"VE_LAYERS": "2,3", "XSA_LAST_N": "4", "NUM_LAYERS": "4"}
    with pytest.raises(t.UserError, match=name):
        t.load_architecture(t.Config.from_env({**env, name: value}))


@pytest.mark.parametrize("name", ["num_layers", "later_feature"])
def test_a_saved_model_of_another_version_is_refused(
    full: Path, corpus: dict[str, str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A variable that one of the two does not know must not become a default in silence."""
    known = {**tiny_config().architecture(), "later_feature": 1}  # one is new to the script, the other it has lost
    other = known if name == "later_feature" else {n: v for n, v in known.items() if n not in (name, "later_feature")}
    monkeypatch.setattr(t.Config, "architecture", lambda _: other)
    cfg = t.Config.from_env(evaluation_variables(corpus, full / "logs/full.pgolf"))
    with pytest.raises(t.UserError, match=rf"full.pgolf was made by another version .*lacks {name.upper()}\); take logs/"):
        t.load_architecture(cfg)
    weights = full / "logs/full.weights.pt"
    with (
        t.Runtime.start(tiny_config(**corpus, EXPORT_ONLY=1, WEIGHTS_PATH=weights), {}) as run,
        pytest.raises(t.UserError, match=rf"WEIGHTS_PATH=.*another version .*lacks {name.upper()}"),
    ):
        t.read_weights(run, tiny_model(), t.load_validation(run))


def test_export_only_repeats_the_export(full: Path, tmp_path: Path, corpus: dict[str, str]) -> None:
    """From the saved weights: the same artifact, byte for byte, and so the same score; the weights stay as they are."""
    weights = tmp_path / "copy.weights.pt"
    shutil.copy(full / "logs/full.weights.pt", weights)
    before = torch.load(weights, weights_only=True)
    env = tiny_env(**corpus, RUN_ID="export", EXPORT_ONLY=1, WEIGHTS_PATH=weights)
    result = start(tmp_path / "work", env)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "work/logs/export.pgolf").read_bytes() == (full / "logs/full.pgolf").read_bytes()
    assert one_line(FINAL, result.stdout) == one_line(FINAL, (full / "logs/full.txt").read_text())
    after = torch.load(weights, weights_only=True)
    for kind in ("average", "raw"):
        assert all(torch.equal(after[kind][n], before[kind][n]) for n in before[kind]), f"{kind} weights overwritten"


def test_a_run_with_costs_and_a_trellis_scores_what_it_wrote(tmp_path: Path, corpus: dict[str, str]) -> None:
    """From the reserve, measured before training, to the artifact that is read back."""
    settings = {"CLIP_POLICY": "cost", "TRELLIS": 1, "MATRIX_BITS": 8, "LATE_QAT_THRESHOLD": 0}
    result = start(tmp_path, tiny_env(**corpus, RUN_ID="fair", MAX_WALLCLOCK_SECONDS=600, **settings))
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "logs/fair.txt").read_text()
    assert abs(float(re.search(r"quantization_degradation bpb:(\S+)", text)[1])) < 0.02


def test_two_ranks_end_with_the_same_score(full: Path, tmp_path: Path, corpus: dict[str, str]) -> None:
    """torchrun with two processes: the score within 0.001, one writer, every line once."""
    env = tiny_env(**corpus, RUN_ID="full", SWA_ENABLED=1, SWA_EVERY=1000, VAL_LOSS_EVERY=5)
    result = start(tmp_path, env, *TORCHRUN)
    assert result.returncode == 0, result.stderr
    text, alone = (tmp_path / "logs/full.txt").read_text(), (full / "logs/full.txt").read_text()
    assert "world_size:2" in text
    for pattern in CANONICAL:
        one_line(pattern.replace("world_size:1", "world_size:2") + ".*$", text)
        assert len(re.findall(f"(?m){pattern.replace('world_size:1', 'world_size:2')}", result.stdout)) <= 1
    assert bpb(one_line(FINAL, text)) == pytest.approx(bpb(one_line(FINAL, alone)), abs=1e-3)
    for step in (1, 5, 10):
        ours, theirs = (one_line(rf"^step:{step}/12 train_loss:(\S+)", log) for log in (text, alone))
        assert float(ours) == pytest.approx(float(theirs), abs=2e-4)


# Ends that are not the usual one


def test_weights_survive_an_export_that_does_not_fit(tmp_path: Path, corpus: dict[str, str]) -> None:
    """No fallback allowed and no room: one line that says by how much, the weights on disk, no artifact."""
    limit = SCRIPT.stat().st_size + 20_000
    result = start(tmp_path, tiny_env(**corpus, RUN_ID="big", TARGET_BYTES=limit, MATRIX_CLIP_SIGMAS=8,
                                      SELECTIVE_PRUNE_ENABLED=0, INT5_FALLBACK=0))  # fmt: skip
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and f"TARGET_BYTES={limit}" in lines[0]
    size, over = (int(n) for n in re.search(r"artifact (\d+) .* (\d+) bytes over", lines[0]).groups())
    assert over == size - 20_000 > 0
    assert not (tmp_path / "logs/big.pgolf").exists()
    saved = torch.load(tmp_path / "logs/big.weights.pt", weights_only=True)
    assert saved["steps"] == 12 and {"raw", "average"} <= set(saved)
    assert lines[0].removeprefix("error: ") in (tmp_path / "logs/big.txt").read_text()


def test_the_wallclock_ends_the_run_within_its_budget(tmp_path: Path, corpus: dict[str, str]) -> None:
    """Steps, calibration and GPTQ together stay below MAX_WALLCLOCK_SECONDS; the schedule reached its end; the logs
    of a seed that is not 1337 do not touch train.log; folders of the outputs are made."""
    paths = {"ARTIFACT_PATH": "made/clock.pgolf", "WEIGHTS_PATH": "made/too/clock.pt"}
    limits = {"MAX_WALLCLOCK_SECONDS": 4, "ITERATIONS": 100_000}
    result = start(tmp_path, tiny_env(**corpus, RUN_ID="clock", SEED=7, **limits, **paths))
    assert result.returncode == 0, result.stderr
    line = one_line(r"^stopping_early: wallclock_cap train_time:\d+ms step:\d+/100000$", result.stdout)
    milliseconds, steps = map(int, re.search(r"train_time:(\d+)ms step:(\d+)/", line).groups())
    assert 5 < steps < 100_000 and milliseconds < 4000
    ledger = {e["budget"]: e for e in events(tmp_path / "logs/clock.jsonl") if e["event"] == "ledger"}
    assert ledger["train"]["seconds"] <= 4 and not ledger["train"]["over"]
    assert one_line(r"^never activated: .*$", result.stdout) == "never activated: none"
    assert (tmp_path / "train_seed7.log").exists() and not (tmp_path / "train.log").exists()
    assert all((tmp_path / path).exists() for path in paths.values())


def truncated_shards(folder: Path, corpus: dict[str, str]) -> dict[str, str]:
    """The corpus with a training shard cut short."""
    shutil.copytree(corpus["DATA_PATH"], folder / "cut")
    path = folder / "cut/fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-100])
    return {"DATA_PATH": str(folder / "cut")}


REFUSALS = {
    "no data folder": ({"DATA_PATH": "/nowhere/at/all"}, "DATA_PATH"),
    "no tokenizer": ({"TOKENIZER_PATH": "/nowhere/tokenizer.model"}, "TOKENIZER_PATH"),
    "misspelled variable": ({"MATRX_LR": "0.02"}, "MATRIX_LR"),
    "truncated shard": (truncated_shards, "fineweb_train_000001.bin"),
    "artifact that is not there": ({"EVAL_ONLY": "1", "ARTIFACT_PATH": "none.pgolf"}, "none.pgolf"),
    "artifact that is none": ({"EVAL_ONLY": "1", "ARTIFACT_PATH": str(SCRIPT)}, "train_gpt.py"),
    "weights that are not there": ({"EXPORT_ONLY": "1", "WEIGHTS_PATH": "none.pt"}, "none.pt"),
}


@pytest.fixture(scope="module")
def refusals(
    tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]
) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    """Folder and outcome of each refused run, two at a time."""
    folders = {name: tmp_path_factory.mktemp("refused") for name in REFUSALS}

    def attempt(name: str) -> subprocess.CompletedProcess[str]:
        changes = REFUSALS[name][0]
        changes = changes if isinstance(changes, dict) else changes(folders[name], corpus)
        return start(folders[name] / "work", tiny_env(**{**corpus, "ITERATIONS": 2, "GPTQ_ENABLED": 0, **changes}))

    with ThreadPoolExecutor(2) as pool:
        return {name: (folders[name], run) for name, run in zip(REFUSALS, pool.map(attempt, REFUSALS), strict=True)}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_ends_in_one_line(
    refusals: dict[str, tuple[Path, subprocess.CompletedProcess[str]]], name: str
) -> None:
    """Exit status 1, one line on stderr that names the culprit, no traceback, no step taken, no artifact."""
    folder, result = refusals[name]
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1
    assert len(lines) == 1 and lines[0].startswith("error: ") and REFUSALS[name][1] in lines[0], result.stderr[-800:]
    assert "step:1/" not in result.stdout
    assert not list(folder.rglob("*.pgolf"))


def test_a_refusal_on_two_ranks_ends_both(tmp_path: Path, corpus: dict[str, str]) -> None:
    """Before the ranks have found each other too, the line stands once in what torchrun prints."""
    result = start(tmp_path, tiny_env(**corpus, MATRX_LR=1), *TORCHRUN)
    assert result.returncode != 0
    assert one_line(r"^error: .*$", result.stderr).startswith("error: no such variable: MATRX_LR=1 (did you mean")


# Recipes


@pytest.mark.parametrize("path", RECIPES or [None], ids=lambda path: path.stem if path else "none yet")
def test_recipes_are_configurations(path: Path | None) -> None:
    """Each file parses without an environment beside it, and what it sets is marked as the recipe's."""
    if path is None:
        pytest.skip("records/recipes/ has no *.env yet")
    cfg = t.Config.from_env({"RECIPE": str(path)})
    assert "recipe" in {source.split()[0] for source in cfg.sources.values()}


def test_the_naive_baseline_has_the_official_number_of_parameters() -> None:
    path = ROOT / "records/recipes/naive_baseline.env"
    if not path.exists():
        pytest.skip("records/recipes/naive_baseline.env is not there yet")
    cfg = t.Config.from_env({"RECIPE": str(path)})
    banks = sum(cfg.num_layers * spec.rows * spec.cols for spec in t.bank_specs(cfg))
    assert banks + sum(math.prod(spec.shape) for spec in t.param_table(cfg)) == 17_059_912
