"""Runs one training on several processes, machines or cards: each computes a share of every step, and gradients are summed.

    torchrun --nproc-per-node 2 -m edgetune train notes/

Process 0 is the leader: it alone makes the plan, evaluates the held-out notes, writes checkpoints and the adapter, and prints.
The others are followers. They follow it step by step, each with its own copy of the model and the notes. Three things travel
between processes: the plan, without paths or text; gradients of the adapter; and, before the steps that follow an evaluation,
the adapter itself, so that machines whose arithmetic rounds differently stay together.

PyTorch's Gloo and NCCL encrypt nothing, and gradients reveal what was trained on. Beyond the loopback of one machine,
edgetune therefore refuses to start until the user confirms that the link is private.
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
"""Longest wait for a process that is alive but silent, since evaluating the held-out notes may take long; chosen by hand.
A process that dies is noticed at once."""
BUCKET_VALUES = 1 << 20
"""Values that are summed at a time; chosen by hand. Many small tensors then need few messages, and no second copy of all
gradients is made."""
_END = -1
"""The step number that tells followers that there are no more steps."""


class World(Protocol):
    """All processes of a run, as one of them sees them. Every process must make the same calls in the same order."""

    rank: int
    """Number of this process; 0 is the leader."""
    size: int
    """Number of processes."""
    local_size: int
    """Number of processes on this machine."""

    def send(self, message: dict[str, Any]) -> None:
        """Send a JSON-ready object from the leader to all followers."""

    def receive(self) -> dict[str, Any]:
        """Return the object that the leader sends."""

    def check_all_ready(self, problem: Exception | None = None) -> None:
        """Wait until all processes have called this. Raise `problem`, or LinkError where another process has a problem."""

    def announce_step(self, step: int | None) -> None:
        """Tell the followers which step all processes run next. None ends the run, and may be announced twice."""

    def receive_step(self) -> int | None:
        """Return the step that the leader announces, or None at the end of the run."""

    def sum_over_processes(self, tensors: Sequence[Tensor], value: float) -> float:
        """Replace each tensor by its sum over all processes, the same bits in each, and return the sum of their values."""

    def copy_from_leader(self, tensors: Sequence[Tensor]) -> None:
        """Replace the followers' tensors by the leader's."""


class SingleProcess:
    """A World of one process, where there is nobody to talk to."""

    rank, size, local_size = 0, 1, 1

    def send(self, message: dict[str, Any]) -> None:
        pass

    def receive(self) -> dict[str, Any]:
        raise RuntimeError("a single process has no leader to receive from")

    def check_all_ready(self, problem: Exception | None = None) -> None:
        if problem is not None:
            raise problem

    def announce_step(self, step: int | None) -> None:
        pass

    def receive_step(self) -> int | None:
        raise RuntimeError("a single process has no leader to receive from")

    def sum_over_processes(self, tensors: Sequence[Tensor], value: float) -> float:
        return value

    def copy_from_leader(self, tensors: Sequence[Tensor]) -> None:
        pass


class ProcessGroup:
    """A World over torch.distributed's process group, which must exist. Every method raises LinkError if a process is gone."""

    def __init__(self, device: torch.device, local_size: int) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.local_size = local_size
        self._device, self._ended = device, False

    def send(self, message: dict[str, Any]) -> None:
        text = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8, device=self._device)
        # The length goes first, because receivers must allocate before they receive.
        self._broadcast(torch.tensor([len(text)], device=self._device))
        self._broadcast(text)

    def receive(self) -> dict[str, Any]:
        size = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._broadcast(size)
        text = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        self._broadcast(text)
        message: dict[str, Any] = json.loads(bytes(text.tolist()))
        return message

    def check_all_ready(self, problem: Exception | None = None) -> None:
        problems = self.sum_over_processes([], 0.0 if problem is None else 1.0)
        if problem is not None:
            raise problem
        if problems > 0:
            raise LinkError("Another process of this run could not begin. Its own error message says why.")

    def announce_step(self, step: int | None) -> None:
        # After the end nobody receives any more, so a second announcement of it would wait for ever.
        if not self._ended:
            self._broadcast(torch.tensor([_END if step is None else step], device=self._device))
        self._ended = step is None

    def receive_step(self) -> int | None:
        step = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._broadcast(step)
        return None if int(step) == _END else int(step)

    def sum_over_processes(self, tensors: Sequence[Tensor], value: float) -> float:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(self._device)
            with _link_errors():
                torch.distributed.all_reduce(flat)
            _unflatten(flat, bucket)
        # float64 is what a single process sums its losses in: Python's float.
        total = torch.tensor([value], dtype=torch.float64, device=self._device)
        with _link_errors():
            torch.distributed.all_reduce(total)
        return float(total)

    def copy_from_leader(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            on_device = tensor.to(self._device)
            self._broadcast(on_device)
            tensor.copy_(on_device)

    def _broadcast(self, tensor: Tensor) -> None:
        """Send the leader's `tensor` to all processes, in place."""
        with _link_errors():
            torch.distributed.broadcast(tensor, 0)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors in groups of at least BUCKET_VALUES values; the last group may be smaller."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(member.numel() for member in bucket) >= BUCKET_VALUES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _unflatten(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    """Copy the values of `flat` (n,) back into the tensors that it was joined from, n values in all."""
    for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(values.view_as(tensor))


@contextlib.contextmanager
def _link_errors() -> Iterator[None]:
    """Turn the RuntimeError of torch.distributed when a process is gone or the network failed into a LinkError."""
    try:
        yield
    except RuntimeError as error:
        raise LinkError(
            "Another process of this run ended, or the link to it failed. The last completed step is saved: run the same "
            "command again to continue."
        ) from error


def is_launched() -> bool:
    """Return True if torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def join_processes(device: torch.device, private_link: bool) -> Iterator[World]:
    """Connect the processes that torchrun started together; yield a SingleProcess where it did not start this one.

    Raises UsageError for processes on several machines unless `private_link` confirms that nobody listens in between and an
    environment variable names the network interface of that link; DeviceError for more processes than cards.
    """
    if not is_launched():
        yield SingleProcess()
        return
    local_size, size = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if local_size < size and not private_link:
        raise UsageError(
            f"This run has {size} processes, {local_size} of them on this machine. Gradients travel between machines "
            "unencrypted and reveal what was trained on. Type --private-link if the link is private (WireGuard, SSH)."
        )
    on_cards = device.type == "cuda"
    interface = "NCCL_SOCKET_IFNAME" if on_cards else "GLOO_SOCKET_IFNAME"
    if local_size == size:
        # Without this, Gloo and NCCL would listen on an interface that others on the network can reach.
        os.environ[interface] = "lo0" if sys.platform == "darwin" else "lo"
    elif not os.environ.get(interface):
        raise UsageError(
            f"{interface} is not set, so gradients might not travel over the private link. Set it on every machine to "
            f"the link's network interface, for example by typing {interface}=wg0 in front of the command."
        )
    if on_cards:
        if local_size > torch.cuda.device_count():
            cards = torch.cuda.device_count()
            raise DeviceError(f"{local_size} processes were started here for {cards} cards. Start one for each card.")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _link_errors():
        torch.distributed.init_process_group("nccl" if on_cards else "gloo", timeout=TIMEOUT)
    try:
        yield ProcessGroup(device if on_cards else torch.device("cpu"), local_size)
    finally:
        with contextlib.suppress(RuntimeError):
            torch.distributed.destroy_process_group()
