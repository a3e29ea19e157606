"""Recognise, by its tensors, a whole model folder that was saved in another layout than a LlamaForCausalLM's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from edgetune.runtime.safetensors_file import TensorSpec

_LONGEST_FAULT = 600
"""Most characters of a fault in a message, since names of tensors can be of any length. Chosen by hand."""


def foreign_layout(stored: Mapping[str, TensorSpec]) -> str | None:
    """Return why a whole folder does not hold what a LlamaForCausalLM's does; None where its layout is not known either."""
    small = [name for name, tensor in stored.items() if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    if small:
        name = cut(small[0])
        return f"its weights are stored in 8-bit floats ({name}), which edgetune does not read; use its bf16 or fp16 folder"
    layer = re.compile(r"(?:(.*)\.)?layers\.0\.self_attn\.q_proj\..*")
    prefixes = {match[1] or "" for name in stored if (match := layer.fullmatch(name))}
    if len(prefixes) == 1 and prefixes != {"model"}:
        found = f"layers.0 of {cut(prefixes.pop())}" if "" not in prefixes else "layers.0"
        return (
            f"its tensors are those of {found}, where a LlamaForCausalLM has model.layers.0: it was saved without its head, or "
            "as a part of another model; use the folder of the whole model, or save it again as AutoModelForCausalLM"
        )
    return None


def cut(text: str) -> str:
    """Return a text without its middle if it is too long for an error message."""
    half = _LONGEST_FAULT // 2
    return text if len(text) <= _LONGEST_FAULT else f"{text[:half]}...{text[-half:]}"
