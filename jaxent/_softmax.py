"""The primitive of a row of logits: its total, entropy, target logit and target sums.

With z the logits (soft-capped, if asked), s the row's shift, y its target class and q a
target mass over classes:

    total      = sum_c exp(z_c - s)
    entropy    = log(total) - sum_c p_c * (z_c - s),  p_c = exp(z_c - s) / total
    picked     = z_y - s
    mass_sum   = sum_c q_c
    target_sum = sum_c q_c * (z_c - s)

Cross-entropy is `log(total) - picked` for a class index, and for a mass
`mass_sum * log(total) - target_sum`. All are relative to the shift, the row's maximum, so
nothing is lost where logits are large. The shift is a constant to differentiation:
cross-entropy does not depend on it.

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

from ._axes import vary_alike


def compute_dtype(*arrays: Any):
    """float64 if one has dtype float64, else float32."""
    return jnp.dtype("float64" if any(x.dtype == jnp.float64 for x in arrays) else "float32")


def unless_zero(factor, value):
    """`value`, but 0 where `factor` is 0 and `value` is not finite: 0 * inf is 0."""
    return jnp.where((factor == 0) & ~jnp.isfinite(value), 0, value)


def times(factor, value):
    """`factor * value`, and 0 with derivatives 0 where that would be 0 * inf."""
    return factor * unless_zero(factor, value)


def along(axis: int, ndim: int, values: Array) -> Array:
    """(C,) laid along `axis` of `ndim` dimensions: (1, C, 1, ...)."""
    return jnp.expand_dims(values, [i for i in range(ndim) if i != axis % ndim])


def pick(arrays: tuple, index: Array, axis: int, function: Callable = lambda x: x) -> Array:
    """`function(*arrays)`, of arrays and elementwise, at an index (..., 1, ...) along `axis`; any
    value where it is < 0.

    Arrays are (..., C, ...), or tables of one value a class, (1, C, 1, ...), or None. A gather on
    CPU, where a masked sum costs five times the log-sum. Elsewhere a masked sum, which fuses with
    a pass over the same function's values; and where an explicit mesh shards the classes, or the
    index alone, which refuses the gather.
    """

    def gather(arrays, index):
        index = jnp.maximum(index, 0)

        def take(values):
            if values.size == values.shape[axis]:
                return jnp.take(values.ravel(), index, mode="clip")
            return (_take_bits if values.dtype.itemsize == 2 else _take)(axis, values, index)

        return function(*(None if values is None else take(values) for values in arrays))

    def masked_sum(arrays, index):
        values = function(*arrays)
        return jnp.sum(jnp.where(_one_hot(index, values, axis), values, 0), axis, keepdims=True)

    spec = jax.typeof(index).sharding.spec
    if any(x is not None and jax.typeof(x).sharding.spec != spec for x in arrays):
        return masked_sum(arrays, index)
    return jax.lax.platform_dependent(arrays, index, cpu=gather, default=masked_sum)


def _take(axis, values, index):
    return jnp.take_along_axis(values, index, axis, mode="clip")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _take_bits(axis, values, index):
    """Of half precision, which XLA's gather on the CPU makes a float32 copy of (jax 0.10.2)."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16)
    return jax.lax.bitcast_convert_type(_take(axis, bits, index), values.dtype)


@_take_bits.defjvp
def _take_bits_jvp(axis, primals, tangents):
    (values, index), (d_values, _) = primals, tangents
    return _take_bits(axis, values, index), _take(axis, d_values, index)


def _one_hot(index, x, axis):
    return index == _class_numbers(x, axis)


def _class_numbers(x, axis):
    """The numbers of the classes, broadcastable to x, split as x is on an explicit mesh: else what
    is compared with them is whole on each device, or gathered (jax 0.10.2 for TPUs)."""
    numbers = along(axis, x.ndim, jnp.arange(x.shape[axis], dtype=jnp.int32))
    spec = jax.typeof(x).sharding.spec
    return numbers + jnp.zeros_like(x, jnp.int32) if spec and spec[axis] else numbers


def row_max(axis: int, softcap: float | None, x: Array, exists: Array | None) -> Array:
    """Each row's largest logit among the classes that exist, as a constant, (..., 1, ...).

    Finite where all of them are -inf, which is no reason for NaN in a shard of a row's classes.
    """
    x = jax.lax.stop_gradient(x)
    x = x if exists is None else jnp.where(exists, x, -jnp.inf)
    top = jnp.max(x, axis, keepdims=True).astype(compute_dtype(x))
    # A select, which XLA's CPU compiler leaves out of the reduction; with `maximum` in it, it takes
    # twice as long over the second of four dimensions (jax 0.10.2).
    return cap(softcap, jnp.where(top == -jnp.inf, jnp.finfo(top.dtype).min, top))


def _shown(x, exists):
    """x in float32, -inf where no class exists: the maximum's and the target's pass."""
    x = x.astype(compute_dtype(x))
    return x if exists is None else jnp.where(exists, x, -jnp.inf)


def first_best(scores: Array, axis: int) -> Array:
    """The first class of the largest score, as argmax; which, of sharded classes, gathers."""
    top = jnp.max(scores, axis, keepdims=True)
    best = (scores == top) | jnp.isnan(scores)
    numbers = jnp.where(best, _class_numbers(scores, axis), scores.shape[axis])
    return jnp.min(numbers, axis, keepdims=True)


def _centre(softcap, x, shift, exists):
    """z - shift; -inf where no class exists."""
    x = x.astype(compute_dtype(x))
    if shift is None:  # log-probabilities: nothing to normalize
        return x
    centred = cap(softcap, x) - shift
    return centred if exists is None else jnp.where(exists, centred, -jnp.inf)


# Second order comes through the next four. Where a row is not finite their derivatives are: it
# may be one that the loss does not count; if it counts, its NaN shows in the other factors.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def cap(softcap, x):
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


@cap.defjvp
def _cap_jvp(softcap, primals, tangents):
    (x,), (dx,) = primals, tangents
    return cap(softcap, x), _slope(softcap, x) * dx


def _slope(softcap, x):
    if softcap is None:
        return 1
    tanh = jnp.tanh(jnp.where(jnp.isnan(x), 0, x.astype(compute_dtype(x))) / softcap)
    return (1 - tanh) * (1 + tanh)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _exponentials(softcap, x, shift, exists):
    return jnp.exp(_centre(softcap, x, shift, exists))


@_exponentials.defjvp
def _exponentials_jvp(softcap, primals, tangents):
    exps = _exponentials(softcap, *primals)
    return exps, jnp.where(jnp.isfinite(exps), exps * _slope(softcap, primals[0]), 0) * tangents[0]


@jax.custom_jvp
def log(total):
    return jnp.log(total)


@log.defjvp
def _log_jvp(primals, tangents):
    (total,), (d_total,) = primals, tangents
    return log(total), d_total / jnp.where(_has_log(total), total, 1)


def _has_log(total):
    return (total > 0) & (total < jnp.inf)


@jax.custom_jvp
def product(q, centred):
    return times(q, centred)


@product.defjvp
def product_jvp(primals, tangents):
    (q, centred), (dq, d_centred) = primals, tangents
    return product(q, centred), q * d_centred + dq * jnp.where(jnp.isfinite(centred), centred, 0)


class RowSums(NamedTuple):
    """Sums of the rows, or their cotangents; None for those not asked for."""

    total: Any = None
    entropy: Any = None
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
    softcap: float | None,
    x: Array,
    shift: Array | None,
    exists: Array | None,
    index: Array | None,
    mass: Callable[[Any], Array] | None,
    entropy: bool = False,
) -> RowSums:
    """The sums of each row, (..., 1, ...), those that are asked for.

    Args:
      axis: the class axis.
      softcap: the cap, or None.
      x: logits or log-probabilities, (..., C, ...), any float dtype.
      shift: what `row_max` returned; None says that x is log-probabilities already, and
        leaves the total out.
      exists: bool, (..., C, ...), broadcastable to x; None where all classes exist.
      index: int32, (..., 1, ...), < 0 for none; None leaves the picked logit out.
      mass: a `jax.tree_util.Partial` that takes `exists` and returns q, broadcastable to x;
        its arrays are differentiated through. None leaves both sums of it out.
      entropy: whether to return it.
    """
    shift, exists, index, mass, x = vary_alike(shift, exists, index, mass, x)
    asked = (shift is not None, entropy, index is not None, mass is not None)
    return _unpack(axis, asked, _row_sums(axis, softcap, entropy, x, shift, exists, index, mass))


# One array holds all sums: `vmap` gets the gradient of an unmapped argument wrong where some
# outputs of a custom_vjp are mapped and others are not (seen in jax 0.9.0 to 0.12.0).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _row_sums(axis, softcap, entropy, x, shift, exists, index, mass):
    return _row_sums_fwd(axis, softcap, entropy, x, shift, exists, index, mass)[0]


def _row_sums_fwd(axis, softcap, entropy, x, shift, exists, index, mass):
    sums, total, spread = [], None, None
    if shift is not None:
        total = jnp.sum(_exponentials(softcap, x, shift, exists), axis, keepdims=True)
        sums.append(total)
    if entropy:
        centred = _centre(softcap, x, shift, exists)
        exps = _exponentials(softcap, x, shift, exists)
        spread = log(total) - jnp.sum(product(exps, centred), axis, keepdims=True) / total
        sums.append(spread)
    if index is not None:
        known = None if exists is None else pick((exists,), index, axis, jnp.float32) > 0
        sums.append(_centre(softcap, pick((x, exists), index, axis, _shown), shift, known))
    if mass is not None:
        centred = _centre(softcap, x, shift, exists)
        q = unless_lost(mass(exists), centred)
        sums.append(jnp.sum(q, axis, keepdims=True))
        sums.append(jnp.sum(product(q, centred), axis, keepdims=True))
    return jnp.concatenate(sums, axis), (x, shift, exists, index, mass, total, spread)


def _row_sums_bwd(axis, softcap, entropy, residuals, cotangents):
    x, shift, exists, index, mass, total, spread = residuals
    x = _fresh(x, softcap, mass)
    asked = (shift is not None, entropy, index is not None, mass is not None)
    d_sums = poison(total, _unpack(axis, asked, cotangents))
    # Concatenated and hidden: else XLA's CPU compiler makes them again for each class.
    packed = jax.lax.optimization_barrier(jnp.concatenate(jax.tree.leaves(d_sums), axis))
    q, pull = (None, None) if mass is None else jax.vjp(lambda mass: mass(exists), mass)
    d_x, d_q = row_gradients(
        axis,
        softcap,
        x,
        shift,
        exists,
        index,
        q,
        total,
        spread,
        _unpack(axis, asked, packed),
    )
    d_mass = None if pull is None else pull(d_q)[0]
    return d_x.astype(x.dtype), None, None, None, d_mass


_row_sums.defvjp(_row_sums_fwd, _row_sums_bwd)


def _fresh(x, softcap, mass):
    """x, from which XLA makes again what the forward pass made where it would hold it for longer:
    beside a mass or a cap, float32 arrays of the logits' size (jax 0.10.2: for an H100, of capped
    ones; on CPUs, of both, but not of capped ones alone, of which it holds more when hidden)."""
    if mass is None and softcap is None:
        return x
    hidden = jax.lax.optimization_barrier
    kept = hidden if mass is not None else lambda x: x
    return jax.lax.platform_dependent(x, cpu=kept, default=hidden)


def poison(total: Any, d_sums: RowSums) -> RowSums:
    """Cotangents of the sums, NaN for a row that is counted and whose total has no logarithm."""
    if total is None:
        return d_sums
    lost = (d_sums.total != 0) & ~_has_log(total)
    return d_sums._replace(total=jnp.where(lost, jnp.nan, d_sums.total))


def row_gradients(
    axis, softcap, x, shift, exists, index, q, total, entropy, cotangents: RowSums
) -> tuple[Array, Array | None]:
    """The gradients of a loss with respect to logits and target mass, given those of the sums."""
    d_total, d_entropy, d_picked, d_mass_sum, d_target_sum = cotangents
    centred = _centre(softcap, x, shift, exists)
    # Zeros of the logits' sharding, which an explicit mesh wants a gradient to have.
    d_centred: Any = jnp.zeros_like(centred) if total is None else 0
    d_q = None
    if total is not None:
        exps = _exponentials(softcap, x, shift, exists)
        d_centred += times(d_total, exps)
        if entropy is not None:
            uncounted = (d_entropy == 0) & ~_has_log(total)
            probs = jnp.where(uncounted, 0, exps) / jnp.where(uncounted, 1, total)
            log_probs = jnp.where(uncounted, -jnp.inf, centred - log(total))
            d_centred -= d_entropy * product(probs, log_probs + entropy)
    if index is not None:
        # 0 * d_picked, so that the NaN of an index out of range reaches its whole row.
        d_centred += jnp.where(_one_hot(index, x, axis), d_picked, 0 * d_picked)
    if q is not None:
        # Its own sums: q broadcasts, and has no derivative where it meets an infinite loss.
        q, unspread = jax.vjp(lambda q: unless_lost(q, centred), q)
        d_centred += times(d_target_sum, q)
        (d_q,) = unspread(d_mass_sum + times(d_target_sum, unless_zero(q, centred)))
    d_x = d_centred * _slope(softcap, x)
    return d_x if exists is None else jnp.where(exists, d_x, 0), d_q


def _unpack(axis, asked, sums):
    """Slices of the sums; `asked` for total, entropy, picked logit, both sums of the mass."""
    parts = iter(jnp.split(sums, sums.shape[axis], axis))
    return RowSums(*(next(parts) if wanted else None for wanted in (*asked, asked[-1])))


def unless_lost(q, centred):
    """q, of the rows' shape; without derivative where no mass meets an infinite loss."""
    q = q.astype(centred.dtype)
    return jnp.where((q == 0) & ~jnp.isfinite(centred), 0, q)
