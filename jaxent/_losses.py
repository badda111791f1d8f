"""The losses as pure functions; long, since half of it is signatures and docstrings.

```python
loss = jaxent.cross_entropy(logits, labels)                          # mean over the batch
loss = jaxent.cross_entropy(logits, tokens, ignore_index=pad_id)     # padding does not count
loss = jaxent.cross_entropy(logits, labels, weight=class_weights, label_smoothing=0.1)
```

Each checks its arguments and calls one compiled function, which is a composition: the targets
are read (`_targets`), the rows are summed (`_dense`), the sums are reduced (`_reduction`).
Nothing but the row sums has a hand-written gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._arguments import (
    ArrayOrList,
    Reduction,
    TargetsLike,
    check_reduction,
    check_return_stats,
    read_axis,
    read_class_axis,
    read_class_mask,
    read_index_targets,
    read_logits,
    read_sample_weight,
    read_targets,
    read_weight,
)
from ._axes import AxisName, Names, local_index, num_shards, read_axis_names
from ._calls import compiled, public
from ._classes import along
from ._dense import row_max, row_sums
from ._keywords import CrossEntropyKeywords
from ._numerics import blank_uncounted, compute_dtype
from ._reduction import Rows, TokenStats, reduced_loss, token_stats_of, total
from ._rows import (
    Transform,
    combine_argmax,
    combine_shards,
    log_total,
    surprise,
)
from ._targets import (
    Given,
    class_table,
    make_targets,
    read_existing,
    read_given,
    read_indices,
    take_target_weight,
)
from ._xla import once_per_row, one_hot


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a loss of logits."""

    axis: int = -1  # of the classes
    reduction: Reduction = "none"
    examples: Names = ()  # mapped axes over which they are split
    classes: Names = ()
    stats: bool = False  # whether to return them


@public
def log_softmax(
    logits: ArrayOrList,
    axis: int = -1,
    *,
    class_mask: ArrayOrList | None = None,
    class_axis_name: AxisName = None,
) -> Array:
    r"""Return the logarithm of the softmax over the class axis.

    .. math:: \log p_c = x_c - m - \log \sum_k e^{x_k - m}, \quad m = \max_k x_k

    Args:
      logits: float array with the classes on one axis, (..., C, ...).
      axis: the class axis.
      class_mask: bool; classes that are False do not exist and get -inf. (C,) lies along
        the class axis; otherwise it has the dimensions of the logits and broadcasts.
      class_axis_name: mapped axis or axes over which classes are split; `logits` and
        `class_mask` are this shard's, and so is what is returned.

    Returns:
      Array of the shape and dtype of `logits`, half precision being computed in float32.

    Raises:
      TypeError: `logits` is not a float array, or `class_mask` is not bool.
      ValueError: shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> jaxent.log_softmax(jnp.zeros(4)) / jnp.log(2)
      Array([-2., -2., -2., -2.], dtype=float32)
    """
    x = read_logits(logits, "logits")
    axis = read_axis(axis, x.ndim, "logits")
    mask = read_class_mask(class_mask, x.shape, axis, "logits")
    (classes,) = read_axis_names(x, class_axis_name=class_axis_name)
    return _log_softmax(Options(axis=axis, classes=classes), x, mask)


@compiled
def _log_softmax(options: Options, logits: Array, class_mask: Array | None) -> Array:
    axis, classes = options.axis, options.classes
    if not logits.size:
        return logits
    class_mask = class_table(class_mask, logits.shape, axis)
    x = logits.astype(compute_dtype(logits))
    finite = None if class_mask is None else read_existing(class_mask, axis, classes)[0]
    shift, top, own = row_max(axis, Transform(), x, finite, with_class=True)
    best, here = combine_argmax(top, own, x.shape[axis], classes)
    sums = row_sums(axis, Transform(), x, shift, finite, (own, None), None, None)
    shift, sums = combine_shards(shift, sums, (best, None), (here, None), False, classes)
    shift, normalizer, best_loss = once_per_row(
        (shift, log_total(sums.left, sums.others), surprise(sums.left, sums.others))
    )
    # Not x - shift - normalizer of the largest, which would be 0 where that is nearly certain.
    log_probs = jnp.where(one_hot(here, x, axis), -best_loss, x - shift - normalizer)
    if class_mask is not None:
        log_probs = jnp.where(class_mask, log_probs, -jnp.inf)
    return log_probs.astype(logits.dtype)


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
    r"""Return the negative log-likelihood of targets under given log-probabilities.

    .. math:: \ell_i = -w_{y_i} \log p_{i, y_i}
              \quad\text{or}\quad \ell_i = -\sum_c w_c t_{i,c} \log p_{i,c}

    for class indices y and class probabilities t. With `log_softmax` before it, this is
    `cross_entropy`.

    Args:
      log_probs: log-probabilities, float, (..., C, ...).
      targets, weight, ignore_index, reduction, axis, sample_weight, axis_name,
        class_axis_name: as in `cross_entropy`.

    Returns:
      As `cross_entropy`.

    Raises:
      TypeError, ValueError: as `cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> log_probs = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
      >>> jaxent.nll(log_probs, jnp.array([0, 1]), reduction="none")
      Array([0.6931472 , 0.22314353], dtype=float32)
    """
    check_reduction(reduction)
    x = read_logits(log_probs, "log_probs", targets)
    y, ignored = read_targets(targets, ignore_index)
    axis = read_class_axis(axis, x, y, "log_probs")
    given = read_given(
        "log_probs",
        x.shape,
        axis,
        y,
        ignored,
        weight=weight,
        sample_weight=sample_weight,
    )
    examples, classes = read_axis_names(x, axis_name=axis_name, class_axis_name=class_axis_name)
    return _nll(Options(axis, reduction, examples, classes), x, given)


@compiled
def _nll(options: Options, log_probs: Array, given: Given) -> Array:
    axis, classes = options.axis, options.classes
    rows = make_targets(axis, log_probs.shape, compute_dtype(log_probs), given, classes)
    index, here = (rows.index, None), (rows.local_index, None)
    sums = row_sums(axis, Transform(), log_probs, None, None, here, rows.mass, rows.local_places)
    _, sums = combine_shards(None, sums, index, here, rows.uncounted, classes)
    return reduced_loss((rows, None, sums, None), None, options.reduction, options.examples)


@overload
def cross_entropy(
    logits: ArrayOrList,
    targets: TargetsLike,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[CrossEntropyKeywords],
) -> tuple[Array, TokenStats]: ...
@overload
def cross_entropy(
    logits: ArrayOrList,
    targets: TargetsLike,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[CrossEntropyKeywords],
) -> Array: ...
@overload
def cross_entropy(
    logits: ArrayOrList,
    targets: TargetsLike,
    *,
    return_stats: bool,
    **keywords: Unpack[CrossEntropyKeywords],
) -> Array | tuple[Array, TokenStats]: ...
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
) -> Array | tuple[Array, TokenStats]:
    r"""Return the softmax cross-entropy of logits with class indices or class probabilities.

    .. math:: \ell_i = -\sum_c w_c q_{i,c} \log \mathrm{softmax}(x_i)_c, \qquad
              q_{i,c} = (1 - \varepsilon) t_{i,c} + \varepsilon / C

    where t is one-hot for class indices, w the class weights, and
    :math:`\varepsilon` the label smoothing. Over the counted examples, with
    sample weights s and z-loss coefficient z,

    * `"none"` returns :math:`s_i (\ell_i + z\,\mathrm{lse}_i^2)`, and 0 for the others,
    * `"sum"` adds these up,
    * `"mean"` is :math:`\sum s_i \ell_i / \sum s_i w_{y_i} + z \sum s_i \mathrm{lse}_i^2 /
      \sum s_i` for indices; for probabilities both denominators are :math:`\sum s_i`.
      A denominator of 0 is taken as 1: the mean over nothing is 0.

    An example is counted unless its target is `ignore_index`, its sample weight is 0 or it
    has no class left; one that is not acts as deleted, even if its logits are NaN.

    Args:
      logits: float array, (..., C, ...). Half precision is computed in float32.
      targets: class indices, any integer dtype, the shape of the logits without the class
        axis; or class probabilities, float, the shape of the logits, taken as given. An
        index outside [0, C) that is not `ignore_index` gives NaN, in its loss and in its
        gradient, which `jax_debug_nans` finds; `jaxent.check_targets` names it. Or
        `jaxent.SparseTargets`: the probabilities of few classes, which are never made dense.
      weight: class weights, (C,).
      ignore_index: targets equal to it do not count; None switches it off.
      reduction: "mean", "sum" or "none".
      label_smoothing: in [0, 1], a Python float or a traced scalar. Smoothing spreads over
        all C classes, as in PyTorch; to spread e over the C - 1 wrong ones, pass
        e * C / (C - 1).
      axis: the class axis. None reads it off the shapes (1 or -1) and raises where both fit.
        Under `vmap` the mapped axis is not seen: pass `axis` there.
      sample_weight: bool or float: a scalar, or of the per-example shape, where a size may
        be 1. 0 and False leave an example out. Weights may be negative, as advantages are: use
        "sum" then, since the mean divides by their sum.
      class_mask: bool; classes that are False do not exist (padded vocabularies, illegal
        actions). (C,) lies along the class axis; otherwise it has the dimensions of the
        logits and broadcasts. Target mass on such a class makes the loss +inf.
      z_loss: coefficient of the squared log-normalizer, a float or a traced scalar.
      logit_scale: logits become logit_scale * logits, before `softcap`; a float or a traced
        scalar, differentiable. A temperature T is logit_scale=1 / T.
      softcap: logits become softcap * tanh(logits / softcap), before `class_mask`.
      axis_name: mapped axis or axes over which examples are split; "sum" and "mean" are
        those of the whole.
      class_axis_name: mapped axis or axes over which classes are split. What has a class
        axis (logits, probabilities, weight, class_mask) is this shard's; class indices are
        those of the whole. On a mesh that `jit` splits arrays over, neither is needed.
      return_stats: whether to return `jaxent.token_stats` of each example as well, from the same
        pass: (loss, stats), as `jax.value_and_grad(..., has_aux=True)` takes it. Of class
        probabilities t, the log-probability is :math:`\sum_c t_c \log p_c`, and the prediction is
        correct where it is the most probable target. Weights and smoothing are not in them,
        but an example of sample weight 0 does not count, and has statistics of 0 here.

    Returns:
      float32, float64 for float64 logits: a scalar, or for "none" the per-example shape. With
      `return_stats`, that and a `jaxent.TokenStats`.

    Raises:
      TypeError: a dtype is none of the above.
      ValueError: shapes do not fit, leave the class axis open, or a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> logits = jnp.array([[2.0, 1.0, 0.1], [0.3, 0.2, 3.0], [1.0, 1.0, 1.0]])
      >>> jaxent.cross_entropy(logits, jnp.array([0, 2, -100])).round(4)
      Array(0.2687, dtype=float32)
      >>> jaxent.cross_entropy(logits, jnp.array([0, 2, -100]), reduction="none").round(4)
      Array([0.417 , 0.1205, 0.    ], dtype=float32)

    References:
      Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015
      (label smoothing); Chowdhery et al., "PaLM", 2022 (z-loss); Gemma Team, "Gemma 2",
      2024 (soft-capping).
    """
    check_reduction(reduction)
    x = read_logits(logits, "logits", targets)
    y, ignored = read_targets(targets, ignore_index)
    axis = read_class_axis(axis, x, y, "logits")
    given = read_given(
        "logits",
        x.shape,
        axis,
        y,
        ignored,
        weight=weight,
        label_smoothing=label_smoothing,
        sample_weight=sample_weight,
        class_mask=class_mask,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    examples, classes = read_axis_names(x, axis_name=axis_name, class_axis_name=class_axis_name)
    check_return_stats(return_stats)
    return _cross_entropy(Options(axis, reduction, examples, classes, return_stats), x, given)


@compiled
def _cross_entropy(
    options: Options, logits: Array, given: Given
) -> Array | tuple[Array, TokenStats]:
    found = rows_of_logits(options, logits, given)
    loss = reduced_loss(found, given.z_loss, options.reduction, options.examples)
    return (loss, stats_of_logits(options, logits, given, found)) if options.stats else loss


def stats_of_logits(options: Options, logits: Array, given: Given, found: Rows) -> TokenStats:
    """Return the statistics of rows whose sums were found."""
    plain = functools.partial(rows_of_logits, dataclasses.replace(options, stats=False), logits)
    return token_stats_of(plain, given, found, options.classes)


def rows_of_logits(options: Options, logits: Array, given: Given) -> Rows:
    """Return what the targets are, and shift and sums of each row of logits.

    They are of all of its classes. For statistics or probabilities, the last result is the row's
    most probable class, which is then the one apart.
    """
    axis, classes, stats = options.axis, options.classes, options.stats
    wide = compute_dtype(logits)
    rows = make_targets(axis, logits.shape, wide, given, classes)
    transform, class_mask = given.transform(wide), rows.class_mask
    own, whole, here = rows.local_index, rows.index, rows.local_index
    with_class = stats or whole is None
    shift, top, best = row_max(axis, transform, logits, class_mask, with_class)
    if with_class:
        own = best
        whole, here = combine_argmax(top, best, logits.shape[axis], classes)
    target, target_here = (rows.index, rows.local_index) if stats else (None, None)
    sums = row_sums(
        axis,
        transform,
        logits,
        shift,
        class_mask,
        (own, target_here),
        rows.mass,
        rows.local_places,
        moment=stats,
    )
    shift, sums = combine_shards(
        shift, sums, (whole, target), (here, target_here), rows.uncounted, classes
    )
    return rows, shift, sums, whole


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
    r"""Return what the mean of `cross_entropy` divides by: :math:`\sum s_i w_{y_i}`.

    The sum of the losses of all micro-batches, divided once by the sum of their total
    weights, is the mean over the whole batch; the mean of their means is not. (A `z_loss`
    beside class weights is averaged on its own, by the sum of the sample weights.)

    Args:
      targets: class indices, any integer dtype and shape. (For class probabilities the mean
        divides by the sum of the sample weights.)
      weight, ignore_index, sample_weight, axis_name, class_axis_name: as in
        `cross_entropy`; class axes concern the weights alone. A target outside [0, C) counts
        with weight 1; its loss is NaN. Examples that a `class_mask` leaves without a class do
        not count: give them a sample weight of 0 here.

    Returns:
      A float scalar; the number of counted examples where there are no weights.

    Raises:
      TypeError: `targets` is not an integer array.
      ValueError: a weight's shape does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> jaxent.total_weight(jnp.array([0, 2, -100]), weight=[1.0, 1.0, 0.5])
      Array(1.5, dtype=float32)
    """
    y, ignored = read_index_targets(
        targets,
        ignore_index,
        "total_weight counts class indices; for class probabilities the mean divides by the sum "
        "of sample weights",
    )
    given = Given(
        targets=y,
        weight=read_weight(weight, None),
        ignore_index=ignored,
        sample_weight=read_sample_weight(sample_weight, y.shape),
    )
    examples, classes = read_axis_names(y, axis_name=axis_name, class_axis_name=class_axis_name)
    return _total_weight(Options(examples=examples, classes=classes), given)


@compiled
def _total_weight(options: Options, given: Given) -> Array:
    classes, targets, weight = options.classes, given.targets, given.weight
    dtype = compute_dtype(*(w for w in (weight, given.sample_weight) if w is not None))
    num_classes = None if weight is None else weight.size * num_shards(classes)
    index, ignored = read_indices(targets, num_classes, given.ignore_index)
    scale: Any = 1 if given.sample_weight is None else given.sample_weight
    scale = jnp.broadcast_to(jnp.asarray(scale, dtype), targets.shape)
    if weight is not None:
        index = index[..., None]
        here = local_index(index, weight.size, classes)
        table = along(-1, index.ndim, weight.astype(dtype))
        chosen = jnp.where(index < 0, 1, take_target_weight(table, here, -1, classes))[..., 0]
        scale *= blank_uncounted(scale, chosen)
    return total(jnp.where(ignored, 0, scale), options.examples)
