"""Measure the peak memory of a piece of work.

On the CPU and on Apple GPUs that is anonymous memory, the resident pages of the weight files, and what the GPU's driver
holds; on an NVIDIA card, what torch's allocator reserved there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from edgetune.runtime.memory import anonymous_memory, card_memory, device_memory, resident_pages

INTERVAL = 0.1
"""Seconds between two samples (chosen by hand)."""


class MemoryMeter:
    """Samples memory ten times a second on a thread of its own. Weight pages take longer to count: only `peak` does."""

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
        """Return the anonymous memory and the device's memory held now, in bytes, and update the peak."""
        held = anonymous_memory() + device_memory(self._device)
        self._peak_held = max(self._peak_held, held)
        return held

    @property
    def now(self) -> int:
        """Return the bytes held now, plus the weight pages as last counted."""
        return self._sample() + self._peak_pages

    def peak(self) -> int:
        """Return the peak so far, in bytes."""
        self._peak_pages = max(self._peak_pages, resident_pages(self._files))
        self._sample()
        return self._peak_held + self._peak_pages


class CardMeter:
    """Measures the memory that torch's allocator reserved on an NVIDIA card, which other programs cannot use.

    The allocator tracks its peak itself, so nothing is sampled.
    """

    def __enter__(self) -> CardMeter:
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    @property
    def now(self) -> int:
        """Return the bytes reserved now."""
        return card_memory().held

    def peak(self) -> int:
        """Return the peak so far, in bytes."""
        return int(torch.cuda.max_memory_reserved())


class Meter(Protocol):
    """The interface that both meters share."""

    @property
    def now(self) -> int: ...

    def peak(self) -> int:
        """Return the peak memory so far, in bytes."""


def meter_for(device: torch.device, weight_files: Sequence[Path]) -> MemoryMeter | CardMeter:
    """Return the meter for the memory that limits a run on this device."""
    return CardMeter() if device.type == "cuda" else MemoryMeter(weight_files, device)
