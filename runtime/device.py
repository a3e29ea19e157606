"""Which device, which dtype, how many threads, how much memory."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys

import psutil
import torch

from edgetune.runtime.errors import DeviceError

DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str) -> torch.device:
    """The torch device for a name of DEVICES; `auto` is the best one that the engine trains on here.

    Raises DeviceError, in one sentence, for a device that this machine or this build of torch has not.
    """
    if name not in DEVICES:
        raise DeviceError(f"Unknown device {name!r}; expected one of {', '.join(DEVICES)}.")
    if name in ("auto", "cpu"):
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
    """bf16 where the hardware multiplies it, else fp32; never fp16 on a CPU, where it is slower than fp32."""
    if device.type == "cpu":
        return torch.bfloat16 if has_fast_bf16() else torch.float32
    return torch.bfloat16


def process_memory() -> int:
    """Bytes this process holds: anonymous memory plus resident pages of mapped files, where the system tells."""
    return int(psutil.Process().memory_info().rss)


def available_memory() -> int:
    """Bytes that could be allocated now without swapping; a container's limit counts."""
    available = int(psutil.virtual_memory().available)
    limit = _cgroup_limit()
    return available if limit is None else min(available, limit)


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


def can_compact_heap() -> bool:
    """Whether `compact_heap` does anything here."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def compact_heap(threshold: int = 1 << 20) -> None:
    """From now on give tensors of `threshold` bytes and more pages of their own, which go back when they are freed.

    Their memory is then never lost to holes in the heap; but new pages take time. glibc alone has the switch.
    """
    map_threshold = -3  # M_MMAP_THRESHOLD
    if can_compact_heap():
        ctypes.CDLL(None).mallopt(map_threshold, threshold)


def cpu_name() -> str:
    """The processor's own name, for a benchmark's heading."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
