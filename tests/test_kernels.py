"""Triton kernels against their plain definitions, in float64, on the CPU through Triton's interpreter or on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt as t

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(128, 32, 256), (300, 48, 200), (77, 64, 520)]  # tokens, model width, hidden: whole tiles and none
CASES = """
import sys, torch
import train_gpt as t
fused, device = t.fused_feed_forward(), torch.device(sys.argv[1])
dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
for tokens, width, hidden in {shapes}:
    generator = torch.Generator().manual_seed(tokens)
    sizes = [(1, tokens, width), (hidden, width), (width, hidden), (hidden,)]
    values = [torch.randn(size, generator=generator) for size in sizes]
    upstream = torch.randn(sizes[0], generator=generator)

    def run(function, dtype, device, learned):
        inputs = [v.detach().clone().to(device, dtype).requires_grad_(i < 3 or learned) for i, v in enumerate(values)]
        y, act = function(*inputs)
        y.backward(upstream.to(device, dtype))
        return [y, act.view(tokens, hidden), *(i.grad for i in inputs if i.requires_grad)]

    for learned in (False, True):
        want = run(t.plain_feed_forward, torch.float64, torch.device("cpu"), learned)
        error = t.relative_error(run(fused, dtype, device, learned), [w.view_as(w) if w.dim() < 3 else w for w in want[:1]]
                                 + [want[1].view(tokens, hidden), *want[2:]])
        print(tokens, width, hidden, learned, error)
        assert error < (1e-5 if device.type == "cpu" else 1e-2), error
"""


def run_cases(device: str) -> None:
    """The comparison in a process of its own: TRITON_INTERPRET counts when Triton is imported."""
    interpret = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    env = {**os.environ, **interpret, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = CASES.format(shapes=SHAPES)
    done = subprocess.run([sys.executable, "-c", script, device], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_fused_feed_forward_equals_its_definition_in_the_interpreter() -> None:
    """Output, activations and every gradient, with and without a learned beta, on shapes that no tile divides."""
    pytest.importorskip("triton")
    run_cases("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fused_feed_forward_equals_its_definition_on_the_gpu() -> None:
    """The same in bfloat16, as trained."""
    run_cases("cuda")


def test_the_probe_refuses_a_wrong_feed_forward(run: t.Runtime, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets beta's gradient or squares wrongly is an error where it was named."""

    def no_beta_gradient(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, beta: torch.Tensor) -> tuple:
        return t.plain_feed_forward(x, up, down, beta.detach() + 0 * beta)

    assert t.probe_feed_forward(t.plain_feed_forward, run.cfg, torch.device("cpu")) < 1e-4
    monkeypatch.setitem(t.FEED_FORWARD, "plain", lambda: no_beta_gradient)
    with pytest.raises(t.UserError, match="MLP_BACKEND=auto.*wrong by"):
        t.choose_back_end(run, t.MLP_BACK_ENDS, "auto")


def test_the_fused_layer_needs_a_gpu_or_says_so(run: t.Runtime, in_tmp: Path) -> None:
    """MLP_BACKEND=triton on a CPU is an error that names the remedy; auto takes the plain layer and logs it."""
    with pytest.raises(t.UserError, match="MLP_BACKEND=triton: not usable here"):
        t.choose_back_end(run, t.MLP_BACK_ENDS, "triton")
    t.choose_back_end(run, t.MLP_BACK_ENDS, "auto")
    assert "mlp_backend:plain" in (in_tmp / "logs/tiny.txt").read_text()
