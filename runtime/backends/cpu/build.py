"""Compile the C++ kernels into one shared library with a plain C ABI, `_kernels.so` (`_kernels.dll`), beside this file.

setuptools loads `BuildKernels` straight from this file (pyproject.toml names it), so this file imports nothing of edgetune.
The kernels are optional: without a working compiler the install succeeds with one warning, and plain torch is used instead.
To work on the kernels in a clone, run `python runtime/backends/cpu/build.py`, which compiles into this folder.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError, LinkError

NAME = "edgetune.runtime.backends.cpu._kernels"
"""Name of the extension module for setuptools. It decides where the library is installed."""
FAILURES = (BaseError, CCompilerError, CompileError, LinkError, OSError, ValueError)
"""Exceptions that a failing or missing compiler raises."""
FOLDER = Path(__file__).resolve().parent

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi")
_AVX_VNNI = (*_AVX2, "-mavxvnni")
_AMX = (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8")

# Instruction set -> flags for gcc and clang, flags for MSVC. The names are those of isa_*.cpp and of dispatch.cpp, whose
# first comment lists everything that a new instruction set needs.
Flags = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
X86: Flags = {
    "avx2": (_AVX2, ("/arch:AVX2",)),
    "avx_vnni": (_AVX_VNNI, ("/arch:AVX2",)),
    "avx512": (_AVX512, ("/arch:AVX512",)),
    "avx512_bf16": (_AVX512_BF16, ("/arch:AVX512",)),
    "amx": (_AMX, ("/arch:AVX512",)),
}
ARM: Flags = {
    "neon": ((), ()),
    "neon_dot": (("-march=armv8.2-a+dotprod",), ()),
    "neon_i8mm": (("-march=armv8.2-a+bf16+i8mm+dotprod+fp16",), ()),
}
# -ffp-contract=off: dequantisation is defined without fused operations; a kernel that wants one calls `fma` or `fused`.
# -fopenmp-simd: vectorise where the source asks for it. No -fopenmp: the threads are team.cpp's.
UNIX_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
    *("-g0", "-Wall", "-Wno-unused-function", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
MSVC_FLAGS = ("/std:c++17", "/O2", "/fp:precise", "/EHs-c-", "/GR-", "/Zc:threadSafeInit-", "/openmp:experimental")


def machine_isas() -> Flags:
    """Return the instruction sets beyond `scalar` that CPUs of this machine's architecture may have, with their flags."""
    machine = platform.machine().lower()
    if sys.maxsize < 2**32:  # the kernels that use intrinsics expect 64 bits
        return {}
    if machine in ("x86_64", "amd64"):
        return X86
    if machine in ("aarch64", "arm64"):
        return ARM
    return {}


class BuildKernels(build_ext):
    """Build the kernels, each file with its own flags. If that fails, leave the library out with one warning."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a file name without Python's ABI tag: the library is not a Python extension module."""
        return os.path.join(*fullname.split(".")) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return no symbols beyond those that dispatch.cpp exports; in particular no PyInit_ function."""
        return []

    def get_outputs(self) -> list[str]:
        """Return only files that exist: a strict editable install links every file in this list."""
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        """Return the built files that exist, each with its place in the source tree."""
        return {built: source for built, source in super().get_output_mapping().items() if os.path.exists(built)}

    def build_extension(self, ext: Extension) -> None:
        """Compile and link the library; if that fails, warn and go on."""
        try:
            self._build(ext)
        except FAILURES as error:
            self._leave_out(ext, str(error))

    def run(self) -> None:
        """Run build_ext; if it fails before it reaches an extension (on Windows, finding a compiler can), warn and go on."""
        try:
            super().run()
        except FAILURES as error:
            for ext in self.extensions:
                self._leave_out(ext, str(error))

    def _leave_out(self, ext: Extension, reason: str) -> None:
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        reason = " ".join(reason.split()).rstrip(".") or "no reason given"
        warnings.warn(
            f"edgetune's C++ kernels were not built ({reason}). edgetune will use plain torch, which is several times slower. "
            "To build the kernels, install a C++ compiler and reinstall edgetune.",
            stacklevel=2,
        )

    def _build(self, ext: Extension) -> None:
        folder = Path(ext.sources[0]).parent
        msvc = self.compiler.compiler_type == "msvc"
        if sys.platform == "darwin":  # a universal Python compiles for two architectures, but x86's flags are no ARM flags
            for command in ("compiler_so", "compiler_so_cxx", "linker_so", "linker_so_cxx"):
                if getattr(self.compiler, command, None):
                    setattr(self.compiler, command, one_architecture(getattr(self.compiler, command)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {
                isa: pool.submit(self._compile, folder / f"isa_{isa}.cpp", list(flags[1] if msvc else flags[0]))
                for isa, flags in machine_isas().items()
            }
            scalar = pool.submit(self._compile, folder / "isa_scalar.cpp", [])
            objects, left_out = scalar.result(), []
            for isa, job in jobs.items():
                try:
                    objects += job.result()
                except FAILURES:  # the compiler is older than the instruction set
                    left_out.append(f"{'/D' if msvc else '-D'}ET_NO_{isa.upper()}")
        objects += [*self._compile(folder / "dispatch.cpp", left_out), *self._compile(folder / "team.cpp", [])]
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, libraries=[] if msvc else ["m", "pthread"], build_temp=self.build_temp
        )

    def _compile(self, source: Path, flags: list[str]) -> list[str]:
        common = MSVC_FLAGS if self.compiler.compiler_type == "msvc" else UNIX_FLAGS
        objects = self.compiler.compile(
            [str(source)],
            output_dir=self.build_temp,
            extra_postargs=[*common, *flags],
            depends=inputs(source.parent),
        )
        return list(objects)


def one_architecture(command: list[str]) -> list[str]:
    """Return a compiler's command line with its -arch options replaced by one for this machine."""
    text = " ".join(command)
    return [*re.sub(r"-arch \S+", "", text).split(), "-arch", platform.machine()]


def inputs(folder: Path) -> list[str]:
    """Return the files that every object depends on."""
    return [str(path) for path in sorted([*folder.glob("*.inl"), *folder.glob("*.h")])]


def build_in_place(folder: Path = FOLDER) -> Path:
    """Compile the library into `folder` and return its path. Raise the compiler's exception if it fails."""
    extension = Extension(NAME, [str(FOLDER / "dispatch.cpp")])
    with tempfile.TemporaryDirectory() as temporary:
        command: Any = BuildKernels(Distribution({"name": "edgetune", "ext_modules": [extension]}))
        command.build_lib, command.build_temp = os.path.join(temporary, "lib"), os.path.join(temporary, "temp")
        command.force = True
        command.ensure_finalized()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            command.run()
        built = Path(command.get_ext_fullpath(NAME))
        target = folder / built.name
        # Rename over the old library instead of writing into it: a running Python may have it mapped into memory.
        fresh = target.with_name(target.name + ".new")
        fresh.write_bytes(built.read_bytes())
        os.replace(fresh, target)
    return target


if __name__ == "__main__":
    sys.stdout.write(f"{build_in_place()}\n")
