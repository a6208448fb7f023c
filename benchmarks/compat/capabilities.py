"""The capabilities: each one way to call a model, and what is right for it.

A capability returns what the library made of it, and how to find out what is right; the runner
calls the second only when the first came back. The runner also tries the capability on the bare
model, without a prefix, before it blames a library.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from compat.architectures import PAD, Architecture, Family, Row, pad, real_places
from compat.libraries import Library, NotOfferedError, Tuned, flat
from compat.oracle import Oracle, Prefix, Semantics, output_of

LENGTH = 5  # of the prefix
STEPS = 8  # new tokens; text and prefix outgrow every window
LENGTHS = (9, 6, 3)

# In float32, relative to the norm of what is right. Rounding stays below 1e-5 in these models;
# losing a token of the prefix or a position costs 1e-2 and more (Case.blind).
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over that of what is right."""
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def typical(got: Tensor, want: Tensor) -> float:
    """The median of the places' relative errors.

    For bfloat16, where a mixture of experts may send single tokens elsewhere for a rounding.
    """
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median())


@dataclass
class Check:
    """One comparison.

    Attributes:
        got: what the library computed.
        want: computes what is right.
        tolerance: of the error, or what computes it; token ids must be equal.
        error: of what came out against what is right, `relative` if not told otherwise.
        what: is compared, if not the output.
        without: what comes out where the prefix is lost, and in which way, to name that.
    """

    got: Tensor | None
    want: Callable[[], Tensor | None]
    tolerance: float | Callable[[], float] = TOLERANCE
    error: Callable[[Tensor, Tensor], float] = relative
    what: str = ""
    without: dict[str, Callable[[], Tensor]] = field(default_factory=dict)


@dataclass
class Case:
    """One architecture with one library.

    Attributes:
        architecture: of the model.
        library: that gives it the prefix.
        oracle: a bare model with the same weights.
        model: the weights; copied by `tune`.
        note: of the last `tune`.
    """

    architecture: Architecture
    library: Library
    oracle: Oracle
    model: PreTrainedModel
    note: str = ""

    @classmethod
    def make(cls, architecture: Architecture, library: Library, **changes: Any) -> Case:
        """Builds the model and its oracle; changes are fields of the configuration."""
        model = architecture.build(**changes)
        return cls(architecture, library, Oracle(architecture, model), model)

    def with_library(self, library: Library) -> Case:
        """The same model and oracle for another library."""
        return Case(self.architecture, library, self.oracle, self.model)

    @property
    def generates(self) -> bool:
        """Whether it has a generate()."""
        return self.architecture.family in ("decoder", "encoder-decoder")

    def prefix(self, length: int = LENGTH, seed: int = 0, group: str | None = None) -> Prefix:
        """Numbers for all groups that the library has a prefix for, or for one."""
        groups = self.library.groups(self.architecture)
        if group is not None:
            if groups and group not in groups:
                raise NotOfferedError(f"{self.library.name} has no prefix for the {group} group")
            groups = (group,)
        return self.oracle.prefix(length, seed, groups)

    def tune(self, prefix: Prefix, training: bool = False, dtype: Any = torch.float32) -> Tuned:
        """A fresh copy of the model with the prefix."""
        model = copy.deepcopy(self.model).to(dtype)
        tuned = self.library.tune(self.architecture, model, {"default": prefix}, training)
        self.note = tuned.note
        return tuned

    def right(self, prefix: Prefix) -> tuple[Prefix | None, Semantics]:
        """What the oracle needs: the prefix by the library's layout, and its semantics."""
        length = max((key.shape[1] for key, _ in prefix), default=0)
        semantics = self.library.semantics(self.architecture, length)
        return self.library.effective(self.oracle.slots, prefix), semantics

    def rows(self, *lengths: int, seed: int = 0) -> list[Row]:
        """Inputs of these lengths."""
        return self.architecture.rows(lengths, seed)

    def prompts(self, *lengths: int, seed: int = 0) -> list[Row]:
        """Inputs to generate from: an encoder-decoder's decoder starts with its start token."""
        rows = self.rows(*lengths, seed=seed)
        if self.architecture.family == "encoder-decoder":
            start: Any = self.model.generation_config.decoder_start_token_id
            for row in rows:
                row["decoder_input_ids"] = torch.tensor([[start]])
        return rows

    def at_text(self, out: Any, rows: list[Row], side: str = "right") -> Tensor:
        """A padded batch's output at all real places, as `Oracle.outputs` orders them."""
        output = output_of(out)
        if self.architecture.family == "vision":
            return output.flatten(0, 1)
        return output[real_places(rows, self.architecture.text, side)]

    def check_output(self, got: Tensor, rows: list[Row], prefix: Prefix) -> Check:
        """An output at all real places against the oracle's."""

        def outputs(part: Prefix | None, semantics: Semantics) -> Tensor:
            return self.oracle.outputs(rows, part, semantics).detach()

        empty = [(key[:, :0], value[:, :0]) for key, value in prefix]
        lost = {
            "the prefix is ignored": lambda: outputs(None, Semantics(0)),
            "the prefix is ignored, the text moved": lambda: outputs(empty, self.right(prefix)[1]),
        }
        if not self.library.groups(self.architecture):
            lost = {}  # the bare model has none to lose
        return Check(got.detach(), lambda: outputs(*self.right(prefix)), without=lost)


Capability = Callable[[Case], list[Check]]


@dataclass(frozen=True)
class Entry:
    """A capability's place in the table."""

    key: str
    title: str
    families: tuple[Family, ...]
    run: Capability
    why_not: str  # for the other families


CAPABILITIES: dict[str, Entry] = {}
_ALL: tuple[Family, ...] = ("decoder", "encoder", "vision", "encoder-decoder")
_TEXT: tuple[Family, ...] = ("decoder", "encoder", "encoder-decoder")
_GENERATE: tuple[Family, ...] = ("decoder", "encoder-decoder")


def _capability(
    key: str, title: str, families: tuple[Family, ...] = _ALL, why_not: str = ""
) -> Callable[[Capability], Capability]:
    def register(run: Capability) -> Capability:
        CAPABILITIES[key] = Entry(key, title, families, run, why_not)
        return run

    return register


def _forward(case: Case, rows: list[Row], side: str = "right", **options: Any) -> list[Check]:
    """A batch's forward against its rows alone."""
    prefix = case.prefix()
    batch = pad(rows, side, mask=options.pop("mask", True))
    with torch.no_grad():
        out = case.tune(prefix).forward(**batch, **options)
    return [case.check_output(case.at_text(out, rows, side), rows, prefix)]


@_capability("forward", "forward, no padding")
def _plain(case: Case) -> list[Check]:
    return _forward(case, case.rows(9, 9, 9), mask=False)


@_capability("right_padded", "right-padded batch", _TEXT, "images are not padded")
def _right(case: Case) -> list[Check]:
    return _forward(case, case.rows(*LENGTHS), "right")


@_capability("left_padded", "left-padded batch", _TEXT, "images are not padded")
def _left(case: Case) -> list[Check]:
    return _forward(case, case.rows(*LENGTHS), "left")


@_capability(
    "left_positions",
    "left-padded batch with position_ids",
    ("decoder", "encoder"),
    "takes no position_ids",
)
def _left_with_positions(case: Case) -> list[Check]:
    rows = case.rows(*LENGTHS)
    mask = pad(rows, "left")["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + case.architecture.first_position
    return _forward(case, rows, "left", position_ids=positions)


@_capability("bf16", "bfloat16")
def _bfloat16(case: Case) -> list[Check]:
    rows, prefix = case.rows(9, 9, 9), case.prefix()
    batch = pad(rows)
    if "pixel_values" in batch or "input_features" in batch:
        batch = {n: x.bfloat16() if x.is_floating_point() else x for n, x in batch.items()}
    with torch.no_grad():
        out = case.tune(prefix, dtype=torch.bfloat16).forward(**batch)
    got = case.at_text(out, rows).float()

    @torch.no_grad()
    def right() -> Tensor:
        return case.oracle.outputs(rows, *case.right(prefix))

    @torch.no_grad()
    def twice_what_plain_bfloat16_loses() -> float:
        same = case.oracle.outputs(rows, *case.right(prefix), dtype=torch.bfloat16)
        return 2.0 * typical(same.float(), right())

    return [Check(got, right, twice_what_plain_bfloat16_loses, typical)]


def _loss(output: Tensor) -> Tensor:
    """A sum with weights that no symmetry cancels, the same for the same number of places."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return (weights * output.float()).sum()


def _backward(case: Case, lengths: tuple[int, ...], checkpointing: bool = False) -> list[Check]:
    rows, prefix = case.rows(*lengths), case.prefix()
    tuned = case.tune(prefix, training=True)
    tuned.module.train()
    if checkpointing:
        tuned.checkpointing()
    out = tuned.forward(**pad(rows, mask=len(set(lengths)) > 1))
    _loss(case.at_text(out, rows)).backward()

    def right() -> Tensor | None:
        return _gradients(case, rows, prefix)

    got = tuned.gradient()
    if got is None and case.library.groups(case.architecture):
        got = torch.zeros_like(flat(prefix))  # trains, and leaves the prefix as it is
    what = "the prefix's gradient"
    return [
        case.check_output(case.at_text(out, rows), rows, prefix),
        Check(got, right, GRADIENT_TOLERANCE, what=what),
    ]


def _gradients(case: Case, rows: list[Row], prefix: Prefix) -> Tensor | None:
    """The oracle's gradient of the prefix, laid out as `flat` does."""
    leaves = [
        (key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in prefix
    ]
    effective, semantics = case.right(leaves)
    if effective is None:
        return None
    every = [x for pair in leaves for x in pair]
    loss = _loss(case.oracle.outputs(rows, effective, semantics))
    found = torch.autograd.grad(loss, every, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(found, every, strict=True)]
    return flat(list(zip(grads[0::2], grads[1::2], strict=True)))


@_capability("gradient", "gradient of the prefix")
def _gradient(case: Case) -> list[Check]:
    return _backward(case, LENGTHS)


@_capability("checkpointing", "with gradient checkpointing")
def _checkpointing(case: Case) -> list[Check]:
    return _backward(case, (9, 9, 9), checkpointing=True)


@_capability(
    "checkpointing_padded", "with gradient checkpointing, padded", _TEXT, "images are not padded"
)
def _checkpointing_padded(case: Case) -> list[Check]:
    return _backward(case, LENGTHS, checkpointing=True)


@_capability("compile", "torch.compile(fullgraph=True)")
def _compiled(case: Case) -> list[Check]:
    rows, prefix = case.rows(9, 9, 9), case.prefix()
    tuned = case.tune(prefix, training=True)
    torch._dynamo.reset()
    compiled: Any = torch.compile(tuned.module, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = case.at_text(compiled(**pad(rows)), rows)
    return [case.check_output(got, rows, prefix)]


@_capability("packed", "packed sequences", ("decoder",), "packing is for decoders here")
def _packed(case: Case) -> list[Check]:
    rows, prefix = case.rows(5, 3, 4), case.prefix()
    ids = torch.cat([row["input_ids"] for row in rows], 1)
    positions = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
    with torch.no_grad():
        out = case.tune(prefix).forward(input_ids=ids, position_ids=positions, use_cache=False)
    return [case.check_output(output_of(out)[0], rows, prefix)]


_NAMES: list[str | None] = ["a", "b", None, "a"]


def _several(case: Case) -> dict[str, Prefix]:
    return {"a": case.prefix(), "b": case.prefix(3, seed=1)}


@_capability("mixed", "several prefixes in one batch")
def _mixed(case: Case) -> list[Check]:
    rows, prefixes = case.rows(9, 6, 3, 5), _several(case)
    model = copy.deepcopy(case.model)
    with torch.no_grad(), case.library.rows(case.architecture, model, prefixes, _NAMES) as tuned:
        got = case.at_text(tuned.forward(**pad(rows)), rows)

    def right() -> Tensor:
        parts = []
        for row, name in zip(rows, _NAMES, strict=True):
            at = (None, Semantics(0)) if name is None else case.right(prefixes[name])
            parts.append(case.oracle.outputs([row], *at))
        return torch.cat(parts)

    def same_for_all() -> Tensor:
        return case.oracle.outputs(rows, *case.right(prefixes["a"]))

    return [Check(got, right, without={"every row gets the active prefix": same_for_all})]


@_capability("mixed_generate", "several prefixes, generate()", _GENERATE, "does not generate")
def _mixed_generate(case: Case) -> list[Check]:
    rows, prefixes = case.prompts(9, 6, 3, 5), _several(case)
    model = copy.deepcopy(case.model)
    batch = _prompt_batch(case, rows)
    with case.library.rows(case.architecture, model, prefixes, _NAMES) as tuned:
        got = _generate(case, tuned, batch)

    def right() -> Tensor:
        parts = []
        for row, name in zip(rows, _NAMES, strict=True):
            at = (None, Semantics(0)) if name is None else case.right(prefixes[name])
            parts.append(case.oracle.greedy([row], STEPS, *at))
        return torch.cat(parts)

    return [Check(got, right)]


@_capability("lora", "prefix with LoRA")
def _lora(case: Case) -> list[Check]:
    changed = copy.deepcopy(case.model)
    _add_lora(changed)
    inner = Case(case.architecture, case.library, Oracle(case.architecture, changed), changed)
    rows, prefix = inner.rows(*LENGTHS), inner.prefix()
    tuned = inner.tune(prefix, training=True)
    lora = _lora_parameters(tuned.module)
    if not all(parameter.requires_grad for parameter in lora):
        case.note = "LoRA is frozen with the base and has to be unfrozen by hand"
    for parameter in lora:
        parameter.requires_grad_(True)
    out = tuned.forward(**pad(rows))
    loss = _loss(inner.at_text(out, rows))
    got = _joined(torch.autograd.grad(loss, lora, retain_graph=True, allow_unused=True), lora)
    loss.backward()

    def right() -> Tensor:
        own = _lora_parameters(inner.oracle.model)
        for parameter in own:
            parameter.requires_grad_(True)
        loss = _loss(inner.oracle.outputs(rows, *inner.right(prefix)))
        return _joined(torch.autograd.grad(loss, own, allow_unused=True), own)

    return [
        inner.check_output(inner.at_text(out, rows), rows, prefix),
        Check(
            tuned.gradient(),
            lambda: _gradients(inner, rows, prefix),
            GRADIENT_TOLERANCE,
            what="the prefix's gradient",
        ),
        Check(got, right, GRADIENT_TOLERANCE, what="LoRA's gradient"),
    ]


def _lora_parameters(module: nn.Module) -> list[Tensor]:
    return [p for name, p in module.named_parameters() if ".lora_" in name]


def _joined(grads: tuple[Tensor | None, ...], like: list[Tensor]) -> Tensor:
    """One vector; zeros where no gradient arrived."""
    pairs = zip(grads, like, strict=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for g, x in pairs])


def _add_lora(model: PreTrainedModel) -> None:
    """LoRA through transformers' own add_adapter, with weights that are not zero."""
    kinds = ("Linear", "Conv1D", "FalconLinear")
    own = {name for name, m in model.named_modules() if type(m).__name__ in kinds}
    config = peft.LoraConfig(r=2, target_modules=sorted(n for n in own if "head" not in n))
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@_capability("files", "save and load")
def _files(case: Case) -> list[Check]:
    rows, prefix = case.rows(9, 9, 9), case.prefix()
    tuned = case.tune(prefix, training=True)
    checks = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not case.library.groups(case.architecture):
            return []
        tuned.save(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["peft_type"] == "PREFIX_TUNING":  # PEFT's own layout holds these very numbers
            (numbers,) = load_file(folder / "adapter_model.safetensors").values()
            checks.append(Check(numbers, lambda: flat(prefix), 0.0, what="the file's numbers"))
        else:
            case.note = "a format of its own, where PEFT's has no place for the prefix"
        loaded = case.library.load(copy.deepcopy(case.model), folder)
    with torch.no_grad():
        got = case.at_text(loaded.forward(**pad(rows)), rows)
    return [*checks, case.check_output(got, rows, prefix)]


def _prompt_batch(case: Case, rows: list[Row]) -> dict[str, Tensor]:
    """Padded as generate() wants it: on the left what is continued, on the right an encoder's."""
    return pad(rows, "left" if case.architecture.family == "decoder" else "right")


def _generate(
    case: Case, tuned: Tuned, batch: dict[str, Tensor], steps: int = STEPS, **options: Any
) -> Tensor:
    fixed = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": PAD}
    batch = {n: x for n, x in batch.items() if n != "decoder_attention_mask"}
    if case.architecture.family == "encoder-decoder":
        batch.pop("decoder_input_ids")  # the start token alone, which generate() adds
    with torch.no_grad():
        # no text ends early; Whisper returns the new tokens alone
        return tuned.generate(**batch, **{**fixed, **options})[:, -steps:]


def _greedy(case: Case, rows: list[Row], **options: Any) -> list[Check]:
    prefix = case.prefix()
    got = _generate(case, case.tune(prefix), _prompt_batch(case, rows), **options)
    return [Check(got, lambda: case.oracle.greedy(rows, STEPS, *case.right(prefix)))]


_NO_GENERATE = "does not generate"


@_capability("greedy", "generate(): greedy", _GENERATE, _NO_GENERATE)
def _greedy_plain(case: Case) -> list[Check]:
    return _greedy(case, case.prompts(6, 6, 6))


@_capability("greedy_padded", "generate(): greedy, padded batch", _GENERATE, _NO_GENERATE)
def _greedy_padded(case: Case) -> list[Check]:
    return _greedy(case, case.prompts(*LENGTHS))


@_capability("beams", "generate(): beams", _GENERATE, _NO_GENERATE)
def _beams(case: Case) -> list[Check]:
    rows, prefix = case.prompts(6, 6), case.prefix()
    batch = _prompt_batch(case, rows)
    got = _generate(case, case.tune(prefix), batch, num_beams=3, num_return_sequences=3)
    return [Check(got, lambda: case.oracle.beams(rows, STEPS, *case.right(prefix), width=3))]


@_capability("sampling", "generate(): sampling", _GENERATE, _NO_GENERATE)
def _sampling(case: Case) -> list[Check]:
    rows, prefix = case.prompts(6, 6, 6), case.prefix()
    tuned = case.tune(prefix)
    torch.manual_seed(5)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    got = _generate(case, tuned, _prompt_batch(case, rows), **options)
    return [Check(got, lambda: case.oracle.sample(rows, STEPS, *case.right(prefix), seed=5))]


@_capability("static_cache", "generate(): static cache", _GENERATE, _NO_GENERATE)
def _static(case: Case) -> list[Check]:
    return _greedy(case, case.prompts(*LENGTHS), cache_implementation="static")


@_capability("prompt_lookup", "generate(): prompt lookup", _GENERATE, _NO_GENERATE)
def _lookup(case: Case) -> list[Check]:
    (row,) = case.prompts(3)
    if "input_ids" in row:
        row["input_ids"] = row["input_ids"].repeat(1, 3)  # something to find again
    return _greedy(case, [row], prompt_lookup_num_tokens=3)


@_capability("assisted", "generate(): assisted", _GENERATE, _NO_GENERATE)
def _assisted(case: Case) -> list[Check]:
    assistant = copy.deepcopy(case.model)
    # transformers adapts it with scikit-learn, where that happens to be installed
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return _greedy(case, case.prompts(6), assistant_model=assistant)


@_capability("no_cache", "generate(): use_cache=False", _GENERATE, _NO_GENERATE)
def _no_cache(case: Case) -> list[Check]:
    return _greedy(case, case.prompts(*LENGTHS), use_cache=False)


@_capability(
    "continued",
    "generate(): going on from a cache",
    ("decoder",),
    "a decoder's text goes on; others start anew",
)
def _continued(case: Case) -> list[Check]:
    rows, more, prefix = case.prompts(6, 6), case.prompts(3, 3, seed=1), case.prefix()
    tuned, ids = case.tune(prefix), pad(rows, mask=False)["input_ids"]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": PAD}
    with torch.no_grad():
        first = tuned.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            return_dict_in_generate=True,
            **options,
        )
        ids = torch.cat([first.sequences, pad(more, mask=False)["input_ids"]], 1)
        second = tuned.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=first.past_key_values,
            max_new_tokens=STEPS,
            **options,
        )

    def right() -> Tensor:
        new = case.oracle.greedy(rows, 3, *case.right(prefix))
        joined = [
            {"input_ids": torch.cat([row["input_ids"], new[i : i + 1], after["input_ids"]], 1)}
            for i, (row, after) in enumerate(zip(rows, more, strict=True))
        ]
        return case.oracle.greedy(joined, STEPS, *case.right(prefix))

    return [Check(second[:, -STEPS:], right)]


def _one_group(case: Case, group: str) -> list[Check]:
    """Every slot of a group has numbers of its own, whatever the library's layout."""
    rows, prefix = case.rows(*LENGTHS), case.prefix(group=group)
    with torch.no_grad():
        got = case.at_text(case.tune(prefix).forward(**pad(rows)), rows)
    own = prefix if case.library.groups(case.architecture) else None
    return [Check(got, lambda: case.oracle.outputs(rows, own, case.right(prefix)[1]))]


_ENCODER_DECODER: tuple[Family, ...] = ("encoder-decoder",)
_NO_GROUPS = "no encoder-decoder"


@_capability("encoder_group", "prefix for the encoder alone", _ENCODER_DECODER, _NO_GROUPS)
def _encoder_group(case: Case) -> list[Check]:
    return _one_group(case, "encoder")


@_capability("decoder_group", "prefix for the decoder alone", _ENCODER_DECODER, _NO_GROUPS)
def _decoder_group(case: Case) -> list[Check]:
    return _one_group(case, "decoder")


@_capability("cross_group", "prefix for cross-attention alone", _ENCODER_DECODER, _NO_GROUPS)
def _cross_group(case: Case) -> list[Check]:
    return _one_group(case, "cross")


@_capability("deeper_decoder", "decoder deeper than the encoder", _ENCODER_DECODER, _NO_GROUPS)
def _deeper(case: Case) -> list[Check]:
    inner = Case.make(case.architecture, case.library, **(case.architecture.deeper or {}))
    checks = _plain(inner)
    case.note = inner.note
    return checks
