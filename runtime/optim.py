"""AdamW whose states need not stay in memory: 32-bit or 8-bit, resident, or paged to a file or to pinned host memory.

All states of one parameter lie side by side in one page of bytes. Resident, every page stays where it is; paged, one page
at a time is read, updated and written back, so that memory holds the states of one parameter. Both give the same bits.

8-bit states are bitsandbytes' AdamW8bit's: blocks of 256 values with an fp32 absmax each, codes of the signed dynamic map
for the first moment and of the unsigned one for the second, and 32-bit states for parameters under 4,096 values.

Sources: Decoupled Weight Decay Regularization (Loshchilov & Hutter 2017, arXiv 1711.05101); 8-bit Optimizers via
Block-wise Quantization (Dettmers et al. 2021, arXiv 2110.02861); paging: QLoRA §3 (arXiv 2305.14314).
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from edgetune.runtime.errors import TrainingError
from edgetune.runtime.files import explain_full_disk, read_at, scratch_file, write_at
from edgetune.runtime.nf4 import SMALLEST_ABSMAX, dynamic_map

BLOCK = 256
SMALLEST_8BIT = 4096
"""Parameters of fewer values keep 32-bit states: they cost nothing and are the most sensitive (bitsandbytes' rule)."""
EPS = 1e-8
"""Added to the root of the second moment: torch's and bitsandbytes' default."""
HOST: Literal["host"] = "host"

_ALIGNMENT = 64
_CHUNK = 256 * BLOCK  # values of an 8-bit update at a time: its temporaries stay in the cache


class _Layout:
    """Where the states of one parameter of n values lie in its page: name -> (first byte, dtype, values)."""

    def __init__(self, n: int, bits: int) -> None:
        blocks = -(-n // BLOCK)
        self.is_8bit = bits == 8 and n >= SMALLEST_8BIT
        names = ("exp_avg", "exp_avg_sq")
        if self.is_8bit:  # codes are padded to whole blocks
            states = [(name, torch.uint8, blocks * BLOCK) for name in names]
            states += [(f"{name}.absmax", torch.float32, blocks) for name in names]
        else:
            states = [(name, torch.float32, n) for name in names]
        self.nbytes, self._states = 0, dict[str, tuple[int, torch.dtype, int]]()
        for name, dtype, count in states:
            self._states[name] = (self.nbytes, dtype, count)
            self.nbytes += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def views(self, page: Tensor) -> dict[str, Tensor]:
        """The states in a page u8 (nbytes,)."""
        return {
            name: page[start : start + count * dtype.itemsize].view(dtype)
            for name, (start, dtype, count) in self._states.items()
        }


class _Pages(Protocol):
    """Pages of bytes, zero at first, one after the other at known places."""

    at_once: bool
    """Whether all pages can be held at the same time."""

    def read(self, start: int, stop: int) -> Tensor:
        """A page to be changed, u8 on the compute device."""

    def write(self, start: int, stop: int, page: Tensor) -> None:
        """Keep what was made of a page that was read."""

    def peek(self) -> Tensor:
        """All bytes, read-only, without taking memory for them where that is possible."""


class _Resident:
    at_once = True

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._bytes = torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def read(self, start: int, stop: int) -> Tensor:
        return self._bytes[start:stop]

    def write(self, start: int, stop: int, page: Tensor) -> None:
        pass

    def peek(self) -> Tensor:
        return self._bytes


class _InHost:
    """Pages in host memory, pinned where the compute device is a CUDA card: nobody waits for its copies but `peek`.

    Other devices' copies are waited for: an Apple GPU would fill a page after `write` has returned.
    """

    at_once = False

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._pinned, self._device = device.type == "cuda", device
        self._bytes = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self._pinned)

    def read(self, start: int, stop: int) -> Tensor:
        return self._bytes[start:stop].to(self._device, non_blocking=self._pinned)

    def write(self, start: int, stop: int, page: Tensor) -> None:
        self._bytes[start:stop].copy_(page, non_blocking=self._pinned)

    def peek(self) -> Tensor:
        if self._pinned:
            torch.cuda.synchronize(self._device)  # the last write may be under way
        return self._bytes


class _InFile:
    """Pages in a nameless private file, read and written through one buffer."""

    at_once = False

    def __init__(self, nbytes: int, largest: int, device: torch.device, folder: Path) -> None:
        self._file, self._folder, self._device = scratch_file(folder, nbytes), folder, device
        self._buffer = torch.empty(largest, dtype=torch.uint8)

    def read(self, start: int, stop: int) -> Tensor:
        page = self._buffer[: stop - start]
        read_at(self._file, page.numpy().data, start)
        return page.to(self._device)

    def write(self, start: int, stop: int, page: Tensor) -> None:
        with explain_full_disk(self._folder):
            write_at(self._file, page.cpu().numpy().data, start)

    def peek(self) -> Tensor:
        return torch.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


class PagedAdamW:
    """AdamW over fp32 parameters of one device.

    pages: None keeps the states beside the parameters, a folder keeps them in a nameless file there, HOST in host memory.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        bits: int = 32,
        pages: Path | Literal["host"] | None = None,
    ) -> None:
        if bits not in (8, 32):
            raise ValueError(f"states of {bits} bits; expected 8 or 32")
        if not parameters or any(p.dtype != torch.float32 or not p.is_contiguous() for p in parameters):
            raise ValueError("expected at least one parameter, all of them contiguous and fp32")
        self.parameters, self.betas, self.weight_decay = list(parameters), betas, weight_decay
        self.steps = 0
        self._layouts = [_Layout(parameter.numel(), bits) for parameter in self.parameters]
        self._places: list[tuple[int, int]] = []
        total = 0
        for layout in self._layouts:
            self._places.append((total, total + layout.nbytes))
            total += layout.nbytes
        self.nbytes = total
        """Bytes of all states, wherever they are."""
        device = self.parameters[0].device
        self._pages: _Pages
        if pages is None:
            self._pages = _Resident(total, device)
        elif pages == HOST:
            self._pages = _InHost(total, device)
        else:
            self._pages = _InFile(total, max(layout.nbytes for layout in self._layouts), device, Path(pages))
        for parameter in self.parameters:  # before the first step's tensors, which come and go: no holes in the heap
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def zero_grad(self) -> None:
        """Set all gradients to zero; they stay where they are."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every parameter that has a gradient, at learning rate `rate`."""
        self.steps += 1
        numbers = [number for number, parameter in enumerate(self.parameters) if parameter.grad is not None]
        for batch in [numbers] if self._pages.at_once else [[number] for number in numbers]:
            pages = {number: self._pages.read(*self._places[number]) for number in batch}
            plain = [number for number in batch if not self._layouts[number].is_8bit]
            self._update_32bit(plain, [self._layouts[number].views(pages[number]) for number in plain], rate)
            for number in batch:
                if self._layouts[number].is_8bit:
                    self._update_8bit(self.parameters[number], self._layouts[number].views(pages[number]), rate)
            for number, page in pages.items():
                self._pages.write(*self._places[number], page)

    def state(self) -> dict[str, Tensor]:
        """All states by stable names, ready for safetensors: save or clone them before the next step changes them."""
        found = self._pages.peek()
        values = {"step": torch.tensor(self.steps)}
        for number, layout in enumerate(self._layouts):
            views = layout.views(found[slice(*self._places[number])])
            values |= {f"{number}.{name}": view for name, view in views.items()}
        return values

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; raises TrainingError, and changes nothing, for states of other parameters."""
        wanted = {name: (tensor.dtype, tensor.shape) for name, tensor in self.state().items()}
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if odd:
            raise TrainingError(
                f"The saved optimizer state is of another adapter: {len(odd)} of its tensors differ, {odd[0]} first; "
                "type --fresh to start over."
            )
        self.steps = int(state["step"])
        for number, layout in enumerate(self._layouts):
            page = self._pages.read(*self._places[number])
            for name, view in layout.views(page).items():
                view.copy_(state[f"{number}.{name}"])
            self._pages.write(*self._places[number], page)

    def _update_32bit(self, numbers: list[int], states: list[dict[str, Tensor]], rate: float) -> None:
        """torch's own fused AdamW, all parameters in one call."""
        parameters = [self.parameters[number] for number in numbers]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        first, second = (
            [state[name].view(parameter.shape) for parameter, state in zip(parameters, states, strict=True)]
            for name in ("exp_avg", "exp_avg_sq")
        )
        steps = torch.full((len(numbers),), self.steps - 1.0, device=self.parameters[0].device)  # the call adds the one
        adamw(
            parameters, gradients, first, second, [], list(steps.unbind()), fused=True, amsgrad=False, beta1=self.betas[0],
            beta2=self.betas[1], lr=rate, weight_decay=self.weight_decay, eps=EPS, maximize=False,
        )  # fmt: skip

    def _update_8bit(self, parameter: Tensor, state: dict[str, Tensor], rate: float) -> None:
        """One parameter, a chunk of whole blocks at a time: states to fp32, AdamW, and back to codes."""
        assert parameter.grad is not None
        (beta1, beta2), n = self.betas, parameter.numel()
        size, root = rate / (1 - beta1**self.steps), (1 - beta2**self.steps) ** 0.5
        values, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        for start in range(0, n, _CHUNK):
            stop = min(start + _CHUNK, n)
            part, gradient = values[start:stop], gradients[start:stop]
            padded = torch.nn.functional.pad(gradient, (0, -len(gradient) % BLOCK))
            first = _Moment(state, "exp_avg", start, len(padded), signed=True)
            second = _Moment(state, "exp_avg_sq", start, len(padded), signed=False)
            m = first.read().mul_(beta1).add_(padded, alpha=1 - beta1)
            v = second.read().mul_(beta2).addcmul_(padded, padded, value=1 - beta2)
            part.mul_(1 - rate * self.weight_decay)
            part.addcdiv_(m[: len(part)], v[: len(part)].sqrt().div_(root).add_(EPS), value=-size)
            first.write(m)
            second.write(v)


class _Moment:
    """Whole blocks of one 8-bit state: codes u8 (n,) and absmax f32 (n / 256,)."""

    def __init__(self, state: dict[str, Tensor], name: str, start: int, n: int, signed: bool) -> None:
        self._codes = state[name][start : start + n]
        self._absmax = state[f"{name}.absmax"][start // BLOCK : (start + n) // BLOCK]
        self._signed = signed

    def read(self) -> Tensor:
        """The values, f32 (n,)."""
        values = _table(self._signed, self._codes.device).index_select(0, self._codes.int())
        values.view(-1, BLOCK).mul_(self._absmax.unsqueeze(1))
        return values

    def write(self, values: Tensor) -> None:
        """Quantise new values, which are used up."""
        blocks = values.view(-1, BLOCK)
        self._absmax.copy_(torch.amax(blocks.abs(), 1))  # no `out=`: macOS 14 may lose what is written to a view
        blocks.div_(self._absmax.clamp(min=SMALLEST_ABSMAX).unsqueeze(1))
        bits = values.half().view(torch.int16).int().add_(1 << 15)
        self._codes.copy_(torch.index_select(_nearest(self._signed, values.device), 0, bits))


@functools.cache
def _table(signed: bool, device: torch.device) -> Tensor:
    """dynamic_map on a device, once: a copy for every chunk of every step would have the device's whole queue waited for."""
    return dynamic_map(signed).to(device)


@functools.cache
def _nearest(signed: bool, device: torch.device) -> Tensor:
    """u8 (65536,): the code of the map's value nearest to each fp16 number, in the order of its bits as an int16.

    Looking a rounded value up is ten times as quick as searching the map. A negative first moment never becomes zero, as
    in bitsandbytes; nor does a second moment, or else a step would be divided by eps alone.
    """
    table = dynamic_map(signed)
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).float().nan_to_num()
    codes = torch.bucketize(numbers, (table[:-1] + table[1:]) / 2)
    zero = int((table == 0).nonzero())
    if signed:
        codes[torch.signbit(numbers) & (codes == zero)] -= 1
    else:
        codes[codes == zero] += 1
    return codes.to(torch.uint8).to(device)
