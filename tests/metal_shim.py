"""Runs Metal kernels on a CPU: the source itself, compiled as C++ behind tests/metal/metal_stdlib.

How a kernel is called is read from its signature, so that nothing here knows the kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent / "metal"
SOURCE = Path(__file__).parent.parent / "runtime" / "backends" / "metal" / "nf4.metal"
COMPILER = (shutil.which("g++") or shutil.which("clang++")) if os.name == "posix" else None
needs_a_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++ or clang++, on Linux or macOS")
_KERNEL = re.compile(r"^kernel void (\w+)\((.*?)\)\s*\{", re.DOTALL | re.MULTILINE)
_PARAMETER = re.compile(r"(.+?)\s*(\w+) \[\[(?:buffer\((\d+)\)|(\w+))\]\]")


@dataclass(frozen=True)
class Signature:
    """A kernel's parameters: (name, type) of its buffers in order, and (name, type, attribute) of the rest."""

    name: str
    buffers: tuple[tuple[str, str], ...]
    builtins: tuple[tuple[str, str, str], ...]


def signatures(source: str) -> list[Signature]:
    """The kernels of a Metal source. Raises ValueError where buffers are not numbered in their order."""
    found = []
    for name, parameters in _KERNEL.findall(source):
        buffers, builtins = [], []
        for parameter in parameters.split(","):
            match = _PARAMETER.fullmatch(" ".join(parameter.split()))
            if match is None:
                raise ValueError(f"{name}: {parameter.strip()!r} is no parameter")
            kind, own, index, attribute = match.groups()
            if index is None:
                builtins.append((own, kind, attribute))
            elif int(index) != len(buffers):
                raise ValueError(f"{name}: {own} is buffer {index}; expected {len(buffers)}")
            else:
                buffers.append((own, kind))
        found.append(Signature(name, tuple(buffers), tuple(builtins)))
    return found


def _wrapper(signature: Signature, value: str) -> str:
    """C++ that takes the addresses of a kernel's arguments, as buffers or as the bytes that they are bound as."""
    arguments = []
    for number, (_, kind) in enumerate(signature.buffers):
        if kind.endswith("*"):
            arguments.append(f"({kind.removeprefix('device ')})arguments[{number}]")
        else:
            arguments.append(f"*(const {kind.removeprefix('constant ').removesuffix('&')}*)arguments[{number}]")
    simd = any(attribute.startswith("thread_index_in_simd") for _, _, attribute in signature.builtins)
    places = {"uint": "position.x", "uint2": "position"}
    for _, kind, attribute in signature.builtins:
        arguments.append({"thread_position_in_grid": places[kind], "thread_index_in_simdgroup": "lane"}[attribute])
    call = f"in_{value}::{signature.name}({', '.join(arguments)})"
    return (
        f'extern "C" void {value}_{signature.name}(void** arguments, uint gx, uint gy, uint tx, uint ty) {{\n'
        f"#define VALUE {value}\n"
        f"  metal::dispatch(uint2{{gx, gy}}, uint2{{tx, ty}}, {str(simd).lower()}, [&](uint2 position, uint lane) {{\n"
        f"    (void)lane; {call};\n  }});\n#undef VALUE\n}}\n"
    )


@functools.cache
def compiled(source: str, value: str) -> ctypes.CDLL:
    """A library with every kernel of `source`, whose first lines define VALUE as `value`."""
    assert COMPILER is not None
    folder = Path(tempfile.mkdtemp(prefix="metal-shim-"))
    try:
        text = f"#include <metal_stdlib>\nnamespace in_{value} {{\n{source}\n}}\n#undef VALUE\n"
        text += "".join(_wrapper(signature, value) for signature in signatures(source))
        (folder / "kernels.cpp").write_text(text)
        flags = ["-std=c++14", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-I", str(FOLDER)]
        command = [COMPILER, *flags, str(folder / "kernels.cpp"), "-o", str(folder / "kernels.so")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SyntaxError(f"program_source:\n{done.stderr}")  # as torch reports the Metal compiler's errors
        return ctypes.CDLL(str(folder / "kernels.so"))
    finally:
        shutil.rmtree(folder)


class ShimKernel:
    """What torch.mps.compile_shader's library gives for a name: called with tensors, ints and floats by position."""

    thread_execution_width = 32

    def __init__(self, library: ctypes.CDLL, value: str, signature: Signature) -> None:
        self._run, self.signature = getattr(library, f"{value}_{signature.name}"), signature
        self.calls = 0

    def __call__(self, *arguments: Any, threads: Sequence[int], group_size: Sequence[int]) -> None:
        assert len(arguments) == len(self.signature.buffers)
        assert len(threads) == len(group_size)
        assert min(threads) > 0
        held: list[Any] = []
        for argument in arguments:  # by position, whatever the type: as torch binds them
            if isinstance(argument, torch.Tensor):
                held.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                own = ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
                held.append(ctypes.cast(ctypes.pointer(own), ctypes.c_void_p))
        array = (ctypes.c_void_p * len(held))(*held)
        grid, group = (*threads, 1)[:2], (*group_size, 1)[:2]
        self._run(array, *(ctypes.c_uint(size) for size in (*grid, *group)))
        self.calls += 1


class ShimLibrary:
    """torch.mps.compile_shader(source), on the CPU."""

    def __init__(self, source: str) -> None:
        value = re.search(r"#define VALUE (\w+)", source)
        assert value is not None
        library = compiled(source, value[1])
        for signature in signatures(source):
            setattr(self, signature.name, ShimKernel(library, value[1], signature))
