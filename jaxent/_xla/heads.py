"""The arrays of a head: slices of half precision, and slices that are added to."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from .._axes import Names
from .registry import R, by_platform, hidden, workaround


def is_widened_on_cpu(dtype: Any) -> bool:
    """Return whether a CPU makes float32 copies of all that matmuls of the dtype read.

    Since jax 0.12 it does not, and has matmuls of bfloat16: a head's loss and gradients take 0.5 to
    0.7 of the time.
    """
    return jnp.finfo(dtype).bits <= 16 and jax.__version_info__ < (0, 12)


@workaround(lambda function, plan, on_cpu, *arguments: function(plan, *arguments))
def with_cpu_plan(function: Callable[..., R], plan: Any, on_cpu: Any, *arguments: Any) -> R:
    """Return `function(plan, *arguments)`, on a CPU of another plan.

    A CPU turns matmuls of half precision into float32 ones (jax 0.10.2, see `is_widened_on_cpu`);
    the plan for it reads slices of half precision by their bits, as `slice_of_bits` says.
    """
    cpu, default = (functools.partial(function, each) for each in (on_cpu, plan))
    return by_platform(cpu, default, *arguments)


def take_slice(array: Array, start: Array, size: int, axis: int) -> Array:
    """Return this many entries of the axis, from the start on."""
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


@workaround(take_slice)
def slice_of_bits(array: Array, start: Array, size: int, axis: int) -> Array:
    """Return a slice of a half-precision array, on a CPU.

    It computes such a slice as one of float32, hoists the cast out of the loop and holds a float32
    copy of the array (jax 0.10.2). Bits are sliced as they are.
    """
    array, start = hidden((array, start))
    bits = take_slice(jax.lax.bitcast_convert_type(array, jnp.uint16), start, size, axis)
    return hidden(jax.lax.bitcast_convert_type(bits, array.dtype))


def add_slice(total: Array, part: Array, start: Array, axis: int) -> Array:
    """Return the total with the part added to a slice of it."""
    part += take_slice(total, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, part.astype(total.dtype), start, axis)


@workaround(add_slice)
def scatter_slice(total: Array, part: Array, start: Array, axis: int) -> Array:
    """Return the total with the part added to a slice of it, by a scatter.

    The transpose of `add_slice` writes to the total's cotangent, and copies it each time: a second
    reverse mode holds 1.14 times as much (jax 0.10.2 to 0.12.0.1).
    """
    dimensions = jax.lax.ScatterDimensionNumbers((0, 1), (), (axis,))
    return jax.lax.scatter_add(total, start[None], part.astype(total.dtype), dimensions)


def _transpose(matrix: Array) -> Array:
    """Return the transpose of a matrix."""
    return matrix.T


@workaround(_transpose)
def transposed(matrix: Array) -> Array:
    """Return the transpose of a matrix, on a CPU as an array of its own.

    Where it is only seen as a transpose, a matmul reads its left operand along the columns: the
    gradient of a kernel (512, 32768), of 512 tokens, takes 2.4 times as long with jax 0.10.2, and
    1.3 times with 0.12.0.1. This is a copy of the tokens.
    """
    return by_platform(lambda x: hidden(_transpose(x)), _transpose, matrix)


def _all_gather(part: Array, names: Names, axis: int) -> Array:
    """Return what is split over mapped axes, whole."""
    whole: Array = jax.lax.all_gather(part, names, axis=axis, tiled=True)
    return whole


@workaround(_all_gather)
def gather_parts(part: Array, names: Names, axis: int) -> Array:
    """Return what is split over mapped axes, whole.

    Where JAX cannot compile the transpose of `all_gather` (jax 0.12.0.1, see `add_parts`), as much
    is sent in a form whose transpose is that of `add_parts`.
    """
    if not _is_beside_explicit_axes():
        return _all_gather(part, names, axis)
    copies = jnp.broadcast_to(part, (jax.lax.axis_size(names), *part.shape))
    parts = jnp.moveaxis(jax.lax.all_to_all(copies, names, 0, 0), 0, axis)
    return parts.reshape(*part.shape[:axis], -1, *part.shape[axis + 1 :])


def _psum_scatter(whole: Array, names: Names, axis: int) -> Array:
    """Return this shard's part of the sum over mapped axes."""
    part: Array = jax.lax.psum_scatter(whole, names, scatter_dimension=axis, tiled=True)
    return part


@workaround(_psum_scatter)
def add_parts(whole: Array, names: Names, axis: int) -> Array:
    """Return this shard's part of the sum over mapped axes.

    Beside an axis of an explicit mesh that is not mapped JAX cannot compile `psum_scatter`, the
    transpose of `all_gather` (jax 0.12.0.1). So parts are sent to where they are added: as much is
    sent, and a copy more is held of what is split.
    """
    if not _is_beside_explicit_axes():
        return _psum_scatter(whole, names, axis)
    shape = *whole.shape[:axis], jax.lax.axis_size(names), -1, *whole.shape[axis + 1 :]
    parts = jnp.moveaxis(whole.reshape(shape), axis, 0)
    return jnp.sum(jax.lax.all_to_all(parts, names, 0, 0), 0)


def _is_beside_explicit_axes() -> bool:
    """Return whether axes of an explicit mesh are not mapped here."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
