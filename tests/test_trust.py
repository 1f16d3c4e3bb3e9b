"""What must not be silently wrong or lost: shards with another tokenizer, two runs with one name, outputs that fail."""

import errno
import json
import os
import pty
import pydoc_data.topics
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import VOCAB, tiny_config, tiny_env, tiny_model, write_shard

import train_gpt as t

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
QUICK = {"ITERATIONS": 3, "WARMUP_STEPS": 0, "GPTQ_ENABLED": 0, "EVAL_STRIDE": 0, "SHORT_SEQ_LEN": 0}
TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())]


def environment(corpus: dict[str, str], **changes: object) -> dict[str, str]:
    """Of a subprocess that trains three steps; nothing else of this process's variables but where programs are."""
    outside = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
    return {**outside, "OMP_NUM_THREADS": "1", **tiny_env(**{**corpus, **QUICK, **changes})}


def train(folder: Path, env: dict[str, str], **streams: object) -> subprocess.CompletedProcess[str]:
    """A run in `folder`, with its output captured where `streams` says nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([sys.executable, str(SCRIPT)], cwd=folder, env=env, text=True, timeout=110, **streams)


# Shards and tokenizer


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many pieces as the corpus' tokenizer and the same special ids, from other text."""
    path = tmp_path_factory.mktemp("other") / "other"
    words = [" ".join(reversed(line.split())) for text in TEXTS[::3] for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(path), vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
        character_coverage=0.9999, add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return path.with_suffix(".model")


def data_folder(folder: Path, tokenizer: Path, texts: list[str], noted: str = "") -> dict[str, str]:
    """Variables of a set of `texts`, whose shards note a tokenizer's hash."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = np.concatenate([[1, *pieces.encode(text)] for text in texts])
    folder.mkdir()
    for split in ("train", "val"):
        path = folder / f"fineweb_{split}_000000.bin"
        write_shard(path, tokens)
        blob = bytearray(path.read_bytes())
        blob[12:44] = bytes.fromhex(noted) if noted else bytes(32)
        path.write_bytes(blob)
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(tokenizer)}


def load(**variables: object) -> t.ValidationSet:
    with t.Runtime.start(tiny_config(**variables), {}) as run:
        return t.load_validation(run)


@pytest.mark.parametrize("documents", [1, 5], ids=["one document", "five documents"])
def test_another_tokenizer_of_the_same_size_is_refused(
    in_tmp: Path, corpus: dict[str, str], other_tokenizer: Path, documents: int
) -> None:
    """Both ways round; the right one passes, and says what it compared."""
    tokenizers = [Path(corpus["TOKENIZER_PATH"]), other_tokenizer]
    for number, (right, wrong) in enumerate([tokenizers, tokenizers[::-1]]):
        paths = data_folder(in_tmp / f"set{number}", right, TEXTS[:documents])
        assert load(**paths, RUN_ID="right").targets > 100
        log = Path("logs/right.txt").read_text()
        assert re.search(rf"bytes exact on {documents} documents, (99|100)\.\d+% of \d+ tokens the same", log)
        with pytest.raises(t.UserError, match=r"TOKENIZER_PATH=.*not the tokenizer of these shards"):
            load(**paths | {"TOKENIZER_PATH": str(wrong)}, RUN_ID="wrong")


def test_bytes_that_happen_to_be_right_do_not_save_a_wrong_tokenizer(in_tmp: Path, corpus: dict[str, str]) -> None:
    """Two pieces of equal length change places: every byte count stays, only the text is another one."""
    table = t.ByteTable(Path(corpus["TOKENIZER_PATH"]), VOCAB)
    tokens = np.concatenate([[1, *table.pieces.encode(text)] for text in TEXTS[:4]])
    common = [token for token in np.bincount(tokens).argsort()[::-1] if table.base[token] == 1 and token > 3][:40]
    swapped = np.arange(VOCAB)
    swapped[common] = np.roll(common, 1)
    with pytest.raises(t.UserError, match="come again when their text is encoded"):
        table.self_test(swapped[tokens], None)


@pytest.mark.parametrize(("vocab", "pieces"), [(600, VOCAB), (500, VOCAB)])
def test_a_vocabulary_of_another_size_is_refused(in_tmp: Path, corpus: dict[str, str], vocab: int, pieces: int) -> None:
    with pytest.raises(t.UserError, match=f"TOKENIZER_PATH=.* has {pieces} pieces but VOCAB_SIZE={vocab}"):
        load(**corpus, VOCAB_SIZE=vocab)


def test_a_shard_that_names_its_tokenizer_is_compared(in_tmp: Path, corpus: dict[str, str]) -> None:
    """Validation and training shards; the hash of the file itself passes, zeros say nothing."""
    tokenizer = Path(corpus["TOKENIZER_PATH"])
    own = t.ByteTable(tokenizer, VOCAB).sha256
    for name, noted in {"own": own, "none": ""}.items():
        load(**data_folder(in_tmp / name, tokenizer, TEXTS[:3], noted), RUN_ID=name)
    paths = data_folder(in_tmp / "foreign", tokenizer, TEXTS[:3], "ab" * 32)
    with pytest.raises(t.UserError, match=r"fineweb_val_000000.bin was built with another tokenizer, sha256 abab"):
        load(**paths, RUN_ID="foreign")
    good = Path(data_folder(in_tmp / "good", tokenizer, TEXTS[:3])["DATA_PATH"], "fineweb_val_000000.bin")
    Path(paths["DATA_PATH"], good.name).write_bytes(good.read_bytes())
    with t.Runtime.start(tiny_config(**paths, RUN_ID="train"), {}) as run:
        validation = t.load_validation(run)
        with pytest.raises(t.UserError, match=r"fineweb_train_000000.bin was built with another tokenizer"):
            t.produce_artifact(run, validation)


def test_an_official_set_has_its_official_bytes(
    in_tmp: Path, corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of tokens says which set it is; other bytes mean a damaged sidecar, table or download."""
    count, total = 4003, int(load(**corpus).token_bytes.sum())
    monkeypatch.setattr(t, "OFFICIAL_SETS", {count: ("sp512", total)})
    load(**corpus, RUN_ID="official")
    assert f"val_bytes: {total} (sp512;" in Path("logs/official.txt").read_text()
    monkeypatch.setattr(t, "OFFICIAL_SETS", {count: ("sp512", total + 2)})
    with pytest.raises(t.UserError, match=f"{total} bytes in {count} tokens; sp512 has {total + 2}"):
        load(**corpus, RUN_ID="damaged")


STRAYS = ["fineweb_val_000000 (1).bin", "fineweb_val_000000.old.bin", "fineweb_val_000002.bin", "fineweb_val_1.bin",
          "fineweb_val_000000.bin.tmp"]  # fmt: skip


@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_shard_or_a_gap_is_refused(in_tmp: Path, corpus: dict[str, str], name: str) -> None:
    """A copy would count its documents twice."""
    paths = data_folder(in_tmp / "data", Path(corpus["TOKENIZER_PATH"]), TEXTS[:2])
    shard = Path(paths["DATA_PATH"], "fineweb_val_000000.bin")
    shard.with_name(name).write_bytes(shard.read_bytes())
    with pytest.raises(t.UserError, match=re.escape(name)):
        load(**paths)


def test_a_shard_that_shrinks_ends_in_a_message(in_tmp: Path, corpus: dict[str, str]) -> None:
    """A mapped file would end the process by SIGBUS."""
    paths = data_folder(in_tmp / "data", Path(corpus["TOKENIZER_PATH"]), TEXTS[:2])
    stream = t.TokenStream(tiny_config(**paths), "train")
    os.truncate(Path(paths["DATA_PATH"], "fineweb_train_000000.bin"), 2000)
    with pytest.raises(t.UserError, match=r"fineweb_train_000000.bin: has become shorter"):
        stream.read(stream.total - 50, 40)


# A run owns its files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]) -> Path:
    """Folder of a finished run, RUN_ID=one."""
    folder = tmp_path_factory.mktemp("finished")
    result = train(folder, environment(corpus, RUN_ID="one"))
    assert result.returncode == 0, result.stderr
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes, but for locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


BLOCKED = {
    "the same name": ({"RUN_ID": "one"}, "RUN_ID=one"),
    "its artifact": ({"RUN_ID": "two", "ARTIFACT_PATH": "logs/one.pgolf"}, "ARTIFACT_PATH=logs/one.pgolf"),
    "its weights": ({"RUN_ID": "two", "WEIGHTS_PATH": "logs/one.weights.pt"}, "WEIGHTS_PATH=logs/one.weights.pt"),
    "its artifact, exported again": ({"RUN_ID": "two", "EXPORT_ONLY": 1, "WEIGHTS_PATH": "logs/one.weights.pt",
                                      "ARTIFACT_PATH": "logs/one.pgolf", "MATRIX_BITS": 5}, "ARTIFACT_PATH="),
    "a bad tokenizer": ({"RUN_ID": "two", "TOKENIZER_PATH": "/nope"}, "TOKENIZER_PATH=/nope"),
    "the script for an artifact": ({"RUN_ID": "two", "ARTIFACT_PATH": "logs/one.py", "OVERWRITE": 1}, "logs/one.py: not a"),
    "one path for two files": ({"RUN_ID": "two", "ARTIFACT_PATH": "./logs/../x", "WEIGHTS_PATH": "x"}, "one file for two"),
    "its log for an artifact": ({"RUN_ID": "two", "ARTIFACT_PATH": "logs/two.jsonl"}, "logs/two.jsonl WEIGHTS_PATH="),
    "a seed log for weights": ({"RUN_ID": "two", "WEIGHTS_PATH": "train.log"}, "WEIGHTS_PATH=train.log: one file for two"),
    "a folder for an artifact": ({"RUN_ID": "two", "ARTIFACT_PATH": "logs"}, "ARTIFACT_PATH=logs: cannot be written"),
    "a slash in the name": ({"RUN_ID": "a/../one"}, "RUN_ID='a/../one'"),
    "a long name": ({"RUN_ID": "x" * 300}, "at most 200 bytes"),
    "no checkpoint to resume": ({"RUN_ID": "two", "RESUME": 1}, "WEIGHTS_PATH=logs/two.weights.pt: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKED)
def test_starting_a_run_destroys_nothing(
    finished: Path, corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Refused in one line, and every file of the finished run is as it was."""
    changes, message = BLOCKED[name]
    monkeypatch.chdir(finished)
    before = {path: blob for path, blob in contents(finished).items() if "two" not in path}
    with pytest.raises(t.UserError, match=re.escape(message)):
        cfg = t.Config.from_env(tiny_env(**{**corpus, **QUICK, **changes}))
        with t.Runtime.start(cfg, {}) as run:
            t.produce_artifact(run, t.load_validation(run))
    after = contents(finished)
    assert {path: after.get(path) for path in before} == before


def test_overwrite_replaces_what_a_run_left(finished: Path, corpus: dict[str, str], tmp_path: Path) -> None:
    """And a failed start leaves nothing that stands in the way of the next one."""
    for path, blob in contents(finished).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(blob)
    result = train(tmp_path, environment(corpus, RUN_ID="one", OVERWRITE=1, SEED=7))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "logs/one.pgolf").read_bytes() != (finished / "logs/one.pgolf").read_bytes()
    assert "seed:7" in (tmp_path / "logs/one.txt").read_text()
    assert (tmp_path / "train_seed1337.log").read_bytes() == (finished / "train_seed1337.log").read_bytes()
    for tokenizer, status in (("/nope", 1), (corpus["TOKENIZER_PATH"], 0)):
        assert train(tmp_path, environment(corpus, RUN_ID="new", TOKENIZER_PATH=tokenizer)).returncode == status


@pytest.mark.parametrize("second", [{"RUN_ID": "a"}, {"RUN_ID": "b", "ARTIFACT_PATH": "logs/a.pgolf"},
                                    {"RUN_ID": "b", "WEIGHTS_PATH": "sub/../logs/a.weights.pt"},
                                    {"RUN_ID": "b", "WEIGHTS_PATH": "link.pt"}],
                         ids=["name", "artifact", "weights", "link"])  # fmt: skip
def test_two_runs_never_share_a_file(in_tmp: Path, corpus: dict[str, str], second: dict[str, str]) -> None:
    """The second one ends at once and names the first; when that has ended its locks are gone."""
    Path("sub").mkdir()
    Path("link.pt").symlink_to("logs/a.weights.pt")
    with t.Runtime.start(tiny_config(**corpus, RUN_ID="a"), {}) as first:
        first.log("step of the first")
        with pytest.raises(t.UserError, match=rf"process {os.getpid()} on .*RUN_ID=a, writes it now"):
            t.Claim(tiny_config(**corpus, **second))
        assert "step of the first" in Path("logs/a.txt").read_text()
    assert not list(in_tmp.rglob("*.lock"))
    t.Claim(tiny_config(**corpus, **second, OVERWRITE=1)).release()


def test_a_lock_ends_with_its_process(in_tmp: Path, corpus: dict[str, str]) -> None:
    """The file that a killed run leaves stands in nobody's way."""
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import train_gpt as t; from conftest import tiny_config; import os\n" \
           "claim = t.Claim(tiny_config(RUN_ID='a')); os.kill(os.getpid(), 9)"  # fmt: skip
    places = [str(SCRIPT.parent), str(Path(__file__).parent)]
    assert subprocess.run([sys.executable, "-c", code, *places]).returncode == -signal.SIGKILL
    assert list(in_tmp.rglob("*.lock"))
    t.Claim(tiny_config(**corpus, RUN_ID="a")).release()


def test_an_artifact_that_was_replaced_is_not_scored(in_tmp: Path, corpus: dict[str, str], finished: Path) -> None:
    """A run that reads back another artifact than its own would print another one's score."""
    with t.Runtime.start(tiny_config(**corpus, **QUICK, RUN_ID="mine"), {}) as run:
        validation = t.load_validation(run)
        produced = t.produce_artifact(run, validation)
        produced.path.write_bytes((finished / "logs/one.pgolf").read_bytes()[:-1] + b"x")
        with pytest.raises(t.UserError, match="another process has replaced it"):
            t.evaluate_artifact(run, validation, produced)


def test_an_artifact_belongs_to_its_tokenizer_and_set(
    in_tmp: Path, corpus: dict[str, str], other_tokenizer: Path, finished: Path
) -> None:
    """EVAL_ONLY and EXPORT_ONLY with another one end in an error, whatever the other set's own checks say."""
    other = data_folder(in_tmp / "other", other_tokenizer, TEXTS[:4])
    more = data_folder(in_tmp / "more", Path(corpus["TOKENIZER_PATH"]), TEXTS[:4])
    eval_only = {"EVAL_ONLY": 1, "ARTIFACT_PATH": finished / "logs/one.pgolf", "EVAL_STRIDE": 0}
    export_only = {"EXPORT_ONLY": 1, "WEIGHTS_PATH": finished / "logs/one.weights.pt"}
    for number, (paths, mode, key) in enumerate([(other, eval_only, "TOKENIZER"), (other, export_only, "TOKENIZER"),
                                                 (more, eval_only, "validation set: VAL")]):  # fmt: skip
        cfg = t.load_architecture(tiny_config(**paths, **QUICK | mode, RUN_ID=f"r{number}"))
        message = rf"belongs to another tokenizer.*{key}_SHA256 was \w+, is \w+.*; set its TOKENIZER_PATH"
        with t.Runtime.start(cfg, {}) as run, pytest.raises(t.UserError, match=message):
            validation = t.load_validation(run)
            t.evaluate_artifact(run, validation, t.produce_artifact(run, validation))


# Outputs that fail


def scores(text: str) -> list[str]:
    return re.findall(r"(?m)^final_int6_roundtrip_exact .*$", text)


SINKS: dict[str, Callable[[], dict[str, object]]] = {
    "a full device": lambda: {"stdout": open("/dev/full", "w")},
    "both streams full": lambda: {"stdout": open("/dev/full", "w"), "stderr": open("/dev/full", "w")},
    "closed streams": lambda: {"stdout": None, "preexec_fn": lambda: (os.close(1), os.close(2))},
}


@pytest.mark.parametrize("name", SINKS)
def test_a_console_that_takes_nothing_ends_nothing(tmp_path: Path, corpus: dict[str, str], name: str) -> None:
    """Exit status 0, the artifact, and every line in the log, with one warning there."""
    result = train(tmp_path, environment(corpus, RUN_ID="r"), **SINKS[name]())
    log = (tmp_path / "logs/r.txt").read_text()
    assert result.returncode == 0 and (tmp_path / "logs/r.pgolf").exists() and len(scores(log)) == 1
    assert log.count("WARNING: the console takes no more lines") == (name != "closed streams")


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path, corpus: dict[str, str]) -> None:
    """`train_gpt.py | head -1`"""
    tmp_path.joinpath("work").mkdir()
    with subprocess.Popen([sys.executable, str(SCRIPT)], cwd=tmp_path / "work", env=environment(corpus, RUN_ID="r"),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(100) == 0 and process.stderr.read() == ""
    assert scores((tmp_path / "work/logs/r.txt").read_text())


def test_a_terminal_that_closes_ends_nothing(tmp_path: Path, corpus: dict[str, str]) -> None:
    """The kernel sends SIGHUP, and every write fails."""
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, str(SCRIPT)], environment(corpus, RUN_ID="r", ITERATIONS=40))
    seen = b""
    while b"step:5/40" not in seen:
        assert select.select([master], [], [], 60)[0], seen[-500:]
        seen += os.read(master, 10_000)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    log = (tmp_path / "logs/r.txt").read_text()
    assert "SIGHUP: the terminal is gone; the run goes on" in log and scores(log)


def test_a_console_without_unicode_ends_nothing(tmp_path: Path, corpus: dict[str, str]) -> None:
    folder = tmp_path / "ordner-\u00fc-\u4e2d"
    folder.mkdir()
    for path in Path(corpus["DATA_PATH"]).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    paths = {"DATA_PATH": folder, "TOKENIZER_PATH": folder / "tokenizer.model"}
    env = environment({k: str(v) for k, v in paths.items()}, RUN_ID="r") | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    result = train(tmp_path / "work", env)
    assert result.returncode == 0, result.stderr
    assert "\\xfc" in result.stdout and str(folder) in (tmp_path / "work/logs/r.txt").read_text()


def test_a_link_to_another_disk_stays(in_tmp: Path) -> None:
    """What is written to it lands where it leads."""
    Path("link").symlink_to("disk/file")
    t.atomic_write(Path("link"), b"blob", "WEIGHTS_PATH")
    assert Path("link").is_symlink() and Path("disk/file").read_bytes() == b"blob"


def test_folders_that_vanish_come_back(tmp_path: Path, corpus: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, artifact and the whole log are there in the end, although their folders went while it trained."""
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(**corpus, **QUICK, RUN_ID="r", WEIGHTS_PATH="w/r.pt", ARTIFACT_PATH="a/r.pgolf")
    with t.Runtime.start(cfg, {}) as run:
        validation = t.load_validation(run)
        for folder in ("w", "a", "logs"):
            os.rename(folder, f"gone-{folder}")
        t.evaluate_artifact(run, validation, t.produce_artifact(run, validation))
    assert Path("w/r.pt").exists() and Path("a/r.pgolf").exists()
    log = Path("logs/r.txt").read_text()
    assert log.startswith("source: ") and scores(log) and Path("logs/r.jsonl").read_text().count('"event": "config"') == 1
    assert Path("train_seed1337.log").read_text() == log


def test_an_artifact_that_cannot_be_written_lands_elsewhere(
    run: t.Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that has become a file is the one thing that nobody can write into, root neither."""
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    assert t.write_output(run, blocked / "x.pgolf", b"artifact", "ARTIFACT_PATH") == Path("logs/x.pgolf")
    assert Path("logs/x.pgolf").read_bytes() == b"artifact"
    assert re.search(rf"WARNING: ARTIFACT_PATH={blocked}/x.pgolf: \w+", capsys.readouterr().out)


def test_an_artifact_that_no_folder_takes_is_an_error_of_its_path(
    run: t.Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each folder is tried once; the error names the path that was asked for, not the last one tried."""
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    monkeypatch.setattr(t.tempfile, "tempdir", str(blocked))
    (tmp_path / "logs/x.pgolf").mkdir()  # and the weights would be there too
    with pytest.raises(t.UserError, match=rf"^ARTIFACT_PATH={blocked}/sub/x.pgolf: \w+"):
        t.write_output(run, blocked / "sub/x.pgolf", b"artifact", "ARTIFACT_PATH")
    tried = re.findall(r"WARNING: ARTIFACT_PATH=(\S+):", capsys.readouterr().out)
    assert tried == [f"{blocked}/sub/x.pgolf", "logs/x.pgolf", f"{blocked}/x.pgolf"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_log_file_that_fails_is_written_at_the_end(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One warning; the console and the other file get every line, and the file itself when there is room again."""
    log = t.Log(tiny_config(RUN_ID="full"), enabled=True)
    log.files["txt"].close()
    log.files["txt"] = open("/dev/full", "wb", buffering=0)
    for line in ("first", "second"):
        log(line)
    log.event("last")
    warning = "WARNING: logs/full.txt: No space left on device; its lines are kept in memory until the end"
    assert capsys.readouterr().out.splitlines() == [warning, "first", "second"]
    log.close(None)
    assert Path("logs/full.txt").read_text().splitlines() == ["first", warning, "second"]
    assert json.loads(Path("logs/full.jsonl").read_text()) == {"event": "last"}


def test_a_disk_that_stays_full_ends_nothing(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning for each log that cannot be written at the end, on the console, whose lines are kept as well."""

    def write_bytes(path: Path, data: bytes) -> None:
        view = memoryview(data)  # as the real one; the traceback keeps it
        raise OSError(errno.ENOSPC, "No space left on device", len(view))

    log = t.Log(tiny_config(RUN_ID="full", SEED=3), enabled=True)
    log("a line")
    Path("logs/full.txt").unlink()
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    log.close(None)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in said[1:]] == [" log=logs/full.txt", " log=train_seed3.log"]


def test_a_failed_run_leaves_no_seed_log(in_tmp: Path, corpus: dict[str, str]) -> None:
    """What a submission ships is written when a run has ended well."""
    with pytest.raises(t.UserError), t.Runtime.start(tiny_config(**corpus), {}):
        raise t.UserError("an error")
    assert not list(in_tmp.glob("train*.log")) and "error: an error" in Path("logs/tiny.txt").read_text()


# Input from outside


LAUNCHES = {
    "RANK=3 alone": {"RANK": "3"}, "WORLD_SIZE=2 alone": {"WORLD_SIZE": "2"}, "LOCAL_RANK=0 alone": {"LOCAL_RANK": "0"},
    "a word": {"RANK": "one", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    "a negative rank": {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    "no port": {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": ""},
    "a word for a port": {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "http"},
    "a port too high": {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "65536"},
    "a rank beyond the world": {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    "an empty world": {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_half_set_launch_is_refused(name: str) -> None:
    """The message has every variable that is there, and the way out."""
    with pytest.raises(t.UserError, match="torchrun sets all of them; unset them") as caught:
        t.Ranks.start(tiny_config(), LAUNCHES[name])
    assert any(f"{key}=" in str(caught.value) for key in LAUNCHES[name])
    assert t.is_first_to_fail(LAUNCHES[name])


@pytest.mark.parametrize("env", [{}, {"RANK": "", "WORLD_SIZE": " ", "LOCAL_RANK": ""}, {"MASTER_PORT": "abc"},
                                 {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": ""}])  # fmt: skip
def test_no_launch_is_a_world_of_one(env: dict[str, str]) -> None:
    assert t.launch_numbers(env) == (0, 1, 0)


def test_seeds_beyond_the_generators_are_refused() -> None:
    assert tiny_config(SEED=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(t.UserError, match=f"SEED={2**64}"):
        tiny_config(SEED=2**64)


BAD_WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda blob: blob[: len(blob) // 2],
    "text": lambda blob: b"these are no weights\n" * 100,
    "empty": lambda blob: b"",
    "one byte changed in its directory": lambda blob: blob[:-50] + bytes([blob[-50] ^ 255]) + blob[-49:],
    "an artifact": lambda blob: b"PGOLF\x01" + blob[:1000],
}


@pytest.mark.parametrize("name", [*BAD_WEIGHTS, "a list", "another model", "a tensor missing"])
def test_weights_that_are_none_are_refused(run: t.Runtime, finished: Path, name: str) -> None:
    path, good = Path("bad.pt"), finished / "logs/one.weights.pt"
    saved = torch.load(good, weights_only=True)
    if name in BAD_WEIGHTS:
        path.write_bytes(BAD_WEIGHTS[name](good.read_bytes()))
    elif name == "a tensor missing":
        torch.save({**saved, "raw": {n: w for n, w in saved["raw"].items() if n != "banks.up"}}, path)
    else:
        torch.save([1, 2] if name == "a list" else {"state_dict": saved["raw"]}, path)
    run = replace(run, cfg=replace(run.cfg, weights_path=str(path)))
    with pytest.raises(t.UserError, match=r"WEIGHTS_PATH=bad\.pt"):
        t.read_weights(run, tiny_model(), t.load_validation(run))


def test_a_folder_that_cannot_be_written_is_one_line(in_tmp: Path, corpus: dict[str, str]) -> None:
    Path("logs").write_text("a file where the folder should be")
    with pytest.raises(t.UserError, match="RUN_ID=logs/tiny.txt: cannot be written"):
        t.Claim(tiny_config(**corpus))


RECIPES = {
    "a byte order mark": (b"\xef\xbb\xbfMATRIX_LR=0.5\n", {"MATRIX_LR": "0.5"}),
    "quotes and comments": (b"A='x # y'  # z\nB=\"q\"\n # c\nC=1#2\nD = 3\t# e\nE=\n",
                            {"A": "x # y", "B": "q", "C": "1#2", "D": "3", "E": ""}),
    "Windows lines": (b"A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
    "UTF-16": ("A=1\n".encode("utf-16"), "not UTF-8"),
    "latin-1": ("# f\u00fcr uns\nA=1\n".encode("latin-1"), "not UTF-8"),
    "a key twice": (b"A=1\nB=2\nA=1\n", ":3: A is set twice"),
    "a recipe in it": (b"RECIPE=other.env\n", "RECIPE cannot stand in a recipe"),
    "no value": (b"A\n", "expected KEY=value"),
    "an open quote": (b"A='x\n", "expected KEY=value"),
    "a key that is none": (b"export A=1\n", "expected KEY=value"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_read_as_they_are_meant_or_refused(tmp_path: Path, name: str) -> None:
    path, (blob, meant) = tmp_path / "r.env", RECIPES[name]
    path.write_bytes(blob)
    if isinstance(meant, dict):
        assert t.read_recipe(path) == meant
        return
    with pytest.raises(t.UserError, match=re.escape(meant)) as caught:
        t.read_recipe(path)
    assert str(path) in str(caught.value)


# What the command line of PR #1855 sets and this script does not know.
FOREIGN = """CASEOPS_ENABLED=1 PHASED_TTT_ENABLED=1 PHASED_TTT_PREFIX_DOCS=2500 PHASED_TTT_NUM_PHASES=3 MLP_CLIP_SIGMAS=11.5
ATTN_CLIP_SIGMAS=13.0 GLOBAL_TTT_MOMENTUM=0.9 GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1
GATE_WINDOW=12 LQER_ENABLED=1 LQER_ASYM_ENABLED=1 LQER_RANK=4 LQER_FACTOR_BITS=4 LQER_ASYM_GROUP=64 LQER_TOP_K=3
FUSED_CE_ENABLED=1""".split()


def test_all_unknown_variables_are_named_at_once() -> None:
    """Only those; and a suggestion is near in spelling or the beginning of a name."""
    env = dict(word.split("=") for word in FOREIGN)
    known = {"VOCAB_SIZE": "8192", "BETA2": "0.99", "NCCL_NET": "Socket", "WANDB_MODE": "off", "EDITOR": "vi"}
    with pytest.raises(t.UserError) as caught:
        t.Config.from_env({**known, **env, "MATRX_LR": "1"})
    message = str(caught.value)
    assert all(f"{name}={value}" in message for name, value in env.items())
    assert not any(f"{name}=" in message for name in known)
    assert re.findall(r"did you mean (.*?)\?", message) == ["MATRIX_LR"]


@pytest.mark.parametrize("name", ["NEW_THING_ENABLED", "X_BITS", "FOO_LR", "BAR_STEPS", "Q_DIM", "USE_INT6", "EVAL_X",
                                  "SW_EVAL_BATCH", "MTP_HEADS", "TEMP_SCALING", "SLOT_ROUNDS_FRAC"])  # fmt: skip
def test_nothing_that_looks_like_a_switch_passes(name: str) -> None:
    with pytest.raises(t.UserError, match=f"no such variable: {name}=1"):
        t.Config.from_env({name: "1"})
    t.Config.from_env({name: ""})  # empty is unset
