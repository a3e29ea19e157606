"""Export one folder (a bundle) for apps on Apple GPUs: the base in bitsandbytes' 4-bit layout, the adapter, and Metal kernels.

    config.json, *.safetensors, tokenizer …   an ordinary Hugging Face folder
    adapter/                                  a PEFT folder
    kernels/nf4.metal                         for apps that run the kernels without edgetune
    golden.json                               the expected logits, to repeat the proof on the device
    manifest.json                             digests of all files, the kernels' arguments, the table of the 4-bit codes

`Session.load(folder, device="mps")` opens it with its adapter. It compiles the Metal source that edgetune was installed with,
never the one in a folder: a bundle is data, not code.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping, Sequence
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
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.backends.metal.contract import KERNELS
from edgetune.runtime.backends.metal.library import SOURCE
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LlamaConfig, QuantConfig
from edgetune.runtime.errors import AdapterError, ModelError
from edgetune.runtime.files import atomic_write, sha256_file
from edgetune.runtime.json_file import read_object, read_value
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import Llama
from edgetune.runtime.model_folder import write_settings
from edgetune.runtime.nf4 import code_table
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.runner import Runner
from edgetune.runtime.untrusted_file import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BUNDLE_MANIFEST,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    FileKind,
    copy_untrusted,
    sha256_untrusted,
)

MANIFEST, ADAPTER, KERNEL_FOLDER = "manifest.json", "adapter", "kernels"
"""Names of the bundle's own file and folders."""
NF4_BYTES = 9 / 16
"""Bytes per weight of a linear in NF4: half a byte for the code, and an fp32 scale for every 64 weights."""
_FORMAT = 1
"""Version of the manifest's format."""


def peak_memory(job: Job) -> ExportMemory:
    """Forecast edgetune's own model twice: as reference, and as reader. A base that is quantised here is not streamed."""
    reference = reference_memory(job)
    if job.base.quant is None:
        reference = StageMemory(reference.fixed + int(job.base.config.linear_parameters * NF4_BYTES))
    return ExportMemory([reference], [reference_memory(job)])


def write(job: Job, folder: Path) -> Written:
    """Write the bundle. A base that is not 4-bit yet is quantised a tensor at a time."""
    if job.base.quant is None:
        _quantize_base(job, folder)
    else:
        _copy_base(job, folder)
    if job.adapter is not None:
        (folder / ADAPTER).mkdir(mode=0o700)
        peft_folder.write_files(replace(job.adapter, about={}), folder / ADAPTER, job.base_name)
    (folder / KERNEL_FOLDER).mkdir(mode=0o700)
    atomic_write(folder / KERNEL_FOLDER / SOURCE, kernel_source())
    atomic_write(folder / MANIFEST, json.dumps(_manifest(folder), indent=2) + "\n")
    notice = "Proved on the CPU only. To check that your Apple GPU computes the same, run edgetune doctor on that Mac."
    return Written(notices=(notice,))


def _quantize_base(job: Job, folder: Path) -> None:
    """Quantise the base into a folder of its own, then move its files up into the bundle."""
    quantize_folder(job.base.folder, folder / "base", progress=lambda done, total: job.progress("writing", done, total))
    for file in sorted((folder / "base").iterdir()):
        os.rename(file, folder / file.name)
    (folder / "base").rmdir()


def _copy_base(job: Job, folder: Path) -> None:
    """Copy the files of a 4-bit base into the bundle, readable by their owner only."""
    files = job.base.weight_files
    done = job.counter("writing", len(files))
    for file, kind in files:
        copy_untrusted(file, kind, folder / file.name)
        done(file.name)
    write_settings(job.base.folder, folder, job.base.hf_config)


def seal(folder: Path) -> None:
    """Add golden.json's digest to the manifest, once that file exists."""
    manifest = read_object(folder / MANIFEST, BUNDLE_MANIFEST)
    manifest["sha256"][GOLDEN_FILE] = sha256_file(folder / GOLDEN_FILE)
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def kernel_source() -> str:
    """Return the Metal source of this installation."""
    return resources.files("edgetune.runtime.backends.metal").joinpath(SOURCE).read_text(encoding="utf-8")


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the content of manifest.json for the files that are in the folder."""
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


def read_adapter(folder: Path, base: LlamaConfig | None = None) -> Adapter | None:
    """Load the adapter of a bundle; return None if the folder is not a bundle or contains no adapter.

    base: as in peft_folder.load.
    Raises AdapterError for a bundle of a newer edgetune, and if the adapter's digests differ from those in the manifest.
    """
    found = _read_manifest(folder)
    if found is None or found.get("adapter") is None:
        return None
    files = {peft_folder.CONFIG_FILE: ADAPTER_CONFIG, peft_folder.WEIGHTS_FILE: ADAPTER_WEIGHTS}
    if _changed(folder, found, {f"{ADAPTER}/{name}": kind for name, kind in files.items()}):
        raise AdapterError(f"The adapter in {folder} differs from the one in its {MANIFEST}; export the folder again.")
    return peft_folder.load(folder / ADAPTER, base)


def check_base(folder: Path) -> None:
    """Raise ModelError if the base of a bundle differs from the one that was exported; any other folder is left alone.

    Every byte is read. An app that runs the kernels without edgetune can do the same with the manifest's digests.
    """
    found = _read_manifest(folder)
    if found is None:
        return
    files = {path.name: MODEL_WEIGHTS for path in sorted(folder.glob("*.safetensors"))}
    if changed := _changed(folder, found, {"config.json": MODEL_CONFIG, **files}):
        raise ModelError(
            f"{changed[0]} in {folder} differs from the one in its {MANIFEST}, so it is not the model that was exported; "
            "copy or export the folder again."
        )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a bundle's manifest; None for a folder that is not a bundle. Raises AdapterError for one of a newer edgetune."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    found = read_value(manifest, BUNDLE_MANIFEST)
    if not isinstance(found, dict) or not {"format", "base", "kernels"} <= found.keys():
        return None  # a manifest.json of another program
    if found["format"] != _FORMAT:
        shown = reprlib.repr(found["format"])
        raise AdapterError(f"{manifest} was written by a newer edgetune (format {shown}); update edgetune.")
    if not isinstance(found.get("sha256"), dict):
        raise AdapterError(f"The {MANIFEST} in {folder} cannot be read; export the folder again.")
    return found


def _changed(folder: Path, manifest: dict[str, Any], files: Mapping[str, FileKind]) -> list[str]:
    """Return the named files whose bytes differ from the manifest's digests. Raises the kind's error for a missing file."""
    return [name for name, kind in files.items() if sha256_untrusted(folder / name, kind) != manifest["sha256"].get(name)]


@dataclass(frozen=True)
class BundleReader:
    """The Reader of a bundle: edgetune's own model, on the CPU in fp32."""

    model: Llama

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Run token ids (N,); return logits (N, V) f32."""
        return self.model.logits(Runner(self.model).read(ids)).float()


def reference(job: Job, folder: Path) -> Llama:
    """Load base and adapter; a base that the export quantised is loaded in NF4."""
    return job.model(quant=QuantConfig() if job.base.quant is None else None)


def read(job: Job, folder: Path) -> BundleReader:
    """Open the bundle with this machine's own kernels."""
    model = load_llama(open_model(folder), torch.float32, layer_memory=job.layer_memory)
    adapter = read_adapter(folder, job.base.config)
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
