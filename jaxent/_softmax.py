"""The primitive of a row of logits: its total, moment, target logit and target sums.

With z the logits (soft-capped, if asked), s the row's shift, y its target class and q a
target mass over classes:

    total      = sum_c exp(z_c - s)
    moment     = sum_c exp(z_c - s) * (z_c - s)
    picked     = z_y - s
    mass_sum   = sum_c q_c
    target_sum = sum_c q_c * (z_c - s)

Cross-entropy is `log(total) - picked` for a class index, and for a mass
`mass_sum * log(total) - target_sum`; the entropy is `log(total) - moment / total`. All are
relative to the shift, the row's maximum, so nothing is lost where logits are large. The shift is
a constant to differentiation: cross-entropy does not depend on it.

Gradients are written by hand so that the logits are kept as they came (bfloat16 stays
bfloat16) and rounded to once, and so that a row which the loss does not count gets
gradient 0 whatever it holds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ._axes import meshes, vary_alike, vary_like, zeros_like
from ._classes import one_hot, pick
from ._numerics import blank_uncounted, compute_dtype, times, unless_zero


def row_max(axis: int, softcap: Any, x: Array, exists: Array | None) -> Array:
    """Each row's largest logit among the classes that exist, as a constant, (..., 1, ...).

    Finite where all of them are -inf, which is no reason for NaN in a shard of a row's classes; and
    in a row of NaN, as an eager gradient keeps it: it comes out of a program, where
    `jax_debug_nans` sees it.
    """
    x = jax.lax.stop_gradient(x)
    x = x if exists is None else jnp.where(exists, x, -jnp.inf)
    axis %= x.ndim
    top = jax.lax.expand_dims(jax.lax.reduce_max(x, (axis,)), (axis,)).astype(compute_dtype(x))
    low = jnp.finfo(top.dtype).min
    # What is asked of the row's target here, XLA's CPU compiler would ask for each class again.
    return cap(softcap, jnp.where(top > low, top, low))


def _shown(x, exists):
    """x in float32, -inf where no class exists: the maximum's and the target's pass."""
    x = x.astype(compute_dtype(x))
    return x if exists is None else jnp.where(exists, x, -jnp.inf)


def _centre(softcap, x, shift, exists):
    """z - shift; -inf where no class exists."""
    x = x.astype(compute_dtype(x))
    if shift is None:  # log-probabilities: nothing to normalize
        return x
    centred = cap(softcap, x) - shift
    return centred if exists is None else jnp.where(exists, centred, -jnp.inf)


# Second order comes through the next three. Where a row is not finite their derivatives are: it
# may be one that the loss does not count; if it counts, its NaN shows in the other factors.


def cap(softcap, x):
    return x if softcap is None else _cap(jnp.asarray(softcap, x.dtype), x)


@jax.custom_jvp
def _cap(softcap, x):
    return softcap * jnp.tanh(x / softcap)


@_cap.defjvp
def _cap_jvp(primals, tangents):
    return _cap(*primals), _slope(*primals) * tangents[1]


def _slope(softcap, x):
    if softcap is None:
        return 1
    x = x.astype(compute_dtype(x))
    tanh = jnp.tanh(jnp.where(jnp.isnan(x), 0, x) / jnp.asarray(softcap, x.dtype))
    return (1 - tanh) * (1 + tanh)


@jax.custom_jvp
def _exponentials(x, softcap, shift, exists):
    return jnp.exp(_centre(softcap, x, shift, exists))


@_exponentials.defjvp
def _exponentials_jvp(primals, tangents):
    exps = _exponentials(*primals)
    slope = _slope(primals[1], primals[0])
    return exps, jnp.where(jnp.isfinite(exps), exps * slope, 0) * tangents[0]


def has_log(total):
    return (total > 0) & (total < jnp.inf)


@jax.custom_jvp
def product(q, centred):
    return times(q, centred)


@product.defjvp
def _product_jvp(primals, tangents):
    return product(*primals), _product_tangent(*primals, *tangents)


def _product_tangent(q, centred, dq, d_centred):
    return q * d_centred + dq * jnp.where(jnp.isfinite(centred), centred, 0)


@jax.custom_jvp
def _scaled(d_total, exps):
    """`d_total * exps`, 0 where that is 0 * NaN.

    A poisoned d_total is not 0 only where all exps are finite.

    Said so, it is short enough for XLA's CPU compiler to vectorize ten classes of bfloat16, in a
    quarter of the time (jax 0.10.2).
    """
    scaled = d_total * exps
    return jnp.where(jnp.isnan(scaled), 0 * d_total, scaled)


@_scaled.defjvp
def _scaled_jvp(primals, tangents):
    return _scaled(*primals), _product_tangent(*primals, *tangents)


class RowSums(NamedTuple):
    """Sums of the rows, or their cotangents; None for those not asked for."""

    total: Any = None
    moment: Any = None
    picked: Any = None
    mass_sum: Any = None
    target_sum: Any = None


def hide(where: Array, shift: Any, sums: RowSums) -> tuple[Any, RowSums]:
    """Shift and sums, those of a row of nothing in these rows."""
    blank = RowSums(1, 0, 0, 0, 0)
    sums = RowSums(*(x if x is None else jnp.where(where, b, x) for b, x in zip(blank, sums)))
    return None if shift is None else jnp.where(where, 0, shift), sums


def row_sums(
    axis: int,
    softcap: Any,
    x: Array,
    shift: Array | None,
    exists: Array | None,
    index: Array | None,
    mass: Callable[[Any], Array] | None,
    moment: bool = False,
) -> RowSums:
    """The sums of each row, (..., 1, ...), those that are asked for.

    Args:
      axis: the class axis.
      softcap: the cap, a number, or None.
      x: logits or log-probabilities, (..., C, ...), any float dtype.
      shift: what `row_max` returned; None says that x is log-probabilities already, and
        leaves the total out.
      exists: bool, (..., C, ...), broadcastable to x; None where all classes exist.
      index: int32, (..., 1, ...), < 0 for none; None leaves the picked logit out.
      mass: a `jax.tree_util.Partial` that takes `exists` and returns q, broadcastable to x;
        its arrays are differentiated through. None leaves both sums of it out.
      moment: whether to return it.
    """
    arguments = vary_alike(x, softcap, shift, exists, index, mass)
    asked = (shift is not None, moment, index is not None, mass is not None)
    return _unpack(axis, asked, _row_sums(axis, moment, *arguments))


# One array holds all sums: `vmap` gets the gradient of an unmapped argument wrong where some
# outputs of a custom_vjp are mapped and others are not (seen in jax 0.9.0 to 0.12.0).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _row_sums(axis, moment, x, softcap, shift, exists, index, mass):
    return _packed_sums(axis, moment, x, softcap, shift, exists, index, mass)


def _row_sums_fwd(axis, moment, *arguments):
    packed = _packed_sums(axis, moment, *arguments)
    return packed, arguments


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced once for both of these
def _packed_sums(axis, moment, x, softcap, shift, exists, index, mass):
    def in_one_pass(x, softcap, shift, exists, index, mass):
        terms = _terms(axis, softcap, moment, x, shift, exists, index, mass)
        mass_sum = None if mass is None else _sum(axis, terms.mass_sum)
        return _sum_at_once(axis, terms._replace(mass_sum=None))._replace(mass_sum=mass_sum)

    def one_by_one(x, softcap, shift, exists, index, mass):
        terms = _terms(axis, softcap, moment, x, shift, exists, None, mass)
        sums = jax.tree.map(functools.partial(_sum, axis), terms)
        if index is None:
            return sums
        known = None if exists is None else pick((exists,), index, axis, jnp.float32) > 0
        target = pick((x, exists), index, axis, _shown)
        return sums._replace(picked=_centre(softcap, target, shift, known))

    arguments = x, softcap, shift, exists, index, mass
    several = mass is not None or (shift is not None and (moment or index is not None))
    if several and _is_unrolled(axis, x, mass):
        sums = jax.lax.platform_dependent(*arguments, cpu=in_one_pass, default=one_by_one)
    else:
        sums = one_by_one(*arguments)
    return jax.lax.concatenate(jax.tree.leaves(sums), axis % x.ndim)


def _terms(axis, softcap, moment, x, shift, exists, index, mass):
    """What is summed over the classes."""
    centred = _centre(softcap, x, shift, exists)
    exps = None if shift is None else _exponentials(x, softcap, shift, exists)
    q = None if mass is None else unless_lost(mass(exists), centred)
    return RowSums(
        total=exps,
        moment=product(exps, centred) if moment else None,
        picked=None if index is None else jnp.where(one_hot(index, x, axis), centred, 0),
        mass_sum=q,
        target_sum=None if q is None else product(q, centred),
    )


def _sum(axis, term):
    axis %= term.ndim
    return jax.lax.expand_dims(jax.lax.reduce_sum(term, (axis,)), (axis,))


def _is_unrolled(axis, x, mass):
    """Whether a CPU is to sum all terms in one loop, which XLA unrolls for few classes.

    Over a second axis of 21 it is 3 to 40 times faster than sums one by one, which XLA gives to a
    library (jax 0.10.2). That is slow at products of a table on any axis but the last, by 30 times
    for 21 classes; without them it is the faster one for many. Not on a mesh, which may split the
    classes: XLA gathers what it cannot add up.
    """
    return not meshes(x) and (_are_few(axis, x) or (mass is not None and not _is_last(axis, x)))


def _are_few(axis, x):
    """On a CPU, 16 classes on the last axis, and 24 on another, are still unrolled (jax 0.10.2)."""
    size = x.shape[axis]
    return isinstance(size, int) and size <= (16 if _is_last(axis, x) else 24)


def _is_last(axis, x):
    return axis % x.ndim == x.ndim - 1


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_at_once(axis, terms):
    leaves, structure = jax.tree.flatten(terms)
    axis %= leaves[0].ndim
    zeros = vary_like(leaves[0], tuple(jnp.zeros((), leaf.dtype) for leaf in leaves))
    sums = jax.lax.reduce(tuple(leaves), zeros, _add, (axis,))
    return jax.tree.unflatten(structure, [jnp.expand_dims(x, axis) for x in sums])


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


@_sum_at_once.defjvp
def _sum_at_once_jvp(axis, primals, tangents):
    d_sums = jax.tree.map(functools.partial(_sum, axis), tangents[0])
    return _sum_at_once(axis, *primals), d_sums


def _row_sums_bwd(axis, moment, residuals, cotangents):
    x, softcap, shift, exists, index, mass = residuals
    x = _fresh(axis, softcap, x, mass)
    asked = (shift is not None, moment, index is not None, mass is not None)
    # Hidden: else XLA's CPU compiler makes them again for each class.
    packed = jax.lax.optimization_barrier(cotangents)
    q, pull = (None, None) if mass is None else jax.vjp(lambda mass: mass(exists), mass)
    d_x, d_q = row_gradients(
        axis,
        softcap,
        x,
        shift,
        exists,
        index,
        q,
        _unpack(axis, asked, packed),
    )
    d_mass = None if pull is None else pull(d_q)[0]
    return d_x.astype(x.dtype), None, None, None, None, d_mass


_row_sums.defvjp(_row_sums_fwd, _row_sums_bwd)


def _fresh(axis, softcap, x, mass):
    """x, from which XLA makes again what the forward pass made where it would hold it for longer:
    beside a mass or a cap, float32 arrays of the logits' size (jax 0.10.2: for an H100, of capped
    ones; on CPUs, of both, but not of capped ones alone, of which it holds more when hidden).
    Of few classes, CPUs make them again vectorized where their axis is not the last.
    """
    hide_on_cpu = mass is not None
    if _are_few(axis, x):
        hide_on_cpu = not _is_last(axis, x)
    hide_elsewhere = mass is not None or softcap is not None
    if not hide_on_cpu and not hide_elsewhere:
        return x
    hidden, same = jax.lax.optimization_barrier, lambda x: x
    return jax.lax.platform_dependent(
        x, cpu=hidden if hide_on_cpu else same, default=hidden if hide_elsewhere else same
    )


def row_gradients(
    axis, softcap, x, shift, exists, index, q, cotangents: RowSums
) -> tuple[Array, Array | None]:
    """The gradients of a loss with respect to logits and target mass, given those of the sums."""
    d_total, d_moment, d_picked, d_mass_sum, d_target_sum = cotangents
    centred = _centre(softcap, x, shift, exists)
    # Zeros of the logits' sharding, which an explicit mesh wants a gradient to have.
    d_centred: Any = zeros_like(centred) if shift is None else 0
    d_q = None
    if shift is not None:
        exps = _exponentials(x, softcap, shift, exists)
        d_centred += _scaled(d_total, exps)
        if d_moment is not None:
            d_centred += _scaled(d_moment, exps + product(exps, centred))
    if index is not None:
        # 0 * d_picked, so that the NaN of an index out of range reaches its whole row.
        d_centred += jnp.where(one_hot(index, x, axis), d_picked, 0 * d_picked)
    if q is not None:
        # Its own sums: q broadcasts, and has no derivative where it meets an infinite loss.
        q, unspread = jax.vjp(lambda q: unless_lost(q, centred), q)
        d_centred += d_target_sum * blank_uncounted(d_target_sum, q)
        by_logit = blank_uncounted(d_target_sum, unless_zero(q, centred))
        (d_q,) = unspread(d_mass_sum + d_target_sum * by_logit)
    d_x = d_centred * _slope(softcap, x)
    return d_x if exists is None else jnp.where(exists, d_x, 0), d_q


def _unpack(axis, asked, sums):
    """Slices of the sums; `asked` for total, moment, picked logit, both sums of the mass."""
    parts = iter(jnp.split(sums, sums.shape[axis], axis))
    return RowSums(*(next(parts) if wanted else None for wanted in (*asked, asked[-1])))


@jax.custom_jvp
def unless_lost(q, centred):
    """q, of the rows' shape; without derivative where no mass meets an infinite loss."""
    return q.astype(centred.dtype) + zeros_like(centred)  # which has the sharding, too


@unless_lost.defjvp
def _unless_lost_jvp(primals, tangents):
    (q, centred), (dq, _) = primals, tangents
    lost = (q == 0) & ~jnp.isfinite(centred)
    return unless_lost(q, centred), jnp.where(lost, 0, dq.astype(centred.dtype))
