"""Plain LoRA on some linears of some layers, with ranks and alphas of their own: it gives PEFT's logits, and travels."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from adapters import PROMPT, job_for, random_adapter, write_and_compare

import edgetune
from edgetune.config import TrainConfig
from edgetune.export.gguf import adapter as gguf_adapter
from edgetune.export.mlx import adapter as mlx_adapter
from edgetune.library import adapter_registry as registry
from edgetune.runtime import adapter as adapters
from edgetune.runtime import peft_folder
from edgetune.runtime.adapter import Adapter
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LINEARS, LoraConfig
from edgetune.runtime.errors import AdapterError
from edgetune.runtime.loader import load_llama
from edgetune.runtime.module_patterns import ModulePattern
from edgetune.runtime.runner import Runner
from edgetune.training.setup import named_adapter

FAMILY = "llama-2-grouped"
DEMO = Path(edgetune.__file__).parent / "demo"
VOCABULARY = open_model(DEMO).config.vocab_size
"""Tokens of the model here, as many as its tokenizer has, which is the demo's."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny.save_model(folder, FAMILY, vocab_size=VOCABULARY)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def logits(base: Path, adapter: Adapter | None) -> torch.Tensor:
    model = load_llama(open_model(base), torch.float32)
    if adapter is not None:
        adapters.attach(model, adapter)
    with torch.no_grad():
        return model.logits(Runner(model).read(PROMPT)).float()


def peft_logits(folder: Path) -> torch.Tensor:
    import peft

    theirs = peft.PeftModel.from_pretrained(tiny.transformers_model(FAMILY, vocab_size=VOCABULARY), str(folder))
    with torch.no_grad():
        logits: torch.Tensor = theirs(torch.tensor([PROMPT])).logits[0]
        return logits


def made_by_peft(folder: Path, **settings: Any) -> None:
    """Let PEFT write an adapter with these settings, its matrices random."""
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings})
    theirs = peft.get_peft_model(tiny.transformers_model(FAMILY, vocab_size=VOCABULARY), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    theirs.save_pretrained(str(folder))
    config_file = folder / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"init_lora_weights": True}))


IRREGULAR: dict[str, dict[str, Any]] = {
    "a regular expression": {"target_modules": r".*\.(self_attn|mlp)\.(q_proj|down_proj)"},
    "a hostile regular expression of one layer": {"target_modules": r"(?:.*?(?:layers).*?(?:1).*?(?:q_proj|k_proj).*?)+"},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    "names with a layer": {"target_modules": ["1.self_attn.q_proj", "0.mlp.down_proj", "0.mlp.up_proj"]},
    "names that the model lacks": {"target_modules": ["q_proj", "c_attn", "w1"]},
    "all linears": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "a layer as a number, and its pattern": {
        "target_modules": ["o_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "ranks": {"target_modules": list(LINEARS), "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}},
    "alphas": {"target_modules": list(LINEARS), "alpha_pattern": {"k_proj": 3, r".*layers\.0\.mlp\.(up|down)_proj": 1.5}},
    "ranks and alphas, anchored": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 16},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5},
    },
    "ranks with rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 9}},
    "excluded names": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "an excluded expression": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_an_irregular_adapter_gives_pefts_logits_and_is_kept_as_it_is(kind: str, base: Path, tmp_path: Path) -> None:
    made_by_peft(tmp_path / "theirs", **IRREGULAR[kind])
    adapter = registry.read(tmp_path / "theirs", open_model(base).config)
    wanted, ours = peft_logits(tmp_path / "theirs"), logits(base, adapter)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0)
    assert (wanted - logits(base, None)).abs().max() > 0.1  # it has an effect
    peft_folder.save(adapter, tmp_path / "kept", "base")
    again = registry.read(tmp_path / "kept", open_model(base).config)
    assert torch.equal(logits(base, again), ours)
    assert (again.config, again.layers, again.alphas) == (adapter.config, adapter.layers, adapter.alphas)
    assert torch.equal(peft_logits(tmp_path / "kept"), wanted)  # PEFT reads our copy as it reads its own
    tensors = safetensors.torch.load_file(tmp_path / "theirs" / peft_folder.WEIGHTS_FILE)
    assert len(adapter.tensors) == len(tensors)


@pytest.mark.parametrize("kind", ["names with a layer", "ranks", "alphas", "ranks and alphas, anchored", "ranks with rslora"])
def test_an_irregular_adapter_travels_as_gguf_and_mlx(kind: str, base: Path, tmp_path: Path) -> None:
    made_by_peft(tmp_path / "theirs", **IRREGULAR[kind])
    config = open_model(base).config
    adapter = registry.read(tmp_path / "theirs", config)
    wanted = logits(base, adapter)
    gguf_adapter.write_adapter(adapter, config, tmp_path / "a.gguf")
    twin = gguf_adapter.read_adapter(tmp_path / "a.gguf", config)
    assert {key: tensor.shape for key, tensor in twin.tensors.items()} == {
        key: tensor.shape for key, tensor in adapter.tensors.items()
    }
    torch.testing.assert_close(logits(base, twin), wanted, atol=1e-4, rtol=0)
    (tmp_path / "mlx").mkdir()
    mlx_adapter.write_adapter(adapter, tmp_path / "mlx", "base", config.num_layers)
    torch.testing.assert_close(logits(base, mlx_adapter.read_adapter(tmp_path / "mlx", config)), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("target", "weights", "more"),
    [
        ("peft", "", {}),
        ("hf", "fp32", {}),
        ("mlx", "", {}),
        ("mps", "nf4", {}),
        ("coreml", "fp16", {"adapter_as": "inputs"}),
        ("coreml", "fp16", {"adapter_as": "functions"}),
        ("coreml", "none", {}),
    ],
)
def test_every_export_of_an_irregular_adapter_is_proved(
    target: str, weights: str, more: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("coremltools" if target == "coreml" else "mlx_lm" if target == "mlx" else "peft")
    usual = random_adapter(open_model(base).config, rank=4, layers=(0, 1), size=0.05)
    kept = {key: tensor for key, tensor in usual.tensors.items() if key[:2] not in ((0, "q_proj"), (1, "up_proj"))}
    kept[1, "o_proj", "A"], kept[1, "o_proj", "B"] = kept[1, "o_proj", "A"][:2].clone(), kept[1, "o_proj", "B"][:, :2].clone()
    adapter = replace(usual, tensors=kept, layers=None, alphas={(0, "down_proj"): 3.0})
    folder = tmp_path / "out"
    _, agreement = write_and_compare(target, job_for(open_model(base), adapter, weights, **more), folder)
    assert agreement.greedy_match
    assert agreement.max_logit_difference < (0.05 if target in ("coreml", "mps") else 1e-3)  # fp16, and kernels in bf16


def test_a_gguf_on_some_layers_with_ranks_of_their_own_follows_llama_cpps_rule(base: Path, tmp_path: Path) -> None:
    """llama.cpp's scale is alpha / rank of each matrix, and 1 for a file without alpha."""
    gguf = pytest.importorskip("gguf")
    config = open_model(base).config
    for alpha in (6.0, None):
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        if alpha is not None:
            writer.add_float32("adapter.lora.alpha", alpha)
        shapes = {"blk.1.attn_v": (3, 64, 32), "blk.0.ffn_up": (3, 64, 96), "blk.0.ffn_down": (6, 96, 64)}
        for name, (rank, inputs, outputs) in shapes.items():
            writer.add_tensor(f"{name}.weight.lora_a", torch.ones(rank, inputs).numpy())
            writer.add_tensor(f"{name}.weight.lora_b", torch.ones(outputs, rank).numpy())
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
            write()
        found = registry.read(tmp_path / "a.gguf", config)
        assert found.linears == [(0, "down_proj"), (0, "up_proj"), (1, "v_proj")]
        scales = [found.scale_of(*linear) for linear in found.linears]
        assert scales == ([1.0, 2.0, 2.0] if alpha else [1.0, 1.0, 1.0])


def test_training_on_from_an_irregular_adapter_is_refused_by_its_cause(base: Path, tmp_path: Path) -> None:
    made_by_peft(tmp_path / "theirs", **IRREGULAR["ranks"])
    with pytest.raises(
        AdapterError, match=r"theirs has other targets, ranks or alphas in some layers than in others\. Name one"
    ):
        named_adapter(TrainConfig(from_adapter=str(tmp_path / "theirs")), open_model(base))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": r".*(q_proj|lm_head)"},
    ],
)
def test_lora_on_the_head_or_the_embedding_is_refused_as_such(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    made_by_peft(tmp_path / "theirs", **settings)
    with pytest.raises(AdapterError) as caught:
        registry.read(tmp_path / "theirs", open_model(base).config)
    assert "LoRA or a copy of the embedding or the head, which edgetune does not adapt: 'base_model." in str(caught.value)
    assert str(caught.value).endswith("of linears only: train it on linears only.")


def test_no_matrix_is_read_before_its_shape_is_checked(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_model(base).config
    adapter = random_adapter(replace(config, hidden_size=80), rank=4)
    peft_folder.save(adapter, tmp_path / "peft", "base")
    (tmp_path / "mlx").mkdir()
    mlx_adapter.write_adapter(adapter, tmp_path / "mlx", "base", 2)
    gguf_adapter.write_adapter(adapter, config, tmp_path / "a.gguf")
    monkeypatch.setattr(torch, "isfinite", lambda tensor: pytest.fail("a matrix was read"))
    for path in ("peft", "mlx", "a.gguf"):
        with pytest.raises(AdapterError, match=r"layers 0-1 q_proj: lora_A is \(4, 80\) .*expected \(4, 64\)"):
            registry.read(tmp_path / path, config)


def test_settings_at_their_default_are_left_out_for_older_pefts(base: Path, tmp_path: Path) -> None:
    """The fields of peft 0.12.0's LoraConfig (peft/tuners/lora/config.py and peft/config.py); it dies on any other key."""
    known = {
        "auto_mapping", "base_model_name_or_path", "revision", "peft_type", "task_type", "inference_mode", "r", "lora_alpha",
        "target_modules", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core",
        "loftq_config", "use_dora", "layer_replication",
    }  # fmt: skip
    for number, adapter in enumerate(
        (
            random_adapter(open_model(base).config),
            replace(random_adapter(open_model(base).config, layers=(1,)), alphas={(1, "q_proj"): 2.0}),
        )
    ):
        peft_folder.save(adapter, tmp_path / str(number), "base")
        written = json.loads((tmp_path / str(number) / peft_folder.CONFIG_FILE).read_text())
        assert set(written) <= known
        assert written["target_modules"] == sorted(LINEARS)


def test_uniform_pads_with_zeros_and_folds_the_scale_into_b() -> None:
    tensors = {(0, "q_proj", "A"): torch.ones(2, 3), (0, "q_proj", "B"): torch.ones(4, 2)}
    tensors |= {(1, "q_proj", "A"): torch.ones(1, 3), (1, "q_proj", "B"): torch.ones(4, 1)}
    adapter = Adapter(LoraConfig(2, 4.0, targets=("q_proj",)), tensors)
    even = adapter.uniform()
    assert (even.config.rank, even.config.scale) == (2, 2.0)
    assert even.tensors[1, "q_proj", "A"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert even.tensors[1, "q_proj", "B"].tolist() == [[2, 0]] * 4  # alpha / rank is 4 there, twice the others'
    assert even.is_uniform
    assert even.uniform() is even


@pytest.mark.parametrize(
    "key",
    [
        "q_proj", "self_attn.q_proj", "1.self_attn.q_proj", "^model.layers.1.mlp.up_proj$", "q.proj", "proj", "mlp", "",
        r".*layers\.[0-9]\.self_attn\.q_proj", "layers.(0|1).mlp.(up|down)_proj", r"model\.layers\.\d+\.mlp\.down_proj",
        "q_proj|k_proj", r"layers\.[12]+\..*", r"\w+_proj", "up_proj?", "a*a*.*.*.*.*.*.*q_proj", "^layers.0.mlp.up_proj",
    ],
)  # fmt: skip
def test_a_key_of_alpha_pattern_matches_what_pefts_expression_matches(key: str) -> None:
    for layer in (0, 1, 2, 10, 11):
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            assert ModulePattern(key).matches(name) == (re.match(rf"(.*\.)?({key})$", name) is not None), name


@pytest.mark.parametrize(
    "key", ["(a+)+$", "(?=x)q", "((a|b)|c)", "(q_proj", "q{1,3}", "(a|a)" * 20, "[z-a]", "q\\", "a" * 999 + "*"]
)
def test_a_key_that_could_run_for_years_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"key"):
        ModulePattern(key)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (
            {(n, "q_proj", "A"): (4, 64) for n in range(0, 9999, 2)},
            r"no layers 2, 4, .*24, \.\.\.; layer 0 q_proj: ",
        ),
        (
            {(0, name, part): (n, n + 1) for n, name in enumerate(LINEARS, 1) for part in "AB"}
            | {(1, name, part): (n, n + 2) for n, name in enumerate(LINEARS, 1) for part in "AB"},
            r"layer 0 down_proj: .*; and 2 faults more;",
        ),
    ],
    ids=["layers", "shapes"],
)
def test_an_adapter_with_thousands_of_faults_is_one_short_sentence(
    shapes: dict[tuple[int, str, str], tuple[int, int]], said: str, base: Path
) -> None:
    with pytest.raises(AdapterError, match=said) as caught:
        adapters.check_shapes(shapes, None, open_model(base).config)
    assert len(str(caught.value)) < 2000


def test_a_rank_beyond_the_limit_is_refused_even_where_its_pattern_allows_it(base: Path) -> None:
    shapes = {(0, "q_proj", "A"): (2000, 64), (0, "q_proj", "B"): (64, 2000)}
    with pytest.raises(AdapterError, match=r"lora_A is \(2000, 64\)"):
        adapters.check_shapes(shapes, None, open_model(base).config, {4, 2000})
