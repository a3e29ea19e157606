"""The highest memory a piece of work held: anonymous memory, the resident pages of its weight files, and what an Apple GPU's
driver holds."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from edgetune.runtime.memory import anonymous_memory, card_memory, device_memory, resident_pages

INTERVAL = 0.1


class MemoryMeter:
    """Samples memory ten times a second on a thread of its own; weight pages are counted on `peak`."""

    def __init__(self, weight_files: Sequence[Path] = (), device: torch.device | None = None) -> None:
        self._files, self._device = tuple(weight_files), device or torch.device("cpu")
        self._peak_held = self._peak_pages = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory meter", daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self._sample()
            if self._stop.wait(INTERVAL):
                return

    def _sample(self) -> int:
        """Anonymous memory and the device's, now."""
        held = anonymous_memory() + device_memory(self._device)
        self._peak_held = max(self._peak_held, held)
        return held

    @property
    def now(self) -> int:
        """What is held now, plus the weight pages last counted."""
        return self._sample() + self._peak_pages

    def peak(self) -> int:
        """The highest so far."""
        self._peak_pages = max(self._peak_pages, resident_pages(self._files))
        self._sample()
        return self._peak_held + self._peak_pages


class CardMeter:
    """The same of a card: what torch's allocator took of its memory, which is what other programs cannot have.

    The allocator keeps the highest itself; nothing is sampled.
    """

    def __enter__(self) -> CardMeter:
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    @property
    def now(self) -> int:
        """What is held now."""
        return card_memory().held

    def peak(self) -> int:
        """The highest so far."""
        return int(torch.cuda.max_memory_reserved())


class Meter(Protocol):
    """What measures a run: of either kind."""

    @property
    def now(self) -> int: ...

    def peak(self) -> int: ...


def meter_for(device: torch.device, weight_files: Sequence[Path]) -> MemoryMeter | CardMeter:
    """The meter of the memory that a run on this device is planned in."""
    return CardMeter() if device.type == "cuda" else MemoryMeter(weight_files, device)
