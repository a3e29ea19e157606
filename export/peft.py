"""The adapter for transformers with PEFT, vLLM and TGI: a PEFT folder, the base named as it is on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export.job import Job, Written
from edgetune.export.memory import ExportMemory, fp32_reader_memory, reference_memory
from edgetune.export.targets import TargetSpec
from edgetune.runtime import adapter as adapters
from edgetune.runtime.errors import ModelError

TRANSFORMERS_BYTES, PEFT_BYTES = 300_000_000, 50_000_000
"""Anonymous memory of a process with transformers in it, and what peft and bitsandbytes add (measured: 265 and 53 MB)."""


def write(job: Job, folder: Path) -> Written:
    """adapter_config.json and adapter_model.safetensors."""
    adapters.write_files(replace(job.needed_adapter(), about={}), folder, job.base_name)
    if "/" in job.base_name:  # an id that AutoPeftModel finds
        return Written()
    told = f"PEFT finds no base by the name {job.base_name}: open the base's folder, and the adapter over it."
    return Written(notices=(told,))


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
    """A Hugging Face folder as transformers reads it, computing in fp32, with nothing fetched.

    transformers keeps the dense tensors of a 4-bit folder in its 16 bits whatever dtype is asked for, and bitsandbytes
    rounds scales and activations to bf16 where the CPU has AVX-512 BF16: both are told not to.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    with _quiet():
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for linear in model.modules():
        if hasattr(linear, "compute_dtype"):
            _refuse_misread(linear.in_features, linear.weight.quant_state.blocksize)
            linear.compute_dtype, linear.compute_type_is_set = torch.float32, True
            linear.support_avx512bf16_for_cpu = False
    return model


def _refuse_misread(inputs: int, block_size: int) -> None:
    """bitsandbytes' AVX-512 code takes every row to begin a block (seen in 0.50): its answers are wrong where none does."""
    if inputs % block_size and torch.backends.cpu.get_cpu_capability() == "AVX512":
        raise ModelError(
            f"bitsandbytes misreads 4-bit linears of {inputs} inputs, no multiple of their {block_size} a block, on this CPU "
            "(AVX-512), so that the export cannot be proved here; type --no-verify to write it unproved."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars and advice, and what bitsandbytes says of kernels that it would fetch; errors still rise."""
    from transformers.utils import logging as advice

    kernels, bars, level = logging.getLogger("bitsandbytes"), advice.is_progress_bar_enabled(), advice.get_verbosity()
    before = kernels.level
    kernels.setLevel(logging.ERROR)
    advice.set_verbosity_error()
    advice.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        kernels.setLevel(before)
        advice.set_verbosity(level)
        if bars:
            advice.enable_progress_bar()


def peak_memory(job: Job) -> ExportMemory:
    """The adapter's file is as nothing beside the model that it is compared with."""
    return ExportMemory([reference_memory(job)], [fp32_reader_memory(job, TRANSFORMERS_BYTES + PEFT_BYTES)])


def read(job: Job, folder: Path) -> TransformersReader:
    """The base by transformers, the adapter by peft."""
    base = open_transformers(job.base.folder)
    with _quiet():
        from peft import PeftModel

        return TransformersReader(PeftModel.from_pretrained(base, folder))


SPEC = TargetSpec(
    name="peft",
    weights=("",),
    proved_by="peft in fp32",
    packages=("peft", "transformers", "accelerate", "bitsandbytes"),
    extra="peft",
    peak_memory=peak_memory,
    write=write,
    read=read,
)
