"""Examples as token ids, for each kind of model, and the collators that make batches of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from fastprefix.arguments import (
    check_flag,
    check_whole,
    methods_refuse_unknown_arguments,
    refuses_unknown_arguments,
)
from fastprefix.tasks.encode import IGNORED, Collator, encode_start, encode_starts
from fastprefix.tasks.registry import get_task
from fastprefix.tasks.task import (
    AnsweredQuestion,
    Classification,
    Example,
    Extraction,
    Generation,
    LabelledText,
    Task,
    WrittenText,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# PEFT's names of what a model does.
TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "QUESTION_ANS"]
LANGUAGE_MODELS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_AT_ONCE = 256  # examples that are tokenised together


@refuses_unknown_arguments
def task_types(task: str | Task) -> tuple[str, ...]:
    """The kinds of model that a task, or the task of that name, can be trained with."""
    task = get_task(task)
    if isinstance(task, Extraction):
        return ("QUESTION_ANS",)
    return (*LANGUAGE_MODELS, "SEQ_CLS") if isinstance(task, Classification) else LANGUAGE_MODELS


@methods_refuse_unknown_arguments
@dataclass(frozen=True)
class Encoding:
    """How the examples of a task become token ids for a model.

    Attributes:
        task: whose examples they are. A name of the registry becomes its task.
        tokenizer: of the model. For QUESTION_ANS a fast one, which tells where a token lies in its
            text.
        task_type: "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS" or "QUESTION_ANS", as in PEFT.
        max_length: tokens of an example, target and special tokens included. A source that is
            longer loses its end; the question behind it stays. A passage of QUESTION_ANS is cut
            into pieces that overlap, so that nothing is lost.
        max_target_length: tokens of a target for language models; in training more are cut off,
            and in generation no more are written. If None, the task's ``max_new_tokens``, or the
            longest word of a classification.
        stride: tokens by which two pieces of a passage overlap.

    Raises:
        ValueError: the task cannot be trained with such a model, or a number does not fit.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    task_type: TaskType
    max_length: int = 256
    max_target_length: int | None = None
    stride: int = 64

    def __post_init__(self) -> None:
        """Checks the fields."""
        object.__setattr__(self, "task", get_task(self.task))
        if self.task_type not in get_args(TaskType):
            raise ValueError(
                f"task_type: got {self.task_type!r}, takes one of {list(get_args(TaskType))}"
            )
        if self.task_type not in task_types(self.task):
            raise ValueError(
                f"task_type: got {self.task_type}, {self.task.name} takes one of "
                f"{list(task_types(self.task))}"
            )
        check_whole("max_length", self.max_length, 8)
        check_whole("max_target_length", self.max_target_length, 1, none=True)
        check_whole("stride", self.stride, 0)
        if self.task_type == "QUESTION_ANS":
            if not self.tokenizer.is_fast:
                raise ValueError("tokenizer: got a slow one, QUESTION_ANS takes a fast one")
            if self.stride >= self.max_length // 2:
                raise ValueError(
                    f"stride: got {self.stride}, takes less than half of max_length = "
                    f"{self.max_length}"
                )
        if self.task_type == "CAUSAL_LM" and self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: it has no end-of-sequence token, which ends each target")
        if isinstance(self.task, Classification) and self.task_type in LANGUAGE_MODELS:
            words = self._words()
            if len({tuple(ids) for ids in self.targets(words)}) < len(words):
                raise ValueError(
                    f"max_target_length: got {self.max_target_length}, which cuts the words of two "
                    f"classes to the same tokens"
                )

    def items(self, examples: Iterable[Example]) -> Iterator[dict[str, Any]]:
        """Items with ``input_ids``, ``attention_mask`` and what the model learns from.

        That is ``labels`` for all but QUESTION_ANS, which has ``start_positions`` and
        ``end_positions``. A long passage of QUESTION_ANS makes several items. The labels of a
        language model are those of the target; those of what it reads are -100.
        """
        rest = iter(examples)
        while some := list(islice(rest, _AT_ONCE)):
            if self.task_type == "QUESTION_ANS":
                for example in cast(list[AnsweredQuestion], some):
                    yield from (piece.training_item() for piece in self.pieces(example))
            elif self.task_type == "SEQ_CLS":
                yield from self._labelled(cast(list[LabelledText], some))
            else:
                yield from self._written(some)

    def prompts(self, examples: Sequence[Example]) -> list[dict[str, list[int]]]:
        """``input_ids`` and ``attention_mask`` from which a language model writes each target."""
        if not examples:
            return []
        read = [self._source_and_question(example) for example in examples]
        texts = [source + question for source, question in read]
        if self.task_type == "CAUSAL_LM":
            room = self.max_length - self.target_room
            rows = encode_starts(texts, self.tokenizer)
            cut = self._start
        else:
            room = self.max_length
            rows = [list(ids) for ids in self.tokenizer(texts)["input_ids"]]
            cut = self._whole
        for i, (source, question) in enumerate(read):
            if len(rows[i]) > room:
                rows[i] = cut(source, question, room)
        return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]

    def prompt(self, example: Example) -> dict[str, list[int]]:
        """What :meth:`prompts` returns for one example."""
        return self.prompts([example])[0]

    def targets(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of targets, with the token that ends each; cut off where they are too long."""
        if self.task_type == "CAUSAL_LM":
            end = [cast(int, self.tokenizer.eos_token_id)]
            rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        else:
            end = []
            rows = self.tokenizer(text_target=list(texts))["input_ids"]
        return [[*ids, *end][: self.target_room] for ids in rows]

    def target(self, text: str) -> list[int]:
        """What :meth:`targets` returns for one text."""
        return self.targets([text])[0]

    def collator(self, packing: bool = False) -> Callable[[list[dict[str, Any]]], Any]:
        """Makes batches of :meth:`items`, padded to the longest.

        Args:
            packing: whether the items of a batch go end to end into one row without padding.
                ``position_ids`` begin anew in each, by which models keep them apart: every item
                sees itself and the prefix. A model must get neither a mask nor a cache (a Trainer
                gives none). Only for CAUSAL_LM, and not for prompts of ``PromptTuningModel``.

        Raises:
            ValueError: packing with another kind of model.
        """
        from transformers import (
            DataCollatorForSeq2Seq,
            DataCollatorWithFlattening,
            DataCollatorWithPadding,
        )

        check_flag("packing", packing)
        if packing and self.task_type != "CAUSAL_LM":
            raise ValueError(f"packing: got True for {self.task_type}, takes it for CAUSAL_LM only")
        if packing:
            return DataCollatorWithFlattening()
        if self.task_type == "CAUSAL_LM":
            return Collator(self.tokenizer)
        if self.task_type == "SEQ_2_SEQ_LM":
            return DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        return DataCollatorWithPadding(self.tokenizer)

    def pieces(self, example: AnsweredQuestion) -> Iterator[Piece]:
        """A question with each piece of its passage.

        Raises:
            ValueError: the question leaves too few tokens for a passage.
        """
        question = self.tokenizer(example.question, add_special_tokens=False)["input_ids"]
        room = self.max_length - len(question) - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room <= self.stride:
            raise ValueError(
                f"max_length: got {self.max_length}, which beside the {len(question)} tokens of "
                f"question {example.id} leaves {room} for its passage; takes more, or a smaller "
                f"stride than {self.stride}"
            )
        encoded = self.tokenizer(
            example.question,
            example.context,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for i, offsets in enumerate(encoded["offset_mapping"]):
            inputs = {
                key: encoded[key][i] for key in self.tokenizer.model_input_names if key in encoded
            }
            places = encoded.sequence_ids(i)
            yield Piece(
                example,
                inputs,
                tuple(
                    span if place == 1 else None
                    for span, place in zip(offsets, places, strict=True)
                ),
                inputs["input_ids"].index(self._no_answer),
            )

    @property
    def _no_answer(self) -> int:
        """The token that stands for "the answer is not in this piece"."""
        token = self.tokenizer.cls_token_id
        if token is None:
            token = self.tokenizer.bos_token_id
        if token is None:
            raise ValueError(
                "tokenizer: it has no token that begins a text, QUESTION_ANS takes one"
            )
        return token

    @functools.cached_property
    def target_room(self) -> int:
        """The tokens that are kept free for a target, in training and in generation alike."""
        if self.max_target_length is not None:
            return self.max_target_length
        if isinstance(self.task, Generation):
            return self.task.max_new_tokens
        ids = self.tokenizer(self._words(), add_special_tokens=True)["input_ids"]
        return max(map(len, ids)) + 1

    def _words(self) -> list[str]:
        """What a language model writes for each class."""
        task = cast(Classification, self.task)
        return [task.answer(label) for label in range(len(task.labels))]

    def _source_and_question(self, example: Example) -> tuple[str, str]:
        if isinstance(example, LabelledText):
            return example.text, cast(Classification, self.task).asked(example)
        written = cast(WrittenText, example)
        return written.source, cast(Generation, self.task).question

    def _target_text(self, example: Example) -> str:
        if isinstance(example, LabelledText):
            return cast(Classification, self.task).answer(example.label)
        return cast(WrittenText, example).targets[0]

    def _labelled(self, examples: list[LabelledText]) -> Iterator[dict[str, Any]]:
        texts = [[example.text for example in examples]]
        if cast(Classification, self.task).second is not None:
            texts.append([cast(str, example.second) for example in examples])
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        for i, example in enumerate(examples):
            yield {key: rows[i] for key, rows in encoded.items()} | {"labels": example.label}

    def _written(self, examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
        """Items of language models."""
        prompts = self.prompts(examples)
        targets = self.targets([self._target_text(example) for example in examples])
        for prompt, target in zip(prompts, targets, strict=True):
            if self.task_type == "SEQ_2_SEQ_LM":
                yield {**prompt, "labels": target}
                continue
            read = prompt["input_ids"]
            yield {
                "input_ids": read + target,
                "attention_mask": [1] * (len(read) + len(target)),
                "labels": [IGNORED] * len(read) + target,
            }

    def _start(self, source: str, question: str, room: int) -> list[int]:
        """The ids of source and question, of the source only the start."""
        tail = list(self.tokenizer(question, add_special_tokens=False)["input_ids"])
        head = encode_start(source, self.tokenizer)[: self._left(room, len(tail))]
        return head + tail

    def _whole(self, source: str, question: str, room: int) -> list[int]:
        """The same with the tokens that begin and end a text of an encoder-decoder."""
        tail = list(self.tokenizer(question)["input_ids"])
        before = 0
        while before < len(tail) and tail[before] in self.tokenizer.all_special_ids:
            before += 1
        tail = tail[before:]
        head = list(self.tokenizer(source)["input_ids"])
        return head[: self._left(room, len(tail))] + tail

    def _left(self, room: int, tail: int) -> int:
        if tail >= room:
            raise ValueError(
                f"max_length: got {self.max_length}, which leaves {room} tokens to read, but the "
                f"question alone has {tail}"
            )
        return room - tail


@dataclass(frozen=True)
class Piece:
    """A question with a piece of its passage.

    Attributes:
        example: whose passage it is.
        inputs: of the model.
        offsets: for each token its place in the passage (start, end), None if it is not of it.
        no_answer: the index of the token that stands for "the answer is not in this piece".
    """

    example: AnsweredQuestion
    inputs: dict[str, list[int]]
    offsets: tuple[tuple[int, int] | None, ...]
    no_answer: int

    def training_item(self) -> dict[str, Any]:
        """The inputs with ``start_positions`` and ``end_positions``.

        Both are :attr:`no_answer` if the piece does not hold the whole answer.
        """
        first = last = self.no_answer
        begin = self.example.starts[0]
        end = begin + len(self.example.answers[0])
        found = [i for i, at in enumerate(self.offsets) if at and at[0] < end and at[1] > begin]
        if found and self._at(found[0])[0] <= begin and self._at(found[-1])[1] >= end:
            first, last = found[0], found[-1]
        return {**self.inputs, "start_positions": first, "end_positions": last}

    def text(self, first: int, last: int) -> str:
        """The part of the passage from one token to another, both included."""
        return self.example.context[self._at(first)[0] : self._at(last)[1]]

    def _at(self, token: int) -> tuple[int, int]:
        place = self.offsets[token]
        assert place is not None
        return place
