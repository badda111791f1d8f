"""From per-example terms to `none`, `sum` or `mean`, over mapped axes too."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._axes import Names, psum, zeros_like


def total(values: ArrayLike, examples: Names) -> Array:
    """The sum of all values, here and on the other shards of these mapped axes."""
    return psum(jnp.sum(values), examples)


def reduce(terms: list[tuple[Array, Array]], reduction: str, examples: Names):
    """Add up the terms, each a pair of per-example (numerator, denominator).

    `none` adds numerators, `sum` totals them, `mean` divides each term's total by its
    denominator's, or by 1 where that is 0: the mean over nothing is 0.
    """
    numerators, denominators = zip(*terms)
    if reduction == "none":
        return sum(numerators)
    if reduction == "sum":
        return jnp.sum(_totals(numerators, examples))
    above, below = jnp.split(_totals(numerators + denominators, examples), 2)
    return jnp.sum(above / jnp.where(below == 0, 1, below))


def _totals(terms, examples):
    """Stacked: else XLA's CPU compiler makes a kernel of each (jax 0.10.2), and of some parts."""
    alike = [term + zeros_like(terms[0]) for term in terms]  # in their sharding, too
    stacked = jnp.stack(alike)
    return psum(jnp.sum(stacked, tuple(range(1, stacked.ndim))), examples)
