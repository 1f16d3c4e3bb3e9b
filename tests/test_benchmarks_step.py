"""benchmarks/step_time.py, attention_time.py, coding_size.py: what is timed, where time goes, how curves differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import codes_of, tiny_config, tiny_env

import train_gpt as t
from benchmarks import attention_time, coding_size, step_time


@pytest.fixture
def toy(in_tmp: Path, corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, the tiny configuration and its data in the environment."""
    for name, value in tiny_env(**corpus).items():
        monkeypatch.setenv(name, value)
    return in_tmp


def tables(output: str) -> list[list[list[str]]]:
    """All Markdown tables, head first."""
    found: list[list[list[str]]] = [[]]
    for line in output.splitlines():
        if line.startswith("|---"):
            continue
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_variants_share_a_table(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row each, with consistent numbers; one that is refused costs the others nothing; the table is last."""
    assert step_time.main(["--steps", "3", "--profile", "--", "NUM_LAYERS=5", "--", "NUM_HEADS=5"]) == 0
    output = capsys.readouterr().out
    head, *rows = tables(output)[-1]
    assert output.rstrip().splitlines()[-1].startswith("| NUM_LAYERS=5 |")
    assert [row[0] for row in rows] == ["default", "NUM_LAYERS=5"]
    assert "NUM_HEADS=5: MODEL_DIM=32 is not divisible" in output and "this device has none" in output
    for row in rows:
        cell = dict(zip(head, row, strict=True))
        median, optimizer = float(cell["median ms"]), float(cell["optimizer ms"])
        assert 0 < optimizer < median
        assert float(cell["tokens/s"].replace(",", "")) == pytest.approx(1000 * 256 / median, rel=0.01)
        assert 3 < float(cell["last loss"]) < 7 and cell["peak MiB"] == ""
    assert int(rows[1][1].replace(",", "")) > int(rows[0][1].replace(",", ""))


def test_sweep_is_every_length_with_every_width(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At constant tokens a step and the configuration's head size; settings after `--` hold for all."""
    words = ["--sweep", "--lengths", "16", "64", "--widths", "16", "48", "--steps", "1", "--", "NUM_LAYERS=4"]
    variants = step_time.parse(words).variants
    configs = [t.Config.from_env(tiny_env(**variant.settings)) for variant in variants]
    assert [(c.model_dim, c.train_seq_len) for c in configs] == [(16, 16), (16, 64), (48, 16), (48, 64)]
    assert {(c.head_dim, c.num_heads // c.num_kv_heads, c.train_batch_tokens) for c in configs} == {(8, 2, 256)}
    assert step_time.main(words) == 0
    names = [row[0] for row in tables(capsys.readouterr().out)[-1][1:]]
    assert names == ["width 16, length 16", "width 16, length 64", "width 48, length 16", "width 48, length 64"]


def test_the_same_variant_twice_has_two_names() -> None:
    """The difference between them is the noise of the measurement."""
    variants = step_time.parse(["A=1", "--", "B=1", "--", "A=1"]).variants
    assert [variant.name for variant in variants] == ["A=1", "B=1", "A=1 (2)"]
    assert variants[0].settings == variants[2].settings == {"A": "1"}


def test_default_sweep_is_the_one_that_users_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 to 8,192 tokens, widths 384 to 768, 98,304 tokens a step: each divides into whole sequences."""
    variants = step_time.parse(["--sweep"]).variants
    assert [v.name for v in variants][:: len(variants) - 1] == ["width 384, length 1024", "width 768, length 8192"]
    for variant in variants:
        cfg = t.Config.from_env({**step_time.BASE, **variant.settings})
        assert cfg.head_dim == 64 and cfg.num_heads == 2 * cfg.num_kv_heads
        shape = t.batch_shape(cfg, 1)
        assert shape.accum * shape.sequences * cfg.train_seq_len == 98_304


@pytest.mark.parametrize(("words", "message"), [
    (["--sweep", "--widths", "100"], "--widths 100"), (["--sweep", "A=1", "--", "B=1"], "one configuration"),
    (["A"], "expected KEY=value"), (["--steps", "0"], "at least 1"), (["--sweep", "MODEL_DIM=7"], "MODEL_DIM=7"),
])  # fmt: skip
def test_command_lines_that_mean_nothing(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert step_time.main(words) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_into_the_time_is_said(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After one variant took longer than is left, no other begins."""
    assert step_time.main(["--steps", "1", "--limit-s", "0.01", "SEED=1", "--", "SEED=2"]) == 0
    output = capsys.readouterr().out
    assert "not measured, the time is up: SEED=2" in output
    assert [row[0] for row in tables(output)[-1][1:]] == ["SEED=1"]


# ---------------------------------------------------------------------------------------
# FLOPs and the breakdown
# ---------------------------------------------------------------------------------------


def flops(run: t.Runtime, **changes: Any) -> float:
    cfg = tiny_config(**changes)
    return step_time.flops_per_token(cfg, t.GPT(cfg, 1, t.PLAIN_ATTENTION, torch.device("cpu")))


def test_flops_by_hand(run: t.Runtime) -> None:
    """6 per matrix entry and token, 6 T C per attention; a looped layer counts as often as it runs."""
    layer = (32 + 2 * 16) * 32 + 32 * 32 + 2 * 32 * 128
    assert flops(run) == 6 * (4 * layer + 512 * 32) + 6 * 4 * 32 * 32
    looped = {"NUM_LOOPS": 2, "LOOP_START": 1, "LOOP_END": 2, "ENABLE_LOOPING_AT": 0}
    assert flops(run, **looped) == 6 * (8 * layer + 512 * 32) + 6 * 8 * 32 * 32


def launch(ts: float, correlation: int, cat: str = "cuda_runtime") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": "launch", "ts": ts, "dur": 1.0, "args": {"correlation": correlation}}


def kernel(name: str, ts: float, dur: float, correlation: int, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


TRACE = [
    {"ph": "M", "name": "process_name"}, {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 9.0},
    launch(10, 1), launch(11, 2), launch(12, 3, "cuda_driver"), launch(13, 4, "cuda_driver"), launch(14, 5), launch(15, 9),
    {"ph": "X", "cat": "user_annotation", "name": "optimizer", "ts": 20.0, "dur": 10.0, "args": {}},
    launch(21, 6), launch(25, 7, "cuda_driver"), launch(31, 8),
    {"ph": "X", "cat": "gpu_user_annotation", "name": "optimizer", "ts": 5000.0, "dur": 4000.0, "args": {}},
    kernel("cudnn_generated_fort_native_sdpa", 1000, 1000, 1), kernel("nvjet_hsh_128x256", 2000, 500, 2),
    kernel("mlp_kernel", 2500, 200, 3), kernel("resid_mix_norm_backward_kernel", 2700, 50, 9),
    kernel("triton_red_fused_3", 2700, 300, 4),
    kernel("Memcpy HtoD", 3500, 100, 5, "gpu_memcpy"),
    kernel("nvjet_orthogonalize", 5000, 600, 6), kernel("triton_poi_fused_adam", 5600, 400, 7),
    kernel("at::native::vectorized", 6500, 200, 8),
]  # fmt: skip


def test_breakdown_of_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """Kernels by kind, what the optimizer launched apart, overlap counted once for the gaps; ms per step."""
    kinds = step_time.breakdown(TRACE, steps=2, median_ms=2.0)
    assert kinds == pytest.approx({
        "attention": 0.5, "matrix products": 0.25, "matrix products (ours)": 0.1, "between products (ours)": 0.025,
        "fused (inductor)": 0.15, "other kernels": 0.15, "optimizer": 0.5, "gaps": 2.0 - (2.0 + 0.1 + 1.0 + 0.2) / 2,
    })  # fmt: skip
    first = capsys.readouterr().out.splitlines()[0]
    assert first.split() == ["0.500", "ms", "0.5", "calls", "cudnn_generated_fort_native_sdpa"]
    profiled = step_time.Row("a", 1, 2.0, 0.5, 1.0, 0.3, 5, 1.0, 2.0, kinds)
    head, row = tables(step_time.table([profiled]))[1]
    assert head[-2:] == ["optimizer", "gaps"] and row[-2:] == ["0.50", "0.35"] and head[1:3] == ["median", "attention"]


def test_optimizer_has_its_name_in_a_trace(run: t.Runtime) -> None:
    """For the step and for the average, on the host's side, as the breakdown looks for it."""
    trainer, averager = step_time.build(run)
    marks = step_time.mark_optimizer(trainer)
    trace = step_time.profile(trainer, averager)
    spans = [e for e in trace if (e.get("cat"), e.get("name")) == ("user_annotation", "optimizer")]
    assert len(spans) == 2 * len(marks) == 2 * step_time.PROFILED_STEPS and all(span["dur"] > 0 for span in spans)
    assert step_time.kernels_of(trace) == [], "nothing ran on a device"


# ---------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------


def test_curves_start_alike_and_are_compared(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same settings give the same losses; the yardstick differs a little, another activation more."""
    plain, relu2 = ["SEED=3", "LAYER_BACKEND=plain"], ["MLP_ACTIVATION=relu2", "SEED=3"]
    assert step_time.main(["--curve", "8", "SEED=3", "--", *plain, "--", *relu2]) == 0
    head, *rows = tables(capsys.readouterr().out)[-1]
    assert head == ["step", "SEED=3", "rounding", "SEED=3 LAYER_BACKEND=plain", "MLP_ACTIVATION=relu2 SEED=3"]
    assert [row[0] for row in rows[:-2]] == ["1", "2", "3", "4", "5", "7", "8"]
    assert all(row[1] == row[3] for row in rows[:-2])
    name, _, rounding, same, other = rows[-2]
    assert name == "greatest difference to SEED=3" and float(same) == 0 < float(rounding) < float(other)
    assert rows[-1][0] == "mean over the last 2" and rows[-1][3] == "+0.00000"
    assert float(rows[0][1]) > float(rows[-3][1]), "it learns"


def test_curve_is_that_of_training(run: t.Runtime) -> None:
    """The losses of a real run of as many steps, whose learning rate falls by steps."""
    cfg = t.replace(run.cfg, iterations=6, warmup_steps=0, late_qat_threshold=0.0)
    real = t.Runtime(cfg, run.ranks, run.log, [], run.signals)
    losses: list[float] = []
    trainer = t.Trainer(real, t.build_model(real, cfg, 1))
    step = trainer.step
    trainer.step = lambda *a: losses.append(step(*a)) or losses[-1]
    t.train(real, trainer, t.load_validation(real))
    assert step_time.curve(real, 6) == pytest.approx([loss.item() for loss in losses], rel=1e-5)


def test_differences_of_curves() -> None:
    """Greatest over all steps, mean over the last quarter."""
    curves = {"a": [1.0] * 8, "b": [1.0, 1.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.9]}
    head, *rows = tables(step_time.curves_table(curves))[0]
    assert rows[-2] == ["greatest difference to a", "", "0.5000"]
    assert rows[-1] == ["mean over the last 2", "", "-0.15000"]


def test_perturbation_is_as_large_as_bfloat16_rounds(run: t.Runtime) -> None:
    """Relative 2^-9, and zeros stay zeros."""
    model = t.build_model(run, run.cfg, bos_id=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step_time.perturb(model)
    assert torch.equal(model.banks["out"], before["banks.out"])
    assert (model.banks["up"] / before["banks.up"] - 1).std().item() == pytest.approx(2.0**-9, rel=0.05)


# ---------------------------------------------------------------------------------------
# Coding
# ---------------------------------------------------------------------------------------


def test_coders_are_compared_on_an_artifact(run: t.Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    """Every coder's bytes against the entropy; other coders' artifacts are refused with what to do."""
    model = t.build_model(run, run.cfg, bos_id=1)
    jobs, kept = t.quant_specs(model), t.passthrough(model)
    coded = codes_of(run.cfg, jobs, {}, 6.0)
    Path("a.pgolf").write_bytes(t.encode_artifact(run.cfg, coded, kept, {"identity": {"tokenizer_sha256": "a"}}))
    other = t.replace(run.cfg, compressor="zlib")
    Path("b.pgolf").write_bytes(t.encode_artifact(other, coded, kept, {"identity": {"tokenizer_sha256": "a"}}))
    capsys.readouterr()
    coding_size.main(["a.pgolf"])
    output = capsys.readouterr().out
    head, entropy, *rows = tables(output)[0]
    assert [row[0] for row in rows] == [*(f"{name}-{row.strongest}" for name, row in t.CODECS.items()), "ans"]
    floor = float(entropy[1].replace(",", ""))
    assert floor == pytest.approx(t.entropy_bytes(*(c.codes for c in coded.values())), abs=1)
    for row in rows:
        assert float(row[2].strip("%")) == pytest.approx(100 * (int(row[1].replace(",", "")) / floor - 1), abs=0.02)
    with pytest.raises(SystemExit, match="coded with zlib"):
        coding_size.main(["b.pgolf"])


def test_attention_is_timed_by_back_end_length_and_sharing(capsys: pytest.CaptureFixture[str]) -> None:
    """What is here has a line for each length and way of sharing; what is not says why; nonsense is refused."""
    words = ["--lengths", "16", "32", "--tokens", "64", "--repeats", "9", "DEVICE=cpu", "DOC_ATTENTION=0"]
    assert attention_time.main([*words, "MODEL_DIM=32", "NUM_HEADS=4", "NUM_KV_HEADS=2", "ROPE_DIMS=4"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert "64 tokens, head size 8" in head
    for name in ("flash", "math"):
        kinds = [row[1:3] for row in cells if row[0] == name]
        assert kinds == [[length, heads] for length in ("16", "32") for heads in ("4 over 2", "copies")]
    assert all(0 < float(row[3]) < float(row[4]) for row in cells if row[3])
    assert {row[0] for row in cells} == {*t.ATTENTION} and all(bool(row[3]) != bool(row[5]) for row in cells)
    assert attention_time.main(["DEVICE"]) == 2 and attention_time.main(["MATRX_LR=1"]) == 2


def test_attention_is_timed_within_documents(
    corpus: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With DOC_ATTENTION=1 by the back ends that can, over the documents of validation tokens."""
    seen, plain = [], t.PLAIN_ATTENTION
    noting = plain._replace(mask=lambda documents: seen.append(documents) or plain.mask(documents))
    monkeypatch.setitem(t.ATTENTION, "math", lambda: noting)
    words = ["--lengths", "64", "--tokens", "512", "--repeats", "3"]
    settings = {**tiny_env(**corpus), "DOC_ATTENTION": "1", "COMPILE": "0"}
    assert attention_time.main([*words, *(f"{k}={v}" for k, v in settings.items() if k != "RUN_ID")]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[3:]]
    assert {row[0] for row in rows} == t.ATTENTION.keys() - {"cudnn"}
    assert [row[0] for row in rows if row[3]] == ["math"] * 2
    tokens = t.TokenStream(tiny_config(**corpus), "val").read(0, 512).reshape(8, 64)
    assert seen[-1].tolist() == (tokens == 1).cumsum(1).tolist() and seen[-1].max() > 0


def test_copied_heads_are_the_same_function() -> None:
    """`copies` are independent tensors: as many heads as queries, for which the gradients need no sum."""
    cfg = tiny_config()
    shared, copied = (attention_time.inputs(cfg, 64, 16, torch.device("cpu"), copies) for copies in (False, True))
    assert [tensor.shape for tensor in shared] == [(4, 16, 4, 8), (4, 16, 2, 8), (4, 16, 2, 8)]
    assert {tensor.shape for tensor in copied} == {(4, 16, 4, 8)} and all(tensor.is_leaf for tensor in copied)
