"""Load the kernel library and look kernels up in it. No other module calls the library's C functions directly.

The library has a thread team of its own (team.cpp), which is independent of torch's. Each call says how many threads it may
use; callers pass `torch.get_num_threads()`.
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

from edgetune.runtime.errors import UsageError

ABI = 7
"""Version of the C interface; equal to ET_ABI in kernels.h. Raise both when a kernel's arguments or a struct change."""
VARIABLE = "EDGETUNE_CPU_ISA"
"""Environment variable that names the instruction set to use instead of the best one."""

_FOLDER = Path(__file__).resolve().parent
_TYPES = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "u": ctypes.c_uint64,
    "f": ctypes.c_float,
}
_forced: list[str] = []  # force_isa's names, the innermost last
_functions: dict[str, Callable[..., None]] = {}  # kernels of the selected instruction set, by name


class KernelsMissing(ImportError):
    """The kernel library was not built, cannot be loaded, or is of another version than this source."""


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library, once, and return it. Raises KernelsMissing."""
    path = _find()
    if path is None:
        raise KernelsMissing(
            f"no C++ kernels found in {_FOLDER}. Install a C++ compiler and reinstall edgetune, or in a clone run "
            f"`python runtime/backends/cpu/build.py`."
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsMissing(f"cannot load the C++ kernels ({error}). Reinstall edgetune.") from error
    found = loaded.et_abi()
    if found != ABI:
        raise KernelsMissing(f"the C++ kernels at {path} have ABI {found}, expected {ABI}. Reinstall edgetune.")
    loaded.et_isa_name.restype = ctypes.c_char_p
    loaded.et_kernel.restype = ctypes.c_void_p
    loaded.et_kernel.argtypes = [ctypes.c_int, ctypes.c_char_p]
    return loaded


def _find() -> Path | None:
    """Return the library beside this file, else the installed package's (when Python runs in a clone's root), else None."""
    name = "_kernels.dll" if os.name == "nt" else "_kernels.so"
    installed = (Path(entry) / "edgetune" / "runtime" / "backends" / "cpu" for entry in sys.path if entry)
    return next((folder / name for folder in (_FOLDER, *installed) if (folder / name).is_file()), None)


def _names() -> list[str]:
    """Return the instruction sets of this build, best first. An index in this list is the library's index."""
    loaded, names = load(), list[str]()
    while (name := loaded.et_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


@functools.cache
def isas() -> tuple[str, ...]:
    """Return the instruction sets that this build holds and this machine runs, best first."""
    return tuple(name for index, name in enumerate(_names()) if load().et_isa_supported(index))


def selected_isa() -> str:
    """Return the instruction set in use: force_isa's, else EDGETUNE_CPU_ISA's, else the best.

    Raises UsageError if this machine or this build does not have it.
    """
    wanted = _forced[-1] if _forced else os.environ.get(VARIABLE, "")
    if not wanted:
        return isas()[0]
    if wanted not in isas():
        available = ", ".join(isas())
        raise UsageError(f"{VARIABLE} is {wanted!r}, but this machine has {available}. Choose one of these or unset it.")
    return wanted


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Use the kernels of the named instruction set within the context, for tests. Raises UsageError if it is not available."""
    _forced.append(name)
    _functions.clear()
    try:
        selected_isa()
        yield
    finally:
        _forced.pop()
        _functions.clear()


def kernel(name: str, signature: str) -> Callable[..., None]:
    """Return the kernel of this name for the instruction set in use.

    signature: one letter for each argument, as in `_TYPES` (p pointer, i int, l int64, u uint64, f float). Every call for the
    same kernel must give the same signature, since functions are cached by name. Raises KernelsMissing.
    """
    function = _functions.get(name)
    if function is None:
        address = load().et_kernel(_names().index(selected_isa()), name.encode())
        if not address:
            raise KernelsMissing(f"the C++ kernels have no {name}: they are older than this source. Reinstall edgetune.")
        prototype: Any = ctypes.CFUNCTYPE(None, *(_TYPES[letter] for letter in signature))
        function = _functions[name] = prototype(address)
    return function
