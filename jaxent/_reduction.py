"""From per-example terms to `none`, `sum` or `mean`, over mapped axes too."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._arguments import Reduction
from ._axes import Names, psum, zeros_like


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
        return jax.lax.reduce_sum(_totals(numerators, examples), (0,))
    above, below = jnp.split(_totals(numerators + denominators, examples), 2)
    return jax.lax.reduce_sum(above / jnp.where(below == 0, 1, below), (0,))


def _totals(terms: Sequence[Array], examples: Names) -> Array:
    """Return each term's total.

    They are stacked. Otherwise, XLA's CPU compiler makes a kernel of each, and of some parts
    (jax 0.10.2).
    """
    if any(jax.typeof(term) != jax.typeof(terms[0]) for term in terms):
        terms = [term + zeros_like(terms[0]) for term in terms]  # of one sharding
    stacked = jax.lax.concatenate([jax.lax.expand_dims(term, (0,)) for term in terms], 0)
    return psum(jax.lax.reduce_sum(stacked, tuple(range(1, stacked.ndim))), examples)
