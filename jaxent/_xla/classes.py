"""Classes of a row: their numbers, split as the logits are, the value at one, the sum of all."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._classes import along
from .registry import by_platform, workaround


def is_last(axis: int, x: Array) -> bool:
    """Return whether it is the last axis."""
    return axis % x.ndim == x.ndim - 1


def is_inside(index: Array, axis: int, x: Array) -> Array:
    """Return where the class at the index is one of x."""
    return (index >= 0) & (index < x.shape[axis])


def sum_classes(axis: int, term: Array) -> Array:
    """Return the sum over the class axis, which is kept as 1."""
    axis %= term.ndim
    return jax.lax.expand_dims(jax.lax.reduce_sum(term, (axis,)), (axis,))


@workaround(lambda x, dtype=None: jnp.zeros_like(x, dtype))
def zeros_like(x: Array, dtype: Any = None) -> Array:
    """Return zeros that are split as x is.

    The zeros of `jnp.zeros_like` are whole, or raise, where an explicit mesh is that of the
    arguments and none is set (jax 0.10.2 to 0.12.0.1). This costs nothing: XLA knows that an
    integer times 0 is 0.
    """
    return (x.astype(jnp.int32) * 0).astype(x.dtype if dtype is None else dtype)


@workaround(lambda x, axis: _numbers(x, axis))
def class_numbers(x: Array, axis: int) -> Array:
    """Return the numbers of the classes, broadcastable to x, and split as x is on an explicit mesh.

    Numbers that are whole on each device make what is compared with them whole, or gathered (jax
    0.10.2 for TPUs).
    """
    numbers, spec = _numbers(x, axis), jax.typeof(x).sharding.spec
    return numbers + zeros_like(x, jnp.int32) if spec and spec[axis] else numbers


def _numbers(x: Array, axis: int) -> Array:
    return along(axis, x.ndim, jnp.arange(x.shape[axis], dtype=jnp.int32))


def one_hot(index: Array, x: Array, axis: int) -> Array:
    """Return where the class is the one at the index (..., 1, ...), broadcastable to x."""
    return index == class_numbers(x, axis)


def _masked_sum(
    arrays: tuple[Any, ...], index: Array, axis: int, function: Any = lambda x: x
) -> Array:
    values = function(*arrays)
    if index.shape[axis] != 1:
        values = jnp.expand_dims(values, _places_axis(axis, values))
        return jnp.sum(jnp.where(_one_hots(index, values, axis), values, 0), axis % index.ndim)
    total: Array = jnp.sum(jnp.where(one_hot(index, values, axis), values, 0), axis, keepdims=True)
    return total


def _places_axis(axis: int, values: Array) -> int:
    """Return the axis of several classes of each row, beside that of all of them."""
    return axis % values.ndim + 1


def _one_hots(index: Array, values: Array, axis: int) -> Array:
    """Return where the class is that of a place, (..., C, K, ...), of an index (..., K, ...)."""
    return one_hot(jnp.expand_dims(index, axis % index.ndim), values, axis % index.ndim)


@workaround(_masked_sum)
def take_class(
    arrays: tuple[Any, ...], index: Array, axis: int, function: Any = lambda x: x
) -> Array:
    """Return `function(*arrays)`, elementwise, at the class (..., 1, ...); any value if it is < 0.

    Arrays are (..., C, ...), or tables of one value a class, (1, C, 1, ...), or None. On a CPU it
    is a gather: a sum in which all other classes are 0 takes five times as long as the sum of the
    exponentials (jax 0.10.2). Other backends fuse that sum with the pass over the same values, and
    an explicit mesh that splits the classes, or the index alone, refuses the gather. Of several
    classes, (..., K, ...), where that sum takes K times as long, it is a gather everywhere.
    """
    if not splits_alike(arrays, index):
        return _masked_sum(arrays, index, axis, function)
    if index.shape[axis] != 1:
        return gather_class(arrays, index, axis, function)
    on_cpu, others = (
        functools.partial(f, axis=axis, function=function) for f in (gather_class, _masked_sum)
    )
    return by_platform(on_cpu, others, arrays, index)


def splits_alike(arrays: tuple[Any, ...], index: Array) -> bool:
    """Return whether an explicit mesh splits all of them as the index, or there is none."""
    spec = jax.typeof(index).sharding.spec
    return all(x is None or jax.typeof(x).sharding.spec == spec for x in arrays)


def gather_class(
    arrays: tuple[Any, ...], index: Array, axis: int, function: Any = lambda x: x
) -> Array:
    """Return what `take_class` does, as a gather."""
    take = functools.partial(gather_bits, functools.partial(_gather, axis))
    taken: Array = function(*(None if values is None else take(values, index) for values in arrays))
    return taken


def _gather(axis: int, values: Array, index: Array) -> Array:
    """`jnp.take_along_axis`, and of a table's value for each index; clipped to the classes."""
    axis %= values.ndim
    batch = tuple(i for i in range(values.ndim) if i != axis)
    if values.size == values.shape[axis]:
        values, axis, batch = values.ravel(), 0, ()
    dimensions = jax.lax.GatherDimensionNumbers((), (axis,), (axis,), batch, batch)
    one = (1,) * values.ndim
    return jax.lax.gather(values, index[..., None], dimensions, one, mode="clip")


@workaround(lambda gather, values, index: gather(values, index))
def gather_bits(gather: Callable[[Array, Array], Array], values: Array, index: Array) -> Array:
    """Return `gather(values, index)`; of half precision, the gather of its bits.

    A CPU makes a float32 copy of a half-precision array to gather from (jax 0.10.2). The bits are
    gathered as they are.
    """
    return _gathered_bits(gather, values, index)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gathered_bits(gather: Callable[[Array, Array], Array], values: Array, index: Array) -> Array:
    if values.dtype.itemsize != 2:
        return gather(values, index)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16)
    return jax.lax.bitcast_convert_type(gather(bits, index), values.dtype)


@_gathered_bits.defjvp
def _gathered_bits_jvp(
    gather: Callable[[Array, Array], Array], primals: Any, tangents: Any
) -> tuple[Array, Array]:
    (values, index), (d_values, _) = primals, tangents
    return _gathered_bits(gather, values, index), gather(d_values, index)


def _masked_put(x: Array, index: Array, values: Array, axis: int) -> Array:
    one_hots = _one_hots(index, jnp.expand_dims(x, _places_axis(axis, x)), axis)
    put = jnp.where(one_hots, jnp.expand_dims(values, axis % x.ndim), 0)
    places = _places_axis(axis, x)
    return jnp.where(jnp.any(one_hots, places), jnp.sum(put, places), x)


def put_at_class(x: Array, index: Array, values: Array, axis: int) -> Array:
    """Return x with these values, (..., K, ...), at the classes of an index of the same shape.

    A class is there once at most; an index outside of [0, C) is none. It is a scatter, which an
    explicit mesh that splits the classes refuses. Comparing each class with each of 16 places takes
    a CPU as long as the exponentials of four logits, 2.6 ns (jax 0.12.0.1).
    """
    if not splits_alike((x,), index):
        return _masked_put(x, index, values, axis)
    at = index[..., None], values, _scatter_dimensions(axis, x)
    put: Array = jax.lax.scatter(x, *at, unique_indices=True, mode="drop")
    return put


def _scatter_dimensions(axis: int, x: Array) -> jax.lax.ScatterDimensionNumbers:
    axis %= x.ndim
    batch = tuple(i for i in range(x.ndim) if i != axis)
    return jax.lax.ScatterDimensionNumbers((), (axis,), (axis,), batch, batch)


def add_at_class(x: Array, index: Array, values: Array, axis: int) -> Array:
    """Return x with these values added at the classes of an index, which may have one twice."""
    at = index[..., None], values, _scatter_dimensions(axis, x)
    added: Array = jax.lax.scatter_add(x, *at, mode="drop")
    return added
