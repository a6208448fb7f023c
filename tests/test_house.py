"""The structure of the library, read from its source: imports, layers, sizes. Nothing is imported.

Each rule yields violations. NOT_YET lists the known ones by rule, as "file name". It may only
shrink: an entry that no longer applies fails as well.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each layer imports only from itself and from the layers before it.
LAYERS = (
    ("options", "arguments", "files", "after_import"),
    ("kernels",),
    ("attention",),
    ("kv",),
    ("encoders",),
    ("formats",),
    ("implementation", "hf"),
    ("tuning",),
    ("integrations",),
    ("tasks",),
    ("training",),
    ("bench",),
    ("cli", "__main__"),
)
RANK = {f"fastprefix.{name}": i for i, names in enumerate(LAYERS) for name in names}
RANK["fastprefix"] = len(LAYERS) - 1  # __init__.py, which hands out the names of every layer

# Edges that point up, or would close a circle, on purpose: a file, and what its functions import.
UPWARD = {
    "fastprefix.kv.prefix": "fastprefix.hf.prefill",  # PrefixKV.prefill runs a model
    "fastprefix.implementation": "fastprefix.hf",  # the first call of the implementation loads hf
}

# What a function may import, and why it does not stand at the top of the file.
LAZY = {
    "accelerate": "slow to import; only training needs it",
    "fastprefix.bench.plots": "imports matplotlib, which is optional",
    "flashinfer": "optional, and only one peer of the benchmarks",
    "datasets": "optional, and slow to import; only what reads data sets needs it",
    "huggingface_hub": "only what reads or writes the hub needs it",
    "peft": "optional",
    "ray": "optional, and needed by one engine only",
    "safetensors": "errors are explained without it",
    "transformers": "slow to import; kv and cli work without it, and hf reads rare parts of it",
    "torch.nn.attention.flex_attention": "imports PyTorch's compiler",
    "torch.utils.tensorboard": "optional",
    "triton": "optional, and needed by kernels only",
    "fastprefix.attention.differentiated": "imports PyTorch's compiler",
    "fastprefix.hf": "imports transformers (for its own files this is no reason)",
    "fastprefix.kernels": "imports Triton (for its own files this is no reason)",
}
# Files whose functions may import all they need: `fastprefix --help` must not load torch.
LAZY_FILES = {"fastprefix.cli.app", "fastprefix.cli.run_commands", "fastprefix.cli.typed"}

MAX_LINES = 500  # of a file
MAX_CODE_LINES = 60  # of a function, with its signature and without its docstring
MAX_PARAMETERS = 12
MAX_JIT_PARAMETERS = 30
# Public signatures that follow another library's, or name one option a parameter.
WIDE = {
    "attention_interface": "transformers' AttentionInterface, and what models hand to it",
    "prefix_attention": "the operator: torch's scaled_dot_product_attention and our options",
    "PrefixTuningModel.from_pretrained": "PEFT's, and our options",
    "bench": "one parameter for each option of the command",
    "train": "one parameter for each option of the command",
    "generate": "one parameter for each option of the command",
    "inspect": "one parameter for each option of the command",
}

NOT_YET: dict[str, set[str]] = {}


@dataclass(frozen=True)
class Import:
    """One imported module of a file, and the names taken from it."""

    line: int
    module: str
    names: tuple[str, ...]
    in_function: bool


@dataclass(frozen=True)
class File:
    """A source file under its dotted name."""

    path: str
    module: str
    lines: int
    tree: ast.Module
    imports: tuple[Import, ...]


@dataclass(frozen=True)
class Violation:
    """`figure` says what is wrong; `key` does not change when lines move."""

    path: str
    line: int
    name: str
    figure: str

    @property
    def key(self) -> str:
        return f"{self.path} {self.name}".strip()

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.name} {self.figure}".replace("  ", " ")


def sources() -> Iterator[tuple[Path, str]]:
    """Every file of the library with its dotted name, the kernels under the package's name."""
    library = ROOT / "fastprefix"
    link = library / "kernels"
    # a checkout without symlinks has a text file there that names the folder
    kernels = link.resolve() if link.is_dir() else (library / link.read_text().strip()).resolve()
    for folder, package in ((library, "fastprefix"), (kernels, "fastprefix.kernels")):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).with_suffix("").parts
            if package == "fastprefix" and inside[0] == "kernels":
                continue
            parts = inside[:-1] if inside[-1] == "__init__" else inside
            yield path.resolve(), ".".join((package, *parts))


def imports_of(tree: ast.Module, module: str, is_package: bool, known: set[str]) -> list[Import]:
    """All imports of a file. `from a import b` imports `a.b` where that is a file of ours."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(node.lineno, a.name, (), in_function) for a in node.names)
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                up = module.split(".")
                up = up[: len(up) - node.level + is_package]
                source = ".".join((*up, source) if source else up)
            plain = [a.name for a in node.names if f"{source}.{a.name}" not in known]
            if plain:
                found.append(Import(node.lineno, source, tuple(plain), in_function))
            for name in (a.name for a in node.names if a.name not in plain):
                found.append(Import(node.lineno, f"{source}.{name}", (name,), in_function))
        inside = in_function or isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


@pytest.fixture(scope="module")
def files() -> list[File]:
    """The whole library, parsed."""
    listed = list(sources())
    known = {module for _, module in listed}
    made = []
    for path, module in listed:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        found = imports_of(tree, module, path.name == "__init__.py", known)
        name = path.relative_to(ROOT).as_posix()
        made.append(File(name, module, text.count("\n"), tree, tuple(found)))
    return made


def under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def is_upward(file: File, imported: Import) -> bool:
    """Whether it is an edge of UPWARD, imported when a function is called."""
    prefix = UPWARD.get(file.module)
    return imported.in_function and prefix is not None and under(imported.module, prefix)


def layer(module: str) -> int:
    """The rank of a module's layer; `fastprefix` itself has one of its own."""
    name = ".".join(module.split(".")[:2])
    assert name in RANK, f"{module} belongs to no layer: name it in LAYERS"
    return RANK[name]


def functions(file: File) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its dotted name inside the file."""

    def visit(node: ast.AST, outer: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{outer}.{child.name}" if outer else child.name
                if not isinstance(child, ast.ClassDef):
                    yield name, child
            yield from visit(child, name)

    yield from visit(file.tree, "")


def is_jit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(each) for each in function.decorator_list)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters there are, `self` and `cls` aside."""
    a = function.args
    named = [each.arg for each in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len(named) - (named[:1] in (["self"], ["cls"])) + bool(a.vararg) + bool(a.kwarg)


def imports_in_functions(files: list[File]) -> Iterator[Violation]:
    """Imports stand at the top, but for what is lazy on purpose."""
    for file in files:
        for each in file.imports:
            lazy = file.module in LAZY_FILES or any(
                under(each.module, prefix) and not under(file.module, prefix) for prefix in LAZY
            )
            if each.in_function and not lazy:
                yield Violation(file.path, each.line, each.module, "imported in a function")


def circles(files: list[File]) -> Iterator[Violation]:
    """No file imports itself by way of others, in functions and for types included."""
    by_name = {file.module: file for file in files}
    edges: dict[str, set[str]] = {
        file.module: {
            each.module
            for each in file.imports
            if each.module in by_name and not is_upward(file, each)
        }
        for file in files
        if file.module != "fastprefix"  # it hands out names, and imports them when asked
    }

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = edges.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reach = {module: reached(module) for module in edges}
    for module, others in reach.items():
        if module in others:
            around = sorted(other for other in others if module in reach.get(other, ()))
            yield Violation(by_name[module].path, 1, "", f"circle of {', '.join(around)}")


def upward_imports(files: list[File]) -> Iterator[Violation]:
    """Layers import from those before them, types included."""
    for file in files:
        for each in file.imports:
            if not under(each.module, "fastprefix") or is_upward(file, each):
                continue
            if layer(each.module) > layer(file.module):
                yield Violation(file.path, each.line, each.module, "belongs to a later layer")


def private_imports(files: list[File]) -> Iterator[Violation]:
    """Names with an underscore stay in their file."""
    for file in files:
        for each in file.imports:
            for name in each.names:
                if under(each.module, "fastprefix") and name.startswith("_") and name[:2] != "__":
                    yield Violation(file.path, each.line, name, f"private to {each.module}")


def long_functions(files: list[File]) -> Iterator[Violation]:
    """Outside kernels a function fits on a screen."""
    for file in files:
        for name, function in functions(file):
            lines = code_lines(function)
            if lines > MAX_CODE_LINES and not is_jit(function):
                yield Violation(file.path, function.lineno, name, f"{lines} lines of code")


def wide_functions(files: list[File]) -> Iterator[Violation]:
    """Functions take few parameters."""
    for file in files:
        for name, function in functions(file):
            count = parameters(function)
            limit = MAX_JIT_PARAMETERS if is_jit(function) else MAX_PARAMETERS
            if count > limit and name not in WIDE:
                yield Violation(file.path, function.lineno, name, f"{count} parameters")


def long_files(files: list[File]) -> Iterator[Violation]:
    """A file holds one idea."""
    for file in files:
        if file.lines > MAX_LINES:
            yield Violation(file.path, 1, "", f"{file.lines} lines")


RULES = (
    imports_in_functions,
    circles,
    upward_imports,
    private_imports,
    long_functions,
    wide_functions,
    long_files,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(files: list[File], rule) -> None:
    found: dict[str, list[Violation]] = defaultdict(list)
    for violation in rule(files):
        found[violation.key].append(violation)
    known = NOT_YET.get(rule.__name__, set())
    new = [str(each) for key in sorted(set(found) - known) for each in found[key]]
    stale = sorted(known - set(found))
    assert not new, f"{rule.__doc__}\n" + "\n".join(new)
    assert not stale, "take these out of NOT_YET:\n" + "\n".join(stale)


def test_the_tables_name_what_there_is(files: list[File]) -> None:
    assert set(NOT_YET) <= {rule.__name__ for rule in RULES}
    every = {name for file in files for name, _ in functions(file)}
    modules = {file.module for file in files}
    assert set(WIDE) <= every
    assert LAZY_FILES | set(UPWARD) <= modules


def files_below_tests() -> Iterator[tuple[str, str]]:
    """Every file below tests/, with its text."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_files_of_tests_hold_one_idea() -> None:
    long = {path: text.count("\n") for path, text in files_below_tests()}
    assert {path: lines for path, lines in long.items() if lines > MAX_LINES} == {}


def test_no_test_loads_a_file_by_its_path() -> None:
    """What tests share is imported from tests/support."""
    loaders = {"spec_from_file_location", "SourceFileLoader", "run_path"}
    found = [
        f"{path}:{node.lineno}"
        for path, text in files_below_tests()
        for node in ast.walk(ast.parse(text))
        if (isinstance(node, ast.Attribute) and node.attr in loaders)
        or (isinstance(node, ast.Name) and node.id in loaders)
    ]
    assert not found
