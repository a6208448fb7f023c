"""fallback="expand": prefixes that are trained, saved and loaded."""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import (
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    UnsupportedModelError,
)
from fastprefix_testing.fallback import P, close, make, plain_logits, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:.*fallback='expand' the prefix is copied")


@pytest.mark.parametrize("name", ["falcon new", "bloom", "mpt", "megatron_bert"])
def test_a_prefix_is_trained_saved_and_loaded(name, tmp_path):
    config = PrefixConfig(num_virtual_tokens=4, fallback="expand", init_std=0.5)
    tuned = PrefixTuningModel(make(name), config)
    optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), lr=1.0)
    ids, mask = tiny.batch((7, 4, 2), "right")
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    for _ in range(2):
        loss = tuned(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0] - 1e-3
    tuned.eval().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="fallback='expand'"):
        PrefixTuningModel.from_pretrained(make(name), tmp_path)
    loaded = PrefixTuningModel.from_pretrained(make(name), tmp_path, fallback="expand")
    with torch.no_grad():
        logits = loaded(input_ids=ids, attention_mask=mask).logits
        close(logits, tuned(input_ids=ids, attention_mask=mask).logits)
        for row, text in enumerate(rows_of(ids, mask)):
            wanted = plain_logits(make(name), text, tuned.export())
            close(logits[row][mask[row].bool()], wanted)
    assert tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2).shape == (3, 9)
    with tuned.disable_adapter():
        assert torch.equal(tuned(input_ids=ids).logits, make(name)(ids).logits)


@pytest.mark.parametrize("init", ["text", "embeddings"])
def test_a_prefix_starts_from_a_text(init):
    def tokenizer(text):
        return {"input_ids": [3, 1, 4, 1, 5][: len(text)]}

    config = PrefixConfig(5, init=init, init_text="abcde", fallback="expand")
    if init == "embeddings":
        with pytest.raises(ValueError, match="takes 'text'"):
            PrefixTuningModel(make("bloom"), config, tokenizer)
        return
    kv = PrefixTuningModel(make("bloom"), config, tokenizer).export()
    wanted = PrefixKV.prefill(make("bloom"), [3, 1, 4, 1, 5], fallback="expand")
    for x, y in zip(kv.keys, wanted.keys, strict=True):
        close(x, y)


@pytest.mark.parametrize(
    ("field", "given"), [("layers", [0]), ("gated", True), ("prefix_bias", "learned")]
)
def test_configs_for_what_the_cache_cannot_hold(field, given):
    config = PrefixConfig(P, fallback="expand", **{field: given})
    with pytest.raises(ValueError, match=f"{field}: got .* fallback='expand'"):
        PrefixTuningModel(make("bloom"), config)
