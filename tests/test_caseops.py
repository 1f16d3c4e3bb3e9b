"""data/caseops.py and the shards made with it: every text comes back, and its bytes are counted exactly."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import sentencepiece
from conftest import tiny_env

import train_gpt as t

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))

import build_shards  # noqa: E402
import caseops  # noqa: E402
import shards  # noqa: E402

TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
# Text and its marked form, spelled out from the description of the format.
EXAMPLES = {
    "": "", "all lower case, 123": "all lower case, 123", "The cat": "\ue001the cat", "NASA": "\ue002nasa",
    "A": "\ue001a", "I am": "\ue001i am", "iPhone": "i\ue003phone", "McDonald": "\ue001mc\ue003donald",
    "eBAY": "e\ue003b\ue003a\ue003y", "USAs": "\ue001u\ue003s\ue003as", "aB": "a\ue003b", "AB": "\ue002ab", "Ab": "\ue001ab",
    "don'T": "don'\ue001t", "U.S.A": "\ue001u.\ue001s.\ue001a", "B2B": "\ue001b2\ue001b", "\u00c9cole": "\u00c9cole",
    "\u00dcBER": "\u00dc\ue002ber", "na\u00efVE": "na\u00ef\ue002ve", "\ue001The": "\ue004\ue001\ue001the",
    "AB\ue002CD": "\ue002ab\ue004\ue002\ue002cd", "\ue004\ue004": "\ue004\ue004\ue004\ue004", "\ue000": "\ue000",
    "x\ue003Y": "x\ue004\ue003\ue001y",
}  # fmt: skip
DOCUMENTS = [text for _, text in sorted(topics.topics.items())][:24]
ODD = ["Z\u00fcrich \u4f60\u597d \U0001f600 CAF\u00c9 Cafe\u0301", "Tabs\tand\n\n\n  Newlines\r\n  x", "\ufeffBOM first \u200b",
       "\ufb01 ligature, WIDE \uff21, \u00bd, \u2026", "Marks \ue001\ue002A\ue003\ue004 of its own", "soft\u00adhyphen\u00ad",
       "LongRunOfMixedCASE" * 9, "nul\x00Byte \u2028 X", "\u2581 Literal", "E\u0301 A\u030a", "1,234.5 km/H"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with the marks, trained as the builder trains one."""
    path = tmp_path_factory.mktemp("tokenizer") / "marks.model"
    marked = map(caseops.mark_case, DOCUMENTS)
    path.write_bytes(build_shards.train_tokenizer(marked, 420, 10**6, caseops.MARKS))
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def build(folder: Path, train: list[str], val: list[str], *flags: str) -> int:
    """Run the builder; the dataset is called d."""
    inputs = {name: write_jsonl(folder / f"{name}.jsonl", texts) for name, texts in (("train", train), ("val", val))}
    return build_shards.main(["--train", str(inputs["train"]), "--val", str(inputs["val"]), "--out", str(folder / "out"),
                              "--name", "d", "--workers", "1", *flags])


def read(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([shards.read_tokens(path) for path in shards.list_shards(folder / "out/datasets/d", split)])


# The marks


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_format(text: str) -> None:
    assert caseops.mark_case(text) == EXAMPLES[text]
    assert caseops.restore_case(EXAMPLES[text]) == text


def test_any_text_comes_back() -> None:
    """Letters of both cases, letters that are not ASCII but have an ASCII lower case, and the marks, in every order."""
    draw, alphabet = random.Random(0), "abAB zZ1'\n\ue000\ue001\ue002\ue003\ue004\u0130\u0131\u017f\u212a\u00e9\u00c9\u4f60"
    for _ in range(20_000):
        text = "".join(draw.choices(alphabet, k=draw.randrange(16)))
        marked = caseops.mark_case(text)
        assert caseops.restore_case(marked) == text
        assert not any("A" <= character <= "Z" for character in marked)
    for text in [*DOCUMENTS, *ODD]:
        assert caseops.restore_case(caseops.mark_case(text)) == text


def test_long_runs_take_linear_time() -> None:
    """A run of a million letters without a capital is looked at once, not once from each of its letters."""
    text = "a" * 10**6 + " " + "b" * 10**6 + "C"
    assert caseops.mark_case(text) == text[:-1] + CAPNEXT + "c"


# The bytes


def counted(path: Path, text: str) -> tuple[list[str], list[int]]:
    """Pieces of a document and the sidecar's counts, without BOS."""
    encoder = build_shards.Encoder(path.read_bytes())
    encoded = encoder.encode(build_shards.Batch([text], 1, True))
    assert encoded.sidecar[0] == 0 and len(encoded.sidecar) == len(encoded.ids)
    return [encoder.processor.id_to_piece(int(i)) for i in encoded.ids[1:]], encoded.sidecar[1:].tolist()


def test_marks_count_nothing_and_escaped_ones_three(model: Path) -> None:
    pieces, counts = counted(model, "The \ue002NO")
    assert [(p, c) for p, c in zip(pieces, counts) if p in (TITLE, ALLCAPS, ESC)] == [
        (TITLE, 0), (ESC, 0), (ALLCAPS, 3), (ALLCAPS, 0)]  # fmt: skip
    assert sum(counts) == len("The \ue002NO".encode())


def test_white_space_and_byte_pieces(model: Path) -> None:
    """What normalisation drops goes to the piece after it; a character in several pieces to the last of them."""
    pieces, counts = counted(model, "a\n\n \u4f60b")
    assert list(zip(pieces, counts)) == [("a", 1), ("\u2581", 3), ("<0xE4>", 0), ("<0xBD>", 0), ("<0xA0>", 3), ("b", 1)]
    assert counted(model, "a\u200b") == (["a"], [4]), "the last piece takes what is dropped at the end"
    assert counted(model, "\ufeffa") == (["a"], [4])
    assert counted(model, "\ufb01x")[1][-1] >= 1 and sum(counted(model, "\ufb01x")[1]) == 4


@pytest.mark.parametrize("text", [*ODD, DOCUMENTS[0]])
def test_the_sum_is_the_original_text(model: Path, text: str) -> None:
    text = build_shards.clean("x", text)
    assert sum(counted(model, text)[1]) == len(text.encode())


def offset_counts(processor: Any, marked: str) -> list[int]:
    """Counts by SentencePiece's own offsets of pieces, where this version of the package gives them."""
    try:
        spans = processor.encode(marked, return_type="offset_mapping")["offsets"]
    except TypeError:
        spans = [(p.begin, p.end) for p in processor.encode(marked, out_type="immutable_proto").pieces]
    escaped, sizes = False, []
    for character in marked:
        is_mark = character in caseops.MARKS and not escaped
        sizes.append(0 if is_mark else len(character.encode()))
        escaped = is_mark and character == ESC
    return [sum(sizes[begin:end]) for begin, end in spans]


@pytest.mark.parametrize("text", [*ODD, *DOCUMENTS[:6]])
def test_counts_agree_with_sentencepiece_s_offsets(model: Path, text: str) -> None:
    """As the published exporter counts; only what is dropped at the very ends is in no piece of its."""
    text = build_shards.clean("x", text)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    want, got = offset_counts(processor, caseops.mark_case(text)), counted(model, text)[1]
    assert got[1:-1] == want[1:-1] and got[0] >= want[0] and got[-1] >= want[-1]
    missing = len(text.encode()) - sum(want)
    assert sum(got) - sum(want) == missing and (missing == 0 or text[0] in "\ufeff\u2581" or text[-1] in "\u200b\u00ad")


# The shards


def test_shards_and_sidecar(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Marked tokens in both splits, a sidecar for validation alone, the hash in all of them, marks in the manifest."""
    assert build(tmp_path, DOCUMENTS[:8], [*DOCUMENTS[8:], *ODD], "--tokenizer", str(model), "--shard-tokens", "9000") == 0
    out = capsys.readouterr().out
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for split, texts in (("train", DOCUMENTS[:8]), ("val", [*DOCUMENTS[8:], *ODD])):
        marked = [caseops.mark_case(build_shards.clean("x", text)) for text in texts]
        assert read(tmp_path, split).tolist() == [i for text in marked for i in (1, *processor.encode(text))]
    total = sum(len(build_shards.clean("x", text).encode()) for text in [*DOCUMENTS[8:], *ODD])
    assert int(read(tmp_path, "val_bytes").sum()) == total and f"{total} text bytes in the sidecar" in out
    folder = tmp_path / "out/datasets/d"
    assert len(shards.list_shards(folder, "val_bytes")) == len(shards.list_shards(folder, "val")) > 1
    assert len({shards.read_header(path).tokenizer_sha256 for path in folder.glob("fineweb_*")}) == 1
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    tokenizer, dataset = manifest["tokenizers"][0], manifest["datasets"][0]
    assert tokenizer["name"] == dataset["tokenizer_name"] == "sp_bpe_420_lossless_caps_caseops_v1_reserved"
    assert tokenizer["text_transform"] == "lossless_caps_caseops_v1" and tokenizer["reserve_text_transform_controls"] is True
    assert tokenizer["model_path"] == "tokenizers/fineweb_420_bpe_lossless_caps_caseops_v1_reserved.model"
    assert (tmp_path / "out" / tokenizer["model_path"]).read_bytes() == model.read_bytes()
    assert dataset["val_bytes_glob"] == "datasets/d/fineweb_val_bytes_*.bin"


def test_the_number_of_workers_does_not_matter(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_shards, "BATCH_BYTES", 5000)
    written = []
    for workers in ("1", "2"):
        assert build(tmp_path, DOCUMENTS[:3], DOCUMENTS[3:], "--tokenizer", str(model), "--overwrite", "--workers", workers) == 0
        written.append([read(tmp_path, split).tolist() for split in ("train", "val", "val_bytes")])
    assert written[0] == written[1]


def test_a_tokenizer_with_marks_is_trained(tmp_path: Path) -> None:
    """They are the pieces after the special ones, as in the published tokenizer."""
    assert build(tmp_path, DOCUMENTS, ["A validation Text"], "--train-tokenizer", "420", "--caseops") == 0
    path = tmp_path / "out/tokenizers/fineweb_420_bpe_lossless_caps_caseops_v1_reserved.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [processor.id_to_piece(i) for i in range(8)] == ["<pad>", "<s>", "</s>", "<unk>", *caseops.MARKS]
    assert processor.decode(read(tmp_path, "val").tolist()) == "\ue001a validation \ue001text"
    assert path.with_suffix(".vocab").exists()


def test_a_tokenizer_without_marks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain.model"
    plain.write_bytes(build_shards.train_tokenizer(DOCUMENTS, 420, 10**6))
    assert build(tmp_path, DOCUMENTS, ["text"], "--tokenizer", str(plain), "--caseops") == 1
    assert "no pieces for case marks" in capsys.readouterr().err
    assert build(tmp_path, DOCUMENTS, ["Text"], "--tokenizer", str(plain)) == 0
    assert shards.list_shards(tmp_path / "out/datasets/d", "val_bytes") == []


REFUSED = {
    "no token stands for the text": ("\u200b", "the tokens do not spell the document"),
    "more white space than 16 bits": ("a" + 70_000 * " " + "b", r"a token stands for 7000\d bytes of the document"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_counted_is_refused(tmp_path: Path, model: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = REFUSED[case]
    assert build(tmp_path, DOCUMENTS[:2], ["fine", text], "--tokenizer", str(model)) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out/datasets/d").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_document_that_does_not_come_back_stops_the_build(
    tmp_path: Path, model: Path, split: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such text is known, so the marks are broken for one document; --check-docs has no say in it."""
    mark = caseops.mark_case
    monkeypatch.setattr(caseops, "mark_case", lambda text: mark(text).replace("\ue001x", "x"))
    texts = {"train": DOCUMENTS[:2], "val": DOCUMENTS[2:4]}
    texts[split] = [*texts[split], "Xylophone"]
    assert build(tmp_path, texts["train"], texts["val"], "--tokenizer", str(model), "--check-docs", "0") == 1
    assert "case marks do not give back the document that begins 'Xylophone'" in capsys.readouterr().err


def test_the_trainer_scores_by_the_sidecar(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits per byte of the original text: its bytes, but for the first token, which is no target."""
    assert build(tmp_path, DOCUMENTS[:16], DOCUMENTS[16:], "--tokenizer", str(model)) == 0
    monkeypatch.chdir(tmp_path)
    env = tiny_env(VOCAB_SIZE=420, DATA_PATH=tmp_path / "out/datasets/d", RUN_ID="marks", TOKENIZER_PATH=next(
        (tmp_path / "out/tokenizers").glob("*.model")))
    with t.Runtime.start(t.Config.from_env(env), {}) as run:
        validation = t.load_validation(run)
    assert int(validation.token_bytes[1:].sum()) == sum(len(build_shards.clean("x", x).encode()) for x in DOCUMENTS[16:])
    assert torch_equal(validation.tokens, read(tmp_path, "val")) and "sidecar" in (tmp_path / "logs/marks.txt").read_text()


def test_marked_shards_without_their_sidecar_are_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The byte table would count the marks, and the score would be too good by 7%."""
    assert build(tmp_path, DOCUMENTS[:16], DOCUMENTS[16:], "--tokenizer", str(model)) == 0
    (tmp_path / "out/datasets/d/fineweb_val_bytes_000000.bin").unlink()
    monkeypatch.chdir(tmp_path)
    tokenizer = next((tmp_path / "out/tokenizers").glob("*.model"))
    env = tiny_env(VOCAB_SIZE=420, DATA_PATH=tmp_path / "out/datasets/d", TOKENIZER_PATH=tokenizer)
    with t.Runtime.start(t.Config.from_env(env), {}) as run, pytest.raises(t.UserError, match="need their byte sidecar"):
        t.load_validation(run)


def torch_equal(tensor: Any, array: np.ndarray) -> bool:
    return np.array_equal(tensor.cpu().numpy(), array.astype(np.int32))
