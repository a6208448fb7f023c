"""The options of a call of the operator, each declared once.

:class:`Options` is the table: a field's name, type and default, and in its :class:`Option` what the
operator and its backends need to know. Everything that lists the options is derived from it: the
signature of the registered op, the features that backends are asked for, which options may need a
gradient, which ones the backends read as int32. So an option is added here, and then where it has
a meaning of its own: the public function, its check, the backends that can do it.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor


class Feature(NamedTuple):
    """Something that a backend may or may not be able to do.

    Attributes:
        name: as messages and the table of :mod:`fastprefix.attention.selection` write it.
        asked: whether the value of an option that is used asks for it; None for any value.
    """

    name: str
    asked: Callable[[Any], bool] | None = None


class Option(NamedTuple):
    """What an option is, besides its name, its type and its default.

    Attributes:
        doc: its shape, if it is a tensor, and its meaning, as the backends get it.
        features: what it may ask a backend for. An option without features is one that every
            backend can do.
        gradient: the fused backends compute its gradient.
        integers: a tensor of int32 or int64 integers, which the backends get as int32. Its values
            are checked too, where they can be read without waiting for a device.
        argument: an argument of :func:`fastprefix.prefix_attention`. The others are made by the
            operator.
    """

    doc: str
    features: tuple[Feature, ...] = ()
    gradient: bool = False
    integers: bool = False
    argument: bool = True


def _one_dimension(x: Tensor) -> bool:
    return x.dim() == 1


def _three_dimensions(x: Tensor) -> bool:
    return x.dim() == 3


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _wants_gradient_by_column(x: Tensor) -> bool:
    return x.dim() == 3 and _wants_gradient(x)


_PACKED_PREFIXES = (Feature("packed prefixes"),)


class Options(NamedTuple):
    """All that a call asks for, besides query, key, value and the prefix.

    One immutable value goes from the public function through the op to the kernels. The fields are
    named like the arguments of :func:`fastprefix.prefix_attention`. An option that is None or False
    is not used.

    A launcher takes the five tensors and one ``Options``. It reads ``options.sinks`` and so on, and
    keeps the value in its problem. To hand other values on, it uses ``_replace``::

        options._replace(sinks=options.sinks.contiguous())

    Whoever calls a launcher directly (tests, the offline compiler) writes
    ``Options(is_causal=True, scale=0.125, **others)``: the constructor refuses unknown names.

    ``help(Options)`` documents every field; the text comes from the table below.
    """

    is_causal: Annotated[
        bool,
        Option("query i sees sequence keys 0 .. p_i, where p_i = i + Lk - Lq"),
    ]
    scale: Annotated[float, Option("factor on the scores")]
    key_padding_mask: Annotated[Tensor | None, Option("[B, Lk] bool, True = real token")] = None
    key_lengths: Annotated[
        Tensor | None,
        Option(
            "[B] int32: row b attends to keys 0 .. key_lengths[b] - 1, and p_i = i + "
            "key_lengths[b] - Lq there; what lies beyond is not read",
            (Feature("key_lengths"),),
            integers=True,
        ),
    ] = None
    attn_mask: Annotated[
        Tensor | None,
        Option(
            "bool (True = attend) or additive (the query's dtype or float32), broadcastable to "
            "[B, Hq, Lq, Lk]; for the sequence part only",
            (Feature("attn_mask"), Feature("attn_mask gradient", _wants_gradient)),
        ),
    ] = None
    prefix_index: Annotated[
        Tensor | None,
        Option(
            "[B] int32 ([M] with cu_seqlens): which prefix a row attends to, -1 for none",
            _PACKED_PREFIXES,
            integers=True,
        ),
    ] = None
    prefix_lengths: Annotated[
        Tensor | None,
        Option(
            "[N] int32: lengths of the prefixes, which lie end to end along P",
            _PACKED_PREFIXES,
            integers=True,
        ),
    ] = None
    cu_seqlens: Annotated[
        Tensor | None,
        Option(
            "[M + 1] int32: offsets of M sequences, which lie end to end along Lq = Lk, with B = 1",
            (Feature("cu_seqlens"),),
            integers=True,
        ),
    ] = None
    sliding_window: Annotated[
        int | None,
        Option(
            "query i sees sequence keys j with |p_i - j| < sliding_window",
            (Feature("sliding_window"),),
        ),
    ] = None
    prefix_in_window: Annotated[
        bool,
        Option(
            "the prefix slides out of the window as the same text would; padding does not count",
            (Feature("prefix_in_window"),),
        ),
    ] = False
    sinks: Annotated[
        Tensor | None,
        Option(
            "[Hq], the query's dtype or float32: a score for each head, without a value",
            (Feature("sinks"),),
            gradient=True,
        ),
    ] = None
    prefix_bias: Annotated[
        Tensor | None,
        Option(
            "[Hq], or [Hq, Lq, P] by packed column, the query's dtype or float32: added to the "
            "scores of the prefix; -1e30 or less hides the key",
            (
                Feature("prefix_bias [Hq]", _one_dimension),
                Feature("prefix_bias [Hq, Lq, P]", _three_dimensions),
                Feature("prefix_bias 3D gradient", _wants_gradient_by_column),
            ),
            gradient=True,
        ),
    ] = None
    softcap: Annotated[
        float | None,
        Option(
            "scores become softcap * tanh(score / softcap), before anything is added to them",
            (Feature("softcap"),),
        ),
    ] = None
    dropout_p: Annotated[
        float | None,
        Option("share of the weights that is dropped, above 0", (Feature("dropout_p"),)),
    ] = None
    dropout_seed: Annotated[
        Tensor | None,
        Option(
            "[1] int64 on the query's device, given if and only if dropout_p is: the Philox key of "
            "reference and triton, which drop the same weights; composed seeds a generator of "
            "PyTorch with it and drops others",
            argument=False,
        ),
    ] = None
    batch_invariant: Annotated[
        bool,
        Option(
            "a sequence's output has the same bits whatever the other sequences are",
            (Feature("batch_invariant"),),
        ),
    ] = False
    tables: Annotated[
        Tensor | None,
        Option(
            "[size] int32: what the triton backend made of prefix_index, prefix_lengths and "
            "cu_seqlens for another call with these; None: each call makes its own",
            argument=False,
        ),
    ] = None
    spans: Annotated[
        Tensor | None,
        Option(
            "[B, 3] int32: what the triton backend made of key_padding_mask for another call with "
            "it; None: the kernels look at all of the mask",
            argument=False,
        ),
    ] = None


_TYPES = get_type_hints(Options, include_extras=True)
# The records of the table by name, in the order of the fields.
OPTIONS: dict[str, Option] = {name: get_args(hint)[1] for name, hint in _TYPES.items()}
for _name, _option in OPTIONS.items():
    getattr(Options, _name).__doc__ = _option.doc

_OP_TYPES = {
    bool: "bool",
    float: "float",
    float | None: "float?",
    int | None: "SymInt?",
    Tensor | None: "Tensor?",
}
# The fields as arguments of a registered op.
SCHEMA = ", ".join(f"{_OP_TYPES[get_args(hint)[0]]} {name}" for name, hint in _TYPES.items())

# The options whose gradients the fused backends compute, in the order in which they return them.
GRADIENTS = tuple(name for name, option in OPTIONS.items() if option.gradient)
# The options that are True or False.
FLAGS = tuple(name for name, hint in _TYPES.items() if get_args(hint)[0] is bool)
# The options that the backends read as int32.
INTEGERS = tuple(name for name, option in OPTIONS.items() if option.integers)
# The names of all features, each once.
FEATURES = tuple(
    dict.fromkeys(feature.name for option in OPTIONS.values() for feature in option.features)
)

# Where the options that have features begin, and their values where none of them is used.
_FIRST = next(place for place, option in enumerate(OPTIONS.values()) if option.features)
_UNUSED = tuple(Options._field_defaults[name] for name in Options._fields[_FIRST:])
_FEATURES = tuple(option.features for option in OPTIONS.values())[_FIRST:]


def asks_for_features(options: Options) -> bool:
    """Whether the options may ask for a feature. Every call asks this, so it must be fast."""
    return not all(map(is_, options[_FIRST:], _UNUSED))


# The tensors of which a call's kind tells all that is checked, in the order of the fields.
TOLD = ("key_padding_mask", "key_lengths", "spans")
# Places of what a call's kind does not tell: the values of tensors, and the seed of a dropout.
_NOT_TOLD = tuple(
    place
    for place, (name, hint) in enumerate(_TYPES.items())
    if name == "dropout_p" or (get_args(hint)[0] == Tensor | None and name not in TOLD)
)


def told_by_kind(options: Options) -> bool:
    """Whether shapes, dtypes and numbers say all that is checked in a call on a device.

    Such options have no tensors but perhaps :data:`TOLD`.
    """
    return not [place for place in _NOT_TOLD if options[place] is not None]


def features_of(options: Options) -> frozenset[str]:
    """The names of the features that the options ask for."""
    names = []
    for value, unused, features in zip(options[_FIRST:], _UNUSED, _FEATURES, strict=True):
        if value is not unused:
            for name, asked in features:
                if asked is None or asked(value):
                    names.append(name)
    return frozenset(names)
