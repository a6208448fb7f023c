"""``fastprefix check``, run as a user runs it."""

from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, FalconConfig, FalconForCausalLM
from typer.testing import CliRunner

from fastprefix.cli.app import app


def report(folder: str, *more: str) -> str:
    result = CliRunner().invoke(app, ["check", folder, *more])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_a_decoder_is_right(tiny_folder: str) -> None:
    said = report(tiny_folder, "--dtype", "bfloat16")
    assert "LlamaForCausalLM, bfloat16" in said
    assert said.count(" right") == 3
    assert "refused" not in said
    assert "2 decoder" in said.replace("prefix decoder", "decoder")
    assert "loading" in said


def test_an_encoder_takes_no_prompt(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(**small, num_hidden_layers=2, vocab_size=50)).save_pretrained(
        tmp_path
    )
    said = report(str(tmp_path))
    assert said.count(" right") == 2
    assert "takes a decoder-only model" in said


def test_a_model_that_cannot_be_patched_says_why(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = FalconConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    said = report(str(tmp_path))
    assert " right" not in said
    assert "AttentionInterface" in said


def test_a_missing_folder_is_one_line() -> None:
    result = CliRunner().invoke(app, ["check", "./nowhere"])
    assert result.exit_code == 1
    assert "model: got './nowhere', which does not exist" in result.output
