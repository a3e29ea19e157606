"""Attach LoRA adapters to a model, detach them, and read and copy their tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from edgetune.runtime.config import MAX_RANK, LlamaConfig, LoraConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.linear import Linear, LoraLinear
from edgetune.runtime.model import Llama

_MOST_NAMED = 12
"""The most faults, and the most ranges of layers of a fault, that an error names. Chosen by hand."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that is not on any model.

    tensors: by (layer, linear, "A" or "B"), in f32: A is (rank, in_features), B is (out_features, rank). They say which
    linears are adapted; adapters of other programs can leave out some of config.targets in some layers, and give linears a
    rank of their own. about: the content of edgetune.json. layers: the adapted layers, ascending; None for all layers.
    alphas: the alpha of each linear whose alpha is not config.alpha.
    """

    config: LoraConfig
    tensors: dict[tuple[int, str, str], Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    alphas: Mapping[tuple[int, str], float] = field(default_factory=dict)

    @property
    def linears(self) -> list[tuple[int, str]]:
        """Return (layer, linear) of each adapted linear, in order."""
        return sorted({(layer, name) for layer, name, _ in self.tensors})

    def config_of(self, layer: int, name: str) -> LoraConfig:
        """Return the configuration of one linear, with its own rank and alpha."""
        rank = self.tensors[layer, name, "A"].shape[0]
        return replace(self.config, rank=rank, alpha=self.alphas.get((layer, name), self.config.alpha))

    def scale_of(self, layer: int, name: str) -> float:
        """Return the factor of B A of one linear."""
        return self.config_of(layer, name).scale

    @property
    def is_uniform(self) -> bool:
        """Return True if all adapted linears have the configuration's rank and alpha."""
        return all(self.config_of(*linear) == self.config for linear in self.linears)

    def covers(self, num_layers: int) -> bool:
        """Return True if every target of every layer is adapted."""
        return len(self.linears) == num_layers * len(self.config.targets)

    def uniform(self) -> Adapter:
        """Return an adapter with the same effect whose linears all have one rank and one alpha, for formats that hold no other.

        Lower ranks are padded with zeros, and B is multiplied by the rest of its scale, which rounds it to f32.
        """
        if self.is_uniform:
            return self
        rank, scale, tensors = max(self.config_of(*linear).rank for linear in self.linears), self.config.scale, {}
        for layer, name in self.linears:
            a, b = self.tensors[layer, name, "A"], self.tensors[layer, name, "B"]
            padding = rank - len(a)
            tensors[layer, name, "A"] = torch.nn.functional.pad(a, (0, 0, 0, padding))
            tensors[layer, name, "B"] = torch.nn.functional.pad(b * (self.scale_of(layer, name) / scale), (0, padding))
        config = replace(self.config, rank=rank, alpha=scale * rank, rslora=False)
        return Adapter(config, tensors, self.about, self.layers)


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
    for layer, name in adapter.linears:
        a, b = (adapter.tensors[layer, name, part].to(model.device, torch.float32).clone() for part in "AB")
        adapted = LoraLinear(linears[layer, name], a, b, adapter.scale_of(layer, name), adapter.config.dropout)
        setattr(model.blocks[layer], name, adapted)


def check_fits(adapter: Adapter, model: LlamaConfig) -> None:
    """Raise AdapterError, which names everything that does not fit, if the adapter was made for a model of another shape."""
    check_shapes({key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}, adapter.layers, model)


def check_shapes(
    shapes: Mapping[tuple[int, str, str], tuple[int, ...]],
    layers: Sequence[int] | None,
    model: LlamaConfig,
    ranks: Collection[int] | None = None,
) -> None:
    """Raise AdapterError as `check_fits` does, from the shapes of A (r, in) and B (out, r) alone: before they are read.

    layers: those that the configuration names, None for all. ranks: the ranks that it allows; None allows any up to 1024.
    """
    wrong: dict[tuple[str, str], list[int]] = {}  # (linear, fault) -> layers
    beyond = {layer for layer in layers or () if layer >= model.num_layers}
    for layer, name in sorted({(layer, name) for layer, name, _ in shapes}):
        a, b = (shapes.get((layer, name, part)) for part in "AB")
        rows, columns = model.linear_shapes()[name]
        if layer >= model.num_layers:
            beyond.add(layer)
        elif a is None or b is None:
            wrong.setdefault((name, f"lora_{'A' if a is None else 'B'} is missing"), []).append(layer)
        else:
            allowed = 1 <= a[0] <= MAX_RANK and (ranks is None or a[0] in ranks)
            rank = a[0] if allowed or not ranks else min(ranks)
            expected = (rank, columns), (rows, rank)
            if (a, b) != expected or not allowed:
                fault = f"lora_A is {a} and lora_B {b}, expected {expected[0]} and {expected[1]}"
                wrong.setdefault((name, fault), []).append(layer)
    problems = [f"the model has no {_layer_list(sorted(beyond))}"] if beyond else []
    problems += [f"{_layer_list(where)} {name}: {fault}" for (name, fault), where in wrong.items()]
    if len(problems) > _MOST_NAMED:
        problems[_MOST_NAMED:] = [f"and {len(problems) - _MOST_NAMED} faults more"]
    if problems:
        raise AdapterError(
            f"The adapter does not fit this model: {'; '.join(problems)}; if it was made for another base, name that with "
            "--model, else copy the adapter again."
        )


def _layer_list(layers: Sequence[int]) -> str:
    """Return ascending numbers as "layer 3" or "layers 0-7, 9"; usually every layer has the same mismatch."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges[:_MOST_NAMED])
    text += ", ..." if len(ranges) > _MOST_NAMED else ""
    return f"layer{'s' if len(layers) > 1 else ''} {text}"


def detach(model: Llama) -> None:
    """Remove the adapter from the model; the base model stays."""
    for block in model.blocks:
        for name, linear in block.linears().items():
            setattr(block, name, _base_linear(linear))


@contextlib.contextmanager
def replaced(model: Llama, adapter: Adapter | None) -> Iterator[None]:
    """Put a stored adapter, or none, in the place of the model's own for a `with` block; then the same modules come back.

    Raises AdapterError, and leaves the model unchanged, where the stored one does not fit.
    """
    own = [block.linears() for block in model.blocks]
    try:
        if adapter is None:
            detach(model)
        else:
            attach(model, adapter)
        yield
    finally:
        for block, linears in zip(model.blocks, own, strict=True):
            for name, linear in linears.items():
                setattr(block, name, linear)


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
