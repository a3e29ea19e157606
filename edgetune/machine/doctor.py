"""Reports what this installation can do on this machine, and what is wrong: the first thing to send with a question.

An NVIDIA card or an Apple GPU is tested too (device_checks.py), which takes seconds.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import edgetune
from edgetune.encrypting import plain_files
from edgetune.encryption import standing
from edgetune.export.targets import TARGETS, load_target
from edgetune.home import home
from edgetune.machine.device_checks import confirm, without_paths
from edgetune.privacy.network_guard import guard, kernel_guards_of_parsers
from edgetune.reports.text import counted
from edgetune.runtime.device import compute_dtype, cpu_name, has_fast_bf16, pick_device
from edgetune.runtime.memory import available_memory
from edgetune.runtime.ops import backend_name, kernels_missing, multiplies_int8


def examine(tell: Callable[[str], object] = lambda name: None) -> dict[str, Any]:
    """Return the facts, ready for JSON. `problems` holds a sentence for each fault found. tell: as in `confirm`."""
    cpu, best = torch.device("cpu"), pick_device("auto")
    confirmations = confirm(best, tell) if best.type != "cpu" else []
    missing = kernels_missing()
    package = Path(edgetune.__file__).resolve().parent
    problems = []
    if missing:
        problems.append(f"Plain torch is used instead of the C++ kernels, several times slower: {without_paths(missing)}")
    if not os.access(home(), os.W_OK):
        problems.append("The folder of adapters and runs cannot be written to; set EDGETUNE_HOME to a folder that can.")
    private = sys.platform == "win32" or home().stat().st_mode & 0o077 == 0
    if not private:
        problems.append("Other users of this machine can read the folder of adapters and runs; type chmod 700 and its path.")
    encryption, plain = standing(home()), 0
    if encryption.problem is not None:
        problems.append(without_paths(encryption.problem))
    elif encryption.state == "on" and (plain := plain_files(home())):
        problems.append(f"{counted(plain, 'file')} of the data folder should be encrypted: type edgetune encrypt.")
    problems += [f"On {best.type}, {found.name}: {found.detail}." for found in confirmations if not found.ok]
    return {
        "edgetune": edgetune.__version__,
        "package": "clone" if (package.parent / "runtime").is_dir() else "site-packages",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": _system(),
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": missing is None,
        "backend": backend_name(cpu),
        "dtype": str(compute_dtype(cpu)).removeprefix("torch."),
        "fast_bf16": has_fast_bf16(),
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "device": best.type,
        "device_backend": backend_name(best),
        "writes_with_head": "int8" if multiplies_int8(best) else "as stored",
        "device_dtype": str(compute_dtype(best)).removeprefix("torch."),
        "confirmations": [dataclasses.asdict(found) for found in confirmations],
        "memory_available_bytes": available_memory(),
        "exports_proved": [name for name in TARGETS if not _missing(name)],
        "exports_lacking": [f"{name}: edgetune[{load_target(name).extra}]" for name in TARGETS if _missing(name)],
        "home_is_private": private,
        "kernel": f"{platform.system()} {platform.release()}",
        "network_guard": str(guard()),
        "parser_guard": [*kernel_guards_of_parsers(), "audit hook"],
        "encryption": encryption.state,
        "problems": problems,
    }


def _missing(target: str) -> list[str]:
    """Return the missing packages without which an export cannot be verified here."""
    spec = load_target(target)
    return spec.missing_packages(spec.weights[0])


def _system() -> str:
    """Return the name of the operating system; on a Mac with its version, because Metal's abilities depend on it."""
    version = platform.mac_ver()[0]
    return f"macOS {version} {platform.machine()}" if version else f"{platform.system()} {platform.machine()}"
