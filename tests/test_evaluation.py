"""Every target is scored once, with the context promised, causally, normalised, and its bytes once."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model

import train_gpt as t

ALL_FEATURES = {"VALUE_RESIDUAL": 1, "GATED_ATTN_ENABLED": 1, "MLP_ACTIVATION": "asqu", "TIE_EMBEDDINGS": 0}
ORDER = (0, 1, 2, 3)


def small_validation(count: int = 147, seed: int = 0) -> t.ValidationSet:
    """Random tokens, a few documents, and bytes that identify the token they belong to."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 512, (count,), generator=generator, dtype=torch.int32)
    tokens[[0, 20, 21, 90]] = 1
    return t.ValidationSet(tokens, torch.randint(0, 9, (count,), generator=generator, dtype=torch.int32), bos_id=1)


# The plan

PLANS = [(64, 64, 64), (64, 32, 32), (65, 32, 16), (100, 32, 7), (100, 32, 1), (33, 32, 32), (32, 32, 5),
         (4002, 32, 16), (1000, 64, 63), (127, 64, 64), (129, 64, 64), (95, 32, 31)]  # fmt: skip


@pytest.mark.parametrize(("targets", "length", "stride"), PLANS)
def test_every_target_is_scored_exactly_once(targets: int, length: int, stride: int) -> None:
    """No overlap, no gap, no dropped tail; every window lies in the text and scores inside itself."""
    times = np.zeros(targets, int)
    for start, first, end in t.plan_windows(targets, length, stride):
        times[first:end] += 1
        assert 0 <= start and start + length <= targets
        assert start <= first < end <= start + length
    assert (times == 1).all()


@pytest.mark.parametrize(("targets", "length", "stride"), PLANS)
def test_targets_have_full_context_where_the_text_allows(targets: int, length: int, stride: int) -> None:
    """After the first window every target sees at least length - stride + 1 tokens, at most length."""
    for start, first, end in t.plan_windows(targets, length, stride)[1:]:
        assert first + 1 - start >= length - stride + 1
        assert end - start == length and end - first <= stride


@pytest.mark.parametrize(("targets", "length"), [(96, 32), (100, 32), (33, 32)])
def test_stride_of_the_whole_window_is_plain_evaluation(targets: int, length: int) -> None:
    """Windows side by side; only the last one reaches back, to keep its shape, and scores its remainder alone."""
    plan = t.plan_windows(targets, length, length)
    whole = targets // length
    assert plan[:whole].tolist() == [[i * length, i * length, (i + 1) * length] for i in range(whole)]
    assert len(plan) == -(-targets // length)
    assert plan[-1].tolist() == [targets - length, plan[-1][1], targets]


# The plan by documents

LENGTHS = {  # documents' lengths in targets
    "mixed": [20, 1, 69, 57], "single targets": [1] * 70, "one long": [500], "long and short": [3, 200, 1, 1, 90, 40, 5],
    "as long as a window": [32] * 5, "one more": [33] * 5, "one less": [31] * 5, "long at the end": [4, 4, 300],
    "short at the end": [300, 4, 4], "no more than a window": [10, 20, 2],
}  # fmt: skip


def spans_of(lengths: list[int]) -> np.ndarray:
    """First target and end of each document, longest first, as `document_spans` gives them."""
    ends = np.cumsum(lengths)
    spans = np.stack([ends - lengths, ends], 1)
    return spans[np.argsort(spans[:, 0] - spans[:, 1], kind="stable")]


def fewest_windows(spans: np.ndarray, length: int, stride: int) -> int:
    """By trying every beginning and every end of every window, from the last target backwards."""
    targets, starts = int(spans[:, 1].max()), sorted(spans[:, 0])
    fewest = [0] * (targets + 1)
    for done in reversed(range(targets)):
        document = max(start for start in starts if start <= done)
        latest = max(document, done - (length - stride)) if done else 0
        begins = range(max(done + 1 - length, 0), min(latest, targets - length) + 1)
        fewest[done] = 1 + min(fewest[end] for begin in begins for end in range(done + 1, begin + length + 1))
    return fewest[0]


@pytest.mark.parametrize("stride", [1, 7, 16, 31, 32])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_windows_by_documents(lengths: list[int], stride: int) -> None:
    """Every target once, from left to right, with its document from the start or the context promised; none too many."""
    spans, length = spans_of(lengths), 32
    plan, end = t.plan_document_windows(spans, length, stride), 0
    begins = np.repeat(np.cumsum(lengths) - lengths, lengths)
    for start, first, stop in plan:
        assert 0 <= start <= first == end < stop == start + length <= sum(lengths)
        sees = np.arange(first, stop) - np.maximum(start, begins[first:stop]) + 1
        assert (sees >= np.minimum(np.arange(first, stop) - begins[first:stop], length - stride) + 1).all()
        end = stop
    assert end == sum(lengths)
    assert len(plan) == fewest_windows(spans, length, stride)
    assert len(plan) <= len(t.plan_windows(sum(lengths), length, stride))


def test_one_long_document_has_sliding_windows() -> None:
    """And documents of a single target need no more than plain ones."""
    for stride in (1, 5, 32):
        assert np.array_equal(t.plan_document_windows(spans_of([500]), 32, stride), t.plan_windows(500, 32, stride))
        assert np.array_equal(t.plan_document_windows(spans_of([1] * 70), 32, stride), t.plan_windows(70, 32, 32))


def test_fineweb_s_lengths_take_a_fifth_of_the_windows() -> None:
    """Lengths like those of web text at 8,192 pieces: median 400, mean 770, a sixth of the tokens beyond 2,048."""
    lengths = np.random.default_rng(0).lognormal(np.log(400), 1.15, 3000).astype(int) + 1
    spans, targets = spans_of(list(lengths)), int(lengths.sum())
    assert 700 < lengths.mean() < 850 and 0.12 < np.maximum(lengths - 2048, 0).sum() / targets < 0.25
    windows, sliding = t.plan_document_windows(spans, 2048, 64), t.plan_windows(targets, 2048, 64)
    assert 4 < len(sliding) / len(windows) < 6


# The score


def naive_nats(model: t.GPT, validation: t.ValidationSet, length: int, stride: int) -> list[float]:
    """Nats of each target, one forward pass per target over its context alone (nothing after it is even present)."""
    tokens, nats = validation.tokens.long(), []
    for target in range(validation.targets):
        late = max(0, -(-(target + 1 - length) // stride))  # windows that ended before this target's
        end = min(length + late * stride, validation.targets)
        context = tokens[end - length : target + 1][None]
        with torch.no_grad():
            weights = model.weights(False)
            logits = model.logits(model.hidden(context, weights, ORDER), weights)[0, -1].double()
        nats.append(-torch.log_softmax(logits, 0)[tokens[target + 1]].item())
    return nats


@pytest.mark.parametrize("stride", [32, 12, 5])
@pytest.mark.parametrize("changes", [{}, ALL_FEATURES])
def test_evaluate_equals_a_loop_over_tokens(run: t.Runtime, stride: int, changes: dict[str, Any]) -> None:
    model, validation = tiny_model(**changes), small_validation()
    score = t.evaluate(run, model, validation, stride)
    nats = naive_nats(model, validation, 32, stride)
    assert score.targets == len(nats) == 146
    assert score.bytes == int(validation.token_bytes.numpy()[1:].sum())
    assert score.nats == pytest.approx(sum(nats), rel=1e-5)
    assert score.loss == pytest.approx(np.mean(nats), rel=1e-5)
    assert score.bpb == pytest.approx(sum(nats) / math.log(2) / score.bytes, rel=1e-5)


@pytest.mark.parametrize("stride", [32, 7])
def test_the_batch_size_does_not_change_the_score(run: t.Runtime, stride: int) -> None:
    """Batches of one window, of several that leave a remainder to fill, and of more than there are."""
    model, validation = tiny_model(), small_validation()
    scores = [
        t.evaluate(replace(run, cfg=replace(run.cfg, val_batch_size=size)), model, validation, stride)
        for size in (1, 32, 96, 500, 50_000)
    ]
    assert {(score.targets, score.bytes) for score in scores} == {(146, scores[0].bytes)}
    assert [score.nats for score in scores] == pytest.approx([scores[0].nats] * len(scores), rel=1e-6)


def test_a_longer_evaluation_window_is_used(run: t.Runtime) -> None:
    """EVAL_SEQ_LEN beyond TRAIN_SEQ_LEN: as many tokens of context as it says."""
    cfg = replace(run.cfg, eval_seq_len=64)
    model, validation = tiny_model(EVAL_SEQ_LEN=64), small_validation()
    score = t.evaluate(replace(run, cfg=cfg), model, validation, 20)
    lengths: list[int] = []
    plain_nll = model.fast_nll
    model.fast_nll = lambda ids, *rest: lengths.append(ids.shape[1]) or plain_nll(ids, *rest)
    again = t.evaluate(replace(run, cfg=cfg), model, validation, 20)
    assert set(lengths) == {64} and again.nats == score.nats


@pytest.mark.parametrize("fault", [lambda w: w[:-1], lambda w: w[1:], lambda w: np.concatenate([w, w[-1:]]),
                                   lambda w: w - [[0, 1, 0]], lambda w: w - [[0, 0, 1]]])  # fmt: skip
def test_a_plan_that_misses_or_repeats_targets_is_refused(
    run: t.Runtime, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """The rule that scored the tail repeatedly for two weeks could not print a score here."""
    plan = t.plan_windows
    monkeypatch.setattr(t, "plan_windows", lambda *arguments: fault(plan(*arguments)))
    with pytest.raises(AssertionError, match="scored"):
        t.evaluate(run, tiny_model(), small_validation(147), 7)


@pytest.mark.parametrize("changes", [{}, ALL_FEATURES, {"ROPE_DIMS": 0, "XSA_LAST_N": 0, "KEY_OFFSET": 0}])
@pytest.mark.parametrize("changed", [1, 9, 30, 31])
def test_scores_are_causal(changes: dict[str, Any], changed: int) -> None:
    """Another token at a position changes its own score and later ones, not one that came before."""
    model, validation = tiny_model(**changes), small_validation()
    tokens = validation.tokens[50:83].long()[None]
    other = tokens.clone()
    other[0, changed] = (tokens[0, changed] + 100) % 500 + 4
    with torch.no_grad():
        weights = model.weights(False)
        before, after = (model.nll(x[:, :-1], x[:, 1:], weights, ORDER)[0] for x in (tokens, other))
    torch.testing.assert_close(before[: changed - 1], after[: changed - 1], rtol=0, atol=1e-6)
    assert (before[changed - 1 :] - after[changed - 1 :]).abs().min() > 1e-6


BY_DOCUMENT = {"DOC_ATTENTION": 1, "SMEAR_GATE_ENABLED": 1, "KEY_OFFSET": 1}


def target_nats(run: t.Runtime, model: t.GPT, validation: t.ValidationSet, stride: int) -> torch.Tensor:
    """Nats of each target in the windows by documents, one window and target at a time."""
    plan = t.plan_document_windows(t.document_spans(validation), run.cfg.eval_len, stride)
    alone = (np.array([[start, i, i + 1]]) for start, first, end in plan for i in range(first, end))
    return torch.stack([t.score_windows(run, model, validation, window)[0] for window in alone])


@pytest.mark.parametrize("changes", [BY_DOCUMENT, {**BY_DOCUMENT, **ALL_FEATURES}])
def test_documents_score_as_if_each_were_alone(run: t.Runtime, changes: dict[str, Any]) -> None:
    """With windows longer than all of them: one forward pass per document over nothing but the document."""
    model, validation = tiny_model(**changes, TRAIN_SEQ_LEN=72, TRAIN_BATCH_TOKENS=144), small_validation()
    run = replace(run, cfg=replace(run.cfg, eval_seq_len=72, val_batch_size=300))
    nats, weights = [], model.weights(False)
    for start, end in sorted(map(tuple, t.document_spans(validation))):
        ids = validation.tokens[start : end + 1].long()[None]
        with torch.no_grad():
            nats.append(model.nll(ids[:, :-1], ids[:, 1:], weights, ORDER)[0].double())
    score = t.evaluate(run, model, validation, 2, by_document=True)
    assert (score.targets, score.bytes) == (146, int(validation.token_bytes[1:].sum()))
    assert score.nats == pytest.approx(float(torch.cat(nats).sum()), rel=1e-5)
    torch.testing.assert_close(target_nats(run, model, validation, 2), torch.cat(nats), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 5, 32])
def test_documents_longer_than_a_window(run: t.Runtime, stride: int) -> None:
    """Against the latest tokens of its own document for each target; and the sum over any number of ranks."""
    model, validation = tiny_model(**BY_DOCUMENT), small_validation()
    nats, weights = [], model.weights(False)
    spans = t.document_spans(validation)
    for begin, first, end in t.plan_document_windows(spans, 32, stride):
        for target in range(first, end):
            start = max(begin, *(start for start, _ in spans if start <= target), 0)
            context = validation.tokens[start : target + 2].long()[None]
            with torch.no_grad():
                nats.append(float(model.nll(context[:, :-1], context[:, 1:], weights, ORDER)[0, -1]))
    score = t.evaluate(run, model, validation, stride, by_document=True)
    assert score.nats == pytest.approx(sum(nats), rel=1e-5)
    for world in (2, 3):
        parts = []
        for rank in range(world):
            ranks = type("Alone", (t.Ranks,), {"all_reduce_sum_": lambda self, tensor: tensor})(rank, world, run.ranks.device)
            windows = t.plan_document_windows(spans, 32, stride)
            parts.append(t.score_windows(replace(run, ranks=ranks), model, validation, windows))
        assert float(sum(parts)[0]) == pytest.approx(sum(nats), rel=1e-5) and int(sum(parts)[1]) == 146


@pytest.mark.parametrize("changed", [22, 60, 91, 130])
def test_scores_by_documents_are_causal(run: t.Runtime, changed: int) -> None:
    """Later tokens, new documents among them, neither change an earlier score nor move an earlier window."""
    model, validation = tiny_model(**BY_DOCUMENT), small_validation()
    tokens = validation.tokens.clone()
    tokens[changed:] = 4 + (tokens[changed:] + 11) % 100
    tokens[[changed + 4, changed + 9]] = 1
    before, after = (target_nats(run, model, v, 7) for v in (validation, replace(validation, tokens=tokens)))
    torch.testing.assert_close(before[: changed - 1], after[: changed - 1], rtol=0, atol=1e-5)
    assert (before[changed - 1 :] - after[changed - 1 :]).abs().min() > 1e-6


@pytest.mark.parametrize("fault", [lambda w: w[:-1], lambda w: w[1:], lambda w: np.concatenate([w, w[-1:]])])
def test_a_plan_by_documents_that_misses_or_repeats_is_refused(
    run: t.Runtime, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    plan = t.plan_document_windows
    monkeypatch.setattr(t, "plan_document_windows", lambda *arguments: fault(plan(*arguments)))
    with pytest.raises(AssertionError, match="scored"):
        t.evaluate(run, tiny_model(**BY_DOCUMENT), small_validation(), 7, by_document=True)


def test_later_windows_do_not_change_earlier_sums(run: t.Runtime) -> None:
    """The sums over the windows before a changed token, padding of the batch included, stay what they were."""
    model, validation = tiny_model(), small_validation()
    windows = t.plan_windows(validation.targets, 32, 12)
    tokens = validation.tokens.clone()
    tokens[100:] = 5
    other = replace(validation, tokens=tokens)
    early = windows[windows[:, 2] < 100]
    for count in range(1, len(early) + 1):
        sums = [t.score_windows(run, model, v, early[:count]) for v in (validation, other)]
        assert torch.equal(*sums)
    assert not torch.equal(*(t.score_windows(run, model, v, windows) for v in (validation, other)))


@pytest.mark.parametrize("changes", [{}, ALL_FEATURES])
def test_probabilities_sum_to_one(changes: dict[str, Any]) -> None:
    """Over all 512 candidates for the next token, at every position, through the function that scores."""
    model = tiny_model(**changes)
    context = small_validation().tokens[:9].long()[None].expand(512, -1)
    candidates = torch.arange(512)[:, None].expand(-1, 9)
    with torch.no_grad():
        nll = model.nll(context, candidates, model.weights(False), ORDER)
    torch.testing.assert_close((-nll.double()).exp().sum(0), torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-5)


def test_bytes_of_the_corpus_are_those_of_its_text(run: t.Runtime) -> None:
    """Bytes that the score divides by equal the UTF-8 length of the decoded validation text."""
    validation = t.load_validation(run)
    pieces = t.ByteTable(run.cfg.tokenizer_file, 512).pieces
    ids = validation.tokens.tolist()
    starts = [i for i, token in enumerate(ids) if token == validation.bos_id] + [len(ids)]
    text = "".join(pieces.decode(ids[a + 1 : b]) for a, b in zip(starts, starts[1:], strict=False))
    score = t.evaluate(run, tiny_model(), validation, 32)
    assert score.bytes == len(text.encode())
    assert score.targets == len(ids) - 1
