"""The keywords of the losses as types, for calls that pass them on to a function."""

from typing import TypedDict

import jax
from jax.typing import ArrayLike, DTypeLike

from ._arguments import ArrayOrList, DotGeneral, Reduction
from ._axes import AxisName


class _OfExamples(TypedDict, total=False):
    ignore_index: int | None
    sample_weight: ArrayOrList | None
    axis_name: AxisName
    class_axis_name: AxisName


class TotalWeightKeywords(_OfExamples, total=False):
    """The keywords of `jaxent.total_weight`."""

    weight: ArrayOrList | None


class _Reduced(TypedDict, total=False):
    reduction: Reduction


class _OfLogits(_Reduced, total=False):
    class_mask: ArrayOrList | None
    logit_scale: ArrayLike
    softcap: float | None


class _OfHead(TypedDict, total=False):
    bias: ArrayOrList | None
    class_axis: int
    dtype: DTypeLike | None
    precision: jax.lax.PrecisionLike
    dot_general: DotGeneral | None
    chunk_size: int | None
    width_axis_name: AxisName


class NLLKeywords(TotalWeightKeywords, _Reduced, total=False):
    """The keywords of `jaxent.nll`."""

    axis: int | None


class _OfLoss(TotalWeightKeywords, _OfLogits, total=False):
    label_smoothing: ArrayLike
    z_loss: ArrayLike


class CrossEntropyKeywords(_OfLoss, total=False):
    """The keywords of `jaxent.cross_entropy`."""

    axis: int | None


class LinearCrossEntropyKeywords(_OfLoss, _OfHead, total=False):
    """The keywords of `jaxent.linear_cross_entropy`."""


class _OfDivergence(_OfExamples, _OfLogits, total=False):
    beta: ArrayLike
    temperature: ArrayLike
    targets: ArrayOrList | None
    teacher_logit_scale: ArrayLike
    teacher_softcap: float | None


class DistillationKeywords(_OfDivergence, total=False):
    """The keywords of `jaxent.distillation`."""

    axis: int


class LinearDistillationKeywords(_OfDivergence, _OfHead, total=False):
    """The keywords of `jaxent.linear_distillation`."""

    teacher_bias: ArrayOrList | None
    teacher_class_axis: int
    teacher_dot_general: DotGeneral | None
