"""The record that training writes beside an adapter's weights, edgetune.json: how it was made, and what became of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import edgetune
from edgetune.documents.lineage import KEY as LINEAGE
from edgetune.library.gate import Decision
from edgetune.library.kept_adapters import LEAKS
from edgetune.training.leak_evidence import Leaks
from edgetune.training.prepared_run import PreparedRun
from edgetune.training.private_plan import KEY as PRIVATE
from edgetune.training.recorded import name_of
from edgetune.weight_forms import RECORDED


def adapter_record(
    run: PreparedRun,
    before: float | None,
    after: float | None,
    best_step: int,
    decision: Decision,
    rival: Path | None,
    leaks: Leaks,
    private: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the contents of edgetune.json, without paths, host names or text.

    before, after: held-out bits per byte of the run's step 0 and of the adapter. rival: folder of the
    current adapter, with which it was compared. leaks: what it was measured to give away of the notes. private: what private
    training promises and has spent (private_plan.settle).
    """
    plan = run.plan
    settings = {name: value for name, value in plan.settings.items() if name not in ("out", "model", "from_adapter")}
    settings["data"] = {name: value for name, value in settings["data"].items() if name != "exclude"}
    return {
        "edgetune": edgetune.__version__,
        "torch": torch.__version__,
        "base": plan.base,
        "data": plan.data_digest,
        LINEAGE: run.record.lineage,
        "configuration": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "parent": name_of(run.config.from_adapter, plan.base),
        "compared_with": None if rival is None else name_of(str(rival), plan.base),
        "verdict": str(decision.verdict),
        "reason": decision.reason,
        "heldout_bits_per_byte_before": before,
        "heldout_bits_per_byte_after": after,
        LEAKS: leaks.figures(),
        "best_step": best_step,
        "start_ids": run.loaded.tokenizer.start_ids,
        "steps": plan.steps,
        "compute_dtype": plan.compute_dtype,
        "int8": plan.int8,
        RECORDED: plan.weights,
        "optimizer_bits": plan.setting.optimizer_bits,
        "settings": settings,
        PRIVATE: private,
    }
