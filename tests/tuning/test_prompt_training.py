"""How a prompt starts, how it is trained, and what is saved of it."""

import pytest
import torch
from peft import LoraConfig, PromptEncoder, PromptEncoderConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    Gemma2Config,
    Trainer,
    TrainingArguments,
)

import fastprefix_testing.models as tiny
from fastprefix import PromptConfig, PromptTuningModel
from fastprefix_testing.prompts import KINDS, P, bert


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


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
