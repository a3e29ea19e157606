"""Chooses what the model continues before and after training: the beginnings of notes, and the first questions of chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgetune.dataset.token_store import join_system
from edgetune.documents.document import Document, Turn
from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.tokenizer import Tokenizer

Prompt = str | list[dict[str, Any]]
"""A text to continue, or the messages of a chat to answer."""

SAMPLES = 3
"""Documents that the model continues; chosen by hand."""
_SEARCH_CHARS, _WORDS_CHARS = 4000, 60
"""Characters of a note that are searched for its first paragraph, and most characters of its first words; chosen by hand."""
_QUESTION_CHARS = 1000
"""Most characters of a chat's question that is asked again; chosen by hand."""


def sample_prompts(documents: Sequence[Document], tokenizer: Tokenizer, template: bool) -> tuple[Prompt, ...]:
    """Return the prompts of the first documents that have one. `template`: chats are trained in the model's chat template."""
    prompts: list[Prompt] = []
    for document in documents:
        prompt = (
            first_words(next(document.blocks(), ""))
            if document.turns is None
            else first_question(document.turns, tokenizer, template)
        )
        if prompt is not None:
            prompts.append(prompt)
        if len(prompts) == SAMPLES:
            break
    return tuple(prompts)


def first_words(text: str) -> str:
    """Return the first words of a note's first paragraph, without heading and tags: a prompt that invites the note's voice."""
    lines = (line.strip() for line in text[:_SEARCH_CHARS].splitlines())
    body = next((line for line in lines if line and not line.startswith(("#", "Tags:"))), text[:_WORDS_CHARS])
    return body if len(body) <= _WORDS_CHARS else body[:_WORDS_CHARS].rsplit(" ", 1)[0]


def first_question(turns: Sequence[Turn], tokenizer: Tokenizer, template: bool) -> Prompt | None:
    """Return a chat up to its first answer, as it was trained; None if that is long, or if the template refuses it."""
    answer = next((number for number, turn in enumerate(turns) if turn.role == "assistant"), 0)
    question = list(turns[:answer])
    if not question or sum(len(turn.text) for turn in question) > _QUESTION_CHARS:
        return None
    if not template:
        return " ".join(["### Human: " * (turn.role == "user") + turn.text for turn in question] + ["### Assistant:"])
    for asked in (question, join_system(question)):
        messages = [turn.message() for turn in asked]
        try:
            tokenizer.render_chat(messages)
        except TokenizerError:
            continue
        return messages
    return None


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a prompt, as they begin a document in training."""
    if isinstance(prompt, str):
        return tokenizer.start.before_text(tokenizer.encode(prompt))
    return tokenizer.start.before_chat(tokenizer.encode_chat(prompt, add_generation_prompt=True))


def prompt_text(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """Return a prompt as the report shows it."""
    return prompt if isinstance(prompt, str) else tokenizer.render_chat(prompt)
