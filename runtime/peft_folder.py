"""Read and write adapters as PEFT folders.

A folder contains adapter_config.json, adapter_model.safetensors and edgetune.json, and PEFT opens it as it is. The tensors
are called `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` (r, in) and `.lora_B.weight` (out, r).
edgetune.json has the digest of the base model, the digests of the notes, the configuration and the metrics; no path, host
name or text of a note.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime.adapter import Adapter, check_shapes
from edgetune.runtime.config import LINEARS, LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError, UsageError
from edgetune.runtime.files import atomic_folder, atomic_write
from edgetune.runtime.json_file import read_object, read_object_if_there
from edgetune.runtime.module_patterns import patterns
from edgetune.runtime.names import hf_linear_name, layer_tensor
from edgetune.runtime.safetensors_file import DTYPE_NAMES, SafetensorsFile, write_tensors
from edgetune.runtime.untrusted_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MAX_CHECKED

CONFIG_FILE, WEIGHTS_FILE, EDGETUNE_FILE = "adapter_config.json", "adapter_model.safetensors", "edgetune.json"
_OWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, EDGETUNE_FILE)
_MOST_NAMED = 8
"""The most tensors that an error names for each fault. Chosen by hand."""
NO_LORA, NO_MATRIX, NOT_FINITE = "not LoRA of a LLaMA linear", "not a matrix", "inf or NaN"
UNNAMED = "not among target_modules, layers_to_transform and exclude_modules"
VOCABULARY = "LoRA or a copy of the embedding or the head, which edgetune does not adapt"
"""Faults that a tensor of an adapter can have in any file format, as errors name them."""
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight")
_VOCABULARY = re.compile(r".*\b(lm_head|embed_tokens|output|token_embd)\b.*")
"""Names of tensors that adapt the embedding or the head, by Hugging Face's names and llama.cpp's."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that are read; values of the others (integers, fp8) mean nothing without a scale."""
# PEFT's settings that change what an adapter computes, each with the only value that edgetune supports. Settings at that value
# are never written: a PEFT that is older than a setting does not open a file that has it.
_PLAIN: dict[str, Any] = {
    "bias": "none", "use_dora": False, "lora_bias": False, "modules_to_save": None, "trainable_token_indices": None,
    "layer_replication": None, "target_parameters": None, "alora_invocation_tokens": None, "use_qalora": False,
    "use_bdlora": None, "arrow_config": None, "kasa_config": None, "monteclora_config": None, "velora_config": None,
}  # fmt: skip
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
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "use_rslora": config.rslora, "inference_mode": True,
        "init_lora_weights": True, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, **_where(adapter),
    }  # fmt: skip
    named = {
        f"base_model.model.{layer_tensor(layer, hf_linear_name(name))}.lora_{part}.weight": tensor
        for (layer, name, part), tensor in sorted(adapter.tensors.items())
    }
    atomic_write(folder / CONFIG_FILE, json.dumps(peft, indent=2, sort_keys=True) + "\n")
    write_tensors(folder / WEIGHTS_FILE, named, {"format": "pt"})
    atomic_write(folder / EDGETUNE_FILE, json.dumps(adapter.about, indent=2, sort_keys=True) + "\n")


def _where(adapter: Adapter) -> dict[str, Any]:
    """Return the settings that tell PEFT which linears are adapted, and which of them have a rank or an alpha of their own."""
    linears, settings = adapter.linears, dict[str, Any]()
    layers, names = {layer for layer, _ in linears}, sorted({name for _, name in linears})
    if len(linears) == len(layers) * len(names):
        settings["target_modules"] = names
        settings["layers_to_transform"] = None if adapter.layers is None else sorted(layers)
    else:
        settings["target_modules"] = [_module(*linear) for linear in linears]
    own = {linear: adapter.config_of(*linear) for linear in linears}
    ranks = {_module(*linear): lora.rank for linear, lora in own.items() if lora.rank != adapter.config.rank}
    alphas = {_module(*linear): lora.alpha for linear, lora in own.items() if lora.alpha != adapter.config.alpha}
    return settings | ({"rank_pattern": ranks} if ranks else {}) | ({"alpha_pattern": alphas} if alphas else {})


def _module(layer: int, name: str) -> str:
    """Return the name that PEFT knows a linear by: (1, "q_proj") -> "model.layers.1.self_attn.q_proj"."""
    return layer_tensor(layer, hf_linear_name(name))


def refuse_foreign(folder: Path) -> None:
    """Raise AdapterError unless `folder` is missing, empty or an adapter's, so that no other files are ever replaced."""
    if not os.path.exists(folder):  # False also for a name that no file can have, where Path.exists raises
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
    _refuse_other_folder(folder)
    return _load_config(folder)[1]


def _refuse_other_folder(folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            f"No adapter at {folder}: {CONFIG_FILE} is missing. Name a PEFT folder, an mlx-lm folder or a .gguf file."
        )


def _load_config(folder: Path) -> tuple[dict[str, Any], Adapter]:
    peft = read_object(folder / CONFIG_FILE, ADAPTER_CONFIG)
    about = read_object_if_there(folder / EDGETUNE_FILE, ADAPTER_CONFIG)
    return peft, Adapter(_lora_config(peft, folder), {}, about, _layers(peft, folder))


def load(folder: Path, base: LlamaConfig | None = None) -> Adapter:
    """Read a PEFT folder, written by edgetune or by another program; the tensors say which linears are adapted.

    base: the model that the adapter is for, if it is known; then no tensor is read that does not fit it.
    Raises AdapterError for a folder that is not a PEFT folder, is damaged, or contains more than plain LoRA.
    """
    _refuse_other_folder(folder)
    peft, adapter = _load_config(folder)
    ranks = {adapter.config.rank, *map(int, _pattern(peft, "rank_pattern", folder).values())}

    def check(shapes: Shapes) -> None:
        unnamed = {linear for linear in {key[:2] for key in shapes} if not _is_named(peft, adapter.layers, *linear)}
        refuse_tensors(folder, {UNNAMED: [_module(*linear) for linear in sorted(unnamed)]} if unnamed else {})
        if base is not None:
            check_shapes(shapes, adapter.layers, base, ranks)

    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(
            f"The adapter at {folder} has no {WEIGHTS_FILE}; save it with safetensors (pickled .bin files are not opened)."
        )
    tensors = read_tensors(folder / WEIGHTS_FILE, _KEY, check)
    adapted = {name for _, name, _ in tensors}
    config = replace(adapter.config, targets=tuple(name for name in LINEARS if name in adapted))
    found = sorted({layer for layer, _, _ in tensors})
    layers = None if adapter.layers is None and found == list(range(len(found))) else tuple(found)
    return replace(adapter, config=config, tensors=tensors, layers=layers, alphas=_alphas(peft, tensors, config, folder))


Shapes = Mapping[tuple[int, str, str], tuple[int, ...]]
"""The shape of each matrix as its file holds it, by (layer, linear, "A" or "B")."""


def read_tensors(path: Path, key: re.Pattern[str], check: Callable[[Shapes], None]) -> dict[tuple[int, str, str], Tensor]:
    """Read the LoRA matrices of a safetensors file; return them in f32, by (layer, linear, "A" or "B").

    `key` matches the name of a tensor, with the number of the layer, the name of the linear, and a or b as its groups.
    `check` raises if the shapes are wrong; no matrix is read before. Raises AdapterError for a damaged file, and for one with
    other tensors, all of which the error names.
    """
    file = SafetensorsFile.open(path, ADAPTER_WEIGHTS)
    faults: defaultdict[str, list[str]] = defaultdict(list)
    names: dict[tuple[int, str, str], str] = {}
    for name, stored in file.tensors.items():
        match = key.fullmatch(name)
        if match is None or match[2] not in LINEARS or f".{hf_linear_name(match[2])}." not in name:
            faults[fault_of_name(name)].append(name)
        elif stored.dtype not in _FLOATS:
            faults[f"numbers of type {DTYPE_NAMES[stored.dtype]}"].append(name)
        elif len(stored.shape) != 2 or 0 in stored.shape:
            faults[NO_MATRIX].append(name)
        elif (where := (int(match[1]), match[2], match[3].upper())) in names:
            faults["given twice"].append(name)
        else:
            names[where] = name
    if names and not faults:
        check({where: file.tensors[name].shape for where, name in names.items()})
    tensors: dict[tuple[int, str, str], Tensor] = {}
    for where, name in names.items():
        if faults and math.prod(file.tensors[name].shape) > MAX_CHECKED:
            continue  # its shape was not checked
        tensors[where] = file.tensor(name).to(torch.float32, copy=True)
        file.release(name)
        if not torch.isfinite(tensors[where]).all():
            faults[NOT_FINITE].append(name)
        if faults:
            del tensors[where]
    refuse_tensors(path.parent, faults)
    if not tensors:
        raise AdapterError(f"The adapter at {path.parent} has no tensors; copy it again.")
    return tensors


def fault_of_name(name: str) -> str:
    """Return the fault of a tensor that is not LoRA of a linear, by its name in any file format."""
    return VOCABULARY if _VOCABULARY.fullmatch(name[:200]) else NO_LORA


def refuse_tensors(path: Path, faults: Mapping[str, Sequence[str]]) -> None:
    """Raise AdapterError if the tensors at `path` have faults; it names them. `faults`: the names of the tensors by fault."""
    if not faults:
        return
    named = []
    for what, names in faults.items():
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        named.append(f"{what}: {', '.join(repr(name[:80]) for name in names[:_MOST_NAMED])}{more}")
    advice = "" if set(faults) == {VOCABULARY} else "copy it again, or "
    raise AdapterError(
        f"The adapter at {path} contains tensors that edgetune cannot use ({'; '.join(named)}); expected finite matrices "
        f"lora_A and lora_B of linears only: {advice}train it on linears only."
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
    unsupported = [name for name, plain in _PLAIN.items() if peft.get(name) not in (plain, None, False, [], {})]
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
    names: tuple[str, ...] = LINEARS  # an expression can stand for any of them
    targets, excluded = peft.get("target_modules"), peft.get("exclude_modules")
    for setting, value in (("target_modules", targets), ("exclude_modules", excluded)):
        if not (value is None or isinstance(value, str) or _is_texts(value)):
            raise AdapterError(f"The adapter at {folder} has {setting} {reprlib.repr(value)}; expected names of linears.")
    if isinstance(targets, list):
        found = {target.rsplit(".", 1)[-1] for target in targets}
        names = tuple(name for name in LINEARS if name in found) or tuple(sorted(found))
    try:
        if not isinstance(peft.get("use_rslora"), bool | None):
            raise ValueError(f"use_rslora is {reprlib.repr(peft['use_rslora'])}, expected true or false")
        return LoraConfig(
            whole_number(peft["r"]),
            real_number(peft["lora_alpha"], "lora_alpha"),
            real_number(peft.get("lora_dropout") or 0.0, "lora_dropout"),
            names,
            bool(peft.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
        raise unusable(folder, error) from error


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_named(peft: dict[str, Any], layers: Sequence[int] | None, layer: int, name: str) -> bool:
    """Return True if PEFT would adapt this linear. It would not read the tensors of any other.

    Expressions of strangers are not run: where target_modules or exclude_modules is one, the tensors themselves say enough.
    """
    module = _module(layer, name)

    def among(names: list[str]) -> bool:
        return any(module == each or module.endswith(f".{each}") for each in names)

    targets, excluded = peft.get("target_modules"), peft.get("exclude_modules")
    named = not isinstance(targets, list) or (among(targets) and (layers is None or layer in layers))
    return named and not (isinstance(excluded, list) and among(excluded))


def _pattern(peft: dict[str, Any], setting: str, folder: Path) -> dict[str, float]:
    """Return PEFT's rank_pattern or alpha_pattern: numbers by module. Raises AdapterError for anything else."""
    found = peft.get(setting) or {}
    try:
        if not isinstance(found, dict):
            raise ValueError(f"{setting} is {reprlib.repr(found)}, expected an object")
        if setting == "rank_pattern":
            return {key: whole_number(value) for key, value in found.items()}
        return {key: real_number(value, setting) for key, value in found.items()}
    except (ValueError, OverflowError) as error:
        raise unusable(folder, error) from error


def _alphas(
    peft: dict[str, Any], tensors: Mapping[tuple[int, str, str], Tensor], usual: LoraConfig, folder: Path
) -> dict[tuple[int, str], float]:
    """Return the alpha of each linear to which alpha_pattern gives one of its own: the first key that matches its name."""
    found = _pattern(peft, "alpha_pattern", folder)
    try:
        known = patterns(found)
        alphas = {}
        for layer, name in {(layer, name) for layer, name, _ in tensors}:
            key = next((each.key for each in known if each.matches(_module(layer, name))), None)
            if key is not None and found[key] != usual.alpha:
                alphas[layer, name] = replace(usual, alpha=found[key]).alpha
    except ValueError as error:
        raise AdapterError(f"The adapter at {folder} has an alpha_pattern that edgetune does not read: {error}.") from error
    except UsageError as error:
        raise unusable(folder, error) from error
    return alphas


def unusable(folder: Path, error: Exception) -> AdapterError:
    """Return the error for a folder whose adapter_config.json lacks a value or has an invalid one, as `error` says."""
    fault = f"it has no {error}" if isinstance(error, KeyError) else str(error)[:300].rstrip(".")
    return AdapterError(f"The adapter_config.json at {folder} is unusable: {fault}; copy the adapter again.")


def whole_number(value: object) -> int:
    """Return a rank that was read from a file. Raises ValueError for anything but a whole number; int() would truncate it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"the rank is {str(value)[:40]!r}, expected a whole number")
    return int(value)


def real_number(value: object, name: str) -> float:
    """Return the number `name` that was read from a file. Raises ValueError for anything else, text and true included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected a number")
    return float(value)
