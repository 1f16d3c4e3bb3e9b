"""The forward pass under every feature, and late QAT on the export's grid."""

import importlib
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as t
from conftest import VOCAB, codes_of, tiny_config, tiny_model, unscaled

CPU = torch.device("cpu")
BOS, LENGTH, FLIPPED = 1, 24, 13
ALL_ON = {"VALUE_RESIDUAL": 1, "GATED_ATTN_ENABLED": 1, "LN_SCALE": 1}
FEATURES: dict[str, dict[str, Any]] = {
    "default": {}, "all on": ALL_ON, "value residual": {"VALUE_RESIDUAL": 1}, "gated": {"GATED_ATTN_ENABLED": 1},
    "gated, no xsa": {"GATED_ATTN_ENABLED": 1, "XSA_LAST_N": 0},
    "no xsa": {"XSA_LAST_N": 0}, "xsa on two": {"XSA_LAST_N": 2}, "no smear": {"SMEAR_GATE_ENABLED": 0},
    "no bigram": {"BIGRAM_VOCAB_SIZE": 0}, "no value embedding": {"VE_ENABLED": 0}, "ln scale": {"LN_SCALE": 1},
    "full rope": {"ROPE_DIMS": 0}, "relu2": {"MLP_ACTIVATION": "relu2"}, "asqu": {"MLP_ACTIVATION": "asqu"},
    "untied": {"TIE_EMBEDDINGS": 0}, "multi-head": {"NUM_KV_HEADS": 4}, "multi-query": {"NUM_KV_HEADS": 1},
    "odd layers": {"NUM_LAYERS": 5}, "one layer": {"NUM_LAYERS": 1, "XSA_LAST_N": 1, "VE_LAYERS": 0},
    "across documents": {"DOC_ATTENTION": 0}, "no key offset": {"KEY_OFFSET": 0},
    "wide mlp": {"MLP_HIDDEN": 48},
    "longer than trained": {"TRAIN_SEQ_LEN": 16}, "5 bits": {"MATRIX_BITS": 5},
    "bare": {"SMEAR_GATE_ENABLED": 0, "BIGRAM_VOCAB_SIZE": 0, "VE_ENABLED": 0, "XSA_LAST_N": 0},
}  # fmt: skip
every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())


def random_ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Token ids with some document starts inside."""
    ids = torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, [place for place in (0, 7, 8, 16) if place < length]] = BOS
    return ids


def order_of(model: t.GPT) -> tuple[int, ...]:
    return tuple(range(model.cfg.num_layers))


@torch.no_grad()
def logits_of(model: t.GPT, ids: Tensor, fake_quant: bool = False, order: tuple[int, ...] = ()) -> Tensor:
    weights = model.weights(fake_quant)
    return model.logits(model.hidden(ids, weights, order or order_of(model)), weights)


@torch.no_grad()
def nll_of(model: t.GPT, tokens: Tensor) -> Tensor:
    """nll (B, T-1) of each token but the first."""
    return model.nll(tokens[:, :-1], tokens[:, 1:], model.weights(False), order_of(model))


# --- causality and documents ------------------------------------------------------------------------


@every_feature
def test_a_later_token_changes_no_earlier_score(features: dict[str, Any]) -> None:
    """Flip token t in row 0: scores of tokens before t stay, those of t and after move, and row 1 stays whole.

    From position 16 on it is another document, whose scores stay unless attention crosses documents.
    """
    model, tokens = tiny_model(**features), random_ids()
    flipped = tokens.clone()
    flipped[0, FLIPPED] = (tokens[0, FLIPPED] + 7) % VOCAB
    before, after = nll_of(model, tokens), nll_of(model, flipped)
    torch.testing.assert_close(after[0, : FLIPPED - 1], before[0, : FLIPPED - 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[1], before[1], rtol=1e-5, atol=1e-5)
    moved = (after[0] != before[0]).tolist()
    assert all(moved[FLIPPED - 1 : 16]) and set(moved[16:]) == {not model.cfg.doc_attention}


@every_feature
def test_probabilities_sum_to_one(features: dict[str, Any]) -> None:
    """exp(-nll) over all possible targets is 1 at every position: what is scored is a distribution."""
    model, ids = tiny_model(**features), random_ids(1, 4)
    targets = torch.arange(VOCAB)[:, None].expand(-1, 4)
    with torch.no_grad():
        nll = model.nll(ids.expand(VOCAB, -1), targets, model.weights(False), order_of(model))
    torch.testing.assert_close((-nll.double()).exp().sum(0), torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smear", [0, 1])
@pytest.mark.parametrize("buckets", [0, 64])
def test_embedding_features_stay_inside_their_document(smear: int, buckets: int) -> None:
    """Flip any token: only its own embedding and, within the document, those that look back to it change.

    Smear and bigram each look back one token; together two, since what smear mixes in holds the bigram before.
    """
    model, ids = tiny_model(SMEAR_GATE_ENABLED=smear, BIGRAM_VOCAB_SIZE=buckets), random_ids(1)
    reach = smear + bool(buckets)
    starts = (ids[0] == BOS).nonzero().flatten().tolist()
    with torch.no_grad():
        before = model.embed(ids, None)
        for place in range(LENGTH):
            changed = ids.clone()
            changed[0, place] = 400 if ids[0, place] != 400 else 401
            if place in starts:
                continue
            moved = (model.embed(changed, None) != before).any(-1)[0].nonzero().flatten().tolist()
            end = min([start for start in starts if start > place] + [LENGTH])
            assert moved == list(range(place, min(place + reach + 1, end)))


def test_a_window_starts_as_a_document_does() -> None:
    """The first token of a window has no previous token, also where it is not BOS: nothing wraps round."""
    model, ids = tiny_model(), random_ids(1)
    ids[0, 0] = 77
    elsewhere = ids.clone()
    elsewhere[0, -1] = 99
    with torch.no_grad():
        assert torch.equal(model.embed(ids, None)[:, :-1], model.embed(elsewhere, None)[:, :-1])
        torch.testing.assert_close(model.embed(ids[:, :1], None), model.embed(ids, None)[:, :1])
    assert t.bigram_hash(ids, BOS, 64)[0, 0] == t.bigram_hash(ids, BOS, 64)[0, 7] == 63


def test_bigram_hash_and_smear_equal_their_definitions() -> None:
    """Against plain loops over positions."""
    ids, generator = random_ids(), torch.Generator().manual_seed(1)
    x, gate = torch.randn(2, LENGTH, 8, generator=generator), torch.randn(8, generator=generator)
    buckets, smeared = t.bigram_hash(ids, BOS, 64), t.smear(x, ids, gate, BOS)
    for row, place in itertools.product(range(2), range(LENGTH)):
        token, alone = int(ids[row, place]), place == 0 or int(ids[row, place]) == BOS
        bucket = 63 if alone else ((36313 * token) ^ (27191 * int(ids[row, place - 1]))) % 63
        share = torch.zeros(8) if alone else torch.sigmoid(gate)
        assert int(buckets[row, place]) == bucket
        torch.testing.assert_close(smeared[row, place], (1 - share) * x[row, place] + share * x[row, place - 1])


# --- attention ------------------------------------------------------------------------------------


def random_heads(*heads: int, length: int = 16, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, length, count, size, generator=generator) for count in heads]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_exclusive_attention_is_orthogonal_to_its_own_value(kv_heads: int) -> None:
    """Head by head, each against the value head that serves it; only the part along v is taken away."""
    y, v = (x.flatten(0, 1) for x in random_heads(4, kv_heads))
    out, own = t.PLAIN_LAYER.xsa(y, v, v), v.repeat_interleave(4 // kv_heads, dim=1)
    assert (out * own).sum(-1).abs().max() < 1e-5
    removed = y - out
    assert (F.cosine_similarity(removed, own, dim=-1).abs() - 1).abs().max() < 1e-4
    torch.testing.assert_close(t.PLAIN_LAYER.xsa(out, v, v), out, rtol=1e-5, atol=1e-5)


def test_exclusive_attention_survives_a_zero_value() -> None:
    y, v = (x.flatten(0, 1) for x in random_heads(4, 2))
    assert torch.equal(t.PLAIN_LAYER.xsa(y, torch.zeros_like(v), torch.zeros_like(v)), y)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_attention_equals_repeated_heads(kv_heads: int) -> None:
    """Against the textbook formula in float64 with each key/value head repeated for its neighbours."""
    q, k, v = (x.double() for x in random_heads(4, kv_heads, kv_heads))
    keys, values = (x.repeat_interleave(4 // kv_heads, dim=2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ keys.mT / math.sqrt(q.shape[-1])
    visible = torch.ones(16, 16, dtype=torch.bool).tril()
    expected = (scores.masked_fill(~visible, -math.inf).softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(t.PLAIN_ATTENTION(q, k, v), expected)


@pytest.mark.parametrize("dims", [2, 4, 8])
def test_partial_rope_leaves_the_other_dimensions(dims: int) -> None:
    """The first dims are rotated by the position's angle in half-split pairs, the rest are the input's bits."""
    cfg = tiny_config(ROPE_DIMS=dims)
    (x,) = random_heads(4)
    out = t.apply_rotary(x, *t.rotary_table(16, cfg, CPU))
    assert torch.equal(out[..., dims:], x[..., dims:]) and torch.equal(out[:, 0], x[:, 0])
    half = dims // 2
    for place, pair in itertools.product(range(16), range(half)):
        angle = place * cfg.rope_base ** (-2 * pair / dims)
        plane = torch.view_as_complex(torch.stack([x[:, place, :, pair], x[:, place, :, pair + half]], -1))
        turned = torch.view_as_complex(torch.stack([out[:, place, :, pair], out[:, place, :, pair + half]], -1))
        torch.testing.assert_close(turned, plane * complex(math.cos(angle), -math.sin(angle)))


def test_rotary_scores_depend_on_distance_only() -> None:
    """Dot products of rotated queries and keys are those of any other two positions as far apart."""
    q, k = (x[:, :1].expand(-1, 16, -1, -1) for x in random_heads(4, 4))
    table = t.rotary_table(16, tiny_config(ROPE_DIMS=0), CPU)
    turned_q, turned_k = t.apply_rotary(q, *table), t.apply_rotary(k, *table)
    torch.testing.assert_close(
        (turned_q[:, 9] * turned_k[:, 4]).sum(-1), (turned_q[:, 15] * turned_k[:, 10]).sum(-1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("length", [1, 16, 31, 32])
def test_rotary_table_is_the_trained_one_up_to_the_trained_length(length: int) -> None:
    """A shorter window must not get another base: NTK scaling that is always on is a published defect."""
    cfg = tiny_config()
    trained = torch.outer(torch.arange(32.0), 10_000.0 ** (-torch.arange(0, 4, 2.0) / 4))
    cos, sin = t.rotary_table(length, cfg, CPU)
    torch.testing.assert_close(cos[:, 0], trained[:length].cos())
    torch.testing.assert_close(sin[:, 0], trained[:length].sin())


def test_rotary_base_slows_down_beyond_the_trained_length() -> None:
    """At twice the length the fastest frequency is as trained and the slowest covers twice the distance."""
    cfg = tiny_config(ROPE_DIMS=8, ROPE_BASE=100)
    (trained, _), (longer, _) = t.rotary_table(32, cfg, CPU), t.rotary_table(64, cfg, CPU)
    torch.testing.assert_close(longer[:32, 0, 0], trained[:, 0, 0])
    torch.testing.assert_close(longer[::2, 0, -1], trained[:, 0, -1])
    assert (torch.acos(longer[1, 0, 1:]) < torch.acos(trained[1, 0, 1:])).all()


def bidirectional(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2)


def tiled_heads(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    """Causal, but query head h reads value head h % KV instead of its neighbours'."""
    k, v = (x.repeat(1, 1, q.shape[2] // x.shape[2], 1) for x in (k, v))
    return t.PLAIN_ATTENTION(q, k, v)


def no_key_gradient(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    return t.PLAIN_ATTENTION(q, k.detach() + 0 * k, v)


def dense(run: t.Runtime) -> t.Runtime:
    """The run without DOC_ATTENTION."""
    return t.replace(run, cfg=t.replace(run.cfg, doc_attention=False))


WRONG = [bidirectional, tiled_heads, no_key_gradient, lambda *inputs: t.PLAIN_ATTENTION(*inputs) * math.nan]


@pytest.mark.parametrize("wrong", WRONG, ids=["bidirectional", "tiled heads", "key gradient", "nan"])
def test_wrong_kernels_are_refused_and_the_reason_logged(
    wrong: Callable[..., Tensor], run: t.Runtime, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is wrong forwards or backwards is passed over by auto, and an error where it was named."""
    run = dense(run)
    assert t.fault(*t.probe_attention(t.Attention(wrong), run.cfg, CPU))
    monkeypatch.setitem(t.ATTENTION, "flash", lambda: t.Attention(wrong))
    t.choose_back_end(run, t.attention_back_ends(run.cfg), run.cfg.attn_backend)
    log = (in_tmp / "logs/tiny.txt").read_text()
    assert re.search(r"attn_backend:math .*flash: wrong", log)
    monkeypatch.setitem(t.ATTENTION, "math", lambda: t.Attention(wrong))
    with pytest.raises(t.UserError, match="flash.*math"):
        t.choose_back_end(run, t.attention_back_ends(run.cfg), run.cfg.attn_backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("doc_attention", [0, 1])
def test_one_wrong_row_of_attention_is_refused_in_every_precision(
    doc_attention: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token's output of 256, or a gradient of the wrong sign; the plain definition is allowed its own error."""
    monkeypatch.setattr(t, "compute_dtype", lambda _: dtype)
    cfg = t.Config.from_env({"RUN_ID": "default", "DOC_ATTENTION": str(doc_attention)})
    plain = t.PLAIN_ATTENTION

    def last_row_lost(*inputs: Any) -> Tensor:
        y = plain(*inputs)
        return torch.cat([y.flatten(0, 1)[:-1], 0 * y[-1, -1:]]).view_as(y)

    def wrong_sign(q: Tensor, *inputs: Any) -> Tensor:
        return plain(2 * q.detach() - q, *inputs)

    for attend, is_right in ((plain, True), (last_row_lost, False), (wrong_sign, False)):
        error, allowed = t.probe_attention(plain._replace(attend=attend), cfg, CPU)
        assert (not t.fault(error, allowed)) == is_right, (attend, error, allowed)


def test_the_right_kernel_is_taken_first(run: t.Runtime, in_tmp: Path) -> None:
    """Within rounding of float64 attention; the log names it."""
    run = dense(run)
    attend = t.choose_back_end(run, t.attention_back_ends(run.cfg), run.cfg.attn_backend)
    assert t.probe_attention(attend, run.cfg, CPU)[0] < 1e-4
    assert "attn_backend:flash" in (in_tmp / "logs/tiny.txt").read_text()


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4", "cudnn"])
def test_a_named_back_end_that_is_missing_is_an_error(
    name: str, corpus: dict[str, str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is taken in its place."""
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute.interface"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with (
        t.Runtime.start(tiny_config(ATTN_BACKEND=name, DOC_ATTENTION=0, **corpus), {}) as run,
        pytest.raises(t.UserError, match=f"ATTN_BACKEND={name}"),
    ):
        t.choose_back_end(run, t.attention_back_ends(run.cfg), run.cfg.attn_backend)


def test_keys_are_offset_within_documents() -> None:
    """The second half is the previous token's; the first half, and what begins a document or row, keep their own."""
    model, ids = tiny_model(), random_ids(2, 9)
    k = torch.arange(18.0)[:, None, None] + torch.arange(4) / 10
    follows = model.begin(ids, model.weights(False), order_of(model), None).follows
    got = t.offset_keys(k, follows).view(2, 9, 4)
    assert torch.equal(got[..., :2], k.view(2, 9, 4)[..., :2])
    places = (got[..., 2] - 0.2).round().long()
    assert places.tolist() == [[0, 0, 1, 2, 3, 4, 5, 7, 8], [9, 9, 10, 11, 12, 13, 14, 16, 17]]


def textbook_attention(model: t.GPT, x: Tensor, ids: Tensor, layer: int, first_v: Tensor) -> Tensor:
    """Attention of x (T, C) with every feature on, head by head, as the techniques are written down."""
    cfg, rest = model.cfg, model.rest
    size, group = cfg.head_dim, cfg.num_heads // cfg.num_kv_heads
    table, documents = t.rotary_table(len(x), cfg, CPU), (ids == BOS).cumsum(0)
    visible = (documents[:, None] == documents).tril()

    def norm(h: Tensor) -> Tensor:
        return h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def turn(h: Tensor) -> Tensor:
        return t.apply_rotary(h[None, :, None], *table)[0, :, 0]

    qkv, outputs = (x @ model.banks["qkv"][layer].T).split(size, dim=1), []
    extra = rest["ve_scale"][cfg.ve_layers.index(layer)] * (rest["ve_table"][ids] @ rest["ve_proj"].T)
    for head in range(cfg.num_heads):
        kv = head // group
        q, k, v = qkv[head], qkv[cfg.num_heads + kv], qkv[cfg.num_heads + cfg.num_kv_heads + kv]
        own = v + extra[:, kv * size : (kv + 1) * size]
        mixed = rest["value_mix"][layer, 0] * first_v[:, kv] + rest["value_mix"][layer, 1] * own
        keys = turn(norm(k))
        for place in (place for place in reversed(range(1, len(x))) if ids[place] != BOS):
            keys[place, size // 2 :] = keys[place - 1, size // 2 :]
        scores = turn(norm(q)) @ keys.T * rest["q_gain"][layer, head] / math.sqrt(size)
        y = scores.masked_fill(~visible, -math.inf).softmax(-1) @ mixed
        direction = mixed / mixed.norm(dim=-1, keepdim=True)
        y = y - (y * direction).sum(-1, keepdim=True) * direction
        gate = x @ rest["gate_weight"][layer, head] + rest["gate_bias"][layer, head]
        outputs.append(y * gate.sigmoid()[:, None])
    return torch.cat(outputs, 1) @ model.banks["out"][layer].T * rest["attn_scale"][layer]


@torch.no_grad()
def test_attention_with_every_feature_equals_its_definition() -> None:
    """Value embedding, value residual, exclusive attention (along the mixed value) and gate, in one layer."""
    model, ids = tiny_model(**ALL_ON), random_ids(1)
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(LENGTH, 32, generator=generator)
    normalized, first_v = t.rms_norm(x), torch.randn(LENGTH, 2, 8, generator=generator)
    begun = model.begin(ids, model.weights(False), order_of(model), None)
    z, _ = model.attention(t.Residual(x, normalized), 3, first_v, begun)
    got = model.parts.attn_proj(t.Residual(x, normalized), z, begun.banks["out"][3], model.norm_scales[3])
    expected = textbook_attention(model, normalized, ids[0], 3, first_v)
    torch.testing.assert_close(got.x - x, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.proxy, t.rms_norm(got.x) / 4**0.5)  # LN_SCALE of the fourth layer


def test_value_residual_hands_on_the_first_layer_s_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later layer in the order gets the first one's own values, not its neighbour's."""
    model, given, own = tiny_model(VALUE_RESIDUAL=1), [], []
    plain = model.attention

    def watched(rows: t.Residual, position: int, first_v: Tensor | None, p: t.Pass) -> tuple[Tensor, Tensor]:
        left, values = plain(rows, position, first_v, p)
        given.append(first_v)
        own.append(values)
        return left, values

    monkeypatch.setattr(model, "attention", watched)
    logits_of(model, random_ids(), order=(2, 0, 1, 3))
    assert given[0] is None and len(given) == 4 and all(first is own[0] for first in given[1:])


@pytest.mark.parametrize(("last", "layers"), [(0, []), (1, [4]), (3, [2, 3, 4]), (5, [0, 1, 2, 3, 4])])
def test_exclusive_attention_is_in_the_last_layers(last: int, layers: list[int]) -> None:
    """The last XSA_LAST_N; value embeddings as VE_LAYERS has them, and norms by 1/sqrt(depth)."""
    model, scales, extras, xsa = tiny_model(NUM_LAYERS=5, XSA_LAST_N=last, VE_LAYERS="3,1", LN_SCALE=1), [], [], []

    class Noting(t.PlainLayer):
        """Notes what each layer is given."""

        def resid_mix_norm(self, *inputs: Any) -> t.Entered:
            scales.append(inputs[-1])
            return super().resid_mix_norm(*inputs)

        def qkv_rope(self, *inputs: Any) -> tuple[Tensor, ...]:
            extras.append(inputs[4])
            return super().qkv_rope(*inputs)

        def xsa(self, *inputs: Any) -> Tensor:
            xsa.append(len(scales) - 1)
            return super().xsa(*inputs)

    model.parts, ids = Noting(), random_ids()
    logits_of(model, ids)
    assert xsa == layers
    assert scales == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5, 5**-0.5])
    assert [extra is not None for extra in extras] == [False, True, False, True, False]
    of_layer_3, of_layer_1 = model.rest["ve_scale"]
    torch.testing.assert_close(extras[3] * of_layer_1, extras[1] * of_layer_3)


# --- layers -----------------------------------------------------------------------------------------


def with_layers(model: t.GPT, source: tuple[int, ...]) -> t.GPT:
    """A model of len(source) layers whose layer i is `model`'s layer source[i]."""
    wide = tiny_model(NUM_LAYERS=len(source), VE_ENABLED=0, XSA_LAST_N=0, VALUE_RESIDUAL=1)
    per_layer = {spec.name for spec in model.param_table if spec.per_layer}
    with torch.no_grad():
        for name, bank in wide.banks.items():
            bank.copy_(model.banks[name][list(source)])
        for name, value in wide.rest.items():
            value.copy_(model.rest[name][list(source)] if name in per_layer else model.rest[name])
    return wide


@pytest.mark.parametrize("order", [(0, 1, 1, 2), (0, 0, 0, 0), (3, 2, 1, 0), (0, 1, 2, 3), (0, 1, 2, 2, 1)])
def test_the_layer_order_is_data(order: tuple[int, ...]) -> None:
    """Running layers in `order` equals a deeper model that holds copies of them: looping is applying twice."""
    model = tiny_model(VE_ENABLED=0, XSA_LAST_N=0, VALUE_RESIDUAL=1)
    deeper = with_layers(model, order)
    ids = random_ids()
    torch.testing.assert_close(logits_of(model, ids, order=order), logits_of(deeper, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [(0, 1, 2, 0, 1, 2), (0, 1, 2) * 3])
def test_an_order_longer_than_the_layers_runs(order: tuple[int, ...]) -> None:
    """Three shared blocks in two and three loops: the U-Net skips must not run out of weights."""
    model = tiny_model(NUM_LAYERS=3, VE_LAYERS="2", XSA_LAST_N=3)
    assert torch.isfinite(logits_of(model, random_ids(), order=order)).all()


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_unet_skips_pair_first_with_last(layers: int) -> None:
    """With attention and MLP silenced the residual stream is arithmetic: check mixing and pairing against it."""
    model = tiny_model(NUM_LAYERS=layers, XSA_LAST_N=0, VE_ENABLED=0)
    with torch.no_grad():
        model.rest["attn_scale"].zero_()
        model.rest["mlp_scale"].zero_()
        got, x0 = model.hidden(random_ids(), model.weights(False), order_of(model)), model.embed(random_ids(), None)
        x, mix, outputs = x0, model.rest["resid_mix"], []
        for layer in range(layers):
            partner = layers // 2 * 2 - 1 - layer  # of an even number of layers i and n - 1 - i; the odd one is alone
            if layer >= layers // 2 and partner >= 0:
                x = x + model.rest["skip_weights"][layer - layers // 2] * outputs[partner]
            x = mix[layer, 0] * x + mix[layer, 1] * x0
            outputs.append(x)
    torch.testing.assert_close(got, x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), rtol=1e-4, atol=1e-5)


PARAMETERS_OF = {
    "smear": ({"SMEAR_GATE_ENABLED": 0}, {"smear_gate"}),
    "bigram": ({"BIGRAM_VOCAB_SIZE": 0}, {"bigram_table", "bigram_proj", "bigram_scale"}),
    "value embedding": ({"VE_ENABLED": 0}, {"ve_table", "ve_proj", "ve_scale"}),
    "value residual": ({"VALUE_RESIDUAL": 0}, {"value_mix"}),
    "gate": ({"GATED_ATTN_ENABLED": 0}, {"gate_weight", "gate_bias"}),
    "asqu": ({"MLP_ACTIVATION": "relu2"}, {"asqu_beta"}),
    "untied head": ({"TIE_EMBEDDINGS": 1}, {"lm_head"}),
    "xsa": ({"XSA_LAST_N": 0}, set()),
    "xsa in part": ({"XSA_LAST_N": 2}, set()),
    "ln scale": ({"LN_SCALE": 0}, set()),
    "key offset": ({"KEY_OFFSET": 0}, set()),
    "partial rope": ({"ROPE_DIMS": 0}, set()),
    "value embedding layers": ({"VE_LAYERS": "1,3"}, set()),
}


@pytest.mark.parametrize(("off", "own"), PARAMETERS_OF.values(), ids=PARAMETERS_OF.keys())
def test_a_feature_that_is_off_has_no_parameters_and_no_effect(off: dict[str, Any], own: set[str]) -> None:
    """Off: exactly its parameters are gone. On: with all others equal, the output is another."""
    everything = {**ALL_ON, "MLP_ACTIVATION": "asqu", "TIE_EMBEDDINGS": 0}
    with_it, without = tiny_model(**everything), tiny_model(**{**everything, **off})
    assert set(with_it.rest) - set(without.rest) == own and set(without.rest) <= set(with_it.rest)
    shared = {name: value for name, value in with_it.state_dict().items() if name in without.state_dict()}
    without.load(shared)
    assert not torch.allclose(logits_of(with_it, random_ids()), logits_of(without, random_ids()), atol=1e-3)


def count_parameters(**settings: Any) -> int:
    cfg = t.Config.from_env({name: str(value) for name, value in {**settings, "COMPILE": 0, "ORTHO_INIT": 0}.items()})
    model = t.GPT(cfg, BOS, t.PLAIN_ATTENTION, CPU)
    return sum(parameter.numel() for parameter in model.parameters())


def test_default_parameter_count() -> None:
    """11 layers of 512 with 8/4 heads and an MLP of 2048, counted on paper; 17 passes have 8 skips."""
    layer = (512 + 256 + 256) * 512 + 512 * 512 + 2 * 512 * 2048
    vectors = 2 * 512 + 512 + 512 + 8  # residual mix, attention and MLP scales, query gains
    bigram, value_embedding = 2048 * 128 + 128 * 512 + 1, 1024 * 128 + 128 * 256 + 2
    expected = 11 * (layer + vectors) + 1024 * 512 + bigram + value_embedding + 512 + 8 * 512
    assert count_parameters() == expected == 32_762_459


def test_official_baseline_parameter_count() -> None:
    """The challenge's own 9-layer model has 17,059,912 parameters."""
    assert count_parameters(
        NUM_LAYERS=9, MLP_MULT=2, MLP_ACTIVATION="relu2", XSA_LAST_N=0, ROPE_DIMS=0, SMEAR_GATE_ENABLED=0,
        BIGRAM_VOCAB_SIZE=0, VE_ENABLED=0, TRAIN_SEQ_LEN=1024, NUM_LOOPS=0,
    ) == 17_059_912  # fmt: skip


def test_initial_weights_depend_on_seed_alone() -> None:
    """The same bits whatever random numbers were drawn before, others under another SEED, the generator untouched."""
    torch.manual_seed(5)
    first, state = t.GPT(tiny_config(), BOS, bidirectional, CPU).state_dict(), torch.random.get_rng_state()
    second = t.GPT(tiny_config(), BOS, bidirectional, CPU).state_dict()
    torch.rand(9)
    other = t.GPT(tiny_config(SEED=2), BOS, bidirectional, CPU).state_dict()
    assert torch.equal(state, torch.manual_seed(5).get_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["banks.qkv"], other["banks.qkv"])


def test_an_untrained_model_is_close_to_uniform() -> None:
    """Zero output projections and a small embedding: the first loss is ln V."""
    model = t.GPT(tiny_config(), BOS, t.PLAIN_ATTENTION, CPU)
    assert float(nll_of(model, random_ids()).mean()) == pytest.approx(math.log(VOCAB), abs=0.05)


# --- activations and head -----------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], tuple[float, float]]]] = {
    "leaky 0.5": (
        lambda h: t.squared_leaky_relu(h, torch.tensor(0.25)),
        lambda h: (h * h, 2 * h) if h > 0 else (h * h / 4, h / 2),
    ),
    "leaky 0.1": (
        lambda h: t.squared_leaky_relu(h, torch.tensor(0.01)),
        lambda h: (h * h, 2 * h) if h > 0 else (h * h / 100, h / 50),
    ),
    "relu2": (lambda h: t.squared_leaky_relu(h, torch.tensor(0)), lambda h: (h * h, 2 * h) if h > 0 else (0.0, 0.0)),
    "asqu 0.7": (
        lambda h: t.squared_leaky_relu(h, torch.full(h.shape[-1:], 0.7, dtype=h.dtype)),
        lambda h: (h * h, 2 * h) if h > 0 else (0.7 * h * h, 1.4 * h),
    ),
}


@pytest.mark.parametrize(("function", "formula"), ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_activations_and_gradients(
    function: Callable[[Tensor], Tensor], formula: Callable[[float], tuple[float, float]]
) -> None:
    """Values and derivatives in float64 against the written formula, zero included."""
    h = torch.cat([torch.linspace(-3, 3, 40), torch.zeros(1)]).double().requires_grad_()
    y = function(h)
    y.sum().backward()
    expected = torch.tensor([formula(float(value)) for value in h.detach()], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([y.detach(), h.grad], 1), expected)


def test_asqu_learns_its_negative_side() -> None:
    """d/d beta is the sum of h^2 where h is negative; at 0.25 ASQU is leaky_relu2 with slope 0.5."""
    h = torch.randn(50, 6, generator=torch.Generator().manual_seed(3)).double()
    beta = torch.full((6,), 0.25, dtype=torch.float64, requires_grad=True)
    t.squared_leaky_relu(h, beta).sum().backward()
    torch.testing.assert_close(beta.grad, (h.square() * (h < 0)).sum(0))
    torch.testing.assert_close(t.squared_leaky_relu(h, beta.detach()), t.squared_leaky_relu(h, torch.tensor(0.25)))


@pytest.mark.parametrize(
    ("activation", "proxy"),
    [({"MLP_ACTIVATION": "leaky_relu2", "NEGATIVE_SLOPE": 0}, {"MLP_ACTIVATION": "relu2"}),
     ({"MLP_ACTIVATION": "leaky_relu2", "NEGATIVE_SLOPE": 0.5}, {"MLP_ACTIVATION": "asqu"})],
)  # fmt: skip
def test_the_model_uses_the_activation_it_is_told(activation: dict[str, Any], proxy: dict[str, Any]) -> None:
    """Equal functions give equal models, through the configuration."""
    one, other = tiny_model(**activation), tiny_model(**proxy)
    other.load({**other.state_dict(), **one.state_dict()})
    if "asqu_beta" in other.rest:
        torch.nn.init.constant_(other.rest["asqu_beta"], 0.25)
    torch.testing.assert_close(logits_of(one, random_ids()), logits_of(other, random_ids()))
    assert not torch.allclose(logits_of(one, random_ids()), logits_of(tiny_model(NEGATIVE_SLOPE=0.3), random_ids()))


def test_logits_are_softcapped() -> None:
    """Within +-LOGIT_SOFTCAP whatever the weights, and almost linear where they are small."""
    model = tiny_model(LOGIT_SOFTCAP=3)
    hidden = torch.randn(1, 2, 32)
    big = model.logits(hidden, {"head": 100 * torch.randn(VOCAB, 32)})
    assert 2.9 < big.abs().max() <= 3 and big.dtype == torch.float32
    head = 1e-3 * torch.randn(VOCAB, 32)
    torch.testing.assert_close(model.logits(hidden, {"head": head}), hidden @ head.T, rtol=1e-2, atol=1e-4)


# --- the export's grid and late QAT ---------------------------------------------------------------------


def random_bank(seed: int = 4) -> Tensor:
    return torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(seed))


GRIDS = [
    (6, "sigma", 4.0), (4, "sigma", torch.tensor(2.0)), (8, "amax", 0.0), (2, "sigma", 3.0),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fake_quantize_is_straight_through_and_on_the_grid(grid: tuple[int, str, float]) -> None:
    """Gradient: the identity, for clipped entries too. Value: an integer code in range times a half-precision scale."""
    w = random_bank().requires_grad_()
    out, upstream = t.fake_quantize(w, *grid), random_bank(5)
    out.backward(upstream)
    assert torch.equal(w.grad, upstream)
    scale = t.row_scale(w.detach(), *grid)
    codes = out.detach() / scale.unsqueeze(-1)
    top = 2 ** (grid[0] - 1)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert codes.round().min() >= -top and codes.round().max() <= top - 1 and torch.equal(scale, scale.half().float())
    inside = (w.detach() / scale.unsqueeze(-1)).abs() <= top - 1
    assert ((out - w).detach().abs() <= 0.5001 * scale.unsqueeze(-1))[inside].all()


@pytest.mark.parametrize("policy", ["sigma", "amax"])
@pytest.mark.parametrize("bits", [4, 6])
def test_late_qat_trains_on_the_grid_of_the_export(policy: str, bits: int) -> None:
    """weights(fake_quant=True) are what the export without GPTQ stores, bank by bank."""
    model = tiny_model(MATRIX_BITS=bits, CLIP_POLICY=policy, MATRIX_CLIP_SIGMAS=3, GPTQ_ENABLED=0)
    coded = codes_of(model.cfg, t.quant_specs(model), {}, model.cfg.matrix_clip_sigmas)
    trained = unscaled(model, model.weights(True))
    for spec in model.specs:
        torch.testing.assert_close(trained[spec.name], coded[spec.name].dequantize(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(trained[spec.name], model.weights(False)[spec.name])


def test_late_qat_changes_output_and_keeps_gradients() -> None:
    """The phase acts: other logits; every bank still gets a gradient, the one at the rounded weights."""
    model, ids = tiny_model(MATRIX_BITS=3, MATRIX_CLIP_SIGMAS=2), random_ids()
    assert not torch.allclose(logits_of(model, ids), logits_of(model, ids, fake_quant=True), atol=1e-2)
    model.nll(ids, ids, model.weights(True), order_of(model)).mean().backward()
    through = {name: bank.grad.clone() for name, bank in model.banks.items()}
    rounded = tiny_model()
    weights = unscaled(model, model.weights(True))
    rounded.load(model.state_dict() | {f"banks.{n}": w for n, w in weights.items() if n != "head"})
    rounded.nll(ids, ids, rounded.weights(False), order_of(model)).mean().backward()
    for name, bank in rounded.banks.items():
        assert through[name].abs().sum() > 0
        torch.testing.assert_close(through[name], bank.grad, rtol=1e-3, atol=1e-6)


def test_compiled_late_qat_is_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.compile: one graph per phase, rounding only in the late one, results equal to eager's."""
    graphs: list[str] = []
    compile_with = torch.compile

    def keep(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(module.code)
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_with(function, backend=keep, **options))
    settings = {"MATRIX_BITS": 3, "MATRIX_CLIP_SIGMAS": 2}
    model, eager = tiny_model(COMPILE=1, **settings), tiny_model(**settings)
    outputs = {fake: model.fast_weights(fake)["qkv"] for fake in (False, True, False, True)}
    assert len(graphs) == 2 and ["round" in graph for graph in graphs] == [False, True]
    assert all(torch.equal(outputs[fake], eager.weights(fake)["qkv"]) for fake in (False, True))
    model.clip_sigmas.fill_(1.0)  # what entering the phase does: it must reach the compiled graph without a new one
    eager.clip_sigmas.fill_(1.0)
    assert torch.equal(model.fast_weights(True)["qkv"], eager.weights(True)["qkv"]) and len(graphs) == 2
    ids = random_ids()
    got = model.fast_nll(ids, ids, model.fast_weights(True), order_of(model))
    torch.testing.assert_close(got, eager.nll(ids, ids, eager.weights(True), order_of(eager)))
    assert len(graphs) == 3


def rounded_losses(grid: tuple[int, str, float], seed: int) -> tuple[float, float]:
    """Losses of a linear regression's rounded weights: before and after training the exact solution under rounding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    y = x @ torch.randn(24, 8, generator=generator)
    w = torch.linalg.lstsq(x, y).solution.T.clone().requires_grad_()

    def loss() -> Tensor:
        return F.mse_loss(x @ t.fake_quantize(w, *grid).T, y)

    before = loss().item()
    optimizer = torch.optim.SGD([w], lr=0.003)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.003 * (1 - step / 200)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return before, loss().item()


def test_training_on_the_grid_makes_better_rounded_weights() -> None:
    """What QAT is for: weights that were best unrounded move to where rounding costs clearly less."""
    before, after = zip(*(rounded_losses((3, "sigma", 2.5), seed) for seed in range(5)), strict=True)
    assert sum(after) < 0.85 * sum(before)


@pytest.mark.parametrize(
    "variables",
    [{"QAT_ENABLED": 1, "CLIP_POLICY": "amax"}, {"QAT_ENABLED": 1, "MATRIX_CLIP_SIGMAS": 5},
     {"LATE_QAT_THRESHOLD": 1, "WARMDOWN_FRAC": 1}, {"LATE_QAT_THRESHOLD": 1, "WARMDOWN_FRAC": 1, "WARMUP_STEPS": 1}],
)  # fmt: skip
def test_qat_has_a_sensible_grid_in_every_step(
    variables: dict[str, Any], corpus: dict[str, str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way the clip is chosen, every step under rounding sees weights near the real ones, never zeros."""
    seen: list[float] = []
    plain = t.GPT.weights

    def watched(model: t.GPT, fake_quant: bool) -> dict[str, Tensor]:
        weights = plain(model, fake_quant)
        if fake_quant:
            bank = model.banks["qkv"].detach()
            seen.append(float((weights["qkv"].detach() - bank).norm() / bank.norm()))
        return weights

    monkeypatch.setattr(t.GPT, "weights", watched)
    settings = {"ITERATIONS": 4, "WARMUP_STEPS": 0, "GPTQ_CALIBRATION_BATCHES": 1, **variables}
    with t.Runtime.start(tiny_config(**settings, **corpus), {}) as run:
        validation = t.load_validation(run)
        model = t.build_model(run, run.cfg, validation.bos_id)
        t.train(run, t.Trainer(run, model), validation)
    assert len(seen) >= 3 and max(seen) < 0.2


def test_inductor_names_an_operator_without_all_that_leads_to_it() -> None:
    """What it describes are nodes of the graph that contain their inputs, which contain theirs."""

    class Node:
        def __str__(self) -> str:
            raise AssertionError("described")

    issue = importlib.import_module("torch._inductor.exc").OperatorIssue
    t.compiled(tiny_config(COMPILE=1), lambda: None)
    assert issue.operator_str("resid_mix_norm", [Node()], {"out": Node()}) == "resid_mix_norm"
