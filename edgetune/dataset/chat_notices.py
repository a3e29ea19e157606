"""Counts what becomes of chats that the model's chat template cannot take as they are, in sentences for the user."""

from __future__ import annotations

_PATHS_SHOWN = 5
"""Most chats that a sentence names. Chosen by hand."""
LEFT_OUT = "Left out"
SYSTEM_JOINED = "Joined the system's turn to the user's in"
REASONING_LOST = "Left out the reasoning in"
ANSWERS_LOST = "Left out some answers of"


class ChatNotices:
    """The chats that were changed or left out, by what was done and why. Holds paths only, no text of a chat."""

    def __init__(self) -> None:
        self._paths: dict[tuple[str, str], dict[str, None]] = {}

    def add(self, done: str, why: str, path: str) -> None:
        """Note that `done` (LEFT_OUT, ...) was done to the chat `path`, because of `why`."""
        self._paths.setdefault((done, why), {})[path] = None

    def sentences(self) -> tuple[str, ...]:
        """Return one sentence for each cause, the most frequent first."""
        ordered = sorted(self._paths.items(), key=lambda item: -len(item[1]))
        return tuple(self._sentence(done, why, list(paths)) for (done, why), paths in ordered)

    @staticmethod
    def _sentence(done: str, why: str, paths: list[str]) -> str:
        more = f" and {len(paths) - _PATHS_SHOWN:,} more" if len(paths) > _PATHS_SHOWN else ""
        named = ", ".join(paths[:_PATHS_SHOWN]) + more
        return f"{done} {len(paths):,} chat{'s' if len(paths) > 1 else ''} ({named}), because {why}."
