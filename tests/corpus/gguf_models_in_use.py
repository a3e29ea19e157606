"""GGUF models as people have them: in parts, in the folders of other programs, and odd ones that are right."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from corpus.case import CASES, Case, Place, text_of
from corpus.gguf_files import packed
from corpus.gguf_models import EMBEDDING, KIND, array, case, keys, model, tensors, written

# --- split files ------------------------------------------------------------------------------------------------------------


def part_keys(number: int, count: int = 3, all_tensors: int | None = None) -> dict[str, Any]:
    """Return the keys of a part; the first has the model's as well."""
    split = {
        "split.no": (2, struct.pack("<H", number)),
        "split.count": (2, struct.pack("<H", count)),
        "split.tensors.count": (5, struct.pack("<i", len(tensors()) if all_tensors is None else all_tensors)),
    }
    return (keys() if number == 0 else {}) | split


def write_parts(place: Place, change: Callable[[list[bytes]], None] = lambda parts: None, **lies: Any) -> Path:
    """Write the tiny LLaMA in three parts, after a change to their bytes; return the path of the first."""
    items = list(tensors().items())
    bounds = [0, 1, len(items) // 2, len(items)]
    parts = [packed(part_keys(n, **lies), dict(items[bounds[n] : bounds[n + 1]])) for n in range(3)]
    change(parts)
    for number, content in enumerate(parts, 1):
        written(place, content, f"model-{number:05}-of-00003.gguf")
    return place.folder / "model-00001-of-00003.gguf"


@case("a model in three parts")
def _(place: Place) -> None:
    place.writes_as(write_parts(place), text_of())


@case("a model whose second part is missing")
def _(place: Place) -> None:
    first = write_parts(place)
    (place.folder / "model-00002-of-00003.gguf").unlink()
    place.converted(first).refused(r"model-00002-of-00003\.gguf is missing")


@case("the second part named as the model")
def _(place: Place) -> None:
    write_parts(place)
    place.converted(place.folder / "model-00002-of-00003.gguf").refused(
        "not the first part", r"name model-00001-of-00003\.gguf"
    )


@case("a first part under another name")
def _(place: Place) -> None:
    write_parts(place).rename(place.folder / "renamed.gguf")
    place.converted(place.folder / "renamed.gguf").refused("split into 3 files", "-of-00003")


@case("a second part that is the third")
def _(place: Place) -> None:
    place.converted(write_parts(place, lambda parts: parts.__setitem__(1, parts[2]))).refused("says part 3 of 3")


@case("a second part of another model, with the same tensors as the first")
def _(place: Place) -> None:
    def change(parts: list[bytes]) -> None:
        parts[1] = packed(part_keys(1), dict([next(iter(tensors().items()))]))

    place.converted(write_parts(place, change)).refused("00002", "given twice")


@case("a last part that is cut off")
def _(place: Place) -> None:
    place.converted(write_parts(place, lambda parts: parts.__setitem__(2, parts[2][:-5000]))).refused(
        "00003-of-00003", "cut off"
    )


@case("parts that hold fewer tensors than the first announces")
def _(place: Place) -> None:
    place.converted(write_parts(place, all_tensors=99)).refused(f"{len(tensors())} tensors of the 99")


@case("65,535 parts")
def _(place: Place) -> None:
    content = model(keys() | {"split.count": (2, struct.pack("<H", 65535))})
    place.converted(written(place, content, "model-00001-of-65535.gguf")).refused(r"split\.count is 65535")


@case("a number of parts in quotes")
def _(place: Place) -> None:
    place.converted(written(place, model(keys() | {"split.count": "3"}))).refused(r"split\.count is 3")


# --- odd, but right ---------------------------------------------------------------------------------------------------------


# Name and file of a model that writes what the tiny LLaMA writes.
TAKEN: tuple[tuple[str, Callable[[], bytes]], ...] = (
    ("the tiny LLaMA as it is", model),
    ("version 2", lambda: model(version=2)),
    ("an alignment of 8", lambda: model(keys() | {"general.alignment": 8}, alignment=8)),
    ("an alignment of 4,096", lambda: model(keys() | {"general.alignment": 4096}, alignment=4096)),
    ("tensors in the opposite order", lambda: model(None, dict(reversed(tensors().items())))),
    ("keys in the opposite order", lambda: model(list(reversed(keys().items())))),
    ("bytes after the end", lambda: model() + bytes(5000)),
    ("300,000 empty texts under a key of their own", lambda: model(keys() | {"x": array(8, 300_000, bytes(2_400_000))})),
    ("keys of every kind that say nothing", lambda: model(
        keys(expert_count=0, expert_used_count=0, logit_scale=0.0, use_parallel_residual=False)
        | {"general.tags": ["a", "b"], "general.size_label": "1M", "x": (12, bytes(8)), "y": array(5, 0)})),
    ("the sizes of a head, spelled out", lambda: model(
        keys(attention__key_length=16, attention__value_length=16, rope__dimension_count=16, vocab_size=8192))),
    ("a scaling of RoPE that is switched off", lambda: model(keys(rope__scaling__type="none", rope__scaling__factor=4.0))),
    ("factors of RoPE that are all 1", lambda: model(None, tensors(rope_freqs__weight=torch.ones(8)))),
    ("a head that is the embedding", lambda: model(None, tensors(output__weight=tensors()[EMBEDDING]))),
    ("no type of file", lambda: model(keys("general.type"))),
)  # fmt: skip


def _taking(content: Callable[[], bytes]) -> Callable[[Place], None]:
    return lambda place: place.writes_as(written(place, content()), text_of())


CASES.extend(Case(KIND, name, _taking(content)) for name, content in TAKEN)


@case("a blob of Ollama, which has no .gguf in its name")
def _(place: Place) -> None:
    place.writes_as(written(place, model(), "blobs/sha256-" + "ab" * 32), text_of())


@case("a link in the cache of Hugging Face")
def _(place: Place) -> None:
    written(place, model(), "models--a--b/blobs/1234")
    snapshot = place.folder / "models--a--b" / "snapshots" / "5678"
    snapshot.mkdir(parents=True)
    (snapshot / "model.gguf").symlink_to("../../blobs/1234")
    place.writes_as(snapshot / "model.gguf", text_of())


@case("matrices in f16 and bf16, vectors in f32")
def _(place: Place) -> None:
    half = [name for name, tensor in tensors().items() if tensor.dim() == 2]
    rounded = {name: tensors()[name].half() if n % 2 else tensors()[name].bfloat16() for n, name in enumerate(half)}
    place.converted(written(place, model(None, tensors() | rounded))).taken()
    (place.folder / "converted").rename(place.folder / "small")
    exact = {name: tensor.float() for name, tensor in rounded.items()}
    text = place.opened(place.folder / "small").taken().json["text"]
    place.writes_as(written(place, model(None, tensors() | exact)), text)


@case("a linear scaling of RoPE")
def _(place: Place) -> None:
    scaled = place.opened(place.model(rope_scaling={"type": "linear", "factor": 8.0})).taken().json["text"]
    assert scaled != text_of()
    place.writes_as(written(place, model(keys(rope__scaling__type="linear", rope__scaling__factor=8.0))), scaled)


@case("a sliding window, as in Mistral")
def _(place: Place) -> None:
    window = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 2}
    windowed = place.opened(place.model(**window)).taken().json["text"]
    assert windowed != text_of()
    place.writes_as(written(place, model(keys(attention__sliding_window=2))), windowed)
