"""Sums over few classes, in one loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._axes import meshes, vary_like
from .._forms import chosen
from .classes import is_last, sum_classes
from .registry import R, by_platform, workaround


def are_few(axis: int, x: Array) -> bool:
    """On a CPU, 16 classes on the last axis, and 24 on another, are still unrolled (jax 0.10.2)."""
    size = x.shape[axis]
    return isinstance(size, int) and size <= (16 if is_last(axis, x) else 24)


def _is_faster_in_one_loop(axis: int, x: Array, has_mass: bool) -> bool:
    return not meshes(x) and (are_few(axis, x) or (has_mass and not is_last(axis, x)))


@workaround(lambda axis, has_mass, one_loop, one_by_one, x, *rest: one_by_one(x, *rest))
def in_one_loop(
    axis: int,
    has_mass: bool,
    one_loop: Callable[..., R],
    one_by_one: Callable[..., R],
    x: Array,
    *rest: Any,
) -> R:
    """Return `one_loop(x, *rest)` on a CPU where its loop over the classes is unrolled.

    Over a second axis of 21 classes it is 3 to 40 times as fast as sums one by one, which the
    compiler gives to a library (jax 0.10.2). The library is slow, by 30 times for 21 classes, at
    products of a table on any axis but the last, so many classes take the loop there, too; without
    products it is the faster one for many. On a mesh, which may split the classes, no loop of
    several sums is added up, but gathered.
    """
    if not chosen("one_loop", _is_faster_in_one_loop, axis, x, has_mass):
        return one_by_one(x, *rest)
    return by_platform(one_loop, one_by_one, x, *rest)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def sum_at_once(axis: int, terms: Any) -> Any:
    """Return the sums of the terms over an axis, kept as 1, in one loop."""
    leaves, structure = jax.tree.flatten(terms)
    axis %= leaves[0].ndim
    zeros = vary_like(leaves[0], tuple(jnp.zeros((), leaf.dtype) for leaf in leaves))
    sums = jax.lax.reduce(tuple(leaves), zeros, _add, (axis,))
    return jax.tree.unflatten(structure, [jnp.expand_dims(x, axis) for x in sums])


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)  # one function, so that a second call compiles nothing


@sum_at_once.defjvp
def _sum_at_once_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    d_sums = jax.tree.map(functools.partial(sum_classes, axis), tangents[0])
    return sum_at_once(axis, *primals), d_sums
