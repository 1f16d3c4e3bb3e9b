"""CLIP_POLICY=fisher: grid steps by what an error costs, so that bytes go where the loss needs them."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_env, tiny_model

import train_gpt as t

FISHER = {"CLIP_POLICY": "fisher", "MATRIX_BITS": 8, "LATE_QAT_THRESHOLD": 0}


@pytest.fixture
def trainer(run: t.Runtime) -> t.Trainer:
    """A randomized tiny model under the policy, with training data."""
    model = tiny_model(**FISHER)
    data = {"data_path": run.cfg.data_path, "tokenizer_path": run.cfg.tokenizer_path}
    return t.Trainer(t.replace(run, cfg=t.replace(model.cfg, **data)), model)


def fisher_by_hand(trainer: t.Trainer, numbers: range) -> dict[str, torch.Tensor]:
    """Sum over tokens of the squared gradient of each one's loss, token by token, averaged over whole tensors."""
    model, total = trainer.model, {}
    for number in numbers:
        inputs, targets = trainer.loader.fetch(number)
        losses = model.nll(inputs[:1], targets[:1], model.weights(False), model.order).flatten()
        for loss in losses:
            gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
            for (name, _), g in zip(model.named_parameters(), gradients, strict=True):
                total[name] = total.get(name, 0.0) + (g.square().mean().item() if g is not None else 0.0)
    return total


def test_one_backward_pass_estimates_the_sum_of_squares(trainer: t.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 sequences of 32 tokens: banks and embedding within a tenth, with the model left without gradients."""
    fetch = trainer.loader.fetch
    monkeypatch.setattr(trainer.loader, "fetch", lambda number: tuple(side[:1] for side in fetch(number)))
    squares = t.collect_squares(trainer.run, trainer, 3)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    exact = fisher_by_hand(trainer, range(3, 3 + t.FISHER_BATCHES))
    for name in ("qkv", "out", "up", "down"):
        assert squares[name].mean().item() == pytest.approx(exact[f"banks.{name}"], rel=0.15)
    assert squares["tok_emb"].mean().item() == pytest.approx(exact["rest.tok_emb"], rel=0.15)
    assert squares["qkv"].shape == (4, 64) and squares["tok_emb"].shape == (1, 512)


def test_steps_make_every_matrix_equally_dear(trainer: t.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """F s^2 is one number over all matrices; the geometric mean of s is that of the rows' standard deviations."""
    squares = t.collect_squares(trainer.run, trainer, 3)
    monkeypatch.setattr(t, "collect_squares", lambda *_: squares)
    units = t.fisher_units(trainer.run, trainer, 3)
    jobs, prices, logs = t.quant_jobs(trainer.model, units=units), [], []
    for job in jobs:
        rows = [n for spec in trainer.model.specs if spec.name == job.name for _, n in spec.roles] or job.tensor.shape[1]
        pairs = zip(squares[job.name].split(rows, dim=1), job.unit.split(rows, dim=1), strict=True)
        prices += [(f.mean(1) * s[:, :1, 0].square().squeeze(1)).flatten() for f, s in pairs]
        logs.append((job.unit / job.tensor.std(-1, correction=0, keepdim=True)).log().expand_as(job.tensor).flatten())
    prices = torch.cat(prices)
    torch.testing.assert_close(prices, prices[0].expand_as(prices), rtol=1e-4, atol=0)
    assert torch.cat(logs).mean().item() == pytest.approx(0, abs=1e-4)


def test_no_entry_is_clipped(trainer: t.Trainer) -> None:
    """Where the step would be too fine for eight bits the row's largest entry decides."""
    jobs = t.quant_jobs(trainer.model, units=t.fisher_units(trainer.run, trainer, 0))
    for k in (4.0, 40.0):
        for job in jobs:
            scale = t.job_scale(trainer.run.cfg, job, {}, k)
            error = t.round_to_grid(job.tensor, scale, job.bits) * scale.unsqueeze(-1) - job.tensor
            assert (error.abs() <= 0.501 * scale.unsqueeze(-1)).all()
            assert (scale >= 0.999 * k * job.unit[..., 0] / 127).all()


def test_the_same_bytes_cost_less_loss(trainer: t.Trainer) -> None:
    """Rounded to equal entropy, the loss that is predicted for the errors is lower than under policy sigma."""
    cfg = trainer.run.cfg
    squares = t.collect_squares(trainer.run, trainer, 3)
    shaped, plain = t.quant_jobs(trainer.model, units=t.fisher_units(trainer.run, trainer, 3)), t.quant_jobs(trainer.model)

    def rounded(jobs: list[t.QuantJob], k: float) -> tuple[float, float]:
        size = cost = 0.0
        for job in jobs:
            scale = t.job_scale(cfg if job.unit is not None else t.replace(cfg, clip_policy="sigma"), job, {}, k)
            codes = t.round_to_grid(job.tensor, scale, job.bits)
            error = (codes * scale.unsqueeze(-1) - job.tensor).square()
            size, cost = size + t.entropy_bytes(codes), cost + float((error.mean(-1) * squares[job.name]).sum())
        return size, cost

    size, cost = rounded(plain, 40.0)
    fine, coarse = 4.0, 200.0
    for _ in range(30):
        middle = math.sqrt(fine * coarse)
        fine, coarse = (middle, coarse) if rounded(shaped, middle)[0] > size else (fine, middle)
    same_size, lower = rounded(shaped, coarse)
    assert same_size <= size and lower < 0.8 * cost


def test_a_run_chooses_the_steps_inside_the_clock(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass over gradients is in the training ledger, and another policy writes another artifact."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    env = tiny_env(**corpus, **FISHER, RUN_ID="fisher", MAX_WALLCLOCK_SECONDS=60)
    monkeypatch.setattr(t.os, "environ", env)
    t.main()
    log = (tmp_path / "logs/fisher.txt").read_text()
    assert re.search(r"^budget train: .* fisher:\d", log, re.MULTILINE)
    assert re.search(r"^final_int8_roundtrip_exact val_loss:\d", log, re.MULTILINE)
    again = {**env, "CLIP_POLICY": "sigma", "EXPORT_ONLY": "1", "WEIGHTS_PATH": "logs/fisher.weights.pt"}
    monkeypatch.setattr(t.os, "environ", {**again, "ARTIFACT_PATH": "logs/sigma.pgolf"})
    t.main()
    assert (tmp_path / "logs/sigma.pgolf").read_bytes() != (tmp_path / "logs/fisher.pgolf").read_bytes()


@pytest.mark.parametrize("changes", [{"MATRIX_BITS": 6}, {"EMBED_BITS": 7}, {"LATE_QAT_THRESHOLD": 0.1},
                                     {"QAT_ENABLED": 1, "MATRIX_CLIP_SIGMAS": 9}, {"POST_QAT_SECONDS": 1}])  # fmt: skip
def test_what_it_cannot_go_with_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(t.UserError, match="CLIP_POLICY=fisher"):
        tiny_config(**{**FISHER, **changes})
