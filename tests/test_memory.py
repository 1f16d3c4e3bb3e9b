"""Micro-batches follow from the memory that is there, and the result does not depend on them."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_gpt as t

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
GIB = 2**30


def test_what_fits_grows_with_the_memory() -> None:
    """100 KiB a token twice, 1 GiB of copies, 1 GiB for libraries, a peak of half a GiB without tokens."""
    each, length = 100 * 2**10, 2048
    peaks = [GIB // 2 + rows * length * each for rows in (1, 2)]
    for gib in (80, 24, 8):
        tokens, why = t.tokens_that_fit(peaks, length, GIB, gib * GIB)
        assert tokens == pytest.approx((0.95 * gib - 2.5) * GIB / (2 * each))
        assert why == f"a token takes 100 KiB twice, the rest 2.5 GiB of {gib}.0 GiB"
    assert t.tokens_that_fit(peaks, length, GIB, 2 * GIB)[0] < 0


@pytest.mark.parametrize("most", [98_304, 100, 64, 32, 1])
def test_smaller_micro_batches_train_the_same(run: t.Runtime, most: int) -> None:
    """Losses of three steps and the weights after them, within rounding; a sequence is the least."""
    results = []
    for tokens in (98_304, most):
        model = t.build_model(run, run.cfg, 1)
        model.micro_batch = tokens
        trainer = t.Trainer(run, model)
        assert trainer.loader.shape.sequences * run.cfg.train_seq_len <= max(tokens, run.cfg.train_seq_len)
        plans = [t.plan_step(run.cfg, step, 0.0, float("inf")) for step in range(3)]
        losses = [trainer.step(step, plan).item() for step, plan in enumerate(plans)]
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    (losses, weights), (again, others) = results
    assert again == pytest.approx(losses, rel=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(weights, others, strict=True)) < 2e-3


def test_micro_steps_given_by_hand_win(run: t.Runtime) -> None:
    run = replace(run, cfg=replace(run.cfg, grad_accum_steps=2))
    model = t.build_model(run, run.cfg, 1)
    model.micro_batch = 32
    assert t.Trainer(run, model).loader.shape == (2, 4)


def test_evaluation_takes_the_same_limit(run: t.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """And scores the same."""
    validation, model, rows = t.load_validation(run), t.build_model(run, run.cfg, 1), []
    want = t.evaluate(run, model, validation, run.cfg.eval_len)
    nll = model.fast_nll
    monkeypatch.setattr(model, "fast_nll", lambda ids, *rest: rows.append(len(ids)) or nll(ids, *rest))
    model.micro_batch = 3 * run.cfg.eval_len
    assert t.evaluate(run, model, validation, run.cfg.eval_len).bpb == pytest.approx(want.bpb, abs=1e-6)
    assert set(rows) == {3}


def test_no_memory_is_one_line() -> None:
    text = t.describe(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nMore."))
    assert text.startswith("error: CUDA out of memory. Tried") and "GRAD_ACCUM_STEPS" in text and "\n" not in text


LIMITED = """
import runpy, sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv[2]) * 2**30 / torch.cuda.mem_get_info()[1])
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gib", [22, 15, 11])
def test_a_small_gpu_trains_the_record_model(tmp_path: Path, corpus: dict[str, str], gib: int) -> None:
    """The default model, whose vocabulary is the corpus'; the script says how and why, and ends with a score."""
    env = {**os.environ, **corpus, "VOCAB_SIZE": "512", "TRAIN_BATCH_TOKENS": "98304", "ITERATIONS": "4", "RUN_ID": "r",
           "WARMUP_STEPS": "2", "EVAL_SEQ_LEN": "1024", "EVAL_STRIDE": "0"}  # fmt: skip
    command = [sys.executable, "-c", LIMITED, str(SCRIPT), str(gib)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?m)^micro_batch:\d+ tokens at most, because a token takes", done.stdout)
    assert "final_int6_roundtrip_exact" in done.stdout
