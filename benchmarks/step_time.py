"""Median time of a full training step, and where it goes, for several configurations in one process.

    python -m benchmarks.step_time [--steps 100] [--profile] [KEY=value ...] [-- KEY=value ...] ...

Each group of KEY=value pairs between `--` is one variant on top of the environment. The data are real training
shards (DATA_PATH); a step is data, forward, backward, optimizer and EMA, timed with device events after warm-up.
Model FLOPs per token: 6 x matrix parameters (banks and head) + 6 x layers x T x C for causal attention (forward and
backward, half of T x T). Utilization is against 989 TFLOP/s, the dense bf16 datasheet rate of an H100 SXM.
"""

import os
import statistics
import sys
import time
from collections import defaultdict
from typing import NamedTuple

import torch

import train_gpt as t

PEAK_FLOPS = 989e12
KINDS = (  # first match names a kernel's kind
    ("attention", ("flash", "fmha", "cudnn", "attention", "sdpa")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "s16816", "bmm")),
    ("our Triton", ("tiles",)),
    ("inductor (fused)", ("triton",)),
)


class Row(NamedTuple):
    """One line of the table."""

    name: str
    median_ms: float
    optimizer_ms: float  # Muon, Adam and EMA on the device
    tokens_per_s: float
    utilization: float
    peak_mib: int
    warmup_s: float
    loss: float


def flops_per_token(cfg: t.Config, model: t.GPT) -> float:
    """Model FLOPs of one token, forward and backward; see the module's head."""
    matrices = sum(bank.numel() for bank in model.banks.values()) + cfg.vocab_size * cfg.model_dim
    return 6 * matrices + 6 * cfg.num_layers * cfg.train_seq_len * cfg.model_dim


def build(run: t.Runtime) -> tuple[t.Trainer, t.Averager]:
    """A trainer on real data, as the training script builds it."""
    table = t.ByteTable(run.cfg.tokenizer_file, run.cfg.vocab_size)
    trainer = t.Trainer(run, t.build_model(run, run.cfg, table.bos_id))
    return trainer, t.Averager(run.cfg, trainer.model)


def one_step(trainer: t.Trainer, averager: t.Averager, number: int) -> torch.Tensor:
    """A training step as the loop does it, in the phase `train`."""
    cfg = trainer.run.cfg
    loss = trainer.step(number, t.phases(cfg)["train"], 1.0, t.momentum_at(cfg, number))
    averager.update(number + 1, 1.0)
    return loss


def mark_optimizer(optimizers: t.Optimizers) -> list[torch.cuda.Event]:
    """From now on every optimizer step adds a device event to the list as it begins."""
    marks: list[torch.cuda.Event] = []
    step = optimizers.step

    def marked(lr_scale: float, momentum: float) -> None:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        step(lr_scale, momentum)

    optimizers.step = marked
    return marks


def measure(run: t.Runtime, name: str, steps: int) -> tuple[Row, t.Trainer, t.Averager]:
    """Median over `steps` steps after 10 warm-up steps."""
    begin = time.perf_counter()
    trainer, averager = build(run)
    torch.cuda.reset_peak_memory_stats()
    for number in range(10):
        one_step(trainer, averager, number)
    torch.cuda.synchronize()
    warmup = time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks = mark_optimizer(trainer.optimizers)
    events[0].record()
    for number in range(steps):
        loss = one_step(trainer, averager, 10 + number)
        events[number + 1].record()
    torch.cuda.synchronize()
    median = statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:]))
    optimizer = statistics.median(a.elapsed_time(b) for a, b in zip(marks, events[1:]))
    rate = run.cfg.train_batch_tokens / median * 1000
    utilization = rate * flops_per_token(run.cfg, trainer.model) / PEAK_FLOPS
    peak = torch.cuda.max_memory_allocated() >> 20
    return Row(name, median, optimizer, rate, utilization, peak, warmup, loss.item()), trainer, averager


def profile(trainer: t.Trainer, averager: t.Averager, steps: int = 5) -> None:
    """Device time per step by kind and the 30 largest kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as prof:
        for number in range(steps):
            one_step(trainer, averager, number)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in prof.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name][0] += event.time_range.elapsed_us() / 1000 / steps
            kernels[event.name][1] += 1 / steps
    kinds: dict[str, float] = defaultdict(float)
    for name, (ms, _) in kernels.items():
        kinds[next((k for k, words in KINDS if any(w in name.lower() for w in words)), "other kernels")] += ms
    for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {kind:<18} {ms:8.3f} ms/step")
    for name, (ms, calls) in sorted(kernels.items(), key=lambda item: -item[1][0])[:70]:
        print(f"    {ms:8.3f} ms {calls:6.1f} calls  {name[:150]}")


def main() -> None:
    arguments = sys.argv[1:]
    steps = int(arguments[arguments.index("--steps") + 1]) if "--steps" in arguments else 100
    groups: list[list[str]] = [[]]
    for word in arguments:
        if word == "--":
            groups.append([])
        elif "=" in word:
            groups[-1].append(word)
    rows = []
    for group in groups:
        env = {**os.environ, **dict(pair.split("=", 1) for pair in group)}
        cfg = t.Config.from_env({**env, "EXPORT_ONLY": "1", "WEIGHTS_PATH": "unused"})  # keeps training logs untouched
        name = " ".join(group) or "default"
        try:
            with t.Runtime.start(cfg, env) as run:
                row, trainer, averager = measure(run, name, steps)
                rows.append(row)
                if "--profile" in arguments:
                    profile(trainer, averager)
            del trainer, averager
        except (t.UserError, torch.OutOfMemoryError) as error:  # the other variants still count
            print(f"{name}: {error}")
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()} torch {torch.__version__} {rows and steps} steps after 10")
    print("| variant | median ms | optimizer ms | tokens/s | utilization | peak MiB | build + 10 steps, s | last loss |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.median_ms:.2f} | {row.optimizer_ms:.2f} | {row.tokens_per_s:,.0f} | {row.utilization:.1%} | {row.peak_mib} | "
              f"{row.warmup_s:.0f} | {row.loss:.4f} |")  # fmt: skip


if __name__ == "__main__":
    main()
