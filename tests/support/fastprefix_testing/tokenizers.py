"""A tokenizer of single bytes, which needs no file."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(bos: bool = False, **special: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, after "<bos>", "<eos>" and "<pad>" (0, 1 and 2).

    Args:
        bos: whether it puts "<bos>" and "<eos>" around a text, as BERT's does.
        special: the special tokens that it knows, for example ``eos_token="<eos>"``.
    """
    vocab = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>",
            pair="<bos> $A <eos> $B:1 <eos>:1",
            special_tokens=[("<bos>", 0), ("<eos>", 1)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)
