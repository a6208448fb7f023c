"""Every notebook of examples/notebooks/ runs with its small setting, and what it prints holds.

What is committed are the outputs of a whole run: they are there, small, and name no place on the
machine that made them.
"""

import json
import re
from pathlib import Path

import pytest

from run_notebook import execute, printed

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
STORY = ("4_positive_tweets_set_up", "5_positive_tweets_training", "6_positive_tweets_inference")


@pytest.fixture(autouse=True)
def _as_a_user(monkeypatch):
    """The kernel takes over the environment: no hub, one thread, no interpreter of Triton."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def run(name, **parameters):
    """What a notebook prints with the small setting."""
    return printed(execute(FOLDER / f"{name}.ipynb", QUICK=True, **parameters))


def numbers(text, pattern):
    """The numbers in the pattern's groups; the pattern must be there."""
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in {text}"
    return [float(group.replace(",", "").rstrip("%")) for group in found.groups()]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert not re.findall(r"/(?:work|home|tmp|root|usr)\b[^\"]*", text)
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "QUICK = False" in text  # it was the whole run
    assert max(len("".join(cell["source"]).splitlines()) for cell in code) <= 25


def test_every_notebook_has_a_test():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in NOTEBOOKS if name.removesuffix(".ipynb") not in tests] == []


def test_what_a_prefix_does_to_attention(smollm2):
    out = run("1_what_a_prefix_does_to_attention", MODEL=str(smollm2))
    error, least, most = numbers(out, r"largest difference (\S+); mass between (\S+) and (\d\.\d+)")
    assert error < 1e-5  # the rule of the first part
    assert 0 < least < most < 1
    before, after = numbers(out, r"mass: ([\d.]+) before, ([\d.]+) after")
    assert 0 < before < 1
    assert after != before


def test_prefix_against_prompt_tuning(smollm2):
    out = run("2_prefix_against_prompt_tuning", MODEL=str(smollm2))
    rows = re.findall(r"(prefix|prompt), (\d+) tokens +([\d,]+) +([\d.]+) +([\d.]+)", out)
    assert len(rows) == 4
    for kind, length, trained, before, after in rows:
        width = 576 if kind == "prompt" else 30 * 384  # SmolLM2's embeddings, and keys and values
        assert int(trained.replace(",", "")) == int(length) * width
        assert float(after) < float(before)


def test_where_prefixes_win_and_lose(smollm2):
    out = run("3_where_prefixes_win_and_lose", MODEL=str(smollm2))
    ours, theirs = numbers(out, r"loss fastprefix ([\d.]+), PEFT ([\d.]+)")
    assert ours == pytest.approx(theirs, abs=1e-4)  # the same prefix on both sides
    (share,) = numbers(out, r"PEFT's time, ([\d.]+) times its bytes")
    assert share < 1
    same = re.findall(r"MB.*\n|(True|False)\n", out)
    assert "False" not in same
    assert same.count("True") == 2


def test_positive_tweets(smollm2, tmp_path):
    """Three notebooks that hand files to one another."""
    setup, training, inference = STORY
    folder, model = str(tmp_path), str(smollm2)
    out = run(setup, FOLDER=folder)
    (accuracy,) = numbers(out, r"right on ([\d.]+)% of")
    assert accuracy > 60  # of two classes

    out = run(training, FOLDER=folder, MODEL=model)
    bare = numbers(out, r"the model alone +([\d.]+) +([\d.]+)")
    for name in ("positive", "negative"):
        tuned = numbers(out, rf"{name} prefix +([\d.]+) +([\d.]+)")
        assert all(after < before for after, before in zip(tuned, bare, strict=True))

    out = run(inference, FOLDER=folder, MODEL=model)
    for voice in ("no prefix", "positive prefix", "negative prefix", "real, positive"):
        share, varied, words, surprise, nearest = numbers(
            out, voice + r" +(\d+)% +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)"
        )
        assert 0 <= share <= 100
        assert 0 < varied <= 1
        assert words > 3
        assert surprise > 1
        assert nearest < 1
