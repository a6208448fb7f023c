"""Models that see: an image in the text, in the prompt, in both; against plain transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from fastprefix import (
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    patch_model,
    unpatch_model,
    use_prefix,
)
from fastprefix.hf import UnsupportedModelError, patch_of
from fastprefix.hf.multimodal import language_model

EXACT = {"rtol": 0, "atol": 1e-9}
P = 5
IMAGE, VIDEO, START, END = 90, 91, 92, 93
TOKENS = 4  # of an image
TEXT: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
THREE_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
QWEN = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 2,
    "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3, "out_hidden_size": 32,
}  # fmt: skip
OWN = {"image_token_id": IMAGE, "video_token_id": VIDEO}
WITH_AXES: dict[str, Any] = {"text_config": {**TEXT, "rope_parameters": THREE_AXES}, **OWN}


def on(language: str, tower: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Fields of a model that has the same tower and a language model of some kind."""
    return {
        "text_config": {"model_type": language, **TEXT},
        "vision_config": tower,
        "image_token_id": IMAGE,
        **fields,
    }


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        on("llama", {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
           image_token_index=IMAGE, vision_feature_layer=-1),
    ),
    "idefics3": ("Idefics3ForConditionalGeneration", on("llama", TOWER, scale_factor=1)),
    "internvl": (
        "InternVLForConditionalGeneration",
        on("qwen2", {**TOWER, "image_size": [8, 8], "patch_size": [2, 2]}, downsample_ratio=0.5),
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        on("mistral", {**TOWER, "model_type": "pixtral", "patch_size": 2, "head_dim": 8},
           image_token_index=IMAGE, spatial_merge_size=2),
    ),
    # windows, out of which prompts slide, and images whose tokens see each other on both sides
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": {**TEXT, "sliding_window": 12, "query_pre_attn_scalar": 8,
                         "layer_types": ["sliding_attention", "full_attention"]},
         "vision_config": TOWER, "image_token_index": IMAGE, "image_token_id": IMAGE,
         "mm_tokens_per_image": TOKENS, "boi_token_index": START, "eoi_token_index": END},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {**WITH_AXES, "vision_config": {**QWEN, "embed_dim": 16, "hidden_size": 32,
                                        "mlp_ratio": 2}},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {**WITH_AXES, "vision_config": {**QWEN, "window_size": 8, "fullatt_block_indexes": [1]}},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {**WITH_AXES, "vision_config": {**QWEN, "num_position_embeddings": 16,
                                        "deepstack_visual_indexes": [0]}},
    ),
    "glm4v": (
        "Glm4vForConditionalGeneration",
        {**WITH_AXES, "vision_config": {**QWEN, "image_size": 8},
         "text_config": {**TEXT, "rope_parameters": {**THREE_AXES, "partial_rotary_factor": 1.0}}},
    ),
}  # fmt: skip
TWO_SIDED = {
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        on("gemma", {**TOWER, "model_type": "siglip_vision_model", "projection_dim": 32},
           image_token_index=IMAGE, projection_dim=32, hidden_size=32),
    ),
}  # fmt: skip
AXES = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"}
BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def build(name: str) -> Any:
    """A model in eval mode and float64; the same name gives the same weights."""
    model_class, fields = {**MODELS, **TWO_SIDED}[name]
    make: Any = getattr(transformers, model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(make.config_class(**copy.deepcopy(fields)))
        for parameter in model.parameters():
            mean = parameter.mean().item() if parameter.dim() == 1 else 0.0
            nn.init.normal_(parameter, mean, 0.2)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.double().eval()


def inputs(
    name: str, rows: int = 1, *, before: int = 3, after: int = 4, seed: int = 0, image: bool = True
) -> dict[str, Tensor]:
    """Rows of text, an image and text, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (rows, before + TOKENS + 2 + after), generator=generator)
    types = torch.zeros_like(ids)
    if image:
        ids[:, before], ids[:, before + TOKENS + 1] = START, END
        ids[:, before + 1 : before + TOKENS + 1] = IMAGE
        types[:, before + 1 : before + TOKENS + 1] = 1
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not image:
        return made
    shape = (16 * rows, 12) if name in AXES else (rows, 3, 8, 8)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    made["pixel_values"] = pixels[:, None] if name == "idefics3" else pixels
    if name in AXES:
        made |= {"image_grid_thw": torch.tensor([[1, 4, 4]] * rows), "mm_token_type_ids": types}
    if name == "gemma3":
        made["token_type_ids"] = types
    if name == "mistral3":
        made["image_sizes"] = torch.tensor([[8, 8]] * rows)
    return made


def joined(front: dict[str, Tensor], text: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prompt and text as one sequence."""
    made = {}
    for name in {**front, **text}:
        parts = [x[name] for x in (front, text) if name in x]
        if name in BY_TOKEN:
            parts = [x.get(name, torch.zeros_like(x["input_ids"])) for x in (front, text)]
        made[name] = torch.cat(parts, 1 if name in BY_TOKEN or parts[0].dim() == 5 else 0)
    return made


def left_padded(given: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    pad = nn.functional.pad
    return {name: pad(x, (by, 0)) if name in BY_TOKEN else x for name, x in given.items()}


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    ids = model.generate(**given, max_new_tokens=6, do_sample=False, **options)
    return ids[:, given["input_ids"].shape[1] :]


def learned(model: Any) -> PrefixKV:
    generator = torch.Generator().manual_seed(3)

    def draw(heads: int, size: int) -> Tensor:
        return torch.randn(heads, P, size, generator=generator, dtype=torch.float64)

    shapes = patch_of(model).shapes
    return PrefixKV(
        tuple(draw(x.num_heads, x.key_size) for x in shapes),
        tuple(draw(x.num_heads, x.value_size) for x in shapes),
        P,
    )


@torch.no_grad()
def behind_copies(model: Any, kv: PrefixKV, given: dict[str, Tensor]) -> Tensor:
    """Logits of a bare model with the prefix in the cache, as its outer part places the text."""
    inside, told = language_model(model), {}
    handle = inside.register_forward_pre_hook(lambda _, a, k: told.update(k), with_kwargs=True)
    model(**given, use_cache=False)
    handle.remove()
    B, L = given["input_ids"].shape
    cache = DynamicCache()
    for layer in range(kv.num_layers):
        cache.update(*(x.expand(B, -1, -1, -1) for x in kv.layer(layer)), layer)
    positions = told.get("position_ids")
    positions = torch.arange(L).expand(B, L) if positions is None else positions
    told |= {"position_ids": positions + P, "past_key_values": cache, "use_cache": True}
    told |= {"attention_mask": torch.ones(B, P + L, dtype=torch.long)}
    told.pop("cache", None)
    return model.get_output_embeddings()(inside(**told).last_hidden_state)


@pytest.mark.parametrize("name", MODELS)
def test_patched_models_see_as_before(name):
    """An image may come after a probe that had only text, and only the text has slots."""
    model, bare = build(name), build(name)
    given = inputs(name, 2)
    with torch.no_grad():
        expected = bare(**given).logits
        got = patch_model(model)(**given).logits
        assert patch_of(model).groups == ("decoder", "decoder")
        assert torch.equal(generate(model, given), generate(bare, given))
        seen = unpatch_model(model)(**given).logits
        patch_model(model, example=given)
        assert patch_of(model).groups == ("decoder", "decoder")
    torch.testing.assert_close(got, expected, **EXACT)
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma3"])
def test_a_learned_prefix_and_an_image(name):
    """An image's own positions, moved behind the prefix."""
    model = patch_model(build(name))
    kv, given = learned(model), inputs(name, 2)
    expected = behind_copies(build(name), kv, given)
    with torch.no_grad(), use_prefix(model, kv):
        got = model(**given).logits
        embedded = model(**{**given, "attention_mask": None}).logits
        greedy = generate(model, given)
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(embedded, expected, **EXACT)
    assert torch.equal(greedy[:, 0], expected[:, -1].argmax(-1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("where", ["prompt", "text", "both"])
def test_prompts_equal_the_whole_sequence(name, where):
    """An image in the prompt, in the text, in both: logits and greedy ids."""
    model, bare = build(name), build(name)
    front = inputs(name, before=2, seed=1, image=where != "text")
    text = inputs(name, seed=2, image=where != "prompt")
    whole, length = joined(front, text), front["input_ids"].shape[1]
    before = [x.rope_deltas for x in model.modules() if hasattr(x, "rope_deltas")]
    kv = PrefixKV.prefill(model, **front)
    assert [x.rope_deltas for x in model.modules() if hasattr(x, "rope_deltas")] == before
    assert kv.num_virtual_tokens == length
    saved = TOKENS - 2 if name in AXES and where != "text" else 0  # 2 x 2 patches in 2 positions
    assert kv.position_offset == length - saved
    with torch.no_grad():
        expected, greedy = bare(**whole).logits[:, length:], generate(bare, whole)
        with use_prefix(model, kv):
            got = model(**text).logits
            padded = model(**left_padded(text, 3)).logits[:, 3:]
            found = [generate(model, x) for x in (text, left_padded(text, 3))]
            found.append(generate(model, text, cache_implementation="static"))
        without = build(name)(**text).logits
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(padded, expected, **EXACT)
    for ids in found:
        assert torch.equal(ids, greedy)
    assert not torch.allclose(without, expected, atol=1e-2)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_forwards_over_a_cache(name):
    model, bare = build(name), build(name)
    front, text = inputs(name, seed=1), inputs(name, seed=2)
    more = {"input_ids": torch.tensor([[7, 9]]), "attention_mask": torch.ones(1, 2).long()}
    with torch.no_grad():
        expected = bare(**joined(joined(front, text), more)).logits[:, -2:]
        with use_prefix(model, PrefixKV.prefill(model, **front)):
            text.pop("attention_mask")
            cache = model(**text, use_cache=True).past_key_values
            got = model(more["input_ids"], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_rows_with_prefixes_of_their_own(name):
    model = build(name)
    kv = {
        "seen": PrefixKV.prefill(model, **inputs(name, seed=1)),
        "read": PrefixKV.prefill(model, **inputs(name, seed=2, before=1, image=False)),
    }
    given = inputs(name, 3)
    rows = ["seen", None, "read"]
    expected = []
    with torch.no_grad():
        for row in rows:
            with use_prefix(model, kv[row] if row else None):
                expected.append(model(**given).logits)
        with use_prefix(model, kv, rows):
            got = model(**given).logits
    for row in range(3):
        torch.testing.assert_close(got[row], expected[row][row], **EXACT)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_training_a_prefix_on_images(name):
    tuned = PrefixTuningModel(build(name), PrefixConfig(num_virtual_tokens=P))
    given = inputs(name, 2)
    tuned.train()(**given, labels=given["input_ids"]).loss.backward()
    gradients = [x.grad for x in tuned.parameters() if x.requires_grad]
    assert gradients
    assert all(x is not None and x.abs().max() > 1e-9 for x in gradients)


def test_what_makes_no_prompt():
    model = build("qwen2_5_vl")
    given = inputs("qwen2_5_vl")
    ids = given["input_ids"]
    refused = {
        "config's image_token_id, takes pixel_values": ({"input_ids": ids}, ValueError),
        "did you mean pixel_values": ({"input_ids": ids, "pixel_value": ids}, TypeError),
        "labels: got Tensor, takes None": ({**given, "labels": ids}, TypeError),
        "takes one of them": ({}, TypeError),
        "attention_mask: got .*, takes ones alone": (
            {**given, "attention_mask": torch.zeros_like(ids)}, ValueError
        ),
        "input_ids: got": (inputs("qwen2_5_vl", 2), ValueError),
    }  # fmt: skip
    for message, (wrong, error) in refused.items():
        with pytest.raises(error, match=message):
            PrefixKV.prefill(model, **wrong)
    embeds = model.get_input_embeddings()(ids[:, :2])
    one, other = PrefixKV.prefill(model, inputs_embeds=embeds), PrefixKV.prefill(model, ids[:, :2])
    for x, y in zip(one.keys + one.values, other.keys + other.values, strict=True):
        assert torch.equal(x, y)


def test_a_prompt_that_would_see_the_text():
    """PaliGemma's tokens see each other on both sides, by what types they have."""
    model = build("paligemma")
    model.set_attn_implementation("eager")
    given = inputs("paligemma")
    with pytest.raises(ValueError, match="prompt sees the text"):
        PrefixKV.prefill(model, **given)
    types = torch.zeros_like(given["input_ids"])
    with pytest.raises(ValueError, match="prompt sees the text"):
        PrefixKV.prefill(model, **given, token_type_ids=types)


def test_a_model_that_sees_both_sides_where_it_has_no_mask():
    """With sdpa PaliGemma is causal only if a row is padded."""
    model = build("paligemma")
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match="without a prefix"):
        patch_model(model)


def test_cross_attention_to_an_image_is_refused():
    """Mllama's language model has layers that run only for an image."""
    fields = {
        "text_config": {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1],
                        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                          "num_global_layers": 1, "attention_heads": 2, "image_size": 8,
                          "patch_size": 4, "max_num_tiles": 1, "vision_output_dim": 32,
                          "intermediate_layers_indices": [0],
                          "supported_aspect_ratios": [[1, 1]]},
        "image_token_index": IMAGE,
    }  # fmt: skip
    make = transformers.MllamaForConditionalGeneration
    model = patch_model(make(make.config_class(**fields)).double().eval())
    assert patch_of(model).groups == ("decoder", "decoder")
    ids = torch.tensor([[5, 6, 7]])
    picture = {
        "pixel_values": torch.randn(1, 1, 1, 3, 8, 8, dtype=torch.float64),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 3, 1, 1, dtype=torch.long),
    }
    kv = PrefixKV.prefill(model, ids)
    with torch.no_grad(), use_prefix(model, kv):
        model(ids)
        with pytest.raises(ValueError, match=r"MllamaTextCrossAttention: .* did not run"):
            model(ids, **picture)
    with pytest.raises(NotImplementedError, match="MllamaTextCrossAttention: did not run"):
        PrefixKV.prefill(model, ids, **picture)
