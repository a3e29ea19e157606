"""With `export peft`, transformers and peft compute what the reference computes in fp32, and print nothing needless."""

from __future__ import annotations

import json
import re
import shutil
import stat
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import job_for, random_adapter, write_and_compare
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import save_model

import edgetune
from edgetune.cli.main import cli
from edgetune.export import peft as target
from edgetune.export import verify
from edgetune.export.targets import TARGETS, load_target
from edgetune.exporting import export_adapter
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.errors import AdapterError, ModelError, ResourceError, UsageError
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.weight_files import INDEX

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

DEMO = Path(edgetune.__file__).parent / "demo"


@pytest.fixture
def demo_adapter(tmp_path: Path) -> Path:
    peft_folder.save(random_adapter(open_model(DEMO).config, rank=8), tmp_path / "adapter", "demo")
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", ["llama-3.2-tied-scaled", "qwen2", "qwen3", "mistral-window"])
def test_peft_on_dense_bases_gives_the_references_logits(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "base", family)
    base = open_model(tmp_path / "base")
    _, found = write_and_compare("peft", job_for(base, random_adapter(base.config)), tmp_path / "out")
    assert found.greedy_match
    assert found.max_logit_difference < 1e-4


def test_peft_on_a_4bit_base_computes_in_fp32(tmp_path: Path) -> None:
    save_model(tmp_path / "dense", "qwen2", intermediate_size=128)
    quantize_folder(tmp_path / "dense", tmp_path / "base")
    base = open_model(tmp_path / "base")
    _, found = write_and_compare("peft", job_for(base, random_adapter(base.config)), tmp_path / "out")
    assert found.greedy_match
    assert found.max_logit_difference < 1e-4


def test_what_bitsandbytes_misreads_on_this_cpu_is_not_taken_for_a_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "dense", intermediate_size=96)
    quantize_folder(tmp_path / "dense", tmp_path / "base")
    base = open_model(tmp_path / "base")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(ModelError, match=r"number of inputs \(96\) is not a multiple of their block size \(64\)"):
        write_and_compare("peft", job_for(base, random_adapter(base.config)), tmp_path / "out")


@pytest.mark.parametrize("one_shard", [False, True])
def test_transformers_opens_a_base_that_edgetune_laid_out(
    one_shard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the model's own folder, transformers would load the adapter that an adapter_config.json there names."""
    model = save_model(tmp_path / "whole")
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    if one_shard:
        for file in (tmp_path / "base").glob("*.safetensors"):
            file.unlink()
        shard = shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "base" / "model-00001-of-00001.safetensors")
        weight_map = dict.fromkeys(load_file(shard), shard.name)
        (tmp_path / "base" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "base" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil"}))
    base, opened = open_model(tmp_path / "base"), []
    open_transformers = target.open_transformers
    monkeypatch.setattr(
        target,
        "open_transformers",
        lambda folder: opened.append({file.name for file in folder.iterdir()}) or open_transformers(folder),
    )
    _, found = write_and_compare("peft", job_for(base, random_adapter(base.config)), tmp_path / "out")
    assert found.max_logit_difference < 1e-4
    assert (len(base.files) == 1) == one_shard
    assert opened == [{"config.json", INDEX, *(file.name for file in base.files)}]
    assert not (tmp_path / "out" / ".work").exists()


def test_an_adapter_on_some_layers_travels(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    base = open_model(tmp_path / "base")
    adapter = random_adapter(base.config, layers=(1,))
    _, found = write_and_compare("peft", job_for(base, adapter), tmp_path / "out")
    assert found.max_logit_difference < 1e-4
    back = peft_folder.load(tmp_path / "out")
    assert back.layers == (1,)
    assert set(back.tensors) == set(adapter.tensors)


def test_the_command_proves_the_demos_export(demo_adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["export", "peft", "--model", "demo", "--adapter", str(demo_adapter), "--out", str(out), "--json"]
    run = CliRunner().invoke(cli, arguments)
    assert run.exit_code == 0, run.output
    *events, result = (json.loads(line) for line in run.stdout.splitlines())
    assert [(event["event"], event["stage"], event["done"]) for event in events] == [
        ("working", "measuring", 0), ("working", "measuring", 1), ("working", "proving", 0), ("working", "proving", 1)
    ]  # fmt: skip
    assert result["target"] == "peft"
    assert result["verified"]
    assert result["greedy_match"]
    assert 0 < result["max_logit_difference"] < 1e-3
    assert result["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o600}
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    named, base, warned = run.stderr.splitlines()
    assert named == f"Model demo, adapter {demo_adapter.name}."
    assert base == "PEFT cannot find a base named demo: load the base from its folder, then the adapter onto it."
    assert warned.startswith("The notes that were trained on")
    assert capfd.readouterr().err == ""  # no progress bars and no advice from other packages


def test_golden_json_holds_what_the_reference_says(demo_adapter: Path, tmp_path: Path) -> None:
    result = export_adapter("peft", "demo", str(demo_adapter), tmp_path / "out", check=False)
    assert not result.verified
    assert result.max_logit_difference is None
    golden = json.loads((tmp_path / "out" / verify.GOLDEN_FILE).read_text())
    job = job_for(open_model(DEMO), peft_folder.load(tmp_path / "out"))
    ids, prompt = golden["token_ids"], golden["prompt_tokens"]
    assert len(ids) == prompt + verify.WRITTEN_TOKENS
    logits = verify.golden(job, ids[:prompt], job.model()).logits
    values, tokens = logits.topk(verify.STORED_LOGITS)
    assert golden["top_token_ids"] == tokens.tolist()
    assert torch.allclose(torch.tensor(golden["top_logits"]), values, atol=1e-4)
    assert tokens[prompt - 1 : -1, 0].tolist() == ids[prompt:]  # the text is the greedy choice
    assert (golden["target"], golden["base"]) == ("peft", open_model(DEMO).digest)


def test_a_corrupted_export_is_caught_and_leaves_nothing(
    demo_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = target.SPEC

    def flip(job, folder):
        written, file = spec.write(job, folder), folder / peft_folder.WEIGHTS_FILE
        tensors = load_file(file)
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name].view(-1)[5] += 8.0
        save_file(tensors, file)
        return written

    monkeypatch.setattr(target, "SPEC", replace(spec, write=flip))
    with pytest.raises(ModelError, match="does not agree with edgetune's own model"):
        export_adapter("peft", "demo", str(demo_adapter), tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []

    def cut(job, folder):
        written, file = spec.write(job, folder), folder / peft_folder.WEIGHTS_FILE
        file.write_bytes(file.read_bytes()[:1000])
        return written

    monkeypatch.setattr(target, "SPEC", replace(spec, write=cut))
    with pytest.raises(ModelError, match=r"peft in fp32 cannot open the export to peft .*--no-verify"):
        export_adapter("peft", "demo", str(demo_adapter), tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_what_cannot_be_done_is_told_before_anything_is_written(
    demo_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"already exists and contains thesis.txt, which is not part of an export"):
        export_adapter("peft", "demo", str(demo_adapter), tmp_path / "mine")
    for name, weights, sentence in (
        ("peft", "none", "export peft has no --weights none: it writes the adapter alone; leave --weights out."),
        ("mps", "fp16", "export mps has no --weights fp16; expected nf4."),
        ("mlx", "none", "has no --weights none; expected one of bf16, fp16, int4, or no --weights for the adapter alone."),
    ):
        with pytest.raises(UsageError, match=re.escape(sentence)):
            export_adapter(name, "demo", str(demo_adapter), tmp_path / "out", weights=weights)
    with pytest.raises(UsageError, match="no --adapter-as inputs; leave it out, it is for coreml"):
        export_adapter("peft", "demo", str(demo_adapter), tmp_path / "out", adapter_as="inputs")
    with pytest.raises(AdapterError, match=r"no adapter of demo to export; train one, or name one with --adapter\.$"):
        export_adapter("peft", "demo", "none", tmp_path / "out")
    with pytest.raises(ResourceError, match=r"or --no-verify and \d+MB to write it unproved\."):
        export_adapter("peft", "demo", str(demo_adapter), tmp_path / "out", memory=248_000_000)
    for needs, said in (
        (("torch", "no_such"), r"needs no_such, which is not installed; type pip install 'edgetune\[peft\]'"),
        (("no_such", "torch", "nor_this"), "needs no_such and nor_this, which are not installed"),
    ):
        monkeypatch.setattr(target, "SPEC", replace(target.SPEC, packages=needs))
        with pytest.raises(ResourceError, match=said):
            export_adapter("peft", "demo", str(demo_adapter), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_every_target_names_all_that_its_reader_imports() -> None:
    """The extra must install each of these packages, so that none is found missing after the work is done."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras, spelt = project["project"]["optional-dependencies"], {"llama_cpp": "llama-cpp-python", "mlx_lm": "mlx-lm"}
    found = {}
    for name in TARGETS:
        spec = load_target(name)
        installed = [re.split(r"[\[>;]", line)[0] for line in extras.get(spec.extra, [])]
        also = [package for form in spec.also_needs.values() for package in form]
        assert {spelt.get(package, package) for package in (*spec.packages, *also)} <= set(installed), name
        found[name] = set(spec.packages)
    assert found["hf"] == {"transformers", "accelerate"}
    assert found["peft"] == {"peft", "transformers", "accelerate", "bitsandbytes"}
    assert found["mlx"] == {"mlx_lm", "mlx"}
    assert found["gguf"] == found["ollama"] == {"llama_cpp", "gguf"}


def test_an_adapter_of_another_base_is_refused_with_all_mismatches(demo_adapter: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    base = open_model(tmp_path / "base")
    with pytest.raises(AdapterError) as caught:
        adapters.check_fits(peft_folder.load(demo_adapter), base.config)
    said = str(caught.value)
    assert "the model has no layers 2-7; " in said
    for name, (rows, columns) in open_model(DEMO).config.linear_shapes().items():
        out, inputs = base.config.linear_shapes()[name]
        found, expected = f"({8}, {columns}) and lora_B ({rows}, 8)", f"(8, {inputs}) and ({out}, 8)"
        assert f"layers 0-1 {name}: lora_A is {found}, expected {expected}" in said
    assert len(said) < 1000


def test_a_base_packed_into_bf16_is_proved_and_names_no_code_to_load(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage is bfloat16 where FSDP shards the model. The folder also tries to lead transformers elsewhere."""
    save_model(tmp_path / "dense", intermediate_size=128)
    quantize_folder(tmp_path / "dense", tmp_path / "base")
    weights, config_file = tmp_path / "base" / "model.safetensors", tmp_path / "base" / "config.json"
    packed = {
        name: tensor.view(-1).view(torch.bfloat16).view(-1, 1).clone() if name.endswith("_proj.weight") else tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(packed, weights, {"format": "pt"})
    config = json.loads(config_file.read_text())
    config["quantization_config"]["bnb_4bit_quant_storage"] = "bfloat16"
    elsewhere = {"attn_implementation": "a/kernel", "_attn_implementation": "a/kernel", "auto_map": {"AutoModel": "a--b.C"}}
    config_file.write_text(json.dumps(config | elsewhere))
    (tmp_path / "base" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere"}))
    base = open_model(tmp_path / "base")
    _, found = write_and_compare("peft", job_for(base, random_adapter(base.config)), tmp_path / "out")
    assert found.max_logit_difference < 1e-4
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        (peft_folder.CONFIG_FILE, peft_folder.EDGETUNE_FILE, peft_folder.WEIGHTS_FILE)
    )
