"""fallback="expand": models that cannot be patched get prefixes through their own KV cache.

The oracle runs each row alone, unpadded, in plain transformers: behind the prompt in one sequence,
or behind the same keys and values in a DynamicCache.
"""

import copy
import inspect
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    BloomForSequenceClassification,
    DynamicCache,
    FalconConfig,
    FalconForQuestionAnswering,
    StaticCache,
)

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    UnsupportedModelError,
    patch_model,
    unpatch_model,
    use_prefix,
)
from fastprefix.hf import patch_of
from fastprefix.kv import Reweighting

P = 5
_BASE = {
    "vocab_size": 101, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "initializer_range": 0.15, "tie_word_embeddings": False,
}  # fmt: skip
_STACK = {
    **_BASE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_BERT = {
    **_STACK, "intermediate_size": 96, "is_decoder": True, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_GPTJ = {
    **_BASE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
_GROUPED = {**_STACK, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
_SPEECH = {
    **_BASE, "d_model": 64, "max_position_embeddings": 64, "dropout": 0.0, "init_std": 0.15,
}  # fmt: skip
MODELS = {
    "falcon mqa": (
        "FalconForCausalLM",
        {**_STACK, "multi_query": True, "new_decoder_architecture": False, "alibi": False},
    ),
    "falcon alibi": (
        "FalconForCausalLM",
        {**_STACK, "multi_query": False, "new_decoder_architecture": False, "alibi": True,
         "parallel_attn": False, "bias": True},
    ),
    "falcon new": (
        "FalconForCausalLM",
        {**_STACK, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    ),
    "bloom": ("BloomForCausalLM", {**_BASE, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJForCausalLM", _GPTJ),
    "codegen": ("CodeGenForCausalLM", _GPTJ),
    "mpt": (
        "MptForCausalLM", {**_BASE, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
         "use_cache": True}
    ),
    "xglm": (
        "XGLMForCausalLM",
        {**_SPEECH, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96,
         "attention_dropout": 0.0, "activation_dropout": 0.0},
    ),
    "stablelm": ("StableLmForCausalLM", _GROUPED),
    "nemotron": ("NemotronForCausalLM", _GROUPED),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseForCausalLM",
        {**_STACK, "intermediate_multiple_size": 2, "attention_dropout": 0.0,
         "hidden_dropout": 0.0},
    ),
    "roformer": ("RoFormerForCausalLM", {**_BERT, "embedding_size": 64}),
    "rembert": (
        "RemBertForCausalLM", {**_BERT, "input_embedding_size": 32, "output_embedding_size": 32}
    ),
    "megatron_bert": ("MegatronBertForCausalLM", _BERT),
    "trocr": (
        "TrOCRForCausalLM",
        {**_SPEECH, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96},
    ),
}  # fmt: skip
# Their pads take positions, so that padding on the left is refused.
COUNT_PADS = ("roformer", "trocr")
BERTS = ("roformer", "rembert", "megatron_bert")
# From 5.24 on their attention goes through the interface.
MAY_BE_PATCHED = ("gptj", "codegen")

pytestmark = pytest.mark.filterwarnings("ignore:.*fallback='expand' the prefix is copied")


def make(name, **changes):
    model_class, fields = MODELS[name]
    cls = getattr(transformers, model_class)
    return fill(cls(cls.config_class(**{**fields, **changes})))


def fill(model):
    """Loud weights, the same for the same model."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for key, parameter in model.named_parameters():
            if "embed_positions" in key and not parameter.requires_grad:
                continue  # sinusoids
            mean = parameter.mean().item() if parameter.dim() == 1 else 0.0
            parameter.normal_(mean, 0.1 if parameter.dim() == 1 else 0.15)
    return model.eval()


def is_causal(name):
    """Release 5.17 lets the BERT-like decoders see their text in both directions."""
    model, ids = make(name), torch.arange(1, 6)[None]
    other = ids.clone()
    other[0, -1] = 0
    return torch.equal(model(ids).logits[:, 0], model(other).logits[:, 0])


@pytest.fixture(params=MODELS)
def name(request):
    if request.param in BERTS and not is_causal(request.param):
        pytest.skip(f"{request.param} is no causal model in this release of transformers")
    return request.param


@pytest.mark.parametrize("bert", BERTS)
def test_decoders_that_are_none_take_no_prompt(bert):
    """What the model does counts, not what its configuration says."""
    if is_causal(bert):
        PrefixKV.prefill(make(bert), tiny.prompt(3), fallback="expand")
    else:
        with pytest.raises(ValueError, match="takes a decoder-only model"):
            PrefixKV.prefill(make(bert), tiny.prompt(3), fallback="expand")


def learned(model, length=P, seed=0, requires_grad=True):
    """A prefix that no text has, for a patched model."""
    generator = torch.Generator().manual_seed(7 + seed)
    made = []
    for shape in patch_of(model).shapes * 2:
        size = (shape.num_heads, length, shape.key_size)
        made.append(torch.randn(size, generator=generator).requires_grad_(requires_grad))
    half = len(made) // 2
    return PrefixKV(tuple(made[:half]), tuple(made[half:]), length)


def rows_of(ids, mask):
    return [row[keep.bool()][None] for row, keep in zip(ids, mask, strict=True)]


def plain_logits(bare, row, kv=None):
    """Of one text [1, L] behind a prefix in a plain cache."""
    if kv is None or kv.num_virtual_tokens == 0:
        return bare(row).logits[0]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(kv.keys, kv.values, strict=True)):
        cache.update(key[None], value[None], layer)
    F = kv.num_virtual_tokens
    where = {}
    if "position_ids" in inspect.signature(bare.forward).parameters:
        where["position_ids"] = torch.arange(row.shape[1])[None] + kv.position_offset
    mask = torch.ones(1, F + row.shape[1], dtype=torch.long)
    return bare(row, attention_mask=mask, past_key_values=cache, **where).logits[0]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def sides(name):
    return ("right",) if name in COUNT_PADS else ("right", "left")


def test_a_prompt_is_the_concatenation(name):
    model, bare, front = make(name), make(name), tiny.prompt(9)
    kv = PrefixKV.prefill(model, front, fallback="expand")
    assert kv.in_window
    assert kv.position_offset == 9
    for side, lengths in [(s, (7, 4, 1)) for s in sides(name)] + [("right", (6, 6))]:
        ids, mask = tiny.batch(lengths, side)
        with use_prefix(model, kv, fallback="expand"):
            logits = model(ids, attention_mask=mask).logits
            if min(lengths) == max(lengths):
                close(model(ids).logits, logits)
        for row, text in enumerate(rows_of(ids, mask)):
            wanted = bare(torch.cat([front, text], 1)).logits[0, 9:]
            close(logits[row][mask[row].bool()], wanted)
    # the test can fail: one token of the prompt less is not the same
    less = kv.map(lambda x: x[:, 1:])
    less = PrefixKV(less.keys, less.values, 8, in_window=True)
    with use_prefix(model, less, fallback="expand"):
        assert (model(ids).logits - logits).abs().max() > 0.05


def test_a_learned_prefix_and_its_gradient(name):
    model, bare = patch_model(make(name), fallback="expand"), make(name)
    assert patch_of(model).expanded is not None or name in MAY_BE_PATCHED
    assert patch_of(model).groups == ("decoder",) * 2
    assert patch_of(model).default_offset(P) == P
    kv = learned(model)
    leaves = [*kv.keys, *kv.values]
    for side in sides(name):
        ids, mask = tiny.batch((7, 4, 2), side)
        model.train(side == "left")  # nothing of it drops anything
        weight = torch.randn(101, generator=torch.Generator().manual_seed(1))
        with use_prefix(model, kv):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        real = [logits[row][mask[row].bool()] for row in range(3)]
        wanted = [plain_logits(bare, text, kv) for text in rows_of(ids, mask)]
        for found, want in zip(real, wanted, strict=True):
            close(found, want)
        found = torch.autograd.grad(torch.cat(real).sigmoid().matmul(weight).sum(), leaves)
        want = torch.autograd.grad(torch.cat(wanted).sigmoid().matmul(weight).sum(), leaves)
        for x, y in zip(found, want, strict=True):
            close(x, y)
        assert min(x.abs().max() for x in found) > 1e-3


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3},
     {"num_beams": 2, "num_return_sequences": 2}],
    ids=lambda how: " ".join(how) or "greedy",
)  # fmt: skip
def test_generate(name, how):
    model, bare, front = make(name), make(name), tiny.prompt(9)
    kv = PrefixKV.prefill(model, front, fallback="expand")
    batches = [tiny.batch((6, 6))]
    if name not in COUNT_PADS:
        batches.append(tiny.batch((7, 4, 1)))
    if "prompt_lookup_num_tokens" in how:
        batches = [tiny.batch((6,))]
    for ids, mask in batches:
        with use_prefix(model, kv, fallback="expand"):
            found = tiny.generate(model, ids, mask, **how)
        texts = rows_of(ids, mask)
        wanted = [tiny.generate(bare, torch.cat([front, text], 1), **how) for text in texts]
        assert torch.equal(found, torch.cat(wanted))
        assert not any(torch.equal(tiny.generate(bare, texts[0], **how), x) for x in wanted[:1])


def test_generate_samples_the_same(name):
    model, bare, front = make(name), make(name), tiny.prompt(9)
    kv = PrefixKV.prefill(model, front, fallback="expand")
    ids, _ = tiny.batch((6, 6))
    torch.manual_seed(3)
    with use_prefix(model, kv, fallback="expand"):
        found = tiny.generate(model, ids, do_sample=True)
    torch.manual_seed(3)
    both = torch.cat([front.expand(2, -1), ids], 1)
    assert torch.equal(found, tiny.generate(bare, both, do_sample=True))


def test_generate_goes_on_from_a_cache(name):
    """The cache shows the text alone, in and between two blocks with the prefix."""
    model, bare, front = make(name), make(name), tiny.prompt(9)
    kv = PrefixKV.prefill(model, front, fallback="expand")
    cache, ids = DynamicCache(config=model.config), tiny.prompt(4, seed=5)
    text = ids
    for turn in range(2):
        with use_prefix(model, PrefixKV(kv.keys, kv.values, 9, True), fallback="expand"):
            text = model.generate(
                text, attention_mask=torch.ones_like(text), max_new_tokens=4, do_sample=False,
                pad_token_id=0, past_key_values=cache,
            )  # fmt: skip
        assert cache.get_seq_length() == text.shape[1] - 1
        text = torch.cat([text, tiny.prompt(3, seed=6 + turn)], 1)
    both = torch.cat([front, ids], 1)
    for turn in range(2):
        both = bare.generate(
            both, attention_mask=torch.ones_like(both), max_new_tokens=4, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        both = torch.cat([both, tiny.prompt(3, seed=6 + turn)], 1)
    assert torch.equal(text, both[:, 9:])


def test_rows_with_prefixes_of_their_own(name):
    model, bare = patch_model(make(name), fallback="expand"), make(name)
    long, short = learned(model), learned(model, 3 if name not in COUNT_PADS else P, seed=1)
    rows = ["long", "short", None, "long"] if name not in COUNT_PADS else ["long", "short"] * 2
    for side in sides(name):
        ids, mask = tiny.batch((5, 7, 4, 6), side)
        with use_prefix(model, {"long": long, "short": short}, rows):
            logits = model(ids, attention_mask=mask).logits
            if side == "left":
                new = tiny.generate(model, ids, mask, max_new_tokens=3)
        for row, (text, own) in enumerate(zip(rows_of(ids, mask), rows, strict=True)):
            prefix = {"long": long, "short": short, None: None}[own]
            close(logits[row][mask[row].bool()], plain_logits(bare, text, prefix))
            if side == "left":
                for token in new[row]:
                    assert plain_logits(bare, text, prefix)[-1].argmax() == token
                    text = torch.cat([text, token.view(1, 1)], 1)


@pytest.mark.parametrize("name", ["falcon new", "bloom", "mpt", "megatron_bert"])
def test_a_prefix_is_trained_saved_and_loaded(name, tmp_path):
    config = PrefixConfig(num_virtual_tokens=4, fallback="expand", init_std=0.5)
    tuned = PrefixTuningModel(make(name), config)
    optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), lr=1.0)
    ids, mask = tiny.batch((7, 4, 2), "right")
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    for _ in range(2):
        loss = tuned(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0] - 1e-3
    tuned.eval().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="fallback='expand'"):
        PrefixTuningModel.from_pretrained(make(name), tmp_path)
    loaded = PrefixTuningModel.from_pretrained(make(name), tmp_path, fallback="expand")
    with torch.no_grad():
        logits = loaded(input_ids=ids, attention_mask=mask).logits
        close(logits, tuned(input_ids=ids, attention_mask=mask).logits)
        for row, text in enumerate(rows_of(ids, mask)):
            wanted = plain_logits(make(name), text, tuned.export())
            close(logits[row][mask[row].bool()], wanted)
    assert tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2).shape == (3, 9)
    with tuned.disable_adapter():
        assert torch.equal(tuned(input_ids=ids).logits, make(name)(ids).logits)


@pytest.mark.parametrize("init", ["text", "embeddings"])
def test_a_prefix_starts_from_a_text(init):
    def tokenizer(text):
        return {"input_ids": [3, 1, 4, 1, 5][: len(text)]}

    config = PrefixConfig(5, init=init, init_text="abcde", fallback="expand")
    if init == "embeddings":
        with pytest.raises(ValueError, match="takes 'text'"):
            PrefixTuningModel(make("bloom"), config, tokenizer)
        return
    kv = PrefixTuningModel(make("bloom"), config, tokenizer).export()
    wanted = PrefixKV.prefill(make("bloom"), [3, 1, 4, 1, 5], fallback="expand")
    for x, y in zip(kv.keys, wanted.keys, strict=True):
        close(x, y)


def test_encoders_that_look_into_their_cache():
    """RemBERT's encoder attends to what is there; a prompt is refused, since it sees the text."""
    fields = {**MODELS["rembert"][1], "is_decoder": False}
    config = transformers.RemBertConfig(**fields)
    model = patch_model(fill(transformers.RemBertForMaskedLM(config)), fallback="expand")
    bare = fill(transformers.RemBertForMaskedLM(config))
    assert set(patch_of(model).groups) == {"encoder"}
    front, text = tiny.prompt(P), tiny.prompt(6, seed=3)
    # the keys that all layers make of the first tokens of one sequence are a prefix of the rest
    cache = DynamicCache()
    whole = bare.rembert(torch.cat([front, text], 1), past_key_values=cache).last_hidden_state
    keys = tuple(layer.keys[0, :, :P] for layer in cache.layers)
    values = tuple(layer.values[0, :, :P] for layer in cache.layers)
    with use_prefix(model, PrefixKV(keys, values, P)):
        close(model.base_model(text).last_hidden_state, whole[:, P:])
    with pytest.raises(ValueError, match="decoder-only"):
        PrefixKV.prefill(model, front)


def test_heads_on_top():
    """What a model makes of the last token, or of every one, is the text's."""
    fields = {**MODELS["bloom"][1], "num_labels": 3}
    model = fill(BloomForSequenceClassification(BloomConfig(**fields)))
    bare = fill(BloomForSequenceClassification(BloomConfig(**fields)))
    front = tiny.prompt(9)
    kv = PrefixKV.prefill(model, front, fallback="expand")
    ids, mask = tiny.batch((7, 4), "right")
    with use_prefix(model, kv, fallback="expand"):
        logits = model(ids, attention_mask=mask).logits
    for row, text in enumerate(rows_of(ids, mask)):
        close(logits[row], bare(torch.cat([front, text], 1)).logits[0])
    # a head that takes no cache itself
    config = FalconConfig(**MODELS["falcon new"][1])
    model, bare = (fill(FalconForQuestionAnswering(config)) for _ in range(2))
    kv = PrefixKV.prefill(model, front, fallback="expand")
    with use_prefix(model, kv, fallback="expand"):
        close(model(ids[:1]).start_logits, bare(torch.cat([front, ids[:1]], 1)).start_logits[:, 9:])
        hidden = model.base_model(ids[:1], return_dict=False, use_cache=False)
        assert len(hidden) == 1


def test_never_chosen_silently():
    for name in ("falcon new", "stablelm"):
        with pytest.raises(UnsupportedModelError, match=r"fallback='expand' gives it"):
            patch_model(make(name))
    with pytest.raises(UnsupportedModelError) as refused:
        patch_model(fill(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(
            n_embd=32, n_layer=1, n_head=2, vocab_size=50))))  # fmt: skip
    assert "fallback" not in str(refused.value)  # which would not help


def test_models_that_can_be_patched_are():
    model = tiny.build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, fallback="expand")
        with use_prefix(model, tiny.random_kv(model), fallback="expand"):
            model(tiny.prompt(4))
    assert patch_of(model).expanded is None


@pytest.mark.parametrize("thing", ["copy", True, 1])
def test_what_is_no_fallback(thing):
    message = f"fallback: got {thing!r}, takes None or 'expand'"
    model = tiny.build("llama")
    for call in (
        lambda: patch_model(model, fallback=thing),
        lambda: use_prefix(model, None, fallback=thing).__enter__(),
        lambda: PrefixKV.prefill(model, [1], fallback=thing),
        lambda: PrefixConfig(fallback=thing),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.filterwarnings("default:.*fallback='expand' the prefix is copied")
def test_one_warning_says_what_it_costs():
    model, ids = make("falcon new"), tiny.prompt(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kv = PrefixKV.prefill(model, tiny.prompt(9), fallback="expand")
        for _ in range(2):
            with use_prefix(model, kv, fallback="expand"):
                model(ids)
                model(ids)
    told = [str(x.message) for x in caught if "fallback" in str(x.message)]
    assert len(told) == 1
    assert f"9 tokens, {kv.nbytes:,} bytes a row" in told[0]
    assert "FalconForCausalLM does not route its attention" in told[0]


def test_unpatching_leaves_the_model_as_it_was():
    model, ids = make("bloom"), tiny.prompt(4)
    before = model(ids).logits
    patch_model(model, fallback="expand")
    assert torch.equal(model(ids).logits, before)
    twin = copy.deepcopy(model)
    kv = learned(model)
    with use_prefix(model, kv):
        assert not torch.equal(model(ids).logits, before)
        assert torch.equal(twin(ids).logits, before)
        with use_prefix(model, None):
            assert torch.equal(model(ids).logits, before)
    with use_prefix(twin, kv), use_prefix(model, kv):
        assert torch.equal(twin(ids).logits, model(ids).logits)
    unpatch_model(model)
    assert torch.equal(model(ids).logits, before)
    for module in model.modules():
        assert not any(key.startswith("_fastprefix") for key in vars(module))
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_a_call_that_fails_leaves_nothing_behind():
    model, ids = patch_model(make("falcon new"), fallback="expand"), tiny.prompt(4)
    before, kv = model(ids).logits, learned(model)
    with use_prefix(model, kv):
        wanted = model(ids).logits
        with pytest.raises(IndexError):
            model(ids + 1000)
        assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model(ids).logits, before)


def test_what_cannot_be_exact_is_refused_by_name():
    model = patch_model(make("falcon new"), fallback="expand")
    kv, ids = learned(model, requires_grad=False), tiny.prompt(4)
    ones = torch.ones_like(ids)

    def refused(message, error=NotImplementedError, kv=kv, rows=None, model=model, **kwargs):
        with pytest.raises(error, match=message), use_prefix(model, kv, rows):
            model(ids, **kwargs)

    heads = Reweighting("bias", (torch.zeros(4),) * 2)
    refused("a bias for each query head", kv=PrefixKV(kv.keys, kv.values, P, reweighting=heads))
    shorter = PrefixKV((kv.keys[0], kv.keys[1][:, 1:]), (kv.values[0], kv.values[1][:, 1:]), P)
    refused("different lengths in different layers", kv=shorter)
    refused("got StaticCache", past_key_values=StaticCache(config=model.config, max_cache_len=9))
    refused("got DynamicCache of .*DynamicSliding", past_key_values=windowed_cache())
    refused("output_attentions", ValueError, output_attentions=True)
    refused("attention_mask: got 4 dimensions", attention_mask=torch.ones(1, 1, 4, 4).bool())
    refused("attention_mask: got shape", ValueError, attention_mask=ones[:, :2])
    refused("position_ids: start anew", position_ids=torch.tensor([[0, 1, 0, 1]]))
    refused("rows: got 2 names", ValueError, {"a": kv}, ["a", None])
    model.gradient_checkpointing_enable()
    model.train()
    refused("gradient checkpointing", ValueError)
    with pytest.raises(ValueError, match="a prefix of 1 layers"), use_prefix(model, kv.select([0])):
        pass
    bloom = patch_model(make("bloom"), fallback="expand")
    away = learned(bloom)
    refused("position_offset", ValueError, PrefixKV(away.keys, away.values, 0), model=bloom)
    pads = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])
    with pytest.raises(NotImplementedError, match="a row of pads"), use_prefix(bloom, away):
        bloom(ids.expand(2, -1), attention_mask=pads)
    roformer = patch_model(make("roformer"), fallback="expand")
    away = learned(roformer)
    left = tiny.batch((4, 2))
    refused_left = pytest.raises(NotImplementedError, match="padding on the left")
    with use_prefix(roformer, away), refused_left:
        roformer(left[0], attention_mask=left[1])
    shorter = away.map(lambda x: x[:, 1:])
    shorter = PrefixKV(shorter.keys, shorter.values, P - 1)
    ragged = pytest.raises(NotImplementedError, match="rows: got prefixes of")
    with ragged, use_prefix(roformer, {"a": away, "b": shorter}, ["a", "b"]):
        pass


def windowed_cache():
    layer = transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=4)
    cache = DynamicCache()
    cache.layers = [layer, layer]
    return cache


def test_caches_of_other_texts_are_refused():
    model = patch_model(make("bloom"), fallback="expand")
    kv, other, ids = learned(model), learned(model, seed=1), tiny.prompt(4)
    bare = model(ids, use_cache=True).past_key_values
    with use_prefix(model, kv):
        ours = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="a text behind no prefix"):
            model(ids, past_key_values=bare)
    with use_prefix(model, other), pytest.raises(ValueError, match="behind another prefix"):
        model(ids, past_key_values=ours)
    with pytest.raises(ValueError, match="holds a prefix, and none is active"):
        model(ids, past_key_values=ours)
    with pytest.raises(RuntimeError, match="use_prefix block, which is closed"):
        unpatch_model(model)(ids, past_key_values=ours)


@pytest.mark.parametrize(
    ("field", "given"), [("layers", [0]), ("gated", True), ("prefix_bias", "learned")]
)
def test_configs_for_what_the_cache_cannot_hold(field, given):
    config = PrefixConfig(P, fallback="expand", **{field: given})
    with pytest.raises(ValueError, match=f"{field}: got .* fallback='expand'"):
        PrefixTuningModel(make("bloom"), config)


@pytest.mark.parametrize("name", ["roformer", "trocr", "bloom", "mpt", "falcon alibi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pads_that_take_positions_are_seen_with_any_weights(name, dtype):
    """Weights as they are made are so small that positions hardly matter to the results."""
    model_class, fields = MODELS[name]
    fields = {k: v for k, v in fields.items() if k not in ("initializer_range", "init_std")}
    cls = getattr(transformers, model_class)
    model = cls(cls.config_class(**fields)).to(dtype).eval()
    patch_model(model, fallback="expand")
    ids, mask = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    with use_prefix(model, learned(model)):
        if name in COUNT_PADS:
            with pytest.raises(NotImplementedError, match="padding on the left"):
                model(ids, attention_mask=mask)
        else:
            model(ids, attention_mask=mask)


def test_a_thread_in_no_block_is_refused():
    model, ids = patch_model(make("bloom"), fallback="expand"), tiny.prompt(4)
    with ThreadPoolExecutor(1) as pool, use_prefix(model, learned(model)):
        model(ids)
        with pytest.raises(RuntimeError, match="open in another thread"):
            pool.submit(model, ids).result()


class Forgetful(BloomForCausalLM):
    """Computes something else as soon as there is anything in the cache."""

    def __init__(self, config):
        super().__init__(config)
        inner = self.transformer.h[0]
        inner.register_forward_hook(self.louder, with_kwargs=True)

    @staticmethod
    def louder(module, args, kwargs, output):
        cache = kwargs["layer_past"]
        past = cache.layers[0].keys.shape[2] - args[0].shape[1] if cache is not None else 0
        return (output[0] * (1 + past), *output[1:])


def test_a_model_that_is_wrong_behind_its_cache_is_refused():
    """The check when a model is patched can fail."""
    model = fill(Forgetful(BloomConfig(**MODELS["bloom"][1])))
    with pytest.raises(UnsupportedModelError, match="is not what it computes behind the text"):
        patch_model(model, fallback="expand")
    assert not any(k.startswith("_fastprefix") for m in model.modules() for k in vars(m))
    assert not model.transformer._forward_pre_hooks


REFUSED = {
    "openai": ("OpenAIGPTLMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "no KV cache"),
    "deberta_v2": ("DebertaV2ForMaskedLM", {**_STACK, "intermediate_size": 32}, "no KV cache"),
    "prophetnet": (
        "ProphetNetForConditionalGeneration", {"hidden_size": 32, "num_encoder_layers": 1,
        "num_decoder_layers": 1, "decoder_start_token_id": 0}, "for decoder-only models",
    ),
    "prophetnet decoder": (
        "ProphetNetForCausalLM", {"hidden_size": 32, "num_decoder_layers": 1, "is_decoder": True,
        "num_encoder_layers": 1}, "`decoder_input_ids` of length 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_it_does_not_help(name):
    model_class, fields, message = REFUSED[name]
    cls = getattr(transformers, model_class)
    model = cls(cls.config_class(**fields)).eval()
    with pytest.raises(
        UnsupportedModelError, match=f"fallback='expand' does not help: .*{message}"
    ):
        patch_model(model, fallback="expand")
    assert not any(isinstance(x, nn.Module) and x._forward_pre_hooks for x in model.modules())
