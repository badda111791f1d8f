"""From per-example terms to `none`, `sum` or `mean`, over mapped axes too."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._arguments import Reduction
from ._axes import Names, psum
from ._xla import sums_of


def total(values: ArrayLike, examples: Names) -> Array:
    """Return the sum of all values, here and on the other shards of these mapped axes."""
    return psum(jnp.sum(values), examples)


def reduce(terms: list[tuple[Array, Array]], reduction: Reduction, examples: Names) -> Array:
    """Add up the terms, each a pair of per-example (numerator, denominator).

    `none` adds numerators, `sum` totals them, `mean` divides each term's total by its
    denominator's, or by 1 where that is 0: the mean over nothing is 0.
    """
    numerators: tuple[Array, ...]
    denominators: tuple[Array, ...]
    numerators, denominators = zip(*terms)
    if reduction == "none":
        return functools.reduce(jnp.add, numerators)
    if reduction == "sum":
        return jax.lax.reduce_sum(psum(sums_of(numerators), examples), (0,))
    above, below = jnp.split(psum(sums_of(numerators + denominators), examples), 2)
    return jax.lax.reduce_sum(above / jnp.where(below == 0, 1, below), (0,))
