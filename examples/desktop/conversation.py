"""Hold a chat without a window: questions go in, and parts of the answers come out of a queue that a window reads."""

from __future__ import annotations

import contextlib
import queue
import threading
from dataclasses import dataclass

from edgetune import EdgetuneError, Session
from edgetune.chat import Chat


@dataclass(frozen=True)
class News:
    """An item of the queue. `kind` is "piece" (part of the answer), "end", or "failure" (a sentence to show)."""

    kind: str
    text: str = ""


class Conversation:
    """One chat with a Session. Answers are generated on a thread of their own, so that the window stays responsive."""

    def __init__(self, session: Session, max_tokens: int = 256, temperature: float = 0.7, seed: int | None = None) -> None:
        self._chat = Chat(session, max_tokens, temperature, seed)
        self._news: queue.Queue[News] = queue.Queue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Return True while an answer is being generated."""
        return self._thread is not None and self._thread.is_alive()

    def ask(self, question: str) -> bool:
        """Start an answer; return False if another one is still being generated or the question is empty."""
        if self.busy or not question.strip():
            return False
        self._stop.clear()
        self._thread = threading.Thread(target=self._answer, args=(question.strip(),), daemon=True)
        self._thread.start()
        return True

    def news(self) -> list[News]:
        """Return the items that arrived since the last call."""
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        return found

    def stop(self) -> None:
        """End the answer where it is; the part so far stays in the conversation."""
        self._stop.set()

    def close(self) -> None:
        """Stop and wait for the thread, because a process that exits while a thread computes may crash."""
        self.stop()
        self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the answer is complete, or for at most `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _answer(self, question: str) -> None:
        try:
            with contextlib.closing(self._chat.say(question)) as pieces:
                for piece in pieces:
                    self._news.put(News("piece", piece))
                    if self._stop.is_set():
                        break
            self._news.put(News("end"))
        except EdgetuneError as error:
            self._news.put(News("failure", str(error)))
