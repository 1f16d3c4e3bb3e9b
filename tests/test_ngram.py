"""N-gram mixer: a distribution at every position, from what was scored before, with exact contexts of one document."""

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_env, tiny_model

import train_gpt as t

ENVIRONMENT = dict(os.environ)
BOS, LETTERS = 1, 6  # few letters, so that long contexts come again
NGRAM = {"NGRAM_ENABLED": 1, "NGRAM_ENTROPY": 1.0, "TTT_CHUNK_TOKENS": 256, "EVAL_STRIDE": 16}


def text(length: int = 600, seed: int = 0) -> torch.Tensor:
    """Documents of random letters, (length,) int32."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 2 + LETTERS, length)
    tokens[rng.random(length) < 0.03] = BOS
    tokens[0] = BOS
    return torch.from_numpy(tokens.astype(np.int32))


def mixer(tokens: torch.Tensor, learned: int, **settings: Any) -> t.NgramMixer:
    """A mixer that has learned the first `learned` targets of a text, in two goes."""
    cfg = tiny_config(**{**NGRAM, **settings})
    run = t.Runtime(cfg, t.Ranks(0, 1, torch.device("cpu")), t.Log(cfg, enabled=False), [])
    made = t.NgramMixer(run, t.ValidationSet(tokens, torch.ones_like(tokens), BOS))
    for first, end in ((0, learned // 3), (learned // 3, learned)):
        made.learn(np.array([[0, first, end]]))
    return made


def by_hand(tokens: list[int], learned: int, position: int, orders: range) -> dict[int, float] | None:
    """The n-gram distribution at a position by plain counting: the longest context of its document that was counted."""
    start = max(i for i in range(position) if tokens[i] == BOS)
    for n in reversed(orders):
        context = tokens[position - n + 1 : position]
        if position - n + 1 < start:
            continue
        after = Counter()
        for target in range(1, learned + 1):
            begin = target - n + 1
            if begin >= 0 and BOS not in tokens[begin + 1 : target] and tokens[begin:target] == context:
                after[tokens[target]] += 1
        if after:
            return {token: count / after.total() for token, count in after.items()}
    return None


@pytest.mark.parametrize("orders", [(2, 7), (3, 4), (2, 2)])
def test_it_predicts_what_plain_counting_predicts(orders: tuple[int, int]) -> None:
    """At every position of the rest of the text, with the model's share known."""
    tokens, learned = text(), 400
    made = mixer(tokens, learned, NGRAM_MIN_ORDER=orders[0], NGRAM_MAX_ORDER=orders[1])
    positions = torch.arange(learned + 1, len(tokens))
    nll, entropy = torch.full((len(positions),), 2.0), torch.rand(len(positions)) * 3
    mixed = made.mix(positions, nll, entropy)
    found = 0
    for i, position in enumerate(positions.tolist()):
        counted = by_hand(tokens.tolist(), learned, position, range(orders[0], orders[1] + 1))
        alpha = 0.05 + 0.55 / (1 + math.exp(-2 * (entropy[i].item() - 1.0)))
        share = counted.get(int(tokens[position]), 0.0) if counted else 0.0
        want = (1 - alpha) * math.exp(-2) + alpha * share if counted else math.exp(-2)
        assert mixed[i].item() == pytest.approx(-math.log(want), abs=1e-6)
        found += counted is not None
    assert found > 100


@pytest.mark.parametrize("position", [401, 430, 499])
def test_the_mixture_sums_to_one(position: int) -> None:
    """Over the whole vocabulary, each token put in place of the target in turn: so it cannot see the target either."""
    tokens, vocab = text()[: position + 1], 512
    probabilities = torch.randn(vocab, generator=torch.Generator().manual_seed(position)).softmax(0)
    entropy = -(probabilities * probabilities.log()).sum()
    total, moved = 0.0, 0
    for token in range(vocab):
        tokens[position] = token
        nll = -probabilities[token].log().view(1)
        mixed = mixer(tokens, position - 1).mix(torch.tensor([position]), nll, entropy.view(1))
        total += math.exp(-mixed.item())
        moved += abs(mixed.item() - nll.item()) > 1e-3
    assert total == pytest.approx(1, abs=1e-6) and moved == vocab


def test_documents_share_counts_but_no_context() -> None:
    """A document's first token has BOS as its context, whatever stood before it."""
    tokens = text()
    bos = int((tokens == BOS).nonzero()[-2])
    other = tokens.clone()
    other[bos - 4 : bos] = torch.tensor([2, 3, 2, 3])
    positions = torch.arange(bos + 1, bos + 6)
    args = positions, torch.full((5,), 2.0), torch.ones(5)
    assert torch.equal(*(mixer(x, bos - 5).mix(*args) for x in (tokens, other)))


@pytest.fixture
def parts(run: t.Runtime) -> Any:
    """Runtime, model and validation set of a randomized tiny model, with settings by keyword."""

    def make(**settings: Any) -> tuple[t.Runtime, t.GPT, t.ValidationSet]:
        cfg = tiny_config(**{**NGRAM, **settings})
        data = {"data_path": run.cfg.data_path, "tokenizer_path": run.cfg.tokenizer_path}
        here = t.replace(run, cfg=t.replace(cfg, **data))
        return here, tiny_model(**{**NGRAM, **settings}), t.load_validation(here)

    return make


def online(here: t.Runtime, model: t.GPT, validation: t.ValidationSet) -> list[t.Score]:
    return t.evaluate_online(here, model, validation, None, t.NgramMixer(here, validation))


def test_without_weight_it_is_the_sliding_evaluation(parts: Any) -> None:
    """Both scores of the pass equal it; with weight the second one differs and the first does not."""
    silent = parts(NGRAM_ALPHA_LOW=0, NGRAM_ALPHA_HIGH=0)
    plain = t.evaluate(*silent, silent[0].cfg.eval_stride)
    for score in online(*silent):
        assert score.nats == pytest.approx(plain.nats, rel=1e-6) and score[1:3] == plain[1:3]
    model_only, mixed = online(*parts())
    assert model_only.nats == pytest.approx(plain.nats, rel=1e-6)
    assert mixed.bpb < plain.bpb - 0.01, "real text helps a model that knows nothing"


def test_settings_act(parts: Any) -> None:
    """Each changes the score."""
    changes = [{}, {"NGRAM_MIN_ORDER": 3}, {"NGRAM_MAX_ORDER": 3}, {"NGRAM_ALPHA_LOW": 0.2}, {"NGRAM_ALPHA_HIGH": 0.9},
               {"NGRAM_ENTROPY": 5.0}, {"TTT_CHUNK_TOKENS": 512}]  # fmt: skip
    assert len({online(*parts(**change))[1].nats for change in changes}) == len(changes)


def test_nothing_is_counted_before_it_is_scored(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorder of all targets scored and counted: each is counted once, after it was scored; the last chunk never."""
    here, model, validation = parts()
    made, scored, counted = t.NgramMixer(here, validation), [], []
    score_windows, learn = t.score_windows, made.learn

    def recording_score(*args: Any) -> torch.Tensor:
        scored.extend(target for _, first, end in args[3] for target in range(first, end))
        return score_windows(*args)

    def recording_learn(windows: np.ndarray) -> None:
        targets = [target for _, first, end in windows for target in range(first, end)]
        assert set(targets) <= set(scored) and not set(targets) & set(counted)
        counted.extend(targets)
        learn(windows)

    monkeypatch.setattr(t, "score_windows", recording_score)
    monkeypatch.setattr(made, "learn", recording_learn)
    t.evaluate_online(here, model, validation, None, made)
    assert scored == list(range(validation.targets))
    assert validation.targets - 256 - 32 <= len(counted) < validation.targets
    assert int(made.follows[2].sum()) == len(counted)


def test_a_run_and_a_sweep(corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores under their own names, time in the ledger; another weight on the same artifact needs no training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    ttt = {"TTT_ENABLED": 1, "TTT_BATCH_SEQS": 4}
    sweep = {"EVAL_ONLY": 1, "ARTIFACT_PATH": "logs/both.pgolf"}
    runs = {"both": ttt, "again": {**sweep, **ttt}, "alone": sweep, "more": {**sweep, "NGRAM_ALPHA_HIGH": 0.8}}
    lines = {}
    for name, settings in runs.items():
        env = {**ENVIRONMENT, **tiny_env(**corpus, **{**NGRAM, **settings, "RUN_ID": name})}
        monkeypatch.setattr(t.os, "environ", env)
        t.main()
        suffix = ".eval" if "EVAL_ONLY" in settings else ""
        log = (tmp_path / f"logs/{name}{suffix}.txt").read_text()
        lines[name] = re.findall(r"^(\w+)_exact val_loss:\S+ val_bpb:(\S+)", log, re.MULTILINE)
        phase = r"ttt\+ngram" if "TTT_ENABLED" in settings else "ngram"
        assert re.search(rf"^budget eval: .* {phase}:\d", log, re.MULTILINE)
    assert [name for name, _ in lines["both"]][-2:] == ["legal_ttt", "legal_ttt_ngram"]
    assert lines["again"][-4:] == lines["both"][-4:]
    names = {name: [n for n, _ in found] for name, found in lines.items()}
    assert names["alone"][-2:] == ["final_int6_sliding_window", "ngram_mix"]
    assert lines["more"][:-1] == lines["alone"][:-1] and lines["more"][-1] != lines["alone"][-1]


@pytest.mark.parametrize(("settings", "words"), [
    ({"EVAL_STRIDE": 0}, "EVAL_STRIDE"), ({"NGRAM_MIN_ORDER": 8}, "NGRAM_MIN_ORDER=8 exceeds NGRAM_MAX_ORDER=7"),
    ({"NGRAM_ALPHA_LOW": 0.7}, "NGRAM_ALPHA_LOW=0.7"), ({"NGRAM_ALPHA_HIGH": 1}, "NGRAM_ALPHA_HIGH=1"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(t.UserError, match=words):
        tiny_config(**{**NGRAM, **settings})
