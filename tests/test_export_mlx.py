"""mlx-lm loads what `export mlx` writes, edgetune reads what mlx-lm writes, and both round trips keep every bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import job_for, random_adapter, write_and_compare
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny import save_model

import edgetune
from edgetune.export import effect
from edgetune.export.merge import DenseRecipe, Merged
from edgetune.export.mlx import affine, reader, target
from edgetune.export.mlx.adapter import ADAPTER_FILE, CONFIG_FILE, is_adapter, read_adapter, write_adapter
from edgetune.export.mlx.model import mlx_config
from edgetune.export.mlx.reader import MlxReader, open_mlx
from edgetune.exporting import export_adapter
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.error_feedback import nearest
from edgetune.runtime.errors import AdapterError, ModelError, UsageError
from edgetune.runtime.model_folder import write_model

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

DEMO = Path(edgetune.__file__).parent / "demo"
FAMILIES = ["llama-3.2-tied-scaled", "llama-linear-rope", "llama-head-dim", "llama-attention-bias", "qwen2", "qwen3"]


def same(one: Adapter, other: Adapter) -> bool:
    return (
        (one.config, one.layers) == (other.config, other.layers)
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_gives_the_references_logits(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "base", family)
    base = open_model(tmp_path / "base")
    adapter = random_adapter(base.config)
    written, found = write_and_compare("mlx", job_for(base, adapter), tmp_path / "adapter")
    assert found.greedy_match
    assert found.max_logit_difference < 1e-3
    assert written.notices == ()
    _, found = write_and_compare("mlx", job_for(base, adapter, "fp16"), tmp_path / "fused")
    assert found.greedy_match
    assert found.max_logit_difference < 0.2
    # The base that was written for the proof must be deleted.
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_base_of_a_proof_lies_within_the_export_and_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process then leaves only the export's own temporary folder, which the next run removes."""
    save_model(tmp_path / "base")
    base = open_model(tmp_path / "base")
    job, seen = job_for(base, random_adapter(base.config)), []

    def opened(folder: Path, adapter: Path) -> None:
        seen.extend((path.relative_to(adapter), path.stat().st_mode & 0o777) for path in (folder, *folder.iterdir()))

    monkeypatch.setattr(reader, "open_mlx", opened)
    (tmp_path / "out").mkdir()
    target.write(job, tmp_path / "out")
    target.read(job, tmp_path / "out")
    assert (Path(".work"), 0o700) in seen
    assert (Path(".work/model.safetensors"), 0o600) in seen
    assert {mode for _, mode in seen[1:]} == {0o600}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapters.safetensors"]


def test_a_window_that_mlx_lm_ignores_is_told(tmp_path: Path) -> None:
    save_model(tmp_path / "base", "mistral-window")
    base = open_model(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (notice,) = target.write(job_for(base, random_adapter(base.config)), tmp_path / "out").notices
    assert notice == "mlx-lm ignores this model's sliding window: its answers will differ beyond 16 tokens."


def test_layers_without_a_window_between_those_with_one_are_honoured(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    save_model(tmp_path / "base", "mistral-window")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"layer_types": kinds, "sliding_window": 6}))
    base = open_model(tmp_path / "base")
    written, found = write_and_compare("mlx", job_for(base, random_adapter(base.config), "fp16"), tmp_path / "out")
    assert written.notices == ()
    assert found.greedy_match
    assert found.max_logit_difference < 0.2


@pytest.mark.parametrize("family", ["llama-2-grouped", "qwen2", "qwen3"])
def test_mlx_lm_reads_the_4bit_model_as_edgetune_does(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effect, "TOKENS", 1024)
    save_model(tmp_path / "base", family, intermediate_size=128)
    base = open_model(tmp_path / "base")
    job = job_for(base, random_adapter(base.config, size=0.3), "int4", force=True)
    written, found = write_and_compare("mlx", job, tmp_path / "out")
    assert found.greedy_match
    assert found.max_logit_difference < 1e-3
    assert dict(written.facts)["adapter_effect_kept"] > 0.3
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint32
    assert stored["model.layers.0.mlp.up_proj.weight"].shape == (128, 8)


@pytest.mark.slow
def test_a_base_whose_codes_say_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong export still agrees with itself, so it is compared with the model that it was made from."""
    monkeypatch.setattr(effect, "TOKENS", 512)
    job = job_for(open_model(DEMO), None, "int4")
    (tmp_path / "right").mkdir()
    ((name, kl),) = target.write(job, tmp_path / "right").facts
    assert name == "kl_of_rounding"
    assert 0 < kl < effect.MOST_KL / 5
    tensors = affine.AffineGrid.tensors
    monkeypatch.setattr(affine.AffineGrid, "tensors", lambda self, name, codes: tensors(self, name, codes * 0))
    (tmp_path / "wrong").mkdir()
    with pytest.raises(ModelError, match=r"Rounding to int4 changes the model by KL [\d.]+ on .* --weights bf16, or"):
        target.write(job, tmp_path / "wrong")


@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "tiny", "zero", "constant"])
def test_groups_are_mlx_cores_bit_for_bit(kind: str) -> None:
    weight = {
        "normal": torch.randn(48, 256) * 0.02,
        "positive": torch.rand(8, 64) + 1,
        "negative": -torch.rand(8, 128),
        "tiny": torch.randn(3, 64) * 1e-9,
        "zero": torch.zeros(2, 64),
        "constant": torch.full((2, 64), 0.3),
    }[kind]
    packed, scales, biases = mx.quantize(mx.array(weight.numpy()), affine.GROUP, affine.BITS)
    scale, bias = affine.affine_groups(weight)
    assert np.array_equal(scale.numpy(), np.array(scales))
    assert np.array_equal(bias.numpy(), np.array(biases))
    grid = affine.AffineGrid(scale, bias)
    grid._scale, grid._bias = scale, bias  # in fp32, like mlx's own
    tensors = grid.tensors("x.weight", nearest(weight, grid))
    assert np.array_equal(tensors["x.weight"].view(torch.int32).numpy().view(np.uint32), np.array(packed))
    ours = affine.affine_weight(tensors["x.weight"], scale, bias)
    assert np.array_equal(ours.numpy(), np.array(mx.dequantize(packed, scales, biases, affine.GROUP, affine.BITS)))


def test_a_model_whose_rows_are_no_whole_groups_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    with pytest.raises(UsageError, match=r"linears with 96 inputs, which is not a multiple of 64, .* type --weights bf16"):
        target.write(job_for(open_model(tmp_path / "base"), None, "int4"), tmp_path)


@pytest.mark.parametrize("weights", ["", "bf16", "int4"])
def test_a_model_that_mlx_lm_has_no_place_for_is_refused_before_anything_is_written(weights: str, tmp_path: Path) -> None:
    save_model(tmp_path / "base", "qwen3", attention_bias=True)
    base = open_model(tmp_path / "base")
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"mlx-lm's Qwen3 has no biases, and a base has them in its attention"):
        target.write(job_for(base, random_adapter(base.config), weights), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(4, 8.0, 0.05),
        LoraConfig(6, 16.0, 0.0, ("q_proj", "v_proj")),
        LoraConfig(3, 1.0, 0.1, ("down_proj",), rslora=True),
    ],
)
@pytest.mark.parametrize("layers", [None, (1,), (0,)])
def test_peft_to_mlx_to_peft_changes_no_byte(config: LoraConfig, layers: tuple[int, ...] | None, tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    shape = open_model(tmp_path / "base").config
    made = random_adapter(shape, config.rank, config.alpha, config.targets, layers=layers)
    made = replace(made, config=config)
    peft_folder.save(made, tmp_path / "peft", "a base")
    (tmp_path / "mlx").mkdir()
    write_adapter(peft_folder.load(tmp_path / "peft"), tmp_path / "mlx", "a base", shape.num_layers)
    assert is_adapter(tmp_path / "mlx")
    back = read_adapter(tmp_path / "mlx")
    assert same(back, made)
    peft_folder.save(back, tmp_path / "again", "a base")
    for file in (peft_folder.WEIGHTS_FILE, peft_folder.CONFIG_FILE):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()


def test_an_adapter_that_mlx_lm_trained_is_read(tmp_path: Path) -> None:
    """Uses LoRA layers that mlx-lm itself makes on the last of two layers, saved as its trainer saves them."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    save_model(tmp_path / "base", "qwen3")
    base = open_model(tmp_path / "base")
    (tmp_path / "model").mkdir()
    target.write(job_for(base, None, "fp16"), tmp_path / "model")
    model = open_mlx(tmp_path / "model")
    settings = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    model.freeze()
    linear_to_lora_layers(model, 1, settings)
    with mx.stream(mx.cpu):
        trained = {name: mx.random.normal(value.shape) * 0.05 for name, value in tree_flatten(model.trainable_parameters())}
        model.load_weights(list(trained.items()), strict=False)
        (tmp_path / "theirs").mkdir()
        mx.save_safetensors(str(tmp_path / "theirs" / ADAPTER_FILE), trained)
    about = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (tmp_path / "theirs" / CONFIG_FILE).write_text(json.dumps(about))
    adapter = read_adapter(tmp_path / "theirs")
    assert (adapter.layers, adapter.config.scale, adapter.config.targets) == ((1,), 20.0, ("q_proj", "down_proj"))
    (tmp_path / "fused").mkdir()
    job = job_for(open_model(tmp_path / "model"), adapter)
    with torch.no_grad():
        from edgetune.export import verify

        expected = verify.golden(job, [1, 5, 9, 17], job.model()).logits[:4]
    found = MlxReader(model).logits([1, 5, 9, 17])
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fine_tune_type": "dora"}, "has fine_tune_type 'dora'; expected lora"),
        ({"num_layers": "all"}, "num_layers 'all'; expected a whole number"),
        ({"lora_parameters": {"scale": 2.0}}, "unusable: it has no 'rank'; copy"),
        ({"lora_parameters": {"rank": 4, "scale": float("nan")}}, "is not valid JSON .it holds NaN"),
        ({"lora_parameters": {"rank": 4, "scale": 0}}, "unusable: Alpha is 0"),
    ],
)
def test_what_is_no_plain_lora_is_refused(change: dict[str, object], said: str, tmp_path: Path) -> None:
    write_adapter(random_adapter(open_model(DEMO).config, targets=("q_proj",)), tmp_path, "demo", 8)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=said):
        read_adapter(tmp_path)


def test_damaged_and_foreign_tensors_are_refused(tmp_path: Path) -> None:
    write_adapter(random_adapter(open_model(DEMO).config, targets=("q_proj",)), tmp_path, "demo", 8)
    file = tmp_path / ADAPTER_FILE
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.m": torch.ones(3)}, file)
    with pytest.raises(AdapterError, match=r"not LoRA of a LLaMA linear: 'model.*q_proj\.m'\)"):
        read_adapter(tmp_path)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, file)
    with pytest.raises(AdapterError, match=r"inf or NaN: .* and 8 more"):
        read_adapter(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(AdapterError, match="is truncated"):
        read_adapter(tmp_path)


_READS = """
import sys
from pathlib import Path
import mlx.core as mx
from edgetune.export.merge import DenseRecipe, Merged
from edgetune.export.mlx.model import mlx_config
from edgetune.export.mlx.reader import MlxReader, open_mlx
if sys.argv[2] == "compiled":
    mx.disable_compile = lambda: None
print(MlxReader(open_mlx(Path(sys.argv[1]))).logits([1, 5, 9]).sum().item())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_mlx_loads_no_library_from_the_temporary_folder(tmp_path: Path) -> None:
    """With MLX's compiler on, the last run shows, it keeps libraries in a place that another user can predict and fill."""
    save_model(tmp_path / "base")
    base, temporary = open_model(tmp_path / "base"), tmp_path / "tmp"
    temporary.mkdir()
    write_model(
        base.folder, tmp_path / "model", mlx_config(base.hf_config, base.config), DenseRecipe(Merged(base, None), torch.float32)
    )

    def left_by(how: str) -> list[str]:
        environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-c", _READS, tmp_path / "model", how], env=environment, check=True, capture_output=True
        )
        return [path.name for path in temporary.rglob("*.so")]

    assert left_by("as edgetune does") == []
    assert left_by("compiled") != []


def test_the_command_proves_the_demo_and_mlx_lm_writes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft_folder.save(random_adapter(open_model(DEMO).config), tmp_path / "adapter", "demo")
    result = export_adapter("mlx", "demo", str(tmp_path / "adapter"), tmp_path / "out")
    assert result.verified
    assert result.greedy_match
    assert "edgetune export mlx --adapter none --weights bf16" in result.notices[0]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {ADAPTER_FILE, CONFIG_FILE, "golden.json"}
    fused = export_adapter("mlx", "demo", str(tmp_path / "adapter"), tmp_path / "fused", weights="fp16")
    model, tokenizer = mlx_lm.load(str(tmp_path / "fused"))
    assert mlx_lm.generate(model, tokenizer, prompt="The lighthouse", max_tokens=8)
    assert fused.max_logit_difference < 0.1
    spec = target.SPEC

    def flipped(job, folder):
        tensors = load_file(folder / ADAPTER_FILE)
        next(iter(tensors.values()))[0, 0] += 30.0
        save_file(tensors, folder / ADAPTER_FILE)
        return spec.read(job, folder)

    monkeypatch.setattr(target, "SPEC", replace(spec, read=flipped))
    with pytest.raises(ModelError, match="does not agree with edgetune's own model"):
        export_adapter("mlx", "demo", str(tmp_path / "adapter"), tmp_path / "third")
    assert not (tmp_path / "third").exists()
