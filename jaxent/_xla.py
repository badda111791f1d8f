"""What XLA and JAX made us write otherwise, whole: each place a function that says why.

The rest of the library reads as if the compiler were perfect. A docstring here says what happens
without the function, where that was seen, and what the function costs. Each has a plain form,
which `without(name)` takes instead: `tests/test_workarounds.py` shows what then breaks, on the
newest JAX, and a workaround without which nothing breaks is to be taken out.

CPU means XLA's CPU compiler. Others (GPU, TPU) get the formula unless a function says otherwise.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from ._axes import meshes, vary_like
from ._classes import along
from ._forms import chosen
from ._numerics import finite_exp, safe_multiply

P = ParamSpec("P")
R = TypeVar("R")

# The bytes of float32 exponentials that a CPU may keep from the forward pass to the backward pass.
KEPT_BYTES = 2**25
# The classes from which a CPU goes over a row in blocks: for the sum of its exponentials, for that
# and its moment, and for its largest class.
BLOCKED_SUM_CLASSES = 4096
BLOCKED_MOMENT_CLASSES = 512
BLOCKED_ARGMAX_CLASSES = 128

# (x, class_mask, shift, transform, q) -> q and q * (z - shift), which have the logits' shape.
Terms = Callable[..., tuple[Array, Array]]
# (x, class_mask, transform) -> values, and (values, axis, transform) -> the class of the largest.
Visible = Callable[[Array, Any, Any], Array]
First = Callable[[Array, int, Any], Array]
# `_rows.centre`, `_rows.centre_at` and `_rows.exponentials`.
Functions = tuple[Callable[..., Array], Callable[..., Array], Callable[..., Array]]

WORKAROUNDS: dict[str, Callable[..., Any]] = {}
_switched_off: set[str] = set()


def workaround(plain: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Name a function a workaround, of which `plain` is the form for a perfect compiler."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        WORKAROUNDS[name] = function

        @functools.wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> R:
            form = plain if name in _switched_off else function
            return form(*args, **keywords)

        return call

    return register


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """Take a workaround's plain form in what is traced within this context."""
    if name not in WORKAROUNDS:
        raise ValueError(f"{name} is none of {', '.join(WORKAROUNDS)}")
    jax.clear_caches()
    _switched_off.add(name)
    try:
        yield
    finally:
        _switched_off.remove(name)
        jax.clear_caches()


def _by_platform(on_cpu: Callable[..., R], others: Callable[..., R], *arguments: Any) -> R:
    result: R = jax.lax.platform_dependent(*arguments, cpu=on_cpu, default=others)
    return result


def _hidden(values: R) -> R:
    result: R = jax.lax.optimization_barrier(values)
    return result


# Shardings of an explicit mesh.


@workaround(lambda x, dtype=None: jnp.zeros_like(x, dtype))
def zeros_like(x: Array, dtype: Any = None) -> Array:
    """Return zeros that are split as x is.

    The zeros of `jnp.zeros_like` are whole, or raise, where an explicit mesh is that of the
    arguments and none is set (jax 0.10.2 to 0.12.0.1). This costs nothing: XLA knows that an
    integer times 0 is 0.
    """
    return (x.astype(jnp.int32) * 0).astype(x.dtype if dtype is None else dtype)


@workaround(lambda x, axis: _numbers(x, axis))
def class_numbers(x: Array, axis: int) -> Array:
    """Return the numbers of the classes, broadcastable to x, and split as x is on an explicit mesh.

    Numbers that are whole on each device make what is compared with them whole, or gathered (jax
    0.10.2 for TPUs).
    """
    numbers, spec = _numbers(x, axis), jax.typeof(x).sharding.spec
    return numbers + zeros_like(x, jnp.int32) if spec and spec[axis] else numbers


def _numbers(x: Array, axis: int) -> Array:
    return along(axis, x.ndim, jnp.arange(x.shape[axis], dtype=jnp.int32))


# The value at one class of each row.


def one_hot(index: Array, x: Array, axis: int) -> Array:
    """Return where the class is the one at the index (..., 1, ...), broadcastable to x."""
    return index == class_numbers(x, axis)


def _masked_sum(
    arrays: tuple[Any, ...], index: Array, axis: int, function: Any = lambda x: x
) -> Array:
    values = function(*arrays)
    if index.shape[axis] != 1:
        values = jnp.expand_dims(values, _places_axis(axis, values))
        return jnp.sum(jnp.where(_one_hots(index, values, axis), values, 0), axis % index.ndim)
    total: Array = jnp.sum(jnp.where(one_hot(index, values, axis), values, 0), axis, keepdims=True)
    return total


def _places_axis(axis: int, values: Array) -> int:
    """Return the axis of several classes of each row, beside that of all of them."""
    return axis % values.ndim + 1


def _one_hots(index: Array, values: Array, axis: int) -> Array:
    """Return where the class is that of a place, (..., C, K, ...), of an index (..., K, ...)."""
    return one_hot(jnp.expand_dims(index, axis % index.ndim), values, axis % index.ndim)


@workaround(_masked_sum)
def take_class(
    arrays: tuple[Any, ...], index: Array, axis: int, function: Any = lambda x: x
) -> Array:
    """Return `function(*arrays)`, elementwise, at the class (..., 1, ...); any value if it is < 0.

    Arrays are (..., C, ...), or tables of one value a class, (1, C, 1, ...), or None. On a CPU it
    is a gather: a sum in which all other classes are 0 takes five times as long as the sum of the
    exponentials (jax 0.10.2). Other backends fuse that sum with the pass over the same values, and
    an explicit mesh that splits the classes, or the index alone, refuses the gather. Of several
    classes, (..., K, ...), where that sum takes K times as long, it is a gather everywhere.
    """
    if not splits_alike(arrays, index):
        return _masked_sum(arrays, index, axis, function)
    if index.shape[axis] != 1:
        return gather_class(arrays, index, axis, function)
    on_cpu, others = (
        functools.partial(f, axis=axis, function=function) for f in (gather_class, _masked_sum)
    )
    return _by_platform(on_cpu, others, arrays, index)


def splits_alike(arrays: tuple[Any, ...], index: Array) -> bool:
    """Return whether an explicit mesh splits all of them as the index, or there is none."""
    spec = jax.typeof(index).sharding.spec
    return all(x is None or jax.typeof(x).sharding.spec == spec for x in arrays)


def gather_class(
    arrays: tuple[Any, ...], index: Array, axis: int, function: Any = lambda x: x
) -> Array:
    """Return what `take_class` does, as a gather."""
    take = functools.partial(gather_bits, functools.partial(_gather, axis))
    taken: Array = function(*(None if values is None else take(values, index) for values in arrays))
    return taken


def _gather(axis: int, values: Array, index: Array) -> Array:
    """`jnp.take_along_axis`, and of a table's value for each index; clipped to the classes."""
    axis %= values.ndim
    batch = tuple(i for i in range(values.ndim) if i != axis)
    if values.size == values.shape[axis]:
        values, axis, batch = values.ravel(), 0, ()
    dimensions = jax.lax.GatherDimensionNumbers((), (axis,), (axis,), batch, batch)
    one = (1,) * values.ndim
    return jax.lax.gather(values, index[..., None], dimensions, one, mode="clip")


@workaround(lambda gather, values, index: gather(values, index))
def gather_bits(gather: Callable[[Array, Array], Array], values: Array, index: Array) -> Array:
    """Return `gather(values, index)`; of half precision, the gather of its bits.

    A CPU makes a float32 copy of a half-precision array to gather from (jax 0.10.2). The bits are
    gathered as they are.
    """
    return _gathered_bits(gather, values, index)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gathered_bits(gather: Callable[[Array, Array], Array], values: Array, index: Array) -> Array:
    if values.dtype.itemsize != 2:
        return gather(values, index)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16)
    return jax.lax.bitcast_convert_type(gather(bits, index), values.dtype)


@_gathered_bits.defjvp
def _gathered_bits_jvp(
    gather: Callable[[Array, Array], Array], primals: Any, tangents: Any
) -> tuple[Array, Array]:
    (values, index), (d_values, _) = primals, tangents
    return _gathered_bits(gather, values, index), gather(d_values, index)


def _masked_put(x: Array, index: Array, values: Array, axis: int) -> Array:
    one_hots = _one_hots(index, jnp.expand_dims(x, _places_axis(axis, x)), axis)
    put = jnp.where(one_hots, jnp.expand_dims(values, axis % x.ndim), 0)
    places = _places_axis(axis, x)
    return jnp.where(jnp.any(one_hots, places), jnp.sum(put, places), x)


def put_at_class(x: Array, index: Array, values: Array, axis: int) -> Array:
    """Return x with these values, (..., K, ...), at the classes of an index of the same shape.

    A class is there once at most; an index outside of [0, C) is none. It is a scatter, which an
    explicit mesh that splits the classes refuses. Comparing each class with each of 16 places takes
    a CPU as long as the exponentials of four logits, 2.6 ns (jax 0.12.0.1).
    """
    if not splits_alike((x,), index):
        return _masked_put(x, index, values, axis)
    at = index[..., None], values, _scatter_dimensions(axis, x)
    put: Array = jax.lax.scatter(x, *at, unique_indices=True, mode="drop")
    return put


def _scatter_dimensions(axis: int, x: Array) -> jax.lax.ScatterDimensionNumbers:
    axis %= x.ndim
    batch = tuple(i for i in range(x.ndim) if i != axis)
    return jax.lax.ScatterDimensionNumbers((), (axis,), (axis,), batch, batch)


def add_at_class(x: Array, index: Array, values: Array, axis: int) -> Array:
    """Return x with these values added at the classes of an index, which may have one twice."""
    at = index[..., None], values, _scatter_dimensions(axis, x)
    added: Array = jax.lax.scatter_add(x, *at, mode="drop")
    return added


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


# Rows in blocks of classes.


def has_blocks(axis: int, x: Array, least: int) -> bool:
    """Return whether a CPU is to go over the classes in blocks; not on a mesh, which may split."""
    static = all(isinstance(size, int) and size for size in x.shape)
    if not static or not is_last(axis, x) or meshes(x):
        return False
    return x.shape[axis] >= least and num_blocks(x.shape[axis]) > 1


@functools.lru_cache
def num_blocks(num_classes: int) -> int:
    """Return into how many blocks of one size the classes are divided; 1 where no size is good."""
    wanted = math.sqrt(num_classes)
    sizes = [
        size
        for small in range(1, math.isqrt(num_classes) + 1)
        if num_classes % small == 0
        for size in (small, num_classes // small)
    ]
    best = min(sizes, key=lambda size: abs(math.log(size / wanted)))
    return num_classes // best if wanted / 8 <= best <= 8 * wanted else 1


def _blocks(x: Array) -> Array:
    """(..., C) as (N, K, C / K), or (1, K, C / K) of a table."""
    count = num_blocks(x.shape[-1])
    return x.reshape(-1, count, x.shape[-1] // count)


def _hidden_blocks(x: Any) -> Any:
    # Hidden: XLA would go over the rows as they were.
    return None if x is None else _hidden(_blocks(x))


def _take_block(blocks: Any, which: Array) -> Any:
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
        blocks, masks = _hidden_blocks(x), _hidden_blocks(class_mask)
        tops = jnp.max(visible(blocks, masks, transform), -1)
        tops = _hidden(tops)
        top = jnp.max(tops, -1, keepdims=True).reshape(*x.shape[:-1], 1)
        if first is None:
            return (top,)
        which = first(tops, -1, transform)
        block = _take_block(blocks, which), _take_block(masks, which)
        inside = first(visible(*_hidden(block), transform), -1, transform)
        return top, (which * blocks.shape[2] + inside).reshape(top.shape)

    least = BLOCKED_SUM_CLASSES if first is None else BLOCKED_ARGMAX_CLASSES
    if not has_blocks(axis, x, least):
        return plain(x, class_mask, transform)
    return _by_platform(in_blocks, plain, x, class_mask, transform)


# The sum over a row's classes but one.


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


def sum_classes(axis: int, term: Array) -> Array:
    """Return the sum over the class axis, which is kept as 1."""
    axis %= term.ndim
    return jax.lax.expand_dims(jax.lax.reduce_sum(term, (axis,)), (axis,))


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
    keeps = may_keep and _can_keep(x)
    if keeps and x.dtype.itemsize < 4:
        return "masked"
    least = BLOCKED_MOMENT_CLASSES if moment else BLOCKED_SUM_CLASSES
    if has_mass or not has_blocks(axis, x, least):
        # Exponentials that both sums take would be kept: 8 MB of a head's chunk.
        return "masked" if moment else "products"
    return "kept blocks" if keeps else "blocks"


def _can_keep(x: Array) -> bool:
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
    - blocks: sums of blocks, and once more of the one that has the class, from 4096 classes on;
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
        blocks = _blocks(exponentials(transform, x, shift, class_mask))
        which, inside = _in_block(apart.reshape(-1, 1), blocks)
        block = _hidden(_take_block(blocks, which))
        again = jnp.where(one_hot(inside, block, -1), 0, block)
        others = _put_together(blocks, which, again, x)
        return gathered(x, class_mask, shift, transform, apart), others

    def in_blocks(
        x: Array, class_mask: Any, shift: Array, transform: Any, apart: Array
    ) -> tuple[Array, Array]:
        blocks, masks = _hidden_blocks(x), _hidden_blocks(class_mask)
        shift = shift.reshape(-1, 1)
        which, inside, values, mask = _block_apart(apart, blocks, masks)
        centred = centre(transform, values, shift, mask)
        left = sum_classes(-1, jnp.where(one_hot(inside, values, -1), centred, 0))
        mask = others_mask(inside, values, -1, mask)
        again = exponentials(transform, values, shift, mask)
        exps = exponentials(transform, blocks, shift[..., None], masks)
        return left.reshape(*x.shape[:-1], 1), _put_together(exps, which, again, x)

    forms = {
        "products": products,
        "blocks": in_blocks,
        "kept blocks": kept_blocks,
        "taken out": taken_out,
        "masked": masked,
    }
    arguments = x, class_mask, shift, transform, apart
    return _by_platform(forms[form], plain, *arguments)


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
    From 4096 classes on, blocks are summed up there, and the one that has the class apart once
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
        masks = None if class_mask is None else _blocks(class_mask)
        blocks, masks, shift = _hidden((_blocks(x), masks, shift))
        shift = shift.reshape(-1, 1)
        which, inside, values, mask = _block_apart(apart, blocks, masks)
        again = moments(transform, values, shift, others_mask(inside, values, -1, mask))
        terms = moments(transform, blocks, shift[..., None], masks)
        return _put_together(terms, which, again, x)

    return _by_platform(in_blocks, plain, *arguments)


def _sums_of_terms(axis: int, terms: Terms, centre: Any, *arguments: Any) -> tuple[Array, Array]:
    mass, mass_logit = terms(*arguments)
    return sum_classes(axis, mass), sum_classes(axis, mass_logit)


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
    the select, in a slow loop without arrays, where a row's sum is not finite. (256, 32000)
    bfloat16 with class weights and smoothing takes 0.46 of the time, and 0.1 MB of scratch for 33;
    with logits of -inf of weight 0, 0.5 to 1.5 (jax 0.12.0.1). A class_mask, a scale and a cap make
    arrays all the same; with jit off, `jax_debug_nans` would see the 0 * inf.
    """
    arguments = x, class_mask, shift, transform, q
    plain = functools.partial(_sums_of_terms, axis, terms, centre)
    has_array = class_mask is not None or not transform.is_identity
    if has_array or not is_last(axis, x) or meshes(x) or jax.config.jax_disable_jit:
        return plain(*arguments)
    fast = functools.partial(_fast_mass_sums, axis, terms, centre)
    return _by_platform(fast, plain, *arguments)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _fast_mass_sums(
    axis: int, terms: Terms, centre: Callable[..., Array], *arguments: Any
) -> tuple[Array, Array]:
    # Hidden: what the sum of the exponentials takes as well would be kept.
    x, class_mask, shift, transform, q = _hidden(arguments)
    centred = centre(transform, x, shift, class_mask)
    if not q.ndim:
        mass_logit = safe_multiply(q, sum_classes(axis, centred))
        return q * x.shape[-1] + jnp.zeros_like(mass_logit), mass_logit
    mass_logit = sum_classes(axis, centred * q)
    by_class = jnp.broadcast_to(q, (*q.shape[:-1], x.shape[-1])).astype(mass_logit.dtype)
    mass = jnp.sum(by_class, -1, keepdims=True) + jnp.zeros_like(mass_logit)
    sums: tuple[Array, Array] = jax.lax.cond(
        jnp.all(jnp.isfinite(mass_logit)),
        lambda *_: (mass, mass_logit),
        lambda *arguments: sum_at_once(axis, terms(*arguments)),
        *arguments,
    )
    return sums


@_fast_mass_sums.defjvp
def _fast_mass_sums_jvp(
    axis: int, terms: Terms, centre: Callable[..., Array], primals: Any, tangents: Any
) -> tuple[Any, Any]:
    plain = functools.partial(_sums_of_terms, axis, terms, centre)
    return _fast_mass_sums(axis, terms, centre, *primals), jax.jvp(plain, primals, tangents)[1]


def is_inside(index: Array, axis: int, x: Array) -> Array:
    """Return where the class at the index is one of x."""
    return (index >= 0) & (index < x.shape[axis])


def _not_at(index: Array, x: Array, dtype: Any) -> Array:
    """0 where the last axis' class is the one at the index (..., 1), else 1."""
    distance = jnp.arange(x.shape[-1], dtype=dtype) - index.astype(dtype)
    return jnp.minimum(distance * distance, 1)


def _in_block(apart: Array, blocks: Array) -> tuple[Array, Array]:
    """Which block has the class apart, and where it is in there; -1 for none."""
    which = jnp.clip(apart, 0) // blocks.shape[2]
    return which, jnp.where(apart < 0, -1, apart - which * blocks.shape[2])


def _block_apart(apart: Array, blocks: Array, masks: Any) -> tuple[Array, Array, Array, Any]:
    """Return `_in_block` of the class apart, and that block with its mask."""
    which, inside = _in_block(apart.reshape(-1, 1), blocks)
    values, mask = _hidden((_take_block(blocks, which), _take_block(masks, which)))
    return which, inside, values, mask


def _put_together(blocks: Array, which: Array, again: Array, x: Array) -> Array:
    """Return the sum over all blocks, (..., 1), one of which is summed up again."""
    sums = jnp.where(
        jnp.arange(blocks.shape[1]) == which, sum_classes(-1, again), jnp.sum(blocks, -1)
    )
    return sum_classes(-1, sums).reshape(*x.shape[:-1], 1)


# Loops over few classes.


def is_last(axis: int, x: Array) -> bool:
    """Return whether it is the last axis."""
    return axis % x.ndim == x.ndim - 1


def _are_few(axis: int, x: Array) -> bool:
    """On a CPU, 16 classes on the last axis, and 24 on another, are still unrolled (jax 0.10.2)."""
    size = x.shape[axis]
    return isinstance(size, int) and size <= (16 if is_last(axis, x) else 24)


def _is_faster_in_one_loop(axis: int, x: Array, has_mass: bool) -> bool:
    return not meshes(x) and (_are_few(axis, x) or (has_mass and not is_last(axis, x)))


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
    return _by_platform(one_loop, one_by_one, x, *rest)


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


# What is kept, made again, or made once.


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
    the backward pass: for an H100 (jax 0.10.2), and on a CPU beside smoothing with a class_mask, a
    scale or a cap, 16 MB of a loss of (4096, 1000) float32 that needs 0.2 MB (jax 0.12.0.1).
    Without these it holds the exponentials, which it may (`_can_keep`) or not. Beside probabilities
    a CPU holds as much either way, and takes up to 1.4 times as long if x is hidden. It vectorizes
    the loop over few classes of another axis than the last only if it makes them again (jax
    0.10.2).
    """
    if _are_few(axis, x):
        hide_on_cpu = not is_last(axis, x)
    else:
        has_array = class_mask is not None or not transform.is_identity
        hide_on_cpu = is_smoothed and (has_array or not _can_keep(x))
    hide_elsewhere = has_mass or not transform.is_identity
    if not hide_on_cpu and not hide_elsewhere:
        return x, shift
    on_cpu: Callable[[Any], Any] = _hidden if hide_on_cpu else _same
    others: Callable[[Any], Any] = _hidden if hide_elsewhere else _same
    hidden: tuple[Array, Any] = _by_platform(on_cpu, others, (x, shift))
    return hidden


def _same(x: Any) -> Any:
    return x


@workaround(_same)
def once_per_row(values: R) -> R:
    """Return values of the rows, behind a barrier.

    A CPU fuses what makes a value of a row, a logarithm say, into the loop that uses it, and makes
    it again for each class: log_softmax of (4096, 1000) float32 takes 1.2 times as long (jax
    0.12.0.1).
    """
    return _hidden(values)


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


# A head's half-precision arrays.


def is_widened_on_cpu(dtype: Any) -> bool:
    """Return whether a CPU makes float32 copies of all that matmuls of the dtype read.

    Since jax 0.12 it does not, and has matmuls of bfloat16: a head's loss and gradients take 0.5 to
    0.7 of the time.
    """
    return jnp.finfo(dtype).bits <= 16 and jax.__version_info__ < (0, 12)


@workaround(lambda function, plan, on_cpu, *arguments: function(plan, *arguments))
def with_cpu_plan(function: Callable[..., R], plan: Any, on_cpu: Any, *arguments: Any) -> R:
    """Return `function(plan, *arguments)`, on a CPU of another plan.

    A CPU turns matmuls of half precision into float32 ones (jax 0.10.2, see `is_widened_on_cpu`);
    the plan for it reads slices of half precision by their bits, as `slice_of_bits` says.
    """
    cpu, default = (functools.partial(function, each) for each in (on_cpu, plan))
    return _by_platform(cpu, default, *arguments)


def take_slice(array: Array, start: Array, size: int, axis: int) -> Array:
    """Return this many entries of the axis, from the start on."""
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


@workaround(take_slice)
def slice_of_bits(array: Array, start: Array, size: int, axis: int) -> Array:
    """Return a slice of a half-precision array, on a CPU.

    It computes such a slice as one of float32, hoists the cast out of the loop and holds a float32
    copy of the array (jax 0.10.2). Bits are sliced as they are.
    """
    array, start = _hidden((array, start))
    bits = take_slice(jax.lax.bitcast_convert_type(array, jnp.uint16), start, size, axis)
    return _hidden(jax.lax.bitcast_convert_type(bits, array.dtype))


def add_slice(total: Array, part: Array, start: Array, axis: int) -> Array:
    """Return the total with the part added to a slice of it."""
    part += take_slice(total, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, part.astype(total.dtype), start, axis)


@workaround(add_slice)
def scatter_slice(total: Array, part: Array, start: Array, axis: int) -> Array:
    """Return the total with the part added to a slice of it, by a scatter.

    The transpose of `add_slice` writes to the total's cotangent, and copies it each time: a second
    reverse mode holds 1.14 times as much (jax 0.10.2 to 0.12.0.1).
    """
    dimensions = jax.lax.ScatterDimensionNumbers((0, 1), (), (axis,))
    return jax.lax.scatter_add(total, start[None], part.astype(total.dtype), dimensions)
