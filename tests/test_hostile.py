"""Artifacts that nobody's run wrote: a valid checksum over a changed header or changed streams ends in one message.

MUTATIONS=10000 pytest tests/test_hostile.py tries more than the few hundred of every day.
"""

import copy
import hashlib
import json
import lzma
import os
import random
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import pytest
import torch
import zstandard
from conftest import codes_of, tiny_model

import train_gpt as t

SOMEWHERE = Path("some.pgolf")
NOTES = {"identity": {"tokenizer_sha256": "a" * 64, "val_sha256": "b" * 64}}
COUNT = int(os.environ.get("MUTATIONS", 300))
SECONDS, BYTES = 1.0, 2**30  # of one attempt, and beyond what the process had
ODD = [-1, 0, 1, 2, 3, 7, 255, 10**5, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), True, None,
       "", "x", "9" * 5000, "zlib", "ans", [], [1], [[]], [0, 1, 2, 3] * 1000, {}, {"a": 1}, [None, None, None]]  # fmt: skip


@pytest.fixture(scope="module")
def artifacts() -> list[bytes]:
    """One for each coder of codes."""
    blobs = []
    for coder in ("ans", "zlib", "lzma", "zstd", "brotli"):
        model = tiny_model(GPTQ_ENABLED=0, COMPRESSOR=coder)
        coded = codes_of(model.cfg, t.quant_specs(model), {}, 6.0)
        blobs.append(t.encode_artifact(model.cfg, coded, t.passthrough(model), NOTES))
    return blobs


def unpack(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and streams."""
    begin = len(t.MAGIC) + 4
    end = begin + struct.unpack_from("<I", blob, len(t.MAGIC))[0]
    return json.loads(zlib.decompress(blob[begin:end])), blob[end:-8]


def pack(header: Any, streams: bytes) -> bytes:
    """An artifact with a valid checksum; a header that is bytes is taken as it is."""
    text = header if isinstance(header, bytes) else zlib.compress(json.dumps(header).encode())
    body = t.MAGIC + struct.pack("<I", len(text)) + text + streams
    return body + hashlib.sha256(body).digest()[:8]


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in nested dicts and lists."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [place for key, value in pairs for place in places(value, (*path, key))]


def mutated(blob: bytes, rng: random.Random) -> bytes:
    """One to three changes of the header, or some bytes of the streams changed, cut or added."""
    header, streams = unpack(blob)
    if rng.random() < 0.3:
        data = bytearray(streams)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 1, 50])] = rng.randbytes(rng.choice([0, 1, 1, 50]))
        streams = bytes(data)
        if rng.random() < 0.7:  # so that the lengths are right again
            header["streams"][rng.randrange(4)][2] += len(streams) - sum(size for *_, size in header["streams"])
        return pack(header, streams)
    for _ in range(rng.randint(1, 3)):
        *path, last = rng.choice(places(header))
        parent = header
        for key in path:
            parent = parent[key]
        choice = rng.random()
        if choice < 0.15:
            del parent[last]
        elif choice < 0.3 and type(parent[last]) in (int, float):
            parent[last] *= rng.choice([2, 10, 1000, -1])
        else:
            parent[last] = copy.deepcopy(rng.choice(ODD))  # or a later change goes into ODD, and it into itself
        if not header:
            break
    return pack(header, streams)


def attempt(blob: bytes) -> str:
    """The message of the refusal, or "" for an artifact that was read, whose tensors are those of its architecture."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        header, parameters = t.decode_artifact(blob, SOMEWHERE)
        message = ""
    except t.UserError as problem:
        message = str(problem)
        assert "\n" not in message and len(message) < 2000
    assert time.perf_counter() - start < SECONDS
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < BYTES
    if not message:
        cfg = t.saved_config(header["architecture"], "here")
        model = t.GPT(cfg, 1, t.PLAIN_ATTENTION, torch.device("cpu"))
        model.load(parameters)
        assert all(tensor.isfinite().all() for tensor in parameters.values())
    return message


def test_mutations_are_refused_or_harmless(artifacts: list[bytes]) -> None:
    """Never another exception, never long, never large; the seed of a failure is printed."""
    assert [attempt(blob) for blob in artifacts] == [""] * len(artifacts)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, refused = random.Random(seed), 0
    for number in range(COUNT):
        print(number)
        refused += bool(attempt(mutated(rng.choice(artifacts), rng)))
    assert refused > 0.8 * COUNT


ZEROS = bytes(2**26)  # 64 MiB


def bomb(coder: str) -> bytes:
    """Few bytes that decode to many."""
    return {"zlib": lambda: zlib.compress(ZEROS, 9), "lzma": lambda: lzma.compress(ZEROS),
            "zstd": lambda: zstandard.compress(ZEROS), "brotli": lambda: brotli.compress(ZEROS)}[coder]()  # fmt: skip


@pytest.mark.parametrize("coder", ["zlib", "lzma", "zstd", "brotli"])
@pytest.mark.parametrize("stream", range(4), ids=["codes", "classes", "scales", "kept"])
def test_a_stream_that_swells_is_cut_off(artifacts: list[bytes], coder: str, stream: int) -> None:
    header, streams = unpack(artifacts[1])
    ends = [0, *(sum(size for *_, size in header["streams"][: i + 1]) for i in range(4))]
    parts = [streams[a:b] for a, b in zip(ends, ends[1:])]
    parts[stream] = bomb(coder)
    header["streams"][stream][1:] = coder, len(parts[stream])
    assert "its streams are damaged" in attempt(pack(header, b"".join(parts)))


def replaced_size(table: list[list], one: Any) -> list[list]:
    """The table of coded tensors with each size of 1 as something that equals it."""
    return [[name, [one if size == 1 else size for size in shape]] for name, shape in table]


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a bomb": lambda header: zlib.compress(b'{"a": "' + ZEROS.replace(b"\0", b" ") + b'"}'),
    "nested deeply": lambda header: zlib.compress(b"[" * 500_000),
    "not JSON": lambda header: zlib.compress(b"{"),
    "not zlib": lambda header: b"no zlib at all",
    "empty": lambda header: b"",
    "a list": lambda header: [1, 2],
    "a large model": lambda header: {**header, "architecture": {**header["architecture"], "model_dim": 32 * 1024}},
    "many layers": lambda header: {**header, "architecture": {**header["architecture"], "num_layers": 1024}},
    "more layers than may be": lambda header: {**header, "architecture": {**header["architecture"], "num_layers": 10**9}},
    "a long order": lambda header: {**header, "order": [0] * 10_000},
    "another order": lambda header: {**header, "order": [3, 2, 1, 0]},
    "a negative stream": lambda header: {**header, "streams": [[n, c, -s] for n, c, s in header["streams"]]},
    "streams twice": lambda header: {**header, "streams": header["streams"] * 2},
    "an unknown coder": lambda header: {**header, "streams": [[n, "pickle", s] for n, _, s in header["streams"]]},
    "a gain beyond float32": lambda header: {**header, "architecture": {**header["architecture"], "qk_gain_init": 1e308}},
    "an order of truths": lambda header: {**header, "order": [0, True, 2, 3]},
    "an order of fractions": lambda header: {**header, "order": [0, 1.0, 2, 3]},
    "a size that is a truth": lambda header: {**header, "coded": replaced_size(header["coded"], True)},
    "a size that is a fraction": lambda header: {**header, "coded": replaced_size(header["coded"], 1.0)},
    "bits that are a fraction": lambda header: {**header, "matrix_bits": 6.0},
    "an identity of numbers": lambda header: {**header, "identity": {"tokenizer_sha256": 1}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_no_run_wrote_is_refused(artifacts: list[bytes], name: str) -> None:
    header, streams = unpack(artifacts[0])
    assert "some.pgolf" in attempt(pack(HEADERS[name](header), streams))


@pytest.mark.parametrize("depth", [10, 500, *range(900, 1000, 9), 100_000])
@pytest.mark.parametrize("name", ["architecture", "order", "matrix_bits", "coded", "kept", "streams", "identity"])
def test_a_value_nested_deeply_is_refused(artifacts: list[bytes], name: str, depth: int) -> None:
    """Also where reading it just stays within Python's recursion limit, and comparing or printing it does not."""
    header, streams = unpack(artifacts[0])
    for inner in ("?", {"model_dim": "?"}):
        text = json.dumps({**header, name: inner}).replace('"?"', "[" * depth + "]" * depth)
        assert "some.pgolf" in attempt(pack(zlib.compress(text.encode()), streams))


@pytest.mark.parametrize("name", ["loop_start", "loop_end", "xsa_last_n", "num_loops"])
def test_a_layer_that_does_not_exist_takes_no_memory(artifacts: list[bytes], name: str) -> None:
    """Without NUM_LOOPS the loop's ends mean nothing: any number is read, and no list of so many layers is made."""
    header, streams = unpack(artifacts[0])
    message = attempt(pack({**header, "architecture": {**header["architecture"], name: 2**31}}, streams))
    assert ("some.pgolf" in message) == (not name.startswith("loop_"))


def test_weights_that_are_no_numbers_are_refused(artifacts: list[bytes]) -> None:
    """Half-precision infinities in the scales."""
    header, streams = unpack(artifacts[1])
    first = header["streams"][0][2] + header["streams"][1][2]
    raw = zlib.compress(b"\xff" * (2 * sum(n * rows for _, (n, rows, _) in header["coded"])))
    rest = streams[first + header["streams"][2][2] :]
    header["streams"][2][1:] = "zlib", len(raw)
    assert "not finite" in attempt(pack(header, streams[:first] + raw + rest))
