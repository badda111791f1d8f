"""What the targets are: indices or probabilities, of which class axis, counted or not.

What comes out is a `Rows`: everything that the primitive and the reduction need, with
nothing left to decide.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify
from jax.tree_util import Partial

from ._arguments import (
    read_class_axis,
    read_class_mask,
    read_ignore_index,
    read_label_smoothing,
    read_sample_weight,
    read_targets,
    read_weight,
)
from ._axes import Names, local_index, num_shards, psum
from ._classes import along, pick
from ._softmax import compute_dtype, times, unless_zero


@functools.partial(
    jax.tree_util.register_dataclass,
    meta_fields=["axis"],
    data_fields=[
        "exists",
        "index",
        "here",
        "picked_weight",
        "mass",
        "sample_weight",
        "scale",
        "denominator",
    ],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Targets, read. Arrays of one value an example keep the class axis as 1.

    An example's loss is `picked_weight` times that of the class at `index`, plus that of the
    target mass: the probabilities, or for indices the part that smoothing spreads.
    """

    axis: int
    exists: Array | None  # bool, of the logits' shape or a table; None where all exist
    index: Array | None  # int32, -1 if out of range; None for probabilities
    here: Array | None  # the same relative to this shard's classes; -1 for other shards' too
    picked_weight: Array | None
    mass: Partial | None  # exists -> (..., C, ...), broadcastable to the logits
    sample_weight: Array  # 0 for examples that are not counted
    scale: Array  # the same, but NaN where the target is out of range
    denominator: Array  # what `mean` divides by, summed


def read_rows(
    logits,
    targets,
    *,
    name: str,
    weight=None,
    ignore_index=None,
    label_smoothing=0.0,
    axis=None,
    sample_weight=None,
    class_mask=None,
    classes: Names = (),
) -> Rows:
    """Check the arguments of a loss and read off what they say.

    Of the logits, called `name`, only shape and dtype are asked. `classes` are the mapped axes
    over which their classes are split.
    """
    targets = read_targets(targets)
    axis = read_class_axis(axis, logits, targets, name)
    dtype = compute_dtype(logits)
    ndim, num_classes = logits.ndim, logits.shape[axis]
    all_classes = num_classes * num_shards(classes)
    per_example = logits.shape[:axis] + logits.shape[axis + 1 :]
    exists = read_class_mask(class_mask, logits, axis, name)
    weight = read_weight(weight, num_classes, dtype)
    weight = None if weight is None else along(axis, ndim, weight)
    ignore_index = read_ignore_index(ignore_index, targets)
    smoothing = read_label_smoothing(label_smoothing, dtype)
    sample_weight = jnp.expand_dims(read_sample_weight(sample_weight, per_example, dtype), axis)
    share = jnp.full((1,) * ndim, 1 / all_classes, dtype)
    if exists is not None:
        # A row without classes is not counted; with all of them, it is at least finite.
        exists, count = read_existing(exists, axis, classes)
        sample_weight = jnp.where(count == 0, 0, sample_weight)
        share = 1 / jnp.where(count == 0, all_classes, count).astype(dtype)

    if jnp.issubdtype(targets.dtype, jnp.floating):
        return Rows(
            axis=axis,
            exists=exists,
            index=None,
            here=None,
            picked_weight=None,
            mass=Partial(_mass, targets, sample_weight, smoothing, share, weight),
            sample_weight=sample_weight,
            scale=sample_weight,
            denominator=sample_weight,
        )

    targets = jnp.expand_dims(targets, axis)
    index, ignored = read_indices(targets, all_classes, ignore_index)
    here = local_index(index, num_classes, classes)
    # Out of range and of weight 0 is not counted either, and has no loss to derive.
    sample_weight = jnp.where(ignored | (index < 0) & (sample_weight == 0), 0, sample_weight)
    outside = (index < 0) & (sample_weight != 0)
    _check_in_range(targets, outside, all_classes)
    picked_weight, denominator = jnp.ones_like(sample_weight), sample_weight
    if weight is not None:
        chosen = pick_weight(weight, here, axis, classes)
        # Out of range: the NaN reaches all classes' weights; `mean` counts the example as 1.
        picked_weight = jnp.where(index < 0, psum(jnp.sum(weight), classes), chosen)
        picked_weight = unless_zero(sample_weight, picked_weight)
        denominator = times(sample_weight, jnp.where(index < 0, 1, chosen))
    if smoothing is not None:
        picked_weight = (1 - smoothing) * picked_weight
    return Rows(
        axis=axis,
        exists=exists,
        index=index,
        here=here,
        picked_weight=picked_weight,
        mass=None if smoothing is None else Partial(_mass, None, None, smoothing, share, weight),
        sample_weight=sample_weight,
        # A product, so that the NaN reaches every gradient that the example has a part in.
        scale=sample_weight * jnp.where(outside, jnp.nan, 1).astype(dtype),
        denominator=denominator,
    )


def read_existing(exists, axis, classes: Names = ()):
    """Which classes exist, all of them in a row that has none; and how many they were."""
    count = psum(jnp.sum(exists, axis, keepdims=True), classes)
    return exists | (count == 0), count


def pick_weight(weight, here, axis, classes: Names):
    """The class weight of each row's target; any value for an index out of range."""
    chosen = pick((weight,), here, axis)
    return psum(jnp.where(here < 0, 0, chosen), classes) if classes else chosen


def _mass(targets, sample_weight, smoothing, share, weight, exists):
    """q = w * ((1 - eps) * targets + eps / C), C counting the classes that exist."""
    mass = jnp.zeros_like(share)
    if targets is not None:
        mass = unless_zero(sample_weight, targets.astype(share.dtype))
    if smoothing is not None:
        uniform = share if exists is None else jnp.where(exists, share, 0)
        mass = (1 - smoothing) * mass + smoothing * uniform
    return mass if weight is None else times(mass, weight)


def read_indices(targets: Array, num_classes: int | None, ignore_index):
    """int32 class indices, -1 for those outside [0, C), and which targets are ignored."""
    limits = jnp.iinfo(targets.dtype)
    ignored = jnp.zeros(targets.shape, bool)
    if ignore_index is not None and limits.min <= ignore_index <= limits.max:
        ignored = targets == np.asarray(ignore_index, targets.dtype)
    inside = targets >= 0
    if num_classes is not None:
        inside &= targets < num_classes
    index = jnp.where(inside, targets, 0).astype(jnp.int32)
    return jnp.where(inside, index, -1), ignored


def _check_in_range(targets, outside, num_classes):
    """Under checkify, an error that names an index; nothing otherwise."""
    found, named = _worst(targets, outside)
    checkify.debug_check(
        ~found,
        "target {index} is outside [0, " + f"{num_classes}), the classes of the logits",
        index=named,
    )


@jax.custom_batching.custom_vmap
def _worst(targets, outside):
    """Whether any target is out of range, and the largest that is."""
    limits = jnp.iinfo(targets.dtype)
    named = jnp.max(jnp.where(outside, targets, limits.min), initial=limits.min)
    return jnp.any(outside), named


@_worst.def_vmap
def _worst_of_batch(size, in_batched, targets, outside):
    """Of the whole batch: what checkify does with a check for each sorts the batch, which an
    explicit mesh that splits it refuses, and an empty one too."""
    return _worst(targets, outside), (False, False)
