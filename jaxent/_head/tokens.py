"""The tokens of a head, in blocks: those that count first, and the others in no block at all."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from .._axes import vary_like

T = TypeVar("T")
# Takes rows of the block, and what else it needs; returns the rows anew, and what is summed.
Turn = Callable[..., tuple[Any, Any]]


class Blocks(NamedTuple):
    """The order in which tokens are gone over.

    There are M >= N places, a multiple of the block's size. Of the places that no block reaches,
    and of those beyond N, nothing is read.
    """

    size: Any  # of a block; None: all tokens at once, as they are
    turns: Any  # blocks that have a token that counts
    # None where each token has its own place:
    order: Array | None = None  # int32, (M,): the token at each place, N where there is none
    place: Array | None = None  # int32, (N,): the place of each token

    @classmethod
    def of(cls, size: Any, uncounted: Array, skip: bool) -> "Blocks":
        """Return blocks of this size; with `skip`, of the tokens that count alone."""
        num_tokens = uncounted.shape[0]
        if not size:
            return cls(None, 1)
        blocks = -(-num_tokens // size)
        places = jnp.arange(blocks * size, dtype=jnp.int32)
        if not skip and len(places) == num_tokens:
            return cls(size, blocks)
        if not skip:
            return cls(size, blocks, jnp.minimum(places, num_tokens), places[:num_tokens])
        # A stable sort of two kinds, without a sort: how many of its kind come before.
        counted = ~uncounted[:, 0]
        before, others = jnp.cumsum(counted, dtype=jnp.int32), jnp.cumsum(~counted, dtype=jnp.int32)
        place = jnp.where(counted, before, before[-1] + others) - 1
        order = jnp.full(places.shape, num_tokens, jnp.int32)
        order = vary_like(uncounted, order)
        order = order.at[place].set(places[:num_tokens], unique_indices=True)
        return cls(size, _of_all(-(-before[-1] // size)), order, place)

    def first(self, x: Array) -> Array:
        """Return (N, ...) as (M, ...), in the order."""
        if self.order is None:
            return x
        ordered: Array = x.at[self.order].get(mode="fill", fill_value=0)
        return ordered

    def back(self, x: Array) -> Array:
        """Return (M, ...) as (N, ...), as the tokens came."""
        if self.place is None:
            return x
        return x.at[self.place].get(mode="promise_in_bounds", unique_indices=True)

    def unreached(self) -> Any:
        """Return which places no block reaches, (M, 1), or for all."""
        if self.order is None:
            return jnp.zeros((), bool)
        return jnp.arange(self.order.shape[0], dtype=jnp.int32)[:, None] >= self.turns * self.size

    def run(self, turn: Turn, rows: T, *given: Any) -> tuple[T, Any]:
        """Return the rows after each block's turn, and the sum of what the turns return.

        Args:
          turn: a function of rows and given, each cut to the block.
          rows: a tree of arrays (M, ...).
          given: what has a method `by_token`, that puts its arrays (M, ...) through a function.
        """
        if self.size is None:
            alone: tuple[T, Any] = turn(rows, *given)
            return alone

        def cut(i: Any, rows: T, given: Any) -> Any:
            def part(x: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size)

            return jax.tree.map(part, rows), *(each.by_token(part) for each in given)

        def step(i: Array, carry: tuple[T, Any]) -> tuple[T, Any]:
            rows, total = carry
            here, part = turn(*cut(i, rows, given))

            def put(x: Array, here: Array) -> Array:
                return jax.lax.dynamic_update_slice_in_dim(x, here, i * self.size, 0)

            return jax.tree.map(put, rows, here), jax.tree.map(jnp.add, total, part)

        of_one = jax.eval_shape(lambda *args: turn(*cut(0, *args))[1], rows, given)
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), of_one)
        total = vary_like(jax.tree.leaves(rows)[0], total)
        after: tuple[T, Any] = jax.lax.fori_loop(0, self.turns, step, (rows, total))
        return after


@jax.custom_batching.custom_vmap
def _of_all(turns: Array) -> Array:
    """Return the number of turns: under `vmap` the same for all, so that no turn is a select."""
    return turns


@_of_all.def_vmap
def _of_all_batched(size: int, batched: Any, turns: Array) -> tuple[Array, bool]:
    return jnp.max(turns), False
