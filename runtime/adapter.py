"""LoRA adapters on a model: attach one, detach it, copy its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime.config import LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.lora import Linear, LoraLinear
from edgetune.runtime.model import Llama


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


def _bare(linear: Linear | LoraLinear) -> Linear:
    return linear.base if isinstance(linear, LoraLinear) else linear
