"""Attach LoRA adapters to a model, detach them, and read and copy their tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime.config import MAX_RANK, LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.linear import Linear, LoraLinear
from edgetune.runtime.model import Llama


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that is not on any model.

    tensors: by (layer, linear, "A" or "B"), in f32: A is (rank, in_features), B is (out_features, rank).
    about: the content of edgetune.json. layers: the adapted layers, ascending; None for all layers.
    """

    config: LoraConfig
    tensors: dict[tuple[int, str, str], Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None


def may_fit(shape: tuple[int, ...], layer: int, name: str, part: str, model: LlamaConfig) -> bool:
    """Return True if a tensor of this shape can be lora_A or lora_B ("A" or "B" as `part`) of a linear of the model."""
    rows, columns = model.linear_shapes()[name]
    rank, width = shape if part == "A" else shape[::-1]
    return layer < model.num_layers and rank <= MAX_RANK and width == (columns if part == "A" else rows)


def attach_new(model: Llama, config: LoraConfig, seed: int) -> None:
    """Attach a new adapter to every target linear: A is random from `seed`, B is zero, so the model's output is unchanged."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for name in config.targets:
            base = _base_linear(getattr(block, name))
            setattr(block, name, LoraLinear.from_base(base, config, generator))


def attach(model: Llama, adapter: Adapter) -> None:
    """Attach a stored adapter to the model in place of the one that it may have.

    Raises AdapterError, which names every tensor that does not fit, and leaves the model unchanged.
    """
    check_fits(adapter, model.config)
    linears = {
        (layer, name): _base_linear(module)
        for layer, block in enumerate(model.blocks)
        for name, module in block.linears().items()
    }
    detach(model)
    for layer, name in sorted({key[:2] for key in adapter.tensors}):
        a, b = (adapter.tensors[layer, name, part].to(model.device, torch.float32).clone() for part in "AB")
        adapted = LoraLinear(linears[layer, name], a, b, adapter.config.scale, adapter.config.dropout)
        setattr(model.blocks[layer], name, adapted)


def check_fits(adapter: Adapter, model: LlamaConfig) -> None:
    """Raise AdapterError, which names everything that does not fit, if the adapter was made for a model of another shape."""
    config, shapes = adapter.config, model.linear_shapes()
    layers = set(range(model.num_layers) if adapter.layers is None else adapter.layers)
    wanted = {(layer, name) for layer in layers & set(range(model.num_layers)) for name in config.targets}
    found = {(layer, name) for layer, name, _ in adapter.tensors}
    wrong: dict[tuple[str, str], list[int]] = {}  # (linear, fault) -> layers
    for layer, name in sorted(found):
        a, b = (adapter.tensors.get((layer, name, part)) for part in "AB")
        rows, columns = shapes[name]
        expected = (config.rank, columns), (rows, config.rank)
        if layer >= model.num_layers:
            layers.add(layer)
            continue
        if a is None or b is None:
            fault = f"lora_{'A' if a is None else 'B'} is missing"
        elif (a.shape, b.shape) != expected:
            fault = f"lora_A is {tuple(a.shape)} and lora_B {tuple(b.shape)}, expected {expected[0]} and {expected[1]}"
        elif (layer, name) not in wanted:
            fault = "adapter_config.json does not name it"
        else:
            continue
        wrong.setdefault((name, fault), []).append(layer)
    for layer, name in sorted(wanted - found):
        wrong.setdefault((name, "no tensors"), []).append(layer)
    beyond = sorted(layer for layer in layers if layer >= model.num_layers)
    problems = [f"the model has no {_layer_list(beyond)}"] if beyond else []
    problems += [f"{_layer_list(where)} {name}: {fault}" for (name, fault), where in wrong.items()]
    if problems:
        raise AdapterError(
            f"The adapter does not fit this model: {'; '.join(problems)}; if it was made for another base, name that with "
            "--model, else copy the adapter again."
        )


def _layer_list(layers: list[int]) -> str:
    """Return ascending numbers as "layer 3" or "layers 0-7, 9"; usually every layer has the same mismatch."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return f"layer{'s' if len(layers) > 1 else ''} {text}"


def detach(model: Llama) -> None:
    """Remove the adapter from the model; the base model stays."""
    for block in model.blocks:
        for name, linear in block.linears().items():
            setattr(block, name, _base_linear(linear))


def live_tensors(model: Llama) -> dict[tuple[int, str, str], Tensor]:
    """Return the tensors of the model's adapter, not copies, by (layer, linear, "A" or "B")."""
    return {
        (layer, name, part): getattr(linear, f"lora_{part}").detach()
        for layer, block in enumerate(model.blocks)
        for name, linear in block.linears().items()
        if isinstance(linear, LoraLinear)
        for part in "AB"
    }


def copy_into(model: Llama, adapter: Adapter) -> None:
    """Overwrite the model's adapter with the values of another of the same shape, in place: references to it stay valid."""
    for key, tensor in live_tensors(model).items():
        tensor.copy_(adapter.tensors[key])


def snapshot(model: Llama, config: LoraConfig, about: dict[str, Any] | None = None) -> Adapter:
    """Return a copy of the model's adapter, which later training does not change. `live_tensors` copies nothing."""
    copies = {key: tensor.cpu().clone() for key, tensor in live_tensors(model).items()}
    layers = tuple(sorted({layer for layer, _, _ in copies}))
    return Adapter(config, copies, about or {}, None if len(layers) == len(model.blocks) else layers)


def parameters(model: Llama) -> list[torch.nn.Parameter]:
    """Return the trainable tensors: lora_A and lora_B of each linear, in the order of the layers."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _base_linear(linear: Linear | LoraLinear) -> Linear:
    """Return the linear of the base model under an adapter, or `linear` itself if it has none."""
    return linear.base if isinstance(linear, LoraLinear) else linear
