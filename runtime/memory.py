"""Measure memory: how much is available, and how much this process and its device hold."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


def process_memory() -> int:
    """Bytes this process holds: anonymous memory plus resident pages of mapped files, where the system tells."""
    return int(psutil.Process().memory_info().rss)


def device_memory(device: torch.device) -> int:
    """Bytes that the driver of an Apple GPU holds for this process, its cache included; 0 for other devices.

    Their memory is the machine's own, and no part of what `process_memory` sees.
    """
    return int(torch.mps.driver_allocated_memory()) if device.type == "mps" else 0


def available_memory(device_type: str = "cpu") -> int:
    """Bytes that could be allocated now without swapping; a container's limit counts, and what Metal recommends."""
    available = int(psutil.virtual_memory().available)
    limits = [_cgroup_limit()]
    if device_type == "mps" and torch.backends.mps.is_available():
        limits.append(max(0, int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory())))
    return min([available, *(limit for limit in limits if limit is not None)])


@dataclass(frozen=True)
class CardMemory:
    """Bytes of an NVIDIA card: free for anyone, held by this process's allocator, and in all."""

    free: int
    held: int
    total: int


def card_memory() -> CardMemory:
    """The current card's memory now. Its own state (about half a gigabyte) is begun first, so that `free` is without it."""
    free, total = torch.cuda.mem_get_info()
    return CardMemory(int(free), int(torch.cuda.memory_reserved()), int(total))


def anonymous_memory() -> int:
    """Bytes that belong to no file. Linux tells; elsewhere the whole resident size stands in for it, which is more.

    A meter asks at any moment of a step: what is read is too short to be put into the heap that the step's tensors lie in.
    """
    if sys.platform != "linux":
        return process_memory()
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        _, resident, shared, *_ = os.read(file, 256).split()
    finally:
        os.close(file)
    return (int(resident) - int(shared)) * mmap.PAGESIZE


def resident_pages(files: Sequence[Path]) -> int:
    """Bytes of the named files that this process has mapped and in memory; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    names = {str(file.resolve()) for file in files}
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024 if inside else 0
        elif "-" in line.split(" ", 1)[0]:
            inside = line.split(maxsplit=5)[-1] in names
    return resident


def _cgroup_limit() -> int | None:
    """What this process's memory cgroup still allows, in bytes; None where there is no limit."""
    pairs = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    )
    for limit_path, used_path in pairs:
        try:
            with open(limit_path) as limit, open(used_path) as used:
                return max(0, int(limit.read()) - int(used.read()))
        except (OSError, ValueError):
            continue
    return None
