"""Chat templates: a model's own Jinja text, rendered as transformers renders it, inside `sandbox`'s limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.sandbox import DEEPEST, METER, Meter, MeteredEnvironment, Raised, Refused

TEMPLATE_BYTES = 64 << 10  # the longest in use (tools, reasoning) are a third of it


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` rebuilt from JSON's types, so that a template meets no other object's methods."""
    if depth > DEEPEST // 2:
        raise Refused("a message is nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_plain(item, depth + 1) for item in value]
    raise Refused("a message holds something that is not text, a number, a list or a mapping")


class ChatTemplate:
    """A compiled template.

    `where` is the file it came from, for error messages; `variables` are the special tokens' spellings, by name.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, str] | None = None) -> None:
        if len(source.encode("utf-8", "replace")) > TEMPLATE_BYTES:
            raise TokenizerError(
                f"The chat template in {where} is longer than {TEMPLATE_BYTES >> 10} KiB, which no known model's is; "
                "replace it with the one its publisher ships."
            )
        self._source, self._where, self._variables = source, where, dict(variables or {})
        try:
            self._template = MeteredEnvironment().from_string(source)
        except Exception as error:
            line = getattr(error, "lineno", None)
            raise TokenizerError(
                f"The chat template in {where} is not valid Jinja ({type(error).__name__}"
                f"{f' at line {line}' if line else ''}); replace it with the one its publisher ships."
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text. Any failure is a TokenizerError that shows nothing of the messages."""
        try:
            chat = [{key: value for key, value in _plain(message).items() if value is not None} for message in messages]
            return self._render(chat, add_generation_prompt)
        except Exception as error:
            raise TokenizerError(self._sentence(error)) from None

    def _render(self, chat: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        meter = Meter(chat)
        token = METER.set(meter)
        given = {"tools": None, "documents": None, **self._variables}
        try:
            pieces, size = [], 0
            for piece in self._template.generate(messages=chat, add_generation_prompt=add_generation_prompt, **given):
                size += meter.weigh(piece)[0]
                meter.fits(size)
                pieces.append(piece)
            return "".join(pieces)
        finally:
            METER.reset(token)

    def _sentence(self, error: Exception) -> str:
        head = f"The chat template in {self._where} could not render this conversation: "
        if isinstance(error, Refused):
            return f"{head}{error}; use a template from a publisher you trust."
        if isinstance(error, Raised):
            # A literal of the template may be shown; anything it put together may hold a message's text.
            said = " ".join(str(error).split())
            known = bool(said) and str(error) in self._source and said.isprintable() and len(said) <= 200
            reason = f"it says '{said}'" if known else "it refuses it with a message that is not shown"
            return f"{head}{reason}; check the order of the roles."
        line, frame = None, error.__traceback__
        while frame is not None:
            line = frame.tb_lineno if frame.tb_frame.f_code.co_filename == "<template>" else line
            frame = frame.tb_next
        return (
            f"{head}{type(error).__name__}{f' at line {line}' if line else ''}; check that each message has a role and "
            "a content, or use the template its publisher ships."
        )
