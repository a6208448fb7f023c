"""The attention function that transformers calls in every layer of a patched model."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from fastprefix.attention.api import default_scale
from fastprefix.hf.layer.active import ActivePrefix, Recorder
from fastprefix.hf.layer.buffered import is_packed
from fastprefix.hf.layer.call import Call
from fastprefix.hf.layer.masks import made_causal, prefix_attention_mask
from fastprefix.hf.layer.reweighted import attend
from fastprefix.hf.layer.windows import in_window, with_mask
from fastprefix.implementation import NAME
from fastprefix.kv import PrefixKV
from fastprefix.options import Options

SLOT = "_fastprefix_slot"
# On modules whose masks are not what ``module.is_causal`` says: whether a call without a mask is
# causal, by the argument ``is_causal`` of that call.
CAUSAL = "_fastprefix_causal"
# Keywords that reach attention functions and change nothing in them: transformers' own functions,
# eager and sdpa, read none of these (checked in 5.17 to 5.24).
HARMLESS = frozenset(
    {
        # where the text stands, which its keys and masks hold already
        "position_ids", "cache_position", "token_type_ids", "mm_token_type_ids",
        "encoder_hidden_states", "encoder_attention_mask",
        # packed sequences, for kernels that take no mask; the mask says the same
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
        # how a kernel computes the same
        "deterministic", "kernel_options",
        # what comes out of the model, and its loss
        "labels", "logits_to_keep", "num_items_in_batch", "output_attentions",
        "output_hidden_states", "output_router_logits", "return_dict", "use_cache",
    }
)  # fmt: skip
_LOGGER: Any = logging.get_logger(__name__)
# For each probe that runs: its thread, and the attention modules that ran in it without receiving
# the keyword argument of the forward call.
modules_without_kwarg: list[tuple[int, list[nn.Module]]] = []


def attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fastprefix: ActivePrefix | Recorder | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' AttentionInterface.

    Args:
        module: the attention module; its slot says which layer of the prefix is its own.
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D]: the text without the prefix, the cached tokens included.
        value: [B, Hkv, Lk, Dv].
        attention_mask: as :mod:`fastprefix.hf.layer.masks` makes it, or a custom mask of 4
            dimensions.
        dropout: share of the attention weights that is dropped; models pass 0 in evaluation.
        scaling: factor on the scores.
        is_causal: overrides the module's own.
        sliding_window: how many keys a query sees, itself included. An explicit mask contains the
            window already and is not cut again.
        softcap: limit of the scores: softcap * tanh(scores / softcap).
        fastprefix: what the hook of a patched model added to the call.
        position_bias: [1 or B, Hq, Lq, Lk], added to the text's scores (T5). The bias of the prefix
            is 0, unless its position_offset places the text behind it.
        s_aux: the sinks [Hq].
        kwargs: everything else that models pass. A tensor or a number is refused if it is not known
            to be harmless.

    Returns:
        [B, Lq, Hq, Dv], and None in place of the weights, which are never formed. With
        output_attentions the model returns an empty tuple, as with sdpa, and logs a warning.

    Raises:
        ValueError: the module has no slot for the prefix.
        NotImplementedError: the operator cannot do this call yet, or the call has an argument that
            is not known here.
    """
    _refuse_unknown(module, kwargs)
    if kwargs.get("output_attentions"):
        warn_of_no_weights()
    causal = _is_causal(module, attention_mask, is_causal, isinstance(fastprefix, Recorder))
    if query.is_meta:  # a model without weights, which is patched before they are loaded
        if isinstance(fastprefix, Recorder):
            fastprefix.record(module, query, key, value, causal, sliding_window, is_causal)
        return query.new_empty(*query.shape[:-1], value.shape[-1]).transpose(1, 2), None
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    active = None
    if isinstance(fastprefix, Recorder):
        fastprefix.record(module, query, key, value, causal, sliding_window, is_causal)
    elif fastprefix is None:
        _note_missing_kwarg(module)
    else:
        active = _of_module(module, fastprefix)
    if s_aux is not None and s_aux.dtype is not torch.float32:
        s_aux = s_aux.to(query.dtype)
    if position_bias is not None:
        position_bias = _without_needless_gradient(module, position_bias)
    options = Options(
        is_causal=causal,
        scale=default_scale(query) if scaling is None else scaling,
        sliding_window=sliding_window,
        sinks=s_aux,
        softcap=softcap or None,
        dropout_p=dropout or None,
    )
    inputs = _Inputs(module, query, key, value, attention_mask, position_bias, options)
    if active is not None and active.masses is not None and active.kv is not None:
        active.masses[_slot(module, active.turn)] = _mass(inputs, active)
    return _attend(inputs, active).transpose(1, 2), None


class _Inputs(NamedTuple):
    """What a layer hands to its attention.

    Attributes:
        module: the attention module.
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        mask: see :func:`attention_interface`.
        position_bias: [1 or B, Hq, Lq, Lk], or None.
        options: of the operator, as far as the layer says. ``is_causal`` holds if there is no mask
            of 4 dimensions.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    position_bias: Tensor | None
    options: Options


def _attend(inputs: _Inputs, active: ActivePrefix | None) -> Tensor:
    """[B, Hq, Lq, Dv]: the attention of a layer to its share of the prefixes and to the text."""
    module, mask = inputs.module, inputs.mask
    given, changes, longest = ({}, {}, 0) if active is None else _prefix_arguments(inputs, active)
    cu_seqlens = None if active is None else active.cu_seqlens
    if cu_seqlens is not None:
        assert active is not None
        changes["cu_seqlens"] = active.integers_on(cu_seqlens, inputs.query.device)
    elif mask is not None and mask.dim() == 2:
        changes["key_padding_mask"] = mask
    options = inputs.options._replace(**changes) if changes else inputs.options
    call = Call(inputs.query, inputs.key, inputs.value, options, **given)
    call = in_window(module, call, active, longest)
    if mask is not None and mask.dim() != 2 and cu_seqlens is None:
        call = with_mask(module, call, active, mask, longest)
    if inputs.position_bias is not None:
        bias = _with_bias(inputs.position_bias, call.options.attn_mask, inputs.query.dtype)
        call = call.with_options(attn_mask=bias)
    return attend(call)


def _mass(inputs: _Inputs, active: ActivePrefix) -> Tensor:
    """[B, Hq, Lq]: the share of a layer's attention that falls on the prefix.

    It is the layer's own output when the values are 1 in the prefix and 0 in the text.
    """
    kv = active.kv
    assert kv is not None
    ones = replace(kv, values=tuple(map(torch.ones_like, kv.values)))
    inputs = inputs._replace(
        value=torch.zeros_like(inputs.value), options=inputs.options._replace(dropout_p=None)
    )
    return _attend(inputs, replace(active, kv=ones, masses=None))[..., 0].float()


def _is_causal(
    module: nn.Module, mask: Tensor | None, is_causal: bool | None, recorded: bool
) -> bool:
    """Whether a call is causal where its mask does not say so itself.

    Args:
        module: the attention module.
        mask: as :mod:`fastprefix.hf.layer.masks` makes it.
        is_causal: the argument of the call, or None.
        recorded: whether the call is recorded. Its mask may then be one that the probe noted.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if mask is None:
        causal = getattr(module, CAUSAL, {}).get(is_causal, causal)
    elif mask.dim() == 2 or is_packed(mask):
        causal = True
    made = made_causal(mask) if recorded else None
    return causal if made is None else made


def _note_missing_kwarg(module: nn.Module) -> None:
    """Tells a probe of this thread, if there is one, which module attended without the keyword."""
    for thread, modules in modules_without_kwarg:
        if thread == threading.get_ident():
            modules.append(module)


def _of_module(module: nn.Module, active: ActivePrefix) -> ActivePrefix:
    """The active prefix for one call of a module, which is counted."""
    if not (active.positioned or hasattr(module, SLOT)):
        return ActivePrefix(None, active.backend)  # a tower in front of the text
    if active.attended is None:
        return active
    call_number, active.attended[0] = active.attended[0], active.attended[0] + 1
    return replace(active, turn=active.turn + call_number, attended=None)


def warn_of_no_weights() -> None:
    """Warns, once, that the model returns no attention weights."""
    _LOGGER.warning_once(
        "output_attentions: fastprefix never forms attention weights, so the model returns none of "
        "them, as with sdpa; unpatch it and run it with attn_implementation='eager' to see them"
    )


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuses arguments that might matter: a mask of chosen keys, a bias, a sink by token."""
    for name, given in kwargs.items():
        number = isinstance(given, (int, float)) and not isinstance(given, bool) and given != 0
        if name not in HARMLESS and (number or isinstance(given, Tensor)):
            what = f"a tensor of shape {list(given.shape)}" if isinstance(given, Tensor) else given
            raise NotImplementedError(
                f"{type(module).__name__}: hands its attention {name}, got {what}, of which "
                "fastprefix does not know what it does there"
            )


def _prefix_arguments(
    inputs: _Inputs, active: ActivePrefix
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A layer's share of the prefixes.

    Returns:
        Fields of :class:`Call`, options of the operator, and how many tokens of a prefix may slide
        out of a window.
    """
    kv, query = active.kv, inputs.query
    if kv is None:
        return {"backend": active.backend}, {}, 0
    slot = _slot(inputs.module, active.turn)
    prefix_key, prefix_value = kv.layer(slot)
    P = longest = prefix_key.shape[1]
    options: dict[str, Any] = {}
    given: dict[str, Any] = {
        "backend": active.backend,
        "prefix_key": active.prefix_for(prefix_key, query),
        "prefix_value": active.prefix_for(prefix_value, query),
        "step": active.step,
    }
    if isinstance(kv, PrefixKV):
        if kv.reweighting is not None and P:
            name = "head_bias" if kv.reweighting.kind == "bias" else "gate"
            given[name] = kv.reweighting.heads[slot].to(query.device)
    else:
        assert active.prefix_index is not None
        options["prefix_index"] = active.integers_on(active.prefix_index, query.device)
        options["prefix_lengths"] = active.integers_on(kv.prefix_lengths[slot], query.device)
        longest = kv.longest[slot]
        ids = active.prefix_ids
        kinds = {kv.kinds[n] for n in ids if n >= 0} if any(kv.kinds) and P else set()
        if "bias" in kinds:
            given["head_bias"] = kv.biases[slot].to(query.device)
        if "gate" in kinds:
            given["gate"] = kv.gates[slot].to(query.device)
        if kinds:
            given["prefix_ids"] = ids
            given["gated"] = frozenset(n for n, kind in enumerate(kv.kinds) if kind == "gate")
    if active.prefix_bias is not None and inputs.options.is_causal and P:
        options["prefix_bias"] = active.prefix_bias[..., :P].to(query.dtype)
    return given, options, longest if kv.in_window else 0


def _slot(module: nn.Module, turn: int) -> int:
    """Which layer of the prefix is a module's own when it runs for the turn-th time in a call."""
    slots = getattr(module, SLOT, ())
    if turn < len(slots):
        return slots[turn]
    if slots:
        raise ValueError(
            f"{type(module).__name__}: ran more often in one call than the {len(slots)} times when "
            "the model was patched; recomputing shared layers one by one is not supported"
        )
    raise ValueError(
        f"{type(module).__name__}: this layer did not run when the model was patched, "
        "so it has no share in the prefix; patch the model as you run it"
    )


def _without_needless_gradient(module: nn.Module, bias: Tensor) -> Tensor:
    """A bias without a gradient if it is one of T5's zeros.

    Layers of T5 that have no bias make zeros, and require their gradient when they checkpoint. Only
    zeros are changed: reentrant checkpointing passes real biases as leaves as well.
    """
    if not (torch.is_grad_enabled() and bias.requires_grad and bias.is_leaf):
        return bias
    zeros = getattr(module, "has_relative_attention_bias", None) is False and not bias.any()
    return bias.detach() if zeros else bias


def _with_bias(bias: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The additive mask [1 or B, Hq, Lq, Lk] of a bias and a mask."""
    if bias.dtype is not torch.float32:
        bias = bias.to(dtype)
    if mask is None:
        return bias
    if mask.dtype is torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask


def register() -> None:
    """Makes "fastprefix" an ``attn_implementation`` of transformers. Idempotent."""
    AttentionInterface.register(NAME, attention_interface)
    AttentionMaskInterface.register(NAME, prefix_attention_mask)


register()
