"""Kernels that might replace what inductor makes of the model, timed beside it: adopted only after this table.

    python -m benchmarks.candidates [NAMES] [--check] [--time]      # no flag: both; within 5 minutes on one GPU
    python -m benchmarks.candidates [NAMES] --resources             # registers and spills for sm_90, without a GPU

A step is bound by what it reads and writes. Three ideas take bytes away, each exactly the same function as before:

- The normalized input of a product is never written. With r = scale * rsqrt(mean(x^2) + eps) per row, the product of
  the normalized row is r times the product of x. Whatever follows a product takes r along, in its ending.
- The gradient of such a row needs no gradient of r: for a loss L(r x) and g = dL/dx with r held fixed, dL/dr is
  <g, x> / r and dr/dx is -r^3 / (C scale^2) x, so dx = g - x (r^2 / (C scale^2)) <g, x>. One pass over g and x, in
  which the residual gradient is added too. `residual` therefore returns x, its *twin* and r: the twin is never written
  or read, it only carries g back; consumers take values from x and hand their gradient to the twin.
- Queries and keys are normalized per head, so r cancels but for eps, which becomes eps / r^2.

Twins also chain gradients that meet in one tensor: x0 mixes into every layer and x returns as a skip, and without them
each meeting were a kernel of its own (three activations), since inductor cannot add inside an operator.

Activations of (98,304, 512) bf16 that are read and written per layer beside the products, 100.7 MB or 33.6 us each at
3.0 TB/s, forward and backward. Today's are what inductor's kernels touch as far as their measured times tell (see
RESULTS.md): the sums over tokens for resid_mix and skip_weights are a pass of their own over the gradient.

    candidate             today       here                                                    gain, ms per step
    feed_forward      (A) 0, 0        0, 0      its gain is that `residual` writes no norm     0
    feed_forward_sum      3, 0        1, 0      x is added in the product's ending             0.74
    heads             (B) 3, 6        4, 6      v is written scaled; today it is a view        -0.30 (9 layers)
    heads_ending      (B) 3, 6        0, 6      in the product's ending                        0.91 (9 layers)
    heads_extra       (B) 4, 6.5      4.5, 6.5  with a value embedding; the ending: 0.5, 6.5   0.27 (2 layers)
    exclusive         (C) 2.5, 6      2.5, 4                                                   0.74
    residual          (D) 4, 4        3, 4      x y -> x r; dx g x -> dx                       0.37
    residual_product      4, 4        1, 4      the same in the product's ending               1.11
    residual_mixed    (D) 5, 11       4, 8      x y x0 -> x r; dx g new x y x0 -> dx dx0       0.81 (6 layers)
    residual_mixed_alone  4, 10       3, 7      the same after feed_forward_sum                0.81
    residual_skip     (D) 6, 14       5, 10                                                    0.84 (5 layers)
    loss              (E) 2, 4        2, 4      the gradient made forward: 4, 0                0 or 0.07
    loss_8192         (E) 16, 32      16, 32    the gradient made forward: 32, 0               0 or 0.54
"""

import argparse
import contextlib
import math
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

import train_gpt as t

EPS = 1e-6  # of train_gpt.rms_norm
COPY_BYTES_PER_US = 3.0e6  # device copy of an H100, bytes read and written
Tiling = list[int]  # rows (and columns) of a tile, ..., warps, stages


def programs(device: torch.device, blocks: int, per_processor: int = 1) -> int:
    """Programs of a grid that walks over `blocks`; two on the CPU, so that tests see the walk and the partial sums."""
    if device.type != "cuda":
        return min(blocks, 2)
    return min(blocks, per_processor * torch.cuda.get_device_properties(device).multi_processor_count)


def kernel(counts: list[str]) -> Callable:
    """triton.jit without one more compilation for each kind of number that these arguments, counts of rows, can be."""
    return triton.jit(do_not_specialize=counts)


def carry(x: Tensor, twin: Tensor) -> Tensor:
    """The values of x with a gradient that goes to `twin`: what the plain definitions make of a twin."""
    return x.detach() + (twin - twin.detach())


# ----------------------------------------------------------------------------------------------
# A. Feed-forward that takes rows as they are and their factor
# ----------------------------------------------------------------------------------------------


def plain_feed_forward(x: Tensor, twin: Tensor, r: Tensor, up: Tensor, down: Tensor, beta: Tensor) -> Tensor:
    """squared_unit(r x up^T) down^T for x (tokens, C) and r (tokens,), which gets no gradient."""
    return F.linear(t.squared_unit(r.detach()[:, None] * F.linear(carry(x, twin), up), beta), down)


@triton.jit
def activate(value, r, pre, out, beta, sums, row, column, tokens, hidden, BACKWARD: tl.constexpr,
             BETA_GRAD: tl.constexpr):  # fmt: skip
    """Ending of a tile: pre = r value and activations; backward, r times the gradient of pre."""
    channel, place = column + tl.arange(0, value.shape[1]), row + tl.arange(0, value.shape[0])
    below = tl.load(beta + channel, mask=channel < hidden, other=0.0).to(tl.float32)[None, :]
    factor = tl.load(r + place, mask=place < tokens, other=0.0)[:, None]
    if BACKWARD:
        h = pre.load([row, column]).to(tl.float32)
        out.store([row, column], (value * factor * 2 * h * tl.where(h > 0, 1.0, below)).to(out.dtype))
        if BETA_GRAD:
            part = tl.sum(tl.where(h > 0, 0.0, value * h * h), 0)
            tl.store(sums + row // value.shape[0] * hidden + channel, part, mask=channel < hidden)
    else:
        h = (value * factor).to(pre.dtype)
        pre.store([row, column], h)
        h = h.to(tl.float32)
        out.store([row, column], (h * h * tl.where(h > 0, 1.0, below)).to(out.dtype))


@kernel(["tokens"])
def feed_forward_tiles(a, b, pre, out, r, beta, sums, tokens, hidden, length, BACKWARD: tl.constexpr,
                       BETA_GRAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                       INNER: tl.constexpr):  # fmt: skip
    """Tiles of a (tokens, length) times b (hidden, length) transposed, each ended by `activate` in two halves."""
    across = tl.cdiv(hidden, COLS)
    for tile in tl.range(tl.program_id(0), across * tl.cdiv(tokens, ROWS), tl.num_programs(0), flatten=True):
        row, column = tile // across * ROWS, tile % across * COLS
        total = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, length, INNER):
            total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
        left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLS // 2)), (0, 2, 1)))
        activate(left, r, pre, out, beta, sums, row, column, tokens, hidden, BACKWARD, BETA_GRAD)
        activate(right, r, pre, out, beta, sums, row, column + COLS // 2, tokens, hidden, BACKWARD, BETA_GRAD)


def run_feed_forward(
    factors: tuple[Tensor, Tensor], r: Tensor, pre: Tensor, beta: Tensor, backward: tuple[bool, bool], tiling: Tiling
) -> list[Tensor]:
    """`feed_forward_tiles` over pre (tokens, hidden): activations or r dpre, and the gradient of beta.

    `backward` says whether it is the backward pass and whether beta's gradient is wanted.
    """
    rows, cols, inner, warps, stages = tiling[-5:] if backward[0] else tiling[:5]
    (tokens, hidden), out = pre.shape, torch.empty_like(pre)
    sums = pre.new_empty((triton.cdiv(tokens, rows) if backward[1] else 1, hidden), dtype=torch.float32)
    a, b = (TensorDescriptor.from_tensor(f, [n, inner]) for f, n in zip(factors, (rows, cols)))
    results = (TensorDescriptor.from_tensor(f, [rows, cols // 2]) for f in (pre, out))
    grid = (programs(pre.device, triton.cdiv(tokens, rows) * triton.cdiv(hidden, cols)),)
    feed_forward_tiles[grid](a, b, *results, r, beta, sums, tokens, hidden, factors[0].shape[1], *backward,
                             rows, cols, inner, num_warps=warps, num_stages=stages)  # fmt: skip
    return [out, sums.sum(0) if backward[1] else sums[0]]


@torch.library.custom_op("candidates::feed_forward", mutates_args=())
def feed_forward(
    x: Tensor, twin: Tensor, r: Tensor, up: Tensor, down: Tensor, beta: Tensor, add: bool, tiling: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_feed_forward`, its activations and pre-activations; `add`: x plus that, x has a gradient of its own."""
    pre = x.new_empty((len(x), len(up)))
    act = run_feed_forward((x, up), r, pre, beta, (False, False), tiling)[0]
    return run_residual_product(x, act, down, tiling[5:10])[0] if add else act @ down.T, act, pre


@torch.library.custom_op("candidates::feed_forward_backward", mutates_args=())
def feed_forward_backward(
    dy: Tensor, down: Tensor, r: Tensor, pre: Tensor, beta: Tensor, beta_grad: bool, tiling: list[int]
) -> list[Tensor]:
    """r times the gradient of the pre-activations, and the gradient of beta."""
    return run_feed_forward((dy.contiguous(), down.T.contiguous()), r, pre, beta, (True, beta_grad), tiling)


@feed_forward.register_fake
def _(x: Tensor, twin: Tensor, r: Tensor, up: Tensor, down: Tensor, beta: Tensor, add: bool,
      tiling: list[int]) -> tuple:  # fmt: skip
    return torch.empty_like(x), x.new_empty((len(x), len(up))), x.new_empty((len(x), len(up)))


@feed_forward_backward.register_fake
def _(dy: Tensor, down: Tensor, r: Tensor, pre: Tensor, beta: Tensor, beta_grad: bool, tiling: list[int]) -> list:
    return [torch.empty_like(pre), pre.new_empty((pre.shape[1],), dtype=torch.float32)]


def save_feed_forward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, _, r, up, down, beta, ctx.add, ctx.tiling = inputs
    ctx.save_for_backward(x, r, up, down, beta, *output[1:])
    ctx.set_materialize_grads(False)


def feed_forward_gradients(ctx: Any, dy: Tensor, *_: Tensor) -> tuple:
    """Gradients of x (of its sum), the twin, up, down and beta."""
    x, r, up, down, beta, act, pre = ctx.saved_tensors
    beta_grad = ctx.needs_input_grad[5]
    dpre, dbeta = feed_forward_backward(dy, down, r, pre, beta, beta_grad, ctx.tiling)
    dx, dbeta = dy if ctx.add else None, dbeta.to(beta.dtype) if beta_grad else None
    return dx, dpre @ up, None, dpre.T @ x, dy.T @ act, dbeta, None, None


feed_forward.register_autograd(feed_forward_gradients, setup_context=save_feed_forward)

# ----------------------------------------------------------------------------------------------
# B. Queries, keys and values of the attention in one pass over the product
# ----------------------------------------------------------------------------------------------


def plain_heads(
    x: Tensor, twin: Tensor, r: Tensor, weight: Tensor, gain: Tensor, rotary: Tensor, extra: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q (tokens, H, D), k and v (tokens, KV, D) of x (tokens, C) with weight ((H + 2 KV) D, C), gain (H,).

    q and k are normalized per head and rotated by rotary (2, T, half), cosines and sines at position row % T;
    `extra` (tokens, KV, D) is added to v. r (tokens,) gets no gradient.
    """
    heads, length = len(gain), rotary.shape[1]
    size = x.shape[1] // heads
    rows = (r.detach()[:, None] * F.linear(carry(x, twin), weight)).view(-1, length, len(weight) // size, size)
    q, k, v = rows.tensor_split([heads, (heads + rows.shape[2]) // 2], 2)
    cos, sin = rotary[:, :, None, :]
    q = t.apply_rotary(t.rms_norm(q), cos, sin) * gain[:, None]
    k, v = t.apply_rotary(t.rms_norm(k), cos, sin).flatten(0, 1), v.flatten(0, 1)
    return q.flatten(0, 1), k, v if extra is None else v + extra


@triton.jit
def spots(row, width, HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Offsets (ROWS, HEADS, SIZE / 2 HALF, HALF) of what is first in its pair; its partner is HALF further.

    Both halves of a pair are loaded as vectors into the same place of two tiles: no thread needs another's values.
    """
    head = tl.arange(0, HEADS)[None, :, None, None]
    block = tl.arange(0, SIZE // (2 * HALF))[None, None, :, None]
    return row * width + head * SIZE + block * (2 * HALF) + tl.arange(0, HALF)[None, None, None, :]


@triton.jit
def angles(rotary, place, tokens, length, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines (ROWS, 1, SIZE / 2 HALF, HALF) for `spots` of rows `place`; 1 and 0 where nothing rotates.

    Loaded as a small tile, so that it takes on the layout of the large one and not the other way round.
    """
    at, live = (place % length * HALF)[:, None] + tl.arange(0, HALF)[None, :], place[:, None] < tokens
    cos = tl.load(rotary + at, mask=live, other=1.0).to(tl.float32)
    sin = tl.load(rotary + length * HALF + at, mask=live, other=0.0).to(tl.float32)
    turns = tl.arange(0, SIZE // (2 * HALF))[None, None, :, None] == 0
    return tl.where(turns, cos[:, None, None, :], 1.0), tl.where(turns, sin[:, None, None, :], 0.0)


@triton.jit
def per_head(tile):
    """Sums (ROWS, HEADS, 1, 1) over a tile of `spots`."""
    return tl.sum(tl.sum(tile, 3), 2)[:, :, None, None]


@triton.jit
def place_heads(u, out, gain, cos, sin, row, tokens, eps, width, FIRST: tl.constexpr, HEADS: tl.constexpr,
                SIZE: tl.constexpr, HALF: tl.constexpr, GAIN: tl.constexpr):  # fmt: skip
    """Normalize, rotate and store HEADS heads of u from head FIRST on."""
    source, live = spots(row, width, HEADS, SIZE, HALF) + FIRST * SIZE, row < tokens
    a = tl.load(u + source, mask=live, other=0.0).to(tl.float32)
    b = tl.load(u + source + HALF, mask=live, other=0.0).to(tl.float32)
    factor = tl.rsqrt(per_head(a * a + b * b) / SIZE + eps)
    if GAIN:
        factor *= tl.load(gain + tl.arange(0, HEADS)).to(tl.float32)[None, :, None, None]
    a, b = a * factor, b * factor
    target = spots(row, HEADS * SIZE, HEADS, SIZE, HALF)
    tl.store(out + target, (a * cos + b * sin).to(out.dtype.element_ty), mask=live)
    tl.store(out + target + HALF, (b * cos - a * sin).to(out.dtype.element_ty), mask=live)


@kernel(["tokens", "length"])
def heads_tiles(u, r, gain, rotary, extra, q, k, v, tokens, length, EPS: tl.constexpr, ROWS: tl.constexpr,
                HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
                EXTRA: tl.constexpr):  # fmt: skip
    """q, k and v of ROWS rows of the product u (tokens, (HEADS + 2 KV) SIZE)."""
    first, width = tl.program_id(0) * ROWS, (HEADS + 2 * KV) * SIZE
    place = first + tl.arange(0, ROWS)
    row = place[:, None, None, None]
    factor = tl.load(r + row, mask=row < tokens, other=1.0)
    cos, sin = angles(rotary, place, tokens, length, SIZE, HALF)
    eps = EPS / (factor * factor)
    place_heads(u, q, gain, cos, sin, row, tokens, eps, width, 0, HEADS, SIZE, HALF, True)
    place_heads(u, k, gain, cos, sin, row, tokens, eps, width, HEADS, KV, SIZE, HALF, False)
    flat, channel = place[:, None], tl.arange(0, KV * SIZE)[None, :]
    live = (flat < tokens) & (channel < KV * SIZE)
    value = tl.load(u + flat * width + (HEADS + KV) * SIZE + channel, mask=live, other=0.0).to(tl.float32)
    value *= tl.load(r + flat, mask=flat < tokens, other=1.0)
    if EXTRA:
        value += tl.load(extra + flat * (KV * SIZE) + channel, mask=live, other=0.0).to(tl.float32)
    tl.store(v + flat * (KV * SIZE) + channel, value.to(v.dtype.element_ty), mask=live)


@triton.jit
def end_heads(value, r, gain, rotary, extra, q, k, v, factors, row, column, tokens, length, EPS: tl.constexpr,
              HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
              EXTRA: tl.constexpr):  # fmt: skip
    """Ending of a tile (ROWS, whole heads of one kind) of the product: what `heads_tiles` does to it, in registers."""
    ROWS: tl.constexpr = value.shape[0]
    GROUP: tl.constexpr = value.shape[1] // SIZE
    place, head = row + tl.arange(0, ROWS), column // SIZE + tl.arange(0, GROUP)
    is_value = column >= (HEADS + KV) * SIZE
    r = tl.load(r + place, mask=place < tokens, other=1.0)[:, None, None, None]
    pairs = tl.reshape(value, (ROWS, GROUP, SIZE // (2 * HALF), 2, HALF))
    a, b = tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))
    factor = tl.rsqrt(per_head(a * a + b * b) / SIZE + EPS / (r * r))
    normed = (place[:, None] < tokens) & (head[None, :] < HEADS + KV)
    tl.store(factors + place[:, None] * (HEADS + KV) + head[None, :], tl.reshape(factor, (ROWS, GROUP)), mask=normed)
    gains = tl.load(gain + head, mask=head < HEADS, other=1.0).to(tl.float32)[None, :, None, None]
    factor = tl.where(is_value, r, factor * gains)
    until = tl.where(is_value, 0, tokens)  # nothing rotates in v
    cos, sin = angles(rotary, place, until, length, SIZE, HALF)
    a, b = a * factor, b * factor
    both = tl.permute(tl.join(a * cos + b * sin, b * cos - a * sin), (0, 1, 2, 4, 3))
    value = tl.reshape(both, (ROWS, GROUP * SIZE))
    if EXTRA:
        at = place[:, None] * (KV * SIZE) + column - (HEADS + KV) * SIZE + tl.arange(0, GROUP * SIZE)[None, :]
        value += tl.load(extra + at, mask=is_value & (place[:, None] < tokens), other=0.0).to(tl.float32)
    # Selected, not branched: Triton 3.6 cannot flatten a loop with a branch in it.
    is_query = column < HEADS * SIZE
    out = tl.where(is_query, q, tl.where(is_value, v, k))
    column -= tl.where(is_query, 0, tl.where(is_value, HEADS + KV, HEADS) * SIZE)
    at = place[:, None] * (tl.where(is_query, HEADS, KV) * SIZE) + column + tl.arange(0, GROUP * SIZE)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=place[:, None] < tokens)


@kernel(["tokens", "length"])
def heads_product_tiles(x, weight, r, gain, rotary, extra, q, k, v, factors, tokens, length, width, EPS: tl.constexpr,
                        ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, HEADS: tl.constexpr,
                        KV: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, EXTRA: tl.constexpr):  # fmt: skip
    """The product x weight^T, each tile ended by `end_heads` in two halves; x is (tokens, width)."""
    across: tl.constexpr = (HEADS + 2 * KV) * SIZE // COLS
    for tile in tl.range(tl.program_id(0), across * tl.cdiv(tokens, ROWS), tl.num_programs(0), flatten=True):
        row, column = tile // across * ROWS, tile % across * COLS
        total = tl.zeros((ROWS, COLS), tl.float32)
        for inner in range(0, width, INNER):
            total = tl.dot(x.load([row, inner]), weight.load([column, inner]).T, total)
        left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLS // 2)), (0, 2, 1)))
        end_heads(left, r, gain, rotary, extra, q, k, v, factors, row, column, tokens, length, EPS, HEADS, KV, SIZE,
                  HALF, EXTRA)
        end_heads(right, r, gain, rotary, extra, q, k, v, factors, row, column + COLS // 2, tokens, length, EPS, HEADS,
                  KV, SIZE, HALF, EXTRA)  # fmt: skip


@triton.jit
def replace_heads(u, final, factors, dout, du, gain, cos, sin, row, tokens, eps, width, FIRST: tl.constexpr,
                  HEADS: tl.constexpr, NORMED: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
                  GAIN: tl.constexpr, PRODUCT: tl.constexpr):  # fmt: skip
    """Backward of `place_heads`: store the gradient of u; returns <gradient, normalized> (ROWS, HEADS, 1, 1).

    The normalized heads come from the product u, or (not PRODUCT) from what was made of it: turned back, over gain.
    """
    source, live = spots(row, width, HEADS, SIZE, HALF) + FIRST * SIZE, row < tokens
    target, head = spots(row, HEADS * SIZE, HEADS, SIZE, HALF), tl.arange(0, HEADS)[None, :, None, None]
    left = tl.load(dout + target, mask=live, other=0.0).to(tl.float32)
    right = tl.load(dout + target + HALF, mask=live, other=0.0).to(tl.float32)
    da, db = left * cos - right * sin, left * sin + right * cos
    if GAIN:
        gains = tl.load(gain + head).to(tl.float32)
    if PRODUCT:
        a = tl.load(u + source, mask=live, other=0.0).to(tl.float32)
        b = tl.load(u + source + HALF, mask=live, other=0.0).to(tl.float32)
        factor = tl.rsqrt(per_head(a * a + b * b) / SIZE + eps)
        a, b = a * factor, b * factor
    else:
        left = tl.load(final + target, mask=live, other=0.0).to(tl.float32)
        right = tl.load(final + target + HALF, mask=live, other=0.0).to(tl.float32)
        factor = tl.load(factors + row * NORMED + FIRST + head, mask=live, other=0.0)
        length = cos * cos + sin * sin  # 1 but for the table's rounding
        if GAIN:
            length *= tl.where(gains == 0, float("inf"), gains)
        a, b = (left * cos - right * sin) / length, (left * sin + right * cos) / length
    inner = per_head(a * da + b * db)
    shrink = inner / SIZE
    if GAIN:
        factor *= gains
    tl.store(du + source, (factor * (da - a * shrink)).to(du.dtype.element_ty), mask=live)
    tl.store(du + source + HALF, (factor * (db - b * shrink)).to(du.dtype.element_ty), mask=live)
    return inner


@kernel(["tokens", "length"])
def heads_backward_tiles(u, q, k, factors, r, gain, rotary, dq, dk, dv, dtwin, du, dextra, sums, tokens, length,
                         EPS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr,
                         SIZE: tl.constexpr, HALF: tl.constexpr, TWIN: tl.constexpr, EXTRA: tl.constexpr,
                         PRODUCT: tl.constexpr):  # fmt: skip
    """The whole gradient of u, walking over blocks of ROWS rows; sums (programs, HEADS) of the gain's gradient."""
    width = (HEADS + 2 * KV) * SIZE
    gains = tl.zeros((ROWS, HEADS, 1, 1), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        place = block * ROWS + tl.arange(0, ROWS)
        row = place[:, None, None, None]
        factor = tl.load(r + row, mask=row < tokens, other=1.0)
        cos, sin = angles(rotary, place, tokens, length, SIZE, HALF)
        eps = EPS / (factor * factor)
        gains += replace_heads(u, q, factors, dq, du, gain, cos, sin, row, tokens, eps, width, 0, HEADS, HEADS + KV,
                               SIZE, HALF, True, PRODUCT)  # fmt: skip
        replace_heads(u, k, factors, dk, du, gain, cos, sin, row, tokens, eps, width, HEADS, KV, HEADS + KV, SIZE, HALF,
                      False, PRODUCT)  # fmt: skip
        flat, channel = place[:, None], tl.arange(0, KV * SIZE)[None, :]
        live = (flat < tokens) & (channel < KV * SIZE)
        value = tl.load(dv + flat * (KV * SIZE) + channel, mask=live, other=0.0).to(tl.float32)
        if TWIN:
            value += tl.load(dtwin + flat * (KV * SIZE) + channel, mask=live, other=0.0).to(tl.float32)
        if EXTRA:
            tl.store(dextra + flat * (KV * SIZE) + channel, value.to(dextra.dtype.element_ty), mask=live)
        value *= tl.load(r + flat, mask=flat < tokens, other=1.0)
        tl.store(du + flat * width + (HEADS + KV) * SIZE + channel, value.to(du.dtype.element_ty), mask=live)
    total = tl.sum(tl.reshape(gains, (ROWS, HEADS)), 0)
    tl.store(sums + tl.program_id(0) * HEADS + tl.arange(0, HEADS), total)


class HeadSizes(NamedTuple):
    """Query heads, key/value heads, head size, half of the rotated dimensions."""

    heads: int
    kv: int
    size: int
    half: int


def head_sizes(width: int, weight: Tensor, gain: Tensor, rotary: Tensor) -> HeadSizes:
    """Sizes that the shapes imply; the kernels want powers of two."""
    size = width // len(gain)
    sizes = HeadSizes(len(gain), (len(weight) // size - len(gain)) // 2, size, rotary.shape[2])
    if any(n & (n - 1) for n in sizes):
        raise ValueError(f"{sizes}: not powers of two")
    return sizes


def heads_product(
    x: Tensor, weight: Tensor, places: list[Tensor], outputs: list[Tensor], sizes: HeadSizes, tiling: Tiling
) -> Tensor:
    """Run `heads_product_tiles` into outputs q, k, v; the factors of the norms (tokens, H + KV).

    `places`: r, gain, rotary and, where given, extra.
    """
    n, (rows, cols, inner, warps, stages) = len(x), tiling[:5]
    if sizes.kv * sizes.size % (cols // 2):
        raise ValueError(f"half a tile of {cols} columns holds heads of two kinds")
    factors = x.new_empty((n, sizes.heads + sizes.kv), dtype=torch.float32)
    a, b = (TensorDescriptor.from_tensor(f, [count, inner]) for f, count in ((x, rows), (weight, cols)))
    r, gain, rotary, extra = (*places, x)[:4]
    grid = (programs(x.device, triton.cdiv(n, rows) * triton.cdiv(len(weight), cols)),)
    heads_product_tiles[grid](a, b, r, gain, rotary, extra, *outputs, factors, n, rotary.shape[1], x.shape[1], EPS,
                              rows, cols, inner, *sizes, len(places) == 4, num_warps=warps,
                              num_stages=stages)  # fmt: skip
    return factors


@torch.library.custom_op("candidates::heads", mutates_args=())
def heads(
    x: Tensor, twin: Tensor, r: Tensor, weight: Tensor, gain: Tensor, rotary: Tensor, extra: Tensor | None,
    tiling: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`plain_heads`, v's twin for `exclusive`, and for the backward pass the product or the factors of the norms.

    A tiling of 7 numbers is a pass over cuBLAS's product; of 9, our own product with that pass as its ending.
    """
    n, sizes = len(x), head_sizes(x.shape[1], weight, gain, rotary)
    q, k, v, v_twin = (x.new_empty((n, count, sizes.size)) for count in (sizes.heads, sizes.kv, sizes.kv, sizes.kv))
    if len(tiling) == 9:
        places = [place for place in (r, gain, rotary, extra) if place is not None]
        return q, k, v, v_twin, heads_product(x, weight, places, [q, k, v], sizes, tiling)
    rows, warps, stages = tiling[:3]
    u = x @ weight.T
    heads_tiles[(triton.cdiv(n, rows),)](u, r, gain, rotary, u if extra is None else extra, q, k, v, n,
                                         rotary.shape[1], EPS, rows, *sizes, extra is not None, num_warps=warps,
                                         num_stages=stages)  # fmt: skip
    return q, k, v, v_twin, u


@torch.library.custom_op("candidates::heads_backward", mutates_args=())
def heads_backward(
    upstream: list[Tensor], saved: list[Tensor], has_extra: bool, tiling: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the product, of the gain, and of v (written only where `extra` wants it).

    `upstream` are the gradients of q, k, v and, where something used it, of v's twin; `saved` r, gain, rotary and the
    product, or the factors of the norms, q and k.
    """
    dq, dk, dv, dtwin = [d.contiguous() for d in (*upstream, upstream[2])[:4]]
    (n, count, size), kv, (rows, warps, stages, per_processor) = dq.shape, dk.shape[1], tiling[-4:]
    r, gain, rotary, basis, q, k = (*saved, *saved[3:], *saved[3:])[:6]
    grid = (programs(dq.device, triton.cdiv(n, rows), per_processor),)
    du, dextra = dq.new_empty((n, (count + 2 * kv) * size)), torch.empty_like(dv) if has_extra else dv.new_empty(0)
    sums = dq.new_empty((grid[0], count), dtype=torch.float32)
    heads_backward_tiles[grid](basis, q, k, basis, r, gain, rotary, dq, dk, dv, dtwin, du, dextra, sums, n,
                               rotary.shape[1], EPS, rows, count, kv, size, rotary.shape[2], len(upstream) == 4,
                               has_extra, len(saved) == 4, num_warps=warps, num_stages=stages)  # fmt: skip
    return du, sums.sum(0).to(gain.dtype), dextra


@heads.register_fake
def _(x: Tensor, twin: Tensor, r: Tensor, weight: Tensor, gain: Tensor, rotary: Tensor, extra: Tensor | None,
      tiling: list[int]) -> tuple:  # fmt: skip
    size = x.shape[1] // len(gain)
    kv = (len(weight) // size - len(gain)) // 2
    outputs = tuple(x.new_empty((len(x), count, size)) for count in (len(gain), kv, kv, kv))
    if len(tiling) == 9:
        return *outputs, x.new_empty((len(x), len(gain) + kv), dtype=torch.float32)
    return *outputs, x.new_empty((len(x), len(weight)))


@heads_backward.register_fake
def _(upstream: list[Tensor], saved: list[Tensor], has_extra: bool, tiling: list[int]) -> tuple:
    dq, dk, dv = upstream[:3]
    width = (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2]
    return dq.new_empty((len(dq), width)), torch.empty_like(saved[1]), dv.new_empty(dv.shape if has_extra else 0)


def save_heads(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, _, r, weight, gain, rotary, extra, ctx.tiling = inputs
    ctx.has_extra = extra is not None
    ctx.save_for_backward(x, weight, r, gain, rotary, output[4], *(output[:2] if len(ctx.tiling) == 9 else ()))
    ctx.set_materialize_grads(False)


def heads_gradients(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dtwin: Tensor | None, _: None) -> tuple:
    """Gradients of the twin, the weight, the gain and `extra`."""
    x, weight, *saved = ctx.saved_tensors
    upstream = [dq, dk, dv] + ([] if dtwin is None else [dtwin])
    du, dgain, dextra = heads_backward(upstream, saved, ctx.has_extra, ctx.tiling)
    return None, du @ weight, None, du.T @ x, dgain, None, dextra if ctx.has_extra else None, None


heads.register_autograd(heads_gradients, setup_context=save_heads)

# ----------------------------------------------------------------------------------------------
# C. Exclusive self-attention
# ----------------------------------------------------------------------------------------------


def plain_exclusive(y: Tensor, v: Tensor, twin: Tensor) -> Tensor:
    """`train_gpt.exclusive` of y (tokens, H, D) and v (tokens, KV, D), whose gradient goes to `twin`."""
    grouped, own = y.unflatten(1, (v.shape[1], -1)), carry(v, twin).unsqueeze(2)
    share = (grouped * own).sum(-1, keepdim=True) / (own * own).sum(-1, keepdim=True).clamp_min(1e-12)
    return (grouped - share * own).flatten(1, 2)


@kernel(["items"])
def exclusive_tiles(y, v, dz, out, dv, items, GROUP: tl.constexpr, SIZE: tl.constexpr, ITEMS: tl.constexpr,
                    BACKWARD: tl.constexpr):  # fmt: skip
    """ITEMS pairs of token and key/value head with their GROUP query heads: z, or dy and the heads' sum of dv."""
    item, d = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)[:, None], tl.arange(0, SIZE)[None, :]
    live = (item < items) & (d < SIZE)
    own = tl.load(v + item * SIZE + d, mask=live, other=0.0).to(tl.float32)
    power = tl.sum(own * own, 1)[:, None]
    inverse = 1.0 / tl.maximum(power, 1e-12)
    total = tl.zeros((ITEMS, SIZE), tl.float32)
    for head in tl.static_range(GROUP):
        at = (item * GROUP + head) * SIZE + d
        value = tl.load(y + at, mask=live, other=0.0).to(tl.float32)
        share = tl.sum(value * own, 1)[:, None] * inverse
        if BACKWARD:
            upstream = tl.load(dz + at, mask=live, other=0.0).to(tl.float32)
            along = tl.sum(upstream * own, 1)[:, None] * inverse
            tl.store(out + at, (upstream - along * own).to(out.dtype.element_ty), mask=live)
            total -= share * upstream + along * value - tl.where(power > 1e-12, 2 * along * share, 0.0) * own
        else:
            tl.store(out + at, (value - share * own).to(out.dtype.element_ty), mask=live)
    if BACKWARD:
        tl.store(dv + item * SIZE + d, total.to(dv.dtype.element_ty), mask=live)


def run_exclusive(y: Tensor, v: Tensor, dz: Tensor | None, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """z, or the gradients of y and v."""
    y, v, (items, warps, stages) = y.contiguous(), v.contiguous(), tiling
    out, dv, pairs = torch.empty_like(y), v if dz is None else torch.empty_like(v), v.shape[0] * v.shape[1]
    exclusive_tiles[(triton.cdiv(pairs, items),)](y, v, y if dz is None else dz.contiguous(), out, dv, pairs,
                                                  y.shape[1] // v.shape[1], y.shape[2], items, dz is not None,
                                                  num_warps=warps, num_stages=stages)  # fmt: skip
    return out, dv


@torch.library.custom_op("candidates::exclusive", mutates_args=())
def exclusive(y: Tensor, v: Tensor, twin: Tensor, tiling: list[int]) -> Tensor:
    """`plain_exclusive`."""
    return run_exclusive(y, v, None, tiling)[0]


@torch.library.custom_op("candidates::exclusive_backward", mutates_args=())
def exclusive_backward(y: Tensor, v: Tensor, dz: Tensor, tiling: list[int]) -> tuple[Tensor, Tensor]:
    """Gradients of y and v."""
    return run_exclusive(y, v, dz, tiling)


@exclusive.register_fake
def _(y: Tensor, v: Tensor, twin: Tensor, tiling: list[int]) -> Tensor:
    return y.new_empty(y.shape)


@exclusive_backward.register_fake
def _(y: Tensor, v: Tensor, dz: Tensor, tiling: list[int]) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), v.new_empty(v.shape)


def save_exclusive(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, v, _, ctx.tiling = inputs
    ctx.save_for_backward(y, v)
    ctx.set_materialize_grads(False)


def exclusive_gradients(ctx: Any, dz: Tensor) -> tuple:
    dy, dv = exclusive_backward(*ctx.saved_tensors, dz, ctx.tiling)
    return dy, None, dv, None


exclusive.register_autograd(exclusive_gradients, setup_context=save_exclusive)

# ----------------------------------------------------------------------------------------------
# D. The step of the residual stream between two parts of a layer
# ----------------------------------------------------------------------------------------------


def plain_residual(
    x: Tensor, y: Tensor | None, skip: Tensor | None, skip_twin: Tensor | None, x0: Tensor | None,
    x0_twin: Tensor | None, mix: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The new x (tokens, C), its twin, r = scale * rsqrt(mean(x^2) + eps) (tokens,), and twins of x + y and x0.

    The new x is x + y, or with mix (3, C): mix[0] (x + y) + mix[1] skip + mix[2] x0; y and skip may be absent. In the
    model mix[1] is resid_mix[0] * skip_weight, a product of two vectors that autograd takes apart.
    The twin's gradient g, taken with r held fixed, counts as that of x and of r. The last two let the gradients that
    x + y (as a skip) and x0 (in the next layer) receive elsewhere be added here, and not by kernels of their own.
    """
    old = x if y is None else x + y
    new = old
    if mix is not None:
        new = mix[0] * old + mix[2] * carry(x0, x0_twin)
        new = new if skip is None else new + mix[1] * carry(skip, skip_twin)
    r = scale * torch.rsqrt(new.square().mean(-1) + EPS)
    return new, new * (r / r.detach())[:, None], r, old, x0_twin


@kernel(["tokens"])
def residual_tiles(x, y, skip, x0, mix, new, factors, tokens, scale, EPS: tl.constexpr, WIDTH: tl.constexpr,
                   COLS: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr, SKIP: tl.constexpr,
                   MIX: tl.constexpr):  # fmt: skip
    """The new x and r of ROWS rows; COLS is WIDTH rounded up to a power of two."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    at, live = row[:, None] * WIDTH + column, (row[:, None] < tokens) & (column < WIDTH)
    every = mix + column + 0 * row[:, None]  # whole tiles: a line would change its layout through shared memory
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if SUM:
        value += tl.load(y + at, mask=live, other=0.0).to(tl.float32)
    if MIX:
        value *= tl.load(every, mask=live, other=0.0).to(tl.float32)
        first = tl.load(x0 + at, mask=live, other=0.0).to(tl.float32)
        value += first * tl.load(every + 2 * WIDTH, mask=live, other=0.0).to(tl.float32)
    if SKIP:
        other = tl.load(skip + at, mask=live, other=0.0).to(tl.float32)
        value += other * tl.load(every + WIDTH, mask=live, other=0.0).to(tl.float32)
    rounded = value.to(new.dtype.element_ty)
    tl.store(new + at, rounded, mask=live)
    value = rounded.to(tl.float32)
    tl.store(factors + row, scale * tl.rsqrt(tl.sum(value * value, 1) / WIDTH + EPS), mask=row < tokens)


@kernel(["tokens"])
def residual_backward_tiles(x, y, skip, x0, mix, new, factors, dnew, dtwin, dkept, dnext, dx, dskip, dx0, sums, tokens,
                            scale, WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
                            STAGES: tl.constexpr, SUM: tl.constexpr, SKIP: tl.constexpr, MIX: tl.constexpr,
                            KEPT: tl.constexpr, NEXT: tl.constexpr):  # fmt: skip
    """Gradients of x (and y: the same), skip and x0, walking over blocks of rows; sums (programs, 3, WIDTH) of mix's.

    The sums stay in registers, a tile each, and are added up over the tile's rows once, at the end of the walk.
    """
    column = tl.arange(0, COLS)[None, :]
    every = mix + column + 0 * tl.arange(0, ROWS)[:, None]  # whole tiles, as in the forward pass
    within = column + 0 * tl.arange(0, ROWS)[:, None] < WIDTH
    if MIX:
        keep = tl.load(every, mask=within, other=0.0).to(tl.float32)
        first = tl.load(every + 2 * WIDTH, mask=within, other=0.0).to(tl.float32)
        dkeep, dfirst = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    if SKIP:
        other = tl.load(every + WIDTH, mask=within, other=0.0).to(tl.float32)
        dother = tl.zeros((ROWS, COLS), tl.float32)
    blocks = tl.cdiv(tokens, ROWS)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        at, live = row[:, None] * WIDTH + column, (row[:, None] < tokens) & (column < WIDTH)
        g = tl.load(dtwin + at, mask=live, other=0.0).to(tl.float32)
        value = tl.load(new + at, mask=live, other=0.0).to(tl.float32)
        upstream = tl.load(dnew + at, mask=live, other=0.0).to(tl.float32)
        r = tl.load(factors + row, mask=row < tokens, other=0.0)
        shrink = r * r / (WIDTH * scale * scale) * tl.sum(g * value, 1)
        d = upstream + g - value * shrink[:, None]
        if MIX:
            old = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
            if SUM:
                old += tl.load(y + at, mask=live, other=0.0).to(tl.float32)
            dkeep += d * old
            dfirst += d * tl.load(x0 + at, mask=live, other=0.0).to(tl.float32)
            begun = d * first
            if NEXT:
                begun += tl.load(dnext + at, mask=live, other=0.0).to(tl.float32)
            tl.store(dx0 + at, begun.to(dx0.dtype.element_ty), mask=live)
            if SKIP:
                dother += d * tl.load(skip + at, mask=live, other=0.0).to(tl.float32)
                tl.store(dskip + at, (d * other).to(dskip.dtype.element_ty), mask=live)
            d *= keep
        if KEPT:
            d += tl.load(dkept + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=live)
    line = sums + tl.program_id(0) * 3 * WIDTH + tl.arange(0, COLS)
    inside = tl.arange(0, COLS) < WIDTH
    if MIX:
        tl.store(line, tl.sum(dkeep, 0), mask=inside)
        tl.store(line + 2 * WIDTH, tl.sum(dfirst, 0), mask=inside)
    if SKIP:
        tl.store(line + WIDTH, tl.sum(dother, 0), mask=inside)


@torch.library.custom_op("candidates::residual", mutates_args=())
def residual(
    x: Tensor, y: Tensor | None, skip: Tensor | None, skip_twin: Tensor | None, x0: Tensor | None,
    x0_twin: Tensor | None, mix: Tensor | None, scale: float, tiling: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`plain_residual`; twins are memory that nobody writes or reads."""
    (n, width), (rows, warps, stages) = x.shape, tiling[:3]
    new, twin, kept, following = (torch.empty_like(x) for _ in range(4))
    r = x.new_empty(n, dtype=torch.float32)
    inputs = [x if given is None else given for given in (x, y, skip, x0, mix)]
    residual_tiles[(triton.cdiv(n, rows),)](*inputs, new, r, n, scale, EPS, width, triton.next_power_of_2(width), rows,
                                            y is not None, skip is not None, mix is not None, num_warps=warps,
                                            num_stages=stages)  # fmt: skip
    return new, twin, r, kept, following


@torch.library.custom_op("candidates::residual_backward", mutates_args=())
def residual_backward(
    upstream: list[Tensor], saved: list[Tensor], present: list[bool], scale: float, tiling: list[int]
) -> list[Tensor]:
    """Gradients of x, skip, x0 and mix (empty where absent).

    `upstream`: of the new x, its twin, and those present of the twins of x + y and x0; `saved`: new x, r and, with mix,
    those present of x, y, skip, x0, mix; `present`: y, skip, mix, the two upstream.
    """
    (new, r, *rest), (has_y, has_skip, has_mix, *more) = saved, present
    (n, width), (rows, warps, stages, per_processor) = new.shape, tiling[-4:]
    left, others = iter(rest), iter(upstream[2:])
    inputs = [next(left) if has_mix and here else new for here in (True, has_y, has_skip, True, True)]
    others = [next(others) if here else new for here in more]
    dx, dskip, dx0 = (torch.empty_like(new) if here else new.new_empty(0) for here in (True, has_skip, has_mix))
    grid = (programs(new.device, triton.cdiv(n, rows), per_processor),)
    sums = new.new_zeros((grid[0] if has_mix else 0, 3, width), dtype=torch.float32)
    residual_backward_tiles[grid](*inputs, new, r, *upstream[:2], *others, dx, dskip, dx0, sums, n, scale, width,
                                  triton.next_power_of_2(width), rows, stages, *present, num_warps=warps)  # fmt: skip
    return [dx, dskip, dx0, sums.sum(0).to(new.dtype)]


@residual.register_fake
def _(x: Tensor, y: Tensor | None, skip: Tensor | None, skip_twin: Tensor | None, x0: Tensor | None,
      x0_twin: Tensor | None, mix: Tensor | None, scale: float, tiling: list[int]) -> tuple:  # fmt: skip
    new, twin, kept, following = (torch.empty_like(x) for _ in range(4))
    return new, twin, x.new_empty(len(x), dtype=torch.float32), kept, following


@residual_backward.register_fake
def _(upstream: list[Tensor], saved: list[Tensor], present: list[bool], scale: float, tiling: list[int]) -> list:
    new, (_, has_skip, has_mix) = saved[0], present[:3]
    shapes = (new.shape, new.shape if has_skip else (0,), new.shape if has_mix else (0,), (3, new.shape[1]))
    return [new.new_empty(shape) for shape in shapes]


def save_residual(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, y, skip, _, x0, _, mix, ctx.scale, ctx.tiling = inputs
    ctx.present = [y is not None, skip is not None, mix is not None]
    needed = [x, y, skip, x0, mix] if mix is not None else []
    ctx.save_for_backward(output[0], output[2], *(tensor for tensor in needed if tensor is not None))
    ctx.set_materialize_grads(False)


def residual_gradients(
    ctx: Any, dnew: Tensor | None, dtwin: Tensor | None, _: None, dkept: Tensor | None, dnext: Tensor | None
) -> tuple:
    """Gradients of x, y, the twins of skip and x0, and mix."""
    saved, (has_y, has_skip, has_mix) = list(ctx.saved_tensors), ctx.present
    upstream = [torch.zeros_like(saved[0]) if d is None else d for d in (dnew, dtwin)]
    upstream = [d.contiguous() for d in (*upstream, dkept, dnext) if d is not None]
    present = [*ctx.present, dkept is not None, dnext is not None]
    dx, dskip, dx0, dmix = residual_backward(upstream, saved, present, ctx.scale, ctx.tiling)
    mixed = (None, dskip if has_skip else None, None, dx0, dmix) if has_mix else (None,) * 5
    return dx, dx if has_y else None, *mixed, None, None


residual.register_autograd(residual_gradients, setup_context=save_residual)


def plain_residual_product(x: Tensor, z: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_residual` of x (tokens, C) and z weight^T, z (tokens, inputs)."""
    return plain_residual(x, F.linear(z, weight), None, None, None, None, None, scale)[:3]


@triton.jit
def end_residual(value, x, new, squares, row, column, tokens):
    """Ending of a tile of the product: add x, store, and store each row's sum of squares over the tile's columns."""
    place = row + tl.arange(0, value.shape[0])
    rounded = (value + x.load([row, column]).to(tl.float32)).to(new.dtype)
    new.store([row, column], rounded)
    total = rounded.to(tl.float32)
    tl.store(squares + column // value.shape[1] * tokens + place, tl.sum(total * total, 1), mask=place < tokens)


@kernel(["tokens"])
def residual_product_tiles(a, b, x, new, squares, tokens, width, length, ROWS: tl.constexpr, COLS: tl.constexpr,
                           INNER: tl.constexpr):  # fmt: skip
    """x + a b^T for a (tokens, length) and b (width, length), each tile ended by `end_residual` in two halves."""
    across = tl.cdiv(width, COLS)
    for tile in tl.range(tl.program_id(0), across * tl.cdiv(tokens, ROWS), tl.num_programs(0), flatten=True):
        row, column = tile // across * ROWS, tile % across * COLS
        total = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, length, INNER):
            total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
        left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLS // 2)), (0, 2, 1)))
        end_residual(left, x, new, squares, row, column, tokens)
        end_residual(right, x, new, squares, row, column + COLS // 2, tokens)


def run_residual_product(x: Tensor, z: Tensor, weight: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """x + z weight^T, and the sums of squares (pieces, tokens) of its rows."""
    (n, width), (rows, cols, inner, warps, stages), new = x.shape, tiling, torch.empty_like(x)
    pieces = 2 * triton.cdiv(width, cols)
    squares = x.new_empty((pieces, n), dtype=torch.float32)
    a, b = (TensorDescriptor.from_tensor(f, [count, inner]) for f, count in ((z, rows), (weight, cols)))
    ends = (TensorDescriptor.from_tensor(f, [rows, cols // 2]) for f in (x, new))
    grid = (programs(x.device, triton.cdiv(n, rows) * triton.cdiv(width, cols)),)
    residual_product_tiles[grid](a, b, *ends, squares, n, width, z.shape[1], rows, cols, inner, num_warps=warps,
                                 num_stages=stages)  # fmt: skip
    return new, squares


@torch.library.custom_op("candidates::residual_product", mutates_args=())
def residual_product(
    x: Tensor, z: Tensor, weight: Tensor, scale: float, tiling: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_residual_product`: the product is never written by itself; the twin is memory that nobody touches."""
    new, squares = run_residual_product(x, z, weight, tiling[:5])
    return new, torch.empty_like(x), scale * torch.rsqrt(squares.sum(0) / x.shape[1] + EPS)


@residual_product.register_fake
def _(x: Tensor, z: Tensor, weight: Tensor, scale: float, tiling: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)


def save_residual_product(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, z, weight, ctx.scale, ctx.tiling = inputs
    ctx.save_for_backward(z, weight, output[0], output[2])
    ctx.set_materialize_grads(False)


def residual_product_gradients(ctx: Any, dnew: Tensor, dtwin: Tensor, _: None) -> tuple:
    """Gradients of x, z and weight."""
    z, weight, *saved = ctx.saved_tensors
    upstream = [torch.zeros_like(saved[0]) if d is None else d.contiguous() for d in (dnew, dtwin)]
    dx = residual_backward(upstream, saved, [True, *[False] * 4], ctx.scale, ctx.tiling)[0]
    return dx, dx @ weight, dx.T @ z, None, None


residual_product.register_autograd(residual_product_gradients, setup_context=save_residual_product)

# ----------------------------------------------------------------------------------------------
# E. Loss: softcapped logits and cross-entropy
# ----------------------------------------------------------------------------------------------


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Nats (tokens,) of targets (tokens,) under cap tanh(hidden weight^T / cap); hidden (tokens, C), weight (V, C)."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(cap * torch.tanh(logits / cap), targets, reduction="none")


@kernel(["tokens"])
def loss_tiles(logits, targets, nll, total, upstream, grad, tokens, vocab, cap, ROWS: tl.constexpr, COLS: tl.constexpr,
               BACKWARD: tl.constexpr, GRADIENT: tl.constexpr):  # fmt: skip
    """Whole rows in registers. Forward: nll, and `total`, the sum of exp(capped logits), or at once the gradient of
    nll in the logits (GRADIENT); BACKWARD: that gradient times upstream, from `total`.

    Capped logits need no maximum before exp: exp(cap) fits into float32 for any cap below 80.
    """
    row, piece = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    at, live = row.to(tl.int64)[:, None] * vocab + piece, (row[:, None] < tokens) & (piece < vocab)
    bent = 1.0 - 2.0 / (1.0 + tl.exp(tl.load(logits + at, mask=live, other=0.0).to(tl.float32) * (2.0 / cap)))
    target = tl.load(targets + row, mask=row < tokens, other=0)
    powers = tl.where(piece < vocab, tl.exp(bent * cap), 0.0)
    if BACKWARD:
        mass = tl.load(total + row, mask=row < tokens, other=1.0)
        weight = tl.load(upstream + row, mask=row < tokens, other=0.0)
    else:
        mass = tl.sum(powers, 1)
        chosen = tl.sum(tl.where(piece == target[:, None], bent, 0.0), 1) * cap
        tl.store(nll + row, tl.log(mass) - chosen, mask=row < tokens)
        weight = tl.full((ROWS,), 1.0, tl.float32)
        if not GRADIENT:
            tl.store(total + row, mass, mask=row < tokens)
    if GRADIENT:
        d = powers / mass[:, None] - tl.where(piece == target[:, None], 1.0, 0.0)
        tl.store(grad + at, (weight[:, None] * d * (1.0 - bent * bent)).to(grad.dtype.element_ty), mask=live)


def run_loss(logits: Tensor, targets: Tensor, cap: float, tiling: Tiling, backward: list[Tensor] | None,
             in_place: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """nll and sums of exp; with backward = [sums of exp, upstream], or in place of the logits, the gradient too."""
    (n, vocab), (rows, warps, stages) = logits.shape, tiling
    nll, total = (logits.new_empty(n, dtype=torch.float32) for _ in range(2))
    upstream, grad = total, logits
    if backward is not None:
        (total, upstream), grad = backward, torch.empty_like(logits)
    loss_tiles[(triton.cdiv(n, rows),)](logits, targets, nll, total, upstream, grad, n, vocab, cap, rows,
                                        triton.next_power_of_2(vocab), backward is not None,
                                        in_place or backward is not None, num_warps=warps,
                                        num_stages=stages)  # fmt: skip
    return nll, total if backward is None else grad


@torch.library.custom_op("candidates::loss", mutates_args=())
def loss(logits: Tensor, targets: Tensor, cap: float, tiling: list[int]) -> tuple[Tensor, Tensor]:
    """nll (tokens,) and sums of exp for the backward pass."""
    return run_loss(logits, targets, cap, tiling, None)


@torch.library.custom_op("candidates::loss_backward", mutates_args=())
def loss_backward(
    logits: Tensor, targets: Tensor, cap: float, total: Tensor, upstream: Tensor, tiling: list[int]
) -> Tensor:
    """Gradient of the logits."""
    return run_loss(logits, targets, cap, tiling, [total, upstream.contiguous()])[1]


@torch.library.custom_op("candidates::head_loss", mutates_args=())
def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, tiling: list[int]
) -> tuple[Tensor, Tensor]:
    """`plain_loss`, and its gradient in the logits, which replaces them: nothing of that size is read afterwards but by
    the products. For training only: without a backward pass it writes in vain."""
    logits = hidden @ weight.T
    return run_loss(logits, targets, cap, tiling, None, in_place=True)[0], logits


@loss.register_fake
def _(logits: Tensor, targets: Tensor, cap: float, tiling: list[int]) -> tuple[Tensor, Tensor]:
    return tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))


@loss_backward.register_fake
def _(logits: Tensor, targets: Tensor, cap: float, total: Tensor, upstream: Tensor, tiling: list[int]) -> Tensor:
    return torch.empty_like(logits)


@head_loss.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, tiling: list[int]) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(len(hidden), dtype=torch.float32), hidden.new_empty((len(hidden), len(weight)))


def save_loss(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.cap, ctx.tiling = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.set_materialize_grads(False)


def loss_gradients(ctx: Any, dnll: Tensor, _: None) -> tuple:
    logits, targets, total = ctx.saved_tensors
    return loss_backward(logits, targets, ctx.cap, total, dnll, ctx.tiling), None, None, None


def save_head_loss(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.set_materialize_grads(False)


def head_loss_gradients(ctx: Any, dnll: Tensor, _: None) -> tuple:
    """The factor of a row goes onto (tokens, C) tensors instead of onto the gradient of the logits."""
    hidden, weight, grad = ctx.saved_tensors
    factor = dnll[:, None]  # stays float32: a mean's 1 / tokens, rounded, would scale every gradient
    return (factor * (grad @ weight)).to(hidden.dtype), grad.T @ (factor * hidden).to(hidden.dtype), None, None, None


loss.register_autograd(loss_gradients, setup_context=save_loss)
head_loss.register_autograd(head_loss_gradients, setup_context=save_head_loss)

# ----------------------------------------------------------------------------------------------
# Checking and timing
# ----------------------------------------------------------------------------------------------

BACK_ENDS: dict[str, Callable] = {"feed_forward": t.plain_feed_forward}  # what today's functions call
Tensors = dict[str, Tensor | None]
Outputs = tuple[list[Tensor], list[Tensor]]  # what is compared, and twins, which only carry a gradient back


class Sizes(NamedTuple):
    """What the inputs of all candidates are made of."""

    sequences: int
    length: int
    width: int
    heads: int
    kv: int
    hidden: int
    half: int  # of the rotated dimensions of a head
    vocab: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


FULL = Sizes(48, 2048, 512, 8, 4, 1536, 8, 1024)
CHECKED = FULL._replace(sequences=3, length=67)  # no tile divides it
CAP = 30.0
SCALE = 0.5  # of a layer's normalized input
FIXED = ("r", "rotary", "targets", "beta")  # inputs without a gradient


class Case(NamedTuple):
    """A candidate: its inputs, three functions of them, tilings, and what is read and written."""

    inputs: Callable[[Sizes, Callable[..., Tensor]], Tensors]
    plain: Callable[[Tensors], Outputs]
    today: Callable[[Tensors], Outputs]
    variants: dict[str, Callable[[Tensors], Outputs]]
    values: tuple[str, ...]  # inputs whose gradient goes to their twin
    traffic: tuple[float, float, float, float]  # today's and ours, forward and backward, in activations
    per_step: int  # how often in a training step
    vocab: int = FULL.vocab


def feed_forward_inputs(s: Sizes, draw: Callable[..., Tensor]) -> Tensors:
    x = draw(s.tokens, s.width)
    up, down = draw(s.hidden, s.width) / s.width**0.5, draw(s.width, s.hidden) / s.hidden**0.5
    return {"x": x, "twin": x.clone(), "r": 0.5 + draw(s.tokens).abs(), "up": up, "down": down, "beta": draw(s.hidden)}


def heads_inputs(s: Sizes, draw: Callable[..., Tensor], extra: bool = False) -> Tensors:
    x, size = draw(s.tokens, s.width), s.width // s.heads
    angle = 3 * draw(s.length, s.half)
    return {"x": x, "twin": x.clone(), "r": 0.5 + draw(s.tokens).abs(),
            "weight": draw((s.heads + 2 * s.kv) * size, s.width) / s.width**0.5, "gain": draw(s.heads),
            "rotary": torch.stack([angle.cos(), angle.sin()]),
            "extra": draw(s.tokens, s.kv, size) if extra else None}  # fmt: skip


def exclusive_inputs(s: Sizes, draw: Callable[..., Tensor]) -> Tensors:
    size = s.width // s.heads
    v = draw(s.tokens, s.kv, size)
    return {"y": draw(s.tokens, s.heads, size), "v": v, "twin": v.clone()}


def residual_inputs(s: Sizes, draw: Callable[..., Tensor], summed: bool, mixed: bool, skipped: bool) -> Tensors:
    x, y, skip, x0 = (draw(s.tokens, s.width) for _ in range(4))
    return {"x": x, "y": y if summed else None,
            "skip": skip if skipped else None, "skip_twin": skip.clone() if skipped else None,
            "x0": x0 if mixed else None, "x0_twin": x0.clone() if mixed else None,
            "mix": draw(3, s.width) if mixed else None}  # fmt: skip


def loss_inputs(s: Sizes, draw: Callable[..., Tensor]) -> Tensors:
    targets = (draw(s.tokens).abs() * 1e6).long() % s.vocab
    return {"hidden": draw(s.tokens, s.width), "weight": draw(s.vocab, s.width), "targets": targets}


def product_inputs(s: Sizes, draw: Callable[..., Tensor]) -> Tensors:
    weight = draw(s.width, s.width) / s.width**0.5
    return {"x": draw(s.tokens, s.width), "z": draw(s.tokens, s.width), "weight": weight}


def only(*outputs: Tensor) -> Outputs:
    return [*outputs], []


def today_feed_forward(i: Tensors) -> Outputs:
    """What train_gpt.py runs on a normalized input."""
    return only(BACK_ENDS["feed_forward"](i["x"], i["up"], i["down"], i["beta"])[0])


def today_heads(i: Tensors) -> Outputs:
    """`GPT.attention` as far as q, k and v; v's gradient comes whole, which spares today half an activation."""
    count, length = len(i["gain"]), i["rotary"].shape[1]
    size = i["x"].shape[1] // count
    qkv = F.linear(i["x"], i["weight"]).view(-1, length, len(i["weight"]) // size, size)
    q, k, v = qkv.tensor_split([count, (count + qkv.shape[2]) // 2], 2)
    cos, sin = i["rotary"][:, :, None]
    q = t.apply_rotary(t.rms_norm(q), cos, sin) * i["gain"][:, None].expand(*q.shape[:3], 1)
    k = t.apply_rotary(t.rms_norm(k), cos, sin)
    return only(q, k, v if i["extra"] is None else v + i["extra"].view_as(v))


def today_residual(i: Tensors) -> Outputs:
    """The residual step of `GPT.hidden` and the norm after it."""
    x = i["x"] if i["y"] is None else i["x"] + i["y"]
    if i["skip"] is not None:
        x = x + i["mix"][1] * i["skip"]
    if i["mix"] is not None:
        x = i["mix"][0] * x + i["mix"][2] * i["x0"]
    return only(x, t.rms_norm(x) * SCALE)


def today_loss(i: Tensors) -> Outputs:
    """`GPT.logits` and `GPT.nll`."""
    logits = CAP * torch.tanh(F.linear(i["hidden"], i["weight"]).float() / CAP)
    return only(F.cross_entropy(logits, i["targets"], reduction="none"))


def today_residual_product(i: Tensors) -> Outputs:
    """The output product of the attention, the sum, and the norm after it."""
    x = i["x"] + F.linear(i["z"], i["weight"])
    return only(x, t.rms_norm(x) * SCALE)


def today_feed_forward_sum(i: Tensors) -> Outputs:
    """The feed-forward part and the sum after it."""
    return only(i["x"] + today_feed_forward(i)[0][0])


def with_twin(outputs: tuple[Tensor, ...], compared: int) -> Outputs:
    """The first outputs are compared, the next is a twin, the rest is saved memory."""
    return [*outputs[:compared]], [outputs[compared]]


def residual_outputs(outputs: tuple[Tensor, ...], chained: bool = False) -> Outputs:
    """New x and r are compared; only new x and the twins have gradients; `chained`: those of x + y and x0 too."""
    new, twin, r, *others = outputs
    return [new, r.detach()], [twin, *(others if chained else [])]


def plain_heads_outputs(i: Tensors) -> Outputs:
    q, k, v = plain_heads(**i)
    return [q, k, v], [v]


def separate_loss(i: Tensors, tiling: Tiling) -> Outputs:
    return only(loss(F.linear(i["hidden"], i["weight"]), i["targets"], CAP, tiling)[0])


WIDE, SQUARE = [128, 256, 64, 8, 3], [128, 128, 64, 4, 3]
FEED_FORWARD_TILINGS = (WIDE, [*SQUARE, *WIDE], [128, 256, 64, 8, 4, *WIDE])
ADDED_TILINGS = ([*WIDE, *WIDE, *WIDE], [*WIDE, *SQUARE, *WIDE])
HEADS_TILINGS = ([4, 4, 2, 4, 4, 2, 6], [8, 4, 2, 8, 4, 2, 4], [4, 2, 2, 4, 2, 2, 8], [8, 8, 2, 4, 4, 2, 24])
ENDING_TILINGS = ([*WIDE, 4, 4, 2, 6], [*SQUARE, 4, 4, 2, 24], [128, 128, 64, 8, 4, 4, 2, 2, 8])
SUM_TILINGS = ([*WIDE, 4, 4, 1, 4], [*SQUARE, 2, 2, 2, 8], [128, 128, 64, 8, 4, 1, 1, 1, 16])
EXCLUSIVE_TILINGS = ([32, 4, 2], [64, 4, 2], [64, 8, 2], [16, 2, 2])
RESIDUAL_TILINGS = ([4, 4, 2, 4, 4, 1, 4], [8, 4, 2, 4, 4, 2, 4], [2, 1, 2, 1, 1, 1, 16], [4, 2, 2, 2, 2, 2, 8],
                    [1, 1, 2, 1, 1, 3, 16])
LOSS_TILINGS = {1024: ([4, 4, 2], [8, 8, 2], [2, 4, 2]), 8192: ([1, 8, 2], [1, 4, 2], [1, 16, 2])}


def named(tilings: tuple[Tiling, ...], make: Callable[..., Outputs], head: str = "") -> dict[str, Callable]:
    """Variants by their tilings."""
    return {head + " ".join(map(str, tiling)): partial(make, tiling=tiling) for tiling in tilings}


def residual_case(traffic: tuple[float, ...], per_step: int, chained: bool = False, **flags: bool) -> Case:
    def ours(i: Tensors, tiling: Tiling) -> Outputs:
        return residual_outputs(residual(**i, scale=SCALE, tiling=tiling), chained)

    def plain(i: Tensors) -> Outputs:
        return residual_outputs(plain_residual(**i, scale=SCALE), chained)

    variants = named(RESIDUAL_TILINGS[: 2 if chained else None], ours)
    return Case(partial(residual_inputs, **flags), plain, today_residual, variants, ("skip", "x0"), traffic, per_step)


def heads_case(tilings: tuple[Tiling, ...], extra: bool, traffic: tuple[float, ...], per_step: int) -> Case:
    return Case(partial(heads_inputs, extra=extra), plain_heads_outputs, today_heads,
                named(tilings, lambda i, tiling: with_twin(heads(**i, tiling=tiling), 3)), ("x",),
                traffic, per_step)  # fmt: skip


def feed_forward_case(tilings: tuple[Tiling, ...], add: bool, traffic: tuple[float, ...]) -> Case:
    def plain(i: Tensors) -> Outputs:
        return only(plain_feed_forward(**i) + (i["x"] if add else 0))

    return Case(feed_forward_inputs, plain, today_feed_forward_sum if add else today_feed_forward,
                named(tilings, lambda i, tiling: only(feed_forward(**i, add=add, tiling=tiling)[0])),
                () if add else ("x",), traffic, 11)  # fmt: skip


def loss_case(vocab: int, traffic: tuple[float, ...]) -> Case:
    variants = named(LOSS_TILINGS[vocab], separate_loss) | named(
        LOSS_TILINGS[vocab], lambda i, tiling: only(head_loss(**i, cap=CAP, tiling=tiling)[0]), "gradient forward ")
    return Case(loss_inputs, lambda i: only(plain_loss(**i, cap=CAP)), today_loss, variants, (), traffic, 1, vocab)


CASES: dict[str, Case] = {
    "feed_forward": feed_forward_case(FEED_FORWARD_TILINGS, False, (0, 0, 0, 0)),
    "feed_forward_sum": feed_forward_case(ADDED_TILINGS, True, (3, 0, 1, 0)),
    "heads": heads_case(HEADS_TILINGS, False, (3, 6, 4, 6), 9),
    "heads_ending": heads_case(ENDING_TILINGS, False, (3, 6, 0, 6), 9),
    "heads_extra": heads_case(HEADS_TILINGS[:1] + ENDING_TILINGS[:1], True, (4, 6.5, 4.5, 6.5), 2),
    "exclusive": Case(
        exclusive_inputs, lambda i: only(plain_exclusive(**i)), lambda i: only(t.exclusive(i["y"][None], i["v"][None])),
        named(EXCLUSIVE_TILINGS, lambda i, tiling: only(exclusive(**i, tiling=tiling))), ("v",), (2.5, 6, 2.5, 4), 11),
    "residual": residual_case((4, 4, 3, 4), 11, summed=True, mixed=False, skipped=False),
    "residual_product": Case(
        product_inputs, lambda i: residual_outputs(plain_residual_product(**i, scale=SCALE)), today_residual_product,
        named(SUM_TILINGS, lambda i, tiling: residual_outputs(residual_product(**i, scale=SCALE, tiling=tiling))), (),
        (4, 4, 1, 4), 11),
    "residual_mixed_alone": residual_case((4, 10, 3, 7), 6, summed=False, mixed=True, skipped=False),
    "residual_mixed": residual_case((5, 11, 4, 8), 6, summed=True, mixed=True, skipped=False),
    "residual_skip": residual_case((6, 14, 5, 10), 5, summed=True, mixed=True, skipped=True),
    "residual_chained": residual_case((6, 14, 4, 11), 0, True, summed=False, mixed=True, skipped=True),
    "loss": loss_case(1024, (2, 4, 2, 4)),
    "loss_8192": loss_case(8192, (16, 32, 16, 32)),
}  # fmt: skip


def draw_inputs(case: Case, sizes: Sizes, device: torch.device, seed: int) -> tuple[Tensors, Callable[..., Tensor]]:
    """Random inputs in the compute type (r stays float32), and the generator's `draw`."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(torch.randn, generator=generator, device=device)
    inputs = case.inputs(sizes, draw)
    dtype = t.compute_dtype(device)
    keep = ("r", "targets")
    return {n: v if v is None or n in keep else v.to(dtype) for n, v in inputs.items()}, draw


def leaves(case: Case, inputs: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Copies that require gradients where the case has one, in `dtype` where given."""

    def leaf(name: str, value: Tensor | None) -> Tensor | None:
        if value is None or name == "targets":
            return value
        copy = value.detach().clone() if dtype is None else value.detach().to(dtype)
        return copy.requires_grad_(name not in FIXED and name not in case.values)

    return {name: leaf(name, value) for name, value in inputs.items()}


def outputs_and_gradients(function: Callable, inputs: Tensors, upstream: list[Tensor]) -> list[Tensor]:
    """What is compared: outputs, then gradients in the order of the inputs."""
    compared, twins = function(inputs)
    ends = [y for y in (*compared, *twins) if y.requires_grad]
    wanted = [v for v in inputs.values() if v is not None and v.requires_grad]
    gradients = torch.autograd.grad(ends, wanted, [u.view_as(y).to(y.dtype) for u, y in zip(upstream, ends)])
    return [y.detach() for y in compared] + list(gradients)


def error_of(case: Case, function: Callable, sizes: Sizes, device: torch.device, seed: int = 0) -> float:
    """Largest relative error over outputs and gradients against the plain definition in float64 on the same inputs."""
    inputs, draw = draw_inputs(case, sizes, device, seed)
    exact = leaves(case, inputs, torch.float64)
    shapes = [y.shape for outputs in case.plain(exact) for y in outputs if y.requires_grad]
    upstream = [draw(*shape).to(t.compute_dtype(device)) for shape in shapes]
    want = outputs_and_gradients(case.plain, exact, upstream)
    got = outputs_and_gradients(function, leaves(case, inputs), upstream)
    return t.relative_error(got, [w.cpu() for w in want])


def median_us(function: Callable[[], Any], repeats: int = 15) -> float:
    """Median device time. A sleeping kernel ahead of each call gives the host time to queue all of its launches."""
    function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        torch.cuda._sleep(2_000_000)  # about 1 ms
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) * 1000


def times_of(
    case: Case, function: Callable, sizes: Sizes, device: torch.device, today: bool = False
) -> tuple[float, float]:
    """Median microseconds of forward and backward on random data; today's function knows no twins."""
    inputs, draw = draw_inputs(case, sizes, device, 0)
    inputs = leaves(case._replace(values=()) if today else case, inputs)
    compared, twins = function(inputs)
    ends = [y for y in (*compared, *twins) if y.requires_grad]
    upstream = [draw(*y.shape).to(y.dtype) for y in ends]
    wanted = [v for n, v in inputs.items() if v is not None and v.requires_grad and not (today and "twin" in n)]
    forward = median_us(lambda: function(inputs))
    return forward, median_us(lambda: torch.autograd.grad(ends, wanted, upstream, retain_graph=True))


FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, KeyError, NotImplementedError,
            triton.CompilationError, triton.OutOfResources)  # fmt: skip


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """Result and no reason, or None and why there is none."""
    try:
        return function(), ""
    except FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0][:80]}"


def compiled_times(case: Case, sizes: Sizes, device: torch.device) -> tuple[tuple[float, float] | None, str]:
    """Times of what inductor makes of today's function; one static graph, as in training."""
    torch._dynamo.reset()
    if BACK_ENDS["feed_forward"] is t.plain_feed_forward:  # made here, because tracing cannot register operators
        BACK_ENDS["feed_forward"] = t.fused_feed_forward()
    function = torch.compile(case.today, dynamic=False, fullgraph=True)
    result = attempt(lambda: times_of(case, function, sizes, device, today=True))
    torch.cuda.empty_cache()
    return result


HEAD = ("| candidate | variant | forward us | backward us | today forward us | today backward us | floor us, without "
        "products | predicted ms per step | measured ms per step | error |")  # fmt: skip
SECONDS = 285  # after which nothing new is begun: what is not reached is a row that says so


class Plan(NamedTuple):
    """What a run does: check against float64, time, sizes, and the moment after which it begins nothing."""

    check: bool
    time: bool
    sizes: Sizes
    device: torch.device
    deadline: float


def measure(case: Case, function: Callable, plan: Plan) -> tuple[float, tuple[float, float], str]:
    """Error, forward and backward microseconds of a variant (NaN where not taken), and what went wrong."""
    error, times, reason = math.nan, (math.nan, math.nan), ""
    if time.monotonic() > plan.deadline:
        return error, times, "not reached"
    if plan.check:
        small = CHECKED._replace(vocab=case.vocab) if plan.sizes.tokens > CHECKED.tokens else plan.sizes
        found, reason = attempt(lambda: error_of(case, function, small, plan.device))
        error = math.nan if found is None else found
        if not reason and not error < 2e-2:
            reason = "WRONG"
    if plan.time and not reason:
        found, reason = attempt(lambda: times_of(case, function, plan.sizes, plan.device))
        times = times if found is None else found
    return error, times, reason


def report(name: str, plan: Plan) -> list[str]:
    """Rows of the table for one candidate, printed as they come."""
    case = CASES[name]
    plan = plan._replace(sizes=plan.sizes._replace(vocab=min(case.vocab, plan.sizes.vocab * 8)))
    today, fault = None, ""
    if plan.time and time.monotonic() < plan.deadline:
        today, fault = compiled_times(case, plan.sizes, plan.device)
    unit, rows = plan.sizes.tokens * plan.sizes.width * 2 / COPY_BYTES_PER_US, []
    before, after = sum(case.traffic[:2]) * unit, sum(case.traffic[2:]) * unit
    for variant, function in case.variants.items():
        error, times, reason = measure(case, function, plan)
        us = " | ".join(f"{value:.0f}" for value in (*times, *(today or (math.nan, math.nan))))
        gain = (sum(today or (math.nan,)) - sum(times)) * case.per_step / 1000
        rows.append(f"| {name} | {variant} | {us} | {after:.0f} | {(before - after) * case.per_step / 1000:.2f} "
                    f"| {gain:.2f} | {error:.1e} {reason} {fault and 'today: ' + fault} |")  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main(arguments: list[str] | None = None, sizes: Sizes = FULL) -> None:
    """Check and time the candidates that are named, or all; the table is printed last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.candidates")
    parser.add_argument("names", nargs="*", metavar="NAMES", help=", ".join(CASES))
    parser.add_argument("--check", action="store_true", help="only compare with float64")
    parser.add_argument("--time", action="store_true", help="only time")
    parser.add_argument("--resources", action="store_true", help="only compile for sm_90 (needs no GPU)")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in CASES]:
        parser.error(f"no candidate {', '.join(unknown)}; there are {', '.join(CASES)}")
    names = given.names or list(CASES)
    if given.resources:
        return resources(names)
    device, both = torch.device("cuda" if torch.cuda.is_available() else "cpu"), given.check == given.time
    functorch_config.donated_buffer = False  # the backward pass is timed again and again on one graph
    plan = Plan(both or given.check, device.type == "cuda" and (both or given.time), sizes, device,
                time.monotonic() + SECONDS)  # fmt: skip
    rows = [row for name in names for row in report(name, plan)]
    print(f"\n{torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'} torch {torch.__version__} "
          f"triton {triton.__version__}, {sizes.tokens:,} rows, {time.monotonic() - plan.deadline + SECONDS:.0f} s\n\n"
          f"{HEAD}\n|{'---|' * 10}")  # fmt: skip
    print("\n".join(rows))


# ----------------------------------------------------------------------------------------------
# Registers, without a GPU
# ----------------------------------------------------------------------------------------------


class Compiler:
    """Stands in for Triton's launch: compiles each kernel for sm_90 as it would be launched, prints what it takes."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.label = ""
        folder = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        self.disassembler = str(folder) if folder.exists() else shutil.which("cuobjdump") or "cuobjdump"

    def launch(self, function: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: int) -> None:
        """Compile with the types of `arguments`; pointers and counts divisible by 16 are declared so, as in Triton."""
        signature, constants, hints = {}, {}, {}
        for place, (parameter, value) in enumerate(zip(function.params, arguments, strict=True)):
            is_count = isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize
            if parameter.is_constexpr or is_count and value == 1:
                signature[parameter.name], constants[place,] = "constexpr", value
                continue
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, Tensor) or is_count and value % 16 == 0:
                hints[place,] = [["tt.divisibility", 16]]
        key = f"{function.fn.__name__} {signature} {constants} {options}"
        if key not in self.seen:
            self.seen.add(key)
            source = ASTSource(function, signature, constants, hints)
            _, reason = attempt(lambda: self.show(function.fn.__name__, source, options))
            print(end=f"| {self.label} | {function.fn.__name__} | {reason} |\n" if reason else "", flush=True)

    def show(self, name: str, source: Any, options: dict[str, int]) -> None:
        """Compile and print one row."""
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(binary.asm["cubin"])
            command = [self.disassembler, "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
        note = "SPILLS" if int(stack) else "NO ROOM" if binary.metadata.shared > 232_448 else ""
        print(f"| {self.label} | {name} | {options.get('num_warps', 4)} | {registers} | {stack} "
              f"| {binary.metadata.shared:,} | {note} |", flush=True)  # fmt: skip


def resources(names: list[str]) -> None:
    """Compile every variant of `names` for sm_90 in bf16; print registers, stack (spills) and shared memory."""
    if torch.cuda.is_available() or triton.knobs.runtime.interpret:
        raise SystemExit("--resources replaces launches: run it where there is no GPU, without TRITON_INTERPRET")
    compiler, sizes = Compiler(), CHECKED._replace(sequences=1, length=96)
    JITFunction.run = lambda function, *arguments, **options: compiler.launch(function, *arguments, **options)
    t.compute_dtype = lambda device: torch.bfloat16
    print("| variant | kernel | warps | registers | stack | shared memory | |\n|---|---|---|---|---|---|---|")
    for name in names:
        for variant, function in CASES[name].variants.items():
            compiler.label = f"{name} {variant}"
            with contextlib.suppress(*FAILURES):  # nothing was computed, so that the comparison may well stumble
                error_of(CASES[name], function, sizes._replace(vocab=CASES[name].vocab), torch.device("cpu"))


if __name__ == "__main__":
    main()
