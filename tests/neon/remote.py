"""A pytest plugin (`-p remote`, with this folder on PYTHONPATH) that gives any machine the instruction sets `neon`,
`neon_dot` and `neon_i8mm`: their kernels run in harness.cpp, cross-compiled, under qemu.

Kernels are called with addresses. Whatever they point into is found among the tensors and ctypes objects alive, copied over
there, pointers within ctypes structures included, and copied back: so the tests of the kernels run as they are.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from edgetune.runtime.backends import cpu
from edgetune.runtime.backends.cpu import attention, decode, elementwise, library, weights

project = importlib.import_module("edgetune.runtime.backends.cpu.project")  # the package exports its function of that name

MOST_ROWS = 100
"""Rows of the largest products that are emulated. The loop over strips of more rows is the same code on every set."""
NEON = ("neon_i8mm", "neon_dot", "neon")
_CTYPES = (ctypes.Structure, ctypes.Array, ctypes._SimpleCData)
_process = subprocess.Popen(
    [os.environ["EDGETUNE_QEMU"], "-cpu", "max", os.environ["EDGETUNE_HARNESS"]],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
)

_early: list[Any] = []
"""The tensors and ctypes objects that were there before the first test."""


@functools.cache
def _family(kind: type) -> type | None:
    """Return torch.Tensor for tensors, ctypes.Structure for any ctypes object, None for all else."""
    if issubclass(kind, torch.Tensor):
        return torch.Tensor
    return ctypes.Structure if issubclass(kind, _CTYPES) else None


def _objects() -> list[tuple[int, int, Any]]:
    """(address, size, ctypes object or None) of all memory a kernel may be shown."""
    found: dict[int, tuple[int, int, Any]] = {}
    # From the caller on: the locals of this frame would hold the frame itself, and with it every caller's tensors.
    frame, scalars = sys._getframe(1), []
    while frame is not None:  # ctypes' single numbers are unknown to the garbage collector
        scalars += [value for value in frame.f_locals.values() if isinstance(value, ctypes._SimpleCData)]
        frame = frame.f_back
    for thing in (*_early, *gc.get_objects(), *scalars):
        family = _family(type(thing))
        if family is None:
            continue
        if family is torch.Tensor and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = (storage.data_ptr(), storage.nbytes(), None)
        elif family is ctypes.Structure:
            address, size = ctypes.addressof(thing), ctypes.sizeof(thing)
            if size > found.get(address, (0, -1))[1]:
                found[address] = (address, size, thing)
    return list(found.values())


def _pointers(kind: Any, offset: int = 0) -> Iterator[int]:
    """Offsets of the pointers in a ctypes type."""
    if kind is ctypes.c_void_p or issubclass(kind, ctypes._Pointer):
        yield offset
    elif issubclass(kind, ctypes.Structure):
        for name, field in kind._fields_:
            yield from _pointers(field, offset + getattr(kind, name).offset)
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from _pointers(kind._type_, offset + i * ctypes.sizeof(kind._type_))


class _Message:
    """One call: the memory it reaches, and where the pointers in it are."""

    def __init__(self) -> None:
        self.objects = _objects()
        self.buffers: list[tuple[int, int, Any]] = []
        self.pointers: list[tuple[int, int]] = []

    def reach(self, address: int) -> None:
        """Take along the largest piece of memory that holds the address, and all that it points to."""
        holders = [item for item in self.objects if item[0] <= address < item[0] + max(item[1], 1)]
        assert holders, f"a kernel was given {address:#x}, which no tensor holds"
        holder = max(holders, key=lambda item: item[1])
        if holder in self.buffers:
            return
        self.buffers.append(holder)
        index = len(self.buffers) - 1
        for offset in _pointers(type(holder[2])) if holder[2] is not None else ():
            value = ctypes.c_void_p.from_address(holder[0] + offset).value
            if value:
                self.pointers.append((index, offset))
                self.reach(value)


def _number(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _call(isa: str, name: str, signature: str, values: tuple[Any, ...]) -> None:
    assert len(values) == len(signature)
    message, arguments = _Message(), [_number(len(values))]
    for letter, value in zip(signature, values, strict=True):
        if letter == "p":
            address = getattr(value, "_obj", None)
            value = ctypes.addressof(address) if address is not None else int(value or 0)
            if value:
                message.reach(value)
            arguments.append(_number(2, value))
        elif letter == "f":
            arguments.append(_number(1) + struct.pack("<fi", value, 0))
        else:
            arguments.append(_number(0, int(value)))
    parts = [_number(len(text)) + text.encode() for text in (isa, name)]
    parts.append(_number(len(message.buffers)))
    for address, size, _ in message.buffers:
        parts += [_number(address, size, 1), ctypes.string_at(address, size)]
    parts.append(_number(len(message.pointers)))
    parts += [_number(*pointer) for pointer in message.pointers]
    _process.stdin.write(b"".join(parts + arguments))
    _process.stdin.flush()
    _take_back(name, message)


def _read(size: int) -> bytes:
    data = _process.stdout.read(size)
    assert len(data) == size, f"the harness ended with {_process.wait()}"
    return data


def _take_back(name: str, message: _Message) -> None:
    if not struct.unpack("<q", _read(8))[0]:
        raise library.KernelsMissing(f"no ARM kernel {name}")
    for index, (address, size, _) in enumerate(message.buffers):
        data = bytearray(_read(size))
        for buffer, offset in message.pointers:
            if buffer == index:  # a pointer of theirs; ours stays
                data[offset : offset + 8] = ctypes.string_at(address + offset, 8)
        ctypes.memmove(address, bytes(data), size)


_native_kernel, _native_isas = library.kernel, library.isas()


def _kernel(name: str, signature: str) -> Callable[..., None]:
    isa = library.selected_isa()
    if isa not in NEON:
        return _native_kernel(name, signature)
    return lambda *values: _call(isa, name, signature, values)


def _isas() -> tuple[str, ...]:
    return (*_native_isas, *NEON)


for module in (library, cpu, attention, decode, elementwise, project, weights):
    if hasattr(module, "kernel"):
        module.kernel = _kernel
    if hasattr(module, "isas"):
        module.isas = _isas


def pytest_collection_finish() -> None:
    """Set aside what exists before the first test, half a million objects, so that each call need not look through them."""
    _early.extend(thing for thing in gc.get_objects() if issubclass(type(thing), (torch.Tensor, *_CTYPES)))
    gc.freeze()


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--only-isa", help="run the tests of this instruction set alone")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Deselect every test but those whose parameter `isa` is the one asked for and that an emulator can do in seconds."""
    wanted = config.getoption("--only-isa")
    if wanted:
        parameters = [(item, item.callspec.params) for item in items if hasattr(item, "callspec")]
        items[:] = [item for item, found in parameters if found.get("isa") == wanted and found.get("rows", 0) <= MOST_ROWS]
