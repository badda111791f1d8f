"""What is kept, made again, or made once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .classes import is_last, zeros_like
from .mass import sums_mass_as_it_is
from .one_loop import are_few
from .registry import R, by_platform, hidden, workaround
from .sums import can_keep


@workaround(lambda product: product)
def rounded(product: Array) -> Array:
    """Return a product as it is, which what follows cannot make part of its own rounding.

    A CPU makes one operation, rounded once, of a product and a difference, in one loop and not in
    another (jax 0.12.0.1): the largest of the logits scale * x then is not 0 from itself, and what
    is nearly certain, or nearly equal to a teacher's, loses its digits. It is not for the
    capped logits of a loss, of which a CPU then keeps a float32 array (bfloat16).
    """
    return _selected(product)


@jax.custom_jvp
def _selected(product: Array) -> Array:
    return jnp.where(jnp.isfinite(product), product, 2 * product)


@_selected.defjvp
def _selected_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _selected(*primals), tangents[0]


@workaround(lambda axis, x, class_mask, shift, transform, has_mass, is_smoothed: (x, shift))
def computed_again(
    axis: int,
    x: Array,
    class_mask: Any,
    shift: Any,
    transform: Any,
    has_mass: bool,
    is_smoothed: bool,
) -> tuple[Array, Any]:
    """Return x and shift, of which the backward pass makes again what the forward pass made.

    Beside a target mass or a cap, XLA holds float32 arrays of the logits' size from the forward to
    the backward pass: for an H100 (jax 0.10.2), and on a CPU beside smoothing where `mass_sums`
    makes arrays, 16 MB of a loss of (4096, 1000) float32 that needs 0.2 MB (jax 0.12.0.1). Where it
    makes none, the exponentials are held, if they may be (`can_keep`). Beside probabilities a CPU
    holds as much either way, and takes up to 1.4 times as long if x is hidden. It vectorizes the
    loop over few classes of another axis than the last only if it makes them again (jax 0.10.2).
    """
    if are_few(axis, x):
        hide_on_cpu = not is_last(axis, x)
    else:
        has_array = not sums_mass_as_it_is(axis, x, class_mask, transform)
        hide_on_cpu = is_smoothed and (has_array or not can_keep(x))
    hide_elsewhere = has_mass or not transform.is_identity
    if not hide_on_cpu and not hide_elsewhere:
        return x, shift
    on_cpu: Callable[[Any], Any] = hidden if hide_on_cpu else _same
    others: Callable[[Any], Any] = hidden if hide_elsewhere else _same
    result: tuple[Array, Any] = by_platform(on_cpu, others, (x, shift))
    return result


def _same(x: Any) -> Any:
    return x


@workaround(_same)
def once_per_row(values: R) -> R:
    """Return values of the rows, behind a barrier.

    A CPU fuses what makes a value of a row, a logarithm say, into the loop that uses it, and makes
    it again for each class: log_softmax of (4096, 1000) float32 takes 1.2 times as long (jax
    0.12.0.1).
    """
    return hidden(values)


@workaround(lambda terms: jnp.stack([jnp.sum(term) for term in terms]))
def sums_of(terms: Sequence[Array]) -> Any:
    """Return the sum of each array, stacked.

    A CPU makes a kernel, or several, of each sum alone (jax 0.10.2).
    """
    if any(jax.typeof(term) != jax.typeof(terms[0]) for term in terms):
        terms = [term + zeros_like(terms[0]) for term in terms]  # of one sharding
    stacked = jax.lax.concatenate([jax.lax.expand_dims(term, (0,)) for term in terms], 0)
    return jax.lax.reduce_sum(stacked, tuple(range(1, stacked.ndim)))


@workaround(lambda sums, axis: sums)
def packed(sums: Any, axis: int) -> Any:
    """Return the arrays (..., 1, ...) as one, (..., K, ...), to come out of a custom_vjp.

    Where `vmap` maps some outputs of a custom_vjp and not others, the gradient of an unmapped
    argument raises a ValueError (jax 0.12.0.1), and was wrong before (jax 0.9.0).
    """
    leaves = jax.tree.leaves(sums)
    return jax.lax.concatenate(leaves, axis % leaves[0].ndim)


def unpacked(structure: Any, packed: Any, axis: int) -> Any:
    """Return what `packed` was given, a tree of this structure."""
    if not isinstance(packed, Array):
        return packed
    return jax.tree.unflatten(structure, jnp.split(packed, packed.shape[axis], axis))


@workaround(lambda values, like: values)
def mapped_alike(values: Any, like: Array) -> Any:
    """Return arrays (..., 1, ...), mapped where `like` is, beside which a custom_vjp returns them.

    As `packed` (jax 0.12.0.1), for what is not to be one array with it: what has integers, or a
    cotangent that may be a symbolic zero by itself. XLA takes the selection out again.
    """
    return jax.tree.map(lambda x: jnp.where(like > 0, x, x), values)
