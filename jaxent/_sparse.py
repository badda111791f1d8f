"""Targets of few classes: which they are, and how probable each is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.typing import ArrayLike


class SparseTargets(NamedTuple):
    """Class probabilities that are 0 for all but K classes an example, as a teacher's top K.

    They equal a float array of probabilities with these K entries, which is never made.

    Args:
      indices: class indices, integers, (..., K), where (...) is the shape of the examples: that of
        the logits without the class axis. K is the last axis whatever the class axis is. A class
        that is there twice has the sum of both probabilities. An index that equals `ignore_index`
        is an empty place: it has no mass, whatever its probability is. An example all of whose
        places are empty is not counted, as one of padding is not. Any other index outside [0, C)
        makes its example NaN, whatever its probability is, 0 too.
      probabilities: float, (..., K), taken as given: they need be neither non-negative nor
        normalized.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> targets = jaxent.SparseTargets(jnp.array([[7, 2]]), jnp.array([[0.75, 0.25]]))
      >>> jaxent.cross_entropy(jnp.zeros((1, 8)), targets) / jnp.log(2)
      Array(3., dtype=float32)
    """

    indices: ArrayLike | Sequence[Any]
    probabilities: ArrayLike | Sequence[Any]
