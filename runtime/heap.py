"""Return freed memory to the system, and set up the C heap so that it does not fragment."""

from __future__ import annotations

import ctypes
import sys

import torch

LARGE_TENSOR = 1 << 20
"""Bytes from which on `compact_heap` gives a tensor pages of its own (chosen by hand)."""
_M_MXFAST, _M_MMAP_THRESHOLD, _M_ARENA_MAX = 1, -3, -8  # the parameters' numbers in glibc's malloc.h


def trim_memory() -> None:
    """Return freed heap pages to the system. Only glibc keeps them; on other systems this does nothing."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)


def trim_device(device: torch.device) -> None:
    """Return the memory that torch caches for later tensors to the system. Only on MPS, where all programs share it."""
    if device.type == "mps":
        torch.mps.synchronize()  # queued work may still use the memory
        torch.mps.empty_cache()


def trim(device: torch.device) -> None:
    """Return all free memory to the system. Call it between kinds of work, which use tensors of different shapes: the holes
    that each kind leaves in the heap would add up."""
    trim_memory()
    trim_device(device)


def steady_heap() -> None:
    """Keep glibc's heap from fragmenting more with every step, so that equal steps take equal memory. For the whole process.

    All threads share one heap. And the slivers that glibc cuts from both ends of an aligned tensor merge with it again when
    it is freed: by default glibc would set them aside for small requests, and the hole that is left would be too short for
    a tensor of the same size.
    """
    if can_compact_heap():
        ctypes.CDLL(None).mallopt(_M_MXFAST, 0)
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def can_compact_heap() -> bool:
    """Return True if `compact_heap` has an effect on this system."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def compact_heap() -> None:
    """Give large tensors pages of their own, which return to the system when they are freed. For the whole process.

    Their memory is then never lost to fragmentation, but fresh pages cost time: steps were 22 to 30% slower where it was
    measured (LOG.md, "compact heap"). Only glibc has the switch.
    """
    if can_compact_heap():
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_TENSOR)
