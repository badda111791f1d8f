"""Sums of floats that no order of the terms changes: integers, of digits that are int32.

`words`, int32 (..., WORDS), are the digits of an integer to the base 256, the smallest first, and
two flags, whether an infinity of either sign was added; NaN is both. Words are added by `+`;
`normalized` makes them small again.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

DIGITS = 40
WORDS = DIGITS + 2  # and the flags of +inf and -inf
SMALLEST = -149  # 2^SMALLEST is the smallest float32, and the unit
MOST_TERMS = 2**23  # of digits up to 255 that an int32 holds

OF_ONE = (18, 19)  # the digits in which 1 is
OF_PROBABILITY = (14, 19)  # those of [0, 1], down to 2^-37


def _carry(digits: Any, steps: int = 4) -> Array:
    """Return the digits of the same numbers, less what `steps` pass to the next; the last has all.

    After 4 steps a digit, which an int32 was, is in [-1, 257]. After as many as there are digits it
    is in [0, 255], and the last has the sign.
    """
    is_last = jnp.arange(DIGITS) == DIGITS - 1

    def step(_: Any, digits: Array) -> Array:
        carried = jnp.where(is_last, 0, digits >> 8)
        return digits - (carried << 8) + jnp.roll(carried, 1, -1)

    return jax.lax.fori_loop(0, steps, step, digits, unroll=steps == 4)


def normalized(words: Any) -> Array:
    """Return words of the same numbers that are small, so that more can be added."""
    digits, flags = jnp.split(words, [DIGITS], -1)
    return jnp.concatenate([_carry(digits), jnp.minimum(flags, 1)], -1)


def total_of(values: Any, digits: tuple[int, int] = (0, DIGITS)) -> Array:
    """Return the sum of all values, int32 (WORDS,), of which these digits are computed."""
    if values.dtype == jnp.float64:
        total, rest = jnp.zeros(WORDS, jnp.int32), values
        for _ in range(3):
            part = rest.astype(jnp.float32)
            total += total_of(part, digits)
            rest = jnp.where(jnp.isfinite(part), rest - part.astype(rest.dtype), 0)
        return normalized(total)
    values = values.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    exponent = (bits >> 23) & 255
    mantissa = (bits & 0x7FFFFF) | jnp.where(exponent > 0, 1 << 23, 0)
    mantissa = jnp.where(exponent == 255, 0, mantissa)  # infinities and NaN, for the flags
    first, last = digits
    shift = (jnp.maximum(exponent, 1) - 1)[..., None] - 8 * jnp.arange(first, last)
    shifted = (mantissa[..., None] << jnp.clip(shift, 0, 31)) >> jnp.clip(-shift, 0, 31)
    found = jnp.where(bits < 0, -1, 1)[..., None] * (shifted & 255)  # (..., last - first)
    isnan = jnp.isnan(values)
    flags = [jnp.any(isnan | (values == infinity)) for infinity in (jnp.inf, -jnp.inf)]
    return words_of(_sum_of_digits(found, first), *flags)


def words_of(digits: Array, above: Array, below: Array) -> Array:
    return jnp.concatenate([digits, jnp.stack([above, below]).astype(jnp.int32)])


def _sum_of_digits(digit: Array, first: int) -> Array:
    """Return the sum over all axes except the last, (DIGITS,), given the digits from `first` on."""
    # An int32 holds MOST_TERMS terms: larger arrays are summed axis by axis.
    axes = tuple(range(digit.ndim - 1))
    steps = (
        [axes]
        if math.prod(digit.shape[:-1]) <= MOST_TERMS
        else [(axis,) for axis in reversed(axes)]
    )
    for step in steps:
        digit = jnp.sum(digit, step, dtype=jnp.int32)
        if digit.shape[-1] < DIGITS:
            missing = (first, DIGITS - first - digit.shape[-1])
            digit = jnp.pad(digit, [(0, 0)] * (digit.ndim - 1) + [missing])
        digit = _carry(digit)
    return digit


def read(words: Any) -> Any:
    """Return the numbers: float64, correctly rounded, of NumPy's words; of JAX's, its floats."""
    if not isinstance(words, np.ndarray):
        return _floats(words)
    numbers = [_float(word) for word in words.reshape(-1, WORDS).tolist()]
    return np.array(numbers).reshape(words.shape[:-1])[()]


def _float(words: list[int]) -> float:
    *digits, above, below = words
    number = sum(digit << 8 * k for k, digit in enumerate(digits)) / 2**-SMALLEST
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


@jax.jit
def added(words: Any, others: Any) -> Array:
    return normalized(words + others)


@jax.jit
def reduced(words: Any) -> Array:
    return normalized(jnp.sum(words, 0, dtype=jnp.int32))
