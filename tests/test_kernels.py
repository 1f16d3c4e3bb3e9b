"""The kernels of a layer against the plain parts in float64: on the CPU through Triton's interpreter, on a GPU as trained.

The cases run in processes of their own, this file as a script: TRITON_INTERPRET counts when Triton is imported. There
an `assert` has to say by itself what it saw. Without the interpreter they are compiled for an H100, which needs none.
"""

import contextlib
import importlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from torch import Tensor

import train_gpt as t

tl = t.tl
CPU, PLAIN = torch.device("cpu"), t.PLAIN_LAYER
REAL_TILE, SMALL_TILE = t.TILE, (16, 32, 16)
SCALE, LENGTH = 0.7, 7
Values = dict[str, Tensor]


class Carry(torch.autograd.Function):
    """Values whose gradient goes to their proxy, as whoever uses a tensor once more hands it on."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, proxy: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, dy


# --- parts --------------------------------------------------------------------------------------------
# Each function runs one part on leaves by name and returns what is compared and has a gradient.


def rows_of(i: Values) -> t.Residual:
    """Rows at the entrance of a norm, `proxy` as `run_part` made it."""
    return t.Residual(i["x"], i["proxy"], i.get("r"))


def enter_part(parts: t.PlainLayer, i: Values, uses: str) -> list[Tensor]:
    """`uses`: which of the new x, its normalized rows, and the proxies of x (as a
    skip) and x0 find a use."""
    skip = (i["skip"], i["skip"]) if "skip" in i else None
    rows, kept, (x0, x0_twin) = parts.resid_mix_norm(i["x"], skip, (i["x0"], i["x0"]), i["mix"], SCALE)
    assert x0 is i["x0"]
    users = {"x": lambda: rows.x, "normalized": lambda: parts.materialize_norm(rows),
             "skip": lambda: Carry.apply(i["x"], kept),
             "x0": lambda: Carry.apply(x0, x0_twin)}  # fmt: skip
    return [users[use]() for use in uses.split()]


def heads_part(parts: t.PlainLayer, i: Values, uses: str) -> list[Tensor]:
    """`uses`: q, k, v alone, or the proxy of v too. Keys and values of plain parts are copied as the kernels copy them."""
    q, k, v, proxy = parts.qkv_rope(rows_of(i), i["weight"], i["gain"], i["rotary"], i.get("extra"), i.get("follows"))
    carried = Carry.apply(v[:, :: v.shape[1] // proxy.shape[1]], proxy)
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], 1) for heads in (k, v))
    return [q, k, v, *([carried] if "proxy" in uses else [])]


def exclusive_part(parts: t.PlainLayer, i: Values, uses: str) -> list[Tensor]:
    """`uses`: the copies of v that the kernel gets, of which all but the first must not be read."""
    v = i["v"]
    if uses and parts is not t.PLAIN_LAYER:
        v = torch.stack([v] + [torch.full_like(v, torch.nan)] * (int(uses) - 1), 2).flatten(1, 2)
    return [parts.xsa(i["y"], v, i["proxy"], i.get("gate"))]


def leave_part(parts: t.PlainLayer, i: Values, uses: str) -> list[Tensor]:
    """`uses`: which of the new x and its normalized rows find a use."""
    rows = parts.attn_proj(rows_of(i), i["z"], i["weight"], SCALE)
    return [{"x": lambda: rows.x, "normalized": lambda: parts.materialize_norm(rows)}[use]() for use in uses.split()]


def feed_forward_part(parts: t.PlainLayer, i: Values, uses: str) -> list[Tensor]:
    """The gradient of x goes through the norm too. The activations are for observers: compared, without a gradient."""
    normalized, x = SCALE * t.rms_norm(i["stream"]), i["stream"]
    r = SCALE * (x.detach().double().square().mean(-1) + t.NORM_EPS).rsqrt()
    rows = t.Residual(x, normalized) if parts is PLAIN else t.Residual(x, None, r.float(), SCALE)
    y, act = parts.mlp(rows, i["up"], i["down"], i["beta"])
    return [y, act.detach()]


def normalized_part(parts: t.PlainLayer, i: Values, uses: str) -> list[Tensor]:
    return [parts.materialize_norm(rows_of(i))]


def nll_part(parts: t.PlainLayer, i: Values, uses: str) -> list[Tensor]:
    return [parts.nll(i["logits"], i["targets"].long(), float(uses))]


def run_part(part: Callable, parts: t.PlainLayer, values: Values, fixed: set[str], uses: str) -> Values:
    """Outputs, and gradients of all leaves but those `fixed`, by name.

    The plain parts get float64 and the normalized x (or v) as proxy. The kernels get float32 and a proxy of NaN, which
    nothing may read; its gradient is r times that of the normalized x.
    """
    is_plain = parts is t.PLAIN_LAYER
    leaves = {name: v.double() if is_plain and v.is_floating_point() else v.clone() for name, v in values.items()}
    r, twin_of = torch.ones(1), leaves.get("v")
    if "x" in leaves and "x0" not in leaves:
        r = SCALE * (values["x"].double().square().mean(-1, keepdim=True) + t.NORM_EPS).rsqrt()
        twin_of = leaves["x"] * r
        leaves |= {} if is_plain else {"r": r.squeeze(-1).float()}
    if twin_of is not None:
        leaves["proxy"] = twin_of.clone() if is_plain else torch.full_like(twin_of, torch.nan).float()
    for name in leaves.keys() - {"r", "v", "rotary", "targets", "follows"} - fixed:
        leaves[name].requires_grad_()
    outputs = part(parts, leaves, uses)
    generator = torch.Generator().manual_seed(1)
    ends = [y for y in outputs if y.requires_grad]
    torch.autograd.backward(ends, [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ends])
    results = {f"output {number}": y.detach() for number, y in enumerate(outputs)}
    results |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if is_plain and "gradient of proxy" in results:
        results["gradient of proxy"] *= r
    return results


def check_part(part: Callable, values: Values, fixed: str = "", uses: str = "", within: float = 2e-6) -> Values:
    """Fails where the kernels differ from the plain part; returns what they gave."""
    layers = (t.PLAIN_LAYER, t.TritonLayer())
    want, got = (run_part(part, parts, values, set(fixed.split()), uses) for parts in layers)
    about = f"{part.__name__} {[tuple(v.shape) for v in values.values()]} fixed:{fixed} uses:{uses}"
    assert want.keys() == got.keys(), f"{about}: {want.keys()} but {got.keys()}"
    errors = errors_by_name(got, want)
    assert max(errors.values()) < within, f"{about}: {errors}"
    return got


def errors_by_name(got: Values, want: Values) -> dict[str, float]:
    return dict(zip(want, t.relative_errors([got[name] for name in want], [*want.values()]), strict=True))


def draw(**shapes: tuple[int, ...]) -> Values:
    generator = torch.Generator().manual_seed(len(shapes))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def enter_cases() -> None:
    """With and without a skip; used for everything, and with each proxy unused."""
    shapes = {"x": (23, 40), "x0": (23, 40), "mix": (3, 40)}
    for uses in ("x normalized skip x0", "normalized", "x x0", "normalized skip"):
        check_part(enter_part, draw(**shapes), "", uses)
        check_part(enter_part, draw(**shapes, skip=(23, 40)), "", uses)
    check_part(enter_part, draw(x=(1, 64), x0=(1, 64), mix=(3, 64)), "", "x normalized")
    small = {name: 1e-3 * value for name, value in draw(**shapes).items()}  # the norm's eps counts
    check_part(enter_part, {**small, "mix": 1e3 * small["mix"]}, "", "x normalized")


def heads_values(sequences: int, sizes: tuple[int, int, int, int], has_extra: bool, offset: bool = False) -> Values:
    """`sizes`: query heads, key/value heads, head size, half of what rotates."""
    heads, kv, size, half = sizes
    n, width = sequences * LENGTH, heads * size
    values = draw(x=(n, width), weight=((heads + 2 * kv) * size, width), gain=(heads,), rotary=(LENGTH, half))
    values["rotary"] = torch.stack([values["rotary"].cos(), values["rotary"].sin()])[:, :, None]
    values |= {"follows": torch.arange(n) % 3 > 0} if offset else {}
    return values | (draw(extra=(n, kv, size)) if has_extra else {})


def heads_cases() -> None:
    """Grouped, multi-query and multi-head; partly and wholly rotated; a tile that ends beyond the width; no fit."""
    for tile, sizes in ((SMALL_TILE, (4, 2, 8, 2)), (SMALL_TILE, (4, 1, 16, 8)), ((16, 32, 64), (4, 4, 8, 4)),
                        (SMALL_TILE, (6, 3, 8, 2))):  # fmt: skip
        t.TILE = tile
        assert t.qkv_rope_fits(*sizes) == (sizes[0] != 6)
        check_part(heads_part, heads_values(3, sizes, True), "", "proxy")
        check_part(heads_part, heads_values(3, sizes, False))
        check_part(heads_part, heads_values(3, sizes, False, offset=True), "", "proxy")
    check_part(heads_part, heads_values(1, sizes, True), "extra")
    t.TILE, values = SMALL_TILE, heads_values(3, (4, 2, 8, 2), True)
    check_part(heads_part, {**values, "weight": 1e-4 * values["weight"]}, "", "proxy")  # the norms' eps counts


def zero_gain_cases() -> None:
    """A gain of 0: no NaN, and every other gradient is right; its own is lost with the head's values."""
    values = heads_values(3, (4, 2, 8, 2), True)
    values["gain"][1] = 0
    want, got = (run_part(heads_part, parts, values, set(), "proxy") for parts in (t.PLAIN_LAYER, t.TritonLayer()))
    for results in (want, got):
        assert results["gradient of gain"].isfinite().all(), results["gradient of gain"]
        results["gradient of gain"] = results["gradient of gain"][[0, 2, 3]]
    errors = errors_by_name(got, want)
    assert max(errors.values()) < 2e-6, errors


def exclusive_cases() -> None:
    """Every size of group, with and without a gate; values that are 0 leave y as it is, and below the clamp the
    gradient is the plain one."""
    for heads, kv, size in ((6, 3, 12), (4, 4, 8), (4, 1, 5)):
        check_part(exclusive_part, draw(y=(37, heads, size), v=(37, kv, size)))
        check_part(exclusive_part, draw(y=(37, heads, size), v=(37, kv, size), gate=(37, heads)))
        check_part(exclusive_part, draw(y=(37, heads, size), v=(37, kv, size)), "", str(heads // kv))
    values = draw(y=(5, 4, 8), v=(5, 2, 8))
    check_part(exclusive_part, {**values, "v": 1e-7 * values["v"]})
    got = run_part(exclusive_part, t.TritonLayer(), {**values, "v": 0 * values["v"]}, set(), "")
    assert torch.equal(got["output 0"], values["y"]) and got["gradient of y"].isfinite().all(), got
    assert torch.equal(got["gradient of proxy"], 0 * values["v"]), got


def leave_cases() -> None:
    """Used for both the sum and its norm, and with either unused."""
    for uses in ("x normalized", "x", "normalized"):
        check_part(leave_part, draw(x=(37, 40), z=(37, 40), weight=(40, 40)), "proxy", uses)
    check_part(leave_part, draw(x=(5, 68), z=(5, 68), weight=(68, 68)), "proxy", "x normalized")


def feed_forward_cases() -> None:
    """With and without a learned beta, which may be negative, or 0 and still has its gradient."""
    for tokens, width, hidden in ((37, 40, 52), (16, 36, 32)):
        values = draw(stream=(tokens, width), up=(hidden, width), down=(width, hidden), beta=(hidden,))
        assert values["beta"].min() < 0 < values["beta"].max()
        zeros = {**values, "beta": values["beta"] * (torch.arange(hidden) % 3 > 0)}
        small = {**values, "stream": 1e-3 * values["stream"]}  # the norm's eps counts
        for fixed, given in itertools.product(("", "beta"), (values, zeros, small)):
            check_part(feed_forward_part, given, fixed)
    values["up"][3] = torch.nan  # must not be rounded to a number
    got = run_part(feed_forward_part, t.TritonLayer(), values, set(), "")
    assert got["output 1"][:, 3].isnan().all() and got["output 0"].isnan().all(), got


def sign_cases() -> None:
    """The lowest bit of every activation says where its pre-activation was negative; none is off by 2^-7 or more."""
    bfloat16_as_on_a_gpu()
    values = draw(x=(37, 40), r=(37,), up=(56, 40), down=(40, 56), beta=(56,))
    values = {name: value.bfloat16() for name, value in values.items()} | {"r": values["r"].abs()}
    act = t.mlp(*(values[name] for name in ("x", "r", "up", "down", "beta")), 1.0)[1]
    h = values["r"].double()[:, None] * (values["x"].double() @ values["up"].double().T)
    assert torch.equal(act.view(torch.int16) % 2 == 1, h < 0)
    exact = t.squared_leaky_relu(h, values["beta"].double())
    assert ((act.double() - exact) / exact).abs().max() < 2**-7, t.relative_errors([act], [exact])
    assert t.relative_errors([act], [exact])[0] < 3.5e-3


def normalized_cases() -> None:
    check_part(normalized_part, draw(x=(7, 12)))


def nll_cases() -> None:
    """A row in one piece and in several, more rows than one program takes, and caps that do little or nearly all."""
    for rows, width in ((7, 24), (5, 1000), (3, 4097), (2, 9000)):
        values = draw(logits=(rows, width)) | {"targets": torch.arange(rows) * (width - 1) // (rows - 1)}
        for cap in ("2", "30", "1000"):
            check_part(nll_part, values, "", cap, 2e-6 + 1e-7 * float(cap))
    values["logits"][0] = 1e4 * values["logits"][0].sign()  # the hyperbolic tangent saturates: no NaN, no gradient
    got = run_part(nll_part, t.TritonLayer(), values, set(), "30")
    assert got["output 0"].isfinite().all() and not got["gradient of logits"][0].any(), got


# --- whole layers and models ----------------------------------------------------------------------------


def probed_layers() -> None:
    """Heads that fill the small tiles or the real ones, and heads that do not."""
    wide = {"MODEL_DIM": 256, "NUM_HEADS": 8, "NUM_KV_HEADS": 4}
    rows = [
        (SMALL_TILE, {}, True),
        (SMALL_TILE, {"MODEL_DIM": 48, "NUM_HEADS": 6, "NUM_KV_HEADS": 3}, False),
        (REAL_TILE, wide, True),
    ]
    for t.TILE, sizes, fits in rows:
        cfg = tiny_config(**sizes, MLP_HIDDEN=40)
        assert fit(cfg) == fits, sizes
        error, allowed = t.check_layer(t.TritonLayer(), cfg, CPU)
        assert error < min(2e-6, allowed), (t.TILE, sizes, error, allowed)
    assert fit(t.Config.from_env({"RUN_ID": "default"}))
    assert not fit(tiny_config(**{**wide, "MODEL_DIM": 128, "NUM_KV_HEADS": 8}))


def fit(cfg: t.Config) -> bool:
    return t.qkv_rope_fits(cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, (cfg.rope_dims or cfg.head_dim) // 2)


SMALL_MODEL = {"VOCAB_SIZE": 64, "MLP_HIDDEN": 40, "TRAIN_SEQ_LEN": 10, "EVAL_STRIDE": 5, "TRAIN_BATCH_TOKENS": 20}
ONE_LAYER = {"NUM_LAYERS": 1, "XSA_LAST_N": 1, "VE_LAYERS": 0}
TWO_LAYERS = {"NUM_LAYERS": 2, "XSA_LAST_N": 2, "VE_LAYERS": 1}
GATES = {"KEY_OFFSET": 0, "LN_SCALE": 1, "VALUE_RESIDUAL": 1, "GATED_ATTN_ENABLED": 1,
         "MLP_ACTIVATION": "asqu"}  # fmt: skip
MODELS: list[dict[str, Any]] = [
    {"NUM_LAYERS": 5, "XSA_LAST_N": 3}, GATES, ONE_LAYER, {"VE_ENABLED": 0, "ROPE_DIMS": 0},
    {**TWO_LAYERS, "NUM_LOOPS": 2, "LOOP_START": 0, "LOOP_END": 1, "ENABLE_LOOPING_AT": 0},
    {**TWO_LAYERS, "DOC_ATTENTION": 0},
]  # fmt: skip
GRAPHS = [{}, {**TWO_LAYERS, **GATES}, ONE_LAYER, {**TWO_LAYERS, "DOC_ATTENTION": 0}]


def model_results(cfg: t.Config, parts: t.PlainLayer, is_graph: bool) -> Values:
    """nll, every parameter's gradient and, in order, what an observer sees, of a model with random parameters."""
    model = t.GPT(cfg, 1, t.PLAIN_ATTENTION, CPU, parts)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ids, targets = torch.randint(2, cfg.vocab_size, (2, 2, cfg.train_seq_len), generator=generator)
    ids[:, [0, 4]] = model.bos_id
    nll = torch.compile(model.nll, fullgraph=True, dynamic=False, backend="aot_eager") if is_graph else model.nll
    weights, seen = model.weights(False), []
    results = {"nll": nll(ids, targets, weights, model.order)}
    results["nll"].sum().backward()
    results |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if not is_graph:
        with torch.no_grad():
            model.hidden(ids, weights, model.order, lambda name, x: seen.append((name, x.flatten(0, -2).clone())))
    return results | {f"{name} seen at {place}": x for place, (name, x) in enumerate(seen)}


def compare_models(variables: dict[str, Any], is_graph: bool) -> None:
    """The gradient of a single number is a sum of terms that cancel: in float32 it has fewer digits."""
    cfg = tiny_config(**SMALL_MODEL, **variables)
    want = model_results(cfg, t.PLAIN_LAYER, False)
    got = model_results(cfg, t.TritonLayer(), is_graph)
    assert got.keys() == {name for name in want if not is_graph or " seen at " not in name}, (variables, got.keys())
    errors = errors_by_name(got, {name: want[name].double() for name in got})
    wrong = {name: error for name, error in errors.items() if not error < (5e-6 if got[name].numel() > 1 else 1e-4)}
    assert not wrong, (variables, wrong)


def bfloat16_as_on_a_gpu() -> None:
    """Triton's interpreter has it as 16-bit integers, multiplies these, and rounds numbers towards zero."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype("uint32") << 16
        return convert(data, source, target, mode)

    def product(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (x if x.dtype.scalar == tl.float32 else builder.cast_impl(x, tl.float32) for x in (a, b))
        return dot(builder, a, b, *rest)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = rounded, product


def layers_in_bfloat16() -> None:
    """At full width with the real tiles the kernels are as near to float64 as the plain layer in bfloat16."""
    bfloat16_as_on_a_gpu()
    t.TILE, t.compute_dtype = REAL_TILE, lambda _: torch.bfloat16
    for changes in ({}, {"MLP_MULT": "4"}, {"MLP_ACTIVATION": "asqu", "KEY_OFFSET": "0"}):
        error, allowed = t.check_layer(t.TritonLayer(), t.Config.from_env({"RUN_ID": "default", **changes}), CPU)
        assert 1e-3 < error < allowed / 2 < 4e-2, (changes, error, allowed)


CASES: dict[str, list[Callable[[], None]]] = {
    "parts": [enter_cases, heads_cases, zero_gain_cases, exclusive_cases, leave_cases, feed_forward_cases,
              normalized_cases, nll_cases, sign_cases],
    "layers": [probed_layers, layers_in_bfloat16],
    "models": [partial(compare_models, variables, False) for variables in MODELS],
    "graphs": [partial(compare_models, variables, True) for variables in GRAPHS],
}  # fmt: skip


def default_layer() -> None:
    """The default configuration on the GPU, in bfloat16, and a wider feed-forward."""
    for changes in ({}, {"MLP_MULT": "4"}):
        found = t.check_layer(
            t.TritonLayer(), t.Config.from_env({"RUN_ID": "default", **changes}), torch.device("cuda")
        )
        assert not t.fault(*found), (changes, found)


SUMS = t.mlp_kernel.arg_names.index("sums") if t.triton else 0  # which argument the sums for beta are
RUN = t.triton.JITFunction.run if t.triton else None


def stack_bytes(cubin: bytes) -> int:
    """What a thread of a compiled kernel keeps in memory for want of registers."""
    tool = Path(t.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    Path("kernel.cubin").write_bytes(cubin)
    usage = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compiled_for(capability: int) -> dict[str, int]:
    """Every kernel of a layer and of the loss, in bfloat16, by Triton's compiler and ptxas; nothing is launched.

    Returns what they keep in memory for want of registers. What a GPU cannot do raises what `choose_back_end` catches.
    """
    compiler, runtime = (importlib.import_module(f"triton.{name}") for name in ("backends.compiler", "runtime"))
    target = compiler.GPUTarget("cuda", capability, 32)
    gpu = {"device": lambda: capability, "stream": lambda _: 0, "target": lambda: target}
    runtime.driver.set_active(SimpleNamespace(**{f"get_current_{name}": get for name, get in gpu.items()}))
    stacks, t.compute_dtype = {}, lambda _: torch.bfloat16

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **words: Any) -> None:
        done = RUN(kernel, *arguments, grid=grid, warmup=True, **words)
        name = kernel.fn.__name__ + " for beta" * (kernel is t.mlp_kernel and arguments[SUMS] is not None)
        stacks[name] = max(stack_bytes(done.asm["cubin"]), stacks.get(name, 0))

    t.triton.JITFunction.run = compile_only
    for changes in ({}, {"KEY_OFFSET": "0", "MLP_ACTIVATION": "asqu"}):
        t.check_layer(t.TritonLayer(), t.Config.from_env({"RUN_ID": "default", **changes}), CPU)
    matrix, rows = torch.zeros(512, 512, dtype=torch.bfloat16), torch.zeros(512)
    t.unit_product(matrix, matrix, rows, rows, matrix, False)  # with a fixed beta
    return stacks


def compiled_for_hopper() -> None:
    """None may spill registers but the feed-forward's where a beta is learned."""
    stacks = compiled_for(90)
    every = {name for name in vars(t) if name.endswith("_kernel")} - {"sdpa_kernel"}
    assert stacks.keys() == every | {"mlp_kernel for beta"}, (every, stacks)
    assert stacks.pop("mlp_kernel for beta") <= 96 and not any(stacks.values()), stacks


def compiled_elsewhere() -> None:
    """On other GPUs the kernels compile, or the fault is one that leaves the plain layer; none ends the process."""
    for capability in (80, 89, 100, 120):
        with contextlib.suppress(*t.BACK_END_FAULTS):
            compiled_for(capability)


# --- the tests ------------------------------------------------------------------------------------------


def run_cases(name: str, **environment: str) -> None:
    """The cases of one name in a process of their own."""
    env = {**os.environ, **environment, "PYTHONPATH": str(Path(t.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_plain_parts_in_the_interpreter(name: str) -> None:
    """Outputs and all gradients, on sizes that no tile divides; models also what an observer sees, and as one graph."""
    pytest.importorskip("triton")
    run_cases(name, TRITON_INTERPRET="1")


@pytest.mark.parametrize("where", ["hopper", "elsewhere"])
def test_kernels_compile(where: str, in_tmp: Path) -> None:
    """On any machine: what does not compile, or spills registers on a Hopper GPU, is seen before one is rented."""
    pytest.importorskip("triton")
    run_cases(where, TRITON_CACHE_DIR=str(in_tmp))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_equal_the_plain_parts_on_the_gpu() -> None:
    """The default's layer in bfloat16, as trained."""
    run_cases("gpu")


def without_gradient(tensor: Tensor) -> Tensor:
    return tensor.detach() + 0 * tensor


WRONG: dict[str, dict[str, Callable]] = {  # each is right forwards, or nearly
    "beta": {"mlp": lambda *inputs: PLAIN.mlp(*inputs[:3], without_gradient(inputs[3]))},
    "gain": {"qkv_rope": lambda *inputs: PLAIN.qkv_rope(*inputs[:2], without_gradient(inputs[2]), *inputs[3:])},
    "extra": {"qkv_rope": lambda *inputs: PLAIN.qkv_rope(*inputs[:4], without_gradient(inputs[4]), inputs[5])},
    "own value": {"xsa": lambda y, v, proxy, *rest: PLAIN.xsa(y, v, without_gradient(proxy), *rest)},
    "skip": {"resid_mix_norm": lambda x, skip, *rest: PLAIN.resid_mix_norm(
        x, skip and (x, without_gradient(skip[1])), *rest)},
    "norm": {"attn_proj": lambda rows, z, weight, scale: PLAIN.attn_proj(rows, z, weight, 1.05 * scale)},
    "loss": {"nll": lambda logits, targets, cap: PLAIN.nll(logits, targets, 1.2 * cap)},
    "not a number": {"materialize_norm": lambda rows: rows.proxy * torch.nan},
}


def changed_layer(**parts: Callable) -> t.PlainLayer:
    """The plain layer with some parts replaced."""
    return type("Changed", (t.PlainLayer,), {name: staticmethod(part) for name, part in parts.items()})()


@pytest.mark.parametrize("parts", WRONG.values(), ids=WRONG.keys())
def test_the_probe_refuses_a_wrong_layer(
    parts: dict[str, Callable], run: t.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that forgets a gradient or is off by a factor is an error where nothing else is left to take."""
    assert t.check_layer(t.PLAIN_LAYER, run.cfg, CPU)[0] < 1e-5
    monkeypatch.setitem(t.LAYER, "plain", lambda: changed_layer(**parts))
    with pytest.raises(t.UserError, match="LAYER_BACKEND=auto.*wrong by"):
        t.choose_back_end(run, t.LAYER_BACK_ENDS, "auto")


def flipped(tensor: Tensor) -> Tensor:
    """The same values, whose gradient has the wrong sign."""
    return 2 * tensor.detach() - tensor


def in_float32(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The feed-forward rounded once, at its end: right, and by other roundings than the plain one's."""
    rows, *rest = inputs
    wide = PLAIN.mlp(t.Residual(*(x.float() for x in rows[:2])), *(x.float() for x in rest))
    return tuple(x.to(rest[0].dtype) for x in wide)


def without_last_row(*inputs: Any) -> tuple[Tensor, Tensor]:
    y, act = PLAIN.mlp(*inputs)
    return F.pad(y[:-1], (0, 0, 0, 1)), act


def without_last_columns(rows: t.Residual, up: Tensor, down: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """As if a tile of the hidden channels were never computed."""
    return PLAIN.mlp(rows, F.pad(up[:-128], (0, 0, 0, 128)), down, beta)


FEED_FORWARDS: dict[str, tuple[bool, Callable]] = {
    "as plain": (True, PLAIN.mlp),
    "in float32": (True, in_float32),
    "dropped row": (False, without_last_row),
    "missing columns": (False, without_last_columns),
    "wrong sign": (False, lambda rows, up, down, beta: PLAIN.mlp(rows, up, flipped(down), beta)),
    "wrong sign of a vector": (False, lambda *inputs: PLAIN.mlp(*inputs[:3], flipped(inputs[3]))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("multiple", [3, 4])
@pytest.mark.parametrize(("is_right", "part"), FEED_FORWARDS.values(), ids=FEED_FORWARDS.keys())
def test_the_tolerance_follows_from_width_and_precision(
    is_right: bool, part: Callable, multiple: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hidden width of 2,048 is no error, and what is wrong in one place in 160 rows or 16 tiles is one."""
    monkeypatch.setattr(t, "compute_dtype", lambda _: dtype)
    cfg = t.Config.from_env({"RUN_ID": "default", "MLP_MULT": str(multiple)})
    error, allowed = t.check_layer(changed_layer(mlp=part), cfg, CPU)
    assert (not t.fault(error, allowed)) == is_right, (error, allowed)
    assert allowed < (0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_kernels_need_triton_and_a_gpu_or_say_so(
    is_installed: bool, run: t.Runtime, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAYER_BACKEND=triton here is an error that names the remedy; auto takes the plain layer and logs it."""
    if not is_installed:
        monkeypatch.setattr(t, "triton", None)
    reason = r"LAYER_BACKEND=triton: not usable here \(triton: .*" + ("" if is_installed else "not installed")
    with pytest.raises(t.UserError, match=reason + r".*\); auto takes the best"):
        t.choose_back_end(run, t.LAYER_BACK_ENDS, "triton")
    assert t.choose_back_end(run, t.LAYER_BACK_ENDS, "auto") is t.PLAIN_LAYER
    assert "layer_backend:plain" in (in_tmp / "logs/tiny.txt").read_text()


if __name__ == "__main__":
    torch.set_num_threads(1)
    others = {"gpu": [default_layer], "hopper": [compiled_for_hopper], "elsewhere": [compiled_elsewhere]}
    for case in {**CASES, **others}[sys.argv[1]]:
        t.TILE = SMALL_TILE if sys.argv[1] in CASES else REAL_TILE
        case()


def test_an_older_gpu_runs_the_plain_layer(run: t.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels would spill their tiles to memory they are not offered; nothing is lost by that."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(t, "is_hopper", lambda _: False)
    ends = t.LAYER_BACK_ENDS._replace(without_cuda=("triton", "plain"))
    assert t.choose_back_end(run, ends, "auto") is PLAIN and not run.costs
    with pytest.raises(t.UserError, match="LAYER_BACKEND=triton: .*for Hopper GPUs and later"):
        t.choose_back_end(run, ends, "triton")


def test_a_kernel_that_does_not_fit_leaves_the_plain_layer(
    run: t.Runtime, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Triton raises for too little shared memory is no RuntimeError; auto goes on, and start and report say why
    and what it costs."""

    def too_large() -> t.PlainLayer:
        raise t.TritonError("out of resource: shared memory")

    monkeypatch.setitem(t.LAYER, "triton", too_large)
    ends = t.LAYER_BACK_ENDS._replace(without_cuda=("triton", "plain"))
    assert t.choose_back_end(run, ends, "auto") is t.PLAIN_LAYER
    warning = "WARNING: LAYER_BACKEND: by plain a step takes 12 to 18% longer (triton: TritonError out of resource"
    assert (in_tmp / "logs/tiny.txt").read_text().count(warning) == 1
    t.choose_back_end(run, ends, "auto")  # as EVAL_ONLY does once more
    t.report_inactive(run)
    report = (in_tmp / "logs/tiny.txt").read_text().split("never activated: ")[1]
    assert report.count(warning) == 1
