"""PromptTuningModel against the bare model fed the same embeddings, row by row, without padding."""

import pytest
import torch
from transformers import (
    BloomConfig,
    MistralConfig,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, PromptConfig, PromptTuningModel, use_prefix
from fastprefix_testing.prompts import CLOSE, KINDS, P, alone, bert, rows, without


@pytest.fixture(params=["left", "right"])
def side(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def tuned(model):
    return PromptTuningModel(model, PromptConfig(num_virtual_tokens=P, init_std=1.0)).eval()


def test_logits_are_those_of_each_row_alone(bare, tuned, side):
    ids, mask = tiny.batch(side=side)
    logits = tuned(ids, attention_mask=mask).logits
    assert logits.shape[:2] == ids.shape
    for row, text in enumerate(rows(ids, mask)):
        expected = without(alone(bare, tuned.export_embeddings(), text).logits)
        torch.testing.assert_close(logits[row][mask[row].bool()], expected, **CLOSE)


def test_the_prompt_matters(bare, tuned):
    ids, mask = tiny.batch()
    got = tuned(ids, attention_mask=mask).logits[mask.bool()]
    plain = bare(ids, attention_mask=mask, position_ids=tiny.positions(mask)).logits[mask.bool()]
    assert (got - plain).abs().max() > 0.1


def test_infixes_lie_where_each_row_says(model, bare, side):
    config = PromptConfig(num_virtual_tokens=P, placement="infix", init_std=1.0)
    tuned = PromptTuningModel(model, config).eval()
    ids, mask = tiny.batch((7, 4, 3, 1), side)
    after = torch.tensor([3, 4, 0, 1])
    given = tiny.positions(mask)
    for position_ids in (None, given):
        logits = tuned(
            ids, attention_mask=mask, position_ids=position_ids, infix_positions=after
        ).logits
        for row, text in enumerate(rows(ids, mask)):
            whole = alone(bare, tuned.export_embeddings(), text, int(after[row])).logits
            torch.testing.assert_close(
                logits[row][mask[row].bool()], without(whole, int(after[row])), **CLOSE
            )
    unpadded = tuned(ids[:1], infix_positions=after[:1]).logits
    torch.testing.assert_close(unpadded[0], logits[0], **CLOSE)


def test_explicit_positions_move_behind_the_prompt(bare, tuned, side):
    ids, mask = tiny.batch(side=side)
    given = 2 * tiny.positions(mask)
    logits = tuned(ids, attention_mask=mask, position_ids=given).logits
    for row, text in enumerate(rows(ids, mask)):
        own = given[row][mask[row].bool()]
        places = torch.cat([torch.arange(P), own + P])[None]
        whole = alone(bare, tuned.export_embeddings(), text, position_ids=places).logits
        torch.testing.assert_close(logits[row][mask[row].bool()], without(whole), **CLOSE)


def test_loss_and_gradients_are_those_of_the_concatenation(model, bare, side, kind):
    tuned = PromptTuningModel(model, PromptConfig(num_virtual_tokens=P, **kind))
    ids, mask = tiny.batch(side=side)
    labels = ids.masked_fill(mask == 0, -100)
    tuned(ids, attention_mask=mask, labels=labels).loss.backward()
    got = [p.grad.clone() for p in tuned.encoder.parameters()]
    tuned.zero_grad()
    prompt, total = tuned.encoder(), 0
    for text in rows(ids, mask):
        target = torch.cat([torch.full((1, P), -100), text], dim=1)
        total = total + alone(bare, prompt, text, labels=target).loss * text.shape[1]
    (total / mask.sum()).backward()
    for ours, plain in zip(got, tuned.encoder.parameters(), strict=True):
        torch.testing.assert_close(ours, plain.grad, rtol=1e-3, atol=1e-6)
        assert plain.grad.abs().max() > 0
    assert all(p.grad is None for p in tuned.base_model.parameters())


@pytest.mark.parametrize("window", [4, 9])
def test_padding_uses_up_no_window(window):
    fields = {**tiny.GROUPED, "sliding_window": window}
    bare, model = (tiny.from_config(MistralConfig(**fields)) for _ in range(2))
    tuned = PromptTuningModel(model, PromptConfig(num_virtual_tokens=P, init_std=1.0)).eval()
    ids, mask = tiny.batch((9, 3), "left")
    logits = tuned(ids, attention_mask=mask).logits
    ours = tiny.generate(tuned, ids, mask)
    for row, text in enumerate(rows(ids, mask)):
        expected = without(alone(bare, tuned.export_embeddings(), text).logits)
        torch.testing.assert_close(logits[row][mask[row].bool()], expected, **CLOSE)
        assert torch.equal(ours[row], greedy(bare, tuned.export_embeddings(), text))


def greedy(bare, prompt, ids, steps=8, after=0):
    """Token by token, without any cache."""
    new = ids
    for _ in range(steps):
        logits = alone(bare, prompt, new, after, use_cache=False).logits
        new = torch.cat([new, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return new[0, ids.shape[1] :]


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}],
    ids=["dynamic", "static", "lookup", "none"],
)
def test_generate_is_greedy_on_the_concatenation(bare, tuned, options):
    ids, mask = tiny.batch((4,) if "prompt_lookup_num_tokens" in options else (7, 4, 1))
    got = tiny.generate(tuned, ids, mask, **options)
    for row, text in enumerate(rows(ids, mask)):
        assert torch.equal(got[row], greedy(bare, tuned.export_embeddings(), text))
    assert not hasattr(tuned.base_model, "_fastprefix_state"), "patched for the call alone"


def test_generate_keeps_one_copy_of_the_prompt(tuned):
    ids, mask = tiny.batch()
    out = tuned.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=3,
        pad_token_id=tiny.PAD,
        return_dict_in_generate=True,
    )
    assert out.past_key_values.get_seq_length() == ids.shape[1] + 2


def test_infixes_in_generate(model, bare):
    config = PromptConfig(num_virtual_tokens=P, placement="infix", init_std=1.0)
    tuned = PromptTuningModel(model, config).eval()
    ids, mask = tiny.batch()
    prompt = tuned.export_embeddings()
    behind = tiny.generate(tuned, ids, mask)
    at = torch.tensor([2, 1, 0])
    within = tiny.generate(tuned, ids, mask, infix_positions=at)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD}
    full = tuned.generate(ids[:1, -3:], **options)
    masked = tuned.generate(ids[:1, -3:], attention_mask=mask[:1, -3:], **options)
    assert mask[:1, -3:].all()
    assert torch.equal(full, masked)
    lengths = {"max_length": ids.shape[1] + 8, "pad_token_id": tiny.PAD}
    longest = tuned.generate(ids, attention_mask=mask, **lengths)
    assert torch.equal(longest[:, ids.shape[1] :], behind)
    for row, text in enumerate(rows(ids, mask)):
        assert torch.equal(behind[row], greedy(bare, prompt, text, after=text.shape[1]))
        assert torch.equal(within[row], greedy(bare, prompt, text, after=int(at[row])))


def test_a_model_that_cannot_be_patched_is_fed_the_prompt():
    fields = {k: v for k, v in tiny.GROUPED.items() if k in ("vocab_size", "initializer_range")}
    config = BloomConfig(**fields, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    bare, model = tiny.from_config(config), tiny.from_config(config)
    tuned = PromptTuningModel(model, PromptConfig(num_virtual_tokens=P, init_std=1.0)).eval()
    ids, mask = tiny.batch()
    got = tiny.generate(tuned, ids, mask)
    logits = tuned(ids, attention_mask=mask).logits
    for row, text in enumerate(rows(ids, mask)):
        assert torch.equal(got[row], greedy(bare, tuned.export_embeddings(), text))
        expected = without(alone(bare, tuned.export_embeddings(), text).logits)
        torch.testing.assert_close(logits[row][mask[row].bool()], expected, **CLOSE)


def test_export_is_the_prompt_as_a_prefix(tuned, bare, side):
    kv = tuned.export()
    assert (kv.num_virtual_tokens, kv.position_offset, kv.in_window) == (P, P, True)
    ids, mask = tiny.batch(side=side)
    expected = tuned(ids, attention_mask=mask).logits[mask.bool()]
    with use_prefix(bare, kv):
        got = bare(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, expected, **CLOSE)


def test_what_depends_on_the_text_is_not_exported(model):
    infix = PromptTuningModel(model, PromptConfig(num_virtual_tokens=P, placement="infix"))
    encoder = PromptTuningModel(bert(), PromptConfig(num_virtual_tokens=P, task_type="SEQ_CLS"))
    for tuned in (infix, encoder):
        with pytest.raises(ValueError, match="depend on the text"):
            tuned.export()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "attention_mask"),
        ({"infix_positions": torch.zeros(2)}, "infix_positions"),
        ({"inputs_embeds": torch.zeros(2, 4, 64)}, "inputs_embeds"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "packed"),
    ],
)
def test_refuses_what_it_would_get_wrong(call, said):
    tuned = PromptTuningModel(tiny.build(), PromptConfig(num_virtual_tokens=P))
    with pytest.raises(ValueError, match=said):
        tuned(torch.ones(2, 4, dtype=torch.long), **call)


def test_a_cache_that_holds_tokens_is_refused():
    tuned = PromptTuningModel(tiny.build(), PromptConfig(num_virtual_tokens=P)).eval()
    ids = torch.ones(1, 3, dtype=torch.long)
    cache = tuned(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values"):
        tuned(ids, past_key_values=cache)


@pytest.mark.parametrize("after", [None, [4, 0], [-1, 0], [[1, 1]]])
def test_infix_positions_are_checked(after):
    tuned = PromptTuningModel(tiny.build(), PromptConfig(num_virtual_tokens=P, placement="infix"))
    ids, mask = tiny.batch((3, 2))
    at = None if after is None else torch.tensor(after)
    with pytest.raises(ValueError, match="infix_positions"):
        tuned(ids, attention_mask=mask, infix_positions=at)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_virtual_tokens", 0),
        ("task_type", "LM"),
        ("placement", "suffix"),
        ("encoder_reparameterization_type", "GRU"),
        ("encoder_num_layers", 3),
        ("encoder_dropout", 0.5),
        ("init", "zero"),
        ("init_text", "no such init"),
        ("init_std", -1.0),
    ],
)
def test_config_names_the_field_it_refuses(field, value):
    with pytest.raises(ValueError, match=field):
        PromptConfig(**{field: value})


def test_heads_that_the_base_lacks_are_refused():
    with pytest.raises(ValueError, match="modules_to_save"):
        PromptTuningModel(tiny.build(), PromptConfig(modules_to_save=["scorer"]))


def test_exports_as_a_file(tuned, bare, tmp_path):
    tuned.export().save(tmp_path / "kv.safetensors")
    ids, mask = tiny.batch()
    with use_prefix(bare, PrefixKV.load(tmp_path / "kv.safetensors")):
        assert torch.equal(tiny.generate(bare, ids, mask), tiny.generate(tuned, ids, mask))
