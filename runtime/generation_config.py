"""Read the sampling settings that a model's publisher recommends, from generation_config.json, which is untrusted."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.runtime.json_file import read_object_if_there
from edgetune.runtime.untrusted_file import TOKENIZER_CONFIG

FILE = "generation_config.json"
MOST = 10.0
"""Largest temperature and repetition penalty that are taken from a file: the largest --temperature."""


@dataclass(frozen=True)
class SamplingSettings:
    """The publisher's sampling settings, None where the file has none. `notices` name the values that were ignored.

    temperature: 0 takes the likeliest token, as `do_sample: false` does. top_k: 0 keeps every token.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    notices: tuple[str, ...] = ()


def read_sampling(folder: Path) -> SamplingSettings:
    """Return the sampling settings of a model folder. Raises TokenizerError where the file is not a JSON object."""
    config = read_object_if_there(folder / FILE, TOKENIZER_CONFIG)
    notices: list[str] = []

    def number(name: str, least: float, most: float, whole: bool = False) -> Any:
        value = config.get(name)
        if value is None:
            return None
        kinds = (int,) if whole else (int, float)
        # 0 is allowed only as a whole number (top_k: all tokens) and as the temperature of greedy decoding.
        if type(value) in kinds and least <= value <= most and (value or whole or name == "temperature"):
            return value
        notices.append(
            f"The model's {FILE} gives {name} as {reprlib.repr(value)}; expected a number from {least:g} to {most:g}, so it is "
            "ignored."
        )
        return None

    greedy = config.get("do_sample") is False
    temperature = number("temperature", 0, MOST)
    return SamplingSettings(
        temperature=0.0 if greedy else temperature,
        top_p=number("top_p", 0, 1),
        top_k=number("top_k", 0, 1 << 30, whole=True),
        repetition_penalty=number("repetition_penalty", 0, MOST),
        notices=tuple(notices),
    )
