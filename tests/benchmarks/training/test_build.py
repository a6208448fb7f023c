"""What each method trains and stores, counted by hand. It trains nothing else."""

import pytest
import torch
from safetensors import safe_open
from transformers import BertConfig, BertForSequenceClassification

import fastprefix_testing.models as tiny
from training.build import Bottleneck, build
from training.plan import METHODS, Method

HIDDEN = 32


@pytest.fixture
def bert():
    config = BertConfig(
        vocab_size=99, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, num_labels=5,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


HEAD = HIDDEN * 5 + 5
# per layer: query, key, value, output, two of the feed-forward, two of layer norms
BIASES = 2 * (4 * HIDDEN + 48 + HIDDEN + 2 * HIDDEN) + HIDDEN + HIDDEN  # and embeddings', pooler's
COUNTS = {
    "none": (0, 0),
    "head": (HEAD, HEAD),
    "bitfit": (BIASES + HEAD, BIASES + HEAD),
    "lora": (2 * 2 * 2 * 3 * HIDDEN + HEAD,) * 2,
    "bottleneck": (2 * (2 * 3 * HIDDEN + 3 + HIDDEN) + HEAD,) * 2,
    "prefix": (2 * 2 * 7 * HIDDEN + HEAD,) * 2,
    "prompt": (7 * HIDDEN + HEAD,) * 2,
}
OPTIONS = {
    "lora": {"r": 3},
    "bottleneck": {"width": 3},
    "prefix": {"num_virtual_tokens": 7},
    "prompt": {"num_virtual_tokens": 7},
}


def made(kind, model, **options):
    method = Method(kind, kind, kind, OPTIONS.get(kind, {}) | options, rates=(1e-2,))
    return build(method, model, None, "SEQ_CLS")


@pytest.mark.parametrize("kind", [*COUNTS, "full"])
def test_what_is_trained_and_stored(bert, kind, tmp_path):
    everything = sum(p.numel() for p in bert.parameters())
    before = {name: p.detach().clone() for name, p in bert.named_parameters()}
    built = made(kind, bert)
    assert (built.trainable, built.stored) == COUNTS.get(kind, (everything, everything))
    if kind == "none":
        assert built.bytes_on_disk() == 0
        return

    trained = [p for p in built.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == built.trainable
    built.save(tmp_path)
    stored = 0
    for file in tmp_path.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            stored += sum(opened.get_tensor(name).numel() for name in opened.offset_keys())
    assert stored == built.stored
    assert built.bytes_on_disk() > 4 * stored

    ids = torch.arange(12).reshape(2, 6)
    labels = torch.tensor([1, 4])
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # LoRA's and the bottleneck's one half wait for the other
        built.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {
        name for name, p in bert.named_parameters() if name in before and (p != before[name]).any()
    }
    expected = {
        "bitfit": {name for name in before if name.endswith("bias") or "classifier" in name},
        "full": set(before),
    }.get(kind, {name for name in before if "classifier" in name})
    # softmax does not see what moves all keys alike
    hidden_from_gradients = {name for name in before if name.endswith("key.bias")}
    assert changed <= expected
    assert {n for n in expected if n in changed or n in hidden_from_gradients} == expected or (
        kind in ("full", "lora", "prefix", "prompt")
    )


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_a_fresh_adapter_changes_nothing(bert, kind):
    ids = torch.arange(12).reshape(2, 6)
    before = bert(input_ids=ids).logits
    tuned = made(kind, bert).model.eval()
    torch.testing.assert_close(tuned(input_ids=ids).logits, before, rtol=0, atol=0)


def test_a_bottleneck_is_its_equation():
    layer = Bottleneck(6, 2).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, 6, dtype=torch.float64)
    inner = torch.nn.functional.gelu(x @ layer.down.weight.T + layer.down.bias)
    expected = x + inner @ layer.up.weight.T + layer.up.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["bitfit", "head"])
def test_what_a_model_lacks_is_refused(kind):
    with pytest.raises(ValueError, match=kind):
        made(kind, tiny.build("llama"))


@pytest.mark.parametrize("method", METHODS["e2e"], ids=lambda m: m.name)
def test_every_method_of_e2e_can_be_built(source, method):
    built = build(method, source.load("e2e", 0, torch.float32), source.tokenizer(), "CAUSAL_LM")
    assert (built.trainable > 0) == (method.kind != "none")
    assert built.infix == (method.options.get("placement") == "infix")
