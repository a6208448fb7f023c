"""A tiny model and the shipped records, on disk as the comparison wants them."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import WordLevelTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.plan import Budget
from training.train import Source

DATA = Path(str(files("fastprefix.tasks"))) / "data"


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A Llama that knows the words of the records and nothing else."""
    files = tuple(str(DATA / f"descriptions-{split}.jsonl") for split in ("train", "heldout"))
    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    inner = Tokenizer(WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"\w+|\s|."), "isolated")
    inner.decoder = Fuse()
    inner.train_from_iterator(texts, WordLevelTrainer(special_tokens=["<unk>", "<eos>"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Source(str(folder), files)


@pytest.fixture(scope="session")
def budget():
    """The smallest budget that runs."""
    return Budget(3, 2, 8, 2, 3, 512, max_new_tokens=3, bf16=True)
