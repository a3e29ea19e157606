"""Tokenizes the notes to train on and the held-out ones, each into a token store of the run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.config import TrainConfig
from edgetune.dataset.chat_notices import ChatNotices
from edgetune.dataset.chat_writer import ChatFormat, TrainOn
from edgetune.dataset.token_store import TokenStore, tokenize
from edgetune.documents.document import Document
from edgetune.documents.heldout import HeldOutSplit, split_held_out
from edgetune.progress import Progress, ignore
from edgetune.runtime.tokenizer import Tokenizer
from edgetune.training.plan import HELD_OUT, TOKENS


@dataclass(frozen=True)
class TokenizedNotes:
    """Both sides of a split as token stores."""

    split: HeldOutSplit
    train: TokenStore
    held_out: TokenStore | None
    """The held-out side; None if nothing can be measured."""
    notices: tuple[str, ...]
    """Sentences for the user about chats that could not be used."""


def write_tokens(
    config: TrainConfig,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    path: Path,
    may_be_empty: bool = False,
    progress: Progress = ignore,
    notices: ChatNotices | None = None,
) -> TokenStore:
    """Write documents to the folder `path` as tokens, chats in the form that the recipe asks for (see `tokenize`)."""
    raw = config.data.recipe == "raw"  # whole conversations in Guanaco's form, as in the QLoRA paper
    train_on: TrainOn = "all" if raw else "assistant"
    chat_format: ChatFormat = "guanaco" if raw else "auto"
    return tokenize(documents, tokenizer, path, train_on, chat_format, may_be_empty, progress, notices)


def tokenize_notes(
    config: TrainConfig, split: HeldOutSplit, tokenizer: Tokenizer, folder: Path, progress: Progress = ignore
) -> TokenizedNotes:
    """Write both sides of the split to `folder` as token stores.

    Where the held-out side has nothing to score (chats that the model's template refuses, for example), it is chosen again
    from the documents that have.
    """
    notices = ChatNotices()

    def write(documents: list[Document], name: str) -> TokenStore:
        return write_tokens(config, documents, tokenizer, folder / name, name == HELD_OUT, progress, notices)

    store, held_out, unscored = write(split.train, TOKENS), None, len(split.held_out)
    if split.held_out:
        held_out = write(split.held_out, HELD_OUT)
    if held_out is not None and not held_out.bytes:
        held_out = None
        shutil.rmtree(folder / HELD_OUT)
        scored = {document.digest for document in store.documents if document.bytes}
        split = split_held_out(document for document in split.train if document.digest in scored)
        if split.held_out:
            store, held_out = write(split.train, TOKENS), write(split.held_out, HELD_OUT)
    said = notices.sentences()
    if unscored and held_out is None:
        said += (
            f"None of the {unscored} held-out documents holds an answer to score, so nothing is measured during this run.",
        )
    return TokenizedNotes(split, store, held_out, said)
