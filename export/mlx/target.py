"""For mlx-lm on Apple silicon: an adapter folder, or base and adapter as one MLX model.

An adapter folder holds adapters.safetensors, `model.layers.0.self_attn.q_proj.lora_a` (in, r) and `.lora_b` (r, out), and an
adapter_config.json with the scale itself instead of alpha. Source: mlx_lm.tuner.utils.load_adapters, mlx_lm.tuner.lora.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from edgetune.export import effect, merge
from edgetune.export.job import OR_NAME_WEIGHTS, Job, Written, work_folder
from edgetune.export.memory import ExportMemory, fp32_reader_memory, reference_memory
from edgetune.export.mlx.groups import BITS, GROUP, AffineGrid, affine_specs, affine_weight
from edgetune.export.rounding import RoundedRecipe, rounded, rounding_memory
from edgetune.export.targets import MeasuredForm, TargetSpec
from edgetune.runtime import adapter as adapters
from edgetune.runtime.adapter import Adapter, read_json, whole_number
from edgetune.runtime.checkpoint import EMBEDDING, FINAL_NORM, HEAD, block_shapes, is_linear, model_shapes
from edgetune.runtime.config import LINEARS, LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError, UsageError
from edgetune.runtime.files import atomic_write
from edgetune.runtime.model import Block, Llama, hf_linear_name
from edgetune.runtime.model_folder import write_model
from edgetune.runtime.safetensors_file import SafetensorsFile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INT4 = "int4"
ADAPTER_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
DEFAULT_SCALE = 20.0
"""mlx-lm's own, for adapters of versions that did not write it."""
_KEY = re.compile(r"model\.layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w+)\.lora_([ab])")


def peak_memory(job: Job) -> ExportMemory:
    """MLX's own 4-bit model is dense where it is measured."""
    made = [] if not job.weights else [merge.merge_memory(job)]
    if job.weights == INT4:
        made = [rounding_memory(job, 4 * job.base.config.linear_parameters)]
    return ExportMemory([*made, reference_memory(job)], [fp32_reader_memory(job)])


def write(job: Job, folder: Path) -> Written:
    """An adapter folder without --weights, else a model folder."""
    if job.weights == INT4:
        return _write_int4(job, folder)
    if job.weights:
        return Written(notices=_write_model(job, folder))
    adapter = job.needed_adapter(OR_NAME_WEIGHTS)
    write_adapter(adapter, folder, job.base_name, job.base.config.num_layers)
    notices = _window_notice(job.base.config)
    if job.base.quant is not None:
        notices += (
            "mlx-lm does not open bitsandbytes' 4-bit folders: give it this base as `edgetune export mlx --adapter none "
            "--weights bf16` writes it.",
        )
    return Written(notices=notices)


def write_adapter(adapter: Adapter, folder: Path, base_name: str, num_layers: int) -> None:
    """The two files, private. Layers that the adapter leaves alone get none: mlx-lm starts them at zero."""
    config = adapter.config
    tensors = {
        f"model.layers.{layer}.{hf_linear_name(name)}.lora_{part.lower()}": tensor.T.contiguous()
        for (layer, name, part), tensor in sorted(adapter.tensors.items())
    }
    first = 0 if adapter.layers is None else adapter.layers[0]
    settings = {
        "fine_tune_type": "lora",
        "model": base_name,
        "num_layers": num_layers - first,
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": [hf_linear_name(name) for name in config.targets],
        },
        # what the rest was made of, so that it comes back as it was; mlx-lm does not look at it
        "edgetune": {"alpha": config.alpha, "rslora": config.rslora, "every_layer": adapter.layers is None},
    }
    atomic_write(folder / CONFIG_FILE, json.dumps(settings, indent=2) + "\n")
    atomic_write(folder / ADAPTER_FILE, safetensors.torch.save(tensors, metadata={"format": "mlx"}))


def read_adapter(folder: Path) -> Adapter:
    """Read an mlx-lm LoRA folder, whoever wrote it.

    Raises AdapterError for one that is damaged or holds what LoRA alone cannot express: DoRA, whole layers, embeddings.
    """
    settings = read_json(folder / CONFIG_FILE)
    kind, parameters = settings.get("fine_tune_type", "lora"), settings.get("lora_parameters")
    if kind != "lora" or not isinstance(parameters, dict):
        raise AdapterError(
            f"The mlx-lm adapter at {folder} is of type {reprlib.repr(kind)}; expected lora with its lora_parameters."
        )
    stored = adapters.read_tensors(folder / ADAPTER_FILE, _KEY)
    tensors = {key: tensor.T.contiguous() for key, tensor in stored.items()}
    targets = tuple(name for name in LINEARS if name in {linear for _, linear, _ in tensors})
    return Adapter(_lora_config(settings, parameters, targets, folder), tensors, {}, _layers(settings, tensors, folder))


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an mlx-lm adapter."""
    return (folder / ADAPTER_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def _lora_config(settings: dict[str, Any], parameters: dict[str, Any], targets: tuple[str, ...], folder: Path) -> LoraConfig:
    """mlx-lm's explicit scale as alpha; alpha itself where edgetune wrote it and it still gives that scale."""
    try:
        rank, scale = whole_number(parameters["rank"]), float(parameters.get("scale", DEFAULT_SCALE))
        dropout = float(parameters.get("dropout") or 0.0)
        origin = settings.get("edgetune")
        if isinstance(origin, dict):
            written = LoraConfig(rank, float(origin["alpha"]), dropout, targets, bool(origin["rslora"]))
            if written.scale == scale:
                return written
        return LoraConfig(rank, scale * rank, dropout, targets)
    except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
        raise adapters.unusable(folder, error) from error


def _layers(settings: dict[str, Any], tensors: dict[tuple[int, str, str], Tensor], folder: Path) -> tuple[int, ...] | None:
    """The layers with tensors; None, which is all, where mlx-lm counted the last `num_layers` down to layer 0."""
    last, layers = settings.get("num_layers"), tuple(sorted({layer for layer, _, _ in tensors}))
    origin = settings.get("edgetune")
    if isinstance(origin, dict) and origin.get("every_layer") is False:
        return layers
    if type(last) is not int:
        raise AdapterError(
            f"The adapter_config.json at {folder} has num_layers {reprlib.repr(last)}; expected a number of layers."
        )
    return None if layers == tuple(range(len(layers))) and (last < 1 or last >= len(layers)) else layers


def _window_notice(config: LlamaConfig) -> tuple[str, ...]:
    windows = sorted({window for window in config.windows if window is not None})
    if not windows or _layer_types(config) is not None:
        return ()
    return (f"mlx-lm runs this model without its sliding window: beyond {windows[0]:,} tokens its answers will differ.",)


def _layer_types(config: LlamaConfig) -> list[str] | None:
    """mlx-lm's llama honours windows where some layers have none; its qwen2 and qwen3 never do."""
    some = any(window is not None for window in config.windows) and any(window is None for window in config.windows)
    if not some or config.model_type.startswith("qwen"):
        return None
    return ["full_attention" if window is None else "sliding_attention" for window in config.windows]


def mlx_config(hf_config: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """config.json with everything spelled out: mlx-lm's defaults are not transformers' (a head is tied, theta is 1e6)."""
    dropped = ("dtype", "quantization_config", "rope_parameters", "rope_scaling", "layer_types")
    rope = config.rope
    scaling: dict[str, Any] | None = None
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling = {
            **(scaling or {}),
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return {
        **{key: value for key, value in hf_config.items() if key not in dropped},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        **({} if (types := _layer_types(config)) is None else {"layer_types": types}),
    }


def _write_model(job: Job, folder: Path) -> tuple[str, ...]:
    merged = merge.Merged(job.base, job.adapter)
    config = mlx_config(job.base.hf_config, job.base.config)
    dtype = DTYPES[job.weights]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    recipe = merge.DenseRecipe(merged, dtype)
    write_model(job.base.folder, folder, config, recipe, done=job.counter("writing", len(recipe.shapes)))
    return _window_notice(job.base.config)


def _write_int4(job: Job, folder: Path) -> Written:
    """Linears in MLX's 4-bit groups, rounded with feedback; what is left of an adapter is measured."""
    merged, config = merge.Merged(job.base, job.adapter), mlx_config(job.base.hf_config, job.base.config)
    odd = sorted({shape[1] for shape in job.base.config.linear_shapes().values() if shape[1] % GROUP})
    if odd:
        raise UsageError(
            f"This model has linears of {odd[0]} inputs and MLX quantises groups of {GROUP}; type --weights bf16 instead."
        )
    calibration, held_out = effect.texts_for(job)
    config |= {"torch_dtype": "bfloat16", "quantization": {"group_size": GROUP, "bits": BITS}}
    recipe = RoundedRecipe(merged, affine_specs, rounded(merged, AffineGrid.of, calibration))
    write_model(job.base.folder, folder, config, recipe, done=job.counter("writing", len(recipe.shapes)))
    advice = "type --weights bf16"
    if job.adapter is not None:
        advice += ", or export mlx without --weights for the adapter alone"
    left = effect.check(job, _int4_model(job, folder), held_out, advice)
    return Written(notices=_window_notice(job.base.config), facts=(left,))


def _int4_model(job: Job, folder: Path) -> Llama:
    """The model of an int4 folder, its linears dense in fp32, read by edgetune's own means."""
    config, files = job.base.config, [SafetensorsFile.open(path) for path in sorted(folder.glob("model*.safetensors"))]
    where = {name: file for file in files for name in file.tensors}

    def tensor(name: str) -> Tensor:
        if not is_linear(name):
            return where[name].tensor(name).float()
        return affine_weight(*(where[spec.name].tensor(spec.name) for spec in affine_specs(name, shapes[name])))

    shapes = model_shapes(config)
    blocks = [
        Block(config, layer, {name: tensor(f"model.layers.{layer}.{name}") for name in block_shapes(config)})
        for layer in range(config.num_layers)
    ]
    embedding = tensor(EMBEDDING)
    head = embedding if config.tie_embeddings else tensor(HEAD)
    return Llama(config, embedding, blocks, tensor(FINAL_NORM), head, torch.float32)


def reference(job: Job, folder: Path) -> Llama:
    """The 4-bit form is proved against the weights that were written."""
    return _int4_model(job, folder) if job.weights == INT4 else job.model()


class MlxReader:
    """A model of mlx-lm in fp32 on the CPU."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(N,) -> (N, V) f32."""
        import mlx.core as mx

        with mx.stream(mx.cpu):
            found = self._model(mx.array([list(ids)]))[0].astype(mx.float32)
            mx.eval(found)
        return torch.utils.dlpack.from_dlpack(found) if math.prod(found.shape) else torch.empty(found.shape)


def read(job: Job, folder: Path) -> MlxReader:
    """A model folder as mlx-lm reads it; an adapter over its base, written as a dense MLX model for as long."""
    if job.weights:
        return MlxReader(open_mlx(folder))
    with work_folder(folder) as base:
        recipe = merge.DenseRecipe(merge.Merged(job.base, None), torch.float32)
        write_model(job.base.folder, base, mlx_config(job.base.hf_config, job.base.config), recipe)
        return MlxReader(open_mlx(base, folder))


def open_mlx(folder: Path, adapter: Path | None = None) -> Any:
    """A model folder, and an adapter folder on it, as mlx-lm reads them, computing in fp32."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    with mx.stream(mx.cpu):
        model = load_model(folder)[0]
        if adapter is not None:
            model = load_adapters(model, str(adapter))
        model.eval()
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model


SPEC = TargetSpec(
    name="mlx",
    weights=("", *DTYPES, INT4),
    proved_by="mlx-lm in fp32",
    packages=("mlx_lm", "mlx"),
    extra="mlx",
    measured=(MeasuredForm(INT4),),
    peak_memory=peak_memory,
    write=write,
    read=read,
    reference=reference,
)
