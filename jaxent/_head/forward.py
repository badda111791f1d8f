"""A head's scalar: its gradients made in the forward pass, where that is the faster form.

It goes over blocks of tokens, all classes of a block in one product, and makes the block's
gradients from its logits at once: three matmuls instead of four. The price is a float32 kernel
gradient to add to, which for a float32 kernel is the result.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import custom_vjp_primal_tree_values

from .._axes import Tree, vary_alike, vary_like
from .._numerics import compute_dtype
from .._rows import RowSums
from .chunks import (
    Around,
    Chunk,
    Fixed,
    Head,
    Plan,
    blank_hidden,
    blocks_of,
    chunk_gradients,
    chunk_logits_and_pull,
    on_platform,
    read_chunk,
    whole,
)
from .streaming import (
    Rows,
    add_chunk,
    gradients_of_rows,
    head_sums,
    no_classes,
    pack,
    streamed_sums,
    unpack,
)

Terms = Callable[[Any, Array, RowSums, Any], Array]
Floats = tuple[Head, Any]  # a head, and the float arrays of the terms


def head_total(
    plan: Plan,
    terms: Terms,
    head: Head,
    rows: Any,
    fixed: Fixed,
) -> tuple[Array, Rows | None]:
    """Return the sum of the terms, its gradients made in the forward pass.

    With `plan.stats`, the second result is what `head_sums` returns. Its gradients are not made
    here: where somebody differentiates it, they are streamed.

    Args:
      plan, head, fixed: as in `head_sums`.
      terms: a function of rows, shift, sums and of whether the target is the most probable class
        (None without statistics), that returns a term for each token, (N, 1). It is static.
      rows: float arrays for it, (N, 1) or scalars, in what has a method `by_token`.
    """
    head, rows, fixed = vary_alike(head, rows, fixed)
    total, packed = _total(plan, terms, head, rows, fixed)
    if packed is None:
        return total, None
    values, best = packed
    shift, sums = unpack(plan, head, fixed, values)
    return total, (jax.lax.stop_gradient(shift), sums, best)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(plan: Plan, terms: Terms, head: Head, rows: Any, fixed: Fixed) -> tuple[Array, Any]:
    streamed = streamed_sums(plan, head, fixed, rows.targets.sample_weight)
    total = _sum(terms, rows, fixed, streamed)
    return total, pack(head, fixed, streamed)[0] if plan.stats else None


def _sum(terms: Terms, rows: Any, fixed: Fixed, of_tokens: Rows) -> Array:
    shift, sums, best = of_tokens
    is_prediction = None if sums.target is None else best == fixed.target
    return jnp.sum(terms(rows, shift, sums, is_prediction))


def _total_fwd(plan: Plan, terms: Terms, head: Any, rows: Any, fixed: Any) -> tuple[Any, Any]:
    if rows.targets.sample_weight.perturbed:
        plan = dataclasses.replace(plan, skip=False)
    head, rows, fixed = custom_vjp_primal_tree_values((head, rows, fixed))
    total, of_tokens, (d_head, d_rows) = _total_and_gradients(plan, terms, (head, rows), fixed)
    gradients = blank_hidden(d_head, fixed.uncounted), d_rows
    like = jax.tree.map(lambda x: jnp.zeros((), x.dtype), (head, rows))
    packed, streamed = pack(head, fixed, of_tokens) if plan.stats else (None, None)
    return (total, packed), (gradients, like, streamed)


def _total_bwd(plan: Plan, terms: Terms, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    gradients, like, streamed = residuals
    cotangent, of_tokens = cotangents
    if _is_zero(cotangent):
        gradients = jax.tree.map(lambda g, x: jnp.zeros(g.shape, x.dtype), gradients, like)
    else:
        gradients = jax.tree.map(lambda g, x: (cotangent * g).astype(x.dtype), gradients, like)
    d_head, d_rows = gradients
    if streamed is not None and not all(map(_is_zero, jax.tree.leaves(of_tokens[0]))):
        plan = plan if plan.skip else whole(plan)
        d_head = jax.tree.map(jnp.add, d_head, gradients_of_rows(plan, streamed, of_tokens))
    return d_head, d_rows, None


def _is_zero(cotangent: Any) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


_total.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _total_and_gradients(
    plan: Plan, terms: Terms, floats: Floats, fixed: Fixed
) -> tuple[Array, Any, Floats]:
    blocks = functools.partial(_blocks_pass, terms=terms)
    return on_platform(blocks, plan, floats, fixed)


@_total_and_gradients.defjvp
def _total_and_gradients_jvp(
    plan: Plan, terms: Terms, primals: tuple[Floats, Fixed], tangents: Any
) -> Any:
    floats, fixed = primals
    plan = whole(plan)

    def total(floats: Floats) -> tuple[Array, Any]:
        head, rows = floats
        streamed = head_sums(plan, head, fixed, rows.targets.sample_weight)
        return _sum(terms, rows, fixed, streamed), streamed if plan.stats else None

    def wide(floats: Floats) -> tuple[Array, Any, Floats]:
        (total_, of_tokens), gradients = jax.value_and_grad(total, has_aux=True)(floats)
        return total_, of_tokens, _widen(plan, gradients, floats)

    # All of it in chunks of classes: no block's logits are held where second order is asked for.
    return jax.jvp(wide, (floats,), tangents[:1])


def _widen(plan: Plan, gradients: Tree, floats: Tree) -> Tree:
    """Return the gradients in float32, whatever a half-precision loss scale multiplies them by.

    In float64 where their array is, even if the products are not.
    """
    wide: Tree = jax.tree.map(lambda g, x: g.astype(compute_dtype(plan, x)), gradients, floats)
    return wide


def _blocks_pass(
    plan: Plan, floats: Floats, fixed: Fixed, terms: Terms
) -> tuple[Array, Any, Floats]:
    blocks = blocks_of(plan, fixed)
    head, rows = floats[0].by_token(blocks.first), floats[1].by_token(blocks.first)
    fixed = fixed.by_token(blocks.first)
    plan = dataclasses.replace(plan, chunk=head.kernel.shape[plan.class_axis])
    chunk = read_chunk(plan, head, fixed, jnp.zeros((), jnp.int32))

    def turn(_: Any, chunk: Chunk, rows: Any, fixed: Fixed) -> tuple[Any, Any]:
        logits, pull_logits = chunk_logits_and_pull(plan, chunk.head)
        none = no_classes(plan, chunk.head, fixed)
        shift, sums, best = found = add_chunk(plan, none, chunk, fixed, logits)
        fixed = fixed._replace(best=best)

        def block_total(rows: Any, sums: RowSums) -> Array:
            return _sum(terms, rows, fixed, (shift, sums, best))

        # No loss has the moment in it, and zeros for its gradient would be multiplied.
        value, pull = jax.vjp(block_total, rows, sums._replace(moment=None))
        d_rows, cotangents = pull(jnp.ones_like(value))
        d_head = chunk_gradients(
            plan, Around(shift, cotangents), chunk, fixed, (logits, pull_logits)
        )
        of_tokens, of_all = _split(_widen(plan, (d_head, d_rows), (chunk.head, rows)))
        return (of_tokens, found if plan.stats else None), (value, of_all)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, compute_dtype(plan, x)), (head, rows))
    found = jax.tree.map(jnp.zeros_like, no_classes(plan, head, fixed)) if plan.stats else None
    zeros, found = vary_like(head.hidden, (zeros, found))
    initial = _split(zeros)[0], found
    of_tokens, (total, of_all) = blocks.run(turn, initial, chunk, rows, fixed)
    of_tokens, found = jax.tree.map(blocks.back, of_tokens)
    return total, found, jax.tree.map(_either, of_tokens, of_all, is_leaf=_is_none)


def _split(floats: Any) -> tuple[Any, Any]:
    """Return what is of each token, and what is of all; None stands for the other."""
    of_all = tuple(x.by_token(lambda _: None) for x in floats)

    def unless_of_all(other: Any, x: Any) -> Any:
        return x if other is None else None

    return jax.tree.map(unless_of_all, of_all, floats, is_leaf=_is_none), of_all


def _either(a: Any, b: Any) -> Any:
    return b if a is None else a


def _is_none(x: Any) -> bool:
    return x is None
