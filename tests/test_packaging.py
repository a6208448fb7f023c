"""What is written for others' machines: metadata, workflow, hooks. It names only what exists."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import fastprefix

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # which pytest brings there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
JOBS = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
COMMANDS = "\n".join(step.get("run", "") for step in STEPS)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def matrix(job, key):
    return JOBS[job].get("strategy", {}).get("matrix", {}).get(key, [])


def pythons():
    """The versions of Python that the workflow sets up."""
    found = {
        value
        for step in STEPS
        for key, value in step.get("with", {}).items()
        if key == "python-version" and "${{" not in value
    }
    return found.union(*(matrix(job, "python") for job in JOBS))


def test_targets_of_make_exist():
    used = re.findall(r"\bmake (\S+)", COMMANDS)
    assert {"test", "fresh", "docs", "dist"} <= set(used)
    for target in used:
        name = target.replace(".venv/", "$(VENV)/")
        assert re.search(rf"^{re.escape(name)}:", MAKEFILE, re.MULTILINE), target
    listed = re.findall(r'@echo "make ([\w-]+)', MAKEFILE)
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    assert set(listed) < set(phony)


def test_paths_exist():
    paths = re.findall(r"(?<![\w/])(?:tests|tools|benchmarks|examples)/[\w./-]+", COMMANDS)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_each_job_can_start():
    for name, job in JOBS.items():
        assert job["runs-on"], name
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        assert uses[0].startswith("actions/checkout@"), name
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", each) for each in uses)
    assert {"push", "pull_request"} <= set(WORKFLOW[True])  # YAML reads "on" as a truth value


def test_every_environment_of_other_versions_is_run():
    text = (ROOT / "tests" / "versions" / "run.py").read_text(encoding="utf-8")
    names = list(dict.fromkeys(re.findall(r'\bEnvironment\(\s*"([^"]+)"', text)))
    names.remove("newest")  # found out when it is run; the job `adapters` does
    assert "floor" in names
    assert sorted(matrix("versions", "environment")) == sorted(names)


def test_the_classifiers_name_the_pythons_that_are_run():
    prefix = "Programming Language :: Python :: 3."
    named = [c for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert {c.removeprefix("Programming Language :: Python :: ") for c in named} == pythons()
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(version in supported for version in pythons())
    lowest = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"])[1]
    assert lowest in matrix("test", "python")


def test_the_hooks_are_the_ruff_that_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (ruff,) = hooks["repos"]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"ruff=={ruff['rev'].removeprefix('v')}\n" in constraints
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_changelog_has_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## \[(.+?)\](.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert fastprefix.__version__ == PROJECT["version"]
    assert first[1] == PROJECT["version"] or (
        first[1] == "Unreleased" and PROJECT["version"] in first[2]
    )


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_what_an_extra_takes_of_others_exists(extra):
    for requirement in PROJECT["optional-dependencies"][extra]:
        named = re.fullmatch(r"fastprefix\[(.*)\]", requirement)
        for name in named[1].split(",") if named else ():
            assert name in PROJECT["optional-dependencies"]
