"""Sums of a row: of its exponentials but one, of their moment, of its target mass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._axes import meshes
from .._forms import chosen
from .._numerics import finite_exp, safe_multiply
from .blocks import (
    BLOCKED_MOMENT_CLASSES,
    BLOCKED_SUM_CLASSES,
    block_apart,
    blocks_of,
    has_blocks,
    hidden_blocks,
    in_block,
    num_blocks,
    put_together,
    take_block,
)
from .classes import gather_class, is_inside, is_last, one_hot, splits_alike, sum_classes
from .one_loop import sum_at_once
from .registry import by_platform, hidden, workaround

# The bytes of float32 exponentials that a CPU may keep from the forward pass to the backward pass.
KEPT_BYTES = 2**25

# (x, class_mask, shift, transform, q) -> q and q * (z - shift), which have the logits' shape.
Terms = Callable[..., tuple[Array, Array]]
# `_rows.centre`, `_rows.centre_at` and `_rows.exponentials`.
Functions = tuple[Callable[..., Array], Callable[..., Array], Callable[..., Array]]


def others_mask(apart: Array, x: Array, axis: int, class_mask: Any) -> Array:
    """Return which classes exist besides the one apart."""
    others = ~one_hot(apart, x, axis)
    return others if class_mask is None else class_mask & others


def _masked(
    axis: int,
    form: str,
    functions: Functions,
    x: Array,
    class_mask: Any,
    shift: Array,
    transform: Any,
    apart: Array,
) -> tuple[Array, Array]:
    centre, _, exponentials = functions
    centred = centre(transform, x, shift, class_mask)
    left = sum_classes(axis, jnp.where(one_hot(apart, x, axis), centred, 0))
    mask = others_mask(apart, x, axis, class_mask)
    return left, sum_classes(axis, exponentials(transform, x, shift, mask))


def sum_form(
    axis: int, x: Array, may_keep: bool, has_mass: bool, is_smoothed: bool, moment: bool
) -> str:
    """Return how a CPU sums up the exponentials of `apart_and_others`.

    `may_keep` says whether the backward pass may find the exponentials again. In float32 they lie
    in the gradient, which they become; of half precision, they may take KEPT_BYTES, and are made
    again otherwise. Where "masked", they are 0 for the class apart.
    """
    if is_smoothed:
        return "taken out"  # with smoothing no loss is small
    # Of a symbolic shape (`jax.export`) no size is known; a number above 2**24 is no float32.
    static = all(isinstance(size, int) for size in x.shape) and x.shape[axis] <= 2**24
    if not static or not is_last(axis, x):
        return "masked"
    keeps = may_keep and can_keep(x)
    if keeps and x.dtype.itemsize < 4:
        return "masked"
    least = BLOCKED_MOMENT_CLASSES if moment else BLOCKED_SUM_CLASSES
    if has_mass or not has_blocks(axis, x, least):
        # Exponentials that both sums take would be kept: 8 MB of a head's chunk.
        return "masked" if moment else "products"
    return "kept blocks" if keeps else "blocks"


def can_keep(x: Array) -> bool:
    """Return whether a CPU may keep the exponentials of x in float32."""
    kept_bytes = chosen("kept_bytes", lambda: KEPT_BYTES)
    static = all(isinstance(size, int) for size in x.shape)
    return x.dtype.itemsize >= 4 or (static and 4 * x.size <= kept_bytes)


@workaround(_masked)
def apart_and_others(
    axis: int,
    form: str,
    functions: Functions,
    x: Array,
    class_mask: Any,
    shift: Array,
    transform: Any,
    apart: Array,
) -> tuple[Array, Array]:
    """Return z - shift of the class apart, any value if it is < 0, and the sum over the others.

    The functions are `_rows.centre`, `_rows.centre_at` and `_rows.exponentials`. The formula is a
    sum of exponentials that are 0 for the class apart. A select beside an exponential takes a CPU
    off its fast path: (4096, 1000) float32 takes 2.5 ms so, and 1.3 ms without the select (jax
    0.12.0.1). `form` is one of `sum_form`'s:

    - products: times 0 or 1, which is 2.2 ms;
    - blocks: sums of blocks, and once more of the one that has the class, from 4096 classes on, and
      beside a moment from 512;
    - kept blocks: the same, of exponentials that are kept for the gradient;
    - taken out: the sum over all less the class, where no small loss is made of it;
    - masked: the formula, for what the gradient finds again as it is, and for other axes.
    """
    plain = functools.partial(_masked, axis, form, functions)
    if not splits_alike((x, class_mask), apart):
        return plain(x, class_mask, shift, transform, apart)
    centre, centre_at, exponentials = functions

    def gathered(x: Array, class_mask: Any, shift: Array, transform: Any, apart: Array) -> Array:
        return centre_at(transform, x, shift, class_mask, apart, axis, gather_class)

    def products(
        x: Array, class_mask: Any, shift: Array, transform: Any, apart: Array
    ) -> tuple[Array, Array]:
        exps = exponentials(transform, x, shift, class_mask)
        others = sum_classes(axis, exps * _not_at(apart, x, exps.dtype))
        return gathered(x, class_mask, shift, transform, apart), others

    def masked(
        x: Array, class_mask: Any, shift: Array, transform: Any, apart: Array
    ) -> tuple[Array, Array]:
        mask = others_mask(apart, x, axis, class_mask)
        others = sum_classes(axis, exponentials(transform, x, shift, mask))
        return gathered(x, class_mask, shift, transform, apart), others

    def taken_out(
        x: Array, class_mask: Any, shift: Array, transform: Any, apart: Array
    ) -> tuple[Array, Array]:
        left = gathered(x, class_mask, shift, transform, apart)
        share = jnp.where(is_inside(apart, axis, x), finite_exp(left), 0)
        return left, sum_classes(axis, exponentials(transform, x, shift, class_mask)) - share

    def kept_blocks(
        x: Array, class_mask: Any, shift: Array, transform: Any, apart: Array
    ) -> tuple[Array, Array]:
        blocks = blocks_of(exponentials(transform, x, shift, class_mask))
        which, inside = in_block(apart.reshape(-1, 1), blocks)
        block = hidden(take_block(blocks, which))
        again = jnp.where(one_hot(inside, block, -1), 0, block)
        others = put_together(blocks, which, again, x)
        return gathered(x, class_mask, shift, transform, apart), others

    def in_blocks(
        x: Array, class_mask: Any, shift: Array, transform: Any, apart: Array
    ) -> tuple[Array, Array]:
        blocks, masks = hidden_blocks(x), hidden_blocks(class_mask)
        shift = shift.reshape(-1, 1)
        which, inside, values, mask = block_apart(apart, blocks, masks)
        centred = centre(transform, values, shift, mask)
        left = sum_classes(-1, jnp.where(one_hot(inside, values, -1), centred, 0))
        mask = others_mask(inside, values, -1, mask)
        again = exponentials(transform, values, shift, mask)
        exps = exponentials(transform, blocks, shift[..., None], masks)
        return left.reshape(*x.shape[:-1], 1), put_together(exps, which, again, x)

    forms = {
        "products": products,
        "blocks": in_blocks,
        "kept blocks": kept_blocks,
        "taken out": taken_out,
        "masked": masked,
    }
    arguments = x, class_mask, shift, transform, apart
    return by_platform(forms[form], plain, *arguments)


def _masked_moment(
    axis: int,
    moments: Callable[..., Array],
    x: Array,
    class_mask: Any,
    shift: Any,
    transform: Any,
    apart: Array,
) -> Array:
    mask = others_mask(apart, x, axis, class_mask)
    return sum_classes(axis, moments(transform, x, shift, mask))


@workaround(_masked_moment)
def moment_of_others(
    axis: int,
    moments: Callable[..., Array],
    x: Array,
    class_mask: Any,
    shift: Any,
    transform: Any,
    apart: Array,
) -> Array:
    """Return the sum over the classes but one of `moments(transform, x, shift, class_mask)`.

    The formula is a sum over a mask, which takes a CPU off its fast path as in `apart_and_others`.
    From 512 classes on, blocks are summed up there, and the one that has the class apart once
    more, without it: with statistics a float32 head of 131072 classes takes 1.1 times the time of
    its loss, and 1.3 times with the mask (jax 0.12.0.1). The sum over all less that of the class
    apart loses the digits of a nearly certain row: in another loop its part is another number.
    """
    plain = functools.partial(_masked_moment, axis, moments)
    arguments = x, class_mask, shift, transform, apart
    if not has_blocks(axis, x, BLOCKED_MOMENT_CLASSES):
        return plain(*arguments)

    def in_blocks(x: Array, class_mask: Any, shift: Array, transform: Any, apart: Array) -> Array:
        # Hidden together: XLA would share what `apart_and_others` makes of each, and keep it.
        masks = None if class_mask is None else blocks_of(class_mask)
        blocks, masks, shift = hidden((blocks_of(x), masks, shift))
        shift = shift.reshape(-1, 1)
        which, inside, values, mask = block_apart(apart, blocks, masks)
        again = moments(transform, values, shift, others_mask(inside, values, -1, mask))
        terms = moments(transform, blocks, shift[..., None], masks)
        return put_together(terms, which, again, x)

    return by_platform(in_blocks, plain, *arguments)


def _sums_of_terms(axis: int, terms: Terms, centre: Any, *arguments: Any) -> tuple[Array, Array]:
    mass, mass_logit = terms(*arguments)
    return sum_classes(axis, mass), sum_classes(axis, mass_logit)


def sums_mass_as_it_is(axis: int, x: Array, class_mask: Any, transform: Any) -> bool:
    """Return whether `mass_sums` makes no arrays on a CPU: with a mask or a cap there are some."""
    has_array = class_mask is not None or not transform.is_identity
    return is_last(axis, x) and not (has_array or meshes(x) or jax.config.jax_disable_jit)


@workaround(_sums_of_terms)
def mass_sums(
    axis: int,
    terms: Terms,
    centre: Callable[..., Array],
    x: Array,
    class_mask: Any,
    shift: Any,
    transform: Any,
    q: Array,
) -> tuple[Array, Array]:
    """Return the sums of both `terms(x, class_mask, shift, transform, q)`, q and q * (z - shift).

    The select that makes 0 of 0 * inf has a CPU write both factors out, float32 arrays of the
    logits' size, before it sums them up. Here they are summed up as they are, and once more with
    the select, in a slow loop without arrays, if a row's sum is not finite. (256, 32000) bfloat16
    with class weights and smoothing takes 0.4 of the time, and 0.4 MB of scratch for 33; with
    logits of -inf of weight 0, 0.5 (jax 0.12.0.1). What q is made of, of probabilities with
    weights say, is written out all the same, and so it is where `sums_mass_as_it_is` says no. With
    jit off, `jax_debug_nans` would see the 0 * inf.
    """
    arguments = x, class_mask, shift, transform, q
    plain = functools.partial(_sums_of_terms, axis, terms, centre)
    if not sums_mass_as_it_is(axis, x, class_mask, transform):
        return plain(*arguments)
    fast = functools.partial(_fast_mass_sums, axis, terms, centre)
    return by_platform(fast, plain, *arguments)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _fast_mass_sums(
    axis: int, terms: Terms, centre: Callable[..., Array], *arguments: Any
) -> tuple[Array, Array]:
    # Hidden: what the sum of the exponentials takes as well would be kept.
    x, class_mask, shift, transform, q = hidden(arguments)
    centred = centre(transform, x, shift, class_mask)
    if not q.ndim:
        # A power of two: the sum of the lowest numbers is finite, and no digit is lost.
        mass_logit = safe_multiply(q * 2.0**31, sum_classes(axis, centred * 2.0**-31))
        return q * x.shape[-1] + jnp.zeros_like(mass_logit), mass_logit
    mass_logit = sum_classes(axis, centred * q)
    by_class = jnp.broadcast_to(q, (*q.shape[:-1], x.shape[-1])).astype(mass_logit.dtype)
    mass = jnp.sum(by_class, -1, keepdims=True) + jnp.zeros_like(mass_logit)
    right = jnp.isfinite(mass_logit)

    def make_again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # Hidden with the state: XLA would do it before the loop, whether asked for or not.
        _, mass, mass_logit, arguments_here = hidden((*state, arguments))
        again = _sums_by_blocks(axis, terms, *arguments_here)
        mass, mass_logit = (
            jnp.where(right, *each) for each in zip((mass, mass_logit), again, strict=True)
        )
        return jnp.zeros((), bool), mass, mass_logit

    # A loop of one turn or none, and no `cond`: that does both under vmap.
    state = jax.lax.while_loop(
        lambda state: state[0], make_again, (~jnp.all(right), mass, mass_logit)
    )
    return state[1], state[2]


def _sums_by_blocks(axis: int, terms: Terms, *arguments: Any) -> tuple[Array, Array]:
    """Return the sums of the terms in one loop, of a block at a time: one of all loses digits."""
    found = terms(*arguments)
    *rows, num_classes = found[0].shape
    count = num_blocks(num_classes) if isinstance(num_classes, int) else 1
    shape = (*rows, count, num_classes // count)
    blocks = jax.tree.map(lambda term: term.reshape(shape), found)
    mass, mass_logit = jax.tree.map(lambda part: part[..., 0], sum_at_once(-1, blocks))
    return sum_classes(axis, mass), sum_classes(axis, mass_logit)


@_fast_mass_sums.defjvp
def _fast_mass_sums_jvp(
    axis: int, terms: Terms, centre: Callable[..., Array], primals: Any, tangents: Any
) -> tuple[Any, Any]:
    plain = functools.partial(_sums_of_terms, axis, terms, centre)
    return _fast_mass_sums(axis, terms, centre, *primals), jax.jvp(plain, primals, tangents)[1]


def _not_at(index: Array, x: Array, dtype: Any) -> Array:
    """0 where the last axis' class is the one at the index (..., 1), else 1."""
    distance = jnp.arange(x.shape[-1], dtype=dtype) - index.astype(dtype)
    return jnp.minimum(distance * distance, 1)
