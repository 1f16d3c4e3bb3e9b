"""The coder is exact and tight, the artifact reads back bitwise or is refused, and the export fits."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import codes_of, tiny_config, tiny_model

import train_gpt as t

SOMEWHERE = Path("folder/some.pgolf")
IDENTITY = {"tokenizer_sha256": "a" * 64, "val_sha256": "b" * 64}
NOTES = {"identity": IDENTITY}


# The entropy coder


def gaussian(count: int, width: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, width, count).round().clip(-128, 127).astype(np.int8)


def entropy(symbols: np.ndarray, sizes: list[int]) -> float:
    """Bytes of an ideal coder with one known distribution per segment."""
    bits = 0.0
    for segment in np.split(symbols, np.cumsum(sizes)[:-1]):
        counts = np.unique(segment, return_counts=True)[1]
        bits -= (counts * np.log2(counts / max(len(segment), 1))).sum()
    return bits / 8


STREAMS: dict[str, Callable[[], tuple[np.ndarray, list[int]]]] = {
    "gaussian": lambda: (gaussian(50_000, 8), [50_000]),
    "whole range": lambda: (gaussian(50_000, 60), [50_000]),
    "uniform": lambda: (np.arange(256 * 40).astype(np.uint8).view(np.int8), [256 * 40]),
    "extremes": lambda: (np.array([-128, 127, 0, 127, -128], np.int8), [5]),
    "skewed": lambda: (np.where(np.arange(100_000) % 33_333 == 0, -77, 3).astype(np.int8), [100_000]),
    "all but one rare": lambda: (np.concatenate([np.zeros(90_000), np.arange(-128, 128)]).astype(np.int8), [90_256]),
    "single symbol": lambda: (np.full(9_000, -5, np.int8), [9_000]),
    "single symbol segments": lambda: (np.repeat([3, -128, 127, 0], 5_000).astype(np.int8), [5_000] * 4),
    "one": lambda: (np.array([42], np.int8), [1]),
    "empty": lambda: (np.zeros(0, np.int8), [0]),
    "empty segments": lambda: (gaussian(7, 3), [0, 3, 0, 4, 0]),
    "exactly the lanes": lambda: (gaussian(t.ANS_LANES, 5), [t.ANS_LANES]),
    "lanes minus and plus one": lambda: (gaussian(2 * t.ANS_LANES, 5), [t.ANS_LANES - 1, t.ANS_LANES + 1]),
    "many odd segments": lambda: (gaussian(sum(range(1, 200, 3)), 4), list(range(1, 200, 3))),
    "different widths": lambda: (np.concatenate([gaussian(9_999, w) for w in (1, 30, 3)]), [9_999] * 3),
}


@pytest.mark.parametrize("name", STREAMS)
def test_coded_symbols_come_back_exactly(name: str) -> None:
    symbols, sizes = STREAMS[name]()
    decoded = t.ans_decode(t.ans_encode(symbols, sizes), sizes)
    assert decoded.dtype == np.int8 and np.array_equal(decoded, symbols)


def test_frequencies_sum_to_the_resolution_and_give_every_symbol_room() -> None:
    """Also for the hardest table: as many symbols that occur once as there can be, beside equal common ones."""
    rng = np.random.default_rng(0)
    tables = [rng.integers(0, 3, 256), np.ones(256), np.eye(256)[7] * 5, np.r_[np.ones(128), np.full(128, 1e7)]]
    for counts in tables:
        frequencies = t.ans_frequencies(np.asarray(counts, np.int64))
        assert frequencies.sum() == 1 << t.ANS_BITS
        assert ((frequencies > 0) == (np.asarray(counts) > 0)).all()


@pytest.mark.parametrize(("count", "width"), [(1 << 20, 8.0), (1 << 20, 2.6), (1 << 22, 2.6)])
def test_coded_size_is_within_one_percent_of_the_entropy(count: int, width: float) -> None:
    """From a million symbols on, tables and final states of the lanes included."""
    symbols, sizes = gaussian(count, width), [count // 8] * 8
    size, ideal = len(t.ans_encode(symbols, sizes)), entropy(symbols, sizes)
    assert ideal < size < 1.01 * ideal, f"{100 * (size / ideal - 1):.2f}% over"


def test_segments_have_their_own_distribution() -> None:
    """Two halves of different width cost less apart than under one table."""
    symbols = np.concatenate([gaussian(200_000, 1), gaussian(200_000, 20)])
    assert len(t.ans_encode(symbols, [200_000] * 2)) < 0.95 * len(t.ans_encode(symbols, [400_000]))


# The container


def quantized(**changes: Any) -> tuple[t.Config, dict[str, t.QuantizedTensor], dict[str, torch.Tensor]]:
    """A tiny model's codes and kept tensors, rounded to nearest."""
    model = tiny_model(GPTQ_ENABLED=0, **changes)
    return model.cfg, codes_of(model.cfg, t.quant_specs(model), {}, 6.0), t.passthrough(model)


CODERS = [("auto", -1), ("ans", -1)] + [
    (name, level)
    for name, levels in {"zlib": (1, 9), "lzma": (0, 6), "zstd": (1, 22), "brotli": (0, 11)}.items()
    for level in (-1, *levels)
]


@pytest.mark.parametrize(("compressor", "level"), CODERS)
def test_artifact_reads_back_bitwise(compressor: str, level: int) -> None:
    """Every parameter of the model, by name and shape, equal to the in-memory dequantized one; coders as asked."""
    cfg, coded, kept = quantized(COMPRESSOR=compressor, COMPRESSOR_LEVEL=level)
    header, parameters = t.decode_artifact(t.encode_artifact(cfg, coded, kept, {**NOTES, "note": 5}), SOMEWHERE)
    expected = {n: c.dequantize() if n in ("qkv", "out", "up", "down") else c.dequantize()[0] for n, c in coded.items()}
    expected |= {name: value.float() for name, value in kept.items()}
    model = tiny_model()
    assert parameters.keys() == model.state_dict().keys()
    for name, value in parameters.items():
        assert torch.equal(value, expected[name.split(".", 1)[1]]), name
    model.load(parameters)
    coders = {coder for _, coder, _ in header["streams"]}
    assert coders == {compressor} if compressor in t.CODECS else header["streams"][0][1] == "ans"
    assert header["note"] == 5 and header["order"] == [0, 1, 2, 3]
    assert header["architecture"] == {k: list(v) if isinstance(v, tuple) else v for k, v in cfg.architecture().items()}


@pytest.mark.parametrize("changes", [
    {"MLP_ACTIVATION": "asqu", "VALUE_RESIDUAL": 1, "GATED_ATTN_ENABLED": 1, "TIE_EMBEDDINGS": 0},
    {"BIGRAM_VOCAB_SIZE": 0, "VE_ENABLED": 0, "SMEAR_GATE_ENABLED": 0, "NUM_LAYERS": 1, "XSA_LAST_N": 1},
    {"MATRIX_BITS": 8, "EMBED_BITS": 2},
])  # fmt: skip
def test_artifact_carries_every_feature(changes: dict[str, Any]) -> None:
    cfg, coded, kept = quantized(**changes)
    _, parameters = t.decode_artifact(t.encode_artifact(cfg, coded, kept, NOTES), SOMEWHERE)
    model = tiny_model(**changes)
    model.load(parameters)
    assert torch.equal(model.banks["up"], coded["up"].dequantize())


def test_a_stronger_level_is_smaller() -> None:
    """The level reaches the coder; -1 is the strongest."""
    sizes = {}
    for level in (1, 9, -1):
        cfg, coded, kept = quantized(COMPRESSOR="zlib", COMPRESSOR_LEVEL=level)
        sizes[level] = len(t.encode_artifact(cfg, coded, kept, NOTES))
    assert sizes[9] < sizes[1] and sizes[-1] == sizes[9]


@pytest.mark.parametrize("compressor", ["zlib", "lzma", "zstd", "brotli"])
def test_a_level_that_the_coder_does_not_have_is_refused(compressor: str) -> None:
    """By variable, before or at the encoding, but never as the coder's own exception and traceback after training."""
    with pytest.raises(t.UserError, match="LEVEL"):
        t.encode_stream(tiny_config(COMPRESSOR=compressor, COMPRESSOR_LEVEL=99), b"codes")


def artifact() -> bytes:
    return t.encode_artifact(*quantized(), NOTES)


def test_any_damaged_byte_is_refused_naming_the_file() -> None:
    """Header, each stream, checksum; and the message tells what to do."""
    blob = artifact()
    for position in [*range(0, 40), *range(40, len(blob), 997), len(blob) - 9, len(blob) - 1]:
        damaged = bytearray(blob)
        damaged[position] ^= 0x10
        with pytest.raises(t.UserError, match=re.escape(str(SOMEWHERE))):
            t.decode_artifact(bytes(damaged), SOMEWHERE)


@pytest.mark.parametrize("keep", [0, 1, 5, 6, 17, 18, 100, 0.5, -8, -1])
def test_a_truncated_artifact_is_refused_naming_the_file(keep: float) -> None:
    blob = artifact()
    cut = blob[: int(keep * len(blob)) if isinstance(keep, float) else keep]
    with pytest.raises(t.UserError, match=re.escape(str(SOMEWHERE))):
        t.decode_artifact(cut, SOMEWHERE)
    with pytest.raises(t.UserError, match=re.escape(str(SOMEWHERE))):
        t.decode_artifact(blob + b"\0", SOMEWHERE)


def test_another_kind_of_file_is_refused() -> None:
    with pytest.raises(t.UserError, match="PGOLF"):
        t.decode_artifact(b"PK\x03\x04" + artifact(), SOMEWHERE)


@pytest.mark.parametrize(("coder", "package"), [("zstd", "zstandard"), ("brotli", "brotli")])
def test_a_missing_package_is_named_as_coder_and_remedy(
    monkeypatch: pytest.MonkeyPatch, coder: str, package: str
) -> None:
    """Writing with it, and reading a file written where it was installed; auto does without."""
    cfg, coded, kept = quantized(COMPRESSOR=coder)
    blob = t.encode_artifact(cfg, coded, kept, NOTES)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails, and it is not found
    for attempt in (lambda: t.encode_artifact(cfg, coded, kept, NOTES), lambda: t.decode_artifact(blob, SOMEWHERE)):
        with pytest.raises(t.UserError, match=f"{coder}.*pip install"):
            attempt()
    header, _ = t.decode_artifact(t.encode_artifact(replace(cfg, compressor="auto"), coded, kept, NOTES), SOMEWHERE)
    assert coder not in {name for _, name, _ in header["streams"]}


@pytest.mark.parametrize("values", [np.arange(-300, 301) / 7, np.zeros(0), np.array([65504.0, -0.0, 6e-8])])
def test_half_precision_bytes_are_split_and_joined_exactly(values: np.ndarray) -> None:
    halves = torch.from_numpy(values).half()
    raw = t.byte_shuffle(halves)
    assert torch.equal(t.byte_unshuffle(raw), halves) and len(raw) == 2 * len(values)
    assert raw == halves.numpy().view(np.uint8)[0::2].tobytes() + halves.numpy().view(np.uint8)[1::2].tobytes()


# Fitting to the limit


def exporter(run: t.Runtime, limit: int, **changes: Any) -> t.Exporter:
    """An exporter of a tiny model whose artifact may take `limit` bytes, with real Hessians."""
    settings = {"MATRIX_CLIP_SIGMAS": 8, "SELECTIVE_PRUNE_ENABLED": 0, "INT5_FALLBACK": 0, **changes}
    model = tiny_model(TARGET_BYTES=t.code_bytes() + limit, **settings)
    run = replace(run, cfg=replace(model.cfg, data_path=run.cfg.data_path, tokenizer_path=run.cfg.tokenizer_path))
    hessians = t.collect_hessians(run, t.Trainer(run, model), 0, 2) if model.cfg.gptq_enabled else {}
    return t.Exporter(run, model, hessians, IDENTITY)


def free_size(run: t.Runtime, **changes: Any) -> tuple[int, dict[str, t.QuantizedTensor]]:
    """Size and codes of the artifact without a limit."""
    unlimited = exporter(run, 10_000_000, **changes)
    return len(unlimited.export()), dict(unlimited.coded)


def test_an_artifact_that_fits_is_left_alone(run: t.Runtime) -> None:
    size, codes = free_size(run)
    exact = exporter(run, size, SELECTIVE_PRUNE_ENABLED=1, INT5_FALLBACK=1)
    assert len(exact.export()) == size and not exact.layer_bits
    assert all(torch.equal(exact.coded[n].codes, codes[n].codes) for n in codes)


@pytest.mark.parametrize("trellis", [0, 1])
def test_under_policy_cost_the_artifact_fills_the_limit_and_reads_back(run: t.Runtime, trellis: int) -> None:
    """Rows differ in their steps and so in the sizes of their codes, which the coder knows by their class."""
    settings = {"MATRIX_CLIP_SIGMAS": 0, "CLIP_POLICY": "cost", "MATRIX_BITS": 8, "MODEL_DIM": 96, "TRELLIS": trellis}
    limit = 240_000
    fitted = exporter(run, limit, **settings)
    run = replace(fitted.run, cfg=fitted.cfg)
    fitted.hessians |= t.row_costs(run, t.Trainer(run, fitted.model), 0, fitted.hessians)
    blob = fitted.export()
    assert t.SIZE_BAND[0] * fitted.cfg.target_bytes <= len(blob) + t.code_bytes() <= fitted.cfg.target_bytes
    _, parameters = t.decode_artifact(blob, SOMEWHERE)
    for name, tensor in fitted.coded.items():
        assert tensor.trellis == bool(trellis)
        kind = "banks" if name in fitted.model.banks else "rest"
        assert torch.equal(parameters[f"{kind}.{name}"].view(tensor.codes.shape), tensor.dequantize())
    assert len({int(c) for tensor in fitted.coded.values() for c in t.row_classes(tensor.codes).unique()}) > 8


@pytest.mark.parametrize("share", [0.999, 0.995, 0.99, 0.985, 0.98, 0.97])
def test_pruning_fits_the_artifact_by_zeroing_ones_only(run: t.Runtime, share: float) -> None:
    """Only codes of +-1 change, to 0, cheapest scales first; embeddings and scales stay; what is exported decodes."""
    size, before = free_size(run)
    pruned = exporter(run, int(share * size), SELECTIVE_PRUNE_ENABLED=1)
    blob = pruned.export()
    assert 0.99 * share * size < len(blob) <= share * size
    _, parameters = t.decode_artifact(blob, SOMEWHERE)
    zeroed, spared = [], []
    for name, old in before.items():
        new = pruned.coded[name]
        changed = old.codes != new.codes
        assert torch.equal(old.scale, new.scale)
        assert (old.codes[changed].abs() == 1).all() and (new.codes[changed] == 0).all()
        if name not in ("qkv", "out", "up", "down"):
            assert not changed.any()
            continue
        cost = old.scale.float().unsqueeze(-1).expand_as(changed)
        zeroed.append(cost[changed])
        spared.append(cost[(new.codes.abs() == 1)])
        assert torch.equal(parameters[f"banks.{name}"], new.dequantize())
    assert len(torch.cat(zeroed)) and torch.cat(zeroed).max() <= torch.cat(spared).min()


def test_layers_drop_to_five_bits_from_the_centre_outwards(run: t.Runtime) -> None:
    """As many as it takes and no more; the header names them; their codes fit five bits and the others use six."""
    settings = {"NUM_LAYERS": 5, "XSA_LAST_N": 5, "MATRIX_CLIP_SIGMAS": 4}
    size, _ = free_size(run, **settings)
    lowered = exporter(run, int(0.94 * size), INT5_FALLBACK=1, **settings)
    blob = lowered.export()
    assert len(blob) <= 0.94 * size
    order = list(lowered.layer_bits)
    assert 1 < len(order) < 5 and order == [2, 1, 3, 0, 4][: len(order)]
    header, _ = t.decode_artifact(blob, SOMEWHERE)
    assert header["layer_bits"] == {str(layer): 5 for layer in order}
    for name in ("qkv", "out", "up", "down"):
        for layer, codes in enumerate(lowered.coded[name].codes):
            assert (codes.min() >= -16 and codes.max() <= 15) == (layer in order)
    last = order[-1]
    assert len(exporter_without(run, lowered, last)) > lowered.limit


@pytest.mark.parametrize("strategy", ["SELECTIVE_PRUNE_ENABLED", "INT5_FALLBACK"])
def test_a_slow_coder_runs_only_near_the_limit(
    run: t.Runtime, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """zstd-22 takes half a minute for the real model: far from the limit the codes' entropy tells as much."""
    settings = {"MODEL_DIM": 96, "NUM_LAYERS": 5, "XSA_LAST_N": 5, "MATRIX_CLIP_SIGMAS": 4, "COMPRESSOR": "zstd"}
    size, _ = free_size(run, **settings)
    share = {"SELECTIVE_PRUNE_ENABLED": 0.98, "INT5_FALLBACK": 0.9}[strategy]
    fitting, sizes, encode = exporter(run, int(share * size), **{strategy: 1}, **settings), [], t.encode_artifact
    monkeypatch.setattr(t, "encode_artifact", lambda *a: sizes.append(blob := encode(*a)) or blob)
    blob = fitting.export()
    assert 0.985 * fitting.limit < len(blob) <= fitting.limit or strategy == "INT5_FALLBACK"
    assert len(sizes) <= 4 and (strategy != "INT5_FALLBACK" or len(fitting.layer_bits) > 2)
    assert fitting.expected() == pytest.approx(len(blob))


def exporter_without(run: t.Runtime, done: t.Exporter, layer: int) -> bytes:
    """The artifact with one layer fewer at five bits."""
    again = t.Exporter(done.run, done.model, done.hessians, IDENTITY)
    again.layer_bits = {k: v for k, v in done.layer_bits.items() if k != layer}
    again.quantize()
    again.encode()
    return again.blob


def test_pruning_comes_before_fewer_bits(run: t.Runtime) -> None:
    size, _ = free_size(run)
    both = exporter(run, int(0.97 * size), SELECTIVE_PRUNE_ENABLED=1, INT5_FALLBACK=1)
    assert len(both.export()) <= 0.97 * size and not both.layer_bits
    hard = exporter(run, int(0.93 * size), SELECTIVE_PRUNE_ENABLED=1, INT5_FALLBACK=1)
    assert len(hard.export()) <= 0.93 * size and hard.layer_bits


@pytest.mark.parametrize("excess", [1, 1234])
def test_an_artifact_over_the_limit_is_an_error_that_says_by_how_much(run: t.Runtime, excess: int) -> None:
    size, _ = free_size(run)
    with pytest.raises(t.UserError, match=rf"\b{excess}\b") as caught:
        exporter(run, size - excess).export()
    assert str(size) in str(caught.value) and str(t.code_bytes()) in str(caught.value)


def test_a_limit_out_of_reach_is_an_error_even_with_every_strategy(run: t.Runtime) -> None:
    with pytest.raises(t.UserError, match="TARGET_BYTES"):
        exporter(run, 5_000, SELECTIVE_PRUNE_ENABLED=1, INT5_FALLBACK=1).export()


def test_a_limit_smaller_than_the_code_is_an_error(run: t.Runtime) -> None:
    with pytest.raises(t.UserError, match="TARGET_BYTES"):
        exporter(run, 1_000 - t.code_bytes(), MATRIX_CLIP_SIGMAS=0).export()


@pytest.mark.parametrize("gptq", [0, 1])
@pytest.mark.parametrize("sigmas", [5.0, 9.0, 15.0])
def test_the_fitted_clip_fills_the_limit(run: t.Runtime, gptq: int, sigmas: float) -> None:
    """With MATRIX_CLIP_SIGMAS left free: 99.5% of the bytes at least, without pruning or fewer bits, and a clip near
    the one that makes this size."""
    settings = {"MODEL_DIM": 96, "GPTQ_ENABLED": gptq}
    size, _ = free_size(run, MATRIX_CLIP_SIGMAS=sigmas, **settings)
    fitted = exporter(run, size, MATRIX_CLIP_SIGMAS=0, **settings)
    total = len(fitted.export()) + t.code_bytes()
    assert 0.995 * fitted.cfg.target_bytes <= total <= fitted.cfg.target_bytes
    assert t.SIGMAS_RANGE[0] <= fitted.sigmas <= t.SIGMAS_RANGE[1]
    assert fitted.sigmas == pytest.approx(sigmas, rel=0.1)


def test_a_model_too_small_for_the_limit_takes_the_finest_grid(run: t.Runtime) -> None:
    small = exporter(run, 16_000_000, MATRIX_CLIP_SIGMAS=0)
    small.export()
    assert small.sigmas == pytest.approx(t.SIGMAS_RANGE[0], rel=2e-3)


def test_code_bytes_are_those_of_the_file_that_runs() -> None:
    assert t.code_bytes() == Path(t.__file__).stat().st_size == len(Path(t.__file__).read_bytes())


def test_logged_sizes_are_those_on_disk(run: t.Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    """Not those of a string in memory: the file is made longer behind the script's back."""
    blob = artifact()
    run.cfg.artifact_file.write_bytes(blob + b"12345")
    capsys.readouterr()
    t.log_sizes(run, run.cfg.artifact_file, t.read_header(blob, SOMEWHERE)[0])
    text = capsys.readouterr().out
    size, code = len(blob) + 5, Path(t.__file__).stat().st_size
    assert re.search(rf"^Serialized model int6\+\w+: {size} bytes", text, re.M)
    assert re.search(rf"^Code size: {code} bytes", text, re.M)
    assert re.search(rf"^Total submission size int6\+\w+: {size + code} bytes", text, re.M)
