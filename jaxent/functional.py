"""The losses as pure functions: log_softmax, nll, cross_entropy and total_weight.

```python
loss = jaxent.cross_entropy(logits, labels)                          # mean over the batch
loss = jaxent.cross_entropy(logits, tokens, ignore_index=pad_id)     # padding does not count
loss = jaxent.cross_entropy(logits, labels, weight=class_weights, label_smoothing=0.1)
```

Each is a composition: the targets are read (`_targets`), the rows are summed
(`_softmax`), the sums are reduced (`_reduction`). Nothing but the row sums has a
hand-written gradient.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._arguments import (
    ArrayOrList,
    check_reduction,
    read_axis,
    read_class_mask,
    read_ignore_index,
    read_index_targets,
    read_logits,
    read_sample_weight,
    read_softcap,
    read_weight,
    read_z_loss,
)
from ._axes import AxisName, local_index, num_shards, read_axis_names
from ._classes import along
from ._reduction import reduce, total
from ._shards import whole_rows
from ._softmax import RowSums, compute_dtype, has_log, hide, log, row_max, row_sums, times
from ._targets import Rows, pick_weight, read_existing, read_indices, read_rows


def log_softmax(
    logits: ArrayOrList,
    axis: int = -1,
    *,
    class_mask: ArrayOrList | None = None,
    class_axis_name: AxisName = None,
) -> Array:
    r"""Logarithm of the softmax over the class axis.

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
    logits = read_logits(logits, "logits")
    (classes,) = read_axis_names(logits, class_axis_name=class_axis_name)
    axis = read_axis(axis, logits.ndim, "logits")
    exists = read_class_mask(class_mask, logits, axis, "logits")
    x = logits.astype(compute_dtype(logits))
    finite = None if exists is None else read_existing(exists, axis, classes)[0]
    shift = row_max(axis, None, x, finite)
    sums = row_sums(axis, None, x, shift, finite, None, None)
    shift, sums = whole_rows(shift, sums, None, None, False, classes)
    log_probs = x - shift - log(sums.total)
    if exists is not None:
        log_probs = jnp.where(exists, log_probs, -jnp.inf)
    return log_probs.astype(logits.dtype)


def nll(
    log_probs: ArrayOrList,
    targets: ArrayOrList,
    *,
    weight: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    axis: int | None = None,
    sample_weight: ArrayOrList | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
) -> Array:
    r"""Negative log-likelihood of targets under given log-probabilities.

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
    log_probs = read_logits(log_probs, "log_probs")
    examples, classes = read_axis_names(
        log_probs, axis_name=axis_name, class_axis_name=class_axis_name
    )
    rows = read_rows(
        log_probs,
        targets,
        name="log_probs",
        weight=weight,
        ignore_index=ignore_index,
        axis=axis,
        sample_weight=sample_weight,
        classes=classes,
    )
    sums = row_sums(rows.axis, None, log_probs, None, None, rows.here, rows.mass)
    _, sums = whole_rows(None, sums, rows.index, rows.here, rows.sample_weight == 0, classes)
    return reduced_loss(rows, None, None, sums, reduction, examples)


def cross_entropy(
    logits: ArrayOrList,
    targets: ArrayOrList,
    *,
    weight: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: ArrayLike = 0.0,
    axis: int | None = None,
    sample_weight: ArrayOrList | None = None,
    class_mask: ArrayOrList | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: float | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
) -> Array:
    r"""Softmax cross-entropy between logits and class indices or class probabilities.

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
        gradient; `jax.experimental.checkify` makes it an error.
      weight: class weights, (C,).
      ignore_index: targets equal to it do not count; None switches it off.
      reduction: "mean", "sum" or "none".
      label_smoothing: in [0, 1], a Python float or a traced scalar. Smoothing spreads over
        all C classes, as in PyTorch; to spread e over the C - 1 wrong ones, pass
        e * C / (C - 1).
      axis: the class axis. None reads it off the shapes (1 or -1) and raises where both fit.
        Under `vmap` the mapped axis is not seen: pass `axis` there.
      sample_weight: bool or float, broadcastable to the per-example shape.
      class_mask: bool; classes that are False do not exist (padded vocabularies, illegal
        actions). (C,) lies along the class axis; otherwise it has the dimensions of the
        logits and broadcasts. Target mass on such a class makes the loss +inf.
      z_loss: coefficient of the squared log-normalizer, a float or a traced scalar.
      softcap: logits become softcap * tanh(logits / softcap), before `class_mask`.
      axis_name: mapped axis or axes over which examples are split; "sum" and "mean" are
        those of the whole.
      class_axis_name: mapped axis or axes over which classes are split. What has a class
        axis (logits, probabilities, weight, class_mask) is this shard's; class indices are
        those of the whole. On a mesh that `jit` splits arrays over, neither is needed.

    Returns:
      float32, float64 for float64 logits: a scalar, or for "none" the per-example shape.

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
    softcap = read_softcap(softcap)
    logits = read_logits(logits, "logits")
    examples, classes = read_axis_names(
        logits, axis_name=axis_name, class_axis_name=class_axis_name
    )
    rows = read_rows(
        logits,
        targets,
        name="logits",
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        axis=axis,
        sample_weight=sample_weight,
        class_mask=class_mask,
        classes=classes,
    )
    shift = row_max(rows.axis, softcap, logits, rows.exists)
    sums = row_sums(rows.axis, softcap, logits, shift, rows.exists, rows.here, rows.mass)
    uncounted = rows.sample_weight == 0
    shift, sums = whole_rows(shift, sums, rows.index, rows.here, uncounted, classes)
    coefficient = read_z_loss(z_loss, shift.dtype)
    return reduced_loss(rows, coefficient, shift, sums, reduction, examples)


def reduced_loss(rows: Rows, z_loss: Any, shift: Any, sums: RowSums, reduction: str, examples):
    """The reduction of the examples' losses, computed without the class axis.

    With it, as 1 at the end, XLA's sum on the CPU takes five times longer (jax 0.10.2).
    """
    values = rows.scale, rows.sample_weight, rows.picked_weight, rows.denominator, shift, sums
    flat = jax.tree.map(lambda x: jnp.squeeze(x, rows.axis), values)
    names = "scale", "sample_weight", "picked_weight", "denominator"
    rows = dataclasses.replace(rows, **dict(zip(names, flat)))
    return reduce(loss_terms(rows, z_loss, *flat[4:]), reduction, examples)


def loss_terms(rows: Rows, z_loss: Array | None, shift: Array | None, sums: RowSums):
    """Pairs of (numerator, denominator) of the examples: the loss, and z-loss if there is one."""

    def per_example(shift, log_sum, sums):
        loss = 0
        if sums.picked is not None:
            loss += times(rows.picked_weight, log_sum - sums.picked)
        if sums.mass_sum is not None:
            loss += times(sums.mass_sum, log_sum) - sums.target_sum
        return loss, 0 if z_loss is None else (shift + log_sum) ** 2

    # An example neither counted nor finite: its sums are hidden, not its result, whose derivatives
    # would be 0 * inf. A 1 in the logarithm's place is NaN where that is not finite.
    one = 0 if sums.total is None else jnp.where(has_log(sums.total), 1, jnp.nan)
    finite = jnp.isfinite(sum(per_example(*jax.lax.stop_gradient((shift, one, sums)))))
    shift, sums = hide((rows.sample_weight == 0) & ~finite, shift, sums)
    log_sum = 0 if sums.total is None else log(sums.total)
    loss, squared_normalizer = per_example(shift, log_sum, sums)
    terms = [(rows.scale * loss, rows.denominator)]
    if z_loss is not None:
        terms.append((times(z_loss, rows.scale * squared_normalizer), rows.sample_weight))
    return terms


def total_weight(
    targets: ArrayOrList,
    *,
    weight: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    sample_weight: ArrayOrList | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
) -> Array:
    r"""What the mean of `cross_entropy` divides by, for class indices: :math:`\sum s_i w_{y_i}`.

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
    targets = read_index_targets(targets)
    examples, classes = read_axis_names(
        targets, axis_name=axis_name, class_axis_name=class_axis_name
    )
    dtype = compute_dtype(*(jnp.asarray(w) for w in (weight, sample_weight) if w is not None))
    weights = read_weight(weight, None, dtype)
    all_classes = None if weights is None else weights.size * num_shards(classes)
    index, ignored = read_indices(targets, all_classes, read_ignore_index(ignore_index))
    scale = read_sample_weight(sample_weight, targets.shape, dtype)
    if weights is not None:
        index = index[..., None]
        here = local_index(index, weights.size, classes)
        chosen = pick_weight(along(-1, index.ndim, weights), here, -1, classes)
        scale = times(scale, jnp.where(index < 0, 1, chosen)[..., 0])
    return total(jnp.where(ignored, 0, scale), examples)
