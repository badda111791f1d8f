"""What a token's logits say: its log-probability, their normalizer, entropy and best class.

```python
stats = jaxent.linear_token_stats(hidden, kernel, tokens)
perplexity = jnp.exp(-stats.log_prob.mean())
ratio = jnp.exp(stats.log_prob - old_log_prob)      # PPO, GRPO
```
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ._arguments import (
    ArrayOrList,
    TargetsLike,
    read_class_axis,
    read_index_targets,
    read_logits,
    read_targets,
)
from ._axes import AxisName, read_axis_names
from ._calls import compiled, public
from ._linear import HeadOptions, read_head, rows_of_head
from ._losses import Options, row_loss, rows_of_logits
from ._rows import Places, RowSums, entropy, log_total, surprise
from ._sparse import SparseTargets
from ._targets import Given, Targets, read_given
from ._xla import take_class

WANTED = "the statistics are of one class a token, given as an index"


class TokenStats(NamedTuple):
    """Statistics of every token, arrays of the targets' shape."""

    log_prob: Array
    log_normalizer: Array
    entropy: Array
    prediction: Array
    correct: Array


def read_stat_targets(targets: Any, ignore_index: Any) -> tuple[Any, Any]:
    if isinstance(targets, SparseTargets):
        return read_targets(targets, ignore_index, as_statistics=True)
    return read_index_targets(targets, ignore_index, WANTED)


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
    r"""Return statistics of each token's logits x, given its target y.

    They are

    * `log_prob`, :math:`\log p_y = x_y - \mathrm{lse}`,
    * `log_normalizer`, :math:`\mathrm{lse} = \log \sum_c e^{x_c}`; the z-loss of
      `jaxent.cross_entropy` is :math:`z\,\mathrm{lse}^2`,
    * `entropy`, :math:`-\sum_c p_c \log p_c`, in nats,
    * `prediction`, the most probable class, the first of equals; int32,
    * `correct`, whether that is the target; bool.

    The first three are differentiable, with any cotangents together, twice. A token that is
    ignored, or has no class left, has 0 for each of them, the prediction -1, and is not correct.
    A target out of range has a log-probability of NaN.

    Args:
      logits: float array, (..., C, ...). Half precision is computed in float32.
      targets: class indices, integers, the shape of the logits without the class axis. Or
        `jaxent.SparseTargets`. Without probabilities, `log_prob` is that of each of its classes,
        (..., K), 0 at an empty place, and `correct` whether any of them is the prediction. With
        them, `log_prob` is :math:`\sum_k p_k \log p_{i_k}`, the negative cross-entropy, and
        `correct` whether the prediction is the most probable of them.
      ignore_index, axis, class_mask, logit_scale, softcap, class_axis_name: as in
        `jaxent.cross_entropy`.

    Returns:
      `TokenStats`, a named tuple of arrays of the targets' shape; floats are float32, float64
      for float64 logits.

    Raises:
      TypeError: a dtype is none of the above.
      ValueError: shapes do not fit, leave the class axis open, or a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> stats = jaxent.token_stats(jnp.zeros((2, 4)), jnp.array([0, 3]))
      >>> stats.entropy / jnp.log(2), stats.correct
      (Array([2., 2.], dtype=float32), Array([ True, False], dtype=bool))
    """
    x = read_logits(logits, "logits", targets)
    y, ignored = read_stat_targets(targets, ignore_index)
    axis = read_class_axis(axis, x, y, "logits")
    given = read_given(
        "logits",
        x.shape,
        axis,
        y,
        ignored,
        class_mask=class_mask,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    (classes,) = read_axis_names(x, class_axis_name=class_axis_name)
    return _token_stats(Options(axis=axis, classes=classes), x, given)


@compiled
def _token_stats(options: Options, logits: Array, given: Given) -> TokenStats:
    rows, shift, sums, best = rows_of_logits(options.axis, logits, given, options.classes, True)
    return _stats(rows, shift, sums, best)


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
    chunk_size: int | None = None,
    ignore_index: int | None = -100,
    class_mask: ArrayOrList | None = None,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
    width_axis_name: AxisName = None,
) -> TokenStats:
    """Return `token_stats` of a linear classifier's logits, which are never held.

    One pass over the classes; memory is that of `jaxent.linear_cross_entropy`.

    Args:
      hidden, kernel, bias, class_axis, dtype, precision, chunk_size, ignore_index,
        class_mask, logit_scale, softcap, axis_name, class_axis_name, width_axis_name: as in
        `jaxent.linear_cross_entropy`.
      targets: class indices, integers, (...); or `jaxent.SparseTargets`, as in `token_stats`.

    Returns:
      As `token_stats`, arrays of shape (...).

    Raises:
      TypeError, ValueError: as `jaxent.linear_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> stats = jaxent.linear_token_stats(jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 3]))
      >>> stats.log_prob.round(4), stats.prediction
      (Array([-1.0986,     nan], dtype=float32), Array([0, 0], dtype=int32))
    """
    read_stat_targets(targets, ignore_index)
    plan, layout, h, k, b, given = read_head(
        hidden,
        kernel,
        targets,
        bias=bias,
        class_axis=class_axis,
        dtype=dtype,
        precision=precision,
        chunk_size=chunk_size,
        logit_scale=logit_scale,
        softcap=softcap,
        axis_name=axis_name,
        class_axis_name=class_axis_name,
        width_axis_name=width_axis_name,
        class_mask=class_mask,
        ignore_index=ignore_index,
        stats=True,
    )
    return _linear_token_stats(HeadOptions(plan, layout), h, k, b, given)


@compiled
def _linear_token_stats(
    options: HeadOptions, hidden: Array, kernel: Array, bias: Any, given: Given
) -> TokenStats:
    return _stats(*rows_of_head(options.plan, options.layout, hidden, kernel, bias, given))


def _stats(rows: Targets, shift: Array, sums: RowSums, prediction: Array) -> TokenStats:
    axis, counted = rows.axis, rows.sample_weight != 0
    # The sums, not what comes of them, whose derivatives would be 0 * inf.
    shift, sums = jnp.where(counted, shift, 0), sums.blank(~counted)
    log_sum = log_total(sums.left, sums.others)
    if rows.places is None:
        is_prediction = prediction == rows.index
        log_prob = jnp.where(
            is_prediction, -surprise(sums.left, sums.others), sums.target - log_sum
        )
    else:
        is_prediction = prediction == _most_probable(rows.places, axis)
        log_prob = -row_loss(rows, sums)
    if rows.slot is None:
        log_prob = jnp.squeeze(rows.example_weight * log_prob, axis)
    else:
        log_prob = rows.example_weight * take_class((log_prob,), rows.slot, axis)
        log_prob = jnp.moveaxis(log_prob, axis, -1)
    return TokenStats(
        log_prob=log_prob,
        log_normalizer=jnp.squeeze(shift + log_sum, axis),
        entropy=jnp.squeeze(entropy(sums), axis),
        prediction=jnp.squeeze(jnp.where(counted, prediction.astype(jnp.int32), -1), axis),
        correct=jnp.squeeze(counted, axis) & jnp.any(is_prediction, axis),
    )


def _most_probable(places: Places, axis: int) -> Array:
    """Return the class of the largest mass, the first of equals, -1 where there is no class."""
    mass = jnp.where(places.index < 0, -jnp.inf, jax.lax.stop_gradient(places.mass))
    top = jnp.max(mass, axis, keepdims=True)
    largest = (mass == top) & (places.index >= 0)
    first = jnp.where(largest, places.index, jnp.iinfo(jnp.int32).max)
    return jnp.min(first, axis, keepdims=True)
