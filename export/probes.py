"""Check that a reader's own tokenizer splits texts, begins them and renders chats as edgetune did in training.

A proof that compares logits passes token ids, so it would not notice a reader that makes other ids of the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.export.job import Job
from edgetune.runtime.errors import ModelError
from edgetune.runtime.tokenizer import Tokenizer, has_tokenizer

PROBES = (
    "The lighthouse keeper wrote it down.",
    "In 2021 we had 12,345 tomatoes; 67 in 2022!",
    "def f(x):\n    if x:\n        return [x**2, 'y']\n\treturn None  # ok\n",
    "Größe, façade, naïve, señor, łódź; Привет, мир",
    "日本語の文章 مرحبا بالعالم บ้าน",
    "emoji 😀👩‍👧🇩🇪 \u00a0\u3000\u200b.",
    "I don't, they'RE wide_words  with   many spaces ",
    "x  1\n  1. one\n  2. two\n",
    "| a | 10 |\n|---|---:|\n| b  |  2 |\n",
    "\n\n## 3\t4\r\n",
    "a</s>b<s> <unk> <|eot_id|><|im_end|>\n",
)
"""Texts that a reader must split into the same ids as edgetune. None begins with a space, because llama.cpp and sentencepiece
add another one there."""
CHAT = [{"role": "user", "content": "How many  tomatoes in 2021?"}]
"""The conversation that a reader with a chat template must turn into the same ids as edgetune."""


def refuse_misread(job: Job, reader: str, wrong: int, total: int) -> None:
    """Raise ModelError if the reader's tokenizer made other ids of `wrong` of `total` test texts, unless job.force."""
    if wrong and not job.force:
        other = "`edgetune export hf`, or " if reader == "llama.cpp" else ""
        raise ModelError(
            f"{reader} splits {wrong} of {total} test texts into other tokens than the model was trained on. Type {other}"
            f"{'add ' if other else ''}--force to write the export anyway."
        )


def check_transformers(job: Job, folder: Path, reader: str) -> None:
    """Raise ModelError if the tokenizer that transformers and mlx-lm open in `folder` reads other ids, unless job.force.

    A folder without a tokenizer is passed over, and a tokenizer.model that they cannot open because protobuf is missing.
    """
    if not has_tokenizer(folder):
        return
    from transformers import AutoTokenizer

    try:
        theirs: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except ImportError:
        return
    ours = Tokenizer.load(job.base.folder)
    results = [_as_text(theirs, text) == ours.encode(text) for text in PROBES]
    # With special tokens, as a user calls it: begun as in training.
    results.append(theirs("tomatoes")["input_ids"] == [*ours.start.chat, *ours.encode("tomatoes")])
    if ours.has_template:
        rendered = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
        results.append(list(rendered) == ours.encode_chat(CHAT))
    refuse_misread(job, reader, results.count(False), len(results))


def _as_text(tokenizer: Any, text: str) -> Sequence[int]:
    """Return the ids of a text whose control tokens stay text, without any added at its ends."""
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids
