"""Loads the kernel library and finds the kernels in it: the only place where Python meets the C ABI.

The library links no OpenMP runtime. It is handed the entry points of the one that torch has loaded (libgomp, libomp or
libiomp5), so that a process has one team of threads, and `torch.set_num_threads` rules it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from edgetune.runtime.errors import UsageError

ABI = 5  # kernels.h's ET_ABI: raised together with it whenever a kernel's arguments change
VARIABLE = "EDGETUNE_CPU_ISA"

_FOLDER = Path(__file__).resolve().parent
_TYPES = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "u": ctypes.c_uint64,
    "f": ctypes.c_float,
}
_forced: list[str] = []
_functions: dict[str, Callable[..., None]] = {}


class KernelsMissing(ImportError):
    """There is no kernel library, or one of another version."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, loaded once. Raises KernelsMissing."""
    path = _find()
    if path is None:
        raise KernelsMissing(
            f"no C++ kernels were built at {_FOLDER}: install a C++ compiler and reinstall edgetune, or in a clone type "
            f"`python runtime/backends/cpu/build.py`."
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsMissing(f"the C++ kernels cannot be loaded ({error}): reinstall edgetune.") from error
    found = loaded.et_abi()
    if found != ABI:
        raise KernelsMissing(f"the C++ kernels at {path} have ABI {found}, and this expects {ABI}: reinstall edgetune.")
    loaded.et_isa_name.restype = ctypes.c_char_p
    loaded.et_kernel.restype = ctypes.c_void_p
    loaded.et_kernel.argtypes = [ctypes.c_int, ctypes.c_char_p]
    loaded.et_set_openmp.argtypes = [ctypes.c_void_p] * 4
    openmp = _openmp()
    if openmp is not None:
        entries = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
        loaded.et_set_openmp(*(ctypes.cast(getattr(openmp, entry), ctypes.c_void_p) for entry in entries))
    return loaded


def _find() -> Path | None:
    """The library beside this file; else, when Python runs in a clone's root, the one that an install has built."""
    name = "_kernels.dll" if os.name == "nt" else "_kernels.so"
    installed = (Path(entry) / "edgetune" / "runtime" / "backends" / "cpu" for entry in sys.path if entry)
    return next((folder / name for folder in (_FOLDER, *installed) if (folder / name).is_file()), None)


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime in this process; never loads one. None: kernels run on one thread (always on Windows)."""
    if os.name == "nt":
        return None
    folder = Path(torch.__file__).parent
    candidates: list[str | None] = [None]  # what the process shows to everyone
    for place in (folder / "lib", folder.parent / "torch.libs"):
        candidates += [str(path) for kind in ("gomp", "omp", "iomp5") for path in sorted(place.glob(f"lib{kind}[-.]*"))]
    candidates += _mapped()
    for candidate in candidates:
        with contextlib.suppress(OSError):
            mode = ctypes.DEFAULT_MODE if candidate is None else os.RTLD_NOLOAD | os.RTLD_LAZY
            runtime = ctypes.CDLL(candidate, mode=mode)
            if hasattr(runtime, "GOMP_parallel") and hasattr(runtime, "omp_get_thread_num"):
                return runtime
    return None


def _mapped() -> list[str]:
    """Paths of OpenMP runtimes mapped into this process (Linux)."""
    if sys.platform != "linux":
        return []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count(" ") >= 5 and "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp5")))


def _names() -> list[str]:
    """Instruction sets of this build, best first; the index is the library's."""
    loaded, names = load(), list[str]()
    while (name := loaded.et_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


@functools.cache
def isas() -> tuple[str, ...]:
    """Instruction sets that this build holds and this machine runs, best first."""
    return tuple(name for index, name in enumerate(_names()) if load().et_isa_supported(index))


def selected_isa() -> str:
    """The instruction set in use: force_isa's, else EDGETUNE_CPU_ISA's, else the best. UsageError: it is not there."""
    wanted = _forced[-1] if _forced else os.environ.get(VARIABLE, "")
    if not wanted:
        return isas()[0]
    if wanted not in isas():
        have = ", ".join(isas())
        raise UsageError(f"{VARIABLE} asks for {wanted!r}, and this machine has {have}: choose one of these or unset it.")
    return wanted


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Run kernels of the named instruction set, for tests. Raises UsageError for one that is not there."""
    _forced.append(name)
    _functions.clear()
    try:
        selected_isa()
        yield
    finally:
        _forced.pop()
        _functions.clear()


def kernel(name: str, signature: str) -> Callable[..., None]:
    """The kernel of that name for the instruction set in use.

    signature: a letter an argument, as in `_TYPES` (p pointer, i int, l int64, u uint64, f float), always the same.
    """
    function = _functions.get(name)
    if function is None:
        address = load().et_kernel(_names().index(selected_isa()), name.encode())
        if not address:
            raise KernelsMissing(f"the C++ kernels lack {name}, being older than this source: reinstall edgetune.")
        prototype: Any = ctypes.CFUNCTYPE(None, *(_TYPES[letter] for letter in signature))
        function = _functions[name] = prototype(address)
    return function
