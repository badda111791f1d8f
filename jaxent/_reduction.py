"""From per-example terms to `none`, `sum` or `mean`, over mapped axes too."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._axes import Names, psum


def total(values: ArrayLike, examples: Names) -> Array:
    """The sum of all values, here and on the other shards of these mapped axes."""
    return psum(jnp.sum(values), examples)


def reduce(terms: list[tuple[Array, Array]], reduction: str, examples: Names):
    """Add up the terms, each a pair of per-example (numerator, denominator).

    `none` adds numerators, `sum` totals them, `mean` divides each term's total by its
    denominator's, or by 1 where that is 0: the mean over nothing is 0.
    """
    if reduction == "none":
        return sum(numerator for numerator, _ in terms)
    numerators, denominators = zip(*terms)
    if reduction == "sum":
        return sum(psum([jnp.sum(n) for n in numerators], examples))
    totals = psum(jax.tree.map(jnp.sum, (numerators, denominators)), examples)
    return sum(n / jnp.where(d == 0, 1, d) for n, d in zip(*totals))
