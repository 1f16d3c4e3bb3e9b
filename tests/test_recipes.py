"""Every known system runs from its recipe, end to end at toy size, and each of its features acts."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_model

import train_gpt as t

ENVIRONMENT = dict(os.environ)
RECIPES = sorted((Path(__file__).parents[1] / "records" / "recipes").glob("*.env"))
SYSTEMS = [path.stem for path in RECIPES if path.stem != "demo"]
SIZES = {k: TINY[k] for k in ("VOCAB_SIZE", "VE_DIM", "BIGRAM_DIM",
                              "TRAIN_BATCH_TOKENS", "ITERATIONS", "WARMUP_STEPS", "GPTQ_CALIBRATION_BATCHES", "VAL_BATCH_SIZE",
                              "DEVICE", "COMPILE")}  # fmt: skip
SIZES |= {"MODEL_DIM": 64, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "MLP_HIDDEN": 64, "TRAIN_SEQ_LEN": 32, "EVAL_SEQ_LEN": 0,
          "MAX_WALLCLOCK_SECONDS": 0, "WARMDOWN_ITERS": 10, "SWA_EVERY": 1, "LAWA_FREQ": 2,
          "MUON_HEAD_GROUP": 0}  # fmt: skip
# Feature of a recipe -> the variables that take it away; the model's output must change.
MODEL_FEATURES = {
    "int6_mlp1488": {"MLP_HIDDEN": 48, "QK_GAIN_INIT": 1.0},
    "mar22_control": {"MLP_ACTIVATION": "leaky_relu2", "XSA_LAST_N": 0, "ROPE_DIMS": 0, "LN_SCALE": 0, "VE_ENABLED": 0,
                      "SMEAR_GATE_ENABLED": 0, "BIGRAM_VOCAB_SIZE": 0},
    "mar22_asqu": {"MLP_ACTIVATION": "relu2", "XSA_LAST_N": 0, "VE_LAYERS": "9"},
    "xsa_gptq": {"MLP_ACTIVATION": "relu2", "NEGATIVE_SLOPE": 0.1, "XSA_LAST_N": 10, "SMEAR_GATE_ENABLED": 0,
                 "BIGRAM_VOCAB_SIZE": 0},
    "xsa_vr_ga": {"VALUE_RESIDUAL": 0, "GATED_ATTN_ENABLED": 0, "XSA_LAST_N": 4, "BIGRAM_VOCAB_SIZE": 2048},
    "depth_recurrent": {"NUM_LOOPS": 1, "LORA_RANK": 0, "TRAIN_SEQ_LEN": 16},
}  # fmt: skip


def recipe_env(name: str, **changes: Any) -> dict[str, str]:
    """Variables of a recipe at toy size, as a mapping that names the recipe."""
    path = next(path for path in RECIPES if path.stem == name)
    tiny = {"EVAL_STRIDE": 16} if t.read_recipe(path).get("EVAL_STRIDE") != "0" else {}
    return {"RECIPE": str(path), **{k: str(v) for k, v in {**SIZES, "RUN_ID": name, **tiny, **changes}.items()}}


def output(env: dict[str, str]) -> torch.Tensor:
    """Logits of a randomized model of a configuration; equal names and shapes get equal values."""
    cfg = t.Config.from_env(env)
    model = t.GPT(cfg, 1, t.PLAIN_ATTENTION, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = sum(map(ord, name))
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        ids = torch.randint(4, 512, (1, 32), generator=torch.Generator().manual_seed(1))
        weights = model.weights(False)
        return model.logits(model.hidden(ids, weights, model.order), weights)


CASES = [(name, key, value) for name, rows in MODEL_FEATURES.items() for key, value in rows.items()]


@pytest.mark.parametrize(("name", "key", "value"), CASES, ids=[f"{name} {key}" for name, key, _ in CASES])
def test_each_feature_of_the_model_acts(name: str, key: str, value: Any) -> None:
    """Taking it away changes the output by more than rounding."""
    assert not torch.allclose(output(recipe_env(name)), output(recipe_env(name, **{key: value})), atol=1e-3)


def finished(folder: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> str:
    """The log of a whole run."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(t.os, "environ", {**ENVIRONMENT, **env})
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    t.main()
    return (folder / f"logs/{env['RUN_ID']}.txt").read_text()


def bpb(log: str, name: str) -> float:
    return float(re.search(rf"^{name}_exact .*val_bpb:(\S+)", log, re.MULTILINE)[1])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_runs_end_to_end(
    name: str, corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the recipe to the score of the artifact; nothing that it configures stays without effect."""
    settings = {"POST_QAT_SECONDS": 0.5} if name == "int6_mlp1488" else {}
    settings |= {"TTT_CHUNK_TOKENS": 512} if name == "ttt_ngram" else {}
    log = finished(tmp_path, monkeypatch, recipe_env(name, **corpus, **settings))
    assert "never activated: none" in log
    assert re.search(r"^final_int[68](_zlib)?_roundtrip_exact val_loss:\d", log, re.MULTILINE)
    assert re.findall(r"^(legal_ttt\w*)_exact", log, re.MULTILINE) == (
        ["legal_ttt", "legal_ttt_ngram"] if name == "ttt_ngram" else [])  # fmt: skip
    assert (tmp_path / f"logs/{name}.pgolf").stat().st_size > 0
    passes = {"depth_recurrent": "passes:9 over 3 layers", "int6_mlp1488": "passes:9 over 9 layers"}
    assert re.search(rf"^model_params:\d+ \(.*up:\d+ .*\) {passes.get(name, 'passes:')}", log, re.MULTILINE)
    sources = dict(re.findall(r"^  (\w+): .*\((\w+)\)$", log, re.MULTILINE))
    env = recipe_env(name, **corpus, **settings)
    named = {key.lower() for key in t.read_recipe(Path(env["RECIPE"])) if key not in env}
    assert named and {sources[key] for key in named} == {"recipe"}


EXPORTS = {  # recipe -> variables that take a feature of its export or averaging away
    "int6_mlp1488": {"LOWBIT_BITS": 7, "COMPRESSOR_LEVEL": 1, "POST_QAT_SECONDS": 0},
    "mar22_control": {"CLIP_POLICY": "amax", "COMPRESSOR": "zlib", "SWA_ENABLED": 0, "EMA_ENABLED": 0, "LATE_QAT_THRESHOLD": 0},
    "xsa_gptq": {"GPTQ_ENABLED": 0, "CLIP_POLICY": "search", "COMPRESSOR": "zlib", "EMA_DECAY": 0.1, "LATE_QAT_THRESHOLD": 0},
    "depth_recurrent": {"LAWA_ENABLED": 0, "QAT_ENABLED": 0, "MATRIX_BITS": 6, "COMPRESSOR": "ans"},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_each_feature_of_the_export_acts(
    name: str, corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking it away changes the artifact's bytes."""
    first = {"POST_QAT_SECONDS": 0.3} if name == "int6_mlp1488" else {}
    few = {"ITERATIONS": 12, "WARMDOWN_ITERS": 20, "EVAL_STRIDE": 0, **corpus, **first}
    finished(tmp_path, monkeypatch, recipe_env(name, **few))
    whole = (tmp_path / f"logs/{name}.pgolf").read_bytes()
    for key, value in EXPORTS[name].items():
        level = {"COMPRESSOR_LEVEL": -1} if key == "COMPRESSOR" else {}
        finished(tmp_path, monkeypatch, recipe_env(name, **{**few, key: value, **level, "RUN_ID": f"without {key}"}))
        assert (tmp_path / f"logs/without {key}.pgolf").read_bytes() != whole, f"{key}={value} changes nothing"


def test_xsa_gptq_keeps_its_reserve_inside_the_clock(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 s are kept for calibration and GPTQ, and the ledger ends under the limit."""
    log = finished(tmp_path, monkeypatch, recipe_env("xsa_gptq", **corpus, MAX_WALLCLOCK_SECONDS=17, ITERATIONS=40))
    assert "gptq:reserving 14.0s, effective=3000ms" in log
    spent = re.search(r"^budget train: ([\d.]+)s of 17s \(", log, re.MULTILINE)[1]
    assert float(spent) < 17 and "OVER BUDGET" not in log


def test_xsa_vr_ga_lowers_one_layer_at_a_time(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the limit: the centre first, then outwards, as many layers as it takes and no more."""
    env = recipe_env("xsa_vr_ga", **corpus, EVAL_STRIDE=0)
    finished(tmp_path, monkeypatch, env)
    whole = (tmp_path / "logs/xsa_vr_ga.pgolf").stat().st_size
    limit = t.code_bytes() + int(whole * 0.97)
    log = finished(tmp_path, monkeypatch, {**env, "TARGET_BYTES": str(limit), "RUN_ID": "limited"})
    layers = [int(n) for n in re.findall(r"^int5_fallback: layer (\d+) at 5 bits", log, re.MULTILINE)]
    assert layers == [5, 4, 6, 3, 7, 2, 8, 1, 9, 0, 10][: len(layers)] and 0 < len(layers) < 11
    sizes = [int(n) for n in re.findall(r"^int5_fallback: .*artifact:(\d+)", log, re.MULTILINE)]
    assert sizes[-1] <= limit - t.code_bytes() and all(size > limit - t.code_bytes() for size in sizes[:-1])
    assert (tmp_path / "logs/limited.pgolf").stat().st_size + t.code_bytes() <= limit


def test_the_matched_pair_differs_in_the_activation_alone() -> None:
    """PR #1247 compares equal runs."""
    pair = [t.read_recipe(path) for path in RECIPES if path.stem.startswith("mar22_")]
    different = {k for k in pair[0] | pair[1] if pair[0].get(k) != pair[1].get(k)}
    assert different == {"MLP_ACTIVATION", "ASQU_BETA_INIT", "ASQU_LR"}


def test_sp8192_caseops_is_sp8192_on_other_data() -> None:
    """The same settings, so that the two scores say what the case marks are worth."""
    marked, plain = (t.read_recipe(RECIPES[0].parent / f"{name}.env") for name in ("sp8192_caseops", "sp8192"))
    assert {k: v for k, v in marked.items() if k not in ("DATA_PATH", "TOKENIZER_PATH")} == plain
    assert all("8192" in marked[k] and "caseops" in marked[k] for k in ("DATA_PATH", "TOKENIZER_PATH"))


def test_ttt_ngram_is_xsa_vr_ga_scored_in_more_ways() -> None:
    """Training and export are the same system's."""
    more, same = (t.read_recipe(RECIPES[0].parent / f"{name}.env") for name in ("ttt_ngram", "xsa_vr_ga"))
    assert {k: v for k, v in more.items() if not k.startswith(("TTT_", "NGRAM_"))} == same
    assert more["TTT_ENABLED"] == more["NGRAM_ENABLED"] == "1"


def test_asqu_factors_stay_out_of_quantization() -> None:
    """They are control parameters, kept in half precision."""
    model = tiny_model(MLP_ACTIVATION="asqu")
    assert "asqu_beta" in t.passthrough(model) and "asqu_beta" not in {job.name for job in t.quant_specs(model)}


@pytest.mark.parametrize(
    ("name", "millions"), [("int6_mlp1488", 21.3), ("naive_baseline", 17.1), ("mar22_control", 27.0)]
)
def test_parameter_counts_are_the_published_ones(name: str, millions: float) -> None:
    cfg = t.Config.from_env({"RECIPE": str(RECIPES[0].parent / f"{name}.env")})
    count = sum(s.rows * s.cols for s in t.bank_specs(cfg)) * cfg.num_layers
    count += sum(torch.Size(s.shape).numel() for s in t.param_table(cfg))
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
