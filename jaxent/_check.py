"""check_targets: which target is out of range, and where."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from ._arguments import ArrayOrList, read_index_targets, read_positive, whole_numbers
from ._calls import public
from ._targets import read_indices


@public
def check_targets(
    targets: ArrayOrList, num_classes: int, *, ignore_index: int | None = -100
) -> None:
    """Raise where a target is neither in [0, C) nor ignored, and say which.

    The losses cannot raise in compiled code: such a target makes them NaN. This function finds it,
    once, before training, or in a step that gave NaN.

    Args:
      targets: class indices, integers of any shape. Concrete ones are checked at once. Traced
        ones (under `jit`, `vmap`, `grad`) are checked by `jax.experimental.checkify`: functionalize
        the step with `checkify.checkify`, or the check raises when JAX compiles it.
      num_classes: C.
      ignore_index: as in `jaxent.cross_entropy`.

    Raises:
      ValueError: a concrete target is out of range; the message has the first one, its place and
        how many there are.
      TypeError: `targets` are not integers, or `num_classes` is no Python integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> jaxent.check_targets(jnp.array([[3, -100], [9, 0]]), 10)
      >>> jaxent.check_targets(jnp.array([[3, -100], [10, -1]]), 10)
      Traceback (most recent call last):
      ...
      ValueError: targets[1, 0] is 10, outside [0, 10) and not ignore_index=-100; 2 of 4 targets are
    """
    num_classes = read_positive("num_classes", num_classes)
    wanted = "check_targets takes class indices; class probabilities may be any floats"
    read, ignored = read_index_targets(targets, ignore_index, wanted)
    allowed = "" if ignore_index is None else f" and not ignore_index={ignore_index}"
    outside = f"outside [0, {num_classes}){allowed}"
    if isinstance(read, Tracer):
        index, is_ignored = read_indices(read, num_classes, ignored)
        bad = ((index < 0) & ~is_ignored).ravel()
        first = jnp.argmax(bad) if bad.size else 0
        checkify.check(
            ~jnp.any(bad),
            "target {value}, the {place}th, is " + outside + "; {count} of {size} targets are",
            value=read.ravel()[first] if bad.size else jnp.asarray(0),
            place=jnp.asarray(first),
            count=jnp.sum(bad),
            size=jnp.asarray(bad.size),
        )
        return
    # As they came: not cut to JAX's integers.
    whole = whole_numbers(targets)
    values = np.asarray(read if whole is None else whole)
    bad = ((values < 0) | (values >= num_classes)) & (values != ignore_index)
    if not bad.any():
        return
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    at = f"[{', '.join(map(str, place))}]" if place else ""
    raise ValueError(
        f"targets{at} is {values[place]}, {outside}; {int(bad.sum())} of {bad.size} targets are"
    )
