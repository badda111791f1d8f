"""The primitive of a classifier head, whole: the row sums of `hidden @ kernel + bias`, streamed.

The classes come in chunks. A pass over them computes a chunk's logits, (N, chunk), adds up
what `_rows` says of them relative to a running maximum, and forgets them; a second pass
computes them again for the gradients. Nothing of the size tokens x classes is ever held, in
second order neither: there, too, only tangents are carried from chunk to chunk.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import custom_vjp_primal_tree_values, zero_from_primal

from .._axes import vary_alike, vary_like
from .._dense import keeps_mass_apart, row_max, set_sums
from .._numerics import compute_dtype
from .._rows import RowSums, Transform, merge
from .._xla import mapped_alike, packed, scatter_slice, unpacked
from .chunks import (
    Around,
    Chunk,
    Fixed,
    Head,
    Plan,
    accumulate,
    apart_and_target,
    blank_hidden,
    blocks_of,
    chunk_gradients,
    chunk_logits,
    chunk_logits_and_pull,
    chunk_mass,
    chunk_numbers,
    keeps_best_apart,
    on_platform,
    read_chunk,
    scatter_width,
    transform_of,
    whole,
    zero_gradients,
)

Floats = tuple[Head, Around]
Rows = tuple[Array, RowSums, Any]  # shift, sums and most probable class
Residuals = tuple[Head, Fixed, Array]


def head_sums(
    plan: Plan, head: Head, fixed: Fixed, sample_weight: Array
) -> tuple[Array, RowSums, Array | None]:
    """Return shift, sums and most probable class of each token, (N, 1), as `_dense` does.

    With `plan.skip` they are those of a single class where a token is uncounted, unless somebody
    differentiates the sample weight (of which the loss is the derivative) or these sums twice.

    Args:
      plan: the static part; with `stats` there is a moment and a most probable class.
      head: hidden states, kernel, bias and target mass.
      fixed: which classes exist, class indices, uncounted tokens and a cap.
      sample_weight: (N, 1), which is only asked whether it is differentiated.
    """
    head, fixed, sample_weight = vary_alike(head, fixed, sample_weight)
    values, best = _packed_sums(plan, head, fixed, sample_weight)
    shift, sums = unpack(plan, head, fixed, values)
    return jax.lax.stop_gradient(shift), sums, best


# The class is an output of its own, as no float has the number of each.
def pack(head: Head, fixed: Fixed, rows: Rows) -> tuple[tuple[Any, Array | None], Residuals]:
    """Return the rows as a primitive does, and what their gradient needs."""
    shift, sums, best = rows
    # 0 in an uncounted row of NaN: an eager gradient keeps it, where `jax_debug_nans` sees it.
    shift = jnp.where(fixed.uncounted & ~jnp.isfinite(shift), 0, shift)
    values = packed((shift, sums), -1)
    residuals = head, fixed._replace(best=best), shift
    if best is not None:
        best = mapped_alike(best, values[:, :1])
    return (values, best), residuals


def unpack(plan: Plan, head: Head, fixed: Fixed, values: Any) -> tuple[Array, RowSums]:
    """Return shift and sums, or the gradients of theirs, of what was packed."""
    asked = _sums_like(plan, head, fixed, 0)
    shift_and_sums: tuple[Array, RowSums] = unpacked(jax.tree.structure((0, asked)), values, -1)
    return shift_and_sums


def _sums_like(plan: Plan, head: Head, fixed: Fixed, value: Any) -> RowSums:
    """Return sums of this value, where they are asked for."""
    best = keeps_best_apart(plan, fixed)
    mass = None if head.mass is None and head.places is None else value
    return RowSums(
        left=value,
        others=value,
        moment=value if plan.stats else None,
        target=value if best and fixed.target is not None else None,
        left_mass=value if keeps_mass_apart(value, head.mass, head.places) else None,
        mass=mass,
        mass_logit=mass,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_sums(
    plan: Plan, head: Head, fixed: Fixed, sample_weight: Array
) -> tuple[Array, Array | None]:
    return _packed_sums_and_residuals(plan, head, fixed, sample_weight)[0]


def _packed_sums_and_residuals(
    plan: Plan, head: Head, fixed: Fixed, sample_weight: Array
) -> tuple[tuple[Array, Array | None], Residuals]:
    return pack(head, fixed, streamed_sums(plan, head, fixed, sample_weight))


def _packed_sums_fwd(plan: Plan, head: Any, fixed: Any, sample_weight: Any) -> Any:
    if sample_weight.perturbed:
        plan = whole(plan)
    values = custom_vjp_primal_tree_values((head, fixed, sample_weight))
    return _packed_sums_and_residuals(plan, *values)


def _packed_sums_bwd(plan: Plan, residuals: Residuals, cotangent: Any) -> tuple[Head, None, None]:
    return gradients_of_rows(plan, residuals, cotangent), None, None


def gradients_of_rows(plan: Plan, residuals: Residuals, cotangent: Any) -> Head:
    """Return the gradients of a head, given those of what `pack` returned."""
    head, fixed, shift = residuals
    _, cotangents = unpack(plan, head, fixed, cotangent[0])
    gradients = _gradients(plan, (head, Around(shift, cotangents)), fixed)
    return blank_hidden(gradients, fixed.uncounted)


_packed_sums.defvjp(_packed_sums_fwd, _packed_sums_bwd, symbolic_zeros=True)


def cast_like(gradients: Head, head: Head) -> Head:
    cast: Head = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, head)
    return cast


# The two passes. Each is a custom_jvp, whose tangents are a scan of their own: it carries
# nothing but tangents and computes a chunk's logits again, so its transpose is small too.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def streamed_sums(plan: Plan, head: Head, fixed: Fixed, sample_weight: Array) -> Rows:
    rows: Rows = on_platform(_sums_pass, plan, head, fixed)
    return rows


def _sums_pass(plan: Plan, head: Head, fixed: Fixed) -> Rows:
    blocks = blocks_of(plan, fixed)
    head, fixed = head.by_token(blocks.first), fixed.by_token(blocks.first)

    def step(rows: Rows, i: Array) -> tuple[Rows, None]:
        def turn(rows: Rows, chunk: Chunk, fixed: Fixed) -> tuple[Rows, None]:
            return add_chunk(plan, rows, chunk, fixed, chunk_logits(plan, chunk.head)), None

        return blocks.run(turn, rows, read_chunk(plan, head, fixed, i), fixed)

    rows, _ = jax.lax.scan(step, no_classes(plan, head, fixed), chunk_numbers(plan, head))
    shift, sums, best = rows
    if plan.skip:
        skipped = blocks.unreached()
        shift, sums = jnp.where(skipped, 0, shift), sums.blank(skipped)
    back: Rows = jax.tree.map(blocks.back, (shift, sums, best))
    return back


def no_classes(plan: Plan, head: Head, fixed: Fixed) -> Rows:
    """Return what `add_chunk` begins with."""
    dtype = compute_dtype(plan)
    zeros = jnp.zeros((head.hidden.shape[0], 1), dtype)
    # Below all logits, and finite: -inf - -inf is NaN.
    lowest = zeros + jnp.finfo(dtype).min
    none = _sums_like(plan, head, fixed, zeros)._replace(left=zeros - jnp.inf)
    best = jnp.zeros(zeros.shape, jnp.int32) if keeps_best_apart(plan, fixed) else None
    rows: Rows = vary_like(head.hidden, (lowest, none, best))
    return rows


def add_chunk(plan: Plan, rows: Rows, chunk: Chunk, fixed: Fixed, logits: Array) -> Rows:
    """Return shift, sums and most probable class with those of one more chunk."""
    shift, sums, best = rows
    transform = transform_of(chunk.head, fixed)
    keeps_best = best is not None
    _, top, apart = row_max(-1, transform, logits, chunk.class_mask, with_class=keeps_best)
    target = chunk.local_index(fixed.target)
    has_target = None if target is None else (target >= 0) & (target < plan.chunk)
    stays: Any
    if best is not None:
        stays = (top > shift) | (jnp.isnan(top) & ~jnp.isnan(shift))  # as argmax
        best = jnp.where(stays, chunk.start + apart, best)
        if has_target is not None and fixed.target is not None:
            # That of a row without one stays 0, whatever the shift.
            has_target |= fixed.target < 0
    else:
        apart, target, stays = target, None, has_target
    change = shift - jnp.maximum(shift, top)
    shift = jnp.maximum(shift, top)
    part = _chunk_sums(plan, chunk, fixed, logits, transform, shift, (apart, target))
    return shift, merge(sums.rebase(change), part, stays, has_target), best


def _chunk_sums(
    plan: Plan,
    chunk: Chunk,
    fixed: Fixed,
    logits: Array,
    transform: Transform,
    shift: Array,
    index: tuple[Array | None, Array | None],
) -> RowSums:
    mass = chunk.head.mass
    if mass is not None:
        mass = chunk_mass(chunk, mass)
    places = chunk.places(fixed)
    return set_sums(-1, plan.stats, logits, transform, shift, chunk.class_mask, index, mass, places)


@streamed_sums.defjvp
def _sums_jvp(plan: Plan, primals: tuple[Head, Fixed, Array], tangents: Any) -> Any:
    # Of all tokens: a derivative by the weight of an uncounted one asks for its sums.
    head, fixed, _ = primals
    plan = whole(plan)
    shift, sums, best = streamed_sums(plan, *primals)
    fixed = fixed._replace(best=best)
    plan = finer(plan)

    def local(head: Head, i: Array) -> RowSums:
        """Return the sums over a chunk, with the derivatives of its share in those over all."""
        chunk = read_chunk(plan, head, fixed, i)
        # A rule for reverse mode alone, of a given `dot_general`, has derivatives in that form.
        logits, _ = chunk_logits_and_pull(plan, chunk.head)
        apart, target = map(chunk.local_index, apart_and_target(plan, fixed))
        transform = transform_of(head, fixed)
        return _chunk_sums(plan, chunk, fixed, logits, transform, shift, (apart, target))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(d_sums: RowSums, i: Array) -> tuple[RowSums, None]:
        part = jax.jvp(lambda head: local(head, i), (head,), tangents[:1])[1]
        return jax.tree.map(jnp.add, d_sums, part), None

    steps = chunk_numbers(plan, head)
    zeros = vary_like(head.hidden, jax.tree.map(jnp.zeros_like, sums))
    d_sums, _ = jax.lax.scan(step, zeros, steps)
    d_best = None if best is None else zero_from_primal(best)
    return (shift, sums, best), (jnp.zeros_like(shift), d_sums, d_best)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(plan: Plan, floats: Floats, fixed: Fixed) -> Head:
    """Return the gradients of a head, in the dtypes of its arrays."""
    return on_platform(_gradients_pass, plan, floats, fixed)


def _gradients_pass(plan: Plan, floats: Floats, fixed: Fixed) -> Head:
    blocks = blocks_of(plan, fixed)
    head, around = floats[0].by_token(blocks.first), floats[1].by_token(blocks.first)
    fixed = fixed.by_token(blocks.first)

    def step(total: Head, i: Array) -> tuple[Head, None]:
        def turn(of_tokens: Any, around: Around, chunk: Chunk, fixed: Fixed) -> tuple[Any, Head]:
            part = chunk_gradients(plan, around, chunk, fixed)
            mass = part.mass
            if mass is not None:  # whose other arrays have no gradient
                mass = dataclasses.replace(mass, sample_weight=None, share=None)
            of_tokens = jax.tree.map(jnp.add, of_tokens, (part.hidden, part.places))
            return of_tokens, part._replace(hidden=None, mass=mass, places=None)

        chunk = read_chunk(plan, head, fixed, i)
        of_tokens = total.hidden, total.places
        (hidden, places), part = blocks.run(turn, of_tokens, around, chunk, fixed)
        total = total._replace(hidden=hidden, places=places)
        return accumulate(plan, head, total, scatter_width(plan, part), chunk.start), None

    zeros = zero_gradients(plan, head)
    gradients, _ = jax.lax.scan(step, zeros, chunk_numbers(plan, head))
    # In the dtype of the result: of float32 the order would be changed in another array.
    return cast_like(gradients, head).by_token(blocks.back)


@_gradients.defjvp
def _gradients_jvp(plan: Plan, primals: tuple[Floats, Fixed], tangents: Any) -> tuple[Head, Head]:
    floats, fixed = primals
    head = floats[0]
    gradients = _gradients(plan, *primals)
    plan = finer(whole(plan))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total: Head, i: Array) -> tuple[Head, None]:
        def part(floats: Floats) -> tuple[Head, Array]:
            head, around = floats
            chunk = read_chunk(plan, head, fixed, i)
            gradients = chunk_gradients(plan, around, chunk, fixed)
            return scatter_width(plan, gradients), chunk.start

        _, d_part, start = jax.jvp(part, (floats,), tangents[:1], has_aux=True)
        return accumulate(plan, head, total, d_part, start, scatter_slice), None

    zeros = zero_gradients(plan, head)
    d_gradients, _ = jax.lax.scan(step, zeros, chunk_numbers(plan, head))
    return gradients, cast_like(d_gradients, head)


def finer(plan: Plan) -> Plan:
    """Return the plan with smaller chunks.

    Tangents need several arrays of a chunk's size where the first order needs one.
    """
    return dataclasses.replace(plan, chunk=-(-plan.chunk // 4))
