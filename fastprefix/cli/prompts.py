"""Prompts of the command line as token ids: turns of a chat where there is a template, or text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import CHAT_TEMPLATE_FILE

from fastprefix.files import written_whole
from fastprefix.formats.peft_files import find
from fastprefix.tasks.encode import encode_start, prompt_template


def save_template(tokenizer: Tokenizer, adapter: Path) -> None:
    """Stores beside an adapter the chat template that its training prompts used."""
    with written_whole(adapter / CHAT_TEMPLATE_FILE) as partial:
        partial.write_text(prompt_template(tokenizer), encoding="utf-8")


def template_of(adapter: str | None, tokenizer: Tokenizer) -> str | None:
    """The chat template for the prompts; None if there is none.

    Args:
        adapter: a folder or hub repository, which may hold what :func:`save_template` kept; its
            prompts are never those of the model's own chats. None for a model without.
        tokenizer: the model's.
    """
    if adapter is None:
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    try:
        return find(adapter, CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, EntryNotFoundError):
        return None


def encode(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    template: str | None,
    system_prompt: str | None = None,
) -> list[list[int]]:
    """The token ids that the model continues, for each prompt.

    Args:
        prompts: a user's turn each, or texts.
        tokenizer: the model's.
        template: a chat template; None takes prompts as they are.
        system_prompt: the first turn, of a chat.

    Raises:
        ValueError: the template refuses a turn, a system prompt say.
    """
    if template is None:
        return [encode_start(prompt, tokenizer) for prompt in prompts]
    first = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    chats: Any = [[*first, {"role": "user", "content": prompt}] for prompt in prompts]
    try:
        rows: Any = tokenizer.apply_chat_template(
            chats, chat_template=template, add_generation_prompt=True, return_dict=False
        )
        return rows
    except TemplateError as error:
        what = "--system-prompt" if first else "prompt"
        raise ValueError(
            f"{what}: the chat template refuses it ({error}); --raw does without"
        ) from error


def shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows start with in common; each row keeps at least one token."""
    count = 0
    for tokens in zip(*(row[:-1] for row in rows), strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count
