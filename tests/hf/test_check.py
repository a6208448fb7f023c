"""Models are held to what they computed before: strangers that differ are refused, by what they do.

The strangers are Llamas whose attention layers were changed; nothing in the library knows them.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixKV, PrefixTuningModel, patch_model, use_prefix
from fastprefix.hf import UnsupportedModelError, is_patched
from fastprefix.hf.checking import check_prefix as checks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Attention(LlamaAttention):
    """Llama's own, in parts that strangers change."""

    passes_kwargs = True

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        out = self.attend(query, key, value, attention_mask, kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None

    def attend(self, query, key, value, mask, kwargs) -> Tensor:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        handed = kwargs if self.passes_kwargs else {}
        out: Tensor = function(
            self, query, key, value, mask, scaling=self.scaling, dropout=0.0, **handed
        )[0]
        return out


class MaskOfValues(Attention):
    """Keys count by what their values are, which the layer adds to the mask it was given."""

    def attend(self, query, key, value, mask, kwargs):
        Lq, Lk = query.shape[2], key.shape[2]
        if mask is None:
            mask = torch.ones(1, 1, Lq, Lk, dtype=torch.bool).tril(Lk - Lq)
        elif mask.dim() == 2:
            mask = mask[:, None, None] & torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq)
        weight = value.float().mean((1, 3))[:, None, None].to(query.dtype)  # [B, 1, 1, Lk]
        bias = (4 * weight).masked_fill(~mask.bool(), torch.finfo(query.dtype).min)
        return super().attend(query, key, value, bias, kwargs)


class Twice(Attention):
    """What a first attention found is added to the queries of a second."""

    def attend(self, query, key, value, mask, kwargs):
        first = super().attend(query, key, value, mask, kwargs)
        return super().attend(query + first.transpose(1, 2), key, -value, mask, kwargs)


class NoKeywords(Attention):
    """Keyword arguments end here."""

    passes_kwargs = False


class BySdpa(Attention):
    """Halves its scores where it does not know the implementation."""

    def attend(self, query, key, value, mask, kwargs):
        known = self.config._attn_implementation in ("sdpa", "eager")
        return super().attend(query if known else query / 2, key, value, mask, kwargs)


class SaysBoth(Attention):
    """Says that it is causal only where it knows the implementation; its mask always is."""

    def attend(self, query, key, value, mask, kwargs):
        known = self.config._attn_implementation == "sdpa"
        return super().attend(query, key, value, mask, {**kwargs, "is_causal": known})


class Stateful(LlamaDecoderLayer):
    """Adds the mean of all that it has seen, which no key or value holds."""

    def forward(self, hidden_states, *args: Any, **kwargs: Any):
        out = super().forward(hidden_states, *args, **kwargs)
        hidden = out if isinstance(out, Tensor) else out[0]
        count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        hidden = hidden + 0.5 * (hidden_states.cumsum(1) / count).to(hidden.dtype)
        return hidden if isinstance(out, Tensor) else (hidden, *out[1:])


def stranger(kind: type[nn.Module], dtype: torch.dtype = torch.float32):
    model = tiny.build("llama").to(dtype)
    for layer in model.model.layers:
        if issubclass(kind, LlamaDecoderLayer):
            layer.__class__ = kind
        else:
            layer.self_attn.__class__ = kind
    return model


def use(model, **kwargs: Any) -> None:
    """All that a caller may do with a prompt."""
    kv = PrefixKV.prefill(model, tiny.prompt(), **kwargs)
    with use_prefix(model, kv, **kwargs):
        model(tiny.prompt(5, seed=2))


def all_right(model) -> bool:
    front, ids = tiny.prompt(), tiny.prompt(5, seed=2)
    with torch.no_grad():
        want = model(torch.cat([front, ids], 1)).logits[:, front.shape[1] :]
        with use_prefix(model, PrefixKV.prefill(model, front)):
            got = model(ids).logits
    return torch.allclose(got.float(), want.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (MaskOfValues, "with a prefix"),
        (NoKeywords, "did not receive the keyword arguments"),
        (BySdpa, "without a prefix"),
        (Stateful, "not all that it keeps of a prompt"),
    ],
)
def test_strangers_are_refused_by_what_they_do(kind, reason, dtype):
    model = stranger(kind, dtype)
    with pytest.raises(UnsupportedModelError, match=reason):
        use(model)
    assert not is_patched(model)
    with pytest.raises(UnsupportedModelError, match=reason):  # and again, from memory
        use(model)


@pytest.mark.parametrize("kind", [Twice, SaysBoth])
def test_other_strangers_are_right(kind):
    """Attention called twice has two slots; masks are causal as they are made, not as is said."""
    assert all_right(stranger(kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("range_", [0.02, 0.15])
def test_the_same_layers_unchanged_are_not_refused(dtype, range_):
    model = tiny.build("llama", initializer_range=range_).to(dtype)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Attention
    use(model)


@pytest.mark.parametrize("kind", [MaskOfValues, Stateful])
def test_learned_prefixes_ask_for_keys_and_values_alone(kind):
    model = stranger(kind)
    config = PrefixConfig(num_virtual_tokens=4)
    if kind is Stateful:
        PrefixTuningModel(model, config)(tiny.prompt())
        return
    with pytest.raises(UnsupportedModelError, match="with a prefix"):
        PrefixTuningModel(model, config)
    assert not is_patched(model)


def test_the_check_can_be_switched_off():
    model = stranger(Stateful)
    use(model, check=False)
    assert not all_right_unchecked(model)
    patch_model(stranger(BySdpa), check=False)
    PrefixTuningModel(stranger(MaskOfValues), PrefixConfig(), check=False)


def all_right_unchecked(model) -> bool:
    front, ids = tiny.prompt(), tiny.prompt(5, seed=2)
    kv = PrefixKV.prefill(model, front, check=False)
    with torch.no_grad():
        want = model(torch.cat([front, ids], 1)).logits[:, front.shape[1] :]
        with use_prefix(model, kv, check=False):
            return torch.allclose(model(ids).logits, want, rtol=1e-3, atol=1e-4)


def forwards(model: nn.Module) -> list[int]:
    """Counts the forwards of a model from now on."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    model.register_forward_pre_hook(add)
    return count


def test_a_model_is_checked_once():
    model = tiny.build("llama")
    use(model)
    count = forwards(model.model)
    patch_model(model)
    kv = PrefixKV.prefill(model, tiny.prompt())
    assert count == [1]  # the prompt itself
    with use_prefix(model, kv):
        pass
    assert count == [1]


def test_a_changed_model_is_checked_again():
    model = tiny.build("llama")
    use(model)
    model.model.layers[1].self_attn = stranger(BySdpa).model.layers[1].self_attn
    model.model.layers[1].self_attn.config = model.config
    with pytest.raises(UnsupportedModelError, match="patched"):
        use(model)


def test_the_check_leaves_no_trace():
    model = tiny.build("gpt2").train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    before = [(m.training, sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()]
    use(model)
    after = [(m.training, sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()]
    assert after == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_weights_is_skipped_with_a_line(caplog):
    config = tiny.build("llama").config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with caplog.at_level(logging.WARNING, "fastprefix"):
        patch_model(model)
    assert "not checked: some of its weights are on the meta device" in caplog.text


@pytest.mark.parametrize("wrong", ["position", "slot", "token"])
def test_the_check_sees_what_it_is_for(monkeypatch, wrong):
    """Even where weights are as small as a new model's."""
    model = tiny.build("llama", initializer_range=0.02)
    make = checks._shares

    def broken(recorder, held, offset):
        kv = make(recorder, held, offset)
        keys, values = list(kv.keys), list(kv.values)
        if wrong == "position":
            offset += 1
        elif wrong == "slot":
            keys[0], keys[1] = keys[1], keys[0]
        else:
            keys = [key[:, 1:] for key in keys]
            values = [value[:, 1:] for value in values]
        return PrefixKV(tuple(keys), tuple(values), offset)

    monkeypatch.setattr(checks, "_shares", broken)
    with pytest.raises(UnsupportedModelError, match="with a prefix"):
        use(model)


class ReadsMask(LlamaDecoderLayer):
    """Reads the mask outside of its attention, in the form that eager attention has it."""

    def forward(self, hidden_states, attention_mask=None, *args: Any, **kwargs: Any):
        out = super().forward(hidden_states, attention_mask, *args, **kwargs)
        hidden = out if isinstance(out, Tensor) else out[0]
        if attention_mask is not None and attention_mask.dim() == 4:
            hidden = 2 * hidden
        return hidden if isinstance(out, Tensor) else (hidden, *out[1:])


def test_what_reads_the_mask_besides_attention_is_seen():
    with pytest.raises(UnsupportedModelError, match="without a prefix"):
        patch_model(stranger(ReadsMask))
