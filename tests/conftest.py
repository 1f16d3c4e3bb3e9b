"""Shared pieces of the tests: a tiny configuration, a small real corpus in the challenge format, a runtime."""

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt as t

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and a busy machine makes it worse
VOCAB = 512
TINY = {
    "VOCAB_SIZE": VOCAB, "NUM_LAYERS": 4, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "XSA_LAST_N": 4,
    "ROPE_DIMS": 4, "VE_LAYERS": "2,3", "VE_DIM": 16, "BIGRAM_VOCAB_SIZE": 64, "BIGRAM_DIM": 16, "TRAIN_SEQ_LEN": 32,
    "TRAIN_BATCH_TOKENS": 256, "ITERATIONS": 12, "WARMUP_STEPS": 1, "GPTQ_CALIBRATION_BATCHES": 2, "EVAL_STRIDE": 16,
    "VAL_BATCH_SIZE": 512, "DEVICE": "cpu", "COMPILE": 0, "RUN_ID": "tiny", "MAX_WALLCLOCK_SECONDS": 0, "NUM_LOOPS": 0,
    "MUON_HEAD_GROUP": 0, "MIN_LR": 0, "WARMDOWN_FRAC": 0.6, "LATE_QAT_THRESHOLD": 0.15, "QK_GAIN_INIT": 1.5,
}  # fmt: skip


def tiny_env(**changes: Any) -> dict[str, str]:
    """Environment of a tiny model; keyword arguments are variables."""
    return {key: str(value) for key, value in {**TINY, **changes}.items()}


def tiny_config(**changes: Any) -> t.Config:
    return t.Config.from_env(tiny_env(**changes))


def tiny_model(seed: int = 0, **changes: Any) -> t.GPT:
    """A tiny model whose every parameter is random, so that no path is hidden behind a zero initialization."""
    cfg = tiny_config(**changes)
    model = t.GPT(cfg, bos_id=1, attend=t.PLAIN_ATTENTION, device=torch.device(cfg.device))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return model


def unscaled(model: t.GPT, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`GPT.weights` without the output scales that it multiplies into two of the banks."""
    scales = {"out": model.rest["attn_scale"], "down": model.rest["mlp_scale"]}
    return {n: w / scales[n].unsqueeze(-1) if n in scales else w for n, w in weights.items()}


def codes_of(
    cfg: t.Config, jobs: list[t.QuantSpec], hessians: dict[str, torch.Tensor], sigmas: float
) -> dict[str, t.QuantizedTensor]:
    """The codes of all jobs, made one after another."""
    return {job.name: t.quantize(cfg, job, hessians, sigmas) for job in jobs}


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """A shard as the challenge defines it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables DATA_PATH and TOKENIZER_PATH of a small corpus: Python's help topics, 512 BPE pieces, BOS per document."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in documents for line in text.splitlines() if line.strip()),
        model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
        character_coverage=0.999, add_dummy_prefix=False, split_digits=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = [[1, *pieces.encode(text)] for text in documents]
    validation, training = np.concatenate(encoded[:8])[:4003], np.concatenate(encoded[8:])
    write_shard(folder / "fineweb_val_000000.bin", validation)
    middle = len(training) // 2 + 7
    write_shard(folder / "fineweb_train_000000.bin", training[:middle])
    write_shard(folder / "fineweb_train_000001.bin", training[middle:])
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / "tokenizer.model")}


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: runs write their logs there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(in_tmp: Path, corpus: dict[str, str]) -> Iterator[t.Runtime]:
    """A runtime of one rank over the small corpus."""
    with t.Runtime.start(tiny_config(**corpus), {}) as runtime:
        yield runtime
