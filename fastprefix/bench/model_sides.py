"""What the suites on whole models share: two copies of a model, prefixes, and the peers' ways."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.bench import language_model as lm
from fastprefix.bench.case import OURS, Case
from fastprefix.hf import patch_model
from fastprefix.hf.versions import peft_mismatch
from fastprefix.kv import PrefixKV, to_flat

TEXT = 128  # tokens that are prefilled for a prefix; a longer prefix repeats their keys and values
REPEATED = "repeated cache"
PEFT = "peft"
NO_PREFIX = "no prefix"


@functools.lru_cache(maxsize=2)
def models(dtype: str, tiny: bool, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model that fastprefix has patched, and one that it never touched, with equal weights.

    Args:
        dtype: of the weights.
        tiny: two small layers instead of SmolLM2.
        device: of the weights.
    """
    place = "cpu" if tiny else ""
    ours, plain = (lm.build(device, getattr(torch, dtype), place) for _ in range(2))
    patch_model(ours)
    return ours, plain


@dataclass(frozen=True)
class Inputs:
    """What all providers of a case on a model start from.

    Attributes:
        ours: the patched model.
        plain: the model as transformers loads it.
        kvs: a prefix for each task, of equal lengths; empty if there is none.
        ids: [B, L] token ids, without padding.
    """

    ours: PreTrainedModel
    plain: PreTrainedModel
    kvs: tuple[PrefixKV, ...]
    ids: Tensor

    @property
    def kv(self) -> PrefixKV | None:
        """The only prefix."""
        return self.kvs[0] if self.kvs else None


@dataclass(frozen=True)
class ModelCase(Case):
    """A case on a whole model: SmolLM2-135M, or a tiny one.

    Attributes:
        B: rows.
        P: tokens of the prefix.
        L: tokens of each row's text.
        dtype: of the weights.
        tiny: whether the model is.
    """

    bound: ClassVar[str | None] = NO_PREFIX
    rounds: ClassVar[int] = 2
    budget_s: ClassVar[float] = 4.0

    B: int
    P: int
    L: int = 16
    dtype: str = "bfloat16"
    tiny: bool = False

    @property
    def label(self) -> str:
        """As tables write it."""
        name = "tiny" if self.tiny else "SmolLM2"
        return f"{name} B{self.B} P{self.P} text {self.L} {self.dtype}"

    @property
    def tolerance(self) -> float:
        """Of logits: in bfloat16 two orders of rounding through all layers."""
        return 1e-3 if self.dtype == "float32" else 5e-2

    def providers(self) -> tuple[str, ...]:
        """fastprefix, PEFT, a cache with a copy for each row, and the model without a prefix."""
        return (OURS, PEFT, REPEATED, NO_PREFIX) if self.P else (OURS, NO_PREFIX)

    def inputs(self, device: torch.device) -> Inputs:
        """Random texts, and a prefix unless P is 0."""
        return self.inputs_of(device, int(self.P > 0))

    def inputs_of(self, device: torch.device, tasks: int) -> Inputs:
        """Random texts, and a prefix for each task."""
        return inputs_of_size(self.dtype, self.tiny, device, (self.B, self.L), self.P, tasks)

    def held_bytes(self, provider: str) -> int:
        """About how many bytes the copies of the prefix take.

        PEFT looks its prefix up in float32 for every row, and copies that into the cache's dtype.
        """
        shape, itemsize = lm.SHAPE, 4 if self.dtype == "float32" else 2
        width = shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
        copies = 0 if self.tiny else 2 * width * self.B * self.P
        one = copies * itemsize
        return {PEFT: 2 * 4 * copies + one, REPEATED: one * 5 // 4}.get(provider, 0)

    def step_s(self, pace: float) -> tuple[float, float]:
        """Seconds of a decoding step with one copy of the prefix, and with copies; reckoned."""
        step = (0.035 + 0.0016 * self.B) * min(pace, 4)
        fits = self.held_bytes(REPEATED) < 8e9
        return step + 2.5e-7 * self.B * self.P * min(pace, 4), step + (
            4e-6 * self.B * self.P * min(pace, 2) * fits
        )


@functools.lru_cache(maxsize=1)  # asked for by one provider after the other; nobody changes them
def inputs_of_size(
    dtype: str, tiny: bool, device: torch.device, size: tuple[int, int], P: int, tasks: int
) -> Inputs:
    """See :meth:`ModelCase.inputs_of`; the size is [B, L]."""
    ours, plain = models(dtype, tiny, device)
    kvs = tuple(prefix(ours, P, task) for task in range(tasks))
    return Inputs(ours, plain, kvs, lm.tokens(ours, *size, seed=99))


def prefix(model: PreTrainedModel, P: int, seed: int) -> PrefixKV:
    """Keys and values as a text has them; of :data:`TEXT` tokens, again and again up to P."""
    text = lm.tokens(model, 1, min(P, TEXT), seed=seed)
    kv = PrefixKV.prefill(model, text, check=False)
    times = -(-P // TEXT)

    def longer(part: Tensor) -> Tensor:
        return part.repeat(1, times, 1)[:, :P].contiguous()

    keys, values = tuple(map(longer, kv.keys)), tuple(map(longer, kv.values))
    return PrefixKV(keys, values, P)


def last_logits(model: Any, ids: Tensor, kvs: Sequence[PrefixKV] = ()) -> Tensor:
    """Logits of the last token [B, V], with the prefixes in a repeated cache if there are any."""
    more: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    if kvs:
        P = kvs[0].num_virtual_tokens
        places = torch.arange(P, P + ids.shape[1], device=ids.device)
        more = {
            "past_key_values": lm.repeated_cache(model, kvs),
            "attention_mask": ids.new_ones(len(ids), P + ids.shape[1]),
            "position_ids": places.expand_as(ids),
        }
    with torch.no_grad():
        return model(input_ids=ids, logits_to_keep=1, **more).logits[:, -1]


def peft_model(model: Any, kvs: Sequence[PrefixKV]) -> Any:
    """PEFT's prefix tuning around a model, an adapter named "0", "1", ... for each prefix.

    Raises:
        NotImplementedError: the installed PEFT does not run with the installed transformers.
    """
    reason = peft_mismatch()
    if reason is not None:
        raise NotImplementedError(reason)
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=kvs[0].num_virtual_tokens)
    tuned: Any = get_peft_model(model, config, adapter_name="0")
    for i, kv in enumerate(kvs):
        if i:
            tuned.add_adapter(str(i), config)
        weight = tuned.prompt_encoder[str(i)].embedding.weight
        with torch.no_grad():
            weight.copy_(to_flat(kv))
    return tuned.to(model.device).eval()
