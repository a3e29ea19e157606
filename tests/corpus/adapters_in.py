"""Adapter folders of PEFT and mlx-lm: plain LoRA in every spelling, what is no plain LoRA, and what does not fit."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from corpus.case import CASES, DROP, Case, Place, change_json, of_kind, plain_adapter, plain_model, text_of
from edgetune.export.mlx import adapter as mlx_adapter
from edgetune.runtime import peft_folder

KIND = "adapters"
case = of_kind(KIND)
REGEX = r"(?:model\.layers\.\d+\.)(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj"

# Name, changes to adapter_config.json, and what the refusal names.
REFUSED: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("DoRA", {"use_dora": True}, ("use_dora",)),
    ("trained biases", {"bias": "lora_only"}, ("bias",)),
    ("a whole head saved beside the matrices", {"modules_to_save": ["lm_head"]}, ("modules_to_save",)),
    ("PiSSA, which changes the base", {"init_lora_weights": "pissa"}, ("init_lora_weights",)),
    ("LoftQ, which changes the base", {"init_lora_weights": "loftq"}, ("init_lora_weights",)),
    ("layers used twice", {"layer_replication": [[0, 2], [1, 2]]}, ("layer_replication",)),
    ("single trained tokens", {"trainable_token_indices": [5]}, ("trainable_token_indices",)),
    ("aLoRA, which takes effect after certain tokens", {"alora_invocation_tokens": [7]}, ("alora",)),
    ("QA-LoRA", {"use_qalora": True}, ("use_qalora",)),
    ("LoHa", {"peft_type": "LOHA"}, ("LOHA",)),
    ("no type", {"peft_type": DROP}, ("type",)),
    ("a rank in quotes", {"r": "4"}, ("rank|r ",)),
    ("half a rank", {"r": 4.5}, ("rank",)),
    ("a rank of zero", {"r": 0}, ("rank",)),
    ("a rank of true", {"r": True}, ("rank",)),
    ("a rank of a thousand million", {"r": 10**9}, ("rank",)),
    ("a rank that the matrices do not have", {"r": 8}, ("lora_A",)),
    ("no rank", {"r": DROP}, ("r",)),
    ("an alpha in quotes", {"lora_alpha": "8"}, ("alpha",)),
    ("an alpha of null", {"lora_alpha": None}, ("alpha",)),
    ("a negative alpha", {"lora_alpha": -8}, ("alpha",)),
    ("an alpha of a list", {"lora_alpha": [8]}, ("alpha",)),
    ("a dropout of one and a half", {"lora_dropout": 1.5}, ("dropout",)),
    ('"no" for rank-stabilised LoRA', {"use_rslora": "no"}, ("rslora",)),
    ("layers in quotes", {"layers_to_transform": ["0", "1"]}, ("layers_to_transform",)),
    ("a layer named twice", {"layers_to_transform": [0, 0, 1]}, ("layers_to_transform",)),
    ("a rank pattern that is a list", {"rank_pattern": [4]}, ("rank_pattern",)),
    ("an alpha pattern with text", {"alpha_pattern": {"q_proj": "16"}}, ("alpha_pattern|alpha",)),
)

# Name, and changes to adapter_config.json after which the same matrices do the same.
TAKEN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("targets as a regular expression", {"target_modules": REGEX}),
    ("fan_in_fan_out, which PEFT ignores for LLaMA's linears", {"fan_in_fan_out": True}),
    ("all-linear for the targets", {"target_modules": "all-linear"}),
    ("targets that this model does not have", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
        "up_proj", "down_proj", "query_key_value", "lm_head"]}),
    ("an excluded module that has no matrices anyway", {"exclude_modules": ["lm_head"]}),
    ("settings of newer PEFT at their defaults", {"corda_config": None, "eva_config": None, "qalora_group_size": 16,
        "use_qalora": False, "megatron_config": None, "megatron_core": "megatron.core", "ensure_weight_tying": False,
            "peft_version": "0.19.1"}),
    ("patterns that are empty or null", {"rank_pattern": {}, "alpha_pattern": None, "loftq_config": {}}),
    ("a rank written as 4.0", {"r": 4.0}),
    ("all layers listed", {"layers_to_transform": [0, 1], "layers_pattern": "layers"}),
)  # fmt: skip


def _refusing(changes: dict[str, Any], words: tuple[str, ...]) -> Callable[[Place], None]:
    return lambda place: place.imported(place.adapter(**changes)).refused(*words)


def _taking(changes: dict[str, Any]) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        assert place.opened_adapter(place.adapter(**changes)) == text_of(adapted=True)

    return check


CASES.extend(Case(KIND, name, _refusing(changes, words)) for name, changes, words in REFUSED)
CASES.extend(Case(KIND, name, _taking(changes)) for name, changes in TAKEN)


def matrices() -> dict[str, Tensor]:
    """Return the plain adapter's tensors by PEFT's names."""
    return safetensors.torch.load_file(plain_adapter() / "adapter_model.safetensors")


def with_tensors(place: Place, tensors: dict[str, Tensor], name: str = "adapter", **changes: Any) -> Path:
    """Write the plain adapter with other tensors, and other values in its adapter_config.json."""
    folder = place.adapter(name, **changes)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def only(pattern: str) -> dict[str, Tensor]:
    """Return the plain adapter's tensors whose names a pattern matches."""
    return {name: tensor for name, tensor in matrices().items() if re.search(pattern, name)}


def zeros_but(pattern: str) -> dict[str, Tensor]:
    """Return all of the plain adapter's tensors, with every B zero whose name the pattern does not match."""
    return {n: t if "lora_A" in n or re.search(pattern, n) else torch.zeros_like(t) for n, t in matrices().items()}


@case("chosen modules of chosen layers, by their full names")
def _(place: Place) -> None:
    chosen = r"layers\.1\.self_attn\.q_proj|layers\.0\.mlp\.up_proj"
    names = ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    expected = place.opened_adapter(with_tensors(place, zeros_but(chosen), "expected"))
    found = place.opened_adapter(with_tensors(place, only(chosen), target_modules=names))
    assert found == expected != text_of(adapted=True)


@case("one layer, by layers_to_transform")
def _(place: Place) -> None:
    expected = place.opened_adapter(with_tensors(place, zeros_but(r"layers\.1\."), "expected"))
    found = with_tensors(place, only(r"layers\.1\."), layers_to_transform=1, layers_pattern="layers")
    assert place.opened_adapter(found) == expected


@case("a rank pattern")
def _(place: Place) -> None:
    smaller = {}
    for name, tensor in matrices().items():
        cut = "q_proj" in name and (tensor[:2] if "lora_A" in name else tensor[:, :2])
        smaller[name] = cut.contiguous() if isinstance(cut, Tensor) else tensor
    # With alpha 8, rank 2 is scaled by 4 and rank 4 by 2.
    padded = {}
    for name, tensor in matrices().items():
        padded[name] = tensor.clone()
        if "q_proj" in name:
            (padded[name][2:] if "lora_A" in name else padded[name][:, 2:]).zero_()
            padded[name] *= 1 if "lora_A" in name else 2
    expected = place.opened_adapter(with_tensors(place, padded, "expected"))
    assert place.opened_adapter(with_tensors(place, smaller, rank_pattern={"q_proj": 2})) == expected


@case("an alpha pattern")
def _(place: Place) -> None:
    doubled = {name: tensor * (2 if "v_proj.lora_B" in name else 1) for name, tensor in matrices().items()}
    expected = place.opened_adapter(with_tensors(place, doubled, "expected"))
    assert place.opened_adapter(place.adapter(alpha_pattern={"v_proj": 16})) == expected


@case("matrices of a head")
def _(place: Place) -> None:
    head = {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(4, 64) for part in "AB"}
    outcome = place.imported(with_tensors(place, matrices() | head))
    outcome.refused("lm_head")
    assert "copy the adapter again" not in outcome.err


@case("matrices of the embedding")
def _(place: Place) -> None:
    more = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}
    outcome = place.imported(with_tensors(place, matrices() | more))
    outcome.refused("embed_tokens")
    assert "copy the adapter again" not in outcome.err


@case("A without B")
def _(place: Place) -> None:
    place.imported(with_tensors(place, only("lora_A"))).refused("lora_B is missing")


@case("a NaN in a matrix")
def _(place: Place) -> None:
    broken = matrices()
    next(iter(broken.values()))[0, 0] = float("nan")
    place.imported(with_tensors(place, broken)).refused("NaN")


@case("matrices in fp8")
def _(place: Place) -> None:
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in matrices().items()}
    place.imported(with_tensors(place, small)).refused("F8_E4M3")


@case("matrices of three dimensions, as convolutions have")
def _(place: Place) -> None:
    place.imported(with_tensors(place, {name: tensor[..., None] for name, tensor in matrices().items()})).refused("matrix")


@case("one matrix under two names")
def _(place: Place) -> None:
    twice = {name.replace(".weight", ".default.weight"): tensor for name, tensor in only("q_proj").items()}
    place.imported(with_tensors(place, matrices() | twice)).refused("twice")


@case("matrices of a wider model")
def _(place: Place) -> None:
    wide = {name: torch.ones(4, 128) if "lora_A" in name else tensor for name, tensor in matrices().items()}
    place.imported(with_tensors(place, wide)).refused("does not fit", r"\(4, 128\)")


@case("layers that the model does not have")
def _(place: Place) -> None:
    more = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in matrices().items()}
    place.imported(with_tensors(place, matrices() | more)).refused("layer 7")


@case("a sparse file of 1.5 GB that says it is one matrix")
def _(place: Place) -> None:
    folder = place.adapter()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    size = 4 * (187 << 20) * 2
    header = json.dumps({name: {"dtype": "F16", "shape": [4, 187 << 20], "data_offsets": [0, size]}}).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    place.imported(folder).refused()


@case("no tensors")
def _(place: Place) -> None:
    place.imported(with_tensors(place, {})).refused("no tensors")


@case("pickled matrices alone")
def _(place: Place) -> None:
    folder = place.adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    place.imported(folder).refused("safetensors")


@case("matrices cut in half")
def _(place: Place) -> None:
    folder = place.adapter()
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    place.imported(folder).refused(r"adapter_model\.safetensors")


@case("a folder without adapter_config.json")
def _(place: Place) -> None:
    folder = place.adapter()
    (folder / "adapter_config.json").unlink()
    place.imported(folder).refused(r"adapter_config\.json")


@case("adapter_config.json cut in half")
def _(place: Place) -> None:
    folder = place.adapter()
    place.write("adapter/adapter_config.json", (folder / "adapter_config.json").read_text()[:100])
    place.imported(folder).refused(r"adapter_config\.json")


@case("a rank given twice")
def _(place: Place) -> None:
    folder = place.adapter()
    twice = (folder / "adapter_config.json").read_text().replace('"r": 4', '"r": 8, "r": 4')
    place.write("adapter/adapter_config.json", twice)
    place.imported(folder).refused(r"adapter_config\.json", "repeated|twice")


@case("an array for edgetune.json")
def _(place: Place) -> None:
    folder = place.adapter()
    place.write("adapter/edgetune.json", "[1]")
    place.imported(folder).refused(r"edgetune\.json")


@case("an adapter made for another base")
def _(place: Place) -> None:
    folder = place.adapter()
    place.write("adapter/edgetune.json", json.dumps({"base": "0" * 64}))
    place.imported(folder).refused("another base")


@case("a base's digest that is a number")
def _(place: Place) -> None:
    folder = place.adapter()
    place.write("adapter/edgetune.json", json.dumps({"base": 5}))
    place.imported(folder).refused()


@case("a chat template of its own")
def _(place: Place) -> None:
    folder = place.adapter()
    place.write("adapter/chat_template.jinja", "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    place.imported(folder).taken("template")


@case("an adapter's own folder named as the model")
def _(place: Place) -> None:
    place.opened(place.adapter()).refused("is an adapter", "--adapter")


def from_mlx(place: Place, **changes: Any) -> Path:
    """Write the plain adapter as mlx-lm does, with some keys of its adapter_config.json changed."""
    folder = place.folder / "mlx"
    folder.mkdir()
    mlx_adapter.write_adapter(peft_folder.load(plain_adapter()), folder, "plain", 2)
    change_json(folder / "adapter_config.json", {"edgetune": DROP, **changes})
    return folder


@case("an mlx-lm adapter without edgetune's own keys")
def _(place: Place) -> None:
    assert place.opened_adapter(from_mlx(place)) == text_of(adapted=True)


MLX: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("mlx-lm: DoRA", {"fine_tune_type": "dora"}, ("dora",)),
    ("mlx-lm: a fully trained model", {"fine_tune_type": "full"}, ("full",)),
    ("mlx-lm: no settings", {"lora_parameters": None}, ("lora_parameters",)),
    ("mlx-lm: a rank in quotes", {"lora_parameters": {"rank": "4", "scale": 2.0}}, ("rank",)),
    ("mlx-lm: a scale in quotes", {"lora_parameters": {"rank": 4, "scale": "2"}}, ("scale|unusable",)),
    ("mlx-lm: a number of layers in quotes", {"num_layers": "2"}, ("num_layers",)),
)
CASES.extend(
    Case(KIND, name, lambda place, changes=changes, words=words: place.imported(from_mlx(place, **changes)).refused(*words))  # type: ignore[misc]
    for name, changes, words in MLX
)


@case("a name that leads out of the folder")
def _(place: Place) -> None:
    place.run("adapters", "import", place.adapter(), "--name", "../../evil", "--model", plain_model()).refused("evil", "name")


@case("a name that is taken")
def _(place: Place) -> None:
    place.imported(place.adapter()).taken()
    place.imported(place.adapter("again")).refused("already")


@case("a path with nothing there")
def _(place: Place) -> None:
    place.imported(place.folder / "nowhere").refused("nothing")
