"""A head's scalar: its gradients made in the forward pass, where that is the faster form.

It goes over blocks of tokens and holds a block's logits between its two passes, so that they
are computed once: three matmuls instead of four. The price is a float32 kernel gradient to
add to.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._axes import Tree, vary_alike, vary_like
from ._chunks import (
    Fixed,
    Head,
    Plan,
    accumulate,
    balance,
    blank_hidden,
    chunk_gradients,
    chunk_numbers,
    on_platform,
    zero_gradients,
)
from ._numerics import compute_dtype
from ._rows import RowSums
from ._streaming import head_sums, streamed_sums, sums_pass
from ._xla import add_slice, take_slice

Terms = Callable[[Any, Array, RowSums], Array]
Floats = tuple[Head, Any]  # a head, and the float arrays of the terms


def head_total(
    plan: Plan,
    terms: Terms,
    head: Head,
    rows: Any,
    fixed: Fixed,
) -> Array:
    """Return the sum of `terms(rows, shift, sums)`, its gradients made in the forward pass.

    Args:
      plan, head, fixed: as in `head_sums`.
      terms: a function of shift and sums that returns a term for each token, (N, 1). It is
        static.
      rows: float arrays for it, (N, 1) or scalars.
    """
    return _total(plan, terms, *vary_alike(head, rows, fixed))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(plan: Plan, terms: Terms, head: Head, rows: Any, fixed: Fixed) -> Array:
    shift, sums, _ = streamed_sums(plan, head, fixed)
    return jnp.sum(terms(rows, shift, sums))


def _total_fwd(plan: Plan, terms: Terms, head: Head, rows: Any, fixed: Fixed) -> tuple[Array, Any]:
    total, (d_head, d_rows) = _total_and_gradients(plan, terms, (head, rows), fixed)
    gradients = blank_hidden(d_head, fixed.uncounted), d_rows
    like = jax.tree.map(lambda x: jnp.zeros((), x.dtype), (head, rows))
    return total, (gradients, like)


def _total_bwd(plan: Plan, terms: Terms, residuals: Any, cotangent: Array) -> tuple[Any, ...]:
    gradients, like = residuals
    gradients = jax.tree.map(lambda g, x: (cotangent * g).astype(x.dtype), gradients, like)
    return *gradients, None


_total.defvjp(_total_fwd, _total_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _total_and_gradients(
    plan: Plan, terms: Terms, floats: Floats, fixed: Fixed
) -> tuple[Array, Floats]:
    blocks = functools.partial(_blocks_pass, terms=terms)
    return on_platform(blocks, plan, floats, fixed)


@_total_and_gradients.defjvp
def _total_and_gradients_jvp(
    plan: Plan, terms: Terms, primals: tuple[Floats, Fixed], tangents: Any
) -> Any:
    floats, fixed = primals

    def total(floats: Floats) -> Array:
        head, rows = floats
        shift, sums, _ = head_sums(plan, head, fixed)
        return jnp.sum(terms(rows, shift, sums))

    def wide(floats: Floats) -> tuple[Array, Floats]:
        total_, gradients = jax.value_and_grad(total)(floats)
        return total_, _widen(plan, gradients)

    out = _total_and_gradients(plan, terms, *primals)
    return out, jax.jvp(wide, (floats,), tangents[:1])[1]


def _widen(plan: Plan, gradients: Tree) -> Tree:
    """Return the gradients in float32, whatever a half-precision loss scale multiplies them by."""
    wide: Tree = jax.tree.map(lambda x: x.astype(compute_dtype(plan, x)), gradients)
    return wide


def _blocks_pass(plan: Plan, floats: Floats, fixed: Fixed, terms: Terms) -> tuple[Array, Floats]:
    num_tokens = floats[0].hidden.shape[0]
    size = balance(num_tokens, plan.block)
    blocks = -(-num_tokens // max(size, 1))  # none of no tokens

    def of_token(x: Array) -> bool:
        return x.ndim == 2 and x.shape[0] == num_tokens

    def step(carry: tuple[Array, Floats], i: Array) -> tuple[tuple[Array, Floats], None]:
        start = jnp.minimum(i * size, num_tokens - size)
        (head, rows), fixed_here = jax.tree.map(
            lambda x: take_slice(x, start, size, 0) if of_token(x) else x,
            ((floats[0]._replace(kernel=None), floats[1]), fixed),
        )
        head = head._replace(kernel=floats[0].kernel)
        (shift, sums, best), logits = sums_pass(plan, head, fixed_here, keep=True)
        fixed_here = fixed_here._replace(best=best)

        def block_total(rows: Any, sums: RowSums) -> Array:
            fresh = start + jnp.arange(size, dtype=jnp.int32)[:, None] >= i * size
            return jnp.sum(jnp.where(fresh, terms(rows, shift, sums), 0))

        value, pull = jax.vjp(block_total, rows, sums)
        d_rows, cotangents = pull(jnp.ones_like(value))

        def chunk_step(gradients: Head, x: tuple[Array, Array]) -> tuple[Head, None]:
            around = (head, shift, cotangents)
            c, part = chunk_gradients(plan, around, fixed_here, *x)
            return accumulate(plan, head, gradients, part, c, add_slice), None

        total, (d_head, all_d_rows) = carry
        zeros = _widen(plan, zero_gradients(plan, head))._replace(kernel=d_head.kernel)
        chunks = chunk_numbers(plan, head), logits
        part, _ = jax.lax.scan(chunk_step, zeros, chunks)

        def add(total: Array, part: Array) -> Array:
            return add_slice(total, part, start, 0) if of_token(total) else total + part

        kernel = part.kernel
        d_head, d_rows = jax.tree.map(
            add,
            (d_head._replace(kernel=None), all_d_rows),
            (part._replace(kernel=None), d_rows),
        )
        return (total + value, (d_head._replace(kernel=kernel), d_rows)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, compute_dtype(plan, x)), floats)
    init = vary_like(floats[0].hidden, (jnp.zeros((), compute_dtype(plan)), zeros))
    return jax.lax.scan(step, init, jnp.arange(blocks, dtype=jnp.int32))[0]
