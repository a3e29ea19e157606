"""A conversation with a Session: its history, and one question answered with and without the adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

from edgetune.runtime.errors import TokenizerError
from edgetune.session import Session


class Chat:
    """The turns of one conversation with a Session."""

    def __init__(self, session: Session, max_tokens: int, temperature: float | None = None, seed: int | None = None) -> None:
        self.session, self.max_tokens, self.temperature, self.seed = session, max_tokens, temperature, seed
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> Generator[str, None, None]:
        """Add the user's turn, and yield the answer in pieces.

        The answer joins the history when it is complete, or as far as it was read if the caller closes this generator
        early. If answering fails, the question is removed again. Turns that no longer fit the model's context are dropped
        from the front, in pairs.
        """
        self.messages.append({"role": "user", "content": text})
        answer = []
        try:
            self._make_room()
            for piece in self._answer():
                answer.append(piece)
                yield piece
        except GeneratorExit:
            pass
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": self._content_of("".join(answer))})

    def compare(self, text: str) -> tuple[str, str]:
        """Return the answers of the bare base and of the adapter to the same next turn. The history does not change."""
        self.messages.append({"role": "user", "content": text})
        try:
            self._make_room()
            self.session.use_adapter(False)
            base = "".join(self._answer())
            self.session.use_adapter(True)
            return base, "".join(self._answer())
        finally:
            self.session.use_adapter(True)
            self.messages.pop()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def _content_of(self, answer: str) -> str:
        """Return the message whose rendering gives `answer` again: without the space that a template may write before it."""
        render = self.session.tokenizer.render_chat
        for content in (answer, answer.removeprefix(" "), answer.strip()):
            with contextlib.suppress(TokenizerError):
                whole = render([*self.messages, {"role": "assistant", "content": content}], add_generation_prompt=False)
                if whole.startswith(render(self.messages) + answer):
                    return content
        return answer

    def _answer(self) -> Iterator[str]:
        return self.session.chat(self.messages, self.max_tokens, self.temperature, self.seed)

    def _make_room(self) -> None:
        """Drop the oldest turns until the conversation and an answer of `max_tokens` fit the model's context."""
        limit = self.session.model.config.max_positions - self.max_tokens
        while len(self.messages) > 1 and len(self.session.tokenizer.chat_ids(self.messages)) > limit:
            del self.messages[:2]
