"""Both parameterisations: outputs, gradients, dropout, and starting from given numbers."""

import pytest
import torch

from fastprefix.encoders import DirectEncoder, MLPEncoder, flat_width, to_flat
from fastprefix.kv import LayerShape

SHAPES = (LayerShape(2, 4, 4), LayerShape(1, 6, 2))
P = 5


@pytest.fixture(params=["direct", "mlp"])
def make(request):
    """A function that makes an encoder."""

    def build(**options):
        if request.param == "direct":
            return DirectEncoder(SHAPES, P, **options)
        return MLPEncoder(SHAPES, P, embedding_size=7, hidden_size=3, **options)

    return build


def test_output_is_a_prefix_of_the_shapes_asked_for(make):
    kv = make()()
    assert kv.shapes == SHAPES
    assert kv.num_virtual_tokens == kv.position_offset == P
    assert kv.requires_grad
    assert make(position_offset=0)().position_offset == 0


def test_direct_is_its_embedding():
    encoder = DirectEncoder(SHAPES, P)
    assert torch.equal(to_flat(encoder()), encoder.embedding)


def test_mlp_is_linear_tanh_linear():
    encoder = MLPEncoder(SHAPES, P, embedding_size=7, hidden_size=3)
    one, _, two = encoder.transform
    hidden = torch.tanh(encoder.embedding @ one.weight.T + one.bias)
    torch.testing.assert_close(to_flat(encoder()), hidden @ two.weight.T + two.bias)


@pytest.mark.parametrize("started", [False, True])
def test_gradients_against_finite_differences(make, started):
    encoder = make().double()
    if started:
        encoder.start_from(torch.randn(P, flat_width(SHAPES)).double())
    parameters = dict(encoder.named_parameters())

    def run(*values):
        state = dict(zip(parameters, values, strict=True))
        return to_flat(torch.func.functional_call(encoder, state, ()))

    assert torch.autograd.gradcheck(run, tuple(parameters.values()))


def test_every_parameter_gets_a_gradient(make):
    encoder = make(init_std=1.0)
    to_flat(encoder()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


def test_start_is_exact(make):
    flat = torch.randn(P, flat_width(SHAPES))
    encoder = make()
    encoder.start_from(flat)
    assert torch.equal(to_flat(encoder()), flat)
    flat.zero_()
    assert not torch.equal(to_flat(encoder()), flat), "a copy: the caller's tensor may change"


def test_what_follows_a_start_can_be_learned(make):
    encoder, wanted = make(), torch.randn(P, flat_width(SHAPES))
    encoder.start_from(torch.randn(P, flat_width(SHAPES)))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    errors = []
    for _ in range(40):
        error = (to_flat(encoder()) - wanted).square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
    assert errors[-1] < 0.6 * errors[0]


def test_start_of_another_length_is_refused(make):
    with pytest.raises((ValueError, RuntimeError)):
        make().start_from(torch.randn(P + 1, flat_width(SHAPES)))


def test_state_dict_of_a_started_encoder_loads_into_a_new_one(make):
    encoder, other = make(), make()
    encoder.start_from(torch.randn(P, flat_width(SHAPES)))
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(to_flat(other()), to_flat(encoder()))


def test_dropout_zeroes_in_training_only_and_keeps_the_mean(make):
    encoder = make(dropout=0.25, init_std=1.0)
    encoder.start_from(torch.full((P, flat_width(SHAPES)), 3.0))
    dropped = torch.stack([to_flat(encoder()) for _ in range(200)])
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert dropped.mean().item() == pytest.approx(3.0, rel=0.05)
    encoder.eval()
    assert (to_flat(encoder()) == 3.0).all()


def test_random_start_has_its_standard_deviation():
    encoder = DirectEncoder((LayerShape(8, 16, 16),) * 4, 50, init_std=0.5)
    assert encoder.embedding.std().item() == pytest.approx(0.5, rel=0.03)
