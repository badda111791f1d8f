"""From per-example terms to `none`, `sum` or `mean`, over mapped axes too."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

AxisName = str | Sequence[str] | None


def total(values: ArrayLike, axis_name: AxisName) -> Array:
    """The sum of all values, here and on the other shards of `axis_name`."""
    values = jnp.sum(values)
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def reduce(terms: list[tuple[Array, Array]], axis: int, reduction: str, axis_name: AxisName):
    """Add up the terms, each a pair of per-example (numerator, denominator), (..., 1, ...).

    `none` adds numerators, `sum` totals them, `mean` divides each term's total by its
    denominator's, or by 1 where that is 0: the mean over nothing is 0.
    """
    if reduction == "none":
        return jnp.squeeze(sum(numerator for numerator, _ in terms), axis)
    totals = [total(numerator, axis_name) for numerator, _ in terms]
    if reduction == "mean":
        denominators = [total(denominator, axis_name) for _, denominator in terms]
        totals = [t / jnp.where(d == 0, 1, d) for t, d in zip(totals, denominators)]
    return sum(totals)
