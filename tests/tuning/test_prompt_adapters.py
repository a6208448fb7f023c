"""Several prompts on one model by name, the base without them, and generate() as transformers'."""

import peft
import pytest
import torch
from transformers import BloomConfig, GenerationConfig, T5Config, T5ForConditionalGeneration

import fastprefix_testing.models as tiny
from fastprefix import PromptConfig, PromptTuningModel

P = 3
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def config(tokens=P, **fields):
    return PromptConfig(tokens, init_std=1.0, **fields)


def trained(model):
    names = {n for n, x in model.named_parameters() if x.requires_grad}
    return {name.split(".")[1] for name in names}


@pytest.fixture
def tuned():
    """Two prompts, the second of a network."""
    torch.manual_seed(2)
    result = PromptTuningModel(tiny.build(), config()).eval()
    result.add_adapter("b", config(P + 2, encoder_reparameterization_type="MLP"))
    return result


@pytest.fixture
def bare():
    return tiny.build()


def alone(bare, prompt, ids, mask):
    """Logits of each row's text, behind its prompt, with no padding at all."""
    for row, real in zip(ids, mask.bool(), strict=True):
        text = bare.get_input_embeddings()(row[real][None])
        yield bare(inputs_embeds=torch.cat([prompt[None], text], 1)).logits[0, len(prompt) :]


def test_the_active_prompt_is_the_one_that_runs(tuned, bare):
    ids, mask = tiny.batch()
    assert (tuned.active_adapter, list(tuned.prompt_configs)) == ("default", ["default", "b"])
    assert trained(tuned) == {"default"}
    for name in ("b", "default"):
        tuned.set_adapter(name)
        assert tuned.active_adapters == [name]
        assert trained(tuned) == {name}
        assert tuned.encoder is tuned.encoders[name]
        assert tuned.prompt_config is tuned.prompt_configs[name]
        prompt = tuned.export_embeddings(name)
        assert torch.equal(prompt, tuned.export_embeddings())
        logits = tuned(ids, attention_mask=mask).logits
        for row, expected in enumerate(alone(bare, prompt, ids, mask)):
            torch.testing.assert_close(logits[row][mask[row].bool()], expected, **CLOSE)
        assert tuned.export(name).num_virtual_tokens == len(prompt)
    tuned.set_requires_grad(["default", "b"])
    assert trained(tuned) == {"default", "b"}
    tuned.set_adapter("b", inference_mode=True)
    assert trained(tuned) == set()
    with pytest.warns(UserWarning, match="'b' was active; now 'default' is"):
        tuned.delete_adapter("b")
    assert trained(tuned) == set(), "what was for inference stays so"


def test_disabled_the_model_is_its_base(tuned, bare):
    ids, mask = tiny.batch()
    with tuned.disable_adapter():
        logits = tuned(ids, attention_mask=mask, labels=ids).loss
        new = tiny.generate(tuned, ids, mask)
        embeds = tuned.get_input_embeddings()(ids)
        from_embeds = tuned(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(logits, bare(ids, attention_mask=mask, labels=ids).loss)
    assert torch.equal(from_embeds, bare(ids, attention_mask=mask).logits)
    assert torch.equal(new, tiny.generate(bare, ids, mask))
    assert not torch.equal(new, tiny.generate(tuned, ids, mask)), "and back"


def test_an_infix_can_be_disabled(bare):
    """Preference tuning uses this as its reference model, with the same inputs."""
    tuned = PromptTuningModel(tiny.build(), config(placement="infix")).eval()
    ids, mask = tiny.batch()
    with tuned.disable_adapter():
        got = tuned(ids, attention_mask=mask, infix_positions=torch.zeros(3).long()).logits
    assert torch.equal(got, bare(ids, attention_mask=mask).logits)


def test_prompts_come_back_under_any_name(tuned, tmp_path):
    ids, mask = tiny.batch()
    tuned.save_pretrained(tmp_path / "all")
    tuned.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert {x.name for x in (tmp_path / "one").iterdir() if x.is_dir()} == {"b"}
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    again = PromptTuningModel.from_pretrained(tiny.build(), tmp_path / "all", "first")
    again.load_adapter(tmp_path / "one" / "b", "second")
    assert trained(again) == set()
    again.load_adapter(tmp_path / "all" / "b", "third", is_trainable=True)
    assert trained(again) == {"third"}
    assert again.active_adapter == "first"
    for ours, theirs in (("default", "first"), ("b", "second"), ("b", "third")):
        tuned.set_adapter(ours)
        again.set_adapter(theirs)
        expected = tuned(ids, attention_mask=mask).logits
        torch.testing.assert_close(again(ids, attention_mask=mask).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="'second', which there is already"):
        again.load_adapter(tmp_path / "all", "second")
    with pytest.raises(ValueError, match=r"adapter_name: got 'a/b'"):
        again.add_adapter("a/b", config())
    for call in (again.set_adapter, again.delete_adapter, again.export, again.export_embeddings):
        with pytest.raises(ValueError, match=r"adapter_name: got 'x', takes one of \['first'"):
            call("x")


def test_checkpoints_hold_all_prompts(tuned):
    torch.manual_seed(9)
    again = PromptTuningModel(tiny.build(), config()).eval()
    again.add_adapter("b", config(P + 2, encoder_reparameterization_type="MLP"))
    again.load_state_dict(tuned.state_dict())
    for name in ("default", "b"):
        assert torch.equal(again.export_embeddings(name), tuned.export_embeddings(name))


@pytest.mark.peft
def test_peft_loads_all_that_we_save(tuned, tmp_path):
    """Each kind by itself: PEFT has no two kinds of prompts in one model."""
    ids, mask = tiny.batch(side="right")
    tuned.save_pretrained(tmp_path)
    for name, folder, tokens in (("b", tmp_path / "b", P + 2), ("default", tmp_path, P)):
        tuned.set_adapter(name)
        theirs = peft.PeftModel.from_pretrained(tiny.build(), folder).eval()
        got = tuned(ids, attention_mask=mask).logits
        expected = theirs(input_ids=ids, attention_mask=mask).logits[:, tokens:]
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.peft
def test_each_is_saved_with_the_lora_inside(tmp_path):
    def inside():
        torch.manual_seed(5)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny.build(), lora)

    tuned = PromptTuningModel(inside(), config()).eval()
    tuned.add_adapter("b", config())
    tuned.save_pretrained(tmp_path)
    again = PromptTuningModel.from_pretrained(tiny.build(), tmp_path)
    again.load_adapter(tmp_path / "b", "b")
    ids, _ = tiny.batch((5,))
    for name in ("b", "default"):
        tuned.set_adapter(name)
        again.set_adapter(name)
        torch.testing.assert_close(again(ids).logits, tuned(ids).logits, **CLOSE)
    plain = PromptTuningModel(tiny.build(), config())
    with pytest.raises(ValueError, match="holds an adapter inside the base, too"):
        plain.load_adapter(tmp_path / "b", "b")


def test_one_prompt_for_all_rows(tuned):
    ids, _ = tiny.batch((4, 4))
    for call in (tuned, tuned.generate):
        with pytest.raises(ValueError, match="prefix_names: got names, takes None: all rows"):
            call(input_ids=ids, prefix_names=["default", "b"])
    tuned(input_ids=ids, prefix_names=None)


def bloom():
    """Cannot be patched, so that it is fed the prompt."""
    fields = {k: v for k, v in tiny.GROUPED.items() if k in ("vocab_size", "initializer_range")}
    return tiny.from_config(
        BloomConfig(**fields, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    )


BASES = {
    "shared copy": (tiny.build, {}),
    "infix": (tiny.build, {"placement": "infix"}),
    "fed": (bloom, {}),
}


@pytest.mark.parametrize("kind", BASES)
def test_generate_from_embeddings(kind):
    build, fields = BASES[kind]
    tuned = PromptTuningModel(build(), config(**fields)).eval()
    ids, mask = tiny.batch()
    L = ids.shape[1]
    embeds = tuned.get_input_embeddings()(ids)
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": tiny.PAD}
    expected = tiny.generate(tuned, ids, mask)
    assert torch.equal(tuned.generate(inputs_embeds=embeds, max_new_tokens=8, **options), expected)
    assert torch.equal(tuned.generate(inputs_embeds=embeds, max_length=L + 8, **options), expected)
    whole = torch.cat([ids, expected], dim=1)
    both = tuned.generate(ids, inputs_embeds=embeds, max_new_tokens=8, **options)
    assert torch.equal(both, whole)
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=tiny.PAD)
    assert torch.equal(tuned.generate(ids, settings, attention_mask=mask), whole)
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 5}
    torch.testing.assert_close(
        tuned.generate(inputs_embeds=embeds, **beams, **options),
        tuned.generate(ids, **beams, **options)[:, L:],
    )


def test_embeddings_have_one_copy_of_the_prompt(tuned):
    ids, mask = tiny.batch()
    out = tuned.generate(
        inputs_embeds=tuned.get_input_embeddings()(ids),
        attention_mask=mask,
        max_new_tokens=3,
        pad_token_id=tiny.PAD,
        return_dict_in_generate=True,
    )
    assert out.past_key_values.get_seq_length() == ids.shape[1] + 2


def test_an_encoder_decoder_generates_from_embeddings():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=101, **sizes, **special, initializer_factor=3.0)
    )
    tuned = PromptTuningModel(base, config(task_type="SEQ_2_SEQ_LM")).eval()
    ids, mask = tiny.batch(side="right")
    embeds = tuned.get_input_embeddings()(ids)
    options = {"attention_mask": mask, "max_new_tokens": 5}
    expected = tuned.generate(ids, **options)
    assert torch.equal(tuned.generate(inputs_embeds=embeds, **options), expected)
    with pytest.raises(ValueError, match="got both, takes one of them"):
        tuned.generate(ids, inputs_embeds=embeds, **options)


def test_least_lengths_count_the_text():
    """Plain transformers would count the prompt's tokens as well."""
    tuned = PromptTuningModel(tiny.build(), config(placement="infix")).eval()
    ids, mask = tiny.batch()
    free = tuned.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=tiny.PAD)
    L, end = ids.shape[1], free[0, ids.shape[1] + 1].item()  # what would end the first row
    options = {"attention_mask": mask, "eos_token_id": end, "pad_token_id": tiny.PAD}
    ended = tuned.generate(ids[:1], max_new_tokens=6, **{**options, "attention_mask": mask[:1]})
    assert ended.shape[1] == L + 2
    one = {**options, "attention_mask": mask[:1], "max_new_tokens": 6}
    embeds = {"inputs_embeds": tuned.get_input_embeddings()(ids[:1])}
    for least in ({"min_length": L + 5}, {"min_new_tokens": 5}):
        assert tuned.generate(ids[:1], **one, **least).shape[1] >= L + 5
        assert tuned.generate(**embeds, **one, **least).shape[1] >= 5


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "input_ids: got None, takes"),
        (("ids", "mask"), {}, "generation_config: got a Tensor, takes a GenerationConfig"),
        (("ids",), {"input_ids": "ids"}, "inputs, input_ids: got both"),
        (("ids",), {"infix_positions": "ids"}, "infix_positions: got Tensor, takes None"),
    ],
)
def test_what_generate_refuses(tuned, args, kwargs, said):
    ids, mask = tiny.batch((3, 3))
    given = {"ids": ids, "mask": mask}
    with pytest.raises(ValueError, match=said):
        tuned.generate(*map(given.get, args), **{k: given[v] for k, v in kwargs.items()})


def test_a_head_of_a_language_model_generates():
    untied = {"tie_word_embeddings": False}
    tuned = PromptTuningModel(tiny.build(**untied), config(modules_to_save=["lm_head"])).eval()
    plain = PromptTuningModel(tiny.build(**untied), config()).eval()
    plain.encoder.start_from(tuned.export_embeddings())
    with torch.no_grad():
        tuned.adapter_heads["default"].lm_head.weight.neg_()
    ids, mask = tiny.batch()
    logits = plain(ids, attention_mask=mask).logits
    torch.testing.assert_close(tuned(ids, attention_mask=mask).logits, -logits, **CLOSE)
    new = tiny.generate(tuned, ids, mask, max_new_tokens=1)
    assert torch.equal(new[:, 0], logits[:, -1].argmin(-1))
    with tuned.disable_adapter():
        new = tiny.generate(tuned, ids, mask)
    assert torch.equal(new, tiny.generate(tiny.build(**untied), ids, mask))
