"""How a prefix is made and trained; names are PEFT's where it has any."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fastprefix.arguments import (
    check_flag,
    check_names,
    check_number,
    check_type,
    check_whole,
    methods_refuse_unknown_arguments,
    shown,
)
from fastprefix.encoders.networks import Reparameterization
from fastprefix.encoders.starting_prefixes import Resize
from fastprefix.kv import Group
from fastprefix.tuning.configs.tuning_config import TuningConfig

PrefixInit = Literal["random", "orthogonal", "zero", "text", "embeddings", "vocab", "prefix"]
# Fields of both peft_types. PEFT has the first for cartridges only, and the second not at all.
_OF_BOTH_TYPES = ("num_frozen_tokens", "prefix_in_window")


@methods_refuse_unknown_arguments
@dataclass
class PrefixConfig(TuningConfig):
    """Configuration of prefix tuning (Li and Liang 2021).

    Layers are the model's attention layers, counted from 0 in the order in which they run.

    Attributes:
        num_virtual_tokens: prefix length P. With layer_lengths, the longest of them.
        task_type: PEFT's name of the task; None leaves it open.
        modules_to_save: modules of the base of which copies are trained and saved with the prefix,
            by the ends of their names. If None, those that PEFT trains for the task.
        prefix_projection: whether to train a network that computes the prefix, instead of the
            prefix itself.
        encoder_reparameterization_type: the kind of network, "MLP" or "LSTM" (as in P-tuning; Liu
            et al. 2021).
        encoder_hidden_size: the network's hidden size; the model's hidden size if None.
        encoder_num_layers: the number of linear layers of an MLP, 1 to 3, or of layers of an LSTM.
        encoder_per_layer: whether every attention layer has an MLP of its own.
        encoder_orthogonal: whether the network's weights start orthogonal.
        share_layers: whether all layers share one block of keys and values; not possible with
            prefix_projection.
        layers: the layers that get a prefix; all if None.
        layer_lengths: the prefix length of each layer, 0 for none. If None, all layers have
            num_virtual_tokens.
        num_frozen_tokens: the number of leading tokens that are not trained.
        position_offset: by how much the prefix moves the positions of the text (in
            encoder-decoders, of the decoder's text). If None, it is num_virtual_tokens in
            decoder-only models, BERT, RoBERTa and ELECTRA, as in PEFT. In other models it is 0, and
            the text keeps the positions that it has without a prefix. The text of T5's decoder has
            no positions; there the offset changes its distances to the prefix.
        groups: the groups of layers that get a prefix: "encoder" (an encoder's self-attention),
            "decoder" (a decoder's self-attention) or "cross" (its attention to the encoder). If
            None, all groups that the model has, as in Li and Liang.
        dropout: the probability with which each number of the prefix is set to 0 in training.
        init: what the prefix starts from, also if a network computes it. "random": normal numbers
            of standard deviation init_std. "orthogonal": tokens that are orthogonal in every layer,
            of that standard deviation. "zero": all tokens alike; without a network or dropout they
            stay alike. "text": the model's own keys and values for init_text, repeated or cut to P
            tokens. "embeddings": each layer's projections of that text's input embeddings, not
            changed by the layers before. "vocab": the model's keys and values for tokens drawn at
            random from the vocabulary. "prefix": init_prefix.
        init_text: the text for init="text" or "embeddings".
        init_prefix: the prefix for init="prefix": a file of :meth:`fastprefix.PrefixKV.save`, an
            adapter's folder, or an adapter's name on the hub.
        init_resize: how init_prefix is made P tokens long: "pad" (append random tokens), "repeat",
            or "resample" (linear interpolation). "pad" and "repeat" cut a longer one at the end.
        init_std: the standard deviation of the random start.
        prefix_in_window: if True, the prefix slides out of a model's sliding windows as a text
            would, and as PEFT's prefixes do. If False, every token sees the whole prefix.
        prefix_bias: a number that is added to all attention scores of the prefix. "learned" trains
            one number for each query head of each layer that has a prefix, starting at 0. A long
            prefix dilutes the attention to the text; a bias of -log P undoes that.
        gated: whether the prefix has a softmax of its own. Its result, times the tanh of a gate for
            each query head, is added to that of the text. Gates start at 0, so training starts from
            the bare model (LLaMA-Adapter, Zhang et al. 2023, arXiv 2303.16199). position_offset is
            then 0 unless given.
        peft_type: "PREFIX_TUNING" or "CARTRIDGE", the method under which PEFT loads the adapter.
        fallback: what to do with a base that cannot be patched, None or "expand"; see
            :func:`fastprefix.patch_model`. Only a model's first adapter decides; it is not saved.
        inference_mode: if True, neither the prefix nor the modules saved with it are trained.

    Raises:
        TypeError: a field has the wrong type; the message names it.
        ValueError: a field has a value that is not accepted; the message names it.
    """

    modules_to_save: list[str] | None = None
    prefix_projection: bool = False
    encoder_reparameterization_type: Reparameterization = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_per_layer: bool = False
    encoder_orthogonal: bool = False
    share_layers: bool = False
    layers: list[int] | None = None
    layer_lengths: list[int] | None = None
    num_frozen_tokens: int = 0
    position_offset: int | None = None
    groups: Sequence[Group] | None = None
    dropout: float = 0.0
    init: PrefixInit = "random"
    init_text: str | None = None
    init_prefix: str | None = None
    init_resize: Resize = "pad"
    init_std: float = 0.02
    prefix_in_window: bool = False
    prefix_bias: Literal["learned"] | float | None = None
    gated: bool = False
    peft_type: Literal["PREFIX_TUNING", "CARTRIDGE"] = "PREFIX_TUNING"
    fallback: Literal["expand"] | None = None
    inference_mode: bool = False

    model_class: ClassVar[str] = "PrefixTuningModel"
    peft_kinds: ClassVar[dict[str, tuple[str, ...]]] = {
        "PREFIX_TUNING": (
            *("encoder_hidden_size", "init_weights", "prefix_projection"),
            *_OF_BOTH_TYPES,
        ),
        "CARTRIDGE": _OF_BOTH_TYPES,
    }

    def __post_init__(self) -> None:
        self._check_shared_fields()
        self._check_types()
        if self.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ValueError(
                f"peft_type: got {self.peft_type!r}, takes 'PREFIX_TUNING' or 'CARTRIDGE'"
            )
        if self.fallback not in (None, "expand"):
            raise ValueError(f"fallback: got {self.fallback!r}, takes None or 'expand'")
        self._check_encoder()
        self._check_layers()
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, takes 0 <= dropout < 1")
        self._check_choice("init", get_args(PrefixInit))
        if (self.init in ("text", "embeddings")) != bool(self.init_text):
            raise ValueError(
                f"init_text: got {self.init_text!r} with init={self.init!r}, takes a text with "
                "init='text' or 'embeddings', and None with any other"
            )
        if (self.init == "prefix") != bool(self.init_prefix):
            raise ValueError(
                f"init_prefix: got {self.init_prefix!r} with init={self.init!r}, takes a file, a "
                "folder or a name with init='prefix', and None with any other"
            )
        self._check_choice("init_resize", get_args(Resize))
        if not 0.0 <= self.init_std < float("inf"):
            raise ValueError(f"init_std: got {self.init_std}, takes 0 or more")
        self._check_reweighting()

    def _check_types(self) -> None:
        """Checks the type of each field by itself."""
        check_whole("num_frozen_tokens", self.num_frozen_tokens, 0)
        check_whole("position_offset", self.position_offset, 0, none=True)
        for name in ("dropout", "init_std"):
            check_number(name, getattr(self, name))
        for name in (
            "prefix_projection", "encoder_per_layer", "encoder_orthogonal", "share_layers",
            "prefix_in_window", "gated", "inference_mode",
        ):  # fmt: skip
            check_flag(name, getattr(self, name))
        if self.init_prefix is not None:
            check_type("init_prefix", self.init_prefix, (str, os.PathLike), "a path, or None")

    @classmethod
    def _from_peft_fields(cls, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        start = fields.pop("init_weights", None)
        if start not in (None, "zero"):
            raise ValueError(f"config.init_weights: got {start!r}, takes 'zero' or None")
        if start == "zero":
            fields["init"] = "zero"
        if not fields.get("prefix_projection"):
            fields.pop("encoder_hidden_size", None)
        return {"peft_type": kind, **fields}

    @classmethod
    def _fields_of_weights(cls, about: dict[str, Any]) -> dict[str, Any]:
        names = {"num_frozen_tokens": "num_frozen_tokens", "in_window": "prefix_in_window"}
        return {ours: about[name] for name, ours in names.items() if name in about}

    def _peft_fields(self) -> dict[str, Any]:
        common = super()._peft_fields()
        if self.peft_type == "CARTRIDGE":
            return {**common, "num_frozen_tokens": self.num_frozen_tokens}
        return {
            **common,
            "encoder_hidden_size": self.encoder_hidden_size,
            "init_weights": "zero" if self.init == "zero" else None,
            "prefix_projection": self.prefix_projection,
        }

    def _check_reweighting(self) -> None:
        bias = self.prefix_bias
        if bias is not None and bias != "learned":
            number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
            if not number or not math.isfinite(float(bias)):
                raise ValueError(
                    f"prefix_bias: got {bias!r}, takes a finite number, 'learned', or None"
                )
        if not self.gated:
            return
        if bias is not None:
            raise ValueError(
                f"prefix_bias: got {bias!r} with gated=True, takes None: a prefix that is attended "
                "apart has a softmax of its own, in which one bias for all its tokens does nothing"
            )
        if self.prefix_in_window:
            raise ValueError(
                "prefix_in_window: got True with gated=True, takes False: attended apart, a prefix "
                "has no place in front of the text to slide from"
            )
        if self.init == "zero" or (self.init in ("random", "orthogonal") and not self.init_std):
            raise ValueError(
                f"init: got {self.init!r} of zeros with gated=True, takes another: neither they "
                "nor gates of 0 would get a gradient"
            )

    def _check_encoder(self) -> None:
        self._check_choice("encoder_reparameterization_type", get_args(Reparameterization))
        kind = self.encoder_reparameterization_type
        most = 3 if kind == "MLP" else None
        if most and self.encoder_num_layers > most:
            raise ValueError(
                f"encoder_num_layers: got {self.encoder_num_layers}, takes 1 to {most} for an "
                f"{kind}"
            )
        if self.encoder_per_layer and kind != "MLP":
            raise ValueError(f"encoder_per_layer: got True, takes False for an {kind}")
        if not self.prefix_projection:
            defaults = {"encoder_reparameterization_type": "MLP", "encoder_num_layers": 2}
            defaults |= {"encoder_per_layer": False, "encoder_orthogonal": False}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}: got {getattr(self, name)!r} without a network, takes "
                        f"{default!r}; or set prefix_projection=True"
                    )
        elif self.share_layers:
            raise ValueError("share_layers: got True, takes False with prefix_projection=True")

    def _check_layers(self) -> None:
        for name in ("layers", "layer_lengths"):
            given = getattr(self, name)
            if given is None:
                continue
            listed = isinstance(given, Iterable) and not isinstance(given, str)
            if not listed or not all(type(number) is int for number in given):
                raise TypeError(f"{name}: got {shown(given)}, takes a list of integers")
            setattr(self, name, list(given))
            if not given or min(given) < 0:
                raise ValueError(f"{name}: got {list(given)}, takes numbers of 0 or more")
        if self.groups is not None:
            check_names("groups", self.groups, f"some of {get_args(Group)}, or None for all")
            if not self.groups or not set(self.groups) <= set(get_args(Group)):
                raise ValueError(
                    f"groups: got {self.groups!r}, takes some of {get_args(Group)}, or None for all"
                )
            self.groups = tuple(self.groups)
            if self.layers is not None or self.layer_lengths is not None:
                raise ValueError(
                    f"groups: got {self.groups!r} with layers or layer_lengths, takes None with "
                    "either: they say for each layer of the model whether it has a prefix"
                )
        if self.layers is not None:
            if self.layer_lengths is not None:
                raise ValueError(
                    "layers: got both layers and layer_lengths, takes one; a length of 0 leaves "
                    "a layer out"
                )
            if len(set(self.layers)) != len(self.layers):
                raise ValueError(f"layers: got {self.layers}, takes every layer once")
        lengths = self.layer_lengths or [self.num_virtual_tokens]
        if max(lengths) != self.num_virtual_tokens:
            raise ValueError(
                f"layer_lengths: got {lengths} with num_virtual_tokens={self.num_virtual_tokens}, "
                "takes lengths of which that is the longest"
            )
        shortest = min(length for length in lengths if length)
        if not 0 <= self.num_frozen_tokens < shortest:
            raise ValueError(
                f"num_frozen_tokens: got {self.num_frozen_tokens}, takes 0 or more, and fewer "
                f"than the {shortest} tokens of the shortest prefix of a layer"
            )
