"""Weight files: safetensors whose headers lie, tensors that are not the model's, indexes of shards, and 4-bit weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from corpus.case import CASES, DROP, Case, Place, change_json, of_kind, plain_model
from edgetune.runtime.quantize import quantize_folder

KIND = "safetensors"
case = of_kind(KIND)
Header = dict[str, Any]
NORM, EMBEDDING, Q_PROJ = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"


@functools.cache
def stored() -> tuple[str, bytes]:
    """Return the header and the data of the tiny LLaMA's weights."""
    whole = (plain_model() / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    return whole[8:start].decode(), whole[start:]


def packed(header: str | bytes | Header, data: bytes, count: int | None = None) -> bytes:
    """Return a safetensors file; `count` is the length of the header that it claims."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header.encode() if isinstance(header, str) else header
    return (len(text) if count is None else count).to_bytes(8, "little") + text + data


def with_file(place: Place, content: bytes) -> Path:
    """Write the tiny LLaMA with other bytes for its model.safetensors."""
    model = place.model()
    (model / "model.safetensors").write_bytes(content)
    return model


def edited(name: str, **changes: Any) -> bytes:
    """Return the weights with the header's entry of one tensor changed."""
    header = json.loads(stored()[0])
    header[name] |= changes
    return packed(header, stored()[1])


def tensors() -> dict[str, Tensor]:
    """Return copies of the tiny LLaMA's tensors."""
    return safetensors.torch.load_file(plain_model() / "model.safetensors")


def with_tensors(place: Place, changes: dict[str, Any], **config: Any) -> Path:
    """Write the tiny LLaMA with some tensors replaced, added, or left out (DROP)."""
    model = place.model(**config)
    kept = {name: tensor for name, tensor in {**tensors(), **changes}.items() if tensor is not DROP}
    safetensors.torch.save_file(kept, model / "model.safetensors", {"format": "pt"})
    return model


def with_value(name: str, value: float) -> dict[str, Tensor]:
    """Return a tensor of the tiny LLaMA with one of its values replaced."""
    tensor = tensors()[name]
    tensor.view(-1)[17] = value
    return {name: tensor}


def offsets(name: str) -> list[int]:
    """Return where a tensor's bytes begin and end."""
    found = json.loads(stored()[0])[name]["data_offsets"]
    assert isinstance(found, list)
    return found


# Name, the file, and what the refusal names.
FILES: tuple[tuple[str, Callable[[], bytes], tuple[str, ...]], ...] = (
    ("an empty file", lambda: b"", ("truncated",)),
    ("seven bytes", lambda: b"\0" * 7, ("truncated",)),
    ("a header longer than the file", lambda: packed(*stored(), count=1 << 26), ("truncated|header",)),
    ("a header of 2^63 bytes", lambda: packed(*stored(), count=1 << 63), ("header",)),
    ("a header that is not JSON", lambda: packed(stored()[0].replace(":", "="), stored()[1]), ("JSON",)),
    ("a header that is an array", lambda: packed("[]", b""), ("object",)),
    ("a header without tensors", lambda: packed("{}", b""), ("missing",)),
    ("a header of ten thousand brackets", lambda: packed('{"a":' + "[" * 10_000, b""), ("JSON",)),
    ("one tensor twice", lambda: packed(stored()[0][:-1] + ', "model.norm.weight": {}}', stored()[1]),
        ("JSON|twice|repeated",)),
    ("a pickle under the name of safetensors", lambda: b"PK\x03\x04" + b"\0" * 4000, ("safetensors",)),
    ("a pointer of Git LFS", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", ("safetensors",)),
    ("one byte lost at the end", lambda: packed(stored()[0], stored()[1][:-1]), ("truncated",)),
    ("four bytes too many at the end", lambda: packed(stored()[0], stored()[1] + b"\0" * 4), ("damaged",)),
    ("two tensors in one place", lambda: edited(NORM, data_offsets=[0, 256]), ("overlap",)),
    ("a gap before a tensor", lambda: edited(NORM, data_offsets=[n + 8 for n in offsets(NORM)]), ("damaged",)),
    ("offsets the wrong way round", lambda: edited(NORM, data_offsets=offsets(NORM)[::-1]), ("norm",)),
    ("offsets with decimals", lambda: edited(NORM, data_offsets=[float(n) for n in offsets(NORM)]), ("norm",)),
    ("a negative dimension", lambda: edited(NORM, shape=[-64]), ("norm",)),
    ("a shape whose size overflows 64 bits", lambda: edited(NORM, shape=[2**40, 2**40]), ("norm",)),
    ("a shape larger than its bytes", lambda: edited(NORM, shape=[65]), ("norm",)),
    ("true for a dimension", lambda: edited(NORM, shape=[True, 64]), ("norm",)),
    ("a dtype that nobody knows", lambda: edited(NORM, dtype="F4_EXOTIC"), ("F4_EXOTIC",)),
    ("a number for a dtype", lambda: edited(NORM, dtype=32), ("norm",)),
    ("an entry with a key too many", lambda: edited(NORM, scale=1.0), ("norm",)),
    ("metadata that is not text", lambda: packed(json.loads(stored()[0]) | {"__metadata__": {"n": 1}}, stored()[1]),
        ("metadata",)),
)  # fmt: skip

# Name, tensors of the tiny LLaMA that are replaced, and what the refusal names.
TENSORS: tuple[tuple[str, Callable[[], dict[str, Any]], tuple[str, ...]], ...] = (
    ("no final norm", lambda: {NORM: DROP}, (r"norm\.weight", "missing")),
    ("a tensor that no LLaMA has", lambda: {"model.layers.0.mlp.router.weight": torch.zeros(4, 64)}, ("router",)),
    ("weights in 8-bit integers", lambda: {Q_PROJ: tensors()[Q_PROJ].to(torch.int8)}, ("q_proj", "int8")),
    ("weights in doubles", lambda: {Q_PROJ: tensors()[Q_PROJ].double()}, ("q_proj", "float64")),
    ("a matrix on its side", lambda: {"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 96)}, ("up_proj", "shape")),
    ("NaN in a norm", lambda: with_value(NORM, float("nan")), (r"model\.norm", "NaN")),
    ("infinity in the embedding", lambda: with_value(EMBEDDING, float("inf")), ("embed_tokens", "inf")),
    ("NaN in a linear", lambda: with_value(Q_PROJ, float("nan")), ("q_proj", "NaN")),
    ("a head beside the embedding that it is tied to", lambda: {"lm_head.weight": torch.ones(8192, 64)}, ("lm_head",)),
)

# Name, and tensors beside the tiny LLaMA's own that change no logit.
PASSED_OVER: tuple[tuple[str, Callable[[], dict[str, Tensor]]], ...] = (
    ("cached rotary tables", lambda: {f"model.layers.0.self_attn.rotary_emb.{n}_cached": torch.zeros(8, 8) for n in ("cos",
        "sin")}),
    ("inverse frequencies", lambda: {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    ("a tied head stored as well", lambda: {"lm_head.weight": tensors()[EMBEDDING].clone()}),
)  # fmt: skip


def _file(content: Callable[[], bytes], words: tuple[str, ...]) -> Callable[[Place], None]:
    return lambda place: place.opened(with_file(place, content())).refused(*words)


def _tensors(changes: Callable[[], dict[str, Any]], words: tuple[str, ...]) -> Callable[[Place], None]:
    return lambda place: place.opened(with_tensors(place, changes())).refused(*words)


def _passed_over(changes: Callable[[], dict[str, Tensor]]) -> Callable[[Place], None]:
    return lambda place: place.opens_as_plain(with_tensors(place, changes()))


CASES.extend(Case(KIND, name, _file(content, words)) for name, content, words in FILES)
CASES.extend(Case(KIND, name, _tensors(changes, words)) for name, changes, words in TENSORS)
CASES.extend(Case(KIND, name, _passed_over(changes)) for name, changes in PASSED_OVER)


@case("infinity in a head of its own")
def _(place: Place) -> None:
    head = tensors()[EMBEDDING].clone()
    head[5, 5] = float("inf")
    place.opened(with_tensors(place, {"lm_head.weight": head}, tie_word_embeddings=False)).refused("lm_head", "inf")


@case("names without the first word model")
def _(place: Place) -> None:
    model = place.model()
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors().items()}
    safetensors.torch.save_file(renamed, model / "model.safetensors")
    place.opened(model).refused(r"model\.")


@case("a header of an odd length, so that no tensor is aligned")
def _(place: Place) -> None:
    header = stored()[0].rstrip()
    place.opens_as_plain(with_file(place, packed(header + " " * (1 - len(header) % 2), stored()[1])))


@case("pickled weights alone")
def _(place: Place) -> None:
    model = place.model()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    place.opened(model).refused("pickled")


@case("a folder called model.safetensors")
def _(place: Place) -> None:
    model = place.model()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    place.opened(model).refused("safetensors")


def sharded(place: Place, **changes: str) -> Path:
    """Write the tiny LLaMA as two shards; `changes` puts tensors' names to other files in the index."""
    model = place.model()
    (model / "model.safetensors").unlink()
    halves = {1: {}, 2: {}}  # type: dict[int, dict[str, Tensor]]
    for number, (name, tensor) in enumerate(tensors().items()):
        halves[1 + number % 2][name] = tensor
    files = {number: f"model-0000{number}-of-00002.safetensors" for number in halves}
    for number, half in halves.items():
        safetensors.torch.save_file(half, model / files[number])
    weight_map = {name: files[number] for number, half in halves.items() for name in half} | changes
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model


@case("an index that leads out of the folder")
def _(place: Place) -> None:
    place.opened(sharded(place, **{NORM: "../secrets.safetensors"})).refused(r"\.\./secrets")


@case("a shard whose name is longer than a file's can be")
def _(place: Place) -> None:
    place.opened(sharded(place, **{NORM: f"{'a' * 300}.safetensors"})).refused("index|lacks")


@case("a tensor in the index whose name has 4,000 letters")
def _(place: Place) -> None:
    place.opened(sharded(place, **{"x" * 4000: "model-00001-of-00002.safetensors"})).refused("xxx")


@case("a shard that was not downloaded")
def _(place: Place) -> None:
    model = sharded(place)
    (model / "model-00002-of-00002.safetensors").unlink()
    place.opened(model).refused("model-00002-of-00002")


@case("an index that promises a tensor in the wrong shard")
def _(place: Place) -> None:
    wrong = {name: f"model-0000{n}-of-00002.safetensors" for name in (NORM,) for n in (1, 2)}
    model = sharded(place)
    found = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][NORM]
    wrong[NORM] = found.replace("00001-of", "x-of").replace("00002-of", "00001-of").replace("x-of", "00002-of")
    change = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"] | wrong
    change_json(model / "model.safetensors.index.json", {"weight_map": change})
    place.opened(model).refused(NORM)


@case("an index without a map")
def _(place: Place) -> None:
    model = sharded(place)
    change_json(model / "model.safetensors.index.json", {"weight_map": []})
    place.opened(model).refused("weight_map")


@case("two shards with one tensor in both")
def _(place: Place) -> None:
    model = sharded(place)
    for file in model.glob("model-*.safetensors"):
        safetensors.torch.save_file(safetensors.torch.load_file(file) | {NORM: tensors()[NORM]}, file)
    place.opened(model).refused(NORM)


def in_4_bits(place: Place, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Write the tiny LLaMA in 4 bits with its tensors changed."""
    model = place.folder / "nf4"
    quantize_folder(plain_model(), model)
    found = safetensors.torch.load_file(model / "model.safetensors")
    change(found)
    safetensors.torch.save_file(found, model / "model.safetensors", {"format": "pt"})
    return model


STATE = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"


def state_with(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    """Return a change to the JSON that says how q_proj is quantised."""

    def change(found: dict[str, Tensor]) -> None:
        state = json.loads(bytes(found[STATE].tolist())) | changes
        found[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


# Name, the change to the 4-bit weights; the refusal names q_proj.
IN_4_BITS: tuple[tuple[str, Callable[[dict[str, Tensor]], None]], ...] = (
    ("4 bits without their scales", lambda found: [found.pop(f"{Q_PROJ}.absmax")]),
    ("4 bits with half of their scales",
        lambda found: found.update({f"{Q_PROJ}.absmax": found[f"{Q_PROJ}.absmax"][:32].clone()})),
    ("4 bits with a table of 15 codes", lambda found: found.update({f"{Q_PROJ}.quant_map": torch.ones(15)})),
    ("4 bits with a NaN in the table", lambda found: found[f"{Q_PROJ}.quant_map"].fill_(float("nan"))),
    ("4 bits whose shape is text", state_with(shape="64x64")),
    ("4 bits whose shape is negative", state_with(shape=[-64, -64])),
    ("4 bits whose block size is 63", state_with(blocksize=63)),
    ("4 bits whose block size is a list", state_with(blocksize=[64])),
    ("4 bits whose offset is infinite", state_with(nested_offset=float("inf"))),
    ("4 bits whose state is not JSON", lambda found: found[STATE].fill_(0)),
    ("4 bits of fewer codes than weights", lambda found: found.update({Q_PROJ: found[Q_PROJ][:100].clone()})),
)  # fmt: skip


def _in_4_bits(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Place], None]:
    return lambda place: place.opened(in_4_bits(place, change)).refused("q_proj")


CASES.extend(Case("4-bit weights", name, _in_4_bits(change)) for name, change in IN_4_BITS)
