"""Read the rotary position embedding (RoPE) of config.json, in transformers 4's spelling or 5's, and check every number.

Sources: RoFormer (arXiv 2104.09864), Llama 3.1's release, YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edgetune.runtime.config_keys import flag, real, unsupported, whole
from edgetune.runtime.errors import ModelError

_ORIGINAL = "original_max_position_embeddings"
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL),
    "longrope": ("short_factor", "long_factor", _ORIGINAL),
}
"""The kinds of RoPE that the engine computes, and the numbers that each needs beside theta."""
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "default": (_ORIGINAL,),
    "linear": (_ORIGINAL,),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}
"""The keys that a kind may have beside those; the first two kinds do not read theirs."""
PLAIN_KINDS = ("default", "linear", "llama3", "yarn")
"""The kinds that transformers computes for every family but Phi 3."""
_LONGEST_FACTORS = 512
"""Most factors in a list of longrope's: those of a head of 1,024 numbers. Chosen by hand."""


@dataclass(frozen=True)
class RopeConfig:
    """A rotary position embedding.

    `kind`: default, linear (positions divided by factor), llama3 (Llama 3.1's scaling), yarn, or longrope. The first
    `rotary_share` of a head is rotated, the rest is left as it is. Cosines and sines are multiplied by `attention_factor`.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    rotary_share: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Round the bounds of yarn's ramp to whole frequencies."""
    short_factors: tuple[float, ...] = ()
    """Longrope's divisors of the frequencies, for rows of up to `original_max_positions` tokens."""
    query_beta: float = 0.0
    """Queries are multiplied by 1 + query_beta * ln(1 + floor(position / original_max_positions)): Ministral 3."""

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        kinds: Collection[str] = PLAIN_KINDS,
        partial: bool = False,
        renamed: Mapping[str, str] | None = None,
        query_beta: str = "",
        usual_theta: float = 10000.0,
    ) -> RopeConfig:
        """Read `rope_theta` and `rope_scaling`, or `rope_parameters` as transformers 5 writes them.

        A config may hold both forms, for readers of either version, but they must agree. kinds: those that the family
        computes. partial: a share of each head may be rotated. renamed: older names of kinds. query_beta: the key of that
        number, where the family has it. usual_theta: the base where no entry has one. Raises ModelError.
        """
        fields, kind = _fields(config, kinds, partial, renamed or {})
        fields.setdefault("rope_theta", usual_theta)
        theta, share = real(fields, "rope_theta", 0.0, 1e15), real(fields, "partial_rotary_factor", 0.0, 1.0, 1.0)
        needed = _KEYS[kind]
        unread = {"rope_theta", "partial_rotary_factor", *_OPTIONAL.get(kind, ())}
        if query_beta:
            unread |= {query_beta, "max_position_embeddings"}
        if kind == "default" and fields.get("factor") == 1:
            unread.add("factor")
        unknown = sorted(name[:80] for name in set(fields) - set(needed) - unread)
        missing = sorted(set(needed) - set(fields))
        if unknown or missing:
            raise ModelError(
                f"config.json's rope_scaling of type {kind!r} has unknown keys {unknown[:8]} and lacks {missing}; "
                f"expected exactly {sorted(needed)}."
            )
        _check(fields, kind)
        # As the file has them, whole numbers included: the digest of a base model covers how these numbers are written.
        own = {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}
        values = {name.replace("max_position_embeddings", "max_positions"): fields[name] for name in needed if name in own}
        more = {"yarn": _yarn, "longrope": _longrope}.get(kind, lambda fields, config: {})(fields, config)
        if query_beta and query_beta in fields:
            more |= {"query_beta": real(fields, query_beta, -1e-9, 1e3)}
            values["original_max_positions"] = whole(fields, _ORIGINAL, 2**31 - 1)
        return cls(theta=theta, kind=kind, rotary_share=share, **values | more)

    def rotated(self, head_dim: int) -> int:
        """Return how many of a head's numbers are rotated."""
        return int(head_dim * self.rotary_share)


def _check(fields: dict[str, Any], kind: str) -> None:
    """Raise ModelError for a number of the wrong type or size among those that the kind needs."""
    for name in _KEYS[kind]:
        if name == _ORIGINAL:
            whole(fields, name, 2**31 - 1)
        elif not name.endswith(("short_factor", "long_factor")):
            real(fields, name, 0.0, 1e6)
    if "factor" in _KEYS[kind] and fields["factor"] < 1:
        raise unsupported("rope_scaling.factor", reprlib.repr(fields["factor"]), "at least 1, as scaling lengthens a context")
    if kind == "llama3" and not fields["low_freq_factor"] < fields["high_freq_factor"]:
        raise unsupported("rope_scaling", "a low_freq_factor that is not below its high_freq_factor", "one that is")


def _yarn(fields: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of yarn. Its attention factor follows from the factor where the file gives none (§3.4)."""
    fast, slow = real(fields, "beta_fast", 0.0, 1e6, 32.0), real(fields, "beta_slow", 0.0, 1e6, 1.0)
    if fast < slow:
        raise unsupported("rope_scaling", "a beta_fast below its beta_slow", "one that is not")
    if real(fields, "rope_theta", 0.0, 1e15) <= 1:
        raise unsupported("rope_theta", reprlib.repr(fields["rope_theta"]), "more than 1 with YaRN")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(fields["factor"]) + 1.0

    one, all_dims = (real(fields, name, -1e-9, 1e6, 0.0) for name in ("mscale", "mscale_all_dim"))
    usual = magnitude(one) / magnitude(all_dims) if one and all_dims else magnitude(1.0)
    attention = real(fields, "attention_factor", 0.0, 1e6, usual)
    truncate = fields.get("truncate") is None or flag(fields, "truncate")
    return {"attention_factor": attention, "beta_fast": fast, "beta_slow": slow, "truncate": truncate}


def _longrope(fields: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of longrope. Its factor is the ratio of the context to the original one where the file gives none.

    The long factors, for rows beyond the original context, are checked and not used: no such row is accepted.
    """
    original = fields[_ORIGINAL]
    for name in ("short_factor", "long_factor"):
        found = fields[name]
        if not isinstance(found, list) or not 1 <= len(found) <= _LONGEST_FACTORS:
            raise unsupported(f"rope_scaling.{name}", reprlib.repr(found), "a list of numbers")
        for value in found:
            real({name: value}, name, 0.0, 1e6)
    if len(fields["short_factor"]) != len(fields["long_factor"]):
        raise unsupported("rope_scaling", "short_factor and long_factor of two lengths", "one length")
    ratio = whole(config, "max_position_embeddings", 2**31 - 1, original) / original
    factor = real(fields, "factor", 0.0, 1e6, ratio)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    attention = real(fields, "attention_factor", 0.0, 1e6, usual)
    return {"attention_factor": attention, "short_factors": tuple(map(float, fields["short_factor"]))}


def _fields(
    config: Mapping[str, Any], kinds: Collection[str], partial: bool, renamed: Mapping[str, str]
) -> tuple[dict[str, Any], str]:
    """Return the fields of all RoPE entries of config.json as one, and the kind. Raises ModelError if they contradict."""
    fields: dict[str, Any] = {}
    for entry in ("rope_parameters", "rope_scaling"):
        found = config.get(entry)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise unsupported(entry, reprlib.repr(found), "an object or null")
        values = {"type" if key == "rope_type" else key: value for key, value in found.items() if value is not None}
        if found.get("type") not in (None, values.get("type")):
            raise _contradiction(f"{entry}.type", found["type"], "its rope_type", values["type"])
        values.setdefault("type", "default")
        for key in sorted(fields.keys() & values.keys()):
            if fields[key] != values[key]:
                raise _contradiction(f"{entry}.{key}", values[key], f"rope_parameters.{key}", fields[key])
        # Older configs have these elsewhere; those of Phi, which accept its two lists alone, have the last three nowhere.
        elsewhere = {"rope_theta", "partial_rotary_factor"}
        elsewhere |= {_ORIGINAL, "attention_factor", "factor"} if partial else set()
        if fields and (fields.keys() ^ values.keys()) - elsewhere:
            raise _contradiction(entry, values, "rope_parameters", fields)
        fields |= values
    for key in ("rope_theta", *(("partial_rotary_factor", _ORIGINAL) if partial else ())):
        value = config.get(key)
        if value is not None and key in fields and fields[key] != value:
            raise _contradiction(key, value, "the one beside its scaling", fields[key])
        if value is not None:
            fields[key] = value
    kind = fields.pop("type", "default")
    if isinstance(kind, str):
        kind = renamed.get(kind, kind)
    if not isinstance(kind, str) or kind not in kinds:
        raise unsupported("rope_scaling", reprlib.repr(kind), f"{', '.join(sorted(kinds)[:-1])} or {sorted(kinds)[-1]}")
    if not partial and fields.pop("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported("rope_parameters.partial_rotary_factor", "not 1.0", "rotation of whole heads")
    return fields, kind


def _contradiction(one: str, value: Any, other: str, second: Any) -> ModelError:
    return ModelError(
        f"config.json contradicts itself: {one} is {reprlib.repr(value)} and {other} is {reprlib.repr(second)}; "
        "copy the model folder again from its publisher."
    )
