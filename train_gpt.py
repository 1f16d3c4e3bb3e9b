"""Parameter Golf trainer: the best language model in 16,000,000 bytes after 10 minutes on 8 H100s.

Token shards and environment variables go in; a trained, quantized, entropy-coded model and its
score in bits per byte (bpb) of the FineWeb validation text come out. One file, no imports from
the repository: copied alone into a records/ folder it runs.

    torchrun --standalone --nproc_per_node=8 train_gpt.py          # the record run
    ITERATIONS=200 TRAIN_BATCH_TOKENS=98304 python train_gpt.py    # one GPU, debugging
    RECIPE=records/recipes/demo.env DEVICE=cpu python train_gpt.py # a few minutes on a CPU
    python train_gpt.py --help                                     # every variable

Contents: no section uses what a later one defines
    1. Configuration
    2. Runtime
    3. Data
    4. Schedule
    5. Attention
    6. Layer
    7. Kernels
    8. Back ends
    9. Model
    10. Quantization
    11. Artifact
    12. Evaluation
    13. Optimizers
    14. Weight averaging
    15. Training
    16. Main
"""

import contextlib
import copy
import difflib
import fcntl
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

try:  # comes with the CUDA builds of torch; where it is absent the layers run their plain parts
    import triton
    import triton.language as tl
    from triton.errors import TritonError
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton, tl, TritonError = None, types.SimpleNamespace(constexpr=int), RuntimeError


class UserError(ValueError):
    """Bad input from the outside (variable, file, machine); the message names it and the remedy."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the run; no library that catches Exception swallows it."""


# ----------------------------------------------------------------------------------------------
# 1. Configuration
# ----------------------------------------------------------------------------------------------
# Every hyperparameter is one field of one frozen dataclass, and its environment variable is the
# field's name in capitals. Values come from the default, from the RECIPE file, or from the
# environment, the later winning. A name that looks like ours and is not known stops the run:
# of 44 published READMEs 4 set variables that their script never read.


def opt(
    default: Any, text: str, group: str = "", low: float = -math.inf, high: float = math.inf, choices: str = ""
) -> Any:
    """A Config field: default, help with unit, the --help group it starts, least and greatest number, allowed words."""
    limits = {"low": low, "high": high, "choices": choices.split()}
    return field(default=default, metadata={"text": text, "group": group, **limits})


@dataclass(frozen=True, kw_only=True)
class Config:
    """All hyperparameters, typed and validated. Build with `from_env`; the names are the variables' names."""

    recipe: str = opt("", "file of KEY=value lines read before the environment", group="Run")
    run_id: str = opt("", "name of the run's files under logs/ (empty: a fresh uuid)")
    seed: int = opt(1337, "seed of initial weights and data order", low=0, high=2**63 - 1)
    device: str = opt("auto", "where to run (auto: cuda, else mps, else cpu)", choices="auto cuda mps cpu")
    compile: bool = opt(True, "torch.compile the model and the optimizer; 0 runs eagerly")
    cuda_graph: bool = opt(True, "replay a micro-step's forward and backward pass as one CUDA graph")
    attn_backend: str = opt("auto", "attention (auto: the best here)", choices="auto fa3 fa4 cudnn fa2 flash math")
    layer_backend: str = opt("auto", "the rest of a layer (auto: first that works)", choices="auto triton plain")
    eval_only: bool = opt(False, "score the artifact at ARTIFACT_PATH; needs no training data")
    export_only: bool = opt(False, "quantize and score the weights at WEIGHTS_PATH; no training")
    resume: bool = opt(False, "go on from the checkpoint at WEIGHTS_PATH; same script, data, ranks and variables")
    overwrite: bool = opt(False, "replace what an earlier run left under RUN_ID, ARTIFACT_PATH or WEIGHTS_PATH")
    artifact_path: str = opt("", "the compressed model (empty: logs/<RUN_ID>.pgolf)")
    weights_path: str = opt("", "checkpoint with fp32 weights and their average (empty: logs/<RUN_ID>.weights.pt)")
    checkpoint_every: int = opt(500, "steps between checkpoints, clock stopped (0: only at the end)", low=0)

    data_dir: str = opt("./data/", "folder that holds datasets/ and tokenizers/", group="Data")
    data_path: str = opt("", "shard folder (empty: <DATA_DIR>/datasets/fineweb10B_sp<VOCAB_SIZE>)")
    tokenizer_path: str = opt("", "SentencePiece model (empty: <DATA_DIR>/tokenizers/fineweb_<VOCAB_SIZE>_bpe.model)")
    vocab_size: int = opt(1024, "pieces of the tokenizer", low=4, high=65_536)
    loader: str = opt("shuffled", "windows in random order, or the official order", choices="shuffled sequential")

    iterations: int = opt(20_000, "optimizer steps at most", group="Training length", low=1)
    max_wallclock_seconds: float = opt(600.0, "training, calibration and quantization, seconds (0: no limit)", low=0)
    train_batch_tokens: int = opt(786_432, "tokens per optimizer step over all ranks", low=1)
    train_seq_len: int = opt(2048, "tokens per training sequence", low=2, high=2**20)
    short_seq_len: tuple[int, ...] = opt((1024,), "tokens per sequence at first, as 1024,2048 (0 or none below: never)")
    short_seq_frac: tuple[float, ...] = opt((0.35,), "parts of the run at which each SHORT_SEQ_LEN ends, as 0.1,0.7")
    grad_accum_steps: int = opt(0, "micro-steps per step (0: fewest with at most 98,304 tokens each)", low=0)
    warmup_steps: int = opt(20, "untimed steps per phase before the clock starts, undone afterwards", low=0)
    warmdown_iters: int = opt(0, "last steps over which the learning rate falls to 0 (0: WARMDOWN_FRAC)", low=0)
    warmdown_frac: float = opt(0.85, "the same as a fraction of the run, by steps or clock", low=0, high=1)
    min_lr: float = opt(0.1, "floor of the learning-rate scale during warmdown", low=0, high=1)
    train_log_every: int = opt(200, "steps between training log lines (0: steps 1-10 only)", low=0)
    val_loss_every: int = opt(4000, "steps between validations (0: only after the last step)", low=0)

    num_layers: int = opt(11, "transformer layers", group="Model", low=1, high=1024)
    model_dim: int = opt(512, "width of the residual stream", low=1, high=65_536)
    num_heads: int = opt(8, "query heads", low=1)
    num_kv_heads: int = opt(4, "key/value heads", low=1)
    mlp_mult: float = opt(4.0, "MLP width over MODEL_DIM", low=0, high=1024)
    mlp_hidden: int = opt(0, "MLP width in units (0: MLP_MULT x MODEL_DIM)", low=0, high=2**20)
    mlp_activation: str = opt("leaky_relu2", "MLP nonlinearity", choices="relu2 leaky_relu2 asqu")
    negative_slope: float = opt(0.5, "slope of leaky_relu2 below zero, before squaring")
    asqu_beta_init: float = opt(0.25, "initial negative-side factor of ASQU, per channel")
    num_loops: int = opt(2, "extra passes over layers LOOP_START to LOOP_END (0: none)", low=0, high=64)
    loop_start: int = opt(3, "first looped layer, counted from 0", low=0)
    loop_end: int = opt(5, "last looped layer", low=0)
    enable_looping_at: float = opt(0.35, "fraction of the run after which loops run (0: from the start)", low=0, high=1)
    lora_rank: int = opt(0, "LoRA rank of each pass over the looped matrices, at the start (0: none)", low=0, high=4096)
    logit_softcap: float = opt(30.0, "logits are capped to +-this by tanh", low=1e-6)
    rope_base: float = opt(10_000.0, "base of the rotary frequencies", low=1)
    rope_dims: int = opt(16, "rotated dimensions per head (0: all)", low=0)
    qk_gain_init: float = opt(5.0, "initial gain on normalized queries, per head", low=0.01)
    doc_attention: bool = opt(True, "attention that does not cross documents (not with ATTN_BACKEND=cudnn)")
    xsa_last_n: int = opt(11, "last layers with exclusive self-attention", low=0)
    key_offset: bool = opt(True, "second half of every key from the token before; stops at BOS")
    ln_scale: bool = opt(False, "scale normalized inputs of layer i by 1/sqrt(i+1)")
    tie_embeddings: bool = opt(True, "use the token embedding as the output head")
    tied_embed_init_std: float = opt(0.005, "standard deviation of the initial token embedding", low=0)
    ortho_init: bool = opt(True, "orthogonal matrices at the start, else uniform +-1/sqrt(inputs)")
    smear_gate_enabled: bool = opt(True, "mix each token with the one before it, per channel; stops at BOS")
    bigram_vocab_size: int = opt(2048, "buckets of the hashed bigram embedding (0: none)", low=0, high=2**24)
    bigram_dim: int = opt(128, "width of the bigram embedding", low=1, high=65_536)
    ve_enabled: bool = opt(True, "shared value embedding added to the values of VE_LAYERS")
    ve_dim: int = opt(128, "width of the value embedding", low=1, high=65_536)
    ve_layers: tuple[int, ...] = opt((9, 10), "layers that get the value embedding, as 9,10")
    value_residual: bool = opt(False, "mix each layer's values with those of the first layer")
    gated_attn_enabled: bool = opt(False, "sigmoid gate per head on the attention output")

    matrix_lr: float = opt(0.025, "Muon learning rate", group="Optimizer", low=0)
    scalar_lr: float = opt(0.025, "Adam learning rate of vectors and small matrices", low=0)
    tied_embed_lr: float = opt(0.035, "Adam learning rate of embeddings when tied", low=0)
    embed_lr: float = opt(0.6, "Adam learning rate of embeddings when untied", low=0)
    head_lr: float = opt(0.008, "Adam learning rate of the untied head", low=0)
    lora_lr: float = opt(0.01, "Adam learning rate of the additions of LORA_RANK", low=0)
    asqu_lr: float = opt(0.001, "Adam learning rate of the ASQU factors", low=0)
    muon_momentum: float = opt(0.97, "Muon momentum after warm-up", low=0, high=1)
    muon_momentum_warmup_start: float = opt(0.92, "Muon momentum at step 0", low=0, high=1)
    muon_momentum_warmup_steps: int = opt(1500, "steps of linear momentum warm-up", low=0)
    muon_rails_at: float = opt(0.3, "part of the run after which momentum has two rails (1: never)", low=0, high=1)
    muon_backend_steps: int = opt(5, "Newton-Schulz iterations", low=1)
    muon_head_group: int = opt(2, "heads whose rows of Q, or of K, Muon orthogonalizes together (0: all)", low=0)
    muon_row_normalize: bool = opt(True, "normalize update rows before orthogonalizing (MuonEq-R)")
    muon_rank_frac: float = opt(1.0, "part of Muon's directions left at the end, by cosine (NuMuon)", low=0.01, high=1)
    polar_express: bool = opt(True, "Polar Express coefficients instead of the fixed quintic")
    muon_wd: float = opt(0.095, "decoupled weight decay of the banks", low=0)
    adam_wd: float = opt(0.04, "decoupled weight decay of vectors and small matrices", low=0)
    embed_wd: float = opt(0.085, "decoupled weight decay of embeddings", low=0)
    beta1: float = opt(0.9, "Adam beta1", low=0, high=1)
    beta2: float = opt(0.99, "Adam beta2", low=0, high=1)
    adam_eps: float = opt(1e-8, "Adam epsilon", low=0)
    grad_clip_norm: float = opt(0.3, "global gradient norm limit (0: none)", low=0)

    ema_enabled: bool = opt(True, "export an exponential moving average of the weights", group="Averaging and QAT")
    ema_decay: float = opt(0.9965, "decay of the average per step", low=0, high=1)
    swa_enabled: bool = opt(False, "export the mean of snapshots (of the EMA where that is on)")
    swa_every: int = opt(50, "steps between SWA snapshots", low=1)
    swa_start_frac: float = opt(0.2, "SWA starts when the learning-rate scale falls below this", low=0)
    lawa_enabled: bool = opt(False, "export the mean of the latest LAWA_K snapshots")
    lawa_k: int = opt(10, "snapshots in the LAWA window", low=1)
    lawa_freq: int = opt(100, "steps between LAWA snapshots", low=1)
    qat_enabled: bool = opt(False, "train on the export grid (straight-through) during the whole run")
    late_qat_threshold: float = opt(0.0, "the same once the rate's scale is below this (0: never)", low=0, high=1)

    post_qat_seconds: float = opt(0.0, "seconds of the clock for QAT after the main training (0: none)", low=0)
    post_qat_lr: float = opt(0.001, "Muon learning rate of that time; the others keep their ratio to it", low=0)

    gptq_enabled: bool = opt(True, "full-Hessian GPTQ, else round to nearest", group="Export")
    gptq_calibration_batches: int = opt(64, "batches of min(TRAIN_BATCH_TOKENS, 98304) tokens for Hessians", low=1)
    gptq_reserve_seconds: float | None = opt(None, "clock kept for calibration and GPTQ (empty: measured)", low=0)
    gptq_block_size: int = opt(128, "columns per lazy GPTQ update", low=1)
    gptq_damp: float = opt(0.01, "damping over the mean diagonal of the Hessian", low=0)
    gptq_act_order: bool = opt(True, "quantize the columns of largest Hessian diagonal first")
    trellis: bool = opt(False, "codes walk an 8-state trellis: a seventh less error from the same bytes")
    matrix_bits: int = opt(6, "bits of the code of a matrix entry (2 to 8)", low=2, high=8)
    lowbit_bits: int = opt(0, "bits of the matrices in LOWBIT_NAME_PATTERNS (0: MATRIX_BITS)", low=0, high=8)
    lowbit_name_patterns: tuple[str, ...] = opt((), "parts of names blocks.<i>.<matrix>., as .mlp.,.attn.proj.")
    embed_bits: int = opt(8, "bits of the code of an embedding entry (2 to 8)", low=2, high=8)
    clip_policy: str = opt("sigma", "grid: k x std, equal cost, amax, a search", choices="sigma cost amax search")
    matrix_clip_sigmas: float = opt(0.0, "k of clip policy sigma (0: what fills TARGET_BYTES)", low=0)
    embed_clip_sigmas: float = opt(8.0, "k of the embeddings under clip policy sigma", low=0.1)
    compressor: str = opt("auto", "auto and ans: entropy coder for codes", choices="auto ans zlib lzma zstd brotli")
    compressor_level: int = opt(-1, "level of a named compressor (-1: its strongest)", low=-1)
    target_bytes: int = opt(16_000_000, "limit of code + artifact, decimal bytes", low=1)
    selective_prune_enabled: bool = opt(True, "over the limit: zero the cheapest +-1 codes until it fits")
    int5_fallback: bool = opt(True, "over the limit after that: int5 for one layer at a time, centre first")

    eval_seq_len: int = opt(0, "tokens per evaluation window (0: TRAIN_SEQ_LEN)", group="Evaluation", low=0)
    eval_stride: int = opt(64, "new tokens per sliding window (0: plain windows only)", low=0)
    val_batch_size: int = opt(524_288, "tokens per evaluation batch over all ranks", low=1)
    max_eval_seconds: float = opt(600.0, "evaluation budget that the ledger reports against, seconds", low=0)

    ttt_enabled: bool = opt(False, "score also with score-first test-time training", group="Test-time training")
    ttt_chunk_tokens: int = opt(32_768, "tokens that are scored, then learned from, at a time", low=1)
    ttt_lr: float = opt(0.002, "learning rate on the first chunk; cosine to 0 over the chunks", low=0)
    ttt_epochs: int = opt(3, "passes over each scored chunk", low=0)
    ttt_optimizer: str = opt("sgd", "optimizer of test-time training", choices="sgd adamw")
    ttt_momentum: float = opt(0.9, "momentum of sgd", low=0)
    ttt_batch_seqs: int = opt(16, "sequences per step over all ranks", low=1)
    ttt_freeze_blocks: int = opt(0, "first layers that stay as they are", low=0)
    ttt_grad_clip: float = opt(1.0, "global gradient norm limit (0: none)", low=0)
    ttt_lora_enabled: bool = opt(False, "score also by documents, each with additions that learn what was scored")
    ttt_lora_rank: int = opt(80, "rank of a document's addition to each matrix", low=1)
    ttt_lora_alpha: float = opt(144.0, "factor on the additions, times 1/TTT_LORA_RANK", low=0)
    ttt_lora_lr: float = opt(2e-4, "Adam learning rate of the additions (beta1 is 0)", low=0)
    ttt_beta2: float = opt(0.99, "Adam beta2 of the additions", low=0, high=1)
    ttt_weight_decay: float = opt(0.5, "decoupled weight decay of the additions", low=0)
    ttt_chunk_size: int = opt(128, "tokens of a document that are scored, then learned from, at a time", low=1)
    ttt_batch_size: int = opt(32, "documents side by side on a rank", low=1)

    ngram_enabled: bool = opt(False, "score also with n-grams counted so far mixed in", group="N-gram mixer")
    ngram_min_order: int = opt(2, "shortest n-gram: one token of context", low=2)
    ngram_max_order: int = opt(7, "longest n-gram; the longest known context decides", low=2)
    ngram_alpha_low: float = opt(0.05, "weight of the n-grams where the model is certain", low=0)
    ngram_alpha_high: float = opt(0.6, "the same where it is uncertain", low=0)
    ngram_entropy: float = opt(4.0, "entropy of the model, in nats, at which the weight is half way", low=0)

    # Where each value came from: field name -> "default", "recipe" or "environment". Not a variable.
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        return self.mlp_hidden or int(self.mlp_mult * self.model_dim)

    @property
    def log_name(self) -> str:
        """Name of the log files: scoring or exporting again must not replace the log of the training run."""
        return self.run_id + (".eval" if self.eval_only else ".export" if self.export_only else "")

    @property
    def auto_clip(self) -> bool:
        """Whether the clip of the matrices is ours to choose, so that the artifact fills TARGET_BYTES."""
        return self.clip_policy in ("sigma", "cost") and not self.matrix_clip_sigmas

    @property
    def eval_len(self) -> int:
        return self.eval_seq_len or self.train_seq_len

    @property
    def seq_lengths(self) -> dict[int, float]:
        """Tokens per sequence -> part of the run at which that ends, the shortest first (PR #2014)."""
        stages = zip(self.short_seq_len, self.short_seq_frac, strict=True)
        short = {length: end for length, end in stages if 0 < length < self.train_seq_len and end > 0}
        return {**short, self.train_seq_len: math.inf}

    @property
    def shard_folder(self) -> Path:
        return Path(self.data_path or Path(self.data_dir, "datasets", f"fineweb10B_sp{self.vocab_size}"))

    @property
    def tokenizer_file(self) -> Path:
        return Path(self.tokenizer_path or Path(self.data_dir, "tokenizers", f"fineweb_{self.vocab_size}_bpe.model"))

    @property
    def artifact_file(self) -> Path:
        return Path(self.artifact_path or f"logs/{self.run_id}.pgolf")

    @property
    def weights_file(self) -> Path:
        return Path(self.weights_path or f"logs/{self.run_id}.weights.pt")

    @property
    def outputs(self) -> dict[str, Path]:
        """Variable -> file that the run writes and no other run may write meanwhile."""
        files = {"RUN_ID": Path(f"logs/{self.log_name}.txt")}
        files |= {} if self.eval_only else {"ARTIFACT_PATH": self.artifact_file}
        return files | ({} if self.eval_only or self.export_only else {"WEIGHTS_PATH": self.weights_file})

    @classmethod
    def variables(cls) -> dict[str, Field]:
        """Variable name -> dataclass field, in the order of --help."""
        return {f.name.upper(): f for f in fields(cls) if f.name != "sources"}

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Config":
        """Configuration from a mapping such as os.environ (and the RECIPE file that it may name); UserError for a name
        or value that cannot be meant."""
        values: dict[str, Any] = {}
        sources = {f.name: "default" for f in cls.variables().values()}
        recipe = read_recipe(Path(env["RECIPE"])) if env.get("RECIPE") else {}
        for source, mapping in {"recipe": recipe, "environment": env}.items():
            check_names(mapping, strict=source == "recipe")
            for name, spec in cls.variables().items():
                if text := mapping.get(name, "").strip():
                    values[spec.name], sources[spec.name] = parse_value(name, text, spec), source
        cfg = cls(**values, sources=sources)
        for demands in RULES:
            validate(cfg, demands(cfg))
        return replace(cfg, run_id=cfg.run_id or str(uuid.uuid4()))

    def architecture(self) -> dict[str, Any]:
        """The fields that define the model's function: what an artifact must carry to be evaluated."""
        names = [f.name for f in self.variables().values()]
        model = names[names.index("num_layers") : names.index("matrix_lr")]
        return {name: getattr(self, name) for name in ["vocab_size", "train_seq_len", *model]}

    @classmethod
    def describe_variables(cls) -> str:
        """The table that --help prints: variable, default, meaning, by group."""
        lines = ["Environment variables of train_gpt.py (booleans: 0/1, true/false, yes/no, on/off; empty = default)"]
        for name, spec in cls.variables().items():
            meta = spec.metadata
            if meta["group"]:
                lines += ["", meta["group"]]
            words = f" [{' | '.join(meta['choices'])}]" if meta["choices"] else ""
            lines.append(f"  {name:<28} {as_text(spec.default):<14} {meta['text']}{words}")
        return "\n".join(lines)


def as_text(value: Any) -> str:
    """A value as the environment would spell it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return "" if value is None else str(int(value) if isinstance(value, bool) else value)


# What other scripts call our variables: never accepted, since units and meanings differ, but named in the error.
OTHER_NAMES = dict(pair.split("=") for pair in """
ACTIVATION=MLP_ACTIVATION ADAM_WEIGHT_DECAY=ADAM_WD BIGRAM_BUCKETS=BIGRAM_VOCAB_SIZE BIGRAM_HASH_DIM=BIGRAM_DIM
BIGRAM_HASH_BUCKETS=BIGRAM_VOCAB_SIZE COMPILE_MODEL=COMPILE EMBED_QUANT_BITS=EMBED_BITS LAWA_INTERVAL=LAWA_FREQ
GATED_ATTENTION=GATED_ATTN_ENABLED GPTQ_RESERVE_MS=GPTQ_RESERVE_SECONDS LAWA_WINDOW=LAWA_K LEAKY_SLOPE=NEGATIVE_SLOPE
LEAKY_RELU_SLOPE=NEGATIVE_SLOPE MLP_LEAKY_SLOPE=NEGATIVE_SLOPE MUON_EQ_R=MUON_ROW_NORMALIZE MUON_WEIGHT_DECAY=MUON_WD
PARTIAL_ROPE_DIMS=ROPE_DIMS QAT_THRESHOLD=LATE_QAT_THRESHOLD
QUANT_BITS=MATRIX_BITS QUANT_BITS_EMBED=EMBED_BITS SERIAL_COMPRESSOR=COMPRESSOR SLIDING_EVAL_STRIDE=EVAL_STRIDE
SMEARGATE=SMEAR_GATE_ENABLED STRIDE=EVAL_STRIDE TARGET_MB=TARGET_BYTES TARGET_TOTAL_BYTES=TARGET_BYTES
USE_SMEARGATE=SMEAR_GATE_ENABLED VAL_BATCH_TOKENS=VAL_BATCH_SIZE VRL=VALUE_RESIDUAL WEIGHT_DECAY=MUON_WD
WEIGHT_QUANT_BITS=MATRIX_BITS XSA_LAYERS=XSA_LAST_N ZSTD_LEVEL=COMPRESSOR_LEVEL
""".split())  # fmt: skip

# A name with one of these words, or that ends in one of the others, is meant for a training script: such scripts read
# some 460 names, and one that passes here for a setting of another program would do nothing in silence.
OWN_WORDS = set(
    "ADAM ASQU ATTN BIGRAM CASEOPS CE CHECKPOINT COMPRESSOR DTG EMA EMBED EMBEDDING EVAL FP16 GATE GATED GPTQ GRAD "
    "INT4 INT5 INT6 INT8 JEPA LAWA LAYER LAYERS LOGIT LOOP LOOPS LOOPING LORA LOWBIT LQER LR MATRIX MLP MOMENTUM MTP "
    "MUON NGRAM PARALLEL PREQUANT QAT QK QUANT RECUR RECURRENCE RESUME ROPE SLIDING SMEAR SOFTCAP SWA TRIGRAM TTT VE "
    "WARMDOWN WD XSA".split()
)
OWN_ENDINGS = tuple(
    "_BITS _BLOCKS _CLIP _DECAY _DEPTH _DIM _DIMS _ENABLED _EPOCHS _EVAL _FRAC _FRACTION _HEADS _INIT _ITERS _LAMBDA "
    "_LEN _MULT _PATTERNS _RANK _RATIO _SCALE _SCALING _SCHEDULE _SIGMA _SIGMAS _SIZE _START _STEP _STEPS "
    "_WEIGHT".split()
)
# Prefixes of other software: never ours, even where a word of ours follows.
FOREIGN_PREFIXES = tuple(
    "NCCL_ CUDA_ TORCH PYTORCH_ TRITON_ OMP_ MKL_ KMP_ GLOO_ OPENBLAS_ PYTHON HF_ HUGGINGFACE_ WANDB_ MATCHED_FINEWEB_ "
    "LD_ LC_ SLURM_ AWS_ KUBERNETES_ NVIDIA_ RUNPOD_ XDG_ SSH_ GIT_ VIRTUAL_ CONDA_ PIP_ FLASH_ATTENTION_ CUTE_ MPL "
    "PYTEST_ MASTER_ GROUP_ ROLE_ LOCAL_ WORLD_SIZE TORCHELASTIC_ OTEL_ VSCODE_ JUPYTER_ RAY_ DD_ UCX_ FI_ "
    "XLA_ JAX_ TF_ NVSHMEM_ CUPY_ NUMBA_ NVTE_ GPG_ DOCKER_".split()
)


def read_recipe(path: Path) -> dict[str, str]:
    """KEY=value lines of a recipe. Quotes round a value come off; a # at the start or after a space is a comment."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as problem:
        raise UserError(f"RECIPE={path}: not UTF-8 ({problem.reason}); save it as UTF-8") from None
    except OSError as problem:
        raise UserError(f"RECIPE={path}: {problem.strerror}; the recipes are in records/recipes/*.env") from None
    values: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, rest = line.partition("=")
        key, quoted = key.strip(), re.fullmatch(r"""\s*(["'])([^"']*)\1\s*(#.*)?""", rest)
        value = quoted[2] if quoted else re.split(r"(?:^|\s)#", rest)[0].strip()
        if not equals or not key.isidentifier() or (not quoted and value.startswith(("'", '"'))):
            raise UserError(f"{path}:{number}: expected KEY=value, found {line.strip()!r}")
        if key in values or key == "RECIPE":
            raise UserError(f"{path}:{number}: {key} {'is set twice' if key in values else 'cannot stand in a recipe'}")
        values[key] = value
    return values


def check_names(mapping: Mapping[str, str], strict: bool) -> None:
    """Refuse unknown variables in one message: all of a recipe's, and those of the environment that look like ours."""
    ours, found = Config.variables(), []
    for name in sorted(mapping.keys() - ours.keys()):
        near = OTHER_NAMES.get(name, "").split() or difflib.get_close_matches(name, ours, n=2, cutoff=0.84)
        is_like_ours = near or OWN_WORDS & set(name.split("_")) or name.endswith(OWN_ENDINGS)
        is_foreign = not (mapping[name] and name.isupper()) or name.startswith(FOREIGN_PREFIXES)
        if not strict and (is_foreign or not is_like_ours and not name.startswith(("TRAIN_", "VAL_", "USE_"))):
            continue
        beginning = name.removeprefix("USE_").removeprefix("ENABLE_")
        near = near or [longer for longer in ours if longer.startswith(beginning)][:2]
        found.append(f"{name}={mapping[name]}" + f" (did you mean {' or '.join(near)}?)" * bool(near))
    if found:
        raise UserError(f"no such variable: {', '.join(found)}; python train_gpt.py --help lists all. Unset what is "
                        "not meant for this run")  # fmt: skip


BOOLEANS = {"0": False, "false": False, "no": False, "off": False, "1": True, "true": True, "yes": True, "on": True}


def parse_value(name: str, text: str, spec: Field) -> Any:
    """The text of a variable as its field's type; UserError names variable, value and what is allowed."""
    low, high, choices = (spec.metadata[key] for key in ("low", "high", "choices"))
    kind = next((k for k in get_args(spec.type) if k in (int, float, str)), spec.type)  # float | None, tuple[int, ...]
    limits = [f" {word} {end:g}" for word, end in (("at least", low), ("at most", high)) if math.isfinite(end)]
    number, is_list = "number" + " and".join(limits), isinstance(spec.default, tuple)
    wanted = {bool: "0 or 1 (true/false, yes/no and on/off are understood)", str: f"one of {', '.join(choices)}",
              int: f"a whole {number}", float: f"a finite {number}"}  # fmt: skip
    read = (lambda word: BOOLEANS[word.lower()]) if kind is bool else kind
    try:
        values = tuple(read(part.strip()) for part in (text.split(",") if is_list else [text]) if part.strip())
    except (KeyError, ValueError):
        values = (math.nan,)
    if not all(v in choices if choices else kind is str or abs(v) < 1e38 and low <= v <= high for v in values):
        raise UserError(f"{name}={text}: expected {wanted[kind]}")  # neither NaN nor beyond float32
    return values if is_list else values[0]


RULES: list[Callable[[Config], list[tuple[Any, str]]]] = []  # later sections add what must hold between variables


def rules(function: Callable) -> Callable:
    """Decorator: what a function demands of a configuration is checked by `Config.from_env`."""
    RULES.append(function)
    return function


def validate(cfg: Config, demands: list[tuple[Any, str]]) -> None:
    """Check what involves several variables; messages name them with their values."""
    shown = {f"${name}": f"{name}={as_text(vars(cfg)[name.lower()]).removesuffix('.0')}" for name in cfg.variables()}
    for holds, message in demands:
        if not holds:
            raise UserError(re.sub(r"\$[A-Z_]+", lambda name: shown.get(name[0], name[0]), message))


# ----------------------------------------------------------------------------------------------
# 2. Runtime
# ----------------------------------------------------------------------------------------------
# Ranks, clock, log and ledger are values handed to whoever needs them. One rank runs the same
# code as eight: collectives on a world of one return their input. Durations are seconds, sizes
# are bytes, lengths are tokens.

PATIENCE = timedelta(minutes=5)  # with a rank that does not answer; a group of its own would wait for 30


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, and the few collectives that the run needs."""

    rank: int
    world: int
    device: torch.device
    control: Any = None  # gloo group for decisions of the host, so that they never wait for the GPU
    env: Mapping[str, str] = field(default_factory=dict)  # what torchrun told, for `close`

    @classmethod
    def start(cls, cfg: Config, env: Mapping[str, str]) -> "Ranks":
        """Join the process group that torchrun describes in `env`; without one this is a world of one."""
        rank, world, local_rank = launch_numbers(env)
        device = pick_device(cfg.device, local_rank)
        if world == 1:
            return cls(rank, world, device)
        bound = {"device_id": device} if device.type == "cuda" else {}
        try:
            dist.init_process_group("nccl" if bound else "gloo", timeout=PATIENCE, **bound)
            return cls(rank, world, device, dist.new_group(backend="gloo", timeout=PATIENCE), env)
        except (RuntimeError, ValueError) as problem:
            where = f"MASTER_ADDR={env['MASTER_ADDR']} MASTER_PORT={env['MASTER_PORT']}"
            raise UserError(f"{where}: the {world} ranks do not find each other: {str(problem)[:300]}") from None

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of the ranks' values, on every rank: clocks and decisions must not differ between ranks."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of one rank, on every rank."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, source, group=self.control)
        return values[0]

    def share(self, count: int) -> range:
        """This rank's contiguous part of `count` pieces of work; sizes differ by one at most."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def close(self, problem: BaseException | None) -> None:
        """Leave the group; after a problem at once, since peers may never answer. The first rank that has one tells it.
        The others have the same one, or have lost a peer: they end silently, or torchrun ends them (SIGTERM as soon as
        a rank has failed, SIGKILL 30 s later)."""
        if self.world > 1 and problem:
            with contextlib.suppress(OSError):  # a closed console
                if is_first_to_fail(self.env):
                    print(describe(problem), file=sys.stderr, flush=True)
            os._exit(1)
        elif self.world > 1:
            dist.destroy_process_group()
            # Gloo's thread lets go of the last tensors when it likes, and an interpreter that ends meanwhile
            # aborts: 5 of 11 runs with torch 2.11. Who drops the last reference to a group waits for its thread.
            object.__setattr__(self, "control", None)


def launch_numbers(env: Mapping[str, str]) -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK of a launcher such as torchrun; without them this is rank 0 of 1."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    given = {name: env.get(name, "").strip() for name in names}
    if not any(given[name] for name in names[:3]):
        return 0, 1, 0
    is_number = re.compile("[0-9]{1,9}").fullmatch
    rank, world, local_rank, port = (int(given[name]) if is_number(given[name]) else -1 for name in names[:4])
    has_meeting_place = 0 < port < 65_536 and given["MASTER_ADDR"]
    if not (0 <= rank < world and local_rank >= 0 and (world == 1 or has_meeting_place)):
        pairs = " ".join(f"{name}={value!r}" for name, value in given.items())
        raise UserError(f"{pairs}: whole numbers, RANK below WORLD_SIZE, MASTER_PORT from 1 to 65535; "
                        "torchrun sets all of them; unset them for a run of one process")  # fmt: skip
    return rank, world, local_rank


def is_first_to_fail(env: Mapping[str, str]) -> bool:
    """Whether no other rank has asked this yet; torchrun keeps the store that counts, so it outlives every rank."""
    with contextlib.suppress(RuntimeError, UserError):  # without torchrun there is no store, or it ended with rank 0
        if launch_numbers(env)[1] > 1:
            store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timedelta(seconds=5))
            return store.add(f"failed/{env.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    return True


def describe(problem: BaseException) -> str:
    """One line for what can happen to a sound script; the traceback for anything else."""
    if isinstance(problem, UserError | Interrupted):
        return f"error: {problem}"
    if isinstance(problem, torch.OutOfMemoryError):
        return f"error: {str(problem).splitlines()[0][:200]} Raise GRAD_ACCUM_STEPS, or lower TRAIN_BATCH_TOKENS, " \
               "VAL_BATCH_SIZE or TTT_BATCH_SIZE; RESUME=1 goes on from the last checkpoint"  # fmt: skip
    if isinstance(problem, RuntimeError) and "/gloo/" in str(problem):
        what = str(problem).split("] ", 1)[-1].split(". ")[0]
        return f"error: another rank has ended or does not answer: {what}; the launcher's report names it"
    return "".join(traceback.format_exception(problem)).rstrip()


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device that DEVICE names; auto takes the best one present. A named one that is missing is an error."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in present if present[k]) if name == "auto" else name
    if not present[kind]:
        raise UserError(f"DEVICE={name}: not available on this machine; present: {[k for k in present if present[k]]}")
    if kind != "cuda":
        return torch.device(kind)
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"LOCAL_RANK={local_rank}: only {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("high")  # TF32 products: exact for bf16 inputs, twice as fast or more
    return torch.device("cuda", local_rank)


class Clock:
    """A stopwatch that waits for the device whenever it starts or stops."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.now = device, now
        self.total, self.started = 0.0, None

    def start(self) -> None:
        synchronize(self.device)
        self.started = self.now()

    def stop(self) -> float:
        synchronize(self.device)
        self.total, self.started = self.seconds(), None
        return self.total

    def seconds(self) -> float:
        return self.total + (self.now() - self.started if self.started is not None else 0.0)


def synchronize(device: torch.device) -> None:
    getattr(torch, device.type).synchronize()


def atomic_write(path: Path, blob: bytes | memoryview, variable: str) -> None:
    """Write a file through a temporary name: it is whole or the older one. A folder that has vanished is made again,
    and a link is followed. UserError where that fails."""
    real = Path(os.path.realpath(path))
    partial_path = real.with_name(real.name + ".partial")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        partial_path.write_bytes(blob)
        partial_path.replace(real)
    except OSError as problem:
        free = "?"
        with contextlib.suppress(OSError):
            partial_path.unlink(missing_ok=True)
            free = shutil.disk_usage(real.parent).free
        raise UserError(f"{variable}={path}: {problem.strerror}, {len(blob)} bytes to write, {free} free; make room or "
                        "take another disk") from None  # fmt: skip


class Claim:
    """The files that a run writes, locked for its lifetime: no two runs share one, and nothing finished is replaced.

    The lock is on a hidden file beside each, which the system releases when the process dies. Its time of change tells
    a run that is resumed when the killed one began its last step.
    """

    MARKS = {"ARTIFACT_PATH": b"PGOLF", "WEIGHTS_PATH": b"PK"}  # how the files begin that this script writes

    def __init__(self, cfg: Config) -> None:
        """Try every path and lock it; UserError names what is in the way before anything is lost."""
        self.locks: dict[Path, int] = {}
        self.last_beat: float | None = None  # of the run that held the weights before
        try:
            for variable, path in cfg.outputs.items():
                self.lock(variable, path, cfg.run_id)
            taken = [f"{variable}={cfg.run_id if variable == 'RUN_ID' else path}"
                     for variable, path in cfg.outputs.items() if self.is_taken(variable, path)]  # fmt: skip
            if taken and not (cfg.overwrite or cfg.resume):
                raise UserError(f"{' '.join(taken)}: an earlier run left its files there. Set another one, OVERWRITE=1 "
                                "to replace them, or RESUME=1 to go on with a training run")  # fmt: skip
        except UserError:
            self.release()
            raise

    def lock(self, variable: str, path: Path, run_id: str) -> None:
        """Take the lock beside `path`, wherever links lead; it also shows that files can be made there."""
        real = Path(os.path.realpath(path))
        name = real.with_name(f".{real.name}.lock")
        try:
            if path.is_dir():
                raise IsADirectoryError(0, "is a folder")
            name.parent.mkdir(parents=True, exist_ok=True)
            beat = name.stat().st_mtime if name.exists() else None
            handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not name.exists() or not os.path.samestat(os.fstat(handle), name.stat()):  # its owner ended just now
                os.close(handle)
                return self.lock(variable, path, run_id)
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace")
            os.close(handle)
            raise UserError(f"{variable}={path}: {owner or 'another run'} writes it now; set another one") from None
        except OSError as problem:
            raise UserError(f"{variable}={path}: cannot be written ({problem.strerror}); set another one") from None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}, RUN_ID={run_id},".encode())
        self.locks[name] = handle
        self.last_beat = beat if variable == "WEIGHTS_PATH" else self.last_beat

    @classmethod
    def is_taken(cls, variable: str, path: Path) -> bool:
        """Whether weights, an artifact, or a log with steps or scores are there; UserError for a foreign file."""
        if variable == "RUN_ID":
            events = path.with_suffix(".jsonl")
            return events.is_file() and bool(re.search(rb'"event": "(train|score)"', events.read_bytes()))
        if path.exists() and not path.open("rb").read(8).startswith(cls.MARKS[variable]):
            raise UserError(f"{variable}={path}: not a file that a run has written; set another one or remove it")
        return path.exists()

    def beat(self) -> None:
        """Note the time, at the start of a step; costs a microsecond."""
        with contextlib.suppress(OSError):
            os.utime(next(reversed(self.locks.values())))

    def release(self) -> None:
        """Give the locks back; removed while held, so that who comes next makes a file of their own."""
        for name, handle in self.locks.items():
            with contextlib.suppress(OSError):
                name.unlink()
            os.close(handle)


class Log:
    """The run's record: console, logs/<RUN_ID>.txt, and a JSON line stream. Only rank 0 writes, every line at once.

    What cannot be written any more (disk full, console closed) is given up with one warning on the others: it must not
    end a paid run. The lines are also kept, for the seed logs of a submission and for a folder that vanished.
    """

    def __init__(self, cfg: Config, enabled: bool) -> None:
        self.cfg, self.console = cfg, enabled
        self.paths = {kind: Path(f"logs/{cfg.log_name}.{kind}") for kind in ("txt", "jsonl") if enabled}
        for path in self.paths.values():
            path.parent.mkdir(exist_ok=True)
        self.files = {kind: open(path, "ab" if cfg.resume else "wb", buffering=0) for kind, path in self.paths.items()}
        self.lines = {kind: bytearray(path.read_bytes()) for kind, path in self.paths.items()}

    def __call__(self, text: str, console: bool = True) -> None:
        self.write("txt", text)
        try:
            if self.console and console:
                print(text, flush=True)
        except (OSError, ValueError) as problem:
            self.console = False
            if sys.stdout is sys.__stdout__:  # or what is buffered fails again when the interpreter ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self(f"WARNING: the console takes no more lines ({problem}); the log goes on in {self.paths['txt']}")

    def event(self, event: str, /, **values: Any) -> None:
        """One JSON object for tools; the text line beside it is for people."""
        self.write("jsonl", json.dumps({"event": event, **values}))

    def write(self, kind: str, line: str) -> None:
        """Append a line to a file, if it still takes any."""
        data = line.encode(errors="backslashreplace") + b"\n"
        if kind in self.lines:
            self.lines[kind] += data
        try:
            if kind in self.files:
                self.files[kind].write(data)
        except OSError as problem:
            self.files.pop(kind)
            self(f"WARNING: {self.paths[kind]}: {problem.strerror}; its lines are kept in memory until the end")

    def close(self, problem: BaseException | None) -> None:
        """Say how the run ended and write again what a folder has lost; after a good end of training also the logs that
        submissions ship."""
        if problem:
            self(describe(problem), console=False)
        wanted = {path: self.lines[kind] for kind, path in self.paths.items()
                  if kind not in self.files or not path.exists()}  # fmt: skip
        if not problem and self.lines and self.cfg.log_name == self.cfg.run_id:
            names = [f"train_seed{self.cfg.seed}.log"] + ["train.log"] * (self.cfg.seed == 1337)
            wanted |= {Path(name): self.lines["txt"] for name in names}
        for path, blob in wanted.items():
            try:
                atomic_write(path, bytes(blob), "log")  # a copy: the warning below makes the lines longer
            except UserError as fault:
                self(f"WARNING: {fault}")
        for file in self.files.values():
            file.close()


STUCK_SECONDS = 15  # for a step to end after SIGTERM; torchrun sends SIGKILL after 30


class Signals:
    """Signals that end a run, from users, schedulers and closing terminals.

    In the training loop they are noted, and the loop saves and ends at its next step; elsewhere `Interrupted` is raised
    at once. A signal that was ignored when the process began (nohup) stays ignored.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

    def __init__(self, cfg: Config, log: Log, ranks: Ranks) -> None:
        self.cfg, self.log, self.ranks = cfg, log, ranks
        self.noted, self.is_deferred, self.answered = [], False, threading.Event()
        self.terminals = [handle for handle in (0, 1, 2) if os.isatty(handle)]

    def handle(self, number: int, _: Any) -> None:
        """Note a signal, or raise it. The hangup of a terminal that is gone ends nothing: only lines are lost."""
        name = signal.Signals(number).name
        if name == "SIGHUP" and self.terminals and not any(map(os.isatty, self.terminals)):
            self.log("WARNING: SIGHUP: the terminal is gone; the run goes on", console=False)
            return
        self.noted.append(name)
        if not self.is_deferred or self.noted.count("SIGINT") > 1:
            self.interrupt()

    def interrupt(self) -> None:
        """Raise what was noted; the message says what goes on from here."""
        self.answered.set()
        path = self.cfg.weights_file
        saved = "" if self.cfg.eval_only or not path.exists() else f"; RESUME=1 goes on from {path}"
        raise Interrupted(f"{self.noted[0]}: stopped{saved}")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, signals are noted; one that nobody has answered is raised at the end."""
        self.is_deferred = True
        yield
        self.is_deferred = False
        if self.noted:
            self.interrupt()

    @contextlib.contextmanager
    def handled(self) -> Iterator["Signals"]:
        """Take the signals over from Python."""
        with contextlib.ExitStack() as undo:
            for number in self.NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    undo.callback(signal.signal, number, signal.signal(number, self.handle))
            readable, writable = os.pipe()
            os.set_blocking(writable, False)
            undo.callback(os.close, writable)
            undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writable, warn_on_full_buffer=False))
            undo.callback(self.answered.set)
            threading.Thread(target=self.end_when_stuck, args=(readable,), daemon=True).start()
            yield self

    def end_when_stuck(self, pipe: int) -> None:
        """End this process, with a message, where nothing has answered a SIGTERM for STUCK_SECONDS: a rank that waits
        on its GPU for a lost peer runs no handler. This thread hears of signals through a pipe."""
        with open(pipe, "rb", buffering=0) as numbers:
            while (number := numbers.read(1)) and number[0] != signal.SIGTERM:
                pass
        if number and not self.answered.wait(STUCK_SECONDS):
            what = f"no step ended within {STUCK_SECONDS} s of SIGTERM"
            problem = UserError(f"another rank has ended or does not answer: {what}; the launcher's report names it")
            self.log(describe(problem), console=False)
            self.ranks.close(problem)


@dataclass(frozen=True)
class Runtime:
    """What every stage needs: configuration, ranks, log, signals, files, and the ledger of time spent."""

    cfg: Config
    ranks: Ranks
    log: Log
    ledger: list[tuple[str, str, float]]  # (budget, phase, seconds)
    signals: Signals | None = None
    claim: Claim | None = None  # rank 0's
    costs: list[str] = field(default_factory=list)  # what makes every step longer than it need be
    active: set[str] = field(default_factory=set)  # configured features that did something

    @classmethod
    @contextlib.contextmanager
    def start(cls, cfg: Config, env: Mapping[str, str]) -> Iterator["Runtime"]:
        """Start ranks, claim the files, open the log and write its header; close all of them whatever happens."""
        ranks = Ranks.start(cfg, env)
        with contextlib.ExitStack() as stack:  # left from the last line to the first
            stack.push(lambda _, problem, __: ranks.close(problem))
            claim = Claim(cfg) if ranks.is_main_process else None
            if claim:
                stack.callback(claim.release)
            log = Log(cfg, ranks.is_main_process)
            stack.push(lambda _, problem, __: log.close(problem))
            signals = stack.enter_context(Signals(cfg, log, ranks).handled())
            run = cls(cfg, ranks, log, [], signals, claim)
            log_header(run)
            yield run

    @contextlib.contextmanager
    def timed(self, phase: str, budget: str) -> Iterator[None]:
        """Book the time of a block under one of the budgets train, eval or untimed."""
        clock = Clock(self.ranks.device)
        clock.start()
        yield
        self.ledger.append((budget, phase, clock.stop()))

    def spent(self, budget: str) -> float:
        return sum(seconds for name, _, seconds in self.ledger if name == budget)

    def warn_of_cost(self, text: str) -> None:
        """Say what makes every step longer, with the price, now and again in the report."""
        self.log(f"WARNING: {text}")
        self.costs.append(text)


def log_header(run: Runtime) -> None:
    """Source with its sha256, versions, and every hyperparameter with where it came from."""
    cfg, log, device, world = run.cfg, run.log, run.ranks.device, run.ranks.world
    source, copy_path = Path(__file__).read_bytes(), Path(f"logs/{cfg.log_name}.py")
    digest, version = hashlib.sha256(source).hexdigest(), torch.__version__
    if run.ranks.is_main_process:
        atomic_write(copy_path, source, "log")  # not in the log, which tools grep
    log(f"source: sha256:{digest} bytes:{len(source)} copy:{copy_path}")
    log(f"Running Python {platform.python_version()} PyTorch {version} command: {' '.join(sys.argv)}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    log(f"device:{device.type} ({name}) cuda:{torch.version.cuda} cudnn:{torch.backends.cudnn.version()} "
        f"host:{platform.node()} world_size:{world}")  # fmt: skip
    log(f"seed:{cfg.seed}")
    log("Hyperparameters:", console=False)
    values, sources = {name: vars(cfg)[name] for name in cfg.sources}, dict(cfg.sources)
    for key, value in values.items():
        log(f"  {key}: {value} ({sources[key]})", console=False)
    log("changed: " + " ".join(f"{k.upper()}={v}" for k, v in values.items() if sources[k] != "default"))
    log.event("config", sha256=digest, torch=version, device=name, world_size=world, values=values, sources=sources)


def log_ledger(run: Runtime) -> None:
    """Every phase against its budget, in the organisers' reading: training, calibration and GPTQ within
    MAX_WALLCLOCK_SECONDS; everything from opening the artifact to the score within MAX_EVAL_SECONDS."""
    limits = {"train": run.cfg.max_wallclock_seconds, "eval": run.cfg.max_eval_seconds, "untimed": 0.0}
    for budget, limit in limits.items():
        rows, spent = [row[1:] for row in run.ledger if row[0] == budget], run.spent(budget)
        parts, over = {phase: sum(s for other, s in rows if other == phase) for phase, _ in rows}, 0 < limit < spent
        text = f"{spent:.1f}s" + (f" of {limit:.0f}s" if limit else "") + (" OVER BUDGET" if over else "")
        if rows:
            run.log(f"budget {budget}: {text} ({' '.join(f'{phase}:{s:.2f}s' for phase, s in parts.items())})")
            run.log.event("ledger", budget=budget, limit=limit, seconds=spent, phases=parts, over=over)


def cut(flat: Tensor, shapes: list[Sequence[int]]) -> list[Tensor]:
    """Tensors of these shapes from all their entries in one row."""
    return [piece.view(shape) for piece, shape in zip(flat.split([*map(math.prod, shapes)]), shapes, strict=True)]


# ----------------------------------------------------------------------------------------------
# 3. Data
# ----------------------------------------------------------------------------------------------
# Shards are 256 little-endian int32 (magic, version, token count, the SHA-256 of the tokenizer's file or zeros, zeros)
# and then that many uint16 tokens. Every document starts with BOS; documents run across shard borders. A batch is a
# pure function of its number, so warm-up, restarts and any number of ranks see the same data.
#
# Nothing in a shard of the official sets says which tokenizer made it, and with a wrong one the bits per byte are wrong
# by a third without any other sign. So the text of validation documents is encoded again: the right tokenizer gives the
# same tokens, another one at most 4% of them.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
MICRO_BATCH_TOKENS = 98_304  # one GPU's share of the record batch: 786,432 over 8; fits 80 GB with room


class Shard:
    """A shard's file, tokens in it, and the tokenizer's SHA-256 as hex ("" where the builder noted none)."""

    def __init__(self, path: Path) -> None:
        """Check magic, version and length."""
        self.path = path
        header = self.read(-SHARD_HEADER_BYTES // 2, SHARD_HEADER_BYTES // 2).view("<i4")
        if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
            raise UserError(f"{path}: not a token shard (magic, version: {header[:2].tolist()}, expected "
                            f"{[SHARD_MAGIC, SHARD_VERSION]}); fetch or build it again")  # fmt: skip
        self.count, size = int(header[2]), path.stat().st_size
        wanted = SHARD_HEADER_BYTES + 2 * self.count
        if self.count < 1 or size != wanted:
            raise UserError(f"{path}: header promises {self.count} tokens, {wanted} bytes, but the file has {size} "
                            "bytes; it is truncated or damaged: fetch it again")  # fmt: skip
        self.tokenizer = header[3:11].tobytes().hex() if header[3:11].any() else ""

    def read(self, offset: int, count: int) -> np.ndarray:
        """`count` tokens, uint16. Read, not mapped: a mapped file that shrinks kills the process (SIGBUS)."""
        try:
            tokens = np.fromfile(self.path, "<u2", count, offset=SHARD_HEADER_BYTES + 2 * offset)
        except OSError as problem:
            raise UserError(f"{self.path}: {problem.strerror}; fetch it again") from None
        if len(tokens) != count:
            raise UserError(f"{self.path}: has become shorter since the run began, or is no shard; fetch it again")
        return tokens


def shard_paths(cfg: Config, split: str) -> list[Path]:
    """Shards of a split in order: numbered from 0 without a gap, and no file beside them that is nearly one. `split`
    may be "val_bytes": the byte sidecars, of which there may be none."""
    are_bytes, folder = split == "val_bytes", cfg.shard_folder
    paths = [path for path in sorted(folder.glob(f"fineweb_{split}_*")) if are_bytes or "_bytes_" not in path.name]
    for number, path in enumerate(paths):
        if path.name != (wanted := f"fineweb_{split}_{number:06d}.bin"):
            raise UserError(f"DATA_PATH={folder}: found {path.name} where {wanted} should be; fetch what is missing, "
                            "move away what is not a shard")  # fmt: skip
    if not paths and not are_bytes:
        raise UserError(f"DATA_PATH={folder}: no fineweb_{split}_*.bin there; get them with `python3 data/cached_"
                        f"challenge_fineweb.py --variant sp{cfg.vocab_size}` or set DATA_PATH to your folder")
    return paths


class TokenStream:
    """All shards of a split as one endless stream of tokens."""

    def __init__(self, cfg: Config, split: str) -> None:
        self.shards, self.vocab_size = [*map(Shard, shard_paths(cfg, split))], cfg.vocab_size
        self.ends = np.cumsum([shard.count for shard in self.shards])
        self.total = int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start`, wrapping round at the end; int64."""
        pieces = []
        while count > 0:
            index = int(np.searchsorted(self.ends, start % self.total, side="right"))
            shard, rest = self.shards[index], int(self.ends[index]) - start % self.total
            piece = shard.read(shard.count - rest, min(count, rest))
            if int(piece.max()) >= self.vocab_size:
                raise UserError(f"{shard.path}: token {piece.max()}, set VOCAB_SIZE={self.vocab_size} higher")
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces).astype(np.int64)


class BatchShape(NamedTuple):
    """How TRAIN_BATCH_TOKENS is cut: micro-steps per step, and sequences per rank and micro-step."""

    accum: int
    sequences: int


def batch_shape(cfg: Config, world: int, most: int = MICRO_BATCH_TOKENS) -> BatchShape:
    """Fewest micro-steps that keep a rank's micro-batch within `most` tokens; UserError where nothing divides."""
    tokens, length = cfg.train_batch_tokens, cfg.train_seq_len
    unit = world * length * max(cfg.grad_accum_steps, 1)
    below = tokens // unit * unit
    if tokens != below or not below:
        valid = f"{below} or {below + unit}" if below else str(unit)
        raise UserError(f"TRAIN_BATCH_TOKENS={tokens} is no multiple of ranks x TRAIN_SEQ_LEN x GRAD_ACCUM_STEPS = "
                        f"{world} x {length} x {cfg.grad_accum_steps or 'auto'}; nearest valid: {valid}")  # fmt: skip
    per_rank, most = tokens // (world * length), max(most // length, 1)
    auto = next(a for a in range(1, per_rank + 1) if per_rank % a == 0 and per_rank // a <= most)
    accum = cfg.grad_accum_steps or auto
    return BatchShape(accum, per_rank // accum)


class Loader:
    """Training micro-batches by number, for this rank, read ahead in a background thread.

    `shuffled`: the stream is cut at a random phase into windows of TRAIN_SEQ_LEN and every window comes once per
    epoch in random order. `sequential`: the official order, in which every rank of every micro-step takes the next
    span of its size plus one token. Both are functions of SEED and the number alone: a step covers the same tokens
    for any number of ranks (sequential: for equal ranks x micro-steps, as in the official script).
    """

    def __init__(self, run: Runtime, most: int = MICRO_BATCH_TOKENS) -> None:
        """`most` tokens in a micro-batch."""
        cfg = run.cfg
        self.cfg, self.ranks, self.shape = cfg, run.ranks, batch_shape(cfg, run.ranks.world, most)
        self.stream = TokenStream(cfg, "train")
        self.windows = (self.stream.total - cfg.train_seq_len) // cfg.train_seq_len
        if self.windows < 1:
            raise UserError(f"{cfg.shard_folder}: {self.stream.total} tokens; lower TRAIN_SEQ_LEN={cfg.train_seq_len}")
        self.epoch_starts = lru_cache(maxsize=2)(self.shuffle)  # a batch may span two epochs
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")  # reads a step's batches and the next
        self.request = lru_cache(self.shape.accum + 1)(partial(worker.submit, self.batch))

    def shuffle(self, epoch: int) -> np.ndarray:
        """Stream position of each window of an epoch, in order of use."""
        rng, length = np.random.default_rng([self.cfg.seed, epoch]), self.cfg.train_seq_len
        return int(rng.integers(length)) + length * rng.permutation(self.windows)

    def window_start(self, index: int) -> int:
        """Stream position of the index-th shuffled window, counted over all epochs."""
        epoch, place = divmod(index, self.windows)
        return int(self.epoch_starts(epoch)[place])

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of micro-batch `number` (step x accum + micro-step), each (sequences, seq_len) int64."""
        count, length = self.shape.sequences, self.cfg.train_seq_len
        place = number * self.ranks.world + self.ranks.rank
        if self.cfg.loader == "sequential":
            starts = [place * (count * length + 1) + i * length for i in range(count)]
        else:
            starts = [self.window_start(place * count + i) for i in range(count)]
        rows = np.stack([self.stream.read(start, length + 1) for start in starts])
        pair = torch.from_numpy(np.stack([rows[:, :-1], rows[:, 1:]]))
        pair = pair.pin_memory() if self.ranks.device.type == "cuda" else pair
        return pair[0], pair[1]

    def fault(self, step: int) -> UserError | None:
        """Why a step's micro-batches cannot be had, once they have been read; None where they can."""
        numbers = range(step * self.shape.accum, (step + 1) * self.shape.accum)
        problems = (future.exception() for future in [self.request(number) for number in numbers])
        return next((problem for problem in problems if isinstance(problem, UserError)), None)

    def fetch(self, number: int) -> tuple[Tensor, Tensor]:
        """`batch(number)` on the device; the next one is read meanwhile."""
        inputs, targets = self.request(number).result()
        self.request(number + 1)
        device = self.ranks.device
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


CASE_MARKS = "\ue001\ue002\ue003\ue004"  # of CaseOps (PR #1729): text in lower case, capitals as marks before it
SAME_TOKENS = 0.9  # least share; right tokenizers reach 1.0 on documents without unknown pieces, wrong ones 0.12


class ByteTable:
    """Bytes of text that a token stands for, from the SentencePiece model.

    bytes(target | previous) = base[target] + (the piece starts with a space and previous is not a control token).
    Control, unknown and unused pieces count 0, byte pieces 1, others their UTF-8 length without the leading mark.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Load the tokenizer at `path`; UserError unless it fits VOCAB_SIZE and has a piece for a space."""
        try:
            model, sentencepiece = path.read_bytes(), importlib.import_module("sentencepiece")
            self.pieces = pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except ImportError:
            raise UserError("the tokenizer needs the package sentencepiece: pip install -r requirements.txt") from None
        except (OSError, RuntimeError) as error:
            raise UserError(f"TOKENIZER_PATH={path}: {str(error)[:200]}; the downloader in data/ fetches it") from None
        if pieces.piece_to_id("\u2581") == pieces.unk_id():
            raise UserError(f"TOKENIZER_PATH={path} has no piece for a single space: byte counts would be wrong by 20%")
        if pieces.vocab_size() != vocab_size:
            raise UserError(f"TOKENIZER_PATH={path} has {pieces.vocab_size()} pieces but VOCAB_SIZE={vocab_size}")
        self.path, self.bos_id, self.sha256 = path, pieces.bos_id(), hashlib.sha256(model).hexdigest()
        is_mark = [pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i) for i in range(vocab_size)]
        texts = ["" if mark else pieces.id_to_piece(i) for i, mark in enumerate(is_mark)]
        lengths = [len(text.removeprefix("\u2581").replace("\u2581", " ").encode()) for text in texts]
        self.base = np.array([min(n, 1) if pieces.is_byte(i) else n for i, n in enumerate(lengths)], np.int32)
        self.has_space = np.array([text.startswith("\u2581") for text in texts])
        self.is_boundary = np.array(is_mark)

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of each token given the one before it, (n,) int32; entry 0, never a target, counts 0."""
        counts = self.base[tokens]
        counts[1:] += self.has_space[tokens[1:]] & ~self.is_boundary[tokens[:-1]]
        counts[0] = 0
        return counts

    def passages(self, tokens: np.ndarray) -> list[slice]:
        """Where the text of each document stands in `tokens`, up to the word before the first piece that is no text.
        The last document may go on after `tokens`, and so also ends with a word."""
        found, ends = [], np.append(np.flatnonzero(self.is_boundary[tokens]), len(tokens))
        for start in np.flatnonzero(tokens == self.bos_id) + 1:
            end = ends[np.searchsorted(ends, start)]
            if end == len(tokens) or tokens[end] != self.bos_id:
                end = start + max(np.flatnonzero(self.has_space[tokens[start:end]]), default=0)
            found.append(slice(start, end))
        return [place for place in found if place.stop > place.start]

    def self_test(self, tokens: np.ndarray, sidecar: np.ndarray | None) -> str:
        """UserError unless this is the tokenizer of `tokens`; says in words what was compared. Text encoded again gives
        the same tokens. The table counts its bytes exactly; the counts of a sidecar (n,) are those of the text without
        case marks (private-use characters) and with the white space that was normalized away."""
        where, places = f"TOKENIZER_PATH={self.path}: not the tokenizer of these shards", self.passages(tokens)
        same, plain = 0, 0
        for number, place in enumerate(places):
            ours = tokens[place].tolist()
            text = self.pieces.decode(ours)
            again = self.pieces.encode(text)
            head, tail = (os.path.commonprefix(pair) for pair in ([ours, again], [ours[::-1], again[::-1]]))
            same += min(len(head) + len(tail), len(ours))
            plain += len(re.sub("[\ue000-\uf8ff]", "", text).encode())
            counted, actual = int(self.count(np.append(self.bos_id, ours)).sum()), len(text.encode())
            if counted != actual and sidecar is None:
                raise UserError(f"{where}: validation document {number} has {actual} bytes decoded, {counted} counted")
        total = sum(place.stop - place.start for place in places)
        share = same / max(total, 1)
        if share < SAME_TOKENS:
            raise UserError(f"{where}: of {total} validation tokens {share:.1%} come again when their text is encoded; "
                            "set the one that they were made with")  # fmt: skip
        if sidecar is None and any(self.pieces.piece_to_id(mark) != self.pieces.unk_id() for mark in CASE_MARKS):
            raise UserError(f"TOKENIZER_PATH={self.path} has case marks, which count no bytes: shards of it need their "
                            "byte sidecar, fineweb_val_bytes_*.bin")  # fmt: skip
        if sidecar is None:
            return f"bytes exact on {len(places)} documents, {share:.2%} of {total} tokens the same when encoded again"
        noted = sum(int(sidecar[place].sum()) for place in places)
        if not 0.99 * plain <= noted <= 1.2 * plain:
            raise UserError(f"the byte sidecar counts {noted} bytes where the text has {plain}; fetch it again")
        return f"bytes by sidecar, {share:.2%} of {total} tokens the same when encoded again"


@dataclass(frozen=True)
class ValidationSet:
    """The whole validation split on the device: tokens (n,) int32, bytes of each token as a target (n,) int32."""

    tokens: Tensor
    token_bytes: Tensor
    bos_id: int
    identity: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the tokenizer's file, of tokens and bytes

    @property
    def targets(self) -> int:
        return len(self.tokens) - 1

    def batch(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs at `positions` and their targets, the tokens after them, int64."""
        return self.tokens[positions].long(), self.tokens[positions + 1].long()


# The official validation splits, 50,000 documents each: tokens -> (variant, bytes of text); CaseOps' bytes to within 1.
OFFICIAL_SETS = {
    62_021_846: ("sp1024", 151_080_891),
    40_540_803: ("sp8192", 151_080_891),
    47_853_344: ("sp8192_lossless_caps_caseops_v1_reserved", 151_080_645),
}


def check_tokenizer(cfg: Config, stream: TokenStream, sha256: str) -> None:
    """UserError where a shard notes another tokenizer than that of `sha256`."""
    for shard in stream.shards:
        if shard.tokenizer not in ("", sha256):
            raise UserError(f"TOKENIZER_PATH={cfg.tokenizer_file} (sha256 {sha256[:16]}): {shard.path} was built with "
                            f"another tokenizer, sha256 {shard.tokenizer[:16]}; set that one")  # fmt: skip


def load_validation(run: Runtime) -> ValidationSet:
    """Validation tokens and their byte counts (from the sidecar where there is one), checked and logged."""
    cfg, log = run.cfg, run.log
    table, stream = ByteTable(cfg.tokenizer_file, cfg.vocab_size), TokenStream(cfg, "val")
    check_tokenizer(cfg, stream, table.sha256)
    tokens = stream.read(0, stream.total)
    documents = int((tokens == table.bos_id).sum())
    if not documents:
        raise UserError(f"{cfg.shard_folder}: no BOS (id {table.bos_id}) in the validation set; build the shards again")
    if stream.total <= cfg.eval_len:
        raise UserError(f"{cfg.shard_folder}: {stream.total} validation tokens; lower EVAL_SEQ_LEN={cfg.eval_len}")
    sidecars = [*map(Shard, shard_paths(cfg, "val_bytes"))]
    counts = np.concatenate([s.read(0, s.count) for s in sidecars]).astype(np.int32) if sidecars else None
    if sidecars and len(counts) != len(tokens):
        raise UserError(f"{sidecars[0].path}: {len(counts)} byte counts for {len(tokens)} tokens; fetch both again")
    tested = table.self_test(tokens[:300_000], counts if counts is None else counts[:300_000])
    counts = table.count(tokens) if counts is None else counts
    total = int(counts[1:].sum())
    official, expected = OFFICIAL_SETS.get(len(tokens), ("", total))
    if abs(total - expected) > 1:
        raise UserError(f"{cfg.shard_folder}: {total} bytes in {len(tokens)} tokens; {official} has {expected}: "
                        "shards, sidecar or tokenizer are not the official ones; fetch them again")  # fmt: skip
    digest = hashlib.sha256(tokens.astype("<u2").tobytes() + counts.astype("<u2").tobytes()).hexdigest()
    identity = {"tokenizer_sha256": table.sha256, "val_sha256": digest}
    log.event("data", split="val", tokens=len(tokens), documents=documents, bytes=total, **identity)
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={cfg.tokenizer_file}")
    log(f"val_loader:shards pattern={cfg.shard_folder}/fineweb_val_*.bin tokens:{len(tokens)}")
    known = official or "no official set"
    log(f"val_tokens: {len(tokens)} val_documents: {documents} val_bytes: {total} ({known}; {tested})")
    log(f"tokenizer_sha256:{table.sha256} val_sha256:{digest}")
    tensors = (torch.tensor(array, dtype=torch.int32, device=run.ranks.device) for array in (tokens, counts))
    return ValidationSet(*tensors, table.bos_id, identity)


# ----------------------------------------------------------------------------------------------
# 4. Schedule
# ----------------------------------------------------------------------------------------------
# Schedules are pure functions of step and clock. What changes the graph is a Phase, a static
# argument of the forward pass: every phase is compiled before the clock starts.


class Phase(NamedTuple):
    """Everything static about a forward pass."""

    order: tuple[int, ...]  # layer indices in the order in which they run
    fake_quant: bool
    seq_len: int


def final_order(cfg: Config) -> tuple[int, ...]:
    """Layers as the finished model runs them, in order: LOOP_START to LOOP_END 1 + NUM_LOOPS times (PR #1394)."""
    plain, first, end = tuple(range(cfg.num_layers)), cfg.loop_start, cfg.loop_end + 1
    return plain[:first] + plain[first:end] * (1 + cfg.num_loops) + plain[end:] if cfg.num_loops else plain


def phase_at(cfg: Config, progress: float) -> tuple[str, Phase]:
    """Name and phase at a part of the run, late QAT aside: sequences grow and loops begin, each at its own time."""
    length = next(n for n, end in cfg.seq_lengths.items() if progress < end)
    looped = progress >= cfg.enable_looping_at
    name = "layer_loop" if looped and cfg.num_loops and cfg.enable_looping_at else "train"
    order = final_order(cfg) if looped else tuple(range(cfg.num_layers))
    return name + f"_{length}" * (length < cfg.train_seq_len), Phase(order, cfg.qat_enabled, length)


def phases(cfg: Config) -> dict[str, Phase]:
    """Name -> phase, in the order in which the schedule will use them; late QAT has all loops and the whole length."""
    begins = {0.0, *cfg.seq_lengths.values(), cfg.enable_looping_at if cfg.num_loops else 0.0} - {math.inf}
    found = dict(phase_at(cfg, begin) for begin in sorted(begins))
    late = {"late_qat": cfg.late_qat_threshold > 0 and not cfg.qat_enabled, "post_qat": cfg.post_qat_seconds}
    return found | {name: Phase(final_order(cfg), True, cfg.train_seq_len) for name, is_used in late.items() if is_used}


def training_frac(cfg: Config, step: int, seconds: float, budget: float) -> float:
    """Part of the run that is over, by steps or by the clock, whichever is further."""
    return max(step / cfg.iterations, seconds / budget)


def lr_scale_at(cfg: Config, step: int, seconds: float, budget: float) -> float:
    """Learning-rate scale in [MIN_LR, 1]: flat, then linear to the end of the run, whichever of steps or clock ends it.
    WARMDOWN_ITERS counts steps; the steps that the clock still allows follow from the step time so far."""
    if cfg.warmdown_iters:
        by_clock = (budget - seconds) * step / seconds if step and seconds > 0 else math.inf
        scale = min(cfg.iterations - step, by_clock) / cfg.warmdown_iters
    else:
        rest = 1 - training_frac(cfg, step, seconds, budget)
        scale = rest / cfg.warmdown_frac if cfg.warmdown_frac else 1.0
    return max(min(scale, 1.0), cfg.min_lr, 0.0)


def muon_momentum_at(cfg: Config, step: int) -> float:
    """Muon momentum, linear from its start to its final value."""
    done = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    return cfg.muon_momentum_warmup_start + done * (cfg.muon_momentum - cfg.muon_momentum_warmup_start)


class StepPlan(NamedTuple):
    """Learning-rate scale, Muon momentum, phase, part of Muon's directions, whether its momentum has two rails."""

    lr_scale: float
    momentum: float
    phase: str
    muon_share: float = 1.0
    two_rails: bool = False


RAILS = {0.85: 0.4385, 0.98: 0.5615}  # decay and share of the fast and the slow one: their mean age is 30 steps


def momentum_rails(cfg: Config, plan: StepPlan) -> list[tuple[float, float, float]]:
    """Decay, gain and weight of each rail of Muon's momentum: a rail becomes decay x rail + gain x gradient, and the
    update is the gradient + the sum of weight x rail.

    Two rails (modded-nanogpt PR #340) f, s are averages of decays .85 and .98, and the update is
    (1 - mu) gradient + mu (.4385 f + .5615 s), all over 1 - mu here, since what follows makes its own length.
    Until MUON_RAILS_AT both are the plain momentum sum of decay mu, in the same units: so both start from it.
    """
    mu, count = plan.momentum, 1 + (cfg.muon_rails_at < 1)
    if not plan.two_rails:
        return [(mu, 1.0, mu / count)] * count
    return [(decay, (1 - decay) / (1 - mu), mu * share) for decay, share in RAILS.items()]


def plan_step(cfg: Config, step: int, seconds: float, budget: float) -> StepPlan:
    """What the schedule wants for a step; late QAT begins once the learning-rate scale is below its threshold."""
    scale, progress = lr_scale_at(cfg, step, seconds, budget), training_frac(cfg, step, seconds, budget)
    is_late = scale < cfg.late_qat_threshold and not cfg.qat_enabled
    phase = "late_qat" if is_late else phase_at(cfg, progress)[0]
    share = cfg.muon_rank_frac + (1 - cfg.muon_rank_frac) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return StepPlan(scale, muon_momentum_at(cfg, step), phase, share, two_rails=progress >= cfg.muon_rails_at < 1)


# ----------------------------------------------------------------------------------------------
# 5. Attention
# ----------------------------------------------------------------------------------------------
# A back end takes q, k and v of B sequences of T tokens, and what tells documents apart. H heads, D head size.

# Namespace of our operators. A process that loads several copies of this file (`records check`) must not define one
# twice: torch frees the first, and calling that ends in a segmentation fault. Cached graphs go by the name.
OPERATORS = next(n for i in itertools.count() if not hasattr(getattr(torch.ops, n := f"pgolf{i or ''}"), "xsa"))
ATTN_CHUNK_TOKENS = 49_152  # what FlashAttention 4 finds in the L2 cache again: all 98,304 at once take 7 to 9% longer


def operator(function: Callable) -> Any:
    """A custom operator, opaque to torch.compile, that runs kernels by `launch`. Its shapes are found by a call with
    tensors that have no memory, on which nothing is launched."""
    made = torch.library.custom_op(f"{OPERATORS}::{function.__name__}", function, mutates_args=())
    made.register_fake(function)
    return made


def differentiable(op: Any, backward: Callable, keep: Callable[..., tuple]) -> None:
    """Give an operator its gradient. Of its inputs and the tuple of its outputs `keep` picks what `backward` finds in
    ctx.saved_tensors and, of numbers, in ctx.numbers. The gradient of an output without a use is None."""

    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        kept = keep(*inputs, output)
        ctx.numbers = [x for x in kept if isinstance(x, int | float)]
        ctx.save_for_backward(*(x for x in kept if not isinstance(x, int | float)))
        ctx.set_materialize_grads(False)

    op.register_autograd(backward, setup_context=save)


class Attention(NamedTuple):
    """Causal attention; with a mask within documents only. One mask per pass serves every layer."""

    attend: Callable[..., Tensor]  # q (B,T,H,D), k and v (B,T,KV,D), mask or None -> y (B,T,H,D)
    mask: Callable[[Tensor], Tensor] | None = None  # of documents (B, T), equal numbers for tokens of one document

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attend(q, k, v, mask)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's scaled-dot-product attention restricted to one kernel, so that it never changes silently; with a mask
    by any kernel that takes one."""
    heads_first, is_shared = (x.transpose(1, 2) for x in (q, k, v)), q.shape[2] != k.shape[2]
    with sdpa_kernel(backend) if mask is None else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(*heads_first, mask, is_causal=mask is None, enable_gqa=is_shared)
    return y.transpose(1, 2)


PLAIN_ATTENTION = Attention(
    partial(sdpa, SDPBackend.MATH),
    lambda documents: (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().unsqueeze(1),
)


def num_chunks(rows: int, length: int) -> int:
    """In how many parts, of whole rows and ATTN_CHUNK_TOKENS or more, documents are counted and attended to."""
    return math.gcd(rows, 1 << max(rows * length // ATTN_CHUNK_TOKENS, 1).bit_length() - 1)


def max_docs_per_chunk(tokens: int) -> int:
    """How many documents of a part are told apart. Every sequence that a kernel must be prepared for costs time, and
    their number may not depend on the batch: half as many again as FineWeb has at 8,192 pieces. What is scored may not
    depend on the batch either, and windows that overlap repeat the places with the shortest documents."""
    return max(64, tokens // (512 if torch.is_grad_enabled() else 64))


def sequence_ends(documents: Tensor, parts: int) -> Tensor:
    """The mask of kernels that take sequences of varied length end to end, and compute nothing that would be masked.

    Where each row or document of a part begins, then the end of the part: (parts, most sequences + 1) int32.
    """
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).view(parts, -1)
    counted, count = num_chunks(*documents.shape), begins.shape[1]
    most = (len(documents) + counted * max_docs_per_chunk(documents.numel() // counted)) // parts
    places = torch.arange(count, dtype=torch.int32, device=documents.device).expand_as(begins)
    slots = torch.where(begins, begins.cumsum(1) - 1, most)
    ends = places.new_full((parts, most + 1), count).scatter(1, slots, places)
    return F.pad(ends[:, :most], (0, 1), value=count)


def flatten_chunks(dense: Callable[..., Tensor], varlen: Callable[..., Tensor]) -> Attention:
    """FlashAttention by two functions, of whole rows and of documents one after the other, (N, H, D)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return dense(q, k, v)
        tokens, ends, longest = (x.flatten(0, 1) for x in (q, k, v)), mask[0], q.shape[1]
        return varlen(*tokens, ends, ends, longest, longest).view_as(q)

    return Attention(attend, partial(sequence_ends, parts=1))


def flash_package(module: str) -> Attention:
    """An installed FlashAttention package; it takes our layout as it is."""
    package = importlib.import_module(module)
    return flatten_chunks(*(partial(f, causal=True) for f in (package.flash_attn_func, package.flash_attn_varlen_func)))


def bundled_flash() -> Attention:
    """The FlashAttention 2 that PyTorch brings along; of documents it shares no keys and values among heads."""
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def repeat_kv(q: Tensor, k: Tensor, v: Tensor, *sizes: Any) -> Tensor:
        k, v = (x if x.shape == q.shape else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return attend(q, k, v, *sizes, window_size=(-1, 0))

    return flatten_chunks(partial(sdpa, SDPBackend.FLASH_ATTENTION), repeat_kv)


@cache
def flash_attention_4() -> Attention:
    """FlashAttention 4 (package flash-attn-4) as an operator, since torch.compile cannot trace its JIT-compiled Python.
    Documents are attended to part by part, in one kernel call each."""
    kernels = importlib.import_module("flash_attn.cute.interface")

    def calls(q: Tensor, ends: Tensor | None, longest: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each part, and what its kernel call is told of its sequences; no call for tensors without memory."""
        for part in range(0 if isinstance(q, FakeTensor) else len(q)):
            cu = None if ends is None else ends[part]
            words = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
            yield part, {} if cu is None else words

    @operator
    def fa4(q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
        y, lse = q.new_empty(q.shape), q.new_empty(q.transpose(-2, -3).shape[:-1], dtype=torch.float32)
        for at, words in calls(q, ends, longest):
            kernels._flash_attn_fwd(q[at], k[at], v[at], causal=True, out=y[at], lse=lse[at], return_lse=True, **words)
        return y, lse

    @operator
    def fa4_backward(
        dy: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, y: Tensor, lse: Tensor, longest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy, dq, dk, dv = dy.contiguous(), *(x.new_empty(x.shape) for x in (q, k, v))
        for at, words in calls(q, ends, longest):
            saved = (tensor[at] for tensor in (q, k, v, y, dy, lse))
            kernels._flash_attn_bwd(*saved, causal=True, dq=dq[at], dk=dk[at], dv=dv[at], **words)
        return dq, dk, dv

    def differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *fa4_backward(dy, *ctx.saved_tensors, *ctx.numbers), None, None

    differentiable(fa4, differentiate, lambda q, k, v, ends, longest, out: (q, k, v, ends, *out, longest))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return fa4(*(x.unsqueeze(0) for x in (q, k, v)), None, 0)[0].squeeze(0)
        parts = (x.reshape(len(mask), -1, *x.shape[2:]) for x in (q, k, v))
        return fa4(*parts, mask, q.shape[1])[0].view_as(q)

    return Attention(attend, lambda documents: sequence_ends(documents, num_chunks(*documents.shape)))


ATTENTION: dict[str, Callable[[], Attention]] = {  # in order of preference on Hopper GPUs
    "fa3": lambda: flash_package("flash_attn_interface"),
    "fa4": flash_attention_4,
    "cudnn": lambda: Attention(partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
    "fa2": lambda: flash_package("flash_attn"),
    "flash": bundled_flash,
    "math": lambda: PLAIN_ATTENTION,
}


def doc_ids(ids: Tensor, bos_id: int) -> Tensor:
    """Numbers (B, T) that are equal for tokens of the same document of a row of ids (B, T); documents beyond
    `max_docs_per_chunk` of a part of the batch are taken for one with the one before them."""
    begins = (ids == bos_id).view(num_chunks(*ids.shape), -1)
    told_apart = begins & (begins.cumsum(1) <= max_docs_per_chunk(begins.shape[1]))
    return told_apart.view_as(ids).cumsum(1)


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


# ----------------------------------------------------------------------------------------------
# 6. Layer
# ----------------------------------------------------------------------------------------------
# The parts of a layer in plain operations: the definition that kernels are measured against, and what runs
# where there are none.

NORM_EPS = 1e-6


class Residual(NamedTuple):
    """The residual stream x (N, C), N = B T, at the entrance of a norm, and what stands for x normalized.

    In plain parts `proxy` is the normalized x (N, C). In kernels it is memory without values that takes the gradient of
    x as the normalized x makes it, which is r (N,) times the rows of x, with r held fixed. None before a feed-forward,
    whose kernels return the gradient of x as a whole.
    """

    x: Tensor
    proxy: Tensor | None
    r: Tensor | None = None
    scale: float = 1.0  # that r includes


WithProxy = tuple[Tensor, Tensor]  # values and the tensor that takes their gradient: in plain parts the same
Entered = tuple[Residual, Tensor, WithProxy]  # at a layer's entrance: the rows, the proxy of x, and x0 for the next one


class LoRAWeight(NamedTuple):
    """A matrix (rows, cols) with an addition of low rank for each of D equal parts of its input (LoRA, 2106.09685)."""

    base: Tensor
    inner: Tensor  # (D, rank, cols)
    outer: Tensor  # (D, rows, rank)


def product(x: Tensor, weight: Tensor | LoRAWeight) -> Tensor:
    """x (N, cols) times weight (rows, cols) transposed."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    parts = x.unflatten(0, (len(weight.inner), -1))
    return F.linear(x, weight.base) + (parts @ weight.inner.mT @ weight.outer.mT).flatten(0, 1)


def head_sizes(x: Tensor, rows: int, gain: Tensor) -> tuple[int, int, int]:
    """Query heads, key/value heads and head size that x, the product's rows and the gain of `qkv_rope` imply."""
    count, size = len(gain), x.shape[1] // len(gain)
    return count, (rows // size - count) // 2, size


def offset_keys(k: Tensor, follows: Tensor) -> Tensor:
    """k (N, H, D) with the second half of each key from the token before, where `follows` (N,) says that there is one.

    What a query finds by it is the value of the token that came next: induction in one layer (modded-nanogpt PR #169).
    """
    own, shifted = k.chunk(2, dim=-1)
    return torch.cat([own, torch.where(follows.view(-1, 1, 1), shifted.roll(1, dims=0), shifted)], dim=-1)


def squared_leaky_relu(h: Tensor, beta: Tensor) -> Tensor:
    """h^2 above zero, beta h^2 below; beta (hidden,) per channel.

    beta = 0 is relu^2, slope^2 is LeakyReLU(slope)^2 (PR #493), a learned beta is ASQU (PR #1247).
    """
    return h.square() * torch.where(h > 0, 1.0, beta)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Logits squeezed into +-cap, in float32."""
    return cap * torch.tanh(logits.float() / cap)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 x cos.shape[-1] dimensions of x (B, T, heads, D) in half-split pairs; the rest passes."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


class PlainLayer:
    """The parts of a layer, in running order, and the loss, in plain operations: the definition of each."""

    def resid_mix_norm(self, x: Tensor, skip: WithProxy | None, x0: WithProxy, mix: Tensor, scale: float) -> Entered:
        """Rows of mix[0] x + mix[1] skip + mix[2] x0 for mix (3, C), the proxy of x, and x0 for the next layer.

        `scale` is the factor on the normalized rows. What comes back lets kernels chain the gradients of a tensor with
        several uses: whoever uses x once more (a skip) or x0 hands its gradient to the proxy.
        """
        new = mix[0] * x + mix[2] * x0[1]
        new = new if skip is None else new + mix[1] * skip[1]
        return Residual(new, rms_norm(new) * scale), x, x0

    def qkv_rope(
        self, rows: Residual, weight: Tensor, gain: Tensor, rotary: Tensor, extra: Tensor | None, follows: Tensor | None
    ) -> tuple[Tensor, ...]:
        """q (N, H, D), k and v (N, KV, D) for weight ((H + 2 KV) D, C) and gain (H,), and the proxy of v (N, KV, D).

        q and k are normalized per head and rotated, `rotary` as from `rotary_table`; `follows` offsets keys; `extra`
        (N, KV, D) is added to v. The kernels return k and v (N, H, D), a copy for every query head.
        """
        qkv = product(rows.proxy, weight)
        count, kv, size = head_sizes(rows.x, qkv.shape[1], gain)
        q, k, v = qkv.view(-1, rotary.shape[1], count + 2 * kv, size).split([count, kv, kv], dim=2)
        # One gain per head, expanded to one per token: its gradient becomes a sum over the head, which fuses with the
        # backward pass of the norm, and then one over tokens. Summed in one go it reads q and dq again (1.1 ms a step).
        q = apply_rotary(rms_norm(q), *rotary) * gain[:, None].expand(*q.shape[:3], 1)
        q, k, v = (t.flatten(0, 1) for t in (q, apply_rotary(rms_norm(k), *rotary), v))
        v = v if extra is None else v + extra
        return q, k if follows is None else offset_keys(k, follows), v, v

    def xsa(self, y: Tensor, v: Tensor, proxy: Tensor, gate: Tensor | None = None) -> Tensor:
        """Exclusive self-attention (PR #265): remove from y (N, H, D) what points along the token's own value.

        v (N, KV, D) serves H/KV neighbouring query heads; its gradient goes to `proxy`. The result is orthogonal to v,
        head by head; times `gate` (N, H). The kernel takes v (N, H, D) as `qkv_rope` copied it, and reads one copy.
        """
        grouped, own = y.unflatten(1, (v.shape[1], -1)).float(), proxy.unsqueeze(2).float()
        share = (grouped * own).sum(-1, keepdim=True) / (own * own).sum(-1, keepdim=True).clamp_min(1e-12)
        z = (grouped - share * own).flatten(1, 2)
        return (z if gate is None else z * gate.unsqueeze(-1)).to(y.dtype)

    def attn_proj(self, rows: Residual, z: Tensor, weight: Tensor, scale: float) -> Residual:
        """Rows of x plus the attention's output, z (N, C) times weight (C, C) transposed."""
        x = rows.x + product(z, weight)
        return Residual(x, rms_norm(x) * scale)

    def mlp(self, rows: Residual, up: Tensor, down: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """x plus squared_leaky_relu(normalized up^T) down^T, up (hidden, C), down (C, hidden); also the activations."""
        act = squared_leaky_relu(product(rows.proxy, up), beta)
        return rows.x + product(act, down), act

    def materialize_norm(self, rows: Residual) -> Tensor:
        """The normalized x of Residual, (N, C)."""
        return rows.proxy

    def nll(self, logits: Tensor, targets: Tensor, cap: float) -> Tensor:
        """Negative log-likelihood in nats, (N,) float32, of targets (N,) under logits (N, V) before their soft cap."""
        return F.cross_entropy(softcap(logits, cap), targets, reduction="none")


PLAIN_LAYER = PlainLayer()


def float64_device(device: torch.device) -> torch.device:
    """Where float64 arithmetic runs: on the device itself, but for mps, which has none, on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA; float32 elsewhere, where bfloat16 products are slow and tests want digits."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def rotary_table(length: int, cfg: Config, device: torch.device) -> Tensor:
    """Cosines and sines (2, length, 1, dims/2) of rotary embedding on the first ROPE_DIMS dimensions."""
    dims = cfg.rope_dims or cfg.head_dim
    stretch = max(length / cfg.train_seq_len, 1.0)  # NTK-aware: beyond the trained length the base grows
    base = cfg.rope_base * stretch ** (dims / max(dims - 2, 1))
    frequencies = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)[:, None, :]
    return torch.stack([angles.cos(), angles.sin()]).to(compute_dtype(device)).to(device)


# ----------------------------------------------------------------------------------------------
# 7. Kernels
# ----------------------------------------------------------------------------------------------
# The plain layer's function for Hopper GPUs, from fewer bytes, which bound a step (benchmarks/RESULTS.md).
#
# RMSNorm has no kernel. Its output r x, with r = scale / sqrt(mean(x^2) + eps) per token, is never written:
# a matmul reads x, and its epilogue multiplies by r, on tiles that are still in registers.
# Backward, let g be the gradient of x with r held fixed. The whole gradient is
#     dx = g - x (r^2 / (C scale^2)) <g, x>
# so that one kernel makes it from g and x, and adds the residual gradient in the same pass. Autograd needs a
# tensor that carries g to that kernel: the `proxy` of `Residual`, memory that holds no values. A second reader
# of x (a U-Net skip) or of x0 hands its gradient to such a proxy too: an operator cannot add to a gradient.
# The MLP needs no such pass: it is homogeneous of degree 2, so <g, x> is twice the sum of a token's activations
# times their gradients. The kernel that makes these sums it, and the matmul that makes g ends with dx.

TILE = (128, 256, 64)  # rows, columns, inner length of a product's tile; 8 warps, 3 stages: the best of 27 tried


def jit(function: Callable) -> Any:
    """triton.jit, without one more compilation for each kind of number that a count can be; nothing without Triton."""
    return triton.jit(function, do_not_specialize=["tokens", "length", "items"]) if triton else function


def persistent_grid(device: torch.device, blocks: int, per_processor: int = 1) -> tuple[int]:
    """Grid that walks over `blocks`; two programs on the CPU, so that tests see the walk and the partial sums."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
    return (min(blocks, per_processor * processors or 2),)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: int) -> None:
    """Run a kernel, if there is memory that it can work on."""
    if not any(isinstance(argument, FakeTensor) for argument in arguments):
        kernel[grid](*arguments, **options)


def launch_product(kernel: Any, a: Tensor, b: Tensor, halves: list[Tensor | None], *arguments: Any) -> None:
    """Run a kernel that walks over the tiles of a b^T; it takes `halves`, like these two, by the bulk copy engine."""
    if isinstance(a, FakeTensor):
        return
    rows, cols, inner = TILE
    blocks = [(a, [rows, inner]), (b, [cols, inner]), *((x, [rows, cols // 2]) for x in halves)]
    tiles = (x if x is None else TensorDescriptor.from_tensor(x, block) for x, block in blocks)
    grid = persistent_grid(a.device, triton.cdiv(len(a), rows) * triton.cdiv(len(b), cols))
    kernel[grid](*tiles, *arguments, len(a), a.shape[1], *TILE, num_warps=8, num_stages=3)


@jit
def tile_halves(a, b, row, column, inputs, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr):
    """The tile at (row, column) of a (rows, inputs) times b (columns, inputs) transposed, as two halves of columns that
    fit into shared memory. Kernels walk over tiles, so that the stores of one overlap the products of the next."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, inputs, INNER):
        total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
    return tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLS // 2)), (0, 2, 1)))


# The step of the residual stream into a layer
@jit
def resid_mix_norm_kernel(x, skip, x0, mix, new, factors, tokens, scale, EPS: tl.constexpr, WIDTH: tl.constexpr,
                          COLS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """The new x and r of ROWS rows; COLS is WIDTH rounded up to a power of two."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    at, live = row[:, None] * WIDTH + column, (row[:, None] < tokens) & (column < WIDTH)
    every = mix + column + 0 * row[:, None]  # whole tiles: a line would change its layout through shared memory
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    value *= tl.load(every, mask=live, other=0.0).to(tl.float32)
    first = tl.load(x0 + at, mask=live, other=0.0).to(tl.float32)
    value += first * tl.load(every + 2 * WIDTH, mask=live, other=0.0).to(tl.float32)
    if skip is not None:
        other = tl.load(skip + at, mask=live, other=0.0).to(tl.float32)
        value += other * tl.load(every + WIDTH, mask=live, other=0.0).to(tl.float32)
    rounded = value.to(new.dtype.element_ty)
    tl.store(new + at, rounded, mask=live)
    value = rounded.to(tl.float32)
    tl.store(factors + row, scale * tl.rsqrt(tl.sum(value * value, 1) / WIDTH + EPS), mask=row < tokens)


@jit
def resid_mix_norm_backward_kernel(x, skip, x0, mix, new, factors, dnew, dproxy, dkept, dnext, dx, dskip, dx0, sums,
                                   tokens, scale, WIDTH: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
                                   STAGES: tl.constexpr):  # fmt: skip
    """Gradients of x, skip and x0, walking over blocks of rows; sums (programs, 3, WIDTH) of mix's.

    The sums stay in registers, a tile each, and are added up over the tile's rows once, at the end of the walk.
    """
    column = tl.arange(0, COLS)[None, :]
    every = mix + column + 0 * tl.arange(0, ROWS)[:, None]
    within = column + 0 * tl.arange(0, ROWS)[:, None] < WIDTH
    keep = tl.load(every, mask=within, other=0.0).to(tl.float32)
    first = tl.load(every + 2 * WIDTH, mask=within, other=0.0).to(tl.float32)
    dkeep, dfirst = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    if skip is not None:
        other = tl.load(every + WIDTH, mask=within, other=0.0).to(tl.float32)
    dother = tl.zeros((ROWS, COLS), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        at, live = row[:, None] * WIDTH + column, (row[:, None] < tokens) & (column < WIDTH)
        g = tl.load(dproxy + at, mask=live, other=0.0).to(tl.float32)
        value = tl.load(new + at, mask=live, other=0.0).to(tl.float32)
        upstream = tl.load(dnew + at, mask=live, other=0.0).to(tl.float32)
        r = tl.load(factors + row, mask=row < tokens, other=0.0)
        shrink = r * r / (WIDTH * scale * scale) * tl.sum(g * value, 1)
        d = upstream + g - value * shrink[:, None]
        dkeep += d * tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        dfirst += d * tl.load(x0 + at, mask=live, other=0.0).to(tl.float32)
        begun = d * first
        if dnext is not None:
            begun += tl.load(dnext + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dx0 + at, begun.to(dx0.dtype.element_ty), mask=live)
        if skip is not None:
            dother += d * tl.load(skip + at, mask=live, other=0.0).to(tl.float32)
            tl.store(dskip + at, (d * other).to(dskip.dtype.element_ty), mask=live)
        d *= keep
        if dkept is not None:
            d += tl.load(dkept + at, mask=live, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=live)
    line, inside = sums + tl.program_id(0) * 3 * WIDTH + tl.arange(0, COLS), tl.arange(0, COLS) < WIDTH
    tl.store(line, tl.sum(dkeep, 0), mask=inside)
    tl.store(line + WIDTH, tl.sum(dother, 0), mask=inside)
    tl.store(line + 2 * WIDTH, tl.sum(dfirst, 0), mask=inside)


@operator
def resid_mix_norm(
    x: Tensor, skip: Tensor | None, skip_proxy: Tensor | None, x0: Tensor, x0_proxy: Tensor, mix: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The parts of Residual, and the proxies of x and x0; 5 activations are written and read where inductor's kernels
    take 6, backward 10 of 14."""
    (n, width), r = x.shape, x.new_empty(len(x), dtype=torch.float32)
    new, proxy, kept, following = (torch.empty_like(x) for _ in range(4))
    launch(resid_mix_norm_kernel, (triton.cdiv(n, 4),), x, skip, x0, mix, new, r, n, scale, NORM_EPS, width,
           triton.next_power_of_2(width), 4, num_warps=2, num_stages=2)  # fmt: skip
    return new, proxy, r, kept, following


@operator
def resid_mix_norm_backward(
    dnew: Tensor, dproxy: Tensor, dkept: Tensor | None, dnext: Tensor | None, new: Tensor, r: Tensor, mix: Tensor,
    x: Tensor, x0: Tensor, skip: Tensor | None, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, skip (empty without one) and x0, and each program's part of mix's, given those of the new x, of
    its proxy and, where they were used, of the proxies of x and x0."""
    (n, width), grid = new.shape, persistent_grid(new.device, triton.cdiv(len(new), 2), 8)
    dx, dx0, dskip = torch.empty_like(new), torch.empty_like(new), new.new_empty(0 if skip is None else new.shape)
    sums = new.new_empty((*grid, 3, width), dtype=torch.float32)
    launch(resid_mix_norm_backward_kernel, grid, x, skip, x0, mix, new, r, dnew, dproxy, dkept, dnext, dx, dskip,
           dx0, sums, n, scale, width, triton.next_power_of_2(width), 2, 2, num_warps=2)  # fmt: skip
    return [dx, dskip, dx0, sums]


def differentiate_resid_mix_norm(
    ctx: Any, dnew: Tensor | None, dproxy: Tensor | None, _: None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the proxies of skip and x0, and mix; `others` are those of the proxies."""
    new, _, mix, _, _, skip = saved = ctx.saved_tensors
    given = [torch.zeros_like(new) if d is None else d.contiguous() for d in (dnew, dproxy)]
    given += [d if d is None else d.contiguous() for d in others]
    dx, dskip, dx0, sums = resid_mix_norm_backward(*given, *saved, *ctx.numbers)
    return dx, None, None if skip is None else dskip, None, dx0, sums.sum(0).to(mix.dtype), None


differentiable(resid_mix_norm, differentiate_resid_mix_norm, lambda x, skip, _, x0, __, mix, scale, out: (
    out[0], out[2], mix, x, x0, skip, scale
))  # fmt: skip


# Queries, keys and values
@jit
def angles(rotary, place, tokens, length, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines (ROWS, 1, SIZE / 2 HALF, HALF) for rows `place`; 1 and 0 where nothing rotates. Loaded as a
    small tile, so that it takes on the layout of the large one and not the other way round."""
    at, live = (place % length * HALF)[:, None] + tl.arange(0, HALF)[None, :], place[:, None] < tokens
    cos = tl.load(rotary + at, mask=live, other=1.0).to(tl.float32)
    sin = tl.load(rotary + length * HALF + at, mask=live, other=0.0).to(tl.float32)
    turns = tl.arange(0, SIZE // (2 * HALF))[None, None, :, None] == 0
    return tl.where(turns, cos[:, None, None, :], 1.0), tl.where(turns, sin[:, None, None, :], 0.0)


@jit
def per_head(tile):
    """Sums (ROWS, HEADS, 1, 1) over a tile (ROWS, HEADS, blocks, HALF)."""
    return tl.sum(tl.sum(tile, 3), 2)[:, :, None, None]


@jit
def qkv_epilogue(value, r, gain, rotary, extra, follows, q, k, v, own, factors, row, column, tokens, length,
                 EPS: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr,
                 HALF: tl.constexpr):  # fmt: skip
    """Ending of a tile (ROWS, whole heads of one kind) of the product: normalize, rotate, gain or `extra`, store. The
    norm of a head cancels r but for eps, which becomes eps / r^2. With `follows` the second half of a key goes to the
    next row, if that follows, and stays where it begins a document; the backward pass finds them all in `own`."""
    ROWS: tl.constexpr = value.shape[0]
    GROUP: tl.constexpr = value.shape[1] // SIZE
    place, head = row + tl.arange(0, ROWS), column // SIZE + tl.arange(0, GROUP)
    is_value = column >= (HEADS + KV) * SIZE
    r = tl.load(r + place, mask=place < tokens, other=1.0)[:, None, None, None]
    pairs = tl.reshape(value, (ROWS, GROUP, SIZE // (2 * HALF), 2, HALF))
    a, b = tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))
    factor = tl.rsqrt(per_head(a * a + b * b) / SIZE + EPS / (r * r))
    normed = (place[:, None] < tokens) & (head[None, :] < HEADS + KV)
    tl.store(factors + place[:, None] * (HEADS + KV) + head[None, :], tl.reshape(factor, (ROWS, GROUP)), mask=normed)
    gains = tl.load(gain + head, mask=head < HEADS, other=1.0).to(tl.float32)[None, :, None, None]
    factor = tl.where(is_value, r, factor * gains)
    until = tl.where(is_value, 0, tokens)  # nothing rotates in v
    cos, sin = angles(rotary, place, until, length, SIZE, HALF)
    a, b = a * factor, b * factor
    both = tl.permute(tl.join(a * cos + b * sin, b * cos - a * sin), (0, 1, 2, 4, 3))
    value = tl.reshape(both, (ROWS, GROUP * SIZE))
    if extra is not None:
        at = place[:, None] * (KV * SIZE) + column - (HEADS + KV) * SIZE + tl.arange(0, GROUP * SIZE)[None, :]
        value += tl.load(extra + at, mask=is_value & (place[:, None] < tokens), other=0.0).to(tl.float32)
    # Selected, not branched: Triton 3.6 cannot flatten a loop with a branch in it.
    is_query = column < HEADS * SIZE
    out = tl.where(is_query, q, tl.where(is_value, v, k))
    column -= tl.where(is_query, 0, tl.where(is_value, HEADS + KV, HEADS) * SIZE)
    channel = column + tl.arange(0, GROUP * SIZE)[None, :]
    apart = tl.where(is_query, 1, HEADS // KV) * SIZE
    at = place[:, None] * (HEADS * SIZE) + channel // SIZE * apart + channel % SIZE
    rounded, stays = value.to(out.dtype.element_ty), place[:, None] < tokens
    if follows is not None:
        is_key = ~is_query & ~is_value
        begins = tl.load(follows + place, mask=(place < tokens) & is_key, other=1) == 0
        moves = tl.load(follows + place + 1, mask=(place + 1 < tokens) & is_key, other=0) != 0
        late = (channel % SIZE >= SIZE // 2) & is_key
        kept = place[:, None] * (KV * SIZE // 2) + channel // SIZE * (SIZE // 2) + channel % (SIZE // 2)
        tl.store(own + kept, rounded, mask=late & (place[:, None] < tokens))
        for copy in tl.static_range(HEADS // KV):
            tl.store(out + at + (HEADS + copy) * SIZE, rounded, mask=late & moves[:, None])
        stays &= begins[:, None] | ~late
    tl.store(out + at, rounded, mask=stays)
    for copy in tl.static_range(1, HEADS // KV):
        tl.store(out + at + copy * SIZE, rounded, mask=stays & ~is_query)


@jit
def qkv_kernel(x, weight, r, gain, rotary, extra, follows, q, k, v, own, factors, length, EPS: tl.constexpr,
               HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, tokens, width,
               ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr):  # fmt: skip
    """The product x weight^T, each tile ended by `qkv_epilogue` in two halves; x is (tokens, width)."""
    across: tl.constexpr = (HEADS + 2 * KV) * SIZE // COLS
    for tile in tl.range(tl.program_id(0), across * tl.cdiv(tokens, ROWS), tl.num_programs(0), flatten=True):
        row, column = tile // across * ROWS, tile % across * COLS
        halves = tile_halves(x, weight, row, column, width, ROWS, COLS, INNER)
        for half in tl.static_range(2):
            qkv_epilogue(halves[half], r, gain, rotary, extra, follows, q, k, v, own, factors, row,
                         column + half * COLS // 2, tokens, length, EPS, HEADS, KV, SIZE, HALF)  # fmt: skip


@jit
def sum_copies(dout, at, live, COPIES: tl.constexpr, SIZE: tl.constexpr):
    """The gradients of a head's copies added up."""
    total = tl.load(dout + at, mask=live, other=0.0).to(tl.float32)
    for copy in tl.static_range(1, COPIES):
        total += tl.load(dout + at + copy * SIZE, mask=live, other=0.0).to(tl.float32)
    return total


@jit
def undo_offset(final, own, follows, dout, at, kept, late, row, tokens, COPIES: tl.constexpr, STRIDE: tl.constexpr,
                SIZE: tl.constexpr):  # fmt: skip
    """Values before, and gradients of all copies: of the next row where `late`, if that `follows`."""
    live = row < tokens
    if follows is None:
        value, gradient = tl.load(final + at, mask=live, other=0.0), sum_copies(dout, at, live, COPIES, SIZE)
    else:
        begins = tl.load(follows + row, mask=live, other=1) == 0
        moves = tl.load(follows + row + 1, mask=row + 1 < tokens, other=0) != 0
        gradient = sum_copies(dout, at, live & (begins | ~late), COPIES, SIZE)
        gradient += sum_copies(dout, at + STRIDE, late & moves, COPIES, SIZE)
        value = tl.load(final + at, mask=live & ~late, other=0.0) + tl.load(own + kept, mask=live & late, other=0.0)
    return value.to(tl.float32), gradient


@jit
def qkv_backward_heads(final, own, follows, factors, dout, du, gain, cos, sin, row, tokens, FIRST: tl.constexpr,
                       HEADS: tl.constexpr, COPIES: tl.constexpr, NORMED: tl.constexpr, WIDTH: tl.constexpr,
                       SIZE: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Store the gradient of HEADS heads of the product from FIRST on; returns <gradient, normalized> per head. The
    normalized heads are made from what became of them: turned back, over the gain (whose own gradient is lost where it
    is exactly 0), which the queries have, the first ones. Both halves of a pair are loaded as vectors into the same
    place of two tiles, so that no thread needs another's values."""
    GAIN: tl.constexpr = FIRST == 0
    head, block = tl.arange(0, HEADS)[None, :, None, None], tl.arange(0, SIZE // (2 * HALF))[None, None, :, None]
    channel, live = block * (2 * HALF) + tl.arange(0, HALF)[None, None, None, :], row < tokens
    STRIDE: tl.constexpr = HEADS * COPIES * SIZE
    source, target = row * WIDTH + (FIRST + head) * SIZE + channel, row * STRIDE + head * (COPIES * SIZE) + channel
    kept = (row * HEADS + head - 1) * (SIZE // 2) + channel
    a, da = undo_offset(final, own, follows, dout, target, kept, channel >= SIZE // 2, row, tokens, COPIES, STRIDE,
                        SIZE)
    b, db = undo_offset(final, own, follows, dout, target + HALF, kept + HALF, channel + HALF >= SIZE // 2, row, tokens,
                        COPIES, STRIDE, SIZE)  # fmt: skip
    factor = tl.load(factors + row * NORMED + FIRST + head, mask=live, other=0.0)
    turned = cos * cos + sin * sin  # 1 but for the table's rounding
    if GAIN:
        gains = tl.load(gain + head).to(tl.float32)
        turned *= tl.where(gains == 0, float("inf"), gains)
    a, b, da, db = (a * cos - b * sin) / turned, (a * sin + b * cos) / turned, da * cos - db * sin, da * sin + db * cos
    inner = per_head(a * da + b * db)
    if GAIN:
        factor *= gains
    tl.store(du + source, (factor * (da - a * (inner / SIZE))).to(du.dtype.element_ty), mask=live)
    tl.store(du + source + HALF, (factor * (db - b * (inner / SIZE))).to(du.dtype.element_ty), mask=live)
    return inner


@jit
def qkv_backward_kernel(q, k, own, follows, factors, r, gain, rotary, dq, dk, dv, dproxy, du, dextra, sums, tokens,
                        length, ROWS: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, SIZE: tl.constexpr,
                        HALF: tl.constexpr):  # fmt: skip
    """The whole gradient of the product, walking over blocks of ROWS rows; sums (programs, HEADS) of the gain's."""
    NORMED: tl.constexpr = HEADS + KV
    WIDTH: tl.constexpr = (HEADS + 2 * KV) * SIZE
    COPIES: tl.constexpr = HEADS // KV
    gains = tl.zeros((ROWS, HEADS, 1, 1), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        place = block * ROWS + tl.arange(0, ROWS)
        row, flat = place[:, None, None, None], place[:, None]
        cos, sin = angles(rotary, place, tokens, length, SIZE, HALF)
        gains += qkv_backward_heads(q, None, None, factors, dq, du, gain, cos, sin, row, tokens, 0, HEADS, 1, NORMED,
                                    WIDTH, SIZE, HALF)
        qkv_backward_heads(k, own, follows, factors, dk, du, gain, cos, sin, row, tokens, HEADS, KV, COPIES, NORMED,
                           WIDTH, SIZE, HALF)  # fmt: skip
        channel = tl.arange(0, KV * SIZE)[None, :]
        live = (flat < tokens) & (channel < KV * SIZE)
        first = flat * (HEADS * SIZE) + channel // SIZE * (COPIES * SIZE) + channel % SIZE
        value = sum_copies(dv, first, live, COPIES, SIZE)
        if dproxy is not None:
            value += tl.load(dproxy + flat * (KV * SIZE) + channel, mask=live, other=0.0).to(tl.float32)
        if dextra is not None:
            tl.store(dextra + flat * (KV * SIZE) + channel, value.to(dextra.dtype.element_ty), mask=live)
        value *= tl.load(r + flat, mask=flat < tokens, other=1.0)
        tl.store(du + flat * WIDTH + NORMED * SIZE + channel, value.to(du.dtype.element_ty), mask=live)
    total = tl.sum(tl.reshape(gains, (ROWS, HEADS)), 0)
    tl.store(sums + tl.program_id(0) * HEADS + tl.arange(0, HEADS), total)


def qkv_rope_fits(heads: int, kv: int, size: int, half: int) -> bool:
    """Whether the kernel can: powers of two, and half a tile of the product holds heads of one kind only."""
    fills = kv * size % (TILE[1] // 2) == 0 and (heads + 2 * kv) * size % TILE[1] == 0
    return fills and all(n & (n - 1) == 0 for n in (heads, kv, size, half))


@operator
def qkv_rope(x: Tensor, proxy: Tensor, r: Tensor, weight: Tensor, gain: Tensor, rotary: Tensor, extra: Tensor | None,
             follows: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v, v's proxy, the factors of the norms (N, H + KV), and with `follows` the second halves of the keys as
    they were (N, KV, D / 2). Attention adds up the gradients of shared keys and values in float32, in memory: filling
    it, adding and rounding cost more than writing copies here and adding up their gradients in the backward pass."""
    n, (count, kv, size) = len(x), head_sizes(x, len(weight), gain)
    q, k, v, v_proxy = (x.new_empty((n, copies, size)) for copies in (count, count, count, kv))
    factors = x.new_empty((n, count + kv), dtype=torch.float32)
    own = x.new_empty(0 if follows is None else (n, kv, size // 2))
    launch_product(qkv_kernel, x, weight, [], r, gain, rotary, extra, follows, q, k, v, own, factors,
                   rotary.shape[1], NORM_EPS, count, kv, size, rotary.shape[-1])  # fmt: skip
    return q, k, v, v_proxy, factors, own


@operator
def qkv_rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, dproxy: Tensor | None, factors: Tensor, r: Tensor,
                      gain: Tensor, rotary: Tensor, q: Tensor, k: Tensor, own: Tensor | None, follows: Tensor | None,
                      has_extra: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of the product, each program's part of the gain's, and that of `extra` (empty where there is none),
    given those of q, k, v and, where something used it, of v's proxy."""
    (n, count, size), kv = dq.shape, factors.shape[1] - dq.shape[1]
    grid = persistent_grid(dq.device, triton.cdiv(n, 4), 6)
    du, dextra = dq.new_empty((n, (count + 2 * kv) * size)), dq.new_empty((n, kv, size) if has_extra else 0)
    sums = dq.new_empty((*grid, count), dtype=torch.float32)
    launch(qkv_backward_kernel, grid, q, k, own, follows, factors, r, gain, rotary, dq, dk, dv, dproxy, du,
           dextra if has_extra else None, sums, n, rotary.shape[1], 4, count, kv, size, rotary.shape[-1], num_warps=4,
           num_stages=2)  # fmt: skip
    return du, sums, dextra


def differentiate_qkv_rope(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the proxy, the weight, the gain and `extra`."""
    (x, weight, _, _, gain, *_), (has_extra,) = ctx.saved_tensors, ctx.numbers
    given = [d if d is None else d.contiguous() for d in upstream[:4]]
    du, sums, dextra = qkv_rope_backward(*given, *ctx.saved_tensors[2:], has_extra)
    dgain = sums.sum(0).to(gain.dtype)
    return None, du @ weight, None, du.T @ x, dgain, None, dextra if has_extra else None, None


differentiable(qkv_rope, differentiate_qkv_rope, lambda x, _, r, weight, gain, rotary, extra, follows, out: (
    x, weight, out[4], r, gain, rotary, out[0], out[1], None if follows is None else out[5], follows, extra is not None
))  # fmt: skip


# Exclusive self-attention
@jit
def xsa_kernel(y, v, gate, dz, out, dv, dgate, items, GROUP: tl.constexpr, COPIES: tl.constexpr,
               SIZE: tl.constexpr, COLS: tl.constexpr, ITEMS: tl.constexpr):  # fmt: skip
    """ITEMS pairs of token and key/value head with their GROUP query heads: z, or dy, their sum of dv, and dgate."""
    item, d = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)[:, None], tl.arange(0, COLS)[None, :]
    live = (item < items) & (d < SIZE)
    own = tl.load(v + item * (COPIES * SIZE) + d, mask=live, other=0.0).to(tl.float32)
    power = tl.sum(own * own, 1)[:, None]
    inverse = 1.0 / tl.maximum(power, 1e-12)
    total = tl.zeros((ITEMS, COLS), tl.float32)
    for head in tl.static_range(GROUP):
        at = (item * GROUP + head) * SIZE + d
        value = tl.load(y + at, mask=live, other=0.0).to(tl.float32)
        share = tl.sum(value * own, 1)[:, None] * inverse
        if gate is not None:
            factor = tl.load(gate + item * GROUP + head, mask=item < items, other=0.0).to(tl.float32)
        if dz is not None:
            upstream = tl.load(dz + at, mask=live, other=0.0).to(tl.float32)
            if gate is not None:
                change = tl.sum(upstream * (value - share * own), 1)[:, None]
                tl.store(dgate + item * GROUP + head, change.to(dgate.dtype.element_ty), mask=item < items)
                upstream *= factor
            along = tl.sum(upstream * own, 1)[:, None] * inverse
            tl.store(out + at, (upstream - along * own).to(out.dtype.element_ty), mask=live)
            total -= share * upstream + along * value - tl.where(power > 1e-12, 2 * along * share, 0.0) * own
        else:
            value -= share * own
            if gate is not None:
                value *= factor
            tl.store(out + at, value.to(out.dtype.element_ty), mask=live)
    if dz is not None:
        tl.store(dv + item * SIZE + d, total.to(dv.dtype.element_ty), mask=live)


@operator
def xsa(y: Tensor, v: Tensor, gate: Tensor | None, proxy: Tensor | None, dz: Tensor | None,
        kv: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """z of `PlainLayer.xsa`; given its gradient, those of y, of the proxy of v, which has `kv` heads (so
    `qkv_rope_backward` adds it to the attention's), and of the gate."""
    y, v, gate, dz = (tensor if tensor is None else tensor.contiguous() for tensor in (y, v, gate, dz))
    n, heads, size = y.shape
    out, dv = torch.empty_like(y), v.new_empty(0 if dz is None else (n, kv, size))
    dgate = y.new_empty(0 if gate is None or dz is None else gate.shape)
    launch(xsa_kernel, (triton.cdiv(n * kv, 32),), y, v, gate, dz, out, dv, dgate, n * kv, heads // kv,
           v.shape[1] // kv, size, triton.next_power_of_2(size), 32, num_warps=4)  # fmt: skip
    return out, dv, dgate


def differentiate_xsa(ctx: Any, dz: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients of y, the gate and the proxy of v."""
    y, v, gate = ctx.saved_tensors
    dy, dv, dgate = xsa(y, v, gate, None, dz, *ctx.numbers)
    return dy, None, None if gate is None else dgate, dv, None, None


differentiable(xsa, differentiate_xsa, lambda y, v, gate, _, __, kv, out: (y, v, gate, kv))


# Products that end in sums
@jit
def matmul_add_kernel(a, b, x, new, along, squares, shrink, width, tokens, inputs, ROWS: tl.constexpr,
                      COLS: tl.constexpr, INNER: tl.constexpr):  # fmt: skip
    """x + a b^T for a (tokens, inputs) and b (width, inputs), with `along` less `shrink` times its rows; with `squares`
    each row's sum of squares over half a tile's columns too."""
    across = tl.cdiv(width, COLS)
    for tile in tl.range(tl.program_id(0), across * tl.cdiv(tokens, ROWS), tl.num_programs(0), flatten=True):
        row, begin = tile // across * ROWS, tile % across * COLS
        halves = tile_halves(a, b, row, begin, inputs, ROWS, COLS, INNER)
        for half in tl.static_range(2):
            place, column = row + tl.arange(0, ROWS), begin + half * COLS // 2
            value = halves[half] + x.load([row, column]).to(tl.float32)
            if along is not None:
                factor = tl.load(shrink + place, mask=place < tokens, other=0.0)[:, None]
                value -= factor * along.load([row, column]).to(tl.float32)
            rounded = value.to(new.dtype)
            new.store([row, column], rounded)
            if squares is not None:
                total, piece = rounded.to(tl.float32), column // (COLS // 2)
                tl.store(squares + piece * tokens + place, tl.sum(total * total, 1), mask=place < tokens)


def pieces(x: Tensor, width: int) -> Tensor:
    """Memory for a number per row of x and half tile of `width` columns, (pieces, N)."""
    return x.new_empty((2 * triton.cdiv(width, TILE[1]), len(x)), dtype=torch.float32)


@operator
def sum_product(x: Tensor, z: Tensor, weight: Tensor, along: Tensor | None, shrink: Tensor | None,
                has_squares: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + z weight^T for weight (C, inputs), less `shrink` (N,) times the rows of `along` (N, C), the product never
    being written by itself; and where they are wanted the sums of squares (pieces, N) of its rows."""
    new, squares = torch.empty_like(x), pieces(x, x.shape[1] if has_squares else 0)
    launch_product(matmul_add_kernel, z, weight, [x, new, along], squares if has_squares else None, shrink, len(weight))
    return new, squares


differentiable(
    sum_product, lambda ctx, dx, _: (dx, dx @ ctx.saved_tensors[1], dx.T @ ctx.saved_tensors[0], None, None, None),
    lambda x, z, weight, *_: (z, weight),
)  # fmt: skip


# Feed-forward
@jit
def mlp_kernel(a, b, act, out, r, low, products, sums, hidden, tokens, inputs, ROWS: tl.constexpr,
               COLS: tl.constexpr, INNER: tl.constexpr):  # fmt: skip
    """Of value = a b^T, a (tokens, inputs) and b (hidden, inputs): without `act` the activations h^2 of h = r value,
    times `low` below zero. With them backward: r times the gradient of h, which is 2 sqrt(act) above zero and `low`
    sqrt(|act|) below, and each row's sum of value times act over half a tile's columns; with `sums` each column's too,
    over a tile's rows where h was below zero.

    h is not kept: the lowest bit of an activation says whether it was below zero. The activation is rounded to the
    nearest number with that bit, so it has 7 of bfloat16's 8 digits: a relative error of 0.0033, against 0.0037 of
    rounding h, to keep it, and then its square.
    """
    SIGN: tl.constexpr = 0x10000 if out.dtype == tl.bfloat16 else 1  # that bit, in float32
    across = tl.cdiv(hidden, COLS)
    for tile in tl.range(tl.program_id(0), across * tl.cdiv(tokens, ROWS), tl.num_programs(0), flatten=True):
        row, begin = tile // across * ROWS, tile % across * COLS
        halves = tile_halves(a, b, row, begin, inputs, ROWS, COLS, INNER)
        for half in tl.static_range(2):
            value, place, column = halves[half], row + tl.arange(0, ROWS), begin + half * COLS // 2
            channel = column + tl.arange(0, COLS // 2)
            slope_below = tl.load(low + channel, mask=channel < hidden, other=0.0).to(tl.float32)[None, :]
            h = value * tl.load(r + place, mask=place < tokens, other=0.0)[:, None]
            if act is None:
                below = (h >= 0) == 0  # not a number counts, or adding to its bits would make it one
                bits = (h * h * tl.where(below, slope_below, 1.0)).to(tl.uint32, bitcast=True)
                bits = (bits + tl.where(below, 0, SIGN)) & (0x100000000 - 2 * SIGN) | tl.where(below, SIGN, 0)
                result = bits.to(tl.float32, bitcast=True)
            else:
                kept = act.load([row, column]).to(tl.float32)
                below, line = kept.to(tl.uint32, bitcast=True) & SIGN != 0, products + column // (COLS // 2) * tokens
                result = h * (tl.where(below, slope_below, 2.0) * tl.sqrt(tl.abs(kept)))
                tl.store(line + place, tl.sum(value * kept, 1), mask=place < tokens)
            if sums is not None:
                total = tl.sum(tl.where(below, value * kept, 0.0), 0)
                tl.store(sums + row // ROWS * hidden + channel, total, mask=channel < hidden)
            out.store([row, column], result.to(out.dtype))


@operator
def unit_product(a: Tensor, b: Tensor, r: Tensor, low: Tensor, act: Tensor | None,
                 has_sums: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The activations (N, hidden) of r a b^T; or, with `act` and their gradient a b^T, r times that of what they were
    made of, and sums of act times gradient: of rows (pieces, N), and where wanted of columns below zero (_, hidden)."""
    out, products = a.new_empty((len(a), len(b))), pieces(a, 0 if act is None else len(b))
    sums = a.new_empty((triton.cdiv(len(a), TILE[0]) * has_sums, len(b)), dtype=torch.float32)
    launch_product(mlp_kernel, a, b, [act, out], r, low, products, sums if has_sums else None, len(b))
    return out, products, sums


@operator
def mlp(x: Tensor, r: Tensor, up: Tensor, down: Tensor, beta: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The new x and the activations: these and the sum are made inside the products (as in PR #1530)."""
    act = unit_product(x, up, r, beta, None, False)[0]
    return sum_product(x, act, down, None, None, False)[0], act


def differentiate_mlp(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    """Gradients of x, up, down and beta."""
    (x, r, up, down, beta, act), (scale,) = ctx.saved_tensors, ctx.numbers
    beta_grad, low = ctx.needs_input_grad[4], -2 * beta.sign() * beta.abs().float().sqrt()
    dpre, products, sums = unit_product(dy.contiguous(), down.T.contiguous(), r, low, act, beta_grad)
    shrink = products.sum(0) * r.square() * (2 / (x.shape[1] * scale**2))
    dx, _ = sum_product(dy.contiguous(), dpre, up.T.contiguous(), x, shrink, False)
    dbeta = (sums.sum(0) / beta).to(beta.dtype) if beta_grad else None
    return dx, None, dpre.T @ x, dy.T @ act, dbeta, None


differentiable(mlp, differentiate_mlp, lambda *inputs: (*inputs[:5], inputs[-1][1], inputs[5]))


class MaterializeNorm(torch.autograd.Function):
    """The normalized row that is otherwise never written, for gates and observers; its gradient goes to the proxy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, proxy: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(r)
        always = torch.ones((), dtype=torch.bool, device=x.device)  # torch 2.11 compiles no gradient of an unused proxy
        return torch.where(always, (x * r.unsqueeze(-1)).to(x.dtype), proxy)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        return None, (dy * ctx.saved_tensors[0].unsqueeze(-1)).to(dy.dtype), None


# The loss
@jit
def capped(logits, at, live, cap):
    """Capped logits at `at` in bits (nats times log2 e), and a quarter of the cap's slope there. With
    q = 1 / (exp(2x) + 1), tanh(x) is 1 - 2q, its slope 4(q - q^2); a squared rsqrt is cheaper than a division."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    root = tl.rsqrt(tl.exp2(tl.load(logits + at, mask=live, other=0.0).to(tl.float32) * (2 * LOG2_E / cap)) + 1)
    q = root * root
    return LOG2_E * cap - 2 * LOG2_E * cap * q, q - q * q


@jit
def softcap_ce_kernel(logits, targets, nll, logs, tokens, cap, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                      COLS: tl.constexpr):  # fmt: skip
    """The loss of ROWS rows, and the binary logarithms of their sums of exponentials, COLS columns at a time."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest, total = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    for begin in range(0, WIDTH, COLS):
        column = begin + tl.arange(0, COLS)[None, :]
        bits, _ = capped(logits, row[:, None] * WIDTH + column, (row[:, None] < tokens) & (column < WIDTH), cap)
        bits = tl.where(column < WIDTH, bits, -float("inf"))
        peak = tl.maximum(largest, tl.max(bits, 1))
        total = total * tl.exp2(largest - peak) + tl.sum(tl.exp2(bits - peak[:, None]), 1)
        largest = peak
    log, target = largest + tl.log2(total), tl.load(targets + row, mask=row < tokens, other=0)
    bits, _ = capped(logits, row * WIDTH + target, row < tokens, cap)
    tl.store(nll + row, (log - bits) * 0.6931471805599453, mask=row < tokens)
    tl.store(logs + row, log, mask=row < tokens)


@jit
def softcap_ce_backward_kernel(logits, targets, logs, dnll, dlogits, tokens, cap, WIDTH: tl.constexpr,
                               ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """The gradient of ROWS rows and COLS columns of the logits before their cap."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, inside = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :], row < tokens
    at, live = row[:, None] * WIDTH + column, inside[:, None] & (column < WIDTH)
    target, log = tl.load(targets + row, mask=inside, other=0), tl.load(logs + row, mask=inside, other=0.0)
    upstream = 4 * tl.load(dnll + row, mask=inside, other=0.0)
    bits, slope = capped(logits, at, live, cap)
    d = tl.exp2(bits - log[:, None]) - tl.where(column == target[:, None], 1.0, 0.0)
    tl.store(dlogits + at, (d * slope * upstream[:, None]).to(dlogits.dtype.element_ty), mask=live)


@operator
def nll(logits: Tensor, targets: Tensor, logs: Tensor | None, dnll: Tensor | None, cap: float) -> tuple[Tensor, Tensor]:
    """`PlainLayer.nll`, and the binary logarithm of each row's sum of exponentials, (N,): all that is kept, so that the
    logits are read once. Given these logarithms and the gradient of the loss, that of the logits."""
    n, width = logits.shape
    cols = min(triton.next_power_of_2(width), 4096)
    sizes = n, cap, width, 4096 // cols, cols  # the last two: rows and columns that a program holds in registers
    if dnll is None:
        loss, logs = (logits.new_empty(n, dtype=torch.float32) for _ in range(2))
        launch(softcap_ce_kernel, (triton.cdiv(n, 4096 // cols),), logits, targets, loss, logs, *sizes, num_warps=4)
        return loss, logs
    dlogits, grid = torch.empty_like(logits), (triton.cdiv(n, 4096 // cols), triton.cdiv(width, cols))
    launch(softcap_ce_backward_kernel, grid, logits, targets, logs, dnll.contiguous(), dlogits, *sizes, num_warps=4)
    return dlogits, logits.new_empty(0)


differentiable(
    nll, lambda ctx, dnll, _: (nll(*ctx.saved_tensors, dnll, *ctx.numbers)[0], *[None] * 4),
    lambda logits, targets, _, __, cap, out: (logits, targets, out[1], cap),
)  # fmt: skip


class TritonLayer(PlainLayer):
    """The parts of a layer as kernels."""

    def __init__(self) -> None:
        if triton is None:
            raise ImportError("Triton with tensor descriptors (3.4 or later) is not installed")
        if torch.cuda.is_available() and not is_hopper(torch.device("cuda")):
            raise NotImplementedError("for Hopper GPUs and later: older ones have no room for the tiles")

    def resid_mix_norm(self, x: Tensor, skip: WithProxy | None, x0: WithProxy, mix: Tensor, scale: float) -> Entered:
        x_new, proxy, r, kept, following = resid_mix_norm(x, *(skip or (None, None)), *x0, mix, scale)
        return Residual(x_new, proxy, r, scale), kept, (x0[0], following)

    def qkv_rope(
        self, rows: Residual, weight: Tensor, gain: Tensor, rotary: Tensor, extra: Tensor | None, follows: Tensor | None
    ) -> tuple[Tensor, ...]:
        """In the ending of the product; in plain steps for heads that do not fill its tiles."""
        if qkv_rope_fits(*head_sizes(rows.x, len(weight), gain), rotary.shape[-1]):
            return qkv_rope(*rows[:3], weight, gain, rotary, extra, follows)[:4]
        return super().qkv_rope(Residual(rows.x, self.materialize_norm(rows)), weight, gain, rotary, extra, follows)

    def xsa(self, y: Tensor, v: Tensor, proxy: Tensor, gate: Tensor | None = None) -> Tensor:
        return xsa(y, v, gate, proxy, None, proxy.shape[1])[0]

    def attn_proj(self, rows: Residual, z: Tensor, weight: Tensor, scale: float) -> Residual:
        x, squares = sum_product(rows.x, z.contiguous(), weight, None, None, True)
        r = scale * torch.rsqrt(squares.detach().sum(0) / x.shape[1] + NORM_EPS)
        return Residual(x, None, r, scale)

    def mlp(self, rows: Residual, up: Tensor, down: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        beta = beta + (beta == 0) * 1e-20  # as good as 0, and the gradient can be told from the activations
        return mlp(rows.x, rows.r, up, down, beta, rows.scale)

    def materialize_norm(self, rows: Residual) -> Tensor:
        return rms_norm(rows.x) * rows.scale if rows.proxy is None else MaterializeNorm.apply(*rows[:3])

    def nll(self, logits: Tensor, targets: Tensor, cap: float) -> Tensor:
        return nll(logits.contiguous(), targets.contiguous(), None, None, cap)[0]


# ----------------------------------------------------------------------------------------------
# 8. Back ends
# ----------------------------------------------------------------------------------------------
# Which attention and which layer a run takes: the first that computes the right values and gradients here.

ALLOWED_ERROR = 4.0  # of a back end, in errors of the plain definition in the same precision
LAYER: dict[str, Callable[[], PlainLayer]] = {"triton": TritonLayer, "plain": lambda: PLAIN_LAYER}


def relative_errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """||got - want|| / ||want|| of each pair of tensors; NaN counts as infinite."""
    pairs = [(g.detach().to("cpu", torch.float64), w.detach()) for g, w in zip(got, want, strict=True)]
    return [float(((g - w).norm() / w.norm()).nan_to_num(nan=math.inf)) for g, w in pairs]


Errors = tuple[float, float]  # a relative error, and how large it may be


def fault(error: float, allowed: float) -> str:
    """What is wrong with a relative error; nothing where it is allowed."""
    return "" if error <= allowed < math.inf else f"wrong by {error:.1e}, {allowed:.1e} allowed"


def probe(function: Callable, plain: Callable, shapes: list[tuple[int, ...]], device: torch.device) -> Errors:
    """Of the output of `function` on random tensors or the gradient that comes out worst, against `plain` in float64.

    Allowed is ALLOWED_ERROR times the error of `plain` in the same precision, which grows with the length of the sums
    as that of any back end. A gradient of a few numbers may be right by luck: none is held to less than the median.
    """
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]

    def run(function: Callable, dtype: torch.dtype, where: torch.device) -> list[Tensor]:
        inputs = [value.detach().clone().to(where, dtype).requires_grad_() for value in values]
        y = function(*inputs)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(where, dtype))
        return [y, *(i.grad for i in inputs)]

    want = run(plain, torch.float64, torch.device("cpu"))
    usual, errors = (relative_errors(run(f, compute_dtype(device), device), want) for f in (plain, function))
    allowed = [ALLOWED_ERROR * max(error, statistics.median(usual)) for error in usual]
    return max(zip(errors, allowed, strict=True), key=lambda pair: pair[0] - pair[1])


def probe_attention(attend: Attention, cfg: Config, device: torch.device) -> Errors:
    """`probe` of an attention back end; with DOC_ATTENTION there are three documents in a row of tokens."""
    shapes = [(2, 128, heads, cfg.head_dim) for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)]
    documents = torch.arange(128).div(50, rounding_mode="floor").expand(2, 128)

    def masked(attend: Attention, *qkv: Tensor) -> Tensor:
        return attend(*qkv, attend.mask(documents.to(qkv[0].device)) if cfg.doc_attention else None)

    return probe(partial(masked, attend), partial(masked, PLAIN_ATTENTION), shapes, device)


def check_layer(parts: PlainLayer, cfg: Config, device: torch.device) -> Errors:
    """`probe` of a layer, every input's gradient included, of its output as the next layer's skip, and of the loss."""
    dim, hidden, kv, length = cfg.model_dim, cfg.hidden_dim, cfg.num_kv_heads * cfg.head_dim, 80
    matrices = [(dim + 2 * kv, dim), (dim, dim), (hidden, dim), (dim, hidden)]
    vectors = [(3, dim), (cfg.num_heads,), (hidden,)]

    def layer(parts: PlainLayer, x: Tensor, x0: Tensor, extra: Tensor, *rest: Tensor) -> Tensor:
        qkv, out, up, down = (w * w.shape[1] ** -0.5 for w in rest[:4])
        (mix, gain, beta), rotary = rest[4:], rotary_table(length, cfg, x.device).to(x.dtype)
        rows, kept, first = parts.resid_mix_norm(x, (x0, x0), (x0, x0), mix, 0.5)
        follows = torch.arange(len(x), device=x.device) % 50 > 0 if cfg.key_offset else None
        q, k, v, proxy = parts.qkv_rope(rows, qkv, gain, rotary, extra.unflatten(1, (-1, cfg.head_dim)), follows)
        y = PLAIN_ATTENTION(*(t.unflatten(0, (-1, length)) for t in (q, k, v))).flatten(0, 1)
        z = parts.xsa(y, v, proxy).flatten(1)
        y = parts.mlp(parts.attn_proj(rows, z, out, 0.5), up, down, beta)[0]
        y = parts.materialize_norm(parts.resid_mix_norm(y, (x, kept), first, mix, 0.5)[0])
        return torch.cat([y.flatten(), parts.nll(2 * y, torch.arange(len(y), device=y.device) % dim, 3.0).to(y.dtype)])

    shapes = [(2 * length, dim)] * 2 + [(2 * length, kv)] + matrices + vectors
    return probe(partial(layer, parts), partial(layer, PLAIN_LAYER), shapes, device)


class BackEnds(NamedTuple):
    """Interchangeable implementations of one function: variable, name -> maker in order of preference, and probe."""

    variable: str
    factories: dict[str, Callable[[], Callable]]
    without_cuda: tuple[str, ...]  # those that `auto` may take where there is no CUDA
    probe: Callable[[Callable, Config, torch.device], Errors]
    prices: dict[str, str]  # by how much a step is longer than by the best, where it is (H100, benchmarks/RESULTS.md)


LAYER_BACK_ENDS = BackEnds("LAYER_BACKEND", LAYER, ("plain",), check_layer, {"plain": "12 to 18%"})


def attention_back_ends(cfg: Config) -> BackEnds:
    """With DOC_ATTENTION all but cuDNN, which cannot keep documents apart."""
    factories = {name: maker for name, maker in ATTENTION.items() if name != "cudnn" or not cfg.doc_attention}
    without_cuda = ("math",) if cfg.doc_attention else ("flash", "math")
    prices = {"cudnn": "5%", "fa2": "18%", "flash": "18%", "math": "several times"}
    return BackEnds("ATTN_BACKEND", factories, without_cuda, probe_attention, prices)


BACK_END_FAULTS = (
    ImportError, AttributeError, AssertionError, TypeError, ValueError, OSError, RuntimeError, TritonError,
)


def choose_back_end(run: Runtime, ends: BackEnds, asked: str) -> Callable:
    """The first back end of a chain that is right on every rank; one asked for by name is taken or is an error.

    A slower one than the best is a warning, unless what was passed over is of no use to this GPU.
    """
    device, refused, is_loss = run.ranks.device, [], False
    chain = list(ends.factories) if device.type == "cuda" else ends.without_cuda
    for name in chain if asked == "auto" else [asked]:
        chosen, error, allowed, reason, is_absent = None, math.nan, math.nan, "", False
        try:
            chosen = ends.factories[name]()
            error, allowed = ends.probe(chosen, run.cfg, device)
            reason = fault(error, allowed)
        except BACK_END_FAULTS as e:
            reason = f"{type(e).__name__} {str(e).strip().splitlines()[0][:100] if str(e).strip() else ''}"
            is_absent = isinstance(e, ImportError | NotImplementedError)
        failures = run.ranks.all_reduce_sum_(torch.tensor(float(bool(reason)), device=device)).item()
        if not failures:
            why = "; ".join(refused) or "first choice"
            errors = f"error:{error:.1e} allowed:{allowed:.1e}"
            run.log(f"{ends.variable.lower()}:{name} head_dim:{run.cfg.head_dim} {errors} reason:{why}")
            run.log.event("back_end", variable=ends.variable, name=name)
            if is_loss and name in ends.prices:
                run.warn_of_cost(f"{ends.variable}: by {name} a step takes {ends.prices[name]} longer ({why})")
            return chosen
        refused.append(f"{name}: {reason or 'failed on another rank'}")
        is_loss = is_loss or not is_absent or is_hopper(device)
    raise UserError(f"{ends.variable}={asked}: not usable here ({'; '.join(refused)}); auto takes the best")


# ----------------------------------------------------------------------------------------------
# 9. Model
# ----------------------------------------------------------------------------------------------
# Matrices live in four banks of shape (layers, rows, cols), so that the optimizer works on a few
# large tensors; BANKS and the rest of the parameters are each described by one table. There is one
# forward pass: training, Hessians and evaluation differ only in the weights, the layer order and
# the observer that they hand in.


@rules
def model_rules(cfg: Config) -> list[tuple[Any, str]]:
    """What must hold between variables of the model, and what the error says otherwise; $NAME stands for NAME=value."""
    layers, head_dim = cfg.num_layers, cfg.head_dim
    ve_fits = sorted(cfg.ve_layers) == sorted(set(cfg.ve_layers) & set(range(layers))) != []
    return [
        (cfg.model_dim % cfg.num_heads == 0, "$MODEL_DIM is not divisible by $NUM_HEADS"),
        (cfg.num_heads % cfg.num_kv_heads == 0, "$NUM_HEADS is not divisible by $NUM_KV_HEADS"),
        (head_dim % 2 == 0, f"MODEL_DIM/NUM_HEADS={head_dim} is odd: rotary embedding needs pairs"),
        (cfg.rope_dims % 2 == 0 and cfg.rope_dims <= head_dim, f"$ROPE_DIMS: even, at most {head_dim}"),
        (cfg.hidden_dim > 0, "$MLP_HIDDEN and $MLP_MULT give an MLP of width 0"),
        (cfg.attn_backend in ("auto", *attention_back_ends(cfg).factories),
         "$ATTN_BACKEND: not with DOC_ATTENTION=1; leave it at auto or set DOC_ATTENTION=0"),
        (cfg.xsa_last_n <= layers, "$XSA_LAST_N exceeds $NUM_LAYERS"),
        (ve_fits or not cfg.ve_enabled, "$VE_LAYERS: different layers below $NUM_LAYERS, or set VE_ENABLED=0"),
        (not cfg.num_loops or cfg.loop_start <= cfg.loop_end < layers,
         "$LOOP_START $LOOP_END: not in order within $NUM_LAYERS; NUM_LOOPS=0 for no loops"),
        (not cfg.lora_rank or (cfg.num_loops > 0 and not cfg.enable_looping_at),
         "$LORA_RANK: needs NUM_LOOPS above 0 and ENABLE_LOOPING_AT=0"),
        (cfg.bigram_vocab_size != 1, "$BIGRAM_VOCAB_SIZE: 0 switches it off, else at least 2"),
    ]  # fmt: skip


CalibHook = Callable[[str, Tensor], None]  # name of a matrix and its inputs


def has_previous(ids: Tensor, bos_id: int) -> Tensor:
    """Where ids (B, T) have a previous token of the same document: neither BOS nor first in the window."""
    return (ids != bos_id) & (torch.arange(ids.shape[1], device=ids.device) > 0)


def bigram_hash(ids: Tensor, bos_id: int, buckets: int) -> Tensor:
    """Bucket of (token, previous token), (B, T); the last bucket stands for 'no previous token' (PR #65)."""
    previous = F.pad(ids, (1, -1))
    hashed = (36313 * ids ^ 27191 * previous) % (buckets - 1)
    return torch.where(has_previous(ids, bos_id), hashed, buckets - 1)


def smear(x: Tensor, ids: Tensor, gate: Tensor, bos_id: int) -> Tensor:
    """x_t + sigmoid(gate) (x_{t-1} - x_t) per channel within a document, x (B, T, C) (PR #65)."""
    amount = torch.sigmoid(gate) * has_previous(ids, bos_id).unsqueeze(-1)
    return x + amount.to(x.dtype) * (F.pad(x, (0, 0, 1, -1)) - x)


class BankSpec(NamedTuple):
    """One bank: (layers, rows, cols), its rows split among named matrices; `zero` starts it at zero."""

    name: str
    roles: tuple[tuple[str, int], ...]  # matrix name within a layer -> rows
    cols: int
    zero: bool

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.roles)

    def spans(self) -> list[tuple[str, int, int]]:
        """(matrix name, first row, end row) of each role."""
        ends = itertools.accumulate(rows for _, rows in self.roles)
        return [(name, end - rows, end) for (name, rows), end in zip(self.roles, ends, strict=True)]


def bank_specs(cfg: Config) -> tuple[BankSpec, ...]:
    """The one table of matrices. Q, K and V share a bank and so one product: one read of the input, not three."""
    dim, hidden, kv = cfg.model_dim, cfg.hidden_dim, cfg.num_kv_heads * cfg.head_dim
    return (
        BankSpec("qkv", (("attn.c_q", dim), ("attn.c_k", kv), ("attn.c_v", kv)), dim, zero=False),
        BankSpec("out", (("attn.proj", dim),), dim, zero=True),
        BankSpec("up", (("mlp.fc", hidden),), dim, zero=False),
        BankSpec("down", (("mlp.proj", dim),), hidden, zero=True),
    )


def row_bits(cfg: Config, spec: BankSpec) -> Tensor:
    """Bits of the codes of every row of a bank, (layers, rows, 1): LOWBIT_BITS where a pattern is in the name."""
    places = itertools.product(range(cfg.num_layers), spec.roles)
    rows = [(f"blocks.{layer}.{role}.", count) for layer, (role, count) in places]
    is_low = [any(p in name for p in cfg.lowbit_name_patterns) for name, count in rows for _ in range(count)]
    return torch.tensor([cfg.lowbit_bits if low else cfg.matrix_bits for low in is_low]).view(-1, spec.rows, 1)


class ParamSpec(NamedTuple):
    """One parameter outside the banks: shape, initial value or standard deviation, and its Adam group.

    `init` is a number (constant), "orthogonal", or ("normal", std). `per_layer`: dimension 0 is the layer.
    Embeddings and small matrices (`coded`) are quantized; the rest is control and is kept in half precision.
    """

    name: str
    shape: tuple[int, ...]
    init: Any
    group: str
    per_layer: bool = False
    coded: bool = False


def param_table(cfg: Config) -> list[ParamSpec]:
    """The one table of parameters outside the banks; a feature that is off has no row and so no parameter."""
    dim, layers, heads, vocab = cfg.model_dim, cfg.num_layers, cfg.num_heads, cfg.vocab_size
    kv, buckets, is_asqu = cfg.num_kv_heads * cfg.head_dim, cfg.bigram_vocab_size, cfg.mlp_activation == "asqu"
    skips = max(len(phase.order) // 2 for phase in phases(cfg).values())
    mix = torch.stack([torch.ones(dim), torch.zeros(dim)]).expand(layers, 2, dim)  # all of x, nothing of x0
    rows = [
        (True, ParamSpec("tok_emb", (vocab, dim), ("normal", cfg.tied_embed_init_std), "embed", coded=True)),
        (not cfg.tie_embeddings, ParamSpec("lm_head", (vocab, dim), 0.0, "head", coded=True)),
        (buckets, ParamSpec("bigram_table", (buckets, cfg.bigram_dim), 0.0, "embed", coded=True)),
        (buckets, ParamSpec("bigram_proj", (dim, cfg.bigram_dim), "orthogonal", "scalar", coded=True)),
        (buckets, ParamSpec("bigram_scale", (1,), 0.05, "scalar")),
        (cfg.ve_enabled, ParamSpec("ve_table", (vocab, cfg.ve_dim), ("normal", 0.01), "embed", coded=True)),
        (cfg.ve_enabled, ParamSpec("ve_proj", (kv, cfg.ve_dim), 0.0, "scalar", coded=True)),
        (cfg.ve_enabled, ParamSpec("ve_scale", (len(cfg.ve_layers),), 0.1, "scalar")),
        (cfg.smear_gate_enabled, ParamSpec("smear_gate", (dim,), 0.0, "scalar")),
        (skips, ParamSpec("skip_weights", (skips, dim), 1.0, "scalar")),
        (True, ParamSpec("resid_mix", (layers, 2, dim), mix, "scalar", per_layer=True)),
        (True, ParamSpec("attn_scale", (layers, dim), 1.0, "scalar", per_layer=True)),
        (True, ParamSpec("mlp_scale", (layers, dim), 1.0, "scalar", per_layer=True)),
        (True, ParamSpec("q_gain", (layers, heads), cfg.qk_gain_init, "scalar", per_layer=True)),
        (cfg.value_residual, ParamSpec("value_mix", (layers, 2), 0.5, "scalar", per_layer=True)),
        (cfg.gated_attn_enabled, ParamSpec("gate_weight", (layers, heads, dim), 0.0, "scalar", per_layer=True)),
        (cfg.gated_attn_enabled, ParamSpec("gate_bias", (layers, heads), 4.0, "scalar", per_layer=True)),
        (is_asqu, ParamSpec("asqu_beta", (layers, cfg.hidden_dim), cfg.asqu_beta_init, "asqu", per_layer=True)),
    ]
    rank, passes = cfg.lora_rank, len(final_order(cfg))
    for bank in bank_specs(cfg):  # zero at the start, by the second factor (PR #38)
        rows += [(rank, ParamSpec(f"lora_{bank.name}_in", (passes, rank, bank.cols), ("normal", 0.02), "lora")),
                 (rank, ParamSpec(f"lora_{bank.name}_out", (passes, bank.rows, rank), 0.0, "lora"))]  # fmt: skip
    return [spec for present, spec in rows if present]


def initial_value(shape: tuple[int, ...], init: Any) -> Tensor:
    """A fresh parameter, on the CPU so that every device and every number of ranks starts from the same bits."""
    if isinstance(init, Tensor):
        return init.clone()
    if isinstance(init, tuple):
        return torch.randn(shape) * init[1]
    if init == "orthogonal":
        return nn.init.orthogonal_(torch.empty(shape))
    if init == "uniform":  # nn.Linear's default, what the official baseline starts from
        return torch.empty(shape).uniform_(-1, 1) / math.sqrt(shape[-1])
    return torch.full(shape, float(init))


def initial_bank(spec: BankSpec, cfg: Config) -> Tensor:
    """(layers, rows, cols): each matrix of the bank initialized by itself."""
    kind = 0.0 if spec.zero else "orthogonal" if cfg.ortho_init else "uniform"
    layers = [[initial_value((rows, spec.cols), kind) for _, rows in spec.roles] for _ in range(cfg.num_layers)]
    return torch.stack([torch.cat(matrices) for matrices in layers])


class Pass(NamedTuple):
    """What one forward pass hands to its layers."""

    order: tuple[int, ...]  # layers as they run
    banks: dict[str, tuple[Tensor, ...]]  # bank -> the matrices of each position in the order
    vectors: dict[str, tuple[Tensor, ...]]  # per-layer parameter -> the layers' values
    mixes: tuple[Tensor, ...]  # per position in the order, (3, C): factors of x, skip and x0 at the layer's entrance
    rotary: Tensor
    value_embedding: Tensor | None  # (N, KV, D)
    mask: Tensor | None  # of the attention, with DOC_ATTENTION
    follows: Tensor | None  # with KEY_OFFSET where a token has a previous one, (N,)
    beta: tuple[Tensor, ...]  # per layer, (hidden,): the factor of squared_leaky_relu below zero
    observe: CalibHook | None


def compiled(cfg: Config, function: Callable) -> Callable:
    """torch.compile as one static graph, or the function itself when COMPILE=0."""
    if not cfg.compile:
        return function
    # Inductor describes an operator that is new to it, or fails, by all that leads to it, in a time exponential in its
    # depth (torch 2.11; 2.13 only where it fails): with XSA_LAST_N=4 of 11 layers no step was made in four minutes.
    issue = importlib.import_module("torch._inductor.exc").OperatorIssue
    issue.operator_str = staticmethod(lambda target, *_: str(target))
    return torch.compile(function, dynamic=False, fullgraph=True)


def row_scale(w: Tensor, bits: Tensor | int, policy: str, sigmas: Tensor | float) -> Tensor:
    """Scale (..., rows) of w (..., rows, cols), rounded to half as it is stored; bits (..., rows, 1), or one for all.
    Policy amax clips at the largest entry, the others at `sigmas` standard deviations (SDClip, PR #1394)."""
    clip = w.abs().amax(-1, keepdim=True) if policy == "amax" else sigmas * w.std(-1, correction=0, keepdim=True)
    return (clip / (2 ** (bits - 1) - 1)).clamp_min(2.0**-20).half().to(w.dtype).squeeze(-1)


def round_to_grid(w: Tensor, scale: Tensor, bits: Tensor | int) -> Tensor:
    """Codes of w (..., rows, cols) for scale (..., rows): whole numbers in [-2^(bits-1), 2^(bits-1) - 1], as floats."""
    top = 2 ** (bits - 1)
    return torch.round(w / scale.unsqueeze(-1)).clamp(-top, top - 1)


def fake_quantize(w: Tensor, bits: Tensor | int, policy: str, sigmas: Tensor | float) -> Tensor:
    """w rounded to its grid in the forward pass, the identity in the backward pass (straight-through)."""
    scale = row_scale(w.detach(), bits, policy, sigmas)
    return w + (round_to_grid(w.detach(), scale, bits) * scale.unsqueeze(-1) - w).detach()


class GPT(nn.Module):
    """The language model. `weights()` prepares the matrices once per step; `nll` is the forward pass."""

    def __init__(
        self, cfg: Config, bos_id: int, attend: Attention, device: torch.device, parts: PlainLayer = PLAIN_LAYER
    ) -> None:
        """Allocate and initialize from SEED, whatever the state of the global generator."""
        super().__init__()
        self.cfg, self.bos_id, self.attend, self.parts = cfg, bos_id, attend, parts
        self.dtype = compute_dtype(device)
        self.norm_scales = [(i + 1) ** -0.5 if cfg.ln_scale else 1.0 for i in range(cfg.num_layers)]
        self.order = final_order(cfg)  # of the model as it is scored; training may still be on its way there
        self.micro_batch = MICRO_BATCH_TOKENS  # tokens at most of a batch; `build_model` measures what the GPU holds
        self.specs, self.param_table = bank_specs(cfg), param_table(cfg)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.banks = nn.ParameterDict({s.name: initial_bank(s, cfg) for s in self.specs})
            self.rest = nn.ParameterDict({s.name: initial_value(s.shape, s.init) for s in self.param_table})
        self.register_buffer("clip_sigmas", torch.tensor(cfg.matrix_clip_sigmas or 6.0), persistent=False)
        self.to(device)
        self.bits = {s.name: row_bits(cfg, s).to(device) for s in self.specs}
        lengths = {phase.seq_len for phase in phases(cfg).values()} | {cfg.eval_len}
        self.rotary = {length: rotary_table(length, cfg, device) for length in lengths}
        self.fast_weights, self.fast_nll = compiled(cfg, self.weights), compiled(cfg, self.nll)
        self.fast_nll_and_entropy = compiled(cfg, self.nll_and_entropy)

    def weights(self, fake_quant: bool) -> dict[str, Tensor]:
        """Banks and head in the compute type; `fake_quant` puts the banks on the export grid, straight-through.

        The scales of a layer's two outputs multiply the rows of the matrices that make them: on small matrices they
        cost nothing, on activations two reads and a write in the backward pass (1.6 ms of a step).
        """
        banks = dict(self.banks.items())
        if fake_quant:
            policy, sigmas = self.cfg.clip_policy, self.clip_sigmas
            banks = {n: fake_quantize(bank, self.bits[n], policy, sigmas) for n, bank in banks.items()}
        scales = {"out": self.rest["attn_scale"], "down": self.rest["mlp_scale"]}
        if self.cfg.lora_rank:  # from here on one matrix per pass, not per layer
            added = {name: self.rest[f"lora_{name}_out"] @ self.rest[f"lora_{name}_in"] for name in banks}
            banks = {name: self.per_loop(bank) + added[name] for name, bank in banks.items()}
            scales = {name: self.per_loop(scale) for name, scale in scales.items()}
        banks |= {name: banks[name] * scale.unsqueeze(-1) for name, scale in scales.items()}
        head = self.rest["tok_emb" if self.cfg.tie_embeddings else "lm_head"]
        return {name: tensor.to(self.dtype) for name, tensor in {**banks, "head": head}.items()}

    def per_loop(self, layers: Tensor) -> Tensor:
        """Slices of `layers` (layers, ...) in the order in which they run, (passes, ...)."""
        return torch.stack([layers[layer] for layer in self.order])

    def project(self, table: str, ids: Tensor, matrix: str, observe: CalibHook | None) -> Tensor:
        """Rows `ids` of an embedding table times a small matrix; gathered in fp32 so that gradients sum in fp32."""
        rows = F.embedding(ids, self.rest[table]).to(self.dtype)
        if observe is not None:
            observe(matrix, rows)
        return F.linear(rows, self.rest[matrix].to(self.dtype))

    def embed(self, ids: Tensor, observe: CalibHook | None) -> Tensor:
        """Token (and bigram) embedding, normalized and smeared: (B, T, C)."""
        x = F.embedding(ids, self.rest["tok_emb"])
        if "bigram_table" in self.rest:
            buckets = bigram_hash(ids, self.bos_id, self.cfg.bigram_vocab_size)
            x = x + self.rest["bigram_scale"] * self.project("bigram_table", buckets, "bigram_proj", observe)
        x = rms_norm(x.to(self.dtype))
        return smear(x, ids, self.rest["smear_gate"], self.bos_id) if "smear_gate" in self.rest else x

    def begin(self, ids: Tensor, weights: dict[str, Tensor], order: tuple[int, ...], observe: CalibHook | None) -> Pass:
        """Split banks and per-layer vectors: one backward concatenation each instead of one per layer."""
        vectors = {s.name: self.rest[s.name].to(self.dtype).unbind() for s in self.param_table if s.per_layer}
        banks = {spec.name: weights[spec.name] for spec in self.specs}
        banks = {name: bank.unbind() if isinstance(bank, Tensor) else bank for name, bank in banks.items()}
        if not self.cfg.lora_rank:
            banks = {name: tuple(matrices[layer] for layer in order) for name, matrices in banks.items()}
        value = None
        if "ve_table" in self.rest:
            value = self.project("ve_table", ids, "ve_proj", observe).view(ids.numel(), self.cfg.num_kv_heads, -1)
        length = ids.shape[1]
        rotary = self.rotary[length] if length in self.rotary else rotary_table(length, self.cfg, ids.device)
        slope = {"relu2": 0.0, "leaky_relu2": self.cfg.negative_slope, "asqu": 0.0}[self.cfg.mlp_activation]
        fixed = torch.full((self.cfg.hidden_dim,), slope**2, dtype=self.dtype, device=ids.device)
        beta = vectors.get("asqu_beta", (fixed,) * self.cfg.num_layers)
        mask = self.attend.mask(doc_ids(ids, self.bos_id)) if self.cfg.doc_attention else None
        follows = has_previous(ids, self.bos_id).flatten() if self.cfg.key_offset else None
        return Pass(order, banks, vectors, self.mixes(order), rotary, value, mask, follows, beta, observe)

    def mixes(self, order: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Factors (3, C) of x, skip and x0 at the entrance of each position: the skip's weight is multiplied in here,
        on vectors, and once for all positions."""
        resid = torch.stack([self.rest["resid_mix"][layer] for layer in order])
        half, skips = len(order) // 2, torch.zeros_like(resid[:, 0])
        if half:
            weights = self.rest["skip_weights"][:half]
            skips = F.pad(weights, (0, 0, half, len(order) - half - len(weights)))
        return torch.stack([resid[:, 0], resid[:, 0] * skips, resid[:, 1]], 1).to(self.dtype).unbind()

    def attention(self, rows: Residual, position: int, first_v: Tensor | None, p: Pass) -> tuple[Tensor, Tensor]:
        """What the heads of a layer attend to, (N, C) before the output matrix, and its own values (N, KV, D)."""
        layer, vectors, parts, cfg, extra = p.order[position], p.vectors, self.parts, self.cfg, None
        if p.observe is not None:
            p.observe(f"qkv.{layer}", parts.materialize_norm(rows))
        if cfg.ve_enabled and layer in cfg.ve_layers:
            extra = self.rest["ve_scale"][cfg.ve_layers.index(layer)].to(self.dtype) * p.value_embedding
        weight, gain = p.banks["qkv"][position], vectors["q_gain"][layer]
        q, k, own, proxy = parts.qkv_rope(rows, weight, gain, p.rotary, extra, p.follows)
        v = own
        if "value_mix" in vectors:
            mix = vectors["value_mix"][layer]
            v = proxy = mix[0] * (own if first_v is None else first_v) + mix[1] * own
        y = self.attend(*(t.unflatten(0, (-1, p.rotary.shape[1])) for t in (q, k, v)), p.mask).flatten(0, 1)
        gate = None
        if "gate_weight" in vectors:
            weight, bias = (vectors[name][layer] for name in ("gate_weight", "gate_bias"))
            gate = F.linear(parts.materialize_norm(rows), weight, bias).sigmoid()
        if layer >= cfg.num_layers - cfg.xsa_last_n:
            y = parts.xsa(y, v, proxy, gate)
        elif gate is not None:
            y = y * gate.unsqueeze(-1)
        z = y.flatten(1)
        if p.observe is not None:
            p.observe(f"out.{layer}", z)
        return z, own

    def mlp(self, rows: Residual, position: int, p: Pass) -> Tensor:
        """Feed-forward part of a layer, its output added: (N, C)."""
        layer = p.order[position]
        x, act = self.parts.mlp(rows, p.banks["up"][position], p.banks["down"][position], p.beta[layer])
        if p.observe is not None:
            p.observe(f"up.{layer}", self.parts.materialize_norm(rows))
            p.observe(f"down.{layer}", act)
        return x

    def hidden(
        self, ids: Tensor, weights: dict[str, Tensor], order: tuple[int, ...], observe: CalibHook | None = None
    ) -> Tensor:
        """Normalized output of the last layer (B, T, C) for ids (B, T), running the layers in `order`.

        The first half of the order pushes its outputs, the second half pops them (U-Net skips); every layer mixes
        the embedding x0 back in.
        """
        p = self.begin(ids, weights, order, observe)
        x = self.embed(ids, observe).flatten(0, 1)
        x0, half, skips, first_v = (x, x), len(order) // 2, [], None
        for position, layer in enumerate(order):
            skip = None
            if half <= position < 2 * half:
                skip = skips.pop() if position > half else (x, x)  # the last one pushed is x itself
            rows, proxy, x0 = self.parts.resid_mix_norm(x, skip, x0, p.mixes[position], self.norm_scales[layer])
            if 0 < position < half:
                skips.append((x, proxy))
            z, own_v = self.attention(rows, position, first_v, p)
            first_v = own_v if first_v is None else first_v
            rows = self.parts.attn_proj(rows, z, p.banks["out"][position], self.norm_scales[layer])
            x = self.mlp(rows, position, p)
        return rms_norm(x).view(*ids.shape, -1)

    def logits(self, hidden: Tensor, weights: dict[str, Tensor], observe: CalibHook | None = None) -> Tensor:
        """Softcapped logits (B, T, V) in float32."""
        if observe is not None:
            observe("head", hidden)
        return softcap(product(hidden, weights["head"]), self.cfg.logit_softcap)

    def nll(self, ids: Tensor, targets: Tensor, weights: dict[str, Tensor], order: tuple[int, ...]) -> Tensor:
        """Negative log-likelihood in nats of each target given its prefix, (B, T) float32."""
        logits = product(self.hidden(ids, weights, order).flatten(0, 1), weights["head"])
        return self.parts.nll(logits, targets.flatten(), self.cfg.logit_softcap).view_as(targets)

    def nll_and_entropy(
        self, ids: Tensor, targets: Tensor, weights: dict[str, Tensor], order: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """`nll`, and the entropy in nats of each prediction, (B, T) float32."""
        log_p = self.logits(self.hidden(ids, weights, order), weights).log_softmax(-1)
        return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all parameters in place: compiled graphs stay valid. Names must match exactly."""
        self.load_state_dict(dict(tensors))


def tokens_that_fit(peaks: list[int], length: int, kept: int, limit: float) -> tuple[float, str]:
    """Tokens of a micro-batch that `limit` bytes hold, and why, from the peaks of one and of two sequences of `length`.

    A token takes its bytes twice: a phase is warmed up while the CUDA graphs of those before it keep their memory.
    Beside them are `kept` bytes, a GiB for libraries, and a twentieth that fragments.
    """
    each = max(peaks[1] - peaks[0], 1) / length
    fixed = peaks[0] - each * length + kept + 2**30
    why = f"a token takes {each / 2**10:.0f} KiB twice, the rest {fixed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB"
    return (0.95 * limit - fixed) / (2 * each), why


def micro_batch_tokens(run: Runtime, model: GPT) -> int:
    """Most tokens of a micro-batch, on every rank: 98,304, or what the GPU holds, by two uncompiled micro-steps.

    Evaluation, which keeps no activations, takes less. UserError where not one sequence fits.
    """
    cfg, device, peaks = run.cfg, run.ranks.device, []
    if device.type != "cuda":
        return MICRO_BATCH_TOKENS
    length, parameters = max(cfg.train_seq_len, cfg.eval_len), 4 * sum(p.numel() for p in model.parameters())
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.memory.get_per_process_memory_fraction(device) * total
    limit = min(free + torch.cuda.memory_reserved(device), allowed) - torch.cuda.memory_allocated(device)
    for rows in (1, 2):
        ids = torch.arange(rows * length, device=device).view(rows, length) % cfg.vocab_size
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with contextlib.suppress(torch.OutOfMemoryError):
            model.nll(ids, ids, model.weights(False), final_order(cfg)).mean().backward()
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
        model.zero_grad()
    copies = 6 + cfg.lawa_k * cfg.lawa_enabled  # gradients, momentum, Adam's moments, average, what warm-up keeps
    tokens, why = tokens_that_fit(peaks, length, copies * parameters, limit)
    tokens = -int(run.ranks.all_reduce_max(-tokens)[0])
    if tokens < length / 2:
        raise UserError(f"TRAIN_SEQ_LEN={cfg.train_seq_len} EVAL_SEQ_LEN={cfg.eval_seq_len}: not one sequence fits: "
                        f"{why}; lower them, MODEL_DIM or NUM_LAYERS")  # fmt: skip
    tokens = min(max(tokens, length), MICRO_BATCH_TOKENS)
    run.log(f"micro_batch:{tokens} tokens at most, because {why}")
    return tokens


def build_model(run: Runtime, cfg: Config, bos_id: int) -> GPT:
    """The model of `cfg` on this rank's device, with its parameter count in the log."""
    attend = choose_back_end(run, attention_back_ends(cfg), cfg.attn_backend)
    parts = choose_back_end(run, LAYER_BACK_ENDS, cfg.layer_backend)
    model = GPT(cfg, bos_id, attend, run.ranks.device, parts)
    sizes = {name.split(".")[1]: p.numel() for name, p in model.named_parameters()}
    count = sum(sizes.values())
    run.log(f"model_params:{count} ({' '.join(f'{n}:{c}' for n, c in sizes.items() if c > 0.002 * count)}) "
            f"passes:{len(final_order(cfg))} over {cfg.num_layers} layers")  # fmt: skip
    run.log.event("model", parameters=count, mlp_hidden=cfg.hidden_dim)
    run.log(f"attention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads} xsa_last_n:{cfg.xsa_last_n} "
            f"mlp_activation:{cfg.mlp_activation} hidden:{cfg.hidden_dim}")  # fmt: skip
    model.micro_batch = micro_batch_tokens(run, model)
    return model


# ----------------------------------------------------------------------------------------------
# 10. Quantization
# ----------------------------------------------------------------------------------------------
# Every matrix becomes integer codes times a scale per row. GPTQ (arXiv 2210.17323) rounds column by
# column and lets the columns still to come absorb the error, weighted by the Hessian X^T X of the
# layer's inputs on training data. All layers of a bank are quantized at once. With CLIP_POLICY=cost
# rounding costs the loss the same in every weight (reverse water filling): bytes go where they gain most.


class QuantSpec(NamedTuple):
    """One tensor to quantize: (n, rows, cols) fp32, the names of its n Hessians, and bits and clip of its kind."""

    name: str
    tensor: Tensor
    hessians: list[str]
    bits: Tensor  # (n, rows, 1) integer
    sigmas: float  # k of policy sigma; 0: the common one
    unit: Tensor | None = None  # step over k of policy cost, (n, rows)


# Dependent quantization as in the video coder VVC: a state knows one of two grids, and the code's parity leads to the
# next state. In odd states every grid point but 0 is half a step nearer to 0. The two grids together are twice as fine
# as one, and the choice among paths makes good most of what a code, which says only its own grid's point, leaves open.
TRELLIS = ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5))  # state -> next after an even, an odd code


def trellis_values(codes: Tensor) -> Tensor:
    """What trellis codes (n, rows, cols) int8 stand for, in steps; every row starts in state 0."""
    following, values = torch.tensor(TRELLIS, device=codes.device), codes.float()
    state = torch.zeros_like(codes[..., 0], dtype=torch.long)
    for code, value in zip(codes.unbind(-1), values.unbind(-1), strict=True):
        value -= 0.5 * (state & 1) * code.sign()
        state = following[state, code.long() & 1]
    return values


class QuantizedTensor(NamedTuple):
    """A quantized tensor: codes (n, rows, cols) int8 and scales (n, rows) half."""

    codes: Tensor
    scale: Tensor
    trellis: bool = False

    def dequantize(self) -> Tensor:
        values = trellis_values(self.codes) if self.trellis else self.codes.float()
        return values * self.scale.float().unsqueeze(-1)


def quant_specs(
    model: GPT, matrix_bits: Mapping[int, int] | None = None, costs: Mapping[str, Tensor] | None = None
) -> list[QuantSpec]:
    """All coded tensors of the model in artifact order; `matrix_bits` limits the bits of single layers.

    `costs` of rounding give a row its unit, a step that costs as much as in all other rows; steps are on the average
    those of policy sigma for the same k. A row whose cost the batches hardly show (a rare token) has some all the same.
    """
    cfg, jobs, home = model.cfg, [], float64_device(model.clip_sigmas.device)
    for spec in model.specs:
        bank = model.banks[spec.name].detach().to(home)
        bits = model.bits[spec.name].to(bank.device, copy=True)
        for layer, lower in (matrix_bits or {}).items():
            bits[layer] = bits[layer].clamp_max(lower)
        jobs.append(QuantSpec(spec.name, bank, [f"{spec.name}.{i}" for i in range(len(bank))], bits, 0.0))
    head = "tok_emb" if cfg.tie_embeddings else "lm_head"
    for spec in model.param_table:
        if spec.coded:
            tensor = model.rest[spec.name].detach()[None].to(home)
            bits = torch.full((1, tensor.shape[1], 1), cfg.embed_bits, device=tensor.device)
            inputs = "head" if spec.name == head else spec.name
            jobs.append(QuantSpec(spec.name, tensor, [inputs], bits, cfg.embed_clip_sigmas))
    known = {job.name: costs[f"cost.{job.name}"] for job in jobs if f"cost.{job.name}" in (costs or {})}
    known = {name: cost + cost.mean(-1, keepdim=True) / 32 + 1e-30 for name, cost in known.items()}
    jobs = [job._replace(unit=known[job.name].rsqrt() if job.name in known else None) for job in jobs]
    paid = [job for job in jobs if job.unit is not None]
    logs = [(job.tensor.std(-1, correction=0) / job.unit).clamp_min(1e-15).log().mean().item() for job in paid]
    mean = sum(log * job.tensor.numel() for log, job in zip(logs, paid, strict=True))
    scale = math.exp(mean / max(sum(job.tensor.numel() for job in paid), 1)) / (2 ** (cfg.matrix_bits - 1) - 1)
    return [job if job.unit is None else job._replace(unit=scale * job.unit) for job in jobs]


def passthrough(model: GPT) -> dict[str, Tensor]:
    """Control parameters, never quantized: name -> tensor in half precision."""
    return {s.name: model.rest[s.name].detach().half() for s in model.param_table if not s.coded}


def row_scales(cfg: Config, job: QuantSpec, hessians: Mapping[str, Tensor], sigmas: float) -> Tensor:
    """Row scales (n, rows) of a job under CLIP_POLICY.

    `search` takes per row the clip percentile of least Hessian-weighted rounding error (GPTQ-lite, PR #374); a
    column's weight is its Hessian's diagonal, or 1 where no inputs were observed.
    """
    if job.unit is not None:  # rounded to 1/8 of an octave: as good, and stored in half the bytes
        finest = row_scale(job.tensor, job.bits, "amax", 0.0)
        coarsest = finest * (2 ** (job.bits[..., 0] - 1) - 1)  # all codes but the largest are 0
        half = (sigmas * job.unit).clamp(1.07 * finest, coarsest).clamp(2.0**-14, 2.0**15).half()
        return ((half.view(torch.int16) + 64) & ~127).view(torch.half).to(job.tensor.dtype)
    if cfg.clip_policy != "search":
        return row_scale(job.tensor, job.bits, cfg.clip_policy, job.sigmas or sigmas)
    w, ones = job.tensor, torch.ones_like(job.tensor[0, 0])
    weight = torch.stack([hessians[n].diagonal() if n in hessians else ones for n in job.hessians]).unsqueeze(1)
    scales, errors = [], []
    for percentile in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        clip = torch.stack([torch.quantile(layer.abs(), percentile, dim=-1, keepdim=True) for layer in w])
        scales.append(row_scale(clip, job.bits, "amax", 0.0))
        rounded = round_to_grid(w, scales[-1], job.bits) * scales[-1].unsqueeze(-1)
        errors.append(((rounded - w).square() * weight).sum(-1))
    return torch.stack(scales).gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]


def hessian_inv_cholesky(hessian: Tensor, damp: float) -> Tensor:
    """Upper U with U^T U = (H + damp x mean diagonal)^-1 (n, cols, cols); damp grows tenfold where that fails."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    hessian = hessian + torch.diag_embed((diagonal == 0).to(hessian.dtype))  # inputs that are always zero
    mean = diagonal.mean(-1)[:, None, None]
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    lower, failed = torch.linalg.cholesky_ex(hessian + damp * mean * eye)
    if failed.any():
        return hessian_inv_cholesky(hessian, max(10 * damp, 1e-6))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def gptq_quantize(job: QuantSpec, hessian: Tensor, scale: Tensor, cfg: Config) -> Tensor:
    """Codes (n, rows, cols), float64 integers, of all layers of a job; Hessian (n, cols, cols), scale (n, rows).

    Columns run in blocks of GPTQ_BLOCK_SIZE; with GPTQ_ACT_ORDER the largest diagonal comes first. Columns whose
    input is always zero are coded as zero. Float64 throughout: the GPU is launch-bound here, so digits are free.
    """
    w, scale, hessian = job.tensor.double(), scale.double(), hessian.double()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    w = w.masked_fill(dead[:, None, :], 0.0)
    columns = torch.arange(w.shape[2], device=w.device).expand_as(diagonal)
    order = diagonal.argsort(dim=-1, descending=True, stable=True) if cfg.gptq_act_order else columns
    w = w.take_along_dim(order[:, None, :], 2)
    hessian = hessian.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None, :], 2)
    factor = hessian_inv_cholesky(hessian, cfg.gptq_damp)
    codes = torch.empty_like(w)
    for begin in range(0, w.shape[2], cfg.gptq_block_size):
        end = min(begin + cfg.gptq_block_size, w.shape[2])
        block, errors = w[:, :, begin:end].clone(), torch.empty_like(w[:, :, begin:end])
        for j in range(end - begin):
            row = factor[:, begin + j, begin:end]
            code = round_to_grid(block[:, :, j : j + 1], scale, job.bits)
            error = (block[:, :, j : j + 1] - code * scale.unsqueeze(-1)) / row[:, None, j : j + 1]
            block[:, :, j:] -= error * row[:, None, j:]
            codes[:, :, begin + j], errors[:, :, j] = code[..., 0], error[..., 0]
        w[:, :, end:] -= errors @ factor[:, begin:end, end:]
    return codes.take_along_dim(order.argsort()[:, None, :], 2)


def trellis_block(w: Tensor, factor: Tensor, scale: Tensor, state: Tensor, top: Tensor) -> tuple[Tensor, ...]:
    """Codes and errors (n, rows, block) of some columns w, and the state (n, rows) after them, by Viterbi's algorithm.

    Of all paths into a state the one of least error survives, with columns that have absorbed its own errors.
    """
    into = [[2 * i + parity for i, to in enumerate(TRELLIS) for parity in (0, 1) if to[parity] == s] for s in range(8)]
    into, parity, past = torch.tensor(into, device=w.device), torch.arange(2, device=w.device), []
    shift = 0.5 * (torch.arange(8, device=w.device) & 1)
    cost = torch.full((*w.shape[:2], 8), math.inf, dtype=w.dtype, device=w.device).scatter_(2, state[..., None], 0.0)
    left, scale, top = w.unsqueeze(2).expand(-1, -1, 8, -1), scale[..., None], top[..., None] - 2 + parity
    for j in range(w.shape[2]):
        y, row = left[..., 0], factor[:, None, None, j, j:]
        code = 2 * ((y / scale + shift * y.sign())[..., None] / 2 - parity / 2).round() + parity
        code = torch.minimum(torch.maximum(code, -top), top)
        error = (y[..., None] - (code - shift[:, None] * code.sign()) * scale[..., None]) / row[..., :1]
        both = (cost[..., None] + error.square()).flatten(2)[..., into]
        second = both[..., 1] < both[..., 0]
        cost, source = both.amin(-1), torch.where(second, into[:, 1], into[:, 0])
        code, error = (x.flatten(2).gather(2, source) for x in (code, error))
        past.append((code, error, source // 2))
        left = left[..., 1:].gather(2, past[-1][2][..., None].expand(-1, -1, -1, left.shape[3] - 1))
        left -= error[..., None] * row[..., 1:]
    best, found = cost.argmin(-1, keepdim=True), []
    state = best[..., 0]
    for code, error, origin in reversed(past):
        found.append((code.gather(2, best), error.gather(2, best)))
        best = origin.gather(2, best)
    return *(torch.cat(parts[::-1], 2) for parts in zip(*found, strict=True)), state


def trellis_quantize(job: QuantSpec, hessian: Tensor, scale: Tensor, cfg: Config) -> Tensor:
    """`gptq_quantize` with trellis codes: blocks of columns as they stand, which costs a trellis a hundredth."""
    w, scale, factor = job.tensor.double(), scale.double(), hessian_inv_cholesky(hessian.double(), cfg.gptq_damp)
    w = w.masked_fill((hessian.diagonal(dim1=-2, dim2=-1) == 0)[:, None, :], 0.0)
    codes, state = torch.empty_like(w), torch.zeros_like(w[..., 0], dtype=torch.long)
    for begin in range(0, w.shape[2], cfg.gptq_block_size):
        end = begin + cfg.gptq_block_size
        block, own = w[..., begin:end], factor[:, begin:end, begin:end]
        codes[..., begin:end], errors, state = trellis_block(block, own, scale, state, 2.0 ** (job.bits - 1))
        w[..., end:] -= errors @ factor[:, begin:end, end:]
    return codes


def quantize(cfg: Config, job: QuantSpec, hessians: Mapping[str, Tensor], sigmas: float) -> QuantizedTensor:
    """Codes of a job by GPTQ where its inputs were observed, by rounding to nearest elsewhere (embedding tables)."""
    scale = row_scales(cfg, job, hessians, sigmas)
    if broken := [name for name in job.hessians if name in hessians and not hessians[name].isfinite().all()]:
        raise UserError(f"Hessians of {broken} are not finite: activations overflowed on the calibration data")
    if cfg.gptq_enabled and all(name in hessians for name in job.hessians):
        method = trellis_quantize if cfg.trellis else gptq_quantize
        codes = method(job, torch.stack([hessians[name] for name in job.hessians]), scale, cfg)
    elif cfg.trellis:
        codes = trellis_quantize(job, torch.eye(job.tensor.shape[2], device=scale.device)[None], scale, cfg)
    else:
        codes = round_to_grid(job.tensor, scale, job.bits)
    return QuantizedTensor(codes.to(torch.int8), scale.half(), cfg.trellis)


def quantize_tensors(
    run: Runtime, jobs: list[QuantSpec], hessians: dict[str, Tensor], sigmas: float
) -> dict[str, QuantizedTensor]:
    """Codes of all jobs by name, their layers shared over the ranks; every rank gets all.

    GPTQ is a loop over columns, so each rank takes layers that have the same number of columns in all. Sums over
    ranks join the parts: what a rank does not own is zero there.
    """
    ranks, coded = run.ranks, {}
    columns = torch.tensor([job.tensor.shape[2] for job in jobs for _ in job.tensor], dtype=torch.float64)
    middles = columns.cumsum(0) - columns / 2
    owners = (middles * ranks.world / columns.sum()).long().split([len(job.tensor) for job in jobs])
    for job, owner in zip(jobs, owners, strict=True):
        codes = torch.zeros_like(job.tensor, dtype=torch.int8)
        scale = torch.zeros_like(job.tensor[..., 0], dtype=torch.half)
        if own := (owner == ranks.rank).nonzero()[:, 0].tolist():
            names = [job.hessians[layer] for layer in own]
            unit = None if job.unit is None else job.unit[own]
            part = job._replace(tensor=job.tensor[own], bits=job.bits[own], hessians=names, unit=unit)
            codes[own], scale[own] = quantize(run.cfg, part, hessians, sigmas)[:2]
        coded[job.name] = QuantizedTensor(ranks.all_reduce_sum_(codes), ranks.all_reduce_sum_(scale), run.cfg.trellis)
    return coded


def row_classes(codes: Tensor) -> Tensor:
    """Class (n, rows) uint8 of each row of codes: its root mean square in quarters of an octave, from 1/256 up.

    Rows of a class share a distribution, wherever they are: codes are all but normal, and so their size says it.
    """
    return (4 * codes.float().square().mean(-1).clamp_min(2.0**-16).log2() / 2 + 32).round().to(torch.uint8)


def entropy_bytes(*tensors: Tensor) -> float:
    """Bytes that an ideal coder needs for codes (n, rows, cols), with one distribution per class of rows."""
    counts = torch.zeros(64 * 256, dtype=torch.double)
    for codes in tensors:
        places = codes.long() + 128 + 256 * row_classes(codes).long().unsqueeze(-1)
        counts += torch.bincount(places.flatten(), minlength=64 * 256).cpu()
    totals = counts.view(64, 256).sum(1, keepdim=True).clamp_min(1).expand(-1, 256).flatten()
    return float((counts * (totals / counts.clamp_min(1)).log2()).sum()) / 8


def ideal_bytes(coded: Iterable[QuantizedTensor], kept: Mapping[str, Tensor]) -> float:
    """Bytes of an artifact whose codes take their entropy and whose scales and kept tensors are stored as they are."""
    coded = list(coded)
    halves = sum(tensor.numel() for tensor in [*kept.values(), *(c.scale for c in coded)])
    return entropy_bytes(*(c.codes for c in coded)) + 2 * halves


def bisect(size: Callable[[float], float], low: float, high: float, limit: float) -> float:
    """The least x in (low, high] with size(x) <= limit, to 1/4096 of the range; size falls; x = high is not tried."""
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) > limit else (low, middle)
    return high


SIGMAS_RANGE = (4.0, 20.0)  # of 6 bits: below 4 the grid clips more than it gains; at 20 a weight has 2.6 bits
SIZE_BAND = (0.998, 0.9990, 1.0)  # least, aimed-at and greatest part of TARGET_BYTES that the artifact takes


def code_bytes() -> int:
    """Size of the file that runs."""
    return Path(__file__).stat().st_size


def fit_clip_sigmas(cfg: Config, jobs: list[QuantSpec], kept: Mapping[str, Tensor], ratio: float = 1.0) -> float:
    """The clip k whose rounded codes fill the limit, by bisection of their entropy; `ratio`: actual over estimated."""
    limit = SIZE_BAND[1] * cfg.target_bytes - code_bytes()

    def size(log_sigmas: float) -> float:
        scales = [row_scales(cfg, job, {}, math.exp(log_sigmas)) for job in jobs]
        pairs = zip(jobs, scales, strict=True)
        rounded = (QuantizedTensor(round_to_grid(job.tensor, scale, job.bits), scale) for job, scale in pairs)
        return ratio * ideal_bytes(rounded, kept)

    finest, coarsest = SIGMAS_RANGE[0], SIGMAS_RANGE[1] * (2 ** (cfg.matrix_bits - 1) - 1) / 31
    return math.exp(bisect(size, math.log(finest), math.log(coarsest), limit))


# ----------------------------------------------------------------------------------------------
# 11. Artifact
# ----------------------------------------------------------------------------------------------
# magic | length of header | header (zlib JSON: architecture, layer order, tensor table, streams) |
# streams | first 8 bytes of the SHA-256 of all that. Codes, classes of their rows, scales and kept
# tensors are one stream each; the coder is chosen per stream and named in the header. Codes are
# stored row by row, the rows of a class together. The bytes that count are those on disk: this
# file's and the artifact's.


def refuse_other(saved: Mapping[str, Any], ours: Mapping[str, Any], where: str, remedy: str) -> None:
    """UserError where a saved model or run differs from this one in any of `ours`: variables, files, ranks, script."""
    if changed := [name for name in ours if saved.get(name) != ours[name]]:
        pairs = ", ".join(f"{n.upper()} was {str(saved.get(n))[:60]}, is {str(ours[n])[:60]}" for n in changed[:8])
        raise UserError(f"{where}: {pairs}; {remedy}")


def refuse_other_version(saved: Any, where: str) -> None:
    """UserError when a saved model knows other variables than this script: a default need not be what it had."""
    if not isinstance(saved, dict) or (names := saved.keys() ^ Config().architecture().keys()):
        lacking = " ".join(sorted(map(str, names))).upper()[:200] if isinstance(saved, dict) else "all variables"
        raise UserError(f"{where} was made by another version of train_gpt.py (one of them lacks {lacking}); "
                        "take logs/<RUN_ID>.py of its run")  # fmt: skip


MAGIC = b"PGOLF\x02"


def byte_shuffle(values: Tensor) -> bytes:
    """Half-precision values as all low bytes, then all high bytes: like bytes side by side compress better."""
    return values.cpu().numpy().reshape(-1).view(np.uint8).reshape(-1, 2).T.tobytes()


def byte_unshuffle(raw: bytes) -> Tensor:
    """Inverse of `byte_shuffle`: (n,) half."""
    return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(2, -1).T.copy().view(np.float16).reshape(-1))


class Codec(NamedTuple):
    """A coder: module, its error, name of its level argument, strongest level, how at most `size` bytes are read."""

    module: str
    error: str
    argument: str
    strongest: int
    read: Callable[[Any, bytes, int], bytes]  # module, data, size


MOST_WINDOW = 2**27  # bytes of memory that a stream may ask its decoder for


def read_brotli(decoder: Any, data: bytes, size: int) -> bytes:
    """At most about `size` bytes: a decoder without a limit is fed in small pieces."""
    raw = bytearray()
    for begin in range(0, len(data), 64):
        if len(raw) > size:
            break
        raw += decoder.process(data[begin : begin + 64])
    return bytes(raw)


CODECS = {
    "zlib": Codec("zlib", "error", "level", 9, lambda m, data, size: m.decompressobj().decompress(data, size)),
    "lzma": Codec("lzma", "LZMAError", "preset", 9,
                  lambda m, data, size: m.LZMADecompressor(memlimit=MOST_WINDOW).decompress(data, size)),
    "zstd": Codec("zstandard", "ZstdError", "level", 22,
                  lambda m, data, size: m.ZstdDecompressor(max_window_size=MOST_WINDOW).stream_reader(data).read(size)),
    "brotli": Codec("brotli", "error", "quality", 11,
                    lambda m, data, size: read_brotli(m.Decompressor(), data, size)),
}  # fmt: skip


def codec(name: str) -> Any:
    """The module of a coder; UserError where its package is missing."""
    try:
        return importlib.import_module(CODECS[name].module)
    except ImportError:
        raise UserError(f"coder {name}: its package is not installed; pip install -r requirements.txt") from None


def encode_stream(cfg: Config, raw: bytes) -> tuple[str, bytes]:
    """(coder, bytes) of a stream by COMPRESSOR; auto and ans take the smallest of the coders that are installed."""
    installed = [name for name, row in CODECS.items() if importlib.util.find_spec(row.module)]
    options = []
    for name in [cfg.compressor] if cfg.compressor in CODECS else installed:
        row = CODECS[name]
        level = cfg.compressor_level if cfg.compressor in CODECS and cfg.compressor_level >= 0 else row.strongest
        options.append((name, codec(name).compress(raw, **{row.argument: level})))
    return min(options, key=lambda option: len(option[1]))


ANS_BITS, ANS_LANES = 15, 1024  # probability resolution; coder states that run side by side in numpy


def ans_steps(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(segment, slice of the symbols) of each coder step: up to ANS_LANES symbols of one segment."""
    begin = 0
    for segment, size in enumerate(sizes):
        for offset in range(0, size, ANS_LANES):
            yield segment, slice(begin + offset, begin + min(offset + ANS_LANES, size))
        begin += size


def ans_decode(blob: bytes, sizes: Sequence[int]) -> np.ndarray:
    """Inverse of `ans_encode`: int8 symbols. ValueError where the stream does not end as it must."""
    length = struct.unpack_from("<I", blob)[0]
    raw = decode_stream("zlib", blob[4 : 4 + length], 512 * len(sizes))
    tables = np.frombuffer(raw, "<u2").reshape(256, -1).T.astype(np.int64)
    tables[tables.sum(1) == 0, 0] = 1 << ANS_BITS  # an empty segment
    if (tables.sum(1) != 1 << ANS_BITS).any():
        raise ValueError("frequencies of the entropy coder do not add up")
    starts = np.cumsum(tables, axis=1) - tables
    lookup = np.stack([np.repeat(np.arange(256), row) for row in tables]).astype(np.int16)
    begin = 4 + length
    state = np.frombuffer(blob, "<u4", ANS_LANES, begin).astype(np.uint64)
    words, position = np.frombuffer(blob, "<u2", offset=begin + 4 * ANS_LANES).astype(np.uint64), 0
    symbols = np.empty(sum(sizes), np.int8)
    for segment, span in ans_steps(sizes):
        lanes = state[: span.stop - span.start]
        slot = (lanes & np.uint64((1 << ANS_BITS) - 1)).astype(np.int64)
        symbol = lookup[segment][slot]
        symbols[span] = symbol - 128
        frequency = tables[segment][symbol].astype(np.uint64)
        lanes[:] = frequency * (lanes >> np.uint64(ANS_BITS)) + (slot - starts[segment][symbol]).astype(np.uint64)
        low = np.flatnonzero(lanes < 1 << 16)
        lanes[low] = lanes[low] << np.uint64(16) | words[position : position + len(low)]
        position += len(low)
    if position != len(words) or (state != 1 << 16).any():
        raise ValueError("the entropy coder does not end where it began")
    return symbols


def decode_stream(coder: str, data: bytes, *segments: int) -> bytes:
    """A stream's bytes, as many as its segments have; ValueError where it has others, before it can fill the memory."""
    if coder == "ans":
        return ans_decode(data, segments).tobytes()
    module, size = codec(coder), sum(segments)
    try:
        raw = CODECS[coder].read(module, data, size + 1)
    except getattr(module, CODECS[coder].error) as problem:
        raise ValueError(str(problem)) from None
    if len(raw) != size:
        raise ValueError(f"a stream holds {len(raw)} bytes or more, not {size}")
    return raw


def ans_frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts (256,) scaled to sum to 2^ANS_BITS, at least 1 where a symbol occurs."""
    scaled = np.maximum(np.floor(counts / max(counts.sum(), 1) * (1 << ANS_BITS)), counts > 0).astype(np.int64)
    scaled[scaled.argmax()] += (1 << ANS_BITS) - scaled.sum()  # the rounding goes to the commonest symbol
    return scaled


def ans_encode(symbols: np.ndarray, sizes: list[int]) -> bytes:
    """Entropy-code int8 symbols whose segments of `sizes` each have their own distribution (rANS, arXiv 1311.2540).

    ANS_LANES interleaved coders share one stream of 16-bit words, so that numpy codes 1,024 symbols per call; the
    price is 4 KB of final states. Layout: table length, zlib tables, states, words.
    """
    bounds = np.cumsum([0, *sizes])
    unsigned = symbols.astype(np.int16) + 128
    tables = np.stack([ans_frequencies(np.bincount(unsigned[a:b], minlength=256)) for a, b in zip(bounds, bounds[1:])])
    starts = np.cumsum(tables, axis=1) - tables
    state, words = np.full(ANS_LANES, 1 << 16, np.uint64), []
    for segment, span in reversed(list(ans_steps(sizes))):
        symbol = unsigned[span]
        frequency, start = tables[segment][symbol].astype(np.uint64), starts[segment][symbol].astype(np.uint64)
        lanes = state[: len(symbol)]
        full = lanes >= frequency << np.uint64(32 - ANS_BITS)
        words.append((lanes[full] & np.uint64(0xFFFF)).astype("<u2"))
        lanes[full] >>= np.uint64(16)
        lanes[:] = (lanes // frequency << np.uint64(ANS_BITS)) + lanes % frequency + start
    packed = zlib.compress(tables.astype("<u2").T.tobytes(), 9)
    body = np.concatenate(words[::-1]) if words else np.zeros(0, "<u2")
    return struct.pack("<I", len(packed)) + packed + state.astype("<u4").tobytes() + body.tobytes()


def rows_by_class(classes: np.ndarray, lengths: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Order of the rows (n,) in which those of a class stand together, and how many codes each class has (256)."""
    sizes = np.bincount(classes, lengths, minlength=256).astype(np.int64)
    return classes.argsort(kind="stable"), sizes.tolist()


def encode_artifact(
    cfg: Config, coded: Mapping[str, QuantizedTensor], kept: Mapping[str, Tensor], notes: dict
) -> bytes:
    """The artifact's bytes: see the section's head for the layout. `notes` go into the header as they are."""
    classes = np.concatenate([row_classes(c.codes).cpu().numpy().reshape(-1) for c in coded.values()])
    rows = [row for c in coded.values() for row in c.codes.flatten(0, 1).cpu().numpy()]
    order, sizes = rows_by_class(classes, [len(row) for row in rows])
    codes, use_ans = np.concatenate([rows[i] for i in order]), cfg.compressor in ("auto", "ans")
    streams = {
        "codes": ("ans", ans_encode(codes, sizes)) if use_ans else encode_stream(cfg, codes.tobytes()),
        "classes": encode_stream(cfg, classes.tobytes()),
        "scales": encode_stream(cfg, byte_shuffle(torch.cat([c.scale.flatten() for c in coded.values()]))),
        "kept": encode_stream(cfg, byte_shuffle(torch.cat([t.flatten() for t in kept.values()]))),
    }
    header = {
        "architecture": cfg.architecture(),
        "order": list(final_order(cfg)),
        "matrix_bits": cfg.matrix_bits,
        "trellis": cfg.trellis,
        "coded": [[name, list(c.codes.shape)] for name, c in coded.items()],
        "kept": [[name, list(t.shape)] for name, t in kept.items()],
        "streams": [[name, coder, len(data)] for name, (coder, data) in streams.items()],
        **notes,
    }
    packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = MAGIC + struct.pack("<I", len(packed)) + packed + b"".join(data for _, data in streams.values())
    return body + hashlib.sha256(body).digest()[:8]


DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, EOFError, MemoryError, RecursionError,
          struct.error, zlib.error)  # fmt: skip
MOST_HEADER_BYTES = 2**20


def tensor_table(cfg: Config) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Shapes by name of the coded tensors and of the kept ones that an architecture has, in an artifact's order."""
    banks = {spec.name: [cfg.num_layers, spec.rows, spec.cols] for spec in bank_specs(cfg)}
    coded = {spec.name: [1, *spec.shape] for spec in param_table(cfg) if spec.coded}
    return banks | coded, {spec.name: [*spec.shape] for spec in param_table(cfg) if not spec.coded}


def saved_config(saved: Any, where: str) -> Config:
    """The configuration with the architecture of a saved model; UserError unless a user could have set it."""
    refuse_other_version(saved, where)
    cfg = Config(**{spec.name: parse_value(variable, as_text(saved[spec.name]), spec)
                    for variable, spec in Config.variables().items() if spec.name in saved})  # fmt: skip
    validate(cfg, model_rules(cfg))
    return cfg


def read_header(blob: bytes, path: Path) -> tuple[dict[str, Any], Config, int]:
    """Header of an artifact, its architecture, and the offset of its first stream. UserError for anything that this
    script does not write: nothing is allocated by what a header says before that is compared with what its
    architecture implies, and a model of more than 16 weights a byte is none."""
    if not blob.startswith(MAGIC) or len(blob) < len(MAGIC) + 12:
        raise UserError(f"{path}: not an artifact of this script (it starts with {blob[:6]!r}, not {MAGIC!r})")
    if hashlib.sha256(blob[:-8]).digest()[:8] != blob[-8:]:
        raise UserError(f"{path}: damaged or truncated ({len(blob)} bytes); export it again with EXPORT_ONLY=1")
    end = len(MAGIC) + 4 + struct.unpack_from("<I", blob, len(MAGIC))[0]
    try:
        header = json.loads(CODECS["zlib"].read(zlib, blob[len(MAGIC) + 4 : end], MOST_HEADER_BYTES))
        cfg = saved_config(header["architecture"], str(path))
        coded, kept = tensor_table(cfg)
        names, coders, sizes = zip(*header["streams"], strict=True)
        orders = [[*range(cfg.num_layers)], [*final_order(cfg)]]
        sound = [
            # As text, since Python takes true and 1.0 for 1.
            json.dumps([header["coded"], header["kept"]]) == json.dumps([[*coded.items()], [*kept.items()]]),
            names == ("codes", "classes", "scales", "kept") and json.dumps(header["order"]) in map(json.dumps, orders),
            sum(map(math.prod, [*coded.values(), *kept.values()])) <= 16 * len(blob),
            {*coders[1:]} <= CODECS.keys() and coders[0] in ("ans", *CODECS),
            all(type(size) is int and size >= 0 for size in sizes) and end + sum(sizes) + 8 == len(blob),
            type(header["trellis"]) is bool and type(header["matrix_bits"]) is int and 2 <= header["matrix_bits"] <= 8,
            {*map(type, header["identity"].values())} <= {str},
        ]
    except DAMAGE as problem:
        raise UserError(f"{path}: its header is none of this script ({str(problem)[:200]})") from None
    if not all(sound):
        raise UserError(f"{path}: its header contradicts itself; export it again with EXPORT_ONLY=1")
    return header, cfg, end


def decode_artifact(blob: bytes, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header, and the parameters by name in fp32 as the model has them; UserError where the streams are damaged."""
    header, cfg, offset = read_header(blob, path)
    coded, kept = tensor_table(cfg)
    file = io.BytesIO(blob[offset:])
    streams = [(coder, file.read(size)) for _, coder, size in header["streams"]]
    lengths = [cols for count, rows, cols in coded.values() for _ in range(count * rows)]

    def halves(stream: int, shapes: list[list[int]]) -> list[Tensor]:
        """A stream's tensors of half-precision values."""
        return cut(byte_unshuffle(decode_stream(*streams[stream], 2 * sum(map(math.prod, shapes)))), shapes)

    try:
        classes = np.frombuffer(decode_stream(*streams[1], len(lengths)), np.uint8)
        order, sizes = rows_by_class(classes, lengths)
        codes = torch.from_numpy(np.frombuffer(decode_stream(*streams[0], *sizes), np.int8).copy())
        rows = codes.split([lengths[i] for i in order])
        codes = cut(torch.cat([rows[i] for i in order.argsort()]), [*coded.values()])
        scales, values = halves(2, [shape[:2] for shape in coded.values()]), halves(3, [*kept.values()])
    except DAMAGE as problem:
        raise UserError(f"{path}: its streams are damaged ({str(problem)[:200]})") from None
    if not all(tensor.isfinite().all() for tensor in [*scales, *values]):
        raise UserError(f"{path}: it holds scales that are not finite; export it again with EXPORT_ONLY=1")
    parameters, banks = {}, {spec.name for spec in bank_specs(cfg)}
    for name, *pair in zip(coded, codes, scales, strict=True):
        tensor = QuantizedTensor(*pair, header["trellis"]).dequantize()
        parameters[f"banks.{name}" if name in banks else f"rest.{name}"] = tensor if name in banks else tensor[0]
    return header, parameters | {f"rest.{name}": value.float() for name, value in zip(kept, values, strict=True)}


class Exporter:
    """Quantizes and encodes the model's weights so that code and artifact fit TARGET_BYTES."""

    def __init__(self, run: Runtime, model: GPT, hessians: dict[str, Tensor], identity: Mapping[str, str]) -> None:
        """`identity` of tokenizer and validation set, which the artifact carries."""
        self.run, self.cfg, self.model, self.hessians, self.identity = run, run.cfg, model, hessians, identity
        self.kept, self.limit = passthrough(model), run.cfg.target_bytes - code_bytes()
        self.sigmas, self.layer_bits = run.cfg.matrix_clip_sigmas, {}
        self.coded, self.blob, self.size = {}, b"", 0  # the blob is rank 0's, which writes it
        self.ratio = 1.0  # of the size over the entropy, when last encoded

    def quantize(self, ratio: float = 1.0) -> None:
        """Quantize; a clip that is ours to choose is first chosen by the expected size, `ratio` times its estimate."""
        with self.run.timed("gptq" if self.cfg.gptq_enabled else "rounding", "train"):
            jobs = quant_specs(self.model, self.layer_bits, self.hessians)
            if self.cfg.auto_clip and not self.layer_bits:
                (self.sigmas,) = self.run.ranks.all_reduce_max(fit_clip_sigmas(self.cfg, jobs, self.kept, ratio))
            self.coded = quantize_tensors(self.run, jobs, self.hessians, self.sigmas)

    def encode(self) -> int:
        """Encode the current codes, on rank 0; returns the artifact's size, on every rank."""
        with self.run.timed("encode", "untimed"):
            notes = {"clip_sigmas": round(self.sigmas, 4), "layer_bits": self.layer_bits,
                     "order": list(self.model.order), "identity": dict(self.identity)}  # fmt: skip
            if self.run.ranks.is_main_process:
                self.blob = encode_artifact(self.cfg, self.coded, self.kept, notes)
            self.size = int(self.run.ranks.all_reduce_max(len(self.blob))[0])
            self.ratio *= self.size / self.expected()
        return self.size

    def expected(self) -> float:
        """The size of the current codes by their entropy, in milliseconds where a slow coder takes half a minute."""
        return self.ratio * self.run.ranks.all_reduce_max(ideal_bytes(self.coded.values(), self.kept))[0]

    def fill(self) -> None:
        """Quantize; where the clip is ours to choose, choose it so that the artifact fills the limit."""
        ratio = 1.035 if self.cfg.trellis else 1.0  # over rounding to the nearest of a grid as wide
        for _ in range(3):
            self.quantize(ratio)
            share = (self.encode() + code_bytes()) / self.cfg.target_bytes
            if not self.cfg.auto_clip:
                return
            self.run.log(f"fit: clip_sigmas:{self.sigmas:.3f} artifact:{self.size} share_of_limit:{share:.4f}")
            finest = self.sigmas <= SIGMAS_RANGE[0] * 1.001  # a small model: there is nothing more to spend bytes on
            if share <= SIZE_BAND[2] and (share >= SIZE_BAND[0] or finest):
                return
            ratio *= self.size / (SIZE_BAND[1] * self.cfg.target_bytes - code_bytes())

    def prune(self) -> None:
        """Zero the +-1 codes that cost least (smallest scale^2) until the artifact fits (PR #609)."""
        full = {spec.name: self.coded[spec.name] for spec in self.model.specs}
        costs = {n: bank.scale.float().square().unsqueeze(-1).where(bank.codes.abs() == 1, math.inf)
                 for n, bank in full.items()}  # fmt: skip
        ranked = torch.cat([cost[cost < math.inf] for cost in costs.values()]).sort().values

        def zeroed_size(share: float) -> float:
            threshold = ranked[min(int(share * len(ranked)), len(ranked) - 1)]
            for n, bank in full.items():
                self.coded[n] = bank._replace(codes=bank.codes.masked_fill(costs[n] <= threshold, 0))
            return self.expected()

        for _ in range(4):  # by entropy, and then by the coder, which corrects what is expected of it
            share = bisect(zeroed_size, 0.0, 1.0, 0.999 * self.limit)
            zeroed_size(share)
            if self.encode() <= self.limit:
                break
        self.run.log(f"selective_prune: +-1 codes zeroed:{share:.4f} artifact:{self.size}")

    def lower_layers(self) -> None:
        """Give one layer after another five bits, from the centre outwards, until the artifact fits (PR #638)."""
        layers = sorted(range(self.cfg.num_layers), key=lambda i: abs(i - (self.cfg.num_layers - 1) / 2))
        for layer in layers:
            if self.size <= self.limit:
                return
            self.layer_bits[layer] = 5
            self.quantize()
            size = self.expected()
            if size < 1.02 * self.limit or layer == layers[-1]:  # near enough that only the coder can tell
                size = self.encode()
            self.run.log(f"int5_fallback: layer {layer} at 5 bits, artifact:{size:.0f}")

    def export(self) -> bytes:
        """The artifact (on rank 0); UserError, with the excess, when nothing that is allowed makes it fit."""
        self.fill()
        if self.size > self.limit and self.cfg.selective_prune_enabled and not self.cfg.trellis:  # no code stands alone
            self.prune()
        if self.size > self.limit and self.cfg.int5_fallback and self.cfg.matrix_bits > 5:
            self.lower_layers()
        if self.size > self.limit:
            raise UserError(f"artifact {self.size} + code {code_bytes()} bytes are {self.size - self.limit} bytes over "
                            f"TARGET_BYTES={self.cfg.target_bytes}; the weights are safe in {self.cfg.weights_file}: "
                            "raise MATRIX_CLIP_SIGMAS (0 fits by itself) or lower MATRIX_BITS, with EXPORT_ONLY=1")
        return self.blob


# ----------------------------------------------------------------------------------------------
# 12. Evaluation
# ----------------------------------------------------------------------------------------------
# A plan of windows says which targets each window scores; one function runs the model on them.
# Every evaluation checks that each target was scored, and its bytes counted, exactly once.


def plan_windows(targets: int, length: int, stride: int) -> np.ndarray:
    """Windows (n, 3) int64: first input position, first scored target, end of scored targets; target i is token i + 1.
    The first window scores all its `length` targets, every later one the `stride` targets after those scored before it,
    with as much context as fits; the last one ends exactly at the last target."""
    ends = np.append(np.arange(length, targets, stride), targets)
    return np.stack([ends - length, np.append(0, ends[:-1]), ends], axis=1)


def plan_document_windows(spans: np.ndarray, length: int, stride: int) -> np.ndarray:
    """The fewest windows, as of `plan_windows`, in which every target sees its document (`spans` of `document_spans`)
    from the start, or its latest length - stride + 1 tokens and more: what sliding windows show with DOC_ATTENTION.
    """
    starts, targets = np.sort(spans[:, 0]), int(spans[:, 1].max())
    windows = [(0, 0, length)]
    while (done := windows[-1][2]) < targets:
        document = int(starts[np.searchsorted(starts, done, side="right") - 1])
        begin = min(max(document, done + stride - length), targets - length)
        windows.append((begin, done, begin + length))
    return np.array(windows)


class Score(NamedTuple):
    """Sums over scored targets."""

    nats: float
    targets: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.targets

    @property
    def bpb(self) -> float:
        """Bits per byte of the original text."""
        return self.nats / math.log(2) / self.bytes


class NgramMixer:
    """Mixes what n-grams of the text scored so far predict into the model's prediction (successor of PR #638).

    p(v) = (1 - a) p_model(v) + a count(context, v) / count(context). The context is the longest one of up to
    NGRAM_MAX_ORDER - 1 tokens, all of the same document, that has been counted; without one a is 0. Otherwise
    a = low + (high - low) sigmoid(2 (H - NGRAM_ENTROPY)) with H the model's entropy: it cannot depend on the target, so
    p sums to 1.

    Contexts are exact: every distinct run of n tokens has a number. Numbering reads the whole text, but numbers are
    only names; what is predicted comes from `learn`, which is called with targets that have been scored.
    """

    def __init__(self, run: Runtime, validation: ValidationSet) -> None:
        """Number all runs of tokens; nothing is counted yet."""
        self.cfg, self.orders = run.cfg, range(run.cfg.ngram_min_order, run.cfg.ngram_max_order + 1)
        tokens = validation.tokens.to(float64_device(run.ranks.device)).long()
        place = torch.arange(len(tokens), device=tokens.device)
        self.age = place - torch.where(tokens == validation.bos_id, place, 0).cummax(0).values  # tokens since BOS
        self.labels = {1: tokens}  # n -> number of the run of n tokens that ends here
        for n in range(2, self.orders[-1] + 1):
            longer = F.pad(self.labels[n - 1], (1, -1)).long() * run.cfg.vocab_size + tokens
            self.labels[n] = longer.unique(return_inverse=True)[1].int()
        counters = partial(torch.zeros, dtype=torch.int32, device=tokens.device)
        runs = {n: int(labels.max()) + 1 for n, labels in self.labels.items()}
        self.follows = {n: counters(runs[n]) for n in self.orders}  # times that the last token of a run of n was scored
        self.contexts = {n: counters(runs[n - 1]) for n in self.orders}  # times that any was, after a run of n - 1

    def known(self, n: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Whether order n reaches back to no other document at `positions`, and the number of its context there."""
        return self.age[positions - 1] >= n - 2, self.labels[n - 1][positions - 1]

    def learn(self, windows: np.ndarray) -> None:
        """Count the targets of `windows`, which have been scored; every rank counts all, so that all know the same."""
        targets = torch.arange(int(windows[0, 1]), int(windows[-1, 2]), device=self.age.device) + 1
        for n in self.orders:
            within, context = self.known(n, targets)
            self.contexts[n].index_add_(0, context, within.int())
            self.follows[n].index_add_(0, self.labels[n][targets], within.int())

    def mix(self, positions: Tensor, nll: Tensor, entropy: Tensor) -> Tensor:
        """Negative log-likelihood (n,) of the tokens at `positions` in the mixture; nll and entropy are the model's."""
        cfg, share = self.cfg, torch.full_like(nll, -1.0, dtype=torch.float64)  # where no context is known
        for n in self.orders:  # so that the longest known context decides
            within, context = self.known(n, positions)
            times = self.contexts[n][context] * within
            share = torch.where(times > 0, self.follows[n][self.labels[n][positions]].double() / times, share)
        rise = torch.sigmoid(2 * (entropy.double() - cfg.ngram_entropy))
        alpha = torch.where(share < 0, 0.0, cfg.ngram_alpha_low + (cfg.ngram_alpha_high - cfg.ngram_alpha_low) * rise)
        return -torch.log((1 - alpha) * torch.exp(-nll.double()) + alpha * share)


@torch.no_grad()
def score_windows(
    run: Runtime, model: GPT, validation: ValidationSet, windows: np.ndarray, mixer: NgramMixer | None = None
) -> Tensor:
    """[nats, targets, bytes] over the scored targets of `windows`, by all ranks, float64; a mixer adds its nats. All
    batches have one shape: the last is filled with windows that score nothing."""
    length, device, share = run.cfg.eval_len, run.ranks.device, run.ranks.share(len(windows))
    batch = max(1, min(run.cfg.val_batch_size // run.ranks.world, model.micro_batch) // length)
    plan = torch.from_numpy(np.pad(windows[share.start : share.stop], ((0, -len(share) % batch), (0, 0)))).to(device)
    weights, exact = model.fast_weights(False), float64_device(device)
    sums = torch.zeros(4 if mixer else 3, dtype=torch.float64, device=exact)
    for chunk in plan.split(batch) if len(plan) else ():  # a rank may have no share of a short chunk
        positions = chunk[:, :1] + torch.arange(length, device=device)
        scored = (positions >= chunk[:, 1:2]) & (positions < chunk[:, 2:])
        inputs = *validation.batch(positions), weights, model.order
        nll, *entropy = model.fast_nll_and_entropy(*inputs) if mixer else [model.fast_nll(*inputs)]
        columns = [nll * scored, scored, validation.token_bytes[positions + 1] * scored]
        if mixer:
            columns.append(mixer.mix(*(t[scored].to(exact) for t in (positions + 1, nll, *entropy))))
        sums += torch.stack([column.to(exact).sum(dtype=torch.float64) for column in columns])
    return run.ranks.all_reduce_sum_(sums)


def scores(validation: ValidationSet, sums: Tensor) -> list[Score]:
    """The Score of each column of nats in `sums` over the whole validation set; asserts that it was covered exactly."""
    nats, targets, counted, *mixed = sums.tolist()
    expected = validation.targets, int(validation.token_bytes[1:].sum())
    assert (int(targets), int(counted)) == expected, f"scored {targets, counted} targets and bytes of {expected}"
    return [Score(total, int(targets), int(counted)) for total in (nats, *mixed)]


def document_spans(validation: ValidationSet) -> np.ndarray:
    """First target and end of each document, longest first; the BOS of the next one is a document's last target."""
    starts = np.union1d([0], (validation.tokens[:-1] == validation.bos_id).nonzero()[:, 0].cpu().numpy())
    spans = np.stack([starts, np.append(starts[1:], validation.targets)], 1)
    return spans[np.argsort(spans[:, 0] - spans[:, 1], kind="stable")]


def evaluate(run: Runtime, model: GPT, validation: ValidationSet, stride: int, by_document: bool = False) -> Score:
    """Score the whole validation set with windows of EVAL_SEQ_LEN that move by `stride`, or begin at documents."""
    windows = plan_windows(validation.targets, run.cfg.eval_len, stride)
    if by_document:
        windows = plan_document_windows(document_spans(validation), run.cfg.eval_len, stride)
    return scores(validation, score_windows(run, model, validation, windows))[0]


class TestTimeTrainer:
    """Trains the model on text that has been scored (PR #461)."""

    def __init__(self, run: Runtime, model: GPT, validation: ValidationSet) -> None:
        """UserError where TTT_BATCH_SEQS does not divide over the ranks."""
        cfg, world = run.cfg, run.ranks.world
        if cfg.ttt_batch_seqs % world:
            raise UserError(f"TTT_BATCH_SEQS={cfg.ttt_batch_seqs} is no multiple of the {world} ranks")
        self.run, self.cfg, self.model, self.validation = run, cfg, model, validation
        self.parameters, self.trained = list(model.parameters()), 0
        self.layered = [*model.banks.values(), *(model.rest[s.name] for s in model.param_table if s.per_layer)]
        sgd = partial(torch.optim.SGD, momentum=cfg.ttt_momentum)
        maker = {"sgd": sgd, "adamw": partial(torch.optim.AdamW, weight_decay=0.0)}[cfg.ttt_optimizer]
        self.optimizer = maker(self.parameters, lr=cfg.ttt_lr)

    def learn(self, scored: int, progress: float) -> None:
        """Train on the whole windows up to target `scored` that were not trained on yet; the rate falls as a cosine."""
        cfg, length = self.cfg, self.cfg.eval_len
        starts = np.arange(self.trained, scored - length + 1, length)
        self.optimizer.param_groups[0]["lr"] = cfg.ttt_lr * 0.5 * (1 + math.cos(math.pi * progress))
        for _ in range(cfg.ttt_epochs):
            for first in range(0, len(starts), cfg.ttt_batch_seqs):
                self.step(starts[first : first + cfg.ttt_batch_seqs])
        self.trained += len(starts) * length

    def step(self, starts: np.ndarray) -> None:
        """One step on the windows at `starts`, filled up with others of weight 0; as many at a time as memory holds."""
        cfg, ranks = self.cfg, self.run.ranks
        weight = (torch.arange(cfg.ttt_batch_seqs, device=ranks.device) < len(starts)) / len(starts)
        filled = torch.from_numpy(np.resize(starts, cfg.ttt_batch_seqs)).to(ranks.device)
        offsets, most = torch.arange(cfg.eval_len, device=ranks.device), max(self.model.micro_batch // cfg.eval_len, 1)
        self.optimizer.zero_grad()
        for part in torch.tensor(ranks.share(cfg.ttt_batch_seqs), device=ranks.device).split(most):
            inputs, targets = self.validation.batch(filled[part, None] + offsets)
            nll = self.model.fast_nll(inputs, targets, self.model.fast_weights(False), self.model.order)
            (nll.mean(1) * weight[part]).sum().backward()
        for parameter in self.parameters:
            ranks.all_reduce_sum_(parameter.grad)
        for parameter in self.layered:
            parameter.grad[: cfg.ttt_freeze_blocks] = 0
        if cfg.ttt_grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, cfg.ttt_grad_clip)
        self.optimizer.step()


def evaluate_online(
    run: Runtime, model: GPT, validation: ValidationSet, trainer: TestTimeTrainer | None, mixer: NgramMixer | None
) -> list[Score]:
    """Sliding windows chunk by chunk: score a chunk, then let weights and counts learn from it, but for the last one.
    Returns the score, and with a mixer a second one with its predictions mixed in. The weights are restored."""
    total, kept = 0.0, {name: value.clone() for name, value in model.state_dict().items()}
    windows = plan_windows(validation.targets, run.cfg.eval_len, run.cfg.eval_stride)
    chunk_of = (windows[:, 2] - 1) // run.cfg.ttt_chunk_tokens  # where its last target lies
    chunks = np.split(windows, np.flatnonzero(np.diff(chunk_of)) + 1)
    for number, chunk in enumerate(chunks, 1):
        total += score_windows(run, model, validation, chunk, mixer)
        if trainer and number < len(chunks):
            trainer.learn(int(chunk[-1, 2]), (number - 1) / (len(chunks) - 1))
        if mixer and number < len(chunks):
            mixer.learn(chunk)
    model.load(kept)
    return scores(validation, total)


class DocumentLoRA:
    """Low-rank additions to all matrices of a model, one set for each document of a batch (PR #77, #1530). Every
    document starts from the same ones, which add nothing: its scores do not depend on its neighbours."""

    def __init__(self, run: Runtime, model: GPT) -> None:
        """Take the model's weights as they are now, for as many documents as fit where a micro-batch is smaller."""
        cfg = self.cfg = run.cfg
        self.documents = max(cfg.ttt_batch_size * model.micro_batch // MICRO_BATCH_TOKENS, 1)
        with torch.no_grad():
            weights = model.fast_weights(False)
        self.base = {**{spec.name: weights[spec.name].unbind() for spec in model.specs}, "head": (weights["head"],)}
        generator = torch.Generator().manual_seed(cfg.seed)
        self.first, self.inner, self.outer = {}, {}, {}
        fresh = partial(torch.empty, device=run.ranks.device, requires_grad=True)
        for name, matrices in self.base.items():
            count, (rows, cols) = len(matrices), matrices[0].shape
            first = (2 * torch.rand(count, cfg.ttt_lora_rank, cols, generator=generator) - 1) * cols**-0.5
            self.first[name] = first.to(run.ranks.device)
            self.inner[name] = fresh(self.documents, *first.shape)
            self.outer[name] = fresh(self.documents, count, rows, cfg.ttt_lora_rank)
        self.model = copy.copy(model)  # the same parameters; the kernels know no additions
        self.model.parts = PLAIN_LAYER
        self.fast_nll = compiled(cfg, self.nll)

    def reset(self) -> None:
        """Begin with other documents."""
        for name, first in self.first.items():
            self.inner[name].data.copy_(first)
            self.outer[name].data.zero_()
        cfg, parameters = self.cfg, [*self.inner.values(), *self.outer.values()]
        self.optimizer = torch.optim.AdamW(parameters, lr=cfg.ttt_lora_lr, betas=(0.0, cfg.ttt_beta2), eps=1e-10,
                                           weight_decay=cfg.ttt_weight_decay, fused=parameters[0].is_cuda)  # fmt: skip

    def nll(self, ids: Tensor, targets: Tensor, order: tuple[int, ...]) -> Tensor:
        """`GPT.nll` of ids (documents, T), each with its own additions."""
        scale, dtype, weights = self.cfg.ttt_lora_alpha / self.cfg.ttt_lora_rank, self.model.dtype, {}
        for name, matrices in self.base.items():
            inner, outer = self.inner[name].to(dtype).unbind(1), (scale * self.outer[name]).to(dtype).unbind(1)
            weights[name] = tuple(map(LoRAWeight, matrices, inner, outer))
        return self.model.nll(ids, targets, {**weights, "head": weights["head"][0]}, order)

    def learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def ttt_document_batch(additions: DocumentLoRA, validation: ValidationSet, spans: np.ndarray, table: Tensor) -> None:
    """Score documents side by side, chunk by chunk; each learns from a chunk once it is scored. `table` (2, targets)
    takes the nats of a target and the times that it was scored. Windows hold the latest tokens of a document up to the
    chunk's end, in one of two widths, since each is a graph to compile (some 40 s); nothing of another document is in
    them, and what comes after the chunk is blank."""
    cfg, device, last = additions.cfg, validation.tokens.device, validation.targets - 1
    starts, ends = np.pad(spans, ((0, additions.documents - len(spans)), (0, 0))).T  # the rest are empty documents
    additions.reset()
    for first in range(0, int((ends - starts).max()), cfg.ttt_chunk_size):
        firsts, stops = starts + first, np.minimum(starts + first + cfg.ttt_chunk_size, ends)
        half, longest = -(-cfg.eval_len // 2), int((stops - starts).max())
        width = half if longest <= half else cfg.eval_len
        begins = np.maximum(starts, stops - width)
        plan = torch.from_numpy(np.stack([begins, firsts, stops, stops < ends], 1)).to(device)
        begin, scored_from, stop, goes_on = (column.unsqueeze(1) for column in plan.unbind(1))
        positions = begin + torch.arange(width, device=device)
        visible, scored = positions < stop, (positions >= scored_from) & (positions < stop)
        ids, targets = (t.where(visible, validation.bos_id) for t in validation.batch(positions.clamp(max=last)))
        nll = additions.fast_nll(ids, targets, additions.model.order)
        place = positions[scored].to(table.device)
        table[0, place] += nll.detach()[scored].to(table)
        table[1, place] += 1
        if (stops < ends).any():
            share = scored * goes_on / scored.sum(1, keepdim=True).clamp(min=1)
            additions.learn((nll * share).sum())


def score_documents(run: Runtime, model: GPT, validation: ValidationSet) -> Tensor:
    """Nats of every target, and the times that it was scored, (2, targets) float64; the ranks share the documents."""
    table = torch.zeros(2, validation.targets, dtype=torch.float64, device=float64_device(run.ranks.device))
    model.requires_grad_(False)
    additions, spans = DocumentLoRA(run, model), document_spans(validation)
    batches = [spans[begin : begin + additions.documents] for begin in range(0, len(spans), additions.documents)]
    for batch in batches[run.ranks.rank :: run.ranks.world]:
        ttt_document_batch(additions, validation, batch, table)
    model.requires_grad_(True)
    return run.ranks.all_reduce_sum_(table)


def evaluate_documents(run: Runtime, model: GPT, validation: ValidationSet) -> Score:
    """Score the whole validation set document by document; asserts that every target was scored once."""
    nats, times = score_documents(run, model, validation)
    assert (times == 1).all(), f"{int((times != 1).sum())} targets were not scored exactly once"
    return Score(nats.sum().item(), validation.targets, int(validation.token_bytes[1:].sum()))


def log_score(run: Runtime, name: str, score: Score, extra: str = "") -> None:
    """A score under its canonical name, rounded and exact, with the time that was booked last."""
    milliseconds = round(1000 * run.ledger[-1][2])
    run.log(f"{name} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f}{extra} eval_time:{milliseconds}ms")
    run.log(f"{name}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}{extra}")
    run.log.event("score", name=name, val_loss=score.loss, val_bpb=score.bpb, eval_time_ms=milliseconds)


class ExportResult(NamedTuple):
    """What making an artifact leaves behind; nothing where it was only read."""

    model: GPT | None = None  # lends its compiled graphs
    before: Score | None = None  # of the weights that were quantized
    path: Path | None = None  # of the artifact
    digest: bytes = b""  # with which it ends, on rank 0


def log_degradation(run: Runtime, before: Score, after: Score) -> None:
    """What quantization cost, and a warning where that is much: the published systems lose 0.002 to 0.008 bpb."""
    lost, most = after.bpb - before.bpb, 0.01
    advice = f" WARNING: above {most}; raise MATRIX_BITS or TARGET_BYTES" if lost > most else ""
    run.log(f"quantization_degradation bpb:{lost:+.8f}{advice}")
    run.log.event("degradation", bpb=lost)


def evaluate_artifact(run: Runtime, validation: ValidationSet, produced: ExportResult) -> None:
    """Read ARTIFACT_PATH back from disk and score it, last by the sliding window."""
    cfg, path = run.cfg, produced.path or run.cfg.artifact_file
    with run.timed("read artifact", "eval"):
        blob = run.ranks.broadcast(path.read_bytes() if run.ranks.is_main_process else b"")
        if not blob.endswith(produced.digest):
            raise UserError(f"ARTIFACT_PATH={path}: another process has replaced it since it was written")
        header, parameters = decode_artifact(blob, path)
        where = f"ARTIFACT_PATH={path} belongs to another tokenizer or validation set"
        refuse_other(header["identity"], validation.identity, where, "set its TOKENIZER_PATH and DATA_PATH")
        model = produced.model or build_model(run, cfg, validation.bos_id)
        model.load(parameters)
        model.order = tuple(header["order"])
    kind = f"int{header['matrix_bits']}" + ("_zlib" if header["streams"][0][1] == "zlib" else "")
    with run.timed("roundtrip", "eval"):
        score = evaluate(run, model, validation, cfg.eval_len)
    log_score(run, f"final_{kind}_roundtrip", score)
    if produced.before:
        log_degradation(run, produced.before, score)
    for name, is_wanted in (("document windows", cfg.doc_attention), ("sliding window", True)):
        if cfg.eval_stride and is_wanted:
            with run.timed(name, "eval"):
                score = evaluate(run, model, validation, cfg.eval_stride, name == "document windows")
            log_score(run, f"final_{kind}_{name.replace(' ', '_')}", score, f" stride:{cfg.eval_stride}")
    if learners := [name for name, on in (("ttt", cfg.ttt_enabled), ("ngram", cfg.ngram_enabled)) if on]:
        with run.timed("+".join(learners), "eval"):
            trainer = TestTimeTrainer(run, model, validation) if cfg.ttt_enabled else None
            mixer = NgramMixer(run, validation) if cfg.ngram_enabled else None
            results = evaluate_online(run, model, validation, trainer, mixer)
        about = f" stride:{cfg.eval_stride} chunk:{cfg.ttt_chunk_tokens}" + (f" lr:{cfg.ttt_lr:g}" if trainer else "")
        if trainer:
            log_score(run, "legal_ttt", results[0], about)
        if mixer:
            about += f" orders:{cfg.ngram_min_order}-{cfg.ngram_max_order}"
            log_score(run, "legal_ttt_ngram" if trainer else "ngram_mix", results[1], about)
    if cfg.ttt_lora_enabled:
        with run.timed("ttt_lora", "eval"):
            score = evaluate_documents(run, model, validation)
        about = f" rank:{cfg.ttt_lora_rank} chunk:{cfg.ttt_chunk_size} lr:{cfg.ttt_lora_lr:g}"
        log_score(run, "legal_ttt_lora", score, about)


# ----------------------------------------------------------------------------------------------
# 13. Optimizers
# ----------------------------------------------------------------------------------------------
# Muon trains the banks, Adam the rest. With several ranks each owns some layers: it receives their
# gradients' mean, orthogonalizes them, and sends the updates to all.

QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of Muon (K. Jordan)
POLAR_EXPRESS = (  # per-iteration coefficients of Polar Express (arXiv 2505.16932), as in PR #1344
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz_coefficients(cfg: Config) -> list[tuple[float, float, float]]:
    """(a, b, c) of each iteration X <- aX + (bA + cA^2)X with A = XX^T."""
    rows = POLAR_EXPRESS if cfg.polar_express else (QUINTIC,)
    return [rows[min(i, len(rows) - 1)] for i in range(cfg.muon_backend_steps)]


def orthogonalize(matrices: Tensor, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """Nearest semi-orthogonal matrices of a batch (n, rows, cols), approximately: singular values near 1."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / (wide.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(wide.dtype)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def low_rank_orthogonalize(matrices: Tensor, share: float, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """`orthogonalize` of the best approximation of rank `share` x the smaller side (NuMuon, arXiv 2603.03597).

    Two rounds of block power iteration, with the same iteration as the final step for the basis: products only.
    """
    rank = math.ceil(share * min(matrices.shape[1:]) / 8) * 8  # products want multiples of 8
    if rank >= min(matrices.shape[1:]):
        return orthogonalize(matrices, coefficients)
    generator = torch.Generator(matrices.device).manual_seed(0)  # any number of ranks starts from the same directions
    block = torch.randn(matrices.shape[2], rank, generator=generator, device=matrices.device).to(matrices.dtype)
    for _ in range(2):
        basis = orthogonalize(matrices @ block, coefficients)
        block = matrices.mT @ basis
    return basis @ orthogonalize(block.mT, coefficients)


def wait_for(pair: tuple[Tensor, Any]) -> Tensor:
    """The tensor of a pair (tensor, handle), for use once its communication is done; on CUDA the host does not wait."""
    if pair[1] is not None:
        pair[1].wait()
    return pair[0]


def padded(layers: Tensor, world: int) -> Tensor:
    """(layers, rows, cols) with layers of zeros at the end, so that every rank owns as many."""
    return F.pad(layers, (0, 0, 0, 0, 0, -len(layers) % world))


def reduce_scatter(ranks: Ranks, grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """The mean over ranks of the layers that this rank owns, summed as `dtype`, and a handle to wait for."""
    if ranks.world == 1:
        return grad, None
    full = padded((grad / ranks.world).to(dtype), ranks.world)
    shard = full.chunk(ranks.world)[ranks.rank]
    if ranks.device.type != "cuda":  # gloo has no reduce-scatter on every supported version
        return shard, dist.all_reduce(full, async_op=True)
    shard = torch.empty_like(shard)
    return shard, dist.reduce_scatter_tensor(shard, full, async_op=True)


def all_gather(ranks: Ranks, shard: Tensor) -> tuple[Tensor, Any]:
    """All ranks' shards along dimension 0, and a handle to wait for."""
    if ranks.world == 1:
        return shard, None
    full = shard.new_empty((len(shard) * ranks.world, *shard.shape[1:]))
    return full, dist.all_gather_into_tensor(full, shard.contiguous(), async_op=True)


class ParallelMuon:
    """Muon over banks of (layers, rows, cols), sharded by layers (PR #399); not for embeddings, heads or vectors."""

    def __init__(self, cfg: Config, ranks: Ranks, model: GPT) -> None:
        self.cfg, self.ranks = cfg, ranks
        self.specs = sorted(model.specs, key=lambda s: s.rows * s.cols, reverse=True)
        self.banks = dict(model.banks.items())
        self.coefficients, self.dtype = newton_schulz_coefficients(cfg), model.dtype
        owned = -(-cfg.num_layers // ranks.world)  # layers per rank; the last ranks may hold padding
        zeros = partial(torch.zeros, device=ranks.device)  # the rails of the owned layers' momentum
        self.state = {s.name: [zeros(owned, s.rows, s.cols) for _ in range(1 + (cfg.muon_rails_at < 1))]
                      for s in self.specs}  # fmt: skip
        self.fast_muon_update, self.fast_apply = compiled(cfg, self.muon_update), compiled(cfg, self.apply)
        self.as_tensor = partial(torch.full, (), dtype=torch.float32, device=ranks.device)  # numbers would recompile

    def muon_update(
        self, spec: BankSpec, rails: list[Tensor], grad: Tensor, momentum: list, clip: Tensor, share: float = 1.0
    ) -> Tensor:
        """Update (n, rows, cols) of the owned layers from their averaged gradient; advances the momentum's `rails`.

        Nesterov momentum as `momentum_rails` says, optional row normalization (of the update, never of a rail:
        PR #1418), then every matrix of the bank orthogonalized by itself (the leading `share` of its singular
        directions) and scaled by sqrt(max(1, rows/cols)); Q and K in groups of heads (modded-nanogpt PR #253).
        """
        update = grad = grad.float() * clip
        for rail, (decay, gain, weight) in zip(rails, momentum, strict=True):
            rail.mul_(decay).add_(gain * grad)
            update = update + weight * rail
        if self.cfg.muon_row_normalize:
            update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        update = update.to(self.dtype)
        group, parts = self.cfg.muon_head_group * self.cfg.head_dim, []
        for name, a, b in spec.spans():
            rows = group if group and name in ("attn.c_q", "attn.c_k") else b - a
            part = low_rank_orthogonalize(update[:, a:b].reshape(-1, rows, spec.cols), share, self.coefficients)
            parts.append(part.view(len(update), b - a, spec.cols) * max(1.0, rows / spec.cols) ** 0.5)
        return torch.cat(parts, dim=1)

    def apply(self, bank: Tensor, update: Tensor, lr: Tensor) -> None:
        """Decoupled weight decay, then the step, in place on all layers."""
        bank.mul_(1 - lr * self.cfg.muon_wd).sub_(lr * update[: bank.shape[0]].float())

    def launch(self) -> dict[str, tuple[Tensor, Any]]:
        """Start averaging all gradients, largest first; bank -> (owned layers' gradient, handle to wait for)."""
        return {spec.name: reduce_scatter(self.ranks, self.banks[spec.name].grad, self.dtype) for spec in self.specs}

    def gather(self, gradients: dict[str, Tensor], plan: StepPlan, clip: Tensor) -> dict[str, tuple[Tensor, Any]]:
        """Updates of the owned layers from their gradients; bank -> (all ranks' updates, handle to wait for).

        A share of directions below 1 changes shapes as training goes on, so it runs uncompiled.
        """
        share, gathered = plan.muon_share, {}
        momentum = [tuple(map(self.as_tensor, rail)) for rail in momentum_rails(self.cfg, plan)]
        direction = self.fast_muon_update if share == 1 else partial(self.muon_update, share=share)
        for spec in self.specs:
            update = direction(spec, self.state[spec.name], gradients[spec.name], momentum, clip)
            gathered[spec.name] = all_gather(self.ranks, update)
        return gathered

    def finish(self, gathered: dict[str, tuple[Tensor, Any]], lr: Tensor) -> None:
        """Apply all layers' updates as they arrive."""
        for name, pair in gathered.items():
            self.fast_apply(self.banks[name], wait_for(pair), lr)


def tensor_leaves(tree: Any) -> list[Tensor]:
    """All tensors in nested dicts and lists, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [leaf for child in children for leaf in tensor_leaves(child)]


class Optimizers:
    """Muon and AdamW behind one `step`; every parameter is in exactly one of them."""

    def __init__(self, cfg: Config, ranks: Ranks, model: GPT) -> None:
        """Asserts that the tables of banks and of Adam's groups cover the parameters."""
        self.cfg, self.ranks = cfg, ranks
        self.muon = ParallelMuon(cfg, ranks, model)
        rates = {  # Adam group -> (learning rate, weight decay)
            "embed": (cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr, cfg.embed_wd),
            "head": (cfg.head_lr, cfg.adam_wd),
            "scalar": (cfg.scalar_lr, cfg.adam_wd),
            "asqu": (cfg.asqu_lr, 0.0),
            "lora": (cfg.lora_lr, 0.0),
        }
        groups = []
        for name, (lr, decay) in rates.items():
            if members := [model.rest[s.name] for s in model.param_table if s.group == name]:
                groups.append({"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay})
        fused = ranks.device.type == "cuda"
        self.adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=fused)
        self.small = [p for group in groups for p in group["params"]]
        owners = [id(p) for p in [*self.muon.banks.values(), *self.small]]
        assert sorted(owners) == sorted(map(id, model.parameters())), "a parameter is in no optimizer or in two"

    def launch_adam(self) -> tuple[Tensor, Any]:
        """Start averaging Adam's gradients over ranks in one bucket; the bucket and a handle to wait for."""
        bucket = torch.cat([p.grad.flatten() for p in self.small]) / self.ranks.world
        return bucket, dist.all_reduce(bucket, async_op=True) if self.ranks.world > 1 else None

    def clip_factor(self, bucket: Tensor, shards: list[Tensor]) -> Tensor:
        """Factor that limits the norm of the averaged gradient to GRAD_CLIP_NORM: one number for all ranks."""
        if not self.cfg.grad_clip_norm:
            return torch.ones((), device=self.ranks.device)
        own = torch.stack(torch._foreach_norm(shards)).float().square().sum()
        total = self.ranks.all_reduce_sum_(own) + bucket.norm().square()
        return (self.cfg.grad_clip_norm / (total.sqrt() + 1e-6)).clamp_max(1.0)

    @torch.no_grad()
    def step(self, plan: StepPlan) -> None:
        """One step of everything. The host waits for nothing; on the device, communication runs beside other work.

        A bank is reduced beside the casts of the next ones (no earlier: the backward pass makes the banks' gradients
        last) and gathered beside the orthogonalization of the next one; the last, smallest one is gathered beside
        Adam. Nothing runs beside the norm, which needs all gradients and which all updates need.
        """
        launched, small = self.muon.launch(), self.launch_adam()
        gradients, bucket = {name: wait_for(pair) for name, pair in launched.items()}, wait_for(small)
        clip = self.clip_factor(bucket, list(gradients.values()))
        gathered = self.muon.gather(gradients, plan, clip)
        for parameter, grad in zip(self.small, cut(bucket * clip, [p.shape for p in self.small]), strict=True):
            parameter.grad = grad
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * plan.lr_scale
        self.adam.step()
        self.muon.finish(gathered, self.muon.as_tensor(self.cfg.matrix_lr * plan.lr_scale))

    def state_dict(self) -> dict[str, Any]:
        """All optimizer state, with the momentum of all ranks' layers; every rank calls it."""
        whole = [wait_for(all_gather(self.ranks, rail)) for rail in tensor_leaves(self.muon.state)]
        return {"muon": [full[: self.cfg.num_layers] for full in whole], "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's part of a `state_dict`, bitwise."""
        for rail, full in zip(tensor_leaves(self.muon.state), state["muon"], strict=True):
            rail.copy_(padded(full, self.ranks.world).chunk(self.ranks.world)[self.ranks.rank])
        self.adam.load_state_dict(state["adam"])


# ----------------------------------------------------------------------------------------------
# 14. Weight averaging
# ----------------------------------------------------------------------------------------------
# What is configured is what is exported: EMA, the mean of SWA or LAWA snapshots, or (with both)
# the mean of snapshots of the EMA. Averages are fp32; only the chosen ones hold memory.


class Averager:
    """Running averages of the parameters, updated after every step."""

    def __init__(self, cfg: Config, model: GPT) -> None:
        self.cfg = cfg
        self.names, parameters = zip(*model.named_parameters(), strict=True)
        self.live = [p.detach() for p in parameters]
        self.ema = [p.clone() for p in self.live if cfg.ema_enabled]
        self.snapshots: list[list[Tensor]] = []  # LAWA: the latest LAWA_K; SWA: one, the running mean
        self.count = 0  # of what is in the mean

    def update(self, step: int, lr_scale: float) -> None:
        """Take in the parameters after `step` steps. EMA: e <- d e + (1 - d) w (PR #287). d starts low and reaches
        EMA_DECAY after some 10 / (1 - d) steps, so that short runs do not average in the initial weights; runs of
        several thousand steps end with the same average as under a constant decay."""
        cfg = self.cfg
        if self.ema:
            torch._foreach_lerp_(self.ema, self.live, 1 - min(cfg.ema_decay, (1 + step) / (10 + step)))
        if cfg.swa_enabled and lr_scale < cfg.swa_start_frac and step % cfg.swa_every == 0:
            self.count += 1
            self.snapshots = self.snapshots or [[torch.zeros_like(p) for p in self.live]]
            torch._foreach_lerp_(self.snapshots[0], self.ema or self.live, 1 / self.count)
        if cfg.lawa_enabled and step % cfg.lawa_freq == 0:
            self.snapshots = [*self.snapshots, [p.clone() for p in self.ema or self.live]][-cfg.lawa_k :]

    def weights(self) -> dict[str, Tensor]:
        """The weights to export, by parameter name."""
        best = self.ema or self.live
        if self.snapshots:
            best = [torch.stack(tensors).mean(0) for tensors in zip(*self.snapshots, strict=True)]
        return dict(zip(self.names, best, strict=True))

    def state(self) -> dict[str, Any]:
        """All that `update` changes."""
        return {"ema": self.ema, "snapshots": self.snapshots, "count": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`, from any device."""
        device = self.live[0].device
        moved = [[tensor.to(device) for tensor in tensors] for tensors in (state["ema"], *state["snapshots"])]
        (self.ema, *self.snapshots), self.count = moved, state["count"]

    def active(self) -> set[str]:
        """Which of the configured averages have taken anything in."""
        snapshots = "swa" if self.cfg.swa_enabled else "lawa"
        return {name for name, taken in {"ema": self.ema, snapshots: self.snapshots}.items() if taken}


# ----------------------------------------------------------------------------------------------
# 15. Training
# ----------------------------------------------------------------------------------------------
# The clock covers optimizer steps only, from the first real one; compilation, warm-up, validation
# and checkpoints are outside it. All ranks decide by the clock that is ahead. Calibration and GPTQ
# still belong to MAX_WALLCLOCK_SECONDS, so the loop stops early by what they took in warm-up.


class StepGraph:
    """A function of a batch that ends in gradients, recorded once as a CUDA graph and replayed on other batches.

    A layer is some ten operators in Python; launched one by one they take the host longer than the GPU (70 to 77 ms
    a step, whatever the sequences' length). What the function reads besides must stay where it is, as parameters do.
    """

    def __init__(
        self, function: Callable[..., Tensor], batch: Iterable[Tensor], parameters: list[Tensor], pool: Any
    ) -> None:
        """Record; `function` has run on such a batch before, so that nothing is compiled or loaded here, and the
        parameters have no gradients. `pool` is the memory of an earlier graph, to be shared since only the latest
        replay's gradients are read."""
        self.batch, self.parameters = [tensor.clone() for tensor in batch], parameters
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):  # the loader's thread goes on
            self.loss = function(*self.batch)
        self.grads = [parameter.grad for parameter in parameters]

    def replay(self, *batch: Tensor) -> Tensor:
        """Add the gradients of `batch` to the parameters'; returns the value, which the next call overwrites."""
        torch._foreach_copy_(self.batch, batch, non_blocking=True)
        # Copied, since they may be what an earlier replay wrote where this one writes again.
        earlier = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        self.graph.replay()
        for parameter, grad, added in zip(self.parameters, self.grads, earlier, strict=True):
            parameter.grad = grad if added is None else grad.add_(added)
        return self.loss


class Trainer:
    """Model, optimizers and training data, and one optimizer step over them."""

    def __init__(self, run: Runtime, model: GPT) -> None:
        cfg, self.run, self.model = run.cfg, run, model
        self.loader = Loader(run, model.micro_batch)
        self.graphs: dict[Phase, StepGraph] = {}
        self.optimizers = Optimizers(cfg, run.ranks, model)
        shards, tokens = len(self.loader.stream.shards), self.loader.stream.total
        run.log.event("data", split="train", shards=shards, tokens=tokens)
        run.log(f"train_loader:dataset:{cfg.shard_folder.name} train_shards:{shards} tokens:{tokens}")
        run.log(f"world_size:{run.ranks.world} grad_accum_steps:{self.loader.shape.accum}")
        run.log(f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} "
                f"iterations:{cfg.iterations} max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}")  # fmt: skip

    def gradients(self, phase: Phase, *batch: Tensor) -> Tensor:
        """Add the gradients of a micro-batch, cut as the phase wants it; returns its part of the step's loss."""
        inputs, targets = (tensor.view(-1, phase.seq_len) for tensor in batch)
        weights = self.model.fast_weights(phase.fake_quant)
        loss = self.model.fast_nll(inputs, targets, weights, phase.order).mean() / self.loader.shape.accum
        loss.backward()
        return loss.detach()

    @property
    def replays(self) -> bool:
        """Whether micro-steps are to be replayed."""
        return self.run.cfg.cuda_graph and self.run.ranks.device.type == "cuda"

    def record(self, phase: Phase) -> None:
        """From now on, micro-steps of a phase replay a CUDA graph, once it has given loss and gradients of a real one.
        Where that fails, they go on being launched one by one, with a warning; asked for by name it is an error."""
        if not self.replays:
            return
        parameters, batch = list(self.model.parameters()), self.loader.fetch(0)
        function = partial(self.gradients, phase)

        def outcome(function: Callable[..., Tensor]) -> list[Tensor]:
            """Loss and gradients; these compare as a whole, since those of single numbers may be all rounding."""
            self.model.zero_grad()
            loss = function(*batch)
            grads = torch.cat([p.grad.flatten().float() for p in parameters if p.grad is not None])
            self.model.zero_grad()
            return [loss.cpu().double(), grads.cpu().double()]

        want = outcome(function)
        pool = next((graph.graph.pool() for graph in self.graphs.values()), None)
        allowed = ALLOWED_ERROR * torch.finfo(self.model.dtype).eps / 2  # recorded, a product may take another kernel
        try:
            graph = StepGraph(function, batch, parameters, pool)
            reason = fault(max(relative_errors(outcome(graph.replay), want)), allowed)
        except RuntimeError as problem:
            reason = str(problem).strip().splitlines()[0][:200]
        if not reason:
            self.graphs[phase] = graph
        elif self.run.cfg.sources["cuda_graph"] != "default":
            raise UserError(f"CUDA_GRAPH=1: a step cannot be recorded ({reason}); set CUDA_GRAPH=0")
        else:
            self.run.warn_of_cost(f"a step cannot be recorded as a CUDA graph ({reason}); launched one by one it takes "
                                  "up to 25% longer, by how fast the host is")  # fmt: skip

    def step(self, number: int, plan: StepPlan) -> Tensor:
        """Optimizer step `number`; returns this rank's mean loss in nats per token, on the device."""
        phase = phases(self.run.cfg)[plan.phase]
        accum, total = self.loader.shape.accum, 0.0
        micro_step = self.graphs[phase].replay if phase in self.graphs else partial(self.gradients, phase)
        self.model.zero_grad()
        for micro in range(accum):
            total = total + micro_step(*self.loader.fetch(number * accum + micro))
        self.optimizers.step(plan)
        return total

    def state(self) -> dict[str, Any]:
        """A copy of everything that training changes."""
        return copy.deepcopy({"model": self.model.state_dict(), "optimizers": self.optimizers.state_dict()})

    def restore(self, state: dict[str, Any]) -> None:
        """Back to `state`, bitwise; asserted, since warm-up that leaks is training off the clock."""
        self.model.load(state["model"])
        self.optimizers.load_state_dict(copy.deepcopy(state["optimizers"]))
        pairs = zip(tensor_leaves(self.state()), tensor_leaves(state), strict=True)
        assert all(torch.equal(now, then) for now, then in pairs), "warm-up changed the training state"


def warm_up(run: Runtime, trainer: Trainer) -> None:
    """Compile and run every phase on training data, then restore model and optimizers."""
    cfg, before = run.cfg, trainer.state()
    steps = max(cfg.warmup_steps, 2 * cfg.compile)  # compilation never falls into the clock
    for name, phase in phases(cfg).items():
        for step in range(steps):
            trainer.step(step, StepPlan(1.0, muon_momentum_at(cfg, 0), name))
            if step == 0:
                trainer.record(phase)
        run.log(f"warmup:{name} steps:{steps} cuda_graph:{phase in trainer.graphs:d}")
    trainer.restore(before)


def calibration_batches(run: Runtime, shape: BatchShape) -> int:
    """Micro-batches of this rank behind the Hessians: the tokens of the whole set do not depend on the ranks."""
    cfg = run.cfg
    tokens = cfg.gptq_calibration_batches * min(cfg.train_batch_tokens, MICRO_BATCH_TOKENS)
    return -(-tokens // (run.ranks.world * shape.sequences * cfg.train_seq_len)) if cfg.gptq_enabled else 0


def input_moments(model: GPT, ids: Tensor, weights: dict[str, Tensor], order: tuple[int, ...]) -> dict[str, Tensor]:
    """X^T X of every matrix's inputs in one forward pass; TF32 holds bf16 inputs exactly and sums in fp32."""
    moments: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        flat = x.flatten(0, -2).float()
        moments[name] = moments[name] + flat.mT @ flat if name in moments else flat.mT @ flat

    model.logits(model.hidden(ids, weights, order, observe), weights, observe)
    return moments


def collect_hessians(run: Runtime, trainer: Trainer, first: int, batches: int) -> dict[str, Tensor]:
    """X^T X (cols, cols) summed over the inputs X of every matrix, over `batches` per rank from number `first` on."""
    model, order, totals = trainer.model, trainer.model.order, {}
    moments = compiled(run.cfg, partial(input_moments, model))
    with torch.no_grad():
        weights = model.fast_weights(False)
        for number in range(first, first + batches):
            for name, moment in moments(trainer.loader.fetch(number)[0], weights, order).items():
                totals[name] = totals[name] + moment if name in totals else moment
    return {name: run.ranks.all_reduce_sum_(total).to(float64_device(total.device)) for name, total in totals.items()}


COST_BATCHES = 8  # per rank, behind what rounding costs a row: rare tokens need more than half a million tokens


def row_costs(run: Runtime, trainer: Trainer, first: int, hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    """cost.<coded tensor>, (n, rows): what rounding to steps of 1 costs the loss per weight, up to a common factor.

    That is the mean square of a row's gradient, the Fisher information, along the errors that GPTQ leaves: multiples
    of the rows of U, each over its diagonal entry, as large as the step. Nothing where CLIP_POLICY does not ask.
    """
    model, phase, costs = trainer.model, Phase(trainer.model.order, False, run.cfg.train_seq_len), {}
    if run.cfg.clip_policy != "cost" or not hessians:
        return costs
    jobs = [job for job in quant_specs(model) if all(name in hessians for name in job.hessians)]
    stacks = (torch.stack([hessians[name] for name in job.hessians]) for job in jobs)
    factors = (hessian_inv_cholesky(stack, run.cfg.gptq_damp) for stack in stacks)
    errors = [(u / u.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).mT.float().to(run.ranks.device) for u in factors]
    for number in range(first, first + COST_BATCHES):
        model.zero_grad()
        trainer.gradients(phase, *trainer.loader.fetch(number))
        for job, error in zip(jobs, errors, strict=True):
            parameter = model.banks[job.name] if job.name in model.banks else model.rest[job.name]
            cost = (parameter.grad.view(job.tensor.shape) @ error).square().mean(-1)
            total = run.ranks.all_reduce_sum_(cost).to(job.tensor.device)
            costs[f"cost.{job.name}"] = costs.get(f"cost.{job.name}", 0.0) + total
    model.zero_grad()
    return costs


def measure_reserve(run: Runtime, trainer: Trainer) -> float:
    """Seconds of the clock to keep for calibration and GPTQ: as set, or both timed, a fifth on top and a second."""
    cfg, trial = run.cfg, replace(run, ledger=[])
    if cfg.gptq_reserve_seconds is not None or not cfg.max_wallclock_seconds:
        return cfg.gptq_reserve_seconds or 0.0
    hessians, batches = {}, calibration_batches(run, trainer.loader.shape)
    if batches:
        collect_hessians(run, trainer, 0, 1)  # compiles
        with trial.timed("hessians", "train"):
            hessians = collect_hessians(run, trainer, 0, 3)
        hessians |= row_costs(run, trainer, 0, hessians)  # compiles
        with trial.timed("costs", "train"):
            row_costs(run, trainer, 0, hessians)
    exporter = Exporter(trial, trainer.model, hessians, {})
    exporter.quantize()  # loads libraries
    exporter.quantize()
    (calibration, costs), rounding = (spent for *_, spent in trial.ledger[:2]), trial.ledger[-1][2]
    foreseen = cfg.compressor in ("auto", "ans") and not cfg.trellis
    passes = (2 if foreseen else 3) if cfg.auto_clip else 1  # what fitting the size may take
    seconds = bool(batches) * (batches * calibration / 3 + costs) + passes * rounding
    return run.ranks.all_reduce_max(1.2 * seconds + 1.0)[0]  # with 0.5, 0.6 s of rounding ended a run 0.2 s too late


def run_identity(run: Runtime, stream: TokenStream, validation: ValidationSet) -> dict[str, Any]:
    """What must be the same for a run to go on: script, data, ranks, and every variable but names and places."""
    free = ("recipe", "run_id", "resume", "overwrite", "data_dir", "data_path", "tokenizer_path", "artifact_path",
            "weights_path", "checkpoint_every", "device", "sources")  # fmt: skip
    values = {name: value for name, value in vars(run.cfg).items() if name not in free}
    shards = [(shard.path.name, shard.count) for shard in stream.shards]
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    facts = {"script": script, "world_size": run.ranks.world, "device": run.ranks.device.type, "train_shards": shards}
    return {**facts, **validation.identity, **values}


def is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def eval_rounded(run: Runtime, model: GPT, validation: ValidationSet, when: str) -> None:
    """Log the score of the matrices on the grid of QAT, the function that it trains; the model is left as it was."""
    before = copy.deepcopy(model.state_dict())
    with run.timed(f"{when} rounded", "untimed"), torch.no_grad():
        for name, bank in model.banks.items():
            bank.copy_(fake_quantize(bank, model.bits[name], run.cfg.clip_policy, model.clip_sigmas))
        score = evaluate(run, model, validation, run.cfg.eval_len)
    model.load(before)
    log_score(run, f"DIAGNOSTIC {when} rounded", score)


def graphs_compiled() -> int:
    """Graphs that torch.compile has made so far in this process; it counts them in the module it loads for that."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def write_output(run: Runtime, path: Path, blob: bytes | memoryview, variable: str) -> Path:
    """Write a file to its path, or with a warning to another folder where that fails; returns where it is. Where no
    folder takes it, the error is that of the path which was asked for."""
    problems = []
    for folder in dict.fromkeys([path.parent, Path("logs"), run.cfg.weights_file.parent, Path(tempfile.gettempdir())]):
        try:
            atomic_write(folder / path.name, blob, variable)
            return folder / path.name
        except UserError as problem:
            problems.append(problem)
            run.log(f"WARNING: {problem}")
    raise problems[0]


class Training:
    """The training loop, and where it stands. A checkpoint holds that, the weights, averages and optimizers."""

    def __init__(self, run: Runtime, trainer: Trainer, validation: ValidationSet, budget: float) -> None:
        """`budget` seconds of the clock."""
        self.run, self.cfg, self.trainer, self.model, self.validation = run, run.cfg, trainer, trainer.model, validation
        self.budget, self.averager, self.clock = budget, Averager(run.cfg, trainer.model), Clock(run.ranks.device)
        self.step, self.phase, self.graphs = 0, next(iter(phases(run.cfg))), 0  # graphs compiled inside the clock
        self.first, self.saved = 0, 0  # steps at which the clock began and of the latest checkpoint
        self.identity = run_identity(run, trainer.loader.stream, validation)

    def loop(self) -> None:
        """Steps until ITERATIONS or the clock ends. A signal, or data that a rank cannot read, stops all ranks."""
        cfg, ranks, signals, ends_soon = self.cfg, self.run.ranks, self.run.signals, False
        self.clock.start()
        while True:
            if ends_soon:  # the host runs ahead of the GPU: 0.2 s over the end were seen
                synchronize(ranks.device)
            fault = self.trainer.loader.fault(self.step) if self.step < cfg.iterations else None
            reason = signals.noted[0] if signals.noted else str(fault or "")
            seconds, stopped = ranks.all_reduce_max(self.clock.seconds(), (ranks.rank + 1) * bool(reason))
            per_step = seconds / max(self.step, 1)
            ends_soon = seconds + 10 * per_step >= self.budget
            if self.step >= cfg.iterations or seconds + per_step >= self.budget:
                break  # the next one would end too late
            if stopped:
                signals.answered.set()
                self.clock.stop()
                saved = f"RESUME=1 goes on from {cfg.weights_file}, EXPORT_ONLY=1 makes an artifact of it"
                raise UserError(f"{ranks.broadcast(reason, int(stopped) - 1)}: stopped after step {self.step}; "
                                f"{saved if self.save('stopped') else 'not saved'}")  # fmt: skip
            self.advance(seconds)
        self.run.ledger.append(("train", "steps", self.clock.stop()))

    def advance(self, seconds: float) -> None:
        """One step as the schedule wants it after `seconds`, and what is due after it."""
        run, cfg = self.run, self.cfg
        plan = plan_step(cfg, self.step, seconds, self.budget)
        if plan.phase != self.phase:
            self.start_phase(plan, seconds)
        if run.claim:
            run.claim.beat()
        before = graphs_compiled()
        loss = self.trainer.step(self.step, plan)
        self.step += 1
        if made := graphs_compiled() - before:
            self.graphs += made
            run.log(f"WARNING: step {self.step} compiled {made} graphs inside the clock; warm-up should have made them")
        self.averager.update(self.step, plan.lr_scale)
        run.active.update({self.phase, "warmdown" if plan.lr_scale < 1 else self.phase})
        self.log_step(loss, plan)
        scores = is_due(cfg.val_loss_every, self.step)
        saves = is_due(cfg.checkpoint_every, self.step) and self.step < cfg.iterations
        if scores or saves:
            self.clock.stop()
            if scores:
                self.validate()
            if saves:
                with run.timed("checkpoint", "untimed"):
                    self.save("running")
            self.clock.start()

    def start_phase(self, plan: StepPlan, seconds: float) -> None:
        """Announce the plan's phase; where it rounds the weights, fix the grid that the export is expected to use."""
        run, model, self.phase = self.run, self.model, plan.phase
        model.order, rounds, _ = phases(self.cfg)[plan.phase]
        if self.cfg.auto_clip and rounds:
            fitted = fit_clip_sigmas(self.cfg, quant_specs(model), passthrough(model))
            model.clip_sigmas.fill_(run.ranks.all_reduce_max(fitted)[0])
        name, step = f"{plan.phase}:enabled", self.step
        run.log(f"{name} step:{step} scale:{plan.lr_scale:.4f} clip_sigmas:{model.clip_sigmas.item():.2f}")
        run.log.event("phase", step=step, name=name, train_time_ms=round(seconds * 1000))

    def log_step(self, loss: Tensor, plan: StepPlan) -> None:
        """Log steps 1-10 and every TRAIN_LOG_EVERY; stop the run, on all ranks, if the loss is no number any more."""
        run, cfg, step = self.run, self.cfg, self.step
        if step > 10 and not is_due(cfg.train_log_every, step):
            return
        value, seconds = (run.ranks.all_reduce_sum_(loss) / run.ranks.world).item(), self.clock.seconds()
        average, total = 1000 * seconds / (step - self.first), 1000 * (run.spent("train") + seconds)
        run.log(f"step:{step}/{cfg.iterations} train_loss:{value:.4f} train_time:{total:.0f}ms "
                f"step_avg:{average:.2f}ms lr_scale:{plan.lr_scale:.3f} "
                f"tok/s:{1000 * cfg.train_batch_tokens / max(average, 1e-6):.0f}")  # fmt: skip
        facts = {"train_time_ms": round(total), "step_avg_ms": average, "lr_scale": plan.lr_scale}
        run.log.event("train", step=step, train_loss=value, **facts)
        if not math.isfinite(value):
            raise self.diverged(f"the training loss is {value}")

    def diverged(self, what: str) -> UserError:
        """The error that ends a run whose weights are spoilt, with where good ones are."""
        cfg, saved = self.cfg, f"; {self.cfg.weights_file} has the weights of step {self.saved}" if self.saved else ""
        return UserError(f"step {self.step}: {what}; lower MATRIX_LR={cfg.matrix_lr} or change SEED{saved}")

    def validate(self) -> None:
        """Score the weights as they are, on plain windows."""
        run, step, milliseconds = self.run, self.step, 1000 * self.clock.total
        with run.timed(f"validation@{step}", "untimed"):
            score = evaluate(run, self.model, self.validation, self.cfg.eval_len)
        run.log(f"step:{step}/{self.cfg.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
                f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / max(step, 1):.2f}ms")  # fmt: skip
        run.log.event("val", step=step, val_loss=score.loss, val_bpb=score.bpb, train_time_ms=round(milliseconds))

    def save(self, state: str) -> bool:
        """Write the checkpoint to WEIGHTS_PATH; all ranks return together with whether that went well. `state` is
        running, stopped (no step came after) or ended. A full disk is a warning: the run may still end well. Weights
        that are not finite never replace good ones."""
        run, is_saved = self.run, 0.0
        optimizers = self.trainer.optimizers.state_dict()
        if run.ranks.is_main_process:
            raw = self.model.state_dict()
            if broken := [name for name, tensor in raw.items() if not tensor.isfinite().all()]:
                raise self.diverged(f"not finite any more: {' '.join(broken)}"[:200])
            standing = {"seconds": self.clock.total, "saved_at": time.time(), "phase": self.phase,
                        "active": sorted(run.active | self.averager.active()), "graphs": self.graphs,
                        "ledger": [*map(list, run.ledger)], "clip_sigmas": self.model.clip_sigmas.item()}  # fmt: skip
            saved = {"architecture": self.cfg.architecture(), "steps": self.step, "order": list(self.model.order),
                     "state": state, "raw": raw, "average": self.averager.weights(), "optimizers": optimizers,
                     "averager": self.averager.state(), "identity": self.identity, "standing": standing}  # fmt: skip
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            try:
                path = write_output(run, self.cfg.weights_file, buffer.getbuffer(), "WEIGHTS_PATH")
                run.log(f"weights: {path} (raw, average) {path.stat().st_size} bytes")
                is_saved = 1.0
            except UserError as problem:
                run.log(f"WARNING: weights of step {self.step} not saved: {problem}")
        (is_saved,) = run.ranks.all_reduce_max(is_saved)
        self.saved = self.step if is_saved else self.saved
        return bool(is_saved)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. What a killed run spent after it is counted, and at once noted in the file."""
        run, standing, lost = self.run, saved["standing"], 0.0
        self.model.load(saved["raw"])
        self.trainer.optimizers.load_state_dict(saved["optimizers"])
        self.averager.load(saved["averager"])
        self.step, self.phase, self.graphs = saved["steps"], standing["phase"], standing["graphs"]
        self.model.order = tuple(saved["order"])
        self.model.clip_sigmas.fill_(standing["clip_sigmas"])
        run.active.update(standing["active"])
        run.ledger[:0] = [tuple(row) for row in standing["ledger"] if row[1] != "steps"]  # the clock holds those
        if saved["state"] == "running" and run.claim:
            if run.claim.last_beat is None:
                run.log("WARNING: the time that the killed run spent after its checkpoint is not known, nor counted")
            since = (run.claim.last_beat or 0.0) - standing["saved_at"]
            lost = max(since, 0.0) + standing["seconds"] / max(self.step, 1)  # and the step that had begun
        (lost,) = run.ranks.all_reduce_max(lost)
        self.clock.total = standing["seconds"] + lost
        spent, lost = 1000 * self.clock.total, 1000 * lost
        run.log(f"resumed: step:{self.step} train_time:{spent:.0f}ms of which lost:{lost:.0f}ms")
        run.log.event("resume", step=self.step, train_time_ms=round(spent), lost_ms=round(lost))
        self.save("running")

    def post_qat(self) -> None:
        """Train the averaged weights on the export grid for POST_QAT_SECONDS (PR #107). What it is good for is logged:
        the score of the weights rounded to that grid, before and after."""
        run, cfg = self.run, self.cfg
        self.model.load(self.averager.weights())
        self.averager.load({"ema": [], "snapshots": [], "count": 0})  # what is exported is the last weights
        self.clock, self.first = Clock(run.ranks.device), self.step
        scale, two_rails = cfg.post_qat_lr / cfg.matrix_lr, cfg.muon_rails_at < 1
        plan = StepPlan(scale, cfg.muon_momentum, "post_qat", cfg.muon_rank_frac, two_rails)
        self.start_phase(plan, run.spent("train"))
        run.active.add("post_qat")
        eval_rounded(run, self.model, self.validation, "before_post_qat")
        self.clock.start()
        while True:
            (seconds,), steps = run.ranks.all_reduce_max(self.clock.seconds()), self.step - self.first
            if steps and seconds * (1 + 1 / steps) >= cfg.post_qat_seconds:
                break
            loss = self.trainer.step(self.step, plan)
            self.step += 1
            self.log_step(loss, plan)
        run.ledger.append(("train", "post_qat", self.clock.stop()))
        run.log(f"post_qat: {steps} steps in {self.clock.total:.1f}s at MATRIX_LR {cfg.post_qat_lr:g}")
        eval_rounded(run, self.model, self.validation, "after_post_qat")
        self.save("ended")


def train(run: Runtime, trainer: Trainer, validation: ValidationSet, saved: Mapping[str, Any] | None = None) -> int:
    """Train until ITERATIONS or the clock ends, whichever comes first; from a checkpoint where there is one. The model
    then has the weights to export, their average; returns the steps made."""
    cfg, model = run.cfg, trainer.model
    with run.timed("warmup", "untimed"):
        warm_up(run, trainer)
        reserve = measure_reserve(run, trainer)
    kept = reserve + cfg.post_qat_seconds
    budget = cfg.max_wallclock_seconds - kept if cfg.max_wallclock_seconds else math.inf
    if budget <= 0:
        raise UserError(f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g}: raise it, GPTQ and QAT take {kept:.1f}s")
    run.log(f"gptq:reserving {reserve:.1f}s, effective={1000 * budget:.0f}ms")
    training = Training(run, trainer, validation, budget)
    model.order = phases(cfg)[training.phase].order
    with run.signals.deferred():
        if saved:
            training.restore(saved)
        training.loop()
        run.log(f"graphs compiled inside the clock: {training.graphs}")
        run.log.event("clock", graphs_compiled=training.graphs, reserve_s=reserve)
        training.save("stopped" if cfg.post_qat_seconds else "ended")  # before anything else can fail
    if training.step < cfg.iterations:
        spent = 1000 * training.clock.total
        run.log(f"stopping_early: wallclock_cap train_time:{spent:.0f}ms step:{training.step}/{cfg.iterations}")
    if run.ranks.device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        run.log(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
        run.log.event("memory", allocated_mib=allocated, reserved_mib=reserved)
    if not is_due(cfg.val_loss_every, training.step):
        training.validate()
    run.active.update(training.averager.active())
    if cfg.post_qat_seconds:
        training.post_qat()
    model.load(training.averager.weights())
    return training.step


def read_weights(run: Runtime, model: GPT, validation: ValidationSet) -> dict[str, Any]:
    """The checkpoint at WEIGHTS_PATH, for RESUME=1 and EXPORT_ONLY=1; UserError where it is not one of this model's."""
    path = run.cfg.weights_file
    where = f"WEIGHTS_PATH={path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file; a training run writes it every CHECKPOINT_EVERY steps and at its end")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (*BACK_END_FAULTS, LookupError, EOFError, pickle.UnpicklingError) as problem:
        raise UserError(f"{where}: no weights of a run, or damaged ({str(problem).strip()[:100]!r})") from None
    keys = {"architecture", "raw", "average", "identity", "standing"}
    refuse_other_version(saved["architecture"] if isinstance(saved, dict) and keys <= saved.keys() else None, where)
    refuse_other(saved["architecture"], run.cfg.architecture(), f"{where} is of another model", "set the same here")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if any({name: tensor.shape for name, tensor in saved[key].items()} != shapes for key in ("raw", "average")):
        raise UserError(f"{where}: its tensors are not those of its architecture; it is damaged")
    tokenizer = {"tokenizer_sha256": validation.identity["tokenizer_sha256"]}
    refuse_other(saved["identity"], tokenizer, f"{where} belongs to another tokenizer", "set its TOKENIZER_PATH")
    return saved


# ----------------------------------------------------------------------------------------------
# 16. Main
# ----------------------------------------------------------------------------------------------


@rules
def run_rules(cfg: Config) -> list[tuple[Any, str]]:
    """The same for training, export, evaluation and re-entry."""
    names = [f"blocks.{i}.{role}." for s in bank_specs(cfg) for role, _ in s.roles for i in range(cfg.num_layers)]
    short, ends = cfg.short_seq_len, cfg.short_seq_frac
    idle = [p for p in cfg.lowbit_name_patterns if not any(p in name for name in names)]
    window = f"the window of {cfg.eval_len} tokens"
    logs = [f"logs/{cfg.log_name}.{kind}" for kind in ("txt", "jsonl", "py")]
    own = [cfg.artifact_file, cfg.weights_file, *logs, "train.log", f"train_seed{cfg.seed}.log"]
    return [
        (cfg.lowbit_bits != 1, "$LOWBIT_BITS: 2 to 8, or 0 for MATRIX_BITS"),
        (not idle, f"LOWBIT_NAME_PATTERNS={','.join(idle)}: not in {' '.join(names[:: cfg.num_layers])}"),
        (bool(cfg.lowbit_bits) == bool(cfg.lowbit_name_patterns), "$LOWBIT_BITS and $LOWBIT_NAME_PATTERNS: set both"),
        (not cfg.post_qat_seconds or cfg.matrix_lr > 0, "POST_QAT_SECONDS: set MATRIX_LR above 0 too"),
        (not cfg.muon_head_group or cfg.num_kv_heads % cfg.muon_head_group == 0,
         "$MUON_HEAD_GROUP does not divide $NUM_KV_HEADS; 0 for all heads"),
        (cfg.muon_rails_at == 1 or cfg.muon_momentum < 1, "$MUON_RAILS_AT: MUON_MOMENTUM below 1"),
        (len(short) == len(ends) and [*short] == sorted({*short}) and [*ends] == sorted(ends) and min(short) >= 0
         and not any(cfg.train_seq_len % n for n in short if 0 < n < cfg.train_seq_len),
         "$SHORT_SEQ_LEN $SHORT_SEQ_FRAC: as many of each, both rising, lengths that divide $TRAIN_SEQ_LEN; "
         "SHORT_SEQ_LEN=0 SHORT_SEQ_FRAC=0 for none"),
        (not cfg.max_wallclock_seconds or cfg.post_qat_seconds < cfg.max_wallclock_seconds,
         "$POST_QAT_SECONDS is all of $MAX_WALLCLOCK_SECONDS"),
        (not (cfg.qat_enabled and cfg.auto_clip),
         "QAT_ENABLED=1 needs the grid from the first step: set MATRIX_CLIP_SIGMAS above 0 or CLIP_POLICY=amax"),
        (cfg.clip_policy != "cost" or cfg.gptq_enabled, "CLIP_POLICY=cost needs GPTQ_ENABLED=1"),
        (not (cfg.swa_enabled and cfg.lawa_enabled), "SWA_ENABLED=1 and LAWA_ENABLED=1: only one of them is exported"),
        (cfg.compressor not in CODECS or cfg.compressor_level <= CODECS[cfg.compressor].strongest,
         "$COMPRESSOR_LEVEL: too high for $COMPRESSOR; unset it for the best"),
        (not re.search(r"^\.\.?$|[/\x00-\x1f]", cfg.run_id) and len(os.fsencode(cfg.run_id)) <= 200,
         f"RUN_ID={cfg.run_id!r}: a file name is made of it; no slashes or control characters, at most 200 bytes"),
        (len({*map(os.path.realpath, own)}) == len(own),
         f"ARTIFACT_PATH={cfg.artifact_file} WEIGHTS_PATH={cfg.weights_file}: one file for two, or a log of the run"),
        (cfg.eval_only + cfg.export_only + cfg.resume <= 1, "EVAL_ONLY, EXPORT_ONLY, RESUME: set one of them at most"),
        (not cfg.resume or cfg.run_id, "RESUME=1 needs the RUN_ID of the run that is to go on"),
        (not cfg.eval_only or cfg.artifact_path, "EVAL_ONLY=1 needs ARTIFACT_PATH=<file>"),
        (not cfg.export_only or cfg.weights_path, "EXPORT_ONLY=1 needs WEIGHTS_PATH=<file>"),
        (cfg.eval_stride <= cfg.eval_len, f"$EVAL_STRIDE exceeds {window}"),
        (not cfg.ttt_enabled or cfg.eval_stride > 0, "TTT_ENABLED=1 needs EVAL_STRIDE above 0"),
        (cfg.ttt_chunk_tokens > cfg.eval_len or not cfg.ttt_enabled,
         f"$TTT_CHUNK_TOKENS holds no whole window of {cfg.eval_len} tokens and its target"),
        (not cfg.ngram_enabled or cfg.eval_stride > 0, "NGRAM_ENABLED=1 needs EVAL_STRIDE above 0"),
        (cfg.ngram_min_order <= cfg.ngram_max_order, "$NGRAM_MIN_ORDER exceeds $NGRAM_MAX_ORDER"),
        (cfg.ngram_alpha_low <= cfg.ngram_alpha_high < 1, "$NGRAM_ALPHA_LOW $NGRAM_ALPHA_HIGH: in order and below 1"),
        (cfg.ttt_freeze_blocks <= cfg.num_layers, "$TTT_FREEZE_BLOCKS exceeds NUM_LAYERS"),
        (not cfg.ttt_lora_enabled or cfg.ttt_chunk_size <= cfg.eval_len, f"$TTT_CHUNK_SIZE exceeds {window}"),
    ]  # fmt: skip


def log_sizes(run: Runtime, path: Path, header: dict[str, Any]) -> None:
    """Sizes of the two files that count, from disk, and what each stream takes."""
    cfg, artifact = run.cfg, path.stat().st_size
    kind = f"int{cfg.matrix_bits}+{header['streams'][0][1]}"
    streams = " ".join(f"{name}:{coder}:{size}" for name, coder, size in header["streams"])
    run.log(f"artifact: {path} streams {streams}")
    run.log(f"Serialized model {kind}: {artifact} bytes")
    run.log(f"Code size: {code_bytes()} bytes")
    run.log(f"Total submission size {kind}: {artifact + code_bytes()} bytes (limit {cfg.target_bytes})")
    run.log.event("size", artifact_bytes=artifact, code_bytes=code_bytes(), limit=cfg.target_bytes, kind=kind)


def export_model(run: Runtime, trainer: Trainer, steps: int, validation: ValidationSet) -> ExportResult:
    """Calibrate, quantize and write ARTIFACT_PATH; scores the model's weights, which are those after `steps` steps."""
    cfg, model = run.cfg, trainer.model
    total = sum(parameter.sum() for parameter in model.parameters()).item()
    most, least = run.ranks.all_reduce_max(total, -total)
    if most != -least:  # each quantizes its layers from its own replica
        run.log(f"WARNING: the ranks' weights have drifted apart: they sum to between {-least} and {most}")
    names = [n for n in ("ema", "swa", "lawa", "post_qat") if n in run.active]
    run.log(f"{'+'.join(names) or 'raw'}:applying {'+'.join(names).upper() or 'the last'} weights")
    hessians, batches = {}, calibration_batches(run, trainer.loader.shape)
    if batches:
        with run.timed("hessians", "train"):
            first = steps * trainer.loader.shape.accum
            hessians = collect_hessians(run, trainer, first, batches)
            costs = row_costs(run, trainer, first, hessians)
        seconds, count = run.ledger[-1][2], cfg.gptq_calibration_batches
        run.log(f"GPTQ:collected {len(hessians)} Hessians over {count} batches in {seconds:.1f}s")
        hessians |= costs
    blob, path = Exporter(run, model, hessians, validation.identity).export(), cfg.artifact_file
    if run.ranks.is_main_process:
        path = write_output(run, path, blob, "ARTIFACT_PATH")
        log_sizes(run, path, read_header(blob, path)[0])
    with run.timed("averaged weights", "untimed"):
        score = evaluate(run, model, validation, cfg.eval_len)
    last = "post_qat" if "post_qat" in names else "post_ema" if "ema" in names else "pre_quantization"
    log_score(run, f"DIAGNOSTIC {last}", score)
    if cfg.qat_enabled or "late_qat" in run.active:
        eval_rounded(run, model, validation, last)
    return ExportResult(model, score, path, blob[-8:])


def load_architecture(cfg: Config) -> Config:
    """With EVAL_ONLY=1 the model is the artifact's; variables that were set and say otherwise are an error."""
    path = cfg.artifact_file
    if not cfg.eval_only:
        return cfg
    if not path.is_file():
        raise UserError(f"ARTIFACT_PATH={path}: no such file; a run writes logs/<RUN_ID>.pgolf")
    made = read_header(path.read_bytes(), path)[1].architecture()
    asked = {name: value for name, value in cfg.architecture().items() if cfg.sources[name] != "default"}
    refuse_other(made, asked, f"ARTIFACT_PATH={path} is of another model", "set the same here, or nothing")
    return replace(cfg, **made)


def produce_artifact(run: Runtime, validation: ValidationSet) -> ExportResult:
    """Train, or go on training, or load weights; then export."""
    cfg = run.cfg
    if cfg.eval_only:
        return ExportResult()
    model = build_model(run, cfg, validation.bos_id)
    trainer = Trainer(run, model)
    check_tokenizer(cfg, trainer.loader.stream, validation.identity["tokenizer_sha256"])
    saved = read_weights(run, model, validation) if cfg.export_only or cfg.resume else None
    if cfg.resume:
        ours, where = run_identity(run, trainer.loader.stream, validation), f"RESUME=1: {cfg.weights_file}"
        refuse_other(saved["identity"], ours, f"{where} is from another run", "a run goes on as it began")
    if saved and (cfg.export_only or saved["state"] == "ended"):
        run.ledger.extend(tuple(row) for row in saved["standing"]["ledger"] if cfg.resume)
        run.active.update(saved["standing"]["active"])
        model.load(saved["average"])
        steps, model.order = saved["steps"], tuple(saved["order"])
    else:
        steps = train(run, trainer, validation, saved)
    return export_model(run, trainer, steps, validation)


def report_inactive(run: Runtime) -> None:
    """Name what was configured and never happened, so that no flag passes for a feature, and what made steps longer."""
    cfg = run.cfg
    is_named = cfg.sources["short_seq_len"] != "default"
    wanted = {
        "ema": (cfg.ema_enabled, "EMA_ENABLED=1"),
        "swa": (cfg.swa_enabled, f"SWA_START_FRAC={cfg.swa_start_frac} SWA_EVERY={cfg.swa_every}"),
        "lawa": (cfg.lawa_enabled, f"LAWA_FREQ={cfg.lawa_freq}"),
        "short_seq": (is_named and any(cfg.short_seq_len) and len(cfg.seq_lengths) < 2,
                      f"SHORT_SEQ_LEN={as_text(cfg.short_seq_len)} TRAIN_SEQ_LEN={cfg.train_seq_len}"),
        **{name: (name.startswith("layer_loop"), f"ENABLE_LOOPING_AT={cfg.enable_looping_at}") for name in phases(cfg)},
        "late_qat": ("late_qat" in phases(cfg), f"LATE_QAT_THRESHOLD={cfg.late_qat_threshold} MIN_LR={cfg.min_lr}"),
        "post_qat": (cfg.post_qat_seconds, f"POST_QAT_SECONDS={cfg.post_qat_seconds}"),
        "warmdown": (cfg.warmdown_iters or cfg.warmdown_frac, f"WARMDOWN_ITERS={cfg.warmdown_iters}"),
    }  # fmt: skip
    missing = [f"{name} ({setting})" for name, (on, setting) in wanted.items() if on and name not in run.active]
    if not (cfg.eval_only or cfg.export_only):
        run.log(f"never activated: {'; '.join(missing) or 'none'}")
        run.log.event("inactive", features=missing)
    for text in dict.fromkeys(run.costs):
        run.log(f"WARNING: {text}")


def main() -> None:
    """The run, from the environment to the last line of its log."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a console without Unicode shows a path in escapes
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(Config.describe_variables())
        return
    env = os.environ
    with Runtime.start(load_architecture(Config.from_env(env)), env) as run:
        validation = load_validation(run)
        produced = produce_artifact(run, validation)
        evaluate_artifact(run, validation, produced)
        report_inactive(run)
        log_ledger(run)


if __name__ == "__main__":
    try:
        main()
    except (UserError, Interrupted) as problem:
        sys.exit(f"error: {problem}" if is_first_to_fail(os.environ) else 1)
