"""Every family beside Llama and Qwen: logits are in test_model.py; here are gradients, 4-bit folders, refusals and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from adapters import job_for, random_adapter, write_and_compare

from edgetune.export import verify
from edgetune.export.gguf import adapter as gguf_adapter
from edgetune.export.gguf import model as gguf_model
from edgetune.export.gguf import target as gguf
from edgetune.export.gguf.reader import LlamaCppReader
from edgetune.export.job import Job
from edgetune.export.peft import TransformersReader, open_transformers
from edgetune.export.targets import load_target
from edgetune.export.verify import Agreement
from edgetune.runtime import adapter as adapters
from edgetune.runtime import nf4, ops
from edgetune.runtime.batch import Batch
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.config import LlamaConfig, LoraConfig, QuantConfig
from edgetune.runtime.errors import ModelError, UsageError
from edgetune.runtime.families import FAMILIES
from edgetune.runtime.fused import fused_weights
from edgetune.runtime.loader import load_llama
from edgetune.runtime.model import KVCache, Llama
from edgetune.runtime.names import layer_tensor
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.quantize import quantize_folder
from edgetune.runtime.runner import Recompute, Runner

LORA = LoraConfig(rank=4, alpha=8.0)
LENGTH = 50
"""Longer than every window of the tiny models, and than the original contexts of those with YaRN."""
FUSED = [family for family in tiny.UNLIKE_LLAMA if family.startswith(("phi", "granite-4"))]


@pytest.fixture(scope="module", params=tiny.UNLIKE_LLAMA)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the folder of a tiny model, and transformers' model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, tiny.save_model(folder, request.param)


def adapted(folder: Path, dtype: torch.dtype = torch.float32, quant: QuantConfig | None = None) -> Llama:
    """Return a folder's model with an adapter that has an effect."""
    model = load_llama(open_model(folder), dtype, quant=quant)
    adapters.attach_new(model, LORA, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapters.parameters(model):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def row() -> Batch:
    """Return a row of two documents whose first tokens are context."""
    ids = torch.randint(1, 128, (LENGTH + 1,), generator=torch.Generator().manual_seed(3))
    weights = torch.full((LENGTH,), 1 / LENGTH)
    weights[:5] = 0
    positions = torch.cat([torch.arange(40), torch.arange(LENGTH - 40)])
    return Batch(ids[:-1], ids[1:], weights, positions, (Segment.packed(0, 40), Segment.packed(40, LENGTH)))


def gradients(model: Llama, recompute: Recompute = Recompute.FULL) -> tuple[float, list[torch.Tensor]]:
    for parameter in adapters.parameters(model):
        parameter.grad = None
    loss = float(Runner(model, recompute, loss_rows=16).train(row()))
    return loss, [parameter.grad.clone() for parameter in adapters.parameters(model)]


def their_gradients(theirs: Any, ours: Llama) -> tuple[float, list[torch.Tensor]]:
    """Return loss and gradients of A and B by transformers' autograd: those of W + s B A, by the chain rule."""
    home = {linear: whole for whole, linears in fused_weights(ours.config).items() for linear in linears}
    weights, grads, places = dict(theirs.named_parameters()), [], {}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for block in ours.blocks:
        for name, linear in block.linears().items():
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            full = layer_tensor(block.layer, f"{part}.{name}.weight")
            whole = home.get(full, full)
            first = places.get(whole, 0)
            rows = slice(first, first + linear.out_features)
            places[whole] = rows.stop
            weights[whole].data[rows] += linear.scale * linear.lora_B.detach() @ linear.lora_A.detach()
            grads.append((linear, whole, rows))
    theirs.zero_grad()
    batch, loss = row(), torch.zeros(())
    for start, end in ((0, 40), (40, LENGTH)):
        logits = theirs(batch.input_ids[None, start:end]).logits[0]
        nats = torch.nn.functional.cross_entropy(logits, batch.targets[start:end], reduction="none")
        loss = loss + (nats * batch.loss_mask[start:end]).sum()
    loss.backward()
    found = []
    for linear, whole, rows in grads:
        dw = weights[whole].grad[rows]
        found += [linear.scale * linear.lora_B.detach().T @ dw, linear.scale * dw @ linear.lora_A.detach().T]
    for name, weight in weights.items():
        weight.data.copy_(before[name])
    return loss.item(), found


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lora_gradients_equal_transformers(made: tuple[Path, Any], backend: str) -> None:
    folder, theirs = made
    model = adapted(folder)
    expected = their_gradients(theirs, model)
    with ops.use_backend(backend):
        for recompute in Recompute if backend == "cpu" else (Recompute.FULL,):
            loss, found = gradients(model, recompute)
            assert loss == pytest.approx(expected[0], abs=2e-5)
            for one, other in zip(found, expected[1], strict=True):
                assert (one - other).norm() <= 2e-4 * other.norm() + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit(made: tuple[Path, Any], dtype: torch.dtype) -> None:
    model = adapted(made[0], dtype, QuantConfig())
    results = [gradients(model, recompute) for recompute in Recompute]
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


def test_the_cpu_decodes_every_family_by_its_own_kernels(made: tuple[Path, Any]) -> None:
    model = load_llama(open_model(made[0]), torch.float32)
    assert ops.decoder(model, KVCache(model.config, 8, torch.float32, torch.device("cpu"))) is not None


def test_a_4_bit_folder_has_the_dense_weights_rounded(made: tuple[Path, Any], tmp_path: Path) -> None:
    """Matrices that hold several linears are quantised as one, as transformers' bitsandbytes would, and opened as several."""
    quantize_folder(made[0], tmp_path / "nf4", double_quant=False)
    dense, small = open_model(made[0]), open_model(tmp_path / "nf4")
    assert small.quant == QuantConfig(double_quant=False)
    stored = safetensors.torch.load_file(tmp_path / "nf4" / "model.safetensors")
    for whole, linears in fused_weights(dense.config).items():
        assert stored[whole].dtype == torch.uint8
        assert not any(linear in stored for linear in linears)
    for layer in range(dense.config.num_layers):
        for name, weight in small.block_tensors(layer).items():
            if isinstance(weight, nf4.QuantizedTensor):
                original = dense.dense(layer_tensor(layer, name))
                expected = nf4.dequantize(nf4.quantize(original, double_quant=False), torch.float32)
                assert torch.equal(nf4.dequantize(weight, torch.float32), expected)
    assert torch.isfinite(Runner(load_llama(small, torch.float32)).read([1, 2, 3])).all()


def test_linears_in_one_matrix_are_told_apart_in_doubly_quantised_blocks_too(tmp_path: Path) -> None:
    """In Phi-4-mini every linear begins a block of 64 * 256 weights; so it does here."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}
    tiny.save_model(tmp_path / "dense", "phi3", **sizes)
    quantize_folder(tmp_path / "dense", tmp_path / "nf4")
    dense, small = open_model(tmp_path / "dense"), open_model(tmp_path / "nf4")
    for whole, linears in fused_weights(dense.config).items():
        joined = torch.cat([dense.dense(linear) for linear in linears])
        expected = nf4.dequantize(nf4.quantize(joined), torch.float32)
        found = torch.cat([small.dense(linear).float() for linear in linears])
        assert torch.equal(found, expected.bfloat16().float()), whole


@pytest.mark.parametrize("family", ["phi3", "granite-4"])
def test_linears_that_would_share_a_block_are_refused_before_and_after(family: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "dense", family)
    with pytest.raises(
        ModelError, match=r"layers\.0\..* holds several linears, of which one would not .*type --single-quant\.$"
    ):
        quantize_folder(tmp_path / "dense", tmp_path / "nf4")


def test_a_fused_matrix_of_another_shape_is_named(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "phi3")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.qkv_proj.weight"] = torch.zeros(100, 64)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.qkv_proj\.weight has shape \[100, 64\] where .* 128 rows"):
        open_model(tmp_path)


# ---- config.json ----


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a tiny model with some keys changed; None removes a key."""
    config = {**tiny.transformers_model(family).config.to_dict(), **changes}
    return {key: value for key, value in config.items() if value is not None}


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is .*; expected 5 times 0 or 1"),
        ("smollm3", {"final_logit_softcapping": 30.0}, "sets final_logit_softcapping"),
        ("granite-3", {"residual_multiplier": "0.2"}, "residual_multiplier is '0.2', of the wrong type"),
        ("granite-3", {"mlp_bias": True}, "mlp_bias is True"),
        ("granite-4", {"num_local_experts": 4}, "num_local_experts is 4, .*expected 0"),
        ("granite-4", {"num_local_experts": None}, "num_local_experts is 8"),
        ("granite-4", {"layer_types": ["mamba"] * 3}, "layer_types is .*; expected 3 times attention: a dense Granite 4"),
        ("ministral3", {"attention_bias": True}, "attention_bias is True"),
        ("ministral3", {"rope_parameters": {**tiny.MINISTRAL_ROPE, "beta_slow": 9.0}}, "a beta_fast below its beta_slow"),
        ("ministral3", {"rope_parameters": {**tiny.MINISTRAL_ROPE, "llama_4_scaling_beta": "x"}}, "beta is 'x'"),
        ("phi4-mini", {"full_attn_mod": 2}, "full_attn_mod is 2"),
        ("phi4-mini", {"head_dim": 24}, "18 of 24 numbers of a head are rotated, with 6 factors"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear'.*expected default or longrope"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "sets attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "sets use_bidirectional_attention"),
        ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu', .*expected gelu_pytorch_tanh"),
        ("gemma3", {"rope_local_base_freq": 5.0}, "contradicts itself: rope_parameters has other numbers"),
        ("gemma3", {"rope_parameters": {"full_attention": 5}}, "expected objects named full_attention and sliding_attention"),
        (
            "qwen3-yarn",
            {"rope_parameters": {**tiny.YARN_ROPE, "rope_theta": 1.0}},
            "rope_theta is 1.0, .*more than 1 with YaRN",
        ),
        ("gemma3", {"layer_types": ["chunked_attention"] * 4}, "layer_types is"),
        ("smollm3", {"layer_types": ["chunked_attention"] * 5}, "layer_types is .*chunked_attention"),
    ],
)
def test_what_a_family_does_not_have_is_one_sentence(family: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as error:
        LlamaConfig.from_hf(config_of(family, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "instead"), [("gemma3", "gemma-3-1b"), ("mistral3", "Ministral3ForCausalLM")])
def test_a_model_of_pictures_and_text_is_refused_with_what_to_use(kind: str, instead: str) -> None:
    with pytest.raises(ModelError, match=f"model_type '{kind}'.*edgetune runs text models; use .*{instead}"):
        LlamaConfig.from_hf({"model_type": kind, "text_config": {}, "vision_config": {}})


# The config.json of released models, as their publishers wrote them, at our sizes.
RELEASED: dict[str, dict[str, Any]] = {
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
        "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh", "model_type": "gemma3_text", "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    },
    "granite-4.0-micro": {
        "architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12, "hidden_act": "silu", "init_method": "mup",
        "layer_types": ["attention"] * 2, "logits_scaling": 8, "mamba_chunk_size": 256, "mamba_conv_bias": True,
        "mamba_d_conv": 4, "mamba_d_head": 32, "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 1,
        "mamba_n_heads": 128, "mamba_proj_bias": False, "model_type": "granitemoehybrid",
        "normalization_function": "rmsnorm", "num_experts_per_tok": 0, "num_local_experts": 0, "output_router_logits": False,
        "position_embedding_type": "rope", "residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 10000000,
        "router_aux_loss_coef": 0.01, "shared_intermediate_size": 96, "tie_word_embeddings": True,
    },
    "phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0,
        "full_attn_mod": 1, "hidden_act": "silu", "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
        "model_type": "phi3", "original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"long_factor": [1.0] * 6, "short_factor": [1.0] * 6, "type": "longrope"},
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def test_released_configs_are_read() -> None:
    """Their keys are from the models' repositories; the values that matter are those that transformers derives from them."""
    found = {name: LlamaConfig.from_hf({**tiny.COMMON, **config}) for name, config in RELEASED.items()}
    gemma, granite, phi = (found[name] for name in ("gemma-3-1b-it", "granite-4.0-micro", "phi-4-mini"))
    assert (gemma.embedding_scale, gemma.attention_scale, gemma.tie_embeddings) == (8.0, 1 / 16, True)
    assert [rope.theta for rope in gemma.ropes if rope] == [10000.0] * 2
    assert (granite.residual_scale, granite.logit_divisor, granite.attention_scale) == (0.22, 8.0, 0.015625)
    assert (granite.intermediate_size, granite.embedding_scale, granite.layer_ropes) == (96, 12.0, ())
    assert phi.rope.attention_factor == pytest.approx(1.1902380714238083)
    assert (phi.rope.rotated(16), phi.longest_row) == (12, 4096)


def test_smollm3s_base_of_rope_is_read_in_both_spellings() -> None:
    shape = {**tiny.COMMON, "model_type": "smollm3", "num_hidden_layers": 4}
    older = LlamaConfig.from_hf({**shape, "rope_theta": 5e6, "rope_scaling": None})
    newer = LlamaConfig.from_hf({**shape, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}})
    assert older == newer
    assert newer.rope.theta == 5e6
    assert LlamaConfig.from_hf(shape).rope.theta == LlamaConfig.from_hf({**shape, "rope_parameters": {}}).rope.theta == 2e6


def test_yarn_lengthens_a_qwen_as_its_publishers_say() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    qwen = {"model_type": "qwen3", **tiny.COMMON, "max_position_embeddings": 40960, "rope_scaling": scaling}
    config = LlamaConfig.from_hf(qwen)
    assert config.longest_row == 131072
    assert config.rope.attention_factor == pytest.approx(1.138629436)


def test_the_digest_of_a_base_covers_what_its_family_adds(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "granite-3")
    before = open_model(tmp_path).digest
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "logits_scaling": 4.0}))
    assert open_model(tmp_path).digest != before


def test_a_llama_has_nothing_that_llama_has_not() -> None:
    """So the digests of older models, which adapters name, stay what they were."""
    for family in set(tiny.FAMILIES) - set(tiny.UNLIKE_LLAMA):
        assert LlamaConfig.from_hf(config_of(family)).unlike_llama() == ()
    assert all(LlamaConfig.from_hf(config_of(family)).unlike_llama() for family in tiny.UNLIKE_LLAMA if family != "phi3")
    assert {tiny.FAMILIES[family][0] for family in tiny.FAMILIES} == {
        family.architecture.removesuffix("ForCausalLM") + ("Text" if family.architecture.startswith("Gemma") else "")
        for family in FAMILIES.values()
    }


# ---- exports ----


def exported(name: str, family: str, weights: str, tmp_path: Path, **changes: Any) -> Agreement:
    """Write an export of a tiny model with an adapter, and return how it agrees with the target's own reader."""
    tiny.save_model(tmp_path / "base", family, **changes)
    base = open_model(tmp_path / "base")
    job = job_for(base, random_adapter(base.config), weights)
    return write_and_compare(name, job, tmp_path / "out")[1]


@pytest.mark.parametrize("family", tiny.UNLIKE_LLAMA)
def test_transformers_reads_the_merged_model(family: str, tmp_path: Path) -> None:
    found = exported("hf", family, "fp32", tmp_path)
    assert found.greedy_match
    assert found.max_logit_difference < 1e-3


@pytest.mark.parametrize("family", [family for family in tiny.UNLIKE_LLAMA if family not in FUSED])
def test_peft_reads_the_adapter(family: str, tmp_path: Path) -> None:
    found = exported("peft", family, "", tmp_path)
    assert found.greedy_match
    assert found.max_logit_difference < 1e-3


IN_MLX = ["qwen3-yarn", "smollm3", "smollm3-window", "granite-3", "ministral3", "gemma3"]


@pytest.mark.parametrize("weights", ["", "fp16"])
@pytest.mark.parametrize("family", IN_MLX)
def test_mlx_lm_gives_the_references_logits(family: str, weights: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    found = exported("mlx", family, weights, tmp_path)
    assert found.greedy_match
    assert found.max_logit_difference < (0.2 if weights else 1e-3)


@pytest.mark.parametrize(
    ("name", "weights", "family", "said"),
    [
        ("peft", "", "phi3", "PEFT adapts the linears that phi3 models store as one matrix together, and edgetune each by"),
        ("mlx", "bf16", "phi3", "export mlx does not write the linears that phi3 models, such as a base, store as one matrix"),
        ("mlx", "", "granite-4", "export mlx does not write the linears that granitemoehybrid models"),
        ("mlx", "bf16", "gemma3-scaled", r"windows in a regular pattern, and a base has another \(layer_types\)"),
        ("hf", "nf4", "phi4-mini", "export hf does not round the linears that phi3 stores as one matrix; type --weights bf16"),
        ("gguf", "", "ministral3", "edgetune writes no GGUF of ministral3 models yet; type `edgetune export hf`"),
        ("gguf", "", "qwen3-yarn", "edgetune writes no GGUF of models with YaRN yet"),
        ("gguf", "", "gemma3", "llama.cpp's gemma3 gives all but every sixth layer a window"),
        ("gguf", "", "smollm3", "llama.cpp's smollm3 leaves every fourth layer unrotated and has no windows"),
        ("coreml", "fp16", "gemma3", "export coreml has no layers of gemma3_text models; type `edgetune export hf`"),
        ("coreml", "fp16", "granite-3", "export coreml has no layers of granite models"),
    ],
)
def test_an_export_that_cannot_be_made_is_refused_by_name(
    name: str, weights: str, family: str, said: str, tmp_path: Path
) -> None:
    tiny.save_model(tmp_path / "base", family)
    base = open_model(tmp_path / "base")
    (tmp_path / "out").mkdir()
    with pytest.raises((ModelError, UsageError), match=said) as error:
        load_target(name).write(job_for(base, random_adapter(base.config), weights), tmp_path / "out")
    assert "\n" not in str(error.value)


IN_LLAMA_CPP: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4}),
    "granite": ("granite-3", {}),
    "gemma3": ("gemma3", {"num_hidden_layers": 7, "sliding_window_pattern": 6, "query_pre_attn_scalar": 24}),
    "gemma3-scaled": (
        "gemma3-scaled",
        {
            "num_hidden_layers": 7,
            "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
}
"""The families that llama.cpp has, with the settings that it takes for given."""


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    """Compares a whole model and an adapter as a file, in f32, over a text longer than the window."""
    pytest.importorskip("llama_cpp")
    family, changes = IN_LLAMA_CPP[name]
    tiny.save_model(tmp_path / "base", family, **changes)
    base = open_model(tmp_path / "base")
    job = Job(base, "tiny", random_adapter(base.config))
    ids = torch.randint(1, 128, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = verify.golden(job, ids, job.model())
    gguf_model.write_model(job, tmp_path / "m.gguf", "f32", lambda writer: writer.add_tokenizer_model("no_vocab"))
    limit = verify.EXACT.max_logit if name.startswith("gemma3") else 1e-4  # ggml looks GELU up in a table of fp16
    assert verify.compare(expected, LlamaCppReader(tmp_path / "m.gguf"), verify.EXACT).max_logit_difference < limit
    (tmp_path / "a").mkdir()
    gguf_adapter.write_adapter(job.needed_adapter(), base.config, tmp_path / "a" / gguf_adapter.ADAPTER_FILE)
    assert verify.compare(expected, gguf.read(job, tmp_path / "a"), verify.EXACT).max_logit_difference < limit
    back = gguf_adapter.read_adapter(tmp_path / "a" / gguf_adapter.ADAPTER_FILE, base.config)
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in job.needed_adapter().tensors.items())


@pytest.mark.parametrize("family", ["smollm3", "granite-3", "granite-4", "ministral3", "phi3", "gemma3"])
def test_bitsandbytes_reads_the_4_bit_folder_as_edgetune_does(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    tiny.save_model(tmp_path / "dense", family, **sizes, **({"shared_intermediate_size": 128} if family == "granite-4" else {}))
    quantize_folder(tmp_path / "dense", tmp_path / "nf4")
    ids = list(range(1, 40))
    ours = load_llama(open_model(tmp_path / "nf4"), torch.float32)
    with torch.no_grad():
        found = ours.logits(Runner(ours).read(ids))
    torch.testing.assert_close(found, TransformersReader(open_transformers(tmp_path / "nf4")).logits(ids), atol=2e-4, rtol=0)
