"""Along the class axis: a value a class, the value at an index, the first of the best."""

import functools
from collections.abc import Callable

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
        def take(values):
            return (_take_bits if values.dtype.itemsize == 2 else _take)(axis, values, index)

        return function(*(None if values is None else take(values) for values in arrays))

    def masked_sum(arrays, index):
        values = function(*arrays)
        return jnp.sum(jnp.where(one_hot(index, values, axis), values, 0), axis, keepdims=True)

    spec = jax.typeof(index).sharding.spec
    if any(x is not None and jax.typeof(x).sharding.spec != spec for x in arrays):
        return masked_sum(arrays, index)
    return jax.lax.platform_dependent(arrays, index, cpu=gather, default=masked_sum)


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
def _take_bits(axis, values, index):
    """Of half precision, which XLA's gather on the CPU makes a float32 copy of (jax 0.10.2)."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16)
    return jax.lax.bitcast_convert_type(_take(axis, bits, index), values.dtype)


@_take_bits.defjvp
def _take_bits_jvp(axis, primals, tangents):
    (values, index), (d_values, _) = primals, tangents
    return _take_bits(axis, values, index), _take(axis, d_values, index)


def one_hot(index: Array, x: Array, axis: int) -> Array:
    """Where the class is the one at the index (..., 1, ...), broadcastable to x."""
    return index == _class_numbers(x, axis)


def _class_numbers(x, axis):
    """The numbers of the classes, broadcastable to x, split as x is on an explicit mesh: else what
    is compared with them is whole on each device, or gathered (jax 0.10.2 for TPUs)."""
    numbers = along(axis, x.ndim, jnp.arange(x.shape[axis], dtype=jnp.int32))
    spec = jax.typeof(x).sharding.spec
    return numbers + zeros_like(x, jnp.int32) if spec and spec[axis] else numbers


def first_best(scores: Array, axis: int) -> Array:
    """The first class of the largest score, as argmax; which, of sharded classes, gathers."""
    top = jnp.max(scores, axis, keepdims=True)
    best = (scores == top) | jnp.isnan(scores)
    numbers = jnp.where(best, _class_numbers(scores, axis), scores.shape[axis])
    return jnp.min(numbers, axis, keepdims=True)
