"""DOC_ATTENTION: attention that does not cross documents (descendants of PR #634)."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_env, tiny_model

import train_gpt as t

BOS = 1
CPU = torch.device("cpu")


def packed(seed: int = 0) -> torch.Tensor:
    """Two rows of 32 tokens; documents begin at 0, 9 and 21 and at 0 and 16."""
    ids = torch.randint(4, 512, (2, 32), generator=torch.Generator().manual_seed(seed))
    ids[0, [0, 9, 21]] = BOS
    ids[1, [0, 16]] = BOS
    return ids


def logits(model: t.GPT, ids: torch.Tensor) -> torch.Tensor:
    weights = model.weights(False)
    with torch.no_grad():
        return model.logits(model.hidden(ids, weights, model.order), weights)


def document_model(**changes: Any) -> t.GPT:
    """A randomized tiny model with document attention."""
    return tiny_model(DOC_ATTENTION=1, **changes)


@pytest.mark.parametrize(("row", "begin", "end"), [(0, 0, 9), (0, 9, 21), (0, 21, 32), (1, 0, 16), (1, 16, 32)])
def test_documents_do_not_see_each_other(row: int, begin: int, end: int) -> None:
    """Other tokens everywhere else change no bit of a document's logits; without DOC_ATTENTION they do."""
    ids, model = packed(), document_model()
    other = packed(seed=1)
    other[row, begin:end] = ids[row, begin:end]
    assert torch.equal(*(logits(model, x)[row, begin:end] for x in (ids, other)))
    dense = tiny_model(DOC_ATTENTION=0)
    same = torch.equal(*(logits(dense, x)[row, begin:end] for x in (ids, other)))
    assert same == (begin == 0), "the first document of a row has nothing before it"


def test_a_document_scores_in_a_row_as_it_does_alone() -> None:
    """Rotary embedding is relative, so only rounding differs."""
    ids, model = packed(), document_model()
    torch.testing.assert_close(logits(model, ids)[:1, 9:21], logits(model, ids[:1, 9:21]), rtol=0, atol=1e-4)


def attention_of_parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """What a FlashAttention package computes for sequences end to end: q (N, H, D), k and v (N, KV, D)."""
    parts = []
    for begin, end in pairwise(ends.tolist()):
        heads_first = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        parts.append(torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True))
    return torch.cat(parts, 1).transpose(0, 1)


def flash_2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, ends_k: torch.Tensor, longest: int,
    longest_k: int, causal: bool,
) -> torch.Tensor:  # fmt: skip
    """In place of `flash_attn_varlen_func`."""
    assert ends is ends_k and longest == longest_k >= ends.diff().max() and causal and ends.dtype == torch.int32
    return attention_of_parts(q, k, v, ends)


def flash_4_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, return_lse: bool, out: torch.Tensor,
    lse: torch.Tensor, cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> None:  # fmt: skip
    """In place of FlashAttention 4's: values to `out`, and to `lse` here their sums, which the backward pass checks."""
    assert causal and return_lse and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    if cu_seqlens_q is None:
        out.copy_(t.PLAIN_ATTENTION(q, k, v))
    else:
        out.copy_(attention_of_parts(q, k, v, cu_seqlens_q))
    lse.copy_(out.sum(-1).transpose(-1, -2))


def flash_4_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, dy: torch.Tensor, lse: torch.Tensor,
    causal: bool, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cu_seqlens_q: torch.Tensor | None = None,
    **rest: Any,
) -> None:  # fmt: skip
    """In a thread of its own, since inside an operator nothing is differentiated."""
    assert causal and torch.equal(lse, y.sum(-1).transpose(-1, -2))

    def differentiate() -> tuple[torch.Tensor, ...]:
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        if cu_seqlens_q is None:
            again = t.PLAIN_ATTENTION(*inputs)
        else:
            again = attention_of_parts(*inputs, cu_seqlens_q)
        assert torch.equal(again, y)
        return torch.autograd.grad(again, inputs, dy)

    with ThreadPoolExecutor() as other:
        for gradient, found in zip((dq, dk, dv), other.submit(differentiate).result(), strict=True):
            gradient.copy_(found)


def bundled_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, ends_k: torch.Tensor, longest: int,
    longest_k: int, *, window_size: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """In place of `varlen_attn`, which in torch 2.11 takes equal numbers of heads only."""
    assert q.shape == k.shape == v.shape and window_size == (-1, 0)
    return flash_2(q, k, v, ends, ends_k, longest, longest_k, causal=True)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4", "flash"])
def test_packages_get_documents_end_to_end(name: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of the plain definition, within documents and of rows as a whole."""
    monkeypatch.setattr(t, "ATTN_CHUNK_TOKENS", 256 // parts)
    for module in ("flash_attn", "flash_attn_interface"):
        functions = {"flash_attn_func": lambda q, k, v, causal: t.PLAIN_ATTENTION(q, k, v)}
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions, flash_attn_varlen_func=flash_2))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=bundled_flash))
    kernels = SimpleNamespace(_flash_attn_fwd=flash_4_forward, _flash_attn_bwd=flash_4_backward)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", kernels)
    monkeypatch.setattr(t, "OPERATORS", "pgolf_test")
    t.flash_attention_4.cache_clear()
    cfg = tiny_config(DOC_ATTENTION=1)
    assert t.probe_attention(t.ATTENTION[name](), cfg, CPU)[0] < 1e-5
    assert t.probe_attention(t.ATTENTION[name](), t.replace(cfg, doc_attention=False), CPU)[0] < 1e-5
    t.flash_attention_4.cache_clear()


def test_sequences_begin_with_rows_and_documents() -> None:
    """As many entries as any batch of this size can need; what is left over are empty sequences at the end."""
    packed_ends = partial(t.sequence_ends, parts=1)
    assert packed_ends(t.doc_ids(packed(), BOS)).tolist() == [[0, 9, 21, 32, 48] + [64] * 62]
    every = torch.full((2, 32), BOS)
    assert packed_ends(t.doc_ids(every, BOS)).tolist() == [[*range(65), 64, 64]]

    whole = torch.compile(lambda ids: packed_ends(t.doc_ids(ids, BOS)), backend="eager", fullgraph=True)
    assert torch.equal(whole(packed()), packed_ends(t.doc_ids(packed(), BOS)))


def test_documents_beyond_the_most_are_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """They see the document before them, as without DOC_ATTENTION, but never another row; nothing else changes."""
    monkeypatch.setattr(t, "max_docs_per_chunk", lambda tokens: 4)
    numbers = t.doc_ids(packed(), BOS)
    assert numbers[0].tolist() == [1] * 9 + [2] * 12 + [3] * 11 and numbers[1].tolist() == [1] * 32
    assert t.sequence_ends(numbers, 1).tolist() == [[0, 9, 21, 32, 64, 64, 64]]
    ids, model = packed(), document_model()
    merged = ids.clone()
    merged[1, 16] = 5
    assert torch.equal(t.doc_ids(merged, BOS), numbers)
    got = logits(model, ids)
    model.attend = t.flatten_chunks(t.PLAIN_ATTENTION, lambda q, k, v, ends, *_: attention_of_parts(q, k, v, ends))
    torch.testing.assert_close(logits(model, ids), got, rtol=0, atol=1e-5)


def test_parts_are_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts its own documents; where it is attended to by itself its sequences begin at 0."""
    shapes = [(48, 2048), (96, 1024), (64, 2048), (24, 2048), (47, 2048), (1, 2048), (96, 2048)]
    assert [t.num_chunks(*shape) for shape in shapes] == [2, 2, 2, 1, 1, 1, 4]
    monkeypatch.setattr(t, "ATTN_CHUNK_TOKENS", 32)
    monkeypatch.setattr(t, "max_docs_per_chunk", lambda tokens: 2)
    numbers = t.doc_ids(packed(), BOS)
    assert numbers[0].tolist() == [1] * 9 + [2] * 23 and numbers[1].tolist() == [1] * 16 + [2] * 16
    assert t.sequence_ends(numbers, 2).tolist() == [[0, 9, 32, 32], [0, 16, 32, 32]]
    assert t.sequence_ends(numbers, 1).tolist() == [[0, 9, 32, 48, 64, 64, 64]]


def test_scoring_tells_more_documents_apart_than_training() -> None:
    """Windows that overlap repeat a place with short documents; a score must not depend on what is scored beside it."""
    ids = torch.full((4, 2048), 5)
    ids[:, ::100] = BOS
    assert t.doc_ids(ids, BOS)[:, -1].tolist() == [21, 21, 21, 1], "64 of a small batch, and rows begin anew"
    with torch.no_grad():
        assert t.doc_ids(ids, BOS)[:, -1].tolist() == [21] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["fa4", "flash"])
def test_values_and_gradients_on_the_gpu(name: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "fa4":
        pytest.importorskip("flash_attn.cute.interface")
    monkeypatch.setattr(t, "ATTN_CHUNK_TOKENS", 256 // parts)
    attention = t.ATTENTION[name]()
    assert not t.fault(*t.probe_attention(attention, tiny_config(MODEL_DIM=256), torch.device("cuda")))


def test_the_probe_finds_a_mask_that_leaks() -> None:
    """A back end that ignores the documents is wrong by far more than rounding."""
    plain, cfg = t.PLAIN_ATTENTION, tiny_config(DOC_ATTENTION=1)
    leaky = plain._replace(mask=lambda documents: plain.mask(torch.zeros_like(documents)))
    right, wrong = (t.probe_attention(attention, cfg, CPU) for attention in (plain, leaky))
    assert right[0] < 1e-5 < 0.1 < wrong[0] and t.fault(*wrong) and not t.fault(*right)


def test_the_mask_is_made_once_per_pass() -> None:
    model, made = document_model(), []
    plain = model.attend
    model.attend = plain._replace(mask=lambda documents: made.append(documents) or plain.mask(documents))
    logits(model, packed())
    assert len(made) == 1 and model.cfg.num_layers == 4


def test_a_run_trains_and_scores_with_it(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The back end is named in the log; the artifact carries the setting to EVAL_ONLY, with the same score."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    logs = {}
    for name, settings in {"run": {"DOC_ATTENTION": 1}, "dense": {"DOC_ATTENTION": 0}, "again": {"EVAL_ONLY": 1}}.items():
        artifact = {"ARTIFACT_PATH": "logs/run.pgolf"} if settings.get("EVAL_ONLY") else {}
        monkeypatch.setattr(t.os, "environ", tiny_env(**corpus, **settings, **artifact, RUN_ID=name))
        t.main()
        logs[name] = (tmp_path / f"logs/{name}{'.eval' if artifact else ''}.txt").read_text().splitlines()
    assert any(line.startswith("attn_backend:math ") for line in logs["run"])
    name = "final_int6_sliding_window_exact"
    final = {key: [line for line in log if line.startswith(name)] for key, log in logs.items()}
    assert final["run"] == final["again"] != final["dense"]
    by_document = re.compile(r"final_int6_document_windows_exact val_loss:\d\.\d{8} val_bpb:\d\.\d{8} stride:16$")
    final = {key: [line for line in log if by_document.match(line)] for key, log in logs.items()}
    assert final["run"] == final["again"] and len(final["run"]) == 1 and final["dense"] == []


def test_a_back_end_without_documents_is_refused() -> None:
    with pytest.raises(t.UserError, match="ATTN_BACKEND=cudnn: not with DOC_ATTENTION=1; .* or set DOC_ATTENTION=0"):
        tiny_config(ATTN_BACKEND="cudnn", DOC_ATTENTION=1)
    assert tiny_config(ATTN_BACKEND="cudnn", DOC_ATTENTION=0).attn_backend == "cudnn"


def test_a_back_end_that_is_not_installed_is_refused(run: t.Runtime) -> None:
    """Asked for by name it is an error, not a silent fallback."""
    here = t.replace(run, cfg=t.replace(run.cfg, doc_attention=True))
    with pytest.raises(t.UserError, match="ATTN_BACKEND=fa3: not usable here .*flash_attn_interface"):
        t.choose_back_end(here, t.attention_back_ends(here.cfg), "fa3")


@pytest.mark.parametrize(("is_hopper", "fault", "warns"), [
    (True, ImportError("not installed"), True), (False, ImportError("not installed"), False),
    (False, RuntimeError("no kernel image"), True),
])  # fmt: skip
def test_a_slower_back_end_is_a_warning_with_its_price(
    run: t.Runtime, monkeypatch: pytest.MonkeyPatch, is_hopper: bool, fault: Exception, warns: bool
) -> None:
    """Unless all that is faster are packages that the GPU has no use for; one asked for by name is the user's choice."""

    def refused() -> t.Attention:
        raise fault

    monkeypatch.setattr(t, "is_hopper", lambda _: is_hopper)
    ends = t.attention_back_ends(t.replace(run.cfg, doc_attention=True))
    factories = {"fa3": refused, "fa4": refused, "flash": t.ATTENTION["math"]}
    ends = ends._replace(factories=factories, without_cuda=tuple(factories))
    t.choose_back_end(run, ends, "auto")
    text = f"ATTN_BACKEND: by flash a step takes 18% longer (fa3: {type(fault).__name__} {fault}; fa4: "
    assert [line.startswith(text) for line in run.costs] == [True] * warns
    t.choose_back_end(run, ends, "flash")
    t.choose_back_end(run, ends._replace(factories=factories | {"fa4": t.ATTENTION["math"]}), "auto")
    assert len(run.costs) == warns
