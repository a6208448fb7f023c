"""What the suites on whole models share: two copies of a model, prefixes, and the peers' ways."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastprefix.bench import language_model as lm
from fastprefix.hf import patch_model
from fastprefix.hf.versions import peft_mismatch
from fastprefix.kv import PrefixKV, to_flat

TEXT = 128  # tokens that are prefilled for a prefix; a longer prefix repeats their keys and values
REPEATED = "repeated cache"
PEFT = "peft"
NO_PREFIX = "no prefix"


@functools.lru_cache(maxsize=2)
def models(tiny: bool, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model that fastprefix has patched, and one that it never touched, with equal weights.

    Args:
        tiny: two small layers in float32 instead of SmolLM2 in bfloat16.
        device: of the weights.
    """
    dtype = torch.float32 if tiny else torch.bfloat16
    ours, plain = (lm.build(device, dtype, "cpu" if tiny else "") for _ in range(2))
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


def inputs(tiny: bool, device: torch.device, B: int, L: int, P: int, tasks: int = 1) -> Inputs:
    """Random texts, and prefixes of P tokens; none if P is 0."""
    ours, plain = models(tiny, device)
    kvs = tuple(prefix(ours, P, task) for task in range(tasks if P else 0))
    return Inputs(ours, plain, kvs, lm.tokens(ours, B, L, seed=99))


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

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=kvs[0].num_virtual_tokens
    )
    tuned: Any = get_peft_model(model, config, adapter_name="0")
    for i, kv in enumerate(kvs):
        if i:
            tuned.add_adapter(str(i), config)
        weight = tuned.prompt_encoder[str(i)].embedding.weight
        with torch.no_grad():
            weight.copy_(to_flat(kv))
    return tuned.to(model.device).eval()


def held_bytes(provider: str, B: int, P: int) -> int:
    """About how many bytes a provider's copies of a prefix take in SmolLM2, in bfloat16.

    PEFT looks its prefix up in float32 for every row, and copies that into bfloat16.
    """
    shape = lm.SHAPE
    width = shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    copies = 2 * 2 * width * B * P
    return {PEFT: 4 * copies, REPEATED: copies * 5 // 4}.get(provider, 0)
