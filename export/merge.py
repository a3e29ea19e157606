"""The base's tensors with the adapter merged into them, one at a time: W + scale * B A (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edgetune.export.target import Job
from edgetune.runtime import nf4
from edgetune.runtime.checkpoint import is_linear, model_shapes


def merged(job: Job) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, dense tensor) in model_shapes' order, and none held once the next is asked for.

    Linears are fp32, 4-bit ones dequantised; the embedding, the norms, the biases and the head come as the base stores
    them, mapped, so that a large vocabulary is read by whoever writes it.
    """
    scale = 0.0 if job.adapter is None else job.adapter.config.scale
    for name in model_shapes(job.base.config):
        stored = job.base.tensor(name)
        tensor = stored if isinstance(stored, Tensor) else nf4.dequantize(stored, torch.float32)
        if is_linear(name):
            tensor = tensor.float()
            parts = name.split(".")
            layer, linear = int(parts[2]), parts[4]
            if job.adapter is not None and (layer, linear, "A") in job.adapter.tensors:
                a, b = (job.adapter.tensors[layer, linear, part].float() for part in "AB")
                tensor = tensor.addmm(b, a, alpha=scale)
        yield name, tensor
        job.base.release(name)
