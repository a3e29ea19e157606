"""Keep the weights of all layers in memory, or of as many as fit, and read the others from their files while the model runs.

Under a memory limit some layers are pinned, evenly spread, and the rest are streamed through a ring of two slots: a thread
reads the next layer into one slot while the other is in use. The runner announces the order in which it will visit the
layers, so that the layers still in the ring are reused at the turn from forward to backward and from one row to the next. A
linear of a streamed layer points into its slot while the layer is acquired, and holds no bytes otherwise.

Files are read, not mapped, so the limit does not depend on when the kernel evicts mapped pages. The kernel may still cache
the files in memory that nobody else needs, and gives that up first.
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
from edgetune.runtime.untrusted_file import MODEL_WEIGHTS, open_untrusted

SLOTS = 2
"""Slots of the ring: one in use, one being read into."""


class Pager(Protocol):
    """The interface through which the runner acquires layers."""

    streaming: bool
    """True if some layers are in memory only while they are acquired."""

    def expect(self, order: Sequence[int]) -> None:
        """Announce the layers that will be acquired from now on, in this order, so that they can be read ahead."""

    def layer(self, number: int) -> AbstractContextManager[None]:
        """Acquire a layer: keep its weights in memory within this context."""


class Resident:
    """The pager of a model whose layers all stay in memory, or mapped."""

    streaming = False

    def expect(self, order: Sequence[int]) -> None:
        pass

    def layer(self, number: int) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


@dataclass(frozen=True)
class PagedWeight:
    """A linear whose weight is in memory only while its layer is acquired."""

    linear: Linear
    parts: tuple[tuple[Path, StoredTensor], ...]
    """The stored tensors that make up the weight, each with its file."""
    make: Callable[..., Weight]
    """Builds the weight from the bytes of the parts, each u8 on the compute device."""
    placeholder: Weight
    """A weight without bytes, which the linear has while its layer is not acquired."""


class PagedLayer:
    """The weights of one block that can be streamed, and their places in a slot, each at a multiple of ALIGNMENT bytes."""

    def __init__(self, weights: Sequence[PagedWeight]) -> None:
        self._weights = weights
        self._places: list[list[tuple[int, int]]] = []
        self.reads: list[tuple[Path, int, int, int]] = []
        """(file, offset in it, bytes, offset in the slot) of each part."""
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
        """Replace the linears' weights by their placeholders, so that the buffer can be reused."""
        for weight in self._weights:
            weight.linear.weight = weight.placeholder


class Slots(Protocol):
    """The buffers of the ring on one kind of device. The reading thread calls `host` and `send`, the runner the others."""

    def host(self, slot: int) -> Tensor:
        """Return the slot's buffer on the CPU, u8, once its old content is no longer needed."""

    def send(self, slot: int) -> None:
        """Start copying the slot's bytes to the device; called once they have been read."""

    def take(self, slot: int) -> Tensor:
        """Return the slot's bytes on the compute device, for work that is queued from now on."""

    def give(self, slot: int) -> None:
        """Release the slot; called once all work on it has been queued."""


class HostSlots:
    """Slots for the CPU, which computes directly on the buffers that files are read into."""

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
    """Slots for a device that runs copies in the order of its other work, such as MPS."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        super().__init__(nbytes)
        self._on_device = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]

    def take(self, slot: int) -> Tensor:
        return self._on_device[slot].copy_(self._buffers[slot])


class CudaSlots:
    """Slots for CUDA: pinned host memory, and a separate stream for the copies, so that they overlap with computing."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
        self._on_device = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._stream, self._device = torch.cuda.Stream(device), device
        self._sent = [torch.cuda.Event() for _ in range(SLOTS)]
        self._used = [torch.cuda.Event() for _ in range(SLOTS)]
        for slot, buffer in enumerate(self._on_device):
            self.give(slot)  # work that is queued now may still use the memory that the allocator handed out
            buffer.record_stream(self._stream)  # the allocator must not reuse the buffer while a copy to it runs

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
    """Return the ring for a device, with `nbytes` a slot."""
    if device.type == "cpu":
        return HostSlots(nbytes)
    return CudaSlots(nbytes, device) if device.type == "cuda" else CopySlots(nbytes, device)


def streamed_layers(sizes: Sequence[int], memory: int) -> list[int]:
    """Return the fewest layers to stream so that the others and the ring take at most `memory` bytes, evenly spread.

    Raises ResourceError if not even the ring fits.
    """
    count, ring = len(sizes), SLOTS * max(sizes)
    # With as few streamed layers as slots, the ring would hold them all and nothing would be saved.
    for streamed in range(SLOTS + 1, count + 1):
        # the middle layer of each of `streamed` equal stretches of the model
        numbers = [(2 * number + 1) * count // (2 * streamed) for number in range(streamed)]
        if ring + sum(sizes) - sum(sizes[number] for number in numbers) <= memory:
            return numbers
    raise ResourceError(
        f"The weights of two layers take {ring / 1e6:.0f} MB, and only {memory / 1e6:.0f} MB are left for them; "
        "type a larger --memory."
    )


class _Slot:
    """The state of a slot: the layer that it holds or is being filled with."""

    def __init__(self) -> None:
        self.layer: int | None = None
        self.filled: Future[None] | None = None
        self.in_use = False


class Streamer:
    """The pager that pins as many layers as fit into `memory` bytes and streams the others through the ring."""

    streaming = True

    def __init__(self, layers: Sequence[PagedLayer], memory: int, device: torch.device) -> None:
        self._layers = layers
        self.streamed = frozenset(streamed_layers([layer.nbytes for layer in layers], memory))
        paths = {path for layer in layers for path, *_ in layer.reads}
        self._files: dict[Path, FileIO] = {path: open_untrusted(path, MODEL_WEIGHTS) for path in paths}
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
            self._expected.clear()  # not the announced order: still correct, but nothing can be read ahead
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
        """Return how many layers are acquired before this one; all that are announced if it is not among them."""
        return self._expected.index(number) if number is not None and number in self._expected else len(self._expected)

    def _farthest(self) -> int:
        """Return the free slot whose layer will be needed last."""
        free = [index for index, slot in enumerate(self._slots) if not slot.in_use]
        return max(free, key=lambda index: self._next_use(self._slots[index].layer))

    def _read_ahead(self) -> None:
        """Fill each free slot with the next layer needed, unless what the slot holds is needed sooner."""
        for _ in range(sum(not slot.in_use for slot in self._slots)):
            present = {slot.layer for slot in self._slots}
            wanted = next((number for number in self._expected if number not in present), None)
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
            self._slots[index].layer = None  # a partly read layer must not be taken for a whole one
            raise

    def _read(self, layer: PagedLayer, buffer: Tensor) -> None:
        target = buffer.numpy().data
        for path, start, nbytes, place in layer.reads:
            try:
                read_at(self._files[path], target[place : place + nbytes], start)
            except OSError as error:
                raise ModelError(f"{path} can no longer be read: {error.strerror}; copy the model folder again.") from error
