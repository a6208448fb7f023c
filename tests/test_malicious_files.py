"""Files that somebody made to run code, to take all memory, or to reach out of their folder.

Whatever reads a file of ours is given pickles that would leave a canary behind.
"""

from __future__ import annotations

import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import KVBudget, PrefixBank, PrefixConfig, PrefixKV, PrefixTuningModel
from fastprefix.cli.convert import run_conversion
from fastprefix.formats.peft_prefixes import load_adapter, save_adapter
from fastprefix.formats.peft_prompts import load_prompt, save_prompt
from fastprefix.tasks import load_examples
from fastprefix.tuning.peft_base import load_base_adapter
from training.runs import known

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KV_FILE = "prefix_kv.safetensors"


class _Canary:
    """Pickled, it is a call that makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


class _Import:
    """Pickled, it is a call of a builtin that imports."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({str(self.place)!r})",)


def pickles(canary: Path) -> dict[str, bytes]:
    """What a caller of pickle.load, or of an unguarded torch.load, would run."""
    made: dict[str, bytes] = {}
    folder = canary.parent / "made"
    folder.mkdir()
    for name, one in (("call", _Canary(canary)), ("eval", _Import(canary))):
        weights = {"prompt_embeddings": torch.zeros(2, 8), "extra": one}
        made[f"pickle, {name}"] = pickle.dumps(weights)
        torch.save(weights, folder / "zip")
        made[f"torch, {name}"] = (folder / "zip").read_bytes()
        torch.save(weights, folder / "old", _use_new_zipfile_serialization=False)
        made[f"old torch, {name}"] = (folder / "old").read_bytes()
    code = f"import os; os.mkdir({str(canary)!r})"
    with zipfile.ZipFile(folder / "code.zip", "w") as archive:
        archive.writestr("__main__.py", code)
        archive.writestr("../../outside.txt", "planted")
    made["zip of code"] = (folder / "code.zip").read_bytes()
    (folder / "code.py").write_text(code)
    with tarfile.open(folder / "code.tar", "w") as tar:
        tar.add(folder / "code.py", "../outside.py")
    made["tar"] = (folder / "code.tar").read_bytes()
    made["code"] = code.encode()
    return made


def test_the_canary_works(tmp_path):
    """What the others are safe from is real."""
    for i, name in enumerate(("pickle, call", "torch, eval", "old torch, call")):
        here = tmp_path / str(i)
        here.mkdir()
        (here / "file").write_bytes(pickles(here / "canary")[name])
        if name.startswith("pickle"):
            pickle.loads((here / "file").read_bytes())
        else:
            torch.load(here / "file", weights_only=False)
        assert (here / "canary").is_dir(), name


def adapter(folder: Path, kind: str, safe: bool = True) -> None:
    if kind == "PROMPT_TUNING":
        save_prompt(folder, torch.randn(2, 8), {}, safe_serialization=safe)
        return
    x = torch.randn(1, 2, 2)
    kv = PrefixKV([x, x], [x, x], 2 if kind == "PREFIX_TUNING" else 5)
    heads = None if kind == "PREFIX_TUNING" else {"score.weight": torch.zeros(2)}
    save_adapter(folder, kv, {}, heads=heads, safe_serialization=safe)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "ours", "PROMPT_TUNING"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_pickles_in_place_of_an_adapters_files(tmp_path, kind, safe):
    load = load_prompt if kind == "PROMPT_TUNING" else load_adapter
    canary = tmp_path / "canary"
    for what, content in pickles(canary).items():
        for name in (CONFIG, WEIGHTS if safe else BIN, KV_FILE):
            folder = tmp_path / f"{what} as {name}"
            adapter(folder, kind, safe)
            if not (folder / name).exists():
                continue
            load(folder)
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=name) as caught:
                load(folder)
            assert "\n" not in str(caught.value), what
            assert not canary.exists(), what
    assert not list(tmp_path.rglob("outside*"))


def test_pickles_in_place_of_other_files(tmp_path, monkeypatch):
    """In place of a prefix, a budget, a folder to convert, records, results and tuned tiles."""
    from fastprefix.kernels import target
    from fastprefix.kernels.tuning import store

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    tiles = store.save("GPU", "a", target.Tile(64, 32, 4, 2))
    folder = tmp_path / "prefixes"
    x = torch.randn(1, 2, 2)
    KVBudget(10**6, folder).put("a", PrefixKV([x], [x], 2))
    canary = tmp_path / "canary"
    readers = {
        folder / "a.safetensors": [
            PrefixKV.load,
            lambda _: KVBudget(10**6, folder),
            lambda _: PrefixBank.load(folder),
            lambda file: run_conversion(file, tmp_path / "out", None, None, "float32", False, True),
        ],
        folder / "index.json": [lambda _: KVBudget(10**6, folder)],
        **{
            tmp_path / f"records{suffix}": [
                lambda file: load_examples("descriptions", data_files={"train": file})
            ]
            for suffix in (".jsonl", ".txt", ".csv", ".json", ".parquet")
        },
        tmp_path / "result.json": [lambda file: known(file, "x")],
        tiles: [lambda _: store.load("GPU", target.Tile)],
    }
    for what, content in pickles(canary).items():
        for file, readings in readers.items():
            sound = file.read_bytes() if file.exists() else None
            file.write_bytes(content)
            for read in readings:
                with pytest.raises(ValueError, match=file.name):
                    read(file)
                assert not canary.exists(), (what, file)
            if sound is not None:
                file.write_bytes(sound)
    assert not (tmp_path / "out").exists()


def test_pickles_in_an_adapter_inside_the_base(tmp_path):
    canary = tmp_path / "canary"
    model = tiny.build()
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for what, content in pickles(canary).items():
        folder = tmp_path / what / "base_model"
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(json.dumps(lora))
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match=WEIGHTS):
            load_base_adapter(model, folder, is_trainable=False)
        assert not canary.exists(), what
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=CONFIG):
        load_base_adapter(model, folder, is_trainable=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "planted"},
        {"peft_type": "XLORA", "adapters": {"0": "/etc"}, "hidden_size": 64},
    ],
    ids=["a module to import", "other folders"],
)
def test_a_configuration_inside_the_base_that_names_others(tmp_path, monkeypatch, fields):
    (tmp_path / "planted.py").write_text("import os; os.mkdir('canary')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "adapter" / "base_model"
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **fields}
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{CONFIG}: got (megatron_config|adapters) .*outside"):
        load_base_adapter(tiny.build(), folder, is_trainable=False)
    assert not (tmp_path / "canary").exists()


def test_configurations_that_name_other_paths(tmp_path, monkeypatch):
    """The prefix is that of the folder; nothing that the configuration names is opened."""
    adapter(tmp_path / "adapter", "PREFIX_TUNING")
    expected = load_adapter(tmp_path / "adapter").kv.keys[0]
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    config |= {
        "base_model_name_or_path": "../../etc/passwd",
        "revision": "../../x",
        "auto_mapping": {"base_model_class": "X", "parent_library": "planted"},
        "init_weights": "/etc/passwd",
        "weights_file": "/etc/passwd",
    }
    del config["init_weights"]
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    (tmp_path / "planted.py").write_text("import os; os.mkdir('canary')")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_adapter(tmp_path / "adapter").kv.keys[0], expected)
    assert not (tmp_path / "canary").exists()


NAMES = [
    "../x",
    "..",
    "/absolute",
    "a/b",
    "a\\b",
    "C:\\x",
    "a.b",
    "NUL\0",
    "",
    "x" * 256,
    "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 86,
    "\ud800",
    "base_model",
]


def test_names_of_adapters(tmp_path):
    """None leads out of the folder; the same word in two Unicode forms is two names."""
    tuned = PrefixTuningModel(tiny.build(), PrefixConfig(2))
    adapter(tmp_path / "theirs", "PREFIX_TUNING")
    for name in NAMES:
        with pytest.raises(ValueError, match="adapter_name: got") as caught:
            tuned.add_adapter(name, PrefixConfig(2))
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="adapter_name: got"):
            PrefixTuningModel(tiny.build(), PrefixConfig(2), adapter_name=name)
    assert list(tuned.encoders) == ["default"]
    taken = [
        "x" * 255,
        "CON",
        " ",
        "~",
        "$HOME",
        "\N{LATIN SMALL LETTER U WITH DIAERESIS}",
        "u\N{COMBINING DIAERESIS}",
    ]
    for i, name in enumerate(taken):
        tuned.add_adapter(name, PrefixConfig(2 + i))
    tuned.save_pretrained(tmp_path / "deep" / "adapters")
    found = {path.name for path in (tmp_path / "deep" / "adapters").iterdir() if path.is_dir()}
    assert found == set(taken)
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "theirs"}
    for i, name in enumerate(taken):
        kv = load_adapter(tmp_path / "deep" / "adapters" / name).kv
        assert kv.num_virtual_tokens == 2 + i


def test_saving_follows_no_link_out_of_the_folder(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS, KV_FILE):
        (folder / name).symlink_to(outside / "mine")
    adapter(folder, "ours")
    assert (outside / "mine").read_text() == "mine"
    assert [path.name for path in outside.iterdir()] == ["mine"]
    load_adapter(folder)


def test_a_claim_that_a_saving_was_not_ended(tmp_path):
    """A folder from elsewhere with such a sub-folder moves nothing but its own files."""
    adapter(tmp_path / "adapter", "PREFIX_TUNING")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / WEIGHTS).write_text("mine")
    name = f".fastprefix-{'0' * 8}-1-{'0' * 32}.whole"
    (tmp_path / "adapter" / name).symlink_to(outside)
    load_adapter(tmp_path / "adapter")
    assert (outside / WEIGHTS).read_text() == "mine"
