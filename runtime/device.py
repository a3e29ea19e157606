"""Pick the device and the dtype to compute in, and explain the errors of a graphics card."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edgetune.runtime.errors import DeviceError, ResourceError
from edgetune.runtime.memory import card_memory

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


def end_command_buffer(device: torch.device) -> None:
    """Have the device finish what is queued, where a long queue is a danger: macOS ends a program whose work keeps the
    display waiting. A block's work is short; the wait costs less than a millisecond. Nothing on other devices."""
    if device.type == "mps":
        torch.mps.synchronize()


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
