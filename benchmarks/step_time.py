"""Median time of a full training step, and where it goes, for several configurations in one process.

    python -m benchmarks.step_time [--steps 100] [--profile] [KEY=value ...] [-- KEY=value ...] ...
    python -m benchmarks.step_time --sweep [--lengths N ...] [--widths N ...] [--limit-s S] [-- KEY=value ...]
    python -m benchmarks.step_time --curve 300 [KEY=value ...] -- KEY=value ...

Each group of KEY=value pairs between `--` is one variant on top of the environment; 98,304 tokens a step unless
TRAIN_BATCH_TOKENS is set. The data are real training shards (DATA_PATH, TOKENIZER_PATH); a step is data, forward,
backward, optimizer and EMA, timed with device events after 10 warm-up steps. The table comes last.

Model FLOPs per token: 6 x matrix parameters that a pass multiplies by (banks and head) + 6 x layers x T x C for causal
attention (forward and backward, half of T x T). Utilization is that rate over 989 TFLOP/s, the dense bf16 datasheet
rate of an H100 SXM.

--profile adds device time per step by kind of kernel, from the profiler's trace, and lists the 30 largest kernels. What
Muon, Adam, clipping and EMA launch is `optimizer` whatever it is; `gaps` is the median step less the time in which the
device was busy. --sweep varies sequence length and width (at the head size and the ratio of key/value heads of the
configuration) at constant tokens a step. --curve trains each variant for N steps from the same weights on the same data
(phase `train`, learning rate falling as over a run of N steps) and prints their losses side by side. Its yardstick
`rounding` is the first variant again with every initial weight off by a relative 2^-9, bfloat16's rounding: two correct
implementations may drift apart as far as that. The same variant given twice shows the noise of either measurement.

Where the step goes, whether a kernel trains as the plain layer does, and how a step grows:

    python -m benchmarks.step_time --profile DOC_ATTENTION=1 -- DOC_ATTENTION=0 ATTN_BACKEND=cudnn
    python -m benchmarks.step_time --curve 300 LAYER_BACKEND=plain -- LAYER_BACKEND=triton
    python -m benchmarks.step_time --steps 30 --sweep
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train_gpt as t
from benchmarks.common import UsageError, device_name, groups_of, markdown, settings_of, shown

PEAK_FLOPS = 989e12
WARMUP_STEPS = 10
PROFILED_STEPS = 5
BASE = {"TRAIN_BATCH_TOKENS": "98304", "RUN_ID": "step_time"}
OWN = {"EXPORT_ONLY": "1", "WEIGHTS_PATH": "unused"}  # keeps the logs of training runs untouched
KINDS = (  # first match names a kernel's kind
    ("attention", ("flash", "fmha", "cudnn", "attention", "sdpa")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "s16816", "bmm")),
    ("matrix products (ours)", ("mlp_kernel", "matmul_add_kernel", "qkv_kernel")),
    ("between products (ours)", ("resid_mix_norm", "qkv_backward", "xsa_kernel", "softcap_ce")),
    ("fused (inductor)", ("triton",)),
    ("other kernels", ("",)),
)


class Row(NamedTuple):
    """One line of the table; `kinds` is the breakdown of a profiled step, in ms."""

    name: str
    parameters: int
    median_ms: float
    optimizer_ms: float  # Muon, Adam and EMA on the device
    tokens_per_s: float
    utilization: float
    peak_mib: int | None
    warmup_s: float
    loss: float
    kinds: dict[str, float]


class Variant(NamedTuple):
    """Settings under a name."""

    name: str
    settings: dict[str, str]


# ---------------------------------------------------------------------------------------
# A training step
# ---------------------------------------------------------------------------------------


def whole_phase(cfg: t.Config) -> str:
    """The first phase on whole windows."""
    return next(name for name in ("train", "layer_loop") if name in t.phases(cfg))


def flops_per_token(cfg: t.Config, model: t.GPT) -> float:
    """Model FLOPs of one token, forward and backward; see the module's head. A looped layer counts for each pass."""
    order = t.phases(cfg)[whole_phase(cfg)].order
    layer = sum(bank[0].numel() for bank in model.banks.values())
    matrices = len(order) * layer + cfg.vocab_size * cfg.model_dim
    return 6 * matrices + 6 * len(order) * cfg.train_seq_len * cfg.model_dim


def build(run: t.Runtime) -> tuple[t.Trainer, t.Averager]:
    """A trainer on real data, as the training script builds it."""
    table = t.ByteTable(run.cfg.tokenizer_file, run.cfg.vocab_size)
    trainer = t.Trainer(run, t.build_model(run, run.cfg, table.bos_id))
    return trainer, t.Averager(run.cfg, trainer.model)


def one_step(trainer: t.Trainer, averager: t.Averager, number: int, planned: t.StepPlan | None = None) -> torch.Tensor:
    """A training step as the loop does it, of a plan or at full learning rate, in the first phase on whole windows."""
    cfg, name = trainer.run.cfg, whole_phase(trainer.run.cfg)
    phase = t.phases(cfg)[name]
    trainer.model.order = phase.order
    plan = (planned or t.StepPlan(1.0, t.muon_momentum_at(cfg, number), name))._replace(phase=name)
    loss = trainer.step(number, plan)
    if not number and phase not in trainer.graphs:
        trainer.record(phase)
    with torch.profiler.record_function("optimizer"):
        averager.update(number + 1, plan.lr_scale)
    return loss


class Mark:
    """A moment on the device's stream (on the CPU: now)."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.moment = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def ms_until(self, later: "Mark") -> float:
        """Milliseconds; the device must have passed both."""
        return 1000 * (later.moment - self.moment) if self.event is None else self.event.elapsed_time(later.event)


def mark_optimizer(trainer: t.Trainer) -> list[Mark]:
    """From now on every optimizer step adds a mark to the list as it begins, and has a name in the profiler's trace."""
    marks: list[Mark] = []
    step = trainer.optimizers.step

    def marked(*arguments: float) -> None:
        marks.append(Mark(trainer.run.ranks.device))
        with torch.profiler.record_function("optimizer"):
            step(*arguments)

    trainer.optimizers.step = marked
    return marks


def peak_mib(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() >> 20 if device.type == "cuda" else None


def measure(run: t.Runtime, name: str, steps: int, profiled: bool) -> Row:
    """Median over `steps` steps after the warm-up; the breakdown where it is wanted."""
    begin, device = time.perf_counter(), run.ranks.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer, averager = build(run)
    for number in range(WARMUP_STEPS):
        one_step(trainer, averager, number)
    t.synchronize(device)
    warmup = time.perf_counter() - begin
    begun = mark_optimizer(trainer)
    marks = [Mark(device)]
    for number in range(steps):
        loss = one_step(trainer, averager, WARMUP_STEPS + number)
        marks.append(Mark(device))
    t.synchronize(device)
    median = statistics.median(a.ms_until(b) for a, b in pairwise(marks))
    optimizer = statistics.median(a.ms_until(b) for a, b in zip(begun, marks[1:], strict=True))
    rate, peak = 1000 * run.cfg.train_batch_tokens / median, peak_mib(device)
    if profiled and device.type != "cuda":
        print("--profile: the breakdown is of CUDA kernels; this device has none")
    has_kernels = profiled and device.type == "cuda"
    kinds = breakdown(profile(trainer, averager), PROFILED_STEPS, median) if has_kernels else {}
    utilization = rate * flops_per_token(run.cfg, trainer.model) / PEAK_FLOPS
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return Row(name, parameters, median, optimizer, rate, utilization, peak, warmup, loss.item(), kinds)


# ---------------------------------------------------------------------------------------
# Where the time goes
# ---------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """Something that ran on the device: name, begin and end in microseconds, and whether the optimizer launched it."""

    name: str
    begin: float
    end: float
    by_optimizer: bool


def profile(trainer: t.Trainer, averager: t.Averager) -> list[dict[str, Any]]:
    """The events of the profiler's trace over PROFILED_STEPS steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if trainer.run.ranks.device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as prof:
        for number in range(PROFILED_STEPS):
            one_step(trainer, averager, number)
        t.synchronize(trainer.run.ranks.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        prof.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def kernels_of(trace: Iterable[dict[str, Any]]) -> list[Kernel]:
    """Kernels, copies and fills on the device. A launch on the host names its kernel by a correlation number."""
    timed = [event for event in trace if event.get("ph") == "X" and "cat" in event]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in timed if (e["cat"], e["name"]) == ("user_annotation", "optimizer")]
    launches = [e for e in timed if e["cat"] in ("cuda_runtime", "cuda_driver")]
    own = {e["args"].get("correlation") for e in launches if any(a <= e["ts"] <= b for a, b in spans)}
    return [Kernel(e["name"], e["ts"], e["ts"] + e["dur"], e["args"].get("correlation") in own)
            for e in timed if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]  # fmt: skip


def kind_of(kernel: Kernel) -> str:
    if kernel.by_optimizer:
        return "optimizer"
    return next(kind for kind, words in KINDS if any(word in kernel.name.lower() for word in words))


def busy(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, reached = 0.0, -math.inf
    for kernel in sorted(kernels, key=lambda k: k.begin):
        total += max(0.0, kernel.end - max(kernel.begin, reached))
        reached = max(reached, kernel.end)
    return total


def breakdown(trace: Iterable[dict[str, Any]], steps: int, median_ms: float) -> dict[str, float]:
    """Milliseconds of a step by kind, and the gaps; prints the 30 largest kernels."""
    kernels = kernels_of(trace)
    kinds = dict.fromkeys([*(kind for kind, _ in KINDS), "optimizer"], 0.0)
    names: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        milliseconds = (kernel.end - kernel.begin) / 1000 / steps
        kinds[kind_of(kernel)] += milliseconds
        names[kernel.name].append(milliseconds)
    for name, times in sorted(names.items(), key=lambda item: -sum(item[1]))[:30]:
        print(f"    {sum(times):8.3f} ms {len(times) / steps:6.1f} calls  {name[:150]}")
    return kinds | {"gaps": median_ms - busy(kernels) / 1000 / steps}


# ---------------------------------------------------------------------------------------
# Loss curves
# ---------------------------------------------------------------------------------------


@torch.no_grad()
def perturb(model: t.GPT) -> None:
    """Move every weight by a relative 2^-9 (one sigma), which is how coarsely bfloat16 rounds."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.mul_(1 + 2.0**-9 * noise)


def curve(run: t.Runtime, steps: int, perturbed: bool = False) -> list[float]:
    """The loss of each of `steps` steps, learning rate and momentum those of a run of that many."""
    trainer, averager = build(run)
    if perturbed:
        perturb(trainer.model)
    cfg, losses = t.replace(run.cfg, iterations=steps), []
    for number in range(steps):
        losses.append(one_step(trainer, averager, number, t.plan_step(cfg, number, 0.0, math.inf)))
    return torch.stack(losses).tolist()


def curves_table(curves: dict[str, list[float]]) -> str:
    """Losses side by side, then how far each curve is from the first: greatest and mean over the last quarter."""
    (first, reference), *others = curves.items()
    count = len(reference)
    at = sorted({1, *(min(n, count) for n in (2, 5, 10, 20, 50)), *(round(count * i / 6) for i in range(1, 7))} - {0})
    rows = [[str(step), *(f"{losses[step - 1]:.4f}" for losses in curves.values())] for step in at]
    gaps = [[a - b for a, b in zip(losses, reference, strict=True)] for _, losses in others]
    tail = max(count // 4, 1)
    rows.append([f"greatest difference to {first}", "", *(f"{max(map(abs, gap)):.4f}" for gap in gaps)])
    rows.append([f"mean over the last {tail}", "", *(f"{statistics.fmean(gap[-tail:]):+.5f}" for gap in gaps)])
    return markdown(["step", *curves], rows)


def compare_curves(variants: Sequence[Variant], steps: int) -> str:
    """The table of all variants' curves and of the yardstick."""
    wanted = [(variant.name, variant, False) for variant in variants]
    wanted.insert(1, ("rounding", variants[0], True))
    curves = {}
    for name, variant, perturbed in wanted:
        losses = with_runtime(variant, partial(curve, steps=steps, perturbed=perturbed))
        curves |= {name: losses} if losses else {}
    return curves_table(curves) if curves else "no variant ran"


# ---------------------------------------------------------------------------------------
# Several variants
# ---------------------------------------------------------------------------------------


def with_runtime(variant: Variant, action: Callable[[t.Runtime], Any]) -> Any:
    """What `action` returns for a variant's runtime; None, with a message, where the variant does not run."""
    env = {**BASE, **os.environ, **variant.settings, **OWN}
    try:
        with t.Runtime.start(t.Config.from_env(env), env) as run:
            return action(run)
    except (t.UserError, torch.OutOfMemoryError) as error:  # the other variants still count
        print(f"{variant.name}: {error}", flush=True)
        return None
    finally:
        torch._dynamo.reset()
        gc.collect()  # models hang in cycles, and would count in the next variant's peak memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def table(rows: Sequence[Row]) -> str:
    """The table of steps, and that of where their time goes if any was profiled."""
    head = ["variant", "parameters", "median ms", "optimizer ms", "tokens/s", "utilization", "peak MiB",
            "build + 10 steps, s", "last loss"]  # fmt: skip
    cells = [[row.name, f"{row.parameters:,}", f"{row.median_ms:.2f}", f"{row.optimizer_ms:.2f}",
              f"{row.tokens_per_s:,.0f}", f"{row.utilization:.1%}", shown(row.peak_mib, ",d"), f"{row.warmup_s:.0f}",
              f"{row.loss:.4f}"] for row in rows]  # fmt: skip
    tables = [markdown(head, cells)]
    if profiled := [row for row in rows if row.kinds]:
        kinds = list(profiled[0].kinds)
        cells = [[row.name, f"{row.median_ms:.2f}", *(f"{row.kinds[k]:.2f}" for k in kinds)] for row in profiled]
        tables.append(markdown(["ms of a step", "median", *kinds], cells))
    return "\n\n".join(tables)


def time_variants(given: argparse.Namespace) -> str:
    """Measure the variants while the time allows; the table so far is printed after each, the whole one returned."""
    rows, begin, longest = [], time.perf_counter(), 0.0
    for variant in given.variants:
        started = time.perf_counter()
        if given.limit_s and started - begin + longest > given.limit_s:
            print(f"not measured, the time is up: {variant.name}")
            continue
        action = partial(measure, name=variant.name, steps=given.steps, profiled=given.profile)
        if (row := with_runtime(variant, action)) is not None:
            rows.append(row)
            print(table(rows[-1:]), flush=True)
        longest = max(longest, time.perf_counter() - started)
    return table(rows)


def sweep(settings: dict[str, str], lengths: Sequence[int], widths: Sequence[int]) -> list[Variant]:
    """Every length with every width, at the head size and the ratio of key/value heads of the configuration."""
    cfg = t.Config.from_env({**BASE, **os.environ, **settings, **OWN})
    variants = []
    for width in widths:
        heads, rest = divmod(width, cfg.head_dim)
        if rest or heads * cfg.num_kv_heads % cfg.num_heads:
            raise UsageError(f"--widths {width}: heads of {cfg.head_dim} do not divide it into a multiple of "
                             f"{cfg.num_heads // cfg.num_kv_heads}")  # fmt: skip
        kv_heads = heads * cfg.num_kv_heads // cfg.num_heads  # a group of heads would have to divide each number
        shape = {"MODEL_DIM": width, "NUM_HEADS": heads, "NUM_KV_HEADS": kv_heads, "MUON_HEAD_GROUP": 0}
        for length in lengths:
            values = {key: str(value) for key, value in {**shape, "TRAIN_SEQ_LEN": length}.items()}
            variants.append(Variant(f"width {width}, length {length}", settings | values))
    return variants


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options, and the variants they ask for; UsageError where they mean nothing."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_time", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="timed steps after 10 others")
    parser.add_argument("--profile", action="store_true", help="break the step down by kind of kernel")
    parser.add_argument("--sweep", action="store_true", help="every length with every width")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 512, 768])
    parser.add_argument("--curve", type=int, metavar="N", help="losses of N training steps instead of times")
    parser.add_argument("--limit-s", type=float, default=0.0, help="measure no variant that would end later")
    parser.add_argument("settings", nargs="*", metavar="KEY=value")
    first, *others = groups_of(arguments)
    given = parser.parse_intermixed_args(first)
    groups = [given.settings, *others]
    if min(given.steps, given.curve or 1) < 1:
        raise UsageError("--steps, --curve: at least 1")
    names = [" ".join(words) or "default" for words in groups]
    again = [f" ({count})" if (count := names[:i].count(name) + 1) > 1 else "" for i, name in enumerate(names)]
    variants = [Variant(n + a, settings_of(words)) for n, a, words in zip(names, again, groups, strict=True)]
    if given.sweep and len([variant for variant in variants if variant.settings]) > 1:
        raise UsageError("--sweep takes one configuration")
    given.variants = sweep(variants[-1].settings, given.lengths, given.widths) if given.sweep else variants
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """0 unless the command line means nothing."""
    try:
        given = parse(sys.argv[1:] if arguments is None else arguments)
    except (UsageError, t.UserError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    result = compare_curves(given.variants, given.curve) if given.curve else time_variants(given)
    device = t.pick_device(os.environ.get("DEVICE", "auto"), 0)
    print(f"\n{device_name(device)}, {given.curve or given.steps} steps")
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
