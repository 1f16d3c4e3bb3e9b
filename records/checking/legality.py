"""The reviewers' conditions (issue #1017), tested on the CPU with a tiny random model of the submission's own script.

    C1  a score depends on the artifact and the tokens before it, on nothing after
    C2  the scores are those of one normalised distribution over the whole vocabulary
    C3  a token is scored before anything changes because of it
    C4  one pass from left to right, every target scored exactly once
    and, in a whole run in small, bytes are those of the text, the artifact follows from the training text alone and
    the scores are the artifact's; a document's previous-token features show nothing of another document

The script is imported in a process of its own, without a GPU. Its model gets the submission's feature flags, read from
the logs in the folder, at widths that take seconds; its evaluation is called as the run called it.
"""

from __future__ import annotations

import ast
import bisect
import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from records import REPOSITORY, ToolError
from records.checking import branches, foreign, whole_run
from records.checking.result import CheckResult
from records.reading.runs import read_run
from records.reading.script import as_variable, syntax, unpacked

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

API = ("Config", "Log", "Ranks", "Runtime", "UserError", "ValidationSet", "build_model", "evaluate", "phases",
       "plan_windows", "score_windows")
DRIFT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)  # a script that grew another shape
OFFICIAL_TARGETS = 62_021_631  # sp1024 validation tokens as the records log them, less one; where no log says
TIMEOUT_SECONDS = 900
DOCUMENT_WINDOWS = "document windows"
BOS, VOCAB, HEAD_DIM, LENGTH, NOISE = 1, 32, 8, 24, 0.3
LONG = 2048  # tokens of a window at most where a script may do other things than in a short one
MANY = 1_100_000  # tokens that fill hash tables; more than guards by size wait for
CONTEXT, CONTEXTS = 62, 40  # tokens before a target that is tried on full tables, and how many of them
TOLERANCE = 1e-5  # nats; a leak in a model this random moves scores by 1e-2 and more


class Illegal(Exception):
    """A condition that does not hold; the text says where and what to mend."""


# ---------------------------------------------------------------------------------------
# A tiny model of the submission
# ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Subject:
    """The imported script with a tiny random model, something to score, and the run's evaluation paths."""

    script: ModuleType
    full: Any  # Config of the submission
    run: Any  # Runtime whose Config is tiny
    model: Any
    validation: Any
    plans: dict[str, np.ndarray]  # name of an evaluation path -> its windows
    targets: int  # of the submission's validation set

    def nats(self, tokens: Tensor, windows: np.ndarray) -> float:
        """Sum over the scored targets of `windows`, by the script's own scoring function."""
        validation = replace(self.validation, tokens=tokens)
        return float(self.script.score_windows(self.run, self.model, validation, windows)[0])


    def evaluations(self) -> dict[str, Callable[[Any], list[Any]]]:
        """The evaluations that the configuration asks for: name -> function of a validation set to its Scores.

        Test-time training and n-grams are one of them, `online`: it learns from what it has scored.
        """
        def fixed(stride: int, *by_document: bool) -> Callable[[Any], list[Any]]:
            return lambda validation: [self.script.evaluate(self.run, self.model, validation, stride, *by_document)]

        found = {name: fixed(stride) for name, stride in strides(self.run.cfg).items()}
        found |= {DOCUMENT_WINDOWS: fixed(self.run.cfg.eval_stride, True)} if DOCUMENT_WINDOWS in self.plans else {}
        found |= {"online": self.online} if learners(self.run.cfg) else {}
        return found | ({"documents": self.documents} if by_documents(self.run.cfg) else {})

    def documents(self, validation: Any) -> list[Any]:
        """The evaluation in which every document learns for itself."""
        return [self.script.evaluate_documents(self.run, self.model, validation)]

    def document_table(self, tokens: Tensor) -> Tensor:
        """Nats of every target of that evaluation, and the times that it was scored, (2, targets)."""
        text = replace(self.validation, tokens=tokens, token_bytes=self.validation.token_bytes[: len(tokens)])
        return self.script.score_documents(self.run, self.model, text)

    def online(self, validation: Any) -> list[Any]:
        """The evaluation that learns, as the script runs it."""
        script, cfg = self.script, self.run.cfg
        trainer = script.TestTimeTrainer(self.run, self.model, validation) if cfg.ttt_enabled else None
        if not hasattr(script, "evaluate_online"):
            return [trainer.score()]
        mixer = script.NgramMixer(self.run, validation) if getattr(cfg, "ngram_enabled", False) else None
        return script.evaluate_online(self.run, self.model, validation, trainer, mixer)


def strides(cfg: Any) -> dict[str, int]:
    """The evaluations by a fixed model that a configuration asks for: name -> stride."""
    return {"plain": cfg.eval_len, **({"sliding": cfg.eval_stride} if cfg.eval_stride else {})}


def window_plans(script: ModuleType, cfg: Any, validation: Any) -> dict[str, np.ndarray]:
    """The windows by which a fixed model is scored: name of the evaluation -> rows (start, first target, end)."""
    targets = len(validation.tokens) - 1
    plans = {name: script.plan_windows(targets, cfg.eval_len, stride) for name, stride in strides(cfg).items()}
    if hasattr(script, "plan_document_windows") and cfg.eval_stride and cfg.doc_attention:
        spans = script.document_spans(validation)
        plans[DOCUMENT_WINDOWS] = script.plan_document_windows(spans, cfg.eval_len, cfg.eval_stride)
    return plans


def learners(cfg: Any) -> list[str]:
    """Variables that let the evaluation learn from the text."""
    return [name.upper() for name in ("ttt_enabled", "ngram_enabled") if getattr(cfg, name, False)]


def by_documents(cfg: Any) -> bool:
    """Whether the evaluation also learns document by document."""
    return getattr(cfg, "ttt_lora_enabled", False)


def load_script(path: Path) -> ModuleType:
    """Import a script, packed or not, under a name of its own; its folder is left as it is."""
    name = "submission_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def tiny_settings(cfg: Any) -> dict[str, Any]:
    """What shrinks a configuration: widths and lengths; every feature that is on stays on, in proportion."""
    layers = min(cfg.num_layers, 4)
    kv_heads = min(cfg.num_kv_heads, 2)
    heads = kv_heads * (cfg.num_heads // cfg.num_kv_heads)
    stretch = min(cfg.eval_len / cfg.train_seq_len, 4)
    window = max(4, round(LENGTH * stretch))
    rotated = 2 * max(1, round(HEAD_DIM * cfg.rope_dims / cfg.head_dim / 2)) if cfg.rope_dims else 0
    return {
        "device": "cpu", "compile": 0, "attn_backend": "auto", "recipe": "", "eval_only": 0, "export_only": 0,
        "resume": 0,
        "artifact_path": "", "weights_path": "", "run_id": "legality", "vocab_size": VOCAB, "num_layers": layers,
        "num_heads": heads, "num_kv_heads": kv_heads, "model_dim": heads * HEAD_DIM, "rope_dims": rotated,
        "mlp_hidden": math.ceil(cfg.mlp_hidden / cfg.model_dim * heads * HEAD_DIM),
        "xsa_last_n": math.ceil(cfg.xsa_last_n / cfg.num_layers * layers), "ve_dim": HEAD_DIM,
        "ve_layers": list(range(layers))[-min(len(cfg.ve_layers), layers):] if cfg.ve_layers else [],
        "bigram_vocab_size": min(cfg.bigram_vocab_size, 32), "bigram_dim": HEAD_DIM, "train_seq_len": LENGTH,
        "short_seq_len": 0, "muon_head_group": 0,
        "eval_seq_len": window if cfg.eval_seq_len else 0, "val_batch_size": 5 * window,
        "eval_stride": min(window, max(5, round(window * cfg.eval_stride / cfg.eval_len))) if cfg.eval_stride else 0,
        **loop_settings(cfg, layers), **online_settings(cfg, window, layers), **document_settings(cfg),
    }  # fmt: skip


def loop_settings(cfg: Any, layers: int) -> dict[str, Any]:
    """The same part of fewer layers loops."""
    start, ends = (place * layers / cfg.num_layers for place in (cfg.loop_start, cfg.loop_end + 1))
    return {"loop_start": int(start), "loop_end": math.ceil(ends) - 1} if cfg.num_loops else {}


def online_settings(cfg: Any, window: int, layers: int) -> dict[str, Any]:
    """Chunks of a few windows, of which each is trained on; a learning rate whose effect no rounding hides."""
    if not learners(cfg):
        return {}
    return {"ttt_chunk_tokens": window + 8, "ttt_batch_seqs": 2, "ttt_epochs": min(cfg.ttt_epochs, 2),
            "ttt_freeze_blocks": min(cfg.ttt_freeze_blocks, layers - 1), "ttt_lr": 0.05 if cfg.ttt_lr else 0}


def document_settings(cfg: Any) -> dict[str, Any]:
    """Several chunks a document, several documents side by side, and a rate whose effect no rounding hides."""
    if not by_documents(cfg):
        return {}
    return {"ttt_lora_rank": 4, "ttt_lora_alpha": 8, "ttt_lora_lr": 0.05 if cfg.ttt_lora_lr else 0, "ttt_chunk_size": 3,
            "ttt_batch_size": 2}


def tiny_values(script: ModuleType, full: Any) -> dict[str, Any]:
    """Every field of a tiny likeness of `full`."""
    known = [name.lower() for name in script.Config.variables()]
    settings = tiny_settings(full)
    return {name: settings.get(name, getattr(full, name)) for name in known}


def configurations(script: ModuleType, values: Mapping[str, Any]) -> tuple[Any, Any]:
    """(the submission's Config, its tiny likeness) from logged values, which the script's defaults complete."""
    known = {name.lower() for name in script.Config.variables()}
    ours = {name: value for name, value in values.items() if name in known and name != "recipe"}
    environ = {name.upper(): as_variable(value) for name, value in ours.items()}
    here = {"ARTIFACT_PATH": "", "WEIGHTS_PATH": "", "EVAL_ONLY": "0", "EXPORT_ONLY": "0", "RESUME": "0"}
    full = script.Config.from_env({**environ, **here})
    tiny = {name.upper(): as_variable(value) for name, value in tiny_values(script, full).items()}
    return full, script.Config.from_env(tiny)


def build_subject(path: Path, values: Mapping[str, Any], targets: int) -> Subject:
    """Everything the checks need, of the script at `path`."""
    script = load_script(path)
    full, cfg = configurations(script, values)
    return tiny_subject(script, full, cfg, targets)


def tiny_subject(script: ModuleType, full: Any, cfg: Any, targets: int) -> Subject:
    """A model whose parameters are random, so that no path hides behind a zero, and a text of a few windows."""
    import torch

    ranks = script.Ranks(0, 1, torch.device("cpu"))
    run = script.Runtime(cfg, ranks, script.Log(cfg, enabled=False), [])
    model = script.build_model(run, cfg, BOS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))
    count = 4 * cfg.eval_len + cfg.eval_len // 2 + 3  # the last window has a remainder to score
    tokens = torch.randint(4, VOCAB, (count,), generator=generator, dtype=torch.int32)
    tokens[[0, 7, 8, cfg.eval_len + 2, 2 * cfg.eval_len + 5, count - 6]] = BOS
    counts = torch.randint(0, 9, (count,), generator=generator, dtype=torch.int32)
    validation = script.ValidationSet(tokens, counts, BOS)
    return Subject(script, full, run, model, validation, window_plans(script, cfg, validation), targets)


def long_subject(subject: Subject) -> tuple[Subject, int]:
    """The same with the submission's own depth, vocabulary and window (LONG at most): no feature waits for the size.

    It stands in the middle of a text of the submission's length, from the second value on; and what a scoring function
    is told of the configuration is the submission's.
    """
    full, script = subject.full, subject.script
    length = min(full.eval_len, LONG)
    sizes = {"vocab_size": full.vocab_size, "num_layers": full.num_layers, "xsa_last_n": full.xsa_last_n,
             "ve_layers": full.ve_layers, "train_seq_len": min(full.train_seq_len, length), "eval_seq_len": length,
             "eval_stride": min(full.eval_stride, length), "val_batch_size": length, "ttt_enabled": 0,
             "ngram_enabled": 0, "ttt_lora_enabled": 0}  # fmt: skip
    values = {**tiny_values(script, full), **sizes}
    names = {name: as_variable(values[name.lower()]) for name in script.Config.variables()}
    big = tiny_subject(script, full, script.Config.from_env(names), subject.targets)
    text = big.validation.tokens
    times = max(subject.targets // len(text), 1)
    far = big.validation
    far = replace(far, tokens=text.repeat(times), token_bytes=far.token_bytes.max().expand(len(text) * times))
    kept = {"device": "cpu", **{name: getattr(big.run.cfg, name) for name in sizes if "eval" in name or "seq" in name}}
    told = replace(full, val_batch_size=length, **kept)
    return replace(big, run=replace(big.run, cfg=told), validation=far), times // 2 * len(text)


def other_token(token: Any) -> Any:
    """A different token (or tensor of them) that is not BOS."""
    return 4 + (token - 4 + 11) % (VOCAB - 4)


@dataclass(frozen=True)
class Record:
    """What one evaluation did: its Scores, its windows, and the nats (n, scores) of each, clipped as asked."""

    scores: list[Any]
    windows: np.ndarray
    nats: np.ndarray


def observe(
    subject: Subject, evaluation: Callable[[Any], list[Any]], validation: Any, targets: tuple[int, int] = (0, 1 << 60)
) -> Record:
    """Run an evaluation; every window is scored once more at its time, by itself, for those of its targets in a range.

    A window without any has 0 nats. What an evaluation learns in between is so seen where it acts.
    """
    import numpy as np

    script, original, seen, nats = subject.script, subject.script.score_windows, [], []

    def recorder(run: Any, model: Any, text: Any, windows: np.ndarray, *rest: Any, **named: Any) -> Tensor:
        sums = original(run, model, text, windows, *rest, **named)
        for start, first, end in windows.tolist():
            low, high = max(first, targets[0]), min(end, targets[1])
            single = sums * 0
            if low < high:
                single = original(run, model, text, windows[:1] * 0 + [start, low, high], *rest, **named)
            nats.append([float(single[0]), *map(float, single[3:])])
        seen.append(windows.copy())
        return sums

    script.score_windows = recorder
    try:
        scores = evaluation(validation)
    finally:
        script.score_windows = original
    return Record(scores, np.concatenate(seen), np.array(nats))


# ---------------------------------------------------------------------------------------
# The conditions
# ---------------------------------------------------------------------------------------

def check_causal(subject: Subject) -> str:
    """C1: change every token from some position on; the scores of all targets before it keep their value."""
    tokens, flips = subject.validation.tokens, 0
    length = subject.run.cfg.eval_len
    for name, plan in subject.plans.items():
        for position in (3, 9, length - 1, length + 1, 2 * length + 3, len(tokens) - 2):
            changed = tokens.clone()
            changed[position:] = other_token(tokens[position:])
            before = plan[plan[:, 1] < position - 1].copy()
            before[:, 2] = before[:, 2].clip(max=position - 1)  # target i is token i + 1
            moved = abs(subject.nats(changed, before) - subject.nats(tokens, before))
            if not moved <= TOLERANCE:
                raise Illegal(f"{name} evaluation: changing tokens {position}.. moves the scores of the targets before "
                              f"them by {moved:.2g} nats; something looks ahead (mask, shift, feature of the target)")
            if subject.nats(changed, plan) == subject.nats(tokens, plan):
                raise NotImplementedError(f"{name} evaluation: no score depends on tokens {position}..")
            flips += 1
        check_parts(subject, name, plan[len(plan) // 2])
    check_inputs(subject)
    check_document_plan(subject)
    check_long_windows(subject)
    return f"{flips} flips of all later tokens move no earlier score ({', '.join(subject.plans)}; PyTorch attention)"


def check_long_windows(subject: Subject) -> None:
    """The same once for a window of the submission's own length, and for its model with the targets held."""
    import torch

    big, offset = long_subject(subject)
    tokens, length = big.validation.tokens, big.run.cfg.eval_len
    for name, plan in big.plans.items():
        window = plan[len(plan) // 2] + offset
        start, first, end = window.tolist()
        middle = (first + end + 1) // 2
        changed = tokens.clone()
        changed[middle + 1 : end + length] = other_token(tokens[middle + 1 : end + length])
        before = plan[:1] * 0 + [start, first, middle]  # target i is token i + 1
        check_parts(big, name, window)
        moved = abs(big.nats(changed, before) - big.nats(tokens, before))
        if not moved <= 100 * TOLERANCE:  # a sum over a thousand targets
            raise Illegal(f"{name} evaluation in a window of {length} tokens: changing tokens {middle + 1}.. moves the "
                          f"scores of the targets before them by {moved:.2g} nats; something is fitted to the window "
                          "that is scored, or looks ahead")
    inputs, targets = tokens[:length].long()[None], tokens[1 : length + 1].long()[None]
    order = list(big.script.phases(big.run.cfg).values())[-1].order
    with torch.no_grad():
        weights = big.model.weights(False)
        plain = big.model.nll(inputs, targets, weights, order)[0]
        inputs[:, length // 2 :] = other_token(inputs[:, length // 2 :])
        moved = float((big.model.nll(inputs, targets, weights, order)[0] - plain)[: length // 2].abs().max())
    if not moved <= TOLERANCE * 10:
        raise Illegal(f"the model in a window of {length} tokens: inputs from the middle on move scores before it by "
                      f"{moved:.2g} nats")


def check_parts(subject: Subject, name: str, window: np.ndarray) -> None:
    """A window's targets scored together have the nats that its two halves have apart."""
    tokens, (start, first, end) = subject.validation.tokens, window.tolist()
    middle = (first + end + 1) // 2
    whole, *halves = (subject.nats(tokens, window[None] * 0 + [start, low, high])
                      for low, high in ((first, end), (first, middle), (middle, end)))
    if not math.isclose(whole, sum(halves), rel_tol=1e-6, abs_tol=TOLERANCE):
        raise Illegal(f"{name} evaluation in a window of {subject.run.cfg.eval_len} tokens: targets {first}..{end - 1} "
                      f"scored together have {whole:.6f} nats, by halves {sum(halves):.6f}; something is fitted to "
                      "what is scored")


def check_document_plan(subject: Subject) -> None:
    """Windows that follow the documents are a function of the text: what comes later moves none of the earlier."""
    if DOCUMENT_WINDOWS not in subject.plans:
        return
    tokens, plan, length = subject.validation.tokens, subject.plans[DOCUMENT_WINDOWS], subject.run.cfg.eval_len
    for position in range(1, len(tokens) - length):  # the last window ends with the text wherever documents begin
        changed = tokens.clone()
        changed[position:] = BOS
        text = replace(subject.validation, tokens=changed)
        other = window_plans(subject.script, subject.run.cfg, text)[DOCUMENT_WINDOWS]
        before, after = (starts_by_target(rows, position - 1) for rows in (plan, other))
        if before != after:
            raise Illegal(f"document windows: tokens {position}.. decide which context earlier targets are scored "
                          "with; a window may follow from what stands before its first target alone")


def starts_by_target(plan: np.ndarray, targets: int) -> list[int]:
    """First input of the window that scores each of the first `targets`."""
    return [int(start) for start, first, end in plan.tolist() for _ in range(first, min(end, targets))]


def scoring_batch(subject: Subject) -> tuple[Tensor, Tensor, dict[str, Tensor], tuple[int, ...]]:
    """What the model's nll takes: inputs and targets (2, window), prepared weights, layer order."""
    length = subject.run.cfg.eval_len
    pairs = subject.validation.tokens[: 2 * length + 1].long()
    order = list(subject.script.phases(subject.run.cfg).values())[-1].order
    return pairs[:-1].view(2, -1), pairs[1:].view(2, -1), subject.model.weights(False), order


def check_inputs(subject: Subject) -> None:
    """The model itself, with the targets held: inputs from some position on do not reach the scores before it.

    Flipping the text cannot show this for the input that is the target's own token, one step ahead.
    """
    import torch

    with torch.no_grad():
        inputs, *rest = scoring_batch(subject)
        plain = subject.model.nll(inputs, *rest)
        for position in range(1, inputs.shape[1]):
            changed = inputs.clone()
            changed[:, position:] = other_token(inputs[:, position:])
            moved = float((subject.model.nll(changed, *rest) - plain)[:, :position].abs().max())
            if not moved <= TOLERANCE:
                raise Illegal(f"the model's inputs from position {position} on move scores before it by {moved:.2g} "
                              "nats: a feature or mask lets a position see its own target or what follows")


def check_normalised(subject: Subject) -> str:
    """C2: score every token of the vocabulary in the place of a target; the probabilities sum to 1."""
    import torch

    tokens, worst = subject.validation.tokens, 0.0
    length = subject.run.cfg.eval_len
    for name, plan in subject.plans.items():
        for target in (2, length + 4, len(tokens) - 2):
            start = int(plan[(plan[:, 1] <= target) & (target < plan[:, 2])][0, 0])
            window, nats = plan[:1] * 0 + [start, target, target + 1], []
            for candidate in range(VOCAB):
                changed = tokens.clone()
                changed[target + 1] = candidate
                nats.append(subject.nats(changed, window))
            total = float(torch.tensor(nats, dtype=torch.float64).neg().exp().sum())
            worst = max(worst, abs(total - 1))
            if not abs(total - 1) <= 1e-4:
                raise Illegal(f"{name} evaluation: the probabilities of all {VOCAB} tokens at target {target} sum to "
                              f"{total:.6g}; the score must come from one distribution fixed before the token is seen")
    check_logits(subject)
    check_fixed_scores(subject)
    if learners(subject.run.cfg):
        worst = max(worst, check_online_normalised(subject))
    if getattr(subject.run.cfg, "ngram_enabled", False):
        worst = max(worst, check_full_tables(subject))
    if by_documents(subject.run.cfg):
        worst = max(worst, check_documents_normalised(subject))
    names = ", ".join(subject.evaluations())
    return f"probabilities over the vocabulary sum to 1 within {worst:.0e} ({names}); nll = -log p"


def check_online_normalised(subject: Subject) -> float:
    """The same for the evaluation that learns: the last token of a text is each of the vocabulary in turn."""
    import numpy as np

    cfg, nats = subject.run.cfg, []
    target = 2 * cfg.ttt_chunk_tokens + 3  # in the third chunk
    tokens = subject.validation.tokens[: target + 2]
    for candidate in range(VOCAB):
        changed = tokens.clone()
        changed[target + 1] = candidate
        text = replace(subject.validation, tokens=changed, token_bytes=subject.validation.token_bytes[: target + 2])
        nats.append(observe(subject, subject.online, text, (target, target + 1)).nats.sum(0))
    totals = np.exp(-np.array(nats)).sum(0)
    for total in totals.tolist():
        if not abs(total - 1) <= 1e-4:
            raise Illegal(f"online evaluation: the probabilities of all {VOCAB} tokens at target {target} sum to "
                          f"{total:.6g}; a mixture must come from one distribution, of counts that exclude the target")
    return float(abs(totals - 1).max())


def uniform(subject: Subject) -> Subject:
    """A model to which all tokens are equally likely, and a long text."""
    import torch

    wanted = {"ttt_enabled": False, "eval_stride": subject.run.cfg.eval_len, "ttt_chunk_tokens": MANY // 4,
              "val_batch_size": MANY}  # fmt: skip
    cfg = replace(subject.run.cfg, **{name: value for name, value in wanted.items() if hasattr(subject.full, name)})
    model, level = copy.copy(subject.model), torch.tensor(math.log(VOCAB))
    vars(model).update(micro_batch=MANY, fast_nll=lambda ids, *_: level.expand(ids.shape),
                       fast_nll_and_entropy=lambda ids, *_: (level.expand(ids.shape), level.expand(ids.shape)))
    tokens = torch.randint(4, VOCAB, (MANY,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    tokens[0] = BOS
    text = subject.script.ValidationSet(tokens, torch.ones_like(tokens), BOS)
    return replace(subject, run=replace(subject.run, cfg=cfg), model=model, validation=text)


def check_fixed_scores(subject: Subject) -> None:
    """A fixed model to which all tokens are equally likely scores a long text by ln V a target, whatever was scored."""
    long = uniform(subject)
    for name, evaluation in long.evaluations().items():
        if name in subject.plans:
            (score,) = evaluation(long.validation)
            if not math.isclose(score.loss, math.log(VOCAB), rel_tol=1e-6):
                raise Illegal(f"{name} evaluation of {MANY} tokens: {score.loss:.6f} nats a target under a model to "
                              f"which all tokens are equally likely, not ln {VOCAB}: something else scores")


def check_full_tables(subject: Subject) -> float:
    """The same for n-grams after a long text, where hash tables are full and a target's bucket holds other n-grams.

    Only counts decide: each of some contexts, copied from the text, stands in the last chunk, of which nothing is
    counted, once before every token of the vocabulary.
    """
    import numpy as np
    import torch

    long = uniform(subject)
    tokens = long.validation.tokens
    spans = torch.linspace(MANY // 8, MANY // 2, CONTEXTS).long()[:, None] + torch.arange(CONTEXT)
    blocks = torch.empty(CONTEXTS, VOCAB, CONTEXT + 2, dtype=tokens.dtype)  # BOS, context, candidate
    blocks[..., 0], blocks[..., 1:-1], blocks[..., -1] = BOS, tokens[spans][:, None], torch.arange(VOCAB)
    start = MANY - MANY // 8
    tokens[start : start + blocks.numel()] = blocks.flatten()
    targets = start - 1 + (CONTEXT + 2) * torch.arange(1, CONTEXTS * VOCAB + 1) - 1
    nats = nats_of_targets(long, targets.tolist())
    totals = np.exp(-np.array(nats)).reshape(CONTEXTS, VOCAB).sum(1)
    worst = float(totals[abs(totals - 1).argmax()])
    if not abs(worst - 1) <= 1e-4:
        raise Illegal(f"n-grams after {MANY} tokens: the probabilities of all {VOCAB} tokens sum to {worst:.6g}; "
                      "counts of the target must not share a bucket with other n-grams, or be divided by their "
                      "sum")
    return abs(worst - 1)


def nats_of_targets(subject: Subject, targets: list[int]) -> list[float]:
    """Nats of single targets in the last chunk of the evaluation that learns, each scored by itself at its time."""
    script, original, found = subject.script, subject.script.score_windows, {}
    alone = replace(subject.run, cfg=replace(subject.run.cfg, val_batch_size=subject.run.cfg.eval_len))

    def recorder(run: Any, model: Any, text: Any, windows: np.ndarray, *rest: Any, **named: Any) -> Tensor:
        for start, first, end in windows.tolist():
            for target in targets[bisect.bisect_left(targets, first) : bisect.bisect_left(targets, end)]:
                single = original(alone, model, text, windows[:1] * 0 + [start, target, target + 1], *rest, **named)
                found[target] = float(single[-1])
        return original(run, model, text, windows, *rest, **named)

    script.score_windows = recorder
    try:
        subject.online(subject.validation)
    finally:
        script.score_windows = original
    return [found[target] for target in targets]


def check_documents_normalised(subject: Subject) -> float:
    """The same for the evaluation by documents, at the end of one that has learned."""
    tokens, total = subject.validation.tokens[: subject.run.cfg.eval_len].clone(), 0.0
    for candidate in range(VOCAB):
        tokens[-1] = candidate
        total += math.exp(-float(subject.document_table(tokens)[0, -1]))
    if not abs(total - 1) <= 1e-4:
        raise Illegal(f"evaluation by documents: the probabilities of all {VOCAB} tokens at the end of one sum to "
                      f"{total:.6g}; the score must come from one distribution fixed before the token is seen")
    return abs(total - 1)


def check_logits(subject: Subject) -> None:
    """The model's nll is -log of the softmax of its own logits."""
    import torch

    model = subject.model
    with torch.no_grad():
        inputs, targets, weights, order = scoring_batch(subject)
        nll = model.nll(inputs, targets, weights, order)
        log_p = torch.log_softmax(model.logits(model.hidden(inputs, weights, order), weights).double(), -1)
    difference = float((nll + log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).abs().max())
    if not difference <= 1e-4:
        raise Illegal(f"nll differs from -log softmax(logits) by {difference:.2g} nats: it is the score of another "
                      "distribution than the model's")


def digests(model: Any) -> dict[str, str]:
    """Digest of every parameter and buffer, those outside the state_dict included."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for name, tensor in tensors}


def check_score_first(subject: Subject) -> str:
    """C3: an evaluation leaves the model as it was and repeats bit by bit; one that learns does so after scoring."""
    for name, evaluation in subject.evaluations().items():
        before, scores = digests(subject.model), []
        for _ in range(2):
            scores.append([score.nats for score in evaluation(subject.validation)])
        after = digests(subject.model)
        changed = [tensor for tensor in after if after[tensor] != before.get(tensor)]
        if changed:
            raise Illegal(f"{name} evaluation changes {', '.join(changed[:4])}: with weights that move, each token "
                          "must be scored before any step that depends on it, and be the only score that counts")
        if scores[0] != scores[1]:
            raise Illegal(f"{name} evaluation remembers what it scored: a second one gives {scores[1]} nats, not "
                          f"{scores[0]}")
    names = learners(subject.run.cfg)
    flips = check_online_order(subject) if names else 0
    if by_documents(subject.run.cfg):
        names, flips = [*names, "TTT_LORA_ENABLED"], flips + check_documents_order(subject)
    if names:
        return (f"adaptive predictor (Track B, {', '.join(names)}): {flips} flips of all later tokens move no score "
                "given before; the model comes back as it was")
    return f"fixed predictor (Track A): evaluation changes no parameter or buffer ({', '.join(subject.plans)})"


def check_online_order(subject: Subject) -> int:
    """Change all tokens from some position on: what the learning evaluation scored before stays; the positions."""
    tokens, cfg = subject.validation.tokens, subject.run.cfg
    chunk, stride = cfg.ttt_chunk_tokens, cfg.eval_stride
    positions = chunk - 1, chunk + 2, 2 * chunk + stride + 2, len(tokens) - 2
    for position in positions:
        changed = tokens.clone()
        changed[position:] = other_token(tokens[position:])
        plain, other = (observe(subject, subject.online, replace(subject.validation, tokens=text), (0, position - 1))
                        for text in (tokens, changed))
        if plain.windows.tolist() != other.windows.tolist():
            raise Illegal("online evaluation: the windows depend on the text; plan them before it is seen")
        moved = float(abs(plain.nats - other.nats).max())
        if not moved <= TOLERANCE:
            raise Illegal(f"online evaluation: changing tokens {position}.. moves scores of the targets before them by "
                          f"{moved:.2g} nats; it learns from tokens that are not scored yet")
    fixed = subject.script.evaluate(subject.run, subject.model, subject.validation, stride).nats
    if subject.online(subject.validation)[-1].nats == fixed:
        raise NotImplementedError("online evaluation scores as the fixed model does: nothing was learned in the test")
    return len(positions)


def check_documents_order(subject: Subject) -> int:
    """The same for the evaluation by documents, target by target; the flips."""
    tokens, length = subject.validation.tokens, subject.run.cfg.eval_len
    plain, positions = subject.document_table(tokens), (5, length + 1, 2 * length + 9, len(tokens) - 2)
    for position in positions:
        changed = tokens.clone()
        changed[position:] = other_token(tokens[position:])
        moved = float((subject.document_table(changed) - plain)[0, : position - 1].abs().max())
        if not moved <= 10 * TOLERANCE:  # documents find themselves beside others, which changes the order of sums
            raise Illegal(f"evaluation by documents: changing tokens {position}.. moves scores of the targets before "
                          f"them by {moved:.2g} nats; it learns from tokens that are not scored yet")
    cfg = replace(subject.run.cfg, ttt_lora_alpha=0.0)
    still = subject.script.score_documents(replace(subject.run, cfg=cfg), subject.model, subject.validation)
    if float((still - plain)[0].abs().max()) <= 10 * TOLERANCE:
        raise NotImplementedError("evaluation by documents: nothing was learned in the test")
    return len(positions)


def plan_fault(plan: np.ndarray, targets: int, length: int) -> str:
    """What is wrong with a window plan; empty if it is a left-to-right cover of all targets, each once."""
    starts, firsts, ends = plan.T
    if firsts[0] != 0:
        return f"targets 0..{firsts[0] - 1} are not scored"
    for row in (firsts[1:] != ends[:-1]).nonzero()[0][:1]:
        kind = "scored twice" if firsts[row + 1] < ends[row] else "skipped"
        low, high = sorted((int(firsts[row + 1]), int(ends[row])))
        return f"targets {low}..{high - 1} are {kind}"
    if ends[-1] != targets:
        return f"the last scored target is {ends[-1] - 1}, of {targets}"
    if (starts < 0).any() or (starts > firsts).any() or (ends > starts + length).any() or (firsts >= ends).any():
        return "a window scores outside itself"
    return ""


def check_plan(script: ModuleType, targets: int, length: int, stride: int) -> None:
    """One plan of the script; a very long one is shortened by whole strides, which keeps its end."""
    if targets > 3_000_000 * stride:
        targets = length + (targets - length) % stride + 1000 * stride
    if fault := plan_fault(script.plan_windows(targets, length, stride), targets, length):
        raise Illegal(f"plan_windows({targets}, {length}, {stride}): {fault}; each target counts exactly once")


def awkward_spans() -> list[np.ndarray]:
    """Documents (first target, end) of odd lengths: one alone, many of one token, one longer than any window."""
    import numpy as np

    lengths = [[40], [1] * 40, [1, 100, 2, 33, 1], [9, 8, 7, 32, 31, 33]]
    ends = [np.cumsum(row) for row in lengths]
    return [np.stack([end - row, end], 1) for end, row in zip(ends, lengths, strict=True)]


def check_coverage(subject: Subject) -> str:
    """C4: the plan of awkward and real lengths, and the windows and sums of the evaluation itself."""
    import numpy as np

    awkward = [(n, length, stride) for length in (8, 32) for stride in {1, 3, length // 2, length - 1, length}
               for n in (length, length + 1, 2 * length - 1, 2 * length, 3 * length + stride + 1)]
    real = [(subject.targets, subject.full.eval_len, stride) for stride in strides(subject.full).values()]
    for case in [*awkward, *real]:
        check_plan(subject.script, *case)
    for spans in awkward_spans() if DOCUMENT_WINDOWS in subject.plans else ():
        for length, stride in ((8, 3), (8, 8), (32, 1)):
            if fault := plan_fault(subject.script.plan_document_windows(spans, length, stride), spans.max(), length):
                raise Illegal(f"plan_document_windows of {len(spans)} documents, {length}, {stride}: {fault}; each "
                              "target counts exactly once")
    validation = subject.validation
    want = len(validation.tokens) - 1, int(validation.token_bytes[1:].sum())
    windowed = {name: call for name, call in subject.evaluations().items() if name != "documents"}
    for name, evaluation in windowed.items():
        record = observe(subject, evaluation, validation)
        if fault := plan_fault(record.windows, want[0], subject.run.cfg.eval_len):
            raise Illegal(f"{name} evaluation: {fault}; each target counts exactly once")
        for score, nats in zip(record.scores, record.nats.sum(0).tolist(), strict=True):
            if (score.targets, score.bytes) != want or not math.isclose(score.nats, nats, rel_tol=1e-6):
                raise Illegal(f"{name} evaluation reports {score.targets} targets, {score.bytes} bytes, "
                              f"{score.nats:.4f} nats; its windows hold {want[0]}, {want[1]}, {nats:.4f}")
    if by_documents(subject.run.cfg):
        times = subject.document_table(validation.tokens)[1]
        if not (times == 1).all():
            raise Illegal(f"evaluation by documents: {int((times != 1).sum())} targets do not count exactly once")
    return (f"{len(awkward)} awkward plans and the run's own over {subject.targets:,} targets; evaluation scores what "
            "it planned")


def check_documents(subject: Subject) -> str:
    """Flip each token of a few documents: embeddings change from there to its document's end at most."""
    import torch

    length = subject.run.cfg.eval_len
    ids = subject.validation.tokens[: length + 8].long()[None, -length:].clone()
    ids[0, [5, 6, length // 2]] = BOS
    with torch.no_grad():
        plain = subject.model.embed(ids, None)[0]
        for position in (ids[0] != BOS).nonzero().flatten().tolist():
            changed = ids.clone()
            changed[0, position] = other_token(int(ids[0, position]))
            moved = (subject.model.embed(changed, None)[0] != plain).any(-1).nonzero().flatten().tolist()
            later = [i for i in range(position, length) if ids[0, i] == BOS]
            outside = [i for i in moved if not position <= i < min([*later, length])]
            if outside or position not in moved:
                raise Illegal(f"changing token {position} changes the previous-token features of tokens {outside}, "
                              f"of another document (BOS at {later[:1]}) or before it; stop them at BOS")
    return "smear, bigram and embeddings of a token depend on its own document only"


# ---------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------

def check_bytes(subject: Subject) -> str:
    """The bytes that the script counts are those of the text, for a tokenizer that keeps text as it is."""
    with whole_run.place_to_run(subject.script) as place:
        cfg = place.config(tiny_values(subject.script, subject.full), "bytes")
        if fault := whole_run.byte_fault(subject.script, place, cfg):
            raise Illegal(fault)
    return f"exact on {len(place.corpus.val)} documents of another tokenizer"


def check_whole_run(subject: Subject) -> str:
    """Train, export and evaluate in small; again with another validation text; score the artifact alone."""
    text = Path(subject.script.__file__).read_text(encoding="utf-8")
    if fault := branches.fault(syntax(unpacked(text) or text)):
        raise Illegal(fault)
    with whole_run.place_to_run(subject.script) as place:
        values, corpus = tiny_values(subject.script, subject.full), place.corpus
        try:
            first = whole_run.trained(place, place.config(values, "first"), True)
        except whole_run.Early as problem:
            raise Illegal(str(problem)) from None
        again = whole_run.scored_alone(place, values, Path("logs/first.pgolf").read_bytes())
        sizes = sum(len(text.encode()) for text in corpus.val), len(whole_run.encoded(corpus, corpus.val)) - 1
        place.set_validation(corpus.other_val)
        other = whole_run.trained(place, place.config(values, "other"), False)
    if fault := whole_run.artifact_fault(first, other) or whole_run.score_fault(first, again, *sizes):
        raise Illegal(fault)
    return f"the artifact is the same with another validation text, and gives the {len(first.scores)} logged scores"


CHECKS: dict[str, Callable[[Subject], str]] = {
    "C1 causal": check_causal,
    "C2 normalised": check_normalised,
    "C3 score before update": check_score_first,
    "C4 each target once": check_coverage,
    "document leak": check_documents,
    "bytes of the text": check_bytes,
    "whole run": check_whole_run,
}


def outcome(name: str, check: Callable[[Subject], str], subject: Subject) -> CheckResult:
    """Run one check. What the script asserts of itself counts as failed, what it no longer has as not checkable."""
    try:
        return CheckResult(name, "pass", check(subject))
    except Illegal as problem:
        return CheckResult(name, "fail", str(problem))
    except AssertionError as problem:
        return CheckResult(name, "fail", f"the script's own assertion fails: {problem}")
    except NotImplementedError as problem:
        return CheckResult(name, "skip", str(problem))
    except DRIFT as problem:
        return CheckResult(name, "skip", f"not checkable: its functions are not those known here ({problem!r})")


def skipped(reason: str) -> list[CheckResult]:
    """Every condition, not checkable for one reason."""
    return [CheckResult(name, "skip", reason) for name in CHECKS]


def examine(path: Path, values: Mapping[str, Any], targets: int) -> list[CheckResult]:
    """All conditions in this process: imports the script at `path`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny kernels: more threads only wait for each other
    try:
        subject = build_subject(path, values, targets)
    except (ImportError, SyntaxError, *DRIFT) as problem:  # UserError is a ValueError
        return skipped(f"not checkable: no tiny model of this configuration ({type(problem).__name__}: {problem})")
    else:
        return [outcome(name, check, subject) for name, check in CHECKS.items()]
    finally:
        torch.set_num_threads(threads)


def definitions(script: Path) -> set[str]:
    """Names of the functions and classes of a script, packed or not; ToolError says why it cannot be read."""
    try:
        text = script.read_text(encoding="utf-8")
        return {getattr(node, "name", "") for node in ast.parse(unpacked(text) or text).body}
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as problem:
        raise ToolError(f"{script.name} cannot be read ({problem})") from None


def logged(folder: Path) -> tuple[dict[str, Any], int]:
    """(hyperparameters, validation targets) from the first log of ours in the folder that has them."""
    values, targets = {}, 0
    for path in [*sorted(folder.glob("*.jsonl")), *sorted(folder.glob("*.log")), *sorted(folder.glob("*.txt"))]:
        with contextlib.suppress(ToolError):  # a damaged log is the business of another check
            run = read_run(path)
            values = values or run.values
            targets = targets or run.counts.get("val_tokens", 1) - 1
    return values, targets or OFFICIAL_TARGETS


def legality_checks(folder: Path, script: Path | None = None) -> list[CheckResult]:
    """The conditions for a submission folder, one result each; its script runs in a process of its own."""
    script = script or folder / "train_gpt.py"
    try:
        names = definitions(script)
    except ToolError as problem:
        return skipped(str(problem))
    if missing := sorted(set(API) - names):
        reason = f"{script.name} is not a script of this trainer (no {', '.join(missing[:4])}...): read it by hand"
        if not {"GPT", "Hyperparameters"} <= names:
            return skipped(f"{reason}; it has no classes GPT and Hyperparameters to try in small")
        found = {result.name: result for result in foreign.foreign_checks(script)}
        return [found.get(result.name, result) for result in skipped(reason)]
    values, targets = logged(folder)
    job = json.dumps({"path": str(script.resolve()), "values": values, "targets": targets})
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "",
           "OMP_NUM_THREADS": "1"}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run([sys.executable, "-m", "records.checking.legality"], input=job, cwd=scratch, env=env,
                                  text=True, capture_output=True, timeout=TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return skipped(f"not checkable: took more than {TIMEOUT_SECONDS} seconds on this machine")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return skipped(f"not checkable: {script.name} ends the process that imports it ({last[:200]})")
    return [CheckResult(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """The process behind legality_checks: a job on stdin, its results as the last line of stdout."""
    job = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        results = examine(Path(job["path"]), job["values"], job["targets"])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
