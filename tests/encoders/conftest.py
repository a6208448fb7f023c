"""Every encoder on every kind of layout."""

import pytest
import torch

from fastprefix.encoders import EncoderOptions, build_encoder
from fastprefix.kv import FlatLayout, LayerShape

KINDS = {
    "direct": {},
    "shared": {"share_layers": True},
    "mlp1": {"prefix_projection": True, "encoder_num_layers": 1},
    "mlp2": {"prefix_projection": True},
    "mlp3": {"prefix_projection": True, "encoder_num_layers": 3},
    "mlp-orthogonal": {"prefix_projection": True, "encoder_orthogonal": True},
    "mlp-per-layer": {"prefix_projection": True, "encoder_per_layer": True},
    "lstm": {"prefix_projection": True, "encoder_reparameterization_type": "LSTM"},
}
SHAPES = (LayerShape(2, 4, 4), LayerShape(1, 6, 2), LayerShape(2, 3, 5))
SAME = (LayerShape(2, 3, 5),) * 3  # what layers that share a block must be
LENGTHS = {"even": (5, 5, 5), "chosen": (0, 5, 5), "uneven": (3, 5, 0)}
P = 5


@pytest.fixture
def kinds():
    """The EncoderOptions of each kind."""
    return KINDS


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=LENGTHS)
def lengths(request):
    return LENGTHS[request.param]


@pytest.fixture
def shapes(kind):
    return SAME if kind == "shared" else SHAPES


@pytest.fixture
def layout(shapes, lengths):
    return FlatLayout(shapes, lengths)


@pytest.fixture
def make(kind, shapes, lengths):
    """A function that makes an encoder."""

    def build(**options):
        given = EncoderOptions(encoder_hidden_size=3, **KINDS[kind], **options)
        return build_encoder(shapes, lengths, given, embedding_size=7)

    return build


@pytest.fixture
def random_flat(kind, layout):
    """A function that makes numbers an encoder can start from exactly."""

    def draw():
        flat = torch.randn(layout.num_virtual_tokens, layout.width)
        if kind == "shared":
            flat = flat[:, : layout.widths[0]].repeat(1, len(layout.slots))
        return flat.masked_fill(~layout.used(), 0.0)

    return draw
