"""Find the config.json and the files of weights of a Hugging Face model folder, and say what is missing among them."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

from edgetune.runtime.errors import ModelError
from edgetune.runtime.json_file import read_object
from edgetune.runtime.safetensors_file import SafetensorsFile
from edgetune.runtime.untrusted_file import MAX_SHARDS, MODEL_CONFIG, WEIGHT_INDEX

WEIGHTS = "model.safetensors"
"""Name of the file of a model whose weights lie in one."""
INDEX = "model.safetensors.index.json"
"""Name of the file that says which file holds which tensor, where there are several."""
MOST_SHOWN = 12
"""Most faults that one message names. Chosen by hand."""
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


def index_faults(files: list[SafetensorsFile], promised: dict[str, str]) -> list[str]:
    """Return the faults of the index: tensors that it names and its files lack, or that stand in two files."""
    holders: dict[str, list[str]] = {}
    for file in files:
        for name in file.tensors:
            holders.setdefault(name, []).append(file.path.name)
    faults = [f"{name} is stored in several files: {', '.join(found[:3])}" for name, found in holders.items() if len(found) > 1]
    lost = [f"{name} is not in {file}" for name, file in promised.items() if file not in holders.get(name, [])]
    return faults + lost


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises ModelError if there is none, or if it says that edgetune cannot read the weights."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} is an adapter, not a model; type `--adapter {folder}` and name its base model with `--model`."
            )
        raise ModelError(f"{folder} has no config.json; expected a Hugging Face model folder (`edgetune models` lists them).")
    config = read_object(folder / "config.json", MODEL_CONFIG)
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ModelError(
            f"{folder} has quantization_config {reprlib.repr(quantization)}, expected an object; copy the model folder again."
        )
    if quantization:
        method = quantization.get("quant_method", "bitsandbytes")
        if method != "bitsandbytes" or quantization.get("load_in_8bit"):
            kind = "bitsandbytes 8-bit" if method == "bitsandbytes" else str(method)[:40]
            raise ModelError(
                f"{folder} is quantised with {kind}; edgetune reads bitsandbytes 4-bit, bf16, fp16 and fp32: "
                "use the model's unquantised folder."
            )
        if quantization.get("bnb_4bit_quant_type", "nf4") == "fp4":
            raise ModelError(
                f"{folder} is quantised to FP4 and edgetune runs NF4; type `edgetune quantize SRC DEST` on its "
                "unquantised folder."
            )
    return config


def find_weights(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the safetensors files of a folder, and its index: {tensor: file name}, or {} for a single file."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], {}
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    promised = read_object(folder / INDEX, WEIGHT_INDEX).get("weight_map")
    if not isinstance(promised, dict) or not promised or not all(isinstance(file, str) for file in promised.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map; copy it again.")
    names = sorted(set(promised.values()))
    outside = [name for name in names if not re.fullmatch(r"(?!\.)[\w.,+-]{1,200}\.safetensors", name, re.ASCII)]
    if outside:
        raise ModelError(f"{folder / INDEX} names {outside[0][:200]!r}; expected safetensors files of its own folder.")
    if len(names) > MAX_SHARDS:
        raise ModelError(f"{folder / INDEX} names {len(names):,} files of weights; expected at most {MAX_SHARDS}.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files ({', '.join(missing[:MOST_SHOWN])}); "
            "copy or download them again."
        )
    return [folder / name for name in names], promised


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not pickles:
        return ModelError(f"{folder} has a config.json but no {WEIGHTS}; copy or download the folder again.")
    return ModelError(
        f"{folder} holds pickled weights ({pickles[0]}), which can run code when opened; if you trust them, convert "
        'once: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained({str(folder) + '-safetensors'!r})\""
    )
