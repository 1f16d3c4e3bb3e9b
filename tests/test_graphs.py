"""Steps as recorded graphs: on the CPU with a stand-in for CUDA's graph that runs the function again."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as t
from conftest import tiny_config, tiny_model

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class StandIn:
    """A CUDA graph that keeps the contract: replaying writes into the tensors that were there when it was recorded."""

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        """Run the function once more and copy its loss and gradients over the recorded ones."""
        step = self.step
        for parameter in step.parameters:
            parameter.grad = None
        loss = self.function(*step.batch)
        step.loss.copy_(loss)
        for parameter, grad in zip(step.parameters, step.grads, strict=True):
            grad.copy_(parameter.grad)
            parameter.grad = None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Recording works on the CPU; the list takes the pools that graphs were recorded into."""
    pools = []

    @contextlib.contextmanager
    def recording(graph: StandIn, pool: Any, capture_error_mode: str) -> Iterator[None]:
        pools.append(pool)
        yield

    class Graph(t.StepGraph):
        def __init__(self, function: Callable[..., torch.Tensor], *rest: Any) -> None:
            super().__init__(function, *rest)
            self.graph.step, self.graph.function = self, function

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(t, "StepGraph", Graph)
    return pools


def losses_and_weights(run: t.Runtime, accum: int) -> list[torch.Tensor]:
    """Four steps through two phases, each of which is recorded after a first step as in warm-up."""
    model = tiny_model(DEVICE=run.ranks.device.type)
    trainer = t.Trainer(replace(run, cfg=replace(run.cfg, grad_accum_steps=accum)), model)
    phases = t.phases(run.cfg)
    before = trainer.state()
    for name, phase in phases.items():
        trainer.step(0, t.StepPlan(1.0, 0.9, name))
        trainer.record(phase)
    trainer.restore(before)
    assert len(trainer.graphs) == trainer.replays * len(phases)
    losses = [trainer.step(number, t.StepPlan(0.5, 0.9, [*phases][number // 2])) for number in range(4)]
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("accum", [1, 4])
def test_recorded_steps_equal_those_run_one_by_one(
    run: t.Runtime, stand_in: list[Any], monkeypatch: pytest.MonkeyPatch, accum: int
) -> None:
    """Losses and weights bitwise, over a change of phase and several micro-steps; both graphs share one pool of memory."""
    plain = losses_and_weights(run, accum)
    assert not stand_in
    monkeypatch.setattr(t.Trainer, "replays", True)
    recorded = losses_and_weights(run, accum)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert stand_in == [None, "pool"]


def test_micro_steps_on_a_gpu_are_recorded(run: t.Runtime) -> None:
    """CUDA_GRAPH=0 and a CPU leave the steps as they are."""
    trainer = t.Trainer(run, tiny_model())
    assert run.cfg.cuda_graph and not trainer.replays

    class Device:
        type = "cuda"

    def replays(**changes: Any) -> bool:
        trainer.run = replace(run, cfg=replace(run.cfg, **changes), ranks=replace(run.ranks, device=Device()))
        return trainer.replays

    assert replays() and not replays(cuda_graph=False)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [(RuntimeError("not permitted when stream is capturing\nmore"), "not permitted when stream is capturing"),
     (None, r"wrong by [0-9.e-]+, [0-9.e-]+ allowed")],
)  # fmt: skip
def test_a_step_that_cannot_be_recorded_is_launched_or_refused(
    run: t.Runtime, stand_in: list[Any], monkeypatch: pytest.MonkeyPatch, fault: Exception | None, reason: str,
    named: bool,
) -> None:  # fmt: skip
    """Capture that fails, or a graph that computes something else: a warning by default, an error by name."""
    sources = {**run.cfg.sources, "cuda_graph": "environment" if named else "default"}
    run = replace(run, cfg=replace(run.cfg, sources=sources))
    trainer, phase = t.Trainer(run, tiny_model()), t.phases(run.cfg)["train"]
    monkeypatch.setattr(t.Trainer, "replays", True)
    working = StandIn.replay

    def replay(graph: StandIn) -> None:
        if fault:
            raise fault
        working(graph)
        for grad in graph.step.grads[:4]:
            grad *= 1.1

    monkeypatch.setattr(StandIn, "replay", replay)
    if named:
        with pytest.raises(t.UserError, match=rf"CUDA_GRAPH=1: .* \({reason}\); set CUDA_GRAPH=0"):
            trainer.record(phase)
        return
    trainer.record(phase)
    assert not trainer.graphs
    log = Path("logs/tiny.txt").read_text()
    assert re.search(rf"WARNING: a step .*CUDA graph \({reason}\); launched one by one it takes", log)
    assert len(run.costs) == 1
    assert trainer.step(0, t.StepPlan(1.0, 0.9, "train")) > 0


@GPU
@pytest.mark.parametrize("accum", [1, 4])
def test_recorded_steps_equal_those_run_one_by_one_on_the_gpu(
    in_tmp: Path, corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch, accum: int
) -> None:
    """The same with CUDA's graphs; kernels that add atomically leave rounding."""
    with t.Runtime.start(tiny_config(**corpus, DEVICE="cuda"), {}) as run:
        recorded = losses_and_weights(run, accum)
        monkeypatch.setattr(t.Trainer, "replays", False)
        plain = losses_and_weights(run, accum)
    assert max(t.relative_errors(recorded[:4], [loss.cpu().double() for loss in plain[:4]])) < 1e-3
