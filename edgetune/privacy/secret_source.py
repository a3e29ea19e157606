"""The secret randomness of private training: which documents a step samples, and its Gaussian noise.

Everything follows from a key of the operating system's random generator, through SHAKE256 (FIPS 202): a resumed run draws the
same again, and nobody without the key can. Whoever knew the key could subtract the noise, so it is deleted with the unfinished
run. The noise is computed in 64-bit floating point, whose gaps an attacker who sees every bit of a noisy sum could exploit in
theory (Mironov 2012, "On significance of the least significant bits for differential privacy"); what is published is an
adapter after Adam's arithmetic, in which those bits are gone.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

KEY_BYTES = 32
"""Size of a key."""
_UNIFORM_BITS = 53
"""Bits of a uniform number: those that a double holds."""


def new_key() -> str:
    """Return a new key in hexadecimal."""
    return secrets.token_hex(KEY_BYTES)


class SecretSource:
    """The random numbers of one run, each a function of the key, the step and a purpose."""

    def __init__(self, key: str) -> None:
        self._key = bytes.fromhex(key)

    def sample(self, step: int, count: int, rate: float) -> npt.NDArray[np.int64]:
        """Return the numbers, ascending, of those of `count` units that a step samples: each with probability `rate`."""
        return np.flatnonzero(self._uniform("sample", step, 0, count) < rate)

    def choose(self, step: int, unit: int, windows: Sequence[int], most: int) -> list[int]:
        """Return `most` of a unit's windows, in their order: all where there are no more."""
        if len(windows) <= most:
            return list(windows)
        order = np.argsort(self._uniform("windows", step, unit, len(windows)), kind="stable")
        return [windows[place] for place in sorted(order[:most].tolist())]

    def normal(self, step: int, tensor: int, count: int) -> npt.NDArray[np.float64]:
        """Return (count,) independent standard normal numbers for the tensor of this number, by Box and Muller's transform."""
        half = -(-count // 2)
        uniform = self._uniform("noise", step, tensor, 2 * half)
        radius = np.sqrt(-2 * np.log1p(-uniform[:half]))
        angle = 2 * math.pi * uniform[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def _uniform(self, purpose: str, step: int, number: int, count: int) -> npt.NDArray[np.float64]:
        """Return (count,) numbers, uniform in [0, 1)."""
        seed = self._key + f"edgetune {purpose} {step} {number}".encode()
        words = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), dtype="<u8")
        return (words >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float64) * 2.0**-_UNIFORM_BITS
