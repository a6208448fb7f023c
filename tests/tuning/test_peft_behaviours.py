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
    """The gradients of what is trained, by name. None stays behind."""
    tuned.zero_grad()
    tuned(**inputs).loss.backward()
    found = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    tuned.zero_grad()
    return found


# The model and its parts


def test_has_the_attributes(cell):
    base = cell.base()
    tuned = cell.make(base)
    for name in ("save_pretrained", "from_pretrained", "push_to_hub"):
        assert callable(getattr(tuned, name))
    assert tuned.get_base_model() is base
    assert tuned.active_adapter == "default"
    assert tuned.active_adapters == ["default"]
    assert list(tuned.peft_config) == ["default"]
    config = tuned.peft_config["default"]
    assert config.peft_type == cell.peft_type
    assert config.task_type == cell.task_type
    assert config.num_virtual_tokens == cell.P


def test_attributes_of_the_base_are_those_of_the_model(cell):
    base = cell.base()
    tuned = cell.make(base)
    assert tuned.config is base.config
    assert tuned.main_input_name == base.main_input_name
    assert tuned.get_input_embeddings() is base.get_input_embeddings()
    assert tuned.num_parameters() == base.num_parameters()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tuned.no_such_thing


def test_parameters_have_the_adapters_name(cell):
    tuned = cell.make(adapter_name="test-adapter")
    assert any("test-adapter" in name for name, _ in tuned.named_parameters())
    assert tuned.active_adapters == ["test-adapter"]


def test_there_is_nothing_to_unload(cell):
    with pytest.raises(AttributeError):
        cell.make().unload()


@pytest.mark.peft_fails(
    AssertionError, reason="a copy of each head is put into the base", models=CLASSIFIERS
)
def test_the_bases_names_and_numbers_stay(cell):
    before = cell.base().state_dict()
    base = cell.base()
    tuned = cell.make(base)
    tuned(**cell.labelled()).loss.backward()
    after = tuned.get_base_model().state_dict()
    assert after.keys() == before.keys()
    heads = ("classifier.", "score.")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) or name.startswith(heads)


# Training


def test_the_adapter_trains_and_the_base_does_not(cell):
    base = cell.base()
    bodies = {n: p for n, p in base.named_parameters() if not n.startswith(("classifier", "score"))}
    before = {name: parameter.clone() for name, parameter in bodies.items()}
    tuned = cell.make(base).train()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    inputs = cell.labelled()
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


def test_trains_a_base_prepared_for_kbit_training(cell):
    tuned = cell.make()
    ids = cell.batch()["input_ids"]
    assert not tuned.get_input_embeddings()(ids).requires_grad
    base = peft.prepare_model_for_kbit_training(cell.base())
    assert not any(parameter.requires_grad for parameter in base.parameters())
    tuned = cell.make(base).train()
    tuned.enable_input_require_grads()
    assert tuned.get_input_embeddings()(ids).requires_grad
    assert gradients(tuned, cell.labelled())


def test_the_loss_is_the_labels_cross_entropy(cell):
    tuned = cell.make()
    inputs = cell.labelled()
    with torch.no_grad():
        out = tuned(**inputs)
    torch.testing.assert_close(out.loss, cell.loss(out.logits, inputs["labels"]), **CLOSE)


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
def test_embeddings_in_place_of_ids(cell):
    tuned = cell.make()
    inputs = cell.batch()
    expected = cell.logits(tuned, **inputs)
    inputs["inputs_embeds"] = cell.embed(tuned, inputs.pop("input_ids"))
    torch.testing.assert_close(cell.logits(tuned, **inputs), expected, **CLOSE)


@pytest.mark.peft_fails(
    UnboundLocalError,
    reason="disable_adapter asks classifiers for what only generate() needs",
    models=CLASSIFIERS,
)
def test_disable_adapter_is_the_base_and_back(cell):
    base = cell.base()
    inputs = cell.batch()
    bare = cell.logits(base, **inputs)
    tuned = cell.make(base)
    expected = cell.logits(tuned, **inputs)
    assert (expected - bare).abs().max() > 1e-2
    with tuned.disable_adapter():
        torch.testing.assert_close(cell.logits(tuned, **inputs), bare, **CLOSE)
    torch.testing.assert_close(cell.logits(tuned, **inputs), expected, **CLOSE)


@pytest.mark.peft_fails(
    AssertionError,
    reason="generate() of encoder-decoders goes on to put the prompt in front",
    models=SEQ2SEQ,
    methods=PROMPTS,
)
@pytest.mark.cells(models=GENERATING)
def test_disable_adapter_generates_as_the_base_and_back(cell):
    base = cell.base()
    text = cell.text()
    bare = cell.generate(base, **text)
    tuned = cell.make(base)
    expected = cell.generate(tuned, **text)
    assert not torch.equal(expected, bare)
    with tuned.disable_adapter():
        assert torch.equal(cell.generate(tuned, **text), bare)
    assert torch.equal(cell.generate(tuned, **text), expected)


@pytest.mark.peft_fails(
    RuntimeError,
    reason="the cache that holds the prefix is dropped and its mask is not",
    methods=PREFIXES,
)
def test_gradient_checkpointing_leaves_the_gradients(cell):
    tuned = cell.make().train()
    inputs = cell.labelled()
    expected = gradients(tuned, inputs)
    tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(tuned, inputs)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.peft_fails(ValueError, reason="refused", methods=PREFIXES)
def test_a_base_that_checkpoints_already_leaves_the_gradients(cell):
    expected = gradients(cell.make().train(), cell.labelled())
    base = cell.base()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(cell.make(base).train(), cell.labelled())
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def trained(cell, folder, max_steps=4, resume=None, base_checkpoints=False):
    """What is saved of a model that a Trainer trained, and its losses."""
    base = cell.base()
    if base_checkpoints:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    tuned = cell.make(base).train()
    inputs = cell.labelled()
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
    return cell.saved(tuned, folder / "adapter"), losses


@pytest.mark.peft_fails(
    RuntimeError,
    reason="the checkpoint has no network, and its embedding another width",
    methods=("projection",),
)
@pytest.mark.peft_fails(
    AssertionError, reason="the checkpoint has no network", methods=("p_tuning",)
)
@pytest.mark.cells(models=("llama", "t5", "bert_cls"))
def test_the_trainer_resumes_where_it_was(cell, tmp_path):
    expected, losses = trained(cell, tmp_path / "whole")
    start = cell.saved(cell.make(), tmp_path / "start")
    assert any(not torch.equal(start[name], expected[name]) for name in start)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    got, again = trained(cell, tmp_path / "resumed", resume=str(checkpoint))
    assert again == pytest.approx(losses, abs=1e-4)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **CLOSE)


@pytest.mark.peft_fails(ValueError, reason="refused", methods=PREFIXES)
@pytest.mark.cells(models=("llama", "t5", "bert_cls"), methods=("prefix", "prompt"))
def test_the_trainer_trains_a_base_that_checkpoints(cell, tmp_path):
    expected, losses = trained(cell, tmp_path / "plain", max_steps=2)
    got, again = trained(cell, tmp_path / "less", max_steps=2, base_checkpoints=True)
    assert again == pytest.approx(losses, abs=1e-4)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **CLOSE)


# Generation


@pytest.mark.cells(models=GENERATING)
def test_generates_from_ids_by_keyword(cell):
    tuned, text = cell.make(), cell.text()
    out = cell.generate(tuned, **text)
    if cell.task_type == "CAUSAL_LM":
        assert torch.equal(out[:, :5], text["input_ids"])
        out = out[:, 4:]
    assert out.shape == (2, 6)


@pytest.mark.peft_fails(
    TypeError, reason="generate() of encoder-decoders takes keywords alone", models=SEQ2SEQ
)
@pytest.mark.cells(models=GENERATING)
def test_generates_from_ids_by_position(cell):
    tuned, text = cell.make(), cell.text()
    expected = cell.generate(tuned, **text)
    got = cell.generate(tuned, text["input_ids"], attention_mask=text["attention_mask"])
    assert torch.equal(got, expected)


@pytest.mark.cells(models=GENERATING)
def test_generates_in_half_precision_with_a_hole_in_the_mask(cell):
    text, scores = cell.text(), []
    text["attention_mask"][1, 2] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tuned = cell.make(cell.base(dtype))
        out = cell.generate(tuned, **text, output_scores=True, return_dict_in_generate=True)
        assert out.sequences.shape == (2, 10 if cell.task_type == "CAUSAL_LM" else 6)
        scores.append(out.scores[0].float())
    for half in scores[1:]:
        torch.testing.assert_close(half, scores[0], rtol=0, atol=0.2 * scores[0].std().item())


@pytest.mark.cells(models=GENERATING)
def test_max_length_counts_the_text_and_what_is_new(cell):
    tuned, text = cell.make(), cell.text()
    out = cell.generate(tuned, **text, max_length=8)
    assert out.shape == (2, 8)
    if cell.task_type == "CAUSAL_LM":
        assert torch.equal(out[:, :5], text["input_ids"])


@pytest.mark.peft_fails(
    KeyError,
    reason="prompts read cache_position, which is gone",
    models=("llama", "gpt2", "opt"),
    methods=PROMPTS,
)
@pytest.mark.peft_fails(AttributeError, reason="a mask that is None is read", models=("qwen3",))
@pytest.mark.peft_fails(
    AttributeError,
    reason="prefixes read a static cache's length, which is gone",
    models=("llama", "gpt2", "opt"),
    methods=PREFIXES,
    transformers="5.20",
)
@pytest.mark.peft_fails(
    AssertionError,
    reason="a static cache loses T5's prefix",
    models=("t5",),
    methods=PREFIXES,
    transformers="5.20",
)
@pytest.mark.cells(models=GENERATING)
def test_a_static_cache_generates_as_a_dynamic_one(cell):
    tuned, text = cell.make(), cell.text()
    expected = cell.generate(tuned, **text)
    assert torch.equal(cell.generate(tuned, **text, cache_implementation="static"), expected)


@pytest.mark.cells(models=GENERATING)
def test_beams_return_several_sequences(cell):
    tuned, text = cell.make(), cell.text()
    best = cell.generate(tuned, **text, num_beams=3)
    several = cell.generate(tuned, **text, num_beams=3, num_return_sequences=2)
    assert torch.equal(several[::2], best)
    assert not torch.equal(several[1::2], best)
    alone = {name: tensor[1:] for name, tensor in text.items()}
    assert torch.equal(cell.generate(tuned, **alone, num_beams=3)[0], best[1])


@pytest.mark.peft_fails(ValueError, reason="refused")
@pytest.mark.cells(models=CAUSAL)
def test_generates_from_embeddings(cell):
    tuned, text = cell.make(), cell.text()
    expected = cell.generate(tuned, **text)[:, 5:]
    embeds = cell.embed(tuned, text.pop("input_ids"))
    assert torch.equal(cell.generate(tuned, inputs_embeds=embeds, **text), expected)


# Each row has its own adapter, which PEFT does only for LoRA


@pytest.mark.peft_fails(AssertionError, reason="adapter_names are dropped without a word")
@pytest.mark.cells(methods=PREFIXES)
def test_each_row_has_its_own_adapter(cell):
    tuned = cell.make()
    cell.add(tuned, "other", seed=1)
    inputs = cell.batch()
    for names in (["default", "other"], ["other", None]):
        with torch.no_grad():
            got = tuned(**inputs, **cell.rows(names)).logits
        for row, name in enumerate(names):
            alone = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
            with torch.no_grad():
                if name is None:
                    expected = cell.base()(**alone).logits
                else:
                    tuned.set_adapter(name)
                    expected = tuned(**alone).logits
            mask = alone["attention_mask"]
            torch.testing.assert_close(
                cell.real(got[row : row + 1], mask), cell.real(expected, mask), **CLOSE
            )


@pytest.mark.peft_fails(ValueError, reason="adapter_names are an unknown keyword")
@pytest.mark.cells(models=GENERATING, methods=PREFIXES)
def test_each_row_has_its_own_adapter_with_beams(cell):
    tuned = cell.make()
    cell.add(tuned, "other", seed=1)
    text, names = cell.text(), ["other", "default"]
    got = cell.generate(tuned, **text, **cell.rows(names), num_beams=2)
    for row, name in enumerate(names):
        tuned.set_adapter(name)
        alone = {key: tensor[row : row + 1] for key, tensor in text.items()}
        assert torch.equal(cell.generate(tuned, **alone, num_beams=2)[0], got[row])
