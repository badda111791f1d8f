"""The primitive of a classifier head: the row sums of `hidden @ kernel + bias`, streamed.

The classes come in chunks. A pass over them computes a chunk's logits, (N, chunk), adds up
what `_softmax` says of them relative to a running maximum, and forgets them; a second pass
computes them again for the gradients. Nothing of the size tokens x classes is ever held, in
second order neither: there, too, only tangents are carried from chunk to chunk.

`head_sums` takes any cotangent. `head_total` is for a scalar: it goes over blocks of tokens,
holds a block's logits between its two passes, and so computes them once; the price is a
float32 kernel gradient to add to.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from ._softmax import (
    RowSums,
    cap,
    compute_dtype,
    pick,
    product,
    row_gradients,
    times,
    unless_lost,
    vary_alike,
)


TILE = 2**23  # bytes of a chunk's logits
CHUNK = 1024  # classes, at least
BLOCK = 512  # tokens


def choose_chunk(num_tokens: int, num_classes: int) -> int:
    return _balance(num_classes, max(CHUNK, TILE // 4 // max(num_tokens, 1)), 128)


def prefers_total(plan, head) -> bool:
    width = head.hidden.shape[1]
    half = jnp.finfo(plan.dtype).bits == 16
    return 4 * head.kernel.size <= 2**28 and width >= (512 if half else 1024)


def _balance(length: int, size: int, multiple: int = 1) -> int:
    """The size of parts, all about alike, that cover a length."""
    parts = -(-length // min(size, max(length, 1)))
    return min(-(-length // max(parts, 1) // multiple) * multiple, length)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static: how a head is read and computed."""

    class_axis: int  # of the kernel: 1 for (D, C), 0 for (C, D)
    chunk: int  # classes
    dtype: Any  # of the matmuls' operands
    precision: Any = None
    softcap: float | None = None
    stats: bool = False  # whether to return entropy and the most probable class
    cpu: bool = False


class Head(NamedTuple):
    """What is differentiated; or its gradients."""

    hidden: Array  # (N, D)
    kernel: Array  # (D, C) or (C, D)
    bias: Array | None  # (1, C)
    mass: Partial | None  # exists -> (N, C), its arrays scalars, (N, 1), (1, C) or (N, C)


class _Chunk(NamedTuple):
    head: Head
    exists: Array | None  # among the classes of this chunk
    fresh: Array | None  # those which no earlier chunk had; None if all
    index: Array | None  # relative to the chunk; outside [0, chunk) for other classes
    start: Array

    @property
    def shown(self):
        if self.exists is None or self.fresh is None:
            return self.fresh if self.exists is None else self.exists
        return self.exists & self.fresh

    def mass(self, head):
        q = head.mass(self.exists)
        return q if self.fresh is None else jnp.where(self.fresh, q, 0)


def head_sums(
    plan: Plan, head: Head, exists: Array | None, index: Array | None
) -> tuple[Array, RowSums, Array]:
    """Shift, sums and most probable class of each token, (N, 1); of `_softmax.row_sums`.

    Args:
      plan: the static part; with `stats` there is an entropy and a most probable class.
      head: hidden states, kernel, bias and target mass.
      exists: bool, (1, C) or (N, C); None where all classes exist.
      index: int32, (N, 1), < 0 for none; None leaves the picked logit out.
    """
    head, exists, index = vary_alike(head, exists, index)
    shift, sums, best = _unpack(plan, head, index, _packed_sums(plan, head, exists, index))
    return jax.lax.stop_gradient(shift), sums, best


# One array, for `vmap`'s sake: see `_softmax`. A float32 holds the number of a class exactly.
def _pack(shift, sums, best):
    best = None if best is None else best.astype(shift.dtype)
    return jnp.concatenate(jax.tree.leaves((shift, sums, best)), -1)


def _unpack(plan, head, index, packed):
    asked = (
        RowSums(0, 0 if plan.stats else None, None if index is None else 0)
        if head.mass is None
        else RowSums(0, 0 if plan.stats else None, None if index is None else 0, 0, 0)
    )
    structure = jax.tree.structure((0, asked, 0 if plan.stats else None))
    return jax.tree.unflatten(structure, jnp.split(packed, packed.shape[-1], -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_sums(plan, head, exists, index):
    return _pack(*_sums(plan, head, exists, index))


def _packed_sums_fwd(plan, head, exists, index):
    shift, sums, best = _sums(plan, head, exists, index)
    return _pack(shift, sums, best), (head, exists, index, shift, sums.log_sum, sums.entropy)


def _packed_sums_bwd(plan, residuals, cotangent):
    head, exists, index, *normalizer = residuals
    _, cotangents, _ = _unpack(plan, head, index, cotangent)
    gradients = _gradients(plan, (head, *normalizer, cotangents), exists, index)
    return _cast(gradients, head), None, None


_packed_sums.defvjp(_packed_sums_fwd, _packed_sums_bwd)


def _cast(gradients, head):
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, head)


# The two passes. Each is a custom_jvp, whose tangents are a scan of their own: it carries
# nothing but tangents and computes a chunk's logits again, so its transpose is small too.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sums(plan, head, exists, index):
    return _on_platform(_sums_pass, plan, head, exists, index)


def _sums_pass(plan, head, exists, index, keep=False):
    dtype = compute_dtype(plan)
    zeros = jnp.zeros((head.hidden.shape[0], 1), dtype)

    def step(carry, i):
        shift, total, moment, picked, mass_sum, target_sum, best = carry
        chunk = _chunk(plan, head, exists, index, i)
        logits = _logits(plan, chunk.head)
        z = cap(plan.softcap, logits)
        if chunk.shown is not None:
            z = jnp.where(chunk.shown, z, -jnp.inf)
        top = jnp.max(z, -1, keepdims=True)
        if plan.stats:
            first = jnp.argmax(z, -1, keepdims=True).astype(jnp.int32)
            best = jnp.where(top > shift, chunk.start + first, best)
        change = shift - jnp.maximum(shift, top)
        shift = jnp.maximum(shift, top)
        centred = z - shift
        if plan.stats:
            moment = jnp.exp(change) * (moment + times(total, change))
            moment += jnp.sum(product(jnp.exp(centred), centred), -1, keepdims=True)
        total = jnp.exp(change) * total + jnp.sum(jnp.exp(centred), -1, keepdims=True)
        if index is not None:
            here = (chunk.index >= 0) & (chunk.index < plan.chunk)
            picked = jnp.where(here, pick(z, chunk.index, -1), picked)
        if head.mass is not None:
            q = unless_lost(chunk.mass(chunk.head), centred)
            target_sum += times(mass_sum, change) + jnp.sum(product(q, centred), -1, keepdims=True)
            mass_sum += jnp.sum(q, -1, keepdims=True)
        carry = shift, total, moment, picked, mass_sum, target_sum, best
        return carry, logits if keep else None

    # Below all logits, and finite: -inf - -inf is NaN.
    lowest = zeros + jnp.finfo(dtype).min
    init = (lowest, *(zeros,) * 5, jnp.zeros(zeros.shape, jnp.int32))
    carry, kept = jax.lax.scan(step, init, jnp.arange(_steps(plan, head)))
    shift, total, moment, picked, mass_sum, target_sum, best = carry
    log_sum = jnp.log(total)
    sums = RowSums(
        log_sum=log_sum,
        entropy=log_sum - moment / total if plan.stats else None,
        picked=None if index is None else picked - shift,
        mass_sum=None if head.mass is None else mass_sum,
        target_sum=None if head.mass is None else target_sum,
    )
    out = shift, sums, best if plan.stats else None
    return (out, kept) if keep else out


@_sums.defjvp
def _sums_jvp(plan, primals, tangents):
    head, exists, index = primals
    shift, sums, best = _sums(plan, *primals)
    finite = jnp.isfinite(sums.log_sum)

    def local(head, i):
        """Sums over a chunk, with the derivatives of its share in those over all."""
        chunk = _chunk(plan, head, exists, index, i)
        centred = cap(plan.softcap, _logits(plan, chunk.head)) - shift
        if chunk.shown is not None:
            centred = jnp.where(chunk.shown, centred, -jnp.inf)
        log_probs = jnp.where(finite, centred - sums.log_sum, -jnp.inf)
        parts = {"log_sum": jnp.exp(log_probs)}
        if plan.stats:
            parts["entropy"] = -product(jnp.exp(log_probs), log_probs)
        if index is not None:
            here = (chunk.index >= 0) & (chunk.index < plan.chunk)
            parts["picked"] = jnp.where(here, pick(centred, chunk.index, -1), 0)
        if head.mass is not None:
            parts["mass_sum"] = q = unless_lost(chunk.mass(chunk.head), centred)
            parts["target_sum"] = product(q, centred)
        return RowSums(**{k: jnp.sum(v, -1, keepdims=True) for k, v in parts.items()})

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(d_sums, i):
        part = jax.jvp(lambda head: local(head, i), (head,), tangents[:1])[1]
        return jax.tree.map(jnp.add, d_sums, part), None

    steps = jnp.arange(_steps(plan, head))
    d_sums, _ = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, sums), steps)
    if plan.stats:
        slope = jnp.where(jnp.isfinite(sums.entropy), 1 - sums.entropy, 0)
        d_sums = d_sums._replace(entropy=d_sums.entropy - slope * d_sums.log_sum)
    d_best = None if best is None else np.zeros(best.shape, jax.dtypes.float0)
    return (shift, sums, best), (jnp.zeros_like(shift), d_sums, d_best)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(plan, floats, exists, index):
    """The gradients of a head, hidden's in float32; floats: head, shift, log-sum, entropy and
    the cotangents of the sums."""
    return _on_platform(_gradients_pass, plan, floats, exists, index)


def _gradients_pass(plan, floats, exists, index):
    head = floats[0]

    def step(total, i):
        start, part = _chunk_gradients(plan, floats, exists, index, i)
        return _accumulate(plan, head, total, part, start), None

    zeros = _zero_gradients(plan, head)
    gradients, _ = jax.lax.scan(step, zeros, jnp.arange(_steps(plan, head)))
    return gradients._replace(kernel=_load(gradients.kernel, head.kernel.dtype))


@_gradients.defjvp
def _gradients_jvp(plan, primals, tangents):
    floats, exists, index = primals
    head = floats[0]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total, i):
        def part(floats):
            start, gradients = _chunk_gradients(plan, floats, exists, index, i)
            return gradients, start

        _, d_part, start = jax.jvp(part, (floats,), tangents[:1], has_aux=True)
        return _accumulate(plan, head, total, d_part, start), None

    zeros = _zero_gradients(plan, head)
    d_gradients, _ = jax.lax.scan(step, zeros, jnp.arange(_steps(plan, head)))
    return _gradients(plan, *primals), d_gradients


def _chunk_gradients(plan, floats, exists, index, i, logits=None):
    """Where a chunk starts and what it adds to the gradients."""
    head, shift, log_sum, entropy, cotangents = floats
    chunk = _chunk(plan, head, exists, index, i)
    if logits is None:
        logits = _logits(plan, chunk.head)
    q, pull = None, None
    if head.mass is not None:
        q, pull = jax.vjp(lambda mass: chunk.mass(chunk.head._replace(mass=mass)), chunk.head.mass)
    d_logits, d_q = row_gradients(
        -1,
        plan.softcap,
        logits,
        shift,
        chunk.shown,
        chunk.index,
        q,
        log_sum,
        entropy,
        cotangents,
    )
    d_hidden, d_kernel = _matmul_gradients(plan, chunk.head, d_logits)
    d_bias = None if head.bias is None else jnp.sum(d_logits, 0, keepdims=True)
    return chunk.start, Head(d_hidden, d_kernel, d_bias, None if pull is None else pull(d_q)[0])


def _on_platform(function, plan, *arguments):
    """On CPU, half precision is computed in float32, which XLA would turn it into anyway."""
    if jnp.finfo(plan.dtype).bits > 16:
        return function(plan, *arguments)
    return jax.lax.platform_dependent(
        *arguments,
        cpu=functools.partial(function, dataclasses.replace(plan, cpu=True)),
        default=functools.partial(function, plan),
    )


def _steps(plan, head):
    return -(-head.kernel.shape[plan.class_axis] // plan.chunk)


def _chunk(plan, head, exists, index, i):
    """The i-th chunk. The last one ends with the classes, so it may begin with some seen before."""
    num_classes = head.kernel.shape[plan.class_axis]
    start = jnp.minimum(i * plan.chunk, num_classes - plan.chunk)
    bias, mass, exists = jax.tree.map(
        lambda table: _slice(table, start, plan.chunk, -1)
        if _has_classes(table, num_classes)
        else table,
        (head.bias, head.mass, exists),
    )
    kernel = _read_kernel(plan, head.kernel, start)
    if exists is not None:  # 0 * NaN is NaN: what an excluded class holds reaches no gradient
        alive = jnp.expand_dims(jnp.any(exists, 0), 1 - plan.class_axis)
        kernel = jnp.where(alive, kernel, 0)
    fresh = None
    if num_classes % plan.chunk:
        fresh = start + jnp.arange(plan.chunk)[None] >= i * plan.chunk
    if index is not None:
        index = jnp.where(index >= i * plan.chunk, index - start, -1)
    return _Chunk(Head(head.hidden, kernel, bias, mass), exists, fresh, index, start)


def _has_classes(table, num_classes):
    return table.ndim == 2 and table.shape[-1] == num_classes


def _slice(array, start, size, axis):
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def _read_kernel(plan, kernel, start):
    if not plan.cpu or jnp.finfo(kernel.dtype).bits > 16:
        return _slice(kernel, start, plan.chunk, plan.class_axis)
    # XLA computes a slice of half precision as one of float32, hoists the cast out of the loop
    # and holds a float32 copy of the kernel (jax 0.10.2). Its bits it slices as they are.
    kernel, start = jax.lax.optimization_barrier((kernel, start))
    bits = jax.lax.bitcast_convert_type(kernel, jnp.uint16)
    bits = _slice(bits, start, plan.chunk, plan.class_axis)
    return jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(bits, kernel.dtype))


def _logits(plan, head):
    wide = compute_dtype(plan)
    operands = [x.astype(plan.dtype) for x in (head.hidden, head.kernel)]
    if plan.cpu:
        operands = [x.astype(wide) for x in operands]
    logits = _matmul(plan, *operands, 1, 1 - plan.class_axis)
    return logits if head.bias is None else logits + head.bias.astype(wide)


def _matmul(plan, a, b, a_axis, b_axis):
    return jax.lax.dot_general(
        a,
        b,
        (([a_axis], [b_axis]), ([], [])),
        precision=plan.precision,
        preferred_element_type=compute_dtype(plan),
    )


def _matmul_gradients(plan, head, d_logits):
    """Gradients of hidden and kernel; d_logits is rounded to bfloat16, but not to float16,
    which has no room for a small one."""
    narrow = plan.dtype == jnp.bfloat16 and not plan.cpu
    dtype = plan.dtype if narrow else compute_dtype(plan)
    hidden, kernel = (x.astype(plan.dtype).astype(dtype) for x in (head.hidden, head.kernel))
    d_logits = d_logits.astype(dtype)
    d_hidden = _matmul(plan, d_logits, kernel, 1, plan.class_axis)
    if plan.class_axis == 1:
        return d_hidden, _matmul(plan, hidden, d_logits, 0, 0)
    return d_hidden, _matmul(plan, d_logits, hidden, 0, 0)


def _zero_gradients(plan, head):
    wide = functools.partial(jnp.zeros_like, dtype=compute_dtype(plan))
    return Head(
        hidden=wide(head.hidden),
        kernel=_store(plan, jnp.zeros_like(head.kernel)),
        bias=None if head.bias is None else wide(head.bias),
        mass=jax.tree.map(jnp.zeros_like, head.mass),
    )


# Bits again: on CPU, XLA updates a slice of half precision by writing all of the array.


def _store(plan, kernel):
    bits = plan.cpu and jnp.finfo(kernel.dtype).bits == 16
    return jax.lax.bitcast_convert_type(kernel, jnp.uint16) if bits else kernel


def _load(kernel, dtype):
    bits = kernel.dtype == jnp.uint16
    return jax.lax.bitcast_convert_type(kernel, dtype) if bits else kernel


def _accumulate(plan, head, total, part, start, anew=True):
    """Add a chunk's gradients to the whole's, of which it has a slice, or all.

    The kernel's is written once, in its dtype, if `anew`; else it adds to a float32 one.
    """
    num_classes = head.kernel.shape[plan.class_axis]
    kernel = part.kernel
    if anew:
        if num_classes % plan.chunk:  # classes seen before get 0
            old = _slice(total.kernel, start, plan.chunk, plan.class_axis)
            kernel += _load(old, head.kernel.dtype).astype(kernel.dtype)
        kernel = _store(plan, kernel.astype(head.kernel.dtype))
        kernel = jax.lax.dynamic_update_slice_in_dim(total.kernel, kernel, start, plan.class_axis)
    else:
        kernel = _add_slice(total.kernel, kernel, start, plan.class_axis)

    def add(total, part):
        if not _has_classes(total, num_classes):
            return total + part
        return _add_slice(total, part, start, -1)

    bias, mass = jax.tree.map(add, total[2:], part[2:])
    return Head(total.hidden + part.hidden, kernel, bias, mass)


def _add_slice(total, part, start, axis):
    part += _slice(total, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, part, start, axis)


# Scalars.


def head_total(
    plan: Plan,
    terms: Callable[[Any, Array, RowSums], Array],
    head: Head,
    rows: Any,
    exists: Array | None,
    index: Array | None,
) -> Array:
    """The sum of `terms(rows, shift, sums)`, its gradients made in the forward pass.

    Args:
      plan, head, exists, index: as in `head_sums`.
      terms: a function of shift and sums that returns a term for each token, (N, 1). It is
        static.
      rows: float arrays for it, (N, 1) or scalars.
    """
    head, rows, exists, index = vary_alike(head, rows, exists, index)
    return _total(plan, terms, head, rows, exists, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(plan, terms, head, rows, exists, index):
    shift, sums, _ = _sums(plan, head, exists, index)
    return jnp.sum(terms(rows, shift, sums))


def _total_fwd(plan, terms, head, rows, exists, index):
    total, gradients = _total_and_gradients(plan, terms, (head, rows), exists, index)
    like = jax.tree.map(lambda x: jnp.zeros((), x.dtype), (head, rows))
    return total, (gradients, like)


def _total_bwd(plan, terms, residuals, cotangent):
    gradients, like = residuals
    gradients = jax.tree.map(lambda g, x: (cotangent * g).astype(x.dtype), gradients, like)
    return *gradients, None, None


_total.defvjp(_total_fwd, _total_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _total_and_gradients(plan, terms, floats, exists, index):
    blocks = functools.partial(_blocks_pass, terms=terms)
    return _on_platform(blocks, plan, floats, exists, index)


@_total_and_gradients.defjvp
def _total_and_gradients_jvp(plan, terms, primals, tangents):
    floats, exists, index = primals

    def total(floats):
        head, rows = floats
        shift, sums, _ = head_sums(plan, head, exists, index)
        return jnp.sum(terms(rows, shift, sums))

    def wide(floats):
        total_, gradients = jax.value_and_grad(total)(floats)
        return total_, _widen(plan, gradients)

    out = _total_and_gradients(plan, terms, *primals)
    return out, jax.jvp(wide, (floats,), tangents[:1])[1]


def _widen(plan, gradients):
    """In float32, whatever a half-precision loss scale may multiply them with."""
    return jax.tree.map(lambda x: x.astype(compute_dtype(plan, x)), gradients)


def _blocks_pass(plan, floats, exists, index, terms):
    num_tokens = floats[0].hidden.shape[0]
    size = _balance(num_tokens, BLOCK)
    blocks = -(-num_tokens // size)

    def of_token(x):
        return x.ndim == 2 and x.shape[0] == num_tokens

    def step(carry, i):
        start = jnp.minimum(i * size, num_tokens - size)
        (head, rows), exists_here, index_here = jax.tree.map(
            lambda x: _slice(x, start, size, 0) if of_token(x) else x,
            ((floats[0]._replace(kernel=None), floats[1]), exists, index),
        )
        head = head._replace(kernel=floats[0].kernel)
        (shift, sums, _), kept = _sums_pass(plan, head, exists_here, index_here, keep=True)

        def block_total(rows, sums):
            fresh = start + jnp.arange(size)[:, None] >= i * size
            return jnp.sum(jnp.where(fresh, terms(rows, shift, sums), 0))

        value, pull = jax.vjp(block_total, rows, sums)
        d_rows, cotangents = pull(jnp.ones_like(value))

        def chunk_step(gradients, x):
            j, logits = x
            around = (head, shift, sums.log_sum, sums.entropy, cotangents)
            c, part = _chunk_gradients(plan, around, exists_here, index_here, j, logits)
            return _accumulate(plan, head, gradients, part, c, anew=False), None

        total, (d_head, all_d_rows) = carry
        zeros = _widen(plan, _zero_gradients(plan, head))._replace(kernel=d_head.kernel)
        chunks = jnp.arange(_steps(plan, head)), kept
        part, _ = jax.lax.scan(chunk_step, zeros, chunks)

        def add(total, part):
            return _add_slice(total, part, start, 0) if of_token(total) else total + part

        kernel = part.kernel
        d_head, d_rows = jax.tree.map(
            add,
            (d_head._replace(kernel=None), all_d_rows),
            (part._replace(kernel=None), d_rows),
        )
        return (total + value, (d_head._replace(kernel=kernel), d_rows)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, compute_dtype(plan, x)), floats)
    init = jnp.zeros((), compute_dtype(plan)), zeros
    return jax.lax.scan(step, init, jnp.arange(blocks))[0]
