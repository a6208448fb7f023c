"""Parameters and bytes, against counts by hand."""

import pytest
import torch

from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel
from fastprefix.tuning import count_parameters

P = 6


@pytest.mark.parametrize("architecture", ["llama"])
@pytest.mark.parametrize(
    ("fields", "trainable"),
    [
        ({}, P * 3 * 2 * 2 * 16),
        ({"num_frozen_tokens": 2}, (P - 2) * 3 * 2 * 2 * 16),
        ({"share_layers": True}, P * 2 * 2 * 16),
        ({"prefix_projection": True, "encoder_hidden_size": 5}, P * 64 + 64 * 5 + 5 + 6 * 192),
    ],
)
def test_counts(model, fields, trainable):
    base = sum(p.numel() for p in model.parameters())
    count = count_parameters(PrefixTuningModel(model, PrefixConfig(P, **fields)))
    assert count.base == base
    assert count.trainable == trainable
    assert count.exported == P * 3 * 2 * 2 * 16
    assert count.base_bytes == 4 * base
    assert count.trainable_share == trainable / base
    assert count.reduction == base / count.exported
    assert f"{trainable:,d}" in str(count)


@pytest.mark.parametrize("architecture", ["llama"])
def test_bytes_are_those_of_the_files(model, tmp_path):
    tuned = PrefixTuningModel(model.to(torch.bfloat16), PrefixConfig(P))
    count = count_parameters(tuned)
    tuned.save_pretrained(tmp_path)
    files = [file for file in tmp_path.iterdir() if file.name != "README.md"]
    assert count.bytes_on_disk == sum(file.stat().st_size for file in files)
    assert count.bytes_on_disk > 4 * count.exported, "float32 and what comes with it"
    assert count.base_bytes == 2 * count.base
    assert count.disk_reduction == count.base_bytes / count.bytes_on_disk


@pytest.mark.parametrize("architecture", ["llama"])
@pytest.mark.parametrize("placement", ["prefix", "infix"])
def test_a_prompt_ships_its_embeddings(model, placement):
    config = PromptConfig(P, placement=placement, encoder_reparameterization_type="MLP")
    count = count_parameters(PromptTuningModel(model, config))
    width = model.config.hidden_size
    assert count.exported == P * width
    assert count.trainable == P * width + 3 * (width * width + width)
