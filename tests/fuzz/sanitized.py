"""Compiles the C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer into a folder.

    python tests/fuzz/sanitized.py FOLDER

It takes minutes. Prints the libraries that a process must preload to use the kernels.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
BUILD = Path(__file__).resolve().parents[2] / "runtime" / "backends" / "cpu" / "build.py"


def runtimes() -> list[str]:
    """Return the paths of the sanitizers' run-time libraries; empty where gcc, or one of them, is not there."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        try:
            done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return []
        found.append(done.stdout.strip())
    return found if all(os.path.isabs(path) for path in found) else []


def build_script() -> ModuleType:
    """Import the kernels' own build script, with less optimisation, which sanitizers make slow."""
    spec = importlib.util.spec_from_file_location("kernels_build", BUILD)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.UNIX_FLAGS = tuple("-O1" if flag == "-O3" else flag for flag in script.UNIX_FLAGS)
    return script


def main(folder: Path) -> None:
    """Compile into `folder`, and print what LD_PRELOAD must hold."""
    for variable in ("CFLAGS", "CXXFLAGS", "LDFLAGS"):  # setuptools reads them
        os.environ[variable] = FLAGS
    build_script().build_in_place(folder)
    print(" ".join(runtimes()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
