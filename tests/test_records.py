"""`python -m records`: from finished runs to a folder that passes its checks, and every published way to break one."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="the records tool needs requirements-dev.txt")

from conftest import tiny_env, write_shard
from records import RECORDS, ToolError
from records.__main__ import main
from records.checking import doctor, files, overlap
from records.checking.check import check_folder
from records.checking.result import CheckResult
from records.reading.folder import Folder
from records.reading.rules import is_leaky, promises
from records.reading.runs import config_hash, read_run
from records.reading.script import names_read, unpacked
from records.reading.statistics import Baseline, compare, one_sided, read_baseline, summarize
from records.writing import leaderboard, seeds
from records.writing import submission as submission_runs
from records.writing.freeze import bake

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
LAUNCH = ["--", sys.executable, "train_gpt.py"]


def checked(folder: Path, **flags: Any) -> list[CheckResult]:
    """Results of `check` without C1-C4, which have tests of their own."""
    args = {"baseline": None, "reevaluate": False, "no_legality": True, **flags}
    return list(check_folder(folder, argparse.Namespace(**args)))


def failures(folder: Path, **flags: Any) -> dict[str, str]:
    """Check -> message of all that fail."""
    return {result.name: result.message for result in checked(folder, **flags) if result.status == "fail"}


# ---------------------------------------------------------------------------------------
# Round trip: seeds -> statistics -> new -> check, with the packed script
# ---------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]) -> Iterator[Path]:
    """A folder with the script, an environment of the tiny model, and one finished series of two packed runs."""
    place = tmp_path_factory.mktemp("work")
    shutil.copyfile(SCRIPT, place / "train_gpt.py")
    variables = {**tiny_env(**corpus), "OMP_NUM_THREADS": "1"}
    del variables["RUN_ID"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("PYTEST_CURRENT_TEST", raising=False)  # equal environments: the script is asked once
        for name, value in variables.items():
            patch.setenv(name, value)
        assert main(["seeds", "--seeds", "42", "7", "--name", "tiny", "--pack", *LAUNCH]) == 0
    yield place


@pytest.fixture
def at_work(workplace: Path, corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workplace as working directory, with the environment that its series was started in."""
    monkeypatch.chdir(workplace)
    for name, value in {**tiny_env(**corpus), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RUN_ID")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    return workplace


@pytest.fixture(scope="session")
def submission(workplace: Path) -> Path:
    """The folder that `new` makes of the series."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        runs = ["logs/tiny_seed42.jsonl", "logs/tiny_seed7"]
        assert main(["new", "Tiny", "--runs", *runs, "--root", "records", "--author", "A", "--github-id", "a"]) == 0
    return next((workplace / "records" / "track_10min_16mb").iterdir())


def test_seeds_wrote_statistics(workplace: Path) -> None:
    """Mean and spread of both seeds, in text and JSON; what ran is the packed file with the defaults baked in."""
    data = json.loads((workplace / "logs/tiny/statistics.json").read_text())
    runs = [read_run(workplace / f"logs/tiny_seed{seed}.jsonl") for seed in (42, 7)]
    bpbs = [run.score.val_bpb for run in runs]
    assert data["val_bpb"]["mean"] == pytest.approx(np.mean(bpbs), abs=1e-8)
    assert data["val_bpb"]["sd"] == pytest.approx(np.std(bpbs, ddof=1), abs=1e-8)
    assert data["val_bpb"]["se"] == pytest.approx(np.std(bpbs, ddof=1) / math.sqrt(2), abs=1e-8)
    assert list(data["seed_results"]) == ["42", "7"] and f"{bpbs[0]:.6f}" in (
        workplace / "logs/tiny/statistics.txt").read_text()
    sources = runs[0].sources
    assert {name for name, source in sources.items() if source != "default"} <= {
        "run_id", "seed", "device", "data_path", "tokenizer_path", "data_dir", "overwrite"}
    assert runs[0].facts["sha256"] == hashlib.sha256((workplace / "logs/tiny/train_gpt.py").read_bytes()).hexdigest()


def test_series_is_continued(at_work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A finished seed is kept; one whose log was cut off is run again, with the same result."""
    log = at_work / "logs/tiny_seed7.jsonl"
    before, kept = read_run(log).score, (at_work / "logs/tiny_seed42.jsonl").read_bytes()
    whole = log.read_text()
    log.write_text("".join(whole.splitlines(keepends=True)[:5]))
    assert main(["seeds", "--seeds", "42", "7", "--name", "tiny", "--pack", *LAUNCH]) == 0
    assert read_run(log).score.val_bpb == before.val_bpb
    assert (at_work / "logs/tiny_seed42.jsonl").read_bytes() == kept
    assert "seed 42: finished before" in capfd.readouterr().out
    log.write_text(whole)  # its times differ from those in the submission


def test_a_changed_script_stops_the_series_before_it_costs(at_work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A later seed that is finished already is of another script: nothing runs, and the frozen file stays."""
    frozen = (at_work / "logs/tiny/train_gpt.py").read_bytes()
    other = at_work / "changed.py"
    other.write_text(SCRIPT.read_text().replace("def main() -> None:", "def main() -> None:\n    assert True"))
    launch = ["--", sys.executable, "changed.py"]
    assert main(["seeds", "--seeds", "9", "42", "--name", "tiny", "--pack", *launch]) == 1
    assert "mixed scripts: logs/tiny_seed42.jsonl" in capsys.readouterr().err
    assert not Path("logs/tiny_seed9.jsonl").exists() and (at_work / "logs/tiny/train_gpt.py").read_bytes() == frozen


@pytest.mark.parametrize("old, new_text, words", [
    ('"world_size": 1', '"world_size": 8', "world_size=1 (there: 8)"),
    ('"tokens": 4003', '"tokens": 4100', "val_tokens=4003 (there: 4100)"),
    ('"device": "', '"device": "NVIDIA ', "(there: 'NVIDIA "),
])  # fmt: skip
def test_seeds_of_unlike_runs(at_work: Path, tmp_path: Path, old: str, new_text: str, words: str) -> None:
    """Seeds run on other ranks, GPUs or data do not make a mean."""
    text = Path("logs/tiny_seed7.jsonl").read_text()
    assert old in text
    (tmp_path / "other.jsonl").write_text(text.replace(old, new_text))
    runs = [read_run(Path("logs/tiny_seed42.jsonl")), read_run(tmp_path / "other.jsonl")]
    with pytest.raises(ToolError) as refusal:
        seeds.refuse_unlike(runs)
    assert words in str(refusal.value)


def test_a_series_keeps_to_its_data(at_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """A validation set with one document less: the next seed is not paid for."""
    shards = tmp_path / "shards"
    shutil.copytree(os.environ["DATA_PATH"], shards)
    tokens = np.fromfile(shards / "fineweb_val_000000.bin", "<u2", offset=1024)
    write_shard(shards / "fineweb_val_000000.bin", tokens[: np.flatnonzero(tokens == 1)[-1]])
    monkeypatch.setenv("DATA_PATH", str(shards))
    assert main(["seeds", "--seeds", "42", "9", "--name", "tiny", "--pack", *LAUNCH]) == 1
    assert "mixed data: logs/tiny_seed42.jsonl was run with another validation set" in capsys.readouterr().err


def test_a_series_has_one_owner(at_work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second process ends at once and names the first; names that are no file's are refused as early."""
    with seeds.owned("tiny"):
        assert main(["seeds", "--seeds", "9", "--name", "tiny", "--pack", *LAUNCH]) == 1
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    for name in ("a/b c", "", "-x", "x" * 200):
        assert main(["seeds", "--seeds", "9", f"--name={name}", *LAUNCH]) == 1
        assert "files are named after it" in capsys.readouterr().err
    assert not list(Path("logs").glob("*seed9*"))


STARTER = """
import os, signal, sys
from pathlib import Path
from records.writing import seeds
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background of a shell ignores it
os.chdir(sys.argv[1])
program = "import os, time; open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'started'); time.sleep(60)"
with seeds.owned("tiny") as lock:
    sys.exit(seeds.run_to_end(["/bin/sh", "-c", f'"{sys.executable}" -c "{program}"; true'], dict(os.environ), lock))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_seed_ends_with_its_series(in_tmp: Path, number: signal.Signals) -> None:
    """However the command ends, what it started ends too, and only then is the series free again."""
    root = Path(__file__).parents[1]
    command = subprocess.Popen([sys.executable, "-c", STARTER, str(in_tmp)], cwd=root, stderr=subprocess.DEVNULL)
    wait_for((in_tmp / "started").exists)
    child = int((in_tmp / "started").read_text())
    command.send_signal(number)
    assert command.wait(20) != 0
    wait_for(lambda: not Path(f"/proc/{child}").exists())
    wait_for(lambda: is_free("tiny"))


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when it holds; fails after 20 seconds."""
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("20 seconds and it does not hold")


def is_free(name: str) -> bool:
    try:
        with seeds.owned(name):
            return True
    except ToolError:
        return False


@pytest.mark.parametrize("change, words", [
    ({"EVAL_STRIDE": "8"}, "mixed configurations: logs/tiny_seed42.jsonl was run with other values: EVAL_STRIDE=8"),
    ({"MATRX_LR": "1"}, "did you mean MATRIX_LR"),
])  # fmt: skip
def test_seeds_refuses(at_work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                       change: dict[str, str], words: str) -> None:
    """A changed variable is named; nothing runs."""
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    assert main(["seeds", "--seeds", "42", "--name", "tiny", *LAUNCH]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("values, words", [
    ({"eval_only": True}, "EVAL_ONLY=1 trains nothing"), ({"export_only": True}, "EXPORT_ONLY=1 trains nothing"),
    ({"weights_path": "x"}, "WEIGHTS_PATH=x: every seed would write the same file"),
    ({"artifact_path": "x"}, "ARTIFACT_PATH=x: every seed would write the same file"),
    ({"resume": True}, "RESUME=1 goes on with one run"),
])  # fmt: skip
def test_seeds_refuses_single_runs(values: dict[str, Any], words: str) -> None:
    """Variables that belong to one run."""
    with pytest.raises(ToolError, match=words):
        seeds.refuse_single(values)
    seeds.refuse_single(dict.fromkeys(values, ""))


def test_new_folder(submission: Path, workplace: Path) -> None:
    """Every file is there, the script is the one that ran, and the page and the JSON hold the logs' numbers."""
    names = {path.name for path in submission.iterdir()}
    assert {"train_gpt.py", "train_gpt_human.py", "train_seed42.log", "train_seed7.log", "requirements.txt",
            "README.md", "submission.json", "tokenizer.model"} <= names
    assert (submission / "train_gpt.py").read_bytes() == (workplace / "logs/tiny_seed42.py").read_bytes()
    assert (submission / "train_gpt_human.py").read_text() == (workplace / "logs/tiny/train_gpt_human.py").read_text()
    data, page = json.loads((submission / "submission.json").read_text()), (submission / "README.md").read_text()
    run = read_run(submission / "train_seed42.log")
    assert data["seed_results"]["42"]["val_bpb"] == run.score.val_bpb and f"{data['val_bpb']:.4f}" in page
    assert data["bytes_code"] == (submission / "train_gpt.py").stat().st_size == run.code_bytes
    assert files.command_variables(page) == ["DATA_PATH", "TOKENIZER_PATH", "SEED"]
    assert re.search(r"\| `NUM_LAYERS` \| `11` \| `4` \|", page), "what changed against the repository's defaults"
    assert f"torch=={run.facts['torch'].split('+')[0]}" in (submission / "requirements.txt").read_text()
    told = data["compliance"]
    assert told["no_pre_quant_ttt"] and told["no_ngram_cache"] and told["artifact_under_16mb"]
    assert not told["three_seeds"] and "score_first_ttt" not in told
    logs = [read_run(submission / f"train_seed{seed}.log") for seed in (42, 7)]
    plain = [score.val_bpb for log in logs for score in log.scores if score.name == "final_int6_roundtrip"]
    assert len(plain) == 2 and f"| {np.mean(plain):.6f} |" in page
    assert f"{data['bytes_total']:,} of 16,000,000 bytes" in page


def test_runs_are_named_by_any_of_their_files(workplace: Path, tmp_path: Path) -> None:
    """The folder of a series, its seeds in their order; a shell pattern that hits every file of a run."""
    logs, stems = workplace / "logs", [workplace / f"logs/tiny_seed{seed}" for seed in (42, 7)]
    assert submission_runs.run_stems([logs / "tiny"]) == stems
    assert {logs / "tiny_seed42.weights.pt", logs / "tiny_seed42.pgolf"} <= {*logs.glob("tiny_seed*")}
    assert set(submission_runs.run_stems([*logs.glob("tiny*")])) == set(stems)
    with pytest.raises(ToolError, match="no series"):
        submission_runs.run_stems([tmp_path])


@pytest.mark.parametrize("values, no_cache, ttt", [
    ({}, True, None),  # a script without the mixer
    ({"ngram_enabled": False, "ngram_max_order": 7, "ttt_enabled": False, "ttt_lr": 0.1}, True, None),
    ({"ngram_enabled": True, "ngram_max_order": 7, "ttt_enabled": True}, False, True),
    ({"ngram_order": 5, "bigram_vocab_size": 2048, "prequant_ttt_epochs": 21, "ttt_epochs": 3}, False, False),
])  # fmt: skip
def test_promises(values: dict[str, Any], no_cache: bool, ttt: bool | None) -> None:
    """They follow the switches where a script has them, else the numbers."""
    told = promises(values)
    assert (told["no_ngram_cache"], told.get("score_first_ttt")) == (no_cache, ttt)
    assert told["no_pre_quant_ttt"] == (ttt is not False) and told["no_slot"] and told["no_etlb"]


def test_against_a_parent(submission: Path, at_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page says which values and functions changed; the JSON what is claimed; the command what is left open."""
    parent = tmp_path / "2026-01-01_Parent"
    shutil.copytree(submission, parent)
    (parent / "train_gpt.py").write_text((parent / "train_gpt_human.py").read_text().replace(
        "def report_inactive(", "def older(").replace('run.log(f"seed', 'run.log(f"a seed').replace(
        'log(f"seed:{cfg.seed}")', 'log(f"seed: {cfg.seed}")'))
    edit("train_seed*.log", r"^  matrix_lr: \S+", "  matrix_lr: 0.03")(parent)
    claim(val_bpb=9.0, seed_results={}, val_loss=9.0)(parent)
    command = ["new", "Child", "--root", str(tmp_path), "--runs", "logs/tiny", "--parent", str(parent)]
    assert main(command) == 0 and "left open: --author, --github-id, --blurb" in capsys.readouterr().out
    folder = next(tmp_path.glob("track_10min_16mb/*_Child"))
    page, data = (folder / "README.md").read_text(), json.loads((folder / "submission.json").read_text())
    assert "| `MATRIX_LR` | `0.03` | `0.025` |" in page
    assert "added `report_inactive`; removed `older`; changed `log_header`" in page
    assert data["delta_vs_leaderboard_bpb"] == pytest.approx(data["val_bpb"] - 9.0) and data["based_on"] == "Tiny"
    assert main(["new", "//", *command[2:]]) == 1 and "folder's name" in capsys.readouterr().err


def test_new_folder_passes(submission: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` passes, C1-C4 included where the module is there."""
    assert main(["check", str(submission)]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "0 failed" in said and "fail " not in said


COMMITTED = sorted(RECORDS.glob("track_*/*/"))


@pytest.mark.parametrize("folder", COMMITTED, ids=[folder.name for folder in COMMITTED])
def test_committed_folders_pass(folder: Path) -> None:
    """What this repository publishes under records/ holds against its own checker, and has its plot in the README."""
    assert not failures(folder)
    assert "](curves.png)" in (folder / "README.md").read_text()


def test_packed_script_repeats_the_score(submission: Path, corpus: dict[str, str], tmp_path: Path) -> None:
    """The README's command, run in an empty folder, gives the logged score to the last digit."""
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "SEED": "42", "DEVICE": "cpu", "RUN_ID": "again",
           **corpus}
    done = subprocess.run([sys.executable, str(submission / "train_gpt.py")], cwd=tmp_path, env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    again, logged = read_run(tmp_path / "logs/again.txt"), read_run(submission / "train_seed42.log")
    assert again.score[:3] == logged.score[:3] and again.facts["sha256"] == logged.facts["sha256"]
    folder = tmp_path / "track_10min_16mb" / submission.name
    shutil.copytree(submission, folder)
    shutil.copyfile(tmp_path / "logs/again.pgolf", folder / "model.pgolf")
    assert not failures(folder)
    shell = {**env, "DATA_PATH": os.path.relpath(corpus["DATA_PATH"]), "EVAL_STRIDE": "8", "NUM_LAYERS": "3"}
    (result,) = files.score_again(Folder(folder), shell)  # variables of the caller's shell change nothing
    assert result.status == "pass", result.message
    damaged = bytearray((folder / "model.pgolf").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (folder / "model.pgolf").write_bytes(damaged)
    (result,) = files.score_again(Folder(folder), shell)
    assert result.status == "fail" and result.name == "re-evaluation model.pgolf" and "ship the artifact" in (
        result.message) or "not this script's" in result.message


def test_new_refuses(at_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that did not end, a script changed after the run, mixed configurations, one seed twice."""
    def copied(name: str) -> Path:
        for suffix in (".jsonl", ".txt", ".py"):
            shutil.copyfile(f"logs/tiny_seed42{suffix}", tmp_path / f"{name}{suffix}")
        return tmp_path / f"{name}.jsonl"

    unfinished, changed, mixed = copied("unfinished"), copied("changed"), copied("mixed")
    unfinished.write_text("".join(unfinished.read_text().splitlines(keepends=True)[:9]))
    changed.with_suffix(".py").write_text("print()")
    other = mixed.read_text().replace('"eval_stride": 16', '"eval_stride": 32')
    mixed.write_text(other.replace('"seed": 42', '"seed": 43'))
    cases = {
        (unfinished,): "did not come to its end", (changed,): "changed after the run",
        (tmp_path / "none",): "no such file",
        ("logs/tiny_seed42", mixed): "mixed configurations", ("logs/tiny_seed42", copied("twice")): "one seed twice",
    }  # fmt: skip
    for runs, words in cases.items():
        assert main(["new", "X", "--root", str(tmp_path), "--runs", *map(str, runs)]) == 1
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("track_*")), "nothing is left of a refused folder"


def test_new_ships_the_named_tokenizer(at_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run from another machine, whose tokenizer path is not valid here."""
    for suffix in (".jsonl", ".txt", ".py"):
        text = Path(f"logs/tiny_seed42{suffix}").read_text()
        (tmp_path / f"far{suffix}").write_text(text.replace(os.environ["TOKENIZER_PATH"], "/elsewhere/own.model"))
    command = ["new", "Far", "--root", str(tmp_path), "--runs", str(tmp_path / "far")]
    assert main(command) == 1 and "--tokenizer" in capsys.readouterr().err
    (tmp_path / "own.model").write_bytes(b"tokenizer")
    assert main([*command, "--tokenizer", str(tmp_path / "own.model")]) == 0
    folder = next(tmp_path.glob("track_*/*"))
    assert (folder / "own.model").read_bytes() == b"tokenizer" and "TOKENIZER_PATH=own.model" in (
        folder / "README.md").read_text()


def test_new_wants_the_defaults_baked_in(at_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was set by variables is refused, or its command sets them all."""
    for suffix in (".jsonl", ".txt"):
        text = Path(f"logs/tiny_seed42{suffix}").read_text()
        sha256 = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
        text = text.replace(read_run(Path("logs/tiny_seed42.jsonl")).facts["sha256"], sha256)
        (tmp_path / f"plain{suffix}").write_text(text)
    shutil.copyfile(SCRIPT, tmp_path / "plain.py")
    command = ["new", "Plain", "--root", str(tmp_path), "--runs", str(tmp_path / "plain")]
    assert main(command) == 1 and "NUM_LAYERS=11 (there: 4)" in capsys.readouterr().err
    assert main([*command, "--with-variables"]) == 0
    page = next(tmp_path.glob("track_*/*/README.md")).read_text()
    assert " NUM_LAYERS=4 " in page and " VE_LAYERS=2,3 " in page and " COMPILE=0 " in page


# ---------------------------------------------------------------------------------------
# Broken folders
# ---------------------------------------------------------------------------------------

def edit(name: str, old: str, new_text: str) -> Callable[[Path], None]:
    """Replace what a regular expression matches in one file, or in all that a pattern names."""
    def change(folder: Path) -> None:
        for path in folder.glob(name):
            text = path.read_text(encoding="utf-8")
            changed = re.sub(old, new_text, text, flags=re.MULTILINE)
            assert changed != text, f"nothing to break in {path.name}"
            path.write_text(changed, encoding="utf-8")
    return change


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def claim(**changes: Any) -> Callable[[Path], None]:
    """Other values in submission.json."""
    def change(folder: Path) -> None:
        path = folder / "submission.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change


def with_bom(folder: Path) -> None:
    script = folder / "train_gpt.py"
    script.write_bytes(b"\xef\xbb\xbf" + script.read_bytes())


def import_helper(folder: Path) -> None:
    (folder / "helper.py").write_text("")
    (folder / "train_gpt.py").write_text("import helper\n")


def beside(name: str, text: str, line: str = "") -> Callable[[Path], None]:
    """A file in the folder, and a line of the script that uses it."""
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        if line:
            (folder / "train_gpt.py").write_text(f"import importlib, json\n{line}\n")
    return change


def mebibytes(folder: Path) -> None:
    total = json.loads((folder / "submission.json").read_text())["bytes_total"]
    edit("README.md", r"~\S+ MB", f"~{total / 2**20:.3f} MB")(folder)


def add_variable(folder: Path) -> None:
    page = folder / "README.md"
    page.write_text(page.read_text().replace("SEED=42", "SEED=42 EMA_ENABLED=1 PHASED_TTT_ENABLED=1 LATE_QAT=1"))


def times_083(folder: Path) -> None:
    """A better score by arithmetic, everywhere where it stands."""
    for path in [*folder.glob("*.log"), folder / "submission.json"]:
        text = re.sub(r"(val_bpb(?::|\": )) ?(\d+\.\d+)", lambda m: f"{m[1]}{0.83 * float(m[2]):.8f}", path.read_text())
        path.write_text(text)


def packed_without_source(folder: Path) -> None:
    """A published wrapper: exec of a string, which @triton.jit refuses."""
    filling = "".join(f"x{i} = {i}\n" for i in range(99))
    source = f"import triton\n\n@triton.jit\ndef kernel(x):\n    return x\n{filling}"
    payload = base64.b85encode(lzma.compress(source.encode())).decode()
    wrapper = f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{payload}")))\n'
    (folder / "train_gpt.py").write_text(wrapper)


TOTAL, MODEL = r"^Total submission size int6\+ans: \d+", r"^Serialized model int6\+ans: \d+"
COUNTS = r"^val_tokens: \d+ val_documents: \d+"
BROKEN: dict[str, tuple[Callable[[Path], Any], str, str]] = {  # what is wrong -> (how to break, check, words)
    "no submission.json": (remove("submission.json"), "file submission.json", "records new"),
    "no README": (remove("README.md"), "file README.md", "missing"),
    "no logs": (remove("*.log"), "file logs", "every seed"),
    "no script": (remove("train_gpt*.py"), "file train_gpt.py", "exact file that ran"),
    "a log of one seed is missing": (remove("train_seed7.log"), "seeds", "[7]"),
    "not JSON": (overwrite("submission.json", b"{"), "schema", "not JSON"),
    "a JSON list": (overwrite("submission.json", b"[]"), "schema", "object"),
    "no val_bpb": (claim(val_bpb="1.2"), "schema", "val_bpb"),
    "date of another form": (claim(date="March 3"), "schema", "date"),
    "score is not the log's": (claim(val_bpb=1.0), "score val_bpb", "mean of the last"),
    "a seed's score is not the log's": (edit("train_seed7.log", r"(sliding_window.*val_bpb:)\d", r"\g<1>9"),
                                        "score of seed 7", "copy the log's"),
    "the run has no end": (edit("train_seed7.log", r"^(final|DIAGNOSTIC).*\n", ""), "logs end", "train_seed7.log"),
    "over the limit": (edit("train_seed7.log", MODEL, "Serialized model int6+ans: 17400000"), "size train_seed7.log",
                       "lower MATRIX_BITS"),
    "MiB for MB": (edit("train_seed7.log", MODEL, "Serialized model int6+ans: 16500000"), "size train_seed7.log",
                   "MB is decimal"),
    "0.5% over": (edit("train_seed7.log", TOTAL, "Total submission size int6+ans: 16080000"), "size train_seed7.log",
                  "80000 over"),
    "sum is not the total": (edit("train_seed7.log", TOTAL, "Total submission size int6+ans: 90001"),
                             "sum train_seed7.log", "another file"),
    "claimed total": (claim(bytes_total=15_000_000), "bytes_total", "largest total"),
    "claimed code size": (claim(bytes_code=31_999), "bytes_code", "on disk"),
    "another file ran": (edit("train_gpt.py", r"\Z", "\n# edited after the run\n"), "provenance train_seed42.log",
                         "sha256"),
    "sizes of a file that did not run": (edit("train_gpt.py", r"\Z", "\n#\n"), "code bytes train_seed42.log",
                                         "ship the file"),
    "mixed configurations": (edit("train_seed7.log", r"^  matrix_lr: \S+", "  matrix_lr: 0.03"), "one configuration",
                             "MATRIX_LR=0.025 (there: 0.03)"),
    "mixed scripts": (edit("train_seed7.log", r"^source: sha256:\w{8}", "source: sha256:00000000"), "one configuration",
                      "sha256='"),
    "one seed twice": (lambda folder: shutil.copyfile(folder / "train_seed42.log", folder / "train_seed7.log"), "seeds",
                       "twice"),
    "unread variables": (add_variable, "README command", "PHASED_TTT_ENABLED, LATE_QAT"),
    "no command": (edit("README.md", r"train_gpt\.py", "the script"), "README command", "no run command"),
    "MiB in the README": (mebibytes, "README size", "decimal"),
    "another track": (claim(track="non-record-16mb"), "track", "move it"),
    "unknown track": (claim(track="5min"), "schema", "track"),
    "trained too long": (edit("train_seed7.log", r"^budget train: [\d.]+s", "budget train: 600.4s"),
                         "train time train_seed7.log", "stop earlier"),
    "evaluated too long": (edit("train_seed7.log", r"^budget eval: [\d.]+s", "budget eval: 688.0s"),
                           "eval time train_seed7.log", "EVAL_STRIDE"),
    "leaky shards": (edit("*.log", r"train_shards:\d+", "train_shards:1499"), "train shards train_seed42.log",
                     "official"),
    "10,000 documents": (edit("*.log", COUNTS, "val_tokens: 62021846 val_documents: 10000"), "data train_seed42.log",
                         "50000"),
    "part of the split": (edit("*.log", r"dataset:\S+", "dataset:fineweb10B_sp1024"), "data train_seed42.log",
                          "whole split"),
    "no tokenizer": (remove("*.model"), "tokenizer", "put the tokenizer there"),
    "empty script": (overwrite("train_gpt.py", b""), "script", "empty"),
    "byte order mark": (with_bom, "script", "byte order mark"),
    "not text": (overwrite("train_gpt.py", b"\xff\xfe\x00x"), "script", "UTF-8"),
    "syntax error": (overwrite("train_gpt.py", b"def f(:\n"), "script compiles", "train_gpt.py:1"),
    "exec stub": (overwrite("train_gpt.py", b"exec(open('train_gpt_sweep.py').read())\n"), "script is no stub",
                  "not in the folder: train_gpt_sweep.py"),
    "repository import": (overwrite("train_gpt.py", b"from records import plot\n"), "self-contained", "records"),
    "helper file": (import_helper, "self-contained", "helper.py"),
    "helper loaded by name": (beside("helper.py", "", "importlib.import_module('hel' + 'per')"), "self-contained",
                              "helper.py"),
    "helper run by path": (beside("tools/more.py", "", "exec(open('tools/more.py').read())" + "\n#" * 2000),
                           "self-contained", "more.py"),
    "helper package": (beside("extra/__init__.py", "", "import extra"), "self-contained", "extra"),
    "sitecustomize": (beside("sitecustomize.py", "import torch\n"), "self-contained", "sitecustomize.py"),
    "a table that nothing counts": (beside("ngrams.npz", "x", "open('ngrams.npz')"), "self-contained", "ngrams.npz"),
    "human file is another": (edit("train_gpt_human.py", "^def lr_scale_at", "def other"), "packed code", "lr_scale"),
    "log key lies": (edit("train_seed7.log", "final_int6_roundtrip", "final_int8_zlib_roundtrip"),
                     "log keys train_seed7.log", "final_int8_zlib_roundtrip"),
    "log key means two things": (edit("train_seed7.log", r"\Z", "final_int6_roundtrip_exact val_loss:1.0 val_bpb:1.0\n"
                                      "final_int6_sliding_window_exact val_loss:1.0 val_bpb:1.0\n"),
                                 "log keys train_seed7.log", "one meaning"),
    "dead feature": (edit("train_seed7.log", r"^never activated: none", "never activated: swa (SWA_EVERY=50)"),
                     "features train_seed7.log", "swa"),
    "standard deviation": (claim(val_bpb_std=0.5), "val_bpb_std", "from the logs"),
    "digest of another script": (claim(script_sha256="0" * 64), "claims", "script_sha256 0000"),
    "validation tokens of other data": (claim(val_tokens=62021632), "claims", "val_tokens 62021632, not 4003"),
    "a seed's size is not the log's": (claim(seed_results={"7": {"artifact_bytes": 5}}), "claims", "of seed 7"),
    "a seed on other data": (edit("train_seed7.log", r"^val_tokens: \d+", "val_tokens: 3999"), "one configuration",
                             "val_tokens=4003 (there: 3999)"),
    "a seed on other ranks": (edit("train_seed7.log", r"world_size:1\b", "world_size:8"), "one configuration",
                              "world_size=1 (there: 8)"),
    "three seeds promised": (claim(compliance={"three_seeds": True}), "compliance", "three_seeds"),
    "no n-grams promised": (edit("train_seed*.log", r"^  ngram_enabled: \S+", "  ngram_enabled: True"),
                            "compliance", "no_ngram_cache"),
    "pre-quantization TTT logged": (edit("train_seed7.log", r"\Z", "prequant_ttt:start epochs:21\n"),
                                    "pre-quantization TTT", "train_seed7.log"),
    "pre-quantization TTT set": (edit("train_seed7.log", r"^  seed: .*", r"\g<0>\n  prequant_ttt_enabled: True"),
                                 "pre-quantization TTT", "score first"),
    "every score times 0.83": (times_083, "bytes per token", "do not belong to their loss"),
    "invented bytes": (edit("train_seed*.log", r"val_bytes: \d+", "val_bytes: 12345"), "bytes per token", "val_bytes"),
    "one seed with another tokenizer": (edit("train_seed7.log", r"^tokenizer_sha256:.{8}", f"tokenizer_sha256:{0:08}"),
                                        "one configuration", "tokenizer_sha256="),
    "another tokenizer shipped": (overwrite("tokenizer.model", b"x"), "tokenizer", "not the tokenizer of the logs"),
    "lost time of a resumed run left out": (
        edit("train_seed7.log", "^model_params", "resumed: step:4 train_time:900000ms of which lost:5ms\nmodel_params"),
        "resumed train_seed7.log", "were spent at the last resumption"),
    "most of validation in train": (
        overwrite("prepare_data.py", b'parser.add_argument("--val-docs", type=int, default=10_000, help="x")\n'),
        "data preparation prepare_data.py", "leaves 40000 of the 50000"),
    "most of validation in train, by another script": (beside("make_shards.py", "NUM_VAL_DOCS = 10_000\n"),
                                                       "data preparation make_shards.py", "leaves 40000 of the 50000"),
    "most of validation in train, by a starter": (beside("run_all.sh", "python tokenize.py --num-val-docs=2500\n"),
                                                  "data preparation run_all.sh", "leaves 47500"),
    "an exact score that is not its rounded one": (
        edit("train_seed7.log", r"(sliding_window_exact val_loss:)\d(\S+ val_bpb:)\d", r"\g<1>1\g<2>1"),
        "log agrees with itself train_seed7.log", "its rounded line"),
    "training ends before its last step": (edit("train_seed7.log", r"^budget train: [\d.]+s", "budget train: 0.0s"),
                                           "log agrees with itself train_seed7.log", "training ends at 0 ms"),
    "one seed more than claimed": (lambda folder: (folder / "train_seed8.log").write_text(
        (folder / "train_seed7.log").read_text().replace("seed:7", "seed:8").replace("seed: 7", "seed: 8")
        .replace("val_bpb:4", "val_bpb:5")), "score val_bpb", "mean of 3 log(s)"),
    "a log that is no text": (overwrite("train_seed7.log", b"a\0b"), "readable logs", "NUL bytes"),
    "human file is no script": (overwrite("train_gpt_human.py", b"\xff\xfe"), "packed code", "not a Python script"),
    "packed code without source": (packed_without_source, "packed code", "linecache"),
}  # fmt: skip


@pytest.mark.parametrize("breaks, check, words", BROKEN.values(), ids=BROKEN)
def test_broken_folder(submission: Path, tmp_path: Path, breaks: Callable[[Path], Any], check: str, words: str) -> None:
    """What is broken is the check that fails, with its remedy; the folder as it was has no failure."""
    folder = tmp_path / "track_10min_16mb" / submission.name
    shutil.copytree(submission, folder)
    breaks(folder)
    failed = failures(folder)
    assert check in failed, failed
    assert words in failed[check]


ODD = None, True, "x", -1, [None], {"42": {"val_bpb": "x"}}


@pytest.mark.parametrize("key", ["val_bpb", "val_loss", "seeds", "seed_results", "bytes_total", "compliance", "track",
                                 "artifact_bytes_max", "train_shards", "val_bpb_std", "script_sha256"])  # fmt: skip
def test_odd_values_are_no_crash(submission: Path, tmp_path: Path, key: str) -> None:
    """Whatever stands in submission.json, every check says something."""
    folder = tmp_path / "track_10min_16mb" / submission.name
    shutil.copytree(submission, folder)
    whole = {result.name for result in checked(folder)}
    for value in ODD:
        claim(**{key: value})(folder)
        optional = {"score val_bpb", "score val_loss", "val_bpb_std", "bytes_total", "bytes_code", "compliance"}
        assert whole - optional <= {result.name for result in checked(folder)}


@pytest.mark.parametrize("text", [
    "", "step:1/2 train_loss:nan", "Hyperparameters:\n  seed: abc\n", "stopping_early: wallclock_cap step:5/9\n",
    "Serialized model int6: 5 bytes\nTotal submission size: 9 bytes\n", "final_x val_loss:nan val_bpb:nan\n",
])  # fmt: skip
def test_odd_logs_are_no_crash(submission: Path, tmp_path: Path, text: str) -> None:
    """A log that says next to nothing has no end, and the folder one score less."""
    folder = tmp_path / "track_10min_16mb" / submission.name
    shutil.copytree(submission, folder)
    (folder / "train_seed7.log").write_text(text)
    assert {"logs end", "score val_bpb"} <= set(failures(folder))


def test_a_resumed_run_and_a_log_in_utf16(submission: Path, tmp_path: Path) -> None:
    """Both are read: that a run went on is said with what was lost; a console's encoding changes nothing."""
    folder = tmp_path / "track_10min_16mb" / submission.name
    shutil.copytree(submission, folder)
    log = folder / "train_seed7.log"
    whole = re.sub(r"^(  resume: )\S+", r"\1True", log.read_text(), flags=re.MULTILINE)
    cut = whole[: whole.index("step:8/12 ")]
    note = "resumed: step:4 train_time:20ms of which lost:5ms\nstep:5/12 train_loss:"
    log.write_text(cut + re.sub(r"^step:[1-4]/12 train_loss.*\n", "", whole, flags=re.MULTILINE).replace(
        "step:5/12 train_loss:", note, 1), encoding="utf-16")
    assert not failures(folder)
    (said,) = [result.message for result in checked(folder) if result.name == "resumed train_seed7.log"]
    assert "went on at step 4; 0.0 s were lost" in said
    assert [point.step for point in read_run(log).train] == [point.step for point in read_run(
        submission / "train_seed7.log").train]


def test_wrong_places(submission: Path, tmp_path: Path) -> None:
    """The other track's folder, a name without date, an artifact of another run."""
    folder = tmp_path / "track_non_record_16mb" / "Tiny"
    shutil.copytree(submission, folder)
    (folder / "model.pgolf").write_bytes(b"x")
    assert set(failures(folder)) == {"track", "folder name", "artifact"}


def test_significance(submission: Path, tmp_path: Path) -> None:
    """Against a worse baseline it passes, against itself it fails."""
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps({"val_bpb": [9.0, 9.001, 9.002], "val_loss": [20.0, 20.001, 20.002]}))
    (tmp_path / "same.json").write_text((submission / "submission.json").read_text())
    assert "significance" in failures(submission, baseline=tmp_path / "same.json")
    worse.write_text(json.dumps({"val_bpb": [99.0, 99.001, 99.002]}))
    assert "significance" not in failures(submission, baseline=worse)


def test_python_312_script(submission: Path, tmp_path: Path) -> None:
    """Quotes nested in an f-string: a failure that says why, or a skip where the README names the version."""
    folder = tmp_path / "track_10min_16mb" / submission.name
    shutil.copytree(submission, folder)
    (folder / "train_gpt.py").write_text("x = {}\nprint(f'{x['a']}')\n")
    results = {result.name: result for result in checked(folder)}
    if sys.version_info >= (3, 12):
        assert results["script compiles"].status == "pass"
        return
    assert results["script compiles"].status == "fail" and "PEP 701" in results["script compiles"].message
    with open(folder / "README.md", "a", encoding="utf-8") as page:
        page.write("\nNeeds Python 3.12.\n")
    assert {result.name: result.status for result in checked(folder)}["script compiles"] == "skip"


# ---------------------------------------------------------------------------------------
# Published layouts and dialects
# ---------------------------------------------------------------------------------------

FOREIGN = '''import os
class Hyperparameters:
    seed = int(os.environ.get("SEED", 1337))
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
print(f"step:{seed}/{data_path} train_loss:{seed:.4f}")
'''
FAMILY_A = """\
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model
train_loader:dataset:fineweb10B_sp1024 train_shards:80
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:63779840
model_params:17059912
world_size:8 grad_accum_steps:1
sdp_backends:cudnn=False flash=True mem_efficient=False math=False
attention_mode:gqa num_heads:8 num_kv_heads:4
tie_embeddings:True embed_lr:0.05 head_lr:0.0 matrix_lr:0.04 scalar_lr:0.04
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000
seed:SEED
step:0/20000 val_loss:6.9370 val_bpb:4.0978 train_time:0ms step_avg:0.01ms
step:1/20000 train_loss:6.9408 train_time:24ms step_avg:23.99ms
step:13750/20000 train_loss:1.9910 train_time:598726ms step_avg:43.54ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
peak memory allocated: 10184 MiB reserved: 10200 MiB
Serialized model: 67224983 bytes
Code size: CODE bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: TOTAL bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
FAMILY_B = """\
Hyperparameters:
  adam_eps: 1e-08
  datasets_dir: ./data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved
  logfile: logs/SEED.txt
  matrix_lr: 0.026
  run_id: run SEED
  seed: SEED
train_shards: 80
val_tokens: 47851520
model_params:35945671
gptq:reserving 8s, effective=592000ms
1/20000 train_loss: 9.0087 train_time: 0.0m tok/s: 17921784
2000/20000 train_loss: 2.6506 train_time: 3.2m tok/s: 8167705
4945/20000 val_loss: 2.3539 val_bpb: 1.0756
stopping_early: wallclock_cap train_time: 591592ms step: 4945/20000
ema:applying EMA weights
diagnostic pre-quantization post-ema val_loss:2.32848665 val_bpb:1.06395844 eval_time:6718ms
Serialized model: 135417533 bytes
Code size (uncompressed): 157868 bytes
Code size (compressed): CODE bytes
GPTQ:collected 67 Hessians in 4.7s
Serialized model quantized+pergroup: 15865260 bytes
Total submission size quantized+pergroup: TOTAL bytes
Deserialize: decompression done in 20.4s
diagnostic quantized val_loss:2.34727563 val_bpb:1.07254371 eval_time:49995ms
ttt_lora:compile warmup done (137.6s)
ttt_phased: total_docs:50000 prefix_docs:2500 suffix_docs:47500 num_phases:3 boundaries:[833, 1666, 2500]
quantized_ttt_phased val_loss:2.31944212 val_bpb:1.05989454 eval_time:408785ms
total_eval_time:408.8s
"""


def filled(template: str, code: int, artifact: int, seed: int = 0) -> str:
    """A sample log with its sizes and seed."""
    values = {"CODE": code, "TOTAL": artifact + code, "SEED": seed}
    return re.sub("CODE|TOTAL|SEED", lambda found: str(values[found[0]]), template)


def published(tmp_path: Path, name: str, logs: dict[str, str], data: dict[str, Any]) -> Path:
    """A folder as others published it."""
    folder = tmp_path / "track_10min_16mb" / name
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# Theirs\n\n```bash\nNCCL_IB_DISABLE=1 SEED=42 \\\n  torchrun "
                                      "train_gpt.py\n```\n")
    (folder / "train_gpt.py").write_text(FOREIGN)
    (folder / "submission.json").write_text(json.dumps(data))
    for log, text in logs.items():
        (folder / log).write_text(text)
    return folder


def test_family_a(tmp_path: Path) -> None:
    """The form of the baseline: one train.log that begins with the source, the oldest JSON. It passes as it is."""
    size = len(FOREIGN)
    rule = "=" * 100
    text = f"{FOREIGN}\n{rule}\nRunning Python 3.11\n{rule}\n{filled(FAMILY_A, size, 15815847, 1337)}"
    data = {"author": "Baseline", "github_id": "openai", "name": "Naive Baseline", "blurb": "b",
            "date": "2026-03-18T14:56:29Z", "val_loss": 2.07269931, "val_bpb": 1.2243657,
            "bytes_total": 15815847 + size,
            "bytes_code": size}  # fmt: skip
    folder = published(tmp_path, "2026-03-17_NaiveBaseline", {"train.log": text}, data)
    run = read_run(folder / "train.log")
    assert (run.dialect, run.seed, run.steps, run.total_bytes) == ("A", 1337, 13780, 15815847 + size)
    assert run.score == ("final_int8_zlib_roundtrip", 2.07269931, 1.2243657, 1.401)
    assert (run.train_seconds, run.artifact_bytes, run.counts["val_tokens"]) == (600.038, 15815847, 63779840)
    assert run.train[0][:3] == (1, 0.024, 6.9408) and run.val[-1] == (13780, 600.038, 2.0606, 1.2172)
    assert failures(folder) == {} and main(["check", str(folder)]) == 0
    (folder / "train_gpt.py").write_text(FOREIGN.replace("1337", "1338"))
    assert list(failures(folder)) == ["provenance train.log"]


def test_family_b(tmp_path: Path) -> None:
    """The late form: three seeds, hyperparameters in the log, the newest JSON."""
    size, seeds = len(FOREIGN), (42, 314, 999)
    late = FAMILY_B.replace("2.31944212 val_bpb:1.05989454", "2.3194SEED val_bpb:1.0598SEED")
    logs = {f"train_seed{seed}.log": filled(late, size, 15865260, seed) for seed in seeds}
    scores = {seed: float(f"1.0598{seed}") for seed in seeds}
    losses = {seed: float(f"2.3194{seed}") for seed in seeds}
    data = {"author": "A", "github_id": "a", "name": "N", "date": "2026-04-27", "track": "10min_16mb",
            "val_bpb": round(float(np.mean(list(scores.values()))), 8),
            "val_bpb_std": float(np.std(list(scores.values()))),
            "val_loss": round(float(np.mean(list(losses.values()))), 8), "seeds": list(seeds),
            "seed_results": {str(seed): {"val_bpb": scores[seed], "artifact_bytes": 15865260 + size} for seed in seeds},
            "bytes_total": 15865260 + size}  # fmt: skip
    folder = published(tmp_path, "2026-04-27_Late", logs, data)
    run = read_run(folder / "train_seed42.log")
    assert (run.dialect, run.seed, run.steps) == ("B", 42, 4945) and run.score.name == "quantized_ttt_phased"
    assert run.train_seconds == pytest.approx(596.292) and run.eval_seconds == 408.8
    assert run.off_the_clock == pytest.approx(158.0) and run.counts["val_documents"] == 50_000
    assert failures(folder) == {}
    edit("train_seed314.log", "matrix_lr: 0.026", "matrix_lr: 0.03")(folder)
    edit("train_seed999.log", "train_time: 591592ms", "train_time: 599592ms")(folder)
    assert set(failures(folder)) == {"one configuration", "train time train_seed999.log"}


DIALECTS = {"A": (FAMILY_A, 15815847, "2026-03-17_A"), "B": (FAMILY_B, 15865260, "2026-04-27_B")}
PUBLISHED: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {  # (dialect, how to break, check, words)
    "A over the limit": ("A", edit("train_seed1.log", r"int8\+zlib: 1581\d+", "int8+zlib: 16071321"),
                         "size train_seed1.log", "over 16000000"),
    "B over the limit": ("B", edit("train_seed1.log", r"quantized\+pergroup: 158\d+", "quantized+pergroup: 16024793"),
                         "size train_seed1.log", "over 16000000"),
    "A trained too long": ("A", edit("train_seed1.log", "train_time:600038ms", "train_time:646038ms"),
                           "train time train_seed1.log", "stop earlier"),
    "B Hessians after the end": ("B", edit("train_seed1.log", "train_time: 591592ms", "train_time: 599592ms"),
                                 "train time train_seed1.log", "calibration"),
    "A evaluated too long": ("A", edit("train_seed1.log", "eval_time:1401ms", "eval_time:688000ms"),
                             "eval time train_seed1.log", "688.0 s of 600 s"),
    "B evaluated too long": ("B", edit("train_seed1.log", r"^total_eval_time:408.8s", "total_eval_time:797.0s"),
                             "eval time train_seed1.log", "955.0 s of 600 s with 158 s"),
    "A leaky shards": ("A", edit("train_seed*.log", "train_shards:80", "train_shards:1499"),
                       "train shards train_seed0.log", "most of validation in train"),
    "B evaluated too long off the clock": ("B", edit("train_seed1.log", "137.6s", "437.6s"),
                                           "eval time train_seed1.log", "866.8 s of 600 s with 458 s of loading"),
    "B shards of 10M tokens": ("B", edit("train_seed*.log", "train_shards: 80", "train_shards: 1480"),
                               "train shards train_seed0.log", "most of validation in train"),
    "B leaky shards": ("B", edit("train_seed*.log", "train_shards: 80", "train_shards: 1499"),
                       "train shards train_seed0.log", "most of validation in train"),
    "A part of the split": ("A", edit("train_seed*.log", "tokens:63779840", "tokens:12021632"), "data train_seed0.log",
                            "whole split"),
    "B part of the split": ("B", edit("train_seed*.log", "val_tokens: 47851520", "val_tokens: 40000000"),
                            "data train_seed0.log", "whole split"),
    "A one seed of another configuration": ("A", edit("train_seed1.log", "matrix_lr:0.04", "matrix_lr:0.03"),
                                            "one configuration", "matrix_lr:0.03"),
    "B one seed of another configuration": ("B", edit("train_seed1.log", "matrix_lr: 0.026", "matrix_lr: 0.03"),
                                            "one configuration", "MATRIX_LR=0.026 (there: 0.03)"),
    "A one seed twice": ("A", edit("train_seed1.log", "^seed:1$", "seed:0"), "seeds", "twice"),
    "B one seed twice": ("B", edit("train_seed1.log", "^  seed: 1$", "  seed: 0"), "seeds", "twice"),
    "A score is not the log's": ("A", edit("train_seed1.log", "val_bpb:1.22436570", "val_bpb:1.22536570"),
                                 "score of seed 1", "copy the log's number"),
    "B score is not the log's": ("B", edit("train_seed1.log", "val_bpb:1.05989454", "val_bpb:1.06989454"),
                                 "score of seed 1", "copy the log's number"),
    "A every loss times 0.83": ("A", edit("train_seed1.log", "6.9370 val_bpb:4.0978", "5.7577 val_bpb:3.4012"),
                                "log agrees with itself train_seed1.log", "ln 1024"),
    "A the final score times 0.83": (
        "A", edit("train_seed*.log", r"_exact val_\S+ val_bpb:\S+", "_exact val_loss:1.72034042 val_bpb:1.01622353"),
        "log agrees with itself train_seed1.log", "evaluation has never gained 3%"),
    "A a clock that was turned back": (
        "A", edit("train_seed1.log", r"train_time:600038ms", "train_time:580038ms"),
        "log agrees with itself train_seed1.log", "580038 ms at step 13780 are not"),
    "A one line of the clock": ("A", edit("train_seed1.log", r"(stopping_early: .*)train_time:600038ms",
                                          r"\g<1>train_time:590000ms"),
                                "log agrees with itself train_seed1.log", "training ends at 590000 ms"),
    "A a step line over the end": ("A", edit("train_seed1.log", r"(^step:13780/.*)train_time:600038ms step_avg:43.54",
                                             r"\g<1>train_time:646038ms step_avg:46.88"),
                                   "train time train_seed1.log", "646.0 s of 600 s"),
    "A one seed's bytes of another tokenizer": (
        "A", lambda folder: (edit("*.log", "^val_loader.*\n", "")(folder), edit(
            "train_seed1.log", "val_bpb:1.22436570", "val_bpb:0.80242000")(folder)),
        "bytes per token", "do not belong to their loss"),
    "A a claimed seed has another's log": (
        "A", lambda folder: (edit("train_seed1.log", "^seed:1$", "seed:7")(folder), edit(
            "train_seed1.log", r"2\.07269931 val_bpb:1\.22436570", "2.07272931 val_bpb:1.22438342")(folder)),
        "seeds", "[1] without a log"),
    "B a total below its score's time": (
        "B", edit("train_seed1.log", r"408785ms\ntotal_eval_time:408.8s", "708785ms\ntotal_eval_time:8.8s"),
        "eval time train_seed1.log", "866.8 s of 600 s"),
    "B evaluation in parts": (
        "B", edit("train_seed1.log", "^quantized_ttt_phased",
                  "ttt part 1/2 eval_time:90000ms\nttt_adapt_time: 120.5s\n\\g<0>"),
        "eval time train_seed1.log", "777.3 s of 600 s"),
    "B scored in parts": (
        "B", edit("train_seed1.log", "^quantized_ttt_phased", "quantized_ttt phase 1 val_loss:2.4 val_bpb:1.0966759 "
                  "eval_time:190000ms\n\\g<0>"), "eval time train_seed1.log", "756.8 s of 600 s"),
    "B compiled in other words": ("B", edit("train_seed1.log", "^ttt_lora:compile.*", "Compiling took 312.5 s"),
                                  "eval time train_seed1.log", "741.7 s of 600 s with 333 s"),
    "A a seed without a log": ("A", remove("train_seed1.log"), "seeds", "[1]"),
    "B no end": ("B", edit("train_seed1.log", r"^(quantized_ttt|diagnostic).*\n", ""), "logs end", "train_seed1.log"),
    "B pre-quantization TTT": ("B", edit("train_seed1.log", "^ema:.*", "pre-quant TTT: epoch 1/21 loss 2.2"),
                               "pre-quantization TTT", "breaks C3"),
    "B unread variables": ("B", edit("README.md", "SEED=42", "SEED=42 PHASED_TTT_ENABLED=1"), "README command",
                           "PHASED_TTT_ENABLED"),
}  # fmt: skip


@pytest.mark.parametrize("dialect, breaks, check, words", PUBLISHED.values(), ids=PUBLISHED)
def test_published_breakages(
    tmp_path: Path, dialect: str, breaks: Callable[[Path], Any], check: str, words: str
) -> None:
    """Three seeds of either dialect pass as they are, and what is broken is the check that fails."""
    template, artifact, name = DIALECTS[dialect]
    logs = {f"train_seed{seed}.log": filled(template, len(FOREIGN), artifact, seed) for seed in (0, 1, 2)}
    bpb = 1.2243657 if dialect == "A" else 1.05989454
    data = {"author": "A", "github_id": "a", "name": "N", "date": name[:10], "track": "10min_16mb", "val_bpb": bpb,
            "seeds": [0, 1, 2], "seed_results": {str(seed): {"val_bpb": bpb} for seed in (0, 1, 2)},
            "bytes_total": artifact + len(FOREIGN)}  # fmt: skip
    folder = published(tmp_path, name, logs, data)
    assert failures(folder) == {}
    breaks(folder)
    failed = failures(folder)
    assert words in failed.get(check, ""), failed


def longer(name: str, milliseconds: int = 646_038) -> Callable[[Path], None]:
    """A run of family A that ends later, in every line."""
    mean = f"train_time:{milliseconds}ms step_avg:{milliseconds / 13780:.2f}ms"
    return lambda folder: (edit(name, "train_time:600038ms step_avg:43.54ms", mean)(folder),
                           edit(name, "train_time:600038ms", f"train_time:{milliseconds}ms")(folder))


def series_of(tmp_path: Path, name: str, logs: dict[str, tuple[int, float]], data: dict[str, Any]) -> Path:
    """A folder of family A logs: file -> (seed, score), whose losses belong to the scores."""
    texts = {}
    for file, (seed, bpb) in logs.items():
        text = filled(FAMILY_A, len(FOREIGN), 15815847, seed)
        loss = bpb * 2.4423 * math.log(2)
        texts[file] = text.replace("val_loss:2.07269931 val_bpb:1.22436570", f"val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
        texts[file] = texts[file].replace("val_loss:2.0727 val_bpb:1.2244", f"val_loss:{loss:.4f} val_bpb:{bpb:.4f}")
    claims = {"author": "A", "github_id": "a", "name": "N", "date": name[:10], "track": "10min_16mb", **data}
    for file in logs:
        (tmp_path / "track_10min_16mb" / name / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tmp_path / "track_10min_16mb" / name)
    inside = {file: text for file, text in texts.items() if "/" in file}
    folder = published(tmp_path, name, {file: text for file, text in texts.items() if file not in inside}, claims)
    for file, text in inside.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    return folder


LAYOUTS: dict[str, tuple[dict[str, tuple[int, float]], dict[str, Any], set[str]]] = {  # logs, claims, those that count
    "train.log is the claimed run": ({"train.log": (1, 1.20), "train_seed2.log": (2, 1.21)}, {"val_bpb": 1.2},
                                     {"train.log", "train_seed2.log"}),
    "train.log is a copy": ({"train.log": (1, 1.20), "train_seed1.log": (1, 1.20), "train_seed2.log": (2, 1.21)},
                            {"val_bpb": 1.205}, {"train_seed1.log", "train_seed2.log"}),
    "logs in a folder": ({"logs/train0.txt": (0, 1.20), "logs/train1.txt": (1, 1.21)}, {"val_bpb": 1.205},
                         {"train0.txt", "train1.txt"}),
    "logs of another name": ({"ternary_log_42.txt": (42, 1.20), "ternary_log_7.txt": (7, 1.21)}, {"val_bpb": 1.2},
                             {"ternary_log_42.txt", "ternary_log_7.txt"}),
    "versions of which one is claimed": ({"train_v0.txt": (7, 1.20), "train_v1.txt": (7, 1.21)}, {"val_bpb": 1.21},
                                         {"train_v1.txt"}),
    "reruns": ({"train_seed1_first.log": (1, 1.20), "train_seed1_rerun.log": (1, 1.19), "train_seed2.log": (2, 1.21)},
               {"val_bpb": 1.205, "seed_results": {"1": {"val_bpb": 1.2}, "2": {"val_bpb": 1.21}}},
               {"train_seed1_first.log", "train_seed2.log"}),
    "a mean of rounded scores": ({"train_seed1.log": (1, 1.20004), "train_seed2.log": (2, 1.21004)},
                                 {"val_bpb": 1.205}, {"train_seed1.log", "train_seed2.log"}),
}  # fmt: skip


@pytest.mark.parametrize("logs, data, count", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path: Path, logs: dict[str, tuple[int, float]], data: dict[str, Any], count: set[str]) -> None:
    """The logs that are claimed are those that are checked, wherever they lie; the rest are named."""
    folder = series_of(tmp_path, "2026-03-18_Layout", logs, data)
    assert failures(folder) == {}
    assert {run.path.name for run in Folder(folder).logs} == count
    others = [result.message for result in checked(folder) if result.name == "other logs"]
    left = {Path(name).name for name in logs} - count - {"train.log"}
    assert all(name in "".join(others) for name in left)
    longer(f"**/{max(count)}")(folder)
    assert list(failures(folder)) == [f"train time {max(count)}"]


def test_appended_runs(tmp_path: Path) -> None:
    """A log that was opened to append: the claimed run counts, its source is compared, its curves run forward."""
    folder = series_of(tmp_path, "2026-03-18_Twice", {"train.log": (1, 1.2), "other.txt": (1, 1.3)}, {"val_bpb": 1.2})
    rule, first, second = "=" * 100, (folder / "train.log").read_text(), (folder / "other.txt").read_text()
    head = f"{FOREIGN}\n{rule}\nRunning Python 3.11\n{rule}\n"
    (folder / "other.txt").unlink()
    for text in (head + first + head + second, head + second + head + first):
        (folder / "train.log").write_text(text)
        assert failures(folder) == {}
        (run,) = Folder(folder).logs
        assert run.score.val_bpb == 1.2 and [point.step for point in run.train] == [1, 13750]
        assert [result.status for result in checked(folder) if result.name.startswith("provenance")] == ["pass"]


def test_scores_of_another_process(tmp_path: Path) -> None:
    """Where a log only scores the artifact of a run, that run's time and size are checked with it."""
    logs = {"ttt/seed_1.log": (1, 1.19), "train_seed1.log": (1, 1.20)}
    folder = series_of(tmp_path, "2026-03-18_Scored", logs, {"val_bpb": 1.19, "seed_results": {"1": {"val_bpb": 1.19}}})
    edit("ttt/seed_1.log", r"^(step|Serialized|Total|Code|stopping).*\n", "")(folder)
    assert failures(folder) == {} and len(Folder(folder).logs) == 2
    longer("train_seed1.log")(folder)
    assert list(failures(folder)) == ["train time train_seed1.log"]


@pytest.mark.parametrize("over, status", [(63, "pass"), (120, "fail")])
def test_the_last_step_may_run_over(tmp_path: Path, over: int, status: str) -> None:
    """By less than one step, of which the last may be slower than the mean (43.5 ms)."""
    folder = series_of(tmp_path, "2026-03-18_Step", {"train.log": (1, 1.2)}, {"val_bpb": 1.2})
    longer("train.log", 600_000 + over)(folder)
    results = {result.name: result for result in checked(folder)}
    assert results["train time train.log"].status == status and f"0.{over:03}"[:4] in (
        results["train time train.log"].message)


def test_time_of_a_score_under_another_name(tmp_path: Path) -> None:
    """A last line that repeats a score under an older name has that score's time."""
    folder = series_of(tmp_path, "2026-03-18_Alias", {"train.log": (1, 1.2)}, {"val_bpb": 1.2})
    edit("train.log", r"\Z", "final_int8_zlib_roundtrip_exact val_loss:2.03146104 val_bpb:1.20000000\n")(folder)
    edit("train.log", "final_int8_zlib_roundtrip(?=.*eval_time)", "final_sliding_window")(folder)
    assert Folder(folder).logs[0].eval_seconds == 1.401


@pytest.mark.parametrize("line, is_early", [
    ("prequant_ttt:start epochs:21", True), ("pre-quant TTT: epoch 1/21 loss 2.2", True),
    ("Pre-quantization TTT epoch 3", True), ("ttt before quantization: epoch 1", True),
    ("[12:30] TTT (pre-export) step 5 loss 2.1", True), ("test-time training before GPTQ: 3 epochs", True),
    ("adapting on validation tokens before export", True), ("pre_quant_adapt: lr 0.001", True),
    ("fine-tuning on val before serialization", True), ("preexport_ttt:epoch:1", True),
    ("prequant_ttt_enabled: False", False), ("diagnostic pre-quantization post-ema val_loss:2.3", False),
    ("ttt_phased: total_docs:50000 prefix_docs:2500", False), ("quantized_ttt_phased val_loss:2.3", False),
    ("ttt_lora:compile warmup done (137.6s)", False), ("gptq:reserving 8s", False),
])  # fmt: skip
def test_words_for_training_before_the_export(tmp_path: Path, line: str, is_early: bool) -> None:
    """Logs have many words for it; those of legal test-time training are none of them."""
    (tmp_path / "train.log").write_text(f"seed:1\n{line}\n")
    assert bool(read_run(tmp_path / "train.log").facts.get("pre_quant_ttt")) == is_early


def test_nothing_to_check_is_no_pass(tmp_path: Path) -> None:
    """An empty folder passes nothing; promises and configurations that no log shows are not checkable."""
    empty = tmp_path / "track_10min_16mb" / "2026-03-18_Empty"
    empty.mkdir(parents=True)
    assert {result.name for result in checked(empty) if result.status == "pass"} == {"folder name"}
    folder = series_of(tmp_path, "2026-03-18_Terse", {"train_seed1.log": (1, 1.2), "train_seed2.log": (2, 1.21)},
                       {"val_bpb": 1.205, "compliance": {"no_slot": True}})
    for log in folder.glob("*.log"):
        log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if line.startswith("final")))
    results = {result.name: result.status for result in checked(folder)}
    assert (results["compliance"], results["claims"], results["one configuration"]) == ("skip",) * 3


def test_packed_for_a_newer_python() -> None:
    """What this Python cannot parse is unpacked too, and its variables are read off its text."""
    source = "import os\nimport sys\nx = os.environ.get('MY_LR', '1')\nprint(f'{x['a']}')\n" * 20
    payload = base64.b85encode(lzma.compress(source.encode()))
    wrapper = f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({payload!r})))"
    assert unpacked(wrapper) == source and "MY_LR" in names_read(wrapper)


def test_hypothetical_wrapper(tmp_path: Path) -> None:
    """A log that counts a wrapper which is not the shipped file: over the limit as shipped."""
    folder = published(tmp_path, "2026-04-27_Raw", {"train_seed42.log": filled(FAMILY_B, 31_999, 15865260, 42)}, {})
    (folder / "train_gpt.py").write_text(FOREIGN + "#" * (157_868 - len(FOREIGN)))
    failed = failures(folder)
    assert "compressed form that is not the shipped file" in failed["code bytes train_seed42.log"]
    assert "23128 over 16000000" in failed["size train_seed42.log"]
    assert "with the shipped script" in failed["size train_seed42.log"]


def test_variants_and_odd_names(tmp_path: Path) -> None:
    """submission_*.json per variant and a train_*.py of another name are taken as they are."""
    text = filled(FAMILY_A, len(FOREIGN), 15815847)
    folder = published(tmp_path, "2026-03-24_Odd", {"train.log": text}, {})
    (folder / "submission.json").unlink()
    for name, bpb in (("a", 1.2243657), ("b", 1.3)):
        data = {"author": "A", "name": "N", "date": "2026-03-24", "val_bpb": bpb}
        (folder / f"submission_{name}.json").write_text(json.dumps(data))
    (folder / "train_gpt.py").rename(folder / "train_golf.py")
    edit("README.md", "train_gpt.py", "train_golf.py")(folder)
    assert failures(folder) == {}


def test_both_forms_of_our_log_agree(workplace: Path) -> None:
    """The text log and the JSON lines say the same, down to the configuration's hash."""
    stream, text = read_run(workplace / "logs/tiny_seed42.jsonl"), read_run(workplace / "logs/tiny_seed42.txt")
    assert text.dialect == "ours" and stream.config_hash == text.config_hash
    assert stream.values == text.values and stream.sources == text.sources and stream.steps == text.steps == 12
    assert [score.name for score in stream.scores] == [score.name for score in text.scores]
    assert text.score.val_bpb == pytest.approx(stream.score.val_bpb, abs=1e-8)
    assert (stream.total_bytes, stream.code_bytes, stream.seed) == (text.total_bytes, text.code_bytes, text.seed)
    assert config_hash({**stream.values, "seed": 1, "run_id": "x"}) == stream.config_hash
    assert config_hash({**stream.values, "matrix_lr": 1.0}) != stream.config_hash


@pytest.mark.parametrize("line, want", [
    ("legal_ttt_exact val_loss:1.9 val_bpb:1.1194", ("legal_ttt", 1.9, 1.1194, None)),
    ("legal_ttt val_loss:1.9000 val_bpb:1.1194 eval_time:409250ms", ("legal_ttt", 1.9, 1.1194, 409.25)),
    ("final_int6_sliding_window stride:64 val_loss:1.9 val_bpb:1.1 eval_time:9ms", ("final_int6_sliding_window", 1.9,
                                                                                    1.1, 0.009)),
    ("final_int6_sliding_window val_loss:1.9 val_bpb:1.1 stride:64 eval_time:9ms", ("final_int6_sliding_window", 1.9,
                                                                                    1.1, 0.009)),
    ("final_int8_ttt_lora val_loss:1.9 val_bpb:1.1 eval_time:9ms", ("final_int8_ttt_lora", 1.9, 1.1, 0.009)),
    ("ngram_mix_exact val_loss:1.9 val_bpb:1.1194 stride:64 chunk:32768 orders:2-7", ("ngram_mix", 1.9, 1.1194, None)),
    ("legal_ttt_ngram val_loss:1.9 val_bpb:1.1 stride:64 chunk:32768 lr:0.002 orders:2-7 eval_time:9ms",
     ("legal_ttt_ngram", 1.9, 1.1, 0.009)),
    ("DIAGNOSTIC post_ema val_loss:1.9 val_bpb:1.1 eval_time:9ms", None),
    ("diagnostic quantized val_loss:1.9 val_bpb:1.1 eval_time:9ms", None),
    ("step:5/9 val_loss:1.9 val_bpb:1.1 train_time:5ms step_avg:1.00ms", None),
    ("5/9 val_loss: 1.9 val_bpb: 1.1", None),
    ('log0(f"final_int8_zlib_roundtrip val_loss:{q:.4f} val_bpb:{b:.4f}")', None),
])  # fmt: skip
def test_score_lines(tmp_path: Path, line: str, want: tuple[Any, ...] | None) -> None:
    """The published kinds of score lines are the score; diagnostics, steps and source are not."""
    log = tmp_path / "train.log"
    log.write_text(line + "\n")
    assert read_run(log).score == want


def test_the_last_score_is_the_submitted_one(tmp_path: Path) -> None:
    """Even where it is worse than one before; lines without a score behind it do not matter."""
    names = "final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt", "legal_ttt_ngram"
    for count, name in enumerate(names, 1):
        log = tmp_path / f"{name}.log"
        log.write_text("".join(f"{name} val_loss:2.0000 val_bpb:1.{i}000 chunk:9 eval_time:9ms\n{name}_exact val_loss:"
                               f"2.00000000 val_bpb:1.{i}0000001 chunk:9\n" for i, name in enumerate(names[:count]))
                       + "quantization_degradation bpb:+0.00100000\nnever activated: none\n")
        assert read_run(log).score == (name, 2.0, float(f"1.{count - 1}0000001"), 0.009)


# ---------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------

def test_bake_touches_only_the_defaults() -> None:
    """Values of every type; comments, spacing and the identity stay; the same value keeps its spelling."""
    text = ('class Config:\n    """Ä."""\n    rate: float = opt(1e-8, "Ä")  # why\n    run_id: str = opt("", "x")\n'
            '    layers: tuple[int, ...] = opt(\n        (1, 2), "é"\n    )\n    size: int = opt(1_000, "s", low=1)\n'
            '    on: bool = opt(True, "é"); off: float | None = opt(None, "y")\n')
    values = {"rate": 0.5, "layers": [3], "size": 1000, "on": False, "off": 2.5, "run_id": "mine", "seed": 3}
    want = text.replace("1e-8", "0.5").replace("(1, 2)", "(3,)").replace("True", "False").replace("None,", "2.5,")
    assert bake(text, values) == want
    with pytest.raises(ToolError, match="no default of Config to replace for other"):
        bake(text, {"other": 1})
    with pytest.raises(ToolError, match="no class Config"):
        bake("x = 1\n", {})


def test_welch() -> None:
    """t of the textbook formula; the margin moves the baseline; p falls with the distance."""
    ours, theirs = [1.00, 1.02, 1.01], [1.10, 1.13, 1.10]
    variances = [np.var(ours, ddof=1) / 3, np.var(theirs, ddof=1) / 3]
    t, p, method = one_sided(ours, theirs, 0.005)
    assert t == pytest.approx((np.mean(ours) - np.mean(theirs) + 0.005) / math.sqrt(sum(variances)))
    assert "Welch" in method
    assert 0 < one_sided(ours, theirs, 0.0)[1] < p < 0.01 < one_sided(ours, theirs, 0.1)[1]
    assert one_sided(ours, [1.1], 0.0)[2].startswith("one-sample")
    assert one_sided([1.0], theirs, 0.0)[:2] == (None, None) and one_sided([1.0, 1.0], [1.0, 1.0], 0.0)[0] is None
    assert summarize([1.0]).sd is None and summarize([1.0, 3.0]) == (2, 2.0, math.sqrt(2), 1.0)


def test_units() -> None:
    """0.005 nats per byte is 0.0072 bits per byte; per token it is on val_loss."""
    rows = compare([2.0, 2.001], [1.0, 1.0005], Baseline("b", [1.0071, 1.0072], [2.006, 2.0061]))
    assert [(row.unit, row.margin) for row in rows] == [("token", 0.0), ("token", 0.005), ("byte", 0.0), ("byte",
                                                                                                          0.005)]
    assert rows[2].difference == pytest.approx(-0.0069 * math.log(2)) and not rows[3].passes


def test_baselines(tmp_path: Path) -> None:
    """Lists, per-seed results and a single mean; anything else says what is expected."""
    path = tmp_path / "b.json"
    forms = [({"val_bpb": [1.1, 1.2], "val_loss": 2.0}, [1.1, 1.2]), ({"mean_val_bpb": 1.1}, [1.1]),
             ({"val_bpb": 1.0, "seed_results": {"1": {"val_bpb": 1.3}, "2": {"val_bpb": 1.4}}}, [1.3,
                                                                                                 1.4])]  # fmt: skip
    for data, want in forms:
        path.write_text(json.dumps(data))
        assert read_baseline(path).val_bpb == want
    for text in ("[]", "{}", "{"):
        path.write_text(text)
        with pytest.raises(ToolError):
            read_baseline(path)


def test_readme_commands() -> None:
    """Continued lines, exports and quotes are read; other blocks are not commands."""
    page = ("```\nexport A_PATH=x\nSEED=1 NAME='a b' \\\n  LAST=3 torchrun --nproc_per_node=8 train_gpt.py\n```\n"
            "```python\nFOO = 1\n```\n```\nMODEL=1\nval_bpb:1\n```\n")
    assert files.command_variables(page) == ["A_PATH", "SEED", "NAME", "LAST"]


def test_names_read() -> None:
    """Of our script: every variable, and none that it does not take; of others: what they look up."""
    import train_gpt as t

    names = names_read(SCRIPT.read_text())
    assert {*t.Config.variables()} <= names and not {"PHASED_TTT_ENABLED", "LATE_QAT", "FOO"} & names
    assert {"SEED", "DATA_PATH"} <= names_read(FOREIGN)


@pytest.mark.parametrize("compress", [lzma.compress, lambda raw: zlib.compress(raw, 9), lambda raw: lzma.compress(
    raw, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])], ids=["xz", "zlib", "raw lzma2"])  # fmt: skip
@pytest.mark.parametrize("encode", [base64.b85encode, base64.b64encode], ids=["b85", "b64"])
def test_unpacked(compress: Callable[[bytes], bytes], encode: Callable[[bytes], bytes]) -> None:
    """The usual wrappers are opened without being run."""
    source = "".join(f"name_{i} = {i * i}\n" for i in range(200))
    wrapper = f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({encode(compress(source.encode()))!r})))"
    assert unpacked(wrapper) == source and unpacked(source) is None and unpacked("def f(:") is None


def test_table(submission: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
               monkeypatch: pytest.MonkeyPatch) -> None:
    """The board lists the folder, best first; folders without a score are named."""
    root = tmp_path / "records"
    for name, bpb in (("2026-01-02_Worse", 9.5), ("2026-01-03_Best", 0.9)):
        shutil.copytree(submission, root / "track_10min_16mb" / name)
        claim(val_bpb=bpb, name=name)(root / "track_10min_16mb" / name)
    (root / "track_10min_16mb" / "2026-01-04_Empty").mkdir()
    assert main(["table", "--root", str(root), "--markdown"]) == 0
    board = capsys.readouterr().out
    assert board.index("0.9000") < board.index("9.5000")
    assert "[2026-01-03_Best](track_10min_16mb/2026-01-03_Best/README.md)" in board
    assert "not on the board: track_10min_16mb/2026-01-04_Empty: no submission.json, and no log with a score" in board
    assert main(["table", "--root", str(root), "--track", "10min_16mb"]) == 0 and "0.9000" in capsys.readouterr().out
    nothing = dict.fromkeys(("val_bpb", "seeds", "seed_results", "date", "bytes_total", "artifact_bytes_max"))
    claim(**nothing, name="x" * 99)(root / "track_10min_16mb/2026-01-02_Worse")
    assert main(["table", "--root", str(root)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "x" * 99 in line]  # whole in a pipe
    monkeypatch.setattr(leaderboard, "WIDTH_OF_A_PIPE", 80)
    claim(name="[bold] of Differential Payloads")(root / "track_10min_16mb/2026-01-03_Best")
    assert main(["table", "--root", str(root)]) == 0
    words = capsys.readouterr().out.split()
    assert {"[bold]", "Differential", "Payloads,"} <= {*words} and "author" in words  # whole words in a narrow terminal
    runs = [read_run(log) for log in submission.glob("*.log")]
    told = f"{np.mean([run.score.val_bpb for run in runs]):.4f}", f"{max(run.total_bytes for run in runs):,}"
    assert all(text in line for text in told)


def test_a_reference_rate_is_stored() -> None:
    """Of 11 layers on one of eight H100s, so that a slow pod is seen before the first own run."""
    import train_gpt as t

    cfg = t.Config.from_env({"MLP_MULT": "3", "NUM_LOOPS": "0", "QK_GAIN_INIT": "1.5", "TRAIN_BATCH_TOKENS": "98304"})
    keys = [doctor.rate_key(cfg, "NVIDIA H100 80GB HBM3", attention) for attention in ("flash", "fa4")]
    assert sorted(keys) == sorted(json.loads(doctor.RATES.read_text()))
    assert doctor.rate_key(t.replace(cfg, num_layers=9), "x", "fa4") != doctor.rate_key(cfg, "x", "fa4")


@pytest.mark.parametrize(("taken", "device", "is_told"), [
    ("flash", "cuda", True), ("fa4", "cuda", False), ("math", "cpu", False),
])  # fmt: skip
def test_doctor_says_how_attention_would_be_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str, device: str, is_told: bool
) -> None:
    """Only where a GPU has neither FlashAttention 3 nor 4; the other kernels need nothing."""
    import train_gpt as t

    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    Path("logs/d.txt").write_text(f"attn_backend:{taken} head_dim:64\nlayer_backend:triton head_dim:64\n")
    monkeypatch.setattr(t, "choose_back_end", lambda *_: None)
    run = SimpleNamespace(cfg=t.Config.from_env({"RUN_ID": "d"}), ranks=SimpleNamespace(device=torch.device(device)))
    attention, layer = doctor.back_ends(t, run)
    assert attention.status == layer.status == "pass" and ("requirements-gpu.txt" in attention.message) == is_told
    assert "requirements" not in layer.message


def test_leaky_shards() -> None:
    """By their number, or by their size where the data are the official ones."""
    assert is_leaky(1499, 0, "") and is_leaky(1480, 10**10, "x") and is_leaky(1100, 10**9, "x")
    assert not is_leaky(1499, 10**11, "x")
    assert is_leaky(5, 5 * 10**7, "fineweb10B_sp1024") and not is_leaky(5, 5 * 10**7, "demo")
    assert not is_leaky(80, 8 * 10**9, "fineweb10B_sp1024") and not is_leaky(1, 10**6, "fineweb10B_sp1024")


def test_a_forecast_gives_each_phase_its_part_of_the_clock() -> None:
    """Half of 600 s at 50 ms and half at 100 are 9,000 steps."""
    assert doctor.Measured([50.0, 100.0], [0.5, 0.5], 0.0).rate == pytest.approx(600_000 / 9000)


@pytest.mark.usefixtures("at_work")
def test_doctor(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is looked at and nothing is left behind; a wrong value or missing data fails with the remedy."""
    monkeypatch.chdir(tmp_path)
    rates = tmp_path.parent / f"{tmp_path.name}.rates.json"
    monkeypatch.setattr(doctor, "RATES", rates)
    assert main(["doctor", "--steps", "1", "--ranks", "2", "--save-rate"]) == 0
    said = capsys.readouterr().out
    names = ("python", "package torch", "configuration", "disk", "attention", "layer", "train shards",
             "outputs", "tokenizer", "train/val overlap", "artifact size", "forecast")  # fmt: skip
    assert all(f"pass {name}: " in said for name in names)
    assert "0 failed" in said and not list(tmp_path.iterdir())
    rates.write_text(json.dumps(dict.fromkeys(json.loads(rates.read_text()), 1e-3)))
    limited = ["doctor", "--steps", "1", "--ranks", "2", "--", "ITERATIONS=99999", "MAX_WALLCLOCK_SECONDS=60"]
    assert main(limited) == 1
    said = capsys.readouterr().out
    assert "a slow machine" in said and (found := re.search(r"(\d+) steps in 60 s, ([\d.]+) of them for", said))
    assert 0 < int(found[1]) < 99999 and 1 <= float(found[2]) < 60, "the reserve is at least a second"
    assert main([*limited[:-1], "MAX_WALLCLOCK_SECONDS=0.1"]) == 1
    assert "nothing is left to train" in capsys.readouterr().out
    loops = ["NUM_LOOPS=1", "LOOP_START=0", "LOOP_END=0"]
    assert main(["doctor", "--steps", "1", "--ranks", "2", "--", *loops]) == 0
    assert re.search(r"pass forecast: [\d.]+, then [\d.]+ ms per step", capsys.readouterr().out)
    assert main(["doctor", "--", "DOC_ATTENTION=1"]) == 0 and "pass attention: math " in capsys.readouterr().out
    assert main(["doctor", "--", "MODEL_DIM=33"]) == 1 and "MODEL_DIM=33 is not divisible" in capsys.readouterr().out
    assert main(["doctor", "--", "DATA_PATH=nowhere"]) == 1 and "DATA_PATH=" in capsys.readouterr().out
    assert main(["doctor", "--", "nonsense"]) == 1 and "KEY=value" in capsys.readouterr().err


@pytest.mark.usefixtures("at_work")
def test_doctor_compares_what_is_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The data of an artifact that is to be scored, and files of an earlier run."""
    scored = ["doctor", "--", "EVAL_ONLY=1", "ARTIFACT_PATH=logs/tiny_seed42.pgolf"]
    main(scored)
    assert re.search(r"pass artifact: \S+/tiny_seed42.pgolf was made with this tokenizer", capsys.readouterr().out)
    shutil.copytree(os.environ["DATA_PATH"], tmp_path / "cut")
    shard = tmp_path / "cut/fineweb_val_000000.bin"
    write_shard(shard, np.frombuffer(shard.read_bytes()[1024:], "<u2")[:-500])
    assert main([*scored, f"DATA_PATH={tmp_path / 'cut'}"]) == 1
    assert re.search(r"fail artifact: \S+/tiny_seed42.pgolf belongs to other data: VAL_SHA256", capsys.readouterr().out)
    assert main(["doctor", "--", "RUN_ID=tiny_seed42"]) == 1
    assert "fail outputs: RUN_ID=" in capsys.readouterr().out


@pytest.mark.parametrize("leak", [False, True])
def test_overlap(tmp_path: Path, leak: bool) -> None:
    """Validation documents in a later training shard are found at any offset; other text is not."""
    import train_gpt as t

    rng = np.random.default_rng(0)
    val = np.concatenate([np.append(1, rng.integers(3, 500, size=n)) for n in (700, 64, 40, 900)])
    shards = [rng.integers(3, 500, size=5000), rng.integers(3, 500, size=3000)]
    if leak:
        shards[1] = np.concatenate([shards[1][:777], val, shards[1][777:]])
    for i, shard in enumerate(shards):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", shard)
    cfg = t.Config.from_env({"DATA_PATH": str(tmp_path)})
    result = overlap.overlap(t.TokenStream(cfg, "train"), val, bos_id=1)
    assert result.status == ("fail" if leak else "pass"), result.message


def test_every_shard_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the sample is the beginning of the stream, the rest the beginnings of the later shards."""
    import train_gpt as t

    for i, shard in enumerate(np.arange(3, 6003).reshape(3, 2000)):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", shard)
    monkeypatch.setattr(overlap, "SAMPLE_TOKENS", 3000)
    cfg = t.Config.from_env({"DATA_PATH": str(tmp_path), "VOCAB_SIZE": "8192"})
    parts = overlap.samples(t.TokenStream(cfg, "train"))
    assert [(part[0], len(part)) for part in parts] == [(3, 1500), (2003, 500), (4003, 500)]


def test_official_tokenizer_is_not_shipped(submission: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and data: the same name on another corpus is another tokenizer."""
    monkeypatch.chdir(workplace)
    source = submission_runs.read_source(Path("logs/tiny_seed42"))
    source.run.values["tokenizer_path"] = "data/tokenizers/fineweb_1024_bpe.model"
    assert submission_runs.tokenizer_to_ship(source) is not None
    source.text.counts["val_tokens"] = 62_021_846
    assert submission_runs.tokenizer_to_ship(source) is None
