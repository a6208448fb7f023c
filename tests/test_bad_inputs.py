"""What people get wrong, over the public API: each is one line that says which argument it is.

"argument: got X, takes Y": the message names the argument, what it got and what it takes.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fastprefix_testing.models as tiny
from fastprefix import (
    KVBudget,
    PrefixBank,
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
    patch_model,
    prefix_attention,
    use_prefix,
)
from fastprefix.kv import (
    LayerState,
    PackedPrefixKV,
    Reweighting,
    concatenate,
    interpolate,
    orthogonality_penalty,
    plan_kv_bytes,
)
from fastprefix.tasks import get_task, load_examples
from fastprefix.tuning.callbacks import (
    PrefixMonitor,
    ProgressiveLayers,
    ProgressiveLength,
    StopOnCollapse,
)

T = torch.zeros(2, 5, 4)
KV = PrefixKV((T,), (T,), 5)
OTHER = PrefixKV((torch.zeros(2, 3, 4),), (torch.zeros(2, 3, 4),), 3)
IDS = torch.ones(2, 3, dtype=torch.long)


def attend(**changes):
    """The operator with B 2, Hq 4, Hkv 2, Lq 3, Lk 5, P 6, D 8, but for the changes."""
    good = {
        "query": torch.randn(2, 4, 3, 8),
        "key": torch.randn(2, 2, 5, 8),
        "value": torch.randn(2, 2, 5, 8),
        "prefix_key": torch.randn(2, 6, 8),
        "prefix_value": torch.randn(2, 6, 8),
    }
    return prefix_attention(**{**good, **changes})


def block(model, kv, **options):
    """A forward in a use_prefix block."""
    with use_prefix(model, kv, **options):
        model(input_ids=IDS)


# argument, what it got, what it takes (parts of the message, in this order), error, call
OPERATOR = [
    ("query", "list", "a torch.Tensor", TypeError, lambda: attend(query=[[1.0]])),
    ("key", "ndarray", "a torch.Tensor", TypeError, lambda: attend(key=np.zeros((2, 2, 5, 8)))),
    ("value", "NoneType", "a torch.Tensor", TypeError, lambda: attend(value=None)),
    ("query", "[4, 3, 8]", "[B, Hq, Lq, D]", ValueError,
     lambda: attend(query=torch.zeros(4, 3, 8))),
    ("query", "3 heads", "multiple", ValueError, lambda: attend(query=torch.randn(2, 3, 3, 8))),
    ("query", "torch.int64", "float", TypeError,
     lambda: attend(query=torch.ones(2, 4, 3, 8, dtype=torch.long))),
    ("key", "meta", "cpu", ValueError, lambda: attend(key=torch.ones(2, 2, 5, 8, device="meta"))),
    ("prefix_key", "torch.float16", "torch.float32", TypeError,
     lambda: attend(prefix_key=torch.randn(2, 6, 8).half())),
    ("prefix_key, prefix_value", "one", "both or neither", ValueError,
     lambda: attend(prefix_value=None)),
    ("prefix_key", "[2, 6, 9]", "[2, 6, 8]", ValueError,
     lambda: attend(prefix_key=torch.randn(2, 6, 9))),
    ("key_padding_mask", "torch.int64", "torch.bool", TypeError,
     lambda: attend(key_padding_mask=torch.ones(2, 5, dtype=torch.long))),
    ("key_padding_mask", "[2, 11]", "[2, 5]", ValueError,
     lambda: attend(key_padding_mask=torch.ones(2, 11, dtype=torch.bool))),
    ("attn_mask", "[2, 4, 3, 11]", "[2, 4, 3, 5]", ValueError,
     lambda: attend(attn_mask=torch.zeros(2, 4, 3, 11))),
    ("is_causal", "'False'", "True or False", TypeError, lambda: attend(is_causal="False")),
    ("return_lse", "None", "True or False", TypeError, lambda: attend(return_lse=None)),
    ("scale", "'big'", "a number", TypeError, lambda: attend(scale="big")),
    ("scale", "nan", "finite", ValueError, lambda: attend(scale=float("nan"))),
    ("dropout_p", "'0.1'", "a number", TypeError, lambda: attend(dropout_p="0.1")),
    ("dropout_p", "1.0", "dropout_p < 1", ValueError, lambda: attend(dropout_p=1.0)),
    ("softcap", "'30'", "a number", TypeError, lambda: attend(softcap="30")),
    ("softcap", "-1.0", "above 0", ValueError, lambda: attend(softcap=-1.0)),
    ("sliding_window", "bool", "an int", TypeError, lambda: attend(sliding_window=True)),
    ("sliding_window", "float", "an int", TypeError, lambda: attend(sliding_window=2.0)),
    ("sliding_window", "0", "1 or more", ValueError, lambda: attend(sliding_window=0)),
    ("sinks", "[2]", "[4]", ValueError, lambda: attend(sinks=torch.zeros(2))),
    ("prefix_index", "list", "a torch.Tensor", TypeError,
     lambda: attend(prefix_index=[0, 0], prefix_lengths=torch.tensor([6]))),
    ("cu_seqlens", "batch size 2", "1", ValueError,
     lambda: attend(cu_seqlens=torch.tensor([0, 3]))),
    ("backend", "'cuda'", "'composed'", ValueError, lambda: attend(backend="cuda")),
]  # fmt: skip

PREFIXES = [
    ("keys", "None", "tensor", TypeError, lambda: PrefixKV(None, (T,), 5)),
    ("keys[0]", "ndarray", "tensor", TypeError, lambda: PrefixKV((T.numpy(),), (T,), 5)),
    ("keys[0]", "torch.int64", "floating", TypeError, lambda: PrefixKV((T.long(),), (T,), 5)),
    ("keys, values", "1 and 2", "same number", ValueError, lambda: PrefixKV((T,), (T, T), 5)),
    ("values[0]", "[2, 4, 4]", "Hkv", ValueError, lambda: PrefixKV((T,), (T[:, :4],), 5)),
    ("values[0]", "meta", "cpu", ValueError, lambda: PrefixKV((T,), (T.to("meta"),), 5)),
    ("position_offset", "'5'", "whole number", TypeError, lambda: PrefixKV((T,), (T,), "5")),
    ("position_offset", "True", "whole number", TypeError, lambda: PrefixKV((T,), (T,), True)),
    ("position_offset", "-1", "0 or more", ValueError, lambda: PrefixKV((T,), (T,), -1)),
    ("in_window", "'no'", "True or False", TypeError, lambda: PrefixKV((T,), (T,), 5, "no")),
    ("reweighting", "'bias'", "Reweighting", TypeError,
     lambda: PrefixKV((T,), (T,), 5, reweighting="bias")),
    ("states", "str", "LayerState", TypeError, lambda: PrefixKV((T,), (T,), 5, states=["conv"])),
    ("states", "-1", "from 0", ValueError, lambda: LayerState(-1, {"conv.0": T})),
    ("kind", "'biased'", "'gate'", ValueError, lambda: Reweighting("biased", (T[0, 0],))),
    ("heads[0]", "list", "float32", TypeError, lambda: Reweighting("bias", ([0.0],))),
    ("dtype", "'float16'", "torch.dtype", TypeError, lambda: KV.to(dtype="float16")),
    ("device", "'gpu'", "'cpu'", ValueError, lambda: KV.to("gpu")),
    ("index", "1", "0 to 0", IndexError, lambda: KV.layer(1)),
    ("layers", "7", "0 to 0", IndexError, lambda: KV.select([7])),
    ("file", "None", "a path", TypeError, lambda: PrefixKV.load(None)),
    ("file", "7", "a path", TypeError, lambda: KV.save(7)),
    ("kvs[1]", "'b'", "PrefixKV", TypeError, lambda: interpolate([KV, "b"], [0.5, 0.5])),
    ("kvs", "dict", "list", TypeError, lambda: interpolate({"a": KV}, [1.0])),
    ("kvs[1]", "lengths [3]", "[5]", ValueError, lambda: interpolate([KV, OTHER], [0.5, 0.5])),
    ("weights", "'1'", "a number", TypeError, lambda: interpolate([KV], ["1"])),
    ("weights", "[0.5, nan]", "sum to 1", ValueError,
     lambda: interpolate([KV, KV], [0.5, float("nan")])),
    ("method", "'mean'", "'linear'", ValueError, lambda: interpolate([KV], [1.0], "mean")),
    ("kvs", "none", "at least one", ValueError, lambda: concatenate([])),
    ("kvs", "PrefixKV", "list", TypeError, lambda: orthogonality_penalty(KV)),
    ("kv", "Tensor", "PrefixKV", TypeError, lambda: PackedPrefixKV.pack({"a": T})),
    ("num_virtual_tokens, batch_size", "-1", "0 or more", ValueError,
     lambda: plan_kv_bytes(KV.shapes, {"a": -1}, torch.float32)),
]  # fmt: skip


def in_a_bank(use):
    """A bank of one prefix, with what a case does to it."""
    bank = PrefixBank()
    bank.add("a", KV)
    return lambda: use(bank)


BANKS = [
    ("budget", "1024", "KVBudget", TypeError, lambda: PrefixBank(1024)),
    ("kv", "Tensor", "PrefixKV", TypeError, in_a_bank(lambda bank: bank.add("b", T))),
    ("name", "int", "text", TypeError, in_a_bank(lambda bank: bank.add(1, KV))),
    ("name", "''", "not empty", ValueError, in_a_bank(lambda bank: bank.add("", KV))),
    ("priority, pinned", "1", "0 and False", ValueError,
     in_a_bank(lambda bank: bank.add("b", KV, priority=1))),
    ("rows", "'a'", "each row", TypeError, in_a_bank(lambda bank: bank.select("a"))),
    ("rows", "'b'", "['a']", ValueError, in_a_bank(lambda bank: bank.select(["b"]))),
    ("weights", "['a']", "dict", TypeError, in_a_bank(lambda bank: bank.interpolate(["a"]))),
    ("names", "'a'", "list", TypeError, in_a_bank(lambda bank: bank.concatenate("a"))),
    ("folder", "None", "a path", TypeError, in_a_bank(lambda bank: bank.save(None))),
    ("max_bytes", "'1GB'", "whole number", TypeError, lambda: KVBudget("1GB", "f")),
    ("max_bytes", "1.5", "whole number", TypeError, lambda: KVBudget(1.5, "f")),
    ("max_bytes", "True", "whole number", TypeError, lambda: KVBudget(True, "f")),
    ("max_bytes", "-1", "0 or more", ValueError, lambda: KVBudget(-1, "f")),
    ("device", "'gpu'", "'cpu'", ValueError, lambda: KVBudget(1, "f", "gpu")),
    ("folder", "None", "a folder", ValueError, lambda: KVBudget(1)),
    ("folder", "7", "a path", TypeError, lambda: KVBudget(1, 7)),
]  # fmt: skip


def configured(kind, **fields):
    return lambda: kind(**fields)


CONFIGS = [
    *[
        case
        for kind in (PrefixConfig, PromptConfig)
        for case in (
            ("num_virtual_tokens", "'20'", "whole number", TypeError, {"num_virtual_tokens": "20"}),
            ("num_virtual_tokens", "2.5", "whole number", TypeError, {"num_virtual_tokens": 2.5}),
            ("num_virtual_tokens", "True", "whole number", TypeError, {"num_virtual_tokens": True}),
            ("num_virtual_tokens", "None", "whole number", TypeError, {"num_virtual_tokens": None}),
            ("num_virtual_tokens", "0", "1 or more", ValueError, {"num_virtual_tokens": 0}),
            ("task_type", "'CAUSAL'", "'CAUSAL_LM'", ValueError, {"task_type": "CAUSAL"}),
            ("init", "'txt'", "'text'", ValueError, {"init": "txt"}),
            ("init_text", "None", "a text", ValueError, {"init": "text"}),
            ("init_text", "['a']", "a text", TypeError, {"init": "text", "init_text": ["a"]}),
            ("init_std", "'0'", "a number", TypeError, {"init_std": "0"}),
            ("init_std", "nan", "0 or more", ValueError, {"init_std": float("nan")}),
            ("modules_to_save", "'score'", "list", TypeError, {"modules_to_save": "score"}),
        )
        for case in [(*case[:4], configured(kind, **case[4]))]
    ],
    ("dropout", "1.5", "dropout < 1", ValueError, lambda: PrefixConfig(dropout=1.5)),
    ("dropout", "'0.1'", "a number", TypeError, lambda: PrefixConfig(dropout="0.1")),
    ("gated", "'yes'", "True or False", TypeError, lambda: PrefixConfig(gated="yes")),
    ("layers", "'0,1'", "integers", TypeError, lambda: PrefixConfig(layers="0,1")),
    ("layers", "2", "integers", TypeError, lambda: PrefixConfig(layers=2)),
    ("layers", "[0, 0]", "once", ValueError, lambda: PrefixConfig(layers=[0, 0])),
    ("layer_lengths", "[1, 2]", "longest", ValueError, lambda: PrefixConfig(layer_lengths=[1, 2])),
    ("groups", "'decoder'", "some of", TypeError, lambda: PrefixConfig(groups="decoder")),
    ("groups", "['middle']", "some of", ValueError, lambda: PrefixConfig(groups=["middle"])),
    ("num_frozen_tokens", "20", "fewer", ValueError, lambda: PrefixConfig(num_frozen_tokens=20)),
    ("position_offset", "1.5", "None", TypeError, lambda: PrefixConfig(position_offset=1.5)),
    ("encoder_num_layers", "4", "1 to 3", ValueError,
     lambda: PrefixConfig(prefix_projection=True, encoder_num_layers=4)),
    ("encoder_num_layers", "3", "prefix_projection=True", ValueError,
     lambda: PrefixConfig(encoder_num_layers=3)),
    ("prefix_bias", "'learnt'", "'learned'", ValueError,
     lambda: PrefixConfig(prefix_bias="learnt")),
    ("peft_type", "'LORA'", "'CARTRIDGE'", ValueError, lambda: PrefixConfig(peft_type="LORA")),
    ("fallback", "'copy'", "'expand'", ValueError, lambda: PrefixConfig(fallback="copy")),
    ("placement", "'middle'", "'infix'", ValueError, lambda: PromptConfig(placement="middle")),
    ("encoder_dropout", "1.0", "under 1", ValueError,
     lambda: PromptConfig(encoder_reparameterization_type="LSTM", encoder_dropout=1.0)),
    ("step", "0", "1 or more", ValueError, lambda: ProgressiveLength(0, 8)),
    ("maximum", "'8'", "whole number", TypeError, lambda: ProgressiveLength(1, "8")),
    ("threshold", "'0.1'", "a number", TypeError, lambda: ProgressiveLength(1, 8, "0.1")),
    ("factor", "1.0", "more than 1", ValueError, lambda: StopOnCollapse(1.0)),
    ("patience", "2.0", "whole number", TypeError, lambda: StopOnCollapse(patience=2.0)),
    ("first", "'middle'", "'last'", ValueError, lambda: ProgressiveLayers(2, first="middle")),
    ("batch", "Tensor", "dict", TypeError, lambda: PrefixMonitor(T)),
    ("split", "'heldout'", "'test'", ValueError, lambda: load_examples("bbc", "heldout")),
    ("task", "None", "a Task", TypeError, lambda: get_task(None)),
]  # fmt: skip


@pytest.fixture(scope="module")
def world():
    """Models, and prefixes that fit them or do not."""
    model = tiny.build("llama")
    tuned = PrefixTuningModel(tiny.build("llama"), PrefixConfig(num_virtual_tokens=2)).eval()
    prompt = PromptTuningModel(tiny.build("llama"), PromptConfig(num_virtual_tokens=2)).eval()
    infix = PromptConfig(num_virtual_tokens=2, placement="infix")
    return SimpleNamespace(
        model=model,
        kv=tuned.export(),
        tuned=tuned,
        prompt=prompt,
        infix=PromptTuningModel(tiny.build("llama"), infix).eval(),
        vocabulary=model.config.vocab_size,
        fresh=lambda: tiny.build("llama"),
    )


MODELS = [
    ("model", "'gpt2'", "PreTrainedModel", TypeError, lambda w: patch_model("gpt2")),
    ("model", "Linear", "PreTrainedModel", TypeError, lambda w: patch_model(nn.Linear(2, 2))),
    ("backend", "'flash'", "'triton'", ValueError, lambda w: patch_model(w.model, "flash")),
    ("backend", "None", "'triton'", ValueError, lambda w: patch_model(w.model, None)),
    ("fallback", "'copy'", "'expand'", ValueError,
     lambda w: patch_model(w.model, fallback="copy")),
    ("example", "Tensor", "keyword arguments", TypeError,
     lambda w: patch_model(w.model, example=IDS)),
    ("check", "'no'", "True or False", TypeError, lambda w: patch_model(w.model, check="no")),
    ("kv", "str", "PrefixKV", TypeError, lambda w: block(w.model, "prompt.safetensors")),
    ("kv", "1 layers", "3", ValueError, lambda w: block(w.model, KV)),
    ("rows", "'ab'", "each row", TypeError, lambda w: block(w.model, {"ab": w.kv}, rows="ab")),
    ("rows", "None", "each row", ValueError, lambda w: block(w.model, {"a": w.kv})),
    ("rows", "names", "several by name", ValueError,
     lambda w: block(w.model, w.kv, rows=["a", "b"])),
    ("rows", "'b'", "['a']", ValueError,
     lambda w: block(w.model, {"a": w.kv}, rows=["a", "b"])),
    ("model", "'gpt2'", "PreTrainedModel", TypeError, lambda w: PrefixKV.prefill("gpt2", IDS[:1])),
    ("input_ids", "'Hello'", "from_text", TypeError, lambda w: PrefixKV.prefill(w.model, "Hello")),
    ("input_ids", "torch.float32", "token ids", ValueError,
     lambda w: PrefixKV.prefill(w.model, IDS[:1].float())),
    ("input_ids", "[2, 3]", "one prompt", ValueError, lambda w: PrefixKV.prefill(w.model, IDS)),
    ("input_ids", "[1, 0]", "P at least 1", ValueError, lambda w: PrefixKV.prefill(w.model, [])),
    ("input_ids", "100000", "vocabulary", ValueError,
     lambda w: PrefixKV.prefill(w.model, [1, 100000])),
    ("input_ids, inputs_embeds", "neither", "one of them", TypeError,
     lambda w: PrefixKV.prefill(w.model)),
    ("text", "['a']", "one text", TypeError,
     lambda w: PrefixKV.from_text(w.model, lambda text: {}, ["a"])),
    ("tokenizer", "None", "tokenizer", TypeError,
     lambda w: PrefixKV.from_text(w.model, None, "a")),
    ("model", "'gpt2'", "PreTrainedModel", TypeError,
     lambda w: PrefixTuningModel("gpt2", PrefixConfig())),
    ("model", "Linear", "PreTrainedModel", TypeError,
     lambda w: PromptTuningModel(nn.Linear(2, 2), PromptConfig())),
    ("config", "dict", "PrefixConfig", TypeError,
     lambda w: PrefixTuningModel(w.fresh(), {"num_virtual_tokens": 2})),
    ("config", "PrefixConfig", "PromptConfig", TypeError,
     lambda w: PromptTuningModel(w.fresh(), PrefixConfig())),
    ("tokenizer", "None", "the model's", ValueError,
     lambda w: PrefixTuningModel(w.fresh(), PrefixConfig(init="text", init_text="a"))),
    ("tokenizer", "'gpt2'", "the model's", TypeError,
     lambda w: PrefixTuningModel(w.fresh(), PrefixConfig(init="text", init_text="a"), "gpt2")),
    ("layers", "9", "0 to", ValueError,
     lambda w: PrefixTuningModel(w.fresh(), PrefixConfig(layers=[9]))),
    ("adapter_name", "'a.b'", "a name", ValueError,
     lambda w: w.tuned.add_adapter("a.b", PrefixConfig())),
    ("adapter_name", "7", "a name", TypeError, lambda w: w.tuned.add_adapter(7, PrefixConfig())),
    ("adapter_name", "'default'", "a new name", ValueError,
     lambda w: w.tuned.add_adapter("default", PrefixConfig())),
    ("adapter_name", "'cook'", "['default']", ValueError, lambda w: w.tuned.set_adapter("cook")),
    ("prefix_names", "'default'", "each row", TypeError,
     lambda w: w.tuned(input_ids=IDS, prefix_names="default")),
    ("prefix_names", "3 names", "2", ValueError,
     lambda w: w.tuned(input_ids=IDS, prefix_names=["default", None, None])),
    ("prefix_names", "'cook'", "['default']", ValueError,
     lambda w: w.tuned.generate(input_ids=IDS, prefix_names=["cook", None])),
    ("input_ids", "'Hello'", "a tensor", TypeError, lambda w: w.tuned(input_ids="Hello")),
    ("attention_mask", "list", "a tensor", TypeError,
     lambda w: w.prompt(input_ids=IDS, attention_mask=[[1] * 30] * 2)),
    ("input_ids, inputs_embeds", "neither", "one of them", ValueError, lambda w: w.prompt()),
    ("infix_positions", "None", "[B] = [2]", ValueError, lambda w: w.infix(input_ids=IDS)),
    ("infix_positions", "[9, 9]", "real tokens", ValueError,
     lambda w: w.infix(input_ids=IDS, infix_positions=torch.tensor([9, 9]))),
    ("infix_positions", "Tensor", "None", ValueError,
     lambda w: w.prompt(input_ids=IDS, infix_positions=torch.tensor([1, 1]))),
]  # fmt: skip


def check(argument, got, takes, error, call):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert caught.type is error, f"{caught.type.__name__}: {message}"
    assert "\n" not in message
    assert re.fullmatch(
        rf"{re.escape(argument)}: got .*{re.escape(got)}.*takes .*{re.escape(takes)}.*", message
    ), message


def names(cases):
    return [f"{argument}, {got}" for argument, got, *_ in cases]


@pytest.mark.parametrize("case", OPERATOR, ids=names(OPERATOR))
def test_the_operator(case):
    check(*case)


@pytest.mark.parametrize("case", PREFIXES, ids=names(PREFIXES))
def test_prefixes(case):
    check(*case)


@pytest.mark.parametrize("case", BANKS, ids=names(BANKS))
def test_banks_and_budgets(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(*case)


@pytest.mark.parametrize("case", CONFIGS, ids=names(CONFIGS))
def test_configurations_callbacks_and_tasks(case):
    check(*case)


@pytest.mark.parametrize("case", MODELS, ids=names(MODELS))
def test_models(case, world):
    *told, call = case
    check(*told, lambda: call(world))
    assert torch.isfinite(world.tuned(input_ids=IDS).logits).all()  # nothing was left half done


def test_budgets_of_prefixes(tmp_path):
    budget = KVBudget(10**6, tmp_path / "folder")
    budget.put("a", KV, pinned=True)
    learned = PrefixKV((T.clone().requires_grad_(),), (T,), 5)
    check("kv", "Tensor", "PrefixKV", TypeError, lambda: budget.put("b", T))
    check("kv", "gradients", "kv.detach()", ValueError, lambda: budget.put("b", learned))
    check("name", "NoneType", "text", TypeError, lambda: budget.put(None, KV))
    check("priority", "'high'", "number", TypeError, lambda: budget.put("b", KV, priority="high"))
    check("pinned", "'no'", "True or False", TypeError, lambda: budget.put("b", KV, pinned="no"))
    check("name", "'a'", "unpin", ValueError, lambda: budget.evict("a"))
    file = tmp_path / "file"
    file.write_text("")
    check("folder", "file", "a folder", NotADirectoryError, lambda: KVBudget(1, file))
    empty = tmp_path / "empty"
    empty.mkdir()
    check("folder", "empty", "PrefixBank.save", FileNotFoundError, lambda: PrefixBank.load(empty))
    assert list(budget) == ["a"]


def test_there_are_enough_of_them():
    cases = [*OPERATOR, *PREFIXES, *BANKS, *CONFIGS, *MODELS]
    assert len({(argument, got) for argument, got, *_ in cases}) >= 60
