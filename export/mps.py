"""One folder for apps on Apple GPUs: the base in bitsandbytes' 4-bit layout, the adapter, the Metal source, a manifest.

    config.json, *.safetensors, tokenizer …   a Hugging Face folder like any other
    adapter/                                  a PEFT folder
    kernels/nf4.metal                         for apps that run the kernels without edgetune
    golden.json                               what the model must say, to prove it there
    manifest.json                             digests of all that, the kernels' arguments, the table of the 4-bit codes

`Session.load(folder, device="mps")` opens it with its adapter, and compiles the Metal source that edgetune was installed
with, never a folder's: a bundle is data.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export.job import Job, Written
from edgetune.export.memory import ExportMemory, StageMemory, reference_memory
from edgetune.export.targets import TargetSpec
from edgetune.export.verify import GOLDEN_FILE
from edgetune.runtime import adapter as adapters
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.backends.metal.contract import KERNELS
from edgetune.runtime.backends.metal.library import SOURCE
from edgetune.runtime.checkpoint import INDEX, open_model
from edgetune.runtime.config import QuantConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.files import atomic_write, sha256_file
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.model_folder import companions
from edgetune.runtime.nf4 import code_table
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.runner import Runner

MANIFEST, ADAPTER, KERNEL_FOLDER = "manifest.json", "adapter", "kernels"
NF4_BYTES = 9 / 16
"""For each number of a linear that was quantised on the way: its code, and an fp32 scale for 64 of them."""
_FORMAT = 1
_MAX_MANIFEST = 1 << 20


def peak_memory(job: Job) -> ExportMemory:
    """Both models are edgetune's own; one that is quantised on the way is in memory as a whole."""
    made = reference_memory(job)
    if job.base.quant is None:
        made = StageMemory(made.fixed + int(job.base.config.linear_parameters * NF4_BYTES))
    return ExportMemory([made], [reference_memory(job)])


def write(job: Job, folder: Path) -> Written:
    """The bundle. A base that is not 4-bit yet is quantised on the way, a tensor at a time."""
    if job.base.quant is None:
        quantize_folder(job.base.folder, folder / "base", progress=lambda done, total: job.progress("writing", done, total))
        for file in sorted((folder / "base").iterdir()):
            os.rename(file, folder / file.name)
        (folder / "base").rmdir()
    else:
        config, index = job.base.folder / "config.json", job.base.folder / INDEX
        files = [*job.base.files, *companions(job.base.folder), config, *([index] if index.is_file() else [])]
        done = job.counter("writing", len(files))
        for file in files:
            shutil.copyfile(file, folder / file.name)
            os.chmod(folder / file.name, 0o600)
            done(file.name)
    if job.adapter is not None:
        (folder / ADAPTER).mkdir(mode=0o700)
        adapters.write_files(replace(job.adapter, about={}), folder / ADAPTER, job.base_name)
    (folder / KERNEL_FOLDER).mkdir(mode=0o700)
    atomic_write(folder / KERNEL_FOLDER / SOURCE, kernel_source())
    atomic_write(folder / MANIFEST, json.dumps(_manifest(folder), indent=2) + "\n")
    told = "Checked on the CPU: that an Apple GPU computes the same can only be seen on one (edgetune doctor there)."
    return Written(notices=(told,))


def seal(folder: Path) -> None:
    """Put golden.json's digest beside the others."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["sha256"][GOLDEN_FILE] = sha256_file(folder / GOLDEN_FILE)
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def kernel_source() -> str:
    """The Metal source of this installation."""
    return resources.files("edgetune.runtime.backends.metal").joinpath(SOURCE).read_text(encoding="utf-8")


def _manifest(folder: Path) -> dict[str, Any]:
    base = open_model(folder)
    assert base.quant is not None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": _FORMAT,
        "base": base.digest,
        "weights": {"type": base.quant.quant_type, "block_size": base.quant.block_size, "nested": base.quant.double_quant},
        "code_values": code_table(base.quant.quant_type).tolist(),
        "adapter": ADAPTER if (folder / ADAPTER).is_dir() else None,
        "kernels": {
            kernel.name: {
                "arguments": [list(argument) for argument in kernel.arguments],
                "threadgroup": list(kernel.group_size),
            }
            for kernel in KERNELS
        },
        "sha256": {path.relative_to(folder).as_posix(): sha256_file(path) for path in files},
    }


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter of a bundle; None where the folder is no bundle, or one of a bare base.

    Raises AdapterError for a bundle of a newer edgetune, and for one whose adapter is not what its manifest says.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    try:
        if manifest.stat().st_size > _MAX_MANIFEST:
            raise ValueError("too large")
        found = json.loads(manifest.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"format", "base", "kernels"} <= found.keys():
            return None  # another program's
        if found["format"] != _FORMAT:
            raise AdapterError(f"{manifest} is of a newer edgetune (format {found['format']!r}); update edgetune.")
        if found["adapter"] is None:
            return None
        digests = {name: found["sha256"][f"{ADAPTER}/{name}"] for name in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE)}
        whole = all(sha256_file(folder / ADAPTER / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"The {MANIFEST} of {folder} is unusable; export the folder again.") from error
    if not whole:
        raise AdapterError(f"The adapter in {folder} is not the one its {MANIFEST} names; export the folder again.")
    return adapters.load(folder / ADAPTER)


@dataclass(frozen=True)
class BundleReader:
    """The bundle as edgetune opens it, on the CPU in fp32."""

    model: Llama

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """(N,) -> (N, V) f32."""
        return self.model.logits(Runner(self.model).read(ids)).float()


def reference(job: Job, folder: Path) -> Llama:
    """Base and adapter; a base that was quantised on the way in NF4."""
    return job.model(quant=QuantConfig() if job.base.quant is None else None)


def read(job: Job, folder: Path) -> BundleReader:
    """Open what was written, by this machine's own kernels."""
    model = load_llama(open_model(folder), torch.float32, layer_memory=job.layer_memory)
    adapter = read_adapter(folder)
    if adapter is not None:
        adapters.attach(model, adapter)
    return BundleReader(model)


SPEC = TargetSpec(
    name="mps",
    weights=("nf4",),
    proved_by="edgetune on the CPU",
    peak_memory=peak_memory,
    write=write,
    read=read,
    reference=reference,
    seal=seal,
)
