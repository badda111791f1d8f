"""The classifier head and the loss in one; long for its signature, read twice, and docstring.

```python
loss = jaxent.linear_cross_entropy(hidden, kernel, tokens)                     # (D, C)
loss = jaxent.linear_cross_entropy(hidden, embedding, tokens, class_axis=0)    # (C, D), tied
```

A language model's logits are often its largest array. Here they exist a part at a time, a chunk of
classes or a block of tokens, in the forward pass and in the gradients, of first and second order.
Tokens, classes and the kernel's width may be split over devices.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, Unpack, cast, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ._arguments import (
    ArrayOrList,
    DotGeneral,
    Reduction,
    TargetsLike,
    check_reduction,
    check_return_stats,
    is_of_all_classes,
    read_array,
    read_targets,
)
from ._axes import (
    AxisName,
    flat_names,
    local_index,
    num_shards,
    psum,
    read_axis_names,
)
from ._calls import compiled, public
from ._classes import along
from ._forms import chosen
from ._head.chunks import Fixed, Head, Plan, blank_tokens, flatten_tokens, gather_kernel
from ._head.forward import head_total
from ._head.mesh import Layout, gathered_before, lay_out_given, on_shards, read_layout
from ._head.sizes import choose_block, choose_chunk, is_made_forward
from ._head.streaming import head_sums
from ._head_arguments import (
    check_head_targets,
    read_bias,
    read_chunk_size,
    read_hidden_and_kernel,
    read_product,
)
from ._keywords import LinearCrossEntropyKeywords
from ._numerics import compute_dtype, widened_dtype
from ._reduction import Rows, TokenStats, loss_terms, reduced_loss, token_stats_of
from ._rows import RowSums, combine_argmax, combine_shards
from ._targets import Given, Targets, make_targets, read_given


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """What is static in a head."""

    plan: Plan
    layout: Layout
    reduction: Reduction = "none"


@overload
def linear_cross_entropy(
    hidden: ArrayOrList,
    kernel: ArrayOrList,
    targets: TargetsLike,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[LinearCrossEntropyKeywords],
) -> tuple[Array, TokenStats]: ...
@overload
def linear_cross_entropy(
    hidden: ArrayOrList,
    kernel: ArrayOrList,
    targets: TargetsLike,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[LinearCrossEntropyKeywords],
) -> Array: ...
@overload
def linear_cross_entropy(
    hidden: ArrayOrList,
    kernel: ArrayOrList,
    targets: TargetsLike,
    *,
    return_stats: bool,
    **keywords: Unpack[LinearCrossEntropyKeywords],
) -> Array | tuple[Array, TokenStats]: ...
@public
def linear_cross_entropy(
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
    weight: ArrayOrList | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: ArrayLike = 0.0,
    sample_weight: ArrayOrList | None = None,
    class_mask: ArrayOrList | None = None,
    z_loss: ArrayLike = 0.0,
    logit_scale: ArrayLike = 1.0,
    softcap: float | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
    width_axis_name: AxisName = None,
    return_stats: bool = False,
) -> Array | tuple[Array, TokenStats]:
    r"""Return the cross-entropy of a linear classifier, without ever holding its logits.

    .. math:: \mathrm{linear\_cross\_entropy}(h, K, y) = \mathrm{cross\_entropy}(h K + b, y)

    for every keyword of `jaxent.cross_entropy` but the axes, in values and in gradients. The
    product is accumulated in float32, and so are the gradients across chunks. A token that is
    not counted reaches nothing, even if its hidden state is NaN, and takes no time: those that
    count are gone over in blocks, an eighth of the tokens or 512, and the others not at all. (The
    derivatives of second order, and by `sample_weight`, are of all tokens; so is everything with
    class probabilities, with a class_mask of each token, where a (D, C) kernel in chunks has no
    multiple of 128 classes, and in a program for several devices where the head does not know how
    the tokens are split, by axis names or an explicit mesh.)

    Memory, beyond arguments and results, is a float32 gradient of `hidden`, a copy of the hidden
    states, and two chunks of logits, (N, chunk_size), N being the number of tokens. A chunk has
    1024 classes, or, with few tokens, as many as 8 MB of float32 logits and 32 MB of a float32
    kernel hold. Second order (`jvp` of `grad`, `grad` of `grad`) holds at most one gradient of the
    kernel more.

    On many devices each goes over its own tokens and classes, and sends a few numbers a token
    (docs/sharding.md says what is sent). Where axes are mapped (`shard_map`, `pmap`, `vmap`),
    and on an automatic mesh, the axis names say how the arrays are split; on an explicit mesh
    their types do.

    The logits are computed twice: a fourth matmul, for the sake of memory. Where memory allows, a
    scalar reduction makes its gradients in the forward pass instead, in three matmuls, from all
    logits of a block of tokens, an eighth of them (256 to 512): where a float32 gradient of the
    kernel takes at most 256 MB, and no more than two float32 arrays of all logits do, and those of
    a block's logits a quarter of that, or 120 MB. A `chunk_size` rules that out.
    `python -m benchmarks head_ignored` prints what both forms take. (In a program for several
    devices, the head must know how the tokens are split, as above.)

    Args:
      hidden: hidden states, float, (..., D); any leading shape, none too.
      kernel: float, (D, C), as in `flax.nnx.Linear`; (C, D) with `class_axis=0`, as in an
        embedding.
      targets: class indices, integers, (...); or class probabilities, float, (..., C); or
        `jaxent.SparseTargets`, the probabilities of few classes, (..., K).
      bias: float, (C,).
      class_axis: the kernel's axis of classes.
      dtype: of the matmuls' operands; by default that of `hidden` and `kernel`, promoted, float8
        being copied as bfloat16. Gradients come back in the dtypes of the arguments.
      precision: as in `jax.lax.dot_general`.
      dot_general: a function that is called as `jax.lax.dot_general` is and computes the products
        instead, as in `flax.nnx.Linear`: for quantized training. It is given a block of tokens,
        (N, D), and a chunk of the kernel, (D, C) or (C, D), of the `dtype`, so a scale of a whole
        operand is one of these. Its own rule of differentiation makes the gradients, which are
        rounded to the `dtype` for each chunk. It is static, and closes over constants alone; pass
        the same function each time.
      chunk_size: classes in a chunk, for which memory and speed are to be traded by hand.
      weight, ignore_index, reduction, label_smoothing, sample_weight, class_mask, z_loss,
        logit_scale, softcap: as in `jaxent.cross_entropy`, with logits (..., C). The scale is
        applied in float32, after the bias.
      axis_name: mapped axis or axes over which tokens are split. On an automatic mesh, of the
        first dimension of the tokens; a `jax.sharding.PartitionSpec` names those of several.
      class_axis_name: those over which classes are split. Where they are mapped, kernel,
        bias, weight, class_mask and probabilities are this shard's; class indices are those of
        the whole everywhere.
      width_axis_name: those over which the kernel's D is split, as FSDP does. They split the
        tokens too. Each chunk is gathered when its turn comes, and is larger over many; of
        axes of `vmap` and `pmap` all of the kernel is, before.
      return_stats: whether to return `jaxent.linear_token_stats` of each token as well, from the
        same pass, as in `jaxent.cross_entropy`. (Those of class probabilities beside `weight` or
        `label_smoothing` take a second one.)

    Returns:
      float32, float64 for a float64 `dtype`: a scalar, or for "none" the shape (...). With
      `return_stats`, that and a `jaxent.TokenStats`.

    Raises:
      TypeError: a dtype is none of the above.
      ValueError: shapes do not fit, a number is out of range, or arrays are split in a way
        that cannot be meant.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> hidden = jax.random.normal(jax.random.key(0), (4, 8))
      >>> kernel = jax.random.normal(jax.random.key(1), (8, 1000))
      >>> tokens = jnp.array([3, 14, 159, -100])
      >>> loss = jaxent.linear_cross_entropy(hidden, kernel, tokens)
      >>> bool(jnp.isclose(loss, jaxent.cross_entropy(hidden @ kernel, tokens)))
      True

    References:
      Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024; Hsu et al.,
      "Liger Kernel", 2024 (gradients in the forward pass).
    """
    check_reduction(reduction)
    check_return_stats(return_stats)
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
        axis_name=axis_name,
        class_axis_name=class_axis_name,
        width_axis_name=width_axis_name,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        sample_weight=sample_weight,
        class_mask=class_mask,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
        stats=return_stats,
    )
    if reduction != "none" and chosen("made_forward", is_made_forward, plan, h, k, layout):
        plan = dataclasses.replace(plan, made_forward=True)
    return _linear_cross_entropy(HeadOptions(plan, layout, reduction), h, k, b, given)


@compiled
def _linear_cross_entropy(
    options: HeadOptions, hidden: Array, kernel: Array, bias: Any, given: Given
) -> Array | tuple[Array, TokenStats]:
    plan, layout, reduction = options.plan, options.layout, options.reduction
    if plan.made_forward:
        head, rows = _make_head(plan, layout, hidden, kernel, bias, given)
        loss, of_tokens = _total(plan, head, rows, given, reduction, layout)
        found: Any = (rows, *of_tokens) if plan.stats else None
    else:
        found = rows_of_head(plan, layout, hidden, kernel, bias, given)
        loss = reduced_loss(found, given.z_loss, reduction, layout.examples)
    if not plan.stats:
        return loss
    return loss, stats_of_head(options, hidden, kernel, bias, given, found)


def stats_of_head(
    options: HeadOptions, hidden: Array, kernel: Array, bias: Any, given: Given, found: Rows
) -> TokenStats:
    """Return the statistics of tokens whose sums were found."""
    plan, layout = options.plan, options.layout
    plan = dataclasses.replace(plan, stats=False, made_forward=False)
    plain = functools.partial(rows_of_head, plan, layout, hidden, kernel, bias)
    return token_stats_of(plain, given, found, () if layout.mesh else layout.classes)


def rows_of_head(
    plan: Plan, layout: Layout, hidden: Array, kernel: Array, bias: Any, given: Given
) -> Rows:
    """Return the targets, and shift, sums and most probable class of each token, (..., 1)."""
    head, rows = _make_head(plan, layout, hidden, kernel, bias, given)
    rest = head[2:], _fixed(rows, given.softcap), rows.sample_weight

    def local(hidden: Array, kernel: Array, rest: Any) -> tuple[Array, RowSums, Array | None]:
        others, fixed, sample_weight = jax.tree.map(flatten_tokens, rest)
        head, fitted = _local(plan, hidden, kernel, others)
        num_classes, names = kernel.shape[plan.class_axis], layout.classes
        target, here = fixed.target, None
        if target is not None:
            here = local_index(target, num_classes, names)
        places = fixed.places
        if places is not None:
            places = local_index(places, num_classes, names)
        fixed = fixed._replace(target=here, places=places)
        shift, sums, best = head_sums(fitted, head, fixed, sample_weight)
        index: tuple[Array | None, Array | None] = target, None
        own: tuple[Array | None, Array | None] = here, None
        if best is not None:
            best, best_here = combine_argmax(shift, best, num_classes, names)
            index, own = (best, target), (best_here, here)
        top, sums = combine_shards(shift, sums, index, own, fixed.uncounted, names)
        return cast(
            tuple[Array, RowSums, Array | None],
            jax.tree.map(lambda x: x.reshape(*hidden.shape[:-1], 1), (top, sums, best)),
        )

    return rows, *on_shards(local, layout, plan.class_axis, head.hidden, head.kernel, rest)


def _fixed(rows: Targets, softcap: Any) -> Fixed:
    places = None if rows.places is None else rows.places.index
    return Fixed(rows.class_mask, rows.index, rows.uncounted, softcap, places)


def _total(
    plan: Plan, head: Head, rows: Targets, given: Given, reduction: Reduction, layout: Layout
) -> tuple[Array, Any]:
    divisors: list[Array] = []
    if reduction == "mean":
        totals = psum([jnp.sum(rows.denominator), jnp.sum(rows.sample_weight)], layout.examples)
        divisors = [jnp.where(total == 0, 1, total) for total in totals]
    rest = head[2:], Weights(rows.weights(), given.z_loss, divisors), _fixed(rows, given.softcap)

    def local(hidden: Array, kernel: Array, rest: Any) -> tuple[Array, Any]:
        others, floats, fixed = jax.tree.map(flatten_tokens, rest)
        head, fitted = _local(plan, hidden, kernel, others)
        total, found = head_total(fitted, _divided_terms, head, floats, fixed)
        found = jax.tree.map(lambda x: x.reshape(*hidden.shape[:-1], 1), found)
        return psum(total, flat_names(layout.tokens)), found

    specs = jax.sharding.PartitionSpec(), layout.of_hidden()
    total, found = on_shards(local, layout, plan.class_axis, head.hidden, head.kernel, rest, specs)
    return psum(total, layout.examples), found


class Weights(NamedTuple):
    """The float arrays of a total, of each token or of all."""

    targets: Targets
    z_loss: Any
    divisors: list[Array]

    def by_token(self, function: Any) -> Weights:
        """Return them with what is of each token put through a function."""
        return self._replace(targets=self.targets.by_token(function))


def _divided_terms(floats: Weights, shift: Array, sums: RowSums, is_prediction: Any) -> Array:
    rows, z_loss, divisors = floats
    terms = loss_terms(rows, z_loss, shift, sums, is_prediction)
    numerators = [numerator for numerator, _ in terms]
    if divisors:
        numerators = [n / d for n, d in zip(numerators, divisors)]
    return cast(Array, sum(numerators))


def _local(plan: Plan, hidden: Array, kernel: Array, others: Any) -> tuple[Head, Plan]:
    """Return a device's head, its tokens in a row, and the plan with chunks of its classes."""
    head = Head(flatten_tokens(hidden), kernel, *others)
    num_classes = kernel.shape[plan.class_axis]
    chunk = min(plan.chunk or choose_chunk(plan, head), num_classes)
    return head, dataclasses.replace(plan, chunk=chunk, block=choose_block(plan, head))


def read_head(
    hidden: Any,
    kernel: Any,
    targets: Any,
    *,
    bias: Any,
    class_axis: Any,
    dtype: Any,
    precision: Any,
    dot_general: Any,
    chunk_size: Any,
    axis_name: AxisName,
    class_axis_name: AxisName,
    width_axis_name: AxisName,
    ignore_index: Any,
    stats: bool = False,
    **keywords: Any,
) -> tuple[Plan, Layout, Any, Any, Any, Given]:
    """Check the arguments of a head: what is static, and its arrays."""
    hidden, kernel = read_array("hidden", hidden), read_array("kernel", kernel)
    (width,) = read_axis_names(hidden, kernel, width_axis_name=width_axis_name)
    hidden, kernel, class_axis, dtype = read_hidden_and_kernel(
        hidden, kernel, class_axis, dtype, num_shards(width)
    )
    num_classes = kernel.shape[class_axis]
    targets, ignored = read_targets(targets, ignore_index)
    check_head_targets(targets, hidden, num_classes)
    shape = (*hidden.shape[:-1], num_classes)
    given = read_given("logits", shape, len(shape) - 1, targets, ignored, **keywords)
    bias = read_bias(bias, num_classes)
    layout = read_layout(hidden, kernel, class_axis, axis_name, class_axis_name, width_axis_name)
    mask = given.class_mask
    tables = is_of_all_classes(targets) or (mask is not None and mask.ndim > 1)
    some_uncounted = given.ignore_index is not None or given.sample_weight is not None
    layout, gathered = gathered_before(layout)
    precision, dot_general = read_product(hidden, kernel, class_axis, dtype, precision, dot_general)
    plan = Plan(
        class_axis=class_axis,
        chunk=read_chunk_size(chunk_size),
        dtype=dtype,
        precision=precision,
        dot_general=dot_general,
        stats=stats,
        skip=some_uncounted and not tables and chosen("skip", lambda: layout.owns_all_tokens),
        width=layout.width,
        gathered=gathered,
    )
    return plan, layout, hidden, kernel, bias, given


def _make_head(
    plan: Plan, layout: Layout, hidden: Array, kernel: Array, bias: Any, given: Given
) -> tuple[Head, Targets]:
    """Read off what the arguments of a head say."""
    num_classes = kernel.shape[plan.class_axis]
    # Beyond the hand-written gradients, so that these are summed in a wider dtype.
    hidden, kernel = (x.astype(widened_dtype(x)) for x in (hidden, kernel))
    kernel = gather_kernel(plan, kernel)
    given = lay_out_given(hidden, layout, num_classes, given)
    wide = compute_dtype(plan)
    shape = (*hidden.shape[:-1], num_classes)
    classes = layout.classes if layout.mesh is None else ()
    rows = make_targets(len(shape) - 1, shape, wide, given, classes)
    if layout.mesh is not None and layout.classes:
        rows = rows.unlike_classes(num_classes)
    hidden = blank_tokens(hidden, rows.uncounted)
    if bias is not None:
        bias = along(-1, hidden.ndim, bias.astype(wide))
    places = None if rows.places is None else rows.places.mass
    return Head(hidden, kernel, bias, rows.mass, given.transform(wide).scale, places), rows
