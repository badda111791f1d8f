"""The keywords of the losses as types, for calls that pass them on to a function."""

from typing import TypedDict

import jax
from jax.typing import ArrayLike, DTypeLike

from ._arguments import ArrayOrList, DotGeneral, Reduction
from ._axes import AxisName


class TotalWeightKeywords(TypedDict, total=False):
    """The keywords of `jaxent.total_weight`."""

    weight: ArrayOrList | None
    ignore_index: int | None
    sample_weight: ArrayOrList | None
    axis_name: AxisName
    class_axis_name: AxisName


class _OfAll(TotalWeightKeywords, total=False):
    reduction: Reduction


class _OfLogits(_OfAll, total=False):
    label_smoothing: ArrayLike
    class_mask: ArrayOrList | None
    z_loss: ArrayLike
    logit_scale: ArrayLike
    softcap: float | None


class NLLKeywords(_OfAll, total=False):
    """The keywords of `jaxent.nll`."""

    axis: int | None


class CrossEntropyKeywords(_OfLogits, total=False):
    """The keywords of `jaxent.cross_entropy`."""

    axis: int | None


class LinearCrossEntropyKeywords(_OfLogits, total=False):
    """The keywords of `jaxent.linear_cross_entropy`."""

    bias: ArrayOrList | None
    class_axis: int
    dtype: DTypeLike | None
    precision: jax.lax.PrecisionLike
    dot_general: DotGeneral | None
    chunk_size: int | None
    width_axis_name: AxisName


class _OfDivergence(TypedDict, total=False):
    beta: ArrayLike
    temperature: ArrayLike
    targets: ArrayOrList | None
    ignore_index: int | None
    reduction: Reduction
    sample_weight: ArrayOrList | None
    class_mask: ArrayOrList | None
    logit_scale: ArrayLike
    softcap: float | None
    teacher_logit_scale: ArrayLike
    teacher_softcap: float | None
    axis_name: AxisName
    class_axis_name: AxisName


class DistillationKeywords(_OfDivergence, total=False):
    """The keywords of `jaxent.distillation`."""

    axis: int


class LinearDistillationKeywords(_OfDivergence, total=False):
    """The keywords of `jaxent.linear_distillation`."""

    bias: ArrayOrList | None
    teacher_bias: ArrayOrList | None
    class_axis: int
    teacher_class_axis: int
    dtype: DTypeLike | None
    precision: jax.lax.PrecisionLike
    chunk_size: int | None
    width_axis_name: AxisName
