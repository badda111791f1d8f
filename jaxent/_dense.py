"""The primitive of a row of logits that is there: its shift, its class apart and its sums.

Gradients are written by hand so that the logits are kept as they came (bfloat16 stays bfloat16) and
rounded to once, and so that a row which the loss does not count gets gradient 0 whatever it holds.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._axes import meshes, vary_alike, vary_like
from ._classes import class_numbers, first_best, is_split_alike, not_at, one_hot, pick, take_block
from ._numerics import compute_dtype
from ._rows import (
    RowSums,
    Transform,
    centre,
    exponentials,
    finite_exp,
    others_mask,
    product,
    row_gradients,
    unless_lost,
)
from ._targets import TargetMass

# What a CPU may hold of float32 exponentials from one pass to the next, in bytes.
KEPT = 2**25


def row_max(
    axis: int, transform: Transform, x: Array, class_mask: Array | None
) -> tuple[Array, Array]:
    """Return each row's largest z among the classes that exist, and the largest scaled logit.

    They are constants, (..., 1, ...). The first is finite where all logits are -inf, which is no
    reason for NaN in a shard of a row's classes; and in a row of NaN, as an eager gradient keeps
    it: it comes out of a program, where `jax_debug_nans` sees it.
    """
    scaled = _top(axis, transform, x, class_mask)
    top = transform.capped(scaled)
    low = jnp.finfo(top.dtype).min
    # What is asked of the row's target here, XLA's CPU compiler would ask for each class again.
    return jnp.where(top > low, top, low), scaled


def _top(axis, transform, x, class_mask):
    """The largest scaled logit, uncapped."""
    x, transform = jax.lax.stop_gradient((x, transform))

    def largest(x, scale, class_mask):
        scaled = _scaled(scale, x)
        shown = scaled if class_mask is None else jnp.where(class_mask, scaled, -jnp.inf)
        return jnp.max(shown, axis, keepdims=True)

    def in_blocks(x, scale, class_mask):
        shown = _scaled(scale, _hidden_blocks(x))
        if class_mask is not None:
            shown = jnp.where(_hidden_blocks(class_mask), shown, -jnp.inf)
        tops = jax.lax.optimization_barrier(jnp.max(shown, -1))
        return jnp.max(tops, -1, keepdims=True).reshape(*x.shape[:-1], 1)

    arguments = x, transform.scale, class_mask
    if _has_blocks(axis, x):
        top = jax.lax.platform_dependent(*arguments, cpu=in_blocks, default=largest)
    else:
        top = largest(*arguments)
    return top.astype(compute_dtype(x))


def _scaled(scale, x):
    return x if scale is None else Transform(scale).scaled(x)


def first_largest(
    axis: int, transform: Transform, x: Array, class_mask: Array | None
) -> tuple[Array, Array]:
    """Return the first class of the largest z, int32, and that z; NaN is above all."""
    x, transform = jax.lax.stop_gradient((x, transform))
    z = transform(x)
    z = z if class_mask is None else jnp.where(class_mask, z, -jnp.inf)
    return first_best(z, axis), jnp.max(z, axis, keepdims=True)


def a_largest(
    axis: int, transform: Transform, x: Array, top: Array, class_mask: Array | None
) -> Array:
    """Return the first class whose scaled logit is the largest, `top`; the last of a row of NaN."""
    scaled = jax.lax.stop_gradient(transform.scaled(x))
    if class_mask is not None:
        scaled = jnp.where(class_mask, scaled, -jnp.inf)
    numbers = jnp.where(scaled >= top, class_numbers(x, axis), x.shape[axis] - 1)
    return jnp.min(numbers, axis, keepdims=True)


def row_sums(
    axis: int,
    transform: Transform,
    x: Array,
    shift: Array | None,
    class_mask: Array | None,
    index: tuple[Array | None, Array | None],
    mass: TargetMass | None,
    moment: bool = False,
) -> RowSums:
    """Return the sums of each row, (..., 1, ...), those that are asked for.

    Args:
      axis: the class axis.
      transform: what becomes of a logit; its scale is differentiated.
      x: logits or log-probabilities, (..., C, ...), any float dtype.
      shift: what `row_max` returned; None says that x is log-probabilities already, and
        leaves the others out.
      class_mask: bool, (..., C, ...), broadcastable to x; None where all classes exist.
      index: int32, (..., 1, ...), < 0 for none: of the class apart, and of a target that may be
        another one; None leaves them out.
      mass: of the targets. It is that of all classes where the class apart is the target.
      moment: whether to return it.
    """
    arguments = vary_alike(x, transform, shift, class_mask, index, mass)
    asked = _asked(moment, *arguments)
    return _unpack(axis, asked, _row_sums(axis, moment, *arguments))


def _asked(moment, x, transform, shift, class_mask, index, mass):
    apart, target = index
    return RowSums(
        left=apart is not None,
        others=shift is not None,
        moment=moment,
        target=target is not None,
        left_mass=_keeps_mass_apart(shift, mass),
        mass=mass is not None,
        mass_logit=mass is not None,
    )


def _keeps_mass_apart(shift, mass):
    return shift is not None and mass is not None and mass.probabilities is not None


# One array holds all sums: `vmap` gets the gradient of an unmapped argument wrong where some
# outputs of a custom_vjp are mapped and others are not (seen in jax 0.9.0 to 0.12.0).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _row_sums(axis, moment, *arguments):
    return _packed_sums(axis, moment, _form(axis, arguments, False), *arguments)


def _row_sums_fwd(axis, moment, *arguments):
    packed = _packed_sums(axis, moment, _form(axis, arguments, True), *arguments)
    return packed, arguments


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _packed_sums(axis, moment, form, x, transform, shift, class_mask, index, mass):
    arguments = x, transform, shift, class_mask, index, mass
    in_one_pass = functools.partial(_in_one_pass, axis, moment)
    one_by_one = functools.partial(set_sums, axis, moment, form=form)
    several = mass is not None or (shift is not None and (moment or index[0] is not None))
    if several and _is_unrolled(axis, x, mass):
        sums = jax.lax.platform_dependent(*arguments, cpu=in_one_pass, default=one_by_one)
    else:
        sums = one_by_one(*arguments)
    return jax.lax.concatenate(jax.tree.leaves(sums), axis % x.ndim)


def set_sums(
    axis: int,
    moment: bool,
    x: Array,
    transform: Transform,
    shift: Any,
    class_mask: Any,
    index: tuple[Any, Any],
    mass: TargetMass | None,
    form: str | None = None,
) -> RowSums:
    """Return the sums of a set of classes, each as XLA sums it up fastest; an index outside of
    [0, C) is that of another set. `form` says how a CPU sums up the exponentials."""
    apart, target = index
    left = others = None
    if shift is None:
        if apart is not None:
            left = pick((x,), apart, axis, lambda x: x.astype(compute_dtype(x)))
    else:
        left, others = _others(
            axis,
            "masked" if moment else form or _form(axis, (x, mass), False),
            x,
            transform,
            shift,
            class_mask,
            apart,
        )
        left = jnp.where(_is_here(apart, axis, x), left, -jnp.inf)
    sums = RowSums(left=left, others=others)
    if target is not None:
        picked = _centred_at(axis, x, transform, shift, class_mask, target)
        sums = sums._replace(target=jnp.where(_is_here(target, axis, x), picked, 0))
    if moment or mass is not None:
        centred = centre(transform, x, shift, class_mask)
    if moment:
        exps = exponentials(transform, x, shift, others_mask(apart, x, axis, class_mask))
        sums = sums._replace(moment=_sum(axis, product(exps, centred)))
    if mass is not None:
        q = unless_lost(mass.values(class_mask), centred)
        sums = sums._replace(mass=_sum(axis, q), mass_logit=_sum(axis, product(q, centred)))
        if _keeps_mass_apart(shift, mass):
            left_mass = jnp.where(
                _is_here(apart, axis, x), mass.at(apart, axis, class_mask).astype(q.dtype), 0
            )
            sums = sums._replace(
                left_mass=left_mass,
                mass=sums.mass - left_mass,
                mass_logit=sums.mass_logit - product(left_mass, left),
            )
    return sums


def _is_here(index, axis, x):
    return (index >= 0) & (index < x.shape[axis])


def _centred_at(axis, x, transform, shift, class_mask, index):
    known = None if class_mask is None else pick((class_mask,), index, axis, jnp.float32) > 0

    def shown(x, class_mask):
        x = x.astype(compute_dtype(x))
        return x if class_mask is None else jnp.where(class_mask, x, -jnp.inf)

    return centre(transform, pick((x, class_mask), index, axis, shown), shift, known)


def _others(axis, form, x, transform, shift, class_mask, apart):
    """The class apart less the shift, any value where there is none; the sum over the others."""

    def in_one_sum(x, transform, shift, class_mask, apart):
        mask = others_mask(apart, x, axis, class_mask)
        return _sum(axis, exponentials(transform, x, shift, mask))

    def taken_out(*arguments):
        """The sum over all, less the class apart: right where it is not nearly certain."""
        x, transform, shift, class_mask, apart = arguments
        left = _centred_at(axis, *arguments)
        exps = exponentials(transform, x, shift, class_mask)
        return left, _sum(axis, exps) - jnp.where(_is_here(apart, axis, x), finite_exp(left), 0)

    def multiplied(*arguments):
        x, transform, shift, class_mask, apart = arguments
        exps = exponentials(transform, x, shift, class_mask)
        return _centred_at(axis, *arguments), _sum(axis, exps * not_at(apart, x, exps.dtype))

    def masked(*arguments):
        x, transform, shift, class_mask, apart = arguments
        centred = centre(transform, x, shift, class_mask)
        left = _sum(axis, jnp.where(one_hot(apart, x, axis), centred, 0))
        return left, in_one_sum(*arguments)

    def gathered(*arguments):
        return _centred_at(axis, *arguments), in_one_sum(*arguments)

    def of_kept(*arguments):
        """The sums of blocks, of exponentials that the backward pass finds again."""
        x, transform, shift, class_mask, apart = arguments
        blocks = _blocks(exponentials(transform, x, shift, class_mask))
        which, inside = _in_block(apart.reshape(-1, 1), blocks)
        block = jax.lax.optimization_barrier(take_block(blocks, which))
        again = jnp.where(one_hot(inside, block, -1), 0, block)
        return _centred_at(axis, *arguments), _put_together(blocks, which, again, x)

    def in_blocks(x, transform, shift, class_mask, apart):
        """The sums of blocks, and of that one again which has the class apart."""
        blocks, masks = _hidden_blocks(x), _hidden_blocks(class_mask)
        shift = shift.reshape(-1, 1)
        which, inside = _in_block(apart.reshape(-1, 1), blocks)
        block, mask = jax.lax.optimization_barrier(
            (take_block(blocks, which), None if masks is None else take_block(masks, which))
        )
        again = exponentials(transform, block, shift, others_mask(inside, block, -1, mask))
        centred = centre(transform, block, shift, mask)
        left = _sum(-1, jnp.where(one_hot(inside, block, -1), centred, 0))
        exps = exponentials(transform, blocks, shift[..., None], masks)
        return left.reshape(*x.shape[:-1], 1), _put_together(exps, which, again, x)

    arguments = x, transform, shift, class_mask, apart
    if not is_split_alike((x, class_mask), apart):
        return masked(*arguments)
    forms = {
        "taken out": taken_out,
        "masked": gathered,
        "products": multiplied,
        "blocks": in_blocks,
        "kept blocks": of_kept,
    }
    on_cpu = forms[form]
    return jax.lax.platform_dependent(*arguments, cpu=on_cpu, default=masked)


def _form(axis, arguments, with_gradient):
    """How a CPU sums up the exponentials, which the backward pass may find again.

    In float32 they lie in the gradient, which they become; of half precision, they may take as
    much as KEPT, and are made again otherwise. They are 0 for the class apart where "masked".
    """
    x, *_, mass = arguments
    if mass is not None and mass.probabilities is None:
        return "taken out"  # with smoothing no loss is small
    # Of a symbolic shape (`jax.export`) no size is known; a number above 2**24 is no float32.
    static = all(isinstance(size, int) for size in x.shape) and x.shape[axis] <= 2**24
    if not static or not _is_last(axis, x):
        return "masked"
    keeps = with_gradient and mass is None and (x.dtype.itemsize >= 4 or 4 * x.size <= KEPT)
    if keeps and x.dtype.itemsize < 4:
        return "masked"
    if mass is not None or not _has_blocks(axis, x):
        return "products"
    return "kept blocks" if keeps else "blocks"


def _has_blocks(axis, x):
    """Whether a CPU is to go over the classes in blocks; not on a mesh, which may split them."""
    static = all(isinstance(size, int) and size for size in x.shape)
    return static and _is_last(axis, x) and not meshes(x) and num_blocks(x.shape[axis]) > 1


@functools.lru_cache
def num_blocks(num_classes: int) -> int:
    """Return into how many blocks of one size the classes are divided; 1 where no size is good."""
    if not isinstance(num_classes, int) or num_classes < 4096:
        return 1
    wanted = math.sqrt(num_classes)
    sizes = [
        size
        for small in range(1, math.isqrt(num_classes) + 1)
        if num_classes % small == 0
        for size in (small, num_classes // small)
    ]
    best = min(sizes, key=lambda size: abs(math.log(size / wanted)))
    return num_classes // best if wanted / 8 <= best <= 8 * wanted else 1


def _blocks(x):
    """(..., C) as (N, K, C / K), or (1, K, C / K) of a table."""
    count = num_blocks(x.shape[-1])
    return x.reshape(-1, count, x.shape[-1] // count)


def _hidden_blocks(x):
    # Hidden: XLA would go over the rows as they were.
    return None if x is None else jax.lax.optimization_barrier(_blocks(x))


def _in_block(apart, blocks):
    """Which block has the class apart, and where it is in there; -1 for none."""
    which = jnp.clip(apart, 0) // blocks.shape[2]
    return which, jnp.where(apart < 0, -1, apart - which * blocks.shape[2])


def _put_together(blocks, which, again, x):
    """The sum over all blocks, (..., 1), one of which is summed up again."""
    sums = jnp.where(jnp.arange(blocks.shape[1]) == which, _sum(-1, again), jnp.sum(blocks, -1))
    return _sum(-1, sums).reshape(*x.shape[:-1], 1)


def _in_one_pass(axis, moment, x, transform, shift, class_mask, index, mass):
    """All sums in one loop over few classes."""
    apart, target = index
    centred = centre(transform, x, shift, class_mask)
    is_apart = None if apart is None else one_hot(apart, x, axis)
    taken_out = _form(axis, (x, mass), False) == "taken out"
    exps = None
    if shift is not None:
        exps = exponentials(transform, x, shift, class_mask)
        exps = exps if taken_out else jnp.where(is_apart, 0, exps)
    q = None if mass is None else unless_lost(mass.values(class_mask), centred)
    keeps_apart = _keeps_mass_apart(shift, mass)
    terms = RowSums(
        left=None if apart is None else jnp.where(is_apart, centred, 0),
        others=exps,
        moment=product(exps, centred) if moment else None,
        target=None if target is None else jnp.where(one_hot(target, x, axis), centred, 0),
        left_mass=jnp.where(is_apart, q, 0) if keeps_apart else None,
        mass_logit=None if q is None else product(q, centred),
    )
    if keeps_apart:
        terms = terms._replace(mass_logit=jnp.where(is_apart, 0, terms.mass_logit))
        q = jnp.where(is_apart, 0, q)
    sums = _sum_at_once(axis, terms)
    if apart is not None and shift is not None:
        sums = sums._replace(left=jnp.where(_is_here(apart, axis, x), sums.left, -jnp.inf))
        if taken_out:
            sums = sums._replace(others=sums.others - finite_exp(sums.left))
    return sums if q is None else sums._replace(mass=_sum(axis, q))


def _sum(axis, term):
    axis %= term.ndim
    return jax.lax.expand_dims(jax.lax.reduce_sum(term, (axis,)), (axis,))


def _is_unrolled(axis, x, mass):
    """Whether a CPU is to sum all terms in one loop, which XLA unrolls for few classes.

    Over a second axis of 21 it is 3 to 40 times faster than sums one by one, which XLA gives to a
    library (jax 0.10.2). That is slow at products of a table on any axis but the last, by 30 times
    for 21 classes; without them it is the faster one for many. Not on a mesh, which may split the
    classes: XLA gathers what it cannot add up.
    """
    return not meshes(x) and (_are_few(axis, x) or (mass is not None and not _is_last(axis, x)))


def _are_few(axis, x):
    """On a CPU, 16 classes on the last axis, and 24 on another, are still unrolled (jax 0.10.2)."""
    size = x.shape[axis]
    return isinstance(size, int) and size <= (16 if _is_last(axis, x) else 24)


def _is_last(axis, x):
    return axis % x.ndim == x.ndim - 1


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_at_once(axis, terms):
    leaves, structure = jax.tree.flatten(terms)
    axis %= leaves[0].ndim
    zeros = vary_like(leaves[0], tuple(jnp.zeros((), leaf.dtype) for leaf in leaves))
    sums = jax.lax.reduce(tuple(leaves), zeros, _add, (axis,))
    return jax.tree.unflatten(structure, [jnp.expand_dims(x, axis) for x in sums])


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


@_sum_at_once.defjvp
def _sum_at_once_jvp(axis, primals, tangents):
    d_sums = jax.tree.map(functools.partial(_sum, axis), tangents[0])
    return _sum_at_once(axis, *primals), d_sums


def _row_sums_bwd(axis, moment, residuals, cotangents):
    x, transform, shift, class_mask, index, mass = residuals
    asked = _asked(moment, *residuals)
    x = _fresh(axis, transform, x, mass)
    # Hidden: else XLA's CPU compiler makes them again for each class.
    packed = jax.lax.optimization_barrier(cotangents)
    q, pull = None, None
    if mass is not None:
        q, pull = jax.vjp(lambda mass: mass.values(class_mask), mass)
    d_x, d_transform, d_q = row_gradients(
        axis,
        transform,
        x,
        shift,
        class_mask,
        index,
        q,
        _unpack(axis, asked, packed),
        masked=_form(axis, residuals, True) == "masked",
    )
    d_mass = None if pull is None else pull(d_q)[0]
    return d_x.astype(x.dtype), d_transform, None, None, None, d_mass


_row_sums.defvjp(_row_sums_fwd, _row_sums_bwd)


def _fresh(axis, transform, x, mass):
    """x, from which XLA makes again what the forward pass made where it would hold it for longer:
    beside a mass or a cap, float32 arrays of the logits' size (jax 0.10.2: for an H100, of capped
    ones; on CPUs, of both, but not of capped ones alone, of which it holds more when hidden).
    Of few classes, CPUs make them again vectorized where their axis is not the last.
    """
    hide_on_cpu = mass is not None
    if _are_few(axis, x):
        hide_on_cpu = not _is_last(axis, x)
    hide_elsewhere = mass is not None or not transform.is_identity
    if not hide_on_cpu and not hide_elsewhere:
        return x
    hidden, same = jax.lax.optimization_barrier, lambda x: x
    return jax.lax.platform_dependent(
        x, cpu=hidden if hide_on_cpu else same, default=hidden if hide_elsewhere else same
    )


def _unpack(axis, asked, sums):
    """Slices of the sums, of those that are asked for."""
    parts = iter(jnp.split(sums, sums.shape[axis], axis))
    return RowSums(*(next(parts) if wanted else None for wanted in asked))
