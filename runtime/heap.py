"""Return freed memory to the system, and set up the C heap so that it does not fragment."""

from __future__ import annotations

import ctypes
import sys

import torch


def trim_memory() -> None:
    """Give freed heap pages back to the system (glibc alone keeps them)."""
    if sys.platform == "linux":
        with_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if with_trim is not None:
            with_trim(0)


def trim_device(device: torch.device) -> None:
    """Give memory that torch keeps for later tensors back to the system, where a device shares it with everyone: on MPS."""
    if device.type == "mps":
        torch.mps.synchronize()  # what is queued may still need it
        torch.mps.empty_cache()


def steady_heap() -> None:
    """From now on keep the heap whole, so that the same step takes the same memory again and again; glibc alone needs it.

    New threads share one heap. And the slivers that glibc cuts from both ends of an aligned tensor join it again when it is
    freed: set aside for small requests, as they would be, they leave a hole too short for a tensor of the same size.
    """
    set_aside, most_heaps = 1, -8  # M_MXFAST, M_ARENA_MAX
    if can_compact_heap():
        ctypes.CDLL(None).mallopt(set_aside, 0)
        ctypes.CDLL(None).mallopt(most_heaps, 1)


def can_compact_heap() -> bool:
    """Whether `compact_heap` does anything here."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def compact_heap() -> None:
    """From now on give tensors of a mebibyte and more pages of their own, which go back when they are freed.

    Their memory is then never lost to holes in the heap; but new pages take time. glibc alone has the switch.
    """
    map_threshold = -3  # M_MMAP_THRESHOLD
    if can_compact_heap():
        ctypes.CDLL(None).mallopt(map_threshold, 1 << 20)
