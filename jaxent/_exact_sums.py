"""Sums of floats that no order of the terms changes: integers, of digits that are int32.

`words`, int32 (..., WORDS), are the digits of an integer to the base 256, the smallest first, and
two flags, whether an infinity of either sign was added; NaN is both. Words are added by `+`;
`_normalized` makes them small again. `jaxent.metrics` says why.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._axes import AxisName, psum, read_axis_names, vary_like

DIGITS = 40
WORDS = DIGITS + 2  # and the flags of +inf and -inf
SMALLEST = -149  # 2^SMALLEST is the smallest float32, and the unit
MOST_TERMS = 2**27  # in one call


def _carry(digits: Any, steps: int = 4) -> Array:
    """Return the digits of the same numbers, less what `steps` pass to the next; the last has all.

    After 4 steps a digit, which an int32 was, is in [-1, 257]. After as many as there are digits it
    is in [0, 255], and the last has the sign.
    """
    is_last = jnp.arange(DIGITS) == DIGITS - 1

    def step(_: Any, digits: Array) -> Array:
        carried = jnp.where(is_last, 0, digits >> 8)
        return digits - (carried << 8) + jnp.roll(carried, 1, -1)

    carried: Array = jax.lax.fori_loop(0, steps, step, digits, unroll=steps == 4)
    return carried


def _normalized(words: Any) -> Array:
    """Return words of the same numbers that are small, so that more can be added."""
    digits, flags = jnp.split(words, [DIGITS], -1)
    return jnp.concatenate([_carry(digits), jnp.minimum(flags, 1)], -1)


def total_of(values: Any) -> Array:
    """Return the sum of all values, int32 (WORDS,)."""
    values = jax.lax.stop_gradient(values)
    if values.dtype != jnp.float64:
        return _total_of(values.astype(jnp.float32))
    parts = []
    for _ in range(3):  # of 24 bits
        parts.append(values.astype(jnp.float32))
        rest = values - parts[-1].astype(values.dtype)
        values = jnp.where(jnp.isfinite(parts[-1]), rest, 0)
    words: Array = _reduced(jax.lax.map(_total_of, jnp.stack(parts)))
    return words


def _total_of(values: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    exponent = (bits >> 23) & 255
    mantissa = (bits & 0x7FFFFF) | jnp.where(exponent > 0, 1 << 23, 0)
    mantissa = jnp.where(exponent == 255, 0, mantissa)  # infinities and NaN have flags
    place = jnp.maximum(exponent, 1) - 1  # a value is mantissa * 2^(place + SMALLEST)
    number = jnp.arange(DIGITS)

    def add_digit(k: Any, digits: Array) -> Array:
        shift = place - 8 * k
        digit = ((mantissa << jnp.clip(shift, 0, 31)) >> jnp.clip(-shift, 0, 31)) & 255
        low, high = _sum(jnp.where(bits < 0, -digit, digit))
        return digits + jnp.where(number == k, low, 0) + jnp.where(number == k + 1, high, 0)

    # Losses of a batch have about a dozen of the 40 digits, and the others are not computed.
    places = mantissa > 0
    first = jnp.min(place, initial=8 * DIGITS, where=places) >> 3
    last = (jnp.max(place, initial=-32, where=places) >> 3) + 4
    zeros = vary_like(values, jnp.zeros(DIGITS, jnp.int32))
    digits = jax.lax.fori_loop(first, last, add_digit, zeros)
    isnan = jnp.isnan(values)
    flags = [jnp.any(isnan | (values == infinity)) for infinity in (jnp.inf, -jnp.inf)]
    return jnp.concatenate([_carry(digits), jnp.stack(flags).astype(jnp.int32)])


def _sum(digit: Array) -> tuple[Array, Array | int]:
    """Return (a, b), the sum being a + 256 * b: of many terms, an int32 has but four bits each."""
    if digit.size <= 2**23:
        return jnp.sum(digit, dtype=jnp.int32), 0
    low, high = (jnp.sum(half, dtype=jnp.int32) for half in (digit & 15, digit >> 4))
    return low + ((high & 15) << 4), high >> 4


def read(words: Any) -> Any:
    """Return the numbers: float64, correctly rounded, of NumPy's words; of JAX's, its floats."""
    if not isinstance(words, np.ndarray):
        return _floats(words)
    numbers = [_float(word) for word in words.reshape(-1, WORDS).tolist()]
    return np.array(numbers).reshape(words.shape[:-1])[()]


def _float(words: list[int]) -> float:
    *digits, above, below = words
    number: float = sum(digit << 8 * k for k, digit in enumerate(digits)) / 2**-SMALLEST
    return number + (math.inf if above else 0) - (math.inf if below else 0)


@jax.jit
def _floats(words: Any) -> Array:
    dtype = jnp.result_type(float)
    digits = _carry(words[..., :DIGITS], DIGITS)
    sign = jnp.where(digits[..., -1:] < 0, -1, 1)
    # Of a magnitude no digit is negative, and none cancels another.
    digits = _carry(sign * digits, DIGITS)
    with np.errstate(over="ignore"):
        units = np.exp2(SMALLEST + 8.0 * np.arange(DIGITS)).astype(dtype)
    value = jnp.sum(digits * jnp.where(digits == 0, 1, units), -1) * sign[..., 0]
    above, below = (jnp.where(words[..., k] > 0, jnp.inf, 0) for k in (-2, -1))
    return (value + above - below).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Sums:
    """What sums have in common: `words`, int32 (..., WORDS), that are added."""

    words: Any
    NDIM: ClassVar[int] = 2  # of words that are not stacked

    def __add__(self, other: Self) -> Self:
        """Return the sums over the tokens of both."""
        if type(other) is not type(self):
            return NotImplemented
        if self.words.shape != other.words.shape:
            raise ValueError(
                f"words {list(self.words.shape)} and {list(other.words.shape)} are not added: give "
                "both the same num_bins, and reduce() what is stacked"
            )
        return dataclasses.replace(self, words=_added(self.words, other.words))

    def __radd__(self, other: int) -> Self:
        """Return the sums themselves, so that `sum` adds them, which begins with 0."""
        if not isinstance(other, int) or other != 0:
            return NotImplemented
        return self

    def merge(self, other: Self) -> Self:
        """Return `self + other`, by CLU's and metrax's name."""
        return self + other

    def reduce(self) -> Self:
        """Return the sums of stacked ones, over their first axis: CLU's name again.

        Such are what `jax.lax.scan`, `jax.vmap`, `jax.pmap` and
        `jax.experimental.multihost_utils.process_allgather` return.
        """
        words = jnp.asarray(self.words)
        if words.ndim <= self.NDIM:
            raise ValueError(f"words are {list(words.shape)}: there is nothing stacked to reduce")
        return dataclasses.replace(self, words=_reduced(words))

    def psum(self, axis_name: AxisName) -> Self:
        """Return the sums over all shards of mapped axes, in `jax.shard_map`, `pmap` or `vmap`.

        Over an automatic or explicit mesh there is nothing to do.
        """
        words = jnp.asarray(self.words)
        (names,) = read_axis_names(words, axis_name=axis_name)
        return dataclasses.replace(self, words=_normalized(psum(words, names)))


def numpy_of(words: Any) -> Any:
    return np if isinstance(words, (np.ndarray, np.generic)) else jnp


def ratio(above: Any, below: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below


@jax.jit
def _added(words: Any, others: Any) -> Array:
    return _normalized(words + others)


@jax.jit
def _reduced(words: Any) -> Array:
    return _normalized(jnp.sum(words, 0, dtype=jnp.int32))
