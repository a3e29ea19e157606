"""Compile every Triton kernel of the CUDA back end to machine code for real cards; no card is needed. See test_cuda_kernels.py.

Triton's interpreter runs code that its compiler may refuse, so the tests use both. Run this without TRITON_INTERPRET and pass
the compute capabilities to compile for: python tests/compile_kernels.py 80 90. It prints one line per kernel: the kernel's
name, the capability, the number of global loads and the size of the machine code in bytes.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from edgetune.runtime.backends.cuda import kernels

WEIGHT = {
    "packed": "*u8",
    "table": "*fp32",
    "absmax": "*u8",
    "nested_table": "*fp32",
    "nested_absmax": "*fp32",
    "offset": "fp32",
}
PLAIN = {**WEIGHT, "absmax": "*fp32", "nested_table": None, "nested_absmax": None}
DOUBLE = {"NESTED": True, "NESTED_SIZE": 256, "HALF": 32}
SINGLE = {**DOUBLE, "NESTED": False, "NESTED_SIZE": 1}
MATVEC = {"BLOCKS": 16, "ROWS": 2, "ADD": True}
NUMBERS = {"eps": "fp32", "scale": "fp32", "seed": "i64", "threshold": "i64"}
INDICES = {"position": "*i32", "targets": "*i64"}

# For each kernel and each way to launch it: the argument types that differ from the usual ones, and the constants.
WAYS: dict[str, list[tuple[dict[str, str | None], dict[str, Any]]]] = {
    "dequantize": [({**WEIGHT, "out": kind}, {**DOUBLE, "BLOCKS": 32}) for kind in ("*bf16", "*fp32", "*fp16")]
    + [(dict(PLAIN), {**SINGLE, "BLOCKS": 32})],
    "matvec": [
        (dict(WEIGHT), {**DOUBLE, **MATVEC, "BIAS": True, "RANK_TILE": 16}),
        ({**PLAIN, "bias": None, "reduced": None, "lora_b": None}, {**SINGLE, **MATVEC, "BIAS": False, "RANK_TILE": 0}),
    ],
    "dense_matvec": [({"x": "*fp32", "out": "*fp32"}, {"ROWS": 1, "TILE": 4096})],
    "rms_norm": [({}, {"TILE": 4096})],
    "rms_norm_backward": [({}, {"TILE": 4096})],
    "gated": [({}, {"GELU": False, "TILE": 1024}), ({}, {"GELU": True, "TILE": 1024})],
    "gated_backward": [({}, {"GELU": False, "TILE": 1024}), ({}, {"GELU": True, "TILE": 1024})],
    "rope": [({"cos": "*fp32", "sin": "*fp32"}, {"INVERSE": True, "HEADS_TILE": 32, "TILE": 64})],
    "dropout": [({}, {"TILE": 1024})],
    "cross_entropy": [({"weights": "*fp32", "losses": "*fp32"}, {"TILE": 4096})],
    "rotate_and_store": [
        (
            {"qkv": "*fp32", "cos": "*fp32", "sin": "*fp32", "q_norm": norm, "k_norm": norm},
            {"NORM": norm is not None, "TILE": 64},
        )
        for norm in ("*bf16", None)
    ],
    "attend_part": [
        (dict.fromkeys(("q", "sums", "tops", "parts"), "*fp32"), {"WINDOW": window, "KEYS": 32, "TILE": 128})
        for window in (True, False)
    ],
    "attend_whole": [(dict.fromkeys(("sums", "tops", "parts", "out"), "*fp32"), {"SPLITS_TILE": 32, "TILE": 128})],
}
POINTERS = {"x", "h", "dx", "out", "weight", "bias", "reduced", "lora_b", "gate", "up", "dact", "dgate", "dup", "logits",
            "keys", "values"}  # fmt: skip


def compile_one(name: str, types: dict[str, str | None], constants: dict[str, Any], capability: int) -> None:
    """Compile a kernel for one way to launch it and print a line about it. Raises triton's CompilationError."""
    kernel = getattr(kernels, name)
    constants = {**constants, **{argument: None for argument, kind in types.items() if kind is None}}
    signature = {}
    for argument in kernel.arg_names:
        usual = "*bf16" if argument in POINTERS else NUMBERS.get(argument, INDICES.get(argument, "i32"))
        signature[argument] = "constexpr" if argument in constants else types.get(argument) or usual
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"enable_fp_fusion": name != "dequantize", **({"num_warps": 1} if name == "matvec" else {})}
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(name, capability, code.asm["ptx"].count("ld.global"), len(code.asm["cubin"]))


def main() -> None:
    found = {name for name, value in inspect.getmembers(kernels) if isinstance(value, triton.JITFunction) and name[0] != "_"}
    assert found == set(WAYS), f"kernels.py defines {sorted(found)}, but WAYS lists {sorted(WAYS)}"
    for capability in map(int, sys.argv[1:]):
        for name, ways in WAYS.items():
            for types, constants in ways:
                compile_one(name, types, constants, capability)


if __name__ == "__main__":
    main()
