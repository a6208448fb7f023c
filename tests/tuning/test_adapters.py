"""Several prefixes on one model: PEFT's names and rules, and a prefix for each row of a batch."""

import contextlib
import warnings

import peft
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel
from fastprefix.kv import to_flat

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
ROWS = ["default", None, "b", "default"]
LENGTHS = (7, 4, 1, 5)


def config(P, **options):
    return PrefixConfig(num_virtual_tokens=P, **{"init_std": 1.0, **options})


@pytest.fixture
def tuned(model):
    """Two prefixes, the second of an MLP, and the text of each at another position."""
    tuned = PrefixTuningModel(model, config(4, position_offset=9)).eval()
    tuned.add_adapter("b", config(6, prefix_projection=True, encoder_hidden_size=8))
    return tuned


@pytest.fixture
def batch():
    ids, mask = tiny.batch(LENGTHS)
    return {"input_ids": ids, "attention_mask": mask}


def trained(tuned):
    return {
        name
        for name, encoder in tuned.encoders.items()
        if all(parameter.requires_grad for parameter in encoder.parameters())
    }


def expected_logits(bare, kv, batch):
    ids, mask = batch.values()
    if kv is None:
        return bare(ids, attention_mask=mask, position_ids=tiny.positions(mask)).logits
    return tiny.expanded_forward(bare, kv, ids, mask).logits


def assert_logits(tuned, bare, kv, batch):
    got, expected = tuned(**batch).logits, expected_logits(bare, kv, batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], **CLOSE)


def test_the_active_adapter_is_the_one_that_runs(tuned, bare, batch):
    for name in ("default", "b", "default"):
        tuned.set_adapter(name)
        assert tuned.active_adapter == name
        assert tuned.encoder is tuned.encoders[name]
        assert tuned.prefix_config is tuned.prefix_configs[name]
        assert_logits(tuned, bare, tuned.export(name), batch)
        assert torch.equal(to_flat(tuned.export()), to_flat(tuned.export(name)))


@pytest.mark.parametrize("architecture", ["llama"])
def test_what_is_trained_follows_set_adapter_as_in_peft(tuned, bare):
    """PEFT's LoRA is the yardstick."""
    theirs = peft.get_peft_model(bare, peft.LoraConfig(target_modules=["q_proj"]))
    theirs.add_adapter("b", peft.LoraConfig(target_modules=["q_proj"]))

    def theirs_trained():
        return {
            name
            for name in theirs.peft_config
            if all(p.requires_grad for n, p in theirs.named_parameters() if f".{name}." in n)
        }

    steps = [
        lambda m: None,
        lambda m: m.set_adapter("b"),
        lambda m: m.set_requires_grad(["default", "b"]),
        lambda m: m.set_requires_grad("b", False),
        lambda m: m.set_adapter("b", inference_mode=True),
        lambda m: m.set_adapter("default"),
    ]
    for step in steps:
        step(tuned)
        step(theirs)
        assert trained(tuned) == theirs_trained()
        assert tuned.active_adapter == theirs.active_adapter


@pytest.mark.parametrize("architecture", ["llama"])
def test_delete_adapter(tuned):
    tuned.add_adapter("c", config(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.delete_adapter("c")
    with pytest.warns(UserWarning, match="'default' was active; now 'b' is"):
        tuned.delete_adapter("default")
    assert tuned.active_adapter == "b"
    assert trained(tuned) == {"b"}
    assert {name.split(".")[1] for name in tuned.state_dict() if "." in name} == {"b"}
    tuned.add_adapter("default", config(3))
    tuned.set_adapter("b", inference_mode=True)
    with pytest.warns(UserWarning, match="active"):
        tuned.delete_adapter("b")
    assert trained(tuned) == set(), "what was for inference stays so"


def test_disabled_the_model_is_its_base(tuned, bare, batch):
    ids, mask = batch.values()
    with tuned.disable_adapter():
        with tuned.disable_adapter():
            pass
        positions = tiny.positions(mask)
        got = tuned(**batch, position_ids=positions).logits
        ids_got = tiny.generate(tuned, ids, mask)
        with pytest.raises(ValueError, match=r"prefix_names: .*disable_adapter"):
            tuned(**batch, prefix_names=ROWS)
        with pytest.raises(ValueError, match=r"prefix_names: .*disable_adapter"):
            tuned.generate(ids, attention_mask=mask, prefix_names=ROWS)
    expected = bare(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    assert torch.equal(ids_got, tiny.generate(bare, ids, mask))
    with pytest.raises(RuntimeError), tuned.disable_adapter():
        raise RuntimeError
    assert_logits(tuned, bare, tuned.export(), batch)


def test_each_row_has_its_own_prefix(tuned, bare, batch):
    ids, mask = batch.values()
    got = tuned(**batch, position_ids=tiny.positions(mask), prefix_names=ROWS).logits
    new = tiny.generate(tuned, ids, mask, prefix_names=ROWS, num_beams=2, num_return_sequences=2)
    for row, name in enumerate(ROWS):
        real = mask[row].bool()
        text = {"input_ids": ids[row][real][None], "attention_mask": mask[row][real][None]}
        kv = tuned.export(name) if name else None
        expected = expected_logits(bare, kv, text)[0]
        torch.testing.assert_close(got[row][real], expected, **CLOSE)
        if name is None:
            alone = tiny.generate(bare, *text.values(), num_beams=2, num_return_sequences=2)
        else:
            tuned.set_adapter(name)
            alone = tiny.generate(tuned, *text.values(), num_beams=2, num_return_sequences=2)
        assert torch.equal(new[2 * row : 2 * row + 2], alone)


def test_rows_without_any_prefix_are_the_base(tuned, bare, batch):
    ids, mask = batch.values()
    positions = tiny.positions(mask)
    got = tuned(**batch, position_ids=positions, prefix_names=[None] * 4).logits
    expected = bare(**batch, position_ids=positions).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    got = tiny.generate(tuned, ids, mask, prefix_names=[None] * 4)
    assert torch.equal(got, tiny.generate(bare, ids, mask))


@pytest.mark.parametrize("frozen", [None, "default"])
def test_gradients_of_all_that_are_named(tuned, bare, batch, frozen):
    """One forward gives the gradients of each row alone, its prefix in a bare model's cache."""
    ids, mask = batch.values()
    tuned.set_requires_grad(["default", "b"])
    if frozen:
        tuned.set_requires_grad(frozen, False)
    weights = [p for p in tuned.encoders.parameters() if p.requires_grad]
    logits = tuned(**batch, prefix_names=ROWS).logits
    got = torch.autograd.grad(logits[mask.bool()].softmax(-1).square().sum(), weights)
    total = torch.zeros(())
    for row, name in enumerate(ROWS):
        real = mask[row].bool()
        text, ones = ids[row][real][None], mask[row][real][None]
        if name is not None:
            kv = tuned.encoders[name]()
            out = tiny.expanded_forward(bare, kv, text, ones).logits
            total = total + out.softmax(-1).square().sum()
    expected = torch.autograd.grad(total, weights)
    assert len(got) == (5 if frozen else 6)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama"])
def test_each_packed_sequence_has_its_own_prefix(tuned, bare):
    lengths, names = [4, 6, 3], ["b", None, "default"]
    ids = torch.randint(3, tiny.VOCAB, (1, sum(lengths)))
    packed = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    got = tuned(ids, **packed, prefix_names=names).logits[0].split(lengths)
    for logits, text, name in zip(got, ids[0].split(lengths), names, strict=True):
        row = {"input_ids": text[None], "attention_mask": torch.ones_like(text)[None]}
        kv = tuned.export(name) if name else None
        torch.testing.assert_close(logits, expected_logits(bare, kv, row)[0], **CLOSE)
    with pytest.raises(ValueError, match="got 2 names, takes one for each"):
        tuned(ids, **packed, prefix_names=names[:2])
    with pytest.raises(ValueError, match="prefix_names: got 'c'"):
        tuned(ids, **packed, prefix_names=["c", None, None])


def test_prefix_names_that_do_not_fit(tuned, batch):
    calls = [lambda rows: tuned(**batch, prefix_names=rows)]
    calls += [lambda rows: tuned.generate(**batch, prefix_names=rows, max_new_tokens=1)]
    calls += [lambda rows: tuned.generate(batch["input_ids"], prefix_names=rows)]
    for call in calls:
        for rows in (["default", "b"], [None], [], ["b"] * 8):
            with pytest.raises(ValueError, match=rf"prefix_names: got {len(rows)} names, takes 4"):
                call(rows)
        with pytest.raises(ValueError, match=r"prefix_names: got 'c', takes one of.*'b'"):
            call(["default", "c", None, "b"])


@pytest.mark.parametrize("architecture", ["llama"])
@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "a\\b", "keys", "default", "base_model"])
def test_names_that_no_adapter_can_have(tuned, name):
    with pytest.raises(ValueError, match="adapter_name: got"):
        tuned.add_adapter(name, config(3))
    assert list(tuned.encoders) == list(tuned.prefix_configs) == ["default", "b"]


@pytest.mark.parametrize("architecture", ["llama"])
def test_unknown_names(tuned, tmp_path):
    for call, argument in [
        (lambda: tuned.set_adapter("c"), "adapter_name"),
        (lambda: tuned.delete_adapter("c"), "adapter_name"),
        (lambda: tuned.export("c"), "adapter_name"),
        (lambda: tuned.set_requires_grad(["b", "c"]), "adapter_names"),
        (lambda: tuned.save_pretrained(tmp_path, ["c"]), "selected_adapters"),
    ]:
        with pytest.raises(ValueError, match=rf"{argument}: got 'c', takes one of.*'b'"):
            call()


def test_peft_loads_all_that_we_save(model, bare, tmp_path):
    tuned = PrefixTuningModel(model, config(4)).eval()
    tuned.add_adapter("b", config(6, prefix_projection=True, encoder_hidden_size=8))
    tuned.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    theirs.load_adapter(tmp_path / "b", "b")
    ids, mask = tiny.batch(LENGTHS, "right")
    for name in ("b", "default"):
        tuned.set_adapter(name)
        theirs.set_adapter(name)
        got, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (tuned, theirs))
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("architecture", ["llama"])
def test_adapters_come_back_under_any_name(tuned, batch, tmp_path):
    tuned.save_pretrained(tmp_path / "all")
    tuned.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"README.md", "b"}
    again = PrefixTuningModel.from_pretrained(tiny.build(), tmp_path / "all", "first")
    again.load_adapter(tmp_path / "one" / "b", "second")
    assert again.active_adapter == "first"
    assert trained(again) == set()
    again.load_adapter(tmp_path / "all" / "b", "third", is_trainable=True)
    assert trained(again) == {"third"}
    names = {"default": "first", "b": "second", None: None}
    expected = tuned(**batch, prefix_names=ROWS).logits
    got = again(**batch, prefix_names=[names[name] for name in ROWS]).logits
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="'second', which there is already"):
        again.load_adapter(tmp_path / "all", "second")


def test_checkpoints_hold_all_adapters(architecture, tuned, batch):
    again = PrefixTuningModel(tiny.build(architecture), config(4, position_offset=9)).eval()
    again.add_adapter("b", config(6, prefix_projection=True, encoder_hidden_size=8))
    expected = tuned(**batch, prefix_names=ROWS).logits
    assert not torch.allclose(again(**batch, prefix_names=ROWS).logits, expected)
    again.load_state_dict(tuned.state_dict())
    assert torch.equal(again(**batch, prefix_names=ROWS).logits, expected)


class Items(torch.utils.data.Dataset):
    """Texts, each for the adapter of its task."""

    def __len__(self):
        return 8

    def __getitem__(self, item):
        ids = (torch.arange(5) * 7 + item) % tiny.VOCAB
        return {"input_ids": ids, "labels": ids, "prefix_names": "default" if item % 2 else "b"}


def collate(items):
    batch = {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")}
    return {**batch, "prefix_names": [item["prefix_names"] for item in items]}


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_trainer_trains_two_tasks_at_once(tuned, tmp_path):
    tuned.set_requires_grad(["default", "b"])
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, max_steps=4, per_device_train_batch_size=4,
        learning_rate=3e-2, logging_steps=1, save_steps=4, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(tuned, arguments, train_dataset=Items(), data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = tuned.state_dict()
    for name in ("default", "b"):
        key = f"encoders.{name}.embedding"
        assert not torch.equal(after[key], before[key])
    saved = trainer.model.state_dict()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    for name, tensor in saved.items():
        assert torch.equal(tuned.state_dict()[name], tensor)


SMALL = {"vocab_size": 101, "pad_token_id": 0, "initializer_range": 0.3}
BERT = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
BART_SIZES = {
    f"{part}_{size}": number
    for part in ("encoder", "decoder")
    for size, number in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
}
ENCODERS = {
    "bert": (BertForSequenceClassification, BertConfig(**BERT, intermediate_size=32)),
    "roberta": (RobertaForTokenClassification, RobertaConfig(**BERT, intermediate_size=32)),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig(**SMALL, dim=32, n_layers=2, n_heads=2, hidden_dim=32),
    ),
}
SEQ_2_SEQ = {
    "t5": (T5ForConditionalGeneration, T5Config(**SMALL, **T5_SIZES, decoder_start_token_id=0)),
    "bart": (
        BartForConditionalGeneration,
        BartConfig(**SMALL, **BART_SIZES, d_model=32, init_std=0.3, decoder_start_token_id=2),
    ),
}


def build(make, tuned_config):
    """Two prefixes on a model of a class and its configuration."""
    torch.manual_seed(0)
    tuned = PrefixTuningModel(make[0](make[1]), tuned_config).eval()
    fields = {**vars(tuned_config), "num_virtual_tokens": 6}
    tuned.add_adapter("b", PrefixConfig(**fields))
    return tuned


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_of_an_encoder_are_what_each_is_alone(name):
    tuned = build(ENCODERS[name], config(4, task_type="FEATURE_EXTRACTION"))
    ids, mask = tiny.batch(LENGTHS, "right")
    got = tuned(ids, mask, prefix_names=ROWS).logits
    embeds = tuned.base_model.get_input_embeddings()(ids)
    for row, adapter in enumerate(ROWS):
        real = mask[row].bool()
        text, ones = ids[row][real][None], mask[row][real][None]
        if adapter is None:
            with tuned.disable_adapter():
                expected = tuned(text, ones).logits
        else:
            tuned.set_adapter(adapter)
            expected = tuned(text, ones).logits
        mine = got[row][real] if got.dim() == 3 else got[row]
        torch.testing.assert_close(mine, expected[0], **CLOSE)
    if name != "roberta":  # which then counts padding as text
        again = tuned(attention_mask=mask, inputs_embeds=embeds, prefix_names=ROWS).logits
        torch.testing.assert_close(again, got, **CLOSE)
    assert not torch.allclose(tuned(ids, mask, prefix_names=ROWS[::-1]).logits, got)


@pytest.mark.parametrize("name", SEQ_2_SEQ)
def test_rows_of_an_encoder_decoder_are_what_each_is_alone(name):
    """All three groups of layers have prefixes. Beams repeat only the rows of the decoder."""
    tuned = build(SEQ_2_SEQ[name], config(4, task_type="SEQ_2_SEQ_LM"))
    ids, mask = tiny.batch(LENGTHS, "right")
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 6, "min_new_tokens": 6}
    labels = tiny.prompt(5).repeat(4, 1)
    got = tuned(ids, mask, labels=labels, prefix_names=ROWS).logits
    new = tuned.generate(input_ids=ids, attention_mask=mask, prefix_names=ROWS, **options)
    for row, adapter in enumerate(ROWS):
        real = mask[row].bool()
        text, ones = ids[row][real][None], mask[row][real][None]
        with tuned.disable_adapter() if adapter is None else contextlib.nullcontext():
            tuned.set_adapter(adapter or "b")
            expected = tuned(text, ones, labels=labels[:1]).logits
            alone = tuned.generate(input_ids=text, attention_mask=ones, **options)
        torch.testing.assert_close(got[row : row + 1], expected, **CLOSE)
        assert torch.equal(new[2 * row : 2 * row + 2], alone)


def test_rows_that_a_decoder_cannot_place_are_refused():
    """BART's positions are told one number for the whole batch."""
    tuned = build(SEQ_2_SEQ["bart"], config(4, task_type="SEQ_2_SEQ_LM", position_offset=3))
    ids, mask = tiny.batch(LENGTHS, "right")
    with pytest.raises(NotImplementedError, match="rows: BartLearnedPositionalEmbedding"):
        tuned(ids, mask, labels=ids, prefix_names=ROWS)
