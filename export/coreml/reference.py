"""Build the engine's own model of the weights that a package stores: the model with which the package has to agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgetune.export.coreml.contents import ADAPTER_ALONE, Contents, contents_of
from edgetune.export.job import Job, work_folder
from edgetune.runtime import adapter as adapters
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.model_folder import write_model
from edgetune.runtime.names import is_linear
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.safetensors_file import TensorSpec


def stored_model(job: Job, folder: Path) -> Llama:
    """Return the engine's model, with the weights as they are stored where the package rounds them again.

    The weights are not read from the package: they are made a second time from the base. folder: may hold the model's files
    until it is open.
    """
    contents = contents_of(job)
    if contents.requantizes:
        config = {key: value for key, value in job.base.hf_config.items() if key != "quantization_config"}
        model = _through_files(job, folder, lambda made: write_model(job.base.folder, made, config, _StoredRecipe(contents)))
    else:
        model = bare_model(job, folder)
    if job.adapter is not None and not (contents.merges and contents.requantizes):
        adapters.attach(model, job.adapter)
    return model


@dataclass(frozen=True)
class _StoredRecipe:
    """A Recipe (model_folder.py) for a model folder with the weights as the package stores them, in fp16, and the base's own
    other tensors."""

    contents: Contents

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.contents.merged.shapes

    def specs(self, name: str) -> list[TensorSpec]:
        dtype = torch.float16 if is_linear(name) else self.contents.job.base.dense(name).dtype
        return [TensorSpec(name, dtype, self.shapes[name])]

    def tensors(self, name: str) -> dict[str, Tensor]:
        if not is_linear(name):
            return {name: self.contents.job.base.dense(name)}
        return {name: torch.from_numpy(self.contents.weight(name).values())}

    def release(self, name: str) -> None:
        self.contents.job.base.release(name)


def bare_model(job: Job, folder: Path) -> Llama:
    """Return the base in fp32, without an adapter.

    A dense base is quantised to NF4, as it was while the adapter was trained, if it is exported as NF4, or if the adapter is
    exported alone for such a package.
    """
    quant = QuantConfig() if job.weights in ("nf4", ADAPTER_ALONE) and job.base.quant is None else None
    if quant is not None and job.layer_memory is not None:
        return _through_files(job, folder, lambda made: quantize_folder(job.base.folder, made))
    return load_llama(job.base, torch.float32, quant=quant, layer_memory=None if quant is not None else job.layer_memory)


def _through_files(job: Job, folder: Path, write: Callable[[Path], object]) -> Llama:
    """Open, in fp32, the model that `write` writes into a folder; its layers are streamed where memory is short.

    The files are unlinked once the model is open: they disappear with it.
    """
    with work_folder(folder) as place:
        written = place / "model"
        written.mkdir(mode=0o700)
        write(written)
        return load_llama(open_model(written), torch.float32, layer_memory=job.layer_memory)
