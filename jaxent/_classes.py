"""Along the class axis: a value a class, the value at an index, the first of the best."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._axes import zeros_like


def along(axis: int, ndim: int, values: Array) -> Array:
    """(C,) laid along `axis` of `ndim` dimensions: (1, C, 1, ...)."""
    return jnp.expand_dims(values, [i for i in range(ndim) if i != axis % ndim])


def pick(arrays: tuple, index: Array, axis: int, function: Callable = lambda x: x) -> Array:
    """`function(*arrays)`, of arrays and elementwise, at an index (..., 1, ...) along `axis`; any
    value where it is < 0.

    Arrays are (..., C, ...), or tables of one value a class, (1, C, 1, ...), or None. A gather on
    CPU, where a masked sum costs five times the log-sum. Elsewhere a masked sum, which fuses with
    a pass over the same function's values; and where an explicit mesh shards the classes, or the
    index alone, which refuses the gather.
    """

    def gather(arrays, index):
        take = functools.partial(_by_bits, functools.partial(_take, axis))
        return function(*(None if values is None else take(values, index) for values in arrays))

    def masked_sum(arrays, index):
        values = function(*arrays)
        return jnp.sum(jnp.where(one_hot(index, values, axis), values, 0), axis, keepdims=True)

    if not is_split_alike(arrays, index):
        return masked_sum(arrays, index)
    return jax.lax.platform_dependent(arrays, index, cpu=gather, default=masked_sum)


def is_split_alike(arrays: tuple, index: Array) -> bool:
    """Whether an explicit mesh splits all of them as the index, or there is none."""
    spec = jax.typeof(index).sharding.spec
    return all(x is None or jax.typeof(x).sharding.spec == spec for x in arrays)


def take_block(blocks: Array, which: Array) -> Array:
    """Return one block, (N, B), of each row of blocks (N, K, B), or (1, K, B) of a table.

    `which` is (N, 1).
    """
    if blocks.shape[0] == 1:
        return blocks[0][which[:, 0]]
    return _by_bits(_take_row, blocks, which)


def _take_row(blocks, which):
    dimensions = jax.lax.GatherDimensionNumbers((1,), (1,), (1,), (0,), (0,))
    return jax.lax.gather(blocks, which, dimensions, (1, 1, blocks.shape[2]), mode="clip")


def _take(axis, values, index):
    """`jnp.take_along_axis`, and of a table's value for each index; clipped to the classes."""
    axis %= values.ndim
    if values.size == values.shape[axis]:
        values, axis, batch = values.ravel(), 0, ()
    else:
        batch = tuple(i for i in range(values.ndim) if i != axis)
    dimensions = jax.lax.GatherDimensionNumbers((), (axis,), (axis,), batch, batch)
    one = (1,) * values.ndim
    return jax.lax.gather(values, index[..., None], dimensions, one, mode="clip")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_bits(take, values, index):
    """`take(values, index)`, a gather. Half precision, of which XLA makes a float32 copy on the CPU
    (jax 0.10.2), it takes as bits."""
    if values.dtype.itemsize != 2:
        return take(values, index)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16)
    return jax.lax.bitcast_convert_type(take(bits, index), values.dtype)


@_by_bits.defjvp
def _by_bits_jvp(take, primals, tangents):
    (values, index), (d_values, _) = primals, tangents
    return _by_bits(take, values, index), take(d_values, index)


def one_hot(index: Array, x: Array, axis: int) -> Array:
    """Where the class is the one at the index (..., 1, ...), broadcastable to x."""
    return index == class_numbers(x, axis)


def not_at(index: Array, x: Array, dtype: Any) -> Array:
    """Return 0 where the last axis' class is the one at the index (..., 1), else 1, of few classes.

    It is products, which XLA's CPU compiler leaves to a library beside a sum of exponentials (jax
    0.10.2 to 0.12.0.1). A select it does not, and writes all the exponentials, twice.
    """
    distance = jnp.arange(x.shape[-1], dtype=dtype) - index.astype(dtype)
    return jnp.minimum(distance * distance, 1)


def class_numbers(x: Array, axis: int) -> Array:
    """Return the numbers of the classes, broadcastable to x.

    They are split as x is on an explicit mesh. Else what is compared with them is whole on each
    device, or gathered (jax 0.10.2 for TPUs).
    """
    numbers = along(axis, x.ndim, jnp.arange(x.shape[axis], dtype=jnp.int32))
    spec = jax.typeof(x).sharding.spec
    return numbers + zeros_like(x, jnp.int32) if spec and spec[axis] else numbers


def first_best(scores: Array, axis: int) -> Array:
    """The first class of the largest score, as argmax; which, of sharded classes, gathers."""
    top = jnp.max(scores, axis, keepdims=True)
    best = (scores == top) | jnp.isnan(scores)
    numbers = jnp.where(best, class_numbers(scores, axis), scores.shape[axis])
    return jnp.min(numbers, axis, keepdims=True)
