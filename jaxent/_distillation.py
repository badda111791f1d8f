"""Distillation: the divergence of a student from a teacher; long for two signatures and docstrings.

```python
loss = jaxent.distillation(logits, teacher_logits, temperature=2.0)
loss = jaxent.linear_distillation(hidden, kernel, teacher_hidden, teacher_kernel)  # no logits
```

Logits that are there are compared as they are (`_divergence`), those of two heads a chunk of
classes at a time (`_head/divergence.py`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ._arguments import (
    ArrayOrList,
    Reduction,
    check_reduction,
    describe,
    read_axis,
    read_beta,
    read_class_mask,
    read_distilled_targets,
    read_logit_scale,
    read_logits,
    read_sample_weight,
    read_softcap,
    read_temperature,
)
from ._axes import AxisName, Names, read_axis_names
from ._calls import compiled, public
from ._divergence import Form, row_divergences
from ._numerics import compute_dtype, nan_where
from ._reduction import reduce
from ._rows import Transform
from ._targets import class_table, read_existing

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a divergence of logits."""

    form: Form
    axis: int
    reduction: Reduction
    examples: Names
    classes: Names


class Given(NamedTuple):
    """The arrays beside the logits, checked and otherwise as they came; None for none."""

    beta: Any
    temperature: Any
    targets: Any
    ignore_index: Any
    sample_weight: Any
    class_mask: Any
    logit_scale: Any
    softcap: Any
    teacher_logit_scale: Any
    teacher_softcap: Any

    def scalars(self, dtype: Any) -> tuple[Any, Any]:
        """Return 1 / T and beta, NaN where they are out of range."""
        coolness, beta = self.temperature, self.beta
        if coolness is not None:
            temperature = coolness.astype(dtype)
            coolness = 1 / (temperature + nan_where(~(temperature > 0), dtype))
        if beta is not None:
            beta = beta.astype(dtype)
            beta += nan_where(~((beta > 0) & (beta < 1)), dtype)
        return coolness, beta

    def transforms(self, dtype: Any, teacher_dtype: Any) -> tuple[Transform, Transform]:
        """Return what becomes of the student's logits, and of the teacher's."""
        return (
            Transform.of(self.logit_scale, self.softcap, dtype),
            Transform.of(self.teacher_logit_scale, self.teacher_softcap, teacher_dtype),
        )


@public
def distillation(
    logits: ArrayOrList,
    teacher_logits: ArrayOrList,
    *,
    beta: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    targets: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    sample_weight: ArrayOrList | None = None,
    class_mask: ArrayOrList | None = None,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: ArrayLike = 1.0,
    teacher_softcap: float | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
) -> Array:
    r"""Return the divergence of a student's distribution from a teacher's.

    With :math:`p = \mathrm{softmax}(w / T)` of the teacher's logits w,
    :math:`q = \mathrm{softmax}(z / T)` of the student's z, and
    :math:`m = \beta p + (1 - \beta) q`, it is

    * :math:`\mathrm{KL}(p \| q) = \sum_c p_c \log(p_c / q_c)` for beta 0, the classic one
      (forward),
    * :math:`\mathrm{KL}(q \| p)` for beta 1, which seeks modes (reverse),
    * :math:`\beta\,\mathrm{KL}(p \| m) + (1 - \beta)\,\mathrm{KL}(q \| m)` between, the generalized
      Jensen-Shannon divergence. (It goes to 0 as beta goes to 0 or 1; the two ends are what GKD
      puts there.)

    It is not multiplied by :math:`T^2`, which Hinton et al. do to keep the gradients' size.

    The teacher is a constant: its logits and its scale have no gradient. Everything else has, twice:
    logits, logit_scale, sample_weight, and a temperature or beta that is an array. No term is
    negative, so nothing cancels: loss and gradient keep their digits where the two distributions
    are nearly the same, and are 0 where they are the same.

    Args:
      logits: the student's, float, (..., C, ...). Half precision is computed in float32.
      teacher_logits: float, the shape of the logits.
      beta: from 0 to 1, a number; or a traced scalar inside (0, 1), NaN elsewhere, since 0 and 1
        are other formulas.
      temperature: T, a positive number or a traced scalar. What is not positive gives NaN.
      axis: the class axis.
      targets: integers, the shape of the logits without the class axis, which only say what does
        not count: examples whose target is `ignore_index`.
      ignore_index: see there; None switches it off.
      reduction: "mean", "sum" or "none": with s the sample weights of the examples that count,
        :math:`\sum s_i d_i / \sum s_i` (0 if that is over nothing), the sum alone, or each
        :math:`s_i d_i`.
      sample_weight: bool or float: a scalar, or of the per-example shape, where a size may be 1. An
        example of weight 0 does not count. What does not count may be NaN.
      class_mask: bool; classes that are False have no part in either distribution. (C,) lies along
        the class axis; otherwise it has the dimensions of the logits and broadcasts. An example
        without a class does not count.
      logit_scale, softcap: as in `jaxent.cross_entropy`, of the student's logits, before T.
      teacher_logit_scale, teacher_softcap: the same of the teacher's.
      axis_name: mapped axis or axes over which examples are split; "sum" and "mean" are those of
        the whole.
      class_axis_name: mapped axis or axes over which classes are split: logits, teacher_logits and
        class_mask are this shard's.

    Returns:
      float32, float64 if either's logits are: a scalar, or for "none" the per-example shape.
      Where p is not 0 and q is (a logit of -inf), KL(p || q) is +inf, and so the other way round;
      between, the divergence is finite.

    Raises:
      TypeError: a dtype is none of the above.
      ValueError: shapes do not fit, or a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> student, teacher = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 2.0, 0.0]])
      >>> jaxent.distillation(student, teacher).round(4)
      Array(1.025, dtype=float32)
      >>> jaxent.distillation(student, teacher, beta=0.5, temperature=2.0).round(4)
      Array(0.0682, dtype=float32)

    References:
      Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Agarwal et al.,
      "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2024
      (GKD: the generalized Jensen-Shannon divergence).
    """
    check_reduction(reduction)
    x = read_logits(logits, "logits")
    w = read_logits(teacher_logits, "teacher_logits")
    if x.shape != w.shape:
        raise ValueError(
            f"logits are {describe(x)}, teacher_logits {describe(w)}: they must have one shape, and "
            "the same classes"
        )
    axis = read_axis(axis, x.ndim, "logits")
    if x.shape[axis] == 0:
        raise ValueError(f"logits are {describe(x)}: there are no classes along axis {axis}")
    form, given = read_given(
        "logits",
        x.shape,
        axis,
        beta=beta,
        temperature=temperature,
        targets=targets,
        ignore_index=ignore_index,
        sample_weight=sample_weight,
        class_mask=class_mask,
        logit_scale=logit_scale,
        softcap=softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_softcap,
    )
    examples, classes = read_axis_names(
        x, w, axis_name=axis_name, class_axis_name=class_axis_name
    )
    return _distillation(Options(form, axis, reduction, examples, classes), x, w, given)


@compiled
def _distillation(options: Options, logits: Array, teacher_logits: Array, given: Given) -> Array:
    axis, classes = options.axis, options.classes
    dtype = compute_dtype(logits, teacher_logits)
    class_mask, sample_weight = read_counted(axis, logits.shape, dtype, given, classes)
    coolness, beta = given.scalars(dtype)
    transform, teacher_transform = given.transforms(
        compute_dtype(logits), compute_dtype(teacher_logits)
    )
    divergence = row_divergences(
        axis,
        options.form,
        logits,
        transform,
        teacher_logits,
        teacher_transform,
        class_mask,
        coolness,
        beta,
        None if sample_weight is None else sample_weight == 0,
        classes,
    )
    return reduced(axis, divergence, sample_weight, options.reduction, options.examples)


def read_given(
    name: str,
    shape: tuple[int, ...],
    axis: int,
    *,
    beta: Any,
    temperature: Any,
    targets: Any,
    ignore_index: Any,
    sample_weight: Any,
    class_mask: Any,
    logit_scale: Any,
    softcap: Any,
    teacher_logit_scale: Any,
    teacher_softcap: Any,
) -> tuple[Form, Given]:
    """Check the arguments of a divergence of logits of this shape, called `name`."""
    per_example = shape[:axis] + shape[axis + 1 :]
    kind, beta = read_beta(beta)
    temperature = read_temperature(temperature)
    targets, ignored = read_distilled_targets(targets, ignore_index, per_example)
    given = Given(
        beta=beta,
        temperature=temperature,
        targets=targets,
        ignore_index=ignored,
        sample_weight=read_sample_weight(sample_weight, per_example),
        class_mask=read_class_mask(class_mask, shape, axis, name),
        logit_scale=read_logit_scale(logit_scale),
        softcap=read_softcap(softcap),
        teacher_logit_scale=of_teacher(read_logit_scale)(teacher_logit_scale),
        teacher_softcap=of_teacher(read_softcap)(teacher_softcap),
    )
    return Form(kind, isinstance(temperature, Array), isinstance(beta, Array)), given


def read_counted(
    axis: int, shape: tuple[int, ...], dtype: Any, given: Given, classes: Names = ()
) -> tuple[Array | None, Array | None]:
    """Return which classes exist, and the sample weights, (..., 1, ...), 0 for what is not counted.

    The weights are None where all are 1.
    """
    rows = (*shape[:axis], 1, *shape[axis + 1 :])
    class_mask, sample_weight = class_table(given.class_mask, shape, axis), None
    if given.sample_weight is not None:
        sample_weight = jnp.broadcast_to(given.sample_weight, shape[:axis] + shape[axis + 1 :])
        sample_weight = jnp.expand_dims(sample_weight.astype(dtype), axis)
    gone = []
    if class_mask is not None:
        class_mask, count = read_existing(class_mask, axis, classes)
        gone.append(jnp.broadcast_to(count == 0, rows))
    if given.ignore_index is not None:
        gone.append(jnp.expand_dims(given.targets == given.ignore_index, axis))
    if gone:
        is_gone = functools.reduce(jnp.logical_or, gone)
        if sample_weight is None:
            sample_weight = (~is_gone).astype(dtype)
        else:
            sample_weight = jnp.where(is_gone, 0, sample_weight)
    return class_mask, sample_weight


def reduced(
    axis: int, divergence: Array, sample_weight: Any, reduction: Reduction, examples: Names
) -> Array:
    """Return the reduction of divergences and sample weights, (..., 1, ...)."""
    weights = jnp.ones_like(divergence) if sample_weight is None else sample_weight
    divergence, weights = (jax.lax.squeeze(x, (axis,)) for x in (divergence, weights))
    return reduce([(weights * divergence, weights)], reduction, examples)


def of_teacher(read: Callable[P, R]) -> Callable[P, R]:
    """Return a check of a student's argument as one of the teacher's, whose errors name that."""

    @functools.wraps(read)
    def check(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return read(*args, **keywords)
        except (TypeError, ValueError) as error:
            names = r"\b(hidden|kernel|bias|class_axis|logit_scale|softcap)\b"
            kind, message = type(error), re.sub(names, r"teacher_\1", str(error))
        raise kind(message)

    return check
