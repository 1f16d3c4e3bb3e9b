"""Bytes and seconds of every coder on the codes of one artifact, against their empirical entropy.

    python -m benchmarks.coding_size logs/<RUN_ID>.pgolf

The entropy is order 0 with one distribution per layer of a matrix, the floor of a coder that looks at nothing else.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train_gpt as t
from benchmarks.common import markdown


def read_codes(path: Path) -> tuple[np.ndarray, list[int], list[torch.Tensor]]:
    """All codes, the sizes of their segments, and the codes as tensors (n, rows, cols)."""
    blob = path.read_bytes()
    header, _, offset = t.read_header(blob, path)
    (_, coder, size), (_, packer, packed) = header["streams"][:2]
    if coder != "ans":
        raise SystemExit(f"{path}: the codes are coded with {coder}; export with COMPRESSOR=auto")
    lengths = [cols for _, (n, rows, cols) in header["coded"] for _ in range(n * rows)]
    begin = offset + size
    classes = np.frombuffer(t.decode_stream(packer, blob[begin : begin + packed], len(lengths)), np.uint8)
    order, sizes = t.rows_by_class(classes, lengths)
    codes = t.ans_decode(blob[offset:begin], sizes)
    rows = np.split(codes, np.cumsum([lengths[i] for i in order])[:-1])
    flat = torch.from_numpy(np.concatenate([rows[i] for i in order.argsort()]))
    tensors = t.cut(flat, [shape for _, shape in header["coded"]])
    return codes, sizes, tensors


def timed(function: Callable[[], bytes]) -> tuple[bytes, float]:
    """What a call returns, and its seconds."""
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin


def rows_of(codes: np.ndarray, sizes: list[int], entropy: float) -> list[list[str]]:
    """One row of the table per coder: bytes, overhead, and seconds both ways. Decoding must give the codes back."""
    raw, rows = codes.tobytes(), [["entropy", f"{entropy:,.0f}", "", "", ""]]
    coders = {
        f"{name}-{row.strongest}": (
            partial(t.codec(name).compress, raw, **{row.argument: row.strongest}), t.codec(name).decompress
        )
        for name, row in t.CODECS.items()
    }
    coders["ans"] = partial(t.ans_encode, codes, sizes), lambda blob: t.ans_decode(blob, sizes).tobytes()
    for name, (encode, decode) in coders.items():
        blob, seconds = timed(encode)
        decoded, back = timed(partial(decode, blob))
        assert decoded == raw, f"{name} does not give back what it coded"
        rows.append([name, f"{len(blob):,}", f"{len(blob) / entropy - 1:+.2%}", f"{seconds:.1f}", f"{back:.1f}"])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table for the artifact that the command line names."""
    parser = argparse.ArgumentParser(prog="benchmarks.coding_size", description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="logs/<RUN_ID>.pgolf of a run with COMPRESSOR=auto or ans")
    codes, sizes, tensors = read_codes(parser.parse_args(arguments).artifact)
    entropy = t.entropy_bytes(*tensors)
    each = 8 * entropy / len(codes)
    print(f"{len(codes):,} codes, {each:.4f} bits each by entropy, {torch.get_num_threads()} threads")
    print(markdown(["coder", "bytes", "over entropy", "coding s", "decoding s"], rows_of(codes, sizes, entropy)))


if __name__ == "__main__":
    main()
