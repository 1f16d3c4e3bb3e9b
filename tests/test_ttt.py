"""Score-first test-time training: nothing is trained on before it is scored, and the model comes back as it was."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_env, tiny_model

import train_gpt as t

ENVIRONMENT = dict(os.environ)
TTT = {
    "TTT_ENABLED": 1,
    "TTT_CHUNK_TOKENS": 256,
    "TTT_LR": 0.02,
    "TTT_EPOCHS": 2,
    "TTT_BATCH_SEQS": 4,
    "EVAL_STRIDE": 16,
}


@pytest.fixture
def trainer(run: t.Runtime) -> Callable[..., t.TestTimeTrainer]:
    """A trainer of a randomized tiny model on the small corpus, with other settings by keyword."""

    def make(**settings: Any) -> t.TestTimeTrainer:
        cfg = tiny_config(**{**TTT, **settings})
        model = tiny_model(**{**TTT, **settings})
        data = {"data_path": run.cfg.data_path, "tokenizer_path": run.cfg.tokenizer_path}
        here = t.replace(run, cfg=t.replace(cfg, **data))
        return t.TestTimeTrainer(here, model, t.load_validation(here))

    return make


def trained_score(trainer: t.TestTimeTrainer) -> t.Score:
    return t.evaluate_online(trainer.run, trainer.model, trainer.validation, trainer, None)[0]


def sliding(trainer: t.TestTimeTrainer) -> t.Score:
    return t.evaluate(trainer.run, trainer.model, trainer.validation, trainer.cfg.eval_stride)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_a_rate_it_is_the_sliding_evaluation(trainer: Callable[..., t.TestTimeTrainer], optimizer: str) -> None:
    """The same windows, targets and bytes, and the same nats to the last digit."""
    tried = trainer(TTT_LR=0, TTT_OPTIMIZER=optimizer)
    score, plain = trained_score(tried), sliding(tried)
    assert score.nats == pytest.approx(plain.nats, rel=1e-12) and score[1:3] == plain[1:3]


@pytest.mark.parametrize("chunk", [256, 100, 1000])
def test_nothing_is_trained_on_before_it_is_scored(
    trainer: Callable[..., t.TestTimeTrainer], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """A recorder of all targets scored and trained on: each is scored once, and always first; the last chunk stays out."""
    tried, scored, trained = trainer(TTT_CHUNK_TOKENS=chunk), set(), []
    score_windows, step = t.score_windows, tried.step

    def recording_score(*args: Any) -> torch.Tensor:
        for _, first, end in args[3]:
            assert not scored & set(range(first, end))
            scored.update(range(first, end))
        return score_windows(*args)

    def recording_step(starts: np.ndarray) -> None:
        for start in starts:
            targets = set(range(start, start + tried.cfg.eval_len))
            assert targets <= scored
            trained.extend(targets)
        step(starts)

    monkeypatch.setattr(t, "score_windows", recording_score)
    monkeypatch.setattr(tried, "step", recording_step)
    trained_score(tried)
    assert scored == set(range(tried.validation.targets))
    counts = np.bincount(trained)
    assert set(counts) == {2}, "every scored target of every chunk but the last, TTT_EPOCHS times"
    assert tried.validation.targets - chunk - 32 - 16 <= len(counts) < tried.validation.targets


def test_it_learns_and_leaves_the_model_as_it_was(trainer: Callable[..., t.TestTimeTrainer]) -> None:
    """The score improves on a model that knows nothing, and every parameter is restored bitwise."""
    tried = trainer()
    before = {name: value.clone() for name, value in tried.model.state_dict().items()}
    plain, score = sliding(tried), trained_score(tried)
    assert score.bpb < plain.bpb - 0.01
    assert all(torch.equal(before[name], value) for name, value in tried.model.state_dict().items())


def test_settings_act(trainer: Callable[..., t.TestTimeTrainer]) -> None:
    """Each changes the score."""
    default = trained_score(trainer()).nats
    changes = [{"TTT_OPTIMIZER": "adamw"}, {"TTT_EPOCHS": 1}, {"TTT_MOMENTUM": 0.5}, {"TTT_BATCH_SEQS": 2},
               {"TTT_FREEZE_BLOCKS": 2}, {"TTT_GRAD_CLIP": 0.1}, {"TTT_CHUNK_TOKENS": 512}]  # fmt: skip
    assert len({default, *(trained_score(trainer(**change)).nats for change in changes)}) == len(changes) + 1


def test_a_small_gpu_takes_a_step_in_parts(
    trainer: Callable[..., t.TestTimeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three windows at a time of the four of a step, and the same score."""
    whole, tried, rows = trained_score(trainer()), trainer(), []
    tried.model.micro_batch = 3 * tried.cfg.eval_len
    nll = tried.model.fast_nll
    monkeypatch.setattr(tried.model, "fast_nll", lambda ids, *rest: rows.append(len(ids)) or nll(ids, *rest))
    assert trained_score(tried).nats == pytest.approx(whole.nats, rel=1e-6)
    assert max(rows) == 3 and 1 in rows


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_blocks_stay(trainer: Callable[..., t.TestTimeTrainer], optimizer: str) -> None:
    """Matrices and vectors of the first blocks keep their bits; those behind them move."""
    tried = trainer(TTT_FREEZE_BLOCKS=2, TTT_OPTIMIZER=optimizer)
    before = {name: value.clone() for name, value in tried.model.state_dict().items()}
    tried.learn(300, 0.0)
    for name, value in tried.model.state_dict().items():
        if id(dict(tried.model.named_parameters()).get(name)) in map(id, tried.layered):
            assert torch.equal(value[:2], before[name][:2]) and not torch.equal(value[2:], before[name][2:]), name


def test_a_run_reports_it_under_its_own_name(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the sliding window, with its seconds in the ledger; without TTT_ENABLED there is no such line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    logs = {}
    for name, on in (("on", 1), ("off", 0)):
        env = {k: str(v) for k, v in {**tiny_env(**corpus), **TTT, "TTT_ENABLED": on, "RUN_ID": name}.items()}
        monkeypatch.setattr(t.os, "environ", env)
        t.main()
        logs[name] = (tmp_path / f"logs/{name}.txt").read_text()
    assert "legal_ttt" not in logs["off"]
    assert re.search(
        r"^legal_ttt_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} stride:16 chunk:256", logs["on"], re.MULTILINE
    )
    assert logs["on"].index("final_int6_sliding_window_exact") < logs["on"].index("legal_ttt val_loss")
    assert re.search(r"^budget eval: .*ttt:\d", logs["on"], re.MULTILINE)


def test_two_ranks_score_as_one(corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same artifact under torchrun with two processes, to 1e-5 bpb; TTT_BATCH_SEQS must divide over them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    env = tiny_env(**corpus, **TTT, RUN_ID="one")
    monkeypatch.setattr(t.os, "environ", env)
    t.main()
    artifact = str(tmp_path / "logs/one.pgolf")
    again = {**ENVIRONMENT, **env, "EVAL_ONLY": "1", "ARTIFACT_PATH": artifact, "RUN_ID": "two", "OMP_NUM_THREADS": "1",
             "OVERWRITE": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", t.__file__]
    done = subprocess.run(torchrun, env=again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    exact = [float(re.search(r"^legal_ttt_exact .*val_bpb:(\S+)", (tmp_path / f"logs/{name}.txt").read_text(), re.MULTILINE)[1])
             for name in ("one", "two.eval")]  # fmt: skip
    assert exact[0] == pytest.approx(exact[1], abs=1e-5)
    odd = subprocess.run(torchrun, env={**again, "TTT_BATCH_SEQS": "3"}, capture_output=True, text=True, check=False)
    assert odd.returncode != 0 and "TTT_BATCH_SEQS=3 is no multiple of the 2 ranks" in odd.stderr


@pytest.mark.parametrize(("settings", "words"), [
    ({"EVAL_STRIDE": 0}, "EVAL_STRIDE"), ({"TTT_CHUNK_TOKENS": 32}, "TTT_CHUNK_TOKENS=32"),
    ({"TTT_FREEZE_BLOCKS": 5}, "TTT_FREEZE_BLOCKS=5"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(t.UserError, match=words):
        tiny_config(**{**TTT, **settings})
