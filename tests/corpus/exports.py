"""Exports: bundles that were altered, what other programs read of a folder that edgetune wrote, and places not to write to."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from corpus.case import PROMPT, Place, change_json, of_kind, plain_adapter, plain_model
from corpus.tokenizers import byte_level
from edgetune.export.gguf.header import Header

case = of_kind("exports and bundles")


@functools.cache
def bundle() -> Path:
    """Return an export of the tiny LLaMA and its adapter to MPS."""
    folder = plain_model().parent / "bundle"
    place = Place(plain_model().parent)
    place.run("export", "mps", "--model", plain_model(), "--adapter", plain_adapter(), "--force", "--out", folder).taken()
    return folder


def altered(place: Place, **manifest: Any) -> Path:
    """Return a copy of the bundle with keys of its manifest.json changed."""
    if not plain_model().is_dir() or not bundle().is_dir():
        bundle.cache_clear()
    folder = place.folder / "bundle"
    shutil.copytree(bundle(), folder)
    change_json(folder / "manifest.json", manifest)
    return folder


def generated(place: Place, model: Path) -> Any:
    """Run `generate` on a bundle with its own adapter."""
    return place.run("generate", "--model", model, "--max-tokens", "2", "--json", "hello")


@case("a bundle as it was written")
def _(place: Place) -> None:
    assert generated(place, altered(place)).taken().json["adapter"] == "adapter"


@case("one changed weight in a bundle")
def _(place: Place) -> None:
    folder = altered(place)
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    generated(place, folder).refused(r"safetensors|weight", "export")


@case("one changed number in a bundle's adapter")
def _(place: Place) -> None:
    folder = altered(place)
    file = folder / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    generated(place, folder).refused("adapter", "export")


@case("a bundle of a later edgetune")
def _(place: Place) -> None:
    generated(place, altered(place, format=2)).refused("newer edgetune")


@case("a manifest without digests")
def _(place: Place) -> None:
    generated(place, altered(place, sha256={})).refused(r"manifest\.json")


@case("a manifest whose digests are a list")
def _(place: Place) -> None:
    generated(place, altered(place, sha256=[1])).refused(r"manifest\.json")


@case("a manifest.json of another program")
def _(place: Place) -> None:
    model = place.model()
    (model / "manifest.json").write_text(json.dumps({"name": "web app", "icons": []}))
    place.opens_as_plain(model)


@case("an export into a folder with other files")
def _(place: Place) -> None:
    notes = place.notes()
    place.run("export", "peft", "--model", plain_model(), "--adapter", plain_adapter(), "--out", notes).refused(
        "already exists"
    )
    assert len(list(notes.iterdir())) == 12


@case("a number format that the target does not have")
def _(place: Place) -> None:
    place.run("export", "gguf", "--model", plain_model(), "--adapter", plain_adapter(), "--weights", "q2_k").refused("q2_k")


@case("settings that older PEFT does not know")
def _(place: Place) -> None:
    out = place.folder / "out"
    place.run("export", "peft", "--model", plain_model(), "--adapter", plain_adapter(), "--no-verify", "--out", out).taken()
    written = json.loads((out / "adapter_config.json").read_text())
    assert not {"exclude_modules", "lora_bias", "trainable_token_indices", "target_parameters"} & written.keys()


@case("a theta in transformers 5's place alone")
def _(place: Place) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0}
    model = place.model(rope_theta=None, rope_parameters=rope)
    out = place.folder / "out"
    place.run("export", "hf", "--model", model, "--adapter", "none", "--no-verify", "--out", out).taken()
    written = json.loads((out / "config.json").read_text())
    assert written["rope_theta"] == 50000.0
    assert written["rope_scaling"]["factor"] == 2.0


@case("the tokenizer.model of another model, exported to GGUF")
def _(place: Place) -> None:
    model = place.model()
    (model / "tokenizer.json").write_text(json.dumps(byte_level()))
    out = place.folder / "out"
    outcome = place.run(
        "export", "gguf", "--model", model, "--adapter", "none", "--weights", "f16", "--no-verify", "--out", out
    )
    if outcome.code:
        outcome.refused(r"tokenizer\.model|pre-tokenizer|tokenizer")
        return
    outcome.taken()
    assert Header((out / "model.gguf").read_bytes()).keys["tokenizer.ggml.model"] == "gpt2"  # type: ignore[arg-type]


@case("an export that would hold infinity")
def _(place: Place) -> None:
    model = place.model()
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.inf
    safetensors.torch.save_file(tensors, model / "model.safetensors", {"format": "pt"})
    place.run("export", "hf", "--model", model, "--adapter", "none", "--out", place.folder / "out").refused("norm", "inf")
    place.run("quantize", model, place.folder / "small").refused("norm", "inf")
    assert not (place.folder / "small").exists()


@case("a destination that is there already")
def _(place: Place) -> None:
    place.run("quantize", plain_model(), place.notes()).refused("already exists")


@case("4 bits made of 4 bits")
def _(place: Place) -> None:
    place.run("quantize", plain_model(), place.folder / "small").taken()
    place.run("quantize", place.folder / "small", place.folder / "smaller").refused("already 4-bit")


@case("a 4-bit folder opened after it was written")
def _(place: Place) -> None:
    place.run("quantize", plain_model(), place.folder / "small").taken()
    common = ("--max-tokens", "12", "--temperature", "0", "--json")
    same = place.run("generate", "--model", plain_model(), "--weights", "nf4", "--adapter", "none", *common, PROMPT)
    assert place.opened(place.folder / "small").taken().json["text"] == same.taken().json["text"]
