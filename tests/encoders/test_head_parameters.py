"""Biases and gates of query heads."""

import pickle

import torch

from fastprefix.encoders import HeadParameters


def test_a_pickle_with_the_former_name_loads():
    """Pickled encoders of older versions name the class as it was called then."""
    heads = HeadParameters("bias", (2, 0, 3), fixed=0.5)
    present = b"cfastprefix.encoders.head_parameters\nHeadParameters\n"
    former = b"cfastprefix.encoders.reweighting\nHeadNumbers\n"
    written = pickle.dumps(heads, protocol=0)
    assert present in written
    loaded = pickle.loads(written.replace(present, former))
    assert isinstance(loaded, HeadParameters)
    for got, expected in zip(loaded().heads, heads().heads, strict=True):
        assert torch.equal(got, expected)
