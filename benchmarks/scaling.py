"""One configuration on 1, 2, ... ranks of this machine, each world in its own torchrun, and a model of 8 GPUs.

    python -m benchmarks.scaling [KEY=value ...] [--ranks 1 2] [--model 8] [--steps 60] [--tokens 98304] [--windows N]

Every rank has `--tokens` tokens a step: on a perfect machine all rows have one step time. Data are real (DATA_PATH,
TOKENIZER_PATH), the weights are those of the steps just timed. A step is the run's agreement on the clock, data,
forward, backward, optimizer and EMA; medians of rank 0 after 10 steps. Optimizer: from the first reduction to the last
update, waiting for a slower rank included. Collectives: in how much of a step NCCL's kernels run, waiting included, and
alone, in how much nothing runs beside them; from a trace of five steps, which a CPU has not. Muon: the updates of the
rank's own layers without communication. Seconds are those of a second call, all ranks together. `--windows` scores the
first N windows of the sliding evaluation only.

The last row is a model: one GPU has also done the parts of the first and the last of `--model` ranks (layers of Muon
and of GPTQ, batches and windows), with every collective left out; the slower one counts. Its step is that of one GPU
with this part of Muon in place of all layers', plus communication: what the second row takes beyond the same sum for
its own ranks, times (W-1)/W over the same of those, since every byte enters or leaves a GPU once.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo.config

import train_gpt as t
from benchmarks.step_time import PROFILED_STEPS, Kernel, build, busy, kernels_of, one_step, profile


class Parts(NamedTuple):
    """What a rank does of the work that ranks share: ms of Muon, seconds of the rest."""

    muon: float
    hessians: float
    gptq: float
    sliding: float


class World(NamedTuple):
    """What one torchrun measured; ms."""

    ranks: int
    step: float
    optimizer: float
    collectives: tuple[float, float]  # in which they run, and in which nothing else does
    parts: Parts
    model: Parts | None  # of a rank among as many as `--model` says; one rank measures it
    device: str


class Pretended(t.Ranks):
    """One of several ranks that are not there: it does its own part and hears nothing of the others."""

    def all_reduce_sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_reduce_max(self, *values: float) -> list[float]:
        return list(values)


class Marks:
    """Moments on the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.moments = device, []

    def add(self) -> None:
        if self.device.type == "cuda":
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def ms_since(self, others: "Marks") -> list[float]:
        """Milliseconds from each of the others' moments to ours."""
        t.synchronize(self.device)
        pairs = zip(others.moments, self.moments, strict=True)
        return [a.elapsed_time(b) if self.device.type == "cuda" else 1000 * (b - a) for a, b in pairs]


def time_steps(run: t.Runtime, trainer: t.Trainer, averager: t.Averager, steps: int) -> tuple[float, float]:
    """Median ms of a step and of its optimizer."""
    begun, optimizing, optimized, ended = (Marks(run.ranks.device) for _ in range(4))
    plain = trainer.optimizers.step

    def marked(*arguments: float) -> None:
        optimizing.add()
        plain(*arguments)
        optimized.add()

    for number in range(10 + steps):
        if number == 10:
            t.synchronize(run.ranks.device)
            trainer.optimizers.step = marked
        begun.add()
        run.ranks.all_reduce_max(0.0, 0.0)
        one_step(trainer, averager, number)
        ended.add()
    trainer.optimizers.step = plain
    begun.moments, ended.moments = begun.moments[10:], ended.moments[10:]
    return statistics.median(ended.ms_since(begun)), statistics.median(optimized.ms_since(optimizing))


def collectives_of(kernels: list[Kernel], steps: int) -> tuple[float, float]:
    """Milliseconds of a step in which collectives run on this GPU, and in which nothing else does."""
    others = [kernel for kernel in kernels if "nccl" not in kernel.name.lower()]
    own = [kernel for kernel in kernels if "nccl" in kernel.name.lower()]
    return busy(own) / 1000 / steps, (busy(kernels) - busy(others)) / 1000 / steps


@torch.no_grad()
def time_muon(run: t.Runtime, trainer: t.Trainer, repeats: int = 20) -> float:
    """Median ms of the updates of a rank's layers; their gradients are random."""
    muon, device = trainer.optimizers.muon, run.ranks.device
    one, rails = torch.ones((), device=device), copy.deepcopy(muon.state)
    gradients = {name: torch.randn_like(several[0]).to(muon.dtype) for name, several in rails.items()}
    begun, ended = Marks(device), Marks(device)
    for _ in range(repeats):
        begun.add()
        for spec in muon.specs:
            momentum = [(one, one, one) for _ in rails[spec.name]]
            muon.fast_muon_update(spec, rails[spec.name], gradients[spec.name], momentum, one)
        ended.add()
    return statistics.median(ended.ms_since(begun))


def second_call(run: t.Runtime, action: Callable[[], Any]) -> float:
    """Seconds of the second call, from when all ranks begin until all have ended."""
    action()
    clock = t.Clock(run.ranks.device)
    run.ranks.all_reduce_max(0.0)
    clock.start()
    action()
    t.synchronize(run.ranks.device)
    run.ranks.all_reduce_max(0.0)
    return clock.stop()


def time_parts(run: t.Runtime, trainer: t.Trainer, validation: t.ValidationSet, limit: int | None) -> Parts:
    """The parts of this rank, which may be pretended."""
    cfg, ranks, model = run.cfg, run.ranks, trainer.model
    batches, hessians = t.calibration_batches(run, trainer.loader.shape), {}
    seconds = second_call(run, lambda: hessians.update(t.collect_hessians(run, trainer, 0, batches)))
    quantize = partial(t.quantize_tensors, run, t.quant_specs(model), hessians, cfg.matrix_clip_sigmas or 8.0)
    windows = t.plan_windows(validation.targets, cfg.eval_len, cfg.eval_stride)[:limit]
    share = ranks.share(len(windows))
    score = partial(t.score_windows, run, model, validation, windows[share.start : share.stop])
    return Parts(time_muon(run, trainer), seconds, second_call(run, quantize), second_call(run, score))


def measure(run: t.Runtime, given: argparse.Namespace) -> World:
    """Everything that one world measures, on all of its ranks."""
    device, validation = run.ranks.device, t.load_validation(run)
    trainer, averager = build(run)
    step, optimizer = time_steps(run, trainer, averager, given.steps)
    collectives = collectives_of(kernels_of(profile(trainer, averager)), PROFILED_STEPS)
    parts, model = time_parts(run, trainer, validation, given.windows), None
    if run.ranks.world == 1:
        others = [replace(run, ranks=Pretended(rank, given.model, device)) for rank in (0, given.model - 1)]
        model = Parts(*map(max, zip(*(time_parts(r, trainer, validation, given.windows) for r in others))))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, gloo"
    return World(run.ranks.world, step, optimizer, collectives, parts, model, name)


def run_world(ranks: int, given: argparse.Namespace, env: Mapping[str, str]) -> World:
    """The measurements of one world in a torchrun of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.NamedTemporaryFile(mode="r", suffix=".json") as file:
        command = [*torchrun, "-m", "benchmarks.scaling", *sys.argv[1:], "--result", file.name]
        subprocess.run(command, env={**env, "TRAIN_BATCH_TOKENS": str(given.tokens * ranks)}, check=True)
        *head, parts, model, device = json.load(file)
    world = World(*head, Parts(*parts), Parts(*model) if model else None, device)
    print(world, flush=True)  # the second world may never end
    return world


def modelled(one: World, two: World | None, ranks: int) -> tuple[float, float]:
    """ms of a step of `ranks` ranks, and what of it is communication; see the module's head."""
    alone = one.step - one.parts.muon
    communication = 0.0
    if two:
        communication = max(two.step - alone - two.parts.muon, 0.0) * (ranks - 1) / ranks * two.ranks / (two.ranks - 1)
    return alone + one.model.muon + communication, communication


def table(worlds: list[World], given: argparse.Namespace) -> list[str]:
    """The rows that were measured and the one that was modelled, as Markdown."""
    titles = ["ranks", "ms/step", "over one rank", "tokens/s", "optimizer ms", "collectives ms", "alone ms", "Muon ms",
              "Hessians s", "GPTQ s", "sliding s"]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    one = worlds[0]

    def line(name: str, ranks: int, step: float, optimizer: Sequence[str], parts: Parts) -> str:
        cells = [name, f"{step:.2f}", f"{step / one.step:.3f}", f"{1000 * ranks * given.tokens / step:,.0f}",
                 *optimizer, f"{parts.muon:.2f}", *(f"{seconds:.3f}" for seconds in parts[1:])]  # fmt: skip
        return f"| {' | '.join(cells)} |"

    for world in worlds:
        optimizer = [f"{ms:.2f}" for ms in (world.optimizer, *world.collectives)]
        lines.append(line(str(world.ranks), world.ranks, world.step, optimizer, world.parts))
    step, communication = modelled(one, worlds[1] if len(worlds) > 1 else None, given.model)
    lines.append(line(f"{given.model}, model", given.model, step, [""] * 3, one.model))
    return [*lines, "", f"Communication in the model: {communication:.2f} ms a step" if len(worlds) > 1 else
            "Communication in the model: none, since no second world was measured"]  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the command line; exits with a message where they mean nothing."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="worlds to measure, the first one 1")
    parser.add_argument("--model", type=int, default=8, help="ranks of the modelled row")
    parser.add_argument("--steps", type=int, default=60, help="steps to time")
    parser.add_argument("--tokens", type=int, default=t.MICRO_BATCH_TOKENS, help="tokens per rank and step")
    parser.add_argument("--windows", type=int, help="windows of the sliding evaluation (default: all)")
    parser.add_argument("--result", help="(internal) be one rank, and write what rank 0 measured to this file")
    parser.add_argument("settings", nargs="*", metavar="KEY=value", help="variables of train_gpt.py")
    given = parser.parse_intermixed_args(arguments)
    if wrong := [word for word in given.settings if "=" not in word]:
        parser.error(f"{' '.join(wrong)}: expected KEY=value")
    if given.ranks[0] != 1:
        parser.error(f"--ranks {given.ranks[0]}: the first world is 1, which the others are compared with")
    return given


def main() -> None:
    """Measure every world in processes of its own and print the table; with --result, be one of those processes."""
    given = parse(sys.argv[1:])
    settings = dict(pair.split("=", 1) for pair in given.settings)
    env = {**os.environ, **settings, "EXPORT_ONLY": "1", "WEIGHTS_PATH": "unused"}  # keeps training logs untouched
    if given.result:
        torch._dynamo.config.recompile_limit = 64  # Muon's graphs: of each bank for each share of its layers
        with t.Runtime.start(t.Config.from_env(env), env) as run:
            world = measure(run, given)
            if run.ranks.is_main_process:
                Path(given.result).write_text(json.dumps(world))
        return
    worlds = [run_world(ranks, given, env) for ranks in given.ranks]
    print(f"{worlds[0].device} torch {torch.__version__}, {given.tokens} tokens per rank, {given.steps} steps after 10")
    print("\n".join(table(worlds, given)))


if __name__ == "__main__":
    main()
