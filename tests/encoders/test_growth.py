"""A prefix that becomes longer: old tokens stay, and what an optimizer knows of them."""

import pytest
import torch

P, MORE = 5, 2


def numbers(encoder):
    return encoder.layout.to_flat(encoder())


def test_present_tokens_stay_and_new_ones_come_behind(make, random_flat, lengths):
    for started in (False, True):
        encoder = make(num_frozen_tokens=1, init_std=0.5)
        if started:
            encoder.start_from(random_flat())
        before = encoder().detach()
        encoder.grow(MORE)
        after = encoder()
        assert [k.shape[1] for k in after.keys] == [n + MORE if n else 0 for n in lengths]
        assert after.position_offset == P + MORE
        for slot, length in enumerate(lengths):
            for got, expected in zip(after.layer(slot), before.layer(slot), strict=True):
                # an LSTM's tokens see each other, and so the new ones
                if hasattr(encoder, "lstm") and not started:
                    continue
                # matrix products may sum in another order for another number of rows
                torch.testing.assert_close(got[:, :length], expected, rtol=1e-5, atol=1e-6)


def test_new_tokens_are_drawn_as_those_of_a_new_encoder(make, lengths):
    encoder = make(init_std=0.5)
    encoder.grow(200)
    new = torch.cat([k[:, n:].flatten() for k, n in zip(encoder().keys, lengths, strict=True)])
    assert new.std().item() == pytest.approx(0.5, rel=0.3)


def test_a_carried_state_is_that_of_the_present_tokens(make, random_flat):
    """Adam's moments, checked through what they are moments of."""
    encoder = make(num_frozen_tokens=1)
    encoder.start_from(random_flat())
    old = encoder.embedding.detach().clone()
    carry = encoder.grow(MORE)
    state = carry(old + 10)
    assert state.shape == encoder.embedding.shape
    known = state != 0
    assert known.sum() == old.numel()
    torch.testing.assert_close(state[known] - 10, encoder.embedding[known], rtol=0, atol=1e-5)


def test_grown_encoder_trains(make, random_flat):
    encoder = make(num_frozen_tokens=1)
    encoder.start_from(random_flat())
    encoder.grow(MORE)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    wanted = torch.randn(P + MORE, encoder.layout.width)[:, : encoder.layout.widths[0]]
    wanted = torch.nn.functional.pad(wanted, (0, encoder.layout.width - wanted.shape[1]))
    errors = []
    for _ in range(30):
        optimizer.zero_grad()
        error = (numbers(encoder) - wanted).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < errors[0]


def test_state_of_another_length_loads_where_that_is_wanted(make, random_flat):
    grown = make(num_frozen_tokens=1)
    grown.start_from(random_flat())
    grown.grow(MORE)
    short = make(num_frozen_tokens=1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        short.load_state_dict(grown.state_dict())
    short.any_length = True
    expected = grown()
    first = {name: x.clone() for name, x in short.state_dict().items()}
    start = short().detach()
    for state, kv in ((grown.state_dict(), expected), (first, start)):
        short.load_state_dict(state)
        assert short.layout.lengths == tuple(key.shape[1] for key in kv.keys)
        for got, want in zip(short().keys, kv.keys, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("num_tokens", [0, -1])
def test_growth_is_positive(make, num_tokens):
    with pytest.raises(ValueError, match=f"num_tokens: got {num_tokens}"):
        make().grow(num_tokens)
