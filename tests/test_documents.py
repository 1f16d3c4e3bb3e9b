"""DOC_ATTENTION: attention that does not cross documents (descendants of PR #634)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_env, tiny_model

import train_gpt as t

BOS = 1
CPU = torch.device("cpu")


def packed(seed: int = 0) -> torch.Tensor:
    """Two rows of 32 tokens; documents begin at 0, 9 and 21 and at 0 and 16."""
    ids = torch.randint(4, 512, (2, 32), generator=torch.Generator().manual_seed(seed))
    ids[0, [0, 9, 21]] = BOS
    ids[1, [0, 16]] = BOS
    return ids


def logits(model: t.GPT, ids: torch.Tensor) -> torch.Tensor:
    weights = model.weights(False)
    with torch.no_grad():
        return model.logits(model.hidden(ids, weights, model.order), weights)


def document_model(**changes: Any) -> t.GPT:
    """A randomized tiny model with document attention."""
    model = tiny_model(DOC_ATTENTION=1, **changes)
    model.attend = t.math_documents()
    return model


@pytest.mark.parametrize(("row", "begin", "end"), [(0, 0, 9), (0, 9, 21), (0, 21, 32), (1, 0, 16), (1, 16, 32)])
def test_documents_do_not_see_each_other(row: int, begin: int, end: int) -> None:
    """Other tokens everywhere else change no bit of a document's logits; without DOC_ATTENTION they do."""
    ids, model = packed(), document_model()
    other = packed(seed=1)
    other[row, begin:end] = ids[row, begin:end]
    assert torch.equal(*(logits(model, x)[row, begin:end] for x in (ids, other)))
    dense = tiny_model()
    same = torch.equal(*(logits(dense, x)[row, begin:end] for x in (ids, other)))
    assert same == (begin == 0), "the first document of a row has nothing before it"


def test_a_document_scores_in_a_row_as_it_does_alone() -> None:
    """Rotary embedding is relative, so only rounding differs."""
    ids, model = packed(), document_model()
    torch.testing.assert_close(logits(model, ids)[:1, 9:21], logits(model, ids[:1, 9:21]), rtol=0, atol=1e-4)


def test_flex_attention_is_the_plain_definition() -> None:
    """Forward only: PyTorch has no backward pass of flex attention on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 128, heads, 16, generator=generator) for heads in (4, 2, 2))
    documents = torch.arange(128).div(50, rounding_mode="floor").expand(2, 128)
    flex, plain = t.flex_documents(), t.math_documents()
    got, want = (end(q, k, v, end.mask(documents)) for end in (flex, plain))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has a backward pass on CUDA only")
def test_flex_attention_and_its_gradients_on_the_gpu() -> None:
    assert t.probe_document_attention(t.flex_documents(), tiny_config(MODEL_DIM=256), torch.device("cuda")) < 2e-2


def test_the_probe_finds_a_mask_that_leaks() -> None:
    """A back end that ignores the documents is wrong by far more than rounding."""
    plain, cfg = t.math_documents(), tiny_config(DOC_ATTENTION=1)
    leaky = plain._replace(mask=lambda documents: plain.mask(torch.zeros_like(documents)))
    assert t.probe_document_attention(plain, cfg, CPU) < 1e-5 < 0.1 < t.probe_document_attention(leaky, cfg, CPU)


def test_the_mask_is_made_once_per_pass() -> None:
    model, made = document_model(), []
    plain = model.attend
    model.attend = plain._replace(mask=lambda documents: made.append(documents) or plain.mask(documents))
    logits(model, packed())
    assert len(made) == 1 and model.cfg.num_layers == 4


def test_a_run_trains_and_scores_with_it(
    corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The back end is named in the log; the artifact carries the setting to EVAL_ONLY, with the same score."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t.sys, "argv", ["train_gpt.py"])
    logs = {}
    for name, settings in {"run": {"DOC_ATTENTION": 1}, "dense": {}, "again": {"EVAL_ONLY": 1}}.items():
        artifact = {"ARTIFACT_PATH": "logs/run.pgolf"} if settings.get("EVAL_ONLY") else {}
        monkeypatch.setattr(t.os, "environ", tiny_env(**corpus, **settings, **artifact, RUN_ID=name))
        t.main()
        logs[name] = (tmp_path / f"logs/{name}{'.eval' if artifact else ''}.txt").read_text().splitlines()
    assert any(line.startswith("attn_backend:math ") for line in logs["run"])
    name = "final_int6_sliding_window_exact"
    final = {key: [line for line in log if line.startswith(name)] for key, log in logs.items()}
    assert final["run"] == final["again"] != final["dense"]


@pytest.mark.parametrize("settings", [{"ATTN_BACKEND": "flex"}, {"ATTN_BACKEND": "cudnn", "DOC_ATTENTION": 1}])
def test_back_ends_that_do_not_fit_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(t.UserError, match="ATTN_BACKEND=(flex|cudnn) DOC_ATTENTION=[01]: flex and"):
        tiny_config(**settings)


def test_flex_is_refused_where_it_has_no_backward_pass(run: t.Runtime) -> None:
    """Asked for by name on the CPU it is an error, not a silent fallback."""
    here = t.replace(run, cfg=t.replace(run.cfg, doc_attention=True))
    with pytest.raises(t.UserError, match="ATTN_BACKEND=flex: not usable here .*backward on CPU"):
        t.choose_back_end(here, t.DOCUMENT_BACK_ENDS, "flex")
