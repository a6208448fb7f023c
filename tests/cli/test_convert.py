"""``fastprefix convert``: what it writes computes the same, and what it cannot do it does not."""

import json
import os
from dataclasses import replace

import peft
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import fastprefix_testing.models as tiny
from fastprefix import PrefixKV, PromptConfig, PromptTuningModel, use_prefix
from fastprefix.cli.app import app
from fastprefix.cli.console import console
from fastprefix.formats.peft_prefixes import save_adapter
from fastprefix.formats.peft_prompts import save_prompt
from fastprefix.kv import LayerShape
from fastprefix_testing import zoo

P = 4
CLOSE = {"rtol": 0, "atol": 2e-5}


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "400"})


def words(result):
    return " ".join(result.output.split())


def listing(folder):
    """Every file below a folder, and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A two-layer Llama in a folder, with a tokenizer of one word."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Long paths of temporary folders are not wrapped."""
    monkeypatch.setattr(console, "width", 400)


@pytest.fixture
def load(base):
    return lambda: AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture
def ids():
    return torch.tensor([[5, 17, 80, 3], [9, 2, 44, 61]])


@pytest.fixture
def theirs(load, tmp_path):
    """Makes adapters as PEFT saves them, and tells what PEFT computes with them."""

    def make(kind, folder, ids):
        made = peft.get_peft_model(
            load(),
            {
                "PREFIX_TUNING": peft.PrefixTuningConfig,
                "CARTRIDGE": peft.CartridgeConfig,
                "PROMPT_TUNING": peft.PromptTuningConfig,
                "P_TUNING": peft.PromptEncoderConfig,
            }[kind](task_type="CAUSAL_LM", num_virtual_tokens=P),
        ).eval()
        with torch.no_grad():
            for parameter in made.prompt_encoder.parameters():
                parameter.normal_(0, 0.5)
        made.save_pretrained(folder)
        return computed(made, ids)

    return make


def computed(model, ids):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


KINDS = ["PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING", "P_TUNING"]


@pytest.mark.parametrize("kind", KINDS)
def test_peft_to_file_and_back(theirs, load, base, ids, kind, tmp_path):
    expected = theirs(kind, tmp_path / "peft", ids)
    needs_base = ["--base", base] if kind in KINDS[2:] else []
    result = run(tmp_path / "peft", tmp_path / "kv.safetensors", *needs_base)
    assert result.exit_code == 0, result.output
    bare = load()
    with use_prefix(bare, PrefixKV.load(tmp_path / "kv.safetensors")):
        torch.testing.assert_close(bare(ids).logits, expected, **CLOSE)

    to = "CARTRIDGE" if kind == "CARTRIDGE" else "PREFIX_TUNING"
    result = run(tmp_path / "kv.safetensors", tmp_path / "back", "--to", to, "--base", base)
    assert result.exit_code == 0, result.output
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "back").eval()
    assert again.active_peft_config.peft_type == to
    assert again.active_peft_config.base_model_name_or_path == base
    torch.testing.assert_close(computed(again, ids), expected, **CLOSE)
    assert {path.name for path in tmp_path.iterdir()} == {"peft", "kv.safetensors", "back"}


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        ("PREFIX_TUNING", "CARTRIDGE"),
        ("CARTRIDGE", "PREFIX_TUNING"),
        ("P_TUNING", "PROMPT_TUNING"),
        ("PROMPT_TUNING", "P_TUNING"),
        ("PROMPT_TUNING", "PREFIX_TUNING"),
        ("P_TUNING", "CARTRIDGE"),
    ],
)
def test_peft_to_peft(theirs, load, base, ids, kind, to, tmp_path):
    expected = theirs(kind, tmp_path / "from", ids)
    result = run(tmp_path / "from", tmp_path / "to", "--to", to, "--base", base)
    assert result.exit_code == 0, result.output
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "to").eval()
    assert again.active_peft_config.peft_type == to
    torch.testing.assert_close(computed(again, ids), expected, **CLOSE)


@pytest.fixture
def many(theirs, ids, tmp_path):
    """A folder of adapters, files, and what is neither."""
    folder = tmp_path / "many"
    theirs("PREFIX_TUNING", folder / "a", ids)
    theirs("CARTRIDGE", folder / "deep" / "b.v1", ids)
    PrefixKV([torch.randn(2, P, 8)] * 1, [torch.randn(2, P, 8)], P).save(folder / "c.safetensors")
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "lora" / "adapter_model.safetensors").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(b"no such thing")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_folders_of_adapters(many, tmp_path):
    before = listing(many)
    result = run(many, tmp_path / "files")
    assert result.exit_code == 0, result.output
    assert set(listing(tmp_path / "files")) == {"a.safetensors", "deep/b.v1.safetensors"}
    for said in ("c.safetensors (fastprefix already)", "lora", "LORA", "model.safetensors (not a"):
        assert said in words(result)
    result = run(tmp_path / "files", tmp_path / "folders")
    assert result.exit_code == 0, result.output
    assert set(listing(tmp_path / "folders")) == {
        f"{name}/adapter_{file}"
        for name in ("a", "deep/b.v1")
        for file in ("config.json", "model.safetensors")
    }
    assert listing(many) == before


def test_a_dry_run_says_all_and_writes_nothing(many, tmp_path):
    before = listing(tmp_path)
    result = run(many, tmp_path / "files", "--dry-run")
    assert result.exit_code == 0, result.output
    for said in ("a dry run", "deep/b.v1.safetensors", "CARTRIDGE", "fastprefix", "new"):
        assert said in words(result)
    assert listing(tmp_path) == before
    assert not (tmp_path / "files").exists()


def test_nothing_is_replaced_without_force(theirs, many, ids, tmp_path):
    target = tmp_path / "files"
    target.mkdir()
    (target / "a.safetensors").write_text("mine")
    before = listing(tmp_path)
    for options in ([], ["--dry-run"]):
        result = run(many, target, *options)
        assert result.exit_code == 1
        assert "a.safetensors exists; --force replaces it" in words(result)
        assert listing(tmp_path) == before, "one that cannot be keeps all from being written"
    assert run(many, target, "--force", "--dry-run").exit_code == 0
    assert listing(tmp_path) == before
    assert run(many, target, "--force").exit_code == 0
    assert PrefixKV.load(target / "a.safetensors").num_virtual_tokens == P


def test_a_replaced_folder_keeps_its_other_files(theirs, ids, tmp_path):
    theirs("PREFIX_TUNING", tmp_path / "a", ids)
    theirs("CARTRIDGE", tmp_path / "b", ids)
    (tmp_path / "b" / "README.md").write_text("mine")
    result = run(tmp_path / "a", tmp_path / "b", "--to", "CARTRIDGE")
    assert result.exit_code == 1
    result = run(tmp_path / "a", tmp_path / "b", "--to", "CARTRIDGE", "--force")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "b" / "README.md").read_text() == "mine"
    files = listing(tmp_path)
    assert files["a/adapter_model.safetensors"][-64:] == files["b/adapter_model.safetensors"][-64:]
    assert json.loads(files["b/adapter_config.json"])["peft_type"] == "CARTRIDGE"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_what_a_killed_process_left_is_no_source(theirs, ids, tmp_path):
    theirs("PREFIX_TUNING", tmp_path / "many" / "a", ids)
    left = tmp_path / "many" / f".fastprefix-{'0' * 8}-1-{'0' * 32}.partial"
    theirs("PREFIX_TUNING", left / "half", ids)
    result = run(tmp_path / "many", tmp_path / "out", "--to", "fastprefix")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("to", ["fastprefix", "CARTRIDGE"])
def test_no_target_is_ever_half_written(theirs, ids, to, tmp_path, monkeypatch):
    theirs("PREFIX_TUNING", tmp_path / "a", ids)
    target = tmp_path / ("b.safetensors" if to == "fastprefix" else "b")

    def broken(tensors, file, metadata=None):
        with open(file, "wb") as opened:
            opened.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("fastprefix.files.safetensors_files.save_file", broken)
    before = listing(tmp_path)
    result = run(tmp_path / "a", target, "--to", to)
    assert result.exit_code == 1
    assert "disk full" in result.output
    assert listing(tmp_path) == before
    assert not target.exists()


def test_a_failed_swap_leaves_the_old_folder(theirs, ids, tmp_path, monkeypatch):
    theirs("PREFIX_TUNING", tmp_path / "a", ids)
    theirs("CARTRIDGE", tmp_path / "b", ids)

    def broken(old, new):
        raise OSError(5, "Input/output error")

    before = listing(tmp_path)
    monkeypatch.setattr(os, "rename", broken)
    result = run(tmp_path / "a", tmp_path / "b", "--to", "CARTRIDGE", "--force")
    assert result.exit_code == 1
    assert f"folder: {tmp_path / 'b'} cannot be written: Input/output error" in words(result)
    assert listing(tmp_path) == before


def bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=101,
        d_model=32,
        encoder_layers=4,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        forced_eos_token_id=None,
        decoder_start_token_id=0,
        init_std=0.2,
        dropout=0.0,
    )
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def test_an_encoder_decoder_needs_its_base(ids, tmp_path):
    bart().save_pretrained(tmp_path / "base")
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(bart(), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    result = run(tmp_path / "a", tmp_path / "kv.safetensors")
    assert result.exit_code == 1
    assert "takes --base" in words(result)
    result = run(tmp_path / "a", tmp_path / "kv.safetensors", "--base", tmp_path / "base")
    assert result.exit_code == 0, result.output
    bare = bart()
    with use_prefix(bare, PrefixKV.load(tmp_path / "kv.safetensors")):
        got = bare(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(got, theirs(input_ids=ids, decoder_input_ids=ids).logits, **CLOSE)


def test_what_cannot_be_is_refused_with_the_reason(load, base, tmp_path):
    kv = PrefixKV([torch.randn(2, P, 8)], [torch.randn(2, P, 8)], P)
    kv.save(tmp_path / "kv.safetensors")
    moved = PrefixKV([torch.randn(2, P, 8)], [torch.randn(2, P, 8)], 0)
    moved.save(tmp_path / "moved.safetensors")
    save_adapter(tmp_path / "headed", kv, {}, heads={"score.weight": torch.zeros(2, 3)})
    save_prompt(tmp_path / "prompt", torch.zeros(P, 32), {})
    save_prompt(tmp_path / "wide", torch.zeros(P, 33), {})
    PromptTuningModel(
        load(), PromptConfig(num_virtual_tokens=P, placement="infix")
    ).save_pretrained(tmp_path / "infix")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    before = listing(tmp_path)
    for source, target, options, said in (
        ("nowhere", "out", [], "does not exist"),
        ("empty", "out", [], "holds no prefix"),
        ("broken", "out.safetensors", [], "not JSON"),
        ("kv.safetensors", "out", ["--to", "LORA"], "--to: got 'LORA', takes one of fastprefix"),
        ("kv.safetensors", "out", ["--to", "P_TUNING"], "holds keys and values, which no P_TUNING"),
        ("kv.safetensors", "out.safetensors", ["--to", "fastprefix"], "fastprefix already"),
        ("kv.safetensors", "kv.safetensors", ["--force"], "is a source"),
        ("moved.safetensors", "out", [], "cannot be PREFIX_TUNING: the text behind its 4 tokens"),
        ("headed", "out.safetensors", [], "score.weight, trained beside it"),
        ("headed", "out", [], "takes the name of a .safetensors file"),
        ("prompt", "out.safetensors", [], "takes --base"),
        ("wide", "out.safetensors", ["--base", base], "33 wide, takes 32"),
        ("infix", "out.safetensors", ["--base", base], "infix, whose keys and values depend"),
    ):
        result = run(tmp_path / source, tmp_path / target, *options)
        assert result.exit_code == (2 if "LORA" in options else 1), (source, result.output)
        assert said in words(result), result.output
        assert "Traceback" not in result.output
        assert listing(tmp_path) == before, source


def test_a_base_whose_layers_share_keys(tmp_path):
    """Gemma 3n: a file of PEFT's holds numbers that its sharing layers never see."""
    model = zoo.kind("gemma3n", torch.float32, sliding_window=16)
    model.save_pretrained(tmp_path / "base")
    letters = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]").save_pretrained(
        tmp_path / "base"
    )
    shapes = [LayerShape(2, 16, 16)] * 4
    save_adapter(tmp_path / "theirs", tiny.kv_of_shapes(shapes, P, position_offset=P), {})
    done = run(tmp_path / "theirs", tmp_path / "kv.safetensors", "--base", tmp_path / "base")
    assert done.exit_code == 0, done.output
    kv = PrefixKV.load(tmp_path / "kv.safetensors")
    torch.testing.assert_close(kv.keys[2], kv.keys[0], rtol=0, atol=0)
    torch.testing.assert_close(kv.values[3], kv.values[1], rtol=0, atol=0)
    other = replace(kv, keys=(*kv.keys[:3], kv.keys[3] + 1))
    other.save(tmp_path / "other.safetensors")
    arguments = (tmp_path / "other.safetensors", tmp_path / "out", "--base", tmp_path / "base")
    refused = run(*arguments, "--to", "PREFIX_TUNING")
    assert refused.exit_code != 0
    assert "layer 3 sees the text's keys of layer 1" in words(refused)
