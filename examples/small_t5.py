"""A small T5 that copies words or reverses them: no package of the index has a seq2seq model."""

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

DO = {"copy": lambda words: words, "reverse": lambda words: words[::-1]}


def pairs(words: Sequence[str], number: int, asked: str, wanted: str) -> list[tuple[str, str]]:
    """Texts of 3 to 6 words behind the word that is asked, and what is wanted of them."""
    draw, found = random.Random(number), []
    for _ in range(number):
        text = draw.sample(words, draw.randint(3, 6))
        found.append((" ".join([asked, *text]), " ".join(DO[wanted](text))))
    return found


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token for each word, and one that ends a text."""
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", *DO, *words])}
    plain = Tokenizer(models.WordLevel(ids, "<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")


def small_t5(words: Sequence[str], steps: int) -> tuple[T5ForConditionalGeneration, object]:
    """The model after so many steps of 64 texts, and its tokenizer."""
    tokenizer = word_tokenizer(words)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, num_heads=4, d_ff=256, num_layers=2,
            dropout_rate=0.0, decoder_start_token_id=0,
        )
    )  # fmt: skip
    texts = [pair for do in DO for pair in pairs(words, 32 * steps, do, do)]
    random.Random(0).shuffle(texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for start in range(0, len(texts), 64):
        sources, targets = zip(*texts[start : start + 64], strict=True)
        batch = tokenizer(list(sources), return_tensors="pt", padding=True)
        batch["labels"] = tokenizer(list(targets), return_tensors="pt", padding=True).input_ids
        batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer
