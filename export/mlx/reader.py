"""Run mlx-lm on the CPU in fp32: the reader that proves exports for MLX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.export.job import Job, work_folder
from edgetune.export.merge import DenseRecipe, Merged
from edgetune.export.mlx.model import mlx_config
from edgetune.export.peft import quiet
from edgetune.export.probes import check_transformers
from edgetune.runtime.model_folder import write_model


class MlxReader:
    """A model that mlx-lm runs in fp32 on the CPU."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Read token ids (N,); return logits (N, V) f32."""
        import mlx.core as mx

        with mx.stream(mx.cpu):
            found = self._model(mx.array([list(ids)]))[0].astype(mx.float32)
            mx.eval(found)
        return torch.utils.dlpack.from_dlpack(found) if math.prod(found.shape) else torch.empty(found.shape)


def read(job: Job, folder: Path) -> MlxReader:
    """Open an export with mlx-lm. An adapter alone is put on its base, which is written as a dense MLX model meanwhile.

    Raises ModelError if the tokenizer of a model folder reads other ids than edgetune, unless job.force.
    """
    if job.weights:
        with quiet():
            check_transformers(job, folder, "mlx-lm")  # mlx-lm opens tokenizers with transformers
        return MlxReader(open_mlx(folder))
    with work_folder(folder) as base:
        recipe = DenseRecipe(Merged(job.base, None), torch.float32)
        write_model(job.base.folder, base, mlx_config(job.base.hf_config, job.base.config), recipe)
        return MlxReader(open_mlx(base, folder))


def open_mlx(folder: Path, adapter: Path | None = None) -> Any:
    """Open a model folder, and an adapter folder on top of it, with mlx-lm; it computes in fp32.

    MLX's compiler stays off in this process from then on: on the CPU it loads libraries from a folder of the system's temporary
    folder whose name anybody can predict, so another user could put code there.
    """
    import mlx.core as mx

    mx.disable_compile()  # before mlx_lm is imported, which compiles some of its functions
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    with mx.stream(mx.cpu):
        model = load_model(folder)[0]
        if adapter is not None:
            model = load_adapters(model, str(adapter))
        model.eval()
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model
