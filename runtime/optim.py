"""AdamW whose states may leave memory: in 32 or 8 bits, resident, or paged to a scratch file or to pinned host memory.

All states of one parameter lie side by side in one page of bytes. Resident, every page stays where it is. Paged, one page at
a time is read, updated and written back, so that memory holds the states of one parameter only. Both give the same bits.

8-bit states are those of bitsandbytes' AdamW8bit: blocks of 256 values with an fp32 absmax each, codes of the signed dynamic
map for the first moment and of the unsigned map for the second, and 32-bit states for parameters of fewer than 4,096 values.

Sources: Decoupled Weight Decay Regularization (Loshchilov & Hutter 2017, arXiv 1711.05101); 8-bit Optimizers via
Block-wise Quantization (Dettmers et al. 2021, arXiv 2110.02861); paging: QLoRA §3 (arXiv 2305.14314).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from edgetune.runtime.errors import TrainingError
from edgetune.runtime.files import explain_full_disk, read_at, scratch_file, scratch_in_memory, write_at
from edgetune.runtime.nf4 import SMALLEST_ABSMAX, dynamic_map
from edgetune.runtime.safetensors_file import ALIGNMENT

BLOCK = 256
"""Values of an 8-bit state that share one absmax, as in bitsandbytes."""
SMALLEST_8BIT = 4096
"""Parameters of fewer values keep 32-bit states: these take little memory and are the most sensitive (bitsandbytes' rule)."""
EPS = 1e-8
"""Number added to the root of the second moment: the default of torch and of bitsandbytes."""
HOST: Literal["host"] = "host"
"""The value of `pages` that keeps the states in host memory."""

_CHUNK = 256 * BLOCK  # values that an 8-bit update works on at a time, chosen by hand: its temporaries stay in the cache


class _Layout:
    """The layout of one parameter's page: for each state its first byte, its dtype and its number of values."""

    def __init__(self, n: int, bits: int) -> None:
        blocks = -(-n // BLOCK)
        self.is_8bit = bits == 8 and n >= SMALLEST_8BIT
        names = ("exp_avg", "exp_avg_sq")
        if self.is_8bit:  # codes are padded to whole blocks, so that every block can be viewed as one row
            states = [(name, torch.uint8, blocks * BLOCK) for name in names]
            states += [(f"{name}.absmax", torch.float32, blocks) for name in names]
        else:
            states = [(name, torch.float32, n) for name in names]
        self.nbytes, self._states = 0, dict[str, tuple[int, torch.dtype, int]]()
        for name, dtype, count in states:
            self._states[name] = (self.nbytes, dtype, count)
            self.nbytes += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def views(self, page: Tensor) -> dict[str, Tensor]:
        """Return the states in a page, u8 (nbytes,), as views by name."""
        return {
            name: page[start : start + count * dtype.itemsize].view(dtype)
            for name, (start, dtype, count) in self._states.items()
        }


class _Pages(Protocol):
    """The home of all pages: bytes that are zero at first, one page after the other."""

    at_once: bool
    """True if all pages can be held at the same time."""

    def read(self, start: int, stop: int) -> Tensor:
        """Return the page at these bytes, u8 on the compute device, to be changed in place."""

    def write(self, start: int, stop: int, page: Tensor) -> None:
        """Store a page that was read and changed."""

    def peek(self) -> Tensor:
        """Return the bytes of all pages, read-only, without allocating memory for them where possible."""


class _Resident:
    """Pages beside the parameters, on the compute device."""

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
    """Pages in host memory, pinned where the compute device is a CUDA card, whose copies then run in the background.

    Only `peek` waits for these. Copies of other devices are not in the background: an Apple GPU would still be filling a page
    when `write` has returned.
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
            torch.cuda.synchronize(self._device)  # the last write may still be running
        return self._bytes


class _InFile:
    """Pages in a scratch file, read and written through one buffer in memory."""

    at_once = False

    def __init__(self, nbytes: int, largest: int, device: torch.device, folder: Path) -> None:
        self._file, self._folder, self._device = scratch_file(folder, nbytes), folder, device
        self._nbytes = nbytes
        self._buffer = torch.empty(largest, dtype=torch.uint8)

    def read(self, start: int, stop: int) -> Tensor:
        page = self._buffer[: stop - start]
        read_at(self._file, page.numpy().data, start)
        return page.to(self._device)

    def write(self, start: int, stop: int, page: Tensor) -> None:
        with explain_full_disk(self._folder):
            write_at(self._file, page.cpu().numpy().data, start)

    def peek(self) -> Tensor:
        return torch.frombuffer(scratch_in_memory(self._file, self._nbytes), dtype=torch.uint8)


class PagedAdamW:
    """AdamW over fp32 parameters that are all on one device.

    bits: 32 or 8 for each state. pages: None keeps the states beside the parameters, a folder keeps them in a scratch file
    there, HOST keeps them in host memory.
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
            raise ValueError(f"bits is {bits}; expected 8 or 32")
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
        """Size of all states in bytes, wherever they are."""
        device = self.parameters[0].device
        self._pages: _Pages
        if pages is None:
            self._pages = _Resident(total, device)
        elif pages == HOST:
            self._pages = _InHost(total, device)
        else:
            self._pages = _InFile(total, max(layout.nbytes for layout in self._layouts), device, Path(pages))
        # Gradients are allocated before the first step's short-lived tensors, and stay: the heap is not fragmented.
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def zero_grad(self) -> None:
        """Set all gradients to zero in place."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter that has a gradient, with learning rate `rate`."""
        self.steps += 1
        numbers = [number for number, parameter in enumerate(self.parameters) if parameter.grad is not None]
        # Resident states are updated together, since torch's fused kernel takes a list of parameters. Paged ones go one by
        # one, so that no more than one page is in memory.
        for batch in [numbers] if self._pages.at_once else [[number] for number in numbers]:
            pages = {number: self._pages.read(*self._places[number]) for number in batch}
            in_32bit = [number for number in batch if not self._layouts[number].is_8bit]
            self._update_32bit(in_32bit, [self._layouts[number].views(pages[number]) for number in in_32bit], rate)
            for number in batch:
                if self._layouts[number].is_8bit:
                    self._update_8bit(self.parameters[number], self._layouts[number].views(pages[number]), rate)
            for number, page in pages.items():
                self._pages.write(*self._places[number], page)

    def state(self) -> dict[str, Tensor]:
        """Return all states by stable names, ready for safetensors. Save or clone them: the next step changes them."""
        found = self._pages.peek()
        values = {"step": torch.tensor(self.steps)}
        for number, layout in enumerate(self._layouts):
            views = layout.views(found[slice(*self._places[number])])
            values |= {f"{number}.{name}": view for name, view in views.items()}
        return values

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises TrainingError, with nothing changed, for the states of other parameters."""
        expected = {name: (tensor.dtype, tensor.shape) for name, tensor in self.state().items()}
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
        mismatched = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if mismatched:
            raise TrainingError(
                f"The saved optimizer state belongs to another adapter: {len(mismatched)} of its tensors differ, the first is "
                f"{mismatched[0]}. Type --fresh to start over."
            )
        self.steps = int(state["step"])
        for number, layout in enumerate(self._layouts):
            page = self._pages.read(*self._places[number])
            for name, view in layout.views(page).items():
                view.copy_(state[f"{number}.{name}"])
            self._pages.write(*self._places[number], page)

    def _update_32bit(self, numbers: list[int], states: list[dict[str, Tensor]], rate: float) -> None:
        """Update parameters by torch's own fused AdamW, all in one call."""
        parameters = [self.parameters[number] for number in numbers]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        first, second = (
            [state[name].view(parameter.shape) for parameter, state in zip(parameters, states, strict=True)]
            for name in ("exp_avg", "exp_avg_sq")
        )
        steps = torch.full((len(numbers),), self.steps - 1.0, device=self.parameters[0].device)  # the call adds 1
        adamw(
            parameters, gradients, first, second, [], list(steps.unbind()), fused=True, amsgrad=False, beta1=self.betas[0],
            beta2=self.betas[1], lr=rate, weight_decay=self.weight_decay, eps=EPS, maximize=False,
        )  # fmt: skip

    def _update_8bit(self, parameter: Tensor, state: dict[str, Tensor], rate: float) -> None:
        """Update one parameter, a chunk of whole blocks at a time: dequantise the states, apply AdamW, quantise them again."""
        assert parameter.grad is not None
        (beta1, beta2), n = self.betas, parameter.numel()
        # Adam's bias corrections, m / (1 - beta1^t) and v / (1 - beta2^t), are folded into the step size and into the root.
        step_size, root_correction = rate / (1 - beta1**self.steps), (1 - beta2**self.steps) ** 0.5
        values, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        for start in range(0, n, _CHUNK):
            stop = min(start + _CHUNK, n)
            part, gradient = values[start:stop], gradients[start:stop]
            # Zeros fill the last block: they leave its absmax, and so the other codes, as they are.
            padded = torch.nn.functional.pad(gradient, (0, -len(gradient) % BLOCK))
            first = _Moment(state, "exp_avg", start, len(padded), signed=True)
            second = _Moment(state, "exp_avg_sq", start, len(padded), signed=False)
            m = first.read().mul_(beta1).add_(padded, alpha=1 - beta1)
            v = second.read().mul_(beta2).addcmul_(padded, padded, value=1 - beta2)
            # The parameter moves by the unrounded moments; only what the next step reads of them is rounded to 8 bits.
            part.mul_(1 - rate * self.weight_decay)
            part.addcdiv_(m[: len(part)], v[: len(part)].sqrt().div_(root_correction).add_(EPS), value=-step_size)
            first.write(m)
            second.write(v)


class _Moment:
    """Consecutive blocks of one 8-bit state: codes u8 (n,) and absmax f32 (n / 256,)."""

    def __init__(self, state: dict[str, Tensor], name: str, start: int, n: int, signed: bool) -> None:
        self._codes = state[name][start : start + n]
        self._absmax = state[f"{name}.absmax"][start // BLOCK : (start + n) // BLOCK]
        self._signed = signed

    def read(self) -> Tensor:
        """Dequantise the values, f32 (n,)."""
        values = _map_on(self._signed, self._codes.device).index_select(0, self._codes.int())
        values.view(-1, BLOCK).mul_(self._absmax.unsqueeze(1))
        return values

    def write(self, values: Tensor) -> None:
        """Quantise new values (n,), which are overwritten."""
        blocks = values.view(-1, BLOCK)
        self._absmax.copy_(torch.amax(blocks.abs(), 1))  # no `out=`: on macOS 14 a write to a view may be lost
        blocks.div_(self._absmax.clamp(min=SMALLEST_ABSMAX).unsqueeze(1))
        # Values lie in -1 to 1 now. The 16 bits of their fp16 form index a table of the nearest code; 1 << 15 makes the
        # index of the most negative int16 zero.
        bits = values.half().view(torch.int16).int().add_(1 << 15)
        self._codes.copy_(torch.index_select(_nearest_codes(self._signed, values.device), 0, bits))


@functools.cache
def _map_on(signed: bool, device: torch.device) -> Tensor:
    """Return dynamic_map on a device, copied there once: a copy per chunk would wait for the device's whole queue each time."""
    return dynamic_map(signed).to(device)


@functools.cache
def _nearest_codes(signed: bool, device: torch.device) -> Tensor:
    """Return, as u8 (65536,), the code of the map's value nearest to each fp16 number, in the order of their bits as int16.

    Looking up a rounded value is ten times as fast as searching the map. As in bitsandbytes, a negative first moment never
    becomes zero. Nor does a second moment: the step would be divided by EPS alone.
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
