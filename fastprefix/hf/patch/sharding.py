"""Tensor parallelism: each rank attends with some of the heads, a prefix has all of them.

In a model that transformers sharded (``from_pretrained(..., tp_plan="auto")``) each attention layer
receives the heads of its rank. Prefixes stay whole on every rank, as encoders make them and files
contain them. A call narrows the prefix to views of the rank's heads. The backward collects the
gradients of all ranks' heads into the gradient of the whole prefix, the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastprefix.hf.evaluation import evaluating
from fastprefix.hf.layer.active import Recorder
from fastprefix.hf.patch.probe import UnsupportedModelError, is_encoder_decoder
from fastprefix.hf.versions import tensor_parallel_group
from fastprefix.kv import LayerShape, PackedPrefixKV, PrefixKV, Reweighting

# Names of the layers that make keys, in a tensor-parallel plan.
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
# The rank's first head, its last head + 1, and the number of heads of all ranks.
Heads = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Sharding:
    """Which key/value heads of each layer this rank has.

    Attributes:
        group: the ranks that share a layer's heads.
        heads: for each layer: this rank's first head, its last head + 1, and the number of heads
            of all ranks. Layers that the plan gathers have all heads on every rank.
        query_heads: the same for query heads. With MQA a rank has some of the query heads and all
            key/value heads.
    """

    group: Any
    heads: tuple[Heads, ...]
    query_heads: tuple[Heads, ...]

    def whole_shapes(self, shapes: Sequence[LayerShape]) -> tuple[LayerShape, ...]:
        """The layers' shapes with the heads of all ranks."""
        return tuple(
            LayerShape(total, shape.key_size, shape.value_size)
            for shape, (_, _, total) in zip(shapes, self.heads, strict=True)
        )

    def narrow(self, kv: PrefixKV | PackedPrefixKV) -> PrefixKV | PackedPrefixKV:
        """This rank's heads of a whole prefix, or of several packed ones.

        The gradient of the whole prefix is the sum over all ranks.
        """
        if isinstance(kv, PackedPrefixKV):
            reweighting = (*kv.biases, *kv.gates)
        else:
            reweighting = kv.reweighting.heads if kv.reweighting is not None else ()
        tensors = _Narrow.apply(self, *kv.keys, *kv.values, *reweighting)
        count = kv.num_layers
        keys, values, first, second = (tensors[i * count : (i + 1) * count] for i in range(4))
        if isinstance(kv, PackedPrefixKV):
            return replace(kv, keys=keys, values=values, biases=first, gates=second)
        if kv.reweighting is None:
            return replace(kv, keys=keys, values=values)
        narrowed = Reweighting(kv.reweighting.kind, first)
        return replace(kv, keys=keys, values=values, reweighting=narrowed)

    def places(self, tensors: Sequence[Tensor]) -> list[Heads]:
        """Where a rank's heads are in each tensor.

        Args:
            tensors: the keys of all layers, the values of all layers, and then any number of
                further tensors for all layers. These have a row for each query head, or no rows.
        """
        count = len(self.heads)
        more = len(tensors) // count - 2
        of_queries = zip(tensors[2 * count :], self.query_heads * more, strict=True)
        return [
            *(self.heads * 2),
            *(place if tensor.shape[0] else (0, 0, 0) for tensor, place in of_queries),
        ]

    def gather(self, kv: PrefixKV) -> PrefixKV:
        """The whole prefix, from the heads that each rank has; not differentiable."""
        tensors = self.sum_of_ranks((*kv.keys, *kv.values))
        count = kv.num_layers
        return replace(kv, keys=tensors[:count], values=tensors[count:])

    def sum_of_ranks(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Puts each rank's heads at their place among all heads, in one collective.

        Args:
            tensors: [local heads, ...], see :meth:`places`.

        Returns:
            The same with all heads.
        """
        first = dist.get_rank(self.group) == 0
        whole = []
        for tensor, (start, stop, total) in zip(tensors, self.places(tensors), strict=True):
            padded = tensor.new_zeros(total, *tensor.shape[1:])
            if stop - start < total or first:  # heads that every rank has count once
                padded[start:stop] = tensor
            whole.append(padded)
        flat = torch.cat([tensor.flatten() for tensor in whole])
        dist.all_reduce(flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in whole])
        return tuple(
            part.view_as(like).to(like.dtype) for part, like in zip(parts, whole, strict=True)
        )

    def agreed(self, inputs: Tensor) -> Tensor:
        """The first rank's token ids or embeddings, so that all ranks compute the same."""
        found = [inputs.cpu()]
        dist.broadcast_object_list(found, group_src=0, group=self.group)
        return found[0].to(inputs.device)

    @torch.no_grad()
    def synchronize(self, module: nn.Module) -> None:
        """Gives a module that makes prefixes the parameters and buffers of the first rank.

        Raises:
            ValueError: the module has dropout, which each rank would draw for itself.
        """
        for part in module.modules():
            if isinstance(part, nn.Dropout) and part.p > 0:
                raise ValueError(
                    f"dropout: got {part.p} for the prefix of a tensor-parallel model, takes 0: "
                    "ranks would draw different ones for the same prefix"
                )
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, group_src=0, group=self.group)


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sharding: Sharding, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sharding = sharding
        return tuple(
            tensor[start:stop]
            for tensor, (start, stop, _) in zip(tensors, sharding.places(tensors), strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.sharding.sum_of_ranks(gradients)


def refuse_split_heads(model: PreTrainedModel) -> None:
    """Refuses a tensor-parallel model if some rank would get part of a head.

    That rank would fail on its own while the others wait for it.

    Raises:
        UnsupportedModelError: its heads do not divide among the ranks.
    """
    ranks = model.tp_size or 1
    if ranks == 1:
        return
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    split = any(
        name.rsplit(".", 1)[-1] in _KEY_PROJECTIONS and style == "colwise"
        for name, style in model.tp_plan.items()
    )
    if split and any(count % ranks for count in (heads if isinstance(heads, list) else [heads])):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its {heads} key/value heads do not divide among the {ranks} "
            "ranks of its tp_plan"
        )


@torch.no_grad()
def find_sharding(model: PreTrainedModel) -> Sharding | None:
    """Which heads this rank has, found by running the same tokens on all ranks.

    No plan or configuration is read. A layer whose keys and values are the same on all ranks got
    all heads. Any other layer got the heads of its rank, in the order of the ranks.

    Args:
        model: a transformers model with our attention implementation. All ranks make this call.

    Returns:
        None for a model that is not tensor-parallel.

    Raises:
        UnsupportedModelError: a layer's keys and values are all zero, so that ranks cannot be told
            apart; or the model does not accept token ids.
    """
    if (model.tp_size or 1) == 1:
        return None
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__}: tensor parallelism is supported for models of text alone"
        )
    group = tensor_parallel_group(model)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    recorder = Recorder()
    embedding: Any = model.get_input_embeddings()
    # several tokens: the embedding of one may be zero, as for padding
    tokens = torch.linspace(0, embedding.weight.shape[0] - 1, 8, device=model.device).long()[None]
    inputs = {"input_ids": tokens}
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = tokens
    with evaluating(model):
        model(**inputs, fastprefix=recorder)
    own = [
        torch.cat([key[0].flatten(1), value[0].flatten(1)], 1).cpu()
        for key, value in zip(recorder.keys, recorder.values, strict=True)
    ]
    own += [query[0].cpu() for query in recorder.queries]
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    dist.all_gather_object(found, own, group=group)
    heads: list[Heads] = []
    for layer in zip(*found, strict=True):
        if not any(part.any() for part in layer):
            raise UnsupportedModelError(
                f"{type(model).__name__}: its queries, keys or values are zero, which do not say "
                "whose heads they are; load its weights, then patch it"
            )
        if all(part.shape == layer[0].shape and _alike(part, layer[0]) for part in layer):
            heads.append((0, len(layer[0]), len(layer[0])))
            continue
        start = sum(map(len, layer[:rank]))
        heads.append((start, start + len(layer[rank]), sum(map(len, layer))))
    count = len(recorder.keys)
    return Sharding(group, tuple(heads[:count]), tuple(heads[count:]))


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding: ranks may be different devices."""
    return torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2 * one.abs().max().item())
