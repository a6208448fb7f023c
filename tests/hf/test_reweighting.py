"""A bias or a gate for each head, against ``textbook.concatenating``, an attention of its own."""

from dataclasses import replace

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, prefix_attention, use_prefix
from fastprefix.hf import patch_of
from fastprefix.hf.layer.call import Call
from fastprefix.hf.layer.reweighted import attend
from fastprefix.hf.mass import attention_mass
from fastprefix.hf.patch.sharding import Sharding
from fastprefix.hf.versions import enable_checkpointing
from fastprefix.kv import PackedPrefixKV, Reweighting
from fastprefix.options import Options
from fastprefix_testing import textbook, zoo

EXACT = {"rtol": 0, "atol": 1e-9}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # of the biases and gates, and so of their gradients
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # in float32
KINDS = ["bias", "gate"]
PLACED = ("llama", "gemma2", "mistral", "gpt_oss")  # pads push no text away


def frozen(name, **changes):
    return zoo.kind(name, **changes).requires_grad_(False)


def weighted(logits, real):
    kept = logits[real]
    return (kept * torch.linspace(-1, 1, kept.numel(), dtype=kept.dtype).view_as(kept)).sum()


def ours(model, kind, length=5, seed=0, **options):
    kv = tiny.kv_of_shapes(patch_of(model).shapes, length, **options)
    return tiny.reweighted(model, kv, kind, seed=seed)


def constant(model, kv, kind, number):
    heads = tuple(torch.full((count,), number) for count in patch_of(model).query_heads)
    return replace(kv, reweighting=Reweighting(kind, heads))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "albert", "t5", "gemma2", "gpt_oss"])
def test_logits_and_gradients(name, kind):
    model, bare = patch_model(frozen(name)), frozen(name)
    inputs, real = zoo.kind_inputs(model, "left" if name in PLACED else "right")
    kv, told = ours(model, kind), dict(inputs)
    if name in PLACED:
        told["position_ids"] = tiny.positions(inputs["attention_mask"])
    expected = textbook.concatenating(bare, kv, told)(**told).logits
    gradients = torch.autograd.grad(weighted(expected, real), kv.tensors)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients)
    with use_prefix(model, replace(kv, reweighting=None)):
        plain = model(**inputs).logits[real]
    with use_prefix(model, kv):
        got = model(**inputs).logits
        found = torch.autograd.grad(weighted(got, real), kv.tensors)
    assert not torch.allclose(got[real], plain, atol=1e-3)
    torch.testing.assert_close(got[real], expected[real], **EXACT)
    count = 2 * kv.num_layers
    torch.testing.assert_close(found[:count], gradients[:count], **EXACT)
    torch.testing.assert_close(found[count:], gradients[count:], **FLOAT32)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "gemma2"])
def test_nothing_of_the_prefix_is_the_bare_model(name):
    model = patch_model(frozen(name, dtype=torch.float32))
    inputs, real = zoo.kind_inputs(model)
    plain = tiny.kv_of_shapes(patch_of(model).shapes, dtype=torch.float32).detach()

    def run(kv):
        with torch.no_grad(), use_prefix(model, kv):
            return model(**inputs).logits[real]

    bare = run(None)
    assert torch.equal(run(constant(model, plain, "gate", 0.0)), bare)
    for number in (-1e30, -60.0):
        torch.testing.assert_close(run(constant(model, plain, "bias", number)), bare, **CLOSE)
    zero = run(constant(model, plain, "bias", 0.0))
    torch.testing.assert_close(zero, run(plain), **CLOSE)
    assert not torch.allclose(zero, bare, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_biases_of_distances_add_up(kind):
    """What T5's decoder adds to a prefix's scores by distance; gates leave it to the prefix."""
    query, key, value = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64).unbind()
    front, front_value = torch.randn(2, 4, 5, 8, dtype=torch.float64).unbind()
    distances, numbers = torch.randn(4, 6, 5, dtype=torch.float64), torch.randn(4)
    heads = {"head_bias": numbers} if kind == "bias" else {"gate": numbers}
    options = Options(is_causal=False, scale=8**-0.5, prefix_bias=distances)
    call = Call(query, key, value, options, front, front_value, **heads)
    wide = numbers.double()[:, None, None]
    scores = query @ front.mT / 8**0.5 + distances
    text = query @ key.mT / 8**0.5
    if kind == "bias":
        weights = torch.cat([scores + wide, text], -1).softmax(-1)
        expected = weights[..., :5] @ front_value + weights[..., 5:] @ value
    else:
        expected = text.softmax(-1) @ value + wide.tanh() * (scores.softmax(-1) @ front_value)
    torch.testing.assert_close(attend(call), expected, **EXACT)


def test_a_trained_bias_beside_trained_distances():
    query, key, value = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64).unbind()
    front, front_value = torch.randn(2, 4, 5, 8, dtype=torch.float64).unbind()
    distances = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    numbers = torch.randn(4, dtype=torch.float64, requires_grad=True)
    options = Options(is_causal=False, scale=8**-0.5, prefix_bias=distances)
    call = Call(query, key, value, options, front, front_value, head_bias=numbers)
    scores = query @ front.mT / 8**0.5 + distances + numbers[:, None, None]
    weights = torch.cat([scores, query @ key.mT / 8**0.5], -1).softmax(-1)
    expected = weights[..., :5] @ front_value + weights[..., 5:] @ value
    torch.testing.assert_close(attend(call), expected, **EXACT)
    grad, leaves = torch.randn_like(expected), (distances, numbers)
    wanted = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(attend(call), leaves, grad), wanted, **EXACT)


def test_a_trained_bias_in_a_decoder_that_counts_distances():
    """The difference that a step makes judges it. The bias of distances is trained as well."""
    model = patch_model(zoo.kind("t5"))
    inputs, real = zoo.kind_inputs(model)
    kv = ours(model, "bias", position_offset=5)

    def loss():
        with use_prefix(model, kv):
            return model(**inputs).logits[real].square().mean()

    decoder = [n for n, group in enumerate(patch_of(model).groups) if group == "decoder"]
    leaves = [kv.reweighting.heads[n] for n in decoder]
    leaves += [p for n, p in model.named_parameters() if "relative_attention_bias" in n]
    assert len(leaves) == 4
    for leaf, grad in zip(leaves, torch.autograd.grad(loss(), leaves), strict=True):
        step = 1e-3 / grad.norm()
        with torch.no_grad():
            ends = []
            for sign in (1, -2, 1):  # and back
                leaf += sign * step * grad
                ends.append(loss())
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(slope, grad.square().sum().to(slope), rtol=1e-2, atol=0)


ROWS = ["bias", None, "gate", "plain", "other bias", "other gate"]


def of_rows(model):
    """Prefixes of all kinds, by the names in ROWS."""
    named = {}
    for seed, name in enumerate(filter(None, ROWS)):
        kind = name.split()[-1]
        kv = ours(model, None if kind == "plain" else kind, 3 + seed, seed=seed)
        named[name] = replace(kv, position_offset=seed)
    return named


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_rows_of_a_mixed_batch(name, repeats):
    model = patch_model(frozen(name))
    ids, mask = (x.repeat_interleave(repeats, 0) for x in tiny.batch((7, 4, 1, 5, 6, 3)))
    kv = of_rows(model)
    leaves = [tensor for one in kv.values() for tensor in one.tensors]
    with use_prefix(model, kv, ROWS):
        logits = model(ids, attention_mask=mask, position_ids=tiny.positions(mask)).logits
    found = torch.autograd.grad(weighted(logits, mask.bool()), leaves)
    rows = []
    for row, prefix in enumerate(name for name in ROWS for _ in range(repeats)):
        text = ids[row][mask[row].bool()][None]
        one = kv[prefix] if prefix else None
        bare = frozen(name)
        inputs = {"input_ids": text}
        if one is not None:
            inputs["position_ids"] = torch.arange(text.shape[1])[None] + one.position_offset
            bare = textbook.concatenating(bare, one, inputs)
        else:
            bare = textbook.textbook(bare)
        rows.append(bare(**inputs).logits[0])
    expected = torch.cat(rows)
    kept = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    gradients = torch.autograd.grad((expected * kept).sum(), leaves)
    torch.testing.assert_close(logits[mask.bool()], expected, **EXACT)
    for got, want in zip(found, gradients, strict=True):
        assert want.abs().max() > 1e-7
        torch.testing.assert_close(got, want, **(EXACT if got.dtype is torch.float64 else FLOAT32))


def test_packed_sequences():
    """Gates differ from sequence to sequence; biases are refused where they do."""
    model = patch_model(frozen("llama"))
    texts = [tiny.prompt(length, seed=length) for length in (4, 3, 5)]
    ids = torch.cat(texts, 1)
    offsets = torch.tensor([0, 4, 7, 12], dtype=torch.int32)
    packed = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    kv = of_rows(model)

    def check(rows):
        with torch.no_grad():
            with use_prefix(model, kv, rows):
                got = model(ids, use_cache=False, **packed).logits
            parts = []
            for name, text in zip(rows, texts, strict=True):
                with use_prefix(model, kv[name] if name else None):
                    parts.append(model(text).logits)
        torch.testing.assert_close(got, torch.cat(parts, 1), **EXACT)

    check(["gate", "plain", "other gate"])
    check(["gate", None, "bias"])
    check(["bias", None, "bias"])
    with pytest.raises(NotImplementedError, match="differ in the biases"):
        check(["bias", "other bias", None])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_with_a_bias_slides(cache, several):
    """Windows of 4 over a prompt of 6; a static cache copies the prompt's end into its keys."""
    model = patch_model(zoo.kind("mistral").requires_grad_(False))
    bare = textbook.textbook(zoo.kind("mistral"))
    window = model.config.sliding_window
    front, text = tiny.prompt(6), tiny.prompt(2, seed=3)
    bias = torch.linspace(-2, 3, patch_of(model).query_heads[0])
    kv = PrefixKV.prefill(model, front)
    named = {
        name: replace(kv, reweighting=Reweighting("bias", (x,) * kv.num_layers))
        for name, x in (("a", bias), ("b", bias.flip(0)))
    }
    rows = ["a", "b"] if several else None
    ids = text.expand(2 if several else 1, -1)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with use_prefix(model, named if several else named["a"], rows):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    whole = torch.cat([front, out.sequences[-1:]], 1)
    L = whole.shape[1]
    distance = torch.arange(L)[:, None] - torch.arange(L)
    mask = torch.zeros(1, len(bias), L, L, dtype=torch.float64)
    mask[:, :, 6:, :6] += (bias.flip(0) if several else bias).double()[:, None, None]
    mask = mask.masked_fill((distance < 0) | (distance >= window), float("-inf"))
    with torch.no_grad():
        expected = bare(whole, attention_mask=mask, use_cache=False).logits[0, 7:-1]
    got = torch.stack([logits[-1] for logits in out.logits])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_what_it_says_in_one_forward(kind, cache):
    model = patch_model(frozen("llama"))
    kv, ids = ours(model, kind, position_offset=2), tiny.prompt(5)
    with torch.no_grad(), use_prefix(model, kv):
        new = tiny.generate(model, ids, cache_implementation=cache)
        whole = model(torch.cat([ids, new], 1)).logits
        many = tiny.generate(model, ids, num_beams=2)
    with torch.no_grad(), use_prefix(model, {"a": kv}, ["a"]):
        assert torch.equal(tiny.generate(model, ids, num_beams=2), many)
    assert torch.equal(whole[0, 4:-1].argmax(-1), new[0])


@pytest.mark.parametrize("kind", [*KINDS, "rows"])
def test_checkpointing_and_compiling(kind):
    model = patch_model(frozen("llama", num_hidden_layers=1))
    inputs, real = zoo.kind_inputs(model)
    if kind == "rows":
        rows, kv = ["bias", "other bias"], of_rows(model)
        leaves = [tensor for name in rows for tensor in kv[name].tensors]
    else:
        rows, kv = None, ours(model, kind)
        leaves = kv.tensors

    def run(forward):
        with use_prefix(model, kv, rows):
            logits = forward(**inputs, use_cache=False).logits
        return logits[real], *torch.autograd.grad(weighted(logits, real), leaves)

    expected = run(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), expected, **FLOAT32)
    model.train()
    enable_checkpointing(model, {"use_reentrant": False})
    torch.testing.assert_close(run(model), expected, **FLOAT32)


def test_mass():
    """The mass of a bias is what it multiplies weights by, and that of a gate is its tanh."""
    model = patch_model(frozen("gpt2"))
    inputs, _ = zoo.kind_inputs(model)
    kv = ours(model, None).detach()
    before = attention_mass(model, kv, **inputs)[0]
    bias = tiny.reweighted(model, kv, "bias")
    row = {
        "input_ids": inputs["input_ids"][:1, :1]
    }  # one query and one key: the share is a sigmoid
    plain, biased = (attention_mass(model, x, **row)[0] for x in (kv, bias))
    expected = torch.sigmoid(plain.double().logit() + bias.reweighting.heads[0].double())
    torch.testing.assert_close(biased.double(), expected, rtol=1e-4, atol=1e-5)
    assert (attention_mass(model, bias, **inputs)[0] > before).all()
    gate = tiny.reweighted(model, kv, "gate", seed=1)
    for got, numbers in zip(
        attention_mass(model, gate, **inputs), gate.reweighting.heads, strict=True
    ):
        torch.testing.assert_close(got, numbers.tanh(), **FLOAT32)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "composed", "triton"])
def test_every_backend_attends_a_prefix_alone(backend, queries):
    """Without keys of a text, by value and gradient; a row without a prefix gets zeros."""
    query = torch.randn(2, 4, queries, 16, requires_grad=True)
    key, value = torch.randn(2, 2, 5, 16).unbind()
    key.requires_grad_()
    none, index = query.new_empty(2, 2, 0, 16), torch.tensor([1, -1])
    several = {"prefix_index": index, "prefix_lengths": torch.tensor([2, 3])}
    groups = query.unflatten(1, (2, 2))
    for start, options in ((0, {}), (2, several)):
        got = prefix_attention(query, none, none, key, value, backend=backend, **options)
        front, front_value = key[:, None, start:], value[:, None, start:]
        expected = (groups @ front.mT / 4).softmax(-1) @ front_value
        expected = expected.flatten(1, 2) * (1 if start == 0 else (index >= 0).view(2, 1, 1, 1))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(got.square().sum(), (query, key))
        wanted = torch.autograd.grad(expected.square().sum(), (query, key), retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_refuses_what_does_not_fit():
    model = patch_model(frozen("llama"))
    kv = tiny.kv_of_shapes(patch_of(model).shapes).detach()
    Hkv, Hq = kv.shapes[0].num_heads, patch_of(model).query_heads[0]
    wrong = replace(kv, reweighting=Reweighting("gate", (torch.zeros(Hq + Hkv),) * kv.num_layers))
    with (
        pytest.raises(ValueError, match=f"reweighting of {Hq + Hkv} query heads in layer 0"),
        use_prefix(model, wrong),
    ):
        pass


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_gets_its_query_heads(kind, packed):
    """The second of two ranks; in the last layer they share one key/value head (MQA)."""
    heads = ((2, 4, 4), (2, 4, 4), (0, 1, 1))
    sharding = Sharding(None, heads, ((4, 8, 8), (0, 0, 0), (4, 8, 8)))
    tensors = [torch.randn(total, 5, 4) for _, _, total in heads]
    tensors[1] = tensors[1][:, :0]
    numbers = (torch.randn(8), torch.randn(0), torch.randn(8))
    kv = PrefixKV(tensors, tensors, 0, reweighting=Reweighting(kind, numbers))
    if packed:
        other = replace(kv, reweighting=None)
        found = sharding.narrow(PackedPrefixKV.pack({"a": other, "b": kv}))
        got = [x[:, 1] for x in (found.biases if kind == "bias" else found.gates)]
        assert not any(x[:, 0].any() for x in (*found.biases, *found.gates))
    else:
        found = sharding.narrow(kv)
        assert found.reweighting.kind == kind
        got = found.reweighting.heads
    assert [key.shape[0] for key in found.keys] == [2, 2, 1]
    for layer in (0, 2):
        assert torch.equal(got[layer], numbers[layer][4:])
    assert got[1].shape == (0,)
