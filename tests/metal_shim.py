"""Run Metal kernels on a CPU by compiling their source as C++, with tests/metal/metal_stdlib as the standard library.

The way to call a kernel is derived from its signature, so no kernel is named here.
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
    """Return the signatures of a Metal source's kernels. Raises ValueError if buffers are not numbered in order."""
    found = []
    for name, parameters in _KERNEL.findall(source):
        buffers, builtins = [], []
        for parameter in parameters.split(","):
            match = _PARAMETER.fullmatch(" ".join(parameter.split()))
            if match is None:
                raise ValueError(f"{name}: {parameter.strip()!r} is no parameter")
            kind, parameter_name, index, attribute = match.groups()
            if index is None:
                builtins.append((parameter_name, kind, attribute))
            elif int(index) != len(buffers):
                raise ValueError(f"{name}: {parameter_name} is buffer {index}; expected {len(buffers)}")
            else:
                buffers.append((parameter_name, kind))
        found.append(Signature(name, tuple(buffers), tuple(builtins)))
    return found


def _wrapper(signature: Signature, value: str) -> str:
    """Return C++ code for a function that calls a kernel, given the address of each buffer and each scalar argument."""
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
    """Compile `source`, whose first lines define VALUE as `value`, into a library with all its kernels."""
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
            # torch reports the Metal compiler's errors with this type and this first line.
            raise SyntaxError(f"program_source:\n{done.stderr}")
        return ctypes.CDLL(str(folder / "kernels.so"))
    finally:
        shutil.rmtree(folder)


class ShimKernel:
    """A stand-in for a kernel of torch.mps.compile_shader's library; takes tensors, ints and floats by position."""

    thread_execution_width = 32

    def __init__(self, library: ctypes.CDLL, value: str, signature: Signature) -> None:
        self._run, self.signature = getattr(library, f"{value}_{signature.name}"), signature
        self.calls = 0

    def __call__(self, *arguments: Any, threads: Sequence[int], group_size: Sequence[int]) -> None:
        assert len(arguments) == len(self.signature.buffers)
        assert len(threads) == len(group_size)
        assert min(threads) > 0
        pointers: list[Any] = []
        # Arguments are bound by position, whatever their type, as torch does.
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                pointers.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                scalar = ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
                pointers.append(ctypes.cast(ctypes.pointer(scalar), ctypes.c_void_p))
        array = (ctypes.c_void_p * len(pointers))(*pointers)
        grid, group = (*threads, 1)[:2], (*group_size, 1)[:2]
        self._run(array, *(ctypes.c_uint(size) for size in (*grid, *group)))
        self.calls += 1


class ShimLibrary:
    """A stand-in for the library that torch.mps.compile_shader(source) returns, on the CPU."""

    def __init__(self, source: str) -> None:
        value = re.search(r"#define VALUE (\w+)", source)
        assert value is not None
        library = compiled(source, value[1])
        for signature in signatures(source):
            setattr(self, signature.name, ShimKernel(library, value[1], signature))
