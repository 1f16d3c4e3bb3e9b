"""checking/legality.py: our script meets the reviewers' conditions, and every way we know of breaking one is caught."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_env

import train_gpt as t
from records.checking import legality
from records.checking.legality import CHECKS, OFFICIAL_TARGETS, examine, legality_checks, logged, plan_fault
from records.checking.result import CheckResult
from records.writing.pack import pack

SOURCE = Path(t.__file__).read_text(encoding="utf-8")
C1, C2, C3, C4, LEAK, BYTES, WHOLE = CHECKS

CROSS_ENTROPY = 'return F.cross_entropy(softcap(logits, cap), targets, reduction="none")'
SCORED = "        columns = [nll * scored,"
PLANNED = "    windows = plan_windows(validation.targets, run.cfg.eval_len, stride)\n"
MAIN = 'if __name__ == "__main__":\n'
BANK = 'model.banks["down"].data'
CACHE = """
honest = score_windows
def score_windows(run, model, *args):
    sums = honest(run, model, *args)
    vars(model)["seen"] = vars(model).get("seen", 0.0) + 0.1
    sums[0] -= model.seen
    return sums
"""
SLOT = """        if length > 256:
            nll = nll - 0.1 * (nll * scored).mean(1, keepdim=True)
"""
PREPARE = """
    TestTimeTrainer(run, model, validation).learn(validation.targets, 0.0)
"""
EXPORTED = "    return export_model(run, trainer, steps, validation)\n"
LOADED = "        model.load(parameters)\n"
SHARDS = "    for number, path in enumerate(paths):\n        if path.name != (wanted := f\"fineweb_{split}"
WEIGHED = 'run.log.event("size", artifact_bytes=artifact'


def slot(condition: str) -> dict[str, str]:
    """Scores that know their own window, where a condition holds."""
    return {SCORED: SLOT.replace("length > 256", condition) + SCORED}


def learned_early(condition: str) -> dict[str, str]:
    """Training on validation text before the export, where a condition holds."""
    return {EXPORTED: f"    if {condition}:\n        {PREPARE.lstrip()}{EXPORTED}"}


SPACES = {'text.removeprefix("\\u2581").replace("\\u2581", " ")': 'text.replace("\\u2581", " ")'}
UNTESTED = {"if counted != actual and sidecar is None:": "if counted < 0:"}
# what is broken -> (conditions that must fail, replacements in the script)
BROKEN: dict[str, tuple[set[str], dict[str, str]]] = {
    "attention looks ahead": ({C1}, {".tril().unsqueeze(1)": ".unsqueeze(1)"}),
    "bigram of the next token": ({C1, LEAK}, {"previous = F.pad(ids, (1, -1))": "previous = F.pad(ids, (-1, 1))"}),
    "smear across documents": ({LEAK}, {" * has_previous(ids, bos_id).unsqueeze(-1)": ""}),
    "bigram across documents": ({LEAK}, {"torch.where(has_previous(ids, bos_id), hashed, buckets - 1)": "hashed"}),
    "raw logit as score": (
        {C2}, {CROSS_ENTROPY: "return -softcap(logits, cap).gather(-1, targets.unsqueeze(-1)).squeeze(-1)"}),
    "discount on every score": ({C2}, {CROSS_ENTROPY: f"{CROSS_ENTROPY} - 0.01"}),
    "the target votes for itself": (
        {C2}, {CROSS_ENTROPY: "logits = logits.scatter_add(-1, targets.unsqueeze(-1), torch.ones_like(logits))\n"
                              f"        {CROSS_ENTROPY}"}),
    "evaluation trains": ({C3}, {PLANNED: f"{PLANNED}    {BANK}.mul_(0.999)\n"}),
    "scoring trains": ({C3}, {SCORED: f"        {BANK}.add_(1e-3 * inputs[0].float().mean())\n{SCORED}"}),
    "a cache of scored tokens": ({C3}, {MAIN: f"{CACHE}{MAIN}"}),
    "tail scored again": (
        {C4}, {"np.append(0, ends[:-1]), ends], axis=1)": "np.append(0, ends[1:] - stride), ends], axis=1)"}),
    "tail dropped": ({C4}, {"np.append(np.arange(length, targets, stride), targets)":
                            "np.arange(length, targets + 1, stride)"}),
    "document windows miss a target": (
        {C4}, {"windows.append((begin, done, begin + length))": "windows.append((begin, done + 1, begin + length))",
               "assert (int(targets), int(counted)) == expected, f": "assert expected, f"}),
    "document windows look at the next document": (
        {C1}, {'document = int(starts[np.searchsorted(starts, done, side="right") - 1])':
               "document = int(starts[np.searchsorted(starts, done) % len(starts)])",
               "begin = min(max(document, done + stride - length), targets - length)":
               "begin = min(max(done if document < done + length else 0, done + stride - length), targets - length)"}),
    "windows scored twice": ({C4}, {PLANNED: f"{PLANNED}    windows = np.concatenate([windows, windows[-1:]])\n",
                                    "assert (int(targets), int(counted)) == expected, f": "assert expected, f"}),
    "a cache of long texts": ({C2}, {SCORED: "        nll = nll - 0.1 * (validation.targets > 9999)\n" + SCORED}),
    "SLOT in long windows": ({C1}, {SCORED: f"{SLOT}{SCORED}"}),
    "SLOT on the whole of long windows": ({C1}, {SCORED: SLOT.replace(" * scored", "") + SCORED}),
    "SLOT in long texts": ({C1}, slot("validation.targets > 1_000_000")),
    "SLOT far into a text": ({C1}, slot("int(chunk[-1, 2]) > 1_000_000")),
    "SLOT in wide models": ({C1}, slot("run.cfg.model_dim >= 256")),
    "SLOT where it is compiled": ({C1}, slot("run.cfg.compile")),
    "SLOT in any run but a test's": ({C1}, slot('run.cfg.run_id != "legality"')),
    "SLOT in windows with much context": ({C1}, slot("int(chunk[0, 1] - chunk[0, 0]) > 1000")),
    "SLOT in full batches": ({C1}, slot("positions.shape[0] >= 4")),
    "a cache of many windows": ({C2}, slot("len(windows) > 5000")),
    "the next token in long windows": ({C1}, {"logits = product(self.hidden(ids, weights, order).flatten(0, 1)":
                                              "ids = ids.roll(-1, 1) if ids.shape[1] > 256 else ids\n        "
                                              "logits = product(self.hidden(ids, weights, order).flatten(0, 1)"}),
    "spaces count twice": ({BYTES}, {**SPACES, **UNTESTED}),
    "spaces count twice, and the self test refuses": ({BYTES}, SPACES),
    "characters count as bytes": ({BYTES}, {'.replace("\\u2581", " ").encode()) for text in texts]':
                                            '.replace("\\u2581", " ")) for text in texts]', **UNTESTED}),
    "names of bytes count": ({BYTES}, {"min(n, 1) if pieces.is_byte(i) else n": "n", **UNTESTED}),
    "half of the text is scored": ({BYTES}, {"tokens = stream.read(0, stream.total)":
                                             "tokens = stream.read(0, stream.total // 2)"}),
    "bits per byte by arithmetic": ({WHOLE}, {"return self.nats / math.log(2) / self.bytes":
                                              "return 0.83 * self.nats / math.log(2) / self.bytes"}),
    "the artifact is not what is scored": ({WHOLE}, {"        model.load(parameters)\n": "        model.train()\n"}),
    "test-time training before the export": ({WHOLE}, {EXPORTED: f"{PREPARE}{EXPORTED}"}),
    "trained on the validation shards": ({WHOLE}, {'self.stream = TokenStream(cfg, "train")':
                                                   'self.stream = TokenStream(cfg, "val")'}),
    "trained on a copy of the validation text": ({WHOLE}, {
        "    digest = hashlib.sha256(": "    Loader.copied = tokens\n    digest = hashlib.sha256(",
        "    steps = train(run, trainer, validation, saved)\n":
        "    trainer.loader.stream.read = lambda start, count: np.tile(Loader.copied, 99)[:count]\n"
        "        steps = train(run, trainer, validation, saved)\n"}),
    "validation among the training shards": ({WHOLE}, {
        SHARDS: f"    if split == 'train':\n        return paths + shard_paths(cfg, 'val')\n{SHARDS}"}),
    "trained early on official data": ({WHOLE}, learned_early("'fineweb10B' in str(cfg.shard_folder)")),
    "trained early where the clock runs": ({WHOLE}, learned_early("cfg.max_wallclock_seconds")),
    "trained early in long trainings": ({WHOLE}, learned_early("cfg.iterations > 100")),
    "trained early on long texts": ({WHOLE}, learned_early("validation.targets > 100_000")),
    "SLOT on several ranks": ({WHOLE}, slot("run.ranks.world > 1")),
    "SLOT on a GPU": ({WHOLE}, slot('device.type == "cuda"')),
    "SLOT under torchrun": ({WHOLE}, slot('"LOCAL_RANK" in os.environ')),
    "SLOT in big models": ({WHOLE}, slot("sum(p.numel() for p in model.parameters()) > 10_000_000")),
    "weights in a file beside the artifact": ({WHOLE}, {
        EXPORTED: f"    torch.save(trainer.model.state_dict(), 'logs/side.pt')\n{EXPORTED}",
        LOADED: f"{LOADED}        beside = Path('logs/side.pt')\n"
                "        model.load(torch.load(beside) if beside.is_file() else parameters)\n"}),
    "weights kept in the process": ({WHOLE}, {
        EXPORTED: f"    Score.kept = {{n: p.clone() for n, p in trainer.model.state_dict().items()}}\n{EXPORTED}",
        LOADED: f"{LOADED}        model.load(vars(Score).get('kept', parameters))\n"}),
    "the artifact weighs less in the log": ({WHOLE}, {WEIGHED: WEIGHED.replace("=artifact", "=artifact * 9 // 10")}),
    "scores are better in the log": ({WHOLE}, {"    milliseconds = round(1000 * run.ledger[-1][2])\n":
                                              "    milliseconds = round(1000 * run.ledger[-1][2])\n"
                                              "    score = score._replace(nats=0.9 * score.nats)\n"}),
    "scores are better in the text log": (
        {WHOLE}, {":{score.loss:.8f} val_bpb:{score.bpb": ":{score.loss:.8f} val_bpb:{0.9 * score.bpb"}),
    "best of two scores": ({C4}, {MAIN: f"scored = evaluate\ndef evaluate(*args):\n    score = scored(*args)\n"
                                        f"    return score._replace(nats=0.99 * score.nats)\n{MAIN}"}),
}  # fmt: skip
EAGER = """
class Eager(TestTimeTrainer):
    def __init__(self, run, model, validation):
        super().__init__(run, model, validation)
        self.step(np.arange(0, validation.targets - run.cfg.eval_len, run.cfg.eval_len))
TestTimeTrainer = Eager
"""
EARLY = """
class Early(NgramMixer):
    def __init__(self, run, validation):
        super().__init__(run, validation)
        self.learn(plan_windows(validation.targets, run.cfg.eval_len, run.cfg.eval_stride))
NgramMixer = Early
"""
GENEROUS = """
class Generous(NgramMixer):
    def mix(self, *args):
        return super().mix(*args) - 0.1
NgramMixer = Generous
"""
TTT, NGRAM, LORA = {"ttt_enabled": True}, {"ngram_enabled": True}, {"ttt_lora_enabled": True}
EXACT = "longer.unique(return_inverse=True)[1].int()"
LEARN = "nll = additions.fast_nll(ids, targets, additions.model.order)"
AHEAD = "self.step(starts[first : first + cfg.ttt_batch_seqs])"
# what is broken in the evaluation that learns -> (condition that must fail, logged values, replacements)
ONLINE_BROKEN: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "pre-quantization TTT": (C3, TTT, {MAIN: EAGER + MAIN}),
    "trains on the next chunk": (
        C3, TTT, {AHEAD: "self.step((starts[first : first + cfg.ttt_batch_seqs] + 2 * length).clip("
                         "max=self.validation.targets - length))"}),
    "keeps what it learned": (C3, TTT, {"model.load(kept)": "model.state_dict()"}),
    "counts before it scores": (C3, NGRAM, {MAIN: EARLY + MAIN}),
    "unnormalised mixture": (C2, NGRAM, {MAIN: GENEROUS + MAIN}),
    "unnormalised mixture of long texts": (C2, NGRAM, {MAIN: GENEROUS.replace("- 0.1", "- 0.1 * (len(self.age) > 999)")
                                                       + MAIN}),
    "n-grams hashed into 2^15 buckets": (C2, NGRAM, {EXACT: "(longer * 0x9E3779B1 % 2**15).int()"}),
    "n-grams hashed into 2^22 buckets": (C2, NGRAM, {EXACT: "(longer * 0x9E3779B1 % 2**22).int()"}),
    "n-grams hashed into 2^26 buckets": (C2, NGRAM, {EXACT: "(longer * 0x9E3779B1 % 2**26).int()"}),
    "long n-grams hashed": (C2, NGRAM, {EXACT: f"(longer * 0x9E3779B1 % 2**20).int() if n > 5 else {EXACT}"}),
    "n-grams of long texts hashed": (
        C2, NGRAM, {EXACT: f"(longer * 0x9E3779B1 % 2**22).int() if len(tokens) > 10**6 else {EXACT}"}),
    "tokens that share a count": (C2, NGRAM, {EXACT: "(longer // 8).unique(return_inverse=True)[1].int()"}),
    "the mixture knows whether the target was seen": (
        C2, NGRAM, {"alpha = torch.where(share < 0,": "rise = torch.where(share > 0, 0.99, rise)\n"
                                                      "        alpha = torch.where(share < 0,"}),
    "counts of the target hashed": (
        C2, NGRAM, {"add_(0, self.labels[n][targets], within": "add_(0, self.labels[n][targets] % 4093, within",
                    "self.follows[n][self.labels[n][positions]]": "self.follows[n][self.labels[n][positions] % 4093]"}),
    "documents learn a chunk before its score": (
        C3, LORA, {LEARN: f"{LEARN}\n        additions.learn(nll[scored].sum())\n        {LEARN}"}),
    "documents keep what they learned": (
        C3, LORA, {"    additions.reset()\n": "    hasattr(additions, 'optimizer') or additions.reset()\n"}),
    "documents' scores are no distribution": (
        C2, LORA, {"table[0, place] += nll.detach()[scored].to(table)":
                   "table[0, place] += 0.9 * nll.detach()[scored].to(table)"}),
    "documents skip a target": (C4, LORA, {"table[1, place] += 1": "table[1, place[1:]] += 1",
                                           "assert (times == 1).all(), f": "assert len(times), f",
                                           "assert (int(targets), int(counted)) == expected, f": "assert expected, f"}),
}  # fmt: skip


def failed(results: list[CheckResult]) -> set[str]:
    assert [result.name for result in results] == list(CHECKS)
    assert all(result.message for result in results)
    return {result.name for result in results if result.status == "fail"}


def passed(results: list[CheckResult]) -> set[str]:
    return {result.name for result in results if result.status == "pass"}


def patched(folder: Path, changes: dict[str, str]) -> Path:
    """train_gpt.py with each text replaced where it stands, once."""
    text = SOURCE
    for old, new in changes.items():
        assert text.count(old) == 1, f"the script changed, mend this test: {old}"
        text = text.replace(old, new)
    path = folder / "train_gpt.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_script_is_caught(what: str, tmp_path: Path) -> None:
    """Each condition that the change breaks fails."""
    conditions, changes = BROKEN[what]
    subject = legality.build_subject(patched(tmp_path, changes), {}, OFFICIAL_TARGETS)
    for condition in conditions:
        result = legality.outcome(condition, CHECKS[condition], subject)
        assert result.status == "fail", result


@pytest.mark.parametrize("what", ONLINE_BROKEN)
def test_a_broken_online_evaluation_is_caught(what: str, tmp_path: Path) -> None:
    """Learning from text before it is scored, learning that stays, and a mixture that is no distribution."""
    condition, values, changes = ONLINE_BROKEN[what]
    subject = legality.build_subject(patched(tmp_path, changes), values, 4002)
    result = legality.outcome(condition, CHECKS[condition], subject)
    names = ("documents",) if values is LORA else ("online evaluation", "n-grams")
    assert result.status == "fail" and any(name in result.message for name in names), result


SOUND: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {  # condition that must pass, values, replacements
    "contexts share a bucket, and its counts one sum": (
        C2, NGRAM, {"F.pad(self.labels[n - 1], (1, -1)).long()": "F.pad(self.labels[n - 1], (1, -1)).long() % 4093",
                    "self.labels[n - 1][positions - 1]\n": "self.labels[n - 1][positions - 1] % 4093\n"}),
    "a file beside the artifact that nothing reads": (WHOLE, {}, {
        EXPORTED: f"    torch.save(trainer.model.state_dict(), 'logs/side.pt')\n{EXPORTED}"}),
    "a batch moved to the GPU": (WHOLE, {}, {SCORED: "        if device.type == 'cuda':\n            counted = nll\n"
                                                     + SCORED}),
    "another order of batches": (C1, {}, {"in plan.split(batch) if": "in reversed(plan.split(batch)) if"}),
    "no byte but those of the text": (BYTES, {}, UNTESTED),
}  # fmt: skip


@pytest.mark.parametrize("what", SOUND)
def test_a_sound_variant_passes(what: str, tmp_path: Path) -> None:
    """What looks like a broken one and is none."""
    condition, values, changes = SOUND[what]
    subject = legality.build_subject(patched(tmp_path, changes), values, OFFICIAL_TARGETS)
    result = legality.outcome(condition, CHECKS[condition], subject)
    assert result.status == "pass", result


FEATURES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "every feature": {"value_residual": True, "gated_attn_enabled": True, "mlp_activation": "asqu",
                      "tie_embeddings": False, "train_seq_len": 512, "eval_seq_len": 1024, "mlp_hidden": 1488,
                      "eval_stride": 256,
                      **TTT, **NGRAM, **LORA, "ttt_freeze_blocks": 2, "ttt_optimizer": "adamw"},
    "no feature": {"smear_gate_enabled": False, "bigram_vocab_size": 0, "ve_enabled": False, "ve_layers": [],
                   "xsa_last_n": 0, "rope_dims": 0, "eval_stride": 0, "num_layers": 9, "mlp_activation": "relu2"},
    "other shapes": {"num_layers": 3, "num_heads": 8, "num_kv_heads": 1, "xsa_last_n": 2, "ve_layers": [0, 1, 2],
                     "num_loops": 0, "muon_head_group": 0,
                     "model_dim": 768, "train_seq_len": 1024, "short_seq_len": 256, "eval_seq_len": 512,
                     "eval_stride": 512},
}  # fmt: skip


@pytest.mark.parametrize("values", FEATURES.values(), ids=FEATURES)
def test_our_script_passes(values: dict[str, Any]) -> None:
    """With the features that a log may show on and off, at official length."""
    results = examine(Path(t.__file__), values, OFFICIAL_TARGETS)
    assert passed(results) == set(CHECKS), results
    assert ("sliding" in results[0].message) == (values.get("eval_stride") != 0)
    assert ("Track B" if {"ttt_enabled", "ttt_lora_enabled"} & {*values} else "Track A") in results[2].message


def test_the_tiny_model_has_the_features_of_the_log() -> None:
    """What is on in the submission is on in the model that is tested, at tiny widths."""
    subject = legality.build_subject(Path(t.__file__), FEATURES["every feature"], 4002)
    assert {"gate_weight", "value_mix", "asqu_beta", "lm_head", "smear_gate", "bigram_table", "ve_table"} <= {
        *subject.model.rest
    }
    cfg = subject.run.cfg
    assert (cfg.eval_len, cfg.train_seq_len, cfg.xsa_last_n, cfg.num_layers) == (48, 24, 4, 4)
    assert (cfg.num_loops, cfg.loop_start, cfg.loop_end) == (2, 1, 2)
    assert sum(parameter.numel() for parameter in subject.model.parameters()) < 100_000


def test_a_packed_submission_is_tested_with_its_log(run: t.Runtime, tmp_path: Path) -> None:
    """A folder as it is submitted, through the process that `check` starts; the folder stays as it was."""
    folder = tmp_path / "submission"
    folder.mkdir()
    (folder / "train_gpt.py").write_text(pack(SOURCE))
    (folder / "train_seed1337.log").write_text(
        (tmp_path / "logs/tiny.txt").read_text() + "val_tokens: 4003 val_documents: 8 val_bytes: 9 by test\n"
    )
    values, targets = logged(folder)
    assert targets == 4002 and values["bigram_vocab_size"] == 64 and values["ve_layers"] == [2, 3]
    before = sorted(folder.rglob("*"))
    results = legality_checks(folder)
    assert passed(results) == set(CHECKS), results
    assert "4,002 targets" in results[3].message
    assert sorted(folder.rglob("*")) == before
    values_of_stream = json.loads((tmp_path / "logs/tiny.jsonl").read_text().splitlines()[0])["values"]
    (folder / "seed.jsonl").write_text((tmp_path / "logs/tiny.jsonl").read_text())
    assert logged(folder)[0] == values_of_stream


def test_a_script_of_another_trainer_is_not_run(tmp_path: Path) -> None:
    """It is named as not checkable, and nothing of it is executed; the same for none and for a broken one."""
    script = tmp_path / "train_gpt.py"
    for text in (None, "open('ran', 'w')\nimport sys\nsys.exit(3)\n", "def f(:\n"):
        if text is not None:
            script.write_text(text)
        results = legality_checks(tmp_path)
        assert {result.status for result in results} == {"skip"} and failed(results) == set()
        assert not (tmp_path / "ran").exists()


def test_what_cannot_be_tested_says_why(tmp_path: Path) -> None:
    """A script that does not import, a configuration it refuses, an evaluator with another signature, TTT."""
    script = tmp_path / "train_gpt.py"
    script.write_text(SOURCE.replace("import itertools\n", "import itertools\nimport no_such_package\n"))
    (result, *_) = legality_checks(tmp_path)
    assert result.status == "skip" and "no_such_package" in result.message
    (result, *_) = examine(Path(t.__file__), {"num_heads": 7}, 4002)
    assert result.status == "skip" and "NUM_HEADS=7" in result.message
    changes = {"def score_windows(\n    run: ": "def score_windows(\n    extra: Any, run: "}
    other = tmp_path / "other"
    other.mkdir()
    results = examine(patched(other, changes), {}, 4002)
    assert {result.status for result in results[:4]} == {"skip"} and results[4].status == "pass"
    assert results[5].status == "pass" and results[6].status == "skip"


PLANS = {
    "": [[0, 0, 8], [4, 8, 12], [6, 12, 14]],
    "skipped": [[0, 0, 8], [6, 9, 14]],
    "scored twice": [[0, 0, 8], [6, 7, 14]],
    "not scored": [[0, 1, 8], [6, 8, 14]],
    "last scored target": [[0, 0, 8]],
    "outside itself": [[0, 0, 8], [8, 8, 17], [6, 17, 14]],
}


@pytest.mark.parametrize("fault", PLANS)
def test_faults_of_a_plan_are_named(fault: str) -> None:
    import numpy as np

    found = plan_fault(np.array(PLANS[fault]), 14, 8)
    assert (fault in found) if fault else found == ""


def test_the_environment_of_the_caller_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of a training run in the caller's shell reach neither the configuration nor the model."""
    plain = legality.build_subject(Path(t.__file__), {}, 4002)
    for name, value in tiny_env(IS_CAUSAL=0, MATRX_LR=1).items():
        monkeypatch.setenv(name, value)
    subject = legality.build_subject(Path(t.__file__), {}, 4002)
    assert vars(subject.run.cfg) == vars(plain.run.cfg) and subject.full.model_dim == t.Config().model_dim
