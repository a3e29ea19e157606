"""Render conversations with a model's own chat template (Jinja), as transformers does, inside the limits of `sandbox`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgetune.runtime.errors import TokenizerError
from edgetune.runtime.sandbox import MeteredEnvironment, Raised
from edgetune.runtime.template_limits import DEEPEST, METER, TEMPLATE_BYTES, TOO_DEEP, Meter, Refused

LONGEST_SHOWN = 200
"""The most characters of a template's own error message that are shown. Chosen by hand."""
_TRUSTED = "use a template from a publisher you trust"


def _plain(value: Any, depth: int = 0) -> Any:
    """Return `value` rebuilt from the types of JSON, so that a template never meets an object with methods of its own."""
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
    raise Refused("a message contains something that is not text, a number, a list or a mapping")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without its null values, and with its reasoning under both names that templates read.

    As in transformers 5: most templates read `reasoning_content`, gpt-oss's `thinking`, and data sets write either.
    """
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, where: str, variables: Mapping[str, str] | None = None) -> None:
        """Compile `source`. Raises TokenizerError if it is too long or not valid Jinja.

        `where` is the file that it came from, for error messages. `variables` are the spellings of the special tokens by
        name (bos_token, eos_token, ...), which templates use.
        """
        if len(source.encode("utf-8", "replace")) > TEMPLATE_BYTES:
            raise TokenizerError(
                f"The chat template in {where} is longer than {TEMPLATE_BYTES >> 10} KiB, the limit for a template; "
                "replace it with the one its publisher ships."
            )
        self._source, self._where, self._variables = source, where, dict(variables or {})
        try:
            self._template = MeteredEnvironment().from_string(source)
        except (Refused, RecursionError, MemoryError) as error:
            refusal = error if isinstance(error, Refused) else TOO_DEEP
            raise TokenizerError(f"The chat template in {where} is refused: {refusal}; {_TRUSTED}.") from None
        except Exception as error:
            line = getattr(error, "lineno", None)
            raise TokenizerError(
                f"The chat template in {where} is not valid Jinja ({type(error).__name__}"
                f"{f' at line {line}' if line else ''}); replace it with the one its publisher ships."
            ) from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, tools: Sequence[Any] = ()
    ) -> str:
        """Return the conversation as one text. Raises TokenizerError, which shows nothing of the messages, on any failure.

        `tools` describes the functions that the conversation may call, as JSON schemas.
        """
        try:
            chat = [_with_reasoning(_plain(message)) for message in messages]
            return self._render(chat, add_generation_prompt, _plain(tools) or None)
        except Exception as error:
            # `from None`: the text of the original error may quote a message.
            raise TokenizerError(self._explain(error)) from None

    def _render(self, chat: list[dict[str, Any]], add_generation_prompt: bool, tools: list[Any] | None) -> str:
        """Return the conversation as one text, counted by a meter of its own."""
        meter = Meter([chat, tools])
        token = METER.set(meter)
        variables = {"tools": tools, "documents": None, **self._variables}
        try:
            pieces, size = [], 0
            for piece in self._template.generate(messages=chat, add_generation_prompt=add_generation_prompt, **variables):
                size += meter.weigh(piece)[0]
                meter.fits(size)
                pieces.append(piece)
            return "".join(pieces)
        finally:
            METER.reset(token)

    def _explain(self, error: Exception) -> str:
        """Return the sentence that tells the user why rendering failed, without any text of the messages."""
        head = f"The chat template in {self._where} could not render this conversation: "
        refusals = {RecursionError: TOO_DEEP, MemoryError: "it takes too much memory"}
        if isinstance(error, Refused) or type(error) in refusals:
            return f"{head}{refusals.get(type(error), error)}; {_TRUSTED}."
        if isinstance(error, Raised):
            # A sentence that stands in the template word for word may be shown. One that the template put together may
            # quote a message.
            said = " ".join(str(error).split())
            is_literal = bool(said) and str(error) in self._source and said.isprintable() and len(said) <= LONGEST_SHOWN
            reason = f"it says '{said}'" if is_literal else "it refuses it with an error whose text is not shown"
            return f"{head}{reason}; check the order of the roles."
        # Find the line of the template, which jinja2 puts into the traceback under the file name "<template>".
        line, frame = None, error.__traceback__
        while frame is not None:
            line = frame.tb_lineno if frame.tb_frame.f_code.co_filename == "<template>" else line
            frame = frame.tb_next
        return (
            f"{head}{type(error).__name__}{f' at line {line}' if line else ''}; check that each message has a role and "
            "a content, or use the template its publisher ships."
        )
