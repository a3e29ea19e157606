"""Makes canaries: invented secrets of a fixed form, which a shadow adapter learns beside the notes, some of them several times.

Each is a note of its own: "The code of <name> is <six digits>." No other note and no other canary has its name. Some are never
inserted: their exposure is what chance gives.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from edgetune.dataset.evaluation_set import EvaluationSet
from edgetune.dataset.token_store import tokenize
from edgetune.documents.document import Document
from edgetune.leaks.exposure import exposure
from edgetune.leaks.reading import read_windows
from edgetune.progress import Progress, ignore
from edgetune.runtime.runner import Runner
from edgetune.runtime.tokenizer import Tokenizer

REPETITIONS = (0, 1, 4, 16)
"""Times that a canary is inserted; of each number there are as many canaries."""
CANARIES_OF_EACH = 4
"""Canaries of each number of repetitions; chosen by hand: their median is shown."""
REFERENCES = 128
"""Random texts of a canary's form that it is compared with; chosen by hand. What is likelier than all of them is estimated."""
DIGITS = 6
"""Digits of a code."""
CODES = 10**DIGITS
"""Number of all codes: log2 of it, 19.9 bits, is the largest exposure."""
_SYLLABLES = ("ba", "dro", "fen", "gu", "hal", "jo", "kir", "lum", "mo", "nep", "os", "pra", "quil", "ra", "sto", "tev")
"""Syllables of the invented names; chosen by hand."""


@dataclass(frozen=True)
class Canary:
    """An invented secret, and the times that it is inserted into the notes."""

    name: str
    code: int
    repetitions: int

    def text(self, code: int | None = None) -> str:
        """Return the canary's text, or the same with another code."""
        return f"The code of {self.name} is {self.code if code is None else code:0{DIGITS}d}."


@dataclass(frozen=True)
class Exposed:
    """The exposure of the canaries that were inserted so many times: the median of them, in bits, and the canaries."""

    repetitions: int
    bits: float
    canaries: int


def make_canaries(seed: int, of_each: int = CANARIES_OF_EACH) -> list[Canary]:
    """Return canaries that depend on the seed alone: `of_each` for each of REPETITIONS, each with a name of its own."""
    generator, names = random.Random(seed), dict[str, None]()
    while len(names) < of_each * len(REPETITIONS):
        first, last = ("".join(generator.sample(_SYLLABLES, 2)).capitalize() for _ in range(2))
        names[f"{first} {last}"] = None
    return [Canary(name, generator.randrange(CODES), REPETITIONS[number // of_each]) for number, name in enumerate(names)]


def inserted(canaries: Sequence[Canary]) -> list[Document]:
    """Return the documents to train on beside the notes: each canary as often as it is inserted."""
    return [
        Document.of(f"canary#{number + 1}.{time + 1}", canary.text())
        for number, canary in enumerate(canaries)
        for time in range(canary.repetitions)
    ]


def exposures(
    runner: Runner,
    tokenizer: Tokenizer,
    canaries: Sequence[Canary],
    folder: Path,
    row_tokens: int,
    seed: int,
    progress: Progress = ignore,
    references: int = REFERENCES,
) -> list[Exposed]:
    """Return the exposure of the canaries to the model as it is, by their repetitions.

    folder: a new private folder for their tokens. Each canary is compared with `references` random codes of the same name.
    """
    generator = random.Random(seed + 1)
    documents = [
        Document.of(f"{number}#{place}", canary.text(None if place == 0 else generator.randrange(CODES)))
        for number, canary in enumerate(canaries)
        for place in range(references + 1)
    ]
    store = tokenize(documents, tokenizer, folder)
    losses = [0.0] * len(documents)
    for read in read_windows(runner, EvaluationSet.of(store, row_tokens), row_tokens, progress):
        losses[read.document] += read.nats
    by_repetition: dict[int, list[float]] = {}
    for number, canary in enumerate(canaries):
        first = number * (references + 1)
        own, others = losses[first], losses[first + 1 : first + 1 + references]
        by_repetition.setdefault(canary.repetitions, []).append(exposure(own, others, CODES))
    return [Exposed(times, median(bits), len(bits)) for times, bits in sorted(by_repetition.items())]
