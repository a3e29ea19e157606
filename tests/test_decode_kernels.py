"""The decoding kernels agree with plain torch on dequantised weights, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from edgetune.runtime import int8, nf4, ops
from edgetune.runtime.config import LINEARS, LlamaConfig
from edgetune.runtime.linear import LoraLinear
from edgetune.runtime.model import Block, KVCache, Llama
from edgetune.runtime.names import ATTENTION_NORM, MLP_NORM, POST_MLP_NORM, PRE_MLP_NORM, hf_linear_name
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.rope_config import RopeConfig
from edgetune.runtime.runner import Runner

cpu = pytest.importorskip("edgetune.runtime.backends.cpu", exc_type=ImportError)
decode = pytest.importorskip("edgetune.runtime.backends.cpu.decode", exc_type=ImportError)
weights = pytest.importorskip("edgetune.runtime.backends.cpu.weights", exc_type=ImportError)

# The largest relative error allowed in one product.
ERROR = {"f32": 2e-6, "bf16": 4e-3, "int8": 1.2e-2}


# amx decodes with the kernels of avx512_bf16.
@pytest.fixture(params=[name for name in cpu.isas() if name != "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.force_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


# ---- products ----


@pytest.mark.parametrize("compute", weights.COMPUTE)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("rows", "cols"), [(300, 2048), (37, 192), (33, 64), (70, 1408)])
def test_a_product_is_within_its_error(isa: str, rows: int, cols: int, double_quant: bool, compute: str) -> None:
    quantized = nf4.quantize(torch.randn(rows, cols) * 0.02, double_quant=double_quant)
    dense = nf4.dequantize(quantized, torch.float32)
    for n in (1, 2, 3, 5, 8, 11):
        x = torch.randn(n, cols)
        assert relative(weights.matvec(x, quantized, compute), x @ dense.T) < ERROR[compute]


@pytest.mark.parametrize("compute", weights.COMPUTE)
@pytest.mark.parametrize(
    ("rows", "cols", "block_size", "quant_type"),
    [
        (19, 100, 64, "nf4"),
        (7, 33, 64, "nf4"),
        (5, 1, 64, "nf4"),
        (9, 700, 64, "nf4"),
        (8, 256, 128, "nf4"),
        (12, 128, 64, "fp4"),
    ],
)
def test_blocks_that_cross_rows_and_other_formats_are_right(
    isa: str, rows: int, cols: int, block_size: int, quant_type: str, compute: str
) -> None:
    quantized = nf4.quantize(torch.randn(rows, cols), quant_type, block_size)
    x = torch.randn(3, cols)
    exact = cols % 64 != 0 or block_size != 64
    expected = x @ nf4.dequantize(quantized, torch.float32).T
    assert relative(weights.matvec(x, quantized, compute), expected) < ERROR["f32" if exact else compute]


def test_int8_survives_zeros_and_outliers_in_their_own_block(isa: str) -> None:
    quantized = nf4.quantize(torch.randn(64, 256))
    x = torch.randn(1, 256)
    x[:, :64] = 0
    x[:, 64] = 1e4  # spoils only the scale of its own block of 64
    dense = nf4.dequantize(quantized, torch.float32)
    without = x.clone()
    without[:, 64:128] = 0
    found = weights.matvec(x, quantized, "int8") - weights.matvec(x - without, quantized, "int8")
    assert relative(found, without @ dense.T) < 3e-2
    assert not weights.matvec(torch.zeros(1, 256), quantized, "int8").any()


def test_a_product_does_not_depend_on_threads_or_company(isa: str) -> None:
    quantized = nf4.quantize(torch.randn(130, 320))
    x = torch.randn(8, 320)
    for compute in weights.COMPUTE:
        torch.set_num_threads(2)
        together = weights.matvec(x, quantized, compute)
        torch.set_num_threads(1)
        assert torch.equal(weights.matvec(x, quantized, compute), together)
        alone = torch.cat([weights.matvec(row[None], quantized, compute) for row in x])
        assert torch.equal(alone, together)


def test_bf16_activations_give_bf16(isa: str) -> None:
    quantized = nf4.quantize(torch.randn(16, 64))
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    found = weights.matvec(x, quantized)
    assert found.dtype == torch.bfloat16
    assert relative(found, x.float() @ nf4.dequantize(quantized, torch.float32).T) < 8e-3


@pytest.mark.parametrize(("rows", "cols"), [(300, 2048), (37, 192), (2, 70), (9, 33), (5, 1)])
def test_products_of_8_bit_rows_are_exact_but_for_sums(isa: str, rows: int, cols: int) -> None:
    weight = int8.quantize(torch.randn(rows, cols) * torch.rand(rows, 1))
    dense = weight.codes * weight.scale
    for n in (1, 3, 11):
        x = torch.randn(n, cols)
        found = weights.int8_matvec(x, weight)
        assert relative(found, x @ dense.T) < 2e-6
        torch.set_num_threads(2)
        assert torch.equal(weights.int8_matvec(x, weight), found)
        assert torch.equal(torch.cat([weights.int8_matvec(row[None], weight) for row in x]), found)
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_become_8_bits_as_specified(isa: str, dtype: torch.dtype) -> None:
    for rows, cols in ((70, 2048), (33, 50), (3, 1)):
        weight = (torch.randn(rows, cols) * torch.rand(rows, 1)).to(dtype)
        weight[1] = 0
        weight[2] *= 1e-39  # a scale below fp32's normal numbers
        found, wanted = cpu.int8_rows(weight), int8.quantize(weight)
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.scale, wanted.scale)
    for bad in (torch.inf, -torch.inf, torch.nan):
        weight = torch.randn(5, 70).to(dtype)
        weight[3, 66] = bad
        for rows in (cpu.int8_rows(weight), int8.quantize(weight)):
            assert torch.isfinite(rows.scale)[:, 0].tolist() == [True, True, True, False, True]


def test_a_wrong_shape_is_refused_before_a_pointer_crosses() -> None:
    quantized = nf4.quantize(torch.randn(16, 64))
    with pytest.raises(ValueError, match="65 features"):
        weights.matvec(torch.randn(1, 65), quantized)
    short = nf4.QuantizedTensor(quantized.packed[:-1], quantized.state)
    with pytest.raises(ValueError, match="codes"):
        weights.matvec(torch.randn(1, 64), short)


# ---- whole steps ----


def make_config(**changes: object) -> LlamaConfig:
    fields: dict[str, object] = {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 32, "vocab_size": 75, "max_positions": 64, "rms_norm_eps": 1e-5,
        "windows": (None, None), **changes,
    }  # fmt: skip
    return LlamaConfig(**fields)  # type: ignore[arg-type]


def make_model(config: LlamaConfig, quantized: bool = True, rank: int = 0, head: str = "dense") -> Llama:
    d, hd = config.hidden_size, config.head_dim
    q, kv, f = config.num_heads * hd, config.num_kv_heads * hd, config.intermediate_size
    outs = dict(zip(LINEARS, [(q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f)], strict=True))
    blocks = []
    for layer in range(config.num_layers):
        norms = (ATTENTION_NORM, MLP_NORM, PRE_MLP_NORM, POST_MLP_NORM)
        tensors = {name: 1 + 0.1 * torch.randn(d) for name in norms}
        tensors |= {f"self_attn.{name}.weight": 1 + 0.1 * torch.randn(hd) for name in ("q_norm", "k_norm")}
        for name, shape in outs.items():
            weight = torch.randn(shape) * shape[1] ** -0.5
            tensors[f"{hf_linear_name(name)}.weight"] = nf4.quantize(weight) if quantized else weight
            if config.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{hf_linear_name(name)}.bias"] = torch.randn(shape[0])
        block = Block(config, layer, tensors)
        if rank:
            for name, shape in outs.items():
                a, b = torch.randn(rank, shape[1]) * shape[1] ** -0.5, torch.randn(shape[0], rank)
                setattr(block, name, LoraLinear(getattr(block, name), a, b, 0.3))
        blocks.append(block)
    embedding = torch.randn(config.vocab_size, d)
    out = torch.randn(config.vocab_size, d) * d**-0.5
    made = {"dense": lambda: out, "nf4": lambda: nf4.quantize(out), "int8": lambda: int8.quantize(out)}[head]()
    return Llama(config, embedding, blocks, torch.ones(d), made, torch.float32)


def reference(model: Llama, ids: Tensor, length: int) -> tuple[Tensor, KVCache]:
    """Compute a whole text with plain torch in fp32; return its logits (N, V) and the KV cache."""
    cache = KVCache(model.config, length, torch.float32, torch.device("cpu"))
    with ops.use_backend("reference"), torch.no_grad():
        h = Runner(model).infer(ids, torch.arange(len(ids)), [Segment(0, len(ids), 0, len(ids))], cache)
        return model.logits(h), cache


CASES = {
    "plain": {},
    "many heads to a key": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 16},
    "window": {"windows": (5, None)},
    "qk_norm": {"qk_norm": True, "model_type": "qwen3"},
    "bias": {"qkv_bias": True, "model_type": "qwen2"},
    "multipliers": {"residual_scale": 0.3, "attention_scale": 0.1, "embedding_scale": 3.0},
    "four norms and GeGLU": {"post_norms": True, "activation": "gelu_tanh", "qk_norm": True},
    "a part of each head rotated": {"rope": RopeConfig(rotary_share=0.75)},
    "a layer without rotation": {"layer_ropes": (RopeConfig(), None)},
    "scaled queries": {"rope": RopeConfig(query_beta=0.5, original_max_positions=4, attention_factor=1.2)},
    "odd sizes": {"hidden_size": 90, "intermediate_size": 101, "head_dim": 10, "num_heads": 6, "num_kv_heads": 3},
}


@pytest.mark.parametrize("rank", [0, 3, 16])
@pytest.mark.parametrize("case", CASES)
def test_step_by_step_decoding_equals_a_whole_pass(isa: str, case: str, rank: int) -> None:
    model = make_model(make_config(**CASES[case]), rank=rank, head={0: "int8", 3: "nf4", 16: "dense"}[rank])
    ids = torch.randint(model.config.vocab_size, (12,))
    expected, filled = reference(model, ids, 16)
    cache = KVCache(model.config, 16, torch.float32, torch.device("cpu"))
    step = decode.Decoder(model, cache, "f32")
    torch.set_num_threads(2)
    found = torch.stack([step(int(token)) for token in ids])
    assert cache.length == len(ids)
    assert relative(found, expected) < 1e-5
    for layer in range(model.config.num_layers):
        torch.testing.assert_close(cache.k[layer], filled.k[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cache.v[layer], filled.v[layer], atol=1e-4, rtol=1e-4)


def test_several_tokens_at_once_equal_one_by_one(isa: str) -> None:
    model = make_model(make_config(windows=(5, None)), rank=4)
    ids = torch.randint(75, (13,))
    expected, _ = reference(model, ids, 16)
    cache = KVCache(model.config, 16, torch.float32, torch.device("cpu"))
    run = decode.Decoder(model, cache, "f32")
    found = [run.run(model.embed(ids[start : start + n]), start) for start, n in ((0, 8), (8, 2), (10, 3))]
    assert relative(torch.cat(found), expected) < 1e-5


def test_dense_models_decode_exactly(isa: str) -> None:
    model = make_model(make_config(), quantized=False)
    ids = torch.randint(75, (9,))
    expected, _ = reference(model, ids, 9)
    step = decode.Decoder(model, KVCache(model.config, 9, torch.float32, torch.device("cpu")))
    assert relative(torch.stack([step(int(token)) for token in ids]), expected) < 1e-5


@pytest.mark.parametrize("case", ["plain", "odd sizes"])
def test_linears_in_bf16_and_in_8_bits_decode_as_their_dense_weights_do(isa: str, case: str) -> None:
    for form in (lambda weight: weight.bfloat16(), int8.quantize):
        model = make_model(make_config(**CASES[case]), quantized=False, rank=3)
        for block in model.blocks:
            for linear in block.linears().values():
                linear.base.weight = form(linear.base.weight)
        ids = torch.randint(model.config.vocab_size, (9,))
        expected, _ = reference(model, ids, 9)
        step = decode.Decoder(model, KVCache(model.config, 9, torch.float32, torch.device("cpu")))
        assert relative(torch.stack([step(int(token)) for token in ids]), expected) < 1e-5


def test_half_precision_decoding_stays_near(isa: str) -> None:
    model = make_model(make_config(hidden_size=256, head_dim=64), rank=8, head="nf4")
    ids = torch.randint(75, (12,))
    expected, _ = reference(model, ids, 16)
    model.set_dtype(torch.bfloat16)  # adapters and cache in bf16 as well
    step = decode.Decoder(model, KVCache(model.config, 16, torch.bfloat16, torch.device("cpu")))
    found = torch.stack([step(int(token)) for token in ids])
    assert relative(found, expected) < 6e-2


def test_fp32_is_kept_only_where_the_machine_would_compute_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(make_config())

    def run(compute: str | None) -> Tensor:
        step = decode.Decoder(model, KVCache(model.config, 4, torch.float32, torch.device("cpu")), compute)
        return torch.stack([step(token) for token in (1, 2, 3)])

    exact, rounded = run("f32"), run("int8")
    assert not torch.equal(exact, rounded)
    for by_itself, expected in ((torch.bfloat16, exact), (torch.float32, rounded)):
        monkeypatch.setattr(decode, "fuses", lambda dtype, own=by_itself: dtype == own)
        assert torch.equal(run(None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(isa: str, dtype: torch.dtype) -> None:
    model = make_model(make_config(), rank=16)
    model.set_dtype(dtype)
    ids = torch.randint(75, (6,))

    def run(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        step = decode.Decoder(model, KVCache(model.config, 8, dtype, torch.device("cpu")))
        return torch.stack([step(int(token)) for token in ids])

    assert torch.equal(run(1), run(2))
    assert torch.equal(run(3), run(2))  # 3 threads are more than there are key heads


def test_a_full_cache_is_refused(isa: str) -> None:
    model = make_model(make_config())
    step = decode.Decoder(model, KVCache(model.config, 2, torch.float32, torch.device("cpu")))
    step(1), step(2)
    with pytest.raises(ValueError, match="KV cache of 2"):
        step(3)


def test_a_model_the_kernels_cannot_run_has_no_decoder() -> None:
    model = make_model(make_config(), quantized=False)
    model.head = model.head.half()
    assert decode.decoder(model, KVCache(model.config, 4, torch.float32, torch.device("cpu"))) is None
