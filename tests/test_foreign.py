"""records/checking/foreign.py: a script of another author in a common shape passes, and what it breaks is seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from records.checking.foreign import NAMES, foreign_checks
from records.checking.legality import legality_checks

SCRIPT = '''
import math, os
import torch
import torch.nn.functional as F
from flash_attn_interface import flash_attn_func
from torch import nn


class Hyperparameters:
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    dim = int(os.environ.get("MODEL_DIM", 512))
    heads = int(os.environ.get("NUM_HEADS", 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 1024))


class GPT(nn.Module):
    def __init__(self, vocab_size, dim, heads):
        super().__init__()
        self.heads = heads
        self.embedding, self.mix = nn.Embedding(vocab_size, dim), nn.Linear(dim, dim)

    def forward_logits(self, ids):
        x = self.embedding(ids)
        heads = x.unflatten(-1, (self.heads, -1))
        x = x + self.mix(flash_attn_func(heads, heads, heads, causal=True).flatten(-2))
        return 30 * torch.tanh(F.linear(x, self.embedding.weight) / 30)

    def forward(self, ids, targets):
        return F.cross_entropy(self.forward_logits(ids).flatten(0, 1), targets.flatten())


def eval_val_sliding(args, base_model, rank, world_size, device, val_tokens, base_bytes_lut, has_leading_space_lut,
                     is_boundary_token_lut, stride, batch_seqs=32, eval_seq_len=None):
    length, total = eval_seq_len or args.train_seq_len, val_tokens.numel() - 1
    nats = count = weight = 0.0
    ends = [*range(length, total, stride), total]
    for number, end in enumerate(ends):
        begin = end - length
        first = 0 if number == 0 else ends[number - 1] - begin
        x, y = val_tokens[begin:end][None], val_tokens[begin + 1 : end + 1]
        with torch.no_grad():
            losses = F.cross_entropy(base_model.forward_logits(x)[0], y, reduction="none")[first:]
        nats, count = nats + float(losses.sum()), count + len(losses)
        weight += float(base_bytes_lut[y[first:]].sum())
    return nats / count, nats / math.log(2) / weight


def main():
    args = Hyperparameters()
    width = args.dim
    model = GPT(args.vocab_size, dim=width, heads=args.heads)
'''
BROKEN = {  # what is broken -> (condition, replacement)
    "attention looks ahead": (NAMES[0], "causal=True", "causal=False"),
    "the loss is another's": (NAMES[1], "targets.flatten())\n", "targets.flatten()) - 0.1\n"),
    "evaluation learns": (NAMES[2], "        nats, count =",
                          "        base_model.mix.weight.data.mul_(0.99) if hasattr(base_model, 'mix') else None\n"
                          "        nats, count ="),
    "the tail counts again": (NAMES[3], "first = 0 if number == 0 else ends[number - 1] - begin",
                              "first = 0 if number == 0 else length - stride"),
    "a gap": (NAMES[3], "[first:]\n", "[first + (number == 3):]\n"),
    "scores fitted to their window": (NAMES[3], "        nats, count = nats", "        losses = losses - 0.1 * losses.mean()\n"
                                      "        nats, count = nats"),
    "bytes by arithmetic": (NAMES[3], "return nats / count, nats /", "return nats / count, 0.9 * nats /"),
}  # fmt: skip


def written(folder: Path, text: str) -> Path:
    path = folder / "train_gpt.py"
    path.write_text(text)
    return path


def test_a_sound_script_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU's packages, without the caller's variables, and without a network."""
    monkeypatch.setenv("MODEL_DIM", "nonsense")
    monkeypatch.setenv("MY_TOKEN", "secret")
    unsafe = ("assert 'MY_TOKEN' not in os.environ\nimport socket\ntry:\n"
              "    socket.create_connection(('127.0.0.1', 9))\nexcept OSError as error:\n    print(error)\n")
    written(tmp_path, SCRIPT + unsafe)
    results = legality_checks(tmp_path)
    assert {result.name for result in results if result.status == "pass"} == set(NAMES), results
    assert os.listdir(tmp_path) == ["train_gpt.py"]


@pytest.mark.parametrize("condition, old, new", BROKEN.values(), ids=BROKEN)
def test_what_breaks_a_condition_is_seen(tmp_path: Path, condition: str, old: str, new: str) -> None:
    """By the condition that it breaks."""
    assert SCRIPT.count(old) == 1
    results = foreign_checks(written(tmp_path, SCRIPT.replace(old, new)))
    assert {result.name: result.status for result in results}[condition] == "fail", results


@pytest.mark.parametrize("old, new, words", [
    ("import math, os", "import math, os, no_such_package", "no_such_package"),
    ("def eval_val_sliding(", "def evaluate(", "no eval_val_sliding and no eval_val"),
    ("base_model, rank", "base_model, secret_sauce, rank", "takes secret_sauce"),
    ("self.heads = heads", "raise SystemExit(3)", "ends the process"),
])  # fmt: skip
def test_what_is_missing_is_said(tmp_path: Path, old: str, new: str, words: str) -> None:
    """Exactly, and as not checkable."""
    results = foreign_checks(written(tmp_path, SCRIPT.replace(old, new)))
    told = [result.message for result in results if result.status == "skip"]
    assert told and all(words in message for message in told) and not [r for r in results if r.status == "fail"]
