"""Layer looping: one layer order as data, from the schedule over training and export to the artifact's header."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_env, tiny_model

import train_gpt as t

ENVIRONMENT = dict(os.environ)
LOOP = {"NUM_LOOPS": 2, "LOOP_START": 1, "LOOP_END": 2, "ENABLE_LOOPING_AT": 0.5}
LOOPED = (0, 1, 2, 1, 2, 1, 2, 3)


def test_orders_of_the_published_systems() -> None:
    """PR #1493's 17 virtual layers of 11 and PR #38's three blocks run three times."""
    record = t.Config(num_loops=2)
    assert t.final_order(record) == (0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10)
    shared = tiny_config(NUM_LAYERS=3, XSA_LAST_N=3, VE_LAYERS="2", NUM_LOOPS=2, LOOP_START=0, LOOP_END=2,
                         ENABLE_LOOPING_AT=0)  # fmt: skip
    assert t.final_order(shared) == (0, 1, 2) * 3
    assert t.phases(shared)["train"].order == (0, 1, 2) * 3 and "layer_loop" not in t.phases(shared)
    assert t.final_order(tiny_config()) == (0, 1, 2, 3) == t.phases(tiny_config())["train"].order


@pytest.mark.parametrize(("step", "seconds", "phase"), [
    (0, 0, "train"), (49, 0, "train"), (50, 0, "layer_loop"), (5, 50, "layer_loop"), (5, 49, "train"),
    (90, 0, "layer_loop"), (95, 0, "late_qat"), (5, 95, "late_qat"),
])  # fmt: skip
def test_loops_begin_by_steps_or_clock(step: int, seconds: float, phase: str) -> None:
    """At the set fraction of the run; late QAT keeps the loops."""
    cfg = tiny_config(ITERATIONS=100, **LOOP)
    plan = t.plan_step(cfg, step, seconds, 100)
    assert plan.phase == phase
    assert t.phases(cfg)[phase].order == ((0, 1, 2, 3) if phase == "train" else LOOPED)


def test_every_pass_has_its_part() -> None:
    """Another output with loops than without, and a skip weight for each pair of the longer order."""
    ids = torch.randint(4, 512, (2, 16), generator=torch.Generator().manual_seed(2))
    model = tiny_model(**LOOP)
    assert model.order == LOOPED and model.rest["skip_weights"].shape[0] == 4
    with torch.no_grad():
        outputs = [
            model.hidden(ids, model.weights(False), order) for order in (LOOPED, (0, 1, 2, 3), LOOPED[:4] + LOOPED[6:])
        ]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2) and not torch.allclose(
        outputs[0], outputs[2], atol=1e-2
    )


@pytest.mark.parametrize("settings", [
    {"LOOP_END": 4}, {"LOOP_START": 3}, {"ENABLE_LOOPING_AT": 1.5},
])  # fmt: skip
def test_loops_outside_the_stack_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(t.UserError, match=next(iter(settings))):
        tiny_config(**{**LOOP, **settings})


def finished(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    """The log of a whole tiny run in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(t.os, "environ", {**ENVIRONMENT, **tiny_env(**settings)})
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    t.main()
    kind = ".eval" if "EVAL_ONLY" in settings else ".export" if "EXPORT_ONLY" in settings else ""
    return (folder / f"logs/{settings['RUN_ID']}{kind}.txt").read_text()


def scores(text: str) -> list[str]:
    return re.findall(r"^final_\S+_exact .*val_bpb:(\S+)", text, re.MULTILINE)


def test_a_looped_run_from_the_schedule_to_a_fresh_process(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switch is logged, the artifact carries the order, and reading it back gives the same digits."""
    log = finished(tmp_path, monkeypatch, RUN_ID="looped", **LOOP, **corpus)
    assert re.search(r"^layer_loop:enabled step:6 ", log, re.MULTILINE) and "never activated: none" in log
    artifact = tmp_path / "logs/looped.pgolf"
    assert t.read_header(artifact.read_bytes(), artifact)[0]["order"] == list(LOOPED)
    again = finished(tmp_path, monkeypatch, RUN_ID="again", EVAL_ONLY=1, ARTIFACT_PATH=artifact, **LOOP, **corpus)
    assert scores(again) == scores(log) != []


def test_loops_that_never_began_are_reported_and_not_scored(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends before its loops begin is scored, here and in a fresh process, as the model that was trained."""
    settings = {"ENABLE_LOOPING_AT": 1, "LATE_QAT_THRESHOLD": 0, **corpus}
    log = finished(tmp_path, monkeypatch, RUN_ID="early", **{**LOOP, **settings})
    assert re.search(r"^never activated: layer_loop \(ENABLE_LOOPING_AT=1.0\)$", log, re.MULTILINE)
    artifact = tmp_path / "logs/early.pgolf"
    assert t.read_header(artifact.read_bytes(), artifact)[0]["order"] == [0, 1, 2, 3]
    again = finished(tmp_path, monkeypatch, RUN_ID="again", EVAL_ONLY=1, ARTIFACT_PATH=artifact, **{**LOOP, **settings})
    assert scores(again) == scores(log) != []
    weights = tmp_path / "logs/early.weights.pt"
    exported = finished(
        tmp_path, monkeypatch, RUN_ID="third", EXPORT_ONLY=1, WEIGHTS_PATH=weights, **{**LOOP, **settings}
    )
    assert scores(exported) == scores(log)


SHARED = {"NUM_LAYERS": 3, "XSA_LAST_N": 3, "VE_LAYERS": "2", "NUM_LOOPS": 2, "LOOP_START": 0, "LOOP_END": 2,
          "ENABLE_LOOPING_AT": 0}  # fmt: skip


def test_lora_gives_every_pass_its_own_matrices() -> None:
    """At the start it adds nothing; afterwards pass p runs W[layer] + B_p A_p, scaled as the layer's output is."""
    ids = torch.randint(4, 512, (2, 16), generator=torch.Generator().manual_seed(2))
    plain, model = tiny_model(**SHARED), tiny_model(**SHARED, LORA_RANK=3)
    shared = {n: v for n, v in plain.state_dict().items() if n != "clip_sigmas"}
    zeros = {n: torch.zeros_like(v) for n, v in model.state_dict().items() if n.endswith("_out") and "lora" in n}
    model.load(model.state_dict() | shared | zeros)
    with torch.no_grad():
        same = [m.hidden(ids, m.weights(False), m.order) for m in (plain, model)]
        torch.testing.assert_close(same[0], same[1], rtol=1e-4, atol=1e-5)
        model.rest["lora_down_out"][4].normal_()
        down, changed = model.weights(False)["down"], model.hidden(ids, model.weights(False), model.order)
    assert down.shape[0] == 9 and not torch.allclose(changed, same[0], atol=1e-3)
    own = model.banks["down"][1] + model.rest["lora_down_out"][4] @ model.rest["lora_down_in"][4]
    torch.testing.assert_close(down[4], own * model.rest["mlp_scale"][1][:, None])
    torch.testing.assert_close(down[1], model.banks["down"][1] * model.rest["mlp_scale"][1][:, None])


def test_lora_trains_at_its_own_rate_and_is_exported(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both factors move, LORA_LR=0 keeps them; a fresh process scores the artifact to the same digits."""
    log = finished(tmp_path, monkeypatch, RUN_ID="lora", **SHARED, LORA_RANK=2, EMA_ENABLED=0, **corpus)
    still = finished(tmp_path, monkeypatch, RUN_ID="still", **SHARED, LORA_RANK=2, LORA_LR=0, EMA_ENABLED=0, **corpus)
    moved, kept = (torch.load(tmp_path / f"logs/{n}.weights.pt", weights_only=True)["raw"] for n in ("lora", "still"))
    assert moved["rest.lora_up_out"].abs().sum() > 0 == kept["rest.lora_up_out"].abs().sum()
    assert scores(log) != scores(still)
    model = {**SHARED, "LORA_RANK": 2, **corpus}
    again = finished(
        tmp_path, monkeypatch, RUN_ID="again", EVAL_ONLY=1, ARTIFACT_PATH=tmp_path / "logs/lora.pgolf", **model
    )
    assert scores(again) == scores(log)


@pytest.mark.parametrize("settings", [{"NUM_LOOPS": 0}, {"ENABLE_LOOPING_AT": 0.5}])
def test_lora_needs_loops_from_the_start(settings: dict[str, Any]) -> None:
    with pytest.raises(t.UserError, match="LORA_RANK=2"):
        tiny_config(**{**SHARED, "LORA_RANK": 2, **settings})
