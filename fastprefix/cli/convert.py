"""``fastprefix convert``: prefixes and prompts from one kind of file into another.

All sources are read and checked before anything is written; each target takes its place whole, so
that none is ever half there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor

from fastprefix.cli.console import console, working
from fastprefix.cli.errors import blaming, complain
from fastprefix.cli.inputs import place_to_write
from fastprefix.files import finish, is_leftover, opened
from fastprefix.formats.peft_files import CONFIG_FILE, WEIGHTS_FILE, read_config
from fastprefix.formats.peft_prefixes import (
    OWN_KIND,
    PREFIX_KINDS,
    load_adapter,
    refusal,
    save_adapter,
)
from fastprefix.formats.peft_prompts import INFIX_KIND, PROMPT_KINDS, load_prompt, save_prompt
from fastprefix.kv import Group, PrefixKV
from fastprefix.training.base_models import load_causal, load_config, load_seq2seq

FILE = "fastprefix"  # a PrefixKV file
FORMATS = (FILE, *PREFIX_KINDS, *PROMPT_KINDS)
_KNOWN = (*PREFIX_KINDS, *PROMPT_KINDS, OWN_KIND, INFIX_KIND)
_SHARED = "num_kv_shared_layers"  # of a configuration: the last layers, which share
_KEPT = ("base_model_name_or_path", "task_type", "modules_to_save", "revision")


@dataclass
class Source:
    """What a file or folder holds.

    Attributes:
        path: of the file or folder.
        kind: "fastprefix" or a peft_type.
        kv: the prefix; None for a prompt, whose keys and values a base has to compute.
        prompt: [P, width], of a prompt.
        config: adapter_config.json.
        heads: what was trained of the base beside it.
        groups: of the layers of an encoder-decoder; None for a single stack.
        sources: of the layers of a base that is known to share keys and values among them, see
            :class:`fastprefix.hf.patch.patch.Patch`; None for any other.
    """

    path: Path
    kind: str
    kv: PrefixKV | None = None
    prompt: Tensor | None = None
    config: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    groups: tuple[Group, ...] | None = None
    sources: tuple[int, ...] | None = None


@dataclass
class Step:
    """One conversion, not done yet.

    Attributes:
        source: what is converted.
        target: the file or folder to write.
        kind: what it will be.
        problem: why it cannot be; None where it can.
    """

    source: Source
    target: Path
    kind: str
    problem: str | None = None


class Base:
    """The base model, loaded when first needed."""

    def __init__(self, name: str | None, dtype: torch.dtype) -> None:
        self.name, self._dtype = name, dtype
        self._model: Any = None

    def model(self, task_type: str | None) -> Any:
        """The model, for a task of PEFT's."""
        if self._model is None:
            assert self.name is not None
            load = load_seq2seq if task_type == "SEQ_2_SEQ_LM" else load_causal
            with working(f"loading {self.name}"):
                self._model = load(self.name, self._dtype)
        return self._model

    def sources(self, task_type: str | None) -> tuple[int, ...] | None:
        """Which layers see other layers' keys and values; None where the base has none such.

        Without a base nobody knows; PEFT's files do not say.
        """
        if self.name is None:
            return None
        from fastprefix.hf.patch.patch import patch_of
        from fastprefix.hf.patch.patching import patched

        if not getattr(load_config(self.name).get_text_config(), _SHARED, 0):
            return None
        model = self.model(task_type)
        with patched(model):
            return patch_of(model).sources


def run_conversion(
    source: Path,
    target: Path,
    to: str | None,
    base_name: str | None,
    dtype: str,
    dry_run: bool,
    force: bool,
) -> None:
    """Plans all conversions, shows them, and does them unless one of them cannot be done.

    Raises:
        ValueError: it holds nothing to convert, or something that cannot be converted, or a
            target exists and force is not given. Nothing is written then.
    """
    base = Base(base_name, getattr(torch, dtype))
    with blaming("source"):
        paths, left = _find(source)
        if not paths:
            raise ValueError(f"{source} holds no prefix, prompt or cartridge{_told(left)}")
    several = source.is_dir() and paths != [source]
    sources = [_read(path, base) for path in paths]
    if to is None:
        to = PREFIX_KINDS[0] if all(found.kind == FILE for found in sources) else FILE
    if several:
        left += [(found.path, f"{to} already") for found in sources if found.kind == to]
        sources = [found for found in sources if found.kind != to]
    steps = [Step(found, _target(found, source, target, to, several), to) for found in sources]
    for step in steps:
        step.problem = _check(step, base, force)
    _check_places(steps, source)
    console.print(_table(steps, dry_run))
    for path, kind in left:
        console.print(Text(f"left alone: {path} ({kind})"))
    problems = [f"{step.source.path}: {step.problem}" for step in steps if step.problem]
    for problem in problems[:-1]:
        complain(problem, 1)
    if problems:
        raise ValueError(f"{problems[-1]}; nothing was written")
    if dry_run:
        return
    # what a base has to compute is computed before the first target is written
    writes = [(step.target, _writer(step, base)) for step in steps]
    for path, write in writes:
        with blaming("target"):
            _replace(path, write)


def _find(source: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Files and folders to convert; and what looks like one and is not, with its kind."""
    found: list[Path] = []
    left: list[tuple[Path, str]] = []
    if source.is_file():
        return [source], left

    def walk(folder: Path) -> Iterator[Path]:
        finish(folder)
        if (folder / CONFIG_FILE).is_file():
            yield folder
            return
        for path in sorted(folder.iterdir()):
            if path.is_symlink() or is_leftover(path):
                continue
            if path.is_dir():
                yield from walk(path)
            elif path.suffix == ".safetensors" and path.name != WEIGHTS_FILE:
                yield path

    for path in walk(source):
        if path.is_file():
            (found.append(path) if _is_prefix(path) else left.append((path, "not a prefix")))
            continue
        try:
            read_config(path, _KNOWN)
        except ValueError as error:
            if path == source or "got peft_type" not in str(error):
                raise
            left.append((path, str(error).split(": ", 1)[1].split(",")[0]))
        else:
            found.append(path)
    return found, left


def _is_prefix(file: Path) -> bool:
    try:
        with opened(file) as content:
            return "fastprefix-kv" in (content.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def _read(path: Path, base: Base) -> Source:
    if path.is_file():
        with blaming("source"):
            kv = PrefixKV.load(path)
        return Source(path, FILE, kv, sources=base.sources(None))
    config, file = read_config(path, _KNOWN)
    kind = config["peft_type"]
    if kind in (*PROMPT_KINDS, INFIX_KIND):
        with blaming("source"):
            prompt = load_prompt(path)
        return Source(path, kind, None, prompt.embeddings, config, prompt.heads)
    shapes = groups = sources = None
    if kind != OWN_KIND and (config.get("num_transformer_submodules") or 1) > 1:
        if base.name is None:
            raise ValueError(
                f"source: {file} is for an encoder-decoder, whose layers the base alone knows; "
                "takes --base"
            )
        from fastprefix.hf.patch.patch import patch_of
        from fastprefix.hf.patch.patching import patched

        model = base.model("SEQ_2_SEQ_LM")
        with patched(model):
            shapes, groups = patch_of(model).shapes, patch_of(model).groups
    else:
        sources = base.sources(config.get("task_type"))
    with blaming("source"):
        adapter = load_adapter(path, shapes, groups, sources)
    return Source(path, kind, adapter.kv, None, config, adapter.heads, groups, sources)


def _target(found: Source, source: Path, target: Path, to: str, several: bool) -> Path:
    """Where a source's conversion goes."""
    if not several:
        if to == FILE and target.suffix != ".safetensors":
            raise ValueError(f"target: got {target}, takes the name of a .safetensors file")
        return target
    relative = found.path.relative_to(source)
    if to == FILE:
        return (
            target / relative.parent / f"{relative.name.removesuffix('.safetensors')}.safetensors"
        )
    return target / relative.parent / relative.name.removesuffix(".safetensors")


def _check(step: Step, base: Base, force: bool) -> str | None:
    """Why a step cannot be done; None where it can."""
    found, to = step.source, step.kind
    if found.kind == to:
        return f"is {to} already"
    if found.kind == INFIX_KIND:
        return "is an infix, whose keys and values depend on the text; only fastprefix loads it"
    if found.kv is not None and to in PROMPT_KINDS:
        return f"holds keys and values, which no {to} gives"
    if found.heads and to == FILE:
        heads = ", ".join(sorted(found.heads))
        return f"holds {heads}, trained beside it; a PrefixKV file holds keys and values alone"
    if found.prompt is not None and to not in PROMPT_KINDS and base.name is None:
        return "is a prompt, whose keys and values the base has to compute; takes --base"
    if found.kv is not None and to in PREFIX_KINDS:
        why_not = refusal(found.kv, found.groups, found.sources)
        if why_not is not None:
            return f"cannot be {to}: {why_not}"
    if step.target.is_dir() and to == FILE:
        return f"{step.target} is a folder"
    if step.target.is_file() and to != FILE:
        return f"{step.target} is a file"
    problem = place_to_write(step.target)
    if problem is not None:
        return problem
    if not force and step.target.exists() and (to == FILE or any(step.target.iterdir())):
        return f"{step.target} exists; --force replaces it"
    return None


def _check_places(steps: list[Step], source: Path) -> None:
    """No target may be another's, or the source."""
    places: dict[Path, Path] = {}
    for step in steps:
        place = step.target.resolve()
        if place in places:
            step.problem = step.problem or f"{step.target} is {places[place]}'s target too"
        places[place] = step.source.path
        if place == source.resolve() or place in (other.source.path.resolve() for other in steps):
            step.problem = f"{step.target} is a source"


def _writer(step: Step, base: Base) -> Callable[[Path], None]:
    """What writes a step's target to a path."""
    found, kind = step.source, step.kind
    fields = {name: found.config[name] for name in _KEPT if name in found.config}
    if base.name is not None and not fields.get("base_model_name_or_path"):
        fields["base_model_name_or_path"] = base.name
    if kind in PROMPT_KINDS:
        assert found.prompt is not None
        prompt = found.prompt
        return lambda path: save_prompt(path, prompt, fields, kind=kind, heads=found.heads)
    kv = found.kv
    if kv is None:
        kv = _computed(found, base)
    whole = kv
    if kind == FILE:
        return whole.save
    return lambda path: save_adapter(
        path,
        whole,
        fields,
        kind=kind,
        heads=found.heads,
        groups=found.groups,
        sources=found.sources,
    )


def _computed(found: Source, base: Base) -> PrefixKV:
    """A prompt's keys and values."""
    from fastprefix.hf.prefill.prompts import prefill_embeddings

    assert found.prompt is not None
    model = base.model(found.config.get("task_type"))
    width = model.get_input_embeddings().weight.shape[1]
    if found.prompt.shape[1] != width:
        raise ValueError(
            f"{found.path}: got embeddings {found.prompt.shape[1]} wide, takes {width} for "
            f"{base.name}"
        )
    return prefill_embeddings(model, found.prompt)


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    """Puts a target in its place, whole; of a folder, other files stay."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target)


def _table(steps: list[Step], dry_run: bool) -> Table:
    table = Table(title="Nothing is written: a dry run" if dry_run else None)
    for column in ("source", "is", "tokens", "becomes", "target", ""):
        table.add_column(column, overflow="fold")
    for step in steps:
        found = step.source
        if found.kv is not None:
            tokens = found.kv.num_virtual_tokens
        else:
            assert found.prompt is not None
            tokens = found.prompt.shape[0]
        happens = "replaced" if step.target.exists() else "new"
        if found.kv is None and step.kind not in PROMPT_KINDS:
            happens += ", computed by the base"
        cells = (found.path, found.kind, tokens, step.kind, step.target, step.problem or happens)
        table.add_row(*(Text(str(cell)) for cell in cells))
    return table


def _told(left: list[tuple[Path, str]]) -> str:
    return "; left alone: " + ", ".join(f"{path} ({kind})" for path, kind in left) if left else ""
