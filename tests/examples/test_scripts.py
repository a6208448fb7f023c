"""Every script of examples/ runs with --quick, offline, and what it prints holds.

A quick run takes a few steps: enough for what must always be true (the same texts, fewer bytes, a
loss that falls), not for what training reaches.
"""

import ast
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
HELPERS = {"local_models.py", "run_all.py", "run_notebook.py", "small_t5.py"}
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in HELPERS)
GROUPS = ("encoder", "decoder", "cross")  # of an encoder-decoder


def number(text: str, pattern: str) -> float:
    """The number in the pattern's group; the pattern must be there."""
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in {text}"
    return float(found[1].replace(",", "").rstrip("%"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_copied(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    assert f"python examples/{name}" in text  # its docstring says how to run it
    assert "from_pretrained(" in text  # transformers' own, in the open
    assert '"--model"' in text
    assert '"--quick"' in text
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in imports if (node.module or "").startswith("fastprefix.cli")]


def test_no_script_is_without_a_test():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f'run("{name}"' not in tests] == []


def test_text_classification(run):
    out = run("text_classification.py", "--quick")
    assert number(out, r"held out; ([\d.]+)% of the model") < 1
    for row in ("probe on the mean", "probe on the first token", "prefix and head"):
        assert number(out, row + r" +([\d.]+)%") > 60  # five topics: chance is 20


def test_text_generation(run, smollm2):
    out = run("text_generation.py", "--quick", "--model", smollm2)
    losses = [
        number(out, row + r" +([\d.]+)\n")
        for row in ("the model alone", "the instruction, untrained", r"the prefix after \d+ steps")
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3


def test_multi_task_batch(run, smollm2):
    out = run("multi_task_batch.py", "--quick", "--model", smollm2)
    assert "rows that get what they would get alone: 5 of 5" in out
    assert len(set(re.findall(r"-> (.+)", out))) >= 4  # the prefixes do something


def test_shared_system_prompt(run, smollm2):
    out = run("shared_system_prompt.py", "--quick", "--model", smollm2)
    assert "the same answers: 8 of 8" in out
    prompt = number(out, r"a prompt of (\d+) tokens")
    run_tokens = r"tokens of the prompts that run +([\d,]+) +([\d,]+)"
    repeated, shared = (int(n.replace(",", "")) for n in re.search(run_tokens, out).groups())
    assert repeated - shared >= 7 * prompt
    copies, copy = map(float, re.search(r"of the prompt +([\d.]+) +([\d.]+)", out).groups())
    assert copies == pytest.approx(8 * copy, abs=0.5)


def test_seq2seq(run):
    out = run("seq2seq.py", "--quick")
    trained = [number(out, rf"prefix in {group} +\d+% +([\d,]+)") for group in GROUPS]
    assert number(out, r"prefix in encoder, decoder, cross +\d+% +([\d,]+)") == sum(trained) > 0


@pytest.mark.slow
def test_seq2seq_learns(run):
    """The whole run, 2 minutes: a prefix turns a model that copies into one that reverses."""
    out = run("seq2seq.py")
    assert number(out, r"told to reverse +(\d+)%") > 90
    assert number(out, r"told to copy +(\d+)%") < 10
    assert number(out, r"prefix in encoder +(\d+)%") > 40


def test_prompt_tuning(run, smollm2):
    out = run("prompt_tuning.py", "--quick", "--model", smollm2)
    rows = re.findall(r"(random numbers|random words|an instruction) +([\d.]+) +([\d.]+) ", out)
    assert len(rows) == 3
    after = {name: float(loss) for name, _, loss in rows}
    before = {name: float(loss) for name, loss, _ in rows}
    # three steps are not enough for the others
    assert after["an instruction"] == min(after.values()) < before["an instruction"]
    assert "the same texts: True" in out


def test_prefix_with_lora(run):
    out = run("prefix_with_lora.py", "--quick")
    prefix, lora, both = (
        number(out, rf"\n{row} +[\d.]+% +[\d.]+ +([\d,]+)")
        for row in ("prefix", "LoRA", "prefix with LoRA")
    )
    head = 384 * 3 + 3  # which all of them train
    assert both == prefix + lora - head
    assert number(out, r"logits differ by (\S+)") < 1e-5


def test_serving_many_tasks(run, smollm2):
    budget = 10
    out = run("serving_many_tasks.py", "--quick", "--budget", budget, "--model", smollm2)
    assert number(out, r"prefixes in the bank's memory: ([\d.]+) MB") <= budget
    size, holds = number(out, r"articles of ([\d.]+) MB"), number(out, r"MB holds (\d+)")
    assert holds == budget // size
    copies, one = (number(out, rf"{way} +(\d+) ") for way in ("a copy for each row", "one copy"))
    assert one < copies == -(-6 // holds)  # six requests


def test_swap_attention(run, smollm2):
    out = run("swap_attention.py", "--quick", "--model", smollm2)
    assert "bit for bit the same after unpatching: True" in out
    assert number(out, r"auto +differs by (\S+)") < 1e-4
