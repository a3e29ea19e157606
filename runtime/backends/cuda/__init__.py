"""The CUDA back end: the functions of reference.py by Triton kernels. Importing it raises ImportError without triton.

Big products are cuBLAS's: a weight is dequantised into the panel that lora.py reuses, one write and one read of it, which
every row of the step shares. A few rows go to `matvec`, which reads the packed weight as it is. Attention is torch's flash
attention, a document at a time; what has no kernel here is reference.py's.

The kernels run in Triton's interpreter on CPU tensors in the tests. No card has run them yet: what only a card can show
is unverified, speed above all.
"""

from __future__ import annotations

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
