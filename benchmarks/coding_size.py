"""Bytes and seconds of every coder on the codes of one artifact, against their empirical entropy.

    python -m benchmarks.coding_size logs/<RUN_ID>.pgolf

The entropy is order 0 with one distribution per layer of a matrix, the floor of a coder that looks at nothing else.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import train_gpt as t


def read_codes(path: Path) -> tuple[np.ndarray, list[int], list[torch.Tensor]]:
    """All codes, the sizes of their segments, and the codes as tensors (n, rows, cols)."""
    blob = path.read_bytes()
    header, offset = t.read_header(blob, path)
    _, coder, size = header["streams"][0]
    if coder != "ans":
        raise SystemExit(f"{path}: the codes are coded with {coder}; export with COMPRESSOR=auto")
    sizes = [rows * cols for _, (n, rows, cols) in header["coded"] for _ in range(n)]
    codes = t.ans_decode(blob[offset : offset + size], sizes)
    tensors, begin = [], 0
    for _, (n, rows, cols) in header["coded"]:
        tensors.append(torch.from_numpy(codes[begin : begin + n * rows * cols].copy()).view(n, rows, cols))
        begin += n * rows * cols
    return codes, sizes, tensors


def timed(function: Callable[[], bytes | np.ndarray]) -> tuple[bytes | np.ndarray, float]:
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin


def main() -> None:
    codes, sizes, tensors = read_codes(Path(sys.argv[1]))
    entropy = sum(t.entropy_bytes(tensor) for tensor in tensors)
    print(f"{len(codes):,} codes, {8 * entropy / len(codes):.4f} bits each by entropy, {torch.get_num_threads()} threads")
    print("| coder | bytes | over entropy | coding s | decoding s |")
    print("|---|---|---|---|---|")
    print(f"| entropy | {entropy:,.0f} | | | |")
    for name, (_, argument, level) in t.CODECS.items():
        blob, seconds = timed(lambda: t.codec(name).compress(codes.tobytes(), **{argument: level}))
        _, back = timed(lambda: t.codec(name).decompress(blob))
        print(f"| {name}-{level} | {len(blob):,} | {len(blob) / entropy - 1:+.2%} | {seconds:.1f} | {back:.1f} |")
    blob, seconds = timed(lambda: t.ans_encode(codes, sizes))
    decoded, back = timed(lambda: t.ans_decode(blob, sizes))
    assert np.array_equal(decoded, codes)
    print(f"| ans | {len(blob):,} | {len(blob) / entropy - 1:+.2%} | {seconds:.1f} | {back:.1f} |")


if __name__ == "__main__":
    main()
