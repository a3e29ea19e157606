"""Export the adapter as a PEFT folder, for transformers with PEFT, vLLM and TGI; the base is named as on this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export.job import Job, Written, work_folder
from edgetune.export.memory import TORCH_BUILD_BYTES, ExportMemory, fp32_reader_memory, reference_memory
from edgetune.export.targets import TargetSpec
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import Checkpoint
from edgetune.runtime.config_keys import SUPPORTED
from edgetune.runtime.errors import ModelError
from edgetune.runtime.families import FAMILIES
from edgetune.runtime.files import atomic_write
from edgetune.runtime.fused import fused_weights
from edgetune.runtime.reader_files import FAST_CLASS, rebuilding_class
from edgetune.runtime.untrusted_file import copy_untrusted

_ALSO_PASSED_ON = ("architectures", "model_type", "torch_dtype", "dtype", "quantization_config", "pad_token_id")
"""Keys of config.json that transformers needs beside those that decide the logits."""
TRANSFORMERS_BYTES = 300_000_000 + TORCH_BUILD_BYTES
"""Anonymous memory in bytes of a process that has imported transformers. Measured: 265 MB."""
PEFT_BYTES = 50_000_000
"""Bytes that importing peft and bitsandbytes adds to that. Measured: 53 MB."""


def write(job: Job, folder: Path) -> Written:
    """Write adapter_config.json and adapter_model.safetensors.

    Raises ModelError for a family whose linears PEFT would adapt as one matrix.
    """
    if fused_weights(job.base.config):
        raise ModelError(
            f"PEFT adapts the linears that {job.base.config.model_type} models store as one matrix together, and edgetune each "
            "by itself; type `edgetune export hf` for the merged model."
        )
    peft_folder.write_files(replace(job.needed_adapter(), about={}), folder, job.base_name)
    notices: list[str] = []
    if "/" not in job.base_name:  # else a Hugging Face id, by which AutoPeftModel finds the base
        notices.append(
            f"PEFT cannot find a base named {job.base_name}: load the base from its folder, then the adapter onto it."
        )
    if (kind := rebuilding_class(job.base.folder)) is not None:
        notices.append(
            "transformers may split some texts otherwise than in training, because the base's tokenizer_config.json names the "
            f"class {kind}: open its tokenizer with {FAST_CLASS}.from_pretrained."
        )
    return Written(notices=tuple(notices))


class TransformersReader:
    """The Reader of a transformers model in fp32 on the CPU."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Run token ids (N,); return logits (N, V) f32."""
        logits: Tensor = self._model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits.float()


def open_transformers(folder: Path) -> Any:
    """Load a Hugging Face folder that edgetune wrote with transformers, to compute in fp32; nothing is downloaded.

    Two defaults must be overridden: transformers keeps the dense tensors of a 4-bit folder in 16 bits whatever dtype is asked
    for, and bitsandbytes rounds scales and activations to bf16 on CPUs with AVX-512 BF16.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    with quiet():
        from transformers import AutoModelForCausalLM

        # What the folder's config.json says about code and kernels is overruled: no other is imported or fetched.
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            use_safetensors=True,
        )
    for tensor in (*model.parameters(), *model.buffers()):
        packed = hasattr(tensor, "quant_state")  # codes, which bitsandbytes may store in bytes that count as bf16
        if tensor.is_floating_point() and not packed:
            tensor.data = tensor.data.float()
    for linear in model.modules():
        if hasattr(linear, "compute_dtype"):
            refuse_misread(linear.in_features, linear.weight.quant_state.blocksize)
            linear.compute_dtype, linear.compute_type_is_set = torch.float32, True
            linear.support_avx512bf16_for_cpu = False
    return model


@contextlib.contextmanager
def plain_base(base: Checkpoint, folder: Path) -> Iterator[Path]:
    """Yield a folder for other libraries to open the base from: its weights, and of config.json what decides the logits.

    A base can come from anybody. Its own folder could name code and kernels to load, or hold an adapter_config.json, by which
    transformers would open another model in its place.
    """
    with work_folder(folder) as place:
        passed_on = {*SUPPORTED, *FAMILIES[base.config.model_type].all_keys, *_ALSO_PASSED_ON}
        config = {key: value for key, value in base.hf_config.items() if key in passed_on}
        atomic_write(place / "config.json", json.dumps(config))
        for file, kind in base.weight_files:
            try:
                (place / file.name).symlink_to(file.resolve())
            except OSError:  # a system that does not let everybody make links
                copy_untrusted(file, kind, place / file.name)
        yield place


def refuse_misread(inputs: int, block_size: int) -> None:
    """Raise ModelError for linears that bitsandbytes computes wrongly on this CPU.

    Its AVX-512 code assumes that every row begins a block of the quantisation (seen in 0.50).
    """
    if inputs % block_size and torch.backends.cpu.get_cpu_capability() == "AVX512":
        raise ModelError(
            f"bitsandbytes computes wrong results on this CPU (AVX-512) for 4-bit linears whose number of inputs ({inputs}) is "
            f"not a multiple of their block size ({block_size}), so the export cannot be proved here; type --no-verify to "
            "write it unproved."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and advice, and bitsandbytes' log about downloadable kernels; errors still raise."""
    from transformers.utils import logging as transformers_log

    bitsandbytes_log = logging.getLogger("bitsandbytes")
    had_bars, verbosity = transformers_log.is_progress_bar_enabled(), transformers_log.get_verbosity()
    level = bitsandbytes_log.level
    bitsandbytes_log.setLevel(logging.ERROR)
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bitsandbytes_log.setLevel(level)
        transformers_log.set_verbosity(verbosity)
        if had_bars:
            transformers_log.enable_progress_bar()


def peak_memory(job: Job) -> ExportMemory:
    """Forecast the reference model and peft's; the adapter's own file is negligible beside them."""
    return ExportMemory([reference_memory(job)], [fp32_reader_memory(job, TRANSFORMERS_BYTES + PEFT_BYTES)])


def read(job: Job, folder: Path) -> TransformersReader:
    """Open the base with transformers and the adapter with peft."""
    with plain_base(job.base, folder) as place:
        base = open_transformers(place)
    with quiet():
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
