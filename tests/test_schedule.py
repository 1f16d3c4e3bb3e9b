"""Schedules as pure functions, and the averages of the weights."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import train_gpt as t
from conftest import tiny_config, tiny_model

INF = math.inf
CLIP = {"MATRIX_CLIP_SIGMAS": 6}  # QAT from the first step needs to know its grid


def schedule(**variables: Any) -> t.Config:
    """100 steps with a warm-down over the last 40."""
    return tiny_config(**{"ITERATIONS": 100, "WARMDOWN_FRAC": 0.4, **variables})


# --- learning rate --------------------------------------------------------------------------------

BY_FRACTION = [  # variables, step, seconds, budget, scale
    ({}, 0, 0, INF, 1.0), ({}, 59, 0, INF, 1.0), ({}, 60, 0, INF, 1.0), ({}, 61, 0, INF, 0.975), ({}, 80, 0, INF, 0.5),
    ({}, 99, 0, INF, 0.025), ({}, 100, 0, INF, 0.0), ({}, 120, 0, INF, 0.0),
    ({}, 80, 1e9, INF, 0.5),  # no budget: the clock does not matter
    ({}, 5, 80, 100, 0.5), ({}, 5, 60, 100, 1.0), ({}, 5, 99, 100, 0.025), ({}, 5, 100, 100, 0.0),
    ({}, 5, 130, 100, 0.0),
    ({}, 90, 80, 100, 0.25), ({}, 80, 90, 100, 0.25),  # whichever is further
    ({"WARMDOWN_FRAC": 0}, 99, 0, INF, 1.0), ({"WARMDOWN_FRAC": 1}, 25, 0, INF, 0.75),
    ({"MIN_LR": 0.1}, 80, 0, INF, 0.5), ({"MIN_LR": 0.1}, 99, 0, INF, 0.1), ({"MIN_LR": 0.1}, 100, 0, INF, 0.1),
    ({"MIN_LR": 0.1}, 3, 200, 100, 0.1), ({"MIN_LR": 0.1}, 3, 1, 100, 1.0),
]  # fmt: skip
BY_STEPS = [  # WARMDOWN_ITERS=20: 100 steps, or as many as the clock allows at the pace so far
    (0, 0, INF, 1.0), (79, 0, INF, 1.0), (80, 0, INF, 1.0), (90, 0, INF, 0.5), (99, 0, INF, 0.05), (100, 0, INF, 0.0),
    (90, 1e9, INF, 0.5), (0, 0, 50, 1.0), (0, 3, 50, 1.0),
    (10, 10, 50, 1.0), (40, 40, 50, 0.5), (45, 45, 50, 0.25), (50, 50, 50, 0.0), (55, 55, 50, 0.0),  # 1 s per step
    (10, 40, 50, 0.125),  # 4 s per step: 10 s allow 2.5 steps more
    (90, 9, 1000, 0.5),  # a budget far away: steps decide
]  # fmt: skip


@pytest.mark.parametrize(("variables", "step", "seconds", "budget", "scale"), BY_FRACTION)
def test_warmdown_by_fraction(
    variables: dict[str, Any], step: int, seconds: float, budget: float, scale: float
) -> None:
    """Flat, then linear to zero (or MIN_LR) at the end of steps or of the clock, whichever comes first."""
    assert t.lr_scale_at(schedule(**variables), step, seconds, budget) == pytest.approx(scale)


@pytest.mark.parametrize(("step", "seconds", "budget", "scale"), BY_STEPS)
def test_warmdown_by_steps(step: int, seconds: float, budget: float, scale: float) -> None:
    """WARMDOWN_ITERS means the last steps that will really happen, not those of an ITERATIONS never reached."""
    cfg = schedule(WARMDOWN_ITERS=20, WARMDOWN_FRAC=0.9)
    assert t.lr_scale_at(cfg, step, seconds, budget) == pytest.approx(scale)


@pytest.mark.parametrize("variables", [{}, {"WARMDOWN_ITERS": 20}, {"WARMDOWN_ITERS": 500}, {"MIN_LR": 0.2}])
def test_the_scale_never_rises_and_ends_at_its_floor(variables: dict[str, Any]) -> None:
    """At a steady pace, for a run that the clock ends and for one that the steps end."""
    cfg = schedule(**variables)
    for budget in (70.0, 1000.0, INF):
        end = min(100, int(min(budget, 1e6)))
        scales = [t.lr_scale_at(cfg, step, float(step), budget) for step in range(end + 1)]
        later = scales[1:]  # at step 0 there is no pace yet
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(later))
        assert scales[-1] == pytest.approx(cfg.min_lr) and all(cfg.min_lr <= scale <= 1 for scale in scales)


@pytest.mark.parametrize(
    ("step", "warmup", "momentum"),
    [(0, 200, 0.85), (50, 200, 0.875), (100, 200, 0.9), (200, 200, 0.95), (999, 200, 0.95), (0, 0, 0.95), (7, 0, 0.95)],
)
def test_momentum_warms_up_linearly(step: int, warmup: int, momentum: float) -> None:
    cfg = schedule(MUON_MOMENTUM=0.95, MUON_MOMENTUM_WARMUP_START=0.85, MUON_MOMENTUM_WARMUP_STEPS=warmup)
    assert t.muon_momentum_at(cfg, step) == pytest.approx(momentum)


# --- phases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, {"train": False, "late_qat": True}), ({"LATE_QAT_THRESHOLD": 0}, {"train": False}),
     ({"QAT_ENABLED": 1, **CLIP}, {"train": True}),
     ({"QAT_ENABLED": 1, **CLIP, "LATE_QAT_THRESHOLD": 0}, {"train": True})],
)  # fmt: skip
def test_phases_list_every_graph_of_the_schedule(variables: dict[str, Any], expected: dict[str, bool]) -> None:
    """What is warmed up is what the schedule uses, in that order, over all layers."""
    found = t.phases(schedule(**variables))
    assert [(name, phase.fake_quant) for name, phase in found.items()] == list(expected.items())
    assert all(phase.order == (0, 1, 2, 3) for phase in found.values())


@pytest.mark.parametrize(
    ("variables", "step", "seconds", "budget", "phase"),
    [({}, 0, 0, INF, "train"), ({}, 93, 0, INF, "train"), ({}, 95, 0, INF, "late_qat"), ({}, 99, 0, INF, "late_qat"),
     ({}, 5, 95, 100, "late_qat"), ({}, 5, 90, 100, "train"), ({"LATE_QAT_THRESHOLD": 0.5}, 81, 0, INF, "late_qat"),
     ({"LATE_QAT_THRESHOLD": 0.5}, 79, 0, INF, "train"), ({"LATE_QAT_THRESHOLD": 0}, 99, 0, INF, "train"),
     ({"QAT_ENABLED": 1, **CLIP}, 99, 0, INF, "train"), ({"MIN_LR": 0.2}, 99, 0, INF, "train"),
     ({"LATE_QAT_THRESHOLD": 1}, 59, 0, INF, "train"), ({"LATE_QAT_THRESHOLD": 1}, 61, 0, INF, "late_qat")],
)  # fmt: skip
def test_late_qat_begins_below_its_threshold(
    variables: dict[str, Any], step: int, seconds: float, budget: float, phase: str
) -> None:
    """By steps and by clock; never where it is off, where the floor of the rate is above it, or twice."""
    cfg = schedule(**variables)
    plan = t.plan_step(cfg, step, seconds, budget)
    assert plan.phase == phase and plan.phase in t.phases(cfg)
    assert plan[:2] == (t.lr_scale_at(cfg, step, seconds, budget), t.muon_momentum_at(cfg, step))


@pytest.mark.parametrize(("step", "seconds", "share"), [(0, 0, 1.0), (50, 0, 0.625), (10, 50, 0.625), (100, 0, 0.25)])
def test_muon_keeps_fewer_directions_towards_the_end(step: int, seconds: float, share: float) -> None:
    """A cosine from all to MUON_RANK_FRAC, by steps or clock; 1 keeps all."""
    assert t.plan_step(schedule(MUON_RANK_FRAC=0.25), step, seconds, 100).muon_share == pytest.approx(share)
    assert t.plan_step(schedule(), step, seconds, 100).muon_share == 1.0


@pytest.mark.parametrize(
    ("at", "step", "seconds", "two"),
    [(0.3, 29, 29, False), (0.3, 30, 0, True), (0.3, 0, 30, True), (0, 0, 0, True), (1, 100, 100, False)],
)
def test_momentum_has_two_rails_from_a_part_of_the_run_on(at: float, step: int, seconds: float, two: bool) -> None:
    """By steps or clock; before, and without them, the rails add up to the plain momentum sum of Nesterov."""
    cfg = schedule(MUON_RAILS_AT=at, MUON_MOMENTUM_WARMUP_STEPS=0)
    plan = t.plan_step(cfg, step, seconds, 100)
    rails = t.momentum_rails(cfg, plan)
    assert plan.two_rails == two and len(rails) == (1 if at == 1 else 2)
    mu = cfg.muon_momentum
    if not two:
        assert rails == [(mu, 1.0, pytest.approx(mu / len(rails)))] * len(rails)
        return
    (fast, slow), share = rails, [rail[2] / mu for rail in rails]
    assert (fast[0], slow[0]) == (0.85, 0.98) and sum(share) == pytest.approx(1)
    assert [rail[1] / (1 - rail[0]) for rail in rails] == pytest.approx([1 / (1 - mu)] * 2)
    assert sum(s / (1 - d) for s, (d, *_) in zip(share, rails, strict=True)) == pytest.approx(31, abs=0.01)


def test_rails_need_momentum_below_one() -> None:
    with pytest.raises(t.UserError, match="MUON_RAILS_AT=0.3: MUON_MOMENTUM below 1"):
        schedule(MUON_RAILS_AT=0.3, MUON_MOMENTUM=1)


# --- averages -------------------------------------------------------------------------------------


def history(model: t.GPT, averager: t.Averager, steps: int, scale: Callable[[int], float]) -> list[Tensor]:
    """Give the model random weights `steps` times, as training would; returns the values of one parameter, by step."""
    generator, seen = torch.Generator().manual_seed(9), []
    with torch.no_grad():
        for step in range(1, steps + 1):
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            averager.update(step, scale(step))
            seen.append(model.banks["out"].detach().double())
    return seen


def small(**variables: Any) -> tuple[t.GPT, t.Averager]:
    model = tiny_model(NUM_LAYERS=1, XSA_LAST_N=1, VE_ENABLED=0, **variables)
    return model, t.Averager(model.cfg, model)


def averages_over_time(start: Tensor, values: list[Tensor], decay: float) -> list[Tensor]:
    """The EMA after each step in closed form: every value weighs (1 - d) of its step times all later d."""
    decays = [min(decay, (1 + step) / (10 + step)) for step in range(1, len(values) + 1)]
    results = []
    for end in range(1, len(values) + 1):
        weights = [(1 - decays[i]) * math.prod(decays[i + 1 : end]) for i in range(end)]
        assert sum(weights) + math.prod(decays[:end]) == pytest.approx(1)
        results.append(start * math.prod(decays[:end]) + sum(w * v for w, v in zip(weights, values, strict=False)))
    return results


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.8, 0.997])
def test_ema_equals_its_closed_form(decay: float) -> None:
    """Early steps weigh more, later ones by EMA_DECAY; the decay 0 gives the latest weights."""
    model, averager = small(EMA_DECAY=decay)
    start = model.banks["out"].detach().double()
    values = history(model, averager, 25, lambda _: 1.0)
    expected = averages_over_time(start, values, decay)[-1]
    torch.testing.assert_close(averager.weights()["banks.out"].double(), expected, rtol=1e-4, atol=1e-5)


def test_ema_reaches_its_decay_in_long_runs() -> None:
    """From step 10 / (1 - d) on, one step moves the average by 1 - EMA_DECAY, no more and no less."""
    model, averager = small(EMA_DECAY=0.9)
    before = averager.weights()["banks.out"].clone()
    with torch.no_grad():
        model.banks["out"].add_(1.0)
    averager.update(1000, 1.0)
    torch.testing.assert_close(averager.weights()["banks.out"], before + 0.1)


@pytest.mark.parametrize("over_ema", [0, 1])
def test_swa_is_the_mean_of_its_snapshots(over_ema: int) -> None:
    """Snapshots every SWA_EVERY steps once the rate is below SWA_START_FRAC, of the weights or of their EMA."""
    model, averager = small(EMA_ENABLED=over_ema, EMA_DECAY=0.7, SWA_ENABLED=1, SWA_EVERY=5, SWA_START_FRAC=0.5)
    start = model.banks["out"].detach().double()
    values = history(model, averager, 20, lambda step: 1 - step / 20)
    source = averages_over_time(start, values, 0.7) if over_ema else values
    expected = torch.stack([source[step - 1] for step in (15, 20)]).mean(0)  # the scale at step 10 is 0.5 itself
    torch.testing.assert_close(averager.weights()["banks.out"].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("over_ema", [0, 1])
@pytest.mark.parametrize(("steps", "window"), [(20, (12, 16, 20)), (11, (4, 8)), (15, (4, 8, 12))])
def test_lawa_is_the_mean_of_the_latest_snapshots(over_ema: int, steps: int, window: tuple[int, ...]) -> None:
    """LAWA_K snapshots LAWA_FREQ steps apart, older ones forgotten."""
    model, averager = small(EMA_ENABLED=over_ema, EMA_DECAY=0.7, LAWA_ENABLED=1, LAWA_K=3, LAWA_FREQ=4)
    start = model.banks["out"].detach().double()
    values = history(model, averager, steps, lambda _: 1.0)
    source = averages_over_time(start, values, 0.7) if over_ema else values
    expected = torch.stack([source[step - 1] for step in window]).mean(0)
    torch.testing.assert_close(averager.weights()["banks.out"].double(), expected, rtol=1e-4, atol=1e-5)
    assert len(averager.snapshots) == len(window)


@pytest.mark.parametrize(
    ("variables", "copies", "active"),
    [({"EMA_ENABLED": 0}, 0, set()), ({}, 1, {"ema"}),
     ({"EMA_ENABLED": 0, "SWA_ENABLED": 1, "SWA_EVERY": 2}, 1, {"swa"}),
     ({"SWA_ENABLED": 1, "SWA_EVERY": 2}, 2, {"ema", "swa"}),
     ({"EMA_ENABLED": 0, "LAWA_ENABLED": 1, "LAWA_K": 3, "LAWA_FREQ": 1}, 3, {"lawa"}),
     ({"LAWA_ENABLED": 1, "LAWA_K": 2, "LAWA_FREQ": 1}, 3, {"ema", "lawa"}),
     ({"SWA_ENABLED": 1, "SWA_EVERY": 50}, 1, {"ema"}), ({"LAWA_ENABLED": 1, "LAWA_FREQ": 50}, 1, {"ema"}),
     ({"SWA_ENABLED": 1, "SWA_EVERY": 1, "SWA_START_FRAC": 0}, 1, {"ema"})],
)  # fmt: skip
def test_only_what_is_chosen_holds_memory_and_reports_itself(
    variables: dict[str, Any], copies: int, active: set[str]
) -> None:
    """Copies of the model that are held after 6 steps, and which averages have taken anything in."""
    model, averager = small(**variables)
    history(model, averager, 6, lambda _: 0.1)
    held = [*([averager.ema] if averager.ema else []), *averager.snapshots]
    assert len(held) == copies and averager.active() == active
    assert all(len(tensors) == len(list(model.parameters())) for tensors in held)


def test_before_its_first_snapshot_an_average_gives_the_weights() -> None:
    """SWA that never started exports the live weights (or the EMA), not zeros."""
    model, averager = small(EMA_ENABLED=0, SWA_ENABLED=1)
    values = history(model, averager, 6, lambda _: 1.0)
    assert torch.equal(averager.weights()["banks.out"].double(), values[-1]) and averager.active() == set()


def test_averages_name_every_parameter_and_load_back() -> None:
    """Exported weights are a complete state of the model; taking them does not change the live weights."""
    model, averager = small(EMA_DECAY=0.5)
    values = history(model, averager, 3, lambda _: 1.0)
    weights = averager.weights()
    assert set(weights) == set(model.state_dict()) and torch.equal(model.banks["out"].detach().double(), values[-1])
    model.load(weights)
    assert torch.equal(model.banks["out"].detach(), weights["banks.out"])


# --- the clock ------------------------------------------------------------------------------------


def test_steps_that_the_device_has_not_made_yet_count(run: t.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that runs four steps ahead of its device ends within the clock all the same."""
    waiting: list[int] = []

    def synchronize(_: torch.device) -> None:
        time.sleep(0.1 * len(waiting))
        waiting.clear()

    def step(_: t.Trainer, number: int, *__: Any) -> Tensor:
        waiting.append(number)
        if len(waiting) > 4:
            time.sleep(0.1)
            waiting.pop()
        return torch.ones(())

    limits = {"max_wallclock_seconds": 3.0, "gptq_reserve_seconds": 0.0, "iterations": 100_000, "train_log_every": 1000}
    run = replace(run, cfg=replace(run.cfg, **limits))
    trainer = t.Trainer(run, t.build_model(run, run.cfg, 1))
    monkeypatch.setattr(t, "synchronize", synchronize)
    monkeypatch.setattr(t.Trainer, "step", step)
    t.train(run, trainer, t.load_validation(run))
    spent = sum(seconds for _, phase, seconds in run.ledger if phase == "steps")
    assert 2.7 < spent < 3.2, "not what four steps more would take (3.35 s); a busy machine sleeps longer"


def test_what_is_exported_is_the_average(run: t.Runtime) -> None:
    """After training and from the weights file, which holds the last weights beside it; to the last bit."""
    trainer = t.Trainer(run, t.build_model(run, run.cfg, 1))
    t.train(run, trainer, t.load_validation(run))
    trained, saved = trainer.model.state_dict(), torch.load(run.cfg.weights_file, weights_only=True)
    assert trained.keys() == saved["average"].keys() == saved["raw"].keys()
    assert all(torch.equal(tensor, saved["average"][name]) for name, tensor in trained.items())
    assert not torch.equal(saved["raw"]["banks.up"], saved["average"]["banks.up"])
