"""The divergence of a teacher's distribution p and a student's q, of rows of logits, whole.

With c_k = (z_k - max z) / T for both, rest = sum_k exp(c_k) - 1, m = beta p + (1 - beta) q, and
h(x) = exp(x) - 1 - x, which is never negative:

    forward   KL(p || q) = sum_k p_k h(log q_k / p_k)
    reverse   KL(q || p) = sum_k q_k h(log p_k / q_k)
    between   beta KL(p || m) + (1 - beta) KL(q || m)
                         = sum_k beta p_k h(log m_k / p_k) + (1 - beta) q_k h(log m_k / q_k)

The terms that h adds to the plain formula sum to 0 over the classes, since p, q and m are
distributions. With h no term is negative, so nothing cancels where p and q are nearly equal, and an
error of a normalizer, which is the same for all classes, enters squared. log q_k / p_k is the
difference of both c_k less that of both log(1 + rest), which keeps the digits of the logits. The
gradients use expm1 of it: there q - p would be a difference of two numbers nearly equal.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from ._axes import Names, num_shards, psum, vary_alike
from ._dense import row_max
from ._numerics import compute_dtype
from ._reduction import TokenStats
from ._rows import Transform, centre, combine_argmax, product, without_infinite_derivative
from ._xla import is_inside, mapped_alike, one_hot, rounded, sum_classes, zeros_like

Kind = Literal["forward", "reverse", "between"]
# Below it, exp(x) - 1 - x is summed up as a series; from it on, expm1(x) - x loses two bits.
SERIES_RADIUS = 1.0


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static in a divergence."""

    kind: Kind = "forward"
    by_temperature: bool = False  # whether somebody may differentiate it: it came as an array
    by_beta: bool = False
    stats: bool = False  # whether the student's statistics are asked for


class Softmax(NamedTuple):
    """Logits, whole rows or some of their classes, and what makes them a distribution."""

    logits: Any  # (..., C, ...)
    transform: Transform
    shift: Any  # (..., 1, ...), the largest of all classes; a constant
    rest: Any = None  # (..., 1, ...), sum exp(c) - 1, of all classes

    @property
    def z(self) -> Array:
        """Return the transformed logits."""
        return _transformed(self.transform, self.logits, self.shift.dtype)

    def centred(self, class_mask: Any, coolness: Any) -> Array:
        """Return c, -inf where no class exists."""
        return _cooled(centre(Transform(), self.z, self.shift, class_mask), coolness)


def _transformed(transform: Transform, logits: Array, dtype: Any) -> Array:
    """Return z, each the same number in every loop."""
    z = transform(logits).astype(dtype)
    return z if transform.is_identity else rounded(z)


class Sums(NamedTuple):
    """The divergence of each row, the sums of its derivatives by log q and by log p, and others.

    The last two are sum p c and sum q c, of the student's c, for statistics alone.
    """

    divergence: Any
    by_student: Any
    by_teacher: Any
    cross: Any = None
    own: Any = None


class Values(NamedTuple):
    """What is differentiated of each row, (..., 1, ...), or the cotangents of it.

    The others are for statistics alone: sum p log q, log sum exp(c) and -sum q log q.
    """

    divergence: Any
    log_prob: Any = None
    log_total: Any = None
    entropy: Any = None


class _Ratios(NamedTuple):
    """Two probabilities of each class, and the logarithm of their ratio."""

    p: Array
    q: Array
    log_ratio: Array  # log q / p, of its own digits; 0 where both are 0

    def reversed(self) -> "_Ratios":
        return _Ratios(self.q, self.p, -self.log_ratio)


def _cooled(x: Array, coolness: Any) -> Array:
    """Return x / T, the coolness being 1 / T, or None for 1."""
    return x if coolness is None else _times(coolness, x)


@jax.custom_jvp
def _times(coolness: Array, x: Array) -> Array:
    """Return the product, whose derivative by the first is 0 where the other is infinite."""
    return coolness * x


@_times.defjvp
def _times_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (coolness, x), (d_coolness, dx) = primals, tangents
    return _times(*primals), coolness * dx + _finite(x) * d_coolness


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isinf(x), 0, x)


# ---- The rest of a softmax -------------------------------------------------------------------


def sum_of_others(
    axis: int, softmax: Softmax, class_mask: Any, coolness: Any, apart: Array
) -> Array:
    """Return sum exp(c) of the classes that are there, except the class `apart`, (..., 1, ...).

    That is the class of the largest logit, whose exp(c) is 1: without it a small sum keeps its
    digits. It is known by its number, as its c is not 0 wherever it is computed: XLA's CPU compiler
    may make one operation, rounded once, of the logit's product and the shift's difference.
    """
    return _sum_of_others(axis, softmax.centred(class_mask, coolness), apart)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_of_others(axis: int, centred: Array, apart: Array) -> Array:
    return sum_classes(axis, jnp.where(one_hot(apart, centred, axis), 0, jnp.exp(centred)))


@_sum_of_others.defjvp
def _sum_of_others_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _sum_of_others(axis, *primals), sum_classes(axis, jnp.exp(primals[0]) * tangents[0])


def moved(change: Array, rest: Array, coolness: Any) -> Array:
    """Return the total, 1 + rest, relative to a shift that is larger by -change."""
    change = jnp.maximum(change, jnp.finfo(change.dtype).min / 2)  # 0 * inf would be a derivative
    factor = jnp.exp(change if coolness is None else change * coolness)
    return factor * (1 + rest)


def combine_rests(softmax: Softmax, coolness: Any, classes: Names) -> Softmax:
    """Return shift and rest of whole rows, whose classes are split over mapped axes."""
    if not classes:
        return softmax
    shift, rest = softmax.shift, softmax.rest
    top = jax.lax.pmax(jax.lax.stop_gradient(shift), classes)
    has_top = shift == top
    part = jnp.where(has_top, rest, moved(jnp.where(has_top, 0, shift - top), rest, coolness))
    part, number = psum((part, has_top.astype(rest.dtype)), classes)
    return softmax._replace(shift=top, rest=part + (number - 1))


# ---- The terms of the classes ----------------------------------------------------------------


def sums_of(
    axis: int,
    form: Form,
    student: Softmax,
    teacher: Softmax,
    class_mask: Any,
    coolness: Any,
    beta: Any,
) -> Sums:
    """Return the sums of the classes that are there."""
    ratios = _ratios(student, teacher, class_mask, coolness)
    terms = Sums(_terms(form.kind, ratios, beta), *_slopes(form.kind, ratios, beta))
    if form.stats:
        centred = student.centred(class_mask, coolness)
        cross, own = (_moment(probability, centred) for probability in (ratios.p, ratios.q))
        terms = terms._replace(cross=cross, own=own)
    sums: Sums = jax.tree.map(functools.partial(sum_classes, axis), terms)
    return sums


def values_of(student: Softmax, sums: Sums, classes: Names) -> Values:
    """Return what adds up to the values of each row over the shards of its classes."""
    if sums.cross is None:
        return Values(sums.divergence)
    log_total = jnp.log1p(student.rest) / num_shards(classes)
    values = Values(None, sums.cross - log_total, log_total, log_total - sums.own)
    alike: Values = mapped_alike(values, sums.divergence)
    return alike._replace(divergence=sums.divergence)


def stats_of(
    values: Values,
    shift: Array,
    predictions: tuple[Array, Array],
    coolness: Any,
    uncounted: Any,
) -> TokenStats | None:
    """Return the statistics of the student's q with the teacher's p as targets, (..., 1, ...).

    `shift` is the student's, `predictions` the most probable class of each, the student's first.
    None comes of values that have none.
    """
    if values.log_prob is None:
        return None
    prediction, target = predictions
    counted = zeros_like(prediction) == 0 if uncounted is None else ~uncounted

    def of_counted(x: Array) -> Array:
        return jnp.where(counted, x, 0)

    # Twice, before a product whose derivative may be 0 * inf, and after it.
    largest = of_counted(_cooled(of_counted(shift), coolness))
    log_prob, log_total, entropy = map(of_counted, values[1:])
    return TokenStats(
        log_prob=log_prob,
        log_normalizer=largest + log_total,
        entropy=entropy,
        prediction=jnp.where(counted, prediction, -1),
        correct=counted & (prediction == target),
        counted=counted,
    )


def asked(form: Form, sums: Sums, cotangents: Values) -> tuple[Form, Sums, Values]:
    """Return what the gradient of these cotangents is made of.

    It is without statistics where nobody differentiates them.
    """

    def is_zero(x: Any) -> bool:
        return isinstance(x, SymbolicZero)

    if all(map(is_zero, cotangents[1:])):
        form = dataclasses.replace(form, stats=False)
        sums, cotangents = sums._replace(cross=None, own=None), Values(cotangents.divergence)
    zeros = zeros_like(sums.divergence)
    cotangents = jax.tree.map(lambda x: zeros if is_zero(x) else x, cotangents, is_leaf=is_zero)
    return form, sums, cotangents


def divergence_gradients(
    axis: int,
    form: Form,
    student: Softmax,
    teacher: Softmax,
    class_mask: Any,
    coolness: Any,
    beta: Any,
    sums: Sums,
    cotangents: Values,
) -> tuple[Array, Transform, Any, Any]:
    """Return the gradients of the student's logits and transform, of the coolness and of beta.

    Of those two they are the classes' share, and None where nobody asks. `sums` are those of all
    classes.
    """
    ratios = _ratios(student, teacher, class_mask, coolness)
    by_student, by_teacher = _slopes(form.kind, ratios, beta)

    def times(cotangent: Array, slope: Array) -> Array:
        share = cotangent * slope
        # 0 for a row that is not counted, whose share may be of a kernel that is NaN.
        is_asked = (cotangent != 0) | jnp.isfinite(share)
        return jnp.where(is_asked if class_mask is None else is_asked & class_mask, share, 0)

    d_student = times(cotangents.divergence, by_student - ratios.q * sums.by_student)
    d_coolness, d_beta = None, None
    centred: Any = None
    if form.stats:
        centred = student.centred(class_mask, coolness)
        by_log_prob = -_relative_entropy_slopes(ratios)[1]
        by_entropy = -_moment(ratios.q, centred, sums.own)
        slopes = by_log_prob, ratios.q, by_entropy
        d_student += sum(map(times, cotangents[1:], slopes))
    if form.by_temperature:
        d_teacher = times(cotangents.divergence, by_teacher - ratios.p * sums.by_teacher)
        if form.stats:
            d_teacher += times(cotangents.log_prob, _moment(ratios.p, centred, sums.cross))
        d_coolness = jnp.sum(
            d_student * _finite(student.centred(class_mask, None))
            + d_teacher * _finite(teacher.centred(class_mask, None))
        )
    if form.by_beta:
        d_beta = jnp.sum(times(cotangents.divergence, _slope_of_beta(ratios, beta)))
    d_z = d_student if coolness is None else d_student * coolness
    logits = student.logits
    d_logits, d_transform = student.transform.gradients(logits, d_z.astype(compute_dtype(logits)))
    return d_logits, d_transform, d_coolness, d_beta


def _moment(probability: Array, centred: Array, mean: Any = None) -> Array:
    """Return probability * (c - mean), 0 for a class of neither."""
    distance = centred if mean is None else centred - _finite(mean)
    return product(without_infinite_derivative(probability, distance), distance)


def _ratios(student: Softmax, teacher: Softmax, class_mask: Any, coolness: Any) -> _Ratios:
    d_q, d_p = (softmax.centred(class_mask, None) for softmax in (student, teacher))
    q, p = (
        jnp.exp(_cooled(distance, coolness)) / (1 + softmax.rest)
        for distance, softmax in ((d_q, student), (d_p, teacher))
    )
    normalizers = jnp.log1p(student.rest) - jnp.log1p(teacher.rest)
    difference = _difference(student, teacher, d_q, d_p)
    return _Ratios(p, q, _cooled(difference, coolness) - normalizers)


def _difference(student: Softmax, teacher: Softmax, d_q: Array, d_p: Array) -> Array:
    """Return the difference of the distances from the largest logits, 0 where both are infinite.

    Nearly equal logits z and w have the difference (z - w) - (max z - max w) without a rounding,
    where (z - max z) - (w - max w) has those of both distances.
    """
    finite = jnp.isfinite(d_q) & jnp.isfinite(d_p)
    z, w = (jnp.where(finite, x.z, 0) for x in (student, teacher))
    shifts = student.shift - teacher.shift
    is_nearer = finite & (jnp.abs(z - w) + jnp.abs(shifts) < jnp.abs(d_q) + jnp.abs(d_p))
    near = jnp.where(is_nearer, z, 0) - jnp.where(is_nearer, w, 0) - shifts
    neither = jnp.isneginf(d_q) & jnp.isneginf(d_p)
    far = jnp.where(neither, 0, d_q) - jnp.where(neither, 0, d_p)
    return jnp.where(is_nearer, near, far)


def _terms(kind: Kind, ratios: _Ratios, beta: Any) -> Array:
    if kind == "between":
        return _between(ratios, beta)
    return _relative_entropy(ratios if kind == "forward" else ratios.reversed())


def _slopes(kind: Kind, ratios: _Ratios, beta: Any) -> tuple[Array, Array]:
    """Return the derivatives of a class's term by log q and by log p, without h: see above."""
    if kind == "between":
        log_m_p, log_m_q = _log_mixture(ratios.log_ratio, beta)
        return -(1 - beta) * ratios.q * log_m_q, -beta * ratios.p * log_m_p
    if kind == "forward":
        by_p, by_q = _relative_entropy_slopes(ratios)
    else:
        by_q, by_p = _relative_entropy_slopes(ratios.reversed())
    return by_q, by_p


def _relative_entropy(ratios: _Ratios) -> Array:
    """Return p h(log q / p): q where p is 0, and +inf where q is 0 and p is not."""
    p, q, t = ratios
    near, small = _near(t)
    far = q - p - p * _finite(t)
    return jnp.where(jnp.isneginf(t), jnp.inf, jnp.where(near, p * _series(small), far))


def _relative_entropy_slopes(ratios: _Ratios) -> tuple[Array, Array]:
    """Return -p log(q / p) and q - p, the derivatives by log p and by log q."""
    p, q, t = ratios
    near, small = _near(t)
    return -p * _finite(t), jnp.where(near, p * jnp.expm1(small), q - p)


def _near(t: Array) -> tuple[Array, Array]:
    """Return where t is small, and what is: the other place has 0."""
    near = jnp.abs(t) < SERIES_RADIUS
    return near, jnp.where(near, t, 0)


def _series(x: Array) -> Array:
    """Return h(x) = exp(x) - 1 - x = x^2 / 2 (1 + x/3 (1 + x/4 (...))), for a small x."""
    last = 11 if x.dtype == jnp.float32 else 19  # whose factorial is beyond the last digit
    total = jnp.ones_like(x)
    for k in range(last, 2, -1):
        total = 1 + total * x / k
    return total * x * x / 2


def _between(ratios: _Ratios, beta: Array) -> Array:
    """Return beta p h(log m / p) + (1 - beta) q h(log m / q), of which far from 0 h - x is left."""
    p, q, t = ratios
    near, log_m_p, log_m_q = _near_mixture(t, beta)
    terms = [jnp.where(near, _series(jnp.where(near, x, 0)), -x) for x in (log_m_p, log_m_q)]
    return beta * p * terms[0] + (1 - beta) * q * terms[1]


def _slope_of_beta(ratios: _Ratios, beta: Array) -> Array:
    """Return p h(log m / p) - q h(log m / q)."""
    p, q, t = ratios
    near, log_m_p, log_m_q = _near_mixture(t, beta)
    by_series = [x * _series(jnp.where(near, y, 0)) for x, y in ((p, log_m_p), (q, log_m_q))]
    far = q - p - p * log_m_p + q * log_m_q
    return jnp.where(near, by_series[0] - by_series[1], far)


def _near_mixture(t: Array, beta: Array) -> tuple[Array, Array, Array]:
    """Return where t is small, and so both logarithms of ratios to the mixture; and those."""
    near, _ = _near(t)
    return near, *_log_mixture(t, beta)


@jax.custom_jvp
def _log_mixture(t: Array, beta: Array) -> tuple[Array, Array]:
    """Return log m / p and log m / q, given t = log q / p.

    One is <= 0, that of the larger probability, and the other >= 0. Both have their own digits.
    Where one probability is 0 (or as good as), the logarithm of its ratio is finite, and large.
    """
    distance = jnp.minimum(jnp.abs(t), 0.9 * math.log(float(jnp.finfo(t.dtype).max)))
    of_larger = jnp.where(t > 0, 1 - beta, beta)
    of_smaller = jnp.where(t > 0, beta, 1 - beta)
    mixture = of_larger + of_smaller * jnp.exp(-distance)  # relative to the larger
    is_small = mixture < 0.5
    by_larger = jnp.where(
        is_small,
        jnp.log(jnp.where(is_small, mixture, 1)),
        jnp.log1p(jnp.where(is_small, 0, of_smaller * jnp.expm1(-distance))),
    )
    by_smaller = jnp.log1p(of_larger * jnp.expm1(distance))
    return jnp.where(t > 0, by_smaller, by_larger), jnp.where(t > 0, by_larger, by_smaller)


@_log_mixture.defjvp
def _log_mixture_jvp(primals: Any, tangents: Any) -> Any:
    (_, beta), (dt, d_beta) = primals, tangents
    log_m_p, log_m_q = ratios = _log_mixture(*primals)
    p_m, q_m = jnp.exp(-log_m_p), jnp.exp(-log_m_q)
    by_beta = (p_m - q_m) * d_beta
    return ratios, ((1 - beta) * q_m * dt + by_beta, -beta * p_m * dt + by_beta)


# ---- Logits that are there -------------------------------------------------------------------


def row_divergences(
    axis: int,
    form: Form,
    logits: Array,
    transform: Transform,
    teacher_logits: Array,
    teacher_transform: Transform,
    class_mask: Any,
    coolness: Any,
    beta: Any,
    uncounted: Any,
    classes: Names,
) -> tuple[Array, TokenStats | None]:
    """Return the divergence of each row, (..., 1, ...), and the statistics that the form asks for.

    Args:
      axis: the class axis.
      form: what is static.
      logits, transform: the student's.
      teacher_logits, teacher_transform: the teacher's, which are constants.
      class_mask: bool, broadcastable to the logits; None where all classes exist.
      coolness: 1 / T, a scalar; None for 1.
      beta: a scalar, for the kind "between" alone.
      uncounted: bool, (..., 1, ...), of rows whose divergence is 0 where it is not finite, and
        which have no statistics. None where all are counted.
      classes: mapped axes over which the classes are split.
    """
    teacher_logits, teacher_transform = jax.lax.stop_gradient((teacher_logits, teacher_transform))
    dtype = compute_dtype(logits, teacher_logits)

    def read(x: Array, transform: Transform) -> tuple[Softmax, Array]:
        # Of the logits as all loops have them: a largest one with a cap of its own may be another.
        z = _transformed(transform, x, dtype)
        shift, top, best = row_max(axis, Transform(), z, class_mask, with_class=True)
        softmax = Softmax(x, transform, shift)
        prediction, _ = combine_argmax(top, best, x.shape[axis], classes if form.stats else ())
        best = jnp.where(top > jnp.finfo(top.dtype).min, best, -1)
        # Made again from the logits where somebody differentiates twice; nothing else is kept.
        others = jax.checkpoint(functools.partial(sum_of_others, axis))
        rest = others(softmax, class_mask, coolness, best)
        rest -= jnp.where(is_inside(best, axis, x), 0, 1)
        return combine_rests(softmax._replace(rest=rest), coolness, classes), prediction

    lost: Any = None
    if uncounted is not None:
        z, w = transform(logits), teacher_transform(teacher_logits)
        lost = uncounted & ~_is_finite(
            axis, form, *jax.lax.stop_gradient((z, w)), class_mask, classes
        )
        logits, teacher_logits = (jnp.where(lost, 0, x) for x in (logits, teacher_logits))
    student, prediction = read(logits, transform)
    teacher, target = read(teacher_logits, teacher_transform)
    arguments = student, teacher, class_mask, coolness, beta
    parts = jax.checkpoint(functools.partial(sums_of, axis, form))(*arguments)
    sums = psum(parts, classes)
    values = values_of(student, parts, classes)
    varying = vary_alike(values, *arguments, sums)
    values = psum(_with_gradient(axis, form, *varying), classes)
    divergence = values.divergence
    if uncounted is not None:
        lost |= uncounted & ~jnp.isfinite(jax.lax.stop_gradient(divergence))
        divergence = jnp.where(lost, 0, divergence)
    predictions = prediction, target
    return divergence, stats_of(values, student.shift, predictions, coolness, uncounted)


def _is_finite(axis: int, form: Form, z: Array, w: Array, class_mask: Any, classes: Names) -> Array:
    """Return whether the divergence of each row is, of the student's logits z and a teacher's w."""
    gone, teacher_gone = jnp.isneginf(z), jnp.isneginf(w)
    infinite = ~((z < jnp.inf) & (w < jnp.inf))  # NaN, too
    if form.kind == "forward":
        infinite |= gone & ~teacher_gone
    if form.kind == "reverse":
        infinite |= teacher_gone & ~gone
    events = [infinite, ~gone, ~teacher_gone]
    if class_mask is not None:
        events = [event & class_mask for event in events]
    numbers = [sum_classes(axis, event.astype(jnp.int32)) for event in events]
    number, of_student, of_teacher = psum(numbers, classes)
    return (number == 0) & (of_student > 0) & (of_teacher > 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(axis: int, form: Form, values: Values, *arguments: Any) -> Values:
    """Return the values, whose gradients these are: the other sums are constants to them.

    What they are of the logits is in it, and so it knows the sums of all classes where those are
    split. Derivatives of second order go through the sums.
    """
    return values


def _with_gradient_fwd(axis: int, form: Form, values: Any, *arguments: Any) -> tuple[Values, Any]:
    primals: tuple[Values, Any] = custom_vjp_primal_tree_values((values, arguments))
    return primals


def _with_gradient_bwd(axis: int, form: Form, arguments: Any, cotangents: Any) -> tuple[Any, ...]:
    student, teacher, class_mask, coolness, beta, sums = arguments
    form, sums, cotangents = asked(form, sums, cotangents)
    d_logits, d_transform, d_coolness, d_beta = divergence_gradients(
        axis, form, student, teacher, class_mask, coolness, beta, sums, cotangents
    )
    d_student = Softmax(d_logits.astype(student.logits.dtype), d_transform, None)
    return None, d_student, None, None, d_coolness, d_beta, None


_with_gradient.defvjp(_with_gradient_fwd, _with_gradient_bwd, symbolic_zeros=True)
