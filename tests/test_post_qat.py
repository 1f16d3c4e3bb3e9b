"""Mixed bit widths by matrix name, and QAT after the main training (PR #107)."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import codes_of, tiny_config, tiny_env, tiny_model, unscaled

import train_gpt as t

ENVIRONMENT = dict(os.environ)
LOWBIT = {"MATRIX_BITS": 8, "LOWBIT_BITS": 5, "LOWBIT_NAME_PATTERNS": ".mlp.,.attn.c_q.,blocks.2.attn.c_v."}
GRID = {"GPTQ_ENABLED": 0, "CLIP_POLICY": "amax", "LATE_QAT_THRESHOLD": 0}


def test_patterns_choose_rows_of_a_bank() -> None:
    """Q, K and V share a bank and still have bits of their own, layer by layer; without patterns all rows are equal."""
    model = tiny_model(**LOWBIT)
    assert {name: bits.unique().tolist() for name, bits in model.bits.items()} == {
        "qkv": [5, 8], "out": [8], "up": [5], "down": [5]
    }  # fmt: skip
    for layer in range(4):
        q, k, v = model.bits["qkv"][layer].flatten().split([32, 16, 16])
        assert (q == 5).all() and (k == 8).all() and (v == (5 if layer == 2 else 8)).all()
    assert all((bits == 6).all() for bits in tiny_model().bits.values())


def test_export_and_training_share_the_mixed_grid() -> None:
    """Codes stay within the bits of their row, use them, and are what the forward pass trains on."""
    model = tiny_model(**LOWBIT, **GRID)
    coded = codes_of(model.cfg, t.quant_specs(model), {}, 0.0)
    trained_on = unscaled(model, model.weights(True))
    for name, bits in model.bits.items():
        codes = coded[name].codes.float().abs().amax(-1, keepdim=True)
        assert (codes == 2 ** (bits - 1) - 1).all()
        torch.testing.assert_close(trained_on[name], coded[name].dequantize(), rtol=0, atol=1e-5)


def test_int5_fallback_lowers_only_what_is_above() -> None:
    """A limit for a layer does not raise rows that have fewer bits already."""
    model = tiny_model(**{**LOWBIT, "LOWBIT_BITS": 4})
    bits = {job.name: job.bits for job in t.quant_specs(model, {1: 5})}
    assert bits["up"].unique().tolist() == [4] and bits["out"][1].unique().tolist() == [5]
    assert model.bits["out"].unique().tolist() == [8], "the model's own table is not touched"


@pytest.mark.parametrize(("settings", "words"), [
    ({"LOWBIT_BITS": 6}, "set both"), ({"LOWBIT_NAME_PATTERNS": ".mlp."}, "set both"),
    ({"LOWBIT_BITS": 6, "LOWBIT_NAME_PATTERNS": ".mlp.,.ffn."}, r"LOWBIT_NAME_PATTERNS=\.ffn\..*blocks\.0\.mlp\.fc"),
    ({"LOWBIT_BITS": 9, "LOWBIT_NAME_PATTERNS": ".mlp."}, "LOWBIT_BITS.*9"),
    ({"LOWBIT_BITS": 1, "LOWBIT_NAME_PATTERNS": ".mlp."}, "LOWBIT_BITS=1"),
    ({"POST_QAT_SECONDS": 30, "MAX_WALLCLOCK_SECONDS": 30}, "POST_QAT_SECONDS=30"),
    ({"POST_QAT_SECONDS": 1, "MATRIX_LR": 0}, "MATRIX_LR"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(t.UserError, match=words):
        tiny_config(**settings)


@pytest.fixture
def step_seconds(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds that a training step takes by the clock, and nothing else takes any: a busy machine changes nothing."""
    seconds, now, step = 0.03, [0.0], t.Trainer.step

    def timed_step(*arguments: Any) -> torch.Tensor:
        now[0] += seconds
        return step(*arguments)

    monkeypatch.setattr(t.Trainer, "step", timed_step)
    monkeypatch.setattr(t.Clock.__init__, "__defaults__", (lambda: now[0],))
    return seconds


def finished(folder: Path, corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    """The log of a whole tiny run."""
    monkeypatch.chdir(folder)
    env = tiny_env(**{"ITERATIONS": 30, **GRID, **corpus, **settings})
    monkeypatch.setattr(t.os, "environ", {**ENVIRONMENT, **env})
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    t.main()
    return (folder / "logs/tiny.txt").read_text()


def test_post_qat_pays_for_itself(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_seconds: float
) -> None:
    """On a coarse grid the score of the rounded weights falls by more than the same steps of plain training give."""
    log = finished(tmp_path, corpus, monkeypatch, MATRIX_BITS=3, POST_QAT_SECONDS=2, POST_QAT_LR=0.005, EVAL_STRIDE=0)
    score = {
        w: float(re.search(rf"DIAGNOSTIC {w}_post_qat rounded_exact .*val_bpb:(\S+)", log)[1])
        for w in ("before", "after")
    }
    final = float(re.search(r"final_int3_roundtrip_exact .*val_bpb:(\S+)", log)[1])
    assert score["after"] < score["before"] - 0.01
    assert final == pytest.approx(score["after"], abs=0.02), "what was trained is what is exported"
    assert f"post_qat: {int(2 / step_seconds)} steps in 2.0s" in log
    assert "ema+post_qat:applying" in log and "never activated: none" in log and "DIAGNOSTIC post_qat val_loss" in log
    assert "DIAGNOSTIC post_qat rounded" not in log, "after_post_qat says it already; late QAT was off"


def test_post_qat_stays_inside_the_clock(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_seconds: float
) -> None:
    """Its seconds come out of MAX_WALLCLOCK_SECONDS, not on top, to a step; without it there is no such phase."""
    log = finished(tmp_path, corpus, monkeypatch, ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=5, POST_QAT_SECONDS=2,
                   GPTQ_RESERVE_SECONDS=0.5, EVAL_STRIDE=0, TRAIN_LOG_EVERY=10)  # fmt: skip
    assert re.search(r"^budget train: 4\.\ds of 5s \(", log, re.MULTILINE)
    for phase, limit in (("steps", 2.5), ("post_qat", 2)):
        spent = float(re.search(rf"^budget train: .*{phase}:([\d.]+)s", log, re.MULTILINE)[1])
        assert limit - step_seconds < spent <= limit, phase
    main, after = log.split("post_qat:enabled")
    times = [[int(n) for n in re.findall(r" train_time:(\d+)ms step_avg", part)] for part in (main, after)]
    assert sum(times, []) == sorted(sum(times, [])) and times[1][0] >= times[0][-1] > 0, "one clock for both"
    assert "post_qat" not in t.phases(tiny_config()) and "post_qat" in t.phases(tiny_config(POST_QAT_SECONDS=1))


def test_scoring_the_rounded_weights_leaves_the_model_alone(run: t.Runtime) -> None:
    """Bitwise."""
    model, validation = tiny_model(**GRID), t.load_validation(run)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    t.eval_rounded(run, model, validation, "before")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
