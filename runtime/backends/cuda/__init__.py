"""The CUDA back end: the functions of reference.py by Triton kernels. Importing it raises ImportError without triton.

Big products are cuBLAS's: a weight is dequantised into the panel that lora.py reuses, one write and one read of it, which
every row of the step shares. A few rows go to `matvec`, which reads the packed weight as it is. Attention is torch's flash
attention, a document at a time; what has no kernel here is reference.py's.

The kernels run in Triton's interpreter on CPU tensors in the tests. No card has run them yet: what only a card can show
is unverified, speed above all.
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
    rms_norm,
    rms_norm_backward,
    rope_,
    swiglu,
    swiglu_backward,
)
from edgetune.runtime.backends.cuda.weights import dequantize, matvec
from edgetune.runtime.backends.reference import fuses, project, project_backward

__all__ = [
    "attention_backward",
    "attention_forward",
    "cross_entropy_",
    "decoder",
    "dequantize",
    "dropout",
    "fuses",
    "load",
    "matvec",
    "project",
    "project_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope_",
    "swiglu",
    "swiglu_backward",
]

NAME = "cuda"


def load() -> None:
    """Make one small kernel for this machine's card: Triton wants a C compiler, Python's headers and a card it knows.

    Raises ImportError where one of them is missing.
    """
    if not torch.cuda.is_available():
        return
    ones = torch.ones(1, 16, device="cuda")
    try:
        rms_norm(ones, ones[0], 1e-5)
    except Exception as error:  # whatever it is, there are no kernels
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImportError(f"Triton cannot make kernels for this card here ({first})") from error
