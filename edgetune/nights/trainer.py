"""Trains for a night: the real training, behind an interface that tests replace by a simulated one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

from edgetune.config import TrainConfig
from edgetune.events import Event
from edgetune.progress import Show


class Trainer(Protocol):
    """The training that a night needs."""

    def current(self, config: TrainConfig, show: Show) -> str | None:
        """Return the folder of the current adapter of this configuration's base model, or None if there is none."""

    def train(self, config: TrainConfig, stop: threading.Event, fresh: bool, show: Show) -> Iterator[Event]:
        """Train as training/train.py does: the last event is Finished, or Interrupted once `stop` is set.

        Whether the new adapter becomes the current one is decided here too, before Finished is yielded, which says so.
        """

    def discard(self, config: TrainConfig) -> None:
        """Delete the interrupted run of this configuration, if there is one: it holds notes as tokens."""


class EdgetuneTrainer:
    """Trains with edgetune itself. Every method is one of `Trainer`."""

    def current(self, config: TrainConfig, show: Show) -> str | None:
        """Return the folder of the current adapter of this configuration's base model."""
        from edgetune.library import adapter_registry as registry
        from edgetune.library.loading import open_base

        path = registry.find(None, open_base(config.model, show)[1].digest)
        return None if path is None else str(path)

    def train(self, config: TrainConfig, stop: threading.Event, fresh: bool, show: Show) -> Iterator[Event]:
        """Begin or resume the run of this configuration, and yield its events."""
        from edgetune.training.train import train

        return train(config, stop, fresh, show=show)

    def discard(self, config: TrainConfig) -> None:
        """Delete the interrupted run of this configuration, if there is one."""
        from edgetune.library.loading import open_base
        from edgetune.training.unfinished_run import lock_run

        with lock_run(config, open_base(config.model)[1].digest) as unfinished:
            unfinished.discard()
