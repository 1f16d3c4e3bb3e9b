"""A whole run of a submission's script, in small, on the CPU: tokenizer, shards, training, export, evaluation.

What parts alone cannot show: that bytes are counted exactly, that the artifact follows from the training text alone,
and that the scores in the log are those of the artifact on disk.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import math
import os
import pydoc_data.topics
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from records.reading.runs import Score, read_jsonl, read_text
from records.reading.script import as_variable

if TYPE_CHECKING:
    import numpy as np

PIECES = 384  # 256 of them single bytes
STEPS = 3
SMALL = {"iterations": STEPS, "warmup_steps": 1, "max_wallclock_seconds": 0, "gptq_calibration_batches": 2,
         "train_log_every": 1, "val_loss_every": 0, "checkpoint_every": 0, "post_qat_seconds": 0, "seed": 1337,
         "train_batch_tokens": 480, "grad_accum_steps": 0, "gptq_reserve_seconds": "", "target_bytes": 16_000_000,
         "vocab_size": PIECES, "device": "cpu", "compile": 0, "loader": "shuffled"}  # fmt: skip


FOREIGN_TEXT = "Größe naïve café – 東京, Привет; 🙂\t\u200b½\u00a0ﬁ"  # of two, three and four bytes, and rare spaces
DATASET = "fineweb10B_sp1024"  # what some scripts look for in a path
LOADED = itertools.count()


class Corpus(NamedTuple):
    """A tokenizer's file and the documents of each split, as text."""

    tokenizer: bytes
    train: list[str]
    val: list[str]
    other_val: list[str]


def make_corpus() -> Corpus:
    """Python's help texts, and a tokenizer that changes nothing in them."""
    import sentencepiece

    documents = [text.strip() for _, text in sorted(pydoc_data.topics.topics.items()) if 500 < len(text) < 3000]
    documents[:4] = [f"{text}\n\n{FOREIGN_TEXT}" for text in documents[:4]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in documents for line in text.splitlines() if line.strip()),
        model_writer=model, vocab_size=PIECES, model_type="bpe", byte_fallback=True, character_coverage=0.99,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, minloglevel=2, required_chars="ößПя東",  # the others are byte pieces
    )  # fmt: skip
    return Corpus(model.getvalue(), documents[4:], documents[:2], documents[2:4])


def write_shard(script: ModuleType, path: Path, tokens: np.ndarray) -> None:
    """A shard as the challenge defines it."""
    import numpy as np

    header = np.zeros(256, "<i4")
    header[:3] = script.SHARD_MAGIC, script.SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def encoded(corpus: Corpus, documents: list[str]) -> np.ndarray:
    """Documents as tokens, each after BOS."""
    import numpy as np
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=corpus.tokenizer)
    return np.concatenate([[pieces.bos_id(), *pieces.encode(text)] for text in documents])


@dataclass(frozen=True)
class Place:
    """A folder with data of a corpus, in which a script runs."""

    script: ModuleType
    folder: Path
    corpus: Corpus

    def set_validation(self, documents: list[str]) -> None:
        write_shard(self.script, self.folder / "fineweb_val_000000.bin", encoded(self.corpus, documents))

    def config(self, values: Mapping[str, Any], run_id: str, **more: Any) -> Any:
        """The tiny configuration `values` (by field), small in time too, over this folder's data."""
        known = self.script.Config.variables()
        places = {"data_path": self.folder, "tokenizer_path": self.folder / "tokenizer.model", "run_id": run_id}
        wanted = {**values, **SMALL, **places, **more}
        named = {name.upper(): as_variable(value) for name, value in wanted.items()}
        return self.script.Config.from_env({name: text for name, text in named.items() if name in known})


@contextlib.contextmanager
def place_to_run(script: ModuleType) -> Iterator[Place]:
    """A folder with shards; a folder around it is the working directory meanwhile."""
    corpus, home = make_corpus(), Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        place = Place(script, Path(name, DATASET), corpus)
        place.folder.mkdir()
        (place.folder / "tokenizer.model").write_bytes(corpus.tokenizer)
        write_shard(script, place.folder / "fineweb_train_000000.bin", encoded(corpus, corpus.train))
        place.set_validation(corpus.val)
        os.chdir(name)
        try:
            yield place
        finally:
            os.chdir(home)


class Outcome(NamedTuple):
    """What a run left: the artifact's header and tensors, the scores and sizes in its two logs, and those of truth."""

    header: dict[str, Any]
    tensors: dict[str, Any]
    scores: dict[str, Score]
    text_scores: dict[str, Score]
    returned: list[float]  # losses that the evaluations gave
    sizes: dict[str, tuple[int | None, int]]  # what is weighed -> bytes by the log, bytes on disk


@contextlib.contextmanager
def opened(kind: str) -> Iterator[list[str]]:
    """Names of the files opened meanwhile whose name holds `kind`."""
    found, watching = [], [True]

    def note(event: str, args: tuple[Any, ...]) -> None:
        if watching and event == "open" and kind in str(args[0]):
            found.append(Path(str(args[0])).name)

    sys.addaudithook(note)  # for good: only told to be silent
    try:
        yield found
    finally:
        watching.clear()


@contextlib.contextmanager
def noted(script: ModuleType) -> Iterator[list[float]]:
    """Losses that the script's evaluations return meanwhile."""
    names = [name for name in ("evaluate", "evaluate_online", "evaluate_documents") if hasattr(script, name)]
    names += ["TestTimeTrainer.score"] if "evaluate_online" not in names and hasattr(script, "TestTimeTrainer") else []
    kept, found = {}, []
    for name in names:
        owner, _, attribute = name.rpartition(".")
        place = getattr(script, owner) if owner else script
        kept[place, attribute] = getattr(place, attribute)

        def noting(*args: Any, call: Any = kept[place, attribute], **named: Any) -> Any:
            result = call(*args, **named)
            found.extend(score.loss for score in (result if isinstance(result, list) else [result]))
            return result

        setattr(place, attribute, noting)
    try:
        yield found
    finally:
        for (place, attribute), call in kept.items():
            setattr(place, attribute, call)


class Early(Exception):
    """Validation text that was opened again before the artifact was made."""


def trained(place: Place, cfg: Any, evaluated: bool) -> Outcome:
    """Train, export and, if asked, evaluate, as the script's main does."""
    script = place.script
    with script.Runtime.start(cfg, {}) as run, noted(script) as returned:
        validation = script.load_validation(run)
        with opened("fineweb_val") as early:
            produced = script.produce_artifact(run, validation)
        if early:
            raise Early(f"training or export opens {early[0]}: the artifact must follow from the training text alone")
        if evaluated:
            script.evaluate_artifact(run, validation, produced)
    logs = read_jsonl(Path(f"logs/{cfg.log_name}.jsonl")), read_text(Path(f"logs/{cfg.log_name}.txt"))
    scores, texts = ({score.name: score for score in log.scores if "DIAGNOSTIC" not in score.name} for log in logs)
    header, tensors = script.decode_artifact(cfg.artifact_file.read_bytes(), cfg.artifact_file)
    header = {key: value for key, value in header.items() if key != "identity"}
    sizes = {"artifact": cfg.artifact_file.stat().st_size, "code": Path(script.__file__).stat().st_size}
    told = {"artifact": {log.artifact_bytes for log in logs}, "code": {log.code_bytes for log in logs}}
    weighed = {what: (next(iter(told[what] - {size}), size), size) for what, size in sizes.items()}
    return Outcome(header, tensors, scores, texts, returned, {} if cfg.eval_only else weighed)


def scored_alone(place: Place, values: Mapping[str, Any], artifact: bytes) -> Outcome:
    """Score an artifact in a folder that has nothing else, by the script imported anew: nothing else is handed on."""
    name = f"{place.script.__name__}_{next(LOADED)}"
    spec = importlib.util.spec_from_file_location(name, place.script.__file__)
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script
    spec.loader.exec_module(script)
    with place_to_run(script) as empty:
        shutil.copytree(place.folder, empty.folder, dirs_exist_ok=True)
        Path("given.pgolf").write_bytes(artifact)
        return trained(empty, empty.config(values, "again", eval_only=1, artifact_path="given.pgolf"), True)


def byte_fault(script: ModuleType, place: Place, cfg: Any) -> str:
    """How the script's bytes of the validation text differ from the text's; empty if they do not."""
    with script.Runtime.start(cfg, {}) as run:
        try:
            validation = script.load_validation(run)
        except script.UserError as problem:
            return f"the script refuses text that its tokenizer keeps as it is: {problem}"
    counts, tokens = validation.token_bytes.tolist(), validation.tokens.tolist()
    starts = [i for i, token in enumerate(tokens) if token == validation.bos_id]
    if tokens != encoded(place.corpus, place.corpus.val).tolist():
        return (f"of {len(place.corpus.val)} validation documents it scores {len(starts)}, or other tokens; the whole "
                "text must be scored")
    for text, start, end in zip(place.corpus.val, starts, [*starts[1:], len(tokens)], strict=True):
        if (counted := sum(counts[start:end])) != (actual := len(text.encode())):
            return (f"a document of {actual} bytes counts as {counted}: bits per byte are off by "
                    f"{100 * (actual / counted - 1):+.1f}%")
    return ""


def artifact_fault(first: Outcome, other: Outcome) -> str:
    """What two artifacts of one training text, but of different validation texts, differ in."""
    changed = [name for name in first.tensors if not first.tensors[name].equal(other.tensors[name])]
    if changed or first.header != other.header:
        return (f"with another validation text the artifact has other {', '.join(changed[:3]) or 'settings'}: training "
                "or export reads what is to be scored")
    return ""


def score_fault(logged: Outcome, again: Outcome, text_bytes: int, targets: int) -> str:
    """What is wrong with a log: scores that are not the artifact's or not bits per byte, sizes that are no file's."""
    for what, (told, weighs) in logged.sizes.items():
        if told != weighs:
            return f"the log counts {told} bytes of {what}, the file has {weighs}"
    for name, (_, loss, bpb, _) in logged.scores.items():
        wanted = loss * targets / math.log(2) / text_bytes
        if not math.isclose(bpb, wanted, rel_tol=1e-6):
            return f"{name}: {bpb:.6f} bits per byte, the loss and the text's bytes give {wanted:.6f}"
        if not any(math.isclose(loss, value, rel_tol=1e-6) for value in logged.returned):
            return f"{name}: {loss:.6f} nats in the log, which no evaluation gave"
        text = logged.text_scores.get(name)
        if text is None or not math.isclose(text.val_bpb, bpb, rel_tol=1e-6):
            return f"{name}: {bpb:.6f} in the JSON lines, {text.val_bpb if text else 'nothing'} in the text log"
        there = again.scores[name].val_loss if name in again.scores else math.nan
        if not math.isclose(loss, there, rel_tol=1e-6):
            return f"{name}: {loss:.6f} nats in the log of the run, {there:.6f} where the artifact alone is scored"
    return "" if logged.scores else "the run logs no score"
