"""Pick the device and the dtype to compute in, and explain the errors of a graphics card."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edgetune.runtime import ops
from edgetune.runtime.config import DEVICES
from edgetune.runtime.errors import DeviceError, ResourceError
from edgetune.runtime.memory import card_memory

SMALLER_SHARE = 0.8
"""Share of the peak memory on a card that is suggested as the next limit after it ran out (chosen by hand)."""


def pick_device(name: str) -> torch.device:
    """Return the torch device for a name in DEVICES; `auto` prefers an NVIDIA card, then an Apple GPU, then the CPU.

    Raises DeviceError for a device that this machine or this build of torch does not have.
    """
    if name not in DEVICES:
        raise DeviceError(f"Unknown device {name!r}; expected one of {', '.join(DEVICES)}.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    available = torch.cuda.is_available() if name == "cuda" else torch.backends.mps.is_available()
    hardware = "an NVIDIA card with its driver" if name == "cuda" else "an Apple GPU"
    if not available:
        raise DeviceError(f"--device {name} needs {hardware}, and torch {torch.__version__} finds none; type --device cpu.")
    return torch.device(name)


def has_fast_bf16() -> bool:
    """Return True if this CPU multiplies bf16 in hardware (AVX-512 BF16, AMX, Arm BF16), and the kernels in use do too."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if check is not None and platform.machine().lower() in ("x86_64", "amd64"):
        return bool(check()) and not ops.fuses(torch.device("cpu"), torch.float32)
    if sys.platform == "darwin":
        return False
    check = getattr(torch.cpu, "_is_arm_bf16_supported", None)
    return bool(check()) if check is not None else False


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: bf16 where the hardware multiplies it, else fp32.

    It is never fp16, which is slower than fp32 on a CPU and overflows at 65,504, below the hidden states of some models.
    Metal has bf16 from macOS 14 on.
    """
    if device.type == "cpu":
        return torch.bfloat16 if has_fast_bf16() else torch.float32
    if device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        return torch.float32
    return torch.bfloat16


@contextmanager
def explain_card_memory(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error of the card inside the block into a ResourceError that ends with `advice`.

    In `advice`, {less} is replaced by four fifths of this process's peak memory on the card, in GB.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        card, peak = card_memory(), int(torch.cuda.max_memory_reserved())
        raise ResourceError(
            f"The card ran out of memory: it has {card.total / 1e9:.2f} GB, of which this process held {peak / 1e9:.2f} GB "
            f"and {card.free / 1e9:.2f} GB are free; close other programs that use it, or "
            f"{advice.format(less=SMALLER_SHARE * peak / 1e9)}."
        ) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block on one thread of torch, whose sums over many numbers have other last bits at another number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def end_command_buffer(device: torch.device) -> None:
    """Wait until an Apple GPU has finished the work that is queued; do nothing on other devices.

    macOS kills a program whose work keeps the display waiting, so the queue must stay short. Called after each block, the
    wait costs less than a millisecond.
    """
    if device.type == "mps":
        torch.mps.synchronize()


def cpu_name() -> str:
    """Return the model name of the processor, for the heading of a benchmark."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        answer = subprocess.run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if answer.stdout.strip():
            return answer.stdout.strip()
    return platform.processor() or platform.machine()
