"""What comes of the rows' sums: each example's loss, its reduction, and its statistics."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._arguments import Reduction
from ._axes import Names, Tree, psum
from ._dense import row_max
from ._numerics import nan_where, safe_multiply
from ._rows import (
    RowSums,
    Transform,
    combine_argmax,
    entropy,
    is_finite,
    log_total,
    surprise,
)
from ._targets import Given, TargetMass, Targets
from ._xla import sums_of

Rows = tuple[Targets, Any, RowSums, Any]  # targets, shift, sums and most probable class


class TokenStats(NamedTuple):
    """Statistics of every token, arrays of the per-example shape."""

    log_prob: Array
    log_normalizer: Array
    entropy: Array
    prediction: Array
    correct: Array
    counted: Array


def total(values: ArrayLike, examples: Names) -> Array:
    """Return the sum of all values, here and on the other shards of these mapped axes."""
    return psum(jnp.sum(values), examples)


def reduce(terms: list[tuple[Array, Array]], reduction: Reduction, examples: Names) -> Array:
    """Add up the terms, each a pair of per-example (numerator, denominator).

    `none` adds numerators, `sum` totals them, `mean` divides each term's total by its
    denominator's, or by 1 where that is 0: the mean over nothing is 0.
    """
    numerators: tuple[Array, ...]
    denominators: tuple[Array, ...]
    numerators, denominators = zip(*terms)
    if reduction == "none":
        return functools.reduce(jnp.add, numerators)
    if reduction == "sum":
        return jax.lax.reduce_sum(psum(sums_of(numerators), examples), (0,))
    above, below = jnp.split(psum(sums_of(numerators + denominators), examples), 2)
    return jax.lax.reduce_sum(above / jnp.where(below == 0, 1, below), (0,))


def reduced_loss(found: Rows, z_loss: Any, reduction: Reduction, examples: Names) -> Array:
    """Return the reduction of the examples' losses, computed without the class axis.

    With it, as 1 at the end, XLA's sum on the CPU takes five times longer (jax 0.10.2), and there
    are more kernels.
    """
    squeezed: dict[int, Array] = {}

    def squeeze(x: Array) -> Array:
        if id(x) not in squeezed:
            squeezed[id(x)] = jax.lax.squeeze(x, (rows.axis,)) if x.ndim else x
        return squeezed[id(x)]

    rows, shift, sums, prediction = found
    is_prediction = None if sums.target is None else prediction == rows.index
    values = rows.weights(), None if z_loss is None else shift, sums, is_prediction
    rows, shift, sums, is_prediction = jax.tree.map(squeeze, values)
    return reduce(loss_terms(rows, z_loss, shift, sums, is_prediction), reduction, examples)


def loss_terms(
    rows: Targets, z_loss: Array | None, shift: Any, sums: RowSums, is_prediction: Any = None
) -> list[tuple[Array, Array]]:
    """Return (numerator, denominator) of the examples, of the loss and of any z-loss.

    `is_prediction` says where the target is the class apart, if the sums have a target beside it.
    """
    # An example neither counted nor finite: its sums are hidden, not its result, whose derivatives
    # would be 0 * inf.
    finite = is_finite(sums) if z_loss is None else is_finite(sums) & jnp.isfinite(shift * shift)
    hidden = rows.uncounted & ~jax.lax.stop_gradient(finite)
    sums = sums.blank(hidden)
    if sums.others is None:
        loss = _loss_of_log_probs(rows, sums)
    else:
        loss = _loss(rows, sums, is_prediction)
    terms = [(rows.example_weight * loss, rows.denominator)]
    if z_loss is not None:
        z_loss = z_loss.astype(shift.dtype)
        normalizer = jnp.where(hidden, 0, shift) + log_total(sums.left, sums.others)
        terms.append(
            (safe_multiply(z_loss, rows.example_weight * normalizer**2), rows.sample_weight)
        )
    return terms


def _loss(rows: Targets, sums: RowSums, is_prediction: Any) -> Array:
    if sums.left_mass is not None:
        return _loss_of_mass(sums)
    loss = _surprise_of_target(sums, is_prediction)
    if rows.target_weight is not None:
        loss = safe_multiply(rows.target_weight, loss)
    if sums.mass is not None:
        loss += safe_multiply(sums.mass, log_total(sums.left, sums.others)) - sums.mass_logit
    return loss


def _loss_of_mass(sums: RowSums) -> Array:
    """Return -sum_c q_c log p_c, of a mass that has a part on the class apart."""
    mass_logit: Array = sums.mass_logit - safe_multiply(sums.mass, sums.left)
    loss = surprise(sums.left, sums.others)
    return safe_multiply(sums.mass + sums.left_mass, loss) - mass_logit


def _surprise_of_target(sums: RowSums, is_prediction: Any) -> Array:
    """Return -log p of the target, which is the class apart unless the sums have both."""
    loss = surprise(sums.left, sums.others)
    if sums.target is None:
        return loss
    return jnp.where(is_prediction, loss, log_total(sums.left, sums.others) - sums.target)


def _loss_of_log_probs(rows: Targets, sums: RowSums) -> Any:
    loss: Any = 0
    if sums.left is not None:
        loss = (
            -sums.left
            if rows.target_weight is None
            else safe_multiply(rows.target_weight, -sums.left)
        )
    return loss if sums.mass is None else loss - sums.mass_logit


def squeezed(axis: int, tree: Tree) -> Tree:
    """Return arrays (..., 1, ...) without that axis, which was the classes'."""
    without: Tree = jax.tree.map(lambda x: jax.lax.squeeze(x, (axis,)), tree)
    return without


def token_stats_of(
    rows_of: Callable[[Given], Rows], given: Given, found: Rows, classes: Names
) -> TokenStats:
    """Return the statistics of rows whose sums were `found`.

    `rows_of` finds those of other targets: the log-probability of class probabilities is of the
    probabilities as they are, neither smoothed nor weighted. `classes` are the mapped axes over
    which the targets' classes are split.
    """
    rows, shift, sums, prediction = found
    counted, target, of_target = ~rows.uncounted, rows.index, sums
    if target is None:
        plain = rows
        if given.weight is not None or given.label_smoothing is not None:
            plain, _, of_target, _ = rows_of(given._replace(weight=None, label_smoothing=None))
        target = _most_probable(plain, classes)
    # The sums, not what comes of them, whose derivatives would be 0 * inf.
    shift, sums = jnp.where(counted, shift, 0), sums.blank(~counted)
    of_target = of_target.blank(~counted)
    is_prediction = prediction == target
    if rows.index is None:
        loss = _loss_of_mass(of_target)
    else:
        loss = _surprise_of_target(of_target, is_prediction)
    if rows.outside is not None:
        loss *= 1 + nan_where(rows.outside, loss.dtype)
    stats = TokenStats(
        log_prob=jnp.where(counted, -loss, 0),
        log_normalizer=shift + log_total(sums.left, sums.others),
        entropy=entropy(sums),
        prediction=jnp.where(counted, prediction.astype(jnp.int32), -1),
        correct=counted & is_prediction,
        counted=counted,
    )
    return squeezed(rows.axis, stats)


def _most_probable(rows: Targets, classes: Names) -> Array:
    """Return the class of the largest probability, the first of equals; -1 if one is nowhere."""
    if rows.places is None:
        probabilities = cast(TargetMass, rows.mass).probabilities
        _, largest, best = row_max(rows.axis, Transform(), probabilities, None, with_class=True)
        return combine_argmax(largest, best, probabilities.shape[rows.axis], classes)[0]
    index, mass, outside = *rows.places, cast(Array, rows.outside)
    mass = jnp.where(index < 0, -jnp.inf, jax.lax.stop_gradient(mass))
    largest = mass == jnp.max(mass, rows.axis, keepdims=True)
    index = jnp.where(largest & (index >= 0), index, jnp.iinfo(jnp.int32).max)
    return jnp.where(outside, -1, jnp.min(index, rows.axis, keepdims=True))
