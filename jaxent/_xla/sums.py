"""Sums of a row's exponentials: over all classes but one, and their moment."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from .._forms import chosen
from .._numerics import finite_exp
from .blocks import (
    BLOCKED_MOMENT_CLASSES,
    BLOCKED_SUM_CLASSES,
    block_apart,
    blocks_of,
    has_blocks,
    hidden_blocks,
    in_block,
    put_together,
    take_block,
)
from .classes import gather_class, is_inside, is_last, one_hot, splits_alike, sum_classes
from .registry import by_platform, hidden, workaround

# The bytes of float32 exponentials that a CPU may keep from the forward pass to the backward pass.
KEPT_BYTES = 2**25

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
    more, without it: with statistics a float32 head of 131072 classes takes 1.04 times the time of
    its loss, and 1.2 times with the mask (jax 0.12.0.1). The sum over all less that of the class
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


def _not_at(index: Array, x: Array, dtype: Any) -> Array:
    """0 where the last axis' class is the one at the index (..., 1), else 1."""
    distance = jnp.arange(x.shape[-1], dtype=dtype) - index.astype(dtype)
    return jnp.minimum(distance * distance, 1)
