"""Modules other than a classifier that adapters train: inside layers, tied, with a LoRA inside."""

import peft
import pytest
import torch
import transformers

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel
from fastprefix_testing.heads import CLOSE, WRAPS, P, answers, build, loud, two


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
    """The gradients of the layers after two forwards and one backward."""
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


def test_weights_that_are_not_in_memory_cannot_be_copied():
    with torch.device("meta"):
        base = build("bert")
    with pytest.raises(ValueError, match="modules_to_save: got 'classifier', whose weights are"):
        PromptTuningModel(base, PromptConfig(P, task_type="SEQ_CLS"))
