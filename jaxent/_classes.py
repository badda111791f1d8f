"""Along the class axis: a value a class, and the first of the best."""

import jax.numpy as jnp
from jax import Array

from ._xla import class_numbers


def along(axis: int, ndim: int, values: Array) -> Array:
    """Return (C,) laid along `axis` of `ndim` dimensions: (1, C, 1, ...)."""
    return jnp.expand_dims(values, [i for i in range(ndim) if i != axis % ndim])


def first_best(scores: Array, axis: int) -> Array:
    """Return the first class of the largest score, without argmax, which gathers split classes."""
    top = jnp.max(scores, axis, keepdims=True)
    best = (scores == top) | jnp.isnan(scores)
    numbers = jnp.where(best, class_numbers(scores, axis), scores.shape[axis])
    return jnp.min(numbers, axis, keepdims=True)
