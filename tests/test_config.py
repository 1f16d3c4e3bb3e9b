"""What the environment may say, what it turns into, and the runtime's small parts."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt as t
from conftest import tiny_config, tiny_env

SCRIPT = Path(t.__file__).resolve()
CPU = torch.device("cpu")


def config(**variables: Any) -> t.Config:
    """Configuration of an environment that holds only `variables`."""
    return t.Config.from_env({name: str(value) for name, value in variables.items()})


def refusal(env: Mapping[str, str]) -> str:
    """The message with which `env` is refused."""
    with pytest.raises(t.UserError) as caught:
        t.Config.from_env(env)
    return str(caught.value)


def run_script(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python train_gpt.py ...` in `folder`, in a small environment of its own."""
    env = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ} | variables
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


# --- defaults -----------------------------------------------------------------------------------

ELEVEN_LAYER_LINE = {
    "vocab_size": 1024, "num_layers": 11, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 4.0,
    "mlp_activation": "leaky_relu2", "negative_slope": 0.5, "logit_softcap": 30.0, "rope_base": 10_000.0,
    "rope_dims": 16, "qk_gain_init": 5.0, "xsa_last_n": 11, "ln_scale": False, "tie_embeddings": True,
    "smear_gate_enabled": True, "bigram_vocab_size": 2048, "bigram_dim": 128, "ve_enabled": True,
    "ve_layers": (9, 10), "value_residual": False, "gated_attn_enabled": False, "train_batch_tokens": 786_432,
    "train_seq_len": 2048, "iterations": 20_000, "max_wallclock_seconds": 600.0, "seed": 1337, "ema_enabled": True,
    "ema_decay": 0.9965, "swa_enabled": False, "lawa_enabled": False, "qat_enabled": False, "late_qat_threshold": 0.0,
    "gptq_enabled": True, "matrix_bits": 6, "embed_bits": 8, "target_bytes": 16_000_000, "eval_stride": 64,
    "gptq_reserve_seconds": None, "warmup_steps": 20, "muon_momentum": 0.97, "key_offset": True, "beta2": 0.99,
    "min_lr": 0.1, "warmdown_frac": 0.85, "num_loops": 2, "loop_start": 3, "loop_end": 5, "enable_looping_at": 0.35,
    "short_seq_frac": (0.35,), "muon_wd": 0.095, "embed_wd": 0.085, "muon_rails_at": 0.3, "muon_head_group": 2,
}  # fmt: skip


def test_defaults_are_the_eleven_layer_line() -> None:
    """An empty environment is the record configuration, and every value says that it is a default."""
    cfg = t.Config.from_env({})
    assert {name: getattr(cfg, name) for name in ELEVEN_LAYER_LINE} == ELEVEN_LAYER_LINE
    assert (cfg.head_dim, cfg.hidden_dim, cfg.eval_len) == (64, 2048, 2048)
    assert set(cfg.sources.values()) == {"default"} and set(cfg.sources) == {n.lower() for n in t.Config.variables()}


def test_default_paths_follow_vocabulary_and_run_id() -> None:
    cfg = config(VOCAB_SIZE=8192, DATA_DIR="/d", RUN_ID="x")
    paths = cfg.shard_folder, cfg.tokenizer_file, cfg.artifact_file, cfg.weights_file
    assert [str(path) for path in paths] == [
        "/d/datasets/fineweb10B_sp8192", "/d/tokenizers/fineweb_8192_bpe.model", "logs/x.pgolf", "logs/x.weights.pt",
    ]  # fmt: skip


def test_run_ids_are_fresh_unless_given() -> None:
    """Two runs without RUN_ID must not overwrite each other's files."""
    assert config().run_id != config().run_id != "" and config(RUN_ID="mine").run_id == "mine"


# --- values -------------------------------------------------------------------------------------

PARSED = [
    *[("SWA_ENABLED", word, True) for word in ("1", "true", "True", "TRUE", "yes", "on", " 1 ")],
    *[("EMA_ENABLED", word, False) for word in ("0", "false", "False", "no", "off")],
    ("EMA_ENABLED", "", True), ("ITERATIONS", "", 20_000), ("VE_LAYERS", "", (9, 10)), ("RUN_ID", "r", "r"),
    ("MATRIX_LR", " 0.02 ", 0.02), ("MATRIX_LR", "2e-2", 0.02), ("MLP_MULT", "4", 4.0), ("ROPE_BASE", "1e4", 10_000.0),
    ("ITERATIONS", "7", 7), ("VE_LAYERS", "3", (3,)), ("VE_LAYERS", "1, 4,10", (1, 4, 10)),
    ("GPTQ_RESERVE_SECONDS", "", None), ("GPTQ_RESERVE_SECONDS", "0", 0.0), ("GPTQ_RESERVE_SECONDS", "9.5", 9.5),
    ("NEGATIVE_SLOPE", "-0.1", -0.1), ("COMPRESSOR_LEVEL", "-1", -1), ("LOADER", "sequential", "sequential"),
    ("MLP_ACTIVATION", "relu2", "relu2"), ("MAX_WALLCLOCK_SECONDS", "0", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "value"), PARSED)
def test_values_are_parsed_by_type(name: str, text: str, value: Any) -> None:
    """Lenient booleans, scientific floats, tuples; empty or blank means the default."""
    parsed = getattr(config(**{name: text}), name.lower())
    assert parsed == value and type(parsed) is type(value)


REFUSED = [
    ("SEED", "1e3"), ("ITERATIONS", "20000.0"), ("ITERATIONS", "many"), ("ITERATIONS", "0"), ("SEED", "-1"),
    ("EMA_ENABLED", "2"), ("EMA_ENABLED", "y"), ("EMA_ENABLED", "-1"), ("MATRIX_LR", "nan"), ("MATRIX_LR", "inf"),
    ("MATRIX_LR", "1e39"), ("SEED", "9" * 400),
    ("MATRIX_LR", "-0.1"), ("MATRIX_LR", "0,02"), ("VE_LAYERS", "9;10"), ("VE_LAYERS", "a"), ("LOADER", "random"),
    ("MLP_ACTIVATION", "swiglu"), ("DEVICE", "tpu"), ("LOGIT_SOFTCAP", "0"), ("MATRIX_BITS", "1"),
    ("GPTQ_RESERVE_SECONDS", "auto"), ("COMPRESSOR", "gzip"), ("ROPE_BASE", "0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), REFUSED)
def test_impossible_values_are_refused_by_name_and_value(name: str, text: str) -> None:
    message = refusal({name: text})
    assert name in message and text in message


@pytest.mark.parametrize(("name", "word"), [("LOADER", "sequential"), ("DEVICE", "mps"), ("CLIP_POLICY", "amax")])
def test_a_refused_choice_lists_the_choices(name: str, word: str) -> None:
    assert word in refusal({name: "other"})


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [("MATRX_LR", "MATRIX_LR"), ("EMA_ENABLE", "EMA_ENABLED"), ("LATE_QAT", "LATE_QAT_THRESHOLD"),
     ("ITERATION", "ITERATIONS"), ("NUM_LAYER", "NUM_LAYERS"), ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"),
     ("QK_GAIN", "QK_GAIN_INIT"), ("EVAL_STRIDES", "EVAL_STRIDE"), ("GPTQ_CALIB", "GPTQ_CALIBRATION_BATCHES"),
     ("SWA_START", "SWA_START_FRAC"), ("VAL_LOSS_EVRY", "VAL_LOSS_EVERY")],
)  # fmt: skip
def test_misspelled_names_are_refused_with_a_suggestion(name: str, meant: str) -> None:
    message = refusal({name: "1"})
    assert name in message and re.search(rf"did you mean .*\b{meant}\b", message)


@pytest.mark.parametrize(
    "name",
    ["PHASED_TTT_ENABLED", "LATE_QAT", "CASEOPS_ENABLED", "LQER_RANK", "NGRAM_ORDER_X", "MTP_NUM_HEADS",
     "PHASED_TTT_PREFIX_DOCS", "TRIGRAM_BUCKETS", "MUON_BETA2_X", "MIXED_QAT", "EVAL_ONLY_PATH",
     "TRAIN_ON_GPU", "VAL_DOCS", "LOOPING_AT"],
)  # fmt: skip
def test_foreign_training_variables_are_refused(name: str) -> None:
    """Names that only a training script could mean are never silently ignored."""
    assert name in refusal({name: "1"})


USUAL = """PATH HOME USER SHELL PWD LANG LC_ALL TERM TMPDIR HOSTNAME LOGNAME EDITOR DISPLAY OLDPWD SHLVL LS_COLORS _
NCCL_IB_DISABLE NCCL_NET NCCL_DEBUG NCCL_P2P_DISABLE CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_LAUNCH_BLOCKING
CUDA_DEVICE_MAX_CONNECTIONS TORCH_LOGS TORCH_CUDA_ARCH_LIST TORCHINDUCTOR_CACHE_DIR TORCH_NCCL_ASYNC_ERROR_HANDLING
TORCHELASTIC_RUN_ID PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF TRITON_CACHE_DIR OMP_NUM_THREADS MKL_NUM_THREADS
PYTHONPATH PYTHONUNBUFFERED PYTHONHASHSEED VIRTUAL_ENV CONDA_PREFIX HF_HOME HF_TOKEN WANDB_API_KEY WANDB_MODE
RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT SLURM_JOB_ID SLURM_PROCID
KUBERNETES_SERVICE_HOST NVIDIA_VISIBLE_DEVICES RUNPOD_POD_ID SSH_CONNECTION XDG_RUNTIME_DIR XDG_DATA_DIRS
DEBIAN_FRONTEND PIP_CACHE_DIR GIT_AUTHOR_NAME PYTEST_CURRENT_TEST TOKENIZERS_PARALLELISM MPLBACKEND http_proxy NO_PROXY
MAIL FLASH_ATTENTION_FORCE_BUILD MATCHED_FINEWEB_REPO_ID LD_LIBRARY_PATH MANPATH COLUMNS LINES LESSOPEN JUPYTER_TOKEN
GLOO_SOCKET_IFNAME UCX_TLS CUBLAS_WORKSPACE_CONFIG CC CXX CFLAGS""".split()


@pytest.mark.parametrize("name", USUAL)
def test_usual_environment_names_pass(name: str) -> None:
    """No false alarm on what shells, schedulers, torchrun, CUDA and Python set."""
    assert t.Config.from_env({name: "1", "RUN_ID": "r"}) == t.Config.from_env({"RUN_ID": "r"})


def test_this_process_environment_passes() -> None:
    assert t.Config.from_env(dict(os.environ))


# --- other scripts' names -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ours"), t.OTHER_NAMES.items())
def test_another_scripts_name_is_refused_and_ours_is_named(name: str, ours: str) -> None:
    """Also where no word of it is ours (VRL, STRIDE); in a recipe too."""
    assert ours in t.Config.variables() and name not in t.Config.variables()
    assert f"{name}=1 (did you mean {ours}?)" in refusal({name: "1"})


@pytest.mark.parametrize(
    ("name", "ours"),
    [("USE_COMPILE", "COMPILE"), ("USE_GPTQ", "GPTQ_ENABLED"), ("ENABLE_QAT", "QAT_ENABLED"), ("QAT", "QAT_ENABLED"),
     ("EMA", "EMA_ENABLED"), ("SMEAR", "SMEAR_GATE_ENABLED"), ("USE_POLAR_EXPRESS", "POLAR_EXPRESS"),
     ("TRAIN_MAX_SEQ_LEN", "TRAIN_SEQ_LEN"), ("WARMDOWN_FRACTION", "WARMDOWN_FRAC")],
)  # fmt: skip
def test_usual_forms_of_a_name_are_recognized(name: str, ours: str) -> None:
    assert re.search(rf"{name}=1 \(did you mean .*\b{ours}\b", refusal({name: "1"}))


# --- recipes ------------------------------------------------------------------------------------


def recipe(folder: Path, text: str) -> str:
    path = folder / "some.env"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_environment_wins_over_recipe_and_sources_tell(tmp_path: Path) -> None:
    """default < recipe < environment, each recorded."""
    lines = "# a system\nSEED=7\n\nMATRIX_LR = 0.01  # comment\nEVAL_STRIDE=32\nXSA_LAST_N=3\nVE_LAYERS=\n"
    path = recipe(tmp_path, lines)
    cfg = config(RECIPE=path, SEED=8, XSA_LAST_N=2)
    assert (cfg.seed, cfg.matrix_lr, cfg.eval_stride, cfg.xsa_last_n, cfg.ve_layers) == (8, 0.01, 32, 2, (9, 10))
    assert [cfg.sources[n] for n in ("seed", "matrix_lr", "beta1", "xsa_last_n", "eval_stride")] == [
        "environment", "recipe", "default", "environment", "recipe"]  # fmt: skip


def test_an_empty_environment_variable_leaves_the_recipe_value(tmp_path: Path) -> None:
    assert config(RECIPE=recipe(tmp_path, "SEED=7\n"), SEED="").seed == 7


@pytest.mark.parametrize("name", ["MATRX_LR", "DTG_ENABLED", "CONTROL_TENSOR_NAME_PATTERNS", "NCCL_NET", "banana"])
def test_every_unknown_name_in_a_recipe_is_refused(tmp_path: Path, name: str) -> None:
    """A recipe is ours alone: even a name that may stand in an environment has no business there."""
    assert name in refusal({"RECIPE": recipe(tmp_path, f"SEED=1\n{name}=1\n")})


def test_broken_recipes_are_refused(tmp_path: Path) -> None:
    """A missing file names the path; a line without = names file and line; a bad value names the variable."""
    missing = str(tmp_path / "none.env")
    assert missing in refusal({"RECIPE": missing})
    assert re.search(r"some\.env:2\b.*banana", refusal({"RECIPE": recipe(tmp_path, "SEED=1\nbanana\n")}))
    assert "SEED" in refusal({"RECIPE": recipe(tmp_path, "SEED=one\n")})


# --- cross-field rules --------------------------------------------------------------------------

RULES = [
    ({"MODEL_DIM": 500}, "MODEL_DIM=500.*NUM_HEADS=8"),
    ({"NUM_KV_HEADS": 3}, "NUM_HEADS=8.*NUM_KV_HEADS=3"),
    ({"MODEL_DIM": 56, "ROPE_DIMS": 0}, "MODEL_DIM.*7"),
    ({"ROPE_DIMS": 15}, "ROPE_DIMS=15"),
    ({"ROPE_DIMS": 66}, "ROPE_DIMS=66.*64"),
    ({"MLP_MULT": 0}, "MLP_HIDDEN=0.*MLP_MULT=0"),
    ({"MLP_MULT": 0.001}, "MLP_HIDDEN=0.*MLP_MULT=0.001"),
    ({"XSA_LAST_N": 12}, "XSA_LAST_N=12.*NUM_LAYERS=11"),
    ({"NUM_LAYERS": 10, "XSA_LAST_N": 10}, r"VE_LAYERS=.*10.*NUM_LAYERS=10"),
    ({"VE_LAYERS": "-1,2"}, r"VE_LAYERS=.*-1"),
    ({"BIGRAM_VOCAB_SIZE": 1}, "BIGRAM_VOCAB_SIZE=1"),
    ({"MATRIX_BITS": 9}, "MATRIX_BITS.*9"),
    ({"EMBED_BITS": 16}, "EMBED_BITS.*16"),
    *[({name: 1.5}, f"{name}.*1.5") for name in ("WARMDOWN_FRAC", "MIN_LR", "MUON_MOMENTUM", "EMA_DECAY", "BETA1",
                                                  "BETA2", "MUON_MOMENTUM_WARMUP_START", "LATE_QAT_THRESHOLD")],
    ({"SWA_ENABLED": 1, "LAWA_ENABLED": 1}, "SWA_ENABLED.*LAWA_ENABLED"),
    ({"EVAL_ONLY": 1, "EXPORT_ONLY": 1, "ARTIFACT_PATH": "a", "WEIGHTS_PATH": "w"}, "EVAL_ONLY.*EXPORT_ONLY"),
    ({"EVAL_ONLY": 1}, "EVAL_ONLY.*ARTIFACT_PATH"),
    ({"EXPORT_ONLY": 1}, "EXPORT_ONLY.*WEIGHTS_PATH"),
    ({"EVAL_STRIDE": 2049}, "EVAL_STRIDE=2049.*2048"),
    ({"EVAL_SEQ_LEN": 32}, "EVAL_STRIDE=64.*32"),
    ({"QAT_ENABLED": 1}, "QAT_ENABLED=1.*MATRIX_CLIP_SIGMAS"),
    ({"MUON_HEAD_GROUP": 3}, "MUON_HEAD_GROUP=3.*NUM_KV_HEADS=4"),
    ({"VOCAB_SIZE": 65_537}, "VOCAB_SIZE=65537"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "pattern"), RULES)
def test_cross_field_rules_name_the_variables(variables: dict[str, Any], pattern: str) -> None:
    assert re.search(pattern, refusal({name: str(value) for name, value in variables.items()}))


@pytest.mark.parametrize(
    "variables",
    [{"ROPE_DIMS": 64}, {"XSA_LAST_N": 0}, {"XSA_LAST_N": 11}, {"BIGRAM_VOCAB_SIZE": 0}, {"BIGRAM_VOCAB_SIZE": 2},
     {"MATRIX_BITS": 8}, {"EMA_DECAY": 1}, {"EVAL_STRIDE": 2048}, {"VOCAB_SIZE": 65_536},
     {"MLP_MULT": 0, "MLP_HIDDEN": 8}, {"QAT_ENABLED": 1, "CLIP_POLICY": "amax"},
     {"QAT_ENABLED": 1, "MATRIX_CLIP_SIGMAS": 8}, {"EVAL_ONLY": 1, "ARTIFACT_PATH": "a"},
     {"EXPORT_ONLY": 1, "WEIGHTS_PATH": "w"}, {"NUM_LAYERS": 9, "XSA_LAST_N": 9, "VE_ENABLED": 0}],
)  # fmt: skip
def test_values_at_the_border_of_a_rule_pass(variables: dict[str, Any]) -> None:
    assert config(**variables)


@pytest.mark.parametrize("layers", ["2,2", ","])
def test_value_embedding_layers_without_effect_are_refused(layers: str) -> None:
    """A layer named twice leaves a row of ve_scale without a gradient, no layer at all leaves the whole table so."""
    assert "VE_LAYERS" in refusal(tiny_env(VE_LAYERS=layers))


# --- help and the command line --------------------------------------------------------------------


def test_the_table_of_variables_is_complete() -> None:
    """Every field has a line, which shows its default and has a text."""
    lines = t.Config.describe_variables().splitlines()
    by_name = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert set(by_name) == {*t.Config.variables()}
    assert all(spec.metadata["text"] in by_name[name] for name, spec in t.Config.variables().items())
    assert by_name["MODEL_DIM"].split()[1] == "512" and by_name["EMA_ENABLED"].split()[1] == "1"
    assert by_name["VE_LAYERS"].split()[1] == "9,10"


def test_help_prints_the_table_without_a_run(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--help", MATRX_LR="1")
    assert result.returncode == 0 and result.stdout.strip() == t.Config.describe_variables().strip()
    assert not list(tmp_path.iterdir())


def test_a_bad_variable_stops_the_script_before_anything_else(tmp_path: Path) -> None:
    """One line on stderr, exit code not 0, no file written, and the missing data folder is not even looked at."""
    result = run_script(tmp_path, MATRX_LR="0.02", DATA_PATH=str(tmp_path / "none"), DEVICE="cpu")
    assert result.returncode != 0 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1 and re.search("MATRX_LR.*MATRIX_LR", result.stderr)
    assert not list(tmp_path.iterdir())


# --- clock, ranks, ledger ----------------------------------------------------------------


class FakeTime:
    """A time source that moves only when told."""

    def __init__(self) -> None:
        self.value = 100.0

    def __call__(self) -> float:
        return self.value


def test_clock_counts_only_while_it_runs() -> None:
    """Start, read, stop, pause and resume, against a fake time source."""
    now = FakeTime()
    clock = t.Clock(CPU, now)
    now.value += 5
    assert clock.seconds() == 0
    clock.start()
    now.value += 2
    assert clock.seconds() == 2
    clock.stop()
    now.value += 50
    assert clock.seconds() == clock.total == 2
    clock.start()
    now.value += 3
    assert clock.stop() == 5
    now.value += 7
    assert clock.seconds() == clock.total == 5


@pytest.mark.parametrize("world", range(1, 10))
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 64, 1001])
def test_shares_cover_the_work_exactly(world: int, count: int) -> None:
    """Contiguous, in rank order, each piece once, sizes within one."""
    shares = [t.Ranks(rank, world, CPU).share(count) for rank in range(world)]
    assert [piece for share in shares for piece in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_world_of_one_returns_its_input() -> None:
    ranks = t.Ranks.start(tiny_config(), {})
    tensor = torch.arange(3.0)
    assert (ranks.rank, ranks.world, ranks.is_main_process, ranks.device) == (0, 1, True, CPU)
    assert ranks.all_reduce_sum_(tensor) is tensor and tensor.tolist() == [0, 1, 2]
    assert ranks.all_reduce_max(1.5, 2) == [1.5, 2] and ranks.broadcast(b"x") == b"x"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_an_error() -> None:
    with pytest.raises(t.UserError, match="DEVICE=cuda"):
        t.Ranks.start(tiny_config(DEVICE="cuda"), {})


def ledger_lines(cfg: t.Config, ledger: list[tuple[str, str, float]]) -> dict[str, str]:
    """budget -> line that `log_ledger` writes about it."""
    lines: list[str] = []

    class ListLog(t.Log):
        def __call__(self, text: str, console: bool = True) -> None:
            lines.append(text)

    t.log_ledger(t.Runtime(cfg, t.Ranks(0, 1, CPU), ListLog(cfg, enabled=False), ledger))
    return {re.search(r"budget (\w+)", line)[1]: line for line in lines}


def test_ledger_flags_only_what_is_over_its_budget() -> None:
    """Phases of a budget add up; exactly at the limit is inside; no limit and untimed work are never over."""
    cfg = tiny_config(MAX_WALLCLOCK_SECONDS=600, MAX_EVAL_SECONDS=100)
    inside = [("train", "steps", 590.0), ("train", "gptq", 10.0), ("eval", "roundtrip", 99.0), ("untimed", "w", 5000.0)]
    lines = ledger_lines(cfg, inside)
    assert set(lines) == {"train", "eval", "untimed"} and not any("OVER" in line for line in lines.values())
    assert "600.0" in lines["train"] and "steps:590" in lines["train"] and "gptq:10" in lines["train"]
    lines = ledger_lines(cfg, [*inside, ("train", "clip", 0.2), ("eval", "sliding window", 2.0)])
    assert [budget for budget, line in lines.items() if "OVER" in line] == ["train", "eval"]
    assert not any("OVER" in line for line in ledger_lines(tiny_config(), [("train", "steps", 1e6)]).values())


def test_timed_blocks_are_booked_and_the_log_holds_every_value(run: t.Runtime, in_tmp: Path) -> None:
    """The log names every hyperparameter with value and source, and `timed` books under its budget."""
    with run.timed("block", "eval"):
        pass
    assert [entry[:2] for entry in run.ledger] == [("eval", "block")] and run.spent("train") == 0 <= run.spent("eval")
    text = (in_tmp / "logs/tiny.txt").read_text()
    for name in (n.lower() for n in t.Config.variables()):
        assert f"{name}: {getattr(run.cfg, name)} ({run.cfg.sources[name]})" in text
    assert (in_tmp / "logs/tiny.py").read_bytes() == SCRIPT.read_bytes()


# --- batch shape ----------------------------------------------


@pytest.mark.parametrize(
    ("variables", "world", "accum", "sequences"),
    [({}, 8, 1, 48), ({}, 4, 2, 48), ({}, 2, 4, 48), ({}, 1, 8, 48), ({}, 3, 4, 32),
     ({"GRAD_ACCUM_STEPS": 4}, 8, 4, 12),
     ({"TRAIN_BATCH_TOKENS": 524_288, "TRAIN_SEQ_LEN": 1024}, 8, 1, 64),
     ({"TRAIN_BATCH_TOKENS": 524_288, "TRAIN_SEQ_LEN": 1024}, 1, 8, 64),
     ({"TRAIN_BATCH_TOKENS": 262_144, "TRAIN_SEQ_LEN": 131_072}, 1, 2, 1),
     ({"TRAIN_BATCH_TOKENS": 2048 * 53}, 1, 53, 1)],
)  # fmt: skip
def test_batch_shape_arithmetic(variables: dict[str, Any], world: int, accum: int, sequences: int) -> None:
    """The fewest micro-steps whose micro-batch fits; all parts multiply to TRAIN_BATCH_TOKENS."""
    cfg = config(**variables)
    shape = t.batch_shape(cfg, world)
    assert shape == (accum, sequences)
    assert world * shape.accum * shape.sequences * cfg.train_seq_len == cfg.train_batch_tokens


@pytest.mark.parametrize(
    ("tokens", "world", "accum"), [(786_433, 8, 0), (1000, 8, 0), (786_432, 5, 0), (786_432, 8, 7), (20_000, 1, 3),
                                  (100_000, 3, 0), (786_432, 7, 0), (786_433, 3, 2), (2048, 3, 0)],
)
def test_indivisible_batches_name_the_nearest_valid_ones(tokens: int, world: int, accum: int) -> None:
    """The message offers the neighbours below and above, and they are indeed accepted."""
    with pytest.raises(t.UserError, match=f"TRAIN_BATCH_TOKENS={tokens}") as caught:
        t.batch_shape(config(TRAIN_BATCH_TOKENS=tokens, GRAD_ACCUM_STEPS=accum), world)
    unit = world * 2048 * max(accum, 1)
    offered = [int(n) for n in re.search(r"valid\D*(\d[\d or]*)", str(caught.value))[1].split(" or ")]
    assert offered == [n for n in (tokens // unit * unit, (tokens // unit + 1) * unit) if n]
    for valid in offered:
        assert t.batch_shape(config(TRAIN_BATCH_TOKENS=valid, GRAD_ACCUM_STEPS=accum), world)
