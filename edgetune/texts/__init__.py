"""Hold the built-in texts: one to calibrate a quantisation on, another to measure what it costs, and questions that a base
answers before it is trained. All were written for edgetune, and no sentence is in two of them.

The texts are what people keep in notes and ask of a model: stories, letters, lists, questions and answers, code.
"""

from __future__ import annotations

from pathlib import Path

_SEPARATOR = "\n====\n"
"""The line between two documents of a file."""


def calibration_text() -> list[str]:
    """Return the documents to calibrate on."""
    return _documents("calibration.txt")


def measuring_text() -> list[str]:
    """Return the documents to measure bits per byte on."""
    return _documents("measuring.txt")


def anchor_questions() -> list[str]:
    """Return the questions whose answers by the untrained base keep its chat as it is (training/anchor.py)."""
    return (Path(__file__).parent / "anchor_questions.txt").read_text(encoding="utf-8").splitlines()


def _documents(file: str) -> list[str]:
    return (Path(__file__).parent / file).read_text(encoding="utf-8").split(_SEPARATOR)
