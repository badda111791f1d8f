"""Rows whose classes are split over mapped axes: a shard's sums, put together.

Each shard has sums over its own classes, relative to its own shift s_i. With M the largest
shift and d_i = s_i - M, those of the whole row are

    total      = sum_i total_i * exp(d_i)
    moment     = sum_i (moment_i + total_i * d_i) * exp(d_i)
    picked     = picked_i + d_i of the shard that has the class
    target_sum = sum_i target_sum_i + d_i * mass_sum_i

Nothing but these, a few numbers a row, is sent; and in the backward pass nothing at all.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._axes import Names, first_class, psum
from ._numerics import times
from ._softmax import RowSums


def whole_rows(
    shift: Any,
    sums: RowSums,
    index: Any,
    here: Any,
    uncounted: Array | bool,
    names: Names,
) -> tuple[Any, RowSums]:
    """Shift and sums of whole rows.

    Args:
      shift, sums: of this shard's classes, (..., 1, ...); shift None, of log-probabilities.
      index: class indices, < 0 for none; None for probabilities.
      here: the same, relative to this shard's classes; < 0 for none, and for other shards'.
      uncounted: which rows the loss does not count. They may hold anything.
      names: the mapped axes; () if rows are whole already.
    """
    if not names:
        return shift, sums
    top: Any = None
    change: Any = 0.0
    if shift is not None:
        top = jax.lax.pmax(jax.lax.stop_gradient(shift), names)
        change = shift - top
        lowest = jnp.finfo(shift.dtype).min  # finite, as 0 * NaN would be a derivative
        change = jnp.where(uncounted & ~jnp.isfinite(change), lowest, change)
    parts = {}
    if sums.total is not None:
        parts["total"] = total = sums.total * jnp.exp(change)
        if sums.moment is not None:
            parts["moment"] = sums.moment * jnp.exp(change) + times(total, change)
    if index is not None:
        # An index that no shard has is left, for its NaN to reach the row's gradient.
        parts["picked"] = jnp.where((here < 0) & (index >= 0), 0, sums.picked + change)
    if sums.mass_sum is not None:
        parts["mass_sum"] = sums.mass_sum
        parts["target_sum"] = sums.target_sum + times(sums.mass_sum, change)
    return top, RowSums(**psum(parts, names))


def whole_best(peak: Array, best: Array, num_classes: int, names: Names) -> Array:
    """The most probable class of whole rows, the first of equals, of each shard's own.

    `peak` is that class's logit, on each shard; NaN is above all.
    """
    if not names:
        return best
    best = best.astype(jnp.int32) + first_class(num_classes, names)
    peak = jax.lax.stop_gradient(peak)
    largest = (peak == jax.lax.pmax(peak, names)) | jnp.isnan(peak)
    return jax.lax.pmin(jnp.where(largest, best, jnp.iinfo(jnp.int32).max), names)
