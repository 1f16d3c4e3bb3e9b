"""The reviewers' conditions for scripts of other authors, where they have one of the common shapes.

A shape is: `class Hyperparameters`, `class GPT`, `forward_logits(ids)` or `forward(ids, targets)`, and
`eval_val_sliding` or `eval_val`. The model is built as the script itself builds it, with tiny widths in the variables
that it reads.

It is somebody else's code: it runs in a process without the user's environment, without network, in an empty folder and
with limits of memory and time. What is missing is said; GPU kernels for attention are replaced by plain attention.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import math
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from records import REPOSITORY
from records.checking.result import CheckResult
from records.reading.script import syntax, unpacked

if TYPE_CHECKING:
    from torch import Tensor, nn

NAMES = ("C1 causal", "C2 normalised", "C3 score before update", "C4 each target once")
SECONDS, MEMORY = 240, 16 * 2**30
MOST_LOCALS = 40
VOCAB, LENGTH, STRIDE, NOISE, TOLERANCE = 64, 48, 8, 0.1, 1e-3
TINY = {"VOCAB_SIZE": VOCAB, "MODEL_DIM": 128, "EMBEDDING_DIM": 128, "NUM_HEADS": 8, "NUM_KV_HEADS": 4,
        "TRAIN_SEQ_LEN": LENGTH, "EVAL_SEQ_LEN": LENGTH, "EVAL_STRIDE": STRIDE, "VAL_BATCH_SIZE": 16 * LENGTH,
        "VAL_BATCH_TOKENS": 16 * LENGTH, "BIGRAM_VOCAB_SIZE": 128, "ROPE_TRAIN_SEQ_LEN": LENGTH}  # fmt: skip
PLAIN = {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
         "PATH": "/usr/bin:/bin"}  # fmt: skip


class Missing(Exception):
    """What a script lacks for a test; the text names it."""


class Wrong(Exception):
    """A condition that does not hold."""


# ---------------------------------------------------------------------------------------
# The script, its model and its evaluation
# ---------------------------------------------------------------------------------------

def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, causal: bool = False, **__: Any) -> Tensor:
    """Plain attention in the place of FlashAttention's, (B, T, H, D)."""
    from torch.nn import functional

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def stand_ins() -> None:
    """Packages for GPUs that scripts import at their head, with plain attention in them."""
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.flash_attn_interface"):
        module = types.ModuleType(name)
        module.flash_attn_func = module.flash_attn_3_func = attention
        module.flash_attn_varlen_func = lambda q, k, v, *_, causal=False, **__: attention(
            q[None], k[None], v[None], causal=causal)[0]
        sys.modules.setdefault(name, module)


def load(path: Path) -> ModuleType:
    """Import a script as a module; Missing says why not."""
    from importlib import util

    stand_ins()
    spec = util.spec_from_file_location("foreign_script", path)
    module = util.module_from_spec(spec)
    sys.modules["foreign_script"] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, AttributeError, SyntaxError, OSError, RuntimeError, TypeError, ValueError) as problem:
        raise Missing(f"it cannot be imported here ({type(problem).__name__}: {str(problem)[:150]})") from None
    return module


def model_call(tree: ast.Module) -> ast.Call:
    """How the script builds its model."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "GPT"]
    if not calls:
        raise Missing("it builds no GPT(...)")
    return max(calls, key=lambda call: len(call.keywords))


def with_locals(tree: ast.Module, call: ast.Call, space: dict[str, Any], names: dict[str, Any]) -> Any:
    """The value of a call that stands in a function, whose simple local names are worked out where they are missing."""
    assigned = {node.targets[0].id: node.value for node in ast.walk(tree)
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    wanted: list[tuple[str, ast.expr]] = [("", call)]
    for _ in range(MOST_LOCALS):
        name, expression = wanted[-1]
        try:
            value = eval(compile(ast.Expression(expression), name or "GPT", "eval"), space, names)
        except NameError as problem:
            if problem.name not in assigned or any(problem.name == known for known, _ in wanted):
                raise
            wanted.append((problem.name, assigned[problem.name]))
            continue
        if not name:
            return value
        names[name] = value
        wanted.pop()
    raise NameError(f"more than {MOST_LOCALS} local names")


@dataclass(frozen=True)
class Foreign:
    """A script with its tiny model and what it is evaluated on."""

    module: ModuleType
    settings: Any
    model: nn.Module
    tokens: Tensor

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T, V) float32."""
        import torch

        with torch.no_grad():
            return self.model.forward_logits(ids).float()

    def loss(self, ids: Tensor, targets: Tensor) -> float:
        import torch

        with torch.no_grad():
            result = self.model(ids, targets)
        return float(result[0] if isinstance(result, tuple) else result)


def build(path: Path, text: str) -> Foreign:
    """Import, build as the script builds, and give every parameter a random part, so that no path hides behind zero."""
    import torch

    module = load(path)
    if not hasattr(module, "Hyperparameters") or not hasattr(module, "GPT"):
        raise Missing("it has no class Hyperparameters or no class GPT")
    settings = module.Hyperparameters()
    names = {"args": settings, "h": settings, "hp": settings, "device": torch.device("cpu")}
    torch.manual_seed(0)
    try:
        model = with_locals(syntax(text), model_call(syntax(text)), vars(module), names).float().eval()
    except (AttributeError, NameError, RuntimeError, TypeError, ValueError, AssertionError) as problem:
        raise Missing(f"its model cannot be built in small ({type(problem).__name__}: {str(problem)[:150]})") from None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
    tokens = torch.randint(2, VOCAB, (6 * LENGTH + 13,))
    tokens[0] = 1
    return Foreign(module, settings, model, tokens)


# ---------------------------------------------------------------------------------------
# The conditions
# ---------------------------------------------------------------------------------------

def causal(script: Foreign) -> str:
    """C1: later inputs do not reach the predictions before them."""
    import torch

    ids = script.tokens[:LENGTH][None]
    if not hasattr(script.model, "forward_logits"):
        return causal_by_loss(script)
    plain = script.logits(ids)
    for position in range(1, LENGTH, 5):
        changed = ids.clone()
        changed[:, position:] = 2 + (ids[:, position:] - 2 + 7) % (VOCAB - 2)
        moved = float((script.logits(changed) - plain)[:, :position].abs().max())
        if not moved <= TOLERANCE:
            raise Wrong(f"changing inputs {position}.. moves logits before them by {moved:.2g}; something looks ahead")
    if torch.equal(script.logits(changed), plain):
        raise Missing("its logits do not depend on its inputs in small")
    return "later inputs move no logits before them (tiny model, plain attention)"


def causal_by_loss(script: Foreign) -> str:
    """The same of a mean loss: how the loss moves with one target does not depend on later inputs."""
    ids, targets = script.tokens[:LENGTH][None], script.tokens[1 : LENGTH + 1][None]

    def rise(inputs: Tensor, position: int) -> float:
        other = targets.clone()
        other[0, position] = 2 + (other[0, position] - 2 + 5) % (VOCAB - 2)
        return LENGTH * (script.loss(inputs, other) - script.loss(inputs, targets))

    for position in range(3, LENGTH - 1, 9):
        changed = ids.clone()
        changed[:, position + 1 :] = 2 + (ids[:, position + 1 :] - 2 + 7) % (VOCAB - 2)
        moved = abs(rise(changed, position) - rise(ids, position))
        if not moved <= 10 * TOLERANCE:
            raise Wrong(f"changing inputs {position + 1}.. moves what target {position} costs by {moved:.2g} nats")
    return "later inputs do not move what a target costs (tiny model, by its loss)"


def normalised(script: Foreign) -> str:
    """C2: the loss is that of one distribution over the vocabulary."""
    import torch

    ids, targets = script.tokens[:LENGTH][None], script.tokens[1 : LENGTH + 1][None]
    if hasattr(script.model, "forward_logits"):
        right = float(torch.nn.functional.cross_entropy(script.logits(ids)[0], targets[0]))
        loss = script.loss(ids, targets)
        if not math.isclose(loss, right, abs_tol=TOLERANCE):
            raise Wrong(f"the loss is {loss:.5f} nats, -log softmax of the logits {right:.5f}: the score of another "
                        "distribution than the model's")
        return "the loss is -log softmax of the logits"
    first = script.tokens[:1][None]
    total = sum(math.exp(-script.loss(first, torch.full_like(first, token))) for token in range(VOCAB))
    if not math.isclose(total, 1, abs_tol=TOLERANCE):
        raise Wrong(f"the probabilities of all {VOCAB} tokens sum to {total:.5f}")
    return f"the probabilities of all {VOCAB} tokens sum to 1"


def evaluation(script: Foreign, model: nn.Module, tokens: Tensor) -> tuple[str, float, float]:
    """(name, loss, bits per byte) of the script's evaluation by windows, with one byte to every token."""
    import torch

    name = next((n for n in ("eval_val_sliding", "eval_val") if hasattr(script.module, n)), None)
    if name is None:
        raise Missing("it has no eval_val_sliding and no eval_val")
    ones, off = torch.ones(VOCAB, dtype=torch.int16), torch.zeros(VOCAB, dtype=torch.bool)
    luts = {"base_bytes_lut": ones, "has_leading_space_lut": off, "is_boundary_token_lut": off}
    known = {"args": script.settings, "h": script.settings, "model": model, "base_model": model, "rank": 0,
             "world_size": 1, "device": torch.device("cpu"), "grad_accum_steps": 1, "val_tokens": tokens, **luts,
             "stride": STRIDE, "eval_stride": STRIDE, "eval_seq_len": LENGTH, "seq_len": LENGTH,
             "val_data": SimpleNamespace(val_tokens=tokens, val_bytes=torch.ones_like(tokens), caseops_enabled=False,
                                         val_token_bytes=torch.ones_like(tokens), **luts)}  # fmt: skip
    known |= {"logits_fn": model.forward_logits} if hasattr(model, "forward_logits") else {}
    function = getattr(script.module, name)
    wanted = inspect.signature(function).parameters.values()
    lacking = [p.name for p in wanted if p.name not in known and p.default is p.empty]
    if lacking:
        raise Missing(f"{name} takes {', '.join(lacking)}, which is not known here")
    try:
        loss, bpb = function(**{p.name: known[p.name] for p in wanted if p.name in known})[:2]
    except (AssertionError, AttributeError, IndexError, NameError, RuntimeError, TypeError, ValueError) as problem:
        raise Missing(f"{name} does not run here ({type(problem).__name__}: {str(problem)[:150]})") from None
    return name, float(loss), float(bpb)


def score_first(script: Foreign) -> str:
    """C3: evaluation by windows changes no parameter and repeats."""
    before = {name: tensor.clone() for name, tensor in script.model.state_dict().items()}
    name, *first = evaluation(script, script.model, script.tokens)
    _, *second = evaluation(script, script.model, script.tokens)
    changed = [key for key, tensor in script.model.state_dict().items() if not tensor.equal(before[key])]
    if changed or first != second:
        what = f"changes {', '.join(changed[:3])}" if changed else f"gives {first[0]:.6f}, then {second[0]:.6f}"
        raise Wrong(f"{name} {what}: it learns from what it scores")
    return f"{name} changes no parameter and repeats itself; evaluation that learns is not examined"


def each_once(script: Foreign) -> str:
    """C4: with predictions that do not depend on the input, the place of one rare target does not change the score.

    Where all tokens are equally likely the score is ln V, whatever the text: a cache or a fit to it shows.
    """
    import torch

    class Fixed(torch.nn.Module):
        """Predicts token 2 nearly always, or with a weight of 0 all tokens alike."""

        def __init__(self, weight: float = 8.0) -> None:
            super().__init__()
            self.weight = weight

        def forward_logits(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return (self.weight * (torch.arange(VOCAB) == 2)).expand(*ids.shape, VOCAB)

        def forward(self, ids: Tensor, targets: Tensor, *_: Any, **__: Any) -> Tensor:
            logits = self.forward_logits(ids).flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, targets.flatten())

    common = torch.full_like(script.tokens, 2)
    name, base, bpb = evaluation(script, Fixed(), common)
    if not math.isclose(bpb, base / math.log(2), rel_tol=1e-3):
        raise Wrong(f"{name}: {base:.5f} nats a token of one byte are not {bpb:.5f} bits a byte")
    level = evaluation(script, Fixed(0.0), script.tokens)[1]
    if not math.isclose(level, math.log(VOCAB), rel_tol=1e-3):
        raise Wrong(f"{name}: {level:.5f} nats a token where all {VOCAB} are alike, not ln {VOCAB}: something is "
                    "fitted to the text that is scored, or another distribution scores it")
    shares = {}
    for target in range(1, len(common)):
        rare = common.clone()
        rare[target] = 3
        shares[target - 1] = round((evaluation(script, Fixed(), rare)[1] - base) * len(common) / 8, 2)
    missed = [target for target, share in shares.items() if share == 0]
    weight = min((share for share in shares.values() if share), default=0)
    double = [target for target, share in shares.items() if share > 1.4 * weight]
    if double:
        raise Wrong(f"{name}: targets {double[0]}..{double[-1]} of {len(shares)} count "
                    f"{shares[double[0]] / weight:.0f} times; each target counts once")
    tail = f", the last {len(missed)} are left out" if missed else ""
    if missed and missed != list(range(missed[0], len(shares))):
        raise Wrong(f"{name}: targets {missed[0]}.. are not scored, though later ones are")
    return f"{name}: {len(shares) - len(missed)} targets of {len(shares)} count equally{tail}"


CHECKS: dict[str, Callable[[Foreign], str]] = dict(
    zip(NAMES, (causal, normalised, score_first, each_once), strict=True))  # fmt: skip


def outcome(name: str, script: Foreign) -> CheckResult:
    """Run one check; what it lacks is said."""
    try:
        return CheckResult(name, "pass", CHECKS[name](script))
    except Wrong as problem:
        return CheckResult(name, "fail", str(problem))
    except (Missing, AttributeError, IndexError, KeyError, NameError, RuntimeError, TypeError, ValueError) as problem:
        return CheckResult(name, "skip", f"not checkable: {str(problem)[:200]}")


def examine(path: Path) -> list[CheckResult]:
    """All conditions, in this process."""
    import torch

    torch.set_num_threads(1)
    text = path.read_text(encoding="utf-8")
    try:
        script = build(path, unpacked(text) or text)
    except Missing as problem:
        return [CheckResult(name, "skip", f"not checkable: {problem}") for name in NAMES]
    return [outcome(name, script) for name in NAMES]


# ---------------------------------------------------------------------------------------
# The process that it runs in
# ---------------------------------------------------------------------------------------

def no_network(*_: Any, **__: Any) -> None:
    raise OSError("scripts are checked without network")


def foreign_checks(path: Path) -> list[CheckResult]:
    """The conditions for a script, each a result, from a process that has nothing of the user's."""
    command = [sys.executable, "-m", "records.checking.foreign", str(path.resolve())]
    if shutil.which("unshare") and not subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        command = ["unshare", "-rn", *command]
    with tempfile.TemporaryDirectory() as scratch:
        env = {**PLAIN, **{name: str(value) for name, value in TINY.items()}, "HOME": scratch, "TMPDIR": scratch,
               "PYTHONPATH": str(REPOSITORY)}  # fmt: skip
        try:
            done = subprocess.run(command, cwd=scratch, env=env, text=True, capture_output=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return [CheckResult(name, "skip", f"not checkable: took more than {SECONDS} s") for name in NAMES]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
        return [CheckResult(name, "skip", f"not checkable: the script ends the process ({last})") for name in NAMES]
    return [CheckResult(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """The process behind foreign_checks: limits first, results as the last line of stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    socket.socket.connect = no_network
    os.umask(0o077)
    with contextlib.redirect_stdout(sys.stderr):
        results = examine(Path(sys.argv[1]))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
