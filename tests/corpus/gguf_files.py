"""GGUF files: LoRA adapters whose headers lie or whose tensors do not fit, and odd ones that are right."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corpus.case import CASES, Case, Place, change_json, of_kind, plain_adapter, text_of
from edgetune.export.gguf.names import LINEARS, is_rotated, to_llama_rows
from edgetune.runtime import peft_folder

KIND = "GGUF"
case = of_kind(KIND)
Raw = tuple[int, bytes]
"""A value type of GGUF and the bytes of the value."""
F32, F16, Q4_0, BF16 = 0, 1, 2, 30
_CODES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
KEYS: dict[str, Any] = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 8.0,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}
"""The keys of the tiny LLaMA's adapter."""


def text(value: str | bytes) -> bytes:
    """Return a text as GGUF writes it."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """Return a typed value as GGUF writes it: a list as an array of texts, i32 or f32; a Raw pair as it is."""
    if isinstance(item, tuple):
        return struct.pack("<I", item[0]) + item[1]
    if isinstance(item, list) and item and isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
    if isinstance(item, list):
        kind, form = (5, "i") if item and isinstance(item[0], int) else (6, "f")
        return struct.pack(f"<IIQ{len(item)}{form}", 9, kind, len(item), *item)
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    return struct.pack("<I", 8) + text(item)


def matrices() -> dict[str, Tensor]:
    """Return the tensors of the tiny LLaMA's adapter by llama.cpp's names, with their rows in llama.cpp's order."""
    found = {}
    for (layer, name, part), tensor in peft_folder.load(plain_adapter()).tensors.items():
        rows = to_llama_rows(tensor, 16) if part == "B" and is_rotated("llama", name) else tensor
        found[f"blk.{layer}.{LINEARS[name]}.weight.lora_{part.lower()}"] = rows
    return found


def packed(
    keys: dict[str, Any] | Iterable[tuple[str | bytes, Any]] = KEYS,
    tensors: dict[str, Tensor] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    entry: Callable[[str, list[int], int, int], tuple[list[int], int, int]] = lambda name, dims, kind, at: (dims, kind, at),
    twice: bool = False,
    alignment: int = 32,
) -> bytes:
    """Return a GGUF file. `entry` changes what the header says of a tensor: its dimensions, type and offset."""
    pairs = list(keys.items() if isinstance(keys, dict) else keys)
    tensors = matrices() if tensors is None else tensors
    infos, data = [], b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        dims, kind, at = entry(name, list(tensor.shape[::-1]), _CODES[tensor.dtype], len(data))
        infos.append(text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at))
        data += raw + b"\0" * (-len(raw) % alignment)
    infos += infos[:1] if twice else []
    head = magic + struct.pack("<IQQ", version, *(counts or (len(infos), len(pairs))))
    head += b"".join(text(key) + value(item) for key, item in pairs) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + data


def with_value(number: float) -> dict[str, Tensor]:
    """Return the adapter's tensors with one value replaced."""
    found = matrices()
    first = next(iter(found))
    found[first] = found[first].clone()
    found[first][0, 0] = number
    return found


def without(word: str) -> dict[str, Tensor]:
    """Return the adapter's tensors except those whose name holds a word."""
    return {name: tensor for name, tensor in matrices().items() if word not in name}


def lying(**changes: Any) -> Callable[[str, list[int], int, int], tuple[list[int], int, int]]:
    """Return an `entry` that lies about every tensor's dims, kind or at."""
    return lambda name, dims, kind, at: (changes.get("dims", dims), changes.get("kind", kind), changes.get("at", at))


# Name, the file, and what the refusal names.
REFUSED: tuple[tuple[str, Callable[[], bytes], tuple[str, ...]], ...] = (
    ("an empty file", lambda: b"", ()),
    ("another file under the name of GGUF", lambda: packed(magic=b"GGML"), ("GGUF",)),
    ("version 1", lambda: packed(version=1), ("version",)),
    ("a file for big-endian machines", lambda: packed(version=3 << 24), ("version",)),
    ("a file cut within its header", lambda: packed()[:300], ("cut off",)),
    ("a file cut within its tensors", lambda: packed()[:-2000], ("end|larger|cut",)),
    ("2^60 tensors", lambda: packed(counts=(2**60, 6)), (str(2**60),)),
    ("2^60 keys", lambda: packed(counts=(28, 2**60)), (str(2**60),)),
    ("a text of 2^63 bytes", lambda: packed([("general.architecture", (8, struct.pack("<Q", 2**63)))]), ("text",)),
    ("a key that is not UTF-8", lambda: packed([(b"\xff\xfe", 1), *KEYS.items()]), ("utf-8|UTF-8",)),
    ("a key given twice", lambda: packed([*KEYS.items(), ("adapter.lora.alpha", 64.0)]), (r"adapter\.lora\.alpha",
        "twice|repeat")),
    ("a tensor given twice", lambda: packed(twice=True), ("twice",)),
    ("an alignment of 7", lambda: packed(KEYS | {"general.alignment": 7}), ("alignment",)),
    ("an alignment of 0", lambda: packed(KEYS | {"general.alignment": 0}), ("alignment",)),
    ("an alignment of 2^31", lambda: packed(KEYS | {"general.alignment": 2**31}), ("alignment",)),
    ("an alignment that is text", lambda: packed(KEYS | {"general.alignment": "32"}), ("alignment",)),
    ("an array of arrays", lambda: packed(KEYS | {"x": (9, struct.pack("<IQ", 9, 1))}), ("array",)),
    ("an array of 2^40 texts", lambda: packed(KEYS | {"x": (9, struct.pack("<IQ", 8, 2**40))}), ("array",)),
    ("a value of an unknown type", lambda: packed(KEYS | {"x": (99, b"\0" * 8)}), ("type",)),
    ("tensors without dimensions", lambda: packed(entry=lying(dims=[])), ("dimensions",)),
    ("tensors of nine dimensions", lambda: packed(entry=lying(dims=[1] * 9)), ("dimensions",)),
    ("dimensions whose product overflows", lambda: packed(entry=lying(dims=[2**33, 2**33])), ()),
    ("tensors of no values", lambda: packed(entry=lying(dims=[0, 64])), ()),
    ("all tensors in one place", lambda: packed(entry=lying(at=0)), ()),
    ("tensors at odd offsets", lambda: packed(entry=lambda name, dims, kind, at: (dims, kind, at + 1)), ()),
    ("offsets of 2^63", lambda: packed(entry=lying(at=2**63)), ()),
    ("quantised matrices", lambda: packed(entry=lying(kind=Q4_0)), ("f32|f16|type",)),
    ("a model and no adapter", lambda: packed(KEYS | {"general.type": "model"}), ("adapter",)),
    ("a control vector", lambda: packed(KEYS | {"adapter.type": "control_vector"}), ("lora",)),
    ("an adapter of another architecture", lambda: packed(KEYS | {"general.architecture": "qwen2"}), ("qwen2", "another base")),
    ("an adapter of another number of heads", lambda: packed(KEYS | {"llama.attention.head_count": 8}), ("head_count",)),
    ("an alpha in quotes", lambda: packed(KEYS | {"adapter.lora.alpha": "8"}), ("alpha",)),
    ("an alpha of NaN", lambda: packed(KEYS | {"adapter.lora.alpha": float("nan")}), ("alpha",)),
    ("a negative alpha", lambda: packed(KEYS | {"adapter.lora.alpha": -8.0}), ("alpha",)),
    ("an activated LoRA", lambda: packed(KEYS | {"adapter.alora.invocation_tokens": (9, struct.pack("<IQI", 4, 1, 7))}),
        ("aLoRA",)),
    ("a matrix for the embedding", lambda: packed(tensors=matrices() | {"token_embd.weight.lora_a": torch.ones(4, 64)}),
        ("token_embd",)),
    ("a NaN in a matrix", lambda: packed(tensors=with_value(float("nan"))), ("NaN",)),
    ("no lora_b", lambda: packed(tensors=without("lora_b")), ("lora_B",)),
    ("no tensors", lambda: packed(tensors={}), ("no tensors",)),
    ("a layer that the model does not have", lambda: packed(
        tensors=matrices() | {f"blk.99.attn_v.weight.lora_{p}": torch.ones(4, 4) for p in "ab"}), ("layer 99",)),
)  # fmt: skip


def written(place: Place, content: bytes) -> Path:
    """Write a GGUF file."""
    return place.write("adapter.gguf", content)


def _refusing(content: Callable[[], bytes], words: tuple[str, ...]) -> Callable[[Place], None]:
    return lambda place: place.imported(written(place, content())).refused(*words)


CASES.extend(Case(KIND, name, _refusing(content, words)) for name, content, words in REFUSED)


@case("llama.cpp's own adapter, without head counts")
def _(place: Place) -> None:
    keys = {key: item for key, item in KEYS.items() if "head_count" not in key}
    assert place.opened_adapter(written(place, packed(keys))) == text_of(adapted=True)


@case("version 2")
def _(place: Place) -> None:
    assert place.opened_adapter(written(place, packed(version=2))) == text_of(adapted=True)


@case("matrices in bf16 that are exact in it")
def _(place: Place) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in matrices().items()}
    exact = {name: tensor.float() for name, tensor in rounded.items()}
    small = written(place, packed(tensors=rounded))
    large = place.write("large.gguf", packed(tensors=exact))
    assert place.opened_adapter(small) == place.opened_adapter(large)


@case("an adapter without an alpha, whose scale is then 1")
def _(place: Place) -> None:
    keys = {key: item for key, item in KEYS.items() if "alpha" not in key}
    plain = place.opened_adapter(place.write("b.gguf", packed(KEYS | {"adapter.lora.alpha": 4.0})))  # the rank is 4
    assert place.opened_adapter(written(place, packed(keys))) == plain


@case("an adapter of one layer and two linears")
def _(place: Place) -> None:
    some = {name: tensor for name, tensor in matrices().items() if name.startswith("blk.1.") and "attn_q" in name}
    some |= {name: tensor for name, tensor in matrices().items() if "blk.0.ffn_up" in name}
    zeros = {name: tensor if name in some or name.endswith("lora_a") else tensor * 0 for name, tensor in matrices().items()}
    expected = place.opened_adapter(place.write("b.gguf", packed(tensors=zeros)))
    assert place.opened_adapter(written(place, packed(tensors=some))) == expected != text_of(adapted=True)


@case("a model in GGUF named as the base")
def _(place: Place) -> None:
    place.opened(place.write("model-Q4_K_M.gguf", packed({"general.architecture": "llama"}))).refused("GGUF")


@case("a damaged GGUF in a folder of models")
def _(place: Place) -> None:
    place.write("models/broken-Q4_K_M.gguf", packed()[:40])
    place.run("models", place.folder / "models").taken("broken-Q4_K_M")


@case("a folder whose name ends in .gguf")
def _(place: Place) -> None:
    folder = place.adapter("tiny.gguf")
    change_json(folder / "adapter_config.json", {})
    place.imported(folder).taken()
