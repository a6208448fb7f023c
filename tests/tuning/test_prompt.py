"""PromptTuningModel against the bare model fed the same embeddings, row by row, without padding."""

import pytest
import torch
from peft import LoraConfig, PromptEncoder, PromptEncoderConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BloomConfig,
    Gemma2Config,
    LlamaForSequenceClassification,
    MistralConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, PromptConfig, PromptTuningModel, use_prefix

P = 5
CLOSE = {"rtol": 0, "atol": 2e-5}
KINDS = {
    "prompt": {},
    "mlp": {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 24},
    "lstm": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12},
}


@pytest.fixture(params=["left", "right"])
def side(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def tuned(model):
    return PromptTuningModel(model, PromptConfig(num_virtual_tokens=P, init_std=1.0)).eval()


def rows(ids, mask):
    """Each row's real tokens, [1, length]."""
    return [ids[row][mask[row].bool()][None] for row in range(len(ids))]


def alone(bare, prompt, ids, after=0, **kwargs):
    """The bare model fed one row without padding: [x ; PROMPT ; y]."""
    embeds = bare.get_input_embeddings()(ids)
    prompt = prompt[None].to(embeds.dtype)
    fed = torch.cat([embeds[:, :after], prompt, embeds[:, after:]], dim=1)
    return bare(inputs_embeds=fed, **kwargs)


def without(whole, after=0):
    """What an output [1, P + L, ...] has for the text."""
    return torch.cat([whole[:, :after], whole[:, after + P :]], dim=1)[0]


def bert(make=BertForSequenceClassification, **changes):
    config = BertConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        **{"num_labels": 3, **changes},
    )
    torch.manual_seed(0)
    return make(config).eval()


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


def test_an_encoder_classifies_each_row_as_alone(side):
    tuned = PromptTuningModel(
        bert(), PromptConfig(num_virtual_tokens=P, task_type="SEQ_CLS", init_std=1.0)
    ).eval()
    ids, mask = tiny.batch(side=side)
    labels = torch.tensor([2, 0, 1])
    out = tuned(ids, attention_mask=mask, labels=labels, token_type_ids=torch.zeros_like(ids))
    prompt = tuned.export_embeddings()
    expected = torch.cat([alone(bert(), prompt, text).logits for text in rows(ids, mask)])
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(expected, labels))


def test_a_causal_classifier_reads_the_last_real_token(side):
    def build():
        torch.manual_seed(0)
        config = tiny.build().config
        return LlamaForSequenceClassification(config).eval()

    tuned = PromptTuningModel(
        build(), PromptConfig(num_virtual_tokens=P, task_type="SEQ_CLS", init_std=1.0)
    ).eval()
    ids, mask = tiny.batch(side=side)
    got = tuned(ids, attention_mask=mask).logits
    prompt = tuned.export_embeddings()
    expected = torch.cat([alone(build(), prompt, text).logits for text in rows(ids, mask)])
    torch.testing.assert_close(got, expected, **CLOSE)


def test_tokens_are_labelled_as_alone(side):
    tuned = PromptTuningModel(
        bert(BertForTokenClassification),
        PromptConfig(num_virtual_tokens=P, task_type="TOKEN_CLS", init_std=1.0),
    ).eval()
    ids, mask = tiny.batch(side=side)
    labels = (ids % 3).masked_fill(mask == 0, -100)
    out = tuned(ids, attention_mask=mask, labels=labels)
    prompt, plain = tuned.export_embeddings(), bert(BertForTokenClassification)
    expected = torch.cat([without(alone(plain, prompt, t).logits) for t in rows(ids, mask)])
    torch.testing.assert_close(out.logits[mask.bool()], expected, **CLOSE)
    loss = torch.nn.functional.cross_entropy(expected, labels[mask.bool()])
    torch.testing.assert_close(out.loss, loss)


def test_answers_lie_in_the_text(side):
    tuned = PromptTuningModel(
        bert(BertForQuestionAnswering, num_labels=2),
        PromptConfig(num_virtual_tokens=P, task_type="QUESTION_ANS", init_std=1.0),
    ).eval()
    ids, mask = tiny.batch((7, 5), side)
    out = tuned(ids, attention_mask=mask)
    prompt, plain = tuned.export_embeddings(), bert(BertForQuestionAnswering, num_labels=2)
    for row, text in enumerate(rows(ids, mask)):
        expected = alone(plain, prompt, text)
        for name in ("start_logits", "end_logits"):
            got = out[name][row][mask[row].bool()]
            torch.testing.assert_close(got, without(expected[name]), **CLOSE)
    text, start, end = ids[:1], torch.tensor([1]), torch.tensor([4])
    out = tuned(text, attention_mask=mask[:1], start_positions=start, end_positions=end)
    expected = alone(plain, prompt, text, start_positions=start + P, end_positions=end + P)
    torch.testing.assert_close(out.loss, expected.loss)
    cut = tuned(
        torch.cat([text, text]),
        start_positions=torch.tensor([1, 40]),
        end_positions=torch.tensor([4, 40]),
    )
    torch.testing.assert_close(cut.loss, expected.loss)  # an answer cut off counts for nothing


def t5():
    config = T5Config(
        vocab_size=101,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
        initializer_factor=3.0,
    )
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config).double().eval()


def test_an_encoder_decoder_gets_the_prompt_in_its_encoder(side):
    tuned = PromptTuningModel(
        t5(), PromptConfig(num_virtual_tokens=P, task_type="SEQ_2_SEQ_LM", init_std=10.0)
    ).eval()
    ids, mask = tiny.batch(side=side)
    labels = tiny.batch((4, 4, 4))[0]
    out = tuned(ids, attention_mask=mask, labels=labels)
    new = tuned.generate(ids, attention_mask=mask, max_new_tokens=5)
    prompt, plain = tuned.export_embeddings(), t5()
    for row, text in enumerate(rows(ids, mask)):
        expected = alone(plain, prompt, text, labels=labels[row : row + 1])
        torch.testing.assert_close(out.logits[row], expected.logits[0])
        fed = torch.cat([prompt[None].double(), plain.get_input_embeddings()(text)], dim=1)
        assert torch.equal(new[row], plain.generate(inputs_embeds=fed, max_new_tokens=5)[0])


@pytest.mark.parametrize("kind", [KINDS["mlp"], KINDS["lstm"]], ids=["mlp", "lstm"])
def test_the_networks_are_those_of_peft(kind):
    config = PromptConfig(num_virtual_tokens=P, encoder_num_layers=2, **kind)
    encoder = PromptTuningModel(tiny.build(), config).encoder
    theirs = PromptEncoder(
        PromptEncoderConfig(
            num_virtual_tokens=P, token_dim=64, num_transformer_submodules=1, **kind
        )
    )
    state = {
        name.replace("lstm_head", "lstm").replace("mlp_head", "mlp"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    state["embedding"] = state.pop("embedding.weight")
    encoder.load_state_dict({**state, "start": torch.zeros(P, 64)})
    torch.testing.assert_close(encoder(), theirs(torch.arange(P)[None])[0])


@pytest.mark.parametrize("init", ["text", "vocab"])
def test_starts_from_embeddings_of_tokens(kind, init):
    def tokenizer(text):
        return {"input_ids": [ord(letter) % tiny.VOCAB for letter in text]}

    model = tiny.build()
    text = "Sum" if init == "text" else None
    config = PromptConfig(num_virtual_tokens=P, init=init, init_text=text, **kind)
    tuned = PromptTuningModel(model, config, tokenizer)
    table = model.get_input_embeddings().weight
    prompt = tuned.export_embeddings()
    if init == "text":
        ids = (tokenizer(text)["input_ids"] * 2)[:P]
        assert torch.equal(prompt, table[ids])
    else:
        found = [(table == row).all(1).nonzero() for row in prompt]
        assert all(len(places) == 1 for places in found)
    assert all(p.requires_grad for p in tuned.encoder.parameters())


def test_a_start_is_scaled_as_the_base_scales_its_embeddings():
    """Gemma's module multiplies what it looks up by the root of the width."""
    model = tiny.from_config(Gemma2Config(**tiny.GROUPED))
    start = PromptConfig(num_virtual_tokens=3, init="text", init_text="abc")
    tuned = PromptTuningModel(model, start, lambda text: {"input_ids": [5, 6, 7]})
    looked_up = model.get_input_embeddings()(torch.tensor([5, 6, 7]))
    assert torch.equal(tuned.export_embeddings(), looked_up)
    assert not torch.allclose(looked_up, model.get_input_embeddings().weight[5:8])


def test_a_lora_in_the_base_is_saved_and_loaded_with_it(tmp_path):
    ids, mask = tiny.batch()
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    tuned = PromptTuningModel(
        get_peft_model(tiny.build(), lora), PromptConfig(num_virtual_tokens=P, init_std=1.0)
    ).eval()
    assert any("lora" in name for name, p in tuned.named_parameters() if p.requires_grad)
    tuned.save_pretrained(tmp_path)
    again = PromptTuningModel.from_pretrained(tiny.build(), tmp_path)
    with torch.no_grad():
        expected = tuned(ids, attention_mask=mask).logits
        assert torch.equal(again(ids, attention_mask=mask).logits, expected)
        for layer in again.base_model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(False)
        assert (again(ids, attention_mask=mask).logits - expected).abs().max() > 1e-3


def test_it_learns_and_the_base_does_not(model, bare, kind):
    tuned = PromptTuningModel(model, PromptConfig(num_virtual_tokens=P, **kind))
    ids, mask = tiny.batch()
    labels = ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        loss = tuned(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in bare.state_dict().items():
        assert torch.equal(tensor, tuned.base_model.state_dict()[name]), name


def test_the_trainer_trains_checkpoints_and_resumes(tmp_path):
    texts = [{"input_ids": tiny.prompt(6, seed)[0]} for seed in range(8)]
    data = [{**item, "labels": item["input_ids"]} for item in texts]

    def trainer(steps):
        torch.manual_seed(0)
        tuned = PromptTuningModel(tiny.build(), PromptConfig(num_virtual_tokens=P))
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-1,
            lr_scheduler_type="constant",
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=True,
            use_cpu=True,
        )
        return Trainer(tuned, arguments, train_dataset=data)

    whole = trainer(4)
    whole.train()
    half = trainer(4)
    half.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(
        half.model.export_embeddings(), whole.model.export_embeddings(), rtol=0, atol=1e-6
    )
    files = (tmp_path / "checkpoint-4").iterdir()
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert sum(file.stat().st_size for file in weights) < 10_000, "the adapter alone"


def test_state_dict_holds_the_encoder_and_the_heads():
    tuned = PromptTuningModel(bert(), PromptConfig(num_virtual_tokens=P, task_type="SEQ_CLS"))
    assert set(tuned.state_dict()) == {
        "encoders.default.embedding",
        "adapter_heads.default.classifier.weight",
        "adapter_heads.default.classifier.bias",
        "_extra_state",
    }
    tuned.load_state_dict(tuned.state_dict())
    trainable, total = tuned.get_nb_trainable_parameters()
    assert trainable == P * 32 + 3 * 32 + 3
    assert total == trainable + sum(p.numel() for p in bert().parameters())
    state = {name: t for name, t in tuned.state_dict().items() if "weight" not in name}
    with pytest.raises(RuntimeError, match=r"classifier\.weight"):
        tuned.load_state_dict(state)


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
