"""Tests of data/: the downloader against a small hub on the loopback interface, shard builder and demo corpus."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import sentencepiece

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))

import build_shards  # noqa: E402
import demo_corpus  # noqa: E402
import shards  # noqa: E402

REPO = "someone/golf"
FOLDER = "datasets/datasets/fineweb10B_sp1024"
COMMIT = "0123456789" * 4


# ------------------------------------------------------------------------------------------------------- fake hub


def shard_bytes(ids: list[int], tokenizer: bytes | None = None) -> bytes:
    """A shard, spelled out here so that the format has a second witness; the tokenizer's hash is words 3 to 10."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    if tokenizer is not None:
        header[3:11] = np.frombuffer(hashlib.sha256(tokenizer).digest(), dtype="<i4")
    return header.tobytes() + np.array(ids, dtype="<u2").tobytes()


def manifest_bytes(name: str = "fineweb10B_sp1024", files_train: int = 3) -> bytes:
    """A manifest with one dataset."""
    return json.dumps({
        "version": "10B",
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model",
                        "vocab_path": "tokenizers/fineweb_1024_bpe.vocab"}],
        "datasets": [{"name": name, "tokenizer_name": "sp_bpe_1024", "path": f"datasets/{name}",
                      "stats": {"files_train": files_train, "files_val": 1}}],
    }).encode()


def official_files() -> dict[str, bytes]:
    """A repo with the official layout: three train shards, one of validation with two documents."""
    files = {f"{FOLDER}/fineweb_train_{i:06d}.bin": shard_bytes([1, 100 + i] * 500) for i in range(3)}
    files[f"{FOLDER}/fineweb_val_000000.bin"] = shard_bytes([1, 7, 8, 1, 9])
    files["datasets/tokenizers/fineweb_1024_bpe.model"] = b"model"
    files["datasets/tokenizers/fineweb_1024_bpe.vocab"] = b"vocab"
    files["datasets/manifest.json"] = manifest_bytes()
    return files


class Hub:
    """What the downloader needs of a hub; `before_get` hooks let a test misbehave."""

    def __init__(self) -> None:
        """Start serving on a free port."""
        self.files = official_files()
        self.failures: Counter[str] = Counter()  # path -> GETs still to be answered with 503
        self.stall: tuple[str, threading.Event] | None = None  # path whose second half waits for the event
        self.barrier: threading.Barrier | None = None  # shard GETs wait for one another
        self.gets: list[str] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """Routes to the hub object."""

            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:  # noqa: N802
                hub.answer(self, False)

            def do_GET(self) -> None:  # noqa: N802
                hub.answer(self, True)

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler, is_get: bool) -> None:
        """Serve a file, the file list, or the hub's kind of 404."""
        self.tokens.add(request.headers.get("Authorization"))
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        resolve, tree = f"/datasets/{REPO}/resolve/main/", f"/api/datasets/{REPO}/tree/main"
        name = path.removeprefix(resolve)
        if path.startswith(tree):
            listing = [{"type": "file", "path": key, "size": len(value), "oid": hashlib.sha1(value).hexdigest()}
                       for key, value in sorted(self.files.items())]
            self.send(request, 200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        elif not path.startswith(resolve):
            self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        elif name not in self.files:
            self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif is_get:
            self.serve(request, name)
        else:
            self.send(request, 200, self.files[name], self.file_headers(name), with_body=False)

    def file_headers(self, name: str) -> dict[str, str]:
        """Headers of a file that the client insists on."""
        etag = hashlib.sha256(self.files[name]).hexdigest()
        return {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}

    def serve(self, request: http.server.BaseHTTPRequestHandler, name: str) -> None:
        """Answer a GET of a file, as the test wants it."""
        self.gets.append(name)
        if self.failures[name] > 0:
            self.failures[name] -= 1
            self.send(request, 503, b"busy", {})
            return
        if self.barrier is not None and "fineweb_train" in name:
            self.barrier.wait(timeout=10)
        body, status, headers = self.files[name], 200, self.file_headers(name)
        span = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if span:
            headers["Content-Range"] = f"bytes {span.group(1)}-{len(body) - 1}/{len(body)}"
            body, status = body[int(span.group(1)):], 206
        self.send(request, status, body, headers, stall=self.stall if self.stall and self.stall[0] == name else None)

    @staticmethod
    def send(request: http.server.BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str],
             with_body: bool = True, stall: tuple[str, threading.Event] | None = None) -> None:
        """Write a response."""
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if not with_body or request.command == "HEAD":
            return
        half = len(body) // 2
        request.wfile.write(body[:half])
        if stall:
            request.wfile.flush()
            stall[1].wait(timeout=20)
        request.wfile.write(body[half:])

    def shard_gets(self) -> list[str]:
        """Shards whose contents were asked for so far."""
        return [name for name in self.gets if name.endswith(".bin")]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub for one test."""
    server = Hub()
    yield server
    server.server.shutdown()
    server.server.server_close()


@dataclasses.dataclass
class Client:
    """The downloader in its own process, with its own cache and data folder."""

    folder: Path
    endpoint: str

    @property
    def dataset(self) -> Path:
        """Where the shards of the usual variant land."""
        return self.folder / "data/datasets/fineweb10B_sp1024"

    def start(self, *arguments: str, stdout: Any = subprocess.PIPE, **env: str) -> subprocess.Popen[str]:
        """Start the script."""
        inherited = {key: value for key, value in os.environ.items()
                     if not key.startswith(("HF_", "MATCHED_")) and key not in ("DATA_DIR",)
                     and not key.lower().endswith("_proxy")}
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1",
                    "MATCHED_FINEWEB_REPO_ID": REPO, **env}
        command = [sys.executable, str(DATA / "cached_challenge_fineweb.py"), "--data-dir", str(self.folder / "data")]
        # A shell's background jobs begin with SIGINT ignored, and so would the script of tests that run in one.
        return subprocess.Popen([*command, *arguments], env={**inherited, **settings}, text=True,
                                stdout=stdout, stderr=subprocess.PIPE,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def run(self, *arguments: str, fails: bool = False, **env: str) -> str:
        """Run the script to its end; returns what it printed."""
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        assert process.returncode == (1 if fails else 0), out + err
        return out + err


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    """A client of the fake hub."""
    return Client(tmp_path, hub.url)


def contents(folder: Path) -> dict[str, bytes]:
    """Visible files of a folder and what they hold."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


# ----------------------------------------------------------------------------------------------------- downloader


def test_fresh_download_and_second_run(hub: Hub, client: Client) -> None:
    """Two of three train shards, val and tokenizer arrive; the second run asks for no contents, even offline."""
    out = client.run("2", HF_TOKEN="hf_secret")
    wanted = {Path(name).name: hub.files[name] for name in hub.files if name.startswith(FOLDER)}
    del wanted["fineweb_train_000002.bin"]
    assert contents(client.dataset) == wanted
    assert (client.folder / "data/tokenizers/fineweb_1024_bpe.model").read_bytes() == b"model"
    assert "fingerprint: train_shards: 2 val_tokens: 5 val_docs: 2" in out
    assert "warning: 2 validation documents instead of 50000" in out
    assert "Bearer hf_secret" in hub.tokens
    before = list(hub.gets)
    assert "already there" in client.run("--train-shards", "2")
    assert hub.gets == before
    assert "train_shards: 2" in client.run("--train-shards", "2", HF_HUB_OFFLINE="1")
    out = client.run("--train-shards", "2", HF_HUB_OFFLINE="1", HF_HOME=str(client.folder / "empty"))
    assert "train_shards: 2" in out and "manifest.someone--golf.json" in out


def test_default_count_takes_what_exists(client: Client) -> None:
    """Without a number a repo of fewer than 80 shards is fetched whole."""
    assert "train_shards: 3" in client.run()


def test_truncated_local_shard_is_fetched_again(hub: Hub, client: Client) -> None:
    """A cut local shard, cut in the cache too because they are one file, is fetched again; the others are not."""
    client.run("3")
    name = f"{FOLDER}/fineweb_train_000001.bin"
    with open(client.dataset / Path(name).name, "r+b") as file:
        file.truncate(1500)
    hub.gets.clear()
    client.run("3")
    assert hub.shard_gets() == [name]
    assert (client.dataset / Path(name).name).read_bytes() == hub.files[name]


def test_corrupt_shard_on_the_hub(hub: Hub, client: Client) -> None:
    """A shard that is bad at its source is fetched twice, reported, and never takes its final name."""
    name = f"{FOLDER}/fineweb_train_000001.bin"
    hub.files[name] = hub.files[name][:-2]
    out = client.run("3", fails=True)
    assert hub.shard_gets().count(name) == 2
    assert f"error: {name} is damaged in {REPO}" in out and "2024 bytes" not in out
    assert "3022 bytes, but its header promises 1000 tokens = 3024 bytes" in out
    assert sorted(contents(client.dataset)) == [f"fineweb_{rest}.bin" for rest in
                                                ("train_000000", "train_000002", "val_000000")]


def test_temporary_server_error(hub: Hub, client: Client) -> None:
    """A 503 is tried again and then succeeds; too many of them are an error that names the file."""
    name = f"{FOLDER}/fineweb_train_000000.bin"
    hub.failures[name] = 1
    out = client.run("1")
    assert "trying again" in out and "train_shards: 1" in out
    other = f"{FOLDER}/fineweb_train_000001.bin"
    hub.failures[other] = 9
    out = client.run("2", "--retries", "1", fails=True)
    assert hub.shard_gets().count(other) == 2
    assert f"error: fetching {other} of {REPO} failed" in out and "503" in out


@pytest.mark.parametrize("manifest", [b"[]", b'{"datasets": 3}', b'{"datasets": [{"path": "x"}]}', b"null", b"{",
                                      b'{"datasets": [{"name": "sp1024", "stats": {"files_train": "many"}}]}'])
def test_odd_manifests(hub: Hub, client: Client, manifest: bytes) -> None:
    """A manifest of another form gets one line, and --skip-manifest helps."""
    hub.files["datasets/manifest.json"] = manifest
    if manifest not in (b"null", b"[]"):
        assert "use --skip-manifest" in client.run("1", fails=True)
    assert "train_shards: 1" in client.run("1", "--skip-manifest")


def test_unknown_variant_lists_what_there_is(client: Client) -> None:
    """The message names the repo, what it has, and where the variant can be found."""
    out = client.run("--variant", "sp4096", fails=True)
    assert f"variant sp4096 not found in {REPO}, which has: sp1024." in out
    assert "sp4096 is in kevclark/parameter-golf" in out


def test_too_many_shards(hub: Hub, client: Client) -> None:
    """Asking for more shards than exist is refused before anything is fetched."""
    out = client.run("--train-shards", "4", fails=True)
    assert f"error: 4 train shards asked for, {REPO} has 3 of fineweb10B_sp1024" in out
    assert hub.shard_gets() == []


def test_root_prefix(hub: Hub, client: Client) -> None:
    """The prefix moves the whole layout; a dataset outside it does not count."""
    hub.files.update({name.replace("datasets/", "v2/", 1): value for name, value in official_files().items()})
    hub.files["v2/datasets/fineweb10B_sp1024/fineweb_val_000000.bin"] = shard_bytes([1, 7])
    for flags in (("1",), ("1", "--skip-manifest")):
        hub.gets.clear()
        out = client.run(*flags, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="v2")
        assert "val_tokens: 2 val_docs: 1" in out
        assert all(name.startswith("v2/") for name in hub.gets)


@pytest.mark.parametrize("flags", [(), ("--skip-manifest",)])
def test_repo_without_manifest(hub: Hub, client: Client, flags: tuple[str, ...]) -> None:
    """Files are found by listing the repo, whatever folder they are in."""
    hub.files = {name.replace("datasets/", "", 1).replace("sp1024", "sp8192").replace("_1024_", "_8192_"): value
                 for name, value in hub.files.items() if not name.endswith("manifest.json")}
    out = client.run("--variant", "sp8192", "2", *flags)
    assert "train_shards: 2 val_tokens: 5" in out
    assert sorted(contents(client.folder / "data/tokenizers")) == ["fineweb_8192_bpe.model", "fineweb_8192_bpe.vocab"]
    assert "train_shards: 2 val_tokens: 5" in client.run("--variant", "sp8192", "2", *flags, HF_HUB_OFFLINE="1")


def test_caseops_variant_with_sidecar(hub: Hub, client: Client) -> None:
    """A variant that is no sp<digits> is found, with its byte sidecar, which does not count as a val shard."""
    name = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
    hub.files = {key.replace("fineweb10B_sp1024", name): value for key, value in hub.files.items()}
    hub.files["datasets/manifest.json"] = manifest_bytes(name)
    hub.files[f"datasets/datasets/{name}/fineweb_val_bytes_000000.bin"] = shard_bytes([0, 2, 3, 0, 4])
    out = client.run("--variant", name.partition("_")[2], "1")
    assert "val_tokens: 5 val_docs: 2" in out
    assert sorted(contents(client.folder / "data/datasets" / name)) == [
        "fineweb_train_000000.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"]
    (client.folder / "data/datasets" / name / "fineweb_val_bytes_000000.bin").unlink()
    del hub.files[f"datasets/datasets/{name}/fineweb_val_bytes_000000.bin"]
    out = client.run("--variant", name.partition("_")[2], "1", fails=True, HF_HOME=str(client.folder / "hf2"))
    assert "came without fineweb_val_bytes_*.bin" in out


def test_the_tokenizer_of_downloaded_shards_is_recorded(hub: Hub, client: Client) -> None:
    """Official shards do not say which tokenizer made them; `sha256sum -c` can check what is written beside them."""
    client.run("2")
    marker = client.dataset / ".tokenizer.sha256"
    assert marker.read_text() == f"{hashlib.sha256(b'model').hexdigest()}  ../../tokenizers/fineweb_1024_bpe.model\n"
    subprocess.run(["sha256sum", "-c", "--status", marker.name], cwd=client.dataset, check=True)
    hub.files["datasets/tokenizers/fineweb_1024_bpe.model"] = b"another model"
    out = client.run("2", fails=True, HF_HOME=str(client.folder / "hf2"))
    assert f"holds shards of the tokenizer with SHA-256 {hashlib.sha256(b'model').hexdigest()}" in out
    assert marker.read_text().startswith(hashlib.sha256(b"model").hexdigest())


def test_shards_with_another_tokenizer_in_their_headers(hub: Hub, client: Client) -> None:
    """Shards that name their tokenizer must name the one that came with them."""
    name = f"{FOLDER}/fineweb_val_000000.bin"
    hub.files[name] = shard_bytes([1, 7], b"model")
    assert "val_tokens: 2" in client.run("1")
    hub.files[f"{FOLDER}/fineweb_train_000001.bin"] = shard_bytes([1, 7], b"another model")
    out = client.run("2", fails=True)
    assert f"the tokenizer with SHA-256 {hashlib.sha256(b'another model').hexdigest()}" in out


def test_copies_and_gaps_in_a_downloaded_folder(hub: Hub, client: Client) -> None:
    """A copy beside the shards is an error; a gap is what an interrupted download leaves, and is filled."""
    client.run("3")
    (client.dataset / "fineweb_train_000001.bin").unlink()
    assert "train_shards: 3" in client.run("3")
    copy = client.dataset / "fineweb_val_000000 (1).bin"
    copy.write_bytes(shard_bytes([1, 7]))
    assert f"error: {copy} looks like a shard" in client.run("3", fails=True)


def test_byte_counts_for_other_tokens(hub: Hub, client: Client) -> None:
    """A sidecar of another length than the validation tokens is refused."""
    hub.files[f"{FOLDER}/fineweb_val_bytes_000000.bin"] = shard_bytes([0, 2, 3])
    assert "3 byte counts for 5 validation tokens" in client.run("1", fails=True)


def test_downloads_run_in_parallel(hub: Hub, client: Client) -> None:
    """Each train shard is only served while the two others are being asked for."""
    hub.barrier = threading.Barrier(3)
    client.run("3", "--workers", "4")
    assert not hub.barrier.broken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_no_partial_file(hub: Hub, client: Client, number: signal.Signals) -> None:
    """Ctrl-C in the middle of a shard: no file under its name; the same command then finishes."""
    name = f"{FOLDER}/fineweb_train_000000.bin"
    hub.stall = (name, threading.Event())
    process = client.start("1")
    deadline = time.monotonic() + 30
    while name not in hub.gets and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out + err
    assert not (client.dataset / Path(name).name).exists()
    hub.stall[1].set()
    assert "train_shards: 1" in client.run("1")


def test_a_lost_console_and_terminal_do_not_end_a_download(hub: Hub, client: Client) -> None:
    """A full disk under standard output, and SIGHUP in the middle of a shard; threads and retries print, too."""
    name = f"{FOLDER}/fineweb_train_000000.bin"
    hub.stall, hub.failures[f"{FOLDER}/fineweb_train_000001.bin"] = (name, threading.Event()), 1
    with open("/dev/full", "w") as full:
        process = client.start("3", stdout=full)
    deadline = time.monotonic() + 30
    while name not in hub.gets and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    hub.stall[1].set()
    assert process.communicate(timeout=60)[1].startswith("warning: standard output is lost ([Errno 28]")
    assert process.returncode == 0 and len(contents(client.dataset)) == 4


def test_other_repo_is_not_mixed_in(hub: Hub, client: Client) -> None:
    """Shards of one repo are not topped up from another, whose split may differ."""
    client.dataset.mkdir(parents=True)
    shards.claim_folder(client.dataset, "a repo of which nothing arrived")
    shards.claim_folder(client.dataset, "somebody/else")
    (client.dataset / "fineweb_val_000000.bin").write_bytes(shard_bytes([1, 2]))
    assert f"holds shards from somebody/else, not from {REPO}" in client.run("1", fails=True)
    assert hub.shard_gets() == []


def test_errors_without_a_hub(client: Client, tmp_path: Path) -> None:
    """Offline, unreachable and unknown repos have their own messages, without a traceback."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n", encoding="utf-8")
    assert "HF_HUB_OFFLINE forbids" in client.run("1", fails=True, HF_HUB_OFFLINE="1")
    out = client.run("1", "--skip-manifest", "--retries", "0", fails=True, HF_ENDPOINT="http://127.0.0.1:9",
                     PYTHONPATH=str(tmp_path))
    assert "http://127.0.0.1:9 is reachable" in out
    assert "no dataset repo no/such" in client.run("1", fails=True, MATCHED_FINEWEB_REPO_ID="no/such")


# -------------------------------------------------------------------------------------------------- shard builder

ODD_DOCUMENTS = ["Z\u00fcrich \u4f60\u597d \U0001f600 caf\u00e9", "tabs\tand\n\nnewlines\r\n", "nul\x00byte \u2028 x",
                 "\ufb01 ligature, wide \uff21", "1234567890", " leading and trailing  ", "\u2581 literal piece mark"]
DOCUMENTS = [text for _, text in sorted(topics.topics.items())][:24] + ODD_DOCUMENTS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(build_shards.train_tokenizer(DOCUMENTS[:20], 420, 10**6))
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One {"text"} object a line."""
    path.write_text("".join(json.dumps({"id": 0, "text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def build(tmp_path: Path, model: Path, train: Path, *extra: str, val: bool = True) -> int:
    """Run the builder with small settings; the dataset is called d."""
    val_input = write_jsonl(tmp_path / "val_input.jsonl", ["a validation text", "another one"])
    split = ["--val", str(val_input)] if val else []
    return build_shards.main(["--train", str(train), *split, "--out", str(tmp_path / "out"), "--name", "d",
                              "--tokenizer", str(model), "--workers", "1", *extra])


def read_split(tmp_path: Path, split: str) -> np.ndarray:
    """All tokens of a split."""
    return np.concatenate([shards.read_tokens(path) for path in shards.list_shards(tmp_path / "out/datasets/d", split)])


def reference_ids(model: Path, texts: list[str]) -> list[int]:
    """What the tokens of these documents should be."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [index for text in texts for index in [1, *processor.encode(text.replace("\x00", " ").strip())]]


def write_zst(path: Path, raw: bytes) -> None:
    """Two frames, as parallel compressors write them."""
    import zstandard
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in (raw[:1000], raw[1000:])))


def write_parquet(path: Path, raw: bytes) -> None:
    """The same rows as the jsonl, in several row groups."""
    import pyarrow
    import pyarrow.parquet
    texts = [json.loads(line)["text"] for line in raw.splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=7)


WRITERS: dict[str, Callable[[Path, bytes], object]] = {
    ".jsonl": Path.write_bytes,
    ".jsonl.gz": lambda path, raw: path.write_bytes(gzip.compress(raw)),
    ".jsonl.xz": lambda path, raw: path.write_bytes(lzma.compress(raw)),
    ".jsonl.zst": write_zst,
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_formats(tmp_path: Path, model: Path, suffix: str) -> None:
    """Each format gives the same tokens: BOS and ids of each document, nothing else."""
    raw = write_jsonl(tmp_path / "plain.jsonl", DOCUMENTS).read_bytes()
    source = tmp_path / f"train{suffix}"
    WRITERS[suffix](source, raw)
    assert build(tmp_path, model, source) == 0
    assert read_split(tmp_path, "train").tolist() == reference_ids(model, DOCUMENTS)


@pytest.mark.parametrize("name", ["train.jsonl", "train.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, model: Path, name: str) -> None:
    """Some editors put one before the first line."""
    (tmp_path / name).write_text('{"text": "one"}' if name.endswith("l") else "one", encoding="utf-8-sig")
    assert build(tmp_path, model, tmp_path / name) == 0
    assert read_split(tmp_path, "train").tolist() == reference_ids(model, ["one"])


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b"])
def test_names_that_are_no_folder_of_their_own(tmp_path: Path, model: Path, name: str) -> None:
    """`--name .. --overwrite` would have replaced the whole data folder."""
    with pytest.raises(SystemExit):
        build(tmp_path, model, tmp_path, "--name", name, "--overwrite")


def test_folder_of_text_files(tmp_path: Path, model: Path) -> None:
    """A folder is read in sorted order, one document a .txt file; other files are left alone."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second\nline", encoding="utf-8")
    (folder / "a.txt").write_text("first", encoding="utf-8")
    (folder / "sub/c.txt").write_text("third", encoding="utf-8")
    (folder / "sub/ignored.bin").write_bytes(b"\xff")
    assert build(tmp_path, model, folder) == 0
    assert read_split(tmp_path, "train").tolist() == reference_ids(model, ["first", "second\nline", "third"])


def test_bytes_are_exact(model: Path) -> None:
    """The byte table agrees with the decoder on each odd document, and with pieces counted one by one."""
    encoder = build_shards.Encoder(model.read_bytes())
    texts = [build_shards.clean("x", text) for text in ODD_DOCUMENTS]
    totals = encoder.encode(build_shards.Batch(texts, len(texts), True)).totals
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert totals.token_bytes == sum(len(processor.decode(processor.encode(text)).encode()) for text in texts)
    assert (totals.docs, totals.checked) == (len(texts), len(texts))
    lone = processor.piece_to_id("\u2581")
    assert encoder.table.count(np.array([lone, lone])) == 1, "a space after BOS or at the start is not counted"
    assert encoder.table.count(np.array([processor.piece_to_id("<0xE4>")])) == 1


def test_byte_check_refuses_a_lossy_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without byte fallback a character outside the vocabulary is lost; that must not pass."""
    lossy = tmp_path / "lossy"
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(DOCUMENTS[:5]), model_prefix=str(lossy), pad_id=0,
                                             bos_id=1, eos_id=2, unk_id=3, model_type="bpe", vocab_size=300,
                                             max_sentence_length=10**6, add_dummy_prefix=False, minloglevel=2)
    source = write_jsonl(tmp_path / "train.jsonl", ["\u4f60\u597d"])
    assert build(tmp_path, lossy.with_suffix(".model"), source) == 1
    assert "byte check failed" in capsys.readouterr().err


def train_model(path: Path, **options: object) -> Path:
    """A small tokenizer with byte fallback and otherwise SentencePiece's own defaults."""
    settings = {"byte_fallback": True, "model_type": "bpe", "vocab_size": 420, "pad_id": 0, "bos_id": 1, "eos_id": 2,
                "unk_id": 3, "max_sentence_length": 10**6, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(DOCUMENTS[:9]), model_prefix=str(path), **settings)
    return path.with_suffix(".model")


@pytest.mark.parametrize("options", [{}, {"remove_extra_whitespaces": False},
                                     {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}])
def test_the_space_that_sentencepiece_adds_is_not_text(tmp_path: Path, options: dict[str, object]) -> None:
    """By default it puts one before each text and drops it in decoding; the counts are those of the text alone."""
    path = train_model(tmp_path / "default", **options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert processor.encode("word", out_type=str)[0].startswith("\u2581"), "the space is there"
    source = write_jsonl(tmp_path / "train.jsonl", DOCUMENTS)
    assert build(tmp_path, path, source) == 0
    texts = [build_shards.clean("x", text) for text in DOCUMENTS]
    totals = build_shards.Encoder(path.read_bytes()).encode(build_shards.Batch(texts, len(texts), True)).totals
    assert totals.token_bytes == sum(len(processor.decode(processor.encode(text)).encode()) for text in texts)
    if options.get("normalization_rule_name") == "identity":
        marks = sum(text.count("\u2581") for text in texts)  # read as spaces, of one byte for three
        assert totals.token_bytes == totals.text_bytes - 2 * marks, "nothing else is normalised away, or added"


def test_a_tokenizer_that_adds_to_the_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A space after each text is decoded as text that nobody wrote; it would flatter bits per byte."""
    path = train_model(tmp_path / "suffix", treat_whitespace_as_suffix=True)
    assert build(tmp_path, path, write_jsonl(tmp_path / "train.jsonl", ["some text"])) == 1
    assert "byte check failed" in capsys.readouterr().err


def test_all_of_validation_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last validation document counts as the first does; --check-docs is for train, and 0 means no check at all."""
    lossy = train_model(tmp_path / "lossy", byte_fallback=False, add_dummy_prefix=False)
    source = write_jsonl(tmp_path / "all.jsonl", ["a text", "\u4f60\u597d", "train text"])
    arguments = tmp_path, lossy, source, "--val-docs", "2"
    assert build(*arguments, "--check-docs", "1", val=False) == 1
    assert "byte check failed: 5 bytes decoded, 0 counted, 1 unknown" in capsys.readouterr().err
    assert build(*arguments, "--check-docs", "0", val=False) == 0
    assert "warning: 1 unknown tokens in val: without byte fallback text is lost" in capsys.readouterr().out


def test_documents_cross_shard_borders(tmp_path: Path, model: Path) -> None:
    """All shards but the last are full, and the documents run on from one to the next."""
    source = write_jsonl(tmp_path / "train.jsonl", DOCUMENTS)
    assert build(tmp_path, model, source, "--shard-tokens", "1000") == 0
    folder = tmp_path / "out/datasets/d"
    sizes = [shards.read_header(path).count for path in shards.list_shards(folder, "train")]
    expected = reference_ids(model, DOCUMENTS)
    assert sizes == [1000] * (len(expected) // 1000) + [len(expected) % 1000]
    assert read_split(tmp_path, "train").tolist() == expected
    assert shards.count_documents(shards.list_shards(folder, "train")) == len(DOCUMENTS)
    assert shards.list_shards(folder, "train")[0].read_bytes() == shard_bytes(expected[:1000], model.read_bytes())


def test_worker_count_does_not_matter(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One and three processes write the same files, over many batches."""
    monkeypatch.setattr(build_shards, "BATCH_BYTES", 5000)
    source = write_jsonl(tmp_path / "train.jsonl", [f"{i} {text}" for i in range(3) for text in DOCUMENTS])
    written = []
    for workers in ("1", "3"):
        assert build(tmp_path, model, source, "--workers", workers, "--shard-tokens", "20000", "--overwrite") == 0
        written.append(contents(tmp_path / "out/datasets/d"))
    assert len(written[0]) > 3 and written[0] == written[1]


def test_first_documents_are_val(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one input the first documents are val, the rest train, and the manifest says how many."""
    source = write_jsonl(tmp_path / "all.jsonl", DOCUMENTS)
    assert build(tmp_path, model, source, "--val-docs", "5", val=False) == 0
    assert read_split(tmp_path, "val").tolist() == reference_ids(model, DOCUMENTS[:5])
    assert read_split(tmp_path, "train").tolist() == reference_ids(model, DOCUMENTS[5:])
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    stats = manifest["datasets"][0]["stats"]
    assert (stats["docs_val"], stats["docs_train"]) == (5, len(DOCUMENTS) - 5)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert manifest["tokenizers"][0]["tokenizer_sha256"] == manifest["datasets"][0]["tokenizer_sha256"] == digest
    assert stats["tokens_train"] == len(reference_ids(model, DOCUMENTS[5:]))
    assert (tmp_path / "out" / manifest["tokenizers"][0]["model_path"]).read_bytes() == model.read_bytes()
    assert build(tmp_path, model, source, "--val-docs", "99", "--overwrite", val=False) == 1
    assert "no more than the 99 documents of --val-docs" in capsys.readouterr().err
    assert read_split(tmp_path, "val").tolist() == reference_ids(model, DOCUMENTS[:5]), "a failed build changes nothing"


def test_overlap(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Validation documents in train are refused, dropped or kept, and counted."""
    source = write_jsonl(tmp_path / "train.jsonl", ["one", "a validation text ", "two", "another one"])
    assert build(tmp_path, model, source) == 1
    assert "2 train documents are also in val" in capsys.readouterr().err
    assert not (tmp_path / "out/datasets/d").exists()
    assert build(tmp_path, model, source, "--drop-overlap") == 0
    assert read_split(tmp_path, "train").tolist() == reference_ids(model, ["one", "two"])
    assert build(tmp_path, model, source, "--allow-overlap", "--overwrite") == 0
    assert np.count_nonzero(read_split(tmp_path, "train") == 1) == 4


def test_tokenizer_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The challenge's settings, the same result twice, a .vocab beside it, and no validation text in it."""
    source = write_jsonl(tmp_path / "all.jsonl", ["\u2603 snow " * 50, *DOCUMENTS])
    arguments = ["--train", str(source), "--val-docs", "1", "--train-tokenizer", "400", "--name", "d", "--workers", "1"]
    for out in ("first", "second"):
        assert build_shards.main([*arguments, "--out", str(tmp_path / out)]) == 0
    first, second = (tmp_path / out / "tokenizers/fineweb_400_bpe.model" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(first))
    special = processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()
    assert (processor.vocab_size(), *special) == (400, 0, 1, 2, 3)
    assert processor.is_byte(4) and processor.decode(processor.encode("x")) == "x"
    assert len(processor.encode("2026")) == 4, "digits are split"
    assert processor.piece_to_id("\u2603") == processor.unk_id(), "a sign that only validation text has"
    vocab = first.with_suffix(".vocab").read_text(encoding="utf-8").splitlines()
    assert len(vocab) == 400 and vocab[1].split("\t")[0] == "<s>"
    assert "400 pieces trained" in capsys.readouterr().out


BAD_INPUTS = {
    "no text field": ("bad.jsonl", b'{"text": "ok"}\n{"body": "x"}\n', r"bad\.jsonl:2: no text field 'text'.*body"),
    "not JSON": ("bad.jsonl", b'{"text": "ok"}\n\n{"text": ', r"bad\.jsonl:3: not a line of JSON"),
    "not utf-8": ("bad.jsonl", b'{"text": "\xff"}\n', r"bad\.jsonl:1: not a line of JSON in utf-8"),
    "surrogate": ("bad.jsonl", b'{"text": "\\ud800"}\n', r"bad\.jsonl:1: text holds half of a surrogate pair"),
    "empty": ("bad.jsonl", b"\n", r"no documents in the train split"),
    "nested": ("bad.jsonl", b"[" * 99999, r"bad\.jsonl:1: not a line of JSON"),
    "utf-16": ("bad.jsonl", '{"text": "ok"}'.encode("utf-16"), r"bad\.jsonl:1: not a line of JSON in utf-8"),
    "latin-1 text": ("bad.txt", b"caf\xe9", r"bad\.txt: not utf-8"),
    "cut xz": ("bad.jsonl.xz", lzma.compress(b'{"text": "ok"}\n' * 99)[:-20], r"bad\.jsonl\.xz: cannot be read"),
    "no zstd": ("bad.jsonl.zst", b"plain", r"bad\.jsonl\.zst: cannot be read"),
    "no parquet": ("bad.parquet", b"plain", r"bad\.parquet: not a readable parquet file"),
    "unknown kind": ("bad.csv", b"text", r"bad\.csv: unknown kind of file"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(tmp_path: Path, model: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each bad input is named, with its line, and leaves no dataset behind."""
    name, raw, message = BAD_INPUTS[case]
    (tmp_path / name).write_bytes(raw)
    assert build(tmp_path, model, tmp_path / name) == 1
    assert re.search(message, capsys.readouterr().err)
    assert list((tmp_path / "out/datasets").glob("*")) == []


def test_existing_data_is_kept(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither shards nor tokenizer of an earlier build are touched without --overwrite."""
    source = write_jsonl(tmp_path / "train.jsonl", ["one"])
    assert build(tmp_path, model, source) == 0
    assert build(tmp_path, model, source) == 1
    assert "old and new shards must not mix" in capsys.readouterr().err
    tokenizer = next((tmp_path / "out/tokenizers").glob("*.model"))
    tokenizer.write_bytes(b"another one")
    assert build(tmp_path, model, source, "--name", "e") == 1
    assert "another tokenizer that other shards may need" in capsys.readouterr().err
    assert tokenizer.read_bytes() == b"another one" and not (tmp_path / "out/datasets/e").exists()


@pytest.mark.parametrize("stray", ["fineweb_val_000000 (1).bin", "fineweb_val_000000.old.bin", "fineweb_val_00001.bin",
                                   "Copy of fineweb_val_000000.bin", "FINEWEB_VAL_000001.BIN", "fineweb_val_000002.bin"])
def test_strays_and_gaps(tmp_path: Path, stray: str) -> None:
    """What looks like a shard and is not named like one, and a missing number, are named; other files are not."""
    names = ["fineweb_val_000000.bin", "fineweb_train_000000.bin", "fineweb_val_bytes_000000.bin", "notes.bin",
             "._fineweb_val_000000.bin", "fineweb_val_000000.bin.gz"]
    for name in names:
        (tmp_path / name).write_bytes(shard_bytes([1]))
    for split in ("train", "val", "val_bytes"):
        assert [path.name for path in shards.list_shards(tmp_path, split)] == [f"fineweb_{split}_000000.bin"]
    (tmp_path / stray).write_bytes(shard_bytes([1]))
    with pytest.raises(shards.ShardError, match="looks like a shard|000001.bin is missing, but fineweb_val_000002") as raised:
        shards.list_shards(tmp_path, "val")
    assert stray in str(raised.value)


@pytest.mark.parametrize("raw, message", [
    (b"short", "shorter than the 1024 byte header"),
    (shard_bytes([1, 2])[:-1], "1027 bytes, but its header promises 2 tokens = 1028 bytes"),
    (b"\0" * 1024, "magic 0 version 0"),
])
def test_bad_headers(tmp_path: Path, raw: bytes, message: str) -> None:
    """The error names the file and what is wrong with it."""
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(raw)
    with pytest.raises(shards.ShardError, match=message) as raised:
        shards.read_tokens(path)
    assert str(path) in str(raised.value)


# ---------------------------------------------------------------------------------------------------- demo corpus


def test_demo_corpus(tmp_path: Path) -> None:
    """Two runs agree; train and val share no document and no paragraph; the size stays below the limit."""
    for out, workers in (("a", "1"), ("b", "2")):
        assert demo_corpus.main(["--out", str(tmp_path / out), "--max-mb", "0.5", "--workers", workers]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    texts = {split: [json.loads(line)["text"] for line in open(tmp_path / f"a/{split}.jsonl", encoding="utf-8")]
             for split in ("train", "val")}
    size = {split: sum(len(text.encode()) for text in items) for split, items in texts.items()}
    assert 400_000 < sum(size.values()) <= 500_000
    assert 0 < size["val"] <= 0.04 * sum(size.values())
    paragraphs = {split: {part for text in items for part in text.split("\n\n")} for split, items in texts.items()}
    assert not paragraphs["train"] & paragraphs["val"]
    assert not set(texts["train"]) & set(texts["val"])


def test_english_rule() -> None:
    """Prose passes; code, tables and fragments do not."""
    assert demo_corpus.is_english("This is the first sentence of a text that was written for people to read.")
    assert not demo_corpus.is_english("for i in range(10): x[i] += y[i] * (z[i] - w[i]) / 2.0; print(x[i])")
    assert not demo_corpus.is_english("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda")
    assert not demo_corpus.is_english("Return it.")


def test_docstrings_are_read_without_import() -> None:
    """Docstrings of module, class, method and nested function, and nothing from broken files."""
    source = b'"""M."""\nraise SystemExit\nclass A:\n    """A."""\n    def f(self):\n        """F."""\n' \
             b'        if True:\n            def g():\n                """G."""\n        x = """no"""\n'
    assert list(demo_corpus.docstrings(source)) == ["M.", "A.", "F.", "G."]
    assert list(demo_corpus.docstrings(b'"""broken"""\ndef')) == []
