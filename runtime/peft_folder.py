"""Read and write adapters as PEFT folders.

A folder contains adapter_config.json, adapter_model.safetensors and edgetune.json, and PEFT opens it as it is. The tensors
are called `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` (r, in) and `.lora_B.weight` (out, r).
edgetune.json has the digest of the base model, the digests of the notes, the configuration and the metrics; no path, host
name or text of a note.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime.adapter import Adapter, may_fit
from edgetune.runtime.config import LINEARS, LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError, UsageError
from edgetune.runtime.files import atomic_folder, atomic_write
from edgetune.runtime.json_file import read_object, read_object_if_there
from edgetune.runtime.names import hf_linear_name, layer_tensor
from edgetune.runtime.safetensors_file import DTYPE_NAMES, SafetensorsFile, write_tensors
from edgetune.runtime.untrusted_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS

CONFIG_FILE, WEIGHTS_FILE, EDGETUNE_FILE = "adapter_config.json", "adapter_model.safetensors", "edgetune.json"
_OWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, EDGETUNE_FILE)
_MOST_NAMED = 8
"""The most tensors that an error names for each fault. Chosen by hand."""
NO_LORA, NO_MATRIX, NOT_FINITE = "not LoRA of a LLaMA linear", "not a matrix", "inf or NaN"
"""Faults that a tensor of an adapter can have in any file format, as errors name them."""
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that are read; values of the others (integers, fp8) mean nothing without a scale."""
# PEFT's settings that change what an adapter computes, each with the only value that edgetune supports.
_PLAIN = {
    "bias": "none", "fan_in_fan_out": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "trainable_token_indices": None, "lora_bias": False,
    "layer_replication": None, "exclude_modules": None, "target_parameters": None,
}  # fmt: skip
# Settings of newer PEFT versions and of special kinds of LoRA, which edgetune reads but never writes: an older PEFT does
# not open a file with a setting that it does not know. An adapter that uses one is refused.
_UNSUPPORTED = ("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""The values of init_lora_weights that leave the base model unchanged; pissa, olora, corda and loftq subtract from it."""


def save(adapter: Adapter, folder: Path, base_name: str) -> None:
    """Write `adapter` as a PEFT folder in one atomic step, private (folder 0700, files 0600); replace an adapter there.

    `base_name` is the base model's name for adapter_config.json. Raises AdapterError, and writes nothing, if `folder`
    contains anything else than an adapter.
    """
    refuse_foreign(folder)
    with atomic_folder(folder) as temporary:
        write_files(adapter, temporary, base_name)


def write_files(adapter: Adapter, folder: Path, base_name: str) -> None:
    """Write the three files of a PEFT folder into `folder`, each private (0600)."""
    config = adapter.config
    peft = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": config.rank,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": sorted(config.targets),
        "use_rslora": config.rslora, "inference_mode": True, "init_lora_weights": True, **_PLAIN,
        "layers_to_transform": None if adapter.layers is None else list(adapter.layers),
    }  # fmt: skip
    named = {
        f"base_model.model.{layer_tensor(layer, hf_linear_name(name))}.lora_{part}.weight": tensor
        for (layer, name, part), tensor in sorted(adapter.tensors.items())
    }
    atomic_write(folder / CONFIG_FILE, json.dumps(peft, indent=2, sort_keys=True) + "\n")
    write_tensors(folder / WEIGHTS_FILE, named, {"format": "pt"})
    atomic_write(folder / EDGETUNE_FILE, json.dumps(adapter.about, indent=2, sort_keys=True) + "\n")


def refuse_foreign(folder: Path) -> None:
    """Raise AdapterError unless `folder` is missing, empty or an adapter's, so that no other files are ever replaced."""
    if not folder.exists():
        return
    strangers = [folder] if not folder.is_dir() else [path for path in folder.iterdir() if path.name not in _OWN_FILES]
    if strangers:
        raise AdapterError(
            f"{folder} already exists and is not an edgetune adapter (it contains {strangers[0].name}); "
            "name another --out folder."
        )


def load_config(folder: Path) -> Adapter:
    """Read the configuration of a PEFT folder; return an Adapter without tensors.

    Raises AdapterError for a folder that is not a PEFT folder, or uses a setting that edgetune does not support.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            f"No adapter at {folder}: {CONFIG_FILE} is missing. Name a PEFT folder, an mlx-lm folder or a .gguf file."
        )
    peft = read_object(folder / CONFIG_FILE, ADAPTER_CONFIG)
    about = read_object_if_there(folder / EDGETUNE_FILE, ADAPTER_CONFIG)
    return Adapter(_lora_config(peft, folder), {}, about, _layers(peft, folder))


def load(folder: Path, base: LlamaConfig | None = None) -> Adapter:
    """Read a PEFT folder, written by edgetune or by another program. `base`: as in `read_tensors`.

    Raises AdapterError for a folder that is not a PEFT folder, is damaged, or contains more than plain LoRA.
    """
    adapter = load_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(
            f"The adapter at {folder} has no {WEIGHTS_FILE}; save it with safetensors (pickled .bin files are not opened)."
        )
    return replace(adapter, tensors=read_tensors(folder / WEIGHTS_FILE, _KEY, base))


def read_tensors(
    path: Path, key: re.Pattern[str], base: LlamaConfig | None = None, transposed: bool = False
) -> dict[tuple[int, str, str], Tensor]:
    """Read the LoRA matrices of a safetensors file; return them in f32, by (layer, linear, "A" or "B").

    `key` matches the name of a tensor, with the number of the layer, the name of the linear, and a or b as its groups. A
    matrix that cannot fit `base` is not read: its tensor is on the meta device, for check_fits to name with all others.
    `transposed`: the file stores A as (in, r) and B as (r, out), and so they are returned.
    Raises AdapterError for a damaged file, and for one with other tensors, all of which the error names.
    """
    file = SafetensorsFile.open(path, ADAPTER_WEIGHTS)
    tensors: dict[tuple[int, str, str], Tensor] = {}
    faults: defaultdict[str, list[str]] = defaultdict(list)
    for name, stored in file.tensors.items():
        match = key.fullmatch(name)
        if match is None or match[2] not in LINEARS or f".{hf_linear_name(match[2])}." not in name:
            faults[NO_LORA].append(name)
        elif stored.dtype not in _FLOATS:
            faults[f"numbers of type {DTYPE_NAMES[stored.dtype]}"].append(name)
        elif len(stored.shape) != 2:
            faults[NO_MATRIX].append(name)
        elif (where := (int(match[1]), match[2], match[3].upper())) in tensors:
            faults["given twice"].append(name)
        elif base is not None and not may_fit(stored.shape[:: -1 if transposed else 1], *where, base):
            tensors[where] = torch.empty(stored.shape, device="meta")
        else:
            tensors[where] = file.tensor(name).to(torch.float32, copy=True)
            file.release(name)
            if not torch.isfinite(tensors[where]).all():
                faults[NOT_FINITE].append(name)
    refuse_tensors(path.parent, faults)
    if not tensors:
        raise AdapterError(f"The adapter at {path.parent} has no tensors; copy it again.")
    return tensors


def refuse_tensors(path: Path, faults: Mapping[str, Sequence[str]]) -> None:
    """Raise AdapterError if the tensors at `path` have faults; it names them. `faults`: the names of the tensors by fault."""
    if not faults:
        return
    named = []
    for what, names in faults.items():
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        named.append(f"{what}: {', '.join(repr(name[:80]) for name in names[:_MOST_NAMED])}{more}")
    raise AdapterError(
        f"The adapter at {path} contains tensors that edgetune cannot use ({'; '.join(named)}); expected finite matrices "
        "lora_A and lora_B of linears only: copy it again, or train it on linears only."
    )


def _layers(peft: dict[str, Any], folder: Path) -> tuple[int, ...] | None:
    """Return the layers in PEFT's layers_to_transform (a number, a list, or null for all), ascending; None for all."""
    found = peft.get("layers_to_transform")
    if found is None or found == []:
        return None
    layers = found if isinstance(found, list) else [found]
    if not all(type(layer) is int and 0 <= layer < 2**20 for layer in layers) or len(set(layers)) < len(layers):
        raise AdapterError(
            f"The adapter at {folder} has layers_to_transform {reprlib.repr(found)}; expected the numbers of layers, each once."
        )
    return tuple(sorted(layers))


def _lora_config(peft: dict[str, Any], folder: Path) -> LoraConfig:
    """Return the settings in adapter_config.json. Raises AdapterError for those that edgetune does not support."""
    if peft.get("peft_type") != "LORA":
        raise AdapterError(f"The adapter at {folder} is of type {reprlib.repr(peft.get('peft_type'))}; expected LORA.")
    unsupported = [name for name, plain in _PLAIN.items() if peft.get(name) not in (plain, None, [], {})]
    unsupported += [name for name in _UNSUPPORTED if peft.get(name) not in (None, False, [], {})]
    if unsupported:
        raise AdapterError(
            f"The adapter at {folder} uses {', '.join(unsupported)}, which edgetune does not support; expected plain LoRA."
        )
    start = peft.get("init_lora_weights")
    if start not in _HARMLESS_INITS:
        raise AdapterError(
            f"The adapter at {folder} has init_lora_weights {reprlib.repr(start)}, which changes the base model; expected "
            "plain LoRA, as PEFT's save_pretrained writes it with path_initial_model_for_weight_conversion."
        )
    targets = peft.get("target_modules")
    if not isinstance(targets, list):
        raise AdapterError(f"The adapter at {folder} has target_modules {reprlib.repr(targets)}; expected a list of linears.")
    found = {str(target).rsplit(".", 1)[-1] for target in targets}
    names = (*(name for name in LINEARS if name in found), *sorted(found - set(LINEARS)))
    try:
        return LoraConfig(
            whole_number(peft["r"]),
            float(peft["lora_alpha"]),
            float(peft.get("lora_dropout") or 0.0),
            names,
            bool(peft.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
        raise unusable(folder, error) from error


def unusable(folder: Path, error: Exception) -> AdapterError:
    """Return the error for a folder whose adapter_config.json lacks a value or has an invalid one, as `error` says."""
    fault = f"it has no {error}" if isinstance(error, KeyError) else str(error)[:300].rstrip(".")
    return AdapterError(f"The adapter_config.json at {folder} is unusable: {fault}; copy the adapter again.")


def whole_number(value: object) -> int:
    """Return a rank that was read from a file. Raises ValueError for anything but a whole number; int() would truncate it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"the rank is {str(value)[:40]!r}, expected a whole number")
    return int(value)
