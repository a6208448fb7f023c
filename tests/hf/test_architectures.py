"""Every architecture: logits and gradients of the prefix concatenated in front of all keys.

The oracle is the bare model with an attention of the test's own, ``textbook.concatenating``, which
copies the prefix for every row of every layer, in the order in which the layers run.
"""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, UnsupportedModelError, patch_model, unpatch_model, use_prefix
from fastprefix.hf import patch_of
from fastprefix_testing import textbook, zoo

EXACT = {"rtol": 0, "atol": 1e-9}
ENCODERS = ["bert", "roberta", "electra", "distilbert", "albert", "modernbert", "vit", "t5 encoder"]
BOTH = ["t5", "mt5", "bart", "whisper"]
DECODERS = [
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "opt",
    "gpt_neox", "gpt_oss", "olmo2", "gemma3n", "diffllama",
]  # fmt: skip
# a decoder whose learned positions count all tokens, pads among them
COUNTED = ["bigbird_pegasus"]
CHECKPOINTED = [
    "bert", "roberta", "electra", "distilbert", "modernbert", "vit", "t5", "bart", "diffllama"
]  # fmt: skip


def test_the_zoo_is_tested():
    assert set(zoo.ZOO) == {*ENCODERS, *BOTH, *DECODERS, *COUNTED}


def weighted(logits, real):
    """A loss in which every real output counts, and each one differently."""
    kept = logits[real]
    return (kept * torch.linspace(-1, 1, kept.numel(), dtype=kept.dtype).view_as(kept)).sum()


def run(model, kv, inputs, real):
    """Logits of the real outputs, and the gradients of all keys and values."""
    logits = model(**inputs).logits
    leaves = (*kv.keys, *kv.values)
    return logits[real], torch.autograd.grad(weighted(logits, real), leaves)


def frozen(name):
    return zoo.kind(name).requires_grad_(False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*ENCODERS, *BOTH, *DECODERS, *COUNTED])
def test_logits_and_gradients(name, side):
    model, bare = patch_model(frozen(name)), frozen(name)
    inputs, real = zoo.kind_inputs(model, side)
    offset = 5 if name in DECODERS else 0
    kv = tiny.kv_of_shapes(patch_of(model).shapes, position_offset=offset)
    told = dict(inputs)
    if name in (*DECODERS, "modernbert"):  # rotary positions: pads push no text away
        told["position_ids"] = tiny.positions(inputs["attention_mask"]) + offset
    with torch.no_grad():
        plain = bare(**told).logits[real]
    logits, gradients = run(textbook.concatenating(bare, kv, told), kv, told, real)
    assert not torch.allclose(logits, plain, atol=1e-3), "the prefix must matter"
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients), "in every layer"

    with use_prefix(model, kv):
        got, got_gradients = run(model, kv, inputs, real)
    torch.testing.assert_close(got, logits, **EXACT)
    torch.testing.assert_close(got_gradients, gradients, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_is_the_text_in_front(name, side):
    """Windows of 4 slide over a prompt of 6."""
    model, bare = frozen(name), frozen(name)
    if name == "gemma2":  # transformers' own attention with a cap takes its softmax in float32
        bare = textbook.textbook(bare)
    front, (ids, mask) = tiny.prompt(6), tiny.batch((7, 4), side)
    with torch.no_grad():
        expected = tiny.concatenated_logits(bare, front, ids, mask, side)[mask.bool()]
        alone = bare(ids, attention_mask=mask, position_ids=tiny.positions(mask)).logits
        with use_prefix(model, PrefixKV.prefill(model, front)):
            got = model(ids, attention_mask=mask).logits
    assert not torch.allclose(alone[mask.bool()], expected, atol=1e-3)
    torch.testing.assert_close(got[mask.bool()], expected, **EXACT)


@pytest.mark.parametrize("name", COUNTED)
def test_a_prompt_where_positions_count_every_token(name):
    """Its text is not padded, and its modules say that they are not causal."""
    model, bare = frozen(name), frozen(name)
    front, (ids, mask) = tiny.prompt(6), tiny.batch((7, 4), "right")
    with torch.no_grad():
        expected = tiny.concatenated_logits(bare, front, ids, mask, "right")[mask.bool()]
        with use_prefix(model, PrefixKV.prefill(model, front)):
            got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected, **EXACT)
    assert patch_of(patch_model(model)).groups == ("decoder",) * 2


def test_attention_that_cannot_be_told_apart_is_refused():
    """A layer that attends now more often and now less."""
    model = zoo.kind("albert")
    attention = next(m for m in model.modules() if type(m).__name__ == "AlbertAttention")
    ran, forward = [], attention.forward

    def twice_at_times(*args, **kwargs):
        ran.append(1)
        if len(ran) % 2:
            forward(*args, **kwargs)
        return forward(*args, **kwargs)

    attention.forward = twice_at_times
    with pytest.raises(UnsupportedModelError, match="AlbertAttention attends 3 times in 2 runs"):
        patch_model(model)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("name", ["bert", "modernbert", "t5 encoder"])
def test_custom_masks_cover_the_text_alone(name, dtype):
    """The mask has four dimensions, and no flag describes it. T5 adds its bias for distances."""
    model, bare = patch_model(frozen(name)), frozen(name)
    sees = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(6)) < 0.6
    sees |= torch.eye(7, dtype=torch.bool)
    hidden = torch.zeros(sees.shape, dtype=torch.float64)
    hidden = hidden.masked_fill(~sees, torch.finfo(torch.float64).min)
    inputs = {"input_ids": tiny.batch((7, 7))[0], "attention_mask": hidden}
    kv, real = tiny.kv_of_shapes(patch_of(model).shapes), torch.ones(2, 7, dtype=torch.bool)
    logits, gradients = run(textbook.concatenating(bare, kv, inputs), kv, inputs, real)
    mask = sees if dtype == torch.bool else hidden
    with use_prefix(model, kv):
        got, got_gradients = run(model, kv, {**inputs, "attention_mask": mask}, real)
    torch.testing.assert_close(got, logits, **EXACT)
    torch.testing.assert_close(got_gradients, gradients, **EXACT)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_trains_the_prefix(name):
    """PEFT's prefix is silently lost here in BERT, RoBERTa and ELECTRA."""
    model = patch_model(frozen(name))
    inputs, real = zoo.kind_inputs(model)
    kv = tiny.kv_of_shapes(patch_of(model).shapes)
    with use_prefix(model, kv):
        logits, gradients = run(model, kv, inputs, real)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        got, got_gradients = run(model, kv, inputs, real)
    torch.testing.assert_close(got, logits, **EXACT)
    torch.testing.assert_close(got_gradients, gradients, **EXACT)


@pytest.mark.parametrize("name", [*ENCODERS, *BOTH, "diffllama", "bigbird_pegasus"])
def test_without_a_prefix_nothing_changes_and_unpatching_restores(name):
    model = frozen(name)
    implementations = [part.config._attn_implementation for part in parts(model)]
    inputs, real = zoo.kind_inputs(model, "left")
    with torch.no_grad():
        before = model(**inputs).logits
        patched = patch_model(model)(**inputs).logits
        torch.testing.assert_close(patched[real], before[real], **EXACT)
        unpatch_model(model)
        assert torch.equal(model(**inputs).logits, before)
    assert [part.config._attn_implementation for part in parts(model)] == implementations
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(key.startswith("_fastprefix") for m in model.modules() for key in vars(m))


def parts(model):
    return [module for module in model.modules() if hasattr(module, "_can_set_attn_implementation")]


def test_groups_say_which_part_a_layer_belongs_to():
    groups = {name: patch_of(patch_model(zoo.kind(name))).groups for name in ("bert", "t5", "opt")}
    assert groups["bert"] == ("encoder",) * 2
    assert groups["t5"] == ("encoder", "encoder", *("decoder", "cross") * 2)
    assert groups["opt"] == ("decoder",) * 2


def test_each_call_of_a_shared_module_is_a_layer_of_its_own():
    """ALBERT: 4 layers of 2 inner ones, made of 2 groups of 2 modules."""
    model = patch_model(zoo.kind("albert"))
    assert len(patch_of(model).shapes) == 8
    assert len({id(m) for m in model.modules() if type(m).__name__ == "AlbertAttention"}) == 4


def test_layers_that_share_keys_see_prefixes_of_their_own_in_a_cache():
    """Gemma 3n: the last two layers are handed the text's keys of the first two, and no cache."""
    model, bare = patch_model(zoo.kind("gemma3n")), zoo.kind("gemma3n")
    kv = tiny.kv_of_shapes(patch_of(model).shapes).detach()
    inputs, _ = zoo.kind_inputs(model, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    plain = tiny.generate(bare, ids, mask)
    expected = tiny.generate(textbook.concatenating(bare, kv, inputs), ids, mask)
    with use_prefix(model, kv):
        got = tiny.generate(model, ids, mask)
    assert not torch.equal(plain, expected)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["albert", "bart", "diffllama", "bigbird_pegasus"])
def test_compiled_without_graph_breaks(name):
    model = frozen(name)
    inputs, _ = zoo.kind_inputs(model)
    tiny.skip_unless_one_graph(model, **inputs)
    patch_model(model)
    kv = tiny.kv_of_shapes(patch_of(model).shapes, position_offset=0 if name == "albert" else 5)
    with torch.no_grad(), use_prefix(model, kv.detach()):
        expected = model(**inputs).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).logits, expected, **EXACT)


BIASED = ["t5", "mt5", "t5 encoder"]
CHECKPOINTING = {
    "whole": None,
    "checkpointed": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}


def parameter_gradients(model, inputs, real):
    names, leaves = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(weighted(model(**inputs).logits, real), leaves, allow_unused=True)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("name", BIASED)
def test_a_position_bias_is_trained_with_the_rest(name, checkpointing):
    """Patching by itself does not change any parameter's gradient."""
    model, bare = patch_model(zoo.kind(name)), zoo.kind(name)
    inputs, real = zoo.kind_inputs(model)
    if checkpointing is not None:
        if not model.supports_gradient_checkpointing:
            pytest.skip("transformers does not checkpoint it")
        for each in (model, bare):
            each.train().gradient_checkpointing_enable(checkpointing)
    if checkpointing == {"use_reentrant": True}:
        # transformers' own detaches nothing but its layers' inputs: only backward() gives gradients
        found = []
        for each in (model, bare):
            weighted(each(**inputs).logits, real).backward()
            found.append({n: p.grad for n, p in each.named_parameters()})
        got, expected = found
    else:
        got, expected = (parameter_gradients(each, inputs, real) for each in (model, bare))
    biases = [n for n in expected if "relative_attention_bias" in n or "rel_pos" in n]
    assert biases
    assert all(expected[n].abs().max() > 1e-6 for n in biases)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("name", ["t5", "mt5", "t5 encoder"])
def test_a_position_bias_is_trained_beside_a_prefix(name):
    model, bare = patch_model(zoo.kind(name)), zoo.kind(name)
    inputs, real = zoo.kind_inputs(model)
    kv = tiny.kv_of_shapes(patch_of(model).shapes)
    expected = parameter_gradients(textbook.concatenating(bare, kv, inputs), inputs, real)
    with use_prefix(model, kv):
        got = parameter_gradients(model, inputs, real)
    torch.testing.assert_close(got, expected, **EXACT)


def test_a_frozen_position_bias_costs_nothing(monkeypatch):
    """Neither without gradients nor when checkpointing asks for those of zeros."""
    from fastprefix.attention.backends import reference

    model = patch_model(frozen("t5"))
    inputs, real = zoo.kind_inputs(model)
    kv = tiny.kv_of_shapes(patch_of(model).shapes)
    monkeypatch.setattr(reference, "forward", None)
    with use_prefix(model, kv):
        run(model, kv, inputs, real)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run(model, kv, inputs, real)
    with torch.no_grad():
        patch_model(zoo.kind("t5"))(**inputs)
