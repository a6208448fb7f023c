"""The table of methods: every row goes through the page's five lines, and costs what it says."""

import ast
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
TABLE = PAGE.read_text(encoding="utf-8").split("<!-- methods: begin -->")[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.split("<!-- methods: end -->")[0].strip().splitlines()[2:]
]
CLASSES = 3


def number(formula, **names):
    """The value of a row's formula, which has only sums and products."""
    text = formula.replace("·", "*")
    assert re.fullmatch(r"[\w\s*+()-]+", text), formula
    tree = ast.parse(text, mode="eval")
    return eval(compile(tree, PAGE.name, "eval"), {"__builtins__": {}}, names)


def base(config):
    if config.task_type != "SEQ_CLS":
        return tiny.build("llama")
    model = tiny.build("llama")
    settings = LlamaConfig(**{**model.config.to_dict(), "num_labels": CLASSES, "pad_token_id": 0})
    torch.manual_seed(3)
    return LlamaForSequenceClassification(settings).eval()


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_five_lines(row, tmp_path):
    _, configuration, trained, stored, source = row
    config = eval(configuration.strip("`"), {c.__name__: c for c in (PrefixConfig, PromptConfig)})
    classify = config.task_type == "SEQ_CLS"
    kind = PromptTuningModel if isinstance(config, PromptConfig) else PrefixTuningModel
    model = base(config)
    shape = model.config
    names = {
        "P": config.num_virtual_tokens,
        "L": shape.num_hidden_layers,
        "w": 2 * shape.num_key_value_heads * shape.head_dim,
        "Hq": shape.num_attention_heads,
        "d": shape.hidden_size,
        "h": shape.hidden_size,
        "c": CLASSES,
    }
    ids, mask = tiny.batch((6, 6, 6), "left")
    labels = torch.tensor([0, 1, 2]) if classify else ids
    items = [
        {"input_ids": ids[i], "attention_mask": mask[i], "labels": labels[i]} for i in range(3)
    ]
    if configuration.count("infix"):
        items = [item | {"infix_positions": torch.tensor(4)} for item in items]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, learning_rate=0.1, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip

    tuned = kind(model, config, None)
    before = [p.detach().clone() for p in tuned.parameters() if p.requires_grad]
    Trainer(tuned, arguments, train_dataset=items).train()
    tuned.save_pretrained(tmp_path / "adapter")
    after = [p for p in tuned.parameters() if p.requires_grad]
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
    assert sum(p.numel() for p in after) == number(trained, **names)
    files = (tmp_path / "adapter").glob("*.safetensors")
    found = sum(t.numel() for file in files for t in load_file(file).values())
    assert found == number(stored, **names)
    assert source

    again = kind.from_pretrained(base(config), tmp_path / "adapter")
    tuned.eval()
    batch = {"input_ids": ids, "attention_mask": mask}
    if classify:
        torch.testing.assert_close(again(**batch).logits, tuned(**batch).logits)
    else:
        assert torch.equal(tiny.generate(again, ids, mask), tiny.generate(tuned, ids, mask))
