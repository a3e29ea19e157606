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
    """Return the bytes this process holds: anonymous memory plus the resident pages of mapped files."""
    return int(psutil.Process().memory_info().rss)


def device_memory(device: torch.device) -> int:
    """Return the bytes that the driver of an Apple GPU holds for this process, its cache included; 0 for other devices.

    An Apple GPU uses the machine's own memory, but `process_memory` does not count what its driver holds.
    """
    return int(torch.mps.driver_allocated_memory()) if device.type == "mps" else 0


def available_memory(device_type: str = "cpu") -> int:
    """Return the bytes that could be allocated now without swapping, within a container's limit and Metal's recommendation."""
    available = int(psutil.virtual_memory().available)
    limits = [_cgroup_limit()]
    if device_type == "mps" and torch.backends.mps.is_available():
        limits.append(max(0, int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory())))
    return min([available, *(limit for limit in limits if limit is not None)])


@dataclass(frozen=True)
class CardMemory:
    """The memory of an NVIDIA card in bytes: free for any program, held by this process's allocator, and in total."""

    free: int
    held: int
    total: int


def card_memory() -> CardMemory:
    """Return the current card's memory. The CUDA context (about half a gigabyte) is created first, so `free` excludes it."""
    free, total = torch.cuda.mem_get_info()
    return CardMemory(int(free), int(torch.cuda.memory_reserved()), int(total))


def anonymous_memory() -> int:
    """Return the bytes of this process that belong to no file; outside Linux the whole resident size, which is larger.

    A meter calls this at any moment of a step, so it reads /proc/self/statm: 30 bytes, too few to disturb the heap that
    the step's tensors lie in.
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
    """Return the bytes of the given files that this process has mapped and resident; always 0 outside Linux."""
    if sys.platform != "linux":
        return 0
    names = {str(file.resolve()) for file in files}
    resident, is_named = 0, False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024 if is_named else 0
        elif "-" in line.split(" ", 1)[0]:  # the first line of a mapping: its address range, and the file's path at the end
            is_named = line.split(maxsplit=5)[-1] in names
    return resident


def _cgroup_limit() -> int | None:
    """Return the bytes that this process's memory cgroup still allows; None without a limit."""
    pairs = (  # cgroup version 2, then version 1
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
