"""Nothing ends a data tool halfway or leaves something half done: consoles, signals, full disks, two builds at once."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))

import build_shards  # noqa: E402
import shards  # noqa: E402

TEXTS = [f"Document {i} about nothing in particular, with {i * 7919 % 1000} words." for i in range(400)]
SHELL_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(build_shards.train_tokenizer(TEXTS, 300, 10**6))
    return path


def lines_of(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@dataclasses.dataclass
class Builder:
    """build_shards.py in its own process; train documents come from a pipe, so that a test holds it where it likes."""

    folder: Path
    model: Path

    @property
    def dataset(self) -> Path:
        return self.folder / "out/datasets/d"

    def command(self, train: Path, *flags: str) -> list[str]:
        """The command line, with two validation documents."""
        val = self.folder / "val.jsonl"
        val.write_text(lines_of(["a validation text", "another one"]))
        return [sys.executable, str(DATA / "build_shards.py"), "--train", str(train), "--val", str(val), "--name", "d",
                "--out", str(self.folder / "out"), "--tokenizer", str(self.model), *flags]

    def start(self, *flags: str, **options: Any) -> tuple[subprocess.Popen[str], Any]:
        """A build that has written its validation shard and waits for train documents, and where to write them."""
        train = self.folder / "train.jsonl"
        train.unlink(missing_ok=True)
        os.mkfifo(train)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": plain_signals, **options}
        process = subprocess.Popen(self.command(train, "--workers", "1", *flags), **options)
        return process, open(train, "w")  # opening waits for the reader

    def run(self, *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """A whole build of all documents."""
        train = self.folder / "whole.jsonl"
        train.write_text(lines_of(TEXTS))
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.run(self.command(train, "--workers", "1", *flags), timeout=60, **options)

    def hidden(self) -> list[str]:
        """What a build has left beside its dataset."""
        return sorted(path.name for path in self.dataset.parent.glob(".*"))


def plain_signals() -> None:
    """A shell's background jobs begin with SIGINT ignored, and so would the tools of tests that run in one."""
    for number in SHELL_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def builder(tmp_path: Path, model: Path) -> Builder:
    """A builder with a folder of its own."""
    return Builder(tmp_path, model)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def waits(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within some seconds."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# ----------------------------------------------------------------------------------------------------------- consoles


def into_full_disk(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    with open("/dev/full", "w") as full:
        return subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, **options)


def into_closed_pipe(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A reader that is gone, as that of `| head` is."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, **options)
    finally:
        os.close(write)


def into_nothing(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Neither standard output nor error are open: the next files would take their numbers."""
    both = ["bash", "-c", '"$@" >&- 2>&-', "bash", *command]
    return subprocess.run(both, capture_output=True, text=True, timeout=60, **options)


def all_full(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Not even the warning can be printed."""
    both = ["bash", "-c", '"$@" > /dev/full 2>&1', "bash", *command]
    return subprocess.run(both, capture_output=True, text=True, timeout=60, **options)


CONSOLES = {into_full_disk: "warning: standard output is lost ([Errno 28] No space left on device); going on without it\n",
            into_closed_pipe: "warning: standard output is lost ([Errno 32] Broken pipe); going on without it\n",
            into_nothing: "", all_full: ""}  # fmt: skip


@pytest.mark.parametrize("console", CONSOLES, ids=lambda console: console.__name__)
def test_a_lost_console_does_not_end_a_build(builder: Builder, console: Callable) -> None:
    """The build succeeds with the same shards, one warning and nothing else, however many lines it would print."""
    train = builder.folder / "train.jsonl"
    train.write_text(lines_of(TEXTS))
    assert builder.run("--shard-tokens", "500").stdout.count("\n") > 3
    whole = contents(builder.dataset)
    done = console(builder.command(train, "--workers", "2", "--shard-tokens", "500", "--overwrite"))
    assert (done.returncode, done.stderr) == (0, CONSOLES[console])
    assert contents(builder.dataset) == whole and len(whole) > 5


@pytest.mark.parametrize("console", CONSOLES, ids=lambda console: console.__name__)
def test_a_lost_console_does_not_end_the_demo_corpus(tmp_path: Path, console: Callable) -> None:
    done = console([sys.executable, str(DATA / "demo_corpus.py"), "--out", str(tmp_path), "--max-mb", "0.3"])
    assert (done.returncode, done.stderr) == (0, CONSOLES[console])
    assert sorted(contents(tmp_path)) == ["train.jsonl", "val.jsonl"]


@pytest.mark.parametrize("name", ["caf\u00e9", b"latin-\xe9".decode("utf-8", "surrogateescape")], ids=["utf-8", "latin-1"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_the_console_cannot_show(tmp_path: Path, model: Path, name: str, encoding: str) -> None:
    """They are printed as escapes, and stand in the manifest."""
    folder = tmp_path / name
    folder.mkdir()
    done = Builder(folder, model).run(env={**os.environ, "PYTHONIOENCODING": encoding})
    shown = name.encode(encoding, "backslashreplace").decode(encoding)
    assert done.returncode == 0 and not done.stderr
    assert f"DATA_PATH={tmp_path}/{shown}/out/datasets/d " in done.stdout
    manifest = json.loads((folder / "out/manifest.json").read_text(encoding="utf-8"))
    assert manifest["docs_meta"]["inputs"] == [str(folder / "val.jsonl"), str(folder / "whole.jsonl")]


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("older", [False, True])
def test_an_interrupted_build_leaves_nothing(builder: Builder, number: signal.Signals, older: bool) -> None:
    """No staging folder, no dataset; one that was there stays as it was, with --overwrite too."""
    before = {}
    if older:
        assert builder.run().returncode == 0
        before = contents(builder.dataset)
    process, train = builder.start("--overwrite")
    assert (builder.dataset.parent / ".d.building/fineweb_val_000000.bin").exists()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "interrupted; a dataset takes its place only when it is complete\n")
    assert builder.hidden() == [] and builder.dataset.exists() == older
    assert not older or contents(builder.dataset) == before


def test_a_closing_terminal_does_not_end_a_build(builder: Builder) -> None:
    """SIGHUP comes, standard output is gone, and the rest is built."""
    process, train = builder.start()
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    with train:
        train.write(lines_of(TEXTS))
    assert process.wait(timeout=60) == 0
    assert shards.count_documents(shards.list_shards(builder.dataset, "train")) == len(TEXTS)


def children_of(pid: int) -> list[int]:
    """Its living child processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_build(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers end with it, and the next build removes what it left."""
    process, train = builder.start("--workers", "2", stderr=subprocess.DEVNULL)
    with train:
        train.write(lines_of(TEXTS) * 90)  # more than a batch, so that workers have started
        train.flush()
        assert waits(lambda: len(children_of(process.pid)) > 0)
        workers = children_of(process.pid)
        process.kill()
        process.wait(timeout=60)
        assert waits(lambda: not any(map(is_alive, workers)))
    process.stdout.close()
    remnant = builder.dataset.parent / ".d.building"
    assert (remnant / "fineweb_val_000000.bin").exists()
    (remnant / "fineweb_train_000077.bin").write_bytes(b"of the killed build")
    assert builder.run().returncode == 0
    assert builder.hidden() == [] and "fineweb_train_000077.bin" not in contents(builder.dataset)


def test_two_builds_of_one_name(builder: Builder) -> None:
    """The second ends at once and disturbs nothing."""
    process, train = builder.start()
    second = builder.run("--overwrite")
    assert second.returncode == 1
    assert second.stderr == f"error: another build of {builder.dataset} is running, or was until now\n"
    with train:
        train.write(lines_of(TEXTS))
    process.communicate(timeout=60)
    assert process.returncode == 0 and builder.hidden() == []


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_interrupted_while_the_new_dataset_takes_its_place(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Before, between and after the two renames there is a whole dataset, the older or the new one."""
    assert builder.run().returncode == 0
    older, renames, replace = contents(builder.dataset), [], os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(source).name in ("d", ".d.building"):
            renames.append(source)
            if len(renames) == moment:
                raise KeyboardInterrupt
        replace(source, target)

    source = builder.folder / "new.jsonl"
    source.write_text(lines_of(TEXTS[:9]))
    monkeypatch.setattr(os, "replace", interrupted)
    status = build_shards.main(builder.command(source, "--workers", "1", "--overwrite")[2:])
    assert status == (0 if moment == 3 else 128 + signal.SIGINT)
    assert (contents(builder.dataset) == older) == (moment < 3)
    assert builder.hidden() == []


def test_what_a_kill_between_the_renames_leaves_is_put_back(builder: Builder) -> None:
    """Even if the next build fails."""
    assert builder.run().returncode == 0
    older = contents(builder.dataset)
    builder.dataset.rename(builder.dataset.with_name(".d.older"))
    assert builder.run().returncode == 1, "the folder is not empty"
    assert contents(builder.dataset) == older and builder.hidden() == []


# ---------------------------------------------------------------------------------------------------------- full disks


def small_files() -> None:
    """No file may grow beyond 3,000 bytes: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_leaves_older_data_alone(builder: Builder, workers: str) -> None:
    assert builder.run().returncode == 0
    before = contents(builder.dataset)
    done = builder.run("--overwrite", "--workers", workers, preexec_fn=small_files)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: [Errno 27] File too large") and "older data is untouched" in done.stderr
    assert contents(builder.dataset) == before and builder.hidden() == []


def test_a_manifest_that_cannot_be_written(builder: Builder, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards are there by then, and the message says so."""
    source = builder.folder / "train.jsonl"
    source.write_text(lines_of(TEXTS))

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_json", full)
    assert build_shards.main(builder.command(source, "--workers", "1")[2:]) == 1
    assert "the shards are complete, but" in capsys.readouterr().err
    assert len(shards.list_shards(builder.dataset, "train")) == 1


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test if a document is read."""
    def read(*_: Any) -> Iterator[str]:
        raise AssertionError("documents were read")

    monkeypatch.setattr(build_shards, "read_documents", read)
    yield


@pytest.mark.usefixtures("unread")
def test_what_would_fail_at_the_end_fails_at_the_start(builder: Builder, capsys: pytest.CaptureFixture[str]) -> None:
    """A manifest that is not JSON and another tokenizer of the same name are found before the hours of work."""
    out = builder.folder / "out"
    (out / "tokenizers").mkdir(parents=True)
    arguments = builder.command(builder.folder, "--workers", "1")[2:]
    (out / "manifest.json").write_text("{")
    assert build_shards.main(arguments) == 1
    assert "manifest.json: not JSON" in capsys.readouterr().err
    (out / "manifest.json").unlink()
    (out / "tokenizers/fineweb_300_bpe.model").write_bytes(b"another one")
    assert build_shards.main(arguments) == 1
    assert "another tokenizer that other shards may need" in capsys.readouterr().err
    assert builder.hidden() == []


def test_a_dataset_folder_on_another_disk(builder: Builder) -> None:
    """A link stays a link, and the shards lie where it points."""
    builder.dataset.parent.mkdir(parents=True)
    (builder.folder / "large").mkdir()
    builder.dataset.symlink_to(builder.folder / "large")
    for flags in ((), ("--overwrite",)):
        assert builder.run(*flags).returncode == 0
        assert builder.dataset.is_symlink() and len(shards.list_shards(builder.folder / "large", "train")) == 1
