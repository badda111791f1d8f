"""The primitive of a classifier head: the row sums of `hidden @ kernel + bias`, streamed.

The classes come in chunks. A pass over them computes a chunk's logits, (N, chunk), adds up
what `_softmax` says of them relative to a running maximum, and forgets them; a second pass
computes them again for the gradients. Nothing of the size tokens x classes is ever held, in
second order neither: there, too, only tangents are carried from chunk to chunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._axes import vary_alike, vary_like
from ._chunks import (
    Fixed,
    Head,
    Plan,
    accumulate,
    blank_hidden,
    chunk_gradients,
    chunk_logits,
    chunk_numbers,
    load_kernel,
    on_platform,
    read_chunk,
    scatter_slice,
    zero_gradients,
)
from ._classes import pick
from ._numerics import compute_dtype, times
from ._softmax import RowSums, cap, product, unless_lost


def head_sums(plan: Plan, head: Head, fixed: Fixed) -> tuple[Array, RowSums, Array]:
    """Shift, sums and most probable class of each token, (N, 1); of `_softmax.row_sums`.

    Args:
      plan: the static part; with `stats` there is a moment and a most probable class.
      head: hidden states, kernel, bias and target mass.
      fixed: which classes exist, class indices, uncounted tokens and a cap.
    """
    head, fixed = vary_alike(head, fixed)
    packed, best = _packed_sums(plan, head, fixed)
    shift, sums = _unpack(plan, head, fixed, packed)
    return jax.lax.stop_gradient(shift), sums, best


# One array of floats, for `vmap`'s sake: see `_softmax`. The class has its own, as no float has
# the number of each: it is selected by the sums, so that `vmap` maps both or neither.
def _pack(shift, sums, best):
    packed = jnp.concatenate(jax.tree.leaves((shift, sums)), -1)
    if best is not None:
        best = jnp.where(jnp.any(packed > 0, -1, keepdims=True), best, best)
    return packed, best


def _unpack(plan, head, fixed, packed):
    mass = None if head.mass is None else 0
    moment = 0 if plan.stats else None
    asked = RowSums(0, moment, None if fixed.target is None else 0, mass, mass)
    structure = jax.tree.structure((0, asked))
    return jax.tree.unflatten(structure, jnp.split(packed, packed.shape[-1], -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_sums(plan, head, fixed):
    return _packed_sums_fwd(plan, head, fixed)[0]


def _packed_sums_fwd(plan, head, fixed):
    shift, sums, best = streamed_sums(plan, head, fixed)
    # 0 in an uncounted row of NaN: an eager gradient keeps it, where `jax_debug_nans` sees it.
    shift = jnp.where(fixed.uncounted & ~jnp.isfinite(shift), 0, shift)
    return _pack(shift, sums, best), (head, fixed, shift)


def _packed_sums_bwd(plan, residuals, cotangent):
    head, fixed, shift = residuals
    _, cotangents = _unpack(plan, head, fixed, cotangent[0])
    gradients = _gradients(plan, (head, shift, cotangents), fixed)
    return _cast(blank_hidden(gradients, fixed.uncounted), head), None


_packed_sums.defvjp(_packed_sums_fwd, _packed_sums_bwd)


def _cast(gradients, head):
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, head)


# The two passes. Each is a custom_jvp, whose tangents are a scan of their own: it carries
# nothing but tangents and computes a chunk's logits again, so its transpose is small too.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def streamed_sums(plan, head, fixed):
    return on_platform(sums_pass, plan, head, fixed)


def sums_pass(plan, head, fixed, keep=False):
    index = fixed.target
    dtype = compute_dtype(plan)
    zeros = jnp.zeros((head.hidden.shape[0], 1), dtype)

    def step(carry, i):
        shift, total, moment, picked, mass_sum, target_sum, best = carry
        chunk = read_chunk(plan, head, fixed, i)
        logits = chunk_logits(plan, chunk.head)
        z = cap(fixed.softcap, logits)
        if chunk.shown is not None:
            z = jnp.where(chunk.shown, z, -jnp.inf)
        top = jnp.max(z, -1, keepdims=True)
        if plan.stats:
            first = jnp.argmax(z, -1, keepdims=True).astype(jnp.int32)
            better = (top > shift) | (jnp.isnan(top) & ~jnp.isnan(shift))  # as argmax
            best = jnp.where(better, chunk.start + first, best)
        change = shift - jnp.maximum(shift, top)
        shift = jnp.maximum(shift, top)
        centred = z - shift
        if plan.stats:
            moment = jnp.exp(change) * moment + times(jnp.exp(change) * total, change)
            moment += jnp.sum(product(jnp.exp(centred), centred), -1, keepdims=True)
        total = jnp.exp(change) * total + jnp.sum(jnp.exp(centred), -1, keepdims=True)
        if index is not None:
            here = (chunk.index >= 0) & (chunk.index < plan.chunk)
            picked = jnp.where(here, pick((z,), chunk.index, -1), picked)
        if head.mass is not None:
            q = unless_lost(chunk.mass(chunk.head), centred)
            target_sum += times(mass_sum, change) + jnp.sum(product(q, centred), -1, keepdims=True)
            mass_sum += jnp.sum(q, -1, keepdims=True)
        carry = shift, total, moment, picked, mass_sum, target_sum, best
        return carry, logits if keep else None

    # Below all logits, and finite: -inf - -inf is NaN.
    lowest = zeros + jnp.finfo(dtype).min
    init = (lowest, *(zeros,) * 5, jnp.zeros(zeros.shape, jnp.int32))
    init = vary_like(head.hidden, init)
    carry, kept = jax.lax.scan(step, init, chunk_numbers(plan, head))
    shift, total, moment, picked, mass_sum, target_sum, best = carry
    sums = RowSums(
        total=total,
        moment=moment if plan.stats else None,
        picked=None if index is None else picked - shift,
        mass_sum=None if head.mass is None else mass_sum,
        target_sum=None if head.mass is None else target_sum,
    )
    out = shift, sums, best if plan.stats else None
    return (out, kept) if keep else out


@streamed_sums.defjvp
def _sums_jvp(plan, primals, tangents):
    head, fixed = primals
    shift, sums, best = streamed_sums(plan, *primals)
    plan = _finer(plan)
    finite = (sums.total > 0) & (sums.total < jnp.inf)

    def local(head, i):
        """Sums over a chunk, with the derivatives of its share in those over all."""
        chunk = read_chunk(plan, head, fixed, i)
        centred = cap(fixed.softcap, chunk_logits(plan, chunk.head)) - shift
        if chunk.shown is not None:
            centred = jnp.where(chunk.shown, centred, -jnp.inf)
        exps = jnp.exp(jnp.where(finite, centred, -jnp.inf))
        parts = {"total": exps}
        if plan.stats:
            parts["moment"] = product(exps, centred)
        if fixed.target is not None:
            here = (chunk.index >= 0) & (chunk.index < plan.chunk)
            parts["picked"] = jnp.where(here, pick((centred,), chunk.index, -1), 0)
        if head.mass is not None:
            parts["mass_sum"] = q = unless_lost(chunk.mass(chunk.head), centred)
            parts["target_sum"] = product(q, centred)
        return RowSums(**{k: jnp.sum(v, -1, keepdims=True) for k, v in parts.items()})

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(d_sums, i):
        part = jax.jvp(lambda head: local(head, i), (head,), tangents[:1])[1]
        return jax.tree.map(jnp.add, d_sums, part), None

    steps = chunk_numbers(plan, head)
    zeros = vary_like(head.hidden, jax.tree.map(jnp.zeros_like, sums))
    d_sums, _ = jax.lax.scan(step, zeros, steps)
    d_best = None if best is None else np.zeros(best.shape, jax.dtypes.float0)
    return (shift, sums, best), (jnp.zeros_like(shift), d_sums, d_best)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(plan, floats, fixed):
    """The gradients of a head, hidden's in float32; floats: head, shift and the cotangents
    of the sums."""
    return on_platform(_gradients_pass, plan, floats, fixed)


def _gradients_pass(plan, floats, fixed):
    head = floats[0]

    def step(total, i):
        start, part = chunk_gradients(plan, floats, fixed, i)
        return accumulate(plan, head, total, part, start), None

    zeros = zero_gradients(plan, head)
    gradients, _ = jax.lax.scan(step, zeros, chunk_numbers(plan, head))
    return gradients._replace(kernel=load_kernel(gradients.kernel, head.kernel.dtype))


@_gradients.defjvp
def _gradients_jvp(plan, primals, tangents):
    floats, fixed = primals
    head = floats[0]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total, i):
        def part(floats):
            start, gradients = chunk_gradients(plan, floats, fixed, i)
            return gradients, start

        _, d_part, start = jax.jvp(part, (floats,), tangents[:1], has_aux=True)
        return accumulate(plan, head, total, d_part, start, scatter_slice), None

    gradients = _gradients(plan, *primals)
    plan = _finer(plan)
    zeros = zero_gradients(plan, head)
    d_gradients, _ = jax.lax.scan(step, zeros, chunk_numbers(plan, head))
    return gradients, d_gradients


def _finer(plan):
    """Tangents need several arrays of a chunk's size where the first order needs one."""
    return dataclasses.replace(plan, chunk=-(-plan.chunk // 4))
