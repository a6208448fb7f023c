"""The table of options, and that everything which lists the options agrees with it."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from fastprefix import prefix_attention
from fastprefix.attention import api, checks
from fastprefix.attention.selection import FEATURES, UNEQUAL_HEAD_SIZES
from fastprefix.options import (
    OPTIONS,
    SCHEMA,
    Options,
    asks_for_features,
    features_of,
    told_by_kind,
)

ARGUMENTS = [name for name, option in OPTIONS.items() if option.argument]
PLAIN = Options(is_causal=True, scale=0.25)


def test_the_public_function_takes_every_option_by_its_name():
    parameters = inspect.signature(prefix_attention).parameters.values()
    keywords = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert set(keywords) == {*ARGUMENTS, "return_lse", "backend"}


def test_the_public_function_documents_every_option():
    documented = re.findall(r"^    (\w+): ", inspect.getdoc(prefix_attention), re.MULTILINE)
    assert set(documented) >= set(ARGUMENTS)


def test_unused_options_have_the_defaults_of_the_table(monkeypatch):
    given = []
    monkeypatch.setattr(api, "attention_with_options", lambda *args: given.append(args) or (0, 0))
    prefix_attention(*torch.zeros(3, 1, 1, 1, 4).unbind())
    assert given[0][5] == Options(is_causal=False, scale=0.5)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_reaches_its_own_field(name, monkeypatch):
    """The public function fills the fields by position."""
    given = []
    monkeypatch.setattr(api, "attention_with_options", lambda *args: given.append(args) or (0, 0))
    prefix_attention(*torch.zeros(3, 1, 1, 1, 4).unbind(), **{name: 0.125})
    changed = {**Options(is_causal=False, scale=0.5)._asdict(), name: 0.125}
    assert given[0][5]._asdict() == changed


def test_every_option_with_a_feature_has_a_check():
    assert checks.CHECKS.keys() == {name for name, option in OPTIONS.items() if option.features}


def test_every_feature_is_one_of_an_option():
    named = {feature.name for option in OPTIONS.values() for feature in option.features}
    assert set(FEATURES) == {UNEQUAL_HEAD_SIZES, *named}
    assert len(FEATURES) == len(set(FEATURES))


@pytest.mark.parametrize("name", OPTIONS)
def test_fields_are_documented_by_the_table(name):
    assert getattr(Options, name).__doc__ == OPTIONS[name].doc


def test_a_plain_call_asks_for_no_feature():
    padded = PLAIN._replace(key_padding_mask=torch.ones(1, 4, dtype=torch.bool))
    for options in (PLAIN, padded):
        assert not asks_for_features(options)
        assert features_of(options) == frozenset()


# A value for each type of the schema.
VALUES = {"Tensor?": torch.zeros(2), "SymInt?": 2, "float?": 0.5, "bool": True}
TYPES = {name: kind for kind, name in (argument.split() for argument in SCHEMA.split(", "))}


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.features])
def test_an_option_in_use_asks_for_its_feature(name):
    options = PLAIN._replace(**{name: VALUES[TYPES[name]]})
    assert asks_for_features(options)
    assert len(features_of(options)) == 1
    assert features_of(options) <= {feature.name for feature in OPTIONS[name].features}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_kind_of_a_call_tells(name):
    """Numbers, and tensors whose values are not checked on a device."""
    tensors = {other for other, kind in TYPES.items() if kind == "Tensor?"}
    not_told = {*tensors, "dropout_p"} - {"key_padding_mask", "key_lengths", "spans"}
    options = PLAIN._replace(**{name: VALUES.get(TYPES[name], 0.5)})
    assert told_by_kind(options) == (name not in not_told)


def inputs(device="cpu"):
    query = torch.zeros(1, 2, 3, 8, device=device)
    return query, query, query, query[0], query[0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_calls_of_launchers_are_checked_by_the_same_function(device):
    fine = PLAIN._replace(sinks=torch.zeros(2, device=device), sliding_window=2)
    checks.check_call(*inputs(device), fine)
    with pytest.raises(ValueError, match=r"sinks: got shape \[3\], takes \[2\]"):
        checks.check_call(*inputs(device), fine._replace(sinks=torch.zeros(3, device=device)))
    query, key, *others = inputs(device)
    with pytest.raises(ValueError, match="key: got shape"):
        checks.check_call(query, key[..., :4], *others, fine)


def test_values_are_not_read_where_there_are_none():
    lengths, index = torch.tensor([99]), torch.tensor([7])
    packed = PLAIN._replace(prefix_lengths=lengths.to("meta"), prefix_index=index.to("meta"))
    checks.check_call(*inputs("meta"), packed)
    with pytest.raises(ValueError, match="prefix_lengths"):
        checks.check_call(*inputs(), PLAIN._replace(prefix_lengths=lengths, prefix_index=index))
