"""The bundle for Apple-GPU apps opens as a model with its own adapter, and its kernels and digests are right."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from fake_mps import fake_mps
from metal_shim import needs_a_compiler
from tiny import FAMILIES, save_model, save_trainable

from edgetune import export_adapter
from edgetune.export import mps, verify
from edgetune.export.job import Job
from edgetune.library.loading import open_base
from edgetune.runtime import nf4
from edgetune.runtime.backends.metal.contract import KERNELS
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.errors import AdapterError, ModelError
from edgetune.runtime.files import sha256_file
from edgetune.runtime.quantize import quantize_folder
from edgetune.session import Session
from edgetune.training.evaluation import evaluate

PROMPT = [1, 5, 9, 13, 40]


def job(folder: Path, adapted: bool = True) -> Job:
    base = open_model(folder)
    return Job(base, "tiny", random_adapter(base.config) if adapted else None, "nf4")


def export(made: Job, folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    mps.write(made, folder)
    return folder


# Linears that are stored as one matrix are too small here to be told apart once they are doubly quantised.
SPLITTABLE = sorted(family for family in FAMILIES if not family.startswith(("phi", "granite-4")))


@pytest.mark.parametrize("family", [*SPLITTABLE, "phi3"])
def test_a_bundle_agrees_with_the_reference(family: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}
    save_model(tmp_path / "model", family, **({} if family in SPLITTABLE else wide))
    made = job(tmp_path / "model")
    bound = verify.BOUNDS["mps", "nf4"]
    found = verify.compare(
        verify.golden(made, PROMPT, mps.reference(made, tmp_path)), mps.read(made, export(made, tmp_path / "out")), bound
    )
    assert found.holds(bound), found
    bare_job = job(tmp_path / "model", adapted=False)
    bare = verify.golden(bare_job, PROMPT, mps.reference(bare_job, tmp_path))
    # The bundle is not the bare base: its adapter has an effect.
    assert not verify.compare(bare, mps.read(made, tmp_path / "out"), bound).holds(bound)


def test_a_four_bit_base_travels_as_it_is(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    quantize_folder(tmp_path / "model", tmp_path / "nf4")
    folder = export(job(tmp_path / "nf4"), tmp_path / "out")
    for file in open_model(tmp_path / "nf4").files:
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert open_model(folder).digest == open_model(tmp_path / "nf4").digest


def test_the_manifest_names_every_file_and_kernel(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    folder = export(job(tmp_path / "model"), tmp_path / "out")
    manifest = json.loads((folder / mps.MANIFEST).read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {mps.MANIFEST}
    assert manifest["sha256"] == {name: sha256_file(folder / name) for name in files}
    assert {"config.json", "adapter/adapter_model.safetensors", "kernels/nf4.metal"} <= files
    assert torch.equal(torch.tensor(manifest["code_values"]), nf4.code_table("nf4"))
    assert list(manifest["kernels"]) == [kernel.name for kernel in KERNELS]
    assert all(f"kernel void {name}(" in (folder / "kernels" / "nf4.metal").read_text() for name in manifest["kernels"])
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in files} == {0o600}


def test_a_session_opens_a_bundle_with_its_own_adapter(tmp_path: Path) -> None:
    save_trainable(tmp_path / "model")
    folder = export(job(tmp_path / "model"), tmp_path / "out")
    session = Session.load(str(folder), device="cpu")
    assert session.adapter_name == mps.ADAPTER
    notes = tmp_path / "note.md"
    notes.write_text("The tide turned at noon, and we walked back along the wet sand.\n")
    found, bare = evaluate([str(notes)], str(folder), device="cpu"), evaluate([str(notes)], str(folder), "none", "cpu")
    assert (found.adapter, bare.adapter) == (mps.ADAPTER, "none")
    assert found.bits_per_byte != bare.bits_per_byte
    adapted = session.generate("The tide", max_tokens=8, temperature=0).text
    assert adapted != Session.load(str(folder), "none", "cpu").generate("The tide", max_tokens=8, temperature=0).text


@needs_a_compiler
def test_on_an_apple_gpu_no_metal_of_a_bundle_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal source is ignored anywhere in the folder, whatever the manifest says about kernels."""
    save_trainable(tmp_path / "model")
    folder = export(job(tmp_path / "model"), tmp_path / "out")
    for name in ("kernels/nf4.metal", "nf4.metal", "adapter/nf4.metal"):
        (folder / name).write_text("#error this is never compiled\n")
    manifest = json.loads((folder / mps.MANIFEST).read_text())
    kernels = {name: {"arguments": [], "threadgroup": [1]} for name in manifest["kernels"]}
    (folder / mps.MANIFEST).write_text(json.dumps(manifest | {"kernels": kernels, "code_values": [0.0] * 16}))
    monkeypatch.chdir(folder)
    compiled: list[str] = []
    with fake_mps(monkeypatch) as machine:
        machine.source_changes = lambda source: compiled.append(source) or source  # type: ignore[func-returns-value]
        session = Session.load(".", device="mps")
        text = session.generate("The tide", max_tokens=4, temperature=0).text
        assert session.adapter_name == mps.ADAPTER
    assert machine.launches
    assert compiled
    assert all(source.endswith(mps.kernel_source()) for source in compiled)
    assert all("never compiled" not in source for source in compiled)
    assert text == Session.load(".", device="cpu").generate("The tide", max_tokens=4, temperature=0).text


def test_an_adapter_that_was_changed_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    folder = export(job(tmp_path / "model"), tmp_path / "out")
    weights = folder / "adapter" / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(AdapterError, match="differs from the one"):
        mps.read_adapter(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_base_that_was_changed_is_refused_when_it_opens(file: str, tmp_path: Path) -> None:
    """A flipped bit far from the samples that a base's digest covers."""
    save_trainable(tmp_path / "model")
    folder = export(job(tmp_path / "model"), tmp_path / "out")
    assert open_base(str(folder))[1].quant is not None
    damaged = bytearray((folder / file).read_bytes())
    damaged[len(damaged) // 3] ^= 1 if file == "model.safetensors" else 0
    (folder / file).write_bytes(bytes(damaged) + (b"" if file == "model.safetensors" else b" "))
    with pytest.raises(
        ModelError, match=rf"^{file} in .*out differs from the one in its manifest\.json, so it is not the model"
    ):
        open_base(str(folder))


def test_a_model_folder_is_no_bundle(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    assert mps.read_adapter(tmp_path / "model") is None


def test_another_programs_manifest_is_no_bundle_and_a_newer_one_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    for text in ("{}", "[]", '{"name": "my app", "icons": []}'):
        (tmp_path / "model" / mps.MANIFEST).write_text(text)
        assert mps.read_adapter(tmp_path / "model") is None
    folder = export(job(tmp_path / "model"), tmp_path / "out")
    manifest = json.loads((folder / mps.MANIFEST).read_text())
    (folder / mps.MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(AdapterError, match="newer edgetune"):
        mps.read_adapter(folder)


def test_golden_json_is_among_the_manifests_digests(tmp_path: Path) -> None:
    save_trainable(tmp_path / "model")
    export_adapter("mps", str(tmp_path / "model"), "none", tmp_path / "out", check=False)
    digests = json.loads((tmp_path / "out" / mps.MANIFEST).read_text())["sha256"]
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(digests) == files - {mps.MANIFEST}
    assert digests["golden.json"] == sha256_file(tmp_path / "out" / "golden.json")
