"""Chunks of a head's classes, whole: their logits and their share of the gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from .._axes import Names, vary_like
from .._numerics import compute_dtype
from .._rows import Places, RowSums, Transform, row_gradients
from .._targets import TargetMass
from .._xla import (
    add_parts,
    add_slice,
    gather_parts,
    is_widened_on_cpu,
    slice_of_bits,
    take_slice,
    transposed,
    with_cpu_plan,
)
from .tokens import Blocks

Result = TypeVar("Result")
# Writes a slice of a gradient: (total, part, start, axis).
Add = Callable[[Array, Array, Array, int], Array]
# Takes the gradient of a chunk's logits to those of hidden and kernel.
Pull = Callable[[Array], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static: how a head is read and computed."""

    class_axis: int  # of the kernel: 1 for (D, C), 0 for (C, D)
    chunk: Any  # classes; None until a device knows how many it has
    dtype: Any  # of the matmuls' operands
    precision: Any = None
    dot_general: Any = None  # in place of `jax.lax.dot_general`
    stats: bool = False  # whether the most probable class is kept, and the moment of a loss
    made_forward: bool = False  # whether gradients are, of a scalar
    block: int = 0  # tokens that are gone over together; 0 for all
    skip: bool = False  # whether those that do not count are in no block
    width: Names = ()  # mapped axes over which the kernel's width is split
    gathered: Names = ()  # the same, of those that no chunk can be gathered over
    cpu: bool = False


class Head(NamedTuple):
    """What is differentiated; or its gradients."""

    hidden: Any  # (N, D); None in what is of the classes alone
    kernel: Any  # (D, C) or (C, D), or this shard's part of D; None in a tree of the others
    bias: Array | None  # (1, C)
    mass: TargetMass | None  # its arrays scalars, (N, 1), (1, C) or (N, C)
    scale: Any = None  # of the logits, a scalar
    places: Any = None  # (N, K), the target mass at few classes; which they are is in Fixed

    def by_token(self, function: Any) -> "Head":
        """Return the head with what is of each token put through a function."""
        mass = None if self.mass is None else self.mass.by_token(function)
        places = None if self.places is None else function(self.places)
        return self._replace(hidden=function(self.hidden), mass=mass, places=places)


class Fixed(NamedTuple):
    """What is not differentiated."""

    class_mask: Array | None = None  # bool, (1, C) or (N, C); None where all classes exist
    target: Array | None = None  # int32, (N, 1), < 0 for none; None for no class indices
    uncounted: Any = False  # bool, (N, 1)
    softcap: Any = None
    places: Array | None = None  # int32, (N, K), < 0 for none: the few classes that have mass
    best: Array | None = None  # int32, (N, 1): the most probable class, once it is known

    def by_token(self, function: Any) -> "Fixed":
        """Return it with what is of each token put through a function."""
        return self._replace(
            class_mask=_mask_by_token(self.class_mask, function),
            **{
                name: function(value)
                for name in ("target", "uncounted", "places", "best")
                if (value := getattr(self, name)) is not None
            },
        )


class Around(NamedTuple):
    """What the gradients of a chunk need to know of all chunks."""

    shift: Array  # (N, 1)
    cotangents: RowSums  # of the sums over all classes

    def by_token(self, function: Any) -> "Around":
        """Return it put through a function."""
        mapped: Around = jax.tree.map(function, self)
        return mapped


class Chunk(NamedTuple):
    """A chunk of the classes."""

    head: Head  # its tables cut to the chunk; see `chunk_mass`
    class_mask: Array | None  # of the classes that exist, and that no earlier chunk had
    start: Array
    first: Array  # the first class that no earlier chunk had
    fresh: Array | None  # (1, chunk): which classes none had; None where chunks do not overlap

    def by_token(self, function: Any) -> "Chunk":
        """Return the chunk with what is of each token put through a function."""
        return self._replace(
            head=self.head.by_token(function),
            class_mask=_mask_by_token(self.class_mask, function),
        )

    def local_index(self, index: Array | None) -> Array | None:
        """Return the index relative to the chunk; outside of it for other chunks' classes."""
        return None if index is None else jnp.where(index >= self.first, index - self.start, -1)

    def places(self, fixed: Fixed) -> Places | None:
        """Return the few classes that have mass, relative to the chunk."""
        index = self.local_index(fixed.places)
        return None if index is None else Places(index, self.head.places)


def _mask_by_token(mask: Array | None, function: Any) -> Array | None:
    """Return a class_mask (N, C) put through a function; (1, C) is of all tokens."""
    return mask if mask is None or mask.shape[0] == 1 else function(mask)


def transform_of(head: Head, fixed: Fixed) -> Transform:
    return Transform(head.scale, fixed.softcap)


def apart_and_target(plan: Plan, fixed: Fixed) -> tuple[Array | None, Array | None]:
    """Return the class that is kept apart, and the target where that may be another one."""
    if keeps_best_apart(plan, fixed):
        return fixed.best, fixed.target
    return fixed.target, None


def keeps_best_apart(plan: Plan, fixed: Fixed) -> bool:
    return plan.stats or fixed.target is None


def on_platform(function: Callable[..., Result], plan: Plan, *arguments: Any) -> Result:
    """Call the function with the plan of the platform.

    On a CPU, half precision that XLA turns into float32 anyway is computed in float32.
    """
    if plan.dot_general is not None or not is_widened_on_cpu(plan.dtype):
        return function(plan, *arguments)
    return with_cpu_plan(function, plan, dataclasses.replace(plan, cpu=True), *arguments)


def chunk_numbers(plan: Plan, head: Head) -> Array:
    count = -(-head.kernel.shape[plan.class_axis] // plan.chunk)
    return jnp.arange(count, dtype=jnp.int32)


def read_chunk(plan: Plan, head: Head, fixed: Fixed, i: Array) -> Chunk:
    """Return the i-th chunk.

    The last one ends with the classes, so it may begin with some seen before.
    """
    num_classes = head.kernel.shape[plan.class_axis]
    start = jnp.minimum(i * plan.chunk, num_classes - plan.chunk)
    kernel = _read_kernel(plan, head.kernel, start)

    def part(table: Array) -> Array:
        return take_slice(table, start, plan.chunk, -1)

    class_mask = None if fixed.class_mask is None else part(fixed.class_mask)
    if class_mask is not None:
        # 0 * NaN is NaN: what a class holds that no counted token has reaches no gradient.
        seen = class_mask & ~fixed.uncounted if class_mask.shape[0] != 1 else class_mask
        needed = jnp.expand_dims(jnp.any(seen, 0), 1 - plan.class_axis)
        finite = jnp.all(jnp.isfinite(kernel), 1 - plan.class_axis, keepdims=True)
        kernel = jnp.where(needed | finite, kernel, 0)
    fresh = None
    if num_classes % plan.chunk:
        fresh = start + jnp.arange(plan.chunk, dtype=jnp.int32)[None] >= i * plan.chunk
        class_mask = fresh if class_mask is None else class_mask & fresh
    head = head._replace(
        kernel=kernel,
        bias=None if head.bias is None else part(head.bias),
        mass=None if head.mass is None else head.mass.by_class(part),
    )
    return Chunk(head, class_mask, start, i * plan.chunk, fresh)


def chunk_mass(chunk: Chunk, mass: TargetMass) -> TargetMass:
    """Return the mass without the probabilities of classes that an earlier chunk had."""
    if chunk.fresh is None or mass.probabilities is None:
        return mass
    probabilities = jnp.where(chunk.fresh, mass.probabilities, 0)
    return dataclasses.replace(mass, probabilities=probabilities)


def _read_kernel(plan: Plan, kernel: Array, start: Array) -> Array:
    """Return a chunk of it, (D, chunk) or (chunk, D), gathered where its width is split."""
    part = _slice_kernel(plan, kernel, start)
    if not plan.width:
        return part
    part = part.astype(plan.dtype)  # so that no more is sent than is used
    return gather_parts(part, plan.width, 1 - plan.class_axis)


def _slice_kernel(plan: Plan, kernel: Array, start: Array) -> Array:
    if not plan.cpu or jnp.finfo(kernel.dtype).bits > 16:
        return take_slice(kernel, start, plan.chunk, plan.class_axis)
    return slice_of_bits(kernel, start, plan.chunk, plan.class_axis)


def chunk_logits(plan: Plan, head: Head) -> Array:
    return _add_bias(head, _product(plan, *_operands(plan, head)))


def chunk_logits_and_pull(plan: Plan, head: Head) -> tuple[Array, Pull]:
    """Return a chunk's logits, and the function of their gradient that returns the head's.

    Those of a given `dot_general` are its own; ours are summed in float32, which the transpose
    of a product of half precision is not.
    """
    if plan.dot_general is None:
        return chunk_logits(plan, head), functools.partial(_matmul_gradients, plan, head)
    logits, pull = jax.vjp(functools.partial(_product, plan), *_operands(plan, head))

    def pull_wide(d_logits: Array) -> tuple[Array, Array]:
        d_hidden, d_kernel = (x.astype(compute_dtype(plan)) for x in pull(d_logits))
        return d_hidden, d_kernel

    return _add_bias(head, logits), pull_wide


def _operands(plan: Plan, head: Head) -> list[Array]:
    operands = [x.astype(plan.dtype) for x in (head.hidden, head.kernel)]
    return [x.astype(compute_dtype(plan)) for x in operands] if plan.cpu else operands


def _add_bias(head: Head, logits: Array) -> Array:
    return logits if head.bias is None else logits + head.bias.astype(logits.dtype)


def _product(plan: Plan, hidden: Array, kernel: Array) -> Array:
    return _matmul(plan, hidden, kernel, 1, 1 - plan.class_axis)


def _matmul(plan: Plan, a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    wide = compute_dtype(plan)
    product: Array = (plan.dot_general or jax.lax.dot_general)(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=plan.precision,
        preferred_element_type=wide,
    )
    return product.astype(wide)


def _matmul_gradients(plan: Plan, head: Head, d_logits: Array) -> tuple[Array, Array]:
    """Return the gradients of hidden and kernel.

    d_logits is rounded to bfloat16, but not to float16, which has no room for a small one.
    """
    narrow = plan.dtype == jnp.bfloat16 and not plan.cpu
    dtype = plan.dtype if narrow else compute_dtype(plan)
    hidden, kernel = (x.astype(plan.dtype).astype(dtype) for x in (head.hidden, head.kernel))
    d_logits = d_logits.astype(dtype)
    d_hidden = _matmul(plan, d_logits, kernel, 1, plan.class_axis)
    if plan.class_axis == 1:
        # A CPU's copy of the tokens pays where all classes are in one product, and are many.
        pays = plan.made_forward and d_logits.shape[1] > hidden.shape[1]
        columns = transposed(hidden) if pays else hidden.T
        return d_hidden, _matmul(plan, columns, d_logits, 1, 0)
    return d_hidden, _matmul(plan, d_logits, hidden, 0, 0)


def zero_gradients(plan: Plan, head: Head) -> Head:
    wide = functools.partial(jnp.zeros_like, dtype=compute_dtype(plan))
    zeros = Head(
        hidden=wide(head.hidden),
        kernel=jnp.zeros_like(head.kernel),
        bias=None if head.bias is None else wide(head.bias),
        mass=jax.tree.map(jnp.zeros_like, head.mass),
        scale=None if head.scale is None else wide(head.scale),
        places=None if head.places is None else wide(head.places),
    )
    return vary_like(head.hidden, zeros)


def blocks_of(plan: Plan, fixed: Fixed) -> Blocks:
    return Blocks.of(plan.block, fixed.uncounted, plan.skip)


def whole(plan: Plan) -> Plan:
    """Return the plan that goes over all tokens together."""
    return dataclasses.replace(plan, block=0, skip=False)


def accumulate(
    plan: Plan, head: Head, total: Head, part: Head, start: Array, add: Add | None = None
) -> Head:
    """Add a chunk's gradients to the whole's, of which it has a slice, or all.

    The kernel's is written once, in its dtype, unless `add` is there to add it. What is of each
    token is left to the caller where the part has none.
    """
    num_classes = head.kernel.shape[plan.class_axis]
    kernel = part.kernel
    if add is not None:
        kernel = add(total.kernel, kernel, start, plan.class_axis)
    else:
        if num_classes % plan.chunk:  # classes seen before get 0
            old = take_slice(total.kernel, start, plan.chunk, plan.class_axis)
            kernel += old.astype(kernel.dtype)
        kernel = kernel.astype(head.kernel.dtype)
        kernel = jax.lax.dynamic_update_slice_in_dim(total.kernel, kernel, start, plan.class_axis)

    def add_columns(total: Array, part: Array) -> Array:
        return (add or add_slice)(total, part, start, 1)

    bias, mass = total.bias, total.mass
    if bias is not None and part.bias is not None:
        bias = add_columns(bias, part.bias)
    if mass is not None and part.mass is not None:
        columns = mass.by_class(add_columns, part.mass)
        smoothing = None if mass.smoothing is None else mass.smoothing + part.mass.smoothing
        mass = dataclasses.replace(columns, smoothing=smoothing)
    scale = None if total.scale is None else total.scale + part.scale
    hidden = total.hidden if part.hidden is None else total.hidden + part.hidden
    places = total.places if part.places is None else total.places + part.places
    return Head(hidden, kernel, bias, mass, scale, places)


def chunk_gradients(
    plan: Plan,
    around: Around,
    chunk: Chunk,
    fixed: Fixed,
    logits_and_pull: tuple[Array, Pull] | None = None,
) -> Head:
    """Return what a chunk adds to the gradients."""
    head = chunk.head
    logits, pull_logits = logits_and_pull or chunk_logits_and_pull(plan, head)
    q, pull = None, None
    if head.mass is not None:

        def values(mass: TargetMass) -> Array:
            return chunk_mass(chunk, mass).values(chunk.class_mask)

        q, pull = jax.vjp(values, head.mass)
    apart, target = map(chunk.local_index, apart_and_target(plan, fixed))
    gradients = row_gradients(
        -1,
        transform_of(head, fixed),
        logits,
        around.shift,
        chunk.class_mask,
        (apart, target),
        q,
        around.cotangents,
        logits.dtype,
        chunk.places(fixed),
    )
    d_mass = None if pull is None else pull(gradients.mass)[0]
    of_head = gradients_of_logits(head, pull_logits, gradients.x, gradients.transform.scale)
    return of_head._replace(mass=d_mass, places=gradients.places)


def gradients_of_logits(head: Head, pull: Pull, d_logits: Array, d_scale: Any) -> Head:
    """Return the gradients of a chunk, given that of its logits before their scale."""
    d_hidden, d_kernel = pull(d_logits)
    d_bias = None if head.bias is None else jnp.sum(d_logits, 0, keepdims=True)
    return Head(d_hidden, d_kernel, d_bias, None, d_scale)


def scatter_width(plan: Plan, gradients: Head) -> Head:
    """Return the gradients with this shard's part of the kernel's, summed over the shards."""
    if not plan.width:
        return gradients
    kernel = add_parts(gradients.kernel, plan.width, 1 - plan.class_axis)
    return gradients._replace(kernel=kernel)


def flatten_tokens(x: Array) -> Array:
    """Return (..., D) as (N, D)."""
    return x.reshape(-1, x.shape[-1]) if x.ndim else x


def gather_kernel(plan: Plan, kernel: Array) -> Array:
    """Return the kernel, whole along the axes over which no chunk can be gathered."""
    if not plan.gathered:
        return kernel
    return gather_parts(kernel, plan.gathered, 1 - plan.class_axis)


def blank_tokens(hidden: Array, uncounted: Array) -> Array:
    """Return hidden states, 0 for tokens that are neither counted nor finite."""
    finite = jnp.all(jnp.isfinite(hidden), -1, keepdims=True)
    return jnp.where(uncounted & ~finite, 0, hidden)


def blank_hidden(gradients: Head, uncounted: Any) -> Head:
    """Return 0 for an uncounted token's hidden state where a kernel of NaN reached its gradient."""
    lost = uncounted & ~jnp.isfinite(gradients.hidden)
    return gradients._replace(hidden=jnp.where(lost, 0, gradients.hidden))
