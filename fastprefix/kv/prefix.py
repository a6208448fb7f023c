"""A prefix for every layer of a model, in one copy."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastprefix.arguments import (
    as_device,
    as_path,
    check_flag,
    check_type,
    check_whole,
    methods_refuse_unknown_arguments,
    shown,
)
from fastprefix.kv.prefix_file import (
    PrefixFields,
    check_finite,
    prefix_file_errors,
    read_prefix,
    write_prefix,
)
from fastprefix.kv.reweighting import Reweighting
from fastprefix.kv.shapes import LayerShape
from fastprefix.kv.states import LayerState, checked, mapped, tensors_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@methods_refuse_unknown_arguments
@dataclass(frozen=True, eq=False)
class PrefixKV:
    """Keys and values of a prefix, layer by layer; every sequence of a batch shares them.

    Attributes:
        keys: one [Hkv, P, D] tensor for each layer, in the order in which a model's attention
            layers run. They are as the attention sees them, after the rotary embedding. P may
            differ between layers, and be 0.
        values: one [Hkv, P, Dv] tensor for each layer.
        position_offset: position of the first token behind the prefix; in an encoder-decoder, of
            the decoder's first token. For a prefilled prompt it is the prompt's length, or less if
            images take fewer positions than tokens. For a learned prefix it is the number of
            virtual tokens in models where PEFT does so, and 0 in others.
        in_window: if True, the prefix slides out of a sliding window as the same text would (a
            prefilled prompt). If False, all tokens see it (a learned prefix).
        reweighting: a bias or a gate for each query head; see :class:`Reweighting`.
        states: what layers with convolutions or recurrences keep of a prompt in addition to keys
            and values; see :class:`LayerState`. None for a learned prefix and for other models.

    Raises:
        TypeError: keys or values are not sequences of floating-point tensors, position_offset
            is no whole number, or states are not LayerState objects.
        ValueError: the numbers, shapes, dtypes or devices of tensors do not fit together;
            position_offset is negative; or a prefix with gates slides.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    position_offset: int
    in_window: bool = False
    reweighting: Reweighting | None = None
    states: tuple[LayerState, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            given = getattr(self, name)
            check_type(name, given, Iterable, "a floating-point tensor for each layer")
            object.__setattr__(self, name, tuple(given))
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                f"keys, values: got {len(self.keys)} and {len(self.values)} layers, "
                "takes the same number, at least 1"
            )
        first = self.keys[0]
        for name, tensors in (("keys", self.keys), ("values", self.values)):
            for layer, tensor in enumerate(tensors):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    got = tensor.dtype if isinstance(tensor, Tensor) else shown(tensor)
                    raise TypeError(f"{name}[{layer}]: got {got}, takes a floating-point tensor")
                if tensor.dim() != 3 or tensor.shape[:2] != self.keys[layer].shape[:2]:
                    raise ValueError(
                        f"{name}[{layer}]: got shape {list(tensor.shape)}, takes [Hkv, P, D], "
                        f"Hkv and P as in keys[{layer}]"
                    )
                if tensor.dtype != first.dtype or tensor.device != first.device:
                    raise ValueError(
                        f"{name}[{layer}]: got {tensor.dtype} on {tensor.device}, "
                        f"takes {first.dtype} on {first.device} as keys[0]"
                    )
        check_whole("position_offset", self.position_offset, 0)
        object.__setattr__(self, "position_offset", operator.index(self.position_offset))
        check_flag("in_window", self.in_window)
        if self.reweighting is not None:
            check_type("reweighting", self.reweighting, Reweighting, "a Reweighting, or None")
            self.reweighting.check(self.keys, self.in_window)
        object.__setattr__(self, "states", checked(self.states, first))

    @classmethod
    def prefill(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor | Sequence[int] | None = None,
        *,
        check: bool = True,
        fallback: Literal["expand"] | None = None,
        **inputs: Any,
    ) -> PrefixKV:
        """Computes the keys and values of a prompt by running the model.

        Once per model, a few tokens are run behind these keys and values and behind the prompt
        itself. If the results differ, an error is raised (:mod:`fastprefix.hf.checking`).

        Args:
            model: a model that :func:`fastprefix.patch_model` accepts. It is not changed.
            input_ids: [P] or [1, P] token ids.
            check: whether to make this check.
            inputs: other inputs of the prompt, by the names of the model's forward: pixel_values,
                image_grid_thw, mm_token_type_ids, input_features, ..., or inputs_embeds in place of
                input_ids. An attention_mask is accepted if it marks no padding.
            fallback: see :func:`fastprefix.patch_model`; use the prefix with the same fallback.

        Raises:
            TypeError: neither or both of input_ids and inputs_embeds are given, or the model's
                forward does not accept an input.
            ValueError: input_ids is empty, has several sequences or padding, or has places for
                images and there are no images.
            NotImplementedError: the prompt's keys would depend on the text behind it.

        Example:
            >>> kv = PrefixKV.prefill(model, **processor(text=question, images=picture))
        """
        from fastprefix.hf.prefill.prompts import prefill  # the only import from a later layer

        return prefill(model, input_ids, check=check, fallback=fallback, **inputs)

    @classmethod
    def from_text(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        check: bool = True,
        fallback: Literal["expand"] | None = None,
    ) -> PrefixKV:
        """Computes the keys and values of a text that starts a sequence.

        Args:
            model: see :meth:`prefill`.
            tokenizer: the model's tokenizer; it adds its special tokens.
            text: the text, for example a system prompt or a document.
            check: see :meth:`prefill`.
            fallback: see :meth:`prefill`.

        Raises:
            TypeError: text is not one text, or tokenizer cannot be called.
            ValueError: the text has no tokens; see also :meth:`prefill`.
        """
        check_type("text", text, str, "one text")
        if not callable(tokenizer):
            raise TypeError(f"tokenizer: got {shown(tokenizer)}, takes the model's tokenizer")
        ids = tokenizer(text)["input_ids"]
        return cls.prefill(model, ids, check=check, fallback=fallback)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.keys)

    @property
    def num_virtual_tokens(self) -> int:
        """The prefix length P; if layers differ, the longest."""
        return max(key.shape[1] for key in self.keys)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The numbers and sizes of heads, layer by layer."""
        return tuple(
            LayerShape(key.shape[0], key.shape[2], value.shape[2])
            for key, value in zip(self.keys, self.values, strict=True)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all keys and values."""
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of all keys and values."""
        return self.keys[0].device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors: keys, values, the numbers that reweight heads, and states."""
        heads = () if self.reweighting is None else self.reweighting.heads
        return (*self.keys, *self.values, *heads, *tensors_of(self.states))

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor requires a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors. A batch of any size needs no more, except copies of states."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Key [Hkv, P, D] and value [Hkv, P, Dv] of a layer."""
        try:
            return self.keys[index], self.values[index]
        except IndexError:
            raise IndexError(
                f"index: got {index}, takes a layer, 0 to {self.num_layers - 1}"
            ) from None

    def map(self, change: Callable[[Tensor], Tensor]) -> PrefixKV:
        """Applies a function to every tensor, and returns the resulting prefix."""
        return replace(
            self,
            keys=tuple(map(change, self.keys)),
            values=tuple(map(change, self.values)),
            reweighting=self.reweighting and self.reweighting.map(change),
            states=mapped(self.states, change),
        )

    def select(self, layers: Sequence[int]) -> PrefixKV:
        """Returns the prefix of some attention layers only. States of all layers stay.

        Raises:
            IndexError: there is no such layer.
        """
        weights = self.reweighting
        for layer in layers:
            if not -self.num_layers <= layer < self.num_layers:
                raise IndexError(
                    f"layers: got {layer}, takes layers from 0 to {self.num_layers - 1}"
                )
        return replace(
            self,
            keys=tuple(self.keys[layer] for layer in layers),
            values=tuple(self.values[layer] for layer in layers),
            reweighting=weights
            and Reweighting(weights.kind, tuple(weights.heads[i] for i in layers)),
        )

    def spread(self, layers: Sequence[int], shapes: Sequence[LayerShape]) -> PrefixKV:
        """The inverse of :meth:`select`: the other layers get a prefix of length 0.

        Args:
            layers: the place of each layer of this prefix in the result.
            shapes: the shapes of all layers of the result.

        Raises:
            ValueError: layers are not one different place for each layer.
        """
        if len(set(layers)) != self.num_layers or not set(layers) <= set(range(len(shapes))):
            raise ValueError(
                f"layers: got {list(layers)}, takes {self.num_layers} different layers out of "
                f"{len(shapes)}"
            )
        like = self.keys[0]
        keys = [like.new_empty(shape.num_heads, 0, shape.key_size) for shape in shapes]
        values = [like.new_empty(shape.num_heads, 0, shape.value_size) for shape in shapes]
        for layer, key, value in zip(layers, self.keys, self.values, strict=True):
            keys[layer], values[layer] = key, value
        weights = self.reweighting
        if weights is not None:
            heads = [weights.heads[0].new_empty(0) for _ in shapes]
            for layer, tensor in zip(layers, weights.heads, strict=True):
                heads[layer] = tensor
            weights = Reweighting(weights.kind, tuple(heads))
        return replace(self, keys=tuple(keys), values=tuple(values), reweighting=weights)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PrefixKV:
        """Returns a copy on another device or in another dtype; itself if nothing changes.

        The numbers that reweight heads stay in float32, and states keep their own dtype.

        Raises:
            TypeError: dtype is no torch.dtype, or device no device.
            ValueError: there is no such device.
        """
        if dtype is not None:
            check_type("dtype", dtype, torch.dtype, "a torch.dtype")
        device = None if device is None else as_device("device", device)
        if (dtype is None or dtype == self.dtype) and (device is None or device == self.device):
            return self
        moved = self.map(lambda tensor: tensor.to(device=device))
        return replace(
            moved,
            keys=tuple(tensor.to(dtype=dtype) for tensor in moved.keys),
            values=tuple(tensor.to(dtype=dtype) for tensor in moved.values),
        )

    def detach(self) -> PrefixKV:
        """Returns a copy in memory of its own, without a graph.

        Later changes of this prefix, for example by training steps, do not change the copy.
        """
        return self.map(lambda x: x.detach().clone(memory_format=torch.contiguous_format))

    def save(self, file: str | Path, *, durable: bool = True) -> None:
        """Writes a safetensors file; :meth:`load` reads the same bits.

        If writing fails or the process is killed, the file is as it was before. A killed process
        can leave a folder ``.fastprefix-*.partial`` beside it. The file holds a sha256, by which
        :meth:`load` notices later damage.

        Args:
            file: replaced if it exists.
            durable: whether to wait until the disk has the content, so that a loss of power cannot
                take it.

        Raises:
            OSError: the file cannot be written.
            TypeError: file is no path.
            ValueError: a number is not finite; :meth:`load` would refuse such a file.
        """
        file = as_path("file", file)
        check_finite("kv", self._fields)
        write_prefix(file, self._fields, durable=durable)

    @classmethod
    def load(cls, file: str | Path, device: torch.device | str = "cpu") -> PrefixKV:
        """Reads a file that :meth:`save` wrote, into memory of its own.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: file is no path.
            ValueError: the file is not a PrefixKV file, was changed since it was saved, or has a
                number that is not finite; or there is no such device.
        """
        file, device = as_path("file", file), as_device("device", device)
        if not file.is_file():
            raise FileNotFoundError(f"file: {file} does not exist")
        try:
            with prefix_file_errors(file):
                kv = cls(**read_prefix(file))
        except FileNotFoundError:  # it was there a moment ago
            raise FileNotFoundError(f"file: {file} does not exist") from None
        check_finite(f"file: {file}", kv._fields)
        return kv.to(device)

    @property
    def _fields(self) -> PrefixFields:
        return PrefixFields(
            keys=self.keys,
            values=self.values,
            position_offset=self.position_offset,
            in_window=self.in_window,
            reweighting=self.reweighting,
            states=self.states,
        )
