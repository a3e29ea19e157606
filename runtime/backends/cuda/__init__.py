"""The CUDA back end: ops_types.Backend by Triton kernels. Importing it raises ImportError without triton.

Large products are cuBLAS's: a weight is dequantised into the panel that project.py reuses, which costs one write and one read
of it, shared by every row of the step. A few rows go to `matvec`, which reads the packed weight as it is. Attention is torch's
flash attention, one document at a time. Functions without a kernel here are reference.py's.

The tests run the kernels in Triton's interpreter on CPU tensors. No card has run them yet: what only a card can show, speed
above all, is unverified.
"""

from __future__ import annotations

import torch

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("triton is not installed; type pip install triton") from error

from edgetune.runtime.backends.cuda.attention import attention_backward, attention_forward
from edgetune.runtime.backends.cuda.decode import decoder
from edgetune.runtime.backends.cuda.elementwise import (
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
from edgetune.runtime.backends.cuda.weights import dequantize, matvec
from edgetune.runtime.backends.reference import (
    fuses,
    int8_matvec,
    int8_rows,
    multiplies_int8,
    project,
    project_backward,
    selected_isa,
)

__all__ = [
    "NAME",
    "attention_backward",
    "attention_forward",
    "cross_entropy_",
    "decoder",
    "dequantize",
    "dropout",
    "fuses",
    "geglu",
    "geglu_backward",
    "int8_matvec",
    "int8_rows",
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

NAME = "cuda"


def load() -> None:
    """Compile one small kernel for this machine's card, if it has one.

    Triton needs a C compiler, Python's headers and a card that it supports. Raises ImportError where one of them is missing.
    """
    if not torch.cuda.is_available():
        return
    ones = torch.ones(1, 16, device="cuda")
    try:
        rms_norm(ones, ones[0], 1e-5)
    except Exception as error:  # whatever the reason, there are no kernels
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImportError(f"Triton cannot compile kernels for this card ({reason})") from error
