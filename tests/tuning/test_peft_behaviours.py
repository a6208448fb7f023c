"""What PEFT's own tests hold its models to, held of both libraries: models, training, generation.

Where PEFT fails a cell that is written beside the test, and the cell is held to fail.
"""

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

CLOSE = {"rtol": 0, "atol": 2e-5}
CAUSAL = ("llama", "qwen3", "gpt2", "opt")
SEQ2SEQ = ("bart", "t5")
GENERATING = CAUSAL + SEQ2SEQ
CLASSIFIERS = ("bert_cls", "roberta_cls", "llama_cls")
PREFIXES = ("prefix", "projection", "cartridge")
PROMPTS = ("prompt", "p_tuning")


def gradients(tuned, inputs):
    """Of what is trained, by name; and none left behind."""
    tuned.zero_grad()
    tuned(**inputs).loss.backward()
    found = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    tuned.zero_grad()
    return found


# The model and its parts


def test_has_the_attributes(case):
    base = case.base()
    tuned = case.make(base)
    for name in ("save_pretrained", "from_pretrained", "push_to_hub"):
        assert callable(getattr(tuned, name))
    assert tuned.get_base_model() is base
    assert tuned.active_adapter == "default"
    assert tuned.active_adapters == ["default"]
    assert list(tuned.peft_config) == ["default"]
    config = tuned.peft_config["default"]
    assert config.peft_type == case.peft_type
    assert config.task_type == case.task_type
    assert config.num_virtual_tokens == case.P


def test_attributes_of_the_base_are_those_of_the_model(case):
    base = case.base()
    tuned = case.make(base)
    assert tuned.config is base.config
    assert tuned.main_input_name == base.main_input_name
    assert tuned.get_input_embeddings() is base.get_input_embeddings()
    assert tuned.num_parameters() == base.num_parameters()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tuned.no_such_thing


def test_parameters_have_the_adapters_name(case):
    tuned = case.make(adapter_name="test-adapter")
    assert any("test-adapter" in name for name, _ in tuned.named_parameters())
    assert tuned.active_adapters == ["test-adapter"]


def test_there_is_nothing_to_unload(case):
    with pytest.raises(AttributeError):
        case.make().unload()


@pytest.mark.peft_fails(
    AssertionError, reason="a copy of each head is put into the base", models=CLASSIFIERS
)
def test_the_bases_names_and_numbers_stay(case):
    before = case.base().state_dict()
    base = case.base()
    tuned = case.make(base)
    tuned(**case.labelled()).loss.backward()
    after = tuned.get_base_model().state_dict()
    assert after.keys() == before.keys()
    heads = ("classifier.", "score.")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) or name.startswith(heads)


# Training


def test_the_adapter_trains_and_the_base_does_not(case):
    base = case.base()
    bodies = {n: p for n, p in base.named_parameters() if not n.startswith(("classifier", "score"))}
    before = {name: parameter.clone() for name, parameter in bodies.items()}
    tuned = case.make(base).train()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    inputs = case.labelled()
    loss = tuned(**inputs).loss
    loss.backward()
    for parameter in trained:
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    for parameter in bodies.values():
        assert parameter.grad is None
        assert not parameter.requires_grad
    torch.optim.SGD(trained, lr=1e-3).step()
    assert tuned(**inputs).loss < loss
    assert all(torch.equal(bodies[name], number) for name, number in before.items())


def test_trains_a_base_prepared_for_kbit_training(case):
    tuned = case.make()
    ids = case.batch()["input_ids"]
    assert not tuned.get_input_embeddings()(ids).requires_grad
    base = peft.prepare_model_for_kbit_training(case.base())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    tuned = case.make(base).train()
    tuned.enable_input_require_grads()
    assert tuned.get_input_embeddings()(ids).requires_grad
    assert gradients(tuned, case.labelled())


def test_the_loss_is_the_labels_cross_entropy(case):
    tuned = case.make()
    inputs = case.labelled()
    with torch.no_grad():
        out = tuned(**inputs)
    torch.testing.assert_close(out.loss, case.loss(out.logits, inputs["labels"]), **CLOSE)


@pytest.mark.peft_fails(
    AssertionError,
    reason="RoBERTa's positions of embeddings count the prefix as padding",
    models=("roberta_cls",),
    methods=PREFIXES,
)
@pytest.mark.peft_fails(
    ValueError,
    reason="the number of rows is read off ids alone",
    models=SEQ2SEQ + CLASSIFIERS,
    methods=PREFIXES,
    before="0.21",
)
def test_embeddings_in_place_of_ids(case):
    tuned = case.make()
    inputs = case.batch()
    expected = case.logits(tuned, **inputs)
    inputs["inputs_embeds"] = case.embed(tuned, inputs.pop("input_ids"))
    torch.testing.assert_close(case.logits(tuned, **inputs), expected, **CLOSE)


@pytest.mark.peft_fails(
    UnboundLocalError,
    reason="disable_adapter asks classifiers for what only generate() needs",
    models=CLASSIFIERS,
)
def test_disable_adapter_is_the_base_and_back(case):
    base = case.base()
    inputs = case.batch()
    bare = case.logits(base, **inputs)
    tuned = case.make(base)
    expected = case.logits(tuned, **inputs)
    assert (expected - bare).abs().max() > 1e-2
    with tuned.disable_adapter():
        torch.testing.assert_close(case.logits(tuned, **inputs), bare, **CLOSE)
    torch.testing.assert_close(case.logits(tuned, **inputs), expected, **CLOSE)


@pytest.mark.peft_fails(
    AssertionError,
    reason="generate() of encoder-decoders goes on to put the prompt in front",
    models=SEQ2SEQ,
    methods=PROMPTS,
)
@pytest.mark.cells(models=GENERATING)
def test_disable_adapter_generates_as_the_base_and_back(case):
    base = case.base()
    text = case.text()
    bare = case.generate(base, **text)
    tuned = case.make(base)
    expected = case.generate(tuned, **text)
    assert not torch.equal(expected, bare)
    with tuned.disable_adapter():
        assert torch.equal(case.generate(tuned, **text), bare)
    assert torch.equal(case.generate(tuned, **text), expected)


@pytest.mark.peft_fails(
    RuntimeError,
    reason="the cache that holds the prefix is dropped and its mask is not",
    methods=PREFIXES,
)
def test_gradient_checkpointing_leaves_the_gradients(case):
    tuned = case.make().train()
    inputs = case.labelled()
    expected = gradients(tuned, inputs)
    tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(tuned, inputs)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.peft_fails(ValueError, reason="refused", methods=PREFIXES)
def test_a_base_that_checkpoints_already_leaves_the_gradients(case):
    expected = gradients(case.make().train(), case.labelled())
    base = case.base()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(case.make(base).train(), case.labelled())
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def trained(case, folder, max_steps=4, resume=None, base_checkpoints=False):
    """What is saved of a model that a Trainer trained, and its losses."""
    base = case.base()
    if base_checkpoints:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    tuned = case.make(base).train()
    inputs = case.labelled()
    rows = [{name: x[row % 2] for name, x in inputs.items()} for row in range(4)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps" if max_steps > 2 else "no",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=tuned, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return case.saved(tuned, folder / "adapter"), losses


@pytest.mark.peft_fails(
    RuntimeError,
    reason="the checkpoint has no network, and its embedding another width",
    methods=("projection",),
)
@pytest.mark.peft_fails(
    AssertionError, reason="the checkpoint has no network", methods=("p_tuning",)
)
@pytest.mark.cells(models=("llama", "t5", "bert_cls"))
def test_the_trainer_resumes_where_it_was(case, tmp_path):
    expected, losses = trained(case, tmp_path / "whole")
    start = case.saved(case.make(), tmp_path / "start")
    assert any(not torch.equal(start[name], expected[name]) for name in start)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    got, again = trained(case, tmp_path / "resumed", resume=str(checkpoint))
    assert again == pytest.approx(losses, abs=1e-4)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **CLOSE)


@pytest.mark.peft_fails(ValueError, reason="refused", methods=PREFIXES)
@pytest.mark.cells(models=("llama", "t5", "bert_cls"), methods=("prefix", "prompt"))
def test_the_trainer_trains_a_base_that_checkpoints(case, tmp_path):
    expected, losses = trained(case, tmp_path / "plain", max_steps=2)
    got, again = trained(case, tmp_path / "less", max_steps=2, base_checkpoints=True)
    assert again == pytest.approx(losses, abs=1e-4)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **CLOSE)


# Generation


@pytest.mark.cells(models=GENERATING)
def test_generates_from_ids_by_keyword(case):
    tuned, text = case.make(), case.text()
    out = case.generate(tuned, **text)
    if case.task_type == "CAUSAL_LM":
        assert torch.equal(out[:, :5], text["input_ids"])
        out = out[:, 4:]
    assert out.shape == (2, 6)


@pytest.mark.peft_fails(
    TypeError, reason="generate() of encoder-decoders takes keywords alone", models=SEQ2SEQ
)
@pytest.mark.cells(models=GENERATING)
def test_generates_from_ids_by_position(case):
    tuned, text = case.make(), case.text()
    expected = case.generate(tuned, **text)
    got = case.generate(tuned, text["input_ids"], attention_mask=text["attention_mask"])
    assert torch.equal(got, expected)


@pytest.mark.cells(models=GENERATING)
def test_generates_in_half_precision_with_a_hole_in_the_mask(case):
    text, scores = case.text(), []
    text["attention_mask"][1, 2] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tuned = case.make(case.base(dtype))
        out = case.generate(tuned, **text, output_scores=True, return_dict_in_generate=True)
        assert out.sequences.shape == (2, 10 if case.task_type == "CAUSAL_LM" else 6)
        scores.append(out.scores[0].float())
    for half in scores[1:]:
        torch.testing.assert_close(half, scores[0], rtol=0, atol=0.2 * scores[0].std().item())


@pytest.mark.cells(models=GENERATING)
def test_max_length_counts_the_text_and_what_is_new(case):
    tuned, text = case.make(), case.text()
    out = case.generate(tuned, **text, max_length=8)
    assert out.shape == (2, 8)
    if case.task_type == "CAUSAL_LM":
        assert torch.equal(out[:, :5], text["input_ids"])


@pytest.mark.peft_fails(
    KeyError,
    reason="prompts read cache_position, which is gone",
    models=("llama", "gpt2", "opt"),
    methods=PROMPTS,
)
@pytest.mark.peft_fails(AttributeError, reason="a mask that is None is read", models=("qwen3",))
@pytest.mark.cells(models=GENERATING)
def test_a_static_cache_generates_as_a_dynamic_one(case):
    tuned, text = case.make(), case.text()
    expected = case.generate(tuned, **text)
    assert torch.equal(case.generate(tuned, **text, cache_implementation="static"), expected)


@pytest.mark.cells(models=GENERATING)
def test_beams_return_several_sequences(case):
    tuned, text = case.make(), case.text()
    best = case.generate(tuned, **text, num_beams=3)
    several = case.generate(tuned, **text, num_beams=3, num_return_sequences=2)
    assert torch.equal(several[::2], best)
    assert not torch.equal(several[1::2], best)
    alone = {name: tensor[1:] for name, tensor in text.items()}
    assert torch.equal(case.generate(tuned, **alone, num_beams=3)[0], best[1])


@pytest.mark.peft_fails(ValueError, reason="refused")
@pytest.mark.cells(models=CAUSAL)
def test_generates_from_embeddings(case):
    tuned, text = case.make(), case.text()
    expected = case.generate(tuned, **text)[:, 5:]
    embeds = case.embed(tuned, text.pop("input_ids"))
    assert torch.equal(case.generate(tuned, inputs_embeds=embeds, **text), expected)


# Each row its own adapter, which PEFT does for LoRA alone


@pytest.mark.peft_fails(AssertionError, reason="adapter_names are dropped without a word")
@pytest.mark.cells(methods=PREFIXES)
def test_each_row_has_its_own_adapter(case):
    tuned = case.make()
    case.add(tuned, "other", seed=1)
    inputs = case.batch()
    for names in (["default", "other"], ["other", None]):
        with torch.no_grad():
            got = tuned(**inputs, **case.rows(names)).logits
        for row, name in enumerate(names):
            alone = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
            with torch.no_grad():
                if name is None:
                    expected = case.base()(**alone).logits
                else:
                    tuned.set_adapter(name)
                    expected = tuned(**alone).logits
            mask = alone["attention_mask"]
            torch.testing.assert_close(
                case.real(got[row : row + 1], mask), case.real(expected, mask), **CLOSE
            )


@pytest.mark.peft_fails(ValueError, reason="adapter_names are an unknown keyword")
@pytest.mark.cells(models=GENERATING, methods=PREFIXES)
def test_each_row_has_its_own_adapter_with_beams(case):
    tuned = case.make()
    case.add(tuned, "other", seed=1)
    text, names = case.text(), ["other", "default"]
    got = case.generate(tuned, **text, **case.rows(names), num_beams=2)
    for row, name in enumerate(names):
        tuned.set_adapter(name)
        alone = {key: tensor[row : row + 1] for key, tensor in text.items()}
        assert torch.equal(case.generate(tuned, **alone, num_beams=2)[0], got[row])
