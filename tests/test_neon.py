"""The ARM kernels, cross-compiled and run under qemu, pass the tests of the kernels."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "runtime" / "backends" / "cpu"
COMPILER = "aarch64-linux-gnu-g++"
TOOLS = "Debian's g++-aarch64-linux-gnu and qemu-user-static"

pytestmark = pytest.mark.slow


def tool(*names: str) -> str:
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    pytest.skip(f"{names[0]} is not installed: install {TOOLS}")


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library and harness.cpp into one static ARM program and return its path."""
    compiler, folder = tool(COMPILER), tmp_path_factory.mktemp("neon")
    spec = importlib.util.spec_from_file_location("build_kernels", KERNELS / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    sources = {"scalar": (), **{isa: flags for isa, (flags, _) in build.ARM.items()}}
    commands = [([f"isa_{isa}.cpp"], flags) for isa, flags in sources.items()]
    commands += [(["dispatch.cpp"], ()), (["team.cpp"], ())]
    running = []
    for (source,), flags in commands:
        command = [compiler, *build.UNIX_FLAGS, *flags, "-c", str(KERNELS / source), "-o", str(folder / f"{source}.o")]
        running.append(subprocess.Popen(command))
    assert [process.wait() for process in running] == [0] * len(running)
    program = folder / "harness"
    harness = [compiler, "-std=c++17", "-O1", "-static", "-pthread", str(ROOT / "tests" / "neon" / "harness.cpp")]
    subprocess.run([*harness, *map(str, folder.glob("*.o")), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("suite", ["test_cpu_kernels", "test_attention_kernels", "test_decode_kernels", "test_project_kernels"])
@pytest.mark.parametrize("isa", ["neon", "neon_dot", "neon_i8mm"])
def test_the_arm_kernels_pass(harness: Path, isa: str, suite: str) -> None:
    pytest.importorskip("edgetune.runtime.backends.cpu", exc_type=ImportError, reason="no C++ kernels were built")
    paths = os.pathsep.join([str(ROOT / "tests" / "neon"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "EDGETUNE_HARNESS": str(harness),
        "EDGETUNE_QEMU": tool("qemu-aarch64-static", "qemu-aarch64"),
    }
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            f"tests/{suite}.py",
            "-q",
            "-p",
            "remote",
            "-p",
            "no:cacheprovider",
            "--only-isa",
            isa,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 10
