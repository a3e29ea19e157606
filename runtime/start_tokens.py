"""Decide which ids a text begins with: the one rule for training, prompts, chats, held-out texts and exports.

A tokenizer puts its beginning-of-text token (bos) before a text if `add_bos_token` in tokenizer_config.json says so. Where that
key is missing, tokenizer.json's post-processor decides, or LLaMA's own rule (bos) for a tokenizer.model and a tokenizer.json
that transformers rebuilds as LLaMA's. Where the two files contradict each other, `add_bos_token` wins, as in llama.cpp's
converter and in transformers 4. Exports write both files, so that every reader agrees.

A tokenizer that adds no bos may still name one. In SmolLM2 it is `<|im_start|>`, which begins a turn and never a text. What
stood between texts in the training of such models is the end-of-text token, so a note begins with that. SmolLM2-135M-Instruct
needs 1.0763 bits per byte for notes after `<|endoftext|>`, 1.0833 after nothing and 1.0882 after `<|im_start|>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens that stand between texts in the training of base models, by their spelling."""


@dataclass(frozen=True)
class StartTokens:
    """The ids that texts begin with, each tuple holding at most one.

    text: before a note or a prompt. chat: before a rendered chat that does not begin with it already. Both are bos if the
    tokenizer adds bos to every text; otherwise `text` is the end-of-text token and `chat` is empty.
    """

    text: tuple[int, ...] = ()
    chat: tuple[int, ...] = ()

    @property
    def adds_bos(self) -> bool:
        """Return True if the tokenizer adds bos to every text, chats included."""
        return bool(self.chat)

    def before_text(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of a note or a prompt, after its start id."""
        return [*self.text, *ids]

    def before_chat(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of a rendered chat, after its start id unless the template wrote that itself."""
        return [*ids] if tuple(ids[: len(self.chat)]) == self.chat else [*self.chat, *ids]


def start_tokens(
    config: dict[str, Any], bos: int | None, leading: Sequence[int], llama: bool, text_ends: Sequence[int]
) -> StartTokens:
    """Return what texts begin with.

    config: tokenizer_config.json. leading: the ids that tokenizer.json's post-processor puts before a text. llama: LLaMA's own
    rule holds where no file says more. text_ends: ids that may stand between texts, the best first.
    """
    setting = config.get("add_bos_token")
    adds = setting if isinstance(setting, bool) else llama or bos in leading
    if adds and bos is not None:
        return StartTokens((bos,), (bos,))
    return StartTokens(tuple(text_ends[:1]))
