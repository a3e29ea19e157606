"""LoRA adapters on a model and on disk, in PEFT's layout.

On disk: adapter_config.json, adapter_model.safetensors with `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`
(r, in) and `.lora_B.weight` (out, r), and edgetune.json (base digest, data digests, configuration, metrics; no path, host
name or note text). PEFT opens such a folder as it is.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from edgetune.runtime.config import LINEARS, LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError, UsageError
from edgetune.runtime.files import atomic_folder, atomic_write
from edgetune.runtime.linear import Linear, LoraLinear
from edgetune.runtime.model import Llama, hf_linear_name
from edgetune.runtime.safetensors_file import write_tensors

CONFIG_FILE, WEIGHTS_FILE, EDGETUNE_FILE = "adapter_config.json", "adapter_model.safetensors", "edgetune.json"
_OWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, EDGETUNE_FILE)
_MAX_JSON = 8 << 20
_MOST_NAMED = 8
NO_LORA, NO_MATRIX, NOT_FINITE = "no LoRA of a LLaMA linear", "no matrix", "inf or NaN"
"""What can be wrong with a tensor of an adapter's file, whatever its format."""
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; others are codes that need a scale
# What PEFT writes that changes the function computed, with the only value that we honour.
_PLAIN = {
    "bias": "none", "fan_in_fan_out": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "trainable_token_indices": None, "lora_bias": False,
    "layer_replication": None, "exclude_modules": None, "target_parameters": None,
}  # fmt: skip
# The same of newer versions and of kinds of LoRA, written by them alone: older versions do not open what they do not know.
_BEYOND = ("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")
_INITS_BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's init_lora_weights that leave the base as it is; pissa, olora, corda and loftq take a part of its weights away."""


@dataclass(frozen=True)
class Adapter:
    """An adapter apart from any model. `tensors[layer, linear, "A" | "B"]` are f32; `about` is edgetune.json."""

    config: LoraConfig
    tensors: dict[tuple[int, str, str], Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    """The layers that it is on, ascending; None for all."""


def attach_new(model: Llama, config: LoraConfig, seed: int) -> None:
    """Put a fresh adapter on every target linear: A random from `seed`, B zero, so that nothing changes yet."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for name in config.targets:
            base = _bare(getattr(block, name))
            setattr(block, name, LoraLinear.from_base(base, config, generator))


def attach(model: Llama, adapter: Adapter) -> None:
    """Put a stored adapter on the model, replacing any that is there.

    Raises AdapterError that names every tensor which does not fit, and leaves the model as it was.
    """
    check_fits(adapter, model.config)
    linears = {
        (layer, name): _bare(module) for layer, block in enumerate(model.blocks) for name, module in block.linears().items()
    }
    detach(model)
    for layer, name in sorted({key[:2] for key in adapter.tensors}):
        a, b = (adapter.tensors[layer, name, part].to(model.device, torch.float32).clone() for part in "AB")
        adapted = LoraLinear(linears[layer, name], a, b, adapter.config.scale, adapter.config.dropout)
        setattr(model.blocks[layer], name, adapted)


def check_fits(adapter: Adapter, model: LlamaConfig) -> None:
    """Raise AdapterError, naming everything that does not fit, for an adapter that was made for another shape of model."""
    config, shapes = adapter.config, model.linear_shapes()
    layers = set(range(model.num_layers) if adapter.layers is None else adapter.layers)
    wanted = {(layer, name) for layer in layers & set(range(model.num_layers)) for name in config.targets}
    found = {(layer, name) for layer, name, _ in adapter.tensors}
    wrong: dict[tuple[str, str], list[int]] = {}  # linear, what is wrong -> layers
    for layer, name in sorted(found):
        a, b = (adapter.tensors.get((layer, name, part)) for part in "AB")
        rows, columns = shapes[name]
        expected = (config.rank, columns), (rows, config.rank)
        if layer >= model.num_layers:
            layers.add(layer)
            continue
        if a is None or b is None:
            said = f"lora_{'A' if a is None else 'B'} is missing"
        elif (a.shape, b.shape) != expected:
            said = f"lora_A is {tuple(a.shape)} and lora_B {tuple(b.shape)}, expected {expected[0]} and {expected[1]}"
        elif (layer, name) not in wanted:
            said = "adapter_config.json does not name it"
        else:
            continue
        wrong.setdefault((name, said), []).append(layer)
    for layer, name in sorted(wanted - found):
        wrong.setdefault((name, "no tensors"), []).append(layer)
    beyond = sorted(layer for layer in layers if layer >= model.num_layers)
    problems = [f"the model has no {_named(beyond)}"] if beyond else []
    problems += [f"{_named(where)} {name}: {said}" for (name, said), where in wrong.items()]
    if problems:
        raise AdapterError(
            f"The adapter does not fit this model: {'; '.join(problems)}; if it was made for another base, name that with "
            "--model, else copy the adapter again."
        )


def _named(layers: list[int]) -> str:
    """Ascending numbers as "layer 3" or "layers 0-7, 9": a mismatch is most often every layer's."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    spelt = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {spelt}"


def detach(model: Llama) -> None:
    """Leave the bare base."""
    for block in model.blocks:
        for name, linear in block.linears().items():
            setattr(block, name, _bare(linear))


def live_tensors(model: Llama) -> dict[tuple[int, str, str], Tensor]:
    """The model's adapter itself, by (layer, linear, "A" or "B"): writing to one changes the model."""
    return {
        (layer, name, part): getattr(linear, f"lora_{part}").detach()
        for layer, block in enumerate(model.blocks)
        for name, linear in block.linears().items()
        if isinstance(linear, LoraLinear)
        for part in "AB"
    }


def copy_into(model: Llama, adapter: Adapter) -> None:
    """Give the model's adapter the values of one of the same shape; what holds its tensors keeps them."""
    for key, tensor in live_tensors(model).items():
        tensor.copy_(adapter.tensors[key])


def snapshot(model: Llama, config: LoraConfig, about: dict[str, Any] | None = None) -> Adapter:
    """The model's adapter as it stands now, copied: for whoever goes on training. `live_tensors` copies nothing."""
    copies = {key: tensor.cpu().clone() for key, tensor in live_tensors(model).items()}
    layers = tuple(sorted({layer for layer, _, _ in copies}))
    return Adapter(config, copies, about or {}, None if len(layers) == len(model.blocks) else layers)


def parameters(model: Llama) -> list[torch.nn.Parameter]:
    """The trained tensors, lora_A and lora_B of each linear in layer order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save(adapter: Adapter, folder: Path, base_name: str) -> None:
    """Write `adapter` as a PEFT folder, atomically and private (0700, files 0600); an adapter there is replaced.

    Raises AdapterError, and writes nothing, where `folder` holds anything else.
    """
    refuse_foreign(folder)
    with atomic_folder(folder) as temporary:
        write_files(adapter, temporary, base_name)


def write_files(adapter: Adapter, folder: Path, base_name: str) -> None:
    """Write the files of a PEFT folder into `folder`, each of them private (0600)."""
    config = adapter.config
    peft = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": config.rank,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": sorted(config.targets),
        "use_rslora": config.rslora, "inference_mode": True, "init_lora_weights": True, **_PLAIN,
        "layers_to_transform": None if adapter.layers is None else list(adapter.layers),
    }  # fmt: skip
    named = {
        f"base_model.model.model.layers.{layer}.{hf_linear_name(name)}.lora_{part}.weight": tensor
        for (layer, name, part), tensor in sorted(adapter.tensors.items())
    }
    atomic_write(folder / CONFIG_FILE, json.dumps(peft, indent=2, sort_keys=True) + "\n")
    write_tensors(folder / WEIGHTS_FILE, named, {"format": "pt"})
    atomic_write(folder / EDGETUNE_FILE, json.dumps(adapter.about, indent=2, sort_keys=True) + "\n")


def refuse_foreign(folder: Path) -> None:
    """Raise AdapterError unless `folder` is free, empty, or an adapter: nobody's files are ever replaced by one."""
    if not folder.exists():
        return
    strangers = [folder] if not folder.is_dir() else [path for path in folder.iterdir() if path.name not in _OWN_FILES]
    if strangers:
        raise AdapterError(
            f"{folder} is there already and is no adapter of edgetune's (found {strangers[0].name}); name another --out folder."
        )


def load_config(folder: Path) -> Adapter:
    """What a PEFT LoRA folder says of itself: an Adapter without its tensors.

    Raises AdapterError for a folder that is none, or uses what edgetune does not honour.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            f"No adapter at {folder}: found no {CONFIG_FILE}, expected a PEFT or mlx-lm folder or a .gguf file; name one."
        )
    peft = read_json(folder / CONFIG_FILE)
    about = read_json(folder / EDGETUNE_FILE) if (folder / EDGETUNE_FILE).is_file() else {}
    return Adapter(_lora_config(peft, folder), {}, about, _layers(peft, folder))


def load(folder: Path) -> Adapter:
    """Read a PEFT LoRA folder, whoever wrote it.

    Raises AdapterError for a folder that is none, is damaged, or holds what LoRA alone cannot express.
    """
    adapter = load_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(
            f"The adapter at {folder} has no {WEIGHTS_FILE}; save it with safetensors (pickled .bin files are not opened)."
        )
    return replace(adapter, tensors=read_tensors(folder / WEIGHTS_FILE, _KEY))


def read_tensors(path: Path, key: re.Pattern[str]) -> dict[tuple[int, str, str], Tensor]:
    """The LoRA matrices of a safetensors file in f32; `key` has a layer's number, a linear's name and a or b as its groups.

    Raises AdapterError for a damaged file, and one that names all tensors which are no finite LoRA matrices.
    """
    tensors: dict[tuple[int, str, str], Tensor] = {}
    faults: defaultdict[str, list[str]] = defaultdict(list)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                match, stored = key.fullmatch(name), file.get_slice(name)
                if match is None or match[2] not in LINEARS or f".{hf_linear_name(match[2])}." not in name:
                    faults[NO_LORA].append(name)
                elif stored.get_dtype() not in _FLOATS:
                    faults[f"numbers of type {stored.get_dtype()}"].append(name)
                elif len(stored.get_shape()) != 2:
                    faults[NO_MATRIX].append(name)
                elif (where := (int(match[1]), match[2], match[3].upper())) in tensors:
                    faults["given twice"].append(name)
                else:
                    tensors[where] = file.get_tensor(name).float()
                    if not torch.isfinite(tensors[where]).all():
                        faults[NOT_FINITE].append(name)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} is damaged ({error}); copy the adapter again.") from error
    except OSError as error:
        raise AdapterError(f"{path} cannot be read; check that it is there and yours to read.") from error
    refuse_tensors(path.parent, faults)
    if not tensors:
        raise AdapterError(f"The adapter at {path.parent} holds no tensors; copy it again.")
    return tensors


def refuse_tensors(path: Path, faults: Mapping[str, Sequence[str]]) -> None:
    """Raise AdapterError that names every fault of the tensors at `path`; faults: what is wrong -> the names of those."""
    if not faults:
        return
    named = []
    for what, names in faults.items():
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        named.append(f"{what}: {', '.join(repr(name[:80]) for name in names[:_MOST_NAMED])}{more}")
    raise AdapterError(
        f"The adapter at {path} holds what edgetune cannot use ({'; '.join(named)}); expected finite matrices lora_A and "
        "lora_B of linears: copy it again, or train it on linears alone."
    )


def _layers(peft: dict[str, Any], folder: Path) -> tuple[int, ...] | None:
    """PEFT's layers_to_transform: a number, some, or null for all."""
    found = peft.get("layers_to_transform")
    if found is None or found == []:
        return None
    layers = found if isinstance(found, list) else [found]
    if not all(type(layer) is int and 0 <= layer < 2**20 for layer in layers) or len(set(layers)) < len(layers):
        raise AdapterError(
            f"The adapter at {folder} has layers_to_transform {reprlib.repr(found)}; expected numbers of layers, each once."
        )
    return tuple(sorted(layers))


def _lora_config(peft: dict[str, Any], folder: Path) -> LoraConfig:
    if peft.get("peft_type") != "LORA":
        raise AdapterError(f"The adapter at {folder} is of type {reprlib.repr(peft.get('peft_type'))}; expected LORA.")
    odd = [name for name, plain in _PLAIN.items() if peft.get(name) not in (plain, None, [], {})]
    odd += [name for name in _BEYOND if peft.get(name) not in (None, False, [], {})]
    if odd:
        raise AdapterError(
            f"The adapter at {folder} uses {', '.join(odd)}, which edgetune does not honour; expected plain LoRA."
        )
    start = peft.get("init_lora_weights")
    if start not in _INITS_BESIDE_THE_BASE:
        raise AdapterError(
            f"The adapter at {folder} has init_lora_weights {reprlib.repr(start)}, which alters the base beneath it; expected "
            "plain LoRA, as PEFT's save_pretrained writes it with path_initial_model_for_weight_conversion."
        )
    targets = peft.get("target_modules")
    if not isinstance(targets, list):
        raise AdapterError(
            f"The adapter at {folder} names its target_modules by {reprlib.repr(targets)}; expected a list of linears."
        )
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
    """What is said of a folder whose adapter_config.json has no value, or an impossible one, as `error` tells."""
    said = f"it has no {error}" if isinstance(error, KeyError) else str(error)[:300].rstrip(".")
    return AdapterError(f"The adapter_config.json at {folder} is unusable: {said}; copy the adapter again.")


def whole_number(value: object) -> int:
    """A rank as a file has it. Raises ValueError for anything but a whole number, which int() would cut to one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"the rank is {str(value)[:40]!r}, expected a whole number")
    return int(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of an adapter. Raises AdapterError for anything else, or too much of it."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise AdapterError(f"{path} is larger than {_MAX_JSON >> 20} MB; expected a short JSON file.")
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is no readable JSON; copy the adapter again.") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds no JSON object; copy the adapter again.")
    return value


def _bare(linear: Linear | LoraLinear) -> Linear:
    return linear.base if isinstance(linear, LoraLinear) else linear
