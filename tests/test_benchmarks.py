"""The benchmarks: every phase and every world is in its table, and a floor runs what its phase cannot avoid.

Also what holds for every benchmark: the rules of style that the tools keep.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_env, tiny_model

import test_style
import train_gpt as t
from benchmarks import export_time, scaling
from benchmarks.step_time import Kernel

PHASES = ["Hessians, 3 batches", "choosing the clip", "GPTQ of all matrices", "encoding the artifact, 2 cores",
          "reading it back, 2 cores", "plain evaluation, stride 32", "sliding evaluation, stride 16"]  # fmt: skip
BENCHMARKS = sorted((test_style.ROOT / "benchmarks").glob("*.py"))


RULES = [*test_style.TOOL_CHECKS, test_style.annotations, test_style.docstrings, test_style.nesting,
         test_style.unused_imports]  # fmt: skip


@pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_benchmarks_keep_the_style(path: Path, check: test_style.Finder) -> None:
    """Short functions and lines, annotations, docstrings, no dead import."""
    test_style.assert_clean(path, check)


def output_of(arguments: list[str], corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> list[str]:
    """Lines that the benchmark prints with the tiny configuration in the environment."""
    for name, value in tiny_env(**corpus).items():
        monkeypatch.setenv(name, value)
    export_time.main(arguments)
    return capsys.readouterr().out.splitlines()


def table_of(lines: list[str]) -> list[list[str]]:
    """Cells of the table that ends the output, without its head."""
    first = next(i for i, line in enumerate(lines) if line.startswith("| phase |"))
    assert all(line.startswith("|") for line in lines[first:]), "the table is not the last thing printed"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 :]]


@pytest.mark.parametrize(("limit", "counts"), [([], (126, 250)), (["--windows", "20"], (20, 20))])
def test_table_has_every_phase(
    limit: list[str], counts: tuple[int, int], in_tmp: Path, corpus: dict[str, str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """All phases with positive times and consistent ratios; the size line precedes the table and agrees with itself."""
    lines = output_of(["--batches", "3", *limit, "SEED=7"], corpus, monkeypatch, capsys)
    rows = table_of(lines)
    tails = ["", "", "", "", "", *(f", {count} windows" for count in counts)]
    names = [name + tail for name, tail in zip(PHASES, tails, strict=True)]
    assert [row[0] for row in rows] == [*names, "Hessians and GPTQ together"]
    assert [row[6] for row in rows] == ["", "", "", "20 s", "5 s", "", "1.3 x floor", ""]
    for _, cold, warm, floor, what, ratio, target, judged in rows:
        assert judged in (("met", "**missed**") if target else ("",))
        assert min(map(float, (cold, warm, floor, ratio))) > 0 and what
        assert float(ratio) == pytest.approx(float(warm) / float(floor), rel=0.02, abs=0.01)
    size = next(line for line in lines if line.startswith("artifact: "))
    pattern = r"artifact: ([\d,]+) bytes; [\d,]+ codes: ([\d,]+) bytes by ans, ([\d,]+) by entropy"
    artifact, coded, entropy = (int(number.replace(",", "")) for number in re.match(pattern, size).groups())
    assert artifact > coded >= entropy > 0


@pytest.mark.parametrize("stride", [32, 16])
@pytest.mark.parametrize("limit", [None, 1, 16, 17])
def test_floor_of_evaluation_runs_the_same_passes(
    stride: int, limit: int | None, run: t.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many passes of the same shape as score_windows runs, after one that is not timed."""
    model, validation, calls = tiny_model(), t.load_validation(run), []
    forward = model.fast_nll

    def recorded(ids: torch.Tensor, targets: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled() and torch.equal(ids[0, 1:], targets[0, :-1])
        calls.append((ids.shape, ids.stride(), ids.dtype, targets.shape, targets.stride(), targets.dtype))
        return forward(ids, targets, *rest)

    monkeypatch.setattr(model, "fast_nll", recorded)
    windows = t.plan_windows(validation.targets, run.cfg.eval_len, stride)[:limit]
    t.score_windows(run, model, validation, windows)
    expected = [*calls]
    timings = export_time.Timings(run)
    export_time.time_evaluation(timings, model, validation, limit)
    floor = timings.phases[0 if stride == run.cfg.eval_len else 1].floor
    calls.clear()
    assert floor() > 0
    assert calls[1:] == expected


def test_zeros_become_noise_and_nothing_else_changes(run: t.Runtime) -> None:
    """No parameter is zero afterwards; those that were not keep their bits; the noise is of the size that is said."""
    model = t.build_model(run, run.cfg, bos_id=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    export_time.fill_zeros(model)
    zero = {name for name, p in before.items() if not p.any()}
    assert {"banks.out", "banks.down"} <= zero
    for name, parameter in model.named_parameters():
        assert parameter.any() and (name in zero or torch.equal(parameter, before[name])), name
    assert model.banks["down"].std().item() == pytest.approx(export_time.NOISE, rel=0.05)


def test_sliding_evaluation_can_be_off(run: t.Runtime) -> None:
    """EVAL_STRIDE=0 leaves plain evaluation alone."""
    timings = export_time.Timings(t.Runtime(t.replace(run.cfg, eval_stride=0), run.ranks, run.log, []))
    export_time.time_evaluation(timings, tiny_model(), t.load_validation(run), 4)
    assert [phase.name for phase in timings.phases] == ["plain evaluation, stride 32, 4 windows"]


def test_histogram_counts_every_code() -> None:
    """The floor of encoding looks at all codes."""
    codes = torch.tensor([[[-3, 0, 5], [5, 5, -128]]], dtype=torch.int8)
    counts = export_time.count_codes(
        {"a": t.QuantizedTensor(codes, torch.ones(1, 2)), "b": t.QuantizedTensor(codes[:, :1], torch.ones(1, 1))}
    )
    values = counts.nonzero()[0].astype(np.uint8).view(np.int8).tolist()
    assert dict(zip(values, counts[counts > 0].tolist())) == {-3: 2, 0: 2, 5: 4, -128: 1}


@pytest.mark.parametrize("arguments", [["--windows", "0"], ["--windows", "x"], ["SEED"], ["--steps", "3"]])
def test_arguments_that_mean_nothing_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export_time.parse(arguments, {})
    assert stopped.value.code == 2 and arguments[0].strip("-") in capsys.readouterr().err


def test_arguments_win_over_the_environment() -> None:
    """KEY=value and --batches replace variables; EXPORT_ONLY=1 keeps the log of a training run."""
    env, limit = export_time.parse(["A=1=2", "--batches", "5", "SEED=3"], {"SEED": "1", "HOME": "/x"})
    assert limit is None
    assert env == {"A": "1=2", "SEED": "3", "HOME": "/x", "GPTQ_CALIBRATION_BATCHES": "5", "EXPORT_ONLY": "1",
                   "WEIGHTS_PATH": "unused"}  # fmt: skip


def test_without_gptq_there_is_nothing_to_collect(run: t.Runtime) -> None:
    off = t.Runtime(t.replace(run.cfg, gptq_enabled=False), run.ranks, run.log, [])
    with pytest.raises(SystemExit, match="GPTQ_ENABLED=0"):
        export_time.time_all(off, None)


def row(name: str, warm: float, floor: float, target: export_time.Target | None = None) -> export_time.Row:
    return export_time.Row(name, 2 * warm, warm, floor, "work", target)


def test_targets_are_limits_on_seconds_or_on_the_ratio() -> None:
    """A target that is reached exactly is met; the cell beside it says so."""
    seconds, ratio = export_time.Target(5), export_time.Target(1.3, of_floor=True)
    assert row("a", 5.0, 1.0, seconds).cells()[-2:] == ["5 s", "met"]
    assert row("a", 5.1, 1.0, seconds).cells()[-2:] == ["5 s", "**missed**"]
    assert row("a", 13.0, 10.0, ratio).cells()[-2:] == ["1.3 x floor", "met"]
    assert row("a", 14.0, 10.0, ratio).cells()[-3:] == ["1.40", "1.3 x floor", "**missed**"]
    assert row("a", 14.0, 10.0).cells()[-2:] == ["", ""]


@pytest.mark.parametrize(("batches", "seconds", "judged"), [(64, 3.5, ["6 s", "met"]), (64, 5.0, ["6 s", "**missed**"]),
                                                            (8, 3.5, ["", ""])])  # fmt: skip
def test_hessians_and_gptq_share_a_target(batches: int, seconds: float, judged: list[str]) -> None:
    """Their sum is judged, at the number of batches that the target is for."""
    rows = [row(f"Hessians, {batches} batches", seconds, 3.0), row("choosing the clip", 9.0, 1.0),
            row("GPTQ of all matrices", 2.0, 0.5)]  # fmt: skip
    both = export_time.together(rows)
    assert (both.cold, both.warm, both.floor) == (2 * seconds + 4.0, seconds + 2.0, 3.5)
    assert both.cells()[-2:] == judged


def test_coding_gets_two_cores_and_gives_them_back() -> None:
    """Fewer while it runs, as many as before when it has ended, by an error too."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError), export_time.few_cores(1):
            assert torch.get_num_threads() == 1 and len(os.sched_getaffinity(0)) == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3 and os.sched_getaffinity(0) == cores
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scaling_output(corpus: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What benchmarks/scaling.py prints for one and two ranks and a model of three, at toy size."""
    arguments = ["--steps", "3", "--tokens", "64", "--windows", "40", "--model", "3", "SEED=7"]
    env = {**os.environ, **tiny_env(**corpus), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(t.__file__).parent)}
    command, folder = [sys.executable, "-m", "benchmarks.scaling", *arguments], tmp_path_factory.mktemp("scaling")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scaling_prints_every_world_and_a_model(scaling_output: str) -> None:
    """Positive numbers that agree with each other, the ratio of the first row being 1."""
    lines = scaling_output.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| ranks |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 : first + 5]]
    assert [row[0] for row in rows] == ["1", "2", "3, model"]
    assert rows[0][2] == "1.000" and rows[2][4] == ""
    for name, *numbers in rows:
        step, ratio, rate, _, _, _, muon, *seconds = (float(n.replace(",", "") or "nan") for n in numbers)
        assert min(step, muon, *seconds) > 0 and ratio == pytest.approx(step / float(rows[0][1]), rel=2e-3)
        assert rate == pytest.approx(int(name[0]) * 64 * 1000 / step, rel=0.01)
    assert "64 tokens per rank, 3 steps after 10" in lines[first - 1]
    assert re.fullmatch(r"Communication in the model: [\d.]+ ms a step", lines[first + 6])


def test_the_model_adds_up() -> None:
    """Muon's layers are shared, the rest is not; communication grows from 1/2 to 7/8 of the bytes."""
    parts = [scaling.Parts(muon, 1.0, 1.0, 1.0) for muon in (8.0, 4.5, 1.5)]
    one = scaling.World(1, 100.0, 10.0, (0.0, 0.0), parts[0], parts[2], "")
    two = scaling.World(2, 96.9, 7.0, (1.0, 0.5), parts[1], None, "")
    assert scaling.modelled(one, two, 8) == pytest.approx((100 - 8 + 1.5 + 0.4 * 7 / 4, 0.4 * 7 / 4))
    assert scaling.modelled(one, None, 8) == (93.5, 0.0)


def test_collectives_beside_other_kernels_are_told_from_those_alone() -> None:
    """Microseconds of two steps: a reduction half beside a cast, a gathering wholly beside a product."""
    spans = {"ncclReduceScatter": (0, 4000), "cast": (2000, 5000), "gemm": (6000, 9000), "ncclAllGather": (7000, 8000)}
    kernels = [Kernel(name, begin, end, True) for name, (begin, end) in spans.items()]
    assert scaling.collectives_of(kernels, 2) == (2.5, 1.0)
    assert scaling.collectives_of(kernels[1:3], 2) == (0.0, 0.0)


def test_pretended_ranks_do_all_the_work_between_them(run: t.Runtime) -> None:
    """Codes of GPTQ by three ranks that are not there add up to those of one."""
    jobs = t.quant_specs(tiny_model())
    whole = t.quantize_tensors(run, jobs, {}, 4.0)
    others = [t.replace(run, ranks=scaling.Pretended(rank, 3, run.ranks.device)) for rank in range(3)]
    parts = [t.quantize_tensors(other, jobs, {}, 4.0) for other in others]
    for name, coded in whole.items():
        assert torch.equal(sum(part[name].codes for part in parts), coded.codes)
    assert all(sum(part[name].scale.any() for name in whole) < len(whole) for part in parts)
