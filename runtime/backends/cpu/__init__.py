"""The C++ back end: ops_types.Backend by kernels behind a C ABI. Importing it raises KernelsMissing (an ImportError) where the
library was not built.

Everything is checked in Python before a pointer crosses: devices, dtypes, shapes, strides, index ranges. A wrong call raises
ValueError. bf16 and f32 are computed in fp32 and rounded once, to nearest even; threads are torch's.

`weights`, `elementwise`, `attention`, `project` and `decode` each wrap the kernels of one kind; `arguments` checks what they
pass, `structures` mirrors the C structures, `library` finds the kernels, and `build` compiles them.
"""

from __future__ import annotations

from edgetune.runtime.backends.cpu import library
from edgetune.runtime.backends.cpu.attention import attention_backward, attention_forward
from edgetune.runtime.backends.cpu.decode import decoder
from edgetune.runtime.backends.cpu.elementwise import (
    cross_entropy_,
    dropout,
    geglu,
    geglu_backward,
    rms_norm,
    rms_norm_backward,
    rope_,
    swiglu,
    swiglu_backward,
)
from edgetune.runtime.backends.cpu.library import KernelsMissing, force_isa, isas, selected_isa
from edgetune.runtime.backends.cpu.project import fuses, project, project_backward
from edgetune.runtime.backends.cpu.weights import dequantize, int8_matvec, int8_rows, matvec, multiplies_int8

__all__ = [
    "NAME",
    "KernelsMissing",
    "attention_backward",
    "attention_forward",
    "cross_entropy_",
    "decoder",
    "dequantize",
    "dropout",
    "force_isa",
    "fuses",
    "geglu",
    "geglu_backward",
    "int8_matvec",
    "int8_rows",
    "isas",
    "load",
    "matvec",
    "multiplies_int8",
    "project",
    "project_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope_",
    "selected_isa",
    "swiglu",
    "swiglu_backward",
]

NAME = "cpu"


def load() -> None:
    """Load the kernel library and check the instruction set that EDGETUNE_CPU_ISA asks for.

    Raises KernelsMissing, or UsageError for an instruction set that this machine does not have.
    """
    library.load()
    selected_isa()


load()
