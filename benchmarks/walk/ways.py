"""The ways of use, each a function that yields checks: what came back, and what is right.

Whatever plain transformers does first, so that what it cannot do is not held against fastprefix.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from walk.build import first_line, takes, text
from walk.images import Images
from walk.inputs import arguments, ids_for, is_encoder_decoder
from walk.judge import TOLERANCE, Check, WrongError
from walk.library import Library
from walk.oracle import (
    PLAIN,
    BlindError,
    Layers,
    NotApplicableError,
    PrefixOracle,
    distance,
    forget,
    run,
)
from walk.shrink import TEXT

P, L, STEPS = 9, 7, 5  # tokens of the prompt, of the text, and new ones
LEARNED = 5
LENGTHS = (7, 5, 3)  # of the rows of a padded batch
SEEN = 0.01  # how much of the output has to depend on what a check is about


@dataclass
class Case:
    """A class, its plain model, and what all ways need.

    Attributes:
        task: see :mod:`walk.classes`.
        plain: never patched.
        library: fastprefix.
        images: what goes into its texts; None for nothing.
    """

    task: str
    plain: Any
    library: Library
    images: Images | None = None

    def copy(self) -> Any:
        """A model to patch."""
        model = copy.deepcopy(self.plain)
        if hasattr(model, PLAIN):
            delattr(model, PLAIN)
            forget(model)
        return model

    @cached_property
    def with_mask(self) -> bool:
        """Whether the forward takes an attention mask."""
        return takes(self.plain, "attention_mask")

    @cached_property
    def unwanted(self) -> list[int]:
        """Tokens that are not ordinary: a pad that is generated means something to some classes."""
        wide = self.plain.get_output_embeddings()
        size = self.plain.config.get_text_config().vocab_size if wide is None else len(wide.weight)
        return [token for token in range(size) if not TEXT[0] <= token < TEXT[1]]

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """Keyword arguments for a text."""
        given = arguments(self.plain, self.task, ids)
        return given if self.images is None else {**given, **self.images.arguments(ids)}

    def extra(self, ids: Tensor) -> dict[str, Any]:
        """What goes with a text in `generate()`."""
        given = self.inputs(ids)
        del given["input_ids"]
        return given

    def text(self, rows: int, length: int, seed: int) -> Tensor:
        """A text as the class likes it."""
        if self.images is not None:
            return self.images.text(rows, length, seed)
        return ids_for(self.plain, self.task, rows, length, seed)

    def with_images(self) -> Case:
        """The same with an image in each text."""
        with plainly():
            return replace(self, images=Images(self.plain))


@contextlib.contextmanager
def plainly(what: str = "") -> Iterator[None]:
    """What plain transformers cannot do does not apply."""
    try:
        yield
    except NotApplicableError:
        raise
    except Exception as problem:
        raise NotApplicableError(f"the plain model{what}: {first_line(problem)}") from problem


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows [1, n] as one batch, and its mask."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    return ids, mask


def rows_of(case: Case, seed: int = 3) -> list[Tensor]:
    """Texts of several lengths, of which no two start alike."""
    return [case.text(1, n, seed + i) for i, n in enumerate(LENGTHS)]


def patch(case: Case) -> Iterator[Check]:
    """`patch_model` alone: the same output."""
    ids = case.text(2, L, 1)
    with plainly(), torch.no_grad():
        want = run(case.plain, **case.inputs(ids))
        if not torch.isfinite(want).all():
            raise NotApplicableError("the plain model's output is not finite")
    model = case.library.patch(case.copy())
    yield Check(run(model, **case.inputs(ids)), [want])


def patch_padded(case: Case) -> Iterator[Check]:
    """`patch_model` alone, rows padded on either side."""
    model = None
    for side in ("right", "left"):
        ids, mask = padded(rows_of(case), side)
        with plainly(), torch.no_grad():
            if not case.with_mask:
                raise NotApplicableError("it takes no attention mask")
            want = run(case.plain, **case.inputs(ids), attention_mask=mask)
            if not torch.isfinite(want).all():
                raise NotApplicableError("the plain model's output is not finite")
        model = model or case.library.patch(case.copy())
        got = run(model, **case.inputs(ids), attention_mask=mask)
        if want.dim() == 3 and want.shape[:2] == ids.shape:
            yield Check(got[mask.bool()], [want[mask.bool()]], f"pads on the {side}")
        else:
            yield Check(got, [want], f"pads on the {side}")


def prompt(case: Case) -> Iterator[Check]:
    """A prompt's keys and values in front of a text: as the two in one sequence."""
    front, ids = text(1, P, 11), case.text(2, L, 1)
    with plainly(), torch.no_grad():
        whole = torch.cat([front.expand(2, -1), ids], 1)
        want = run(case.plain, **case.inputs(whole))[:, P:]
        seen(want, run(case.plain, **case.inputs(ids)), "a prompt")
    model = case.copy()
    kv = case.library.prefill(model, front)
    with case.library.use(model, kv), torch.no_grad():
        got = run(model, **case.inputs(ids))
    yield Check(got, [want])


def prompt_padded(case: Case) -> Iterator[Check]:
    """The same for rows padded on the left, where the plain model pads right itself."""
    front, rows = text(1, P, 11), rows_of(case)
    ids, mask = padded(rows, "left")
    with plainly(), torch.no_grad():
        more = padding_arguments(case, rows)
        want = [run(case.plain, **case.inputs(torch.cat([front, row], 1)))[0, P:] for row in rows]
        seen(want[0], run(case.plain, **case.inputs(rows[0]))[0], "a prompt")
    model = case.copy()
    kv = case.library.prefill(model, front)
    with case.library.use(model, kv), torch.no_grad():
        got = run(model, **case.inputs(ids), **more)
    yield Check(got[mask.bool()], [torch.cat(want)])


def padding_arguments(case: Case, rows: list[Tensor]) -> dict[str, Tensor]:
    """With what the plain model gives padded rows the output of each row alone.

    Raises:
        NotApplicableError: with nothing that is known here.
    """
    if not case.with_mask:
        raise NotApplicableError("it takes no attention mask")
    ids, mask = padded(rows, "left")
    alone = torch.cat([run(case.plain, **case.inputs(row))[0] for row in rows])
    positions = {"position_ids": mask.cumsum(-1).sub(1).clamp(min=0)}
    for more in ({}, positions if takes(case.plain, "position_ids") else {}):
        got = run(case.plain, **case.inputs(ids), attention_mask=mask, **more)[mask.bool()]
        if distance(got, alone) < 1e-4:
            return {"attention_mask": mask, **more}
    raise NotApplicableError("the plain model does not pad on the left")


def generated(case: Case, model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """New tokens of greedy decoding."""
    torch.manual_seed(0)
    if model is case.plain:
        forget(model)
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        pad_token_id=0,
        suppress_tokens=case.unwanted,
        **case.extra(ids),
    )
    out = out if isinstance(out, Tensor) else out.sequences
    return out[:, ids.shape[1] :]


@torch.no_grad()
def looped(forward: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Greedy decoding by whole forwards, without a cache of the text."""
    for _ in range(STEPS):
        best = forward(ids)[:, -1, TEXT[0] : TEXT[1]].argmax(-1, keepdim=True) + TEXT[0]
        ids = torch.cat([ids, best], 1)
    return ids[:, -STEPS:]


@torch.no_grad()
def is_greedy(forward: Callable[[Tensor], Tensor], ids: Tensor, new: Tensor) -> bool:
    """Whether each new token is the best by forwards, or as good as it but for rounding."""
    logits = forward(torch.cat([ids, new], 1))[:, ids.shape[1] - 1 : -1]
    if ((new < TEXT[0]) | (new >= TEXT[1])).any():
        return False
    best = logits[..., TEXT[0] : TEXT[1]].amax(-1)
    behind = best - logits.gather(-1, new[..., None])[..., 0]
    return bool((behind <= TOLERANCE * logits.std()).all())


def plain_forward(case: Case) -> Callable[[Tensor], Tensor]:
    """The plain model as a function of tokens."""
    return lambda ids: run(case.plain, **case.inputs(ids))


def told_by_generate(case: Case, whole: Tensor) -> Callable[[Tensor], str]:
    """Looks, where a result is not right, whether anything is: `generate()` may contradict itself.

    Its tokens are then neither those of the model's own forwards, nor could ours be both.
    """

    def hint(got: Tensor) -> str:
        if is_greedy(plain_forward(case), whole, generated(case, case.plain, whole)):
            return ""
        raise NotApplicableError("the plain model's generate() is not what its forward says")

    return hint


def prompt_greedy(case: Case) -> Iterator[Check]:
    """`generate()` behind a prompt: the tokens behind the two in one sequence."""
    front = text(1, P, 11)
    with plainly():
        generates(case)
        for seed in range(1, 9):
            ids = case.text(2, L, seed)
            whole = torch.cat([front.expand(2, -1), ids], 1)
            want = generated(case, case.plain, whole)
            if (want != generated(case, case.plain, ids)).any():
                break
        else:
            raise BlindError("the same tokens without the prompt")
    model = case.copy()
    kv = case.library.prefill(model, front)
    with case.library.use(model, kv):
        got = generated(case, model, ids)
    yield Check(
        got,
        [want],
        hint=told_by_generate(case, whole),
        also=lambda new: is_greedy(plain_forward(case), whole, new),
    )


def prompt_greedy_padded(case: Case) -> Iterator[Check]:
    """`generate()` behind a prompt for rows padded on the left."""
    front = text(1, P, 11)
    with plainly():
        generates(case)
        for seed in (3, 13, 23, 33):
            rows = rows_of(case, seed)
            ids, mask = padded(rows, "left")
            alone = torch.cat([generated(case, case.plain, row) for row in rows])
            if (alone != generated(case, case.plain, ids, mask)).any():
                raise NotApplicableError("the plain model does not pad on the left in generate()")
            wholes = [torch.cat([front, row], 1) for row in rows]
            want = torch.cat([generated(case, case.plain, whole) for whole in wholes])
            if (want != alone).any():
                break
        else:
            raise BlindError("the same tokens without the prompt")
    model = case.copy()
    kv = case.library.prefill(model, front)
    with case.library.use(model, kv):
        got = generated(case, model, ids, mask)

    def by_rows(new: Tensor) -> bool:
        rows = zip(wholes, new.split(1), strict=True)
        return all(is_greedy(plain_forward(case), whole, row) for whole, row in rows)

    yield Check(got, [want], hint=told_by_generate(case, wholes[0]), also=by_rows)


def generates(case: Case) -> None:
    """Whether the plain model has `generate()` at all."""
    if not (hasattr(case.plain, "generate") and case.plain.can_generate()):
        raise NotApplicableError("the plain model has no generate()")


def seen(want: Tensor, without: Tensor, what: str) -> None:
    """Whether a check would notice that something is missing.

    Raises:
        BlindError: it would not.
    """
    if not torch.isfinite(want).all():
        raise NotApplicableError("the plain model's output is not finite")
    if want.shape == without.shape and distance(without, want) < SEEN:
        raise BlindError(f"the output hardly depends on {what}")


def learned(
    case: Case, ids: Tensor, groups: tuple[str, ...] | None = None
) -> tuple[PrefixOracle, Layers, int]:
    """Random keys and values for every layer, and a plain model to run them in."""
    shapes, parts, offset = case.library.describe(case.copy(), LEARNED)
    generator, dtype = torch.Generator().manual_seed(7), case.plain.dtype
    layers = []
    for shape, part in zip(shapes, parts, strict=True):
        length = LEARNED if groups is None or part in groups else 0
        sizes = (shape.key_size, shape.value_size)
        key, value = (
            torch.randn(shape.num_heads, length, size, generator=generator).to(dtype)
            for size in sizes
        )
        layers.append((key, value))
    if not any(key.shape[1] for key, _ in layers):
        raise NotApplicableError(f"it has no layers in {', '.join(groups or ())}")
    texts = replace(case, images=None)
    image = case.images is not None
    oracle = PrefixOracle(
        case.plain,
        shapes,
        offset,
        texts.inputs(text(2, L, 1)) if image else case.inputs(ids),
        image,
    )
    if not oracle.ways():
        raise NotApplicableError("nothing says what is right: " + "; ".join(oracle.why))
    return oracle, layers, offset


def right(oracle: PrefixOracle, layers: Layers, **inputs: Any) -> list[Tensor]:
    """What the plain model makes of the prefix; several, where it can be told in several ways."""
    found, problems = [], []
    for way in oracle.ways():
        try:
            found.append(way(layers, **inputs))
        except Exception as problem:
            problems.append(first_line(problem))
    if not found:
        raise NotApplicableError("nothing says what is right: " + "; ".join(problems))
    return found


def expected_offset(model: Any) -> int | None:
    """By how much a learned prefix moves a text: by its length where a cache would.

    That is in decoders that are told positions, and in encoders whose embeddings count the cache.
    None where that is not known.
    """
    if is_encoder_decoder(model):
        return None
    names = {n for m in model.modules() for n in inspect.signature(m.forward).parameters}
    return LEARNED if names & {"past_key_values_length", "cache_length"} else None


def prefix(case: Case, groups: tuple[str, ...] | None = None) -> Iterator[Check]:
    """A learned prefix: as the same numbers in a cache of plain transformers.

    Args:
        case: the class.
        groups: the only ones of an encoder-decoder's layers that get one.
    """
    ids = case.text(2, L, 1)
    oracle, layers, offset = learned(case, ids, groups)
    inputs = case.inputs(ids)
    with plainly(), torch.no_grad():
        want = right(oracle, layers, **inputs)
        seen(want[0], run(case.plain, **inputs), "a prefix")
    kv = case.library.learned([k for k, _ in layers], [v for _, v in layers], offset)
    model = case.copy()
    with case.library.use(model, kv), torch.no_grad():
        got = run(model, **inputs)
    yield from told_apart(got, want)
    expected = expected_offset(case.plain)
    if expected not in (None, offset):
        raise WrongError(f"the default position_offset is {offset}, by a cache {expected}")


def told_apart(
    got: Tensor,
    want: list[Tensor],
    more: Callable[[Tensor], str] = lambda got: "",
    also: Callable[[Tensor], bool] | None = None,
) -> Iterator[Check]:
    """One check; where two oracles differ, the first, the cache, is what counts."""

    def hint(got: Tensor) -> str:
        for other in want[1:]:
            if got.shape == other.shape and (
                distance(got, other) < 1e-4
                if got.is_floating_point()
                else bool((got == other).all())
            ):
                return ", right if the prefix stands outside the cache"
        return more(got)

    yield Check(got, want[:1], hint=hint, also=also)


def prefix_greedy(case: Case) -> Iterator[Check]:
    """`generate()` behind a learned prefix."""
    oracle, layers, offset = learned(case, case.text(2, L, 1))
    with plainly():
        generates(case)
        for seed in range(1, 9):
            ids = case.text(2, L, seed)
            want = []
            for way in oracle.ways():
                with contextlib.suppress(NotApplicableError):
                    want.append(looped(lambda x, way=way: way(layers, **case.inputs(x)), ids))
            if not want:
                raise NotApplicableError("nothing says what is right")
            if (want[0] != generated(case, case.plain, ids)).any():
                break
        else:
            raise BlindError("the same tokens without the prefix")
    kv = case.library.learned([k for k, _ in layers], [v for _, v in layers], offset)
    model = case.copy()
    with case.library.use(model, kv):
        got = generated(case, model, ids)
    first = oracle.ways()[0]
    yield from told_apart(
        got,
        want,
        told_by_generate(case, ids),
        lambda new: is_greedy(lambda x: first(layers, **case.inputs(x)), ids, new),
    )


def prefix_greedy_of_two(case: Case) -> Iterator[Check]:
    """`generate()` of an encoder-decoder behind a prefix in each group of its layers."""
    ids = case.text(2, L, 1)
    oracle, layers, offset = learned(case, ids)
    with plainly():
        generates(case)
        start = case.plain.generation_config.decoder_start_token_id
        first = torch.full((2, 1), start)

        def with_decoder(run_with: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: run_with(input_ids=ids, decoder_input_ids=x)

        plain = of_two(case, case.plain, ids)
        if not is_greedy(with_decoder(partial(run, case.plain)), first, plain):
            raise NotApplicableError("the plain model's generate() is not what its forward says")
        way = with_decoder(partial(oracle.ways()[0], layers))
        want = looped(way, first)
        if (want == plain).all():
            raise BlindError("the same tokens without the prefix")
    kv = case.library.learned([k for k, _ in layers], [v for _, v in layers], offset)
    model = case.copy()
    with case.library.use(model, kv):
        got = of_two(case, model, ids)
    yield Check(got, [want], also=lambda new: is_greedy(way, first, new))


def of_two(case: Case, model: Any, ids: Tensor) -> Tensor:
    """New tokens of greedy decoding by an encoder-decoder."""
    torch.manual_seed(0)
    mask = torch.ones_like(ids)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        suppress_tokens=case.unwanted,
    )
    return out[:, 1:]


def gradient(case: Case) -> Iterator[Check]:
    """The gradient of a learned prefix, the model's weights frozen."""
    ids = case.text(2, L, 1)
    oracle, layers, offset = learned(case, ids)
    inputs = case.inputs(ids)

    def leaves() -> Layers:
        return [(k.clone().requires_grad_(), v.clone().requires_grad_()) for k, v in layers]

    def gradients(output: Tensor, parts: Layers) -> Tensor:
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
        flat = [x for part in parts for x in part]
        found = torch.autograd.grad((output * weights).sum(), flat, allow_unused=True)
        return torch.cat([
            (torch.zeros_like(x) if g is None else g).flatten()
            for x, g in zip(flat, found, strict=True)
        ])  # fmt: skip

    wants = []
    with plainly():
        for frozen in (oracle.plain, oracle.interface):
            if frozen is not None:
                frozen.requires_grad_(False)
        for way in oracle.ways():
            parts = leaves()
            try:
                wants.append(gradients(way(parts, **inputs), parts))
            except Exception as problem:
                if way is oracle.ways()[-1] and not wants:
                    raise NotApplicableError(first_line(problem)) from problem
    parts = leaves()
    kv = case.library.learned([k for k, _ in parts], [v for _, v in parts], offset)
    model = case.copy().requires_grad_(False)
    with case.library.use(model, kv):
        got = gradients(run(model, **inputs), parts)
    yield from told_apart(got, wants)


CAUSAL: dict[str, Callable[[Case], Iterator[Check]]] = {
    "patch": patch,
    "patch padded": patch_padded,
    "prompt": prompt,
    "prompt padded": prompt_padded,
    "prompt greedy": prompt_greedy,
    "prompt greedy padded": prompt_greedy_padded,
    "prefix": prefix,
    "prefix greedy": prefix_greedy,
    "gradient": gradient,
}


def prompt_image(case: Case) -> Iterator[Check]:
    """A prompt that holds an image, in front of a text without one."""
    texts = replace(case, images=None)
    front, ids = case.text(1, P, 11), text(2, L, 1)
    whole = torch.cat([front.expand(2, -1), ids], 1)
    with plainly(), torch.no_grad():
        # row by row, since the rows of a batch would have different images
        want = torch.cat([run(case.plain, **case.inputs(row[None])) for row in whole])
        want = want[:, front.shape[1] :]
        seen(want, run(case.plain, **texts.inputs(ids)), "a prompt")
    model = case.copy()
    kv = case.library.prefill(model, front, **case.extra(front))
    with case.library.use(model, kv), torch.no_grad():
        got = run(model, **texts.inputs(ids))
    yield Check(got, [want])


def prompt_image_greedy(case: Case) -> Iterator[Check]:
    """`generate()` behind a prompt that holds an image."""
    texts, front = replace(case, images=None), case.text(1, P, 11)
    with plainly():
        generates(case)
        for seed in range(1, 9):
            ids = text(2, L, seed)
            whole = torch.cat([front.expand(2, -1), ids], 1)
            # row by row, since the rows of a batch would have different images
            want = torch.cat([generated(case, case.plain, row[None]) for row in whole])
            if (want != generated(texts, case.plain, ids)).any():
                break
        else:
            raise BlindError("the same tokens without the prompt")
    model = case.copy()
    kv = case.library.prefill(model, front, **case.extra(front))
    with case.library.use(model, kv):
        got = generated(texts, model, ids)
    yield Check(got, [want])


def on_images(
    way: Callable[..., Iterator[Check]], **options: Any
) -> Callable[..., Iterator[Check]]:
    """A way, on texts with an image."""

    def walked(case: Case) -> Iterator[Check]:
        case = case.with_images()
        with plainly(" with an image"), torch.no_grad():
            ids = case.text(2, L, 1)
            given = case.inputs(ids)
            with_image = run(case.plain, **given)
            given["pixel_values"] = given["pixel_values"].flip(0, -1) * 2
            seen(with_image, run(case.plain, **given), "the image")
        yield from way(case)

    return walked


IMAGES: dict[str, Callable[[Case], Iterator[Check]]] = {
    "image patch": on_images(patch),
    "image prompt": on_images(prompt),
    "image prompt greedy": on_images(prompt_greedy),
    "image in prompt": on_images(prompt_image),
    "image in prompt greedy": on_images(prompt_image_greedy),
    "image prefix": on_images(prefix),
    "image prefix greedy": on_images(prefix_greedy),
    "image gradient": on_images(gradient),
}
ENCODER = {name: CAUSAL[name] for name in ("patch", "patch padded", "prefix", "gradient")}
ENCODER_DECODER: dict[str, Callable[[Case], Iterator[Check]]] = {
    "patch": patch,
    "patch padded": patch_padded,
    "prefix encoder": partial(prefix, groups=("encoder",)),
    "prefix decoder": partial(prefix, groups=("decoder",)),
    "prefix cross": partial(prefix, groups=("cross",)),
    "prefix": prefix,
    "prefix greedy": prefix_greedy_of_two,
    "gradient": gradient,
}


def ways_for(task: str, model: Any) -> dict[str, Callable[[Case], Iterator[Check]]]:
    """The ways that go with a class."""
    if task == "seq2seq" and is_encoder_decoder(model):
        return ENCODER_DECODER
    if task == "image-text":
        return {**CAUSAL, **IMAGES}
    # a few that read sounds are listed with encoder-decoders, and continue a text
    return CAUSAL if task in ("causal", "seq2seq") else ENCODER


WAY_NAMES = list(dict.fromkeys([*CAUSAL, *IMAGES, *ENCODER_DECODER]))
