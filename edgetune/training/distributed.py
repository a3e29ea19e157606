"""More than one machine or card: every process computes a share of each step's rows, and their gradients are added up.

    torchrun --nproc-per-node 2 -m edgetune train notes/

Process 0 leads: it alone makes the plan, reads the held-out notes, keeps checkpoints, writes the adapter and prints. The
others follow it step by step, each with its own copy of the model and the notes. What travels is the plan without paths
or text, then gradients of the adapter, and, at readings, the adapter itself, so that machines whose arithmetic rounds
differently stay together. PyTorch's Gloo and NCCL encrypt nothing, and gradients give away what was trained on: beyond one
machine's loopback they are refused until the user says that the link is private.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from edgetune.runtime.errors import DeviceError, LinkError, UsageError

TIMEOUT = timedelta(hours=6)
"""How long a process waits for one that is alive but says nothing: a reading of the held-out notes may take long. The end of
one is noticed at once."""
BUCKET = 1 << 20
"""Values that travel at a time: few messages for many small tensors, and no second copy of all gradients."""
_END = -1


class World(Protocol):
    """The processes of a run, seen from one of them."""

    rank: int
    size: int
    here: int
    """How many of them share this machine."""

    def tell(self, message: dict[str, Any]) -> None:
        """Give the followers a JSON-ready object."""

    def hear(self) -> dict[str, Any]:
        """What the leader tells."""

    def agree(self, problem: Exception | None = None) -> None:
        """Wait until everyone came here. Raises `problem`, or LinkError where somebody else has one."""

    def announce(self, step: int | None) -> None:
        """The step that all do next; None, which may be said again: that there is none."""

    def announced(self) -> int | None:
        """What the leader announces."""

    def add_up(self, tensors: Sequence[Tensor], value: float) -> float:
        """Replace each tensor by its sum over all processes, with the same bits in each of them; the sum of their values."""

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Replace the followers' tensors by the leader's."""


class Alone:
    """One process: nobody to talk to."""

    rank, size, here = 0, 1, 1

    def tell(self, message: dict[str, Any]) -> None:
        pass

    def hear(self) -> dict[str, Any]:
        raise RuntimeError("there is no leader to hear")

    def agree(self, problem: Exception | None = None) -> None:
        if problem is not None:
            raise problem

    def announce(self, step: int | None) -> None:
        pass

    def announced(self) -> int | None:
        raise RuntimeError("there is no leader to follow")

    def add_up(self, tensors: Sequence[Tensor], value: float) -> float:
        return value

    def copy(self, tensors: Sequence[Tensor]) -> None:
        pass


class Group:
    """The processes of a torch.distributed group, which must be there. Each method raises LinkError when one is gone."""

    def __init__(self, device: torch.device, here: int) -> None:
        self.rank, self.size, self.here = torch.distributed.get_rank(), torch.distributed.get_world_size(), here
        self._device, self._ended = device, False

    def tell(self, message: dict[str, Any]) -> None:
        text = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8, device=self._device)
        self._broadcast(torch.tensor([len(text)], device=self._device))
        self._broadcast(text)

    def hear(self) -> dict[str, Any]:
        size = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._broadcast(size)
        text = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        self._broadcast(text)
        message: dict[str, Any] = json.loads(bytes(text.tolist()))
        return message

    def agree(self, problem: Exception | None = None) -> None:
        failed = self.add_up([], 0.0 if problem is None else 1.0)
        if problem is not None:
            raise problem
        if failed > 0:
            raise LinkError("Another process of this run could not begin; what it says tells why.")

    def announce(self, step: int | None) -> None:
        if not self._ended:
            self._broadcast(torch.tensor([_END if step is None else step], device=self._device))
        self._ended = step is None

    def announced(self) -> int | None:
        step = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._broadcast(step)
        return None if int(step) == _END else int(step)

    def add_up(self, tensors: Sequence[Tensor], value: float) -> float:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(self._device)
            with _link():
                torch.distributed.all_reduce(flat)
            _scatter(flat, bucket)
        total = torch.tensor([value], dtype=torch.float64, device=self._device)
        with _link():
            torch.distributed.all_reduce(total)
        return float(total)

    def copy(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            there = tensor.to(self._device)
            self._broadcast(there)
            tensor.copy_(there)

    def _broadcast(self, tensor: Tensor) -> None:
        with _link():
            torch.distributed.broadcast(tensor, 0)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of about BUCKET values together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(held.numel() for held in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _scatter(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(values.view_as(tensor))


@contextlib.contextmanager
def _link() -> Iterator[None]:
    """What torch.distributed raises when another process ended or the network failed, as the sentence for it."""
    try:
        yield
    except RuntimeError as error:
        raise LinkError(
            "Another process of this run ended, or the link to it failed; what is kept goes on from the last whole step "
            "when the same command is run again."
        ) from error


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined(device: torch.device, private_link: bool) -> Iterator[World]:
    """The processes that torchrun started together; Alone where it did not.

    Raises UsageError for processes on several machines where `private_link` does not say that nobody listens between, or
    nothing says which interface that link is; DeviceError for more processes than cards.
    """
    if not is_launched():
        yield Alone()
        return
    here, size = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if here < size and not private_link:
        raise UsageError(
            f"This run has {size} processes, {here} of them on this machine; gradients travel between machines unencrypted "
            "and give away what was trained on. Type --private-link where the link is private (WireGuard, SSH)."
        )
    on_cards = device.type == "cuda"
    interface = "NCCL_SOCKET_IFNAME" if on_cards else "GLOO_SOCKET_IFNAME"
    if here == size:
        os.environ[interface] = "lo0" if sys.platform == "darwin" else "lo"
    elif not os.environ.get(interface):
        raise UsageError(
            f"{interface} does not say which interface the private link is, so that gradients might take another; type e.g. "
            f"{interface}=wg0 before the command, on every machine."
        )
    if on_cards:
        if here > torch.cuda.device_count():
            raise DeviceError(f"{here} processes were started here for {torch.cuda.device_count()} cards; start one for each.")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _link():
        torch.distributed.init_process_group("nccl" if on_cards else "gloo", timeout=TIMEOUT)
    try:
        yield Group(device if on_cards else torch.device("cpu"), here)
    finally:
        with contextlib.suppress(RuntimeError):
            torch.distributed.destroy_process_group()
