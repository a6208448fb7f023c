"""Heads: each adapter trains its own, as with PEFT's modules_to_save; the base keeps its own."""

import copy
import pickle
import threading

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel

P = 3
CLOSE = {"rtol": 0, "atol": 2e-5}
_SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2}
_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
# how the class is called, its configuration, the task, and what is trained of the base
CASES = {
    "bert": ("Bert", {**_SIZES, **_STILL}, "SEQ_CLS", {"classifier"}),
    "roberta": ("Roberta", {**_SIZES, **_STILL}, "SEQ_CLS", {"classifier"}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 101, "pad_token_id": 0, **_DISTIL, **_NO_DROPOUT},
        "SEQ_CLS",
        {"classifier", "pre_classifier"},
    ),
    "llama": ("Llama", {**_SIZES, "num_key_value_heads": 2}, "SEQ_CLS", {"score"}),
    "bert tokens": ("Bert", {**_SIZES, **_STILL}, "TOKEN_CLS", {"classifier"}),
    "bert answers": ("Bert", {**_SIZES, **_STILL}, "QUESTION_ANS", {"qa_outputs"}),
}
_ENDS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
}
WRAPS = {
    "prefix": (PrefixTuningModel, PrefixConfig, peft.PrefixTuningConfig),
    "prompt": (PromptTuningModel, PromptConfig, peft.PromptTuningConfig),
}
FILE = "adapter_model.safetensors"


def build(case, task_type=None, **changes):
    """The same weights every time."""
    name, sizes, task, _ = CASES[case]
    of = getattr(transformers, name + _ENDS[task_type or task])
    torch.manual_seed(0)
    labels = {} if (task_type or task) in ("QUESTION_ANS", "CAUSAL_LM") else {"num_labels": 3}
    return of(getattr(transformers, f"{name}Config")(**{**sizes, **labels, **changes})).eval()


def loud(tuned):
    """Adapters and heads with numbers that differ from each other's, in eval mode."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if not name.startswith("base_model."):
                parameter.normal_(0, 0.5)
    return tuned.eval()


def two(case, wrap="prefix", **changes):
    of, config, _ = WRAPS[wrap]
    task = CASES[case][2]
    tuned = of(build(case, **changes), config(P, task_type=task))
    tuned.add_adapter("second", config(P + 1, task_type=task))
    return loud(tuned)


def answers(model, ids, mask, **names):
    """Logits of the text, or both of a model that answers questions."""
    out = model(input_ids=ids, attention_mask=mask, **names)
    logits = out.get("logits")
    if logits is None:
        logits = torch.stack([out.start_logits, out.end_logits], -1)
    return logits[:, -ids.shape[1] :] if logits.dim() == 3 else logits  # PEFT's has the prompt, too


@pytest.fixture
def texts():
    """Of one length, for PEFT's causal classifiers read padding."""
    return tiny.batch((5, 5, 5, 5), "right")


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("case", CASES)
def test_several_are_saved_and_loaded_together(case, wrap, texts, tmp_path):
    tuned = two(case, wrap)
    assert set(tuned.head_names()) == set(tuned.head_names("second")) == CASES[case][3]
    tuned.save_pretrained(tmp_path)
    base = build(case)
    again = type(tuned).from_pretrained(base, tmp_path)
    again.load_adapter(tmp_path / "second", "other")
    seen = []
    for ours, theirs in (("default", "default"), ("second", "other")):
        tuned.set_adapter(ours)
        again.set_adapter(theirs)
        seen.append(answers(tuned, *texts))
        assert torch.equal(answers(again, *texts), seen[-1])
    assert not torch.allclose(*seen)
    with tuned.disable_adapter(), again.disable_adapter():
        for model in (tuned, again):
            torch.testing.assert_close(
                answers(model, *texts), answers(build(case), *texts), **CLOSE
            )
    for name, tensor in build(case).state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor), "the base's own head is untouched"


@pytest.mark.peft
@pytest.mark.parametrize(
    ("case", "wrap"),
    # PEFT has no prefixes for DistilBERT, which takes no cache
    [(case, wrap) for case in CASES for wrap in WRAPS if (case, wrap) != ("distilbert", "prefix")],
)
def test_files_of_several_go_to_peft_and_come_from_it(case, wrap, texts, tmp_path):
    """Also of DistilBERT, of which PEFT trains every module whose name ends in "classifier"."""
    of, _, config = WRAPS[wrap]
    sizes = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
    fields = {"task_type": CASES[case][2], "num_virtual_tokens": P, **sizes}
    theirs = peft.get_peft_model(build(case), config(**fields))
    theirs.add_adapter("second", config(**fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name or "prompt_encoder" in name:
                parameter.normal_(0, 0.5)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = of.from_pretrained(build(case), tmp_path / "theirs")
    ours.load_adapter(tmp_path / "theirs" / "second", "second")
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(build(case), tmp_path / "ours").eval()
    back.load_adapter(tmp_path / "ours" / "second", "second")
    for name in ("second", "default"):
        for model in (theirs, ours, back):
            model.set_adapter(name)
        expected = answers(theirs, *texts)
        torch.testing.assert_close(answers(ours, *texts), expected, **CLOSE)
        torch.testing.assert_close(answers(back, *texts), expected, **CLOSE)


@pytest.mark.parametrize("wrap", WRAPS)
def test_one_is_trained_and_the_others_stay(wrap, texts):
    tuned = two("roberta", wrap)
    ids, mask = texts
    before = {name: tensor.clone() for name, tensor in tuned.named_parameters()}
    tuned.set_adapter("second")
    trained = {name for name, x in tuned.named_parameters() if x.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"encoders", "adapter_heads"}
    assert {name.split(".")[1] for name in trained} == {"second"}
    optimizer = torch.optim.SGD([x for x in tuned.parameters() if x.requires_grad], lr=0.1)
    loss = tuned(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2, 0])).loss
    loss.backward()
    optimizer.step()
    changed = {name for name, x in tuned.named_parameters() if not torch.equal(x, before[name])}
    assert changed == trained
    assert list(tuned.base_model.state_dict()) == list(build("roberta").state_dict())
    tuned.set_requires_grad("default")
    assert tuned.adapter_heads["default"].classifier.dense.weight.requires_grad
    tuned.set_adapter("default", inference_mode=True)
    assert not any(x.requires_grad for x in tuned.parameters())


@pytest.mark.peft
@pytest.mark.parametrize("wrap", WRAPS)
def test_training_steps_are_those_of_peft(wrap, texts, tmp_path):
    """Of the head, too, and with dropout in it: nothing else draws random numbers."""
    of, _, config = WRAPS[wrap]
    ids, mask = texts
    changes = {"classifier_dropout": 0.3}
    theirs = peft.get_peft_model(
        build("roberta", **changes), config(task_type="SEQ_CLS", num_virtual_tokens=P)
    )
    theirs.save_pretrained(tmp_path)
    ours = of.from_pretrained(build("roberta", **changes), tmp_path, is_trainable=True)
    losses = []
    for model in (theirs.train(), ours):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.2)
        for _ in range(4):
            labels = torch.tensor([0, 1, 2, 0])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(torch.stack(losses[4:]), torch.stack(losses[:4]), **CLOSE)
    assert losses[3] < losses[0]


ROWS = ["second", None, "bare", "default"]


@pytest.mark.parametrize("case", ["roberta", "llama", "bert tokens"])
def test_each_row_has_the_head_of_its_adapter(case, texts):
    tuned = two(case)
    tuned.add_adapter("bare", PrefixConfig(2, task_type="FEATURE_EXTRACTION", init_std=0.5))
    assert tuned.head_names("bare") is None
    ids, mask = texts
    tuned.set_requires_grad(["default", "second"])
    weights = [x for x in tuned.parameters() if x.requires_grad]
    got = answers(tuned, ids, mask, prefix_names=ROWS)
    gradients = torch.autograd.grad(got.square().sum(), weights)
    alone = []
    for row, name in enumerate(ROWS):
        text = ids[row : row + 1], mask[row : row + 1]
        alone.append(answers(tuned, *text, prefix_names=[name]))
    torch.testing.assert_close(got, torch.cat(alone), **CLOSE)
    expected = torch.autograd.grad(torch.cat(alone).square().sum(), weights)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
    assert all(x.abs().max() > 0 for x in expected)
    tuned.set_adapter("bare")
    base, head = build(case), next(iter(CASES[case][3]))
    for name, tensor in tuned.base_model.get_submodule(head).state_dict().items():
        assert torch.equal(tensor, base.get_submodule(head).state_dict()[name])
    torch.testing.assert_close(answers(tuned, ids, mask)[2], got[2], **CLOSE)


def test_packed_rows_of_different_heads_are_refused(texts):
    tuned = two("llama")
    positions = torch.cat([torch.arange(2), torch.arange(3)])[None]
    with pytest.raises(NotImplementedError, match="prefix_names: got 2 rows with different heads"):
        tuned(input_ids=texts[0][:1], position_ids=positions, prefix_names=["default", "second"])


def test_a_head_and_a_part_of_it_in_one_batch_are_refused(texts):
    tuned = two("roberta")
    tuned.add_adapter("part", PrefixConfig(P, modules_to_save=["out_proj"], task_type="SEQ_CLS"))
    with pytest.raises(NotImplementedError, match="prefix_names: got rows whose adapters train cl"):
        answers(tuned, *texts, prefix_names=["default", "part"] * 2)
    answers(tuned, *texts, prefix_names=["part"] * 4)


class Items(torch.utils.data.Dataset):
    """Labelled texts."""

    def __len__(self):
        return 8

    def __getitem__(self, item):
        return {"input_ids": (torch.arange(5) * 7 + item) % 101, "labels": item % 3}


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_trainer_resumes_with_the_heads(wrap, tmp_path):
    def trainer(steps):
        arguments = TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, max_steps=steps, save_steps=2,
            per_device_train_batch_size=4, learning_rate=0.1, disable_tqdm=True,
        )  # fmt: skip
        tuned = two("bert", wrap)
        tuned.set_adapter("second")
        return Trainer(tuned, arguments, train_dataset=Items())

    whole = trainer(4)
    before = {name: x.clone() for name, x in whole.model.state_dict().items()}
    whole.train()
    half = trainer(4)
    half.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = whole.model.state_dict()
    changed = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"second"}
    from_checkpoint = type(whole.model).from_pretrained(build("bert"), tmp_path / "checkpoint-4")
    assert from_checkpoint.active_adapter == "second"
    for name in ("second", "default"):
        for model in (from_checkpoint, whole.model.eval()):
            model.set_adapter(name)
        text = torch.arange(5)[None]
        assert torch.equal(from_checkpoint(text).logits, whole.model(text).logits)
    for name, tensor in half.model.state_dict().items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=1e-6)
    assert not any(name.startswith("base_model.") for name in after)


def test_threads_do_not_see_each_others_heads(texts):
    tuned = two("bert")
    ids, mask = texts
    rows = {name: [name] * 4 for name in ("default", "second")} | {"mixed": ["second", None] * 2}
    with torch.no_grad():
        expected = {key: answers(tuned, ids, mask, prefix_names=x) for key, x in rows.items()}
    wrong = []
    start = threading.Barrier(len(rows))

    def run(key):
        start.wait()
        for _ in range(15):
            with torch.no_grad():
                got = answers(tuned, ids, mask, prefix_names=rows[key])
            if not torch.equal(got, expected[key]):
                wrong.append(key)

    threads = [threading.Thread(target=run, args=(key,)) for key in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_copy_has_heads_of_its_own(wrap, make, texts):
    tuned = two("bert", wrap)
    again, base = make(tuned), make(tuned.base_model)
    expected = answers(tuned, *texts)
    assert torch.equal(answers(again, *texts), expected)
    assert type(base.classifier) is torch.nn.Linear
    with torch.no_grad():
        for parameter in again.adapter_heads.parameters():
            parameter.add_(1.0)
    assert torch.equal(answers(tuned, *texts), expected)
    assert not torch.allclose(answers(again, *texts), expected)


def test_compiled_in_one_graph(texts):
    torch._dynamo.reset()
    tuned = two("bert", num_hidden_layers=1)
    compiled = torch.compile(tuned, fullgraph=True, backend="eager")
    for name in ("default", "second", "default"):
        tuned.set_adapter(name)
        torch.testing.assert_close(answers(compiled, *texts), answers(tuned, *texts), **CLOSE)
    again = torch.compile(copy.deepcopy(tuned), fullgraph=True, backend="eager")
    torch.testing.assert_close(answers(again, *texts), answers(tuned, *texts), **CLOSE)


class Fused(transformers.BertForSequenceClassification):
    """Takes its head's weights rather than call it."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        fed = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        pooled = self.bert(**fed, attention_mask=attention_mask, **kwargs)[1]
        logits = torch.nn.functional.linear(pooled, self.classifier.weight, self.classifier.bias)
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)


def test_a_model_that_takes_weights_takes_the_adapters(texts):
    tuned = two("bert")
    base = build("bert")
    base.__class__ = Fused
    fused = PrefixTuningModel(base, PrefixConfig(P, task_type="SEQ_CLS"))
    fused.add_adapter("second", PrefixConfig(P + 1, task_type="SEQ_CLS"))
    loud(fused)
    for name in ("second", "default"):
        tuned.set_adapter(name)
        fused.set_adapter(name)
        torch.testing.assert_close(answers(fused, *texts), answers(tuned, *texts), **CLOSE)
    with pytest.raises(NotImplementedError, match="prefix_names: got rows with different heads"):
        answers(fused, *texts, prefix_names=["second", None] * 2)


def layers_gradients(tuned, ids, names=("default", "second")):
    """Of two forwards before one backward."""
    tuned.train()
    tuned.set_requires_grad(names)
    total = 0.0
    for name in names:
        tuned.active_adapter = name
        total = total + tuned(input_ids=ids, labels=ids).loss
    weights = [x for x in tuned.parameters() if x.requires_grad]
    return torch.autograd.grad(total, weights)


@pytest.mark.parametrize("wrap", WRAPS)
def test_heads_inside_layers_that_are_run_again(wrap, texts):
    of, config, _ = WRAPS[wrap]

    def tuned():
        result = of(tiny.build(), config(P, modules_to_save=["mlp", "norm"]))
        result.add_adapter("second", config(P, modules_to_save=["self_attn"]))
        return loud(result)

    expected = layers_gradients(tuned(), texts[0])
    assert all(x.abs().max() > 0 for x in expected)
    again = tuned()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    assert again.is_gradient_checkpointing
    torch.testing.assert_close(layers_gradients(again, texts[0]), expected, rtol=1e-4, atol=1e-6)
    other = tuned()
    other.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"gradient checkpointing: would run model\.layers\.0"):
        layers_gradients(other, texts[0])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_copies_of_attention_attend_as_the_originals(architecture, texts):
    """A prefix reaches them, too."""
    names = {"llama": ["self_attn"], "gpt2": ["attn", "mlp"]}[architecture]
    plain = loud(PrefixTuningModel(tiny.build(architecture), PrefixConfig(P)))
    tuned = PrefixTuningModel(
        tiny.build(architecture), PrefixConfig(P, modules_to_save=names)
    ).eval()
    assert len(tuned.heads()) > len(names)
    tuned.encoder.start_from_prefix(plain.export())
    torch.testing.assert_close(tuned(*texts).logits, plain(*texts).logits, **CLOSE)
    assert torch.equal(tiny.generate(tuned, *texts), tiny.generate(plain, *texts))


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_tied_head_is_trained_apart_from_the_embeddings(wrap, texts, tmp_path):
    of, config, _ = WRAPS[wrap]
    tuned = of(tiny.build(tie_word_embeddings=True), config(P, modules_to_save=["lm_head"]))
    loud(tuned)
    assert not tuned.get_input_embeddings().weight.requires_grad
    ids, mask = texts
    new = tiny.generate(tuned, ids, mask)
    with tuned.disable_adapter():
        bare = tiny.generate(tuned, ids, mask)
    assert torch.equal(bare, tiny.generate(tiny.build(tie_word_embeddings=True), ids, mask))
    assert not torch.equal(new, bare)
    tuned.save_pretrained(tmp_path)
    again = of.from_pretrained(tiny.build(tie_word_embeddings=True), tmp_path)
    assert torch.equal(tiny.generate(again, ids, mask), new)
    assert torch.equal(again(ids).logits, tuned(ids).logits)


@pytest.mark.peft
@pytest.mark.parametrize("wrap", WRAPS)
def test_peft_reads_a_tied_head(wrap, texts, tmp_path):
    of, config, _ = WRAPS[wrap]
    tuned = of(tiny.build(tie_word_embeddings=True), config(P, modules_to_save=["lm_head"]))
    loud(tuned).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.build(tie_word_embeddings=True), tmp_path).eval()
    got = theirs(input_ids=texts[0], attention_mask=texts[1]).logits[:, -5:]
    torch.testing.assert_close(got, tuned(*texts).logits, **CLOSE)


@pytest.mark.peft
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_head_that_a_lora_inside_trains_is_left_to_it(wrap, texts, tmp_path):
    of, config, _ = WRAPS[wrap]

    def inside():
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        return peft.get_peft_model(build("bert"), lora)

    tuned = of(inside(), config(P, task_type="SEQ_CLS"))
    assert tuned.head_names() is None
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    tuned.eval().save_pretrained(tmp_path)
    again = of.from_pretrained(build("bert"), tmp_path)
    torch.testing.assert_close(answers(again, *texts), answers(tuned, *texts), **CLOSE)
    with pytest.raises(ValueError, match="modules_to_save: got 'classifier', which an adapter"):
        of(inside(), config(P, modules_to_save=["classifier"]))


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("classifier", "got 'classifier', takes a list"),
        ([""], r"got \[''\], takes a list"),
        (["scorer"], "got 'scorer', which BertForSequenceClassification lacks"),
        (["layer"], "got 'bert.encoder.layer', a ModuleList"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused(wrap, names, said):
    of, config, _ = WRAPS[wrap]
    base = build("bert")
    with pytest.raises((TypeError, ValueError), match=f"modules_to_save: {said}"):
        of(base, config(P, modules_to_save=names))
    assert all(x.requires_grad for x in base.parameters()), "as it was"
    tuned = two("bert", wrap)
    with pytest.raises((TypeError, ValueError), match=f"modules_to_save: {said}"):
        tuned.add_adapter("third", config(P, modules_to_save=names))
    assert list(tuned.encoders) == list(tuned.peft_config) == ["default", "second"]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x.update({"base_model.classifier.bias": torch.zeros(9)}), r"bias \[9\].*\[3\]"),
        (lambda x: x.update({"base_model.scorer.bias": torch.zeros(3)}), "no such parameter"),
        (lambda x: x.pop("base_model.classifier.bias"), r"a part of classifier.*classifier\.bias"),
    ],
    ids=["shape", "unknown", "part"],
)
def test_saved_heads_that_do_not_fit_are_refused(wrap, spoil, said, texts, tmp_path):
    tuned = two("bert", wrap)
    tuned.save_pretrained(tmp_path)
    expected = answers(tuned, *texts)
    for folder in (tmp_path, tmp_path / "second"):
        weights = load_file(folder / FILE)
        spoil(weights)
        save_file(weights, folder / FILE)
    with pytest.raises(ValueError, match=said):
        tuned.load_adapter(tmp_path / "second", "third")
    assert list(tuned.encoders) == ["default", "second"]
    assert torch.equal(answers(tuned, *texts), expected)
    base = build("bert")
    with pytest.raises(ValueError, match=said):
        type(tuned).from_pretrained(base, tmp_path)
    for name, tensor in build("bert").state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor)


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_last_adapter_is_deleted(wrap, texts, tmp_path):
    tuned = two("bert", wrap)
    tuned.set_adapter("second")
    tuned.add_adapter("third", WRAPS[wrap][1](P, task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match="'second' was active; now 'default' is"):
        tuned.delete_adapter("second")
    assert tuned.active_adapters == ["default"]
    assert not any(".second." in name for name in tuned.state_dict())
    tuned.delete_adapter("third")
    tuned.delete_adapter("default")
    assert (tuned.active_adapter, tuned.active_adapters, dict(tuned.peft_config)) == (None, [], {})
    assert list(tuned.state_dict()) == ["_extra_state"]
    ids, mask = texts
    for call in (
        lambda: tuned(input_ids=ids),
        lambda: tuned.encoder,
        tuned.export,
        tuned.heads,
    ):
        with pytest.raises(ValueError, match="active_adapter: got none"):
            call()
    with pytest.raises(ValueError, match="selected_adapters: got none"):
        tuned.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    expected = answers(build("bert"), ids, mask)
    with tuned.disable_adapter():
        torch.testing.assert_close(answers(tuned, ids, mask), expected, **CLOSE)
    torch.testing.assert_close(answers(tuned.base_model, ids, mask), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"adapter_name: got 'default', takes one of \[\]"):
        tuned.set_adapter("default")
    tuned.add_adapter("again", WRAPS[wrap][1](P, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="active_adapter: got none"):
        tuned(input_ids=ids)
    tuned.set_adapter("again")
    assert tuned.active_adapters == ["again"]
    assert answers(tuned, ids, mask).shape == (4, 3)


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"),
    reason="PEFT 0.20 cannot delete an adapter of prompts",
)
@pytest.mark.peft
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_is_active_after_deletions_is_what_peft_has(wrap):
    _, config, theirs = WRAPS[wrap]
    task = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": P}
    base = build("bert")
    models = [
        peft.get_peft_model(build("bert"), theirs(**task)),
        WRAPS[wrap][0](base, config(**task)),
    ]
    for name in ("second", "third"):
        models[0].add_adapter(name, theirs(**task))
        models[1].add_adapter(name, config(**task))
    seen = [[], []]
    for model, active in zip(models, seen, strict=True):
        model.set_adapter("second")
        for name in ("second", "third", "default"):
            model.delete_adapter(name)
            active.append((list(model.active_adapters), list(model.peft_config)))
    assert seen[1] == seen[0]


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("wrap", WRAPS)
def test_reloaded_heads_are_trained_if_asked(wrap, is_trainable, tmp_path):
    tuned = two("bert", wrap)
    tuned.save_pretrained(tmp_path)
    again = type(tuned).from_pretrained(build("bert"), tmp_path, is_trainable=is_trainable)
    assert again.training is is_trainable
    again.load_adapter(tmp_path / "second", "second", is_trainable=is_trainable)
    states = {
        name: x.requires_grad
        for name, x in again.named_parameters()
        if not name.startswith("base_model.")
    }
    assert set(states.values()) == {is_trainable}
    assert sum("adapter_heads" in name for name in states) == 4
    assert not any(x.requires_grad for x in again.base_model.parameters())


def test_weights_that_are_not_in_memory_cannot_be_copied():
    with torch.device("meta"):
        base = build("bert")
    with pytest.raises(ValueError, match="modules_to_save: got 'classifier', whose weights are"):
        PromptTuningModel(base, PromptConfig(P, task_type="SEQ_CLS"))
