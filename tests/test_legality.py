"""records/legality.py: our script meets the reviewers' conditions, and every way we know of breaking one is caught."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_env

import train_gpt as t
from records import legality
from records.checks import CheckResult
from records.legality import CHECKS, OFFICIAL_TARGETS, examine, legality_checks, logged, plan_fault
from records.pack import pack

SOURCE = Path(t.__file__).read_text(encoding="utf-8")
C1, C2, C3, C4, LEAK = CHECKS

CROSS_ENTROPY = 'return F.cross_entropy(soft_cap(logits, cap, shift), targets, reduction="none")'
SCORED = "        sums += torch.stack("
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
# what is broken -> (conditions that must fail, replacements in the script)
BROKEN: dict[str, tuple[set[str], dict[str, str]]] = {
    "attention looks ahead": ({C1}, {".tril().unsqueeze(1)": ".unsqueeze(1)"}),
    "bigram of the next token": ({C1, LEAK}, {"previous = F.pad(ids, (1, -1))": "previous = F.pad(ids, (-1, 1))"}),
    "smear across documents": ({LEAK}, {" * has_previous(ids, bos_id).unsqueeze(-1)": ""}),
    "bigram across documents": ({LEAK}, {"torch.where(has_previous(ids, bos_id), hashed, buckets - 1)": "hashed"}),
    "raw logit as score": (
        {C2}, {CROSS_ENTROPY: "return -soft_cap(logits, cap).gather(-1, targets.unsqueeze(-1)).squeeze(-1)"}),
    "discount on every score": ({C2}, {CROSS_ENTROPY: f"{CROSS_ENTROPY} - 0.01"}),
    "the target votes for itself": (
        {C2}, {CROSS_ENTROPY: "logits = logits.scatter_add(-1, targets.unsqueeze(-1), torch.ones_like(logits))\n"
                              f"        {CROSS_ENTROPY}"}),
    "evaluation trains": ({C3}, {PLANNED: f"{PLANNED}    {BANK}.mul_(0.999)\n"}),
    "scoring trains": ({C3}, {SCORED: f"        {BANK}.add_(1e-3 * tokens.float().mean())\n{SCORED}"}),
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
HAS_NGRAM = "NGRAM_ENABLED" in t.Config.variables()  # a trainer without the mixer has nothing to break


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
    """The condition that the change breaks fails; those it has nothing to do with do not."""
    conditions, changes = BROKEN[what]
    results = examine(patched(tmp_path, changes), {}, 4002)
    assert conditions <= failed(results), results
    follow = {C1: {C2}, C2: set(), C3: {C1, C2, C4}, C4: {C3}, LEAK: set()}  # the script asserts its own coverage
    assert failed(results) <= conditions.union(*(follow[condition] for condition in conditions)), results


@pytest.mark.parametrize("what", [what for what, row in ONLINE_BROKEN.items() if HAS_NGRAM or row[1] is not NGRAM])
def test_a_broken_online_evaluation_is_caught(what: str, tmp_path: Path) -> None:
    """Learning from text before it is scored, learning that stays, and a mixture that is no distribution."""
    condition, values, changes = ONLINE_BROKEN[what]
    subject = legality.build_subject(patched(tmp_path, changes), values, 4002)
    result = legality.outcome(condition, CHECKS[condition], subject)
    name = "documents" if values is LORA else "online evaluation"
    assert result.status == "fail" and name in result.message, result


FEATURES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "every feature": {"value_residual": True, "gated_attn_enabled": True, "mlp_activation": "asqu",
                      "tie_embeddings": False, "eval_seq_len": 4096, "mlp_hidden": 1488, "eval_stride": 512},
    "no feature": {"smear_gate_enabled": False, "bigram_vocab_size": 0, "ve_enabled": False, "ve_layers": [],
                   "xsa_last_n": 0, "rope_dims": 0, "eval_stride": 0, "num_layers": 9, "mlp_activation": "relu2"},
    "other shapes": {"num_layers": 3, "num_heads": 8, "num_kv_heads": 1, "xsa_last_n": 2, "ve_layers": [0, 1, 2],
                     "model_dim": 768, "train_seq_len": 1024, "short_seq_len": 256, "eval_seq_len": 512,
                     "eval_stride": 512},
    "online": {**TTT, **(NGRAM if HAS_NGRAM else {}), "ttt_freeze_blocks": 2, "ttt_optimizer": "adamw"},
    "by documents": LORA,
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
    for name, value in tiny_env(IS_CAUSAL=0, MATRX_LR=1).items():
        monkeypatch.setenv(name, value)
    assert passed(examine(Path(t.__file__), {}, 4002)) == set(CHECKS)
