"""Results on standard output, all else on standard error, and neither garbled in a pipe."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from fastprefix.cli import console
from fastprefix.cli.app import app
from fastprefix.cli.outputs import write_text

PROMPTS = ("The sun", "An old house")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def plain(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def test_generated_texts_are_all_of_standard_output(tiny_folder: str) -> None:
    """They are neither wrapped nor mixed with anything else."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    common = ("generate", "--model", tiny_folder, "--raw", "--dtype", "float32")
    common = (*common, "--max-new-tokens", "40", *PROMPTS)
    result = run(*common)
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(f"{text}\n" for text in expected)
    assert result.stderr.splitlines() == [f"loading {tiny_folder}", *PROMPTS]
    pairs = [{"prompt": p, "text": text} for p, text in zip(PROMPTS, expected, strict=True)]
    assert json.loads(run(*common, "--json").stdout) == pairs


def test_training_fills_no_log(tiny_folder: str, tmp_path: Path) -> None:
    result = run(
        *("train", "--model", tiny_folder, "--output", str(tmp_path / "out"), "--max-steps", "25"),
        *("--batch-size", "1", "--option", "num_virtual_tokens=2", "--set", "validation_size=2"),
        *("--set", "test_size=2", "--set", "max_target_length=8"),
    )
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)) == {"validation", "test"}
    assert plain(result.stderr)
    lines = result.stderr.splitlines()
    steps = [line for line in lines if line.startswith("training: ")]
    assert [line.partition(",")[0] for line in steps][-2:] == [
        "training: 24 of 25",
        "training: 25 of 25",
    ]
    assert all(", loss " in line for line in steps)
    assert len(lines) == len(steps) + 2  # what begins, what came of it
    assert {path.name for path in (tmp_path / "out" / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "README.md")
    }


@pytest.mark.parametrize("total", [1, 7, 10, 11, 95, 1000])
def test_progress_is_a_few_lines_and_the_last_of_them_is_the_end(
    total: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.progress("counting", total) as show:
        for done in range(1, total + 1):
            show(done, "")
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 11
    assert lines[-1] == f"counting: {total} of {total}"


def test_on_a_terminal_a_bar_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the work ends. Names are no markup."""
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    monkeypatch.setattr(console, "messages", Console(file=screen, force_terminal=True))

    def interrupted(show: Callable[[int, str], None]) -> None:
        show(1, "[b]")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), console.progress("training [0]", 3) as show:
        interrupted(show)
    with pytest.raises(ValueError, match="no"), console.working("loading [/x]"):
        raise ValueError("no")
    shown = screen.getvalue()
    for said in ("training [0]", "[b]", "loading [/x]"):
        assert said in shown
    hide, show_again = "\x1b[?25l", "\x1b[?25h"
    assert shown.count(hide) == shown.count(show_again) == 2
    assert shown.rfind(show_again) > shown.rfind(hide)


def test_a_reader_that_goes_is_no_error(tmp_path: Path) -> None:
    """``fastprefix train --help | head -1``."""
    started = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); from fastprefix.cli import main; "
         "sys.argv = ['fastprefix', 'train', '--help']; main()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    assert started.stdout is not None
    started.stdout.close()
    started.stdout = None
    _, complaints = started.communicate(timeout=120)
    assert complaints == b""


def test_texts_that_a_terminal_cannot_show_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with pytest.raises(SystemExit):
        app(["--version"])
    print("30 °C", flush=True)
    assert written.getvalue().endswith(rb"30 \xb0C" + b"\n")


def test_control_characters_of_a_name_do_nothing() -> None:
    result = run("train", "--output", "out", "--data-files", "train=n\x1b[2J")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        r"error: --data-files: train: got n\x1b[2J, which does not exist"
    )


def test_a_file_is_written_whole_or_kept(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new\ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    write_text(file, "new")
    assert file.read_text() == "new"
    with pytest.raises(OSError, match="No space left"):
        write_text(Path("/dev/full"), "figures")
