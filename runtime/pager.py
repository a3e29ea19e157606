"""Where the weights of a model's blocks are: all in memory, or as many as fit, the others read while the model runs.

Under a budget some layers are pinned, spread evenly, and the rest pass through a ring of two slots: a thread reads the next
layer into one slot while the other is in use. The runner says in which order it will visit the layers, so that the turn
from forward to backward, and from one row to the next, finds in the ring what is still there. A linear of a streamed layer
points into its slot while the layer is acquired, and holds no bytes otherwise.

Files are read, not mapped: the budget then needs nothing from the kernel, which may still keep in its cache what nobody
else wants memory for, and gives those pages up first.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from edgetune.runtime.errors import ModelError, ResourceError
from edgetune.runtime.files import read_at
from edgetune.runtime.linear import Linear
from edgetune.runtime.ops_types import Weight
from edgetune.runtime.safetensors_file import ALIGNMENT, StoredTensor

SLOTS = 2


class Pager(Protocol):
    """What the runner asks."""

    streaming: bool
    """Whether some layers are in memory only while they are acquired."""

    def expect(self, order: Sequence[int]) -> None:
        """The layers that will be acquired from now on, in this order: what is read ahead."""

    def layer(self, number: int) -> AbstractContextManager[None]:
        """Keep a layer's weights in place within this context."""


class Resident:
    """Every layer is in memory, or mapped, and stays."""

    streaming = False

    def expect(self, order: Sequence[int]) -> None:
        pass

    def layer(self, number: int) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


@dataclass(frozen=True)
class PagedWeight:
    """A linear whose weight comes and goes. `parts` are the tensors of files it is made of, each with its file;
    `make` puts it together from their bytes (u8 each, on the compute device); `away` stands for it and holds none."""

    linear: Linear
    parts: tuple[tuple[Path, StoredTensor], ...]
    make: Callable[..., Weight]
    away: Weight


class PagedLayer:
    """The streamed weights of one block, and where their parts lie in a slot: each at a multiple of 64 bytes."""

    def __init__(self, weights: Sequence[PagedWeight]) -> None:
        self._weights = weights
        self._places: list[list[tuple[int, int]]] = []
        self.reads: list[tuple[Path, int, int, int]] = []
        """(file, first byte, bytes, place in the slot) of each part."""
        self.nbytes = 0
        for weight in weights:
            places = []
            for path, stored in weight.parts:
                places.append((self.nbytes, self.nbytes + stored.nbytes))
                self.reads.append((path, stored.start, stored.nbytes, self.nbytes))
                self.nbytes += -(-stored.nbytes // ALIGNMENT) * ALIGNMENT
            self._places.append(places)

    def bind(self, buffer: Tensor) -> None:
        """Point the linears into a filled buffer u8 (nbytes,)."""
        for weight, places in zip(self._weights, self._places, strict=True):
            weight.linear.weight = weight.make(*(buffer[start:stop] for start, stop in places))

    def unbind(self) -> None:
        """Let go of the buffer."""
        for weight in self._weights:
            weight.linear.weight = weight.away


class Slots(Protocol):
    """The ring's buffers on a kind of device. Of a slot, `host` and `send` are called by the reading thread."""

    def host(self, slot: int) -> Tensor:
        """Where a file may be read into, u8 on the CPU; waits until nobody needs what is there."""

    def send(self, slot: int) -> None:
        """The bytes are there: start moving them to the device."""

    def take(self, slot: int) -> Tensor:
        """The slot's bytes on the compute device, for work queued from now on."""

    def give(self, slot: int) -> None:
        """All work on the slot has been queued."""


class HostSlots:
    """The CPU computes on what was read, where it was read to."""

    def __init__(self, nbytes: int) -> None:
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(SLOTS)]

    def host(self, slot: int) -> Tensor:
        return self._buffers[slot]

    def send(self, slot: int) -> None:
        pass

    def take(self, slot: int) -> Tensor:
        return self._buffers[slot]

    def give(self, slot: int) -> None:
        pass


class CopySlots(HostSlots):
    """A device that is sent copies in the order of its work, such as MPS."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        super().__init__(nbytes)
        self._on_device = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]

    def take(self, slot: int) -> Tensor:
        return self._on_device[slot].copy_(self._buffers[slot])


class CudaSlots:
    """Pinned host memory, and a stream of its own for the copies, so that they run beside the computing."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
        self._on_device = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._stream, self._device = torch.cuda.Stream(device), device
        self._sent = [torch.cuda.Event() for _ in range(SLOTS)]
        self._used = [torch.cuda.Event() for _ in range(SLOTS)]
        for slot, buffer in enumerate(self._on_device):
            self.give(slot)  # the allocator's memory may be in use until what is queued now is done
            buffer.record_stream(self._stream)  # and may not be lent to others while a copy to it is under way

    def host(self, slot: int) -> Tensor:
        self._sent[slot].synchronize()
        return self._buffers[slot]

    def send(self, slot: int) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[slot])
            self._on_device[slot].copy_(self._buffers[slot], non_blocking=True)
            self._sent[slot].record(self._stream)

    def take(self, slot: int) -> Tensor:
        torch.cuda.current_stream(self._device).wait_event(self._sent[slot])
        return self._on_device[slot]

    def give(self, slot: int) -> None:
        self._used[slot].record(torch.cuda.current_stream(self._device))


def slots_for(device: torch.device, nbytes: int) -> Slots:
    """The ring's buffers for a device, of `nbytes` each."""
    if device.type == "cpu":
        return HostSlots(nbytes)
    return CudaSlots(nbytes, device) if device.type == "cuda" else CopySlots(nbytes, device)


def streamed_layers(sizes: Sequence[int], memory: int) -> list[int]:
    """The fewest layers that must be streamed so that the others and the ring take at most `memory`, evenly spread.

    Raises ResourceError where not even the ring fits.
    """
    count, ring = len(sizes), SLOTS * max(sizes)
    for streamed in range(SLOTS + 1, count + 1):
        numbers = [(2 * number + 1) * count // (2 * streamed) for number in range(streamed)]
        if ring + sum(sizes) - sum(sizes[number] for number in numbers) <= memory:
            return numbers
    raise ResourceError(
        f"The weights of two layers take {ring / 1e6:.0f} MB and may take {memory / 1e6:.0f} MB; type a larger --memory."
    )


class _Slot:
    """A slot's content: the layer it has or is being filled with."""

    def __init__(self) -> None:
        self.layer: int | None = None
        self.filled: Future[None] | None = None
        self.in_use = False


class Streamer:
    """Pins the layers that fit in `memory` bytes and streams the others through the ring."""

    streaming = True

    def __init__(self, layers: Sequence[PagedLayer], memory: int, device: torch.device) -> None:
        self._layers = layers
        self.streamed = frozenset(streamed_layers([layer.nbytes for layer in layers], memory))
        paths = {path for layer in layers for path, *_ in layer.reads}
        self._files: dict[Path, FileIO] = {path: path.open("rb", buffering=0) for path in paths}
        for number, layer in enumerate(layers):
            layer.unbind()
            if number not in self.streamed:
                buffer = torch.empty(layer.nbytes, dtype=torch.uint8)
                self._read(layer, buffer)
                layer.bind(buffer.to(device))
        self._buffers = slots_for(device, max(layers[number].nbytes for number in self.streamed))
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._expected: deque[int] = deque()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")

    def expect(self, order: Sequence[int]) -> None:
        self._expected = deque(number for number in order if number in self.streamed)
        self._read_ahead()

    @contextlib.contextmanager
    def layer(self, number: int) -> Iterator[None]:
        if number not in self.streamed:
            yield
            return
        if not self._expected or self._expected.popleft() != number:
            self._expected.clear()  # someone else's order: right all the same, but nothing is read ahead
        index = next((index for index, slot in enumerate(self._slots) if slot.layer == number), None)
        if index is None:
            index = self._farthest()
            self._fill(index, number)
        slot, layer = self._slots[index], self._layers[number]
        slot.in_use = True
        try:
            self._read_ahead()
            assert slot.filled is not None
            slot.filled.result()
            layer.bind(self._buffers.take(index))
            yield
        finally:
            layer.unbind()
            self._buffers.give(index)
            slot.in_use = False
            self._read_ahead()

    def _next_use(self, number: int | None) -> int:
        return self._expected.index(number) if number is not None and number in self._expected else len(self._expected)

    def _farthest(self) -> int:
        """The free slot whose layer is needed last."""
        free = [index for index, slot in enumerate(self._slots) if not slot.in_use]
        return max(free, key=lambda index: self._next_use(self._slots[index].layer))

    def _read_ahead(self) -> None:
        """Fill the free slots with what is needed sooner than what they have."""
        for _ in range(sum(not slot.in_use for slot in self._slots)):
            held = {slot.layer for slot in self._slots}
            wanted = next((number for number in self._expected if number not in held), None)
            index = self._farthest()
            if wanted is None or self._next_use(self._slots[index].layer) < self._next_use(wanted):
                return
            self._fill(index, wanted)

    def _fill(self, index: int, number: int) -> None:
        slot = self._slots[index]
        slot.layer, slot.filled = number, self._reader.submit(self._read_slot, index, number)

    def _read_slot(self, index: int, number: int) -> None:
        try:
            self._read(self._layers[number], self._buffers.host(index))
            self._buffers.send(index)
        except BaseException:
            self._slots[index].layer = None  # half a layer is none
            raise

    def _read(self, layer: PagedLayer, buffer: Tensor) -> None:
        into = buffer.numpy().data
        for path, start, nbytes, place in layer.reads:
            try:
                read_at(self._files[path], into[place : place + nbytes], start)
            except OSError as error:
                raise ModelError(f"{path} cannot be read any more: {error.strerror}; copy the model folder again.") from error
