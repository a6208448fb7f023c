"""What callers who know PEFT's models, or a transformers model, look up on a tuned model."""

import copy
import logging
import pickle

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel

KINDS = {"prefix": (PrefixTuningModel, PrefixConfig), "prompt": (PromptTuningModel, PromptConfig)}


@pytest.fixture(params=KINDS)
def wrap(request):
    """A function that puts a loud prefix or prompt in front of a base."""
    kind, config = KINDS[request.param]

    def build(base, task_type="CAUSAL_LM"):
        return kind(base, config(num_virtual_tokens=4, task_type=task_type, init_std=1.0)).eval()

    return build


def words():
    """A tokenizer that needs no files: words "a0" to "a96", [PAD] as 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"a{n}": n for n in range(2, 97)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", padding_side="left"
    )


def classifier():
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sure = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    loud = {"vocab_size": 97, "num_attention_heads": 4, "initializer_range": 0.2}
    return BertForSequenceClassification(BertConfig(**sizes, **sure, **loud))


def test_adapters_are_named_as_in_peft(wrap):
    base = tiny.build("llama")
    tuned = wrap(base)
    assert tuned.get_base_model() is base
    assert list(tuned.peft_config) == ["default"]
    assert tuned.peft_config["default"].num_virtual_tokens == 4
    assert tuned.active_peft_config is tuned.peft_config["default"]
    assert tuned.active_adapters == ["default"]
    assert tuned.active_adapter == "default"


def test_the_active_adapter_of_several():
    tuned = PrefixTuningModel(tiny.build("llama"), PrefixConfig(num_virtual_tokens=4))
    other = PrefixConfig(num_virtual_tokens=3)
    tuned.add_adapter("other", other)
    assert list(tuned.peft_config) == ["default", "other"]
    tuned.set_adapter("other")
    assert tuned.active_adapters == ["other"]
    assert tuned.active_peft_config is other


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING", "P_TUNING"])
def test_configurations_tell_the_method_as_peft_does(kind):
    ours = {
        "PREFIX_TUNING": PrefixConfig(),
        "CARTRIDGE": PrefixConfig(peft_type="CARTRIDGE"),
        "PROMPT_TUNING": PromptConfig(),
        "P_TUNING": PromptConfig(encoder_reparameterization_type="MLP"),
    }[kind]
    theirs = peft.get_peft_config({"peft_type": kind, "num_virtual_tokens": 20})
    assert ours.peft_type == theirs.peft_type.value
    assert ours.is_prompt_learning is theirs.is_prompt_learning


# what Trainer, accelerate, trl and pipelines read of a model
SHARED = (
    *("_keys_to_ignore_on_save", "_no_split_modules", "_tied_weights_keys", "base_model_prefix"),
    *("add_model_tags", "can_generate", "device", "dtype", "enable_input_require_grads"),
    *("get_output_embeddings", "loss_function", "main_input_name", "model_tags", "name_or_path"),
    *("prepare_inputs_for_generation", "resize_token_embeddings", "tie_weights", "vocab_size"),
)
OWN = ["generate_batch", "disable_adapters", "enable_adapters", "merge_and_unload"]


def test_what_callers_ask_of_a_transformers_model_is_the_base_s(wrap):
    base = tiny.build("llama")
    tuned = wrap(base)
    for name in ("quantization_method", "hf_device_map", "is_loaded_in_8bit"):
        assert not hasattr(tuned, name), "what the base lacks it lacks"
    for name in SHARED:
        assert getattr(tuned, name) == getattr(base, name), name


def test_what_a_loader_hangs_on_the_base_shows(wrap):
    base = tiny.build("llama")
    tuned = wrap(base)
    base.hf_device_map = {"": 0}
    base.is_loaded_in_8bit = True
    assert tuned.hf_device_map == {"": 0}
    assert tuned.is_loaded_in_8bit


def test_modules_of_the_base_show(wrap):
    base = tiny.build("llama")
    tuned = wrap(base)
    assert tuned.lm_head is base.lm_head
    assert tuned.get_submodule("model.layers.0") is base.model.layers[0]


def test_a_loss_function_that_is_set_is_used(wrap):
    tuned = wrap(tiny.build("llama"))
    tuned.loss_function = lambda logits, labels, **_: logits.new_tensor(7.0)
    ids = torch.randint(3, tiny.VOCAB, (2, 5))
    assert tuned(input_ids=ids, labels=ids).loss.item() == 7.0


def test_what_would_leave_out_the_prefix_is_not_the_base_s(wrap):
    tuned = wrap(tiny.build("llama"))
    for name in OWN:
        with pytest.raises(AttributeError, match=name):
            getattr(tuned, name)


def test_accelerate_s_hooks_stay_where_they_were_put(wrap):
    base = tiny.build("llama")
    tuned = wrap(base)
    ids = torch.randint(3, tiny.VOCAB, (2, 5))
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        add_hook_to_module(base, AlignDevicesHook(execution_device="cpu"))
        assert not hasattr(tuned, "_hf_hook")
        assert not hasattr(tuned, "_old_forward")
        add_hook_to_module(tuned, AlignDevicesHook(execution_device="cpu"))
        assert torch.equal(tuned(input_ids=ids).logits, expected)
        remove_hook_from_module(tuned, recurse=True)
        assert torch.equal(tuned(input_ids=ids).logits, expected)


def test_copies_and_missing_attributes(wrap):
    tuned = wrap(tiny.build("llama"))
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tuned.no_such_thing
    copied = copy.deepcopy(tuned)
    assert copied.get_base_model() is copied.base_model is not tuned.base_model
    loaded = pickle.loads(pickle.dumps(tuned.encoder))
    assert torch.equal(next(loaded.parameters()), next(tuned.encoder.parameters()))
    with pytest.raises(AttributeError, match="base_model"):
        _ = type(tuned).__new__(type(tuned)).base_model


def test_a_tuned_model_in_front_of_another_is_refused(wrap):
    tuned = wrap(tiny.build("llama"))
    with pytest.raises(ValueError, match=rf"model: got a {type(tuned).__name__} with P"):
        PrefixTuningModel(tuned, PrefixConfig())


@pytest.fixture
def errors(monkeypatch):
    """What transformers' pipelines log as errors."""
    found = []
    logger = logging.getLogger("transformers.pipelines.base")
    monkeypatch.setattr(logger, "error", lambda message, *_, **__: found.append(message))
    return found


def test_text_generation_pipeline(wrap, errors):
    tokenizer, base = words(), tiny.build("llama")
    texts = ["a5 a9 a20", "a30 a31 a7 a8 a40"]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    bare = pipeline("text-generation", model=tiny.build("llama"), tokenizer=tokenizer, device=-1)
    without = [row[0]["generated_text"] for row in bare(texts, batch_size=2, **options)]
    tuned = wrap(base)
    made = pipeline("text-generation", model=tuned, tokenizer=tokenizer, device=-1)
    found = [row[0]["generated_text"] for row in made(texts, batch_size=2, **options)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    ids = tuned.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert found == tokenizer.batch_decode(ids[:, 5:], skip_special_tokens=True)
    assert found != without
    assert errors == []


def test_text_classification_pipeline(wrap, errors):
    tokenizer = words()
    texts = ["a5 a9 a20", "a30 a31 a7"]
    bare = pipeline(
        "text-classification", model=classifier().eval(), tokenizer=tokenizer, device=-1
    )
    tuned = wrap(classifier().eval(), "SEQ_CLS")
    made = pipeline("text-classification", model=tuned, tokenizer=tokenizer, device=-1)
    found = made(texts, top_k=None)
    with torch.no_grad():
        logits = tuned(**tokenizer(texts, return_tensors="pt")).logits
    for row, scores in zip(found, logits.softmax(-1), strict=True):
        for entry in row:
            index = int(entry["label"].removeprefix("LABEL_"))
            assert entry["score"] == pytest.approx(scores[index].item(), abs=1e-6)
    assert found != bare(texts, top_k=None)
    assert errors == []


def test_the_trainer_takes_a_prefix_on_a_quantised_base(wrap, tmp_path):
    base = tiny.build("llama")
    base.is_quantized = True
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(base, arguments)
    Trainer(wrap(base), arguments)
