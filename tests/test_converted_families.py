"""The families that llama.cpp calls by names of their own are converted as llama.cpp and transformers both compute them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from write_gguf import write_gguf

from edgetune.conversion import convert as conversion
from edgetune.conversion.convert import convert
from edgetune.conversion.gguf_file import GgufFile
from edgetune.conversion.model import Model
from edgetune.export.gguf import llamacpp
from edgetune.runtime import ops
from edgetune.runtime.checkpoint import open_model
from edgetune.runtime.loader import load_llama
from edgetune.runtime.ops_types import Segment
from edgetune.runtime.runner import Runner

TOLERANCE = 1e-4
"""Largest difference of a logit in fp32 from transformers'."""
LLAMA_CPP_TOLERANCE = 5e-3
"""Largest difference from llama.cpp's logits, which it computes with a cache in f16."""
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
MINISTRAL = YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
MINISTRAL_KEYS = {
    "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0, "rope.scaling.yarn_log_multiplier": 1.0,
    "attention.temperature_scale": 0.1,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4, "head_dim": 16}, {}),
    "granite": ("granite-3", {}, {
        "embedding_scale": 3.0, "attention.scale": 0.4, "residual_scale": 0.22, "logit_scale": 8.0,
    }),
    "qwen3 with YaRN": ("qwen3", {"rope_parameters": YARN}, YARN_KEYS),
    "gemma3": ("gemma3", {
        "num_hidden_layers": 7, "sliding_window_pattern": 6, "query_pre_attn_scalar": 24, "sliding_window": 16,
    }, {"attention.sliding_window": 16}),
    "phi3": ("phi3", {"sliding_window": None, "head_dim": 16}, {}),
    "ministral3": ("ministral3", {"rope_parameters": MINISTRAL, "head_dim": 16}, YARN_KEYS | MINISTRAL_KEYS),
}  # fmt: skip
"""For each case a family of tiny.py, changes to its config, and the keys that llama.cpp's converter writes for them."""


@pytest.fixture(autouse=True)
def without_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert the tiny models without a tokenizer, since their files have none."""
    monkeypatch.setattr(conversion, "tokenizer_files", lambda metadata: {})


def a_file(folder: Path, case: str) -> tuple[Any, Path]:
    """Return a tiny model of transformers and its GGUF file."""
    family, changes, keys = CASES[case]
    model = tiny.transformers_model(family, **changes)
    return model, write_gguf(folder / "model.gguf", model, **keys)


def logits_of(folder: Path, ids: Tensor) -> Tensor:
    model, count = load_llama(open_model(folder), torch.float32), len(ids)
    with torch.no_grad(), ops.use_backend("reference"):
        return model.logits(Runner(model).infer(ids, torch.arange(count), [Segment(0, count, 0, count)], None))


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_computes_what_the_original_does(case: str, tmp_path: Path) -> None:
    original, file = a_file(tmp_path, case)
    ids = torch.randint(3, 128, (48,))
    with torch.no_grad():
        theirs = original(ids[None]).logits[0]
    folder = convert(file, tmp_path / "folder", case, "fp32").path
    torch.testing.assert_close(logits_of(folder, ids), theirs, atol=TOLERANCE, rtol=0)
    from transformers import AutoModelForCausalLM

    reopened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(ids[None]).logits[0], theirs, atol=TOLERANCE, rtol=0)
    if case != "phi3":  # its tiny fused matrices cannot be split at a block of the scales
        assert open_model(convert(file, tmp_path / "nf4", case, "nf4").path).quant is not None


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same_from_the_file(case: str, tmp_path: Path) -> None:
    """So the files of these tests are such as llama.cpp's own converter writes."""
    pytest.importorskip("llama_cpp")
    _, file = a_file(tmp_path, case)
    ids = torch.randint(3, 128, (24,))
    ours = logits_of(convert(file, tmp_path / "folder", case, "fp32").path, ids)
    theirs = llamacpp.logits(file, None, ids.tolist())
    torch.testing.assert_close(ours, theirs, atol=LLAMA_CPP_TOLERANCE * ours.abs().max().item(), rtol=0)


def test_phi_4_mini_keeps_its_longrope_and_partial_rotation(tmp_path: Path) -> None:
    original = tiny.transformers_model("phi4-mini")
    rope = original.config.rope_parameters
    factors = {f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"]) for name in ("short", "long")}
    file = write_gguf(
        tmp_path / "model.gguf", original, extra=factors,
        **{"rope.dimension_count": 12, "rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.1338934},
    )  # fmt: skip
    ids = torch.randint(3, 128, (48,))
    with torch.no_grad():
        theirs = original(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(convert(file, tmp_path / "folder", "it", "fp32").path, ids), theirs, atol=1e-4, rtol=0)
    assert Model(GgufFile.open(file)).config.rope.rotary_share == 0.75
