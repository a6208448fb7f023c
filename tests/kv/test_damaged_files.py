"""Files of prefixes that were cut short, or in which bits have flipped: refused, or equal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastprefix.kv import KVBudget, LayerState, PrefixBank, PrefixKV, Reweighting


def make(dtype: torch.dtype = torch.float32, P: int = 2) -> PrefixKV:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    return PrefixKV([draw(2, P, 4), draw(1, P, 3)], [draw(2, P, 2), draw(1, P, 3)], P + 4)


def kinds() -> dict[str, PrefixKV]:
    state = LayerState(3, {"conv.0": torch.randn(2, 3), "recurrent.0": torch.randn(4).bfloat16()})
    return {
        "learned": make(),
        "prompt": replace(make(torch.bfloat16), in_window=True),
        "8 bits": make(torch.float8_e4m3fn),
        "bias": replace(make(), reweighting=Reweighting("bias", [torch.randn(4), torch.randn(2)])),
        "gate": replace(make(), reweighting=Reweighting("gate", [torch.randn(2), torch.randn(2)])),
        "states": replace(make(), states=(state,)),
    }


def told(kv: PrefixKV) -> tuple:
    """All that a prefix is, to be compared."""
    kind = kv.reweighting and kv.reweighting.kind
    states = [(one.layer, list(one.tensors)) for one in kv.states or ()]
    tensors = [(x.dtype, x.shape, x.float().tolist()) for x in kv.tensors]
    return kv.position_offset, kv.in_window, kind, states, tensors


def places(content: bytes) -> list[int]:
    """16 lengths of a file that is cut short: in its first bytes, its header and its numbers."""
    header = 8 + int.from_bytes(content[:8], "little")
    size = len(content)
    within = [header * i // 8 for i in range(1, 7)]
    behind = [header + (size - header) * i // 5 for i in range(1, 5)]
    return [0, 1, 8, *within, header - 1, header, *behind, size - 1]


def flips(content: bytes) -> list[tuple[int, int]]:
    """Every byte of the header, and every fifth of the numbers, with a bit of it."""
    header = 8 + int.from_bytes(content[:8], "little")
    return [
        (place, (place * 5 + place // 8) % 8)
        for place in (*range(header), *range(header, len(content), 5))
    ]


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def check(file: Path, kv: PrefixKV) -> bool:
    """Loads a damaged file: whether it was refused, as it should be; if not, it must be equal."""
    try:
        found = PrefixKV.load(file)
    except ValueError as error:
        refused = str(error)
    else:
        assert told(found) == told(kv)
        return False
    assert refused.startswith(f"file: {file} ")
    assert "\n" not in refused
    return True


@pytest.mark.parametrize("kind", list(kinds()))
def test_cut_short(tmp_path, kind):
    file, kv = tmp_path / "kv.safetensors", kinds()[kind]
    kv.save(file)
    content = file.read_bytes()
    assert told(PrefixKV.load(file)) == told(kv)
    for keep in places(content):
        file.write_bytes(content[:keep])
        assert check(file, kv), keep
    file.write_bytes(content + b"\0")
    assert check(file, kv)


@pytest.mark.parametrize("kind", list(kinds()))
def test_a_bit_flips(tmp_path, kind):
    file, kv = tmp_path / "kv.safetensors", kinds()[kind]
    kv.save(file)
    content = file.read_bytes()
    equal = []
    for place, bit in flips(content):
        file.write_bytes(flipped(content, place, bit))
        if not check(file, kv):
            equal.append(content[place : place + 1])
    # only in the name under which the sha256 stands: such a file is one of those without
    assert len(equal) <= len("fastprefix-sha256")
    assert set(b"".join(equal)) <= set(b"fastprefix-sha256")


def test_files_without_a_sha256_still_load(tmp_path):
    """Those that were written before there was one."""
    for kind, kv in kinds().items():
        kv.save(tmp_path / "new")
        with safe_open(tmp_path / "new", "pt") as opened:
            metadata = opened.metadata()
        del metadata["fastprefix-sha256"]
        save_file(load_file(tmp_path / "new"), tmp_path / "old", metadata)
        assert told(PrefixKV.load(tmp_path / "old")) == told(kv), kind


def with_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ABOUT = {"num_layers": 1, "position_offset": 0, "in_window": False}


def one_layer(about: object = ABOUT, shape: object = (1, 1, 1), dtype: str = "F32", end: int = 4):
    tensor = {"dtype": dtype, "shape": shape}
    return {
        "__metadata__": {"format": "pt", "fastprefix-kv": json.dumps(about)},
        "layers.0.key": {**tensor, "data_offsets": [0, end]},
        "layers.0.value": {**tensor, "data_offsets": [end, 2 * end]},
    }


CRAFTED = {
    "sound": with_header(one_layer(), bytes(8)),
    "a header longer than memory": with_header(one_layer(), bytes(8), 2**63),
    "a header longer than the file": with_header(one_layer(), bytes(8), 10_000),
    "a header of 17 MiB": with_header(b" " * (17 * 2**20)),
    "negative sizes": with_header(one_layer(shape=(-1, 1, -1)), bytes(8)),
    "sizes whose product overflows": with_header(one_layer(shape=(2**62, 4, 1)), bytes(8)),
    "sizes beyond the file": with_header(one_layer(shape=(2**20, 2**10, 2**3), end=2**35)),
    "sizes of text": with_header(one_layer(shape=("1", 1, 1)), bytes(8)),
    "another type": with_header(one_layer(dtype="PICKLE"), bytes(8)),
    "integers": with_header(one_layer(dtype="I32"), bytes(8)),
    "offsets that overlap": with_header(
        {**one_layer(), "layers.0.value": one_layer()["layers.0.key"]}, bytes(4)
    ),
    "more layers than there are": with_header(one_layer({**ABOUT, "num_layers": 10**15}), bytes(8)),
    "less than no layers": with_header(one_layer({**ABOUT, "num_layers": -1}), bytes(8)),
    "a half layer": with_header(one_layer({**ABOUT, "num_layers": 0.5}), bytes(8)),
    "a place of text": with_header(one_layer({**ABOUT, "position_offset": "9" * 99}), bytes(8)),
    "a place before the start": with_header(one_layer({**ABOUT, "position_offset": -1}), bytes(8)),
    "states of no layer": with_header(one_layer({**ABOUT, "states": [[0, ["x"]]]}), bytes(8)),
    "states of another kind": with_header(one_layer({**ABOUT, "states": 7}), bytes(8)),
    "another reweighting": with_header(one_layer({**ABOUT, "reweighting": "exec"}), bytes(8)),
    "a list": with_header(one_layer([ABOUT]), bytes(8)),
    "no metadata": with_header({"layers.0.key": one_layer()["layers.0.key"]}, bytes(4)),
    "nothing": b"",
    "JSON": b'{"num_layers": 1}',
}


@pytest.mark.parametrize("what", list(CRAFTED))
def test_crafted_files(tmp_path, what):
    file = tmp_path / "kv.safetensors"
    file.write_bytes(CRAFTED[what])
    if what == "sound":
        assert PrefixKV.load(file).num_virtual_tokens == 1
        return
    with pytest.raises(ValueError, match=r"^file: .*kv\.safetensors is not a whole PrefixKV file"):
        PrefixKV.load(file)
    for reader in (lambda: KVBudget(100, tmp_path), lambda: PrefixBank.load(tmp_path)):
        # an opened budget reads only headers
        if what in ("integers", "another reweighting") or "place" in what or "states" in what:
            continue
        with pytest.raises(ValueError, match=r"kv\.safetensors is not a whole PrefixKV file"):
            reader()


def test_deep_nesting(tmp_path):
    file = tmp_path / "kv.safetensors"
    metadata = {"fastprefix-kv": "[" * 100_000}
    save_file({"layers.0.key": torch.zeros(1, 1, 1)}, file, metadata)
    with pytest.raises(ValueError, match="nested too deeply"):
        PrefixKV.load(file)


def test_an_index_of_a_budget(tmp_path):
    """Priorities and pins, cut short or with flipped bits."""
    budget = KVBudget(10_000, tmp_path)
    budget.put("a", make(), priority=1)
    budget.put("b", make(), priority=4, pinned=True)
    index = tmp_path / "index.json"
    content = index.read_bytes()

    def state() -> list[tuple]:
        found = KVBudget(10_000, tmp_path)
        return [(n, found._entries[n].priority, found._entries[n].pinned) for n in found]

    sound = [("a", 1, False), ("b", 4, True)]
    assert state() == sound
    refused = 0
    damaged = [content[: len(content) * i // 17] for i in range(16)]
    damaged += [flipped(content, i, i % 8) for i in range(len(content))]
    for one in damaged:
        index.write_bytes(one)
        try:
            found = state()
        except ValueError as error:
            told_so = str(error)
        else:
            assert found == sound, one
            continue
        assert told_so.startswith(f"folder: {index} does not hold priorities and pins")
        refused += 1
    # but for spaces that became other white space
    assert refused > len(damaged) - content.count(b" ") - content.count(b"\n")
    with pytest.raises(ValueError, match="does not hold priorities and pins"):
        budget.put("a", make())  # nor does a budget that is open write over it
    index.write_bytes(content)
    for name in ("priority", "pinned", "prefixes", "sha256"):  # words of the index itself
        budget.put(name, make(), priority=9)
    assert KVBudget(10_000, tmp_path)._entries["b"].pinned
    for name in ("priority", "pinned", "prefixes", "sha256"):
        assert KVBudget(10_000, tmp_path)._entries[name].priority == 9
        budget.remove(name)
    index.write_text(json.dumps({"a": {"priority": 1, "pinned": False}}))  # of an older version
    assert state() == [("a", 1, False), ("b", 0, False)]


def test_a_prefix_that_was_damaged_on_the_disk_is_not_handed_out(tmp_path):
    kv = make()
    budget = KVBudget(10_000, tmp_path)
    budget.put("a", kv)
    budget.put("b", kv)
    budget.evict("a")
    file = tmp_path / "a.safetensors"
    content = file.read_bytes()
    file.write_bytes(flipped(content, len(content) - 3, 2))
    with pytest.raises(ValueError, match=r"a\.safetensors .*damaged"):
        budget.get("a")
    assert told(budget.get("b")) == told(kv), "the others are not touched"
    budget.put("a", kv)
    assert told(budget.get("a")) == told(kv)


@pytest.mark.parametrize("names", [("a%2Fb", "a%2fb"), ("ü", "%C3%BC"), ("a", "%61")])
def test_two_files_of_one_name(tmp_path, names):
    for name in names:
        make().save(tmp_path / f"{name}.safetensors")
    for reader in (lambda: KVBudget(10_000, tmp_path), lambda: PrefixBank.load(tmp_path)):
        with pytest.raises(ValueError, match=r"^folder: .* both for the prefix .*takes one of"):
            reader()


def test_a_file_that_somebody_named_keeps_its_name(tmp_path):
    """A budget would call it otherwise; a second file of the prefix would be ambiguous."""
    make().save(tmp_path / "ü.safetensors")
    budget = KVBudget(10_000, tmp_path)
    kv = make()
    budget.put("ü", kv)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["ü.safetensors"]
    assert told(KVBudget(10_000, tmp_path).get("ü")) == told(kv)
