"""Short sequences first: a phase of the schedule in which every training window is cut into pieces (SHORT_SEQ_LEN)."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_env, tiny_model
from torch import Tensor

import train_gpt as t

ENVIRONMENT = dict(os.environ)
SHORT = {"SHORT_SEQ_LEN": 8, "SHORT_SEQ_FRAC": 0.5}  # of windows of 32
LOOP = {"NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 2, "ENABLE_LOOPING_AT": 0.3}
LOOPED = (0, 1, 2, 1, 2, 3)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"SHORT_SEQ_FRAC": 0.9}, {"train": 32, "late_qat": 32}),
    ({"SHORT_SEQ_LEN": 0}, {"train": 32, "late_qat": 32}),
    (SHORT, {"train_8": 8, "train": 32, "late_qat": 32}),
    ({"SHORT_SEQ_LEN": "8,16", "SHORT_SEQ_FRAC": "0.1,0.7"}, {"train_8": 8, "train_16": 16, "train": 32, "late_qat": 32}),
    ({"SHORT_SEQ_LEN": "8,64", "SHORT_SEQ_FRAC": "0.1,0.7"}, {"train_8": 8, "train": 32, "late_qat": 32}),
    ({**SHORT, "SHORT_SEQ_FRAC": 0}, {"train": 32, "late_qat": 32}),
    ({**SHORT, **LOOP}, {"train_8": 8, "layer_loop_8": 8, "layer_loop": 32, "late_qat": 32}),
    ({**SHORT, **LOOP, "SHORT_SEQ_FRAC": 0.3}, {"train_8": 8, "layer_loop": 32, "late_qat": 32}),
    ({**SHORT, **LOOP, "SHORT_SEQ_FRAC": 0.2}, {"train_8": 8, "train": 32, "layer_loop": 32, "late_qat": 32}),
    ({**SHORT, **LOOP, "ENABLE_LOOPING_AT": 0}, {"train_8": 8, "train": 32, "late_qat": 32}),
    ({**SHORT, "LATE_QAT_THRESHOLD": 0, "POST_QAT_SECONDS": 1, "MAX_WALLCLOCK_SECONDS": 9},
     {"train_8": 8, "train": 32, "post_qat": 32}),
])  # fmt: skip
def test_phases_have_the_length_of_their_part_of_the_run(settings: dict[str, Any], expected: dict[str, int]) -> None:
    """Off without a length, without a part of the run, and where the default's is not below TRAIN_SEQ_LEN.

    The model holds the rotary table of each length.
    """
    cfg = tiny_config(**settings)
    assert [(name, phase.seq_len) for name, phase in t.phases(cfg).items()] == list(expected.items())
    assert set(tiny_model(**settings).rotary) == set(expected.values())


def test_short_sequences_train_the_same_graph_otherwise() -> None:
    """Layers and rounding are those of whole windows: without loops, with them, and QAT from the start."""
    for settings in ({}, LOOP, {**LOOP, "ENABLE_LOOPING_AT": 0}, {"QAT_ENABLED": 1, "MATRIX_CLIP_SIGMAS": 6}):
        phases = t.phases(tiny_config(**SHORT, **settings))
        assert phases["train_8"] == t.phases(tiny_config(SHORT_SEQ_LEN=0, **settings))["train"]._replace(seq_len=8)
        for name in ("train", "layer_loop"):
            assert f"{name}_8" not in phases or name not in phases or phases[f"{name}_8"].order == phases[name].order


@pytest.mark.parametrize(("settings", "step", "seconds", "phase"), [
    ({}, 0, 0, "train_8"), ({}, 49, 49, "train_8"), ({}, 50, 0, "train"), ({}, 5, 50, "train"),
    ({"SHORT_SEQ_LEN": 0}, 0, 0, "train"), ({"SHORT_SEQ_FRAC": 0}, 0, 0, "train"),
    ({"SHORT_SEQ_FRAC": 0.2}, 19, 0, "train_8"), ({"SHORT_SEQ_FRAC": 0.2}, 20, 0, "train"),
    (LOOP, 29, 0, "train_8"), (LOOP, 30, 0, "layer_loop_8"), (LOOP, 5, 30, "layer_loop_8"), (LOOP, 60, 0, "layer_loop"),
    ({"SHORT_SEQ_LEN": "8,16", "SHORT_SEQ_FRAC": "0.1,0.7"}, 10, 0, "train_16"),
    ({"SHORT_SEQ_LEN": "8,16", "SHORT_SEQ_FRAC": "0.1,0.7"}, 1, 70, "train"),
    ({**LOOP, "ENABLE_LOOPING_AT": 0.7}, 60, 0, "train"), ({**LOOP, "ENABLE_LOOPING_AT": 0.7}, 70, 0, "layer_loop"),
    ({"SHORT_SEQ_FRAC": 0.9, "LATE_QAT_THRESHOLD": 0.5}, 79, 0, "train_8"),
    ({"SHORT_SEQ_FRAC": 0.9, "LATE_QAT_THRESHOLD": 0.5}, 81, 0, "late_qat"),
    ({"SHORT_SEQ_FRAC": 1, "LATE_QAT_THRESHOLD": 0}, 99, 0, "train_8"), ({"SHORT_SEQ_FRAC": 1}, 99, 0, "late_qat"),
])  # fmt: skip
def test_short_sequences_end_by_steps_or_clock(settings: dict[str, Any], step: int, seconds: float, phase: str) -> None:
    """At SHORT_SEQ_FRAC of the run, or earlier where late QAT begins; every phase of the schedule is one of the table."""
    cfg = tiny_config(**{"ITERATIONS": 100, "WARMDOWN_FRAC": 0.4, **SHORT, **settings})
    assert t.plan_step(cfg, step, seconds, 100).phase == phase
    used = list(dict.fromkeys(t.plan_step(cfg, step, 0, 100).phase for step in range(101)))
    assert used == [name for name in t.phases(cfg) if name in used]


@pytest.mark.parametrize(("lengths", "ends"), [
    ("5", "0.6"), ("24", "0.6"), ("8,16", "0.6"), ("16,8", "0.1,0.7"), ("8,16", "0.7,0.1"), ("8,8", "0.1,0.7"),
    ("-8", "0.6"),
])  # fmt: skip
def test_lengths_that_do_not_rise_or_do_not_divide_the_window_are_refused(lengths: str, ends: str) -> None:
    with pytest.raises(t.UserError, match=f"SHORT_SEQ_LEN={lengths} SHORT_SEQ_FRAC={ends}.*TRAIN_SEQ_LEN=32"):
        tiny_config(SHORT_SEQ_LEN=lengths, SHORT_SEQ_FRAC=ends)


@pytest.mark.parametrize("length", [32, 64])
def test_a_length_that_is_not_below_the_window_is_reported(run: t.Runtime, length: int) -> None:
    """As a default it fits every TRAIN_SEQ_LEN; set by name it must not pass for a feature that acted."""
    named = tiny_config(SHORT_SEQ_LEN=length)
    assert "train" == next(iter(t.phases(named)))
    for cfg in (tiny_config(), named):
        t.report_inactive(replace(run, cfg=cfg, active={"train"}))
    quiet, told = re.findall(r"^never activated: (.*)$", Path("logs/tiny.txt").read_text(), re.MULTILINE)
    assert "short_seq" not in quiet and f"short_seq (SHORT_SEQ_LEN={length} TRAIN_SEQ_LEN=32)" in told


def watched(trainer: t.Trainer) -> list[Tensor]:
    """The ids that the trainer's model will be given."""
    seen, nll = [], trainer.model.fast_nll
    trainer.model.fast_nll = lambda ids, *rest: seen.append(ids) or nll(ids, *rest)
    return seen


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("features", [{}, {"DOC_ATTENTION": 1}], ids=["default", "documents"])
def test_a_short_step_is_one_over_the_pieces(features: dict[str, Any], accum: int, run: t.Runtime) -> None:
    """The same tokens as the step of whole windows, in order, cut in two: loss and parameters to the last bit."""
    cfg = replace(run.cfg, short_seq_len=(16,), grad_accum_steps=accum, doc_attention="DOC_ATTENTION" in features)
    run = replace(run, cfg=cfg)
    short, by_hand, whole = (t.Trainer(run, tiny_model(SHORT_SEQ_LEN=16)) for _ in range(3))
    if features:
        for trainer in (short, by_hand, whole):
            trainer.model.cfg = cfg
    seen, at_once, fetch = watched(short), watched(whole), by_hand.loader.fetch

    def fetch_pieces(number: int) -> tuple[Tensor, ...]:
        return tuple(torch.stack([row[a : a + 16] for row in rows for a in (0, 16)]) for rows in fetch(number))

    by_hand.loader.fetch = fetch_pieces
    losses = [trainer.step(3, t.StepPlan(0.5, 0.9, "train_16")) for trainer in (short, by_hand)]
    whole.step(3, t.StepPlan(0.5, 0.9, "train"))
    assert [ids.shape for ids in seen] == [(16 // accum, 16)] * accum
    assert torch.equal(torch.cat(seen).flatten(), torch.cat(at_once).flatten()) and at_once[0].shape[1] == 32
    assert torch.equal(*losses)
    state, expected, other = (trainer.model.state_dict() for trainer in (short, by_hand, whole))
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert not torch.equal(state["banks.up"], other["banks.up"])


def test_a_run_with_short_sequences_first(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both lengths are warmed up, the switch is logged, late QAT comes after it, and the score is of whole windows."""
    settings = {**SHORT, "SHORT_SEQ_FRAC": 0.4, "WARMDOWN_FRAC": 0.4, "LATE_QAT_THRESHOLD": 0.5, "RUN_ID": "short"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t.os, "environ", {**ENVIRONMENT, **tiny_env(**settings, **corpus)})
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    t.main()
    log = (tmp_path / "logs/short.txt").read_text()
    assert re.findall(r"^warmup:(\w+) ", log, re.MULTILINE) == ["train_8", "train", "late_qat"]
    assert re.findall(r"^(\w+):enabled step:(\d+) ", log, re.MULTILINE) == [("train", "5"), ("late_qat", "10")]
    assert "never activated: none" in log and re.search(r"^final_int6_sliding_window_exact ", log, re.MULTILINE)
    written = [json.loads(line) for line in (tmp_path / "logs/short.jsonl").read_text().splitlines()]
    named = [(e["step"], e["name"]) for e in written if e["event"] == "phase"]
    assert named == [(5, "train:enabled"), (10, "late_qat:enabled")]
