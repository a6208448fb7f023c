"""Adapters that one set of versions saved give the same logits under another.

    python tests/versions/adapters.py save FOLDER     # in one environment
    python tests/versions/adapters.py check FOLDER    # in another

Weights, inputs and logits lie beside each adapter, so that nothing depends on how a release draws
its random numbers. A new prefix must also get the position offset that the saved one has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from fastprefix import (
    PrefixConfig,
    PrefixKV,
    PrefixTuningModel,
    PromptConfig,
    PromptTuningModel,
    use_prefix,
)

P = 5
CLOSE = 1e-6  # of float64: an offset that moved by one gives 1e-2 and more
_SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
_T5: dict[str, Any] = {
    "vocab_size": 101,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "initializer_factor": 2.0,
    "pad_token_id": 0,
    "eos_token_id": None,
    "decoder_start_token_id": 0,
}


def _decoder() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SMALL, num_key_value_heads=2))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _decoder,
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**_SMALL, num_key_value_heads=2, sliding_window=6)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**_SMALL, num_labels=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_SMALL, num_labels=3)),
    "electra": lambda: ElectraForSequenceClassification(
        ElectraConfig(**_SMALL, num_labels=3, embedding_size=32)
    ),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
}
_CLASSIFIER = PrefixConfig(P, task_type="SEQ_CLS", init_std=1.0)
_PREFIX = PrefixConfig(P, init_std=1.0)
_LORA = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
# what it is called: the model, and the configuration, or None for a prompt's own keys and values
KINDS: dict[str, tuple[str, PrefixConfig | PromptConfig | None]] = {
    "llama prefix": ("llama", _PREFIX),
    "llama prefix of an MLP": ("llama", PrefixConfig(P, prefix_projection=True, init_std=1.0)),
    "llama prefix with a gate": ("llama", PrefixConfig(P, gated=True, init_std=1.0)),
    "llama prefix with LoRA": ("llama", _PREFIX),
    "mistral prefix in the window": ("mistral", PrefixConfig(P, prefix_in_window=True)),
    "gpt2 prefix": ("gpt2", _PREFIX),
    "bert classifier": ("bert", _CLASSIFIER),
    "roberta classifier": ("roberta", _CLASSIFIER),
    "electra classifier": ("electra", _CLASSIFIER),
    "t5 prefix": ("t5", PrefixConfig(P, task_type="SEQ_2_SEQ_LM", init_std=1.0)),
    "llama prompt tuning": ("llama", PromptConfig(P, init_std=1.0)),
    "llama P-tuning": ("llama", PromptConfig(P, encoder_reparameterization_type="MLP")),
    "llama infix": ("llama", PromptConfig(P, placement="infix")),
    "llama prompt file": ("llama", None),
    "mistral prompt file": ("mistral", None),
}


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A right-padded batch, which every kind of model takes."""
    ids = (torch.arange(16).reshape(2, 8) * 7) % 98 + 2
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    return inputs


def _new(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


@torch.no_grad()
def _logits(tuned: Any, model: PreTrainedModel, config: Any) -> Tensor:
    inputs = _inputs(model)
    if isinstance(config, PromptConfig) and config.placement == "infix":
        inputs["infix_positions"] = torch.tensor([2, 5])
    logits: Tensor = tuned(**inputs).logits
    keep = inputs["attention_mask"].bool() if logits.shape[:2] == (2, 8) else slice(None)
    return logits[keep]


def _with_prompt(model: PreTrainedModel, kv: PrefixKV) -> Tensor:
    with use_prefix(model, kv):
        return _logits(model, model, None)


def save(folder: Path) -> None:
    """Writes every kind, each in a folder of its own."""
    for kind, (name, config) in KINDS.items():
        place = folder / kind.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        base = model = _new(name)
        save_file({k: v.clone() for k, v in model.state_dict().items()}, place / "base.safetensors")
        bare = _logits(model, model, None)
        if config is None:
            kv = PrefixKV.prefill(model, torch.arange(3, 12)[None])
            kv.save(place / "prompt.safetensors")
            logits = _with_prompt(model, kv)
        else:
            if kind.endswith("LoRA"):
                base = get_peft_model(model, _LORA)
            make = PromptTuningModel if isinstance(config, PromptConfig) else PrefixTuningModel
            tuned = make(base, config).eval()
            with torch.no_grad():
                for parameter in tuned.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(0, 0.5)
            tuned.save_pretrained(place / "adapter")
            logits = _logits(tuned, model, config)
        if bare.shape == logits.shape and (bare - logits).abs().max() < 1e-2:
            raise AssertionError(f"{kind}: the adapter changes nothing that could be compared")
        save_file({"logits": logits.contiguous()}, place / "logits.safetensors")


def check(folder: Path) -> list[str]:
    """Loads every kind and compares; returns what differs."""
    wrong = []
    for kind, (name, config) in KINDS.items():
        place = folder / kind.replace(" ", "-")
        model = _new(name)
        model.load_state_dict(load_file(place / "base.safetensors"), strict=False)
        model.tie_weights()
        if config is None:
            logits = _with_prompt(model, PrefixKV.load(place / "prompt.safetensors"))
        else:
            make = PromptTuningModel if isinstance(config, PromptConfig) else PrefixTuningModel
            tuned = make.from_pretrained(model, place / "adapter")
            logits = _logits(tuned, model, config)
            if isinstance(tuned, PrefixTuningModel):
                saved = tuned.export().position_offset
                new = PrefixTuningModel(_new(name), config).export().position_offset
                if saved != new:
                    wrong.append(f"{kind}: saved with a position offset of {saved}, now {new}")
        expected = load_file(place / "logits.safetensors")["logits"]
        error = (logits - expected).abs().max().item()
        print(f"{kind}: {error:.1e}")
        if not error < CLOSE:
            wrong.append(f"{kind}: {error:.1e}")
    return wrong


def main() -> None:
    """Saves or checks, by the first argument."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["save", "check"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "save":
        save(arguments.folder)
        return
    wrong = check(arguments.folder)
    print(f"{len(KINDS) - len(wrong)} passed, {len(wrong)} failed")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
