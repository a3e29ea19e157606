"""Plan a program of a package: its sizes, its inputs, and the constants that it holds beside its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgetune.export.coreml.package import Array
from edgetune.export.coreml.stored_weight import StoredWeight, checked_half
from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.names import ATTENTION_NORM, FINAL_NORM, K_NORM, MLP_NORM, Q_NORM, hf_linear_name, layer_tensor
from edgetune.runtime.rope import rope_frequencies


@dataclass(frozen=True)
class Plan:
    """The plan of one function of a package.

    context: slots of the cache. prefill: most tokens in one call. tensor: returns a norm or a bias by its full Hugging Face
    name. weight: returns the placeholder of a weight (out, in) by its name and shape, see stored_weight.placeholder.
    input_ranks: the adapter's rank for each linear that takes it as an input. constants: lora_A and lora_B, f16, of an adapter
    that is built in, by layer and linear.
    """

    config: LlamaConfig
    context: int
    prefill: int
    tensor: Callable[[str], Tensor]
    weight: Callable[[str, tuple[int, int]], StoredWeight]
    input_ranks: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[tuple[int, str], tuple[Array, Array]] = field(default_factory=dict)

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer in tokens, or None where it covers the whole context."""
        window = self.config.windows[layer]
        return None if window is None or window >= self.context else window

    @property
    def windowed(self) -> bool:
        """Return True if any layer has a sliding window."""
        return any(self.window(layer) is not None for layer in range(self.config.num_layers))

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Return the shape of each cache: (L, KV, context, hd)."""
        config = self.config
        return (config.num_layers, config.num_kv_heads, self.context, config.head_dim)

    def adapter_shapes(self, ranks: Mapping[str, Any] | None = None) -> dict[str, tuple[Any, Any, Any]]:
        """Return the shapes of the adapter's inputs by name: (L, r, in) for a, (L, out, r) for b.

        ranks: coremltools' range or symbol that stands for the rank of each linear, instead of the rank itself.
        """
        shapes, layers = self.config.linear_shapes(), self.config.num_layers
        result: dict[str, tuple[Any, Any, Any]] = {}
        for name, rank in (self.input_ranks if ranks is None else ranks).items():
            out, width = shapes[name]
            result |= {f"{name}_a": (layers, rank, width), f"{name}_b": (layers, out, rank)}
        return result


def linear_name(layer: int, name: str) -> str:
    """Return the name that a layer's linear and its output have in the program."""
    return f"layers_{layer}_{name}"


def constants(plan: Plan) -> dict[str, Array]:
    """Return the f16 constants of a program beside its weights, by their names in it: the cosines and sines of all positions
    (context, hd/2), norms, biases, and an adapter that is built in.

    Raises ModelError where a number is beyond fp16's range.
    """
    config = plan.config
    frequencies = rope_frequencies(config.rope, config.head_dim)
    angles = torch.arange(plan.context, dtype=torch.float64).unsqueeze(1) * frequencies
    found = {"cos": checked_half("cos", angles.cos()), "sin": checked_half("sin", angles.sin())}
    norms = {"attn_norm": ATTENTION_NORM, "mlp_norm": MLP_NORM}
    if config.qk_norm:
        norms |= {"q_norm": Q_NORM, "k_norm": K_NORM}
    biased = [*(("q_proj", "k_proj", "v_proj") if config.qkv_bias else ()), *(("o_proj",) if config.o_bias else ())]
    hf_names = {"norm_weight": FINAL_NORM}
    for layer in range(config.num_layers):
        hf_names |= {f"layers_{layer}_{called}_weight": layer_tensor(layer, name) for called, name in norms.items()}
        hf_names |= {f"{linear_name(layer, part)}_bias": layer_tensor(layer, f"{hf_linear_name(part)}.bias") for part in biased}
    found |= {name: checked_half(hf_name, plan.tensor(hf_name)) for name, hf_name in hf_names.items()}
    for (layer, part), pair in plan.constants.items():
        found |= {f"{linear_name(layer, part)}_{which}": values for which, values in zip("ab", pair, strict=True)}
    return found


def does_nothing(name: str, values: Array) -> bool:
    """Return True for a constant that coremltools removes together with its operation: a norm of ones or a bias of zeros."""
    nothing = {"bias": 0, "weight": 1}.get(name.rsplit("_", 1)[-1])
    return nothing is not None and bool((values == nothing).all())
