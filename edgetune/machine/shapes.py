"""Lists the shapes of well-known models, for measuring and planning without their weights."""

from __future__ import annotations

from edgetune.runtime.config import LlamaConfig
from edgetune.runtime.rope_config import RopeConfig


def _llama(
    hidden: int, ffn: int, layers: int, heads: int, kv: int, size: int, vocab: int, context: int, tied: bool = False,
    theta: float = 10000.0,
) -> LlamaConfig:  # fmt: skip
    rope = RopeConfig(theta)
    windows = (None,) * layers
    return LlamaConfig(
        "llama", hidden, ffn, layers, heads, kv, size, vocab, context, 1e-5, rope, tie_embeddings=tied, windows=windows
    )


SHAPES = {
    "demo": _llama(384, 1024, 8, 6, 2, 64, 8192, 1024, tied=True),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 64, 49152, 8192, tied=True, theta=100000.0),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 64, 32000, 2048),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128, 128256, 131072, tied=True, theta=500000.0),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128, 128256, 131072, theta=500000.0),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 128, 32000, 2048),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 128, 32000, 2048),
    "llama-33b": _llama(6656, 17920, 60, 52, 52, 128, 32000, 2048),
    "llama-65b": _llama(8192, 22016, 80, 64, 64, 128, 32000, 2048),
}
"""Shapes of models by name."""
MEASURED = ("demo", "smollm2-135m", "tinyllama-1.1b")
"""Names of the shapes that `edgetune bench` can measure."""
PLANNED = tuple(name for name in SHAPES if name != "demo")
"""Names that `edgetune plan --model` takes without weights; the demo's weights are on every machine."""
