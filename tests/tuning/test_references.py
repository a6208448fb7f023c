"""The adapter "ref": what trl's trainers keep of a policy before they train it."""

import peft
import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel


def add_reference(tuned):
    """Adds a reference adapter as trl's trainers do for a PeftModel."""
    tuned.add_adapter("ref", tuned.peft_config["default"])
    for name, parameter in tuned.named_parameters():
        if ".default." in name:
            other = tuned.get_parameter(name.replace(".default.", ".ref."))
            other.data.copy_(parameter.data)


KINDS = {
    "direct": {},
    "network": {"prefix_projection": True, "encoder_hidden_size": 8},
    "from tokens, behind a network": {
        "prefix_projection": True, "encoder_hidden_size": 8, "init": "vocab",
    },
    "from a text": {"init": "text", "init_text": "any"},
    "frozen tokens": {"num_frozen_tokens": 2, "init": "vocab"},
    "gate": {"gated": True},
    "bias": {"prefix_bias": -0.7},
    "one block": {"share_layers": True},
    "some layers": {"layer_lengths": [4, 0, 2]},
}  # fmt: skip


def tokenizer(_):
    return {"input_ids": [5, 6, 7]}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_adapter_was_whatever_trains_it(kind):
    config = PrefixConfig(num_virtual_tokens=4, **KINDS[kind])
    tuned = PrefixTuningModel(tiny.build("llama"), config, tokenizer)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    before = tuned.export()
    add_reference(tuned)
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained
    assert not any(".ref." in name for name in trained)
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            parameter.add_(1.0)
    reference = tuned.export("ref")
    assert reference.position_offset == before.position_offset
    for got, was in zip(reference.tensors, before.tensors, strict=True):
        assert torch.equal(got, was)
    assert not all(map(torch.equal, tuned.export().tensors, before.tensors))


@pytest.mark.parametrize("kind", [{}, {"encoder_reparameterization_type": "MLP"}])
def test_of_a_prompt_too(kind):
    """Without the tokenizer that its text needed."""
    config = PromptConfig(num_virtual_tokens=4, init="text", init_text="any", **kind)
    tuned = PromptTuningModel(tiny.build("llama"), config, tokenizer)
    before = tuned.export_embeddings()
    add_reference(tuned)
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            parameter.add_(1.0)
    assert torch.equal(tuned.export_embeddings("ref"), before)
    assert not torch.equal(tuned.export_embeddings(), before)


def test_any_other_configuration_or_name_starts_anew():
    config = PrefixConfig(num_virtual_tokens=4)
    tuned = PrefixTuningModel(tiny.build("llama"), config)
    tuned.add_adapter("other", config)
    tuned.add_adapter("ref", PrefixConfig(num_virtual_tokens=4))
    default, other, reference = (tuned.export(name) for name in ("default", "other", "ref"))
    assert not torch.equal(other.keys[0], default.keys[0])
    assert not torch.equal(reference.keys[0], default.keys[0])
    with pytest.raises(ValueError, match="there is already"):
        tuned.add_adapter("ref", tuned.peft_config["default"])


def test_a_lora_inside_is_refused():
    """It would be trained, and be part of the reference."""
    inside = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    tuned = PrefixTuningModel(inside, PrefixConfig(num_virtual_tokens=4))
    with pytest.raises(ValueError, match=r"^ref_model: got None for a model in which .*lora"):
        add_reference(tuned)
    assert list(tuned.encoders) == ["default"]
