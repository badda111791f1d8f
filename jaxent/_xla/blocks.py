"""Rows in blocks of classes: the largest class, and what sums over blocks need."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._axes import meshes
from .classes import gather_bits, is_last, sum_classes
from .registry import by_platform, hidden, workaround

# The classes from which a CPU goes over a row in blocks: for the sum of its exponentials, for that
# and its moment, and for its largest class.
BLOCKED_SUM_CLASSES = 4096
BLOCKED_MOMENT_CLASSES = 512
BLOCKED_ARGMAX_CLASSES = 128

# (x, class_mask, transform) -> values, and (values, axis, transform) -> the class of the largest.
Visible = Callable[[Array, Any, Any], Array]
First = Callable[[Array, int, Any], Array]


def has_blocks(axis: int, x: Array, least: int) -> bool:
    """Return whether a CPU is to go over the classes in blocks; not on a mesh, which may split."""
    static = all(isinstance(size, int) and size for size in x.shape)
    if not static or not is_last(axis, x) or meshes(x):
        return False
    return x.shape[axis] >= least and num_blocks(x.shape[axis]) > 1


@functools.lru_cache
def num_blocks(num_classes: Any) -> int:
    """Return into how many blocks of one size the classes are divided.

    It is 1 where no size is good, or their number is symbolic.
    """
    if not isinstance(num_classes, int):
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


def blocks_of(x: Array) -> Array:
    """(..., C) as (N, K, C / K), or (1, K, C / K) of a table."""
    *rows, num_classes = x.shape
    count = num_blocks(num_classes)
    return x.reshape(math.prod(rows), count, num_classes // count)


def hidden_blocks(x: Any) -> Any:
    # Hidden: XLA would go over the rows as they were.
    return None if x is None else hidden(blocks_of(x))


def take_block(blocks: Any, which: Array) -> Any:
    """One block, (N, B), of each row of blocks (N, K, B), or (1, K, B) of a table."""
    if blocks is None or blocks.shape[0] == 1:
        return None if blocks is None else blocks[0][which[:, 0]]
    return gather_bits(_gather_block, blocks, which)


def _gather_block(blocks: Array, which: Array) -> Array:
    dimensions = jax.lax.GatherDimensionNumbers((1,), (1,), (1,), (0,), (0,))
    return jax.lax.gather(blocks, which, dimensions, (1, 1, blocks.shape[2]), mode="clip")


def _row_max(
    axis: int, visible: Visible, first: First | None, x: Array, class_mask: Any, transform: Any
) -> tuple[Array, ...]:
    values = visible(x, class_mask, transform)
    top = jnp.max(values, axis, keepdims=True)
    return (top,) if first is None else (top, first(values, axis, transform))


@workaround(_row_max)
def row_max(
    axis: int,
    visible: Visible,
    first: First | None,
    x: Array,
    class_mask: Any,
    transform: Any,
) -> tuple[Array, ...]:
    """Return the largest of `visible(x, class_mask, transform)` of each row, and its first class.

    `first(values, axis, transform)` is the class of the first of the largest values; None asks for
    none. A CPU looks at the blocks' largest values for it, and then into one block: (4096, 1000)
    float32 takes 1.1 ms so, and 4.1 ms if each value is compared with the largest; the largest
    alone is 1.4 times as fast from 4096 classes on (jax 0.12.0.1).
    """
    plain: Callable[..., tuple[Array, ...]] = functools.partial(_row_max, axis, visible, first)

    def in_blocks(x: Array, class_mask: Any, transform: Any) -> tuple[Array, ...]:
        blocks, masks = hidden_blocks(x), hidden_blocks(class_mask)
        tops = jnp.max(visible(blocks, masks, transform), -1)
        tops = hidden(tops)
        top = jnp.max(tops, -1, keepdims=True).reshape(*x.shape[:-1], 1)
        if first is None:
            return (top,)
        which = first(tops, -1, transform)
        block = take_block(blocks, which), take_block(masks, which)
        inside = first(visible(*hidden(block), transform), -1, transform)
        return top, (which * blocks.shape[2] + inside).reshape(top.shape)

    least = BLOCKED_SUM_CLASSES if first is None else BLOCKED_ARGMAX_CLASSES
    if not has_blocks(axis, x, least):
        return plain(x, class_mask, transform)
    return by_platform(in_blocks, plain, x, class_mask, transform)


def in_block(apart: Array, blocks: Array) -> tuple[Array, Array]:
    """Which block has the class apart, and where it is in there; -1 for none."""
    which = jnp.clip(apart, 0) // blocks.shape[2]
    return which, jnp.where(apart < 0, -1, apart - which * blocks.shape[2])


def block_apart(apart: Array, blocks: Array, masks: Any) -> tuple[Array, Array, Array, Any]:
    """Return `in_block` of the class apart, and that block with its mask."""
    which, inside = in_block(apart.reshape(-1, 1), blocks)
    values, mask = hidden((take_block(blocks, which), take_block(masks, which)))
    return which, inside, values, mask


def put_together(blocks: Array, which: Array, again: Array, x: Array) -> Array:
    """Return the sum over all blocks, (..., 1), one of which is summed up again."""
    sums = jnp.where(
        jnp.arange(blocks.shape[1]) == which, sum_classes(-1, again), jnp.sum(blocks, -1)
    )
    return sum_classes(-1, sums).reshape(*x.shape[:-1], 1)
