"""``--help``: readable, at once, with examples that work; and the names that it repeats."""

import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from fastprefix.bench.suites import SUITES
from fastprefix.cli import typed
from fastprefix.cli.app import app
from fastprefix.cli.convert import FORMATS
from fastprefix.cli.inputs import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fastprefix.formats.peft_files import CONFIG_FILE, WEIGHTS_FILE
from fastprefix.kernels.offline.cases import DTYPES, TARGETS

NAMES = [
    *("bench", "check", "compare", "convert", "demo", "eval", "generate", "info", "inspect"),
    *("tasks", "train", "tune"),
]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def examples(name: str) -> list[list[str]]:
    """The arguments of each example of a command's help."""
    _, _, end = run(name, "--help").stdout.partition("Example")
    lines = [line.strip() for line in end.splitlines() if line.startswith("    fastprefix ")]
    split = (shlex.split(line.partition(" > ")[0]) for line in lines)
    return [arguments[1:] for arguments in split]


def test_every_command_is_listed_with_a_whole_sentence() -> None:
    result = run("--help")
    assert result.exit_code == 0
    _, _, listed = result.stdout.partition("Commands:\n")
    lines = [line.split(maxsplit=1) for line in listed.splitlines() if line.startswith("  ")]
    told = {line[0]: line[1] for line in lines if len(line) == 2 and line[0] in NAMES}
    assert sorted(told) == NAMES
    assert all(sentence.endswith(".") and "..." not in sentence for sentence in told.values())


def test_without_arguments_there_is_help() -> None:
    result = run()
    assert result.exit_code == 0
    assert result.stdout == run("-h").stdout


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_command_lines(name: str) -> None:
    """Each parses, ends the help, and is not wrapped."""
    result = run(name, "-h")
    assert result.exit_code == 0
    assert result.stdout.isascii()
    found = examples(name)
    assert found
    group = typer.main.get_command(app)
    for arguments in found:
        assert arguments[0] == name
        command = group.get_command(group.make_context("fastprefix", [name]), name)  # type: ignore[attr-defined]
        with command.make_context(name, arguments[1:]) as context:
            assert context.params


def test_examples_do_what_they_say(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as a user types them, on a tiny model and in few steps."""
    monkeypatch.chdir(tmp_path)
    training = examples("train")[0]
    few = ["--model", tiny_folder, "--option", "num_virtual_tokens=2", "--batch-size", "2"]
    few += ["--set", "validation_size=2", "--set", "test_size=2", "--set", "max_target_length=4"]
    short = ["--max-new-tokens", "2"]
    with_adapter, with_prompt, _ = examples("generate")
    convert, back, folder = examples("convert")
    for arguments in (
        [*training, *few, "--max-steps", "2"],
        examples("eval")[0],
        ["generate", *short, *with_adapter[1:]],
        ["generate", *short, "--model", tiny_folder, *with_prompt[1:]],
        *(examples("tasks")),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
    (tmp_path / "run" / "adapter").rename(tmp_path / "adapter")
    for arguments in (convert, back):
        result = run(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
    assert (tmp_path / "again" / "adapter_config.json").exists()
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapter").rename(tmp_path / "adapters" / "adapter")
    assert run(*folder).exit_code == 0
    assert not (tmp_path / "converted").exists()


def test_choices_are_the_librarys() -> None:
    def values(kind: type) -> list[str]:
        return [member.value for member in kind]  # type: ignore[attr-defined]

    assert values(typed.Suite) == list(SUITES)
    assert values(typed.Format) == list(FORMATS)
    assert values(typed.KernelDType) == list(DTYPES)
    targets = [target.removeprefix("hip:").replace("cuda:", "sm_") for target in TARGETS]
    assert values(typed.Arch) == targets
    assert (ADAPTER_CONFIG, ADAPTER_WEIGHTS) == (CONFIG_FILE, WEIGHTS_FILE)


def test_help_and_mistakes_import_nothing_expensive(tmp_path: Path) -> None:
    code = """
import sys
from fastprefix.cli import main
for line in ("-h", "train -h", "--version", "generate Hi --model ./no"):
    sys.argv = ["fastprefix", *line.split()]
    try:
        main()
    except SystemExit:
        pass
print(sorted({"torch", "transformers", "triton", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr.startswith("error: --model: got './no'")


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastprefix", "--version"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout == f"fastprefix {importlib.metadata.version('fastprefix')}\n"
    assert done.stderr == ""
