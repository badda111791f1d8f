"""Along the class axis."""

import jax.numpy as jnp
from jax import Array


def along(axis: int, ndim: int, values: Array) -> Array:
    """Return (C,) laid along `axis` of `ndim` dimensions: (1, C, 1, ...)."""
    return jnp.expand_dims(values, [i for i in range(ndim) if i != axis % ndim])
