"""Seconds of every phase of export and evaluation, each against its own floor, on one device.

    python -m benchmarks.export_time [--batches 64] [--windows N] [KEY=value ...]

Data are real (DATA_PATH, TOKENIZER_PATH); weights are random, since the times do not depend on them. Parameters that
start as zero get N(0, 0.02) noise, so that no matrix codes to nothing. Random weights code to other bytes than trained
ones: the printed size describes this run alone. `--batches` is GPTQ_CALIBRATION_BATCHES; `--windows N` scores only the
first N windows of either evaluation, without the check that every target was scored.

Cold is the first call in this process, with compilation; what earlier processes left in inductor's cache on disk makes
it shorter (TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 prevents that). Sliding evaluation finds the graph that plain
evaluation compiled, as in a run. Warm is the second call. Floors are timed last, in the same process and after an
untimed call, so that no floor compiles for a phase; the ratio is warm over floor. A floor is work that no
implementation of the phase escapes, not a time that one could reach. Targets are held against the warm time: a run has
compiled Hessians and forward pass before its clock starts. Encoding and reading back use two cores at most.
"""

import argparse
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

import train_gpt as t
from benchmarks.common import UsageError, device_name, markdown, settings_of, verdict
from benchmarks.step_time import build

NOISE = 0.02  # standard deviation of what replaces a zero initialization
GPTQ_BATCHES, GPTQ_SECONDS = 64, 6.0  # target of Hessians and GPTQ together
CORES = 2  # of the targets of encoding and reading back


class Target(NamedTuple):
    """A limit on the warm seconds of a phase, or on their ratio to the floor."""

    limit: float
    of_floor: bool = False

    def cells(self, warm: float, floor: float) -> list[str]:
        """The target and whether it was met."""
        if self.of_floor:
            return [f"{self.limit:g} x floor", verdict(warm / floor, self.limit)]
        return [f"{self.limit:g} s", verdict(warm, self.limit)]


class Phase(NamedTuple):
    """A phase that was timed, and how to time its floor."""

    name: str
    cold: float
    warm: float
    floor: Callable[[], float]
    what: str
    target: Target | None


class Row(NamedTuple):
    """One line of the table."""

    phase: str
    cold: float
    warm: float
    floor: float
    what: str
    target: Target | None = None

    def cells(self) -> list[str]:
        """The row as text."""
        seconds = [f"{value:.4g}" for value in (self.cold, self.warm, self.floor)]
        aim = self.target.cells(self.warm, self.floor) if self.target else ["", ""]
        return [self.phase, *seconds, self.what, f"{self.warm / self.floor:.2f}", *aim]


class Timings:
    """Times phases in the order of a run and keeps their floors for later."""

    def __init__(self, run: t.Runtime) -> None:
        self.run, self.phases = run, []

    def seconds(self, action: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of a call, with the device idle before and after, and its result."""
        clock = t.Clock(self.run.ranks.device)
        clock.start()
        result = action()
        return clock.stop(), result

    def second_call(self, action: Callable[[], Any]) -> float:
        action()
        return self.seconds(action)[0]

    def phase(
        self, name: str, action: Callable[[], Any], floor: Callable[[], float], what: str, target: Target | None = None
    ) -> Any:
        """Call `action` twice, cold and warm; returns its second result."""
        cold, _ = self.seconds(action)
        warm, result = self.seconds(action)
        self.phases.append(Phase(name, cold, warm, floor, what, target))
        return result

    def rows(self) -> list[Row]:
        """The table; times the floors."""
        return [Row(p.name, p.cold, p.warm, p.floor(), p.what, p.target) for p in self.phases]


def together(rows: Sequence[Row]) -> Row:
    """Hessians and GPTQ as one row, against their common target where the batches are those that it is for."""
    parts = [row for row in rows if row.phase.startswith(("Hessians", "GPTQ"))]
    is_meant = any(row.phase == f"Hessians, {GPTQ_BATCHES} batches" for row in parts)
    cold, warm, floor = (sum(column) for column in zip(*((r.cold, r.warm, r.floor) for r in parts), strict=True))
    target = Target(GPTQ_SECONDS) if is_meant else None
    return Row("Hessians and GPTQ together", cold, warm, floor, "both floors", target)


@contextlib.contextmanager
def few_cores(count: int = CORES) -> Iterator[None]:
    """At most `count` cores for this thread and for torch's (the former on Linux alone)."""
    threads, can_pin = torch.get_num_threads(), hasattr(os, "sched_setaffinity")
    allowed = os.sched_getaffinity(0) if can_pin else set()
    torch.set_num_threads(min(count, threads))
    if can_pin:
        os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if can_pin:
            os.sched_setaffinity(0, allowed)


@torch.no_grad()
def fill_zeros(model: t.GPT) -> None:
    """N(0, NOISE) in place of every parameter that starts as zero, from SEED."""
    generator = torch.Generator().manual_seed(model.cfg.seed)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(NOISE * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def forward_floor(timings: Timings, model: t.GPT, pair: tuple[torch.Tensor, torch.Tensor], passes: int) -> float:
    """Seconds of `passes` plain forward passes over one batch (inputs, targets) that is on the device already."""
    weights, order = model.fast_weights(False), model.order

    def forward(count: int) -> None:
        for _ in range(count):
            model.fast_nll(*pair, weights, order)

    forward(1)
    return timings.seconds(partial(forward, passes))[0]


def gptq_algebra(cfg: t.Config, jobs: list[t.QuantSpec], hessians: Mapping[str, torch.Tensor]) -> None:
    """The inverse factors and the products between column blocks of GPTQ, without its loop over single columns."""
    for job in (job for job in jobs if all(name in hessians for name in job.hessians)):
        hessian = torch.stack([hessians[name] for name in job.hessians]).double()
        dead = hessian.diagonal(dim1=-2, dim2=-1) == 0
        factor = t.hessian_inv_cholesky(hessian + torch.diag_embed(dead.double()), cfg.gptq_damp)
        w, size = job.tensor.double(), cfg.gptq_block_size
        for end in range(size, w.shape[2], size):
            w[:, :, end:] -= w[:, :, end - size : end] @ factor[:, end - size : end, end:]


def coded_size(cfg: t.Config, jobs: list[t.QuantSpec], sigmas: float) -> float:
    """Bytes by entropy of all codes at one clip: whatever chooses the clip looks at one at least."""
    scales = [t.row_scales(cfg, job, {}, sigmas) for job in jobs]
    pairs = zip(jobs, scales, strict=True)
    return t.entropy_bytes(*(t.round_to_grid(job.tensor, scale, job.bits) for job, scale in pairs))


def count_codes(coded: Mapping[str, t.QuantizedTensor]) -> np.ndarray:
    """Codes on the host and one histogram of them all: the least that an entropy coder looks at."""
    codes = np.concatenate([c.codes.cpu().numpy().reshape(-1) for c in coded.values()])
    return np.bincount(codes.view(np.uint8), minlength=256)


def check_and_dequantize(blob: bytes, coded: list[t.QuantizedTensor]) -> list[torch.Tensor]:
    """What reading an artifact takes when its codes need no decoding: the checksum and fp32 parameters."""
    hashlib.sha256(blob).digest()
    return [c.dequantize() for c in coded]


def time_quantization(
    timings: Timings, trainer: t.Trainer
) -> tuple[dict[str, t.QuantizedTensor], dict[str, torch.Tensor]]:
    """Hessians, clip and GPTQ, in a run's order; returns the codes and what is kept in half precision."""
    run, model, cfg = timings.run, trainer.model, timings.run.cfg
    batches, pair = t.calibration_batches(run, trainer.loader.shape), trainer.loader.fetch(0)
    if not batches:
        raise SystemExit("GPTQ_ENABLED=0: there are no Hessians to collect; leave it at 1")
    hessians = timings.phase(
        f"Hessians, {batches} batches",
        partial(t.collect_hessians, run, trainer, 0, batches),
        partial(forward_floor, timings, model, pair, batches),
        f"{batches} forward passes of {pair[0].shape[0]} x {pair[0].shape[1]} tokens",
    )
    jobs, kept = t.quant_specs(model), t.passthrough(model)
    fitted = timings.phase(
        "choosing the clip",
        partial(t.fit_clip_sigmas, cfg, jobs, kept),
        lambda: timings.second_call(partial(coded_size, cfg, jobs, fitted)),
        "one size: all weights rounded and counted once",
    )
    coded = timings.phase(
        "GPTQ of all matrices",
        partial(t.quantize_tensors, run, jobs, hessians, cfg.matrix_clip_sigmas or fitted),
        partial(timings.second_call, partial(gptq_algebra, cfg, jobs, hessians)),
        "its factors and products of blocks, no loop over columns",
    )
    return coded, kept


def time_artifact(
    timings: Timings, model: t.GPT, coded: dict[str, t.QuantizedTensor], kept: dict[str, torch.Tensor]
) -> str:
    """Encoding and reading back; the model gets the weights that were read. Returns the line on the artifact's size."""
    cfg = timings.run.cfg
    cores = f"{CORES} cores"
    blob = timings.phase(
        f"encoding the artifact, {cores}",
        few_cores()(partial(t.encode_artifact, cfg, coded, kept, {"identity": {}})),
        partial(timings.second_call, partial(count_codes, coded)),
        "codes to the host and one histogram",
        Target(20),
    )
    on_host = [t.QuantizedTensor(c.codes.cpu(), c.scale.cpu()) for c in coded.values()]
    header, parameters = timings.phase(
        f"reading it back, {cores}",
        few_cores()(partial(t.decode_artifact, blob, cfg.artifact_file)),
        partial(timings.second_call, partial(check_and_dequantize, blob, on_host)),
        "checksum, and fp32 weights from codes in memory",
        Target(5),
    )
    model.load(parameters)
    _, coder, size = header["streams"][0]
    count, entropy = sum(c.codes.numel() for c in on_host), t.entropy_bytes(*(c.codes for c in on_host))
    return (f"artifact: {len(blob):,} bytes; {count:,} codes: {size:,} bytes by {coder}, {entropy:,.0f} by entropy "
            f"({8 * entropy / count:.4f} bits each), {size / entropy - 1:+.2%}")  # fmt: skip


def evaluation_batch(cfg: t.Config, validation: t.ValidationSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of the shape that score_windows runs, from the start of the text (again where it ends)."""
    shape = max(1, min(cfg.val_batch_size, t.MICRO_BATCH_TOKENS) // cfg.eval_len), cfg.eval_len
    positions = torch.arange(shape[0] * shape[1] + 1, device=validation.tokens.device) % len(validation.tokens)
    tokens = validation.tokens[positions].long()
    return tokens[:-1].view(shape), tokens[1:].view(shape).contiguous()


def time_evaluation(timings: Timings, model: t.GPT, validation: t.ValidationSet, limit: int | None) -> None:
    """Plain and sliding evaluation (unless EVAL_STRIDE=0), of the first `limit` windows if given."""
    run, cfg = timings.run, timings.run.cfg
    pair = evaluation_batch(cfg, validation)
    for kind, stride in (("plain", cfg.eval_len), ("sliding", cfg.eval_stride)):
        if not stride:
            continue
        windows = t.plan_windows(validation.targets, cfg.eval_len, stride)[:limit]
        whole, part = (t.evaluate, stride), (t.score_windows, windows)
        function, argument = part if limit else whole
        passes = -(-len(windows) // len(pair[0]))
        timings.phase(
            f"{kind} evaluation, stride {stride}, {len(windows):,} windows",
            partial(function, run, model, validation, argument),
            partial(forward_floor, timings, model, pair, passes),
            f"{passes:,} forward passes of {len(pair[0])} x {cfg.eval_len} tokens",
            Target(1.3, of_floor=True) if kind == "sliding" else None,
        )


def time_all(run: t.Runtime, limit: int | None) -> tuple[str, list[Row]]:
    """The line on the artifact's size and the rows of the table."""
    timings, validation = Timings(run), t.load_validation(run)
    trainer, _ = build(run)
    fill_zeros(trainer.model)
    size = time_artifact(timings, trainer.model, *time_quantization(timings, trainer))
    time_evaluation(timings, trainer.model, validation, limit)
    rows = timings.rows()
    return size, [*rows, together(rows)]


def parse(arguments: list[str], environment: Mapping[str, str]) -> tuple[dict[str, str], int | None]:
    """Variables of the configuration and the limit on windows."""
    parser = argparse.ArgumentParser(prog="benchmarks.export_time", description=__doc__.splitlines()[0])
    parser.add_argument("--batches", help="calibration batches (default: GPTQ_CALIBRATION_BATCHES, which is 64)")
    parser.add_argument("--windows", type=int, help="score only this many windows of each evaluation")
    parser.add_argument("settings", nargs="*", metavar="KEY=value", help="variables of train_gpt.py")
    given = parser.parse_intermixed_args(arguments)
    if given.windows is not None and given.windows < 1:
        parser.error(f"--windows {given.windows}: at least 1")
    batches = {"GPTQ_CALIBRATION_BATCHES": given.batches} if given.batches else {}
    try:
        settings = settings_of(given.settings)
    except UsageError as problem:
        parser.error(str(problem))
    export = {"EXPORT_ONLY": "1", "WEIGHTS_PATH": "unused"}  # keeps training logs untouched
    return {**environment, **settings, **batches, **export}, given.windows


def main(arguments: list[str] | None = None) -> None:
    env, limit = parse(arguments, os.environ)
    with t.Runtime.start(t.Config.from_env(env), env) as run:
        size, rows = time_all(run, limit)
        device = run.ranks.device
    print(device_name(device))
    print(size)
    head = ["phase", "seconds, cold", "seconds, warm", "floor, seconds", "what the floor is", "warm over floor",
            "target", "verdict"]  # fmt: skip
    print(markdown(head, [row.cells() for row in rows]))


if __name__ == "__main__":
    main()
