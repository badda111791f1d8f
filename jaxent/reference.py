"""The formulas, plain: what every other function of jaxent must equal.

Written in `jax.numpy` to be read, and differentiated by JAX in any mode: `jax.jvp` and
`jax.jacfwd` work here, which `jax.custom_vjp` refuses. They cost a few arrays of the
logits' size. Arguments, results and errors are those of the functions of the same name
in `jaxent`.

```python
jax.jacfwd(jaxent.reference.cross_entropy)(logits, labels)
```
"""

import jax
import jax.numpy as jnp
from jax import Array

from ._arguments import (
    check_head_targets,
    check_reduction,
    is_float,
    read_array,
    read_axis,
    read_bias,
    read_chunk_size,
    read_class_axis,
    read_class_mask,
    read_hidden_and_kernel,
    read_index_targets,
    read_label_smoothing,
    read_logit_scale,
    read_logits,
    read_precision,
    read_sample_weight,
    read_softcap,
    read_targets,
    read_weight,
    read_z_loss,
)
from ._axes import first_class, num_shards, psum, read_axis_names
from ._calls import public
from .stats import WANTED, TokenStats


@public
def log_softmax(logits, axis=-1, *, class_mask=None, class_axis_name=None) -> Array:
    """x - log(sum(exp(x))), over the classes that exist; -inf for the others."""
    part = logits = jnp.asarray(read_logits(logits, "logits"))
    axis = read_axis(axis, logits.ndim, "logits")
    exists = _class_mask(class_mask, logits, axis, "logits")
    (classes,) = read_axis_names(logits, class_axis_name=class_axis_name)
    if not logits.size:
        return logits
    logits, exists = _whole(classes, axis, logits, exists)
    x = logits.astype(_wide(logits.dtype))
    if exists is not None:
        x = jnp.where(exists, x, -jnp.inf)
    log_probs = _log_probs(x, axis)[0]
    if exists is not None:
        log_probs = jnp.where(exists, log_probs, -jnp.inf)
    if classes:
        size = part.shape[axis]
        log_probs = jax.lax.dynamic_slice_in_dim(log_probs, first_class(size, classes), size, axis)
    return log_probs.astype(logits.dtype)


@public
def nll(
    log_probs,
    targets,
    *,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    axis=None,
    sample_weight=None,
    axis_name=None,
    class_axis_name=None,
) -> Array:
    """-sum_c w_c t_c log p_c, t one-hot for class indices, reduced."""
    x, _, t, s, w, mean_weight, poison, examples = _read(
        "log_probs",
        log_probs,
        targets,
        weight,
        ignore_index,
        axis,
        sample_weight,
        axis_name=axis_name,
        class_axis_name=class_axis_name,
    )

    own = not is_float(read_targets(targets, ignore_index)[0])  # an index reads its class alone

    def per_example(x, _):
        return -jnp.sum(_times(_weighted(t, w, s), jnp.where((t == 0) & own, 0, x)), -1), 0

    loss, _ = _hide_uncounted(per_example, x, jnp.ones(x.shape, bool), s)
    return _reduce(loss * poison, 0, None, s, mean_weight, reduction, examples)


@public
def cross_entropy(
    logits,
    targets,
    *,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    axis=None,
    sample_weight=None,
    class_mask=None,
    z_loss=0.0,
    logit_scale=1.0,
    softcap=None,
    axis_name=None,
    class_axis_name=None,
) -> Array:
    """-sum_c w_c q_c log p_c + z * lse^2, q = (1 - eps) * t + eps / C, reduced."""
    x, exists, t, s, w, mean_weight, poison, examples = _read(
        "logits",
        logits,
        targets,
        weight,
        ignore_index,
        axis,
        sample_weight,
        class_mask,
        axis_name,
        class_axis_name,
    )
    transform = _transform(logit_scale, softcap)
    eps = _number(read_label_smoothing(label_smoothing), x.dtype)
    if eps is not None:
        eps += _nan_where(~((eps >= 0) & (eps <= 1)), x.dtype)
    z = _number(read_z_loss(z_loss), x.dtype)
    count = jnp.maximum(jnp.sum(exists, -1, keepdims=True), 1)
    uniform = exists.astype(x.dtype) / count.astype(x.dtype)
    q = t if eps is None else (1 - eps) * t + eps * uniform

    def per_example(x, exists):
        x = transform(x)
        # A row without classes is not counted: let it be finite.
        empty = ~jnp.any(exists, -1, keepdims=True)
        log_p, lse = _log_probs(jnp.where(exists | empty, x, -jnp.inf), -1)
        return -jnp.sum(_times(_weighted(q, w, s), log_p), -1), lse if z is None else lse**2

    loss, squared = _hide_uncounted(per_example, jnp.where(exists, x, 0), exists, s)
    return _reduce(loss * poison, squared * poison, z, s, mean_weight, reduction, examples)


@public
def linear_cross_entropy(
    hidden,
    kernel,
    targets,
    *,
    bias=None,
    class_axis=-1,
    dtype=None,
    precision=None,
    chunk_size=None,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    sample_weight=None,
    class_mask=None,
    z_loss=0.0,
    logit_scale=1.0,
    softcap=None,
    axis_name=None,
    class_axis_name=None,
    width_axis_name=None,
) -> Array:
    """cross_entropy(hidden @ kernel + bias), chunks being none of a formula's business."""
    logits = _logits(
        hidden,
        kernel,
        bias,
        class_axis,
        dtype,
        precision,
        targets,
        ignore_index,
        sample_weight,
        width_axis_name,
        chunk_size,
    )
    return cross_entropy(
        logits,
        targets,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        axis=-1,
        sample_weight=sample_weight,
        class_mask=class_mask,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
        axis_name=axis_name,
        class_axis_name=class_axis_name,
    )


@public
def token_stats(
    logits,
    targets,
    *,
    ignore_index=-100,
    axis=None,
    class_mask=None,
    logit_scale=1.0,
    softcap=None,
    class_axis_name=None,
) -> TokenStats:
    """log p_y, lse, -sum_c p_c log p_c, argmax_c p_c and whether it is y."""
    read_index_targets(targets, ignore_index, WANTED)
    x, exists, t, s, _, _, poison, _ = _read(
        "logits",
        logits,
        targets,
        None,
        ignore_index,
        axis,
        None,
        class_mask,
        class_axis_name=class_axis_name,
    )
    capped = _transform(logit_scale, softcap)
    counted = (s != 0)[..., None]

    some = exists | ~jnp.any(exists, -1, keepdims=True)
    prediction = jnp.argmax(jnp.where(some, capped(x), -jnp.inf), -1).astype(jnp.int32)
    x = capped(jnp.where(exists & counted, x, 0))
    x = jnp.where(exists | ~counted, x, -jnp.inf)
    log_p, lse = _log_probs(x, -1)
    correct = (s != 0) & (jnp.take_along_axis(t, prediction[..., None], -1)[..., 0] > 0)
    return TokenStats(
        log_prob=s * poison * jnp.sum(_times(t, log_p), -1),
        log_normalizer=s * lse,
        entropy=-s * jnp.sum(_times(jnp.exp(log_p), log_p), -1),
        prediction=prediction,
        correct=correct,
    )


@public
def linear_token_stats(
    hidden,
    kernel,
    targets,
    *,
    bias=None,
    class_axis=-1,
    dtype=None,
    precision=None,
    chunk_size=None,
    ignore_index=-100,
    class_mask=None,
    logit_scale=1.0,
    softcap=None,
    axis_name=None,
    class_axis_name=None,
    width_axis_name=None,
) -> TokenStats:
    """token_stats(hidden @ kernel + bias); over which axes tokens are split is all the same."""
    read_index_targets(targets, ignore_index, WANTED)
    read_axis_names(axis_name=axis_name)
    logits = _logits(
        hidden,
        kernel,
        bias,
        class_axis,
        dtype,
        precision,
        targets,
        ignore_index,
        None,
        width_axis_name,
        chunk_size,
    )
    return token_stats(
        logits,
        targets,
        ignore_index=ignore_index,
        axis=-1,
        class_mask=class_mask,
        logit_scale=logit_scale,
        softcap=softcap,
        class_axis_name=class_axis_name,
    )


@public
def total_weight(
    targets,
    *,
    weight=None,
    ignore_index=-100,
    sample_weight=None,
    axis_name=None,
    class_axis_name=None,
) -> Array:
    """sum_i s_i w_{y_i}, over the targets that are not ignored."""
    targets, ignored = read_index_targets(
        targets,
        ignore_index,
        "total_weight counts class indices; for class probabilities the mean divides by the sum "
        "of sample weights",
    )
    w = read_weight(weight, None)
    s = read_sample_weight(sample_weight, targets.shape)
    examples, classes = read_axis_names(
        targets, axis_name=axis_name, class_axis_name=class_axis_name
    )
    dtype = _wide(*(a.dtype for a in (w, s) if a is not None))
    s = _spread(s, targets.shape, dtype)
    (w,) = _whole(classes, 0, None if w is None else jnp.asarray(w, dtype))
    is_ignored = _is_ignored(targets, ignored)
    if w is not None:
        index = _index(targets, w.size)
        s *= _blank_uncounted(s, jnp.where(index < 0, 1, w[index]))
    return psum(jnp.sum(jnp.where(is_ignored, 0, s)), examples)


def _logits(
    hidden,
    kernel,
    bias,
    class_axis,
    dtype,
    precision,
    targets,
    ignore_index,
    sample_weight,
    width_axis_name,
    chunk_size,
):
    """hidden @ kernel + bias, in float32 or float64; 0 for a token neither counted nor finite."""
    hidden, kernel = (
        jnp.asarray(read_array(name, x)) for name, x in (("hidden", hidden), ("kernel", kernel))
    )
    (width,) = read_axis_names(hidden, kernel, width_axis_name=width_axis_name)
    hidden, kernel, class_axis, dtype = read_hidden_and_kernel(
        hidden, kernel, class_axis, dtype, num_shards(width)
    )
    num_classes = kernel.shape[class_axis]
    targets, ignored = read_targets(targets, ignore_index)
    check_head_targets(targets, hidden, num_classes)
    wide = _wide(dtype)
    bias = read_bias(bias, num_classes)
    s = read_sample_weight(sample_weight, hidden.shape[:-1])
    read_chunk_size(chunk_size)
    precision = read_precision(precision, dtype)
    (kernel,) = _whole(width, 1 - class_axis, kernel)
    counted = _spread(s, hidden.shape[:-1], wide) != 0
    if not is_float(targets):
        counted &= ~_is_ignored(targets, ignored)
    finite = jnp.all(jnp.isfinite(hidden), -1)
    hidden = jnp.where((counted | finite)[..., None], hidden, 0)
    kernel = kernel if class_axis == 1 else kernel.T
    logits = jnp.matmul(
        hidden.astype(dtype),
        kernel.astype(dtype),
        precision=precision,
        preferred_element_type=wide,
    )
    return logits if bias is None else logits + jnp.asarray(bias, wide)


def _weighted(q, w, s):
    """q * w; whatever the weight of a class without mass is, or of one that is not counted."""
    return q * _blank_uncounted(q * s[..., None], w)


# The rules of 0 * inf and of what does not count, again: a fault in what is judged cannot be here.


def _times(factor, value):
    """factor * value, 0 * inf being 0."""
    return factor * jnp.where((factor == 0) & jnp.isinf(value), 0, value)


def _blank_uncounted(weight, value):
    """The value, 0 where the weight is 0 and it is not finite."""
    return jnp.where((weight == 0) & ~jnp.isfinite(value), 0, value)


def _nan_where(condition, dtype):
    """NaN where the condition holds, else 0, without a literal NaN for `jax_debug_nans` to find."""
    return jnp.sqrt(jnp.where(condition, -1.0, 0.0)).astype(dtype)


def _last(values, ndim):
    """(C,) laid along the last of some dimensions."""
    return jnp.reshape(values, (1,) * (ndim - 1) + (-1,))


def _index(targets, num_classes):
    """Class indices, -1 for those outside [0, C)."""
    targets = jnp.asarray(targets)
    if targets.dtype.itemsize < 4:
        targets = targets.astype(jnp.int32)
    inside = (targets >= 0) & (targets < num_classes)
    return jnp.where(inside, targets.astype(jnp.int32), -1)


def _is_ignored(targets, ignored):
    targets = jnp.asarray(targets)
    return jnp.zeros(targets.shape, bool) if ignored is None else targets == ignored


def _wide(*dtypes):
    """What is computed in: float64 for float64, else float32."""
    return jnp.dtype("float64" if any(dtype == jnp.float64 for dtype in dtypes) else "float32")


def _number(value, dtype):
    return None if value is None else jnp.asarray(value, dtype)


def _spread(sample_weight, shape, dtype):
    s = jnp.ones((), dtype) if sample_weight is None else jnp.asarray(sample_weight, dtype)
    return jnp.broadcast_to(s, shape)


def _class_mask(class_mask, logits, axis, name):
    class_mask = read_class_mask(class_mask, logits.shape, axis, name)
    if class_mask is None:
        return None
    if class_mask.ndim == 1:
        class_mask = jnp.reshape(class_mask, [-1 if i == axis else 1 for i in range(logits.ndim)])
    return jnp.broadcast_to(class_mask, logits.shape)


def _whole(names, axis, *arrays):
    """All shards' parts of the arrays, put together along an axis."""

    def whole(array):
        if array is None or not names:
            return array
        size = array.shape[axis]
        shape = [n * num_shards(names) if i == axis else n for i, n in enumerate(array.shape)]
        part = array.astype(jnp.int32) if array.dtype == bool else array
        part = jax.lax.dynamic_update_slice_in_dim(
            jnp.zeros(shape, part.dtype), part, first_class(size, names), axis
        )
        return psum(part, names).astype(array.dtype)

    return [whole(array) for array in arrays]


def _read(
    name,
    logits,
    targets,
    weight,
    ignore_index,
    axis,
    sample_weight,
    class_mask=None,
    axis_name=None,
    class_axis_name=None,
):
    """Logits, which classes exist and targets as probabilities, classes last; sample weights
    (0 if not counted), class weights, what `mean` divides by, and NaN for a target out of
    range, else 1; all of whole rows. Last, the mapped axes of the examples."""
    logits = jnp.asarray(read_logits(logits, name, targets))
    targets, ignored = read_targets(targets, ignore_index)
    targets = jnp.asarray(targets)
    axis = read_class_axis(axis, logits, targets, name)
    per_example = logits.shape[:axis] + logits.shape[axis + 1 :]
    dtype = _wide(logits.dtype)
    exists = _class_mask(class_mask, logits, axis, name)
    w = read_weight(weight, logits.shape[axis], per_example)
    s = _spread(read_sample_weight(sample_weight, per_example), per_example, dtype)
    examples, classes = read_axis_names(
        logits, axis_name=axis_name, class_axis_name=class_axis_name
    )
    (w,) = _whole(classes, 0, None if w is None else jnp.asarray(w, dtype))
    logits, exists = _whole(classes, axis, logits, exists)
    if is_float(targets):
        (targets,) = _whole(classes, axis, targets)
    exists = jnp.broadcast_to(True if exists is None else exists, logits.shape)
    exists = jnp.moveaxis(exists, axis, -1)
    x = jnp.moveaxis(logits.astype(dtype), axis, -1)
    num_classes = x.shape[-1]
    w = _last(jnp.ones(num_classes, x.dtype) if w is None else w, x.ndim)
    s = jnp.where(jnp.any(exists, -1), s, 0)
    if is_float(targets):
        t = _blank_uncounted(s[..., None], jnp.moveaxis(targets.astype(x.dtype), axis, -1))
        return x, exists, t, s, w, s, jnp.ones_like(s), examples
    index = _index(targets, num_classes)
    s = jnp.where(_is_ignored(targets, ignored) | (index < 0) & (s == 0), 0, s)
    classes = _last(jnp.arange(num_classes), x.ndim)
    t = (index[..., None] == classes).astype(x.dtype)
    t = jnp.where((s == 0)[..., None] & ~jnp.isfinite(w), 0, t)
    target_weight = jnp.where(index < 0, 1, jnp.sum(_weighted(t, w, s), -1))
    mean_weight = s * _blank_uncounted(s, target_weight)
    poison = 1 + _nan_where((index < 0) & (s != 0), x.dtype)
    return x, exists, t, s, w, mean_weight, poison, examples


def _transform(logit_scale, softcap):
    """The logits, scaled and soft-capped."""
    scale, cap = read_logit_scale(logit_scale), read_softcap(softcap)

    def transform(x):
        x = x if scale is None else jnp.asarray(scale, x.dtype) * x
        return x if cap is None else cap * jnp.tanh(x / cap)

    return transform


def _log_probs(x, axis):
    """log softmax and log-normalizer, relative to the row's maximum."""
    m = jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True))
    log_sum = jnp.log(jnp.sum(jnp.exp(x - m), axis, keepdims=True))
    return x - m - log_sum, jnp.squeeze(m + log_sum, axis)


def _hide_uncounted(per_example, x, exists, s):
    """`per_example(x, exists)`, and 0 for an example that is neither counted nor finite."""
    fixed = jax.lax.stop_gradient(x)
    lost = (s == 0) & ~jnp.isfinite(jnp.max(fixed, -1))
    fixed = jnp.where(lost[..., None], 0, fixed)
    hidden = lost | (s == 0) & ~jnp.isfinite(sum(per_example(fixed, exists)))
    values = per_example(jnp.where(hidden[..., None], 0, x), exists | hidden[..., None])
    return [jnp.where(hidden, 0, value) for value in values]


def _reduce(loss, squared_normalizer, z, s, mean_weight, reduction, examples):
    check_reduction(reduction)
    z_term = jnp.zeros_like(s) if z is None else _times(z, s * squared_normalizer)
    if reduction == "none":
        return s * loss + z_term
    loss, z_term = _total(s * loss, examples), _total(z_term, examples)
    if reduction == "mean":
        loss /= _or_one(_total(mean_weight, examples))
        z_term /= _or_one(_total(s, examples))
    return loss + z_term


def _total(values, examples):
    return psum(jnp.sum(values), examples)


def _or_one(denominator):
    return jnp.where(denominator == 0, 1, denominator)
