"""The algebra of a row, whole: sums over a set of classes, and what a loss makes of them.

With z the scaled and capped logits, m the row's shift, q a target mass over classes, and e one
class of the set that is kept apart from the others:

    left       = z_e - m, -inf where the set has no such class
    others     = sum_{c != e} exp(z_c - m)
    moment     = sum_{c != e} exp(z_c - m) * (z_c - m)
    target     = z_y - m, 0 where the set does not have class y
    left_mass  = q_e
    mass       = sum_{c != e} q_c
    mass_logit = sum_{c != e} q_c * (z_c - m)

The class apart is the target, or the most probable class where there is no single target. Where it
is nearly certain its share is exp(0) = 1, and a small rest would lose its digits if it were added.
The loss of the class apart is log1p(others * exp(-left)), with the derivative -others / (1 +
others) where it is largest, and never the difference of two numbers near 1. (Beside an index,
smoothing's mass is summed over all classes: no such loss is small.)

Sums of two sets are added, once both are moved to the larger shift (`rebase`) and the class that
does not stay apart is put back (`put_back`). The shift is a constant to differentiation: no loss
depends on it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ._axes import Names, first_class, local_index, psum
from ._numerics import blank_uncounted, compute_dtype, finite_exp, safe_multiply, safe_value
from ._xla import (
    class_numbers,
    is_inside,
    one_hot,
    put_at_class,
    rounded,
    sum_classes,
    take_class,
    zeros_like,
)


class Transform(NamedTuple):
    """What becomes of a logit x: z = cap * tanh(scale * x / cap), or part of it.

    The scale is differentiated, the cap is not. None leaves a part out.
    """

    scale: Any = None
    cap: Any = None

    @classmethod
    def of(cls, scale: Any, cap: Any, dtype: Any) -> "Transform":
        """Return it with the scale in the dtype of the losses, as the functions here need it."""
        return cls(None if scale is None else jnp.asarray(scale, dtype), cap)

    def __call__(self, x: Array) -> Array:
        """Return z, in float32 or float64."""
        x = x.astype(compute_dtype(x))
        return x if self.is_identity else _transformed(self, x)

    @property
    def is_identity(self) -> bool:
        return self.scale is None and self.cap is None

    def scaled(self, x: Array) -> Array:
        """Return scale * x."""
        x = x.astype(compute_dtype(x))
        return x if self.scale is None else rounded(self.scale * x)

    def capped(self, scaled: Array) -> Array:
        """Return the cap of scale * x, a monotone function of it."""
        if self.cap is None:
            return scaled
        cap = jnp.asarray(self.cap, scaled.dtype)
        # The minimum is the product. It keeps a CPU from making one operation of that and a
        # difference, as `rounded` does, without an array of bfloat16's.
        return jnp.minimum(cap * jnp.tanh(scaled / cap), cap)

    def cap_slope(self, x: Array) -> Any:
        """Return the derivative of the cap at scale * x, finite for every x."""
        if self.cap is None:
            return 1
        scaled = self.scaled(jnp.nan_to_num(x))  # finite, for the derivative of the scale
        tanh = jnp.tanh(scaled / jnp.asarray(self.cap, scaled.dtype))
        return (1 - tanh) * (1 + tanh)

    def slope(self, x: Array) -> Any:
        """Return dz/dx."""
        slope = self.cap_slope(x)
        return slope if self.scale is None else slope * self.scale

    def gradients(self, x: Array, d_z: Array) -> tuple[Array, "Transform"]:
        """Return the gradients of x and of the transform, given that of z."""
        d_x = d_z * self.slope(x)
        if self.scale is None:
            return d_x, Transform()
        d_scaled = d_z * self.cap_slope(x)
        x = x.astype(compute_dtype(x))
        return d_x, Transform(jnp.sum(d_scaled * blank_uncounted(d_scaled, x)))


# Second order comes through the custom_jvp functions here. Where a row is not finite their
# derivatives are: it may be one that the loss does not count; if it counts, its NaN shows in the
# other factors.


@jax.custom_jvp
def _transformed(transform: Transform, x: Array) -> Array:
    return transform.capped(transform.scaled(x))


@_transformed.defjvp
def _transformed_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _transformed(*primals), _transform_tangent(*primals, *tangents)


def _transform_tangent(transform: Transform, x: Array, d_transform: Transform, dx: Array) -> Array:
    tangent: Array = transform.slope(x) * dx
    if transform.scale is None:
        return tangent
    finite = jnp.where(jnp.isfinite(x), x, 0).astype(compute_dtype(x))
    by_scale: Array = transform.cap_slope(x) * finite * d_transform.scale
    return tangent + by_scale


def centre(transform: Transform, x: Array, shift: Any, class_mask: Any) -> Array:
    """Return z - shift, -inf where no class exists; x as it is where the shift is None."""
    if shift is None:
        return x.astype(compute_dtype(x))
    centred = transform(x) - shift
    return centred if class_mask is None else jnp.where(class_mask, centred, -jnp.inf)


def centre_at(
    transform: Transform,
    x: Array,
    shift: Any,
    class_mask: Any,
    index: Array,
    axis: int,
    take: Any = take_class,
) -> Array:
    """Return `centre` at a class of each row, any value where the index is < 0."""
    exists = None if class_mask is None else take((class_mask,), index, axis, jnp.float32) > 0

    def visible(x: Array, class_mask: Any) -> Array:
        x = x.astype(compute_dtype(x))
        return x if class_mask is None else jnp.where(class_mask, x, -jnp.inf)

    return centre(transform, take((x, class_mask), index, axis, visible), shift, exists)


@jax.custom_jvp
def exponentials(transform: Transform, x: Array, shift: Any, class_mask: Any) -> Array:
    """Return exp(z - shift)."""
    return jnp.exp(centre(transform, x, shift, class_mask))


@exponentials.defjvp
def _exponentials_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    exps = exponentials(*primals)
    d_z = _transform_tangent(*primals[:2], *tangents[:2])
    return exps, jnp.where(jnp.isfinite(exps), exps, 0) * d_z


@jax.custom_jvp
def product(q: Array, centred: Array) -> Array:
    """Return q * centred, 0 * inf being 0."""
    return safe_multiply(q, centred)


@product.defjvp
def _product_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return product(*primals), _product_tangent(*primals, *tangents)


def _product_tangent(q: Array, centred: Array, dq: Array, d_centred: Array) -> Array:
    finite_q, finite = (jnp.where(jnp.isfinite(x), x, 0) for x in (q, centred))
    return finite_q * d_centred + dq * finite


@jax.custom_jvp
def _scaled(d_others: Array, exps: Array) -> Array:
    """Return `d_others * exps`, 0 where that is 0 * NaN.

    A poisoned d_others is not 0 only where all exps are finite.

    Said so, it is short enough for XLA's CPU compiler to vectorize ten classes of bfloat16, in a
    quarter of the time (jax 0.10.2).
    """
    scaled = d_others * exps
    return jnp.where(jnp.isnan(scaled), 0 * d_others, scaled)


@_scaled.defjvp
def _scaled_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _scaled(*primals), _product_tangent(*primals, *tangents)


@jax.custom_jvp
def without_infinite_derivative(q: Array, centred: Array) -> Array:
    """Return q, of the rows' shape; without derivative where no mass meets an infinite loss."""
    return q.astype(centred.dtype) + zeros_like(centred)  # which has the sharding, too


@without_infinite_derivative.defjvp
def _without_infinite_derivative_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (q, centred), (dq, _) = primals, tangents
    lost = (q == 0) & ~jnp.isfinite(centred)
    return without_infinite_derivative(q, centred), jnp.where(lost, 0, dq.astype(centred.dtype))


class Places(NamedTuple):
    """Few classes of each row with their target mass: arrays (..., K, ...)."""

    index: Any  # int32, each class once at most; of one that x lacks the mass lies elsewhere
    mass: Any


class RowSums(NamedTuple):
    """Sums of rows, arrays (..., 1, ...), or their cotangents; None for those not asked for."""

    left: Any = None
    others: Any = None
    moment: Any = None
    target: Any = None
    left_mass: Any = None
    mass: Any = None
    mass_logit: Any = None

    def rebase(self, change: Any) -> "RowSums":
        """Return the sums relative to another shift, of which `change` is the old one less it."""
        factor = jnp.exp(change)
        sums = self._replace(
            left=_plus(self.left, change),
            others=_by(self.others, factor),
            target=_plus(self.target, change),
        )
        if self.moment is not None:
            moment = self.moment * factor + safe_multiply(self.others * factor, change)
            sums = sums._replace(moment=moment)
        if self.mass is not None:
            sums = sums._replace(mass_logit=self.mass_logit + safe_multiply(self.mass, change))
        return sums

    def put_back(self, where: Any) -> "RowSums":
        """Return the sums with the class apart among the others, where it is not to stay."""
        share = jnp.where(where, finite_exp(self.left), 0)
        sums = self._replace(left=jnp.where(where, -jnp.inf, self.left), others=self.others + share)
        if self.moment is not None:
            sums = sums._replace(moment=self.moment + product(share, self.left))
        if self.left_mass is not None:
            mass = jnp.where(where, self.left_mass, 0)
            sums = sums._replace(
                left_mass=jnp.where(where, 0, self.left_mass),
                mass=self.mass + mass,
                mass_logit=self.mass_logit + product(mass, self.left),
            )
        return sums

    def blank(self, where: Array) -> "RowSums":
        """Return the sums, in these rows those of a single class: its loss and its lse are 0."""
        blanked: RowSums = jax.tree.map(lambda x: jnp.where(where, 0, x), self)
        return blanked


def _plus(x: Any, change: Any) -> Any:
    return None if x is None else x + change


def _by(x: Any, factor: Any) -> Any:
    return None if x is None else x * factor


def merge(a: RowSums, b: RowSums, stays: Array, has_target: Any) -> RowSums:
    """Return the sums of both sets, relative to one shift.

    `stays` says whether the class apart is b's, `has_target` whether the target is.
    """
    left = jnp.where(stays, b.left, a.left)
    target = None if a.target is None else jnp.where(has_target, b.target, a.target)
    a, b = (x._replace(left=None, target=None) for x in (a.put_back(stays), b.put_back(~stays)))
    merged: RowSums = jax.tree.map(jnp.add, a, b)
    return merged._replace(left=left, target=target)


def combine_shards(
    shift: Any, sums: RowSums, index: Any, local_index: Any, uncounted: Any, names: Names
) -> tuple[Any, RowSums]:
    """Return shift and sums of whole rows, whose classes are split over mapped axes.

    Args:
      shift, sums: of this shard's classes, (..., 1, ...); shift None, of log-probabilities.
      index: pairs of class indices, of the class apart and of the target, each (..., 1, ...), < 0
        for none, or None.
      local_index: the same, relative to this shard's classes; < 0 for none, and for other shards'.
      uncounted: which rows the loss does not count. They may hold anything.
      names: the mapped axes; () if rows are whole already.

    Nothing but these, O(1) values a row, is sent; and in the backward pass nothing at all.
    """
    if not names:
        return shift, sums
    top: Any = None
    if shift is not None:
        top = jax.lax.pmax(jax.lax.stop_gradient(shift), names)
        change = shift - top
        lowest = jnp.finfo(shift.dtype).min  # finite, as 0 * NaN would be a derivative
        sums = sums.rebase(jnp.where(uncounted & ~jnp.isfinite(change), lowest, change))
    (apart, target), (here, target_here) = index, local_index
    if apart is not None and shift is not None:
        # An index that no shard has is left, for its NaN to reach the row's gradient.
        sums = sums.put_back((here < 0) & (apart >= 0))
    parts = sums._asdict()
    if apart is not None:
        parts["left"] = jnp.where((here < 0) & (apart >= 0), 0, sums.left)
    if target is not None:
        parts["target"] = jnp.where((target_here < 0) & (target >= 0), 0, sums.target)
    return top, RowSums(**psum(parts, names))


def combine_argmax(peak: Array, best: Array, num_classes: int, names: Names) -> tuple[Array, Array]:
    """Return the most probable class of whole rows, the first of equals, given each shard's own.

    The second array is the same relative to this shard's classes, -1 for another shard's. `peak` is
    that class's logit, on each shard; NaN is above all.
    """
    if not names:
        return best, best
    best = best.astype(jnp.int32) + first_class(num_classes, names)
    peak = jax.lax.stop_gradient(peak)
    largest = (peak == jax.lax.pmax(peak, names)) | jnp.isnan(peak)
    whole: Array = jax.lax.pmin(jnp.where(largest, best, jnp.iinfo(jnp.int32).max), names)
    return whole, local_index(whole, num_classes, names)


def first_best(scores: Array, axis: int) -> Array:
    """Return the first class of the largest score, as argmax, in a loop that a CPU makes fast."""
    top = jnp.max(scores, axis, keepdims=True)
    best = (scores == top) | jnp.isnan(scores)
    numbers = jnp.where(best, class_numbers(scores, axis), scores.shape[axis])
    return jnp.min(numbers, axis, keepdims=True)


def total(left: Array, others: Array) -> Array:
    """Return sum_c exp(z_c - m), of all classes."""
    return jnp.exp(left) + others


@jax.custom_jvp
def log_total(left: Array, others: Array) -> Array:
    """Return the logarithm of the total: log1p(others) where the class apart is the largest."""
    return _log_total(left, others)


def _log_total(left: Array, others: Array) -> Array:
    # Where left < 0, another class is the largest, and others >= 1: no digit is lost.
    return jnp.log1p(others + (jnp.exp(left) - 1))


@log_total.defjvp
def _log_total_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (left, others), (d_left, d_others) = primals, tangents
    change = jnp.exp(left) * d_left + d_others
    return log_total(left, others), change / total(left, others)


@jax.custom_jvp
def surprise(left: Array, others: Array) -> Array:
    """Return -log p of the class apart, right to its last digits where p is nearly 1.

    It is log1p(others * exp(-left)), and so is right whatever is small beside `left`: that of the
    largest class is 0 to a rounding only, where a compiler makes one operation of a product of
    width 1 and its difference from m, or where a cap is another number in another loop.
    """
    low = jnp.maximum(left, -64)  # exp(64) times a sum over all classes is finite
    return jnp.log1p(others * jnp.exp(-low)) + (low - left)


@surprise.defjvp
def _surprise_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (left, others), (d_left, d_others) = primals, tangents
    return surprise(left, others), (d_others - others * d_left) / total(left, others)


def entropy(sums: RowSums) -> Array:
    """Return -sum_c p_c log p_c."""
    relative: Array = sums.moment - safe_multiply(sums.others, sums.left)
    return surprise(sums.left, sums.others) - relative / total(sums.left, sums.others)


def add_places(
    sums: RowSums,
    axis: int,
    transform: Transform,
    x: Array,
    shift: Any,
    class_mask: Any,
    apart: Any,
    places: Places,
) -> RowSums:
    """Return the sums with those of a target mass at few classes, of which x may lack some."""
    inside = is_inside(places.index, axis, x)
    centred = centre_at(transform, x, shift, class_mask, places.index, axis)
    q = without_infinite_derivative(jnp.where(inside, places.mass, 0), centred)
    by_logit = jnp.where(inside, product(q, centred), 0)
    if apart is not None:
        is_apart = places.index == apart
        left_mass = sum_classes(axis, jnp.where(is_apart, q, 0))
        sums = sums._replace(left_mass=_sum(sums.left_mass, left_mass))
        q, by_logit = (jnp.where(is_apart, 0, term) for term in (q, by_logit))
    return sums._replace(
        mass=_sum(sums.mass, sum_classes(axis, q)),
        mass_logit=_sum(sums.mass_logit, sum_classes(axis, by_logit)),
    )


def _sum(a: Any, b: Array) -> Array:
    return b if a is None else a + b


def is_finite(sums: RowSums) -> Array:
    """Return where sums are finite: then the logarithm of the total is."""
    finite = [jnp.isfinite(x) for x in sums if x is not None]
    return functools.reduce(jnp.logical_and, finite)


class RowGradients(NamedTuple):
    """Gradients of a loss; None for what is not there."""

    x: Any
    transform: Any
    mass: Any  # of the classes
    places: Any = None  # of the mass at few classes


def row_gradients(
    axis: int,
    transform: Transform,
    x: Array,
    shift: Any,
    class_mask: Any,
    index: tuple[Any, Any],
    q: Any,
    cotangents: RowSums,
    dtype: Any,
    places: Places | None = None,
    masked: bool = True,
) -> RowGradients:
    """Return the gradients of a loss with respect to logits, transform and target mass.

    `index` is of the class apart and of the target, relative to x; `cotangents` are the gradients
    with respect to the sums, `dtype` is that of the logits' gradient. `masked` says
    whether the forward pass made exponentials that are 0 for the class apart, for XLA to find the
    same here; nothing else depends on it.
    """
    apart, target = index
    is_target = None if target is None else one_hot(target, x, axis)
    is_apart = None if apart is None else one_hot(apart, x, axis)
    d_z, d_q = _logit_gradients(
        transform, x, shift, class_mask, is_apart, is_target, q, cotangents, masked
    )
    d_x, d_transform = transform.gradients(x, d_z)
    d_x = d_x.astype(dtype)
    if places is None:
        return RowGradients(d_x, d_transform, d_q)

    # The rows of few classes, as if there were no others.
    at = places.index
    inside = is_inside(at, axis, x)
    mask = None if class_mask is None else take_class((class_mask,), at, axis, jnp.float32) > 0
    few, is_apart = take_class((x,), at, axis), None if apart is None else at == apart
    if q is not None and q.ndim:
        q = take_class((q,), at, axis)
    d_z, _ = _logit_gradients(transform, few, shift, mask, is_apart, None, q, cotangents, masked)
    mass = jnp.where(inside, places.mass, 0)
    d_own, d_mass = _mass_gradients(mass, centre(transform, few, shift, mask), is_apart, cotangents)
    if is_apart is not None:
        d_own = jnp.where(is_apart, 0, d_own)
    if mask is not None:
        d_own = jnp.where(mask, d_own, 0)
    d_few, _ = transform.gradients(few, d_z + d_own)
    _, d_own_transform = transform.gradients(few, d_own)
    d_x = put_at_class(d_x, at, d_few.astype(dtype), axis)
    d_transform = jax.tree.map(jnp.add, d_transform, d_own_transform)
    return RowGradients(d_x, d_transform, d_q, jnp.where(inside, d_mass, 0))


def _logit_gradients(
    transform: Transform,
    x: Array,
    shift: Any,
    class_mask: Any,
    is_apart: Any,
    is_target: Any,
    q: Any,
    cotangents: RowSums,
    masked: bool,
) -> tuple[Array, Any]:
    """Return the gradients of z and of the target mass q."""
    centred = centre(transform, x, shift, class_mask)
    # Zeros of the logits' sharding, which an explicit mesh wants a gradient to have.
    d_z: Any = zeros_like(centred) if shift is None else 0
    d_q: Any = None
    by_mass: Any = None
    if shift is not None:
        mask = class_mask
        if masked:
            mask = ~is_apart if class_mask is None else class_mask & ~is_apart
        exps = exponentials(transform, x, shift, mask)
        d_z += _scaled(cotangents.others, exps)
        if cotangents.moment is not None:
            d_z += _scaled(cotangents.moment, exps + product(exps, centred))
    if q is not None:
        by_mass, d_q = _mass_gradients(q, centred, is_apart, cotangents)
        if cotangents.left_mass is not None:
            d_z += by_mass
    if is_apart is not None:
        if shift is None:
            d_z += 0 * cotangents.left  # the NaN of an index out of range reaches its whole row
        d_z = jnp.where(is_apart, cotangents.left, d_z)
    if q is not None and cotangents.left_mass is None:
        d_z += by_mass
    if is_target is not None:
        d_z += jnp.where(is_target, cotangents.target, 0 * cotangents.target)
    if class_mask is not None:
        d_z = jnp.where(class_mask, d_z, 0)
    return d_z, d_q


def _mass_gradients(
    q: Array, centred: Array, is_apart: Any, cotangents: RowSums
) -> tuple[Array, Array]:
    """Return the gradients of z, where no class is apart, and of q, that its own sums have."""
    # q broadcasts, and has no derivative where it meets an infinite loss.
    q, unspread = jax.vjp(lambda q: without_infinite_derivative(q, centred), q)
    d_mass_logit = cotangents.mass_logit
    by_logit = blank_uncounted(d_mass_logit, safe_value(q, centred))
    d_q = cotangents.mass + d_mass_logit * by_logit
    if cotangents.left_mass is not None:
        d_q = jnp.where(is_apart, cotangents.left_mass, d_q)
    return d_mass_logit * blank_uncounted(d_mass_logit, q), unspread(d_q)[0]
