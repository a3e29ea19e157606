"""Which device, which dtype, how much memory there is and is held, and what a device wants while it works."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from edgetune.runtime.errors import DeviceError, ResourceError

DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str) -> torch.device:
    """The torch device for a name of DEVICES; `auto` is an NVIDIA card, else an Apple GPU, else the CPU.

    Raises DeviceError, in one sentence, for a device that this machine or this build of torch has not.
    """
    if name not in DEVICES:
        raise DeviceError(f"Unknown device {name!r}; expected one of {', '.join(DEVICES)}.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    there = torch.cuda.is_available() if name == "cuda" else torch.backends.mps.is_available()
    what = "an NVIDIA card with its driver" if name == "cuda" else "an Apple GPU"
    if not there:
        raise DeviceError(f"--device {name} needs {what}, and torch {torch.__version__} finds none here; type --device cpu.")
    return torch.device(name)


@functools.cache
def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX-512 BF16, AMX, Arm BF16)."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if check is not None and platform.machine().lower() in ("x86_64", "amd64"):
        return bool(check())
    if sys.platform == "darwin":
        return False
    check = getattr(torch.cpu, "_is_arm_bf16_supported", None)
    return bool(check()) if check is not None else False


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it, else fp32.

    Never fp16: on a CPU it is slower than fp32, and hidden states of some models are beyond its 65,504. Metal has bf16 from
    macOS 14 on.
    """
    if device.type == "cpu":
        return torch.bfloat16 if has_fast_bf16() else torch.float32
    if device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        return torch.float32
    return torch.bfloat16


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


@contextmanager
def explain_card_memory(advice: str) -> Iterator[None]:
    """A card that runs out of memory within the block becomes a ResourceError that ends with `advice`.

    In `advice`, {less} is four fifths of what this process held on it at the most, in GB.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        card, most = card_memory(), int(torch.cuda.max_memory_reserved())
        raise ResourceError(
            f"The card ran out of memory: it has {card.total / 1e9:.2f} GB, of which this process held {most / 1e9:.2f} GB "
            f"and {card.free / 1e9:.2f} GB are free; end what else uses it, or {advice.format(less=0.8 * most / 1e9)}."
        ) from error


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


def end_command_buffer(device: torch.device) -> None:
    """Have the device finish what is queued, where a long queue is a danger: macOS ends a program whose work keeps the
    display waiting. A block's work is short; the wait costs less than a millisecond. Nothing on other devices."""
    if device.type == "mps":
        torch.mps.synchronize()


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


def cpu_name() -> str:
    """The processor's own name, for a benchmark's heading."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        asked = subprocess.run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine()
