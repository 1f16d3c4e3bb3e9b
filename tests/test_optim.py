"""Muon and Adam do what their formulas say, on one rank and on several, and their state restores bitwise."""

import math
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from conftest import tiny_config, tiny_env, tiny_model
from torch import Tensor

import train_gpt as t

ONE = t.Ranks(0, 1, torch.device("cpu"))
STEPS = 50
PLAN = t.StepPlan(1.0, 0.9, "train")
# No world of 2 or 3 ranks divides them. Without LN_SCALE, or with KEY_OFFSET, rounding of 50 steps grows until one weight
# crosses a border of QAT's grid.
FIVE_LAYERS = {"NUM_LAYERS": 5, "XSA_LAST_N": 5, "LN_SCALE": 1, "KEY_OFFSET": 0}
PLAIN_MUON = {"POLAR_EXPRESS": 0, "MUON_ROW_NORMALIZE": 0}


def random_gradients(model: t.GPT, seed: int, size: float = 1.0) -> dict[str, Tensor]:
    """Give every parameter a random gradient; returns copies by name."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def snapshot(model: t.GPT) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Orthogonalization


@pytest.mark.parametrize("shape", [(1, 24, 64), (3, 24, 64), (2, 96, 32), (5, 8, 40)])
@pytest.mark.parametrize(("polar", "low", "high"), [(False, 0.65, 1.25), (True, 0.8, 1.2)])
def test_orthogonalize_brings_singular_values_near_one(
    shape: tuple[int, int, int], polar: bool, low: float, high: float
) -> None:
    """Wide, tall and batched, from inputs of any size; the singular vectors stay those of the input."""
    coefficients = t.newton_schulz_coefficients(tiny_config(POLAR_EXPRESS=polar))
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, shape[0])[0]
    result = t.orthogonalize(matrices, coefficients)
    values = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape
    assert low < values.min() and values.max() < high
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ result @ vh.mT
    assert (rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
    assert rotated.diagonal(dim1=1, dim2=2).min() > low


@pytest.mark.parametrize("coefficients", [[t.QUINTIC] * 5, t.POLAR_EXPRESS], ids=["quintic", "polar express"])
def test_orthogonalize_keeps_the_zero_matrix_of_a_padded_layer_finite(coefficients: list) -> None:
    assert torch.equal(t.orthogonalize(torch.zeros(2, 4, 8), coefficients), torch.zeros(2, 4, 8))


@pytest.mark.parametrize("shape", [(2, 24, 64), (3, 64, 32)])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_leading_directions_keep_the_largest_singular_pairs(shape: tuple[int, int, int], share: float) -> None:
    """NuMuon: the result has their number of singular values near 1 and none besides, along the input's own vectors."""
    generator = torch.Generator().manual_seed(2)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    small = min(shape[1:])
    kept = -(-int(share * small) // 8) * 8
    values = torch.cat([torch.linspace(5, 3, kept), torch.linspace(0.3, 0.1, small - kept)])
    result = t.low_rank_orthogonalize(u * values @ vh, share, t.newton_schulz_coefficients(tiny_config(POLAR_EXPRESS=1)))
    found = torch.linalg.svdvals(result)
    assert 0.7 < found[:, :kept].min() and found[:, :kept].max() < 1.3 and found[:, kept:].max() < 0.02
    along = (u.mT @ result @ vh.mT).diagonal(dim1=1, dim2=2)
    assert along[:, :kept].min() > 0.7 and along[:, kept:].abs().max() < 0.02


def test_all_directions_are_plain_muon() -> None:
    matrices = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(t.low_rank_orthogonalize(matrices, 1.0, [t.QUINTIC] * 5), t.orthogonalize(matrices, [t.QUINTIC] * 5))


def test_muon_updates_have_the_rank_of_the_schedule() -> None:
    """The step of a bank at a share of 0.25 has a quarter of the directions; weight decay aside."""
    model = tiny_model(MUON_WD=0)
    optimizers, start = t.Optimizers(model.cfg, ONE, model), snapshot(model)
    random_gradients(model, 0)
    optimizers.step(t.StepPlan(1.0, 0.9, "train", 0.25))
    step = model.banks["up"].detach() - start["banks.up"]
    values = torch.linalg.svdvals(step)
    assert (values[:, 7] > 20 * values[:, 8]).all() and model.cfg.model_dim == 32


# One bank update against an independent reference, matrix by matrix


def reference_polar(matrix: Tensor, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """Newton-Schulz of one matrix in float64, from its definition."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def reference_muon(w: Tensor, grads: list[Tensor], lr: float, momentum: float, cfg: t.Config) -> Tensor:
    """One matrix after a Muon step per gradient: momentum, Nesterov, row norm, polar factor, decay, scaled step."""
    steps = cfg.muon_backend_steps
    coefficients = list(t.POLAR_EXPRESS[:steps]) if cfg.polar_express else [t.QUINTIC] * steps
    w, buffer = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for grad in grads:
        buffer = momentum * buffer + grad.double()
        update = grad.double() + momentum * buffer
        if cfg.muon_row_normalize:
            update = update / update.norm(dim=1, keepdim=True)
        scale = max(1.0, w.shape[0] / w.shape[1]) ** 0.5
        w = w * (1 - lr * cfg.muon_wd) - lr * scale * reference_polar(update, coefficients)
    return w


@pytest.mark.parametrize("changes", [
    {}, PLAIN_MUON, {**PLAIN_MUON, "POLAR_EXPRESS": 1}, {**PLAIN_MUON, "MUON_ROW_NORMALIZE": 1}, {"MUON_WD": 0.5},
    {"MUON_BACKEND_STEPS": 3}, {**PLAIN_MUON, "MUON_BACKEND_STEPS": 3}, {"NUM_KV_HEADS": 4, "MLP_MULT": 0.5},
    {"MUON_HEAD_GROUP": 2}, {"MUON_HEAD_GROUP": 1},
])  # fmt: skip
def test_muon_updates_every_matrix_as_the_reference_does(changes: dict[str, Any]) -> None:
    """Each of q, k, v, out, up and down of every layer, after three steps at half the learning rate; of q and k with
    MUON_HEAD_GROUP each group of heads by itself."""
    model = tiny_model(GRAD_CLIP_NORM=0, **changes)
    cfg, optimizers, start = model.cfg, t.Optimizers(model.cfg, ONE, model), snapshot(model)
    grads = []
    for seed in range(3):
        grads.append(random_gradients(model, seed))
        optimizers.step(t.StepPlan(0.5, 0.9, "train"))
    for spec in t.bank_specs(cfg):
        name = f"banks.{spec.name}"
        for layer in range(cfg.num_layers):
            grouped = cfg.muon_head_group * cfg.head_dim
            spans = [(a, b, grouped if grouped and role in ("attn.c_q", "attn.c_k") else b - a)
                     for role, a, b in spec.spans()]  # fmt: skip
            for a, b in ((first, first + rows) for a, b, rows in spans for first in range(a, b, rows)):
                expected = reference_muon(
                    start[name][layer, a:b], [g[name][layer, a:b] for g in grads], 0.5 * cfg.matrix_lr, 0.9, cfg
                )
                got = model.banks[spec.name][layer, a:b].double()
                torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_two_rails_are_two_averages_that_begin_as_one() -> None:
    """Three steps of plain momentum, then four of the mixture, against averages in float64 (modded-nanogpt PR #340)."""
    model, mu = tiny_model(GRAD_CLIP_NORM=0, MUON_WD=0, MUON_RAILS_AT=0.3), 0.9
    optimizers = t.Optimizers(model.cfg, ONE, model)
    fast = slow = torch.zeros_like(model.banks["up"][0], dtype=torch.float64)
    for seed in range(7):
        before, grad = model.banks["up"][0].detach().double().clone(), random_gradients(model, seed)["banks.up"][0]
        optimizers.step(t.StepPlan(1.0, mu, "train", two_rails=seed > 2))
        grad, decays = grad.double(), (0.85, 0.98) if seed > 2 else (mu, mu)
        fast, slow = (decay * rail + (1 - decay) * grad for decay, rail in zip(decays, (fast, slow), strict=True))
        update = (1 - mu) * grad + mu * (0.4385 * fast + 0.5615 * slow)
        direction = reference_polar(update / update.norm(dim=1, keepdim=True), list(t.POLAR_EXPRESS))
        scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
        expected = before - model.cfg.matrix_lr * scale * direction
        torch.testing.assert_close(model.banks["up"][0].double(), expected, rtol=0, atol=2e-6)
    assert not torch.allclose(fast, slow, atol=1e-2)


def test_a_second_rail_exists_only_where_it_is_used() -> None:
    for part, count in ((1, 1), (0.3, 2)):
        model = tiny_model(MUON_RAILS_AT=part)
        assert {len(rails) for rails in t.Optimizers(model.cfg, ONE, model).muon.state.values()} == {count}


def test_row_normalization_leaves_the_momentum_buffer_alone() -> None:
    """MuonEq-R normalizes the update: the buffer holds the plain momentum sum (PR #1418's fix)."""
    states = []
    for flag in (0, 1):
        model = tiny_model(GRAD_CLIP_NORM=0, MUON_ROW_NORMALIZE=flag)
        optimizers = t.Optimizers(model.cfg, ONE, model)
        for seed in range(2):
            random_gradients(model, seed)
            optimizers.step(PLAN)
        states.append((optimizers.muon.state, snapshot(model)))
    (plain, plain_weights), (normalized, weights) = states
    assert all(torch.equal(plain[name][0], normalized[name][0]) for name in plain)
    assert not torch.allclose(plain_weights["banks.up"], weights["banks.up"], atol=1e-4)  # and yet it acts


# Adam


def expected_groups(cfg: t.Config) -> dict[str, tuple[float, float]]:
    """Parameter -> (learning rate, weight decay), spelled out by name."""
    embed = (cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr, cfg.embed_wd)
    special = {"tok_emb": embed, "bigram_table": embed, "ve_table": embed, "lm_head": (cfg.head_lr, cfg.adam_wd),
               "asqu_beta": (cfg.asqu_lr, 0.0)}  # fmt: skip
    return {s.name: special.get(s.name, (cfg.scalar_lr, cfg.adam_wd)) for s in t.param_table(cfg)}


FEATURES = [
    {}, {"TIE_EMBEDDINGS": 0}, {"MLP_ACTIVATION": "asqu", "VALUE_RESIDUAL": 1, "GATED_ATTN_ENABLED": 1},
    {"BIGRAM_VOCAB_SIZE": 0, "VE_ENABLED": 0, "SMEAR_GATE_ENABLED": 0},
]  # fmt: skip
RATES = {"TIED_EMBED_LR": 0.01, "EMBED_LR": 0.02, "HEAD_LR": 0.003, "SCALAR_LR": 0.004, "ASQU_LR": 0.005,
         "ADAM_WD": 0.11, "EMBED_WD": 0.07}  # fmt: skip


@pytest.mark.parametrize("changes", FEATURES)
def test_adam_groups_hold_the_rate_and_decay_of_their_table(changes: dict[str, Any]) -> None:
    model = tiny_model(**RATES, **changes)
    groups = t.Optimizers(model.cfg, ONE, model).adam.param_groups
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = {id(model.rest[name]): values for name, values in expected_groups(model.cfg).items()}
    assert found == expected


@pytest.mark.parametrize("changes", FEATURES)
def test_adam_steps_equal_the_formula_on_clipped_gradients(changes: dict[str, Any]) -> None:
    """Two AdamW steps of every parameter outside the banks, from the definition, with learning-rate scale and clip."""
    model = tiny_model(GRAD_CLIP_NORM=0.3, **RATES, **changes)
    cfg, optimizers, values = model.cfg, t.Optimizers(model.cfg, ONE, model), snapshot(model)
    first = {name: torch.zeros_like(v) for name, v in values.items()}
    second = {name: torch.zeros_like(v) for name, v in values.items()}
    rates = expected_groups(cfg)
    for step, scale in enumerate((1.0, 0.25), 1):
        grads = random_gradients(model, step)
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        optimizers.step(PLAN._replace(lr_scale=scale))
        for name in rates:
            key, (lr, decay) = f"rest.{name}", rates[name]
            grad = grads[key] * (cfg.grad_clip_norm / norm)
            first[key] = cfg.beta1 * first[key] + (1 - cfg.beta1) * grad
            second[key] = cfg.beta2 * second[key] + (1 - cfg.beta2) * grad**2
            mean, square = first[key] / (1 - cfg.beta1**step), second[key] / (1 - cfg.beta2**step)
            moved = values[key] * (1 - lr * scale * decay)
            values[key] = moved - lr * scale * mean / (square.sqrt() + cfg.adam_eps)
            torch.testing.assert_close(model.rest[name].detach(), values[key], rtol=1e-4, atol=1e-5)


def test_a_parameter_that_no_table_names_is_refused() -> None:
    """MTP heads of a published script were in no optimizer: here that cannot start."""
    model = tiny_model()
    model.rest["orphan"] = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="no optimizer"):
        t.Optimizers(model.cfg, ONE, model)


# Clipping


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0])
def test_clip_factor_is_that_of_clip_grad_norm(size: float) -> None:
    """Over all parameters, banks included; small gradients pass unchanged."""
    model = tiny_model(GRAD_CLIP_NORM=0.3)
    optimizers = t.Optimizers(model.cfg, ONE, model)
    grads = random_gradients(model, 3, size)
    shards = [shard for shard, _ in optimizers.muon.launch().values()]
    factor = optimizers.clip_factor(optimizers.launch_adam()[0], shards)
    torch.nn.utils.clip_grad_norm_(list(model.parameters()), 0.3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name] * factor, parameter.grad, rtol=1e-5, atol=0)


def test_no_clipping_at_zero() -> None:
    model = tiny_model(GRAD_CLIP_NORM=0)
    random_gradients(model, 0, 100.0)
    optimizers = t.Optimizers(model.cfg, ONE, model)
    assert optimizers.clip_factor(optimizers.launch_adam()[0], [p.grad for p in model.banks.values()]) == 1.0


# Restoring


@pytest.mark.parametrize("rails_at", [1, 0.3])
def test_state_dict_restores_bitwise(rails_at: float) -> None:
    """Step, snapshot, k more steps, restore, the same step: bitwise the first result, weights and state."""
    model = tiny_model(MUON_RAILS_AT=rails_at)
    optimizers = t.Optimizers(model.cfg, ONE, model)
    trainer_like = {"model": model, "optimizers": optimizers}

    def state() -> dict[str, Any]:
        return {k: t.copy.deepcopy(v.state_dict()) for k, v in trainer_like.items()}

    def step(seed: int) -> None:
        random_gradients(model, seed)
        optimizers.step(t.StepPlan(0.7, 0.95, "train", two_rails=rails_at < 1 and seed > 0))

    step(0)
    saved = state()
    step(1)
    first = state()
    for seed in range(2, 6):
        step(seed)
    model.load(saved["model"])
    optimizers.load_state_dict(t.copy.deepcopy(saved["optimizers"]))
    step(1)
    pairs = list(zip(t.tensor_leaves(state()), t.tensor_leaves(first), strict=True))
    assert len(pairs) > 3 * len(list(model.banks))
    assert all(torch.equal(now, then) for now, then in pairs)


def test_warm_up_leaves_no_trace(run: t.Runtime) -> None:
    """From a state with momentum in it: warm-up runs every phase, then all tensors are bitwise what they were."""
    trainer = t.Trainer(run, tiny_model())
    trainer.step(0, PLAN)
    before = trainer.state()
    assert any(tensor.abs().sum() > 0 for tensor in t.tensor_leaves(before["optimizers"]["muon"]))
    seen = []
    plain_step = trainer.step
    trainer.step = lambda number, plan: seen.append(plan.phase) or plain_step(number, plan)
    t.warm_up(run, trainer)
    assert set(seen) == set(t.phases(run.cfg))
    pairs = zip(t.tensor_leaves(trainer.state()), t.tensor_leaves(before), strict=True)
    assert all(torch.equal(now, then) for now, then in pairs)


def test_restore_notices_state_that_it_does_not_cover(run: t.Runtime) -> None:
    """Parallel Muon's momentum outlived the restore in a published script; the assertion sees such a leak."""
    trainer = t.Trainer(run, tiny_model())
    before = trainer.state()
    trainer.step(0, PLAN)
    trainer.optimizers.load_state_dict = lambda state: None
    with pytest.raises(AssertionError, match="warm-up"):
        trainer.restore(before)


# Several ranks equal one


def run_rank(rank: int, world: int, port: int, folder: str, variables: dict[str, str]) -> None:
    """What one rank does: train, calibrate, score, restore, clip; its results go to folder/<world>.<rank>.pt."""
    os.chdir(folder)
    torch.set_num_threads(1)
    place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)}  # fmt: skip
    os.environ.update(place)
    with t.Runtime.start(t.Config.from_env({**variables, "RUN_ID": f"world{world}"}), place) as run:
        torch.save(train_and_score(run), Path(folder, f"{world}.{rank}.pt"))


def train_and_score(run: t.Runtime) -> dict[str, Any]:
    """Losses, parameters, Hessians and scores of a short run with both phases, and whether restoring is bitwise."""
    model = tiny_model(**FIVE_LAYERS)
    trainer = t.Trainer(run, model)
    model.clip_sigmas.fill_(6.0)
    plain, late = t.phases(run.cfg)
    t.warm_up(run, trainer)
    losses = []
    for step in range(STEPS):
        phase = late if step >= STEPS - 2 else plain
        plan = t.StepPlan(1 - step / (2 * STEPS), 0.9, phase, two_rails=step >= STEPS // 2)
        loss = trainer.step(step, plan)
        losses.append((run.ranks.all_reduce_sum_(loss.clone()) / run.ranks.world).item())
    parameters = snapshot(model)
    accum = trainer.loader.shape.accum
    hessians = t.collect_hessians(run, trainer, STEPS * accum, accum)  # of the batch after the last one
    validation = t.load_validation(run)
    scores = [t.evaluate(run, model, validation, stride)[:3] for stride in (32, 12)]
    return {"losses": losses, "parameters": parameters, "hessians": hessians, "scores": scores,
            "ttt": adapted_score(run, model, validation), "codes": shared_codes(run),
            "exported": export_hessians(run), "restored": restores_bitwise(trainer),
            "clip": clip_of_rank_gradients(run, trainer)}  # fmt: skip


def adapted_score(run: t.Runtime, model: t.GPT, validation: t.ValidationSet) -> float:
    """bpb of score-first test-time training; six sequences a step, so that 1, 2 and 3 ranks divide them."""
    settings = {"ttt_chunk_tokens": 1000, "ttt_epochs": 1, "ttt_batch_seqs": 6, "ttt_lr": 0.01, "eval_stride": 12}
    run = replace(run, cfg=replace(run.cfg, **settings))
    return t.evaluate_online(run, model, validation, t.TestTimeTrainer(run, model, validation), None)[0].bpb


def shared_codes(run: t.Runtime) -> dict[str, t.QuantizedTensor]:
    """Codes by GPTQ of a fixed model with fixed Hessians."""
    model, generator = tiny_model(**FIVE_LAYERS), torch.Generator().manual_seed(5)
    jobs, hessians = t.quant_specs(model), {}
    for job in jobs:
        for name in job.hessians:
            inputs = torch.randn(99, job.tensor.shape[2], generator=generator)
            hessians[name] = inputs.T @ inputs
    return {name: tuple(coded[:2]) for name, coded in t.quantize_tensors(run, jobs, hessians, 4.0).items()}


def export_hessians(run: t.Runtime) -> dict[str, Tensor]:
    """Hessians as `export_model` asks for them, of a fixed model, with the accumulation left to the script."""
    run = replace(run, cfg=replace(run.cfg, grad_accum_steps=0))
    trainer = t.Trainer(run, tiny_model(**FIVE_LAYERS))
    batches = t.calibration_batches(run, trainer.loader.shape)
    return t.collect_hessians(run, trainer, STEPS * trainer.loader.shape.accum, batches)


def restores_bitwise(trainer: t.Trainer) -> bool:
    """The same step from the same restored state, momentum shards included, has the same bits."""
    saved = trainer.state()
    trainer.step(0, PLAN)
    first = trainer.state()
    trainer.step(1, PLAN)
    trainer.restore(saved)
    trainer.step(0, PLAN)
    pairs = zip(t.tensor_leaves(trainer.state()), t.tensor_leaves(first), strict=True)
    return all(torch.equal(now, then) for now, then in pairs)


def clip_of_rank_gradients(run: t.Runtime, trainer: t.Trainer) -> float:
    """Clip factor when every rank brings other gradients (those of seed `rank`)."""
    random_gradients(trainer.model, run.ranks.rank)
    launched, small = trainer.optimizers.muon.launch(), trainer.optimizers.launch_adam()
    shards = [t.wait_for(pair) for pair in launched.values()]
    return trainer.optimizers.clip_factor(t.wait_for(small), shards).item()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def worlds_variables(world: int, corpus: dict[str, str]) -> dict[str, str]:
    """The same batch of 12 sequences on any of 1, 2 and 3 ranks, the one rank in two micro-steps.

    Five layers: with two ranks and with three the last rank's shard holds a layer of padding. No Polar Express: it
    raises small singular values, and with them what the order of summation changes, tenfold more in 50 steps.
    """
    return tiny_env(**corpus, **FIVE_LAYERS, TRAIN_BATCH_TOKENS=384, GRAD_ACCUM_STEPS=2 if world == 1 else 1,
                    GPTQ_CALIBRATION_BATCHES=6, VAL_BATCH_SIZE=200, POLAR_EXPRESS=0, MUON_RAILS_AT=0.5,
                    BETA2=0.95, MUON_MOMENTUM=0.99, MUON_WD=0.04, EMBED_WD=0.04)  # fmt: skip


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]) -> dict[int, list[dict[str, Any]]]:
    """World size -> the results of its ranks."""
    folder = tmp_path_factory.mktemp("worlds")
    multiprocessing.set_forkserver_preload(["torch.distributed", "torch.optim", "sentencepiece"])  # import them once
    for world in (1, 2, 3):
        arguments = world, free_port(), str(folder), worlds_variables(world, corpus)
        mp.start_processes(run_rank, arguments, nprocs=world, start_method="forkserver")
    return {world: [torch.load(folder / f"{world}.{rank}.pt") for rank in range(world)] for world in (1, 2, 3)}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_as_one(worlds: dict[int, list[dict[str, Any]]], world: int) -> None:
    """Losses of every step and all parameters equal those of one rank within rounding; replicas are bitwise equal."""
    (one,), many = worlds[1], worlds[world]
    for result in many:
        assert result["losses"] == pytest.approx(one["losses"], abs=2e-4)  # 50 steps let rounding grow
        for name, tensor in one["parameters"].items():
            error = (result["parameters"][name] - tensor).norm() / tensor.norm()
            assert error < 1e-4, f"{name}: {error}"  # as a whole: Adam lets single entries jump where gradients vanish
            assert torch.equal(result["parameters"][name], many[0]["parameters"][name]), name
    assert one["losses"][0] - one["losses"][-1] > 0.1  # it trained at all


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_the_global_hessians(worlds: dict[int, list[dict[str, Any]]], world: int) -> None:
    """Every rank holds the Hessians of the whole calibration set, those of one rank within rounding."""
    (one,), many = worlds[1], worlds[world]
    assert len(one["hessians"]) == 5 * 4 + 3  # four banks, head, bigram and value projections
    for result in many:
        assert result["hessians"].keys() == one["hessians"].keys()
        for name, hessian in one["hessians"].items():
            error = (result["hessians"][name] - hessian).norm() / hessian.norm()
            assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_score_as_one(worlds: dict[int, list[dict[str, Any]]], world: int) -> None:
    """Nats within rounding, targets and bytes exactly, plain and sliding."""
    (one,) = worlds[1]
    for result in worlds[world]:
        for (nats, *counts), (nats_one, *counts_one) in zip(result["scores"], one["scores"], strict=True):
            assert counts == counts_one
            assert nats == pytest.approx(nats_one, rel=1e-6)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_adapt_as_one(worlds: dict[int, list[dict[str, Any]]], world: int) -> None:
    """Test-time training scores the same on any number of ranks, and better than not adapting."""
    (one,) = worlds[1]
    assert [result["ttt"] for result in worlds[world]] == pytest.approx([one["ttt"]] * world, abs=1e-5)
    nats, _, counted = one["scores"][1]
    assert one["ttt"] < nats / math.log(2) / counted - 0.001


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_gptq_and_get_the_same_codes(worlds: dict[int, list[dict[str, Any]]], world: int) -> None:
    """Bitwise those of one rank, on every rank: codes and scales."""
    (one,) = worlds[1]
    for result in worlds[world]:
        assert result["codes"].keys() == one["codes"].keys()
        for name, pair in one["codes"].items():
            assert all(torch.equal(a, b) for a, b in zip(result["codes"][name], pair, strict=True)), name
    assert all(codes.any() and scale.all() for codes, scale in one["codes"].values())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sharded_momentum_is_restored(worlds: dict[int, list[dict[str, Any]]], world: int) -> None:
    assert all(result["restored"] for result in worlds[world])


@pytest.mark.parametrize("world", [2, 3])
def test_clip_factor_is_that_of_the_averaged_gradient(worlds: dict[int, list[dict[str, Any]]], world: int) -> None:
    """The same on every rank, from the norm of the mean of the ranks' gradients, padding and shards counted once."""
    model = tiny_model(**FIVE_LAYERS)
    per_rank = [random_gradients(model, rank) for rank in range(world)]
    mean = torch.cat([torch.stack([g[name] for g in per_rank]).mean(0).flatten() for name in per_rank[0]])
    expected = model.cfg.grad_clip_norm / mean.norm().item()
    assert [result["clip"] for result in worlds[world]] == pytest.approx([expected] * world, rel=1e-4)
    assert len({result["clip"] for result in worlds[world]}) == 1


@pytest.mark.parametrize("world", [2, 3])
def test_the_calibration_set_is_the_same_on_every_world_size(
    worlds: dict[int, list[dict[str, Any]]], world: int
) -> None:
    """With automatic accumulation too: as many tokens, and the same ones, behind the Hessians of an export."""
    (one,) = worlds[1]
    for result in worlds[world]:
        head, head_one = result["exported"]["head"], one["exported"]["head"]
        tokens, tokens_one = (h.trace().item() / len(h) for h in (head, head_one))  # normalized inputs: mean square 1
        assert tokens == pytest.approx(tokens_one, rel=1e-2)
        torch.testing.assert_close(head, head_one, rtol=0, atol=1e-3 * head_one.abs().max().item())
