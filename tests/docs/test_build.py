"""The site builds without a warning, and its navigation has every page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fastprefix
from fastprefix import tasks

ROOT = Path(__file__).parents[2]
mkdocs = pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def leaves(nav):
    """The pages that a navigation names."""
    for entry in nav:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(target, list):
            yield from leaves(target)
        else:
            yield target


def test_the_navigation_has_every_page():
    class Loader(yaml.SafeLoader):
        """mkdocs.yml names a function of Python, which is not needed here."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    found = {
        path.relative_to(ROOT / "docs").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if "experiments" not in path.relative_to(ROOT / "docs").parts
    }
    assert found <= set(leaves(nav))


def test_strict_build_and_what_pages_show_from_the_repository(site):
    assert (site / "index.html").is_file()
    assert (site / "methods" / "index.html").is_file()
    picture = site / "benchmarks" / "results" / "methods.png"
    assert picture.is_file()
    assert "benchmarks/results/methods.png" in (site / "methods" / "index.html").read_text()


def test_the_reference_has_every_public_name_and_shows_no_role(site):
    pages = {path: path.read_text() for path in (site / "reference").rglob("index.html")}
    found = {
        name for text in pages.values() for name in re.findall(r'id="(fastprefix[\w.]*)"', text)
    }
    public = [name for name in fastprefix.__all__ if name != "__version__"]
    assert {f"fastprefix.{name}" for name in public} <= found
    assert {f"fastprefix.tasks.{name}" for name in tasks.__all__ if name[0] != "_"} - found <= {
        "fastprefix.tasks.Collator",  # what Encoding.collator() returns
        "fastprefix.tasks.TASKS",
    }
    for path, text in {**pages, site: (site / "operator" / "index.html").read_text()}.items():
        assert not re.search(r":(attr|class|data|func|meth|mod):", text), path
        assert "<autoref" not in text, path
    assert 'href="../hf/#fastprefix.patch_model"' in pages[site / "reference" / "kv" / "index.html"]


def test_pages_bring_in_files_and_tables_from_the_code(site):
    def text(page):
        return (site / page / "index.html").read_text()

    assert "Working on fastprefix" in text("contributing")
    assert "prefix_attn_tables_kernel" in text("kernels")
    assert "batch_invariant" in text("operator").split("devices", 1)[1]
