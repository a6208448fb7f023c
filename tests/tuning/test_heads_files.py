"""Heads in files: ours, PEFT's and a trainer's checkpoints."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import fastprefix_testing.models as tiny
from fastprefix_testing.heads import CASES, CLOSE, FILE, WRAPS, P, answers, build, loud, two


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
    """In DistilBERT PEFT trains every module whose name ends in "classifier"."""
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


class Items(torch.utils.data.Dataset):
    """Labelled texts."""

    def __len__(self):
        return 8

    def __getitem__(self, item):
        return {"input_ids": (torch.arange(5) * 7 + item) % 101, "labels": item % 3}


@pytest.mark.peft
@pytest.mark.parametrize("wrap", WRAPS)
def test_peft_reads_a_tied_head(wrap, texts, tmp_path):
    of, config, _ = WRAPS[wrap]
    tuned = of(tiny.build(tie_word_embeddings=True), config(P, modules_to_save=["lm_head"]))
    loud(tuned).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.build(tie_word_embeddings=True), tmp_path).eval()
    got = theirs(input_ids=texts[0], attention_mask=texts[1]).logits[:, -5:]
    torch.testing.assert_close(got, tuned(*texts).logits, **CLOSE)


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
