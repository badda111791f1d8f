"""Distillation: the divergence of a student from a teacher; long for two signatures and docstrings.

```python
loss = jaxent.distillation(logits, teacher_logits, temperature=2.0)
loss = jaxent.linear_distillation(hidden, kernel, teacher_hidden, teacher_kernel)  # no logits
```

Logits that are there are compared as they are (`_divergence`), those of two heads a chunk of
classes at a time (`_head/divergence.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ._arguments import (
    ArrayOrList,
    DotGeneral,
    Reduction,
    check_reduction,
    check_return_stats,
    describe,
    of_teacher,
    read_array,
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
from ._axes import AxisName, Names, num_shards, read_axis_names
from ._calls import compiled, public
from ._classes import along
from ._divergence import Form, row_divergences
from ._forms import chosen
from ._head.chunks import Fixed, Head, Plan, blank_tokens, flatten_tokens, gather_kernel
from ._head.divergence import Pair, Plans, head_divergences
from ._head.mesh import (
    Layout,
    check_divisible,
    gathered_before,
    lay_out_given,
    on_shards,
    read_layout,
)
from ._head.sizes import balance, choose_block, choose_chunk
from ._head_arguments import read_bias, read_chunk_size, read_hidden_and_kernel, read_product
from ._keywords import DistillationKeywords, LinearDistillationKeywords
from ._numerics import compute_dtype, nan_where
from ._reduction import TokenStats, reduce, squeezed
from ._rows import Transform
from ._targets import read_examples, weights_of
from ._xla import zeros_like

# XLA's CPU compiler holds so many arrays of a chunk's logits, of both heads and what is made of
# them, where the loss alone holds one; chunks are as much smaller there (jax 0.12.0.1).
CPU_ARRAYS, CPU_ARRAYS_BETWEEN = 4, 8


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


@overload
def distillation(
    logits: ArrayOrList,
    teacher_logits: ArrayOrList,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[DistillationKeywords],
) -> tuple[Array, TokenStats]: ...
@overload
def distillation(
    logits: ArrayOrList,
    teacher_logits: ArrayOrList,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[DistillationKeywords],
) -> Array: ...
@overload
def distillation(
    logits: ArrayOrList,
    teacher_logits: ArrayOrList,
    *,
    return_stats: bool,
    **keywords: Unpack[DistillationKeywords],
) -> Array | tuple[Array, TokenStats]: ...
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
    return_stats: bool = False,
) -> Array | tuple[Array, TokenStats]:
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

    The teacher is a constant: its logits and its scale have no gradient. Everything else has
    gradients of first and second order: logits, logit_scale, sample_weight, and a temperature or
    beta that is an array. No term is negative, so nothing cancels: loss and gradient keep their
    digits where the two distributions are nearly the same, and are 0 where they are the same.

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
      return_stats: whether to return statistics of the student's q with the teacher's p as targets
        as well: (loss, stats), as `jax.value_and_grad(..., has_aux=True)` takes it. They are those
        of `jaxent.token_stats` of z / T and p: `log_prob` is :math:`\sum_c p_c \log q_c`, `entropy`
        that of q, and `correct` whether the two agree on the most probable class. What does not
        count has 0, the prediction -1, and is not correct.

    Returns:
      float32, float64 if either's logits are: a scalar, or for "none" the per-example shape. With
      `return_stats`, that and a `jaxent.TokenStats`.
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
      Array(0.7794, dtype=float32)
      >>> jaxent.distillation(student, teacher, beta=0.5, temperature=2.0).round(4)
      Array(0.0516, dtype=float32)

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
            f"logits are {describe(x)}, teacher_logits {describe(w)}: they must have the same "
            "shape (pad the smaller vocabulary, and exclude what was added by class_mask)"
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
        return_stats=return_stats,
    )
    examples, classes = read_axis_names(x, w, axis_name=axis_name, class_axis_name=class_axis_name)
    return _distillation(Options(form, axis, reduction, examples, classes), x, w, given)


@compiled
def _distillation(
    options: Options, logits: Array, teacher_logits: Array, given: Given
) -> Array | tuple[Array, TokenStats]:
    axis, classes = options.axis, options.classes
    dtype = compute_dtype(logits, teacher_logits)
    class_mask, sample_weight = read_counted(axis, logits.shape, dtype, given, classes)
    coolness, beta = given.scalars(dtype)
    transform, teacher_transform = given.transforms(
        compute_dtype(logits), compute_dtype(teacher_logits)
    )
    divergence, stats = row_divergences(
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
    loss = reduced(axis, divergence, sample_weight, options.reduction, options.examples)
    return loss if stats is None else (loss, squeezed(axis, stats))


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """What is static in a divergence of heads."""

    plans: Plans
    layout: Layout
    reduction: Reduction
    skip: bool  # whether tokens that do not count may be left out


@overload
def linear_distillation(
    hidden: ArrayOrList,
    kernel: ArrayOrList,
    teacher_hidden: ArrayOrList,
    teacher_kernel: ArrayOrList,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[LinearDistillationKeywords],
) -> tuple[Array, TokenStats]: ...
@overload
def linear_distillation(
    hidden: ArrayOrList,
    kernel: ArrayOrList,
    teacher_hidden: ArrayOrList,
    teacher_kernel: ArrayOrList,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[LinearDistillationKeywords],
) -> Array: ...
@overload
def linear_distillation(
    hidden: ArrayOrList,
    kernel: ArrayOrList,
    teacher_hidden: ArrayOrList,
    teacher_kernel: ArrayOrList,
    *,
    return_stats: bool,
    **keywords: Unpack[LinearDistillationKeywords],
) -> Array | tuple[Array, TokenStats]: ...
@public
def linear_distillation(
    hidden: ArrayOrList,
    kernel: ArrayOrList,
    teacher_hidden: ArrayOrList,
    teacher_kernel: ArrayOrList,
    *,
    bias: ArrayOrList | None = None,
    teacher_bias: ArrayOrList | None = None,
    class_axis: int = -1,
    teacher_class_axis: int = -1,
    beta: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    dot_general: DotGeneral | None = None,
    teacher_dot_general: DotGeneral | None = None,
    chunk_size: int | None = None,
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
    width_axis_name: AxisName = None,
    return_stats: bool = False,
) -> Array | tuple[Array, TokenStats]:
    r"""Return the divergence of a student's head from a teacher's, without holding either's logits.

    .. math:: \mathrm{linear\_distillation}(h, K, h', K') =
              \mathrm{distillation}(h K + b, h' K' + b')

    for every keyword of `jaxent.distillation` but the axes, in values and in gradients. The two
    heads have the same tokens and classes, and widths of their own. Both are gone over together,
    in chunks of classes: once for their normalizers, once for the divergence, and once for the
    gradients. Products are accumulated in float32. The teacher is a constant.

    Memory, beyond arguments and results, is a float32 gradient of `hidden` and chunks of both
    logits, (N, chunk_size). Tokens that do not count take no time, as in
    `jaxent.linear_cross_entropy`; what they hold reaches nothing, even if it is NaN.

    Args:
      hidden: the student's hidden states, float, (..., D).
      kernel: float, (D, C), or (C, D) with `class_axis=0`.
      teacher_hidden, teacher_kernel: the teacher's, (..., D') and (D', C), or (C, D') with
        `teacher_class_axis=0`.
      bias, teacher_bias: float, (C,).
      class_axis, teacher_class_axis: the kernels' axes of classes.
      beta, temperature, targets, ignore_index, reduction, sample_weight, class_mask, logit_scale,
        softcap, teacher_logit_scale, teacher_softcap: as in `jaxent.distillation`, with logits
        (..., C).
      dtype: of the operands of both products; by default each head's own.
      precision: as in `jax.lax.dot_general`.
      dot_general, teacher_dot_general: functions that compute the student's products and the
        teacher's, as in `jaxent.linear_cross_entropy`; `jax.lax.dot_general` by default.
      chunk_size: classes in a chunk, for which memory and speed are to be traded by hand.
      axis_name, class_axis_name, width_axis_name: as in `jaxent.linear_cross_entropy`. The teacher
        is split as the student is.
      return_stats: as in `jaxent.distillation`, from the same passes.

    Returns:
      float32, float64 for a float64 product: a scalar, or for "none" the shape (...). With
      `return_stats`, that and a `jaxent.TokenStats`.

    Raises:
      TypeError: a dtype is none of the above.
      ValueError: shapes do not fit, a number is out of range, or arrays are split in a way that
        cannot be meant.

    Example:
      >>> import jax
      >>> import jaxent
      >>> hidden, wide = (jax.random.normal(jax.random.key(0), (4, d)) for d in (8, 16))
      >>> kernel, teacher = (jax.random.normal(jax.random.key(1), (d, 1000)) for d in (8, 16))
      >>> loss = jaxent.linear_distillation(hidden, kernel, wide, teacher)
      >>> bool(jax.numpy.isclose(loss, jaxent.distillation(hidden @ kernel, wide @ teacher)))
      True

    References:
      As `jaxent.distillation`; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
      Models", 2024.
    """
    check_reduction(reduction)
    names = axis_name, class_axis_name, width_axis_name
    split = read_axis_names(
        read_array("hidden", hidden), read_array("kernel", kernel), width_axis_name=width_axis_name
    )
    num_parts = num_shards(split[0])
    h, k, class_axis, student_dtype = read_hidden_and_kernel(
        hidden, kernel, class_axis, dtype, num_parts
    )
    teacher_h, teacher_k, teacher_class_axis, teacher_dtype = of_teacher(read_hidden_and_kernel)(
        teacher_hidden, teacher_kernel, teacher_class_axis, dtype, num_parts
    )
    num_classes = k.shape[class_axis]
    if teacher_h.shape[:-1] != h.shape[:-1]:
        raise ValueError(
            f"hidden is {describe(h)}, teacher_hidden {describe(teacher_h)}: they must have the "
            "same tokens, that is the same shape except for the last dimension"
        )
    if teacher_k.shape[teacher_class_axis] != num_classes:
        raise ValueError(
            f"kernel is {describe(k)}, with {num_classes} classes along its axis {class_axis}; "
            f"teacher_kernel {describe(teacher_k)}, with {teacher_k.shape[teacher_class_axis]} "
            f"along its axis {teacher_class_axis}: they must have the same classes (pad the "
            "smaller vocabulary, and exclude what was added by class_mask)"
        )
    shape = (*h.shape[:-1], num_classes)
    form, given = read_given(
        "logits",
        shape,
        len(shape) - 1,
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
        return_stats=return_stats,
    )
    b, teacher_b = read_bias(bias, num_classes), of_teacher(read_bias)(teacher_bias, num_classes)
    layout = read_layout(h, k, class_axis, *names)
    if layout.mesh is not None:
        check_divisible("teacher_hidden", teacher_h, layout.of_hidden(), layout.mesh)
        kernel_spec = layout.of_kernel(teacher_class_axis)
        check_divisible("teacher_kernel", teacher_k, kernel_spec, layout.mesh)
    layout, gathered = gathered_before(layout)
    chunk = read_chunk_size(chunk_size)

    def plan(hidden: Any, kernel: Any, class_axis: int, dtype: Any, dot_general: Any) -> Plan:
        product = read_product(hidden, kernel, class_axis, dtype, precision, dot_general)
        return Plan(
            class_axis,
            chunk,
            dtype,
            *product,
            stats=form.stats,
            width=layout.width,
            gathered=gathered,
        )

    of_teachers = teacher_h, teacher_k, teacher_class_axis, teacher_dtype, teacher_dot_general
    plans = Plans(
        plan(h, k, class_axis, student_dtype, dot_general), of_teacher(plan)(*of_teachers), form
    )
    by_token = given.class_mask is not None and given.class_mask.ndim > 1
    skip = not by_token and chosen("skip", lambda: layout.owns_all_tokens)
    options = HeadOptions(plans, layout, reduction, skip)
    return _linear_distillation(
        options, Pair(h, teacher_h), Pair(k, teacher_k), Pair(b, teacher_b), given
    )


@compiled
def _linear_distillation(
    options: HeadOptions, hidden: Pair, kernel: Pair, bias: Pair, given: Given
) -> Array | tuple[Array, TokenStats]:
    plans, layout = options.plans, options.layout
    pair, dtype = plans.pair, plans.dtype
    num_classes, ndim = kernel.student.shape[plans.student.class_axis], hidden.student.ndim
    shape = (*hidden.student.shape[:-1], num_classes)
    kernel = Pair(*map(gather_kernel, pair, kernel))
    given = lay_out_given(hidden.student, layout, num_classes, given)
    classes = layout.classes if layout.mesh is None else ()
    class_mask, sample_weight = read_counted(ndim - 1, shape, dtype, given, classes)
    skip = options.skip and sample_weight is not None
    if sample_weight is None:
        sample_weight = zeros_like(hidden.student[..., :1], dtype) + 1
    uncounted = sample_weight == 0
    coolness, beta = given.scalars(dtype)
    transforms = given.transforms(*(compute_dtype(plan) for plan in pair))

    def read(plan: Plan, bias: Any, transform: Transform) -> tuple[Head, Fixed]:
        if bias is not None:
            bias = along(-1, ndim, bias.astype(compute_dtype(plan)))
        rest = Head(None, None, bias, None, transform.scale)
        return rest, Fixed(class_mask, None, uncounted, transform.cap)

    heads_and_fixed = Pair(*map(read, pair, bias, transforms))
    rest = heads_and_fixed, coolness, beta, sample_weight
    student_hidden, teacher_hidden = (blank_tokens(x, uncounted) for x in hidden)

    def local(hidden: Array, kernel: Array, others: tuple[Array, Array, Any]) -> Any:
        teacher_hidden, teacher_kernel, rest = others
        heads_and_fixed, coolness, beta, sample_weight = jax.tree.map(flatten_tokens, rest)
        (student, fixed), (teacher, teacher_fixed) = heads_and_fixed
        student = student._replace(hidden=flatten_tokens(hidden), kernel=kernel)
        teacher = teacher._replace(hidden=flatten_tokens(teacher_hidden), kernel=teacher_kernel)
        heads = Pair(student, teacher)
        fitted = _fitted(plans, heads, skip)
        found = head_divergences(
            fitted,
            heads,
            Pair(fixed, teacher_fixed),
            coolness,
            beta,
            sample_weight,
            layout.classes,
        )
        return jax.tree.map(lambda x: x.reshape(*hidden.shape[:-1], 1), found)

    others = teacher_hidden, kernel.teacher, rest
    specs = (
        layout.of_hidden(),
        layout.of_kernel(plans.teacher.class_axis),
        jax.tree.map(functools.partial(layout.of_argument, shape), rest),
    )
    divergence, stats = on_shards(
        local, layout, plans.student.class_axis, student_hidden, kernel.student, others, specs=specs
    )
    loss = reduced(ndim - 1, divergence, sample_weight, options.reduction, layout.examples)
    return loss if stats is None else (loss, squeezed(ndim - 1, stats))


def _fitted(plans: Plans, heads: Pair, skip: bool) -> Plans:
    """Return the plans with chunks of a device's own classes, and blocks of its tokens."""
    num_classes = heads.student.kernel.shape[plans.student.class_axis]
    each = list(zip(plans.pair, heads))
    chunk, cpu_chunk = plans.student.chunk, None
    if chunk is None:
        chunk = min(choose_chunk(*plan_and_head) for plan_and_head in each)
        arrays = CPU_ARRAYS_BETWEEN if plans.form.kind == "between" else CPU_ARRAYS
        cpu_chunk = balance(num_classes, max(chunk // arrays, 128), 128)
    plans = dataclasses.replace(plans, cpu_chunk=cpu_chunk).both(
        functools.partial(dataclasses.replace, chunk=min(chunk, num_classes), skip=skip)
    )
    block = min(choose_block(*plan_and_head) for plan_and_head in zip(plans.pair, heads))
    return plans.both(functools.partial(dataclasses.replace, block=block))


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
    return_stats: Any,
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
    check_return_stats(return_stats)
    form = Form(kind, isinstance(temperature, Array), isinstance(beta, Array), return_stats)
    return form, given


def read_counted(
    axis: int, shape: tuple[int, ...], dtype: Any, given: Given, classes: Names = ()
) -> tuple[Array | None, Array | None]:
    """Return which classes exist, and the sample weights, (..., 1, ...), 0 for what is not counted.

    The weights are None where all are 1.
    """
    class_mask, _, is_gone, sample_weight = read_examples(axis, shape, dtype, given, classes)
    if given.ignore_index is not None:
        ignored = jnp.expand_dims(given.targets == given.ignore_index, axis)
        is_gone = ignored if is_gone is None else ignored | is_gone
    if is_gone is not None:
        sample_weight = weights_of(sample_weight, is_gone, dtype)
    return class_mask, sample_weight


def reduced(
    axis: int, divergence: Array, sample_weight: Any, reduction: Reduction, examples: Names
) -> Array:
    """Return the reduction of divergences and sample weights, (..., 1, ...)."""
    weights = zeros_like(divergence) + 1 if sample_weight is None else sample_weight
    divergence, weights = squeezed(axis, (divergence, weights))
    return reduce([(weights * divergence, weights)], reduction, examples)
