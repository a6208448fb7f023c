"""Every encoder on every layout: outputs, gradients, dropout, and starting from given numbers."""

import pytest
import torch

from fastprefix.encoders import (
    DirectEncoder,
    EncoderOptions,
    LSTMEncoder,
    MLPEncoder,
    SharedEncoder,
    build_encoder,
)
from fastprefix.kv import LayerShape, flat_width, to_flat

SHAPES = (LayerShape(2, 4, 4), LayerShape(1, 6, 2))
P = 5


def numbers(encoder):
    return encoder.layout.to_flat(encoder())


def test_output_is_a_prefix_of_the_shapes_and_lengths_asked_for(make, shapes, lengths):
    kv = make()()
    assert kv.shapes == shapes
    assert tuple(key.shape[1] for key in kv.keys) == lengths
    assert kv.num_virtual_tokens == kv.position_offset == P
    assert kv.requires_grad
    assert make(position_offset=0)().position_offset == 0


def test_direct_is_its_embedding():
    encoder = DirectEncoder(SHAPES, P)
    assert encoder.embedding.shape == (P, flat_width(SHAPES))
    assert torch.equal(to_flat(encoder()), encoder.embedding)


def test_direct_has_one_parameter_for_each_number():
    for lengths in ((5, 5), (0, 4), (3, 5)):
        encoder = DirectEncoder(SHAPES, lengths)
        count = sum(length * shape.width for length, shape in zip(lengths, SHAPES, strict=True))
        assert sum(p.numel() for p in encoder.parameters()) == count


def test_shared_is_the_same_block_in_every_layer():
    encoder = SharedEncoder((LayerShape(2, 3, 4),) * 3, (5, 0, 3))
    keys, values = encoder.embedding.split((6, 8), dim=1)
    kv = encoder()
    for slot, length in ((0, 5), (2, 3)):
        for got, block in ((kv.keys[slot], keys), (kv.values[slot], values)):
            expected = torch.stack(block[:length].chunk(2, dim=1))
            assert torch.equal(got, expected)
    assert sum(p.numel() for p in encoder.parameters()) == 5 * 14


def test_shared_takes_layers_of_one_shape_only():
    with pytest.raises(ValueError, match="shapes: got"):
        SharedEncoder(SHAPES, P)
    SharedEncoder(SHAPES, (0, P))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_mlp_is_linear_layers_with_tanh_between(num_layers):
    encoder = MLPEncoder(SHAPES, P, embedding_size=7, hidden_size=3, num_layers=num_layers)
    x = encoder.embedding
    for place, linear in enumerate(encoder.transform[::2]):
        x = (x if place == 0 else torch.tanh(x)) @ linear.weight.T + linear.bias
    assert place == num_layers - 1
    torch.testing.assert_close(to_flat(encoder()), x)


def test_mlp_per_layer_is_one_for_each_layer_that_has_a_prefix():
    encoder = MLPEncoder(SHAPES * 2, (5, 0, 4, 5), embedding_size=7, hidden_size=3, per_layer=True)
    kv = encoder()
    for slot, transform in zip((0, 2, 3), encoder.transform, strict=True):
        one, _, two = transform
        hidden = torch.tanh(encoder.embedding @ one.weight.T + one.bias)
        rows = (hidden @ two.weight.T + two.bias)[: kv.keys[slot].shape[1]]
        got = torch.cat([x.transpose(0, 1).flatten(1) for x in kv.layer(slot)], 1)
        torch.testing.assert_close(got, rows)


def test_lstm_is_that_of_p_tuning():
    """Step by step, both ways, both layers; then linear, ReLU, linear."""
    encoder = LSTMEncoder(SHAPES, P, embedding_size=7, hidden_size=3, init_std=1.0).double()
    x = encoder.embedding
    for layer in (0, 1):
        ways = []
        for suffix, order in (("", range(P)), ("_reverse", reversed(range(P)))):
            w_ih, w_hh, b_ih, b_hh = (
                getattr(encoder.lstm, f"{name}_l{layer}{suffix}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = c = torch.zeros(3).double()
            outputs = {}
            for t in order:
                i, f, g, o = (w_ih @ x[t] + b_ih + w_hh @ h + b_hh).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = outputs[t] = o.sigmoid() * c.tanh()
            ways.append(torch.stack([outputs[t] for t in range(P)]))
        x = torch.cat(ways, dim=1)
    one, _, two = encoder.transform
    hidden = (x @ one.weight.T + one.bias).clamp(min=0)
    torch.testing.assert_close(to_flat(encoder()), hidden @ two.weight.T + two.bias)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("num_frozen_tokens", [0, 2])
def test_gradients_against_finite_differences(make, random_flat, started, num_frozen_tokens):
    encoder = make(init_std=1.0, num_frozen_tokens=num_frozen_tokens).double()
    if started:
        encoder.start_from(random_flat().double())
    weights = torch.randn(P, encoder.layout.width).double()
    torch.manual_seed(7)  # one direction through all parameters at once
    directions = [torch.randn_like(p) for p in encoder.parameters()]

    def loss():
        return (numbers(encoder) * weights).sum() + (numbers(encoder) ** 3).sum()

    loss().backward()
    along = sum((p.grad * d).sum() for p, d in zip(encoder.parameters(), directions, strict=True))
    h, values = 1e-6, []
    with torch.no_grad():
        for step in (h, -2 * h):
            for p, d in zip(encoder.parameters(), directions, strict=True):
                p.add_(d, alpha=step)
            values.append(loss().item())
    assert along.item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


def test_every_parameter_gets_a_gradient(make):
    encoder = make(init_std=1.0, num_frozen_tokens=1)
    weights = torch.randn(P, encoder.layout.width)
    (numbers(encoder) * weights).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        if parameter.dim() == 2 and "embedding" in name:
            assert (parameter.grad != 0).any(1).all(), "a token that nothing uses"
        assert parameter.grad.abs().max() > 0, name


def test_start_is_exact(make, random_flat):
    flat = random_flat()
    encoder = make(num_frozen_tokens=1)
    encoder.start_from(flat)
    assert torch.equal(numbers(encoder), flat)
    flat += 1
    assert not torch.equal(numbers(encoder), flat), "a copy: the caller's tensor may change"


def test_shared_starts_from_the_mean_of_the_layers_that_use_a_token():
    encoder = SharedEncoder((LayerShape(1, 1, 1),) * 3, (2, 0, 1))
    encoder.start_from(torch.tensor([[1.0, 2, 3, 5], [7, 8, 99, 99]]))
    assert torch.equal(encoder.embedding, torch.tensor([[2.0, 3.5], [7, 8]]))


def test_what_follows_a_start_can_be_learned(make, random_flat):
    encoder, wanted = make(), random_flat()
    encoder.start_from(random_flat())
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    errors = []
    for _ in range(40):
        error = (numbers(encoder) - wanted).square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
    assert errors[-1] < 0.7 * errors[0]


def test_start_of_another_shape_is_refused(make, layout):
    for shape in ((P + 1, layout.width), (P, layout.width + 1), (P * layout.width,)):
        with pytest.raises(ValueError, match="flat: got shape"):
            make().start_from(torch.randn(shape))


def test_state_dict_of_a_started_encoder_loads_into_a_new_one(make, random_flat):
    encoder, other = make(num_frozen_tokens=2), make(num_frozen_tokens=2)
    encoder.start_from(random_flat())
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(numbers(other), numbers(encoder))


def test_dropout_zeroes_in_training_only_and_keeps_the_mean(make, layout):
    encoder = make(dropout=0.25, init_std=1.0)
    encoder.start_from(torch.full((P, layout.width), 3.0))
    used = layout.used()
    dropped = torch.stack([numbers(encoder)[used] for _ in range(50)])
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert dropped.mean().item() == pytest.approx(3.0, rel=0.05)
    encoder.eval()
    assert (numbers(encoder)[used] == 3.0).all()


def test_frozen_tokens_are_bit_equal_after_training_also_with_weight_decay(make, random_flat):
    encoder, flat = make(num_frozen_tokens=2, dropout=0.1), random_flat()
    encoder.start_from(flat)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (numbers(encoder) - 1).square().sum().backward()
        optimizer.step()
    encoder.eval()
    got = numbers(encoder)
    assert torch.equal(got[:2], flat[:2])
    assert ((got[2:] != flat[2:]) == encoder.layout.used()[2:]).float().mean() > 0.9
    tokens = encoder.embedding.shape[0] if encoder.embedding.dim() == 2 else None
    assert tokens in (None, P - 2), "no parameters for frozen tokens"


@pytest.mark.parametrize("num_frozen_tokens", [-1, 3, 5])
def test_frozen_tokens_must_leave_every_layer_some(num_frozen_tokens):
    with pytest.raises(ValueError, match=f"num_frozen_tokens: got {num_frozen_tokens}"):
        DirectEncoder(SHAPES, (3, 5), num_frozen_tokens=num_frozen_tokens)


@pytest.mark.parametrize("lengths", [(5,), (5, 5, 5), (5, -1), (0, 0), 0])
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match="lengths: got"):
        DirectEncoder(SHAPES, lengths)


@pytest.mark.parametrize("std", [0.5, 0.0])
def test_random_start_has_its_standard_deviation(kinds, kind, std):
    options = EncoderOptions(
        encoder_hidden_size=24, init_std=std, num_frozen_tokens=10, **kinds[kind]
    )
    encoder = build_encoder((LayerShape(8, 16, 16),) * 4, 60, options, embedding_size=32)
    flat = to_flat(encoder())
    assert flat[:10].std().item() == pytest.approx(std, rel=0.05)
    tokens = flat[10:]
    assert tokens.std(0).square().mean().sqrt().item() == pytest.approx(std, rel=0.1)
    assert tokens.mean(0).square().mean().sqrt().item() <= 0.5 * std, "more alike than different"


def test_orthogonal_weights():
    mlp = MLPEncoder(
        SHAPES, P, embedding_size=7, hidden_size=9, num_layers=3, orthogonal=True, init_std=1.0
    )
    weight = mlp.transform[2].weight
    torch.testing.assert_close(weight @ weight.T, (5 / 3) ** 2 * torch.eye(9))
    weight = mlp.transform[4].weight  # scaled: still orthogonal columns
    product = weight.T @ weight
    torch.testing.assert_close(product, product[0, 0] * torch.eye(9))
    lstm = LSTMEncoder(SHAPES, P, embedding_size=7, hidden_size=3, orthogonal=True).lstm
    gates = lstm.weight_hh_l1_reverse.view(4, 3, 3)
    torch.testing.assert_close(gates @ gates.mT, (5 / 3) ** 2 * torch.eye(3).expand(4, 3, 3))
    assert not lstm.bias_ih_l0.any()


def test_layers_that_are_not_trained_stay_what_they_are():
    encoder = DirectEncoder(SHAPES, P)
    encoder.trained_slots = frozenset({1})
    before = encoder().detach()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.1)
    to_flat(encoder()).square().sum().backward()
    optimizer.step()
    after = encoder()
    for slot, same in ((0, True), (1, False)):
        for got, expected in zip(after.layer(slot), before.layer(slot), strict=True):
            assert torch.equal(got, expected) == same


def test_one_token(kinds, kind):
    options = EncoderOptions(encoder_hidden_size=2, **kinds[kind])
    encoder = build_encoder(SHAPES[:1], 1, options, embedding_size=2)
    assert torch.isfinite(to_flat(encoder())).all()
