"""The adapter for transformers with PEFT, vLLM and TGI: a PEFT folder, the base named as it is on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export.target import Job, Written
from edgetune.runtime import adapter as adapters

WEIGHTS = ("",)
NEEDS = ("peft", "peft")


def write(job: Job, folder: Path) -> Written:
    """adapter_config.json and adapter_model.safetensors."""
    adapters.write_files(replace(job.needed_adapter(), about={}), folder, job.base_name)
    return Written()


class TransformersReader:
    """A model of transformers in fp32 on the CPU."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """(N,) -> (N, V) f32."""
        found: Tensor = self._model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return found.float()


def open_transformers(folder: Path) -> Any:
    """A Hugging Face folder as transformers reads it, computing in fp32, with nothing fetched."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    for linear in model.modules():
        if hasattr(linear, "compute_dtype"):  # bitsandbytes' 4-bit linear, which computes in its folder's dtype otherwise
            linear.compute_dtype = linear.weight.quant_state.dtype = torch.float32
    return model


def read(job: Job, folder: Path) -> TransformersReader:
    """The base by transformers, the adapter by peft."""
    base = open_transformers(job.base.folder)
    from peft import PeftModel

    return TransformersReader(PeftModel.from_pretrained(base, folder))
