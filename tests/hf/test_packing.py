"""Packed sequences: each sees the prefix and itself, as if it ran alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, patch_model, use_prefix
from fastprefix.hf.layer import masks

LENGTHS = (9, 1, 4)
OPTIONS = {
    "position_ids": {},
    "cu_seq_lens": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "seq_idx": {"return_seq_idx": True, "return_position_ids": False},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}
EXACT = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture
def texts():
    return [tiny.prompt(length, seed=10 + length)[0] for length in LENGTHS]


@pytest.fixture
def flatten(texts):
    """The texts as transformers' collator packs them."""

    def collate(**options):
        collator = DataCollatorWithFlattening(return_tensors="pt", **options)
        batch = collator([{"input_ids": text} for text in texts])
        batch.pop("labels")
        return batch

    return collate


@pytest.fixture
def no_mask_is_made(monkeypatch):
    """No mask of L x L: neither transformers' nor ours."""
    make = masks.sdpa_mask

    def refuse(*args, **kwargs):
        assert kwargs["q_length"] != sum(LENGTHS), "a mask was made"
        return make(*args, **kwargs)  # for the prompt, or to patch

    monkeypatch.setattr(masks, "sdpa_mask", refuse)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_has_a_prefix_of_its_own(model, bare, texts, flatten, name):
    """Rows by name count packed sequences, and each one's positions start behind its prefix."""
    kvs = {
        "a": tiny.random_kv(model, 3, seed=1, position_offset=7),
        "b": tiny.random_kv(model, 5, seed=2),
    }
    rows = ["b", None, "a"]
    with torch.no_grad():
        with use_prefix(model, kvs, rows):
            packed = model(**flatten(**OPTIONS[name])).logits[0].split(LENGTHS)
        for got, text, row in zip(packed, texts, rows, strict=True):
            ids = text[None]
            if row is None:
                expected = bare(ids).logits
            else:
                expected = tiny.expanded_forward(bare, kvs[row], ids, torch.ones_like(ids)).logits
            torch.testing.assert_close(got, expected[0], **EXACT)


def test_names_count_the_packed_sequences(flatten):
    model = patch_model(tiny.build())
    kvs = {"a": tiny.random_kv(model, 3)}
    with (
        use_prefix(model, kvs, ["a"]),
        pytest.raises(ValueError, match="got 1 names, takes one for each of the batch's 3 packed"),
    ):
        model(**flatten())


def apart(bare, front, texts):
    """Logits of the texts [T, V], each run behind its own copy of the prompt."""
    P = front.shape[1]
    return torch.cat([bare(torch.cat([front[0], text])[None]).logits[0, P:] for text in texts])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("no_mask_is_made")
def test_logits_equal_separate_runs(model, bare, texts, flatten, options):
    front = tiny.prompt()
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(**flatten(**OPTIONS[options])).logits[0]
    torch.testing.assert_close(got, apart(bare, front, texts), **EXACT)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss", "qwen2"])
@pytest.mark.parametrize("P", [3, 12])
@pytest.mark.usefixtures("no_mask_is_made")
def test_a_prompt_slides_out_of_each_sequence(texts, flatten, name, P):
    model, bare = tiny.windowed(name), tiny.windowed(name)
    front = tiny.prompt(P)
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(**flatten()).logits[0]
    torch.testing.assert_close(got, apart(bare, front, texts), **EXACT)


@pytest.mark.parametrize("options", ["position_ids", "cu_seq_lens"])
def test_gradients_of_a_learned_prefix_are_sums_over_sequences(
    architecture, texts, flatten, options
):
    model, bare = (tiny.build(architecture, torch.float64) for _ in range(2))
    kv = tiny.random_kv(model, requires_grad=True)
    for text in texts:
        mask = torch.ones_like(text)[None]
        tiny.expanded_forward(bare, kv, text[None], mask).logits.logsumexp(-1).sum().backward()
    expected = tiny.gradients(kv)
    assert all(gradient.abs().max() > 1e-6 for gradient in expected)
    patch_model(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with use_prefix(model, kv):
        model(**flatten(**OPTIONS[options])).logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(tiny.gradients(kv), expected, rtol=1e-5, atol=1e-6)


def test_the_decoder_alone(model, bare, texts, flatten):
    front = tiny.prompt()
    P = front.shape[1]
    whole = [torch.cat([front[0], text])[None] for text in texts]
    expected = torch.cat([bare.base_model(ids).last_hidden_state[0, P:] for ids in whole])
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model.base_model(**flatten()).last_hidden_state[0]
    torch.testing.assert_close(got, expected, **EXACT)


def test_inputs_embeds(model, bare, texts, flatten):
    front, batch = tiny.prompt(), flatten(**OPTIONS["cu_seq_lens"])
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(inputs_embeds=embeds, **batch).logits[0]
    torch.testing.assert_close(got, apart(bare, front, texts), **EXACT)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_several_rows_keep_transformers_masks(texts, flatten, name):
    """The operator takes one packed row; with more transformers' masks keep sequences apart."""
    build = tiny.windowed if name == "mistral" else tiny.build
    model, bare, front = build(name), build(name), tiny.prompt(5)
    batch = {key: value.repeat(2, 1) for key, value in flatten().items()}
    batch["input_ids"][1] = batch["input_ids"][1].flip(0)
    others = batch["input_ids"][1].split(LENGTHS)
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(**batch).logits
    expected = torch.stack([apart(bare, front, rows) for rows in (texts, others)])
    torch.testing.assert_close(got, expected, **EXACT)


def test_positions_with_gaps_are_left_to_transformers(model, bare):
    """Not packed: it takes a gap for a new sequence without a cache, and for none with one."""
    front, (ids, _) = tiny.prompt(), tiny.batch((6, 6))
    positions = torch.tensor([[0, 1, 2, 5, 6, 7]]).expand(2, -1)
    full = torch.cat([front.expand(2, -1), ids], 1)
    P = front.shape[1]
    places = torch.cat([torch.arange(P)[None].expand(2, -1), positions + P], 1)
    expected = bare(full, position_ids=places).logits[:, P:]
    with use_prefix(model, PrefixKV.prefill(model, front)):
        got = model(ids, position_ids=positions).logits
    torch.testing.assert_close(got, expected, **EXACT)


def test_compiled_by_offsets(texts, flatten):
    model, bare = tiny.build(num_hidden_layers=1), tiny.build(num_hidden_layers=1)
    front, batch = tiny.prompt(), flatten(**OPTIONS["cu_seq_lens"])
    batch = {name: batch[name] for name in ("input_ids", "cu_seq_lens_q", "cu_seq_lens_k")}
    torch._dynamo.reset()
    with use_prefix(patch_model(model), PrefixKV.prefill(model, front)), torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="eager")(**batch).logits[0]
    torch.testing.assert_close(got, apart(bare, front, texts), **EXACT)


def test_packed_prefix_tuning_learns_as_padded_does(texts, flatten):
    """Labels of the collator: the first token of each sequence is no target."""
    model = patch_model(tiny.build(dtype=torch.float64))
    ids, mask = tiny.pad(texts, "right")
    labels = ids.masked_fill(~mask.bool(), -100)
    packed = flatten()
    first = packed["position_ids"] == 0
    packed["labels"] = packed["input_ids"].masked_fill(first, -100)
    kv, found = tiny.random_kv(model, requires_grad=True), []
    with use_prefix(model, kv):
        for batch in (packed, {"input_ids": ids, "attention_mask": mask, "labels": labels}):
            loss = model(**batch).loss
            loss.backward()
            found.append([loss, *tiny.gradients(kv)])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


WRONG = {
    "use_cache": ({"use_cache": True}, "use_cache"),
    "mask": ({"attention_mask": torch.ones(1, sum(LENGTHS))}, "attention_mask"),
    "other keys": ({"cu_seq_lens_k": torch.tensor([0, 14, 14, 14])}, "cu_seq_lens_k"),
    "not all tokens": ({"cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seqlens"),
    "two rows": ({"input_ids": torch.ones(2, 14, dtype=torch.long)}, "cu_seq_lens_q"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_with_packed_sequences(flatten, case):
    changes, message = WRONG[case]
    batch = {**flatten(**OPTIONS["cu_seq_lens"]), **changes}
    if case == "not all tokens":
        batch["cu_seq_lens_k"] = batch["cu_seq_lens_q"]
    model = tiny.build()
    with use_prefix(model, tiny.random_kv(model)), pytest.raises(ValueError, match=message):
        model(**batch)


def test_a_filled_cache_is_refused(flatten):
    model, cache = tiny.build(), DynamicCache()
    with use_prefix(model, tiny.random_kv(model)):
        model(tiny.prompt(), past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values"):
            model(**flatten(**OPTIONS["cu_seq_lens"]), past_key_values=cache)


def test_layers_that_see_chunks_are_refused(flatten):
    """The offsets do not say where chunks begin, and a prompt's text is in none of them."""
    model = patch_model(tiny.build())
    model.config.layer_types = ["chunked_attention"] * 3
    with (
        use_prefix(model, tiny.random_kv(model)),
        pytest.raises(NotImplementedError, match="chunked_attention"),
    ):
        model(**flatten())
    with (
        pytest.raises(NotImplementedError, match="chunks"),
        use_prefix(model, PrefixKV.prefill(model, tiny.prompt())),
    ):
        pass


def test_a_prompt_for_a_model_with_a_state_is_refused(monkeypatch):
    """State-space layers would not have seen the prompt."""
    model = tiny.build()
    kv = PrefixKV.prefill(model, tiny.prompt())
    monkeypatch.setattr(type(model), "_is_stateful", True)
    with pytest.raises(NotImplementedError, match="state"), use_prefix(model, kv):
        pass
    with use_prefix(model, tiny.random_kv(model)):
        model(tiny.prompt())
