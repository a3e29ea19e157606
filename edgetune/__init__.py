"""edgetune: private, on-device fine-tuning of small LLaMA adapters.

>>> from edgetune import Session
>>> session = Session.load("demo")
>>> session.generate("The tomatoes").text  # doctest: +SKIP

Importing this package is cheap: torch is loaded with the first name that needs it.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune._version import __version__

# `runtime/` and `export/` install as edgetune.runtime and edgetune.export. In a clone they are beside this folder, and Python
# started in the clone's root finds this folder before an installed edgetune: then the clone's own `runtime/` and `export/` must
# be used with it.
_clone = Path(__file__).resolve().parent.parent
if (_clone / "runtime" / "nf4.py").is_file() and str(_clone) not in __path__:
    __path__.append(str(_clone))

OPENMP_WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}
"""Environment variables that make the waiting threads of torch's OpenMP (libgomp; libomp and libiomp5) block after some tens of
microseconds. By default they poll for milliseconds, on processors that the kernels' own threads and other programs could use.
OpenMP reads them when torch is loaded; where the user has set them or OMP_WAIT_POLICY, nothing is changed."""
if "OMP_WAIT_POLICY" not in os.environ:
    for _name, _value in OPENMP_WAITING.items():
        os.environ.setdefault(_name, _value)

if TYPE_CHECKING:
    from edgetune.config import TrainConfig
    from edgetune.exporting import export_adapter
    from edgetune.runtime.errors import EdgetuneError
    from edgetune.session import Session
    from edgetune.training.train import train

_HOMES = {
    "EdgetuneError": "edgetune.runtime.errors",
    "Session": "edgetune.session",
    "TrainConfig": "edgetune.config",
    "export_adapter": "edgetune.exporting",
    "train": "edgetune.training.train",
}
__all__ = ["EdgetuneError", "Session", "TrainConfig", "__version__", "export_adapter", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
