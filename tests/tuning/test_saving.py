"""save_pretrained, from_pretrained and push_to_hub with PEFT's arguments, and model cards."""

import json
import pickle
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel

P = 4
CONFIG, SAFE, BIN, CARD = (
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"),
)
KINDS = {
    "PREFIX_TUNING": (PrefixTuningModel, PrefixConfig(P, init_std=1.0)),
    "CARTRIDGE": (
        PrefixTuningModel,
        PrefixConfig(P, init_std=1.0, peft_type="CARTRIDGE", num_frozen_tokens=1),
    ),
    "PROMPT_TUNING": (PromptTuningModel, PromptConfig(P, init_std=1.0)),
    "P_TUNING": (PromptTuningModel, PromptConfig(P, encoder_reparameterization_type="MLP")),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def build(kind):
    wrapper, config = KINDS[kind]
    torch.manual_seed(3)
    return wrapper(tiny.build("llama"), config).eval()


@pytest.fixture
def tuned(kind):
    return build(kind)


@pytest.fixture
def prefixed():
    return build("PREFIX_TUNING")


def names(folder):
    return {file.name for file in Path(folder).iterdir()}


def classifier():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    loud = {"vocab_size": 97, "num_attention_heads": 4, "initializer_range": 0.2}
    return BertForSequenceClassification(BertConfig(**sizes, **loud)).eval()


def test_only_the_main_process_writes(tuned, tmp_path):
    folder = tmp_path / "adapter"
    tuned.save_pretrained(folder, is_main_process=False)
    assert not folder.exists()
    tuned.save_pretrained(save_directory=folder, is_main_process=True)
    assert names(folder) == {CONFIG, SAFE, CARD}


def test_every_process_makes_the_prefix_of_its_share(prefixed, tmp_path, monkeypatch):
    """Under FSDP making it is a collective: a process that left it out would hang the others."""
    made = []
    export = type(prefixed).export
    monkeypatch.setattr(
        type(prefixed), "export", lambda self, *name: made.append(name) or export(self, *name)
    )
    prefixed.save_pretrained(tmp_path, is_main_process=False)
    assert made == [("default",)]
    assert names(tmp_path) == set()


def test_what_save_pretrained_does_not_take(tuned, tmp_path):
    folder = tmp_path / "adapter"
    with pytest.raises(TypeError, match="got selected_adapter, did you mean selected_adapters"):
        tuned.save_pretrained(folder, selected_adapter=["default"])
    with pytest.raises(TypeError, match="got max_shard_size, takes save_directory, safe_serial"):
        tuned.save_pretrained(folder, max_shard_size="1GB")
    with pytest.raises(ValueError, match="push_to_hub: got True, takes False"):
        tuned.save_pretrained(folder, push_to_hub=True)
    with pytest.raises(ValueError, match="selected_adapters: got 'b', takes one of"):
        tuned.save_pretrained(folder, selected_adapters=["b"])
    assert not folder.exists()
    folder.write_text("mine")
    with pytest.raises(ValueError, match="save_directory: got the file"):
        tuned.save_pretrained(folder)
    assert folder.read_text() == "mine"


def test_adapters_as_second_argument_still(prefixed, tmp_path):
    prefixed.add_adapter("b", PrefixConfig(3))
    prefixed.save_pretrained(tmp_path, ["b"])
    assert names(tmp_path) == {"b", CARD}


def test_bin_files_come_back(tuned, tmp_path):
    tuned.save_pretrained(tmp_path)
    tuned.save_pretrained(tmp_path, safe_serialization=False)
    assert names(tmp_path) == {CONFIG, BIN, CARD}, "the older file, which PEFT would read, is gone"
    again = type(tuned).from_pretrained(tiny.build("llama"), tmp_path)
    ids, mask = tiny.batch()
    with torch.no_grad():
        assert torch.equal(again(ids, mask).logits, tuned(ids, mask).logits)
    if isinstance(tuned, PrefixTuningModel):
        assert again.prefix_config.num_frozen_tokens == tuned.prefix_config.num_frozen_tokens
        assert again.export().in_window == tuned.export().in_window
    tuned.save_pretrained(tmp_path)
    assert names(tmp_path) == {CONFIG, SAFE, CARD}


def test_bin_files_with_heads(tmp_path):
    config = PrefixConfig(P, task_type="SEQ_CLS", init_std=1.0)
    tuned = PrefixTuningModel(classifier(), config).eval()
    with torch.no_grad():
        tuned.adapter_heads["default"].classifier.weight.mul_(3)
    tuned.save_pretrained(tmp_path, safe_serialization=False)
    again = PrefixTuningModel.from_pretrained(classifier(), tmp_path)
    ids = torch.randint(3, 97, (2, 6))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, tuned(ids).logits)


@pytest.mark.peft
def test_peft_reads_our_bin_files(tuned, tmp_path):
    tuned.save_pretrained(tmp_path, safe_serialization=False)
    theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()
    ids, mask = tiny.batch(side="right")
    with torch.no_grad():
        got = theirs(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
        expected = tuned(ids, mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_we_read_peft_s_bin_files(kind, tmp_path):
    torch.manual_seed(0)
    config = peft.get_peft_config(
        {"peft_type": kind, "num_virtual_tokens": P, "task_type": "CAUSAL_LM"}
    )
    theirs = peft.get_peft_model(tiny.build("llama"), config)
    theirs.save_pretrained(str(tmp_path / "bin"), safe_serialization=False)
    theirs.save_pretrained(str(tmp_path / "safe"))
    assert {BIN, SAFE} & names(tmp_path / "bin") == {BIN}
    wrapper = KINDS[kind][0]
    ids, mask = tiny.batch()
    results = []
    for folder in ("bin", "safe"):
        loaded = wrapper.from_pretrained(tiny.build("llama"), tmp_path / folder)
        with torch.no_grad():
            results.append(loaded(ids, mask).logits)
    assert torch.equal(*results)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.mark.parametrize("harm", ["code", "code in zip", "cut", "list", "empty"])
def test_bad_bin_files_are_refused_and_run_nothing(prefixed, tmp_path, harm):
    folder, mark = tmp_path / "adapter", tmp_path / "ran"
    prefixed.save_pretrained(folder, safe_serialization=False)
    file, bomb = folder / BIN, Bomb()
    bomb.mark = str(mark)
    if harm == "code":
        file.write_bytes(pickle.dumps({"prompt_embeddings": bomb}))
    elif harm == "code in zip":
        torch.save({"prompt_embeddings": torch.zeros(4, 8), "base_model.x": bomb}, file)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-300])
    elif harm == "list":
        torch.save([torch.zeros(2)], file)
    else:
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: got "):
        PrefixTuningModel.from_pretrained(tiny.build("llama"), folder)
    assert not mark.exists()


def test_a_card_says_how_to_load_it(prefixed, tmp_path):
    prefixed.base_model.name_or_path = "some/llama"
    prefixed.base_model.add_model_tags(["mine"])
    prefixed.add_adapter("b", PrefixConfig(3))
    prefixed.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.base_model == "some/llama"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert {"fastprefix", "prefix-tuning", "mine"} <= set(card.data.tags)
    assert "base_model:adapter:some/llama" in card.data.tags
    code = card.text.split("```python\n")[1].split("```")[0]
    code = code.replace("this repository or folder", str(tmp_path))
    load = 'LlamaForCausalLM.from_pretrained("some/llama")'
    assert load in code
    scope = {"tiny": tiny}
    exec(code.replace(load, 'tiny.build("llama")'), scope)
    assert list(scope["tuned"].peft_config) == ["default", "b"]


def test_a_card_of_an_adapter_in_a_sub_folder_alone(prefixed, tmp_path):
    prefixed.add_adapter("b", PrefixConfig(3))
    prefixed.add_adapter("c", PrefixConfig(2))
    prefixed.set_adapter("b")
    prefixed.delete_adapter("default")
    prefixed.save_pretrained(tmp_path)
    code = ModelCard.load(tmp_path / CARD).text.split("```python\n")[1].split("```")[0]
    scope = {"model": tiny.build("llama"), "PrefixTuningModel": PrefixTuningModel}
    lines = [line for line in code.splitlines() if line.startswith("tuned")]
    exec("\n".join(lines).replace("this repository or folder", str(tmp_path)), scope)
    assert [x.num_virtual_tokens for x in scope["tuned"].peft_config.values()] == [3, 2]


def test_a_base_from_a_folder_is_not_named(prefixed, tmp_path):
    prefixed.base_model.name_or_path = str(tmp_path)
    prefixed.save_pretrained(tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / CARD).data.base_model is None


def test_formats_of_ours_are_not_called_peft_s(tmp_path):
    gated = PrefixTuningModel(tiny.build("llama"), PrefixConfig(P, gated=True))
    plain = build("PREFIX_TUNING")
    for tuned, library in ((gated, "fastprefix"), (plain, "peft"), (gated, "fastprefix")):
        tuned.save_pretrained(tmp_path)
        assert ModelCard.load(tmp_path / CARD).data.library_name == library


def test_a_card_that_is_there_keeps_its_words(prefixed, tmp_path):
    text = "\n# Mine\r\nNot yours: é.\n"
    (tmp_path / CARD).write_bytes(
        f"---\nlicense: mit\ntags:\n- own\npipeline_tag: summarization\n---\n{text}".encode()
    )
    prefixed.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert (tmp_path / CARD).read_bytes().decode().endswith(text)
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "summarization"
    assert {"own", "fastprefix"} <= set(card.data.tags)
    before = (tmp_path / CARD).read_bytes()
    prefixed.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_bytes() == before


def test_a_card_that_cannot_be_read_is_left(prefixed, tmp_path):
    broken = b"---\ntags: [unclosed\n---\n# Mine\n"
    (tmp_path / CARD).write_bytes(broken)
    with pytest.warns(UserWarning, match=r"README\.md: left as it is"):
        prefixed.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_bytes() == broken
    assert {CONFIG, SAFE} < names(tmp_path)


@pytest.fixture
def uploaded(tmp_path, monkeypatch):
    """The hub's client with a folder in place of the hub; calls and what was uploaded."""
    calls, remote = [], tmp_path / "remote"
    remote.mkdir()

    class Made:
        repo_id = "me/adapter"

    def create_repo(self, repo_id, **options):
        calls.append(("create_repo", repo_id, options))
        return Made

    def create_branch(self, repo_id, **options):
        calls.append(("create_branch", repo_id, options))

    def upload_folder(self, *, folder_path, **options):
        for file in Path(folder_path).iterdir():
            (remote / file.name).write_bytes(file.read_bytes())
        calls.append(("upload_folder", options.pop("repo_id"), options))
        return "commit"

    def download(repo_id, file, **options):
        calls.append(("download", repo_id, options))
        if not (remote / file).exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("none")
        return str(remote / file)

    for function in (create_repo, create_branch, upload_folder):
        monkeypatch.setattr(huggingface_hub.HfApi, function.__name__, function)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls, remote


def test_push_to_hub_uploads_the_adapter_alone(tuned, uploaded):
    calls, remote = uploaded
    commit = tuned.push_to_hub("adapter", private=True, token="secret", tags=["mine"])
    assert commit == "commit"
    assert names(remote) == {CONFIG, SAFE, CARD}
    assert calls[0] == (
        *("create_repo", "adapter"),
        {"private": True, "token": "secret", "exist_ok": True},
    )
    what, repository, options = calls[-1]
    assert (what, repository) == ("upload_folder", "me/adapter")
    assert options["token"] == "secret"
    assert options["commit_message"] == "Upload adapter"
    assert "mine" in ModelCard.load(remote / CARD).data.tags
    again = type(tuned).from_pretrained(tiny.build("llama"), "me/adapter", token="secret")
    ids, mask = tiny.batch()
    with torch.no_grad():
        assert torch.equal(again(ids, mask).logits, tuned(ids, mask).logits)


def test_push_to_hub_keeps_the_card_that_is_there(prefixed, uploaded):
    calls, remote = uploaded
    (remote / CARD).write_text("# Mine\n")
    prefixed.push_to_hub("me/adapter", revision="dev", create_pr=True, safe_serialization=False)
    assert (remote / CARD).read_text().endswith("# Mine\n")
    assert names(remote) == {CONFIG, BIN, CARD}
    assert ("create_branch", "me/adapter", {"branch": "dev", "token": None, "exist_ok": True}) in (
        calls
    )
    assert calls[-1][2]["revision"] == "dev"
    assert calls[-1][2]["create_pr"] is True
    with pytest.raises(TypeError, match="push_to_hub: got privat, did you mean private"):
        prefixed.push_to_hub("me/adapter", privat=True)


def test_downloads_get_what_the_caller_named(prefixed, tmp_path, monkeypatch):
    prefixed.save_pretrained(tmp_path / "sub")
    asked = []

    def download(repo_id, file, **options):
        asked.append((repo_id, options))
        path = tmp_path / options["subfolder"] / file
        if not path.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("none")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    given = {"subfolder": "sub", "revision": "v1", "token": "t", "cache_dir": "c"}
    loaded = PrefixTuningModel.from_pretrained(tiny.build("llama"), "me/adapter", **given)
    assert all(call == ("me/adapter", given) for call in asked)
    loaded.load_adapter("me/adapter", "again", **given)
    for name in ("default", "again"):
        assert torch.equal(loaded.export(name).keys[0], prefixed.export().keys[0])


def test_sub_folders_of_a_folder(tuned, tmp_path):
    tuned.save_pretrained(tmp_path / "a" / "b")
    type(tuned).from_pretrained(tiny.build("llama"), tmp_path, subfolder="a/b")
    with pytest.raises(FileNotFoundError, match=r"c: no adapter_config\.json in this folder"):
        type(tuned).from_pretrained(tiny.build("llama"), tmp_path, subfolder="c")


def test_arguments_of_peft_s_from_pretrained(tuned, kind, tmp_path):
    tuned.save_pretrained(tmp_path)
    options = {"torch_device": "cpu", "low_cpu_mem_usage": True}
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    loaded = type(tuned).from_pretrained(
        tiny.build("llama"), model_id=tmp_path, config=config, is_trainable=False, **options
    )
    ids, mask = tiny.batch()
    with torch.no_grad():
        assert torch.equal(loaded(ids, mask).logits, tuned(ids, mask).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.active_peft_config.inference_mode
    positional = type(tuned).from_pretrained(tiny.build("llama"), tmp_path, "default", True)
    assert any(p.requires_grad for p in positional.parameters())
    assert not positional.active_peft_config.inference_mode


def test_from_pretrained_refuses_what_it_cannot_honour(prefixed, tmp_path):
    prefixed.save_pretrained(tmp_path)

    def load(**options):
        return PrefixTuningModel.from_pretrained(tiny.build("llama"), tmp_path, **options)

    for config, message in [
        (PrefixConfig(5), r"config\.num_virtual_tokens: got 5, takes 4 as in"),
        (PrefixConfig(P, peft_type="CARTRIDGE"), r"config\.peft_type: got 'CARTRIDGE', takes 'PRE"),
        (PrefixConfig(P, task_type="SEQ_CLS"), r"config\.task_type: got 'SEQ_CLS', takes 'CAUSAL"),
        (PrefixConfig(P, gated=True), r"config\.gated: got True, takes False as in"),
        (peft.PrefixTuningConfig(num_virtual_tokens=9), r"config\.num_virtual_tokens: got 9"),
        (peft.LoraConfig(), r"config: got LoraConfig of peft_type 'LORA', takes 'PREFIX_TUNING' o"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(config=config)
    with pytest.raises(TypeError, match="config: got dict, takes a PrefixConfig or PEFT's"):
        load(config={"num_virtual_tokens": P})
    with pytest.raises(TypeError, match="config: got PromptConfig, takes a PrefixConfig"):
        load(config=PromptConfig(P))
    with pytest.raises(ValueError, match="torch_device: got 'gpu7', takes a device"):
        load(torch_device="gpu7")
    with pytest.raises(TypeError, match="low_cpu_mem_usage: got 'yes', takes True or False"):
        load(low_cpu_mem_usage="yes")
    with pytest.raises(TypeError, match="from_pretrained: got is_trainble, did you mean is_train"):
        load(is_trainble=True)
    assert load(config=PrefixConfig(P, dropout=0.5)).prefix_config.dropout == 0.5


def test_weights_are_whole_or_as_they_were(prefixed, tmp_path, monkeypatch):
    prefixed.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def broken(*_, **__):
        raise OSError("no space left on device")

    for name, safe in (
        ("fastprefix.files.safetensors_files.save_file", True),
        ("torch.save", False),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, broken)
            with pytest.raises(OSError, match="no space"):
                prefixed.save_pretrained(tmp_path, safe_serialization=safe)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert json.loads(before[CONFIG])["peft_type"] == "PREFIX_TUNING"
    assert load_file(tmp_path / SAFE)["prompt_embeddings"].shape[0] == P
