"""Score-first test-time training document by document: additions of low rank that start at nothing."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_env, tiny_model

import train_gpt as t

LORA = {"TTT_LORA_ENABLED": 1, "TTT_LORA_RANK": 4, "TTT_LORA_ALPHA": 8, "TTT_LORA_LR": 0.02, "TTT_CHUNK_SIZE": 7,
        "TTT_BATCH_SIZE": 3}  # fmt: skip
Scored = tuple[t.Runtime, t.GPT, t.ValidationSet]


@pytest.fixture
def subject(run: t.Runtime) -> Callable[..., Scored]:
    """What the evaluation takes: a randomized tiny model and the beginning of the small corpus."""

    def make(**settings: Any) -> Scored:
        cfg = tiny_config(**{**LORA, **settings})
        data = {"data_path": run.cfg.data_path, "tokenizer_path": run.cfg.tokenizer_path}
        here = t.replace(run, cfg=t.replace(cfg, **data))
        whole = t.load_validation(here)
        tokens = whole.tokens[:400].clone()
        tokens[[0, 5, 9, 10, 120, 121, 250, 399]] = whole.bos_id  # documents of one token, and one that never ends
        return here, tiny_model(**{**LORA, **settings}), t.ValidationSet(tokens, whole.token_bytes[:400], whole.bos_id)

    return make


def nats(subject: Scored) -> torch.Tensor:
    """Nats of every target, each scored once."""
    table = t.score_documents(*subject)
    assert torch.equal(table[1], torch.ones_like(table[1]))
    return table[0]


def plain_nats(subject: Scored) -> torch.Tensor:
    """The definition without learning: every target from the window of its own document that ends with its chunk."""
    (run, model, validation), result = subject, torch.zeros(399, dtype=torch.float64)
    weights, size = model.weights(False), run.cfg.ttt_chunk_size
    for start, end in t.document_spans(validation):
        for first in range(start, end, size):
            stop = min(first + size, end)
            begin = max(start, stop - run.cfg.eval_len)
            pair = (validation.tokens[a : stop + a - begin].long()[None] for a in (begin, begin + 1))
            result[first:stop] = model.nll(*pair, weights, model.order)[0, first - begin :].detach().double()
    return result


def test_documents_cover_all_targets(subject: Callable[..., Scored]) -> None:
    """Each target in one document, longest first, the BOS of the next as the last target."""
    _, _, validation = subject()
    spans = t.document_spans(validation)
    assert sorted(map(tuple, spans.tolist())) == [(0, 5), (5, 9), (9, 10), (10, 120), (120, 121), (121, 250), (250, 399)]
    assert (np.diff(spans[:, 1] - spans[:, 0]) <= 0).all()
    assert t.document_spans(t.ValidationSet(validation.tokens[1:20], validation.token_bytes[1:20], 1))[0].tolist() == [9, 18]


def test_without_a_rate_it_scores_each_document_alone(subject: Callable[..., Scored]) -> None:
    """Against one window at a time without additions; the kernels or plain parts of the model make no difference."""
    still = subject(TTT_LORA_LR=0, TTT_WEIGHT_DECAY=0)
    torch.testing.assert_close(nats(still), plain_nats(still), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nats(subject(TTT_LORA_ALPHA=0)), plain_nats(still), rtol=1e-5, atol=1e-5)


def test_it_learns_and_leaves_the_model_as_it_was(subject: Callable[..., Scored]) -> None:
    """Every parameter bitwise and still trainable; the first chunk of a document has learned nothing."""
    run, model, validation = tried = subject()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learned, plain = nats(tried), plain_nats(tried)
    assert learned.sum() < plain.sum() - 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for start, end in t.document_spans(validation):
        chunk = slice(start, min(start + run.cfg.ttt_chunk_size, end))
        torch.testing.assert_close(learned[chunk], plain[chunk], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [13, 17, 18, 130, 255, 398])
def test_later_tokens_move_no_earlier_score(subject: Callable[..., Scored], position: int) -> None:
    """Change all tokens from a position on: what stands before it scores the same, to rounding."""
    run, model, validation = subject()
    changed = validation.tokens.clone()
    changed[position:] = 4 + (changed[position:] + 11) % 100
    other = t.ValidationSet(changed, validation.token_bytes, validation.bos_id)
    before, after = nats((run, model, validation)), nats((run, model, other))
    torch.testing.assert_close(before[: position - 1], after[: position - 1], rtol=1e-5, atol=1e-4)
    assert not torch.equal(before[position - 1 :], after[position - 1 :])


def test_probabilities_sum_to_one(subject: Callable[..., Scored]) -> None:
    """Every token of the vocabulary as the last target of a document that has learned from its first chunks."""
    run, _, validation = subject(TTT_BATCH_SIZE=1)
    model = tiny_model(**LORA, VOCAB_SIZE=32)
    tokens, total = validation.tokens[10:40].clone() % 28 + 4, 0.0
    for candidate in range(32):
        tokens[-1] = candidate
        total += math.exp(-t.score_documents(run, model, t.ValidationSet(tokens, validation.token_bytes[:30], 1))[0, -1])
    assert total == pytest.approx(1, abs=1e-4)


def test_neighbours_do_not_matter(subject: Callable[..., Scored]) -> None:
    """One document at a time, or all at once: the same scores to rounding, for any number of ranks."""
    together = nats(subject(TTT_BATCH_SIZE=16))
    torch.testing.assert_close(nats(subject(TTT_BATCH_SIZE=1)), together, rtol=1e-4, atol=1e-4)
    run, model, validation = subject(TTT_BATCH_SIZE=16)
    model.micro_batch = t.MICRO_BATCH_TOKENS // 4  # of a GPU that holds a quarter
    assert t.DocumentLoRA(run, model).documents == 4
    torch.testing.assert_close(nats((run, model, validation)), together, rtol=1e-4, atol=1e-4)
    run, *rest = subject()
    parts = []
    for rank in range(3):
        ranks = type("Alone", (t.Ranks,), {"all_reduce_sum_": lambda self, tensor: tensor})(rank, 3, run.ranks.device)
        parts.append(t.score_documents(t.replace(run, ranks=ranks), *rest))
    torch.testing.assert_close(sum(parts)[0], together, rtol=1e-4, atol=1e-4)
    assert (sum(parts)[1] == 1).all() and all(part[1].any() for part in parts)


@pytest.mark.parametrize("change", [
    {"TTT_LORA_RANK": 2}, {"TTT_LORA_ALPHA": 4}, {"TTT_LORA_LR": 0.01}, {"TTT_BETA2": 0.9}, {"TTT_WEIGHT_DECAY": 0},
    {"TTT_CHUNK_SIZE": 5}, {"SEED": 3},
])  # fmt: skip
def test_settings_act(subject: Callable[..., Scored], change: dict[str, Any]) -> None:
    """Each changes the score by more than rounding."""
    assert abs(float(nats(subject(**change)).sum() - nats(subject()).sum())) > 1e-3


@pytest.mark.parametrize("part", ["qkv", "out", "up", "down", "head"])
def test_every_matrix_learns(subject: Callable[..., Scored], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one matrix's additions the score is another."""
    both, init = nats(subject()), t.DocumentLoRA.__init__

    def without(additions: t.DocumentLoRA, *arguments: Any) -> None:
        init(additions, *arguments)
        additions.first[part].zero_()

    monkeypatch.setattr(t.DocumentLoRA, "__init__", without)
    assert abs(float(nats(subject()).sum() - both.sum())) > 1e-3


def test_looped_layers_and_documents_work_with_it(subject: Callable[..., Scored]) -> None:
    """Passes of a layer share its additions; with LORA_RANK every pass has its own matrices already."""
    for settings in ({"NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 2, "ENABLE_LOOPING_AT": 0},
                     {"NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 2, "ENABLE_LOOPING_AT": 0, "LORA_RANK": 2},
                     {"DOC_ATTENTION": 1}, {"VALUE_RESIDUAL": 1, "GATED_ATTN_ENABLED": 1, "TIE_EMBEDDINGS": 0}):  # fmt: skip
        tried = subject(**settings)
        assert nats(tried).sum() < plain_nats(tried).sum()


def test_a_run_reports_it_under_its_own_name(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the other scores, with its seconds in the ledger."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    env = tiny_env(**{**corpus, **LORA, "TTT_BATCH_SIZE": 8, "TTT_CHUNK_SIZE": 16, "ITERATIONS": 4})
    monkeypatch.setattr(t.os, "environ", env)
    t.main()
    log = (tmp_path / "logs/tiny.txt").read_text()
    assert re.search(r"(?m)^legal_ttt_lora_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} rank:4 chunk:16 lr:0.02", log)
    assert log.index("sliding_window_exact") < log.index("legal_ttt_lora val_loss")
    assert re.search(r"(?m)^budget eval: .*ttt_lora:\d", log)


def test_a_chunk_longer_than_the_window_is_refused() -> None:
    with pytest.raises(t.UserError, match="TTT_CHUNK_SIZE=33"):
        tiny_config(**{**LORA, "TTT_CHUNK_SIZE": 33})
