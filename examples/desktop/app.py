"""Show a chat window for a model and adapter on this computer: python examples/desktop/app.py [MODEL [ADAPTER]]."""

from __future__ import annotations

import sys
import tkinter as tk
from tkinter import scrolledtext

from conversation import Conversation

from edgetune import EdgetuneError, Session

EVERY_MS = 40
"""Milliseconds between two looks for new text. Chosen by hand: 25 times a second."""


class Window:
    """The window: shows a conversation and passes on what the user does."""

    def __init__(self, root: tk.Tk, conversation: Conversation, title: str) -> None:
        root.title(title)
        self.root, self.conversation = root, conversation
        self.history = scrolledtext.ScrolledText(root, wrap="word", state="disabled", width=80, height=24)
        self.history.pack(fill="both", expand=True)
        self.entry = tk.Entry(root)
        self.entry.pack(side="left", fill="x", expand=True)
        self.entry.bind("<Return>", lambda event: self.ask())
        tk.Button(root, text="Ask", command=self.ask).pack(side="left")
        tk.Button(root, text="Stop", command=conversation.stop).pack(side="left")
        self.entry.focus()
        self.listen()

    def ask(self) -> None:
        """Send the question in the entry field."""
        question = self.entry.get()
        if self.conversation.ask(question):
            self.entry.delete(0, "end")
            self.show(f"\n> {question.strip()}\n")

    def listen(self) -> None:
        """Show what has arrived, and look again after EVERY_MS."""
        for news in self.conversation.news():
            self.show({"piece": news.text, "end": "\n", "failure": f"\n{news.text}\n"}[news.kind])
        self.root.after(EVERY_MS, self.listen)

    def show(self, text: str) -> None:
        """Append text to the history."""
        self.history.configure(state="normal")
        self.history.insert("end", text)
        self.history.configure(state="disabled")
        self.history.see("end")


def main() -> None:
    """Open the model (without MODEL: the best one here, with the current adapter) and its window."""
    model, adapter, *_ = [*sys.argv[1:], None, None]
    try:
        session = Session.load(model, adapter)
    except EdgetuneError as error:
        sys.exit(str(error))
    conversation = Conversation(session)
    root = tk.Tk()
    Window(root, conversation, f"{session.model_name}, adapter {session.adapter_name}")
    root.mainloop()
    conversation.close()


if __name__ == "__main__":
    main()
