"""What the targets are, whole: indices, probabilities of all classes or of few, counted or not.

What comes out is `Targets`: everything that the primitive and the reduction need, with
nothing left to decide.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array

from ._arguments import (
    is_of_all_classes,
    read_class_mask,
    read_label_smoothing,
    read_logit_scale,
    read_sample_weight,
    read_softcap,
    read_weight,
    read_z_loss,
)
from ._axes import Names, local_index, num_shards, psum
from ._classes import along
from ._numerics import blank_uncounted, nan_where
from ._rows import Places, Transform
from ._sparse import SparseTargets
from ._xla import add_at_class, class_numbers, take_class, zeros_like


class Given(NamedTuple):
    """A loss's arrays beside its logits, checked and otherwise as they came; None for none."""

    targets: Any
    weight: Any = None
    ignore_index: Any = None  # a number of the targets' dtype
    label_smoothing: Any = None
    sample_weight: Any = None
    class_mask: Any = None
    z_loss: Any = None
    softcap: Any = None
    logit_scale: Any = None

    def transform(self, dtype: Any) -> Transform:
        """Return what becomes of a logit, in the dtype of the losses."""
        return Transform.of(self.logit_scale, self.softcap, dtype)


def read_given(
    name: str,
    shape: tuple[int, ...],
    axis: int,
    targets: Any,
    ignored: Any,
    *,
    weight: Any = None,
    label_smoothing: Any = 0.0,
    sample_weight: Any = None,
    class_mask: Any = None,
    z_loss: Any = 0.0,
    softcap: Any = None,
    logit_scale: Any = 1.0,
) -> Given:
    """Check the arguments of a loss of logits of this shape, called `name`; targets are read."""
    per_example = shape[:axis] + shape[axis + 1 :]
    return Given(
        targets=targets,
        weight=read_weight(weight, shape[axis], per_example),
        ignore_index=ignored,
        label_smoothing=read_label_smoothing(label_smoothing),
        sample_weight=read_sample_weight(sample_weight, per_example),
        class_mask=read_class_mask(class_mask, shape, axis, name),
        z_loss=read_z_loss(z_loss),
        softcap=read_softcap(softcap),
        logit_scale=read_logit_scale(logit_scale),
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    meta_fields=[],
    data_fields=["probabilities", "sample_weight", "smoothing", "share", "weight"],
)
@dataclasses.dataclass(frozen=True)
class TargetMass:
    """A target mass over classes, q = w * ((1 - eps) * probabilities + eps / C), as its arrays.

    C counts the classes that exist, whose share is 1 / C. Beside an index, or probabilities of few
    classes, it is the part that smoothing spreads, without probabilities. None leaves a part out.
    """

    probabilities: Any  # (..., C, ...)
    sample_weight: Any  # (..., 1, ...)
    smoothing: Any  # a scalar
    share: Any  # a scalar, or (..., 1, ...)
    weight: Any  # (1, C, 1, ...)

    def values(self, class_mask: Any) -> Array:
        """Return q, broadcastable to the logits."""
        q: Any = None
        if self.probabilities is not None:
            q = blank_uncounted(self.sample_weight, self.probabilities.astype(self.share.dtype))
        if self.smoothing is not None:
            share = self.share if class_mask is None else jnp.where(class_mask, self.share, 0)
            uniform = self.smoothing * share
            q = uniform if q is None else (1 - self.smoothing) * q + uniform
        if self.weight is None:
            return cast(Array, q)
        # Whatever the weight of a class without mass is, NaN too; and in a row that is not counted.
        asked = q if self.sample_weight is None else q * self.sample_weight
        weighted: Array = q * blank_uncounted(asked, self.weight)
        return weighted

    def at(self, index: Array, axis: int, class_mask: Any) -> Array:
        """Return q at class indices (..., 1, ...); any value where they are < 0."""
        if self.probabilities is None and self.weight is None and class_mask is None:
            return self.values(None)

        def values(probabilities: Any, weight: Any, class_mask: Any) -> Array:
            here = dataclasses.replace(self, probabilities=probabilities, weight=weight)
            return here.values(class_mask)

        return take_class((self.probabilities, self.weight, class_mask), index, axis, values)

    def by_class(self, function: Any, *others: "TargetMass") -> "TargetMass":
        """Return the mass with what has a class axis put through a function, with the others'."""
        parts = {
            name: function(*(getattr(mass, name) for mass in (self, *others)))
            for name in ("probabilities", "weight")
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **parts)

    def by_token(self, function: Any) -> "TargetMass":
        """Return the mass with what is of each token put through a function."""
        names = ["probabilities", "sample_weight"]
        if jnp.ndim(self.share) and self.share.shape[0] != 1:
            names.append("share")
        parts = {
            name: function(value) for name in names if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **parts)


@functools.partial(
    jax.tree_util.register_dataclass,
    meta_fields=["axis"],
    data_fields=[
        "class_mask",
        "index",
        "local_index",
        "target_weight",
        "mass",
        "places",
        "local_places",
        "outside",
        "sample_weight",
        "example_weight",
        "denominator",
    ],
)
@dataclasses.dataclass(frozen=True)
class Targets:
    """Targets, read. Arrays of one value an example keep the class axis as 1.

    An example's loss is `target_weight` times that of the class at `index`, plus that of the
    target mass: the probabilities, or the part that smoothing spreads; and of the mass at `places`.
    """

    axis: int
    class_mask: Array | None  # bool, of the logits' shape or a table; None where all exist
    mass: TargetMass | None
    sample_weight: Array  # 0 for examples that are not counted
    example_weight: Array  # the same, but NaN where the target is out of range
    denominator: Array  # what `mean` divides by, summed
    index: Array | None = None  # int32, -1 if out of range; None for probabilities
    local_index: Array | None = None  # relative to this shard's classes; -1 for other shards' too
    target_weight: Array | None = None  # None for 1; of each example, or a scalar
    outside: Array | None = None  # bool: whether an index is out of range, of what is counted
    places: Places | None = None  # of sparse targets
    local_places: Places | None = None  # their classes relative to this shard's

    @property
    def uncounted(self) -> Array:
        return self.sample_weight == 0

    def weights(self) -> "Targets":
        """Return what the reduction needs: floats, of one value an example."""
        return dataclasses.replace(
            self,
            class_mask=None,
            index=None,
            local_index=None,
            mass=None,
            places=None,
            local_places=None,
            outside=None,
        )

    def unlike_classes(self, num_classes: int) -> "Targets":
        """Return it with an empty place more where there are as many as classes.

        Their arrays are told apart by their shapes, and split or not.
        """
        if self.places is None or self.places.index.shape[self.axis] != num_classes:
            return self
        widths = [(0, int(axis == self.axis)) for axis in range(self.places.index.ndim)]
        places = Places(
            jnp.pad(self.places.index, widths, constant_values=-1),
            jnp.pad(self.places.mass, widths),
        )
        return dataclasses.replace(self, places=places)

    def by_token(self, function: Any) -> "Targets":
        """Return it with what is of each token, and not of all, put through a function."""
        mapped: Targets = jax.tree.map(lambda x: function(x) if x.ndim else x, self)
        return mapped


def make_targets(
    axis: int, shape: tuple[int, ...], dtype: Any, given: Given, classes: Names = ()
) -> Targets:
    """Read off what the arguments of a loss say, of logits of this shape.

    `dtype` is that of what is computed, `classes` are the mapped axes over which their classes
    are split.
    """
    ndim, num_classes = len(shape), shape[axis]
    all_classes = num_classes * num_shards(classes)
    class_mask, count, is_gone, sample_weight = read_examples(axis, shape, dtype, given, classes)
    weight = None if given.weight is None else along(axis, ndim, given.weight.astype(dtype))
    smoothing, share = given.label_smoothing, jnp.asarray(1 / all_classes, dtype)
    if smoothing is not None:
        smoothing = smoothing.astype(dtype)
        smoothing += nan_where(~((smoothing >= 0) & (smoothing <= 1)), dtype)
    if count is not None:
        share = 1 / jnp.where(count == 0, all_classes, count).astype(dtype)

    targets = given.targets
    if is_of_all_classes(targets):
        rows = (*shape[:axis], 1, *shape[axis + 1 :])
        is_gone = jnp.zeros(rows, bool) if is_gone is None else is_gone
        sample_weight = weights_of(sample_weight, is_gone, dtype)
        return Targets(
            axis=axis,
            class_mask=class_mask,
            mass=TargetMass(targets, sample_weight, smoothing, share, weight),
            sample_weight=sample_weight,
            example_weight=sample_weight,
            denominator=sample_weight,
        )

    if isinstance(targets, SparseTargets):
        indices = jnp.moveaxis(jnp.asarray(targets.indices), -1, axis)
        read = read_indices(indices, all_classes, given.ignore_index)
        uniform = TargetMass(None, None, smoothing, share, weight)
        rest = num_classes, classes, is_gone, sample_weight, uniform
        return _make_sparse(axis, class_mask, targets.probabilities, read, *rest)

    index, ignored = read_indices(jnp.expand_dims(targets, axis), all_classes, given.ignore_index)
    local = local_index(index, num_classes, classes) if classes else index
    outside = index < 0
    sample_weight = _weights_of_indices(sample_weight, is_gone, ignored, outside, dtype)
    target_weight, denominator = None, sample_weight
    if weight is not None:
        chosen = take_target_weight(weight, local, axis, classes)
        # Out of range: the NaN reaches all classes' weights; `mean` counts the example as 1.
        target_weight = jnp.where(outside, psum(jnp.sum(weight), classes), chosen)
        target_weight = blank_uncounted(sample_weight, target_weight)
        one_or_chosen = jnp.where(outside, 1, chosen)
        denominator = sample_weight * blank_uncounted(sample_weight, one_or_chosen)
    mass = None
    if smoothing is not None:
        target_weight = (1 - smoothing) * (1 if target_weight is None else target_weight)
        mass = _where_counted(TargetMass(None, None, smoothing, share, weight), sample_weight)
    outside &= sample_weight != 0
    return Targets(
        axis=axis,
        class_mask=class_mask,
        index=index,
        local_index=local,
        target_weight=target_weight,
        mass=mass,
        sample_weight=sample_weight,
        # A product, so that the NaN reaches every gradient that the example has a part in.
        example_weight=sample_weight * (1 + nan_where(outside, dtype)),
        denominator=denominator,
        outside=outside,
    )


class Examples(NamedTuple):
    """What is said of examples beside their targets; None for what is not said."""

    class_mask: Array | None  # which classes exist, all of them in a row that has none
    num_existing: Array | None  # how many they were
    is_gone: Array | None  # bool, (..., 1, ...), of rows not counted whatever their weight
    sample_weight: Array | None  # (..., 1, ...)


def read_examples(
    axis: int, shape: tuple[int, ...], dtype: Any, given: Any, classes: Names
) -> Examples:
    """Read `class_mask` and `sample_weight` of what was given for logits of this shape."""
    class_mask, count, is_gone = class_table(given.class_mask, shape, axis), None, None
    sample_weight = given.sample_weight
    if sample_weight is not None:
        sample_weight = jnp.broadcast_to(sample_weight, shape[:axis] + shape[axis + 1 :])
        sample_weight = jnp.expand_dims(sample_weight.astype(dtype), axis)
    if class_mask is not None:
        # A row without classes is not counted; with all of them, it is at least finite.
        class_mask, count = read_existing(class_mask, axis, classes)
        is_gone = jnp.broadcast_to(count == 0, (*shape[:axis], 1, *shape[axis + 1 :]))
    return Examples(class_mask, count, is_gone, sample_weight)


def _make_sparse(
    axis: int,
    class_mask: Array | None,
    probabilities: Any,
    read: tuple[Array, Array],
    num_classes: int,
    classes: Names,
    is_gone: Array | None,
    sample_weight: Array | None,
    uniform: TargetMass,
) -> Targets:
    """Return what sparse targets say; `read` is what `read_indices` does, `uniform` smoothing's."""
    (index, empty), weight, dtype = read, uniform.weight, uniform.share.dtype
    nowhere = (index < 0) & ~empty
    outside, ignored = (
        reduce(x, axis, keepdims=True) for reduce, x in ((jnp.any, nowhere), (jnp.all, empty))
    )
    sample_weight = _weights_of_indices(sample_weight, is_gone, ignored, outside, dtype)
    outside &= sample_weight != 0
    mass = jnp.moveaxis(jnp.asarray(probabilities), -1, axis).astype(dtype)
    mass = jnp.where(empty | nowhere, 0, blank_uncounted(sample_weight, mass))
    index, mass = _each_class_once(jnp.where(empty, -1, index), mass, axis)
    local, nan = local_index(index, num_classes, classes), nan_where(outside, dtype)
    if weight is not None:
        chosen = jnp.where(index < 0, 0, take_target_weight(weight, local, axis, classes))
        mass *= blank_uncounted(mass * sample_weight, chosen)
        # The NaN reaches all classes' weights.
        nan *= jnp.where(outside, psum(jnp.sum(weight), classes), 1)
    smoothing = uniform.smoothing
    if smoothing is not None:
        mass *= 1 - smoothing
    return Targets(
        axis=axis,
        class_mask=class_mask,
        mass=None if smoothing is None else _where_counted(uniform, sample_weight),
        sample_weight=sample_weight,
        example_weight=sample_weight * (1 + nan),
        denominator=sample_weight,
        outside=outside,
        places=Places(index, mass),
        local_places=Places(local, mass),
    )


def _each_class_once(index: Array, mass: Array, axis: int) -> tuple[Array, Array]:
    """Return the classes in their order, -1 for all but the first of the same, and each's sum."""
    place = zeros_like(index, jnp.int32) + class_numbers(index, axis)
    ordered, order = jax.lax.sort((index, place), axis, num_keys=1)
    first = jax.lax.slice_in_dim(ordered, 0, 1, axis=axis)
    before = jax.lax.slice_in_dim(ordered, 0, -1, axis=axis)
    is_new = ordered != jax.lax.concatenate([zeros_like(first) - 1, before], axis)
    slot = jax.lax.cummax(jnp.where(is_new, place, 0), axis % index.ndim)
    _, slot = jax.lax.sort((order, slot), axis, num_keys=1)
    return jnp.where(is_new, ordered, -1), add_at_class(zeros_like(mass), slot, mass, axis)


def _where_counted(uniform: TargetMass, sample_weight: Array) -> TargetMass:
    """Return what smoothing spreads: nobody asks for class weights where nothing is counted."""
    if uniform.weight is None:
        return uniform
    is_asked_for = jnp.any(sample_weight != 0) | jnp.isfinite(uniform.weight)
    return dataclasses.replace(uniform, weight=jnp.where(is_asked_for, uniform.weight, 0))


def _weights_of_indices(
    sample_weight: Array | None,
    is_gone: Array | None,
    ignored: Array,
    outside: Array,
    dtype: Any,
) -> Array:
    """Return sample weights, 0 for what is not counted."""
    is_gone = ignored if is_gone is None else ignored | is_gone
    if sample_weight is not None:
        # Out of range and of weight 0 is not counted either, and has no loss to derive.
        is_gone |= outside & (sample_weight == 0)
    return weights_of(sample_weight, is_gone, dtype)


def weights_of(sample_weight: Array | None, is_gone: Array, dtype: Any) -> Array:
    """Return sample weights, 0 for what is gone."""
    if sample_weight is None:
        return (~is_gone).astype(dtype)
    return jnp.where(is_gone, 0, sample_weight)


def class_table(class_mask: Any, shape: tuple[int, ...], axis: int) -> Array | None:
    """Return which classes exist, as a table (1, C, 1, ...) or of the logits' shape."""
    if class_mask is None:
        return None
    table = tuple(size if i == axis else 1 for i, size in enumerate(shape))
    if class_mask.shape in [(shape[axis],), table]:
        return jnp.reshape(class_mask, table)
    return jnp.broadcast_to(class_mask, shape)


def read_existing(class_mask: Array, axis: int, classes: Names = ()) -> tuple[Array, Array]:
    """Return which classes exist, all of them in a row that has none; and how many they were."""
    count = psum(jnp.sum(class_mask, axis, keepdims=True, dtype=jnp.int32), classes)
    return class_mask | (count == 0), count


def take_target_weight(weight: Array, local: Array, axis: int, classes: Names) -> Array:
    """Return the class weight of each row's target; any value for an index out of range."""
    chosen = take_class((weight,), local, axis)
    return psum(jnp.where(local < 0, 0, chosen), classes) if classes else chosen


def read_indices(targets: Any, num_classes: int | None, ignore_index: Any) -> tuple[Array, Array]:
    """Return int32 class indices, -1 for those outside [0, C), and which targets are ignored."""
    bits = max(jnp.iinfo(targets.dtype).bits, 32)
    if bits > jnp.iinfo(targets.dtype).bits:
        targets = targets.astype(jnp.int32)
    # As unsigned numbers, negative ones are above all classes.
    inside = targets >= 0
    if num_classes is not None:
        inside = targets.astype(f"uint{bits}") < num_classes
    ignored = zeros_like(targets, bool) if ignore_index is None else targets == ignore_index
    return jnp.where(inside, targets.astype(jnp.int32), -1), ignored
