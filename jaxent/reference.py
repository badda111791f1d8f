"""The formulas, plain; long, since it shares no code with what must equal it.

Written in `jax.numpy` to be read, and differentiated by JAX in any mode: `jax.jvp` and
`jax.jacfwd` work here, which `jax.custom_vjp` refuses. They cost a few arrays of the logits'
size. Arguments, results and errors are those of the functions of the same name in `jaxent`,
except that arrays are whole: the name of a mapped axis is refused.

```python
jax.jacfwd(jaxent.reference.cross_entropy)(logits, labels)
```
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ._arguments import (
    ArrayOrList,
    DotGeneral,
    Reduction,
    TargetsLike,
    check_reduction,
    check_return_stats,
    is_of_all_classes,
    of_teacher,
    read_array,
    read_axis,
    read_beta,
    read_class_axis,
    read_class_mask,
    read_distilled_targets,
    read_index_targets,
    read_label_smoothing,
    read_logit_scale,
    read_logits,
    read_sample_weight,
    read_softcap,
    read_targets,
    read_temperature,
    read_weight,
    read_z_loss,
)
from ._axes import AxisName, read_axis_names
from ._calls import public
from ._head_arguments import (
    check_head_targets,
    read_bias,
    read_chunk_size,
    read_hidden_and_kernel,
    read_product,
)
from ._reduction import TokenStats
from ._sparse import SparseTargets


class _Examples(NamedTuple):
    """What is said beside the logits: arrays (..., C), the classes last, and (...)."""

    class_mask: Array  # (..., C); all of them in a row that has none
    target: Array  # (..., C), t: the probabilities, or one-hot, or NaN for one out of range
    weight: Array  # (..., C), w: of the classes
    sample_weight: Array  # (...), s: 0 for what is not counted
    target_weight: Array  # (...), s * w_y, or s: what the mean divides by
    nan: Array  # (...), NaN for an index out of range, else 1
    places: Any = None  # of sparse targets, (..., K, C), one-hot: 0 where a place is empty


@public
def log_softmax(
    logits: ArrayOrList,
    axis: int = -1,
    *,
    class_mask: ArrayOrList | None = None,
    class_axis_name: AxisName = None,
) -> Array:
    """Return x - log(sum(exp(x))), over the classes that exist; -inf for the others."""
    x = jnp.asarray(read_logits(logits, "logits"))
    axis = read_axis(axis, x.ndim, "logits")
    mask = _class_mask(class_mask, x.shape, axis, "logits")
    _check_whole(x, class_axis_name=class_axis_name)
    if not x.size:
        return x
    masked = jnp.where(jnp.any(mask, -1, keepdims=True), -jnp.inf, 0).astype(_wide(x.dtype))
    z = jnp.where(mask, jnp.moveaxis(x, axis, -1).astype(masked.dtype), masked)
    log_p = jnp.where(mask, _log_softmax(z)[0], -jnp.inf)
    return jnp.moveaxis(log_p, -1, axis).astype(x.dtype)


@public
def nll(
    log_probs: ArrayOrList,
    targets: TargetsLike,
    *,
    weight: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    axis: int | None = None,
    sample_weight: ArrayOrList | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
) -> Array:
    """Return -sum_c w_c t_c log p_c, reduced; t is one-hot for class indices."""
    check_reduction(reduction)
    log_p, axis, targets, ignored = _read(log_probs, targets, ignore_index, axis, "log_probs")
    _check_whole(log_p, axis_name=axis_name, class_axis_name=class_axis_name)
    e = _examples(log_p, axis, targets, ignored, weight, sample_weight, None, "log_probs")
    log_p = jnp.moveaxis(log_p, axis, -1).astype(e.weight.dtype)
    # An index reads its own class alone.
    if e.places is not None:
        log_p = jnp.where(jnp.all(e.places == 0, -2), 0, log_p)
    elif not is_of_all_classes(targets):
        log_p = jnp.where(e.target == 0, 0, log_p)

    def terms(lost: Array) -> Any:
        return _cross(e, e.target, jnp.where(lost[..., None], 0, log_p)), 0

    loss, _ = _unless_lost(terms, jnp.zeros(e.sample_weight.shape, bool), e)
    return _reduce(reduction, e, loss)


@public
def cross_entropy(
    logits: ArrayOrList,
    targets: TargetsLike,
    *,
    weight: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: ArrayLike = 0.0,
    axis: int | None = None,
    sample_weight: ArrayOrList | None = None,
    class_mask: ArrayOrList | None = None,
    z_loss: ArrayLike = 0.0,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
    return_stats: bool = False,
) -> Any:
    """Return -sum_c w_c q_c log p_c + z * lse^2, reduced; q = (1 - eps) * t + eps / C."""
    x, axis, targets, ignored = _read(logits, targets, ignore_index, axis, "logits")
    _check_whole(x, axis_name=axis_name, class_axis_name=class_axis_name)
    e = _examples(x, axis, targets, ignored, weight, sample_weight, class_mask, "logits")
    x = jnp.moveaxis(x, axis, -1)
    loss = _cross_entropy(x, e, reduction, label_smoothing, z_loss, logit_scale, softcap)
    check_return_stats(return_stats)
    return (loss, _token_stats(x, e, logit_scale, softcap)) if return_stats else loss


@public
def linear_cross_entropy(
    hidden: ArrayOrList,
    kernel: ArrayOrList,
    targets: TargetsLike,
    *,
    bias: ArrayOrList | None = None,
    class_axis: int = -1,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    dot_general: DotGeneral | None = None,
    chunk_size: int | None = None,
    weight: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: ArrayLike = 0.0,
    sample_weight: ArrayOrList | None = None,
    class_mask: ArrayOrList | None = None,
    z_loss: ArrayLike = 0.0,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
    width_axis_name: AxisName = None,
    return_stats: bool = False,
) -> Any:
    """Return the cross-entropy of hidden @ kernel + bias; chunks are no part of a formula."""
    names = axis_name, class_axis_name, width_axis_name
    x, e = _read_head(
        hidden, kernel, targets, bias, class_axis, dtype, precision, dot_general, chunk_size,
        ignore_index, weight, sample_weight, class_mask, *names,
    )  # fmt: skip
    loss = _cross_entropy(x, e, reduction, label_smoothing, z_loss, logit_scale, softcap)
    check_return_stats(return_stats)
    return (loss, _token_stats(x, e, logit_scale, softcap)) if return_stats else loss


@public
def token_stats(
    logits: ArrayOrList,
    targets: TargetsLike,
    *,
    ignore_index: int | None = -100,
    axis: int | None = None,
    class_mask: ArrayOrList | None = None,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    class_axis_name: AxisName = None,
) -> TokenStats:
    """Return log p_y, lse, -sum_c p_c log p_c, argmax_c p_c and whether it is y."""
    x, axis, targets, ignored = _read(logits, targets, ignore_index, axis, "logits")
    _check_whole(x, class_axis_name=class_axis_name)
    e = _examples(x, axis, targets, ignored, None, None, class_mask, "logits")
    return _token_stats(jnp.moveaxis(x, axis, -1), e, logit_scale, softcap)


@public
def linear_token_stats(
    hidden: ArrayOrList,
    kernel: ArrayOrList,
    targets: TargetsLike,
    *,
    bias: ArrayOrList | None = None,
    class_axis: int = -1,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    dot_general: DotGeneral | None = None,
    chunk_size: int | None = None,
    ignore_index: int | None = -100,
    class_mask: ArrayOrList | None = None,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
    width_axis_name: AxisName = None,
) -> TokenStats:
    """Return the statistics of hidden @ kernel + bias."""
    names = axis_name, class_axis_name, width_axis_name
    x, e = _read_head(
        hidden, kernel, targets, bias, class_axis, dtype, precision, dot_general, chunk_size,
        ignore_index, None, None, class_mask, *names,
    )  # fmt: skip
    return _token_stats(x, e, logit_scale, softcap)


@public
def distillation(
    logits: ArrayOrList,
    teacher_logits: ArrayOrList,
    *,
    beta: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    targets: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    sample_weight: ArrayOrList | None = None,
    class_mask: ArrayOrList | None = None,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: ArrayLike = 1.0,
    teacher_softcap: float | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
    return_stats: bool = False,
) -> Array | tuple[Array, TokenStats]:
    """Return KL(p, q), KL(q, p), or beta KL(p, m) + (1 - beta) KL(q, m), reduced.

    p is the teacher's distribution, q the student's, and m = beta p + (1 - beta) q.
    """
    x, w = (
        jnp.asarray(read_logits(x, name))
        for x, name in ((logits, "logits"), (teacher_logits, "teacher_logits"))
    )
    if x.shape != w.shape:
        raise ValueError(f"logits are {list(x.shape)}, teacher_logits {list(w.shape)}")
    _check_whole(x, axis_name=axis_name, class_axis_name=class_axis_name)
    axis = read_axis(axis, x.ndim, "logits")
    examples = x.shape, axis, targets, ignore_index, sample_weight, class_mask
    transforms = (logit_scale, softcap), (teacher_logit_scale, teacher_softcap)
    x, w = jnp.moveaxis(x, axis, -1), jnp.moveaxis(w, axis, -1)
    return _distillation(x, w, examples, reduction, beta, temperature, transforms, return_stats)


@public
def linear_distillation(
    hidden: ArrayOrList,
    kernel: ArrayOrList,
    teacher_hidden: ArrayOrList,
    teacher_kernel: ArrayOrList,
    *,
    bias: ArrayOrList | None = None,
    teacher_bias: ArrayOrList | None = None,
    class_axis: int = -1,
    teacher_class_axis: int = -1,
    beta: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    dot_general: DotGeneral | None = None,
    teacher_dot_general: DotGeneral | None = None,
    chunk_size: int | None = None,
    targets: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    sample_weight: ArrayOrList | None = None,
    class_mask: ArrayOrList | None = None,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: ArrayLike = 1.0,
    teacher_softcap: float | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
    width_axis_name: AxisName = None,
    return_stats: bool = False,
) -> Array | tuple[Array, TokenStats]:
    """Return the divergence of hidden @ kernel + bias from the teacher's."""
    names = axis_name, class_axis_name, width_axis_name
    rows = read_array("hidden", hidden).shape[:-1]
    y = jnp.zeros(rows, jnp.int32) if targets is None else targets

    def logits(hidden: Any, kernel: Any, bias: Any, class_axis: int, dot_general: Any) -> Array:
        x: Array = _read_head(
            hidden, kernel, y, bias, class_axis, dtype, precision, dot_general, chunk_size,
            ignore_index, None, sample_weight, class_mask, *names,
        )[0]  # fmt: skip
        return x

    read_distilled_targets(targets, ignore_index, rows)
    x = logits(hidden, kernel, bias, class_axis, dot_general)
    of_teachers = teacher_hidden, teacher_kernel, teacher_bias, teacher_class_axis
    w = of_teacher(logits)(*of_teachers, teacher_dot_general)
    if x.shape != w.shape:
        raise ValueError(f"logits are {list(x.shape)}, the teacher's {list(w.shape)}")
    examples = x.shape, x.ndim - 1, targets, ignore_index, sample_weight, class_mask
    transforms = (logit_scale, softcap), (teacher_logit_scale, teacher_softcap)
    return _distillation(x, w, examples, reduction, beta, temperature, transforms, return_stats)


@public
def total_weight(
    targets: ArrayOrList,
    *,
    weight: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    sample_weight: ArrayOrList | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
) -> Array:
    """Return sum_i s_i w_{y_i}, over the targets that are not ignored."""
    wanted = (
        "total_weight counts class indices; for class probabilities the mean divides by the sum "
        "of sample weights"
    )
    y, ignored = read_index_targets(targets, ignore_index, wanted)
    w, s = read_weight(weight, None), read_sample_weight(sample_weight, y.shape)
    _check_whole(y, axis_name=axis_name, class_axis_name=class_axis_name)
    dtype = _wide(*(a.dtype for a in (w, s) if a is not None))
    s = _broadcast(s, y.shape, dtype)
    index, is_ignored = _index(y, ignored, None if w is None else w.size)
    if w is not None:
        w_y = jnp.where(index < 0, 1, jnp.asarray(w, dtype)[index])
        s *= _blank_uncounted(s, w_y)
    return jnp.sum(jnp.where(is_ignored, 0, s))


# ---- The formulas, of logits with the classes last -------------------------------------------


def _cross_entropy(
    x: Array,
    e: _Examples,
    reduction: Reduction,
    label_smoothing: Any,
    z_loss: Any,
    logit_scale: Any,
    softcap: Any,
) -> Array:
    """Return the loss of logits and examples."""
    check_reduction(reduction)
    eps, z = read_label_smoothing(label_smoothing), read_z_loss(z_loss)
    logits = _logits(x, e.class_mask, logit_scale, softcap)
    q = e.target
    if eps is not None:
        eps = jnp.asarray(eps, q.dtype)
        eps += _nan_where(~((eps >= 0) & (eps <= 1)), q.dtype)
        exists = e.class_mask.astype(q.dtype)
        q = (1 - eps) * q + eps * exists / jnp.sum(exists, -1, keepdims=True)

    def terms(lost: Array) -> Any:
        log_p, lse = _log_softmax(logits(lost))
        return _cross(e, q, log_p), 0 if z is None else lse**2

    s = e.sample_weight
    largest = jnp.max(jax.lax.stop_gradient(logits(jnp.zeros(s.shape, bool))), -1)
    loss, squared = _unless_lost(terms, (s == 0) & ~jnp.isfinite(largest), e)
    return _reduce(reduction, e, loss, 0 if z is None else jnp.asarray(z, q.dtype), squared)


def _distillation(
    x: Array,
    w: Array,
    examples: Any,
    reduction: Reduction,
    beta: Any,
    temperature: Any,
    transforms: Any,
    return_stats: bool,
) -> Array | tuple[Array, TokenStats]:
    """Return the reduced divergences of the student's logits x and the teacher's w."""
    check_reduction(reduction)
    check_return_stats(return_stats)
    (kind, beta), temperature = read_beta(beta), read_temperature(temperature)
    dtype = _wide(x.dtype, w.dtype)
    mask, s = _counted(dtype, *examples)
    t = jnp.asarray(1 if temperature is None else temperature, dtype)
    t += _nan_where(~(t > 0), dtype)
    b = jnp.asarray(0 if beta is None else beta, dtype)
    b += _nan_where((kind == "between") & ~((b > 0) & (b < 1)), dtype)
    student = _logits(x, mask, *transforms[0])
    teacher = of_teacher(_logits)(w, mask, *transforms[1])

    def log_softmax(logits: Array) -> Any:
        finite = jnp.where(jnp.isinf(logits), 0, logits).astype(dtype)
        return _log_softmax(jnp.where(jnp.isinf(logits), logits, finite / t))

    def divergence(lost: Array) -> Array:
        constant = jax.lax.stop_gradient(teacher(lost))
        log_q, log_p = log_softmax(student(lost))[0], log_softmax(constant)[0]
        if kind == "forward":
            return _relative_entropy(log_p, log_q)
        if kind == "reverse":
            return _relative_entropy(log_q, log_p)
        m = b * jnp.exp(log_p) + (1 - b) * jnp.exp(log_q)
        log_m = jnp.where(m == 0, 0, jnp.log(jnp.where(m == 0, 1, m)))
        return b * _relative_entropy(log_p, log_m) + (1 - b) * _relative_entropy(log_q, log_m)

    lost = (s == 0) & ~jnp.isfinite(divergence(jnp.zeros(s.shape, bool)))
    terms = s * jnp.where(lost, 0, divergence(lost))
    loss = terms
    if reduction != "none":
        loss = jnp.sum(terms) / (_or_one(jnp.sum(s)) if reduction == "mean" else 1)
    if not return_stats:
        return loss
    uncounted = s == 0
    p = jnp.exp(log_softmax(jax.lax.stop_gradient(teacher(uncounted)))[0])
    nothing_lost = jnp.zeros(uncounted.shape, bool)
    prediction, target = (jnp.argmax(x(nothing_lost), -1) for x in (student, teacher))
    log_q, lse = log_softmax(student(uncounted))
    return loss, _stats(log_q, lse, p, prediction, prediction == target, ~uncounted)


def _relative_entropy(log_p: Array, log_q: Array) -> Array:
    """Return sum_c p_c (log p_c - log q_c), 0 for a class of no p."""
    p = jnp.exp(log_p)
    log_p, log_q = (jnp.where(p == 0, 0, x) for x in (log_p, log_q))
    return jnp.sum(p * (log_p - log_q), -1)


def _token_stats(x: Array, e: _Examples, logit_scale: Any, softcap: Any) -> TokenStats:
    """Return the statistics of logits and examples."""
    logits, counted = _logits(x, e.class_mask, logit_scale, softcap), e.sample_weight != 0
    prediction = jnp.argmax(logits(jnp.zeros(counted.shape, bool)), -1)
    mass = e.target
    if e.places is not None:  # the most probable of those given, whatever the others' 0
        mass = jnp.where(jnp.any(e.places != 0, -2), mass, -jnp.inf)
    is_target = (prediction == jnp.argmax(mass, -1)) & ~jnp.isnan(e.nan)
    log_p, lse = _log_softmax(logits(~counted))
    return _stats(log_p, lse, e.target, prediction, is_target, counted)


def _stats(
    log_p: Array, lse: Array, q: Array, prediction: Array, is_target: Array, counted: Array
) -> TokenStats:
    """Return sum_c q_c log p_c, the log-normalizer, -sum_c p_c log p_c and the others."""
    p = jnp.exp(log_p)
    return TokenStats(
        log_prob=jnp.where(counted, jnp.sum(_safe_multiply(q, log_p), -1), 0),
        log_normalizer=jnp.where(counted, lse, 0),
        entropy=jnp.where(counted, -jnp.sum(_safe_multiply(p, log_p), -1), 0),
        prediction=jnp.where(counted, prediction.astype(jnp.int32), -1),
        correct=counted & is_target,
        counted=counted,
    )


def _logits(x: Array, class_mask: Any, logit_scale: Any, softcap: Any) -> Any:
    """Return a function: z = cap * tanh(scale * x / cap), -inf for a class that is masked.

    Its argument says which examples are lost: all of their logits are 0.
    """
    scale, cap = read_logit_scale(logit_scale), read_softcap(softcap)
    wide = _wide(x.dtype)

    def logits(lost: Array) -> Any:
        lost = lost[..., None]
        z = jnp.where(class_mask & ~lost, x.astype(wide), 0)
        if scale is not None:
            by, infinite = jnp.asarray(scale, wide), jnp.isinf(z)
            # An infinite logit stays one, and the scale has no derivative there.
            at_infinity = jax.lax.stop_gradient(by) * z
            z = jnp.where(infinite, at_infinity, by * jnp.where(infinite, 0, z))
        if cap is not None:
            z = cap * jnp.tanh(z / cap)
        return jnp.where(class_mask | lost, z, -jnp.inf)

    return logits


def _log_softmax(z: Any) -> Any:
    """Return log p_c = z_c - z_b - log(1 + rest), and lse = z_b + log(1 + rest).

    b is the most probable class, rest = sum_{c != b} exp(z_c - z_b). Where p_b is nearly 1, its
    logarithm, -log(1 + rest), has the digits that 1 + rest loses, and so has its derivative.
    """
    classes = jnp.arange(z.shape[-1], dtype=jnp.int32).reshape((1,) * (z.ndim - 1) + (-1,))
    is_best = classes == jnp.argmax(z, -1, keepdims=True).astype(jnp.int32)
    z_b = jnp.sum(jnp.where(is_best, z, 0), -1, keepdims=True)
    # z_b - z_b is the constant 0, or NaN if z_b is not finite.
    relative = jnp.where(is_best, jax.lax.stop_gradient(z - z_b), z - z_b)
    rest = jnp.sum(jnp.where(is_best, relative, jnp.exp(relative)), -1, keepdims=True)
    return relative - jnp.log1p(rest), (z_b + jnp.log1p(rest))[..., 0]


def _cross(e: _Examples, q: Array, log_p: Array) -> Array:
    """Return -sum_c w_c q_c log p_c."""
    return -jnp.sum(_safe_multiply(_weighted(q, e.weight, e.sample_weight), log_p), -1)


def _weighted(q: Array, w: Array, s: Array) -> Array:
    """Return w * q; whatever the weight is of a class without mass, or that is not counted."""
    return q * _blank_uncounted(q * s[..., None], w)


def _unless_lost(terms: Any, lost: Array, e: _Examples) -> list[Array]:
    """Return terms(lost), and 0 for an example that is lost: neither counted nor finite.

    Without its logits, so that none of its derivatives is 0 * inf.
    """
    lost |= (e.sample_weight == 0) & ~jnp.isfinite(sum(terms(lost)))
    return [jnp.where(lost, 0, term) for term in terms(lost)]


def _reduce(reduction: Reduction, e: _Examples, loss: Array, z: Any = 0, squared: Any = 0) -> Array:
    """Return s * (loss + z * lse^2) of the examples, or sum or mean, each term's by its weights."""
    s = e.sample_weight
    loss, z_term = s * loss, _safe_multiply(z, s * e.nan * squared)
    if reduction == "none":
        return loss + z_term
    loss, z_term = jnp.sum(loss), jnp.sum(z_term)
    if reduction == "mean":
        loss, z_term = loss / _or_one(jnp.sum(e.target_weight)), z_term / _or_one(jnp.sum(s))
    return loss + z_term


def _or_one(denominator: Array) -> Array:
    return jnp.where(denominator == 0, 1, denominator)


# ---- The rules of 0 * inf --------------------------------------------------------------------


def _safe_multiply(factor: Array, value: Array) -> Array:
    """Return factor * value, 0 * inf being 0."""
    return factor * jnp.where((factor == 0) & jnp.isinf(value), 0, value)


def _blank_uncounted(weight: Any, value: Any) -> Array:
    """Return the value, 0 where the weight is 0 and it is not finite."""
    return jnp.where((weight == 0) & ~jnp.isfinite(value), 0, value)


def _nan_where(condition: Any, dtype: Any) -> Array:
    """Return NaN or 0, without a literal NaN, which `jax_debug_nans` would find."""
    return jnp.sqrt(-condition.astype(dtype))


# ---- The arguments ---------------------------------------------------------------------------


def _examples(
    x: Array | jax.ShapeDtypeStruct,
    axis: int,
    targets: Any,
    ignored: Any,
    weight: Any,
    sample_weight: Any,
    class_mask: Any,
    name: str,
) -> _Examples:
    """Read what is said beside logits x, of which only shape and dtype are used."""
    rows, num_classes = x.shape[:axis] + x.shape[axis + 1 :], x.shape[axis]
    dtype = _wide(x.dtype)
    w = _broadcast(read_weight(weight, num_classes, rows), (*rows, num_classes), dtype)
    s = _broadcast(read_sample_weight(sample_weight, rows), rows, dtype)
    mask = _class_mask(class_mask, x.shape, axis, name)
    has_class = jnp.any(mask, -1)
    mask, s = mask | ~has_class[..., None], jnp.where(has_class, s, 0)
    if is_of_all_classes(targets):
        t = jnp.moveaxis(jnp.asarray(targets), axis, -1).astype(dtype)
        t = _blank_uncounted(s[..., None], t)
        return _Examples(mask, t, w, s, s, jnp.ones_like(s))
    if isinstance(targets, SparseTargets):
        return _sparse_examples(mask, w, s, targets, ignored)
    index, is_ignored = _index(targets, ignored, num_classes)
    outside = index < 0
    s = jnp.where(is_ignored | outside & (s == 0), 0, s)
    t = jax.nn.one_hot(index, num_classes, dtype=dtype)
    w_y = jnp.where(outside, 1, jnp.sum(_weighted(t, w, s), -1))
    nan = _nan_where(outside & (s != 0), dtype)
    return _Examples(mask, t + nan[..., None], w, s, s * w_y, 1 + nan)


def _sparse_examples(
    mask: Array, w: Array, s: Array, targets: SparseTargets, ignored: Any
) -> _Examples:
    """Make the dense targets that sparse ones stand for: t_c = sum_k p_k, over i_k = c."""
    index, empty = _index(targets.indices, ignored, w.shape[-1])
    outside = (index < 0) & ~empty
    some_outside = jnp.any(outside, -1)
    s = jnp.where(jnp.all(empty, -1) | some_outside & (s == 0), 0, s)
    places = jax.nn.one_hot(jnp.where(empty, -1, index), w.shape[-1], dtype=s.dtype)
    p = _blank_uncounted(s[..., None], jnp.asarray(targets.probabilities, s.dtype))
    t = jnp.sum(places * jnp.where(empty | outside, 0, p)[..., None], -2)
    nan = _nan_where(some_outside & (s != 0), s.dtype)
    return _Examples(mask, t + nan[..., None], w, s, s, 1 + nan, places)


def _counted(
    dtype: Any,
    shape: tuple[int, ...],
    axis: int,
    targets: Any,
    ignore_index: Any,
    sample_weight: Any,
    class_mask: Any,
) -> tuple[Array, Array]:
    """Return the classes that exist, (..., C), and the sample weights of what counts, (...)."""
    rows = shape[:axis] + shape[axis + 1 :]
    targets, ignored = read_distilled_targets(targets, ignore_index, rows)
    s = _broadcast(read_sample_weight(sample_weight, rows), rows, dtype)
    mask = _class_mask(class_mask, shape, axis, "logits")
    has_class = jnp.any(mask, -1)
    is_ignored = jnp.zeros(rows, bool) if targets is None else jnp.asarray(targets) == ignored
    return mask | ~has_class[..., None], jnp.where(has_class & ~is_ignored, s, 0)


def _index(targets: Any, ignored: Any, num_classes: int | None) -> tuple[Array, Array]:
    """Return class indices, -1 for those outside [0, C), and which targets are ignored."""
    y = jnp.asarray(targets)
    y = y.astype(jnp.int32) if y.dtype.itemsize < 4 else y
    inside = y >= 0 if num_classes is None else (y >= 0) & (y < num_classes)
    is_ignored = jnp.zeros(y.shape, bool) if ignored is None else y == ignored
    return jnp.where(inside, y.astype(jnp.int32), -1), is_ignored


def _class_mask(class_mask: Any, shape: tuple[int, ...], axis: int, name: str) -> Array:
    """Return which classes exist, (..., C)."""
    mask = read_class_mask(class_mask, shape, axis, name)
    if mask is not None and mask.ndim > 1:
        return jnp.moveaxis(jnp.broadcast_to(mask, shape), axis, -1)
    last = shape[:axis] + shape[axis + 1 :] + (shape[axis],)
    return jnp.broadcast_to(True if mask is None else mask, last)


def _read(
    logits: Any,
    targets: Any,
    ignore_index: Any,
    axis: int | None,
    name: str,
    as_statistics: bool = False,
) -> tuple[Array, int, Any, Any]:
    """Return logits, the class axis, targets and the ignored one."""
    x = jnp.asarray(read_logits(logits, name, targets))
    targets, ignored = read_targets(targets, ignore_index)
    return x, read_class_axis(axis, x, targets, name), targets, ignored


def _read_head(
    hidden: Any, kernel: Any, targets: Any, bias: Any, class_axis: Any, dtype: Any, precision: Any,
    dot_general: Any, chunk_size: Any, ignore_index: Any, weight: Any, sample_weight: Any,
    class_mask: Any, axis_name: Any, class_axis_name: Any, width_axis_name: Any,
) -> Any:  # fmt: skip
    """Return hidden @ kernel + bias, in float32 or float64, and the examples."""
    hidden, kernel = (
        jnp.asarray(read_array(name, x)) for name, x in (("hidden", hidden), ("kernel", kernel))
    )
    _check_whole(
        hidden,
        kernel,
        axis_name=axis_name,
        class_axis_name=class_axis_name,
        width_axis_name=width_axis_name,
    )
    hidden, kernel, class_axis, dtype = read_hidden_and_kernel(hidden, kernel, class_axis, dtype, 1)
    kernel = kernel if class_axis == 1 else kernel.T
    num_classes, axis = kernel.shape[1], hidden.ndim - 1
    targets, ignored = read_targets(targets, ignore_index)
    check_head_targets(targets, hidden, num_classes)
    read_chunk_size(chunk_size)
    bias = read_bias(bias, num_classes)
    precision, dot_general = read_product(hidden, kernel, 1, dtype, precision, dot_general)
    logits = jax.ShapeDtypeStruct((*hidden.shape[:-1], num_classes), _wide(dtype))
    e = _examples(logits, axis, targets, ignored, weight, sample_weight, class_mask, "logits")
    lost = (e.sample_weight == 0) & ~jnp.all(jnp.isfinite(hidden), -1)
    x = (dot_general or jax.lax.dot_general)(
        jnp.where(lost[..., None], 0, hidden).astype(dtype),
        kernel.astype(dtype),
        (((axis,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=logits.dtype,
    ).astype(logits.dtype)
    return x if bias is None else x + _broadcast(bias, x.shape, x.dtype), e


def _broadcast(values: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return values of this shape, 1 for None."""
    return jnp.broadcast_to(jnp.asarray(1 if values is None else values, dtype), shape)


def _wide(*dtypes: Any) -> Any:
    """Return what is computed in: float64 for float64, else float32."""
    return jnp.dtype("float64" if any(dtype == jnp.float64 for dtype in dtypes) else "float32")


def _check_whole(*arrays: Any, **names: Any) -> None:
    """Refuse the names of mapped axes. Those of a mesh, under `jit`, are of whole arrays."""
    for argument, mapped in zip(names, read_axis_names(*arrays, **names)):
        if mapped:
            raise ValueError(
                f"{argument}={names[argument]!r}: jaxent.reference computes whole arrays, and "
                f"{mapped[0]!r} is a mapped axis; gather the shards first, as "
                "jax.lax.all_gather does"
            )
