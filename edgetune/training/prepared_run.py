"""A run that is ready for its next step, as setup.py makes it and the loop takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgetune.config import TrainConfig
from edgetune.dataset.anchor_set import AnchorSet
from edgetune.dataset.evaluation_set import EvaluationSet
from edgetune.dataset.packing import Packer
from edgetune.home import expand
from edgetune.library import adapter_registry as registry
from edgetune.library.loading import Loaded
from edgetune.runtime.config import LoraConfig
from edgetune.runtime.runner import Runner
from edgetune.training.plan import Plan, RunRecord
from edgetune.training.recorded import Recorded


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready for its next step: model loaded, adapter attached, notes tokenized, plan made."""

    config: TrainConfig
    record: RunRecord
    loaded: Loaded
    runner: Runner
    packer: Packer
    held_out: EvaluationSet | None
    anchor: AnchorSet | None
    replies: EvaluationSet | None
    """Answers of the base's own that are not trained on."""
    folder: Path
    """The unfinished run's own folder: token stores, and scratch files of what does not stay in memory."""
    recorded: Recorded | None = None
    """The run that this one repeats."""

    @property
    def plan(self) -> Plan:
        """Return everything that the run will do."""
        return self.record.plan

    @property
    def lora(self) -> LoraConfig:
        """Return the shape of the run's adapter."""
        return self.record.lora

    @property
    def adapter_folder(self) -> Path:
        """Return the folder of the run's adapter. It is settled when the run begins: a resumed run writes to the same one."""
        if self.config.out is not None:
            return expand(self.config.out)
        return registry.adapters_folder(self.plan.base) / self.record.run
