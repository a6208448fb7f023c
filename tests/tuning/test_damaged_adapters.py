"""Adapters whose files were cut short, damaged or mixed up: refused, or equal to what was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastprefix.formats.peft_prefixes import load_adapter, save_adapter
from fastprefix.formats.peft_prompts import load_prompt, save_prompt
from fastprefix.kv import PrefixKV, Reweighting

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# What the loaded adapter does not depend on.
FREE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "revision"}
KINDS = ("PREFIX_TUNING", "CARTRIDGE", "ours", "PROMPT_TUNING", "P_TUNING", "FASTPREFIX_INFIX")


def heads() -> dict[str, torch.Tensor]:
    return {"score.weight": torch.randn(2, 3), "score.steps": torch.tensor([4])}


def save(folder: Path, kind: str, *, P: int = 3, safe: bool = True, frozen: int = 2) -> None:
    config = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    if kind in KINDS[3:]:
        save_prompt(
            folder, torch.randn(P, 4), config, kind=kind, heads=heads(), safe_serialization=safe
        )
        return
    kv = PrefixKV([torch.randn(1, P, 2)] * 2, [torch.randn(1, P, 2)] * 2, P)
    if kind == "ours":
        bias = Reweighting("bias", [torch.randn(2), torch.randn(2)])
        kv = PrefixKV(kv.keys, kv.values, P + 1, reweighting=bias)
        kind = "CARTRIDGE"
    config["num_frozen_tokens"] = frozen
    save_adapter(folder, kv, config, kind=kind, heads=heads(), safe_serialization=safe)


def told(folder: Path, kind: str) -> tuple:
    """All that loading gives, to be compared."""
    if kind in KINDS[3:]:
        found = load_prompt(folder)
        numbers = [found.embeddings.tolist()]
    else:
        found = load_adapter(folder)
        kv = found.kv
        numbers = [x.tolist() for x in kv.tensors]
        numbers += [kv.position_offset, kv.in_window, kv.reweighting and kv.reweighting.kind]
    config = {name: value for name, value in found.config.items() if name not in FREE}
    return numbers, {n: x.tolist() for n, x in sorted(found.heads.items())}, config


def check(folder: Path, kind: str, sound: tuple, file: Path) -> bool:
    """Whether a damaged adapter is refused, as it should be; if not, it must be equal."""
    try:
        found = told(folder, kind)
    except ValueError as error:
        refused = str(error)
    else:
        assert found[:2] == sound[:2]
        assert {name: found[2][name] for name in sound[2]} == sound[2]
        return False
    assert str(file) in refused
    assert "\n" not in refused
    return True


@pytest.fixture(params=["safetensors", "bin"])
def safe(request):
    return request.param == "safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_cut_short(tmp_path, kind, safe):
    save(tmp_path, kind, safe=safe)
    sound = told(tmp_path, kind)
    for file in [path for path in tmp_path.iterdir() if path.name != CONFIG] + [tmp_path / CONFIG]:
        content = file.read_bytes()
        for place in range(16):
            keep = min(place, 2) if place < 3 else len(content) * place // 16
            file.write_bytes(content[:keep])
            assert check(tmp_path, kind, sound, file), (file, keep)
        file.write_bytes(content[:-2])  # of JSON one line break may go
        assert check(tmp_path, kind, sound, file)
        file.write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_flips(tmp_path, kind, safe):
    save(tmp_path, kind, safe=safe)
    sound = told(tmp_path, kind)
    refused = 0
    for file in list(tmp_path.iterdir()):
        content = file.read_bytes()
        step = 2 if file.name == CONFIG else 5 if file.suffix == ".safetensors" else 23
        for place in range(0, len(content), step):
            changed = bytearray(content)
            changed[place] ^= 1 << (place // step % 8)
            file.write_bytes(changed)
            refused += check(tmp_path, kind, sound, file)
        file.write_bytes(content)
    assert refused > 100
    assert told(tmp_path, kind) == sound


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_mixture_of_two_savings(tmp_path, kind, safe):
    """The configuration of one, the weights of the other, of the same shapes."""
    save(tmp_path / "old", kind, frozen=2, safe=safe)
    save(tmp_path / "new", kind, frozen=1, safe=safe)
    shutil.copy(tmp_path / "new" / CONFIG, tmp_path / "old" / CONFIG)
    if kind == "PREFIX_TUNING":  # whose configuration has no such field
        assert told(tmp_path / "old", kind)[2]["num_frozen_tokens"] == 2
        return
    name = WEIGHTS if safe else BIN
    with pytest.raises(ValueError, match=rf"{CONFIG}: got num_frozen_tokens 1, takes 2, .*{name}"):
        told(tmp_path / "old", kind)


def test_what_a_person_may_change(tmp_path):
    save(tmp_path, "CARTRIDGE")
    sound = told(tmp_path, "CARTRIDGE")
    config = json.loads((tmp_path / CONFIG).read_text())
    config |= {"base_model_name_or_path": "their/model", "revision": "main", "of_theirs": 1}
    config["num_layers"] = None
    (tmp_path / CONFIG).write_text(json.dumps({**config, "num_layers": 2}))
    found = told(tmp_path, "CARTRIDGE")
    assert found[:2] == sound[:2]
    config["token_dim"] = 3
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="got token_dim 3, takes 2"):
        told(tmp_path, "CARTRIDGE")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_before_still_load(tmp_path, kind):
    """Without a sha256, and without the configuration in the weights' metadata."""
    save(tmp_path, kind)
    sound = told(tmp_path, kind)
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        del metadata["fastprefix-sha256"]
        if "fastprefix" in metadata:
            about = json.loads(metadata["fastprefix"])
            del about["config"]
            metadata["fastprefix"] = json.dumps(about)
        save_file(load_file(file), file, metadata)
    assert told(tmp_path, kind) == sound


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_virtual_tokens": "x" * 10**6}, "got num_virtual_tokens 'xxx"),
        ({"num_virtual_tokens": [3]}, "got num_virtual_tokens"),
        ({"num_virtual_tokens": -3}, "num_virtual_tokens"),
        ({"num_transformer_submodules": 10**30}, "num_.* 1000000"),
        ({"num_layers": 10**12}, "num_layers 1000000000000"),
        ({"num_layers": -2}, "num_layers -2"),
        ({"num_layers": 0.5}, "num_layers 0.5"),
        ({"token_dim": 10**12}, "token_dim 1000000000000"),
        ({"token_dim": True}, "got token_dim True"),
        ({"num_attention_heads": 10**9}, "num_attention_heads 1000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"task_type": ["CAUSAL_LM"]}, "got task_type"),
        ({"modules_to_save": "score"}, "got modules_to_save"),
        ({"modules_to_save": [1]}, "got modules_to_save"),
        ({"peft_type": ["PREFIX_TUNING"]}, "got peft_type"),
        ({"peft_type": {"PREFIX_TUNING": 1}}, "got peft_type"),
        ({"num_frozen_tokens": "2"}, "got num_frozen_tokens '2'"),
    ],
)
@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_crafted_configurations(tmp_path, kind, fields, said):
    """PEFT's weights do not say what belongs there. The sizes in the file are not trusted."""
    save(tmp_path, kind)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"format": "pt"})
    config = json.loads((tmp_path / CONFIG).read_text())
    if kind == "PROMPT_TUNING" and {"num_layers", "token_dim", "num_attention_heads"} & {*fields}:
        fields = {name: str(value) for name, value in fields.items()}  # read by nobody, but checked
        said = next(iter(fields))
    (tmp_path / CONFIG).write_text(json.dumps({**config, **fields}))
    with pytest.raises(ValueError, match=rf"{CONFIG}: .*{said}") as caught:
        told(tmp_path, kind)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [b"[" * 10**6, b"1" * 10**6, b"{}" * 9 * 2**20, b'{"a": ' * 10**5, b"\0", b"\xff\xfe", b"NaN"],
    ids=["lists", "digits", "18 MiB", "objects", "NUL", "UTF-16", "NaN"],
)
def test_configurations_that_no_parser_should_see(tmp_path, text):
    save(tmp_path, "PREFIX_TUNING")
    (tmp_path / CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=CONFIG) as caught:
        load_adapter(tmp_path)
    assert "\n" not in str(caught.value)
