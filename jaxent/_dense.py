"""The primitive of a row of logits that is there: its shift, its class apart and its sums.

Gradients are written by hand so that the logits are kept as they came (bfloat16 stays bfloat16) and
rounded to once, and so that a row which the loss does not count gets gradient 0 whatever it holds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _xla
from ._axes import vary_alike
from ._numerics import compute_dtype, finite_exp
from ._rows import (
    Places,
    RowSums,
    Transform,
    add_places,
    centre,
    centre_at,
    exponentials,
    first_best,
    product,
    row_gradients,
    without_infinite_derivative,
)
from ._targets import TargetMass


def row_max(
    axis: int, transform: Transform, x: Array, class_mask: Array | None, with_class: bool = False
) -> tuple[Array, Array, Any]:
    """Return each row's shift, largest z among the classes that exist, and its first class.

    They are constants, (..., 1, ...); the class is int32, None unless asked for, and NaN is above
    all. The shift is the largest z, finite where all logits are -inf, which is no reason for NaN
    in a shard of a row's classes; and in a row of NaN, as an eager gradient keeps it: it comes out
    of a program, where `jax_debug_nans` sees it.
    """
    x, transform = jax.lax.stop_gradient((x, transform))
    first = _first_capped if with_class else None
    top, *best = _xla.row_max(axis, _scaled, first, x, class_mask, transform)
    top = transform.capped(top.astype(compute_dtype(x)))
    low = jnp.finfo(top.dtype).min
    # What is asked of the row's target here, XLA's CPU compiler would ask for each class again.
    return jnp.where(top > low, top, low), top, best[0] if best else None


def _scaled(x: Array, class_mask: Any, transform: Transform) -> Array:
    """Return the scaled logits, of which the cap is a monotone function."""
    scaled = x if transform.scale is None else transform.scaled(x)
    return scaled if class_mask is None else jnp.where(class_mask, scaled, -jnp.inf)


def _first_capped(scaled: Array, axis: int, transform: Transform) -> Array:
    return first_best(transform.capped(scaled.astype(compute_dtype(scaled))), axis)


def row_sums(
    axis: int,
    transform: Transform,
    x: Array,
    shift: Array | None,
    class_mask: Array | None,
    index: tuple[Array | None, Array | None],
    mass: TargetMass | None,
    places: Places | None,
    moment: bool = False,
) -> RowSums:
    """Return the sums of each row, (..., 1, ...), those that are asked for.

    Args:
      axis: the class axis.
      transform: what becomes of a logit; its scale is differentiated.
      x: logits or log-probabilities, (..., C, ...), any float dtype.
      shift: what `row_max` returned; None says that x is log-probabilities already, and
        leaves the others out.
      class_mask: bool, (..., C, ...), broadcastable to x; None where all classes exist.
      index: int32, (..., 1, ...), < 0 for none: of the class apart, and of a target that may be
        another one; None leaves them out.
      mass: of the targets. It is that of all classes where the class apart is the target.
      places: few classes that have more mass, of targets that are probabilities.
      moment: whether to return it.
    """
    arguments = vary_alike(x, transform, shift, class_mask, index, mass, places)
    return _unpacked(axis, moment, arguments, _row_sums(axis, moment, *arguments))


def _unpacked(axis: int, moment: bool, arguments: Any, packed: Any) -> RowSums:
    _, _, shift, _, (apart, target), mass, places = arguments
    has_mass = mass is not None or places is not None
    asked = RowSums(
        left=_zero_if(apart is not None),
        others=_zero_if(shift is not None),
        moment=_zero_if(moment),
        target=_zero_if(target is not None),
        left_mass=_zero_if(keeps_mass_apart(shift, mass, places)),
        mass=_zero_if(has_mass),
        mass_logit=_zero_if(has_mass),
    )
    sums: RowSums = _xla.unpacked(jax.tree.structure(asked), packed, axis)
    return sums


def _zero_if(asked: bool) -> int | None:
    return 0 if asked else None


def keeps_mass_apart(shift: Any, mass: TargetMass | None, places: Places | None) -> bool:
    """Return whether the sums have the mass of the class apart by itself: not beside an index."""
    has_probabilities = mass is not None and mass.probabilities is not None
    return shift is not None and (has_probabilities or places is not None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _row_sums(axis: int, moment: bool, *arguments: Any) -> Any:
    return _packed_sums(axis, moment, _form(axis, moment, arguments, False), *arguments)


def _row_sums_fwd(axis: int, moment: bool, *arguments: Any) -> tuple[Any, Any]:
    packed = _packed_sums(axis, moment, _form(axis, moment, arguments, True), *arguments)
    return packed, arguments


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _packed_sums(axis: int, moment: bool, form: str, x: Array, *rest: Any) -> Any:
    one_loop = functools.partial(_in_one_loop, axis, moment)
    one_by_one = functools.partial(set_sums, axis, moment, form=form)
    _, shift, _, (apart, _), mass, _ = rest
    several = mass is not None or (shift is not None and (moment or apart is not None))
    if several:
        sums = _xla.in_one_loop(axis, mass is not None, one_loop, one_by_one, x, *rest)
    else:
        sums = one_by_one(x, *rest)
    return _xla.packed(sums, axis)


def _form(axis: int, moment: bool, arguments: Any, with_gradient: bool) -> str:
    """How a CPU sums up the exponentials."""
    x, *_, mass, _ = arguments
    may_keep = with_gradient and mass is None
    return _xla.sum_form(axis, x, may_keep, mass is not None, _is_smoothing(mass), moment)


def _is_smoothing(mass: TargetMass | None) -> bool:
    """Return whether the mass is what smoothing spreads beside an index."""
    return mass is not None and mass.probabilities is None


def set_sums(
    axis: int,
    moment: bool,
    x: Array,
    transform: Transform,
    shift: Any,
    class_mask: Any,
    index: tuple[Any, Any],
    mass: TargetMass | None,
    places: Places | None,
    form: str | None = None,
) -> RowSums:
    """Return the sums of a set of classes; an index outside of [0, C) is that of another set.

    `form` says how a CPU sums up the exponentials.
    """
    apart: Any = index[0]
    target: Any = index[1]
    left: Any = None
    others: Any = None
    if shift is not None:
        form = form or _form(axis, moment, (x, mass, None), False)
        functions = centre, centre_at, exponentials
        left, others = _xla.apart_and_others(
            axis, form, functions, x, class_mask, shift, transform, apart
        )
        left = jnp.where(_xla.is_inside(apart, axis, x), left, -jnp.inf)
    elif apart is not None:
        left = centre_at(transform, x, shift, class_mask, apart, axis)
    sums = RowSums(left=left, others=others)
    if target is not None:
        logit = centre_at(transform, x, shift, class_mask, target, axis)
        sums = sums._replace(target=jnp.where(_xla.is_inside(target, axis, x), logit, 0))
    if moment and apart is not None:
        arguments = x, class_mask, shift, transform, apart
        sums = sums._replace(moment=_xla.moment_of_others(axis, _moments, *arguments))
    if mass is not None:
        q = mass.values(class_mask)
        arguments = x, class_mask, shift, transform, q
        mass_sum, mass_logit = _xla.mass_sums(axis, _mass_terms, centre, *arguments)
        sums = sums._replace(mass=mass_sum, mass_logit=mass_logit)
        if keeps_mass_apart(shift, mass, places) and apart is not None:
            left_mass = mass.at(apart, axis, class_mask).astype(q.dtype)
            left_mass = jnp.where(_xla.is_inside(apart, axis, x), left_mass, 0)
            sums = sums._replace(
                left_mass=left_mass,
                mass=sums.mass - left_mass,
                mass_logit=sums.mass_logit - product(left_mass, left),
            )
    if places is not None:
        sums = add_places(sums, axis, transform, x, shift, class_mask, apart, places)
    return sums


def _mass_terms(
    x: Array, class_mask: Any, shift: Any, transform: Transform, q: Array
) -> tuple[Array, Array]:
    """Return the target mass of the logits' shape, and q * (z - shift)."""
    centred = centre(transform, x, shift, class_mask)
    q = without_infinite_derivative(q, centred)
    return q, product(q, centred)


def _moments(transform: Transform, x: Array, shift: Any, class_mask: Any) -> Array:
    """Return exp(z - shift) * (z - shift), 0 where z is -inf, which a select would make slower.

    Below the floor the exponential is 0, and the floor can be multiplied without overflow.
    """
    centred = centre(transform, x, shift, class_mask)
    floor = -2 * np.log(jnp.finfo(centred.dtype).max)  # -177 in float32, of exponentials above -104
    return exponentials(transform, x, shift, class_mask) * jnp.maximum(centred, floor)


def _in_one_loop(
    axis: int,
    moment: bool,
    x: Array,
    transform: Transform,
    shift: Any,
    class_mask: Any,
    index: tuple[Any, Any],
    mass: TargetMass | None,
    places: Places | None,
) -> RowSums:
    """Return what `set_sums` does, all sums in one loop over few classes."""
    apart, target = index
    centred = centre(transform, x, shift, class_mask)
    is_apart: Any = None if apart is None else _xla.one_hot(apart, x, axis)
    taken_out = _form(axis, moment, (x, mass, None), False) == "taken out"
    exps: Any = None
    if shift is not None:
        exps = exponentials(transform, x, shift, class_mask)
        exps = exps if taken_out else jnp.where(is_apart, 0, exps)
    q: Any = None
    left_mass: Any = None
    mass_logit: Any = None
    if mass is not None:
        q = without_infinite_derivative(mass.values(class_mask), centred)
        mass_logit = product(q, centred)
        if keeps_mass_apart(shift, mass, places):
            left_mass = jnp.where(is_apart, q, 0)
            mass_logit = jnp.where(is_apart, 0, mass_logit)
            q = jnp.where(is_apart, 0, q)
    terms = RowSums(
        left=None if apart is None else jnp.where(is_apart, centred, 0),
        others=exps,
        moment=product(exps, centred) if moment else None,
        target=None if target is None else jnp.where(_xla.one_hot(target, x, axis), centred, 0),
        left_mass=left_mass,
        mass_logit=mass_logit,
    )
    sums: RowSums = _xla.sum_at_once(axis, terms)
    if apart is not None and shift is not None:
        sums = sums._replace(left=jnp.where(_xla.is_inside(apart, axis, x), sums.left, -jnp.inf))
        if taken_out:
            sums = sums._replace(others=sums.others - finite_exp(sums.left))
    if q is not None:
        sums = sums._replace(mass=_xla.sum_classes(axis, q))
    if places is not None:
        sums = add_places(sums, axis, transform, x, shift, class_mask, apart, places)
    return sums


def _row_sums_bwd(axis: int, moment: bool, arguments: Any, cotangents: Any) -> tuple[Any, ...]:
    x, transform, shift, class_mask, index, mass, places = arguments
    x, shift = _xla.computed_again(
        axis, x, class_mask, shift, transform, mass is not None, _is_smoothing(mass)
    )
    cotangents = _unpacked(axis, moment, arguments, _xla.once_per_row(cotangents))
    q: Any = None
    pull: Any = None
    if mass is not None:
        q, pull = jax.vjp(lambda mass: mass.values(class_mask), mass)
    masked = _form(axis, moment, arguments, True) == "masked"
    gradients = row_gradients(
        axis, transform, x, shift, class_mask, index, q, cotangents, x.dtype, places, masked
    )
    d_mass = None if pull is None else pull(gradients.mass)[0]
    d_places = None if places is None else Places(None, gradients.places)
    return gradients.x, gradients.transform, None, None, None, d_mass, d_places


_row_sums.defvjp(_row_sums_fwd, _row_sums_bwd)
