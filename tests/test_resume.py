"""A run that was ended, by whatever, and resumed makes the steps of one that was not: bitwise, on one rank and on two."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_env, write_shard

import train_gpt as t

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
STEPS = 40
LIMIT = 100  # seconds
# SWA of the EMA, loops that begin on the way and late QAT: all that a checkpoint must bring back. A step is logged.
FEATURES = {"SWA_ENABLED": 1, "SWA_EVERY": 3, "SWA_START_FRAC": 0.9, "NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 2,
            "ENABLE_LOOPING_AT": 0.4, "LATE_QAT_THRESHOLD": 0.5, "TRAIN_LOG_EVERY": 1, "CHECKPOINT_EVERY": 5,
            "EVAL_STRIDE": 0, "RUN_ID": "r"}  # fmt: skip
# Ends itself or its launcher by a signal before a step, at a moment that the test chooses.
HELPER = """
import os, runpy, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
number, step, on = (int(os.environ.pop(name)) for name in ("TEST_SIGNAL", "TEST_STEP", "TEST_RANK"))
import train_gpt as t
usual = t.Trainer.step
def hit(self, at, *plan):
    if at == step and int(os.environ.get("RANK", "0")) == on:
        os.kill(os.getpid(), number)
    return usual(self, at, *plan)
t.Trainer.step = hit
t.__file__ = sys.argv[1]
try:
    t.main()
except (t.UserError, t.Interrupted) as problem:
    sys.exit(f"error: {problem}")
"""


def launch(folder: Path, env: dict[str, str], ranks: int, *script: str) -> subprocess.CompletedProcess[str]:
    """The script, or a helper round it, under torchrun where there are ranks."""
    outside = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, *(script or (str(SCRIPT),))]
    return subprocess.run(command, cwd=folder, env={**outside, "OMP_NUM_THREADS": "1", **env}, text=True, timeout=LIMIT,
                          capture_output=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip


def variables(corpus: dict[str, str], **changes: Any) -> dict[str, str]:
    return tiny_env(**{**corpus, **FEATURES, "ITERATIONS": STEPS, **changes})


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step, with all digits; a step that was made twice must have had the same one both times."""
    found: dict[int, float] = {}
    for line in (folder / "logs/r.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "train":
            assert found.setdefault(event["step"], event["train_loss"]) == event["train_loss"]
    return found


def outcome(folder: Path) -> list[str]:
    """Exact scores, the last of each name."""
    lines = re.findall(r"(?m)^(\S+_exact) (val_loss:\S+ val_bpb:\S+)", (folder / "logs/r.txt").read_text())
    return sorted(dict(lines).items())


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]) -> tuple[int, Path]:
    """Ranks, and folder of a run that nothing ended."""
    folder = tmp_path_factory.mktemp("whole")
    result = launch(folder, variables(corpus), request.param)
    assert result.returncode == 0, result.stderr
    return request.param, folder


KILLS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL", "SIGUSR1"]


@pytest.mark.parametrize("name", KILLS)
def test_a_run_that_was_ended_and_resumed_is_the_same(
    whole: tuple[int, Path], tmp_path: Path, corpus: dict[str, str], name: str
) -> None:
    """Ended at a random step; losses, scores and the artifact are those of the run that went through."""
    ranks, uninterrupted = whole
    step = random.randrange(7, STEPS - 1)
    print(f"{name} at step {step}")
    (tmp_path / "helper.py").write_text(HELPER)
    env = {"TEST_SIGNAL": str(int(getattr(signal, name))), "TEST_STEP": str(step), "TEST_RANK": str(ranks - 1)}
    if name == "SIGUSR1" and ranks > 1:
        pytest.skip("as SIGTERM; one rank shows it")
    ended = launch(tmp_path, {**variables(corpus), **env}, ranks, "helper.py", str(SCRIPT))
    assert ended.returncode != 0
    saved = torch.load(tmp_path / "logs/r.weights.pt", weights_only=True)
    if name == "SIGKILL":
        assert saved["steps"] == (step - step % 5 if step % 5 else step) and saved["state"] == "running"
    else:
        assert saved["steps"] == step + 1 and saved["state"] == "stopped", ended.stderr
        assert f"error: {name}: stopped after step {step + 1}; RESUME=1 goes on from" in ended.stderr
    resumed = launch(tmp_path, variables(corpus, RESUME=1), ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path) == losses(uninterrupted) and len(losses(tmp_path)) == STEPS
    assert outcome(tmp_path) == outcome(uninterrupted)
    assert f"resumed: step:{saved['steps']} train_time:" in resumed.stdout
    if name != "SIGKILL":  # its grid and its artifact too
        assert (tmp_path / "logs/r.pgolf").read_bytes() == (uninterrupted / "logs/r.pgolf").read_bytes()


@pytest.mark.parametrize("phase", ["warm_up", "export_model", "evaluate_artifact"])
def test_a_signal_outside_training_leaves_its_reason(
    run: t.Runtime, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """At once, and nothing that catches Exception swallows it; what goes on from here is said where there is a file."""
    monkeypatch.setattr(t, phase, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(t.Interrupted, match="SIGTERM: stopped") as caught:
        validation = t.load_validation(run)
        t.evaluate_artifact(run, validation, t.produce_artifact(run, validation))
    assert ("RESUME=1 goes on from logs/tiny.weights.pt" in str(caught.value)) == (phase != "warm_up")
    assert not isinstance(caught.value, Exception) and t.describe(caught.value).startswith("error: SIGTERM")


def test_after_training_a_run_goes_on_with_its_export(tmp_path: Path, corpus: dict[str, str]) -> None:
    """Ended in GPTQ: RESUME=1 makes no step again, and its ledger holds the training of the first part."""
    helper = HELPER.replace("usual = t.Trainer.step", "usual, t.export_model = t.Trainer.step, lambda *_: os.kill(os.getpid(), 9)")
    (tmp_path / "helper.py").write_text(helper)
    env = variables(corpus, ITERATIONS=6)
    assert launch(tmp_path, {**env, "TEST_SIGNAL": "0", "TEST_STEP": "99", "TEST_RANK": "0"}, 1, "helper.py", str(SCRIPT)).returncode < 0
    resumed = launch(tmp_path, {**env, "RESUME": "1"}, 1)
    assert resumed.returncode == 0 and "step:1/6" not in resumed.stdout, resumed.stderr
    assert re.search(r"(?m)^budget train: \S+ \(steps:\d+\.\d+s", resumed.stdout)


def test_a_signal_that_was_ignored_stays_ignored(in_tmp: Path, corpus: dict[str, str]) -> None:
    """nohup and a shell's background jobs begin so."""
    usual = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with t.Runtime.start(tiny_config(**corpus), {}) as run:
            signal.raise_signal(signal.SIGUSR1)
            assert not run.signals.noted
    finally:
        signal.signal(signal.SIGUSR1, usual)


def test_data_that_cannot_be_read_saves_the_state_before_it(tmp_path: Path, corpus: dict[str, str]) -> None:
    """A token beyond the vocabulary, met by one of two ranks on the way; mended, the run goes on to the same end."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in Path(corpus["DATA_PATH"]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = folder / "fineweb_train_000001.bin"
    good = shard.read_bytes()
    tokens = np.frombuffer(good, "<u2", offset=1024).copy()
    tokens[len(tokens) // 2 :] = 60_000
    write_shard(shard, tokens)
    env = variables({**corpus, "DATA_PATH": str(folder)}, LOADER="sequential", ITERATIONS=400, TRAIN_BATCH_TOKENS=2048,
                    CHECKPOINT_EVERY=0, WARMUP_STEPS=0, GPTQ_ENABLED=0)  # fmt: skip
    ended = launch(tmp_path, env, 2)
    assert ended.returncode != 0
    (step,) = re.findall(r"error: \S*fineweb_train_000001.bin: token 60000, set VOCAB_SIZE=512 higher: stopped after step (\d+);",
                         ended.stderr)  # fmt: skip
    assert torch.load(tmp_path / "logs/r.weights.pt", weights_only=True)["steps"] == int(step) > 10
    shard.write_bytes(good)
    resumed = launch(tmp_path, {**env, "RESUME": "1", "ITERATIONS": "400"}, 2)
    assert resumed.returncode == 0, resumed.stderr
    assert set(losses(tmp_path)) == set(range(1, 401))


# What is refused, and what is counted


def stopped(run: t.Runtime) -> None:
    """Train five steps and leave a checkpoint."""
    with pytest.raises(t.Interrupted):
        validation = t.load_validation(run)
        trainer = t.Trainer(run, t.build_model(run, run.cfg, 1))
        usual = trainer.step
        trainer.step = lambda number, *plan: (number == 5 and signal.raise_signal(signal.SIGTERM), usual(number, *plan))[1]
        try:
            t.train(run, trainer, validation)
        except t.UserError as problem:
            raise t.Interrupted(str(problem)) from None


OTHERS = {
    "another variable": ({"MATRIX_LR": 0.02}, "MATRIX_LR was 0.025, is 0.02"),
    "another seed": ({"SEED": 1}, "SEED was 1337, is 1"),
    "another length": ({"ITERATIONS": 20}, "ITERATIONS was 12, is 20"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_goes_on_only_as_it_began(in_tmp: Path, corpus: dict[str, str], name: str) -> None:
    with t.Runtime.start(tiny_config(**corpus), {}) as run:
        stopped(run)
    changes, message = OTHERS[name]
    with (
        t.Runtime.start(tiny_config(**corpus, **changes, RESUME=1), {}) as run,
        pytest.raises(t.UserError, match=f"RESUME=1: logs/tiny.weights.pt is from another run: .*{message}"),
    ):
        t.produce_artifact(run, t.load_validation(run))


@pytest.mark.parametrize("fact", ["script", "world_size", "train_shards", "val_sha256"])
def test_script_ranks_and_data_must_be_the_same(
    in_tmp: Path, corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch, fact: str
) -> None:
    with t.Runtime.start(tiny_config(**corpus), {}) as run:
        stopped(run)
    usual = t.run_identity
    monkeypatch.setattr(t, "run_identity", lambda *a: {**usual(*a), fact: "other"})
    with (
        t.Runtime.start(tiny_config(**corpus, RESUME=1), {}) as run,
        pytest.raises(t.UserError, match=f"another run: .*{fact.upper()} was .*, is other"),
    ):
        t.produce_artifact(run, t.load_validation(run))


def test_the_time_of_lost_steps_is_counted(in_tmp: Path, corpus: dict[str, str]) -> None:
    """From the checkpoint to the start of the last step that the killed run began, and one step more."""
    with t.Runtime.start(tiny_config(**corpus), {}) as run:
        stopped(run)
    path = Path("logs/tiny.weights.pt")
    saved = torch.load(path, weights_only=True)
    now = time.time()
    saved["state"], saved["standing"] = "running", {**saved["standing"], "saved_at": now - 100, "seconds": 50.0}
    torch.save(saved, path)
    lock = Path("logs/.tiny.weights.pt.lock")
    lock.touch()
    os.utime(lock, (now, now - 70))  # thirty seconds after the checkpoint
    with t.Runtime.start(tiny_config(**corpus, RESUME=1, MAX_WALLCLOCK_SECONDS=0), {}) as run:
        t.produce_artifact(run, t.load_validation(run))
        steps = sum(seconds for budget, phase, seconds in run.ledger if (budget, phase) == ("train", "steps"))
    lost = 30 + 50 / saved["steps"]
    assert 50 + lost <= steps < 50 + lost + 20
    log = Path("logs/tiny.txt").read_text()
    assert f"resumed: step:{saved['steps']} train_time:{1000 * (50 + lost):.0f}ms of which lost:{1000 * lost:.0f}ms" in log
    assert log.count("Hyperparameters:") == 2  # the log goes on


def test_a_killed_run_of_unknown_end_is_said(in_tmp: Path, corpus: dict[str, str]) -> None:
    with t.Runtime.start(tiny_config(**corpus), {}) as run:
        stopped(run)
    saved = torch.load("logs/tiny.weights.pt", weights_only=True)
    torch.save({**saved, "state": "running"}, "logs/tiny.weights.pt")
    with t.Runtime.start(tiny_config(**corpus, RESUME=1), {}) as run:
        t.produce_artifact(run, t.load_validation(run))
    assert "WARNING: the time that the killed run spent after its checkpoint is not known" in Path("logs/tiny.txt").read_text()


def test_every_step_beats_the_lock(run: t.Runtime) -> None:
    """The time of change of the weights' lock is that of the last step's start."""
    lock = Path("logs/.tiny.weights.pt.lock")
    os.utime(lock, (0, 0))
    run = replace(run, cfg=replace(run.cfg, iterations=2, warmup_steps=0))
    t.train(run, t.Trainer(run, t.build_model(run, run.cfg, 1)), t.load_validation(run))
    assert time.time() - lock.stat().st_mtime < 60
