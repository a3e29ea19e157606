"""Load the kernel library and find the kernels in it: the only place where Python calls the C ABI.

The library links no OpenMP runtime. It receives the entry points of the one that torch has loaded (libgomp, libomp or
libiomp5), so that a process has one team of threads, whose size `torch.set_num_threads` sets.
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

ABI = 4
"""Version of the kernels' arguments: ET_ABI in kernels.h, raised together with it whenever an argument changes."""
VARIABLE = "EDGETUNE_CPU_ISA"
"""Environment variable that names the instruction set to use."""

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
    """Raised where the kernel library is missing or of another version."""


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library, once. Raises KernelsMissing."""
    path = _find()
    if path is None:
        raise KernelsMissing(
            f"no C++ kernels in {_FOLDER}: install a C++ compiler and reinstall edgetune, or in a clone type "
            f"`python runtime/backends/cpu/build.py`."
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsMissing(f"the C++ kernels cannot be loaded ({error}): reinstall edgetune.") from error
    found = loaded.et_abi()
    if found != ABI:
        raise KernelsMissing(f"the C++ kernels at {path} have ABI {found}; edgetune expects {ABI}: reinstall edgetune.")
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
    """Return the path of the library beside this file, or else of the one that an install built, or None.

    The latter is for Python that runs in the root of a clone, where this file is the clone's and has no library beside it.
    """
    name = "_kernels.dll" if os.name == "nt" else "_kernels.so"
    installed = (Path(entry) / "edgetune" / "runtime" / "backends" / "cpu" for entry in sys.path if entry)
    return next((folder / name for folder in (_FOLDER, *installed) if (folder / name).is_file()), None)


def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP runtime that this process has loaded, or None: kernels then run on one thread (always on Windows)."""
    if os.name == "nt":
        return None
    folder = Path(torch.__file__).parent
    candidates: list[str | None] = [None]  # None: the symbols that are visible in the whole process
    for place in (folder / "lib", folder.parent / "torch.libs"):
        candidates += [str(path) for kind in ("gomp", "omp", "iomp5") for path in sorted(place.glob(f"lib{kind}[-.]*"))]
    candidates += _mapped()
    for candidate in candidates:
        with contextlib.suppress(OSError):
            # NOLOAD finds a library that is in the process already and never loads a second runtime.
            mode = ctypes.DEFAULT_MODE if candidate is None else os.RTLD_NOLOAD | os.RTLD_LAZY
            runtime = ctypes.CDLL(candidate, mode=mode)
            if hasattr(runtime, "GOMP_parallel") and hasattr(runtime, "omp_get_thread_num"):
                return runtime
    return None


def _mapped() -> list[str]:
    """Return the paths of the OpenMP runtimes that are mapped into this process (Linux)."""
    if sys.platform != "linux":
        return []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count(" ") >= 5 and "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp5")))


def _names() -> list[str]:
    """Return the instruction sets of this build, best first; the library numbers them in this order."""
    loaded, names = load(), list[str]()
    while (name := loaded.et_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


@functools.cache
def isas() -> tuple[str, ...]:
    """Return the instruction sets that this build has and this machine runs, best first."""
    return tuple(name for index, name in enumerate(_names()) if load().et_isa_supported(index))


def selected_isa() -> str:
    """Return the instruction set in use: force_isa's, else EDGETUNE_CPU_ISA's, else the best.

    Raises UsageError for an instruction set that this machine or this build does not have.
    """
    wanted = _forced[-1] if _forced else os.environ.get(VARIABLE, "")
    if not wanted:
        return isas()[0]
    if wanted not in isas():
        available = ", ".join(isas())
        raise UsageError(f"{VARIABLE} is {wanted!r}; this machine has {available}. Choose one of these or unset {VARIABLE}.")
    return wanted


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Run the kernels of the named instruction set within this context, for tests. Raises UsageError if it is not available."""
    _forced.append(name)
    _functions.clear()
    try:
        selected_isa()
        yield
    finally:
        _forced.pop()
        _functions.clear()


def kernel(name: str, signature: str) -> Callable[..., None]:
    """Return the kernel of that name for the instruction set in use.

    signature: one letter per argument (p pointer, i int, l int64, u uint64, f float), the same at every call, since the first
    call's function is kept.
    """
    function = _functions.get(name)
    if function is None:
        address = load().et_kernel(_names().index(selected_isa()), name.encode())
        if not address:
            raise KernelsMissing(f"the C++ kernels are older than this source and lack {name}: reinstall edgetune.")
        prototype: Any = ctypes.CFUNCTYPE(None, *(_TYPES[letter] for letter in signature))
        function = _functions[name] = prototype(address)
    return function
