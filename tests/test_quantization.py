"""GPTQ against naive references, clip policies, Hessians, one grid for QAT and export."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import codes_of, tiny_config, tiny_model, unscaled
from torch import Tensor
from torch.overrides import TorchFunctionMode

import train_gpt as t


def a_job(bits: tuple[int, ...] = (6, 6, 6), rows: int = 8, cols: int = 24, seed: int = 0) -> t.QuantSpec:
    """A job of as many layers as there are bit widths, rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(len(bits), rows, cols, generator=generator) * torch.logspace(-2, 0, rows)[:, None]
    widths = torch.tensor(bits)[:, None, None].expand(-1, rows, 1)
    return t.QuantSpec("up", tensor, [f"up.{i}" for i in range(len(bits))], widths, 0.0)


def correlated(layers: int = 3, cols: int = 24, seed: int = 1) -> Tensor:
    """Hessians (layers, cols, cols) of strongly correlated inputs whose columns differ in size, in random order."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(layers, cols, cols, generator=generator) + 2.0
    sizes = torch.logspace(-1, 1, cols)[torch.randperm(cols, generator=generator)]
    x = torch.randn(layers, 500, cols, generator=generator) @ mixing * sizes
    return x.mT @ x


def scales_of(job: t.QuantSpec, sigmas: float = 3.0) -> Tensor:
    """Coarse scales, so that rounding errors matter."""
    return t.row_scales(tiny_config(), job, {}, sigmas)


def one_layer(job: t.QuantSpec, layer: int) -> t.QuantSpec:
    return job._replace(
        tensor=job.tensor[layer : layer + 1], hessians=job.hessians[layer : layer + 1], bits=job.bits[layer : layer + 1]
    )


def hessian_error(job: t.QuantSpec, codes: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T) of each layer, (n,)."""
    difference = job.tensor.double() - codes.double() * scale.double().unsqueeze(-1)
    return torch.einsum("nrc,ncd,nrd->n", difference, hessian.double(), difference)


# GPTQ

BLOCKS = [1, 5, 24, 128]


@pytest.mark.parametrize("act_order", [0, 1])
@pytest.mark.parametrize("block", BLOCKS)
def test_gptq_with_white_inputs_is_rounding_to_nearest(act_order: int, block: int) -> None:
    """With H proportional to I there is nothing to compensate."""
    job, cfg = a_job((6, 5, 4)), tiny_config(GPTQ_ACT_ORDER=act_order, GPTQ_BLOCK_SIZE=block)
    scale = scales_of(job)
    codes = t.gptq_quantize(job, 7.0 * torch.eye(24).expand(3, -1, -1), scale, cfg)
    assert torch.equal(codes, t.round_to_grid(job.tensor.double(), scale.double(), job.bits))


@pytest.mark.parametrize("act_order", [0, 1])
@pytest.mark.parametrize("block", BLOCKS)
def test_gptq_beats_rounding_in_the_hessian_norm(act_order: int, block: int) -> None:
    """On correlated inputs the output error of every layer is well below that of rounding to nearest."""
    job, cfg = a_job((6, 5, 4)), tiny_config(GPTQ_ACT_ORDER=act_order, GPTQ_BLOCK_SIZE=block)
    hessian, scale = correlated(), scales_of(job, 6.0)
    codes = t.gptq_quantize(job, hessian, scale, cfg)
    nearest = t.round_to_grid(job.tensor.double(), scale.double(), job.bits)
    assert (hessian_error(job, codes, scale, hessian) < 0.75 * hessian_error(job, nearest, scale, hessian)).all()


def naive_gptq(w: Tensor, hessian: Tensor, scale: Tensor, bits: int, cfg: t.Config) -> Tensor:
    """Codes of one matrix: fix a column at a time, and let those left absorb its error by the inverse Hessian of
    the columns left (optimal brain surgeon), inverted anew for every column."""
    w, h = w.double().clone(), hessian.double()
    h = h + cfg.gptq_damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True).tolist() if cfg.gptq_act_order else list(range(len(h)))
    codes, top = torch.zeros_like(w), 2 ** (bits - 1)
    for place, column in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(h[left][:, left])
        codes[:, column] = (w[:, column] / scale.double()).round().clamp(-top, top - 1)
        error = w[:, column] - codes[:, column] * scale.double()
        w[:, left] -= error[:, None] * (inverse[0] / inverse[0, 0])[None]
    return codes


@pytest.mark.parametrize("act_order", [0, 1])
@pytest.mark.parametrize("block", BLOCKS)
def test_gptq_equals_the_naive_algorithm(act_order: int, block: int) -> None:
    """Code for code: factorization, order of columns, lazy blocks and clamping change nothing."""
    job, cfg = a_job((6, 5, 4)), tiny_config(GPTQ_ACT_ORDER=act_order, GPTQ_BLOCK_SIZE=block)
    hessian, scale = correlated(), scales_of(job)
    codes = t.gptq_quantize(job, hessian, scale, cfg)
    for layer, bits in enumerate((6, 5, 4)):
        assert torch.equal(codes[layer], naive_gptq(job.tensor[layer], hessian[layer], scale[layer], bits, cfg))


def test_layers_quantized_together_equal_layers_quantized_alone() -> None:
    job, cfg, hessian = a_job((6, 5, 8)), tiny_config(), correlated()
    scale = scales_of(job)
    together = t.gptq_quantize(job, hessian, scale, cfg)
    for i in range(3):
        alone = t.gptq_quantize(one_layer(job, i), hessian[i : i + 1], scale[i : i + 1], cfg)
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("act_order", [0, 1])
def test_columns_without_input_are_coded_as_zero(act_order: int) -> None:
    """They cost nothing, disturb no other column, and may differ between the layers of a job."""
    job, cfg, hessian = a_job(), tiny_config(GPTQ_ACT_ORDER=act_order), correlated()
    for layer, column in [(0, 3), (0, 23), (2, 0)]:
        hessian[layer, column] = hessian[layer, :, column] = 0.0
    codes = t.gptq_quantize(job, hessian, scales_of(job), cfg)
    assert (codes[0, :, [3, 23]] == 0).all() and (codes[2, :, 0] == 0).all()
    assert (codes[1] != 0).any(0).all()
    empty = t.gptq_quantize(job, torch.zeros_like(hessian), scales_of(job), cfg)
    assert (empty == 0).all()


@pytest.mark.parametrize("damp", [0.0, 1e-12, 0.01])
def test_singular_hessians_are_damped_until_they_factor(damp: float) -> None:
    """Rank one, and rank zero beside it: the codes are finite, on the grid, and no worse than rounding."""
    job, cfg = a_job(), tiny_config(GPTQ_DAMP=damp)
    x = torch.randn(3, 1, 24, generator=torch.Generator().manual_seed(0))
    hessian, scale = x.mT @ x, scales_of(job)
    codes = t.gptq_quantize(job, hessian, scale, cfg)
    assert torch.isfinite(codes).all() and codes.min() >= -32 and codes.max() <= 31
    nearest = t.round_to_grid(job.tensor.double(), scale.double(), job.bits)
    assert hessian_error(job, codes, scale, hessian).sum() < hessian_error(job, nearest, scale, hessian).sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    job, hessian = a_job(), correlated()
    hessian[1, 2, 2] = bad
    with pytest.raises(t.UserError, match=r"(?i)hessian") as caught:
        t.quantize(tiny_config(), job, dict(zip(job.hessians, hessian, strict=True)), 3.0)
    assert "up" in str(caught.value).split() or "up.1" in str(caught.value), "the message does not say which one"


def test_only_observed_matrices_go_through_gptq() -> None:
    """Embedding tables have no inputs and are rounded to nearest; GPTQ_ENABLED=0 rounds everything."""
    job, hessian = a_job(), correlated()
    named = dict(zip(job.hessians, hessian, strict=True))
    nearest = t.round_to_grid(job.tensor, scales_of(job), job.bits).to(torch.int8)
    for cfg, hessians in [(tiny_config(), {}), (tiny_config(GPTQ_ENABLED=0), named)]:
        assert torch.equal(t.quantize(cfg, job, hessians, 3.0).codes, nearest)
    assert not torch.equal(t.quantize(tiny_config(), job, named, 3.0).codes, nearest)


# The grid and its clip


def test_scale_of_policy_sigma_is_k_standard_deviations() -> None:
    job = a_job((6, 5, 8))
    scale = t.row_scales(tiny_config(CLIP_POLICY="sigma"), job, {}, 4.5)
    for layer, bits in enumerate((6, 5, 8)):
        expected = 4.5 * np.std(job.tensor[layer].numpy(), axis=1) / (2 ** (bits - 1) - 1)
        np.testing.assert_allclose(scale[layer].numpy(), expected, rtol=1e-3)
    own = t.row_scales(tiny_config(), job._replace(sigmas=9.0), {}, 4.5)  # embeddings bring their own k
    torch.testing.assert_close(own, 2 * scale, rtol=2e-3, atol=0)


def test_scale_of_policy_amax_is_the_largest_entry() -> None:
    job = a_job((6, 5, 8))
    scale = t.row_scales(tiny_config(CLIP_POLICY="amax"), job, {}, 4.5)
    for layer, bits in enumerate((6, 5, 8)):
        expected = np.abs(job.tensor[layer].numpy()).max(1) / (2 ** (bits - 1) - 1)
        np.testing.assert_allclose(scale[layer].numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_unclipped_values_move_by_half_a_step_at_most(bits: int) -> None:
    job, cfg = a_job((bits,) * 3), tiny_config(CLIP_POLICY="amax", GPTQ_ENABLED=0)
    coded = t.quantize(cfg, job, {}, 0.0)
    step = coded.scale.float().unsqueeze(-1)
    assert ((coded.dequantize() - job.tensor).abs() <= 0.5005 * step + 1e-12).all()
    assert coded.codes.unique().numel() > 2 ** (bits - 1)  # and the grid is used, not only its middle


@pytest.mark.parametrize("policy", ["sigma", "amax", "search"])
def test_codes_stay_in_the_range_of_their_layers_bits(policy: str) -> None:
    """Layers of one job with 6, 5 and 3 bits, a clip that cuts: nothing leaves [-2^(b-1), 2^(b-1) - 1]."""
    bits = (6, 5, 3)
    job, hessian = a_job(bits), correlated()
    named = dict(zip(job.hessians, hessian, strict=True))
    coded = t.quantize(tiny_config(CLIP_POLICY=policy), job, named, 1.5)
    for codes, width in zip(coded.codes, bits, strict=True):
        assert codes.min() >= -(2 ** (width - 1)) and codes.max() <= 2 ** (width - 1) - 1
        assert codes.abs().max() >= 2 ** (width - 1) - 1


def diagonal_error(job: t.QuantSpec, scale: Tensor, hessian: Tensor) -> Tensor:
    """Squared rounding error of each row, weighted by the Hessian's diagonal, (n, rows)."""
    rounded = t.round_to_grid(job.tensor, scale, job.bits) * scale.unsqueeze(-1)
    return ((rounded - job.tensor).square() * hessian.diagonal(dim1=1, dim2=2).unsqueeze(1)).sum(-1)


@pytest.mark.parametrize("bits", [(4, 4, 4), (6, 5, 4)])
def test_searched_clip_is_never_worse_than_the_largest_entry(bits: tuple[int, ...]) -> None:
    """Row by row in the norm of the Hessian's diagonal, and better for rows with outliers where inputs are small."""
    job, hessian = a_job(bits, cols=2048), torch.diag_embed(torch.rand(3, 2048) + 0.1)
    job.tensor[:, ::2, 0] *= 30  # outliers where the input is nothing
    hessian[:, 0, 0] = 1e-6
    named = dict(zip(job.hessians, hessian, strict=True))
    amax = t.row_scales(tiny_config(CLIP_POLICY="amax"), job, named, 0.0)
    searched = t.row_scales(tiny_config(CLIP_POLICY="search"), job, named, 0.0)
    before, after = diagonal_error(job, amax, hessian), diagonal_error(job, searched, hessian)
    assert (after <= before).all()
    assert (after[:, ::2] < 0.5 * before[:, ::2]).all()


def test_rows_of_zeros_have_a_finite_scale() -> None:
    job = a_job()
    job.tensor[:, 2] = 0.0
    for policy in ("sigma", "amax", "search"):
        coded = t.quantize(tiny_config(CLIP_POLICY=policy), job, {}, 3.0)
        assert torch.isfinite(coded.dequantize()).all() and (coded.codes[:, 2] == 0).all()


# QAT and export


@pytest.mark.parametrize("policy", ["sigma", "amax"])
@pytest.mark.parametrize("bits", [5, 6, 8])
def test_late_qat_rounds_on_the_grid_of_the_export(policy: str, bits: int) -> None:
    """The weights of the forward pass under fake_quant equal the banks that the export dequantizes."""
    model = tiny_model(CLIP_POLICY=policy, MATRIX_BITS=bits, GPTQ_ENABLED=0)
    model.clip_sigmas.fill_(3.5)
    trained_on = unscaled(model, model.weights(fake_quant=True))
    coded = codes_of(model.cfg, t.quant_specs(model), {}, 3.5)
    for name, bank in model.banks.items():
        torch.testing.assert_close(trained_on[name], coded[name].dequantize(), rtol=0, atol=1e-6)
        assert not torch.allclose(trained_on[name], bank, atol=1e-4)


def test_the_gradient_passes_the_grid_unchanged() -> None:
    w = torch.randn(2, 4, 8, requires_grad=True)
    weight = torch.randn(2, 4, 8)
    (t.fake_quantize(w, 4, "sigma", 2.0) * weight).sum().backward()
    assert torch.equal(w.grad, weight)


def test_training_on_the_grid_from_the_start_needs_its_clip() -> None:
    """A clip of 0 stands for "what fills the limit", which nobody knows at step 0: it would round all banks to 0."""
    with pytest.raises(t.UserError, match="QAT_ENABLED=1"):
        tiny_config(QAT_ENABLED=1, MATRIX_CLIP_SIGMAS=0)
    assert tiny_config(QAT_ENABLED=1, CLIP_POLICY="amax").qat_enabled


@pytest.mark.parametrize("changes", [
    {"QAT_ENABLED": 1, "MATRIX_CLIP_SIGMAS": 5}, {"QAT_ENABLED": 1, "CLIP_POLICY": "amax"},
    {"LATE_QAT_THRESHOLD": 1, "WARMDOWN_FRAC": 1, "MIN_LR": 0.9},
])  # fmt: skip
def test_the_steps_of_qat_see_banks_on_a_sane_grid(run: t.Runtime, changes: dict[str, Any]) -> None:
    """In the training loop itself, clip left to the export or not: rounded, but by a few percent, not to nothing."""
    paths = {"DATA_PATH": run.cfg.data_path, "TOKENIZER_PATH": run.cfg.tokenizer_path}
    run = replace(run, cfg=tiny_config(**paths, ITERATIONS=2, WARMUP_STEPS=0, **changes))
    model = t.GPT(run.cfg, 1, t.PLAIN_ATTENTION, torch.device("cpu"))
    trainer, errors = t.Trainer(run, model), []
    plain_step = trainer.step

    def step(number: int, plan: t.StepPlan) -> Tensor:
        up, phase = model.banks["up"].detach(), t.phases(run.cfg)[plan.phase]
        errors.append(((model.weights(phase.fake_quant)["up"] - up).norm() / up.norm()).item())
        return plain_step(number, plan)

    trainer.step = step
    t.train(run, trainer, t.load_validation(run))
    assert len(errors) == 2 and 0.005 < errors[-1] < 0.2, errors


# Sizes


@pytest.mark.parametrize("shape", [(1, 3, 5), (4, 16, 32), (2, 1, 1)])
def test_entropy_of_codes_equals_that_of_numpy(shape: tuple[int, ...]) -> None:
    """One distribution for all rows of about one size, in whatever layer or tensor; the codes span all of int8."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.logspace(-2, 2, shape[1])[:, None]
    tensors = [(torch.randn(shape, generator=generator) * sizes).round().clamp(-128, 127).to(torch.int8)] * 2
    rows, bits = np.concatenate([tensor.flatten(0, 1).numpy() for tensor in tensors]), 0.0
    classes = np.concatenate([t.row_classes(tensor).flatten().numpy() for tensor in tensors])
    for number in np.unique(classes):
        _, counts = np.unique(rows[classes == number], return_counts=True)
        bits -= (counts * np.log2(counts / counts.sum())).sum()
    assert t.entropy_bytes(*tensors) == pytest.approx(bits / 8, rel=1e-9, abs=1e-9)


def test_rows_of_a_class_differ_by_less_than_a_quarter_octave() -> None:
    codes = (torch.randn(1, 200, 64) * torch.logspace(-2, 1.5, 200)[:, None]).round().to(torch.int8)
    codes[0, :3] = torch.tensor([0, 127, -128], dtype=torch.int8)[:, None]  # the least and the greatest
    sizes, classes = codes[0].float().square().mean(-1).sqrt(), t.row_classes(codes)[0]
    assert classes.max() < 64 and classes[0] == classes.min() == 0
    for number in classes.unique():
        own = sizes[(classes == number) & (sizes > 0)]
        assert not len(own) or own.max() <= 2**0.25 * own.min() * 1.001


def estimated_bytes(model: t.GPT, sigmas: float) -> float:
    """Code, entropy of the rounded codes, two bytes per scale and kept value."""
    coded = codes_of(replace(model.cfg, gptq_enabled=False), t.quant_specs(model), {}, sigmas)
    streams = t.entropy_bytes(*(c.codes for c in coded.values())) + 2 * sum(c.scale.numel() for c in coded.values())
    return t.code_bytes() + streams + 2 * sum(v.numel() for v in t.passthrough(model).values())


def test_fitted_clip_grows_as_the_limit_shrinks_and_lands_within_it() -> None:
    """The estimate fills 99.5% of what is left for the artifact, for every limit that the range of clips reaches."""
    model = tiny_model()
    widest, finest = (estimated_bytes(model, k) for k in reversed(t.SIGMAS_RANGE))
    limits = np.linspace(widest + 1000, finest - 1000, 6).round().astype(int)
    found = []
    for limit in limits:
        cfg = tiny_config(TARGET_BYTES=limit)
        sigmas = t.fit_clip_sigmas(cfg, t.quant_specs(model), t.passthrough(model))
        assert 0.995 * limit <= estimated_bytes(model, sigmas) <= limit
        found.append(sigmas)
    assert all(later < earlier for earlier, later in zip(found, found[1:], strict=False)), found
    assert t.SIGMAS_RANGE[0] <= found[-1] < found[0] <= t.SIGMAS_RANGE[1]


def test_a_size_larger_than_estimated_widens_the_clip() -> None:
    model = tiny_model()
    cfg = tiny_config(TARGET_BYTES=round(estimated_bytes(model, 8.0)))
    arguments = cfg, t.quant_specs(model), t.passthrough(model)
    assert t.fit_clip_sigmas(*arguments, ratio=1.05) > t.fit_clip_sigmas(*arguments) > t.fit_clip_sigmas(*arguments, ratio=0.95)


# Hessians and jobs


class LinearInputs(TorchFunctionMode):
    """Every call of F.linear: address of its weight and its input, independent of the model's observer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self.calls.append((args[1].data_ptr(), args[0].detach().double().flatten(0, -2)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"VALUE_RESIDUAL": 1, "GATED_ATTN_ENABLED": 1, "MLP_ACTIVATION": "asqu"}])
def test_hessians_are_the_second_moments_of_every_matrix(run: t.Runtime, changes: dict[str, Any]) -> None:
    """Sums of X^T X over two batches, for each layer of each bank, head and projections, from a plain forward pass."""
    model = tiny_model(**changes)
    trainer = t.Trainer(run, model)
    hessians = t.collect_hessians(run, trainer, 5, 2)
    weights = model.weights(False)
    owners = {weights[s.name][i].data_ptr(): f"{s.name}.{i}" for s in model.specs for i in range(4)}
    owners |= {model.rest["tok_emb"].data_ptr(): "head"}
    owners |= {model.rest[name].data_ptr(): name for name in ("bigram_proj", "ve_proj")}
    with torch.no_grad(), LinearInputs() as seen:
        for number in (5, 6):
            model.nll(*trainer.loader.batch(number), weights, (0, 1, 2, 3))
    expected: dict[str, Tensor] = {}
    for address, x in seen.calls:
        if name := owners.get(address):  # gates are no matrices of the artifact
            expected[name] = expected.get(name, 0) + x.T @ x
    assert hessians.keys() == expected.keys() and len(expected) == 4 * 4 + 3
    for name, moment in expected.items():
        torch.testing.assert_close(hessians[name].double(), moment, rtol=1e-4, atol=1e-4 * moment.max().item())


def test_every_job_with_inputs_finds_its_hessians(run: t.Runtime) -> None:
    """All banks, the tied head and both projections go through GPTQ; only pure tables have no inputs."""
    model = tiny_model()
    hessians = t.collect_hessians(run, t.Trainer(run, model), 0, 1)
    jobs = t.quant_specs(model)
    without = {job.name for job in jobs if not all(name in hessians for name in job.hessians)}
    assert without == {"bigram_table", "ve_table"}
    pairs = [(job.tensor.shape[2], hessians[name]) for job in jobs for name in job.hessians if name in hessians]
    assert all(hessian.shape == (cols, cols) for cols, hessian in pairs)
    untied = tiny_model(TIE_EMBEDDINGS=0)
    inputs = {job.name: job.hessians for job in t.quant_specs(untied)}
    assert inputs["lm_head"] == ["head"] and inputs["tok_emb"] == ["tok_emb"]


def test_bits_can_differ_by_layer() -> None:
    jobs = {job.name: job for job in t.quant_specs(tiny_model(EMBED_BITS=7), {2: 5})}
    for name in ("qkv", "out", "up", "down"):
        assert [int(b.unique()) for b in jobs[name].bits] == [6, 6, 5, 6]
    assert jobs["tok_emb"].bits.unique().tolist() == [7]


@pytest.mark.parametrize("changes", [
    {}, {"MLP_ACTIVATION": "asqu", "VALUE_RESIDUAL": 1, "GATED_ATTN_ENABLED": 1, "TIE_EMBEDDINGS": 0},
])  # fmt: skip
def test_control_parameters_are_only_rounded_to_half(changes: dict[str, Any]) -> None:
    """Every parameter is coded or kept, never both; kept ones (ASQU's factors above all) are never quantized."""
    model = tiny_model(**changes)
    kept, jobs = t.passthrough(model), {job.name for job in t.quant_specs(model)}
    assert jobs.isdisjoint(kept) and jobs | set(kept) == set(model.banks) | set(model.rest)
    assert all(torch.equal(value, model.rest[name].detach().half()) for name, value in kept.items())
    assert ("asqu_beta" in kept) == (model.cfg.mlp_activation == "asqu")
    assert {"attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear_gate"} <= set(kept)


# Costs of rows


def test_costs_are_squared_gradients_along_the_errors_of_gptq(run: t.Runtime) -> None:
    """With white inputs those directions are the columns themselves; a table without inputs has no cost."""
    model = tiny_model(CLIP_POLICY="cost")
    costly = replace(run, cfg=replace(run.cfg, clip_policy="cost"))
    trainer = t.Trainer(costly, model)
    jobs = [job for job in t.quant_specs(model) if job.name not in ("bigram_table", "ve_table")]
    white = {name: torch.eye(job.tensor.shape[2]) for job in jobs for name in job.hessians}
    costs, expected = t.row_costs(costly, trainer, 3, white), dict.fromkeys((job.name for job in jobs), 0.0)
    for number in range(3, 3 + t.COST_BATCHES):
        model.zero_grad()
        trainer.gradients(t.Phase(model.order, False, run.cfg.train_seq_len), *trainer.loader.batch(number))
        for job in jobs:
            parameter = (model.banks if job.name in model.banks else model.rest)[job.name]
            expected[job.name] += parameter.grad.view(job.tensor.shape).square().mean(-1)
    assert costs.keys() == {f"cost.{name}" for name in expected}
    for name, cost in expected.items():
        torch.testing.assert_close(costs[f"cost.{name}"], cost, rtol=1e-4, atol=1e-12)
    assert t.row_costs(run, trainer, 3, white) == {}, "other clip policies do not ask"


def test_gptq_errors_cost_what_the_quadratic_form_says() -> None:
    """For random gradients g, the mean of (error . g)^2 over roundings is step^2 / 12 times the cost times columns."""
    hessian, generator = correlated(1), torch.Generator().manual_seed(3)
    job = t.QuantSpec("up", torch.randn(1, 20_000, 24, generator=generator), ["up.0"], torch.full((1, 20_000, 1), 8), 0.0)
    scale = torch.full((1, 20_000), 0.25)
    codes = t.gptq_quantize(job, hessian, scale, cfg := tiny_config(GPTQ_ACT_ORDER=0))
    gradient = torch.randn(24, generator=generator).double()
    factor = t.hessian_inv_cholesky(hessian.double(), cfg.gptq_damp)[0]
    cost = (gradient @ (factor / factor.diagonal()[:, None]).T).square().mean()
    actual = ((codes * 0.25 - job.tensor)[0].double() @ gradient).square().mean()
    assert actual == pytest.approx((0.25**2 / 12 * cost * 24).item(), rel=0.05)


def test_under_policy_cost_a_step_costs_the_same_in_every_row() -> None:
    """Up to the rounding of steps and to rows that need a coarser one for their largest entry to have a code."""
    model = tiny_model(CLIP_POLICY="cost", MATRIX_BITS=8)
    generator, costs = torch.Generator().manual_seed(4), {}
    for job in t.quant_specs(model):
        costs[f"cost.{job.name}"] = torch.rand(job.tensor.shape[:2], generator=generator) + 0.5
    spent = []
    for job in t.quant_specs(model, None, costs):
        scale, cost = t.row_scales(model.cfg, job, {}, 30.0), costs[f"cost.{job.name}"]
        assert (scale.half().view(torch.int16) & 127 == 0).all(), "a byte of the stored scale is not 0"
        codes = torch.round(job.tensor / scale.unsqueeze(-1))
        assert codes.min() >= -128 and codes.max() <= 127
        free = 30.0 * job.unit > 1.2 * t.row_scale(job.tensor, job.bits, "amax", 0.0)
        spent.append((scale.square() * (cost + cost.mean(-1, keepdim=True) / 32))[free].log2())
    spent = torch.cat(spent)
    assert len(spent) > 300 and spent.max() - spent.min() < 0.36  # twice an eighth of an octave, squared


def test_a_model_without_gradients_is_still_quantized() -> None:
    """As at the start, where matrices at zero hide those before them: costs of 0 give finite steps."""
    model = tiny_model(CLIP_POLICY="cost")
    costs = {f"cost.{job.name}": torch.zeros(job.tensor.shape[:2]) for job in t.quant_specs(model)}
    costs["cost.up"][0] = 1.0
    with torch.no_grad():
        model.banks["down"].zero_()
    for job in t.quant_specs(model, None, costs):
        assert t.quantize(model.cfg, job, {}, 9.0).dequantize().isfinite().all()


# Trellis


def test_without_correlations_the_trellis_finds_the_best_of_all_codes() -> None:
    """Against every combination of codes from -2 to 2 in five columns, in one block or in several paths' worth."""
    generator, cols = torch.Generator().manual_seed(5), 5
    job = t.QuantSpec("up", torch.randn(2, 20, cols, generator=generator), [], torch.full((2, 20, 1), 3), 0.0)
    scale, white = torch.full((2, 20), 0.9), torch.eye(cols).expand(2, -1, -1)
    codes = t.trellis_quantize(job, white, scale, tiny_config(GPTQ_DAMP=0)).to(torch.int8)
    every = torch.cartesian_prod(*[torch.arange(-3, 4)] * cols).to(torch.int8)
    values = 0.9 * t.trellis_values(every[None])[0]
    best = (job.tensor[:, :, None] - values).square().sum(-1).amin(-1)
    found = (job.tensor - 0.9 * t.trellis_values(codes)).square().sum(-1)
    assert (found <= best * 1.02 + 1e-6).float().mean() > 0.9 and found.mean() < 1.02 * best.mean()


@pytest.mark.parametrize("block", [16, 24, 128])
def test_the_trellis_beats_gptq_at_the_same_entropy(block: int) -> None:
    """Error in the Hessian norm times 4^bits, which is the same for all steps of a quantizer."""
    generator, hessian = torch.Generator().manual_seed(6), correlated(1, cols=96)
    job = t.QuantSpec("up", torch.randn(1, 512, 96, generator=generator), ["up.0"], torch.full((1, 512, 1), 8), 0.0)
    scale, cfg, figures = torch.full((1, 512), 0.4), tiny_config(GPTQ_BLOCK_SIZE=block), []
    for is_trellis in (False, True):
        job, method = job._replace(unit=scale / 4), replace(cfg, trellis=is_trellis)
        tensor = t.quantize(method, job, {"up.0": hessian[0]}, 4.0)
        error = (tensor.dequantize() - job.tensor).double()
        bits = 8 * t.entropy_bytes(tensor.codes) / tensor.codes.numel()
        figures.append((error @ hessian[0].double() * error).sum().item() * 4**bits)
    assert figures[1] < 0.93 * figures[0]


def test_trellis_codes_keep_to_their_bits_and_layers_to_themselves() -> None:
    job, cfg, hessian = a_job((3, 5, 8)), tiny_config(), correlated()
    scale = scales_of(job, 1.0)
    together = t.trellis_quantize(job, hessian, scale, cfg)
    for i, bits in enumerate((3, 5, 8)):
        alone = t.trellis_quantize(one_layer(job, i), hessian[i : i + 1], scale[i : i + 1], cfg)
        assert torch.equal(together[i], alone[0])
        assert together[i].abs().max() < 2 ** (bits - 1)
