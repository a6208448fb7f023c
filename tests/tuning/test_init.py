"""Where a prefix starts, and what PrefixConfig refuses."""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixKV, PrefixTuningModel
from fastprefix.encoders import resize
from fastprefix.kv import to_flat
from fastprefix_testing import zoo


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


def test_text_start_of_a_projection_trains(model):
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


@pytest.mark.parametrize("projection", [False, True])
def test_zero(model, projection):
    config = PrefixConfig(4, init="zero", prefix_projection=projection)
    assert not to_flat(PrefixTuningModel(model, config).export()).any()


@pytest.mark.parametrize("projection", [False, True])
def test_orthogonal(model, projection):
    config = PrefixConfig(4, init="orthogonal", init_std=0.5, prefix_projection=projection)
    for tensor in PrefixTuningModel(model, config).export().keys:
        tokens = tensor.transpose(0, 1).flatten(1)
        expected = 0.25 * tokens.shape[1] * torch.eye(4)
        torch.testing.assert_close(tokens @ tokens.T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("projection", [False, True])
def test_start_from_files_of_another_prefix(model, projection, tmp_path):
    kv = tiny.random_kv(model, 5)
    kv.save(tmp_path / "kv.safetensors")
    PrefixTuningModel(tiny.from_config(model.config), PrefixConfig(5)).save_pretrained(tmp_path)
    for path in (tmp_path / "kv.safetensors", tmp_path):
        for P, method in ((5, "pad"), (3, "pad"), (8, "pad"), (7, "repeat"), (9, "resample")):
            config = PrefixConfig(
                P,
                init="prefix",
                init_prefix=str(path),
                init_resize=method,
                prefix_projection=projection,
            )
            start = PrefixTuningModel(model, config).export()
            source = kv if path.suffix else PrefixTuningModel.from_pretrained(model, path).export()
            torch.manual_seed(P)
            expected = resize(source, P, method)
            known = slice(None, 5) if method == "pad" else slice(None)
            for got, want in zip(
                start.keys + start.values, expected.keys + expected.values, strict=True
            ):
                assert got.shape == want.shape
                assert torch.equal(got[:, known], want[:, known])


def test_prefix_of_another_model_is_refused_before_anything_changes(model, tmp_path):
    file = str(tmp_path / "kv.safetensors")
    key = torch.zeros(2, 5, 3)
    PrefixKV([key], [key.clone()], 5).save(file)
    with pytest.raises(ValueError, match=r"init_prefix: .* of 1 layers"):
        PrefixTuningModel(model, PrefixConfig(4, init="prefix", init_prefix=file))
    with pytest.raises(FileNotFoundError, match="nothing"):
        PrefixTuningModel(model, PrefixConfig(init="prefix", init_prefix=f"{tmp_path}/nothing"))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fields", [{"layers": [1]}, {"layer_lengths": [0, 3, 9]}])
def test_text_start_of_chosen_layers(model, bare, fields):
    config = PrefixConfig(9, init="text", init_text=TEXT, num_frozen_tokens=1, **fields)
    kv = PrefixTuningModel(model, config, Letters()).export()
    whole = PrefixKV.from_text(bare, Letters(), TEXT)
    lengths = fields.get("layer_lengths", [0, 9, 0])
    for slot, length in enumerate(lengths):
        for got, want in zip(kv.layer(slot), whole.layer(slot), strict=True):
            assert torch.equal(got, want[:, :length])


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
        ("init_prefix", "a file without init='prefix'"),
        ("init_resize", "stretch"),
        ("init_std", float("inf")),
        ("encoder_reparameterization_type", "GRU"),
        ("encoder_reparameterization_type", "LSTM"),  # without prefix_projection
        ("encoder_num_layers", 0),
        ("encoder_num_layers", 3),
        ("encoder_num_layers", 4),
        ("encoder_per_layer", True),
        ("encoder_orthogonal", True),
        ("layers", []),
        ("layers", [1, -1]),
        ("layers", [1, 1]),
        ("layer_lengths", [0, 0]),
        ("layer_lengths", [5, 19]),
        ("layer_lengths", [20, -1]),
        ("num_frozen_tokens", -1),
        ("num_frozen_tokens", 20),
        ("init_text", "a text without init='text'"),
        ("init_std", -1.0),
        ("init_std", float("nan")),
    ],
)
def test_config_names_the_field_it_refuses(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        PrefixConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("init_text", {"init": "text"}),
        ("init_prefix", {"init": "prefix"}),
        ("encoder_per_layer", {"encoder_reparameterization_type": "LSTM"}),
        ("share_layers", {}),
        ("layers", {"layers": [0], "layer_lengths": [20]}),
        ("num_frozen_tokens", {"layer_lengths": [0, 3, 20], "num_frozen_tokens": 3}),
    ],
)
def test_config_names_the_field_that_does_not_go_with_others(field, fields):
    own = {} if field in fields or "init" in fields else {field: True}
    with pytest.raises(ValueError, match=f"^{field}: got"):
        PrefixConfig(**{"prefix_projection": "init" not in fields, **own, **fields})


@pytest.mark.parametrize("value", ["012", [0, 1.0], [True]])
def test_config_takes_lists_of_integers(value):
    for field in ("layers", "layer_lengths"):
        with pytest.raises(TypeError, match=f"^{field}: got"):
            PrefixConfig(**{field: value})


def first_layer_alone(name, layer):
    """The same weights in a model whose only layer is that layer of the whole model."""
    whole = zoo.kind(name, torch.float32)
    one = zoo.kind(name, torch.float32)
    others = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "bert": "bert.encoder.layer"}
    stack = others.get(name, "model.layers")
    layers = one.get_submodule(stack)
    layers[0].load_state_dict(whole.get_submodule(stack)[layer].state_dict())
    return one


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "bert"])
def test_embeddings_as_though_each_layer_were_the_first(name):
    config = PrefixConfig(len(TEXT), init="embeddings", init_text=TEXT, position_offset=0)
    model = zoo.kind(name, torch.float32)
    kv = PrefixTuningModel(model, config, Letters()).export()
    plain = PrefixConfig(len(TEXT), init="text", init_text=TEXT, position_offset=0)
    for layer in range(2):
        one = first_layer_alone(name, layer)
        text = PrefixTuningModel(one, plain, Letters()).export()
        assert hooks(model) == hooks(one)
        torch.testing.assert_close(kv.keys[layer], text.keys[0])
        torch.testing.assert_close(kv.values[layer], text.values[0])
    assert not torch.allclose(kv.values[1], text.values[1], atol=1e-2), "of the layers below it"


def test_embeddings_of_an_encoder_decoder_are_refused():
    config = PrefixConfig(4, init="embeddings", init_text=TEXT)
    with pytest.raises(ValueError, match="of an encoder-decoder has no embeddings"):
        PrefixTuningModel(zoo.kind("t5"), config, Letters())
