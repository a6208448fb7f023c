"""The architectures: a tiny random model of each, and inputs for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn

Family = Literal["decoder", "encoder", "vision", "encoder-decoder"]
Row = dict[str, Tensor]  # one sequence's keyword arguments for forward(), unpadded, batch 1

VOCAB, PAD = 101, 0
WINDOW = 6  # shorter than prefix and text together, so that a window which counts wrongly shows
SOURCE = 7  # frames or tokens that an encoder-decoder's encoder reads at most

_TEXT: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD}
_NO_EOS: dict[str, Any] = {**_TEXT, "bos_token_id": None, "eos_token_id": None}
_GROUPED: dict[str, Any] = {
    **_NO_EOS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads: nobody may derive it from these
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_TWO_KINDS = ["sliding_attention", "full_attention"]
_BERT: dict[str, Any] = {
    **_TEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_T5: dict[str, Any] = {
    **_TEXT,
    "eos_token_id": None,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
    "tie_word_embeddings": False,
}
_BART: dict[str, Any] = {
    **_NO_EOS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


@dataclass(frozen=True)
class Architecture:
    """How to build one, and what its inputs are like.

    Attributes:
        name: as transformers' model_type, or near it.
        family: which capabilities apply.
        config: makes the configuration.
        fields: for it.
        first_position: what the model itself gives to the first token as its position id.
        interface: whether its attention goes through transformers' AttentionInterface.
        deeper: fields of a decoder that is deeper than the encoder.
    """

    name: str
    family: Family
    config: Callable[..., hf.PreTrainedConfig]
    fields: dict[str, Any]
    first_position: int = 0
    interface: bool = True
    deeper: dict[str, Any] | None = None

    def build(self, seed: int = 0, **changes: Any) -> hf.PreTrainedModel:
        """A model in eval mode; the same arguments give the same weights.

        The weights are loud: a freshly made model gives nearly the same output whatever it is
        asked, and no check on it could fail.
        """
        config = self.config(**copy.deepcopy({**self.fields, **changes}))
        auto = {
            "decoder": hf.AutoModelForCausalLM,
            "encoder": hf.AutoModel,
            "vision": hf.AutoModel,
            "encoder-decoder": hf.AutoModelForSpeechSeq2Seq
            if self.name == "whisper"
            else hf.AutoModelForSeq2SeqLM,
        }[self.family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases start at 0: a lost one would not show
                    nn.init.normal_(parameter, parameter.mean().item(), 0.1)
                else:
                    nn.init.normal_(parameter, 0.0, 0.2)
        model.config.use_cache = True
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None  # every generation has its full length
            model.generation_config.forced_eos_token_id = None
        return model.eval()

    def rows(self, lengths: tuple[int, ...], seed: int = 0) -> list[Row]:
        """Inputs of these lengths; no two rows start alike."""
        generator = torch.Generator().manual_seed(100 + seed)

        def text(length: int) -> Tensor:
            return torch.randint(2, VOCAB, (1, length), generator=generator)

        if self.family == "vision":
            return [{"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)} for _ in lengths]
        if self.family != "encoder-decoder":
            return [{"input_ids": text(length)} for length in lengths]
        rows = []
        for i, length in enumerate(lengths):
            row: Row = {"decoder_input_ids": text(length)}
            if self.name == "whisper":
                row["input_features"] = torch.randn(1, 8, 2 * SOURCE, generator=generator)
            else:
                row["input_ids"] = text(SOURCE - (i if len(set(lengths)) > 1 else 0))
            rows.append(row)
        return rows

    @property
    def text(self) -> str:
        """The argument that grows while the model generates, or that an encoder reads."""
        return {
            "decoder": "input_ids",
            "encoder": "input_ids",
            "vision": "pixel_values",
            "encoder-decoder": "decoder_input_ids",
        }[self.family]


def pad(rows: list[Row], side: str = "right", mask: bool = True) -> dict[str, Tensor]:
    """Rows as one batch: token ids padded, attention masks for them if asked for."""
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].is_floating_point():
            batch[name] = torch.cat(values)
            continue
        longest = max(value.shape[1] for value in values)
        ids = torch.full((len(rows), longest), PAD)
        real = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, value in enumerate(values):
            start = longest - value.shape[1] if side == "left" else 0
            ids[i, start : start + value.shape[1]] = value
            real[i, start : start + value.shape[1]] = 1
        batch[name] = ids
        if mask:
            batch[name.replace("input_ids", "attention_mask")] = real
    return batch


def real_places(rows: list[Row], name: str, side: str) -> Tensor:
    """[B, L] bool: where a padded batch of these rows holds text."""
    lengths = torch.tensor([row[name].shape[1] for row in rows])[:, None]
    places = torch.arange(int(lengths.max()))[None]
    return places >= lengths.max() - lengths if side == "left" else places < lengths


_DECODERS = (
    Architecture("llama", "decoder", hf.LlamaConfig, _GROUPED),
    Architecture("mistral", "decoder", hf.MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
    Architecture(
        "mixtral",
        "decoder",
        hf.MixtralConfig,
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    Architecture("qwen2", "decoder", hf.Qwen2Config, {**_GROUPED, "use_sliding_window": False}),
    Architecture("qwen3", "decoder", hf.Qwen3Config, _GROUPED),
    Architecture(
        "gemma2",
        "decoder",
        hf.Gemma2Config,
        {**_GROUPED, "sliding_window": WINDOW, "layer_types": _TWO_KINDS},
    ),
    Architecture(
        "gemma3",
        "decoder",
        hf.Gemma3TextConfig,
        {**_GROUPED, "sliding_window": WINDOW, "layer_types": _TWO_KINDS},
    ),
    Architecture(
        "phi3",
        "decoder",
        hf.Phi3Config,
        {
            **{name: value for name, value in _GROUPED.items() if name != "head_dim"},
            "original_max_position_embeddings": 128,
        },
    ),
    Architecture(
        "gpt2",
        "decoder",
        hf.GPT2Config,
        {
            **_NO_EOS,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    Architecture(
        "opt",
        "decoder",
        hf.OPTConfig,
        {
            **_NO_EOS,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "dropout": 0.0,
        },
    ),
    Architecture(
        "gpt_neox",
        "decoder",
        hf.GPTNeoXConfig,
        {
            **_NO_EOS,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    Architecture(
        "gpt_oss",
        "decoder",
        hf.GptOssConfig,
        {
            **_GROUPED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _TWO_KINDS,
        },
    ),
    Architecture(
        "olmo2",
        "decoder",
        hf.Olmo2Config,
        {name: value for name, value in _GROUPED.items() if name != "head_dim"},
    ),
)
_FALCON: dict[str, Any] = {
    **_NO_EOS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "alibi": False,
    "max_position_embeddings": 128,
}
_OWN_ATTENTION = (
    Architecture(
        "falcon-mq",
        "decoder",
        hf.FalconConfig,
        {**_FALCON, "multi_query": True, "new_decoder_architecture": False},
        interface=False,
    ),
    Architecture(
        "falcon-new",
        "decoder",
        hf.FalconConfig,
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        interface=False,
    ),
    Architecture(
        "bloom",
        "decoder",
        hf.BloomConfig,
        {**_NO_EOS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        interface=False,
    ),
)
_ENCODERS = (
    Architecture("bert", "encoder", hf.BertConfig, _BERT),
    Architecture("roberta", "encoder", hf.RobertaConfig, _BERT, first_position=PAD + 1),
    Architecture(
        "distilbert",
        "encoder",
        hf.DistilBertConfig,
        {
            **_TEXT,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    Architecture("electra", "encoder", hf.ElectraConfig, {**_BERT, "embedding_size": 24}),
    Architecture("albert", "encoder", hf.AlbertConfig, {**_BERT, "embedding_size": 24}),
    Architecture(
        "modernbert",
        "encoder",
        hf.ModernBertConfig,
        {
            **{name: value for name, value in _BERT.items() if "dropout" not in name},
            "bos_token_id": None,
            "eos_token_id": None,
            "cls_token_id": None,
            "sep_token_id": None,
            "local_attention": WINDOW,
            "global_attn_every_n_layers": 2,
        },
    ),
    Architecture(
        "deberta_v2",
        "encoder",
        hf.DebertaV2Config,
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        interface=False,
    ),
    Architecture(
        "vit",
        "vision",
        hf.ViTConfig,
        {
            **{name: value for name, value in _BERT.items() if name not in _TEXT},
            "image_size": 8,
            "patch_size": 4,
        },
    ),
)
_ENCODER_DECODERS = (
    Architecture("t5", "encoder-decoder", hf.T5Config, _T5, deeper={"num_decoder_layers": 3}),
    Architecture(
        "mt5",
        "encoder-decoder",
        hf.MT5Config,
        {**_T5, "feed_forward_proj": "gated-gelu"},
        deeper={"num_decoder_layers": 3},
    ),
    Architecture(
        "bart",
        "encoder-decoder",
        hf.BartConfig,
        {**_BART, "max_position_embeddings": 64},
        deeper={"decoder_layers": 3},
    ),
    Architecture(
        "whisper",
        "encoder-decoder",
        hf.WhisperConfig,
        {
            **_BART,
            "num_mel_bins": 8,
            "max_source_positions": SOURCE,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        deeper={"decoder_layers": 3},
    ),
)
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (*_DECODERS, *_OWN_ATTENTION, *_ENCODERS, *_ENCODER_DECODERS)
}
