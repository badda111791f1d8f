"""What a token's logits say: its log-probability, their normalizer, entropy and best class.

```python
stats = jaxent.linear_token_stats(hidden, kernel, tokens)
perplexity = jnp.exp(-stats.log_prob.sum() / stats.counted.sum())
ratio = jnp.exp(stats.log_prob - old_log_prob)      # PPO, GRPO
```
"""

from __future__ import annotations

from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ._arguments import (
    ArrayOrList,
    DotGeneral,
    TargetsLike,
    read_class_axis,
    read_logits,
    read_targets,
)
from ._axes import AxisName, read_axis_names
from ._calls import compiled, public
from ._linear import HeadOptions, read_head, rows_of_head, stats_of_head
from ._losses import Options, rows_of_logits, stats_of_logits
from ._reduction import TokenStats
from ._targets import Given, read_given


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
    * `correct`, whether that is the target; bool,
    * `counted`, whether the token is; bool.

    The first three are differentiable, with any cotangents together, twice. A token that is
    ignored, or has no class left, has 0 for each of them, the prediction -1, and is not correct.
    A target out of range has a log-probability of NaN.

    Args:
      logits: float array, (..., C, ...). Half precision is computed in float32.
      targets: class indices, class probabilities or `jaxent.SparseTargets`, as in
        `jaxent.cross_entropy`. Of probabilities q, `log_prob` is :math:`\sum_c q_c \log p_c`, the
        negative cross-entropy, and `correct` whether the prediction is the most probable of q.
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
    y, ignored = read_targets(targets, ignore_index)
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
    return _token_stats(Options(axis=axis, classes=classes, stats=True), x, given)


@compiled
def _token_stats(options: Options, logits: Array, given: Given) -> TokenStats:
    return stats_of_logits(options, logits, given, rows_of_logits(options, logits, given))


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
    """Return `token_stats` of a linear classifier's logits, which are never held.

    One pass over the classes; memory is that of `jaxent.linear_cross_entropy`.

    Args:
      hidden, kernel, bias, class_axis, dtype, precision, dot_general, chunk_size, ignore_index,
        class_mask, logit_scale, softcap, axis_name, class_axis_name, width_axis_name: as in
        `jaxent.linear_cross_entropy`.
      targets: as in `token_stats`, with logits (..., C).

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
    plan, layout, h, k, b, given = read_head(
        hidden,
        kernel,
        targets,
        bias=bias,
        class_axis=class_axis,
        dtype=dtype,
        precision=precision,
        dot_general=dot_general,
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
    found = rows_of_head(options.plan, options.layout, hidden, kernel, bias, given)
    return stats_of_head(options, hidden, kernel, bias, given, found)
