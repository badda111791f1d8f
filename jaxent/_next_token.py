"""The targets of a causal language model: at each position, the token that comes next."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._arguments import (
    ArrayOrList,
    describe,
    read_array,
    read_ignore_index,
    read_targets,
    whole_numbers,
)
from ._calls import compiled, public


@public
def next_token_targets(
    tokens: ArrayOrList,
    *,
    segment_ids: ArrayOrList | None = None,
    ignore_index: int = -100,
) -> Array:
    r"""Return the token after each, and `ignore_index` where a sequence or a segment ends.

    .. math:: y_t = x_{t+1}, \quad y_{T-1} = \mathrm{ignore\_index}

    So hidden states and targets have one shape, and no row is cut off:
    `linear_cross_entropy(hidden, kernel, next_token_targets(tokens))`. Prompts and padding are left
    out by `tokens = jnp.where(is_answer, tokens, -100)`, which then are ignored where they are
    shifted to; padding also by its token as `ignore_index`, here and in the loss.

    Args:
      tokens: integers, (..., T). The whole of each sequence: where T is split by `shard_map`,
        call it outside.
      segment_ids: integers, (..., T), for sequences packed into a row: tokens with different
        numbers do not predict each other.
      ignore_index: what `jaxent.cross_entropy` is given as `ignore_index`.

    Returns:
      Integers, (..., T), of the tokens' dtype; int32 (int64 for 64 bits) where that does not have
      `ignore_index`.

    Raises:
      TypeError: an array is not of integers.
      ValueError: the shapes differ, or `ignore_index` is None or too large for the targets.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> tokens = jnp.array([5, 6, 7, 8])
      >>> jaxent.next_token_targets(tokens)
      Array([   6,    7,    8, -100], dtype=int32)
      >>> jaxent.next_token_targets(tokens, segment_ids=jnp.array([1, 1, 2, 2]))
      Array([   6, -100,    8, -100], dtype=int32)
    """
    number = read_ignore_index(ignore_index)
    if number is None:
        raise ValueError("ignore_index must be an integer, which is the target of a last token")
    x = _read_integers("tokens", tokens, number)
    ids = None if segment_ids is None else _read_segments(segment_ids)
    if x.ndim == 0:
        raise ValueError("tokens must be a sequence, (..., T), got a scalar")
    if ids is not None and ids.shape != x.shape:
        raise ValueError(
            f"tokens are {list(x.shape)}, segment_ids {list(ids.shape)}: they must be of one shape"
        )
    dtype = _dtype_with(x.dtype, number)
    return _next_token_targets(dtype, x, ids, np.asarray(number, dtype))


def _read_integers(name: str, value: Any, ignore_index: int | None = None) -> Any:
    """Return integers, of which those that JAX would cut are out of range and not ignored."""
    array = whole_numbers(value)
    array = read_array(name, value) if array is None else array
    if array.dtype != object and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {describe(array)}")
    may_be_cut = array.dtype == object or array.dtype.itemsize == 8
    return read_targets(value, ignore_index if may_be_cut else None)[0]


def _read_segments(segment_ids: Any) -> Any:
    """Return the numbers of segments, which tell as many apart: JAX would cut those of 64 bits."""
    whole = whole_numbers(segment_ids)
    if whole is not None and whole.dtype.itemsize == 8:
        segment_ids = np.unique(whole, return_inverse=True)[1].reshape(whole.shape)
    return _read_integers("segment_ids", segment_ids)


def _dtype_with(dtype: Any, number: int) -> Any:
    """Return the dtype, or a signed one of at least 32 bits that has the number."""
    signed = jnp.dtype("int64" if dtype.itemsize == 8 else "int32")
    for candidate in (dtype, signed):
        if jnp.iinfo(candidate).min <= number <= jnp.iinfo(candidate).max:
            return candidate
    raise ValueError(f"ignore_index={number} is no {signed}, as the targets are")


@compiled
def _next_token_targets(dtype: Any, tokens: Array, segment_ids: Any, ignored: Any) -> Array:
    if tokens.dtype != dtype:
        # What an unsigned dtype has beyond is out of range, and stays it.
        largest = jnp.iinfo(dtype).max
        beyond = tokens > jnp.asarray(min(largest, jnp.iinfo(tokens.dtype).max), tokens.dtype)
        tokens = jnp.where(beyond, largest, tokens.astype(dtype))
    targets = _shifted(tokens, ignored)
    if segment_ids is None:
        return targets
    ends = _shifted(segment_ids, jnp.zeros((), segment_ids.dtype)) != segment_ids
    return jnp.where(ends, ignored, targets)


def _shifted(x: Array, last: Any) -> Array:
    """Return (..., T) with each value at the place before its own, and another one at the end."""
    # A shift of slices would have to divide T - 1 over an explicit mesh.
    return jax.lax.pad(x, last, [(0, 0, 0)] * (x.ndim - 1) + [(-1, 1, 0)])
