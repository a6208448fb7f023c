"""What a model does on the examples of a task: its loss, what it predicts, and the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprefix.arguments import check_whole, refuses_unknown_arguments
from fastprefix.hf.evaluation import evaluating
from fastprefix.tasks.encode import IGNORED, Collator
from fastprefix.tasks.encoding import Encoding, Piece
from fastprefix.tasks.metrics import classification_scores, perplexity, text_scores
from fastprefix.tasks.task import (
    AnsweredQuestion,
    Classification,
    Example,
    Generation,
    LabelledText,
    WrittenText,
)

MAX_ANSWER_TOKENS = 30  # SQuAD's answers are short; the usual limit of extractive readers


@refuses_unknown_arguments
def evaluate(
    model: Any, encoding: Encoding, examples: Sequence[Example], batch_size: int = 16
) -> dict[str, float]:
    """The task's metrics on these examples, and the mean loss.

    ``loss`` is the mean cross entropy: in nats for each target token of a language model, for each
    example or piece of the others. Language models that write also get ``perplexity``.

    Args:
        model: of the encoding's task type, a plain one or a tuned one, in any mode: its training
            mode is restored.
        encoding: how examples become token ids.
        examples: at least one.
        batch_size: of a forward pass; does not change the result.

    Raises:
        ValueError: no examples.
        ImportError: the library of a metric is not installed.
    """
    if not examples:
        raise ValueError("examples: got none, takes at least one")
    check_whole("batch_size", batch_size, 1)
    scores = {"loss": mean_loss(model, encoding, examples, batch_size)}
    if isinstance(encoding.task, Classification):
        chosen = predict_classes(
            model, encoding, cast(Sequence[LabelledText], examples), batch_size
        )
        labels = [cast(LabelledText, example).label for example in examples]
        return scores | classification_scores(chosen, labels)
    if isinstance(encoding.task, Generation):
        written = cast(Sequence[WrittenText], examples)
        texts = write(model, encoding, examples, batch_size)
        references = [example.targets for example in written]
        scores["perplexity"] = perplexity(scores["loss"])
        return scores | text_scores(texts, references, encoding.task.metrics)
    answered = cast(Sequence[AnsweredQuestion], examples)
    answers = find_answers(model, encoding, answered, batch_size)
    acceptable = [example.answers for example in answered]
    return scores | text_scores(answers, acceptable, encoding.task.metrics)


@refuses_unknown_arguments
def mean_loss(
    model: Any, encoding: Encoding, examples: Sequence[Example], batch_size: int = 16
) -> float:
    """The mean cross entropy; see :func:`evaluate`."""
    total = count = 0.0
    shifted = encoding.task_type == "CAUSAL_LM"
    with evaluating(model):
        for _, batch in _batches(model, encoding, list(encoding.items(examples)), batch_size):
            labels = batch.get("labels")
            if labels is None or labels.dim() == 1:
                weight = len(batch["input_ids"])
            else:  # no token precedes the first one, so its label does not count
                weight = int((labels[:, 1:] if shifted else labels).ne(IGNORED).sum())
            output = model(**batch)
            loss = output.loss if "labels" in batch else _span_loss(output, batch)
            total += float(loss) * weight
            count += weight
    return total / count


def _span_loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the cross entropies of start and end. Transformers' own loss counts padding, too."""
    padding = batch["attention_mask"] == 0
    losses = [
        F.cross_entropy(logits.float().masked_fill(padding, float("-inf")), batch[place])
        for logits, place in (
            (output.start_logits, "start_positions"),
            (output.end_logits, "end_positions"),
        )
    ]
    return torch.stack(losses).mean()


@refuses_unknown_arguments
def predict_classes(
    model: Any, encoding: Encoding, examples: Sequence[LabelledText], batch_size: int = 16
) -> list[int]:
    """The class that a model chooses for each example.

    A classification head's largest logit. A language model scores the word of each class behind
    the question, with the token that ends it, and the most probable one is chosen.
    """
    with evaluating(model):
        if encoding.task_type == "SEQ_CLS":
            chosen = torch.empty(len(examples), dtype=torch.long)
            for rows, batch in _batches(
                model, encoding, list(encoding.items(examples)), batch_size
            ):
                chosen[rows] = model(**batch).logits.argmax(-1).cpu()
            return chosen.tolist()
        task = cast(Classification, encoding.task)
        classes = len(task.labels)
        asked = [
            LabelledText(example.text, example.second, label)
            for example in examples
            for label in range(classes)
        ]
        likely = torch.empty(len(asked))
        shifted = encoding.task_type == "CAUSAL_LM"
        for rows, batch in _batches(model, encoding, list(encoding.items(asked)), batch_size):
            logits = model(**batch).logits
            likely[rows] = _log_probabilities(logits, batch["labels"], shifted).cpu()
        return likely.view(-1, classes).argmax(-1).tolist()


@refuses_unknown_arguments
def write(
    model: Any, encoding: Encoding, examples: Sequence[Example], batch_size: int = 16
) -> list[str]:
    """What a language model writes for each example, greedily."""
    tokenizer = encoding.tokenizer
    causal = encoding.task_type == "CAUSAL_LM"
    collator = Collator(tokenizer, padding_side="left" if causal else "right")
    pad = tokenizer.pad_token_id
    options = {"pad_token_id": tokenizer.eos_token_id if pad is None else pad}
    if causal:  # the token that ended the targets in training; the model's own may be another
        options["eos_token_id"] = tokenizer.eos_token_id
    prompts = encoding.prompts(examples)
    texts = [""] * len(examples)
    with evaluating(model):
        for rows in _of_like_length(prompts, batch_size):
            batch = collator([prompts[i] for i in rows])
            batch = {key: value.to(_device(model)) for key, value in batch.items()}
            ids = model.generate(
                **batch, **options, max_new_tokens=encoding.target_room, do_sample=False
            )
            new = ids[:, batch["input_ids"].shape[1] :] if causal else ids
            found = tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, text in zip(rows, found, strict=True):
                texts[i] = text.strip()
    return texts


@refuses_unknown_arguments
def find_answers(
    model: Any, encoding: Encoding, examples: Sequence[AnsweredQuestion], batch_size: int = 16
) -> list[str]:
    """The part of each passage that a model points at.

    Of all pieces of a passage the span with the largest sum of start and end logit is taken.
    """
    pieces = [
        (i, piece) for i, example in enumerate(examples) for piece in encoding.pieces(example)
    ]
    best = [(float("-inf"), "")] * len(examples)
    with evaluating(model):
        for start in range(0, len(pieces), batch_size):
            some = pieces[start : start + batch_size]
            batch = encoding.collator()([piece.inputs for _, piece in some])
            output = model(**{k: v.to(_device(model)) for k, v in batch.items()})
            firsts, lasts = output.start_logits.float().cpu(), output.end_logits.float().cpu()
            for (i, piece), first, last in zip(some, firsts, lasts, strict=True):
                best[i] = max(best[i], _best_span(piece, first, last))
    return [text for _, text in best]


def _best_span(piece: Piece, first: Tensor, last: Tensor) -> tuple[float, str]:
    """The score and the text of the best span of a piece."""
    inside = torch.tensor([place is not None for place in piece.offsets])
    size = len(inside)
    scores = first[:size, None] + last[None, :size]
    place = torch.arange(size)
    length = place[None, :] - place[:, None]
    allowed = inside[:, None] & inside[None, :] & (length >= 0) & (length < MAX_ANSWER_TOKENS)
    scores = scores.masked_fill(~allowed, float("-inf"))
    at = int(scores.argmax())
    return float(scores.view(-1)[at]), piece.text(at // size, at % size)


def _log_probabilities(logits: Tensor, labels: Tensor, shifted: bool) -> Tensor:
    """[B] the log-probability of the tokens with a label."""
    if shifted:
        logits, labels = logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]
    real = labels != IGNORED
    each = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (each * real).sum(-1)


def _batches(
    model: Any, encoding: Encoding, items: list[dict[str, Any]], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches on the model's device, each with the places of its items."""
    collator = encoding.collator()
    for rows in _of_like_length(items, batch_size):
        batch = collator([items[i] for i in rows])
        yield rows, {key: value.to(_device(model)) for key, value in batch.items()}


def _of_like_length(items: list[dict[str, Any]], batch_size: int) -> Iterator[list[int]]:
    """The places of the items of each batch, the longest first, so that little is padding."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _device(model: Any) -> torch.device:
    return next(iter(model.parameters())).device
