"""Milliseconds of one layer's attention by back end and length, forward and with backward, at constant tokens.

    python -m benchmarks.attention_time [KEY=value ...] [--lengths 1024 2048 4096] [--tokens 98304] [--repeats 15]

Queries and keys are normalized random rows, as the model hands them over, in the compute type. `copies`: every query
head has keys and values of its own; what a back end then saves is what it pays for adding up the gradients of shared
ones (FlashAttention 4 does so in float32). With DOC_ATTENTION=1 attention stays within the documents of the first
validation tokens (DATA_PATH), and making the mask is not timed. Medians of device time after three untimed calls. A
back end that is not installed or wrong is a line with the reason.
"""

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import train_gpt as t
from benchmarks.common import UsageError, device_name, markdown, settings_of
from benchmarks.step_time import Mark


def inputs(cfg: t.Config, tokens: int, length: int, device: torch.device, copies: bool) -> list[Tensor]:
    """q, k and v of whole sequences."""
    generator = torch.Generator(device).manual_seed(0)
    kv = cfg.num_heads if copies else cfg.num_kv_heads
    shapes = [(max(tokens // length, 1), length, heads, cfg.head_dim) for heads in (cfg.num_heads, kv, kv)]
    rows = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    return [t.rms_norm(row).to(t.compute_dtype(device)).requires_grad_() for row in rows]


def median_ms(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median device time of `repeats` calls after three others."""
    marks = []
    for _ in range(3 + repeats):
        begin = Mark(device)
        action()
        marks.append((begin, Mark(device)))
    t.synchronize(device)
    return statistics.median(begin.ms_until(end) for begin, end in marks[3:])


def times(attend: t.Attention, qkv: list[Tensor], mask: Tensor | None, repeats: int) -> tuple[float, float]:
    """Milliseconds forward, and forward and backward."""
    device, upstream = qkv[0].device, torch.randn_like(qkv[0])

    def both() -> None:
        torch.autograd.grad(attend(*qkv, mask), qkv, upstream)

    with torch.no_grad():
        forward = median_ms(lambda: attend(*qkv, mask), repeats, device)
    return forward, median_ms(both, repeats, device)


def document_mask(attention: t.Attention, cfg: t.Config, qkv: list[Tensor]) -> Tensor:
    """The mask of rows of validation tokens."""
    rows, length = qkv[0].shape[:2]
    tokens = torch.from_numpy(t.TokenStream(cfg, "val").read(0, rows * length).astype("int64"))
    ids = tokens.to(qkv[0].device).view(rows, length)
    return attention.mask(t.doc_ids(ids, t.ByteTable(cfg.tokenizer_file, cfg.vocab_size).bos_id))


def back_end_rows(name: str, cfg: t.Config, given: argparse.Namespace, device: torch.device) -> Iterator[list[str]]:
    """A line of one back end for every length and way of sharing."""
    ends = t.attention_back_ends(cfg)
    attention = ends.factories[name]()
    if reason := t.fault(*ends.probe(attention, cfg, device)):
        raise RuntimeError(reason)
    for length, copies in itertools.product(given.lengths, (False, True)):
        qkv = inputs(cfg, given.tokens, length, device, copies)
        mask = document_mask(attention, cfg, qkv) if cfg.doc_attention else None
        measured = times(attention, qkv, mask, given.repeats)
        sharing = "copies" if copies else f"{cfg.num_heads} over {cfg.num_kv_heads}"
        yield [name, str(length), sharing, *(f"{ms:.3f}" for ms in measured), ""]


def rows(cfg: t.Config, given: argparse.Namespace, device: torch.device) -> Iterator[list[str]]:
    """The lines of all back ends, or why there are none."""
    for name in t.attention_back_ends(cfg).factories:
        try:
            yield from back_end_rows(name, cfg, given, device)
        except t.BACK_END_FAULTS as problem:
            reason = (str(problem).strip().splitlines() or [""])[0]
            yield [name, "", "", "", "", f"{type(problem).__name__} {reason[:100]}".replace("|", "/")]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 unless the command line means nothing."""
    parser = argparse.ArgumentParser(prog="benchmarks.attention_time", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=t.MICRO_BATCH_TOKENS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("settings", nargs="*", metavar="KEY=value", help="variables of train_gpt.py")
    given = parser.parse_intermixed_args(arguments)
    try:
        cfg = t.Config.from_env({**os.environ, **settings_of(given.settings), "RUN_ID": "attention_time"})
        device = t.pick_device(cfg.device, 0)
    except (UsageError, t.UserError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    head = ["back end", "length", "heads", "forward ms", "with backward ms", "not measured because"]
    print(f"{device_name(device)}, {given.tokens} tokens, head size {cfg.head_dim}")
    print(markdown(head, rows(cfg, given, device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
