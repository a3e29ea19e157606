"""Imitate a Mac's GPU: tensors that report `mps:0` are computed on the CPU, and a fake torch.mps records how it is used.

The fake raises an error where the real device does: for float64, for tensors of two devices in one op, for pinned memory and
for random generators of another device. It also refuses non-blocking copies, which on a real GPU may still be under way when
they return. It records every op that ran. Metal sources are compiled by metal_shim and run on the same numbers, so that a whole
training run executes exactly the code that it would execute on a Mac.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import metal_shim
import pytest
import torch
from torch.overrides import TorchFunctionMode

MPS, CPU = torch.device("mps:0"), torch.device("cpu")
_COPY = torch.ops.aten.copy_.default


class MpsTensor(torch.Tensor):
    """A tensor that reports mps:0; `inner` holds its numbers on the CPU. C++ sees a CPU tensor: there is no MPS runtime."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> MpsTensor:
        if inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        if inner.is_pinned():
            raise RuntimeError("only dense CPU tensors can be pinned")
        made: MpsTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=CPU
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert FakeMps.active is not None, "an MPS tensor outlived its machine"
        return FakeMps.active.run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"MpsTensor({self.inner})"


class FakeMps(TorchFunctionMode):
    """Makes `mps` a usable device while entered. `ops` is the set of ops that ran on it, `sent` counts tensors copied to it."""

    active: FakeMps | None = None

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[Any] = set()
        self.sent = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handle the functions that take a device, which create or move tensors."""
        kwargs = dict(kwargs or {})
        ours = bool(args) and isinstance(args[0], MpsTensor)
        if ours and func is torch.Tensor.cpu:
            return args[0].detach().inner.clone()
        if func is torch.Tensor.numpy and ours:
            raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first.")
        where = [value for value in (*args, *kwargs.values()) if _is_device(value)]
        if func is torch.device or not where:
            return func(*args, **kwargs)
        _refuse_to_hurry(kwargs.get("non_blocking", False))
        target = torch.device(where[0])
        if target.type == "mps":
            if kwargs.get("pin_memory") or kwargs.get("generator") is not None or kwargs.get("dtype") == torch.float64:
                raise RuntimeError(f"an MPS tensor cannot be made with {kwargs}")
            args = [CPU if _is_device(value) else value for value in args]
            made = func(*args, **{name: CPU if _is_device(value) else value for name, value in kwargs.items()})
            if isinstance(made, MpsTensor):
                return made
            self.sent += bool(args) and isinstance(args[0], torch.Tensor)
            return MpsTensor(made.detach().clone() if len(args) and made is args[0] else made.detach())
        if ours:
            return func(args[0].detach().inner, *args[1:], **kwargs).clone()
        return func(*args, **kwargs)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an op that has at least one MPS tensor among its arguments."""
        tensors: list[torch.Tensor] = []
        inner_args, inner_kwargs = _map(functools.partial(_unwrap, tensors), [args, kwargs])
        ours = [tensor for tensor in tensors if isinstance(tensor, MpsTensor)]
        if func is not _COPY and any(not isinstance(tensor, MpsTensor) and tensor.dim() > 0 for tensor in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got mps:0 and cpu")
        _refuse_to_hurry(func is _COPY and len(args) > 2 and args[2])
        _refuse_what_macos_gets_wrong(str(func), args, kwargs)
        wrappers = {id(tensor.inner): tensor for tensor in ours}
        found = func(*inner_args, **inner_kwargs)
        if any(tensor.inner.shape != tensor.shape for tensor in ours):
            raise RuntimeError(f"{func} would resize an output, which is deprecated")
        if func is _COPY and not isinstance(args[0], MpsTensor):
            return args[0]
        self.ops.add(func)
        wrap = functools.partial(_wrap, wrappers)
        return _map(wrap, found)


def _refuse_to_hurry(non_blocking: bool) -> None:
    """Raise RuntimeError for a non-blocking copy: code that uses its source or its result before it ends is a race."""
    if non_blocking:
        raise RuntimeError("nobody waits for a non_blocking copy to or from mps")


_WRONG_WHERE_STRIDED = ("masked_fill_", "index_add_", "index_copy_", "scatter_add_", "addcdiv_", "addcmul_")
"""Ops that give wrong numbers on tensors that are not contiguous: pytorch#118115, #131285, #163327, #176159."""


def _refuse_what_macos_gets_wrong(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise for calls that silently give wrong numbers on some Macs. See also ops.product_into and vocabulary.MPS_TERMS."""
    name = name.removeprefix("aten.").split(".")[0]
    product = name.rstrip("_") in ("mm", "addmm", "bmm", "baddbmm")
    if product:
        first, second = args[-2:]
        if first.shape[-1] >= 32767 and min(first.shape[-2], second.shape[-1]) >= 16:
            raise RuntimeError(f"{name} of {tuple(first.shape)} and {tuple(second.shape)} is wrong on an M1")
    out = args[0] if product and name.endswith("_") else kwargs.get("out")
    if out is not None and (out.storage_offset() or not out.is_contiguous()):
        raise RuntimeError(f"{name} into a view is lost on macOS 14")
    if name in _WRONG_WHERE_STRIDED and not args[0].is_contiguous():
        raise RuntimeError(f"{name} of a tensor that is not contiguous is wrong in some versions")
    if name == "scatter_add_" and args[0].storage_offset():
        raise RuntimeError("scatter_add_ of a view is lost")


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cpu", "mps"))


def _map(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Apply `change` to every tensor in a value and in its nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_map(change, part) for part in value)
    return {name: _map(change, part) for name, part in value.items()} if isinstance(value, dict) else value


def _unwrap(seen: list[torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    seen.append(value)
    return value.inner if isinstance(value, MpsTensor) else value


def _wrap(wrappers: dict[int, MpsTensor], value: torch.Tensor) -> MpsTensor:
    return wrappers[id(value)] if id(value) in wrappers else MpsTensor(value)


class FakeKernel:
    """A shim kernel whose tensor arguments must all be MPS tensors; it reads them at their storage offset."""

    thread_execution_width = 32

    def __init__(self, kernel: metal_shim.ShimKernel, machine: Machine) -> None:
        self._kernel, self._machine = kernel, machine

    def __call__(self, *arguments: Any, threads: Any, group_size: Any) -> None:
        assert all(not isinstance(value, torch.Tensor) or isinstance(value, MpsTensor) for value in arguments)
        self._machine.launches.append((self._kernel.signature.name, arguments, tuple(threads), tuple(group_size)))
        self._kernel(*_map(functools.partial(_unwrap, []), arguments), threads=threads, group_size=group_size)


class Machine:
    """The fake's versions of torch.mps's functions, with a record of the calls."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[Any, ...], tuple[int, ...], tuple[int, ...]]] = []
        self.asked: list[str] = []
        self.cached = 3 << 20
        self.allocated = 5 << 20
        self.source_changes: Callable[[str], str] = lambda source: source
        self.mode = FakeMps()

    def compile_shader(self, source: str) -> Any:
        library = metal_shim.ShimLibrary(self.source_changes(source))
        kernels = {name: FakeKernel(kernel, self) for name, kernel in vars(library).items()}
        return type("Library", (), kernels)()

    def synchronize(self) -> None:
        self.asked.append("synchronize")

    def empty_cache(self) -> None:
        self.asked.append("empty_cache")
        self.cached = 0

    def current_allocated_memory(self) -> int:
        return self.allocated

    def driver_allocated_memory(self) -> int:
        return self.allocated + self.cached

    def recommended_max_memory(self) -> int:
        return 8 << 30


@contextlib.contextmanager
def fake_mps(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Iterator[Machine]:
    """Pretend within a block that the machine has an Apple GPU; `changes` replaces functions of torch.mps, None removes one."""
    import sys

    from edgetune.runtime import ops

    machine = Machine()
    for name in (
        "compile_shader", "synchronize", "empty_cache", "current_allocated_memory", "driver_allocated_memory",
        "recommended_max_memory",
    ):  # fmt: skip
        monkeypatch.setattr(torch.mps, name, getattr(machine, name))
    for name, value in changes.items():
        monkeypatch.setattr(torch.mps, name, value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def backward(*arguments: Any, **named: Any) -> Any:
        # A mode is off while it handles a function, and torch.autograd.backward is such a function.
        with machine.mode:
            return run_backward(*arguments, **named)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", backward)
    forget(ops, sys.modules)
    FakeMps.active = machine.mode
    try:
        with machine.mode:
            yield machine
    finally:
        FakeMps.active = None
        forget(ops, sys.modules)


def forget(ops: Any, modules: dict[str, Any]) -> None:
    """Clear the cached back ends, so that they are looked up again."""
    ops._load.cache_clear()
    ops._best.cache_clear()
    for name in [name for name in modules if name.startswith("edgetune.runtime.backends.metal")]:
        del modules[name]
    # Otherwise `from backends import metal` would find the old module.
    vars(modules["edgetune.runtime.backends"]).pop("metal", None)


@functools.cache
def mps_table() -> dict[str, set[str]]:
    """Return each op's dispatch keys in torch's own table of ops: {"mm.out": {"CPU", "CUDA", "MPS"}, ...}."""
    yaml = pytest.importorskip("yaml")
    torchgen = pytest.importorskip("torchgen")
    from pathlib import Path

    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    table: dict[str, set[str]] = {}
    for entry in yaml.safe_load(text):
        name = re.split(r"\(", entry["func"], maxsplit=1)[0]
        keys = {key.strip() for keys in entry.get("dispatch", {}) for key in keys.split(",")}
        table[name] = keys or {"CompositeImplicitAutograd"}
        if "structured_delegate" in entry:
            table[name] = {"delegate:" + entry["structured_delegate"]}
    return table
