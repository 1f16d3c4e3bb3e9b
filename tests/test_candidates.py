"""benchmarks/candidates.py through Triton's interpreter: every kernel against its definition in float64, and the table.

The cases run in processes of their own: TRITON_INTERPRET counts when Triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUP = """
import torch, torch.nn.functional as F
import train_gpt as t
from benchmarks import candidates as c
torch.set_num_threads(1)
cpu = torch.device("cpu")
TOY = [c.Sizes(3, 7, 32, 4, 2, 48, 2, 40), c.Sizes(1, 17, 64, 4, 1, 80, 8, 17), c.Sizes(2, 16, 48, 2, 2, 32, 1, 64)]
TOY[2] = TOY[2]._replace(width=32)  # heads of 16, two of them for each kind
"""
# First and last variant of each candidate. Whole heads must fill half a tile of the endings, which the real tilings do
# at real width only.
EVERY_CASE = """
SMALL = [16, 32, 16, 4, 2, 2, 4, 2, 8]
c.CASES["heads_ending"] = c.heads_case((SMALL, [32, 32, 32, 4, 2, 4, 4, 2, 8]), False, (0, 0, 0, 0), 1)
c.CASES["heads_extra"] = c.heads_case((SMALL, c.HEADS_TILINGS[0]), True, (0, 0, 0, 0), 1)
for name, case in c.CASES.items():
    for number, (variant, function) in enumerate(list(case.variants.items())[:: max(len(case.variants) - 1, 1)]):
        for seed, sizes in enumerate(TOY[2 * number :]):
            error = c.error_of(case, function, sizes, cpu, seed)
            assert error < 2e-6, (name, variant, sizes, error)
"""
REAL_TILES = """
sizes = c.CHECKED._replace(sequences=1)
for name in ("heads_extra",):
    function = list(c.CASES[name].variants.values())[-1]
    error = c.error_of(c.CASES[name], function, sizes, cpu)
    assert error < 2e-6, (name, error)
"""
LEARNED_BETA = """
c.FIXED = tuple(name for name in c.FIXED if name != "beta")
case = c.CASES["feed_forward"]
for seed, sizes in enumerate(TOY):
    inputs, _ = c.draw_inputs(case, sizes, cpu, seed)
    assert c.leaves(case, inputs)["beta"].requires_grad
    assert c.error_of(case, case.variants["128 256 64 8 3"], sizes, cpu, seed) < 2e-6
"""
# What is timed as today's function is the function: on the normalized row, with the gain that the residual step gives.
TODAY = """
for name in ("heads", "heads_extra", "feed_forward", "residual", "residual_mixed", "residual_skip", "exclusive", "loss",
             "residual_product"):
    case = c.CASES[name]
    inputs, _ = c.draw_inputs(case, TOY[0], cpu, 0)
    inputs = {n: v if v is None or n == "targets" else v.double() for n, v in inputs.items()}
    want = case.plain(inputs)[0]
    if "r" in inputs:
        inputs["x"] = inputs["r"][:, None] * inputs["x"]
    if name == "residual_skip":  # the model scales the skip by its own weight first
        inputs["mix"] = torch.stack([inputs["mix"][0], inputs["mix"][1] / inputs["mix"][0], inputs["mix"][2]])
    got = case.today(inputs)[0]
    if name.startswith("residual"):
        want = [want[0], want[0] * want[1][:, None]]
    got = [g.reshape(w.shape) for g, w in zip(got, want, strict=True)]
    error = t.relative_error(got, want)
    assert error < 1e-6, (name, error)  # exclusive and the loss compute in float32 whatever they are given
"""
# One layer of kernels against the layer of train_gpt.py, in which the normalized tensors exist; also as one graph.
LAYER = """
sizes, scale = c.Sizes(2, 9, 32, 4, 2, 48, 2, 40), 0.6
n, size, T = sizes.tokens, 8, sizes.length
shapes = {"x": (n, 32), "skip": (n, 32), "x0": (n, 32), "mix": (3, 32), "qkv": (64, 32), "gain": (4,),
          "extra": (n, 2, size), "out": (32, 32), "up": (48, 32), "down": (32, 48), "beta": (48,)}
generator = torch.Generator().manual_seed(0)
values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
upstream, angle = torch.randn((n, 32), generator=generator), torch.randn((T, sizes.half), generator=generator)
rotary = torch.stack([angle.cos(), angle.sin()])
attend = t.sdpa(t.SDPBackend.MATH)
PRODUCT, STEP = [16, 32, 16, 4, 2], [4, 4, 2, 4, 4, 1, 4]

def ours(i):
    x, twin, r, kept, x0_twin = c.residual(i["x"], None, i["skip"], i["skip"], i["x0"], i["x0"], i["mix"], scale, STEP)
    q, k, v, v_twin, _ = c.heads(x, twin, r, i["qkv"], i["gain"], rotary, i["extra"], TILING)
    y = attend(*(part.unflatten(0, (-1, T)) for part in (q, k, v))).flatten(0, 1)
    z = c.exclusive(y, v, v_twin, [16, 4, 2]).flatten(1)
    x, twin, r = c.residual_product(x, z, i["out"], scale, [*PRODUCT, 4, 4, 1, 4])
    x = c.feed_forward(x, twin, r, i["up"], i["down"], i["beta"], True, PRODUCT * 3)[0]
    return c.residual(x, None, i["x"], kept, i["x0"], x0_twin, i["mix"], scale, STEP)[0]  # x as a skip, x0 once more

def theirs(i):
    x = i["mix"][0] * i["x"] + i["mix"][1] * i["skip"] + i["mix"][2] * i["x0"]
    qkv = F.linear(t.rms_norm(x) * scale, i["qkv"]).view(-1, T, 8, size)
    q, k, v = qkv.split([4, 2, 2], 2)
    cos, sin = rotary[:, :, None].to(x.dtype)
    q, k = t.apply_rotary(t.rms_norm(q), cos, sin) * i["gain"][:, None], t.apply_rotary(t.rms_norm(k), cos, sin)
    v = v + i["extra"].view_as(v)
    y = attend(q, k, v)
    y = (y.unflatten(2, (2, -1)) - (share := (y.unflatten(2, (2, -1)) * v.unsqueeze(3)).sum(-1, keepdim=True)
         / v.square().sum(-1)[..., None, None]) * v.unsqueeze(3)).flatten(2)  # t.exclusive computes in float32
    x = x + F.linear(y, i["out"]).flatten(0, 1)
    x = x + t.plain_feed_forward(t.rms_norm(x) * scale, i["up"], i["down"], i["beta"])[0]
    return i["mix"][0] * x + i["mix"][1] * i["x"] + i["mix"][2] * i["x0"]

def run(function, dtype):
    inputs = {name: value.detach().clone().to(dtype).requires_grad_() for name, value in values.items()}
    y = function(inputs)
    y.backward(upstream.to(dtype))
    return [y.detach(), *(value.grad for value in inputs.values())]

want = run(theirs, torch.float64)
for TILING in ([4, 4, 2, 4, 4, 2, 6], [*PRODUCT, 4, 4, 2, 6]):
    plain = run(ours, torch.float32)
    error = t.relative_error(plain, want)
    assert error < 5e-6, error
    torch._dynamo.reset()
    graph = run(torch.compile(ours, fullgraph=True, dynamic=False, backend="aot_eager"), torch.float32)
    assert t.relative_error(graph, [w.double() for w in plain]) < 1e-6
"""
# A variant that is wrong, one that cannot be launched and one that is not reached are rows, and the table comes last.
TABLE = """
exact = c.CASES["exclusive"]

def wrong(i):
    return c.only(2 * exact.variants["32 4 2"](i)[0][0])

def broken(i):
    raise RuntimeError("no such kernel\\nand more")

variants = {"right": exact.variants["32 4 2"], "wrong": wrong, "broken": broken}
c.CASES["exclusive"] = exact._replace(variants=variants)
c.main(["exclusive", "loss"], TOY[0])
c.SECONDS = -1
c.main(["exclusive", "--check"], TOY[0])
"""


# Everything but the clock: today's function as one graph, both passes again and again on the same tensors.
TIMED = """
import math, functools
c.median_us = lambda function: [function() for _ in range(3)] and 7.0
torch.compile = functools.partial(torch.compile, backend="eager")
SMALL = [16, 32, 16, 4, 2, 2, 4, 2, 8]
c.CASES["heads_ending"] = c.heads_case((SMALL,), False, (0, 0, 0, 0), 1)
for name in ("feed_forward_sum", "heads_ending", "exclusive", "residual_skip", "residual_product", "loss"):
    case = c.CASES[name]
    c.CASES[name] = case._replace(variants=dict(list(case.variants.items())[:1]))
    c.report(name, c.Plan(False, True, TOY[0], cpu, math.inf))
"""


def run(script: str) -> str:
    """Output of a script under the interpreter."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SETUP + script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", [TODAY + EVERY_CASE + LEARNED_BETA, REAL_TILES, LAYER],
                         ids=["every case", "real tiles", "layer"])  # fmt: skip
def test_kernels_equal_their_definitions(script: str) -> None:
    """Outputs and all gradients, on row counts that no tile divides."""
    pytest.importorskip("triton")
    run(script)


def test_table_is_last_and_names_what_failed() -> None:
    """One row per variant, whatever became of it."""
    pytest.importorskip("triton")
    first, second = run(TABLE).split("cpu torch")[1:]
    rows = [line.strip("| ").split(" | ") for line in first.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows[:3]] == ["right", "wrong", "broken"] and rows[3][0] == "loss"
    assert float(rows[0][-1].split()[0]) < 1e-6
    assert "WRONG" in rows[1][-1] and "RuntimeError: no such kernel" in rows[2][-1]
    assert second.count("not reached") >= 3


def test_everything_that_is_timed_runs() -> None:
    """Forward and backward of each candidate and of what it is compared with, for the same case, without a reason."""
    pytest.importorskip("triton")
    rows = [line.strip("|").split("|") for line in run(TIMED).splitlines() if line.startswith("| ")]
    assert len(rows) == 6
    for row in rows:
        assert [cell.strip() for cell in row[2:6]] == ["7"] * 4 and row[-1].split() == ["nan"], row


def test_unknown_names_are_refused() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "benchmarks.candidates", "exclusif"], cwd=ROOT, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2 and "no candidate exclusif" in done.stderr
