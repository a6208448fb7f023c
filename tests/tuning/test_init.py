"""Where a prefix starts, and what PrefixConfig refuses."""

import pytest
import torch

from fastprefix import PrefixConfig, PrefixKV, PrefixTuningModel
from fastprefix.encoders import to_flat


class Letters:
    """A tokenizer of letters: all that init="text" asks of one."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) - ord("a") + 1 for letter in text]}


TEXT = "theprefix"


@pytest.fixture(params=[False, True], ids=["direct", "projection"])
def start(request, model):
    """A prefix as it starts from a text."""

    def make(P, text=TEXT):
        config = PrefixConfig(P, init="text", init_text=text, prefix_projection=request.param)
        return PrefixTuningModel(model, config, Letters()).export()

    return make


def assert_same(one, other):
    assert one.position_offset == other.position_offset
    for got, expected in zip(one.keys + one.values, other.keys + other.values, strict=True):
        assert torch.equal(got, expected)


def test_text_of_the_right_length_is_from_text_exactly(start, bare):
    assert_same(start(len(TEXT)), PrefixKV.from_text(bare, Letters(), TEXT))


def test_longer_text_is_cut(start, bare):
    assert_same(start(4), PrefixKV.from_text(bare, Letters(), TEXT[:4]))


def test_shorter_text_is_repeated(start, bare):
    P = 2 * len(TEXT) + 2
    assert_same(start(P), PrefixKV.from_text(bare, Letters(), (3 * TEXT)[:P]))


def test_text_start_of_a_projection_trains(tiny, model):
    """Its last layer starts at zero, which must not stop the gradient for good."""
    config = PrefixConfig(9, init="text", init_text=TEXT, prefix_projection=True)
    tuned = PrefixTuningModel(model, config, Letters())
    ids, mask = tiny.batch()
    optimizer = torch.optim.AdamW(tuned.encoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(ids, mask, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_vocab_starts_from_random_tokens_of_the_vocabulary(model, bare):
    config = PrefixConfig(7, init="vocab")
    torch.manual_seed(5)
    kv = PrefixTuningModel(model, config).export()
    # the first layer's keys at position 0 are those of one of the tokens
    first = torch.cat(
        [PrefixKV.prefill(bare, [token]).keys[0] for token in range(bare.config.vocab_size)], 1
    )
    distance = (first - kv.keys[0][:, :1]).abs().amax((0, 2))
    assert distance.min() < 1e-5
    torch.manual_seed(5)
    again = PrefixTuningModel(model, config).export()
    assert_same(kv, again)
    other = PrefixTuningModel(model, config).export()
    assert not torch.equal(to_flat(other), to_flat(kv))


def test_random_start_has_the_standard_deviation_asked_for(model):
    config = PrefixConfig(50, init_std=0.3)
    flat = to_flat(PrefixTuningModel(model, config).export())
    assert flat.std().item() == pytest.approx(0.3, rel=0.05)
    assert flat.mean().item() == pytest.approx(0, abs=0.02)


def test_text_without_a_tokenizer_is_refused_before_anything_changes(model):
    with pytest.raises(ValueError, match="tokenizer"):
        PrefixTuningModel(model, PrefixConfig(4, init="text", init_text="abc"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_virtual_tokens", 0),
        ("num_virtual_tokens", -3),
        ("task_type", "SEQ_CLASS"),
        ("encoder_hidden_size", 0),
        ("position_offset", -1),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("init", "zeros"),
        ("init_text", "a text without init='text'"),
        ("init_std", -1.0),
        ("init_std", float("nan")),
    ],
)
def test_config_names_the_field_it_refuses(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        PrefixConfig(**{field: value})


def test_config_refuses_text_init_without_a_text():
    with pytest.raises(ValueError, match="init_text"):
        PrefixConfig(init="text")
