"""Compile nf4.metal on first use and launch its kernels."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import torch

from edgetune.runtime.backends.metal.contract import KERNELS, LANES, VALUES, Kernel
from edgetune.runtime.ops_types import FEW_ROWS

SOURCE = "nf4.metal"


class KernelsMissing(ImportError):
    """Raised where the Metal kernels cannot serve; the message says why."""


@functools.cache
def library(dtype: torch.dtype) -> Any:
    """Return the kernels compiled with VALUE as `dtype`. Raises KernelsMissing where they do not compile."""
    compile_shader = getattr(torch.mps, "compile_shader", None)
    if compile_shader is None:
        raise KernelsMissing(f"torch {torch.__version__} cannot compile Metal source; install torch 2.7 or newer.")
    source = resources.files(__package__).joinpath(SOURCE).read_text(encoding="utf-8")
    defines = f"#define VALUE {VALUES[dtype]}\n#define FEW_ROWS {FEW_ROWS}\n"
    try:
        compiled = compile_shader(defines + source)
        widths = {kernel.name: getattr(compiled, kernel.name).thread_execution_width for kernel in KERNELS}
    except (RuntimeError, SyntaxError, AttributeError) as error:  # torch raises SyntaxError for the compiler's errors
        raise KernelsMissing(f"{SOURCE} does not compile for {VALUES[dtype]} here: {error}") from error
    odd = {name: width for name, width in widths.items() if width != LANES}
    if odd:
        raise KernelsMissing(f"this GPU runs simdgroups of another width than {LANES}: {odd}")
    return compiled


def launch(kernel: Kernel, dtype: torch.dtype, device: torch.device, threads: tuple[int, ...], *values: Any) -> None:
    """Queue a kernel compiled with VALUE as `dtype` over a grid of threads. Raises ValueError for wrong arguments."""
    kernel.check(dtype, device, values)
    getattr(library(dtype), kernel.name)(*values, threads=threads, group_size=kernel.group_size)
